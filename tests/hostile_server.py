"""A server that stands before an honest one and spoils its answers, each mode in a way of its own."""

import asyncio
import gzip
import json

from fault_server import Server, http

HUGE = 10**400
BIG = 2**16


def raw(head, body=b""):
    """An answer whose headers are given in full."""
    return head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body


async def drip(data, pause=0.05):
    """One byte at a time, each before a single read would time out."""
    for byte in data:
        yield bytes([byte])
        await asyncio.sleep(pause)


async def endless(head, part=b" " * BIG):
    """A head, and a body that never ends."""
    yield head
    while True:
        yield part
        await asyncio.sleep(0)


async def chunks(*parts):
    for part in parts:
        yield part


async def never():
    await asyncio.sleep(3600)
    yield b""


def body_of(whole):
    return whole.partition(b"\r\n\r\n")[2]


def bomb(layers):
    """What becomes 1 GiB when it is decompressed, as long as a second at the most takes to make."""
    data = gzip.compress(b" " * 2**24) * 64
    for _ in range(layers - 1):
        data = gzip.compress(data)
    return data


def encoded(data, *names):
    return http(200, data, [f"content-encoding: {', '.join(names)}"])


BOMB, BOMB2 = bomb(1), bomb(2)
OK, HEAD = "HTTP/1.1 200 x\ncontent-type: application/json", raw("HTTP/1.1 200 x\ncontent-type: application/json")
CHUNKED = raw("HTTP/1.1 200 x\ntransfer-encoding: chunked")
FINAL, PASSING, HARMLESS = "final", "passing", "harmless"

# By name: what it comes to, and the answer that is sent in place of the honest one.
# FINAL: an error at once. PASSING: an error after all attempts, and the right answer once the server is honest again.
# HARMLESS: the right answer.
WIRE = {
    "status 500": (PASSING, lambda whole: http(500, {"error": {"message": "oops"}})),
    "status 503 in html": (PASSING, lambda whole: http(503, b"<html>\x00\xff")),
    "status 429": (PASSING, lambda whole: http(429, {}, ["retry-after: 0"])),
    "status 429, bad wait": (PASSING, lambda whole: http(429, {}, ["retry-after: Mon, 99 Foo 99999 99:99:99 +9999"])),
    "status 429, endless wait": (PASSING, lambda whole: http(429, {}, ["retry-after: 1e400"])),
    "status 429, a day's wait": (FINAL, lambda whole: http(429, {}, ["retry-after: 86400"])),
    "status 408": (PASSING, lambda whole: http(408, b"")),
    "status 204": (PASSING, lambda whole: raw("HTTP/1.1 204 x")),
    "status 401": (FINAL, lambda whole: http(401, {"error": "no"})),
    "status 404": (FINAL, lambda whole: http(404, {"error": {"message": ["no", {"such": "model"}]}})),
    "status 999": (PASSING, lambda whole: http(999, b"")),
    "status of four digits": (PASSING, lambda whole: raw("HTTP/1.1 2000 x")),
    "deep error": (PASSING, lambda whole: http(500, b'{"error":' + b"[" * 30_000)),
    "error of many levels": (PASSING, lambda whole: http(500, b'{"error":' * 900 + b"1" + b"}" * 900)),
    "redirect elsewhere": (FINAL, lambda whole: http(307, b"", ["location: http://203.0.113.7/v1/completions"])),
    "redirect to itself": (FINAL, lambda whole: http(308, b"", ["location: /v1/completions"])),
    "redirect to nowhere": (FINAL, lambda whole: http(302, b"")),
    "no HTTP": (PASSING, lambda whole: chunks(b"\x16\x03\x01 hello\r\n\r\n")),
    "hangs up": (PASSING, lambda whole: None),
    "cut body": (PASSING, lambda whole: (whole[:-7], False)),
    "cut head": (PASSING, lambda whole: (whole[:20], False)),
    "length too short": (PASSING, lambda whole: raw(f"{OK}\ncontent-length: 9", body_of(whole))),
    "length negative": (PASSING, lambda whole: raw(f"{OK}\ncontent-length: -9", body_of(whole))),
    "length huge": (PASSING, lambda whole: (raw(f"{OK}\ncontent-length: {HUGE}", body_of(whole)), False)),
    "two lengths": (PASSING, lambda whole: raw(f"{OK}\ncontent-length: 9\ncontent-length: 10", body_of(whole))),
    "bad chunk": (PASSING, lambda whole: CHUNKED + b"zz\r\n"),
    "never answers": (PASSING, lambda whole: never()),
    "slow body": (PASSING, lambda whole: drip(raw(OK + "\ncontent-length: 999", body_of(whole)))),
    "slow head": (PASSING, lambda whole: drip(raw("HTTP/1.1 200 x\nx: " + "y" * 999))),
    "slow error": (PASSING, lambda whole: drip(raw("HTTP/1.1 500 x\ncontent-length: 999", b" " * 999))),
    "endless body": (PASSING, lambda whole: endless(HEAD)),
    "endless chunks": (PASSING, lambda whole: endless(CHUNKED, b"%x\r\n%s\r\n" % (BIG, b"[" * BIG))),
    "endless error": (PASSING, lambda whole: endless(raw("HTTP/1.1 500 x"))),
    "endless head": (PASSING, lambda whole: endless(b"HTTP/1.1 200 x\r\n", b"a: b\r\n" * 9)),
    "endless head line": (PASSING, lambda whole: endless(b"HTTP/1.1 200 x\r\na: ", b"b" * BIG)),
    "endless continue": (PASSING, lambda whole: endless(b"", b"HTTP/1.1 100 x\r\n\r\n")),
    "gzip": (PASSING, lambda whole: encoded(gzip.compress(body_of(whole)), "gzip")),
    "gzip bomb": (PASSING, lambda whole: encoded(BOMB, "gzip")),
    "gzip of a gzip bomb": (PASSING, lambda whole: encoded(BOMB2, "gzip", "gzip")),
    "encoding unknown": (PASSING, lambda whole: http(200, body_of(whole), ["content-encoding: rot13"])),
    "error encoded": (PASSING, lambda whole: http(500, b"zz", ["content-encoding: gzip"])),
    "latin-1": (PASSING, lambda whole: http(200, body_of(whole).replace(b'{"id"', b'{"\xe9": 1, "id"'))),
    "utf-16": (HARMLESS, lambda whole: http(200, body_of(whole).decode().encode("utf-16"))),
    "byte order mark": (HARMLESS, lambda whole: http(200, b"\xef\xbb\xbf" + body_of(whole))),
    "charset of another": (HARMLESS, lambda whole: raw(f"HTTP/1.1 200 x\ncontent-type: text/html; charset=utf-7\ncontent-length: {len(body_of(whole))}", body_of(whole))),
    "no content type": (HARMLESS, lambda whole: chunks(raw("HTTP/1.1 200 x"), body_of(whole))),
    "cookies": (HARMLESS, lambda whole: http(200, body_of(whole), [f"set-cookie: c{i}={'x' * 999}" for i in range(50)])),
    "not JSON": (PASSING, lambda whole: http(200, b"data: [DONE]")),
    "deep JSON": (PASSING, lambda whole: http(200, b"[" * 100_000)),
    "a list": (PASSING, lambda whole: http(200, b"[]")),
    "null": (PASSING, lambda whole: http(200, b"null")),
    "5000 digits": (PASSING, lambda whole: http(200, b'{"id": ' + b"9" * 5000 + b"}")),
}  # fmt: skip


def paths(value, place=()):
    """Every place inside a JSON value."""
    yield place
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from paths(value[key], (*place, key))


def replaced(value, place, new):
    """A copy of a JSON value with something else at a place; `dict.pop` and `list.append` change what is there."""
    copy = json.loads(json.dumps(value))
    if not place:
        return new
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return copy


class Hostile(Server):
    """Spoils the answers of an honest server.

    Args:
        spoil: from the honest answer's bytes to what is sent. times: how many answers it spoils before it is honest.
    """

    def __init__(self, honest, spoil, times=10**9):
        super().__init__()
        self.honest, self.spoil, self.left = honest, spoil, times

    async def answer(self, path, headers, body):
        whole = await self.honest.answer(path, headers, body)
        if self.left <= 0:
            return whole
        self.left -= 1
        return self.spoil(whole)
