"""Hostile servers, for text and for scores: the right answer, or one line, soon, and in little memory."""

import json
import math
import resource
import time

import pytest
import torch

from fault_server import Upstream, http
from hostile_server import FINAL, HARMLESS, HUGE, PASSING, WIRE, Hostile, body_of, paths, replaced
from scoring_server import Scorer
from served_cases import made, opened, recipe, sides
from understudy import InputError
from understudy.cli import main
from understudy.generation import Endpoint, EndpointSource, FailedRequests, Request, RequestLog, SourceError, generate
from understudy.teachers import ServedTeacher
from understudy.teachers.server.scores import Score

ATTEMPTS, PATIENT = 3, 9  # at a server that never mends; and where an honest answer may be late on a busy machine
QUICK = {"timeout": 0.4, "retries": ATTEMPTS - 1, "backoff": 0.001, "longest_backoff": 0.01, "concurrency": 1}
SECONDS, MEMORY, SENT = 10, 300 * 2**20, 32 * 2**20
CHAT = ({"role": "user", "content": "say it"},)
ASKED = [Request("say it", "text", log_probs=True), Request(CHAT, "chat", log_probs=True)]


def spoiled(change):
    """A mode that changes the JSON of the honest answer."""
    return lambda whole: http(200, json.dumps(change(json.loads(body_of(whole)))).encode())


def choice(**fields):
    return spoiled(lambda r: {**r, "choices": [c | fields for c in r["choices"]]})


def used(**fields):
    return spoiled(lambda r: {**r, "usage": r["usage"] | fields})


def log_probs(change):
    """A mode that changes the list of log-probabilities, in text and chat alike."""

    def changed(reply):
        (one,) = reply["choices"]
        held = one["logprobs"]
        if "content" in held:
            held["content"] = [{"logprob": v} for v in change([t["logprob"] for t in held["content"]])]
        else:
            held["token_logprobs"] = change(held["token_logprobs"])
        return reply

    return spoiled(changed)


def named(*tokens):
    """A mode in which the log-probabilities are of these tokens."""

    def changed(reply):
        (one,) = reply["choices"]
        parts = [-0.5] * len(tokens)
        chat = "message" in one
        listed = [{"token": t, "logprob": v} for t, v in zip(tokens, parts, strict=True)]
        one["logprobs"] = {"content": listed} if chat else {"token_logprobs": parts, "tokens": list(tokens)}
        return reply

    return spoiled(changed)


TEXT = {
    "no choices": (PASSING, spoiled(lambda r: {**r, "choices": []})),
    "two choices": (PASSING, spoiled(lambda r: {**r, "choices": r["choices"] * 2})),
    "choices as a text": (PASSING, spoiled(lambda r: {**r, "choices": "x"})),
    "an error in a 200": (PASSING, spoiled(lambda r: {"error": {"message": "overloaded"}})),
    "no text": (PASSING, choice(text=None, message={"content": None})),
    "text as a list": (PASSING, choice(text=["x"], message={"content": [{"type": "text", "text": "x"}]})),
    "no reason": (PASSING, choice(finish_reason=None)),
    "count of 400 digits": (PASSING, used(prompt_tokens=HUGE)),
    "count beyond belief": (PASSING, used(completion_tokens=10**12)),
    "count infinite": (PASSING, used(completion_tokens=math.inf)),
    "count true": (PASSING, used(completion_tokens=True)),
    "count negative": (PASSING, used(prompt_tokens=-1)),
    "count a fraction": (PASSING, used(prompt_tokens=1.5)),
    "usage a list": (HARMLESS, spoiled(lambda r: {**r, "usage": [1]})),
    "log-prob nan": (PASSING, log_probs(lambda v: [math.nan, *v])),
    "log-prob infinite": (PASSING, log_probs(lambda v: [-math.inf, *v])),
    "log-prob of 400 digits": (PASSING, log_probs(lambda v: [-HUGE, *v])),
    "log-prob a text": (PASSING, log_probs(lambda v: ["-0.5"])),
    "log-prob true": (PASSING, log_probs(lambda v: [True])),
    "log-prob positive": (PASSING, log_probs(lambda v: [2.5, *v])),
    "no log-prob of a text": (PASSING, log_probs(lambda v: [])),
    "tokens of another text": (PASSING, named("some", "thing", " else")),
    "tokens of part of the text": (PASSING, named("answer", " to")),
    "tokens of the text": (HARMLESS, named("▁answer", "Ġto", " say", " it", "<|end|>")),
    "name of a megabyte": (HARMLESS, spoiled(lambda r: {**r, "id": r["id"] + "x" * 2**20})),
}  # fmt: skip


def entries(change):
    """A mode that changes what is said of each scored position."""

    def changed(reply):
        for one in reply["choices"]:
            one["prompt_logprobs"] = [e and change(e) for e in one["prompt_logprobs"]]
        return reply

    return spoiled(changed)


def values(new):
    return entries(lambda e: {i: {"logprob": new} for i in e})


SCORES = {
    "no choices": (PASSING, spoiled(lambda r: {**r, "choices": []})),
    "one choice more": (PASSING, spoiled(lambda r: {**r, "choices": [*r["choices"], r["choices"][-1]]})),
    "one choice twice": (HARMLESS, spoiled(lambda r: {**r, "choices": [r["choices"][0]] * len(r["choices"])})),
    "index a text": (PASSING, choice(index="0")),
    "tokens of another text": (PASSING, choice(prompt_token_ids=[1, 2, 3])),
    "one position less": (PASSING, spoiled(lambda r: {**r, "choices": [
        c | {"prompt_logprobs": c["prompt_logprobs"][:-1]} for c in r["choices"]]})),
    "one position more": (PASSING, spoiled(lambda r: {**r, "choices": [
        c | {"prompt_logprobs": [*c["prompt_logprobs"], {}]} for c in r["choices"]]})),
    "no entry": (PASSING, entries(lambda e: None)),
    "entries as lists": (PASSING, entries(list)),
    "entries of other tokens": (PASSING, entries(lambda e: {str(int(i) + 1): v for i, v in e.items()})),
    "too few tokens": (FINAL, entries(lambda e: dict(list(e.items())[:1] + list(e.items())[-1:]))),
    "token of 400 digits": (FINAL, entries(lambda e: e | {str(HUGE): {"logprob": 0.0}})),
    "token negative": (FINAL, entries(lambda e: e | {"-1": {"logprob": 0.0}})),
    "log-prob nan": (PASSING, values(math.nan)),
    "log-prob infinite": (PASSING, values(math.inf)),
    "log-prob of 400 digits": (PASSING, values(HUGE)),
    "log-prob a text": (PASSING, values("-0.5")),
    "log-prob true": (PASSING, values(True)),
    "log-prob null": (PASSING, values(None)),
    "log-prob positive": (FINAL, values(2.5)),
    "probabilities": (FINAL, entries(lambda e: {i: {"logprob": math.exp(v["logprob"])} for i, v in e.items()})),
    "count of 400 digits": (HARMLESS, used(prompt_tokens=HUGE)),
    "count negative": (HARMLESS, used(prompt_tokens=-1)),
    "count true": (HARMLESS, used(completion_tokens=True)),
    "usage a list": (HARMLESS, spoiled(lambda r: {**r, "usage": [1]})),
}  # fmt: skip
QUICKLY = {
    "status 408", "redirect elsewhere", "cut body", "length huge", "slow body", "endless head", "endless body", "gzip bomb",
    "latin-1", "utf-16", "deep JSON", "endless error", "count of 400 digits", "log-prob nan", "tokens of another text",
}  # fmt: skip


def cases(modes, requests):
    """Each mode with each request; those that are not quick are marked as slow."""
    return [
        pytest.param(*modes[m], r, id=m + (f" {r.id}" if r else ""), marks=() if m in QUICKLY else pytest.mark.slow)
        for m in modes
        for r in requests
    ]


class Bounds:
    """What an exchange with a hostile server may take."""

    def __enter__(self):
        self.start, self.peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return self

    def __exit__(self, kind, error, trace):
        assert time.monotonic() - self.start < SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.peak) * 1024 < MEMORY


def one_line(error):
    line = str(error)
    assert "\n" not in line and line.isprintable() and len(line) < 1000
    return line


def asked_of(ask, kind, right, servers):
    """Ask a server that spoils every answer, and one that spoils two: what each mode has to come to."""
    always, twice = servers
    with always, Bounds():
        if kind == HARMLESS:
            right(ask(always.url, "always", retries=PATIENT))
        else:
            with pytest.raises(InputError) as caught:
                ask(always.url, "always")
            one_line(caught.value)
            assert always.requests <= (1 if kind == FINAL else ATTEMPTS)
        assert always.sent <= SENT
    with twice, Bounds():
        if kind == FINAL:
            with pytest.raises(InputError):
                ask(twice.url, "twice")
        else:
            right(ask(twice.url, "twice", retries=PATIENT))


@pytest.mark.parametrize(("kind", "spoil", "request_"), cases(WIRE, ASKED[:1]) + cases(TEXT, ASKED))
def test_text_from_a_hostile_server(kind, spoil, request_, tmp_path):
    def ask(url, name, **limits):
        endpoint = Endpoint(url=url, **QUICK | limits)
        source = EndpointSource("toy", endpoint)
        with RequestLog(tmp_path / name, source.name) as log:
            return generate(source, [request_], log, **endpoint.limits())

    def right(answers):
        (one,) = answers
        assert one.text == "answer to say it" and one.log_prob is not None and one.log_prob <= 0
        assert all(0 <= n < 10**9 for n in (one.prompt_tokens, one.tokens))

    honest = Upstream(key=None)
    asked_of(ask, kind, right, (Hostile(honest, spoil), Hostile(honest, spoil, times=2)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A scoring server (asked directly), its tokenizer, two examples, and what is right."""
    folder = tmp_path_factory.mktemp("teacher")
    home = made(folder)
    server = Scorer(*sides(home))
    with server:
        teacher, batch = opened(recipe(home, server.url, "top_k:5"), folder / "store", number=2)
        return server, sides(home)[1], batch, teacher(batch).signal


@pytest.mark.parametrize(("kind", "spoil", "_"), cases(WIRE | SCORES, [None]))
def test_scores_from_a_hostile_server(kind, spoil, _, world, tmp_path):
    honest, words, batch, known = world

    def ask(url, name, **limits):
        endpoint = Endpoint(url=url, **QUICK | limits)
        at = tmp_path / name
        return ServedTeacher("toy", endpoint, Score("top_k", 5), at, {"classes": len(words)}, words)(batch).signal

    def right(found):
        assert torch.equal(found.ids, known.ids) and torch.equal(found.log_probs, known.log_probs)

    asked_of(ask, kind, right, (Hostile(honest, spoil), Hostile(honest, spoil, times=2)))


@pytest.mark.parametrize("mode", ["endless body", "deep JSON"])
def test_a_served_teacher_does_not_start_at_a_hostile_server(mode, world, tmp_path):
    honest, words, batch, _ = world
    with Hostile(honest, WIRE[mode][1]) as server, Bounds(), pytest.raises(FailedRequests) as caught:
        endpoint = Endpoint(url=server.url, **QUICK)
        ServedTeacher("toy", endpoint, Score("top_k", 5), tmp_path, {"classes": len(words)}, words).start(batch)
    one_line(caught.value)


@pytest.mark.parametrize("mode", ["slow body", "count of 400 digits", "redirect elsewhere"])
def test_the_command_ends_in_one_line(mode, tmp_path, capfd):
    (tmp_path / "p.txt").write_text("say it\n")
    words = ["generate", str(tmp_path / "p.txt"), "--model", "toy", "--output", str(tmp_path / "o.jsonl")]
    with Hostile(Upstream(key=None), (WIRE | TEXT)[mode][1]) as server, Bounds(), pytest.raises(SystemExit) as left:
        main([*words, "--endpoint", server.url, "--timeout", "0.4", "--retries", "0", "--price-in", "1"])
    error = capfd.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1, error


WRONG = (None, True, -1, 1.5, HUGE, -HUGE, math.nan, math.inf, "x", "\ud800", [], {}, [[]], {"a": 1}, [None] * 3)


@pytest.mark.parametrize("request_", ASKED, ids=lambda r: r.id)
def test_a_wrong_value_at_any_place_of_a_text_is_found_or_changes_nothing_else(request_):
    with Hostile(Upstream(key=None), None) as server:
        found = []
        server.spoil = lambda whole: found.append(json.loads(body_of(whole))) or whole
        source = EndpointSource("toy", Endpoint(url=server.url, **QUICK))
        honest = source.complete(request_)
        for place in paths(found[0]):
            for new in WRONG:
                spoil = spoiled(lambda r, place=place, new=new: replaced(r, place, new))
                server.spoil = spoil
                try:
                    one = source.complete(request_)
                except (SourceError, InputError) as error:
                    one_line(error)
                    continue
                text = new if place and place[-1] in ("text", "content") and isinstance(new, str) else honest.text
                assert one.text == text, (place, new)
                assert one.log_prob is None or (math.isfinite(one.log_prob) and one.log_prob <= 0), (place, new)
                assert all(type(n) is int and 0 <= n < 10**10 for n in (one.prompt_tokens, one.tokens)), (place, new)


@pytest.mark.slow
def test_a_wrong_value_at_any_place_of_scores_is_found_or_changes_nothing_else(world, tmp_path):
    honest, words, batch, _ = world
    with Hostile(honest, None) as server:
        facts = {"classes": len(words)}
        teacher = ServedTeacher("toy", Endpoint(url=server.url, **QUICK), Score("top_k", 5), tmp_path, facts, words)
        asked = teacher._asked(batch)[0]
        asked = type(asked)(asked.key, asked.ids[:3], (0, 1))
        replies = []
        server.spoil = lambda whole: replies.append(json.loads(body_of(whole))) or whole
        (right,), _ = teacher.client.ask([asked])
        for place in paths(replies[0]):
            for new in WRONG:
                server.spoil = spoiled(lambda r, place=place, new=new: replaced(r, place, new))
                try:
                    (found,), cost = teacher.client.ask([asked])
                except (SourceError, InputError) as error:
                    one_line(error)
                    continue
                assert all(type(n) is int and 0 <= n <= 10**9 for n in cost.values()), (place, new)
                if "logprob" not in place:
                    assert torch.equal(found.target.ids, right.target.ids), (place, new)
                    assert torch.equal(found.target.log_probs, right.target.log_probs), (place, new)
                assert bool((found.target.log_probs.exp().sum(-1) <= 1.002).all()), (place, new)
