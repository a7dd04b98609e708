"""HTTP to an OpenAI-compatible server, with every response bounded in time and size."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from functools import cache
from typing import Any

from understudy.errors import InputError
from understudy.generation.limits import Endpoint

ERROR_BYTES = 2**16  # read of a response with an error status: its beginning has the reason
_most_bytes: ContextVar[int] = ContextVar("_most_bytes")
_starting = threading.Lock()


class Transport:
    """Sends a JSON body and reads the response within the endpoint's timeout, from the first byte to the last.

    The openai client applies its timeout to single reads, so a server that sends a byte now and then never times out,
    and it reads responses of any size. Here the whole exchange runs in an event loop that cancels it at the deadline,
    and the body is read up to a maximum size. Nothing is decompressed and no redirect is followed.

    Args:
        endpoint: address and timeout.

    Raises:
        InputError: the extra is not installed, or the key or the URL is invalid.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.timeout = endpoint.timeout
        self._client, self._headers = _client(endpoint)
        weakref.finalize(self, _close, self._client)

    def post(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str], most: int) -> tuple[bytes, Any]:
        """Send a body.

        Args:
            path: `/completions`, `/chat/completions`, or a full URL of the server.
            most: largest response in bytes.

        Returns:
            The body and the headers of the response.

        Raises:
            TimeoutError: the response is not complete within the timeout.
            OpenAIError: any other failure.
        """
        return asyncio.run_coroutine_threadsafe(self._post(path, dict(body), dict(headers), most), _loop()).result()

    async def _post(self, path: str, body: dict[str, Any], headers: dict[str, str], most: int) -> tuple[bytes, Any]:
        _most_bytes.set(most)
        # The last header makes openai's client leave the body unread.
        sent = {**self._headers, "Accept-Encoding": "identity", **headers, "X-Stainless-Raw-Response": "true"}
        async with asyncio.timeout(self.timeout):
            raw = await self._client.post(path, cast_to=object, body=body, options={"headers": sent})
            return raw.content, raw.headers


def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all requests of this process. The lock is needed: `cache` alone lets two threads make one each,
    and a connection that was opened in one loop fails in the other."""
    with _starting:
        return _started()


@cache
def _started() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="understudy-http").start()
    return loop


def _close(client: Any) -> None:
    asyncio.run_coroutine_threadsafe(client.close(), _loop())


@cache
def _bounded() -> Any:
    """openai's HTTP client with a maximum response size."""
    import openai

    class Bounded(openai.DefaultAsyncHttpxClient):  # type: ignore[misc]
        async def send(self, request: Any, **options: Any) -> Any:
            response = await super().send(request, **{**options, "stream": True})
            try:
                data = await _read(response)
            finally:
                await response.aclose()
                self.cookies.clear()  # a server could add cookies without end
            return type(response)(response.status_code, headers=response.headers, content=data, request=request)

    async def _read(response: Any) -> bytes:
        failed = not response.is_success
        most, encoding = _most_bytes.get(), response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            if failed:
                del response.headers["content-encoding"]
                return b""
            raise openai.OpenAIError(f"it is encoded as {encoding!r}, which was not asked for")
        data = bytearray()
        async for part in response.aiter_raw():
            data += part
            if failed and len(data) >= ERROR_BYTES:
                break
            if not failed and len(data) > most:
                raise openai.OpenAIError(f"it exceeds the {most} bytes that such an answer can have")
        return bytes(data[:ERROR_BYTES] if failed else data)

    return Bounded


def _client(endpoint: Endpoint) -> tuple[Any, dict[str, Any]]:
    """The client, and the headers that it must omit."""
    try:
        import openai
    except ImportError:
        raise InputError("A served model needs the extra: pip install understudy[served].") from None
    key = "none"
    if endpoint.api_key_env is not None:
        key = os.environ.get(endpoint.api_key_env, "").strip()
        if not key:
            raise InputError(
                f"{endpoint.address}: environment variable {endpoint.api_key_env} is not set; it holds the key."
            )
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"{endpoint.address}: {endpoint.api_key_env} holds characters that no key has.")
    http = _bounded()(timeout=endpoint.timeout, follow_redirects=False)
    client = openai.AsyncOpenAI(base_url=endpoint.address, api_key=key, max_retries=0, timeout=endpoint.timeout, http_client=http)  # fmt: skip
    # The client would read these from the environment and send them to any server.
    names = ["OpenAI-Organization", "OpenAI-Project"] + ["Authorization"] * (endpoint.api_key_env is None)
    return client, {name: openai.Omit() for name in names}
