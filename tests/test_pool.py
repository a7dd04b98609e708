"""Several servers of one model: shares, shards that resume alone, one budget, and servers that fail, move or are replaced."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from fault_server import KEY, KEY_ENV, Upstream, http, usage
from generation_client import requests
from guide_cases import Answers, lines, questions
from understudy import InputError, distill
from understudy.cli import main
from understudy.generation import (
    Budget,
    BudgetSpent,
    Endpoint,
    EndpointSource,
    FailedRequests,
    RequestLog,
    ServerPool,
    ShardedLog,
    Spent,
    generate,
    log_of,
    source_from,
    tally,
    tally_all,
)
from understudy.runs.recipe import load, make
from understudy.runs.specs import ModelSpec

QUICK = {"backoff": 0.001, "longest_backoff": 0.01, "retries": 1}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)


class Failing(Upstream):
    """Answers every request with `status` while it is set."""

    status = None

    async def answer(self, path, headers, body):
        whole = await super().answer(path, headers, body) if self.status is None else None
        return whole or http(self.status, {"error": {"message": "it is broken"}})


def model(*servers, name="toy", **keys):
    urls = [s if isinstance(s, str) else s.url for s in servers]
    return source_from(ModelSpec(model=name, endpoint={"url": urls, "api_key_env": KEY_ENV, "timeout": 5.0, **keys}))


def ask(folder, source, number, **limits):
    with log_of(source, folder / "toy.jsonl") as log:
        return generate(source, requests(number), log, **{**QUICK, **limits})


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def paid(*servers):
    return sum((s.paid for s in servers), Counter())


def test_a_pool_gives_what_one_server_gives_and_each_request_goes_to_one_server(tmp_path):
    with Upstream() as one, Upstream() as a, Upstream() as b:
        alone = ask(tmp_path / "one", model(one), 60)
        shared = ask(tmp_path / "pool", model(a, b), 60)
        assert alone == shared and [c.text for c in shared] == [f"answer to {r.prompt}" for r in requests(60)]
        assert 15 < a.requests < 45 and a.requests + b.requests == 60 and not set(a.paid) & set(b.paid)
        sent = lambda *servers: sorted(json.dumps(body) for s in servers for body in s.bodies)  # noqa: E731
        assert sent(a, b) == sent(one)  # seeds too
    assert files(tmp_path / "one") == ["toy.jsonl"]
    assert files(tmp_path / "pool") == ["toy-00000-of-00002.jsonl", "toy-00001-of-00002.jsonl"]
    keys = set()
    for file, server in zip(files(tmp_path / "pool"), (a, b), strict=True):
        with RequestLog(tmp_path / "pool" / file, "served toy") as log:
            assert len(log) == server.requests
            keys |= set(log._known)
    with RequestLog(tmp_path / "one" / "toy.jsonl", "served toy") as log:
        assert keys == set(log._known)
    assert tally_all(tmp_path / "pool" / "toy.jsonl") == tally(tmp_path / "one" / "toy.jsonl")


def test_a_pool_completes_single_requests_at_their_server(tmp_path):
    with Upstream() as a, Upstream() as b:
        pool = model(a, b)
        ask(tmp_path, pool, 20)
        shares = [set(s.paid) for s in (a, b)]
        assert [pool.complete(r).text for r in requests(20)] == [f"answer to {r.prompt}" for r in requests(20)]
        assert [set(s.paid) for s in (a, b)] == shares and all(shares)


def test_concurrency_holds_at_each_server_and_a_pool_writes_into_a_single_log_too(tmp_path):
    with Upstream(delay=0.05) as a, Upstream(delay=0.05) as b:
        pool = model(a, b)
        with RequestLog(tmp_path / "log", pool.name) as log:
            generate(pool, requests(40), log, concurrency=3)
            assert len(log) == 40
        assert a.most_in_flight == b.most_in_flight == 3
        with (
            ShardedLog(tmp_path / "toy.jsonl", pool.name, 3) as log,
            pytest.raises(InputError, match="is open for 3 servers, and the source has 2"),
        ):
            generate(pool, requests(1), log)


@pytest.mark.parametrize("status", [503, 400, 404])
def test_a_server_that_fails_is_named_with_what_is_kept_and_its_share_is_sent_when_it_is_back(tmp_path, status, caplog):
    """For a while (503), at each request (400), at all (404); the others finish their shares."""
    with Upstream() as a, Failing() as b:
        b.status = status
        with pytest.raises(InputError, match="starting again sends only what is missing") as caught:
            ask(tmp_path, model(a, b), 60, concurrency=2)
        said, done = str(caught.value), a.requests
        assert f"Server {b.url}: " in said and "it is broken" in said and "\n" not in said and KEY not in said
        assert f"{done} of {done} new requests of {a.url} are answered and kept in {tmp_path}/toy-00000-of" in said
        assert f"0 of {60 - done} new requests of {b.url} are answered and kept in {tmp_path}/toy-00001-of" in said
        assert isinstance(caught.value, FailedRequests) == (status != 404) and f"Server {a.url}" not in said
        told = [r.getMessage() for r in caplog.records if "The other servers go on with their shares" in r.getMessage()]
        assert len(told) == 1 and b.url in told[0]
        b.status = None
        assert [c.text for c in ask(tmp_path, model(a, b), 60)] == [f"answer to {r.prompt}" for r in requests(60)]
        assert a.requests == done and max(paid(a, b).values()) == 1 and len(paid(a, b)) == 60


def test_a_single_failed_request_does_not_stop_its_server(tmp_path):
    class Picky(Upstream):
        async def answer(self, path, headers, body):
            if body["prompt"] == requests(8)[7].prompt:
                return http(400, {"error": "never"})
            return await super().answer(path, headers, body)

    with Picky() as a, Picky() as b, pytest.raises(FailedRequests, match=r"1 requests failed \(r/7\)") as caught:
        ask(tmp_path, model(a, b), 60)
    assert set(caught.value.failed) == {"r/7"} and len(paid(a, b)) == 59


def test_a_fault_of_this_process_stops_all_servers(tmp_path):
    with Upstream(delay=0.02) as a, Upstream(delay=0.02) as b:
        pool = model(a, b)
        with log_of(pool, tmp_path / "toy.jsonl") as log:
            append = log.shards[0].append

            def full(*facts):
                append(*facts)
                raise OSError("no space left")

            log.shards[0].append = full
            with pytest.raises(OSError, match="no space left"):
                generate(pool, requests(200), log, concurrency=1)
        assert a.requests + b.requests < 20


@pytest.mark.parametrize("before,after", [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_another_number_of_servers_sends_only_what_is_missing(tmp_path, before, after):
    with Upstream() as a, Upstream() as b, Upstream() as c:
        ask(tmp_path, model(*(a, b, c)[:before]), 30)
        answers = ask(tmp_path, model(*(c, b, a)[:after]), 60)
        assert [x.text for x in answers] == [f"answer to {r.prompt}" for r in requests(60)]
        assert max(paid(a, b, c).values()) == 1 and len(paid(a, b, c)) == 60
    assert tally_all(tmp_path / "toy.jsonl")[0] == 60


def test_a_replaced_server_and_one_that_moved_send_only_what_is_missing(tmp_path):
    with Upstream() as a, Failing() as b, Upstream() as other:
        b.status = 503
        with pytest.raises(FailedRequests):
            ask(tmp_path, model(a, b), 40)
        done = a.requests
        ask(tmp_path, model(a, other), 40)
        assert (a.requests, other.requests) == (done, 40 - done)
        ask(tmp_path, model(other, a), 40)
        assert (a.requests, other.requests) == (done, 40 - done)
    with Upstream() as first:
        ask(tmp_path / "moved", model(first), 5)
    with Upstream() as second:
        ask(tmp_path / "moved", model(second), 9)
        assert second.requests == 4


def test_the_command_goes_on_with_a_server_that_moved(tmp_path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    for number in (2, 5):
        prompts.write_text("".join(f"prompt {i}\n" for i in range(number)))
        with Upstream(key=None) as up, pytest.raises(SystemExit) as left:
            main(["generate", str(prompts), "--model", "toy", "--endpoint", up.url, "--output", str(output)])
        assert left.value.code in (0, None) and up.requests == (2 if number == 2 else 3)
    assert len(output.read_text().splitlines()) == 5


def test_parts_do_not_replace_each_other_in_one_output(tmp_path, capsys):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(5)))
    with Upstream(key=None) as up:

        def go(part, path):
            words = ["--model", "toy", "--endpoint", up.url, "--shard", part, "--output", str(path)]
            with pytest.raises(SystemExit) as left:
                main(["generate", str(prompts), *words])
            return left.value.code or 0

        assert (go("1/2", output), up.requests) == (0, 3)
        whole = output.read_text()
        assert (go("2/2", output), up.requests) == (2, 3) and output.read_text() == whole
        assert "--output out-2-of-2.jsonl, and join them" in capsys.readouterr().err
        assert (go("1/2", output), up.requests) == (0, 3)  # its own part goes on
        assert (go("2/2", tmp_path / "out-2-of-2.jsonl"), up.requests) == (0, 5)
        with pytest.raises(SystemExit):
            main(["generate", str(prompts), "--model", "toy", "--endpoint", up.url, "--output", str(output)])
        assert len(output.read_text().splitlines()) == 5  # without parts it is the whole
        assert go("1/2", output) == 2 and len(output.read_text().splitlines()) == 5


def test_answers_of_another_model_are_never_mixed(tmp_path):
    with Upstream() as a, Upstream() as b:
        ask(tmp_path, model(a, b), 10)
        for change in ({"name": "other"}, {"extra": {"top_k": 1}}):
            for servers in ((a,), (a, b), (a, b, "http://localhost:1")):
                with pytest.raises(InputError, match=r"toy-0000.-of-00002\.jsonl belongs to source 'served toy'"):
                    ask(tmp_path, model(*servers, **change), 10)
        ask(tmp_path, model(a, b), 10)  # refusing left no lock and no file behind
        assert a.requests + b.requests == 10 and len(files(tmp_path)) == 2


def test_a_log_that_names_a_server_by_its_address_is_read_as_the_models(tmp_path):
    """As versions before 0.11 wrote them: its keys are of that name."""
    former = "http://gone:8000/v1 toy"
    with RequestLog(tmp_path / "toy.jsonl", former) as log, Upstream() as up:
        for request in requests(6):
            log.append(request.key(former), request.id, model(up).complete(request))
    with Upstream() as a, Upstream() as b:
        answers = ask(tmp_path, model(a), 9)
        assert a.requests == 3 and answers == ask(tmp_path, model(a, b), 9) and a.requests + b.requests == 3
        assert [x.text for x in answers] == [f"answer to {r.prompt}" for r in requests(9)]
        with pytest.raises(InputError, match="belongs to source 'http://gone:8000/v1 toy'"):
            ask(tmp_path, model(a, name="other"), 9)


@pytest.mark.parametrize(
    "bound,says",
    [
        ({"budget": Budget(requests=20), "before": Spent(3)}, "budget.requests=20 does not cover the next request: 20"),
        ({"budget": Budget(tokens=400)}, "budget.tokens=400"),
        ({"token_budget": 400}, "token budget of 400"),
        ({"cost_budget": 4e-4, "price_in": 1.0, "price_out": 1.0}, "cost budget of 0.0004"),
    ],
)
def test_one_budget_covers_all_servers_and_what_any_has_spent_before(tmp_path, bound, says):
    with Upstream() as a, Upstream() as b, Upstream() as c:
        for servers in ((a, b), (a, b), (c, b, a), (a,)):
            with pytest.raises(BudgetSpent, match=says) as caught:
                ask(tmp_path, model(*servers), 200, **bound)
            assert "\n" not in str(caught.value)
        answers, read, written = tally_all(tmp_path / "toy.jsonl")
        if "before" in bound:
            assert answers == 17
        assert len(paid(a, b, c)) == answers and max(paid(a, b, c).values()) == 1
        # Some request did not fit, which reserves its prompt's bytes and 8 tokens.
        assert "before" in bound or 400 - 70 < read + written <= 400
        ask(tmp_path, model(a, b), 200)
        assert max(paid(a, b, c).values()) == 1 and len(paid(a, b, c)) == 200


def test_killed_it_resumes_and_asks_nothing_twice(tmp_path):
    """A kill costs at most the answers in flight at each server."""
    tests, number, crew = Path(__file__).parent, 400, 2
    env = {**os.environ, "PYTHONPATH": f"{tests.parent / 'src'}:{tests}"}
    with Upstream(delay=0.01) as a, Upstream(delay=0.01) as b:
        command = [sys.executable, str(tests / "generation_client.py"), f"{a.url},{b.url}", str(tmp_path / "toy.jsonl")]
        client = subprocess.Popen([*command, str(number), str(crew), str(10**6)], env=env)
        until = time.time() + 60
        while a.requests < 40 or b.requests < 40:
            assert client.poll() is None and time.time() < until
            time.sleep(0.002)
        client.send_signal(signal.SIGKILL)
        client.wait()
        kept = tally_all(tmp_path / "toy.jsonl")[0]
        asked = a.requests + b.requests
        assert 0 < kept < number and asked - kept <= 2 * crew
        ask(tmp_path, model(a, b), number)
        assert sum(paid(a, b).values()) <= number + 2 * crew and len(paid(a, b)) == number
        assert tally_all(tmp_path / "toy.jsonl")[0] == number
    total = sum(sum(usage(r.prompt)) for r in requests(number))
    assert sum(tally_all(tmp_path / "toy.jsonl")[1:]) == total


def test_a_shard_is_written_by_one_process_and_refusing_one_frees_the_others(tmp_path):
    with RequestLog(tmp_path / "toy-00001-of-00002.jsonl", "served toy"):
        with pytest.raises(InputError, match=r"toy-00001-of-00002\.jsonl is being written by another process"):
            ShardedLog(tmp_path / "toy.jsonl", "served toy", 2)
        RequestLog(tmp_path / "toy-00000-of-00002.jsonl", "served toy").close()
    with ShardedLog(tmp_path / "toy.jsonl", "served toy", 2) as log:
        assert len(log) == 0 and log.get("0" * 64) is None
        with pytest.raises(KeyError):
            log["0" * 64]


def test_a_log_of_one_role_is_not_that_of_another(tmp_path):
    for name in ("teacher.a.jsonl", "teacher-2.jsonl", "teacher-00000-of-00002.jsonl.bak", "my-teacher.jsonl"):
        RequestLog(tmp_path / name, "another").close()
    with ShardedLog(tmp_path / "teacher.jsonl", "served toy", 2) as log:
        assert len(log.shards) == 2


def test_a_recipe_names_several_servers(tmp_path):
    words = ["method=frontier-synthetic", "task=reasoning", "teacher.model=m"]
    found = load(None, [*words, "teacher.endpoint.url=[http://a:1, http://b:2/v1/]"])
    assert found.teacher.endpoint.url == ["http://a:1/v1", "http://b:2/v1"] and make(found.dump()) == found
    assert [e.url for e in found.teacher.endpoint.servers] == found.teacher.endpoint.url
    assert load(None, [*words, "teacher.endpoint=[http://a:1, http://b:2]"]).teacher == found.teacher
    assert load(None, [*words, "teacher.endpoint.url=[http://a:1]"]).teacher.endpoint.url == "http://a:1/v1"
    assert isinstance(source_from(found.teacher), ServerPool)
    for url, says in (
        ("[]", "a URL is a text, and those of several servers of one model a list"),
        ("[http://a, 5]", "a URL is a text"),
        ("[http://a, nonsense]", "a URL begins with http"),
        ("[http://a, http://a/v1]", "a list of servers names one twice"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            load(None, [*words, f"teacher.endpoint.url={url}"])
        assert "\n" not in str(caught.value) and "teacher.endpoint.url" in str(caught.value)


def test_scores_come_from_one_server():
    served = {"model": "m", "endpoint": ["http://a", "http://b"], "score": "top_k:5"}
    with pytest.raises(
        InputError, match=r"score is requested from one server: give endpoint\.url one address"
    ) as caught:
        make({"task": "language_modeling", "method": "kd", "teacher": served})
    assert "\n" not in str(caught.value)
    with pytest.raises(
        InputError, match=r"endpoint\.url names 2 servers \(http://a/v1, http://b/v1\) where one is asked"
    ):
        EndpointSource("m", Endpoint(url=["http://a", "http://b"]))


class Solver(Answers):
    """A served teacher of the reasoning guide that may be down."""

    down = False

    async def answer(self, path, headers, body):
        if self.down:
            return http(503, {"error": {"message": "loading"}})
        await asyncio.sleep(0)
        return await super().answer(path, headers, body)


def test_a_procedure_on_a_pool_with_a_server_that_was_down_ends_as_on_one_server(tmp_path):
    lines(tmp_path / "questions.jsonl", questions())

    def run(name, *servers):
        at = {"url": [s.url for s in servers], **QUICK}
        recipe = {
            "method": "frontier-synthetic",
            "task": "reasoning",
            "data": {"name": str(tmp_path / "questions.jsonl"), "samples": 0, "max_new_tokens": 8},
            "teacher": {"model": "solver", "endpoint": at},
            "student": "llama:hidden=16,layers=1,heads=2",
            "trainer": {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no"},
            "budget": {"requests": 100},
            "output": str(tmp_path / name),
        }
        return distill(recipe)

    with Solver() as one, Solver() as a, Solver() as b, Solver() as other:
        whole = run("one", one)
        b.down = True  # for the first part
        with pytest.raises(FailedRequests, match=f"Server {b.url}: .*starting again sends only what is missing"):
            run("pool", a, b)
        b.down = False
        done = run("pool", a, other, b)
        assert other.requests and b.paid and one.requests > 20
    assert paid(a, other, b) == one.paid and done.metrics == whole.metrics  # nothing was asked twice
    compared = [
        "stages/targets.jsonl",
        "stages/targets.json",
        "corpus/train.jsonl",
        "training/student/model.safetensors",
    ]
    for file in compared:
        assert (whole.folder / file).read_bytes() == (done.folder / file).read_bytes(), file
    tables = [json.loads((r.folder / "evaluation.json").read_text())["tables"] for r in (whole, done)]
    assert tables[0] == tables[1]
    assert len(files(done.folder / "logs")) == 5 and files(whole.folder / "logs") == ["teacher.jsonl"]
