"""Endpoints: every way to fail, kills on the way, budgets, keys; and a real OpenAI-compatible server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from fault_server import KEY, KEY_ENV, KINDS, Proxy, Server, Upstream, http, usage
from generation_client import requests
from understudy.errors import InputError
from understudy.generation import (
    BudgetSpent,
    Endpoint,
    EndpointSource,
    FailedRequests,
    RefusedRequest,
    Request,
    RequestLog,
    SourceError,
    generate,
)

QUICK = {"backoff": 0.001, "longest_backoff": 0.01}
CHAT = ({"role": "user", "content": "hello there"},)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-ambient")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-ambient")


def source(url, **keys):
    return EndpointSource("toy", Endpoint(**{"url": url, "api_key_env": KEY_ENV, "timeout": 5.0, **keys}))


class Fixed(Server):
    """One answer to everything."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    async def answer(self, path, headers, body):
        return self.data


def test_text_and_chat_go_to_their_endpoints_with_what_was_asked():
    with Upstream() as up:
        s = source(up.url, extra={"top_k": 5})
        request = Request("say it", "a", max_tokens=7, temperature=0.5, top_p=0.9, stop=(" it",), log_probs=True)
        text = s.complete(request)
        assert (text.text, text.finish, text.log_prob) == ("answer to say", "stop", -0.75)
        assert (text.prompt_tokens, text.tokens) == usage("say it")
        assert s.complete(Request(CHAT, "b", log_probs=True)).log_prob == -0.75
        s.complete(Request("plain", "c", temperature=0.0))
    first, second, third = up.bodies
    assert first["max_tokens"] == 7 and first["stop"] == [" it"] and first["top_p"] == 0.9 and first["top_k"] == 5
    assert 0 <= first["seed"] < 2**31 and first["seed"] == int(request.key(s.name)[:7], 16)
    assert second["messages"] == list(CHAT) and "top_p" not in second and "presence_penalty" not in second
    assert "seed" not in third  # greedy needs none
    assert all("openai-organization" not in h for h in up.headers)


def test_no_key_is_sent_unless_named():
    with Upstream(key=None) as up:
        source(up.url, api_key_env=None).complete(Request("x", "a"))
    assert "authorization" not in up.headers[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("echo", [False, True])
def test_each_fault_is_tried_again_and_mended(kind, echo, tmp_path):
    if kind == "wrong id" and not echo:
        pytest.skip("a server that echoes no id cannot be caught at it")
    crew = 8 if echo else 1  # without an echoed id, a copy that overtakes its original cannot be told from it
    with Upstream(echo=echo) as up, Proxy(up, share=0.5, kinds=(kind,)) as proxy:
        s, asked = source(proxy.url), requests(40)
        with RequestLog(tmp_path / "log", s.name) as log:
            answers = generate(s, asked, log, concurrency=crew, retries=40, **QUICK)
    assert [a.text for a in answers] == [f"answer to {r.prompt}" for r in asked]
    assert proxy.met[kind] > 5


def test_a_hanging_server_is_a_time_out_and_a_closed_port_a_failed_connection():
    with Proxy(Upstream(), share=1.0, kinds=("hang",)) as proxy, pytest.raises(SourceError, match=r"within 0\.3 s"):
        source(proxy.url, timeout=0.3).complete(Request("x", "a"))
    with pytest.raises(SourceError, match="connection failed"):
        source(proxy.url).complete(Request("x", "a"))


@pytest.mark.parametrize(
    ("data", "kind", "says"),
    [
        (http(401, {"error": {"message": f"wrong key {KEY}"}}), InputError, f"the key in {KEY_ENV} was refused"),
        (http(404, {"error": {"message": "no such model"}}), InputError, "HTTP 404, no such model"),
        (http(402, {"detail": f"pay, {KEY}"}), InputError, r"HTTP 402, pay, \[key\]"),
        (http(429, {"error": {"code": "insufficient_quota", "message": "no money"}}), InputError, "no money"),
        (http(400, {"error": {"message": "too\nlong \x1b[31m"}}), RefusedRequest, r"HTTP 400, too long \[31m"),
        (http(422, {"detail": [{"loc": ["body"]}]}), RefusedRequest, "HTTP 422"),
        (http(503, b"<html>"), SourceError, "HTTP 503"),
        (http(200, b"[]"), SourceError, "not a JSON object"),
        (http(200, b"[" * 100_000), SourceError, "not JSON"),
        (http(200, {"choices": [{"text": None, "finish_reason": "stop"}]}), SourceError, "no text"),
        (http(200, {"choices": [{"text": "x"}]}), SourceError, "misses fields"),
        (http(200, {"choices": [{"text": "", "finish_reason": "content_filter"}]}), RefusedRequest, "filtered"),
        (http(200, {"choices": [{"text": "", "finish_reason": "stop"}], "usage": {"prompt_tokens": -1}}), SourceError, "counts"),
    ],
)  # fmt: skip
def test_each_bad_answer_is_one_line_without_the_key(data, kind, says):
    with Fixed(data) as server, pytest.raises(kind, match=says) as caught:
        source(server.url).complete(Request("x", "a"))
    line = str(caught.value)
    assert (
        type(caught.value) is kind
        and server.url in line
        and KEY not in line
        and "\n" not in line
        and "\x1b" not in line
    )
    assert KEY not in repr(vars(source(server.url)) | {"_client": None})


@pytest.mark.parametrize(("value", "wait"), [("0.25", 0.25), ("7", 7.0), ("-3", 0.0), ("nan", None), ("soon", None)])
def test_retry_after_is_read(value, wait):
    with Fixed(http(429, {}, [f"retry-after: {value}"])) as server, pytest.raises(SourceError) as caught:
        source(server.url).complete(Request("x", "a"))
    assert caught.value.wait == wait
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    with Fixed(http(503, {}, [f"retry-after: {date}"])) as server, pytest.raises(SourceError) as caught:
        source(server.url).complete(Request("x", "a"))
    assert 90 < caught.value.wait <= 100


def test_a_server_with_one_id_for_all_and_one_that_counts_nothing_are_usable(tmp_path):
    with Upstream(fixed_id="same", counts=False) as up:
        s = source(up.url)
        with RequestLog(tmp_path / "log", s.name) as log:
            answers = generate(s, requests(20), log, **QUICK)
            assert len(answers) == 20 and answers[0].tokens == 8  # the most it could have used
            assert log.prompt_tokens > sum(len(r.prompt.encode()) for r in requests(20))
            with pytest.raises(BudgetSpent):
                generate(s, requests(40), log, token_budget=log.prompt_tokens + log.tokens + 10, **QUICK)


def test_a_wrong_key_stops_at_once_and_refused_requests_are_told_together(tmp_path):
    with Upstream(key="other") as up:
        s = source(up.url)
        with RequestLog(tmp_path / "log", s.name) as log, pytest.raises(InputError, match="was refused"):
            generate(s, requests(200), log, concurrency=2)
        assert up.requests <= 4 and KEY not in (tmp_path / "log").read_text()
    with Fixed(http(400, {"error": "never"})) as server:
        s = source(server.url)
        with (
            RequestLog(tmp_path / "log2", s.name) as log,
            pytest.raises(FailedRequests, match="20 requests in a row") as e,
        ):
            generate(s, requests(200), log, concurrency=2)
        assert 20 <= server.requests <= 22 and set(e.value.failed) <= {r.id for r in requests(200)}


@pytest.mark.slow
def test_ten_thousand_requests_with_faults_and_two_kills(tmp_path):
    """Each prompt is answered once in the log; a kill costs at most the answers in flight; the budget holds."""
    number, crew = 10_000, 8
    asked = requests(number)
    total = sum(sum(usage(r.prompt)) for r in asked)
    budget, path, kills = total + 4_000, tmp_path / "run" / "log.jsonl", 0
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{tests.parent / 'src'}:{tests}"}
    with Upstream(echo=True) as up, Proxy(up, share=0.3, hangs=12) as proxy:
        command = [sys.executable, str(tests / "generation_client.py"), proxy.url, str(path), str(number), str(crew)]
        for kill_at in (0.3, 0.65, None):
            client = subprocess.Popen([*command, str(budget)], env=env, stderr=subprocess.PIPE)
            size = 230 * number * kill_at if kill_at else None
            while client.poll() is None:
                if size and path.exists() and path.stat().st_size > size:
                    client.send_signal(signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.005)
            error = client.communicate()[1].decode()
            assert client.returncode == (-signal.SIGKILL if size else 0), error
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    written = {line["id"]: line for line in lines}
    assert len(lines) == len(written) == number and kills == 2
    assert all(written[r.id]["text"] == f"answer to {r.prompt}" for r in asked)
    assert sum(line["prompt_tokens"] + line["tokens"] for line in lines) == total <= budget
    # An answer that reached the client was paid for once, but for those that a kill took on their way to the log.
    assert sum(proxy.delivered.values()) <= number + kills * crew
    assert max(proxy.delivered.values()) <= 1 + kills
    faults = sum(n for kind, n in proxy.met.items() if kind)
    assert set(KINDS) | {"hang"} <= set(proxy.met) and 0.27 < faults / proxy.requests < 0.33
    assert proxy.most_in_flight <= crew + 12  # hangs of clients that are gone stay open here
    for file in (tmp_path / "run").rglob("*"):
        assert KEY.encode() not in file.read_bytes()


@pytest.mark.slow
def test_a_real_server(tmp_path):
    """`transformers serve`, which many people have: text and chat, greedy as the model itself writes."""
    pytest.importorskip("fastapi")
    from understudy.data import train_tokenizer
    from understudy.generation import LocalSource, source_from
    from understudy.models import load_causal_lm
    from understudy.runs.recipe import ModelSpec

    words = train_tokenizer(["the cat sat on the mat and the dog ran away. " * 40], 300)
    words.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}<s>assistant:"
    model = load_causal_lm("llama:hidden=32,layers=1,heads=2", tokenizer=words)
    model.generation_config.do_sample = True  # this server samples where the model's own settings say so
    model.save_pretrained(tmp_path / "toy")
    words.save_pretrained(tmp_path / "toy")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(tmp_path / "toy"), "--device", "cpu"]
    with open(tmp_path / "server.log", "wb") as out:
        server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=out, stderr=out)
    try:
        until = time.time() + 200
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
                break
            except OSError:
                assert server.poll() is None and time.time() < until, (tmp_path / "server.log").read_text()[-2000:]
                time.sleep(0.3)
        spec = ModelSpec(model=str(tmp_path / "toy"), endpoint=f"http://127.0.0.1:{port}/v1")
        served, local = source_from(spec), LocalSource(model, words, "toy")
        plain = Request(CHAT, "chat", max_tokens=6, temperature=0.0)
        asked = [plain, *(Request(CHAT, f"d/{i}", draw=i, max_tokens=6) for i in range(4))]
        with RequestLog(tmp_path / "log", served.name) as log:
            answers = generate(served, asked, log, concurrency=2)
        assert answers[0].text == local.complete(plain).text and answers[0].finish == "length"
        assert answers[0].tokens == 6 and answers[0].prompt_tokens == local.complete(plain).prompt_tokens
        assert len({a.text for a in answers[1:]}) > 1  # draws differ
        text = Request("<s>the cat", "t", max_tokens=5, temperature=0.0)
        here = Request("the cat", "t", max_tokens=5, temperature=0.0)  # this server adds no BOS of its own
        assert served.complete(text).text == local.complete(here).text
    finally:
        server.terminate()
        server.wait(20)
