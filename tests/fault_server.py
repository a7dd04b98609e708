"""An OpenAI-compatible server of raw asyncio on loopback, and a proxy before it that breaks a share of the replies."""

import asyncio
import json
import random
import threading
from collections import Counter

KINDS = ("429", "500", "500 after", "cut", "cut early", "malformed", "missing", "several", "duplicate", "wrong id")
KEY_ENV, KEY = "UNDERSTUDY_TEST_KEY", "sk-test-4f1d9c-never-in-a-file"


def usage(prompt):
    """What a prompt costs here: (prompt tokens, written tokens)."""
    return len(prompt.split()), 3 + len(prompt) % 5


def http(status, body, headers=()):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} x", "content-type: application/json", f"content-length: {len(data)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


class Server:
    """A loopback server in a thread; `answer(path, headers, body)` returns bytes, or `None` to hang up, or an asynchronous
    iterator of parts after which it hangs up."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.requests = self.sent = 0
        self.in_flight = self.most_in_flight = 0

    def __enter__(self):
        ready = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self.thread.start()
        assert ready.wait(10)
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    def _run(self, ready):
        asyncio.set_event_loop(self.loop)
        server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self.loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()

    async def _serve(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.requests += 1
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    answer = await self.answer(head[0].split()[1], headers, json.loads(body))
                finally:
                    self.in_flight -= 1
                if hasattr(answer, "__aiter__"):
                    async for part in answer:
                        writer.write(part)
                        await writer.drain()
                        self.sent += len(part)
                    return
                data, whole = answer if isinstance(answer, tuple) else (answer, True)
                if data:
                    writer.write(data)
                    await writer.drain()
                if not data or not whole:
                    return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


class Upstream(Server):
    """Answers "answer to PROMPT". `echo`: replies carry the request's X-Request-ID, as `transformers serve` does."""

    def __init__(self, key=KEY, echo=False, fixed_id=None, delay=0.0, counts=True):
        super().__init__()
        self.key, self.echo, self.fixed_id, self.delay, self.counts = key, echo, fixed_id, delay, counts
        self.paid = Counter()
        self.bodies = []
        self.headers = []

    async def answer(self, path, headers, body):
        if self.delay:
            await asyncio.sleep(self.delay)
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return http(401, {"error": {"message": f"bad key {headers.get('authorization')}"}})
        return http(200, *self.reply(path, headers, body))

    def reply(self, path, headers, body):
        chat = path.endswith("/chat/completions")
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        self.paid[prompt] += 1
        if len(self.bodies) < 100:
            self.bodies.append(body)
            self.headers.append(headers)
        mark = headers.get("x-request-id", "")
        text = f"answer to {prompt}"
        content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        used = dict(zip(("prompt_tokens", "completion_tokens"), usage(prompt), strict=True))
        name = self.fixed_id or (mark if self.echo else f"cmpl-{sum(self.paid.values())}")
        choice = {"index": 0, "finish_reason": "stop", **content}
        if body.get("logprobs"):
            parts = [-0.5, -0.25]
            choice["logprobs"] = {"content": [{"logprob": v} for v in parts]} if chat else {"token_logprobs": parts}
        reply = {"id": name, "choices": [choice]} | ({"usage": used} if self.counts else {})
        return reply, ([f"x-request-id: {mark}"] if self.echo else [])


class Proxy(Server):
    """Before an upstream (called directly, so that ten thousand requests stay quick). Faults are seeded.

    Args:
        share: of requests that meet a fault. kinds: which faults; `hang` never answers, and is drawn `hangs` times.
    """

    def __init__(self, upstream, share=0.3, kinds=KINDS, hangs=0, seed=0):
        super().__init__()
        self.upstream, self.share, self.kinds, self.hangs = upstream, share, kinds, hangs
        self.random = random.Random(seed)
        self.met = Counter()
        self.delivered = Counter()
        self.last = None

    async def answer(self, path, headers, body):
        kind = None
        if self.random.random() < self.share:
            kind = self.random.choice(self.kinds)
            if self.hangs and self.random.random() < 0.02:
                kind, self.hangs = "hang", self.hangs - 1
        if kind == "duplicate" and self.last is None:
            kind = "500"
        self.met[kind] += 1
        if kind == "429":
            return http(429, {"error": {"message": "slow down"}}, ["retry-after: 0"])
        if kind == "500":
            return http(500, {"error": {"message": "oops"}})
        if kind == "hang":
            await asyncio.sleep(3600)
        if kind == "cut early":
            return None
        if kind == "duplicate":
            return self.last
        if kind == "wrong id":
            headers = {**headers, "x-request-id": "understudy-" + "0" * 32}
        whole = await self.upstream.answer(path, headers, body)
        if kind is None:
            self.last = whole
            self.delivered[str(body.get("prompt") or body["messages"][-1]["content"])] += 1
            return whole
        return self.broken(kind, whole)

    def broken(self, kind, whole):
        reply = json.loads(whole.partition(b"\r\n\r\n")[2])
        if kind == "500 after":
            return http(500, {"error": {"message": "lost it"}})
        if kind == "cut":
            return whole[: len(whole) - 7], False
        if kind == "malformed":
            return http(200, json.dumps(reply).encode()[:-9])
        if kind == "missing":
            return http(200, {k: v for k, v in reply.items() if k != "choices"})
        if kind == "several":
            return http(200, {**reply, "choices": reply["choices"] * 2})
        return whole  # wrong id
