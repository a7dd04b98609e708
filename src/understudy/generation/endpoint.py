"""A source behind HTTP: any OpenAI-compatible server. Failures are temporary, final, or specific to a request."""

from __future__ import annotations

import email.utils
import hashlib
import json
import math
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal

from understudy.errors import InputError
from understudy.generation.limits import MOST_TOKENS, Endpoint
from understudy.generation.request import Completion, RefusedRequest, Request, SourceError, cut
from understudy.generation.transport import Transport

PASSING = {408, 409, 425, 429}  # and 5xx
OF_THE_REQUEST = {400, 413, 414, 422}
MARK = "understudy-"
ANSWER_BYTES = 2**20  # most bytes of a response apart from its tokens
TOKEN_BYTES = 2**12  # most bytes of a response for each token, with the log-probabilities of alternatives
SAME = 16  # responses with one and the same id after which a server's ids are ignored


def served_name(model: str, endpoint: Endpoint) -> str:
    """What answers depend on: the model and further fields of its requests, not the address it is served at."""
    return f"served {model}" + (f" {json.dumps(endpoint.extra, sort_keys=True)}" if endpoint.extra else "")


class Client:
    """A client of one server: sends a JSON body, returns a JSON object, and maps every failure to one of three
    exceptions.

    The key is read from the environment variable that the endpoint names, given to the HTTP client, and kept nowhere
    else; without such a name no key is sent.

    Every attempt has its own `X-Request-ID`. A response with the id of another attempt, or a second response with the
    same id, belongs to another request and counts as failed; servers that give all responses one id are recognised. (If
    a server echoes no id, a duplicate that arrives before its original cannot be detected.)

    Args:
        model: the server's name of the model.
        endpoint: address and options of the server.
    """

    def __init__(self, model: str, endpoint: Endpoint) -> None:
        self.model, self.endpoint = model, endpoint
        self.name, self.url = served_name(model, endpoint), endpoint.address
        self._transport = Transport(endpoint)
        self._lock = threading.Lock()
        self._seen: set[bytes] = set()
        self._first = b""
        self._repeats = 0

    def post(
        self, path: str, body: Mapping[str, Any], most: int = ANSWER_BYTES
    ) -> tuple[dict[str, Any], Callable[[], None]]:
        """Send a body. Returns the response, and a function to call once the response is parsed, which checks that it
        belongs to this request.

        Args:
            path: `/completions`, `/chat/completions`, or a full URL of the server.
            most: largest response in bytes.

        Raises:
            SourceError: another attempt may succeed.
            RefusedRequest: this body can never succeed.
            InputError: no request can succeed.
        """
        import openai

        mark = MARK + uuid.uuid4().hex
        try:
            data, headers = self._transport.post(path, body, {"X-Request-ID": mark}, most)
        except (TimeoutError, openai.APITimeoutError):
            raise SourceError(self._say(f"no answer within {self.endpoint.timeout:g} s")) from None
        except openai.APIStatusError as error:
            raise self._status(error) from None
        except openai.APIConnectionError as error:
            raise SourceError(self._say(f"connection failed ({error.__cause__ or error})")) from None
        except openai.OpenAIError as error:
            raise SourceError(self._say(f"unreadable answer ({error})")) from None
        try:
            reply = json.loads(data)
        except (ValueError, RecursionError):
            raise SourceError(self._say("the answer is not JSON")) from None
        if not isinstance(reply, dict):
            raise SourceError(self._say("the answer is not a JSON object"))
        return reply, lambda: self._own(mark, headers.get("x-request-id"), reply.get("id"), data)

    def _own(self, mark: str, header: str | None, name: Any, data: bytes) -> None:
        """Raise an error for a response that belongs to another attempt."""
        for given in (header, name):
            if isinstance(given, str) and MARK in given and mark not in given:
                raise SourceError(self._say("the answer belongs to another request"))
        if not isinstance(name, str) or not name:
            return
        short = hashlib.sha256(name.encode(errors="surrogatepass")).digest()  # an id may be very long
        with self._lock:
            if short in self._seen:
                # A server that gives all responses one id never sends a second id, and soon another text under it.
                one_for_all = len(self._seen) == 1 and (data != self._first or self._repeats >= SAME)
                if not one_for_all:
                    self._repeats += 1
                    raise SourceError(self._say("the answer repeats an earlier one"))
            elif not self._seen:
                self._first = data
            self._seen.add(short)

    def _status(self, error: Any) -> Exception:
        """The exception for an HTTP status."""
        status, reason = int(error.status_code), f"HTTP {error.status_code}"
        said = _message(error.body)
        env = self.endpoint.api_key_env
        if status in (401, 403):
            key = f"the key in {env} was refused" if env else "a key is needed: name its variable with api_key_env"
            return InputError(self._say(f"{reason}, {key}"))
        said = f"{reason}, {said}" if said else reason
        if status == 429 and "insufficient_quota" in error.response.text:
            return InputError(self._say(said))
        if 300 <= status < 400:
            place = error.response.headers.get("location", "nowhere")
            return InputError(self._say(f"{reason}, the server sends elsewhere ({place}): give the URL that answers"))
        if status in PASSING or status >= 500:
            return SourceError(self._say(said), _wait(error.response.headers))
        if status in OF_THE_REQUEST:
            return RefusedRequest(self._say(said))
        return InputError(self._say(f"{said} (model {self.model!r}: check it and the URL)"))

    def _say(self, reason: str) -> str:
        """One line with the URL; text from the server is stripped of control characters and of the key."""
        key = os.environ.get(self.endpoint.api_key_env or "", "")
        reason = reason.replace(key, "[key]") if key else reason
        line = "".join(c if c.isprintable() else " " for c in reason)
        return f"{self.url}: {' '.join(line.split())[:300]}"


class EndpointSource(Client):
    """Completions over HTTP: `/completions` for a text prompt, `/chat/completions` for messages.

    If a server does not count tokens, the largest number that the request could have used is charged.
    """

    def complete(self, request: Request) -> Completion:
        """Generate one completion.

        Raises:
            SourceError: another attempt may succeed.
            RefusedRequest: this request can never succeed.
            InputError: no request can succeed.
        """
        chat = not isinstance(request.prompt, str)
        path = "/chat/completions" if chat else "/completions"
        most = ANSWER_BYTES + TOKEN_BYTES * request.max_tokens
        reply, check_own = self.post(path, {**self._prompt(request), **self._body(request)}, most)
        completion = self._read(request, reply, chat)
        check_own()
        return completion

    def _prompt(self, request: Request) -> dict[str, Any]:
        if isinstance(request.prompt, str):
            return {"model": self.model, "prompt": request.prompt}
        return {"model": self.model, "messages": [dict(m) for m in request.prompt]}

    def _body(self, request: Request) -> dict[str, Any]:
        """The other fields; those at their default are left out, since servers refuse fields that they do not know."""
        chat = not isinstance(request.prompt, str)
        body: dict[str, Any] = {self.endpoint.max_tokens_name: request.max_tokens, "temperature": request.temperature}
        for name, default in (("top_p", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
            if getattr(request, name) != default:
                body[name] = getattr(request, name)
        if request.stop:
            body["stop"] = list(request.stop)
        if request.log_probs:
            body["logprobs"] = True if chat else 1
        if self.endpoint.seed and request.temperature > 0:
            body["seed"] = int(request.key(self.name)[:7], 16)
        return body | self.endpoint.extra

    def _read(self, request: Request, reply: Mapping[str, Any], chat: bool) -> Completion:
        try:
            (choice,) = reply["choices"]
            text = choice["message"]["content"] if chat else choice["text"]
            reason = choice["finish_reason"]
        except (KeyError, TypeError, ValueError):
            raise SourceError(self._say("the answer misses fields, or holds several for one prompt")) from None
        if reason == "content_filter" or (chat and isinstance(choice["message"].get("refusal"), str)):
            raise RefusedRequest(self._say(f"the server filtered the answer to request {request.id}"))
        if text is None and reason == "length":
            text = ""  # all tokens were spent on reasoning
        if not isinstance(text, str) or not isinstance(reason, str):
            raise SourceError(self._say("the answer holds no text or no reason to end"))
        log_prob = self._log_prob(choice, chat, text) if request.log_probs else None
        text, stopped = cut(text, request.stop)
        finish: Literal["stop", "length"] = "length" if reason == "length" and not stopped else "stop"
        return Completion(text, finish, log_prob, *self._usage(request, reply))

    def _usage(self, request: Request, reply: Mapping[str, Any]) -> tuple[int, int]:
        if not isinstance(reply.get("usage"), Mapping):
            return request.most_tokens()
        counts = spent(reply)
        if counts is None:
            raise SourceError(self._say("the answer's usage holds no counts of tokens"))
        return counts

    def _log_prob(self, choice: Mapping[str, Any], chat: bool, text: str) -> float | None:
        given = choice.get("logprobs")
        if given is None:
            return None
        try:
            values = [t["logprob"] for t in given["content"]] if chat else given["token_logprobs"]
            tokens = [t.get("token") for t in given["content"]] if chat else given.get("tokens")
            total = math.fsum(_log_probability(v) for v in values if v is not None)
            others = bool(text) and (not values or not _spell(tokens, len(values), text))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise SourceError(self._say("the answer's log-probabilities cannot be read")) from None
        if others:
            raise SourceError(self._say("the answer's log-probabilities are of other tokens than its text"))
        return total


def spent(reply: Mapping[str, Any]) -> tuple[int, int] | None:
    """The (prompt, generated) tokens in a server's usage, or `None` without usage."""
    usage = reply.get("usage")
    if not isinstance(usage, Mapping):
        return None
    prompt, written = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MOST_TOKENS for n in (prompt, written)):
        return None
    return prompt, written  # type: ignore[return-value]


def number(value: Any) -> float:
    """A finite number from a JSON response.

    Raises:
        ValueError: any other value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"no finite number: {type(value).__name__}")
    return float(value)


def _log_probability(value: Any) -> float:
    found = number(value)
    if found > 1e-3:  # tolerance for rounding
        raise ValueError("a probability above 1")
    return found


def _spell(tokens: Any, count: int, text: str) -> bool:
    """Whether tokens can be those of a text, by its ASCII letters and digits: servers differ in how they show blanks
    and bytes."""
    if tokens is None or None in tokens:
        return True  # the server does not provide it
    if len(tokens) != count:
        return False
    joined = "".join(tokens)
    return any(mark in joined for mark in ("token_id:", "bytes:", "\\x")) or _letters(text) in _letters(joined)


def _letters(text: str) -> str:
    return "".join(c for c in text if c.isascii() and c.isalnum())


def _message(body: Any) -> str:
    """The reason in the body of an error, in the forms that servers use."""
    while isinstance(body, Mapping):
        body = next((body[k] for k in ("message", "error", "detail") if body.get(k)), "")
    try:
        return body if isinstance(body, str) else json.dumps(body) if body else ""
    except RecursionError:
        return ""


def _wait(headers: Any) -> float | None:
    """Seconds given by `Retry-After`: a number or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
