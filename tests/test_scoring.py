"""Scores from a server: equal to a live teacher's, through every fault and kill, bounded, paid for once."""

import os
import random
import signal
import time
from collections import Counter

import pytest
import torch

from engine_cases import FORKED
from fault_server import KEY, KEY_ENV, KINDS, Proxy
from scoring_server import Scorer
from served_cases import asking, made, opened, recipe, sides
from understudy import InputError
from understudy.generation import BudgetSpent, Endpoint, FailedRequests, SourceError
from understudy.models import CausalLMAdapter, load_tokenizer
from understudy.streaming import project
from understudy.targets import top_k
from understudy.teachers import CachedTeacher, LocalTeacher, ServedTeacher
from understudy.teachers.cache.store import ShardStore, content_key
from understudy.teachers.server.client import ScoringClient
from understudy.teachers.server.scores import Asked, Position, Score, echoed, kept, target


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return made(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def world(home):
    return sides(home)


def live(world, batch):
    """The teacher in this process: its log-probabilities."""
    model, tokenizer = world
    signal = LocalTeacher(CausalLMAdapter(model, len(tokenizer)), "live")(batch).signal
    return torch.log_softmax(project(signal), -1)


def same(found, exact):
    """Equal to float tolerance, ids in the same order but for ties."""
    torch.testing.assert_close(found.log_probs, exact.log_probs, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.log_tail.exp(), exact.log_tail.exp(), atol=1e-5, rtol=0)
    assert (found.ids == exact.ids).float().mean() > 0.999


@pytest.mark.parametrize("way,score,k", [("vllm", "top_k:20", 20), ("echo ids", "top_k:3", 3), ("ids", "top_k:20", 20)])
def test_top_k_is_that_of_the_live_teacher(way, score, k, home, world, tmp_path):
    with Scorer(*world, way=way) as server:
        teacher, batch = opened(recipe(home, server.url, score), tmp_path / "store")
        found = teacher(batch).signal
        same(found, top_k(live(world, batch), k))
        before = server.requests
        assert torch.equal(teacher(batch).signal.log_probs, found.log_probs) and server.requests == before
    again = CachedTeacher(tmp_path / "store")(batch).signal  # an ordinary cache, without the server
    assert torch.equal(again.ids, found.ids) and torch.equal(again.log_tail, found.log_tail)
    assert teacher.store.identity["score"] == score and teacher.store.identity["teacher"] == "served toy"


@pytest.mark.parametrize("way", ["vllm", "echo"])
def test_the_sampled_token_alone(way, home, world, tmp_path):
    with Scorer(*world, way=way) as server:
        teacher, batch = opened(recipe(home, server.url, "sampled"), tmp_path / "store")
        found = teacher(batch).signal
    own = live(world, batch).gather(-1, batch.row_labels[:, None])
    assert torch.equal(found.ids, batch.row_labels[:, None])
    torch.testing.assert_close(found.log_probs, own, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.log_tail.exp(), 1 - own.exp(), atol=1e-5, rtol=0)


def test_the_students_own_ids_and_the_fall_back(home, world, tmp_path):
    torch.manual_seed(3)
    model, tokenizer = world
    student = CausalLMAdapter(type(model)(model.config), len(tokenizer))
    with Scorer(*world, way="ids") as server:
        teacher, batch = opened(recipe(home, server.url, "ids:7"), tmp_path / "store", student)
        found = teacher(batch).signal
        paid = sum(server.paid.values())
        teacher(batch)
        assert sum(server.paid.values()) == paid
    mine = torch.log_softmax(project(student(batch).signal), -1).topk(7).indices.sort(-1).values
    assert (found.ids == mine).float().mean() > 0.99  # but for ties
    torch.testing.assert_close(found.log_probs, live(world, batch).gather(-1, found.ids), atol=2e-5, rtol=0)
    with Scorer(*world, way="vllm") as server:
        teacher, batch = opened(recipe(home, server.url, "ids:7"), tmp_path / "other", student)
        same(teacher(batch).signal, top_k(live(world, batch), 7))
        teacher, batch = opened(recipe(home, server.url, "ids:7"), tmp_path / "other", student)  # and again
    assert "score=ids:7 became top_k:7" in " ".join(teacher.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_is_mended(kind, home, world, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    with Scorer(*world) as server, Proxy(server, share=0.4, kinds=(kind,)) as proxy:
        values = recipe(home, proxy.url, key=True, endpoint={"scoring_tokens": 128, "concurrency": 2})
        teacher, batch = opened(values, tmp_path / "store", number=40)
        same(teacher(batch).signal, top_k(live(world, batch), 20))
    assert proxy.met[kind] > 2
    for file in (tmp_path / "store").rglob("*"):
        assert KEY.encode() not in file.read_bytes()


def test_requests_are_bounded_and_halved_where_the_server_cannot(home, world, tmp_path):
    with Scorer(*world, most=100) as server:
        values = recipe(home, server.url, endpoint={"scoring_tokens": 4096, "concurrency": 2})
        teacher, batch = opened(values, tmp_path / "store")
        assert teacher.client.bound == 4096
        same(teacher(batch).signal, top_k(live(world, batch), 20))
        assert max(server.sizes) <= 100 and max(server.paid.values()) == 1 + 1  # the probe is one of the examples
        assert teacher.client.bound <= 1024  # what was too large is not tried again
    with Scorer(*world) as server:
        values = recipe(home, server.url, endpoint={"scoring_tokens": 128, "concurrency": 2})
        teacher, batch = opened(values, tmp_path / "small")
        teacher(batch)
        assert max(server.sizes) <= 64 and server.most_in_flight <= 2
    with Scorer(*world) as server:
        teacher, batch = opened(recipe(home, server.url), tmp_path / "none")
        server.most = 20
        with pytest.raises(FailedRequests, match=r"one sequence of 32 tokens is too much .* Lower data.max_length"):
            teacher(batch)


def test_the_bound_is_computed_from_the_vocabulary(home, world, tmp_path):
    with Scorer(*world) as server:
        teacher, _ = opened(recipe(home, server.url), tmp_path / "store")
    ask = [teacher.client.endpoint, teacher.store, teacher.score]
    bounds = [ScoringClient("m", *ask, classes, str, int).bound for classes in (300, 64_000, 152_064)]
    assert bounds == [16_384, 2**32 // (8 * 64_000), 2**32 // (8 * 152_064)]


def test_budgets_hold_and_what_was_paid_is_kept(home, world, tmp_path):
    with Scorer(*world) as server:
        few = {"scoring_tokens": 64, "concurrency": 2, "token_budget": 1000}
        teacher, batch = opened(recipe(home, server.url, endpoint=few), tmp_path / "store")
        with pytest.raises(BudgetSpent, match="token budget of 1000"):
            teacher(batch)
        spent = ShardStore(tmp_path / "store").spent
        assert 800 < spent["prompt_tokens"] + spent["tokens"] <= 1000
        teacher, batch = opened(recipe(home, server.url), tmp_path / "store")
        teacher(batch)
        assert teacher.store.spent["prompt_tokens"] == int(batch.inputs["attention_mask"].sum())


@pytest.mark.slow
def test_killed_at_twenty_random_points_nothing_is_lost_or_doubled(home, world, tmp_path):
    chance, crew = random.Random(0), 2
    with Scorer(*world) as server:
        small = {"scoring_tokens": 64, "concurrency": crew}
        _, batch = opened(recipe(home, server.url), tmp_path / "other")
        server.paid.clear()
        kills = 0
        for _ in range(20):
            before, more = server.requests, chance.randint(4, 14)
            child = FORKED.Process(target=asking, args=(server.url, home, tmp_path / "cut", batch, small))
            child.start()
            while child.is_alive() and server.requests < before + more:
                time.sleep(0.0005)
            time.sleep(chance.random() * 0.004)
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += child.exitcode == -signal.SIGKILL
        asking(server.url, home, tmp_path / "cut", batch, small)
        asked = Counter(server.paid)
    found = CachedTeacher(tmp_path / "cut")(batch).signal
    same(found, top_k(live(world, batch), 20))
    store = ShardStore(tmp_path / "cut")
    assert len(store) == len(batch.labels) and store.rows == batch.num_items
    assert sum(len(shard["arrays"]["ids"]) for shard in store.shards) == batch.num_items  # on disk too, each once
    assert kills >= 15 and sum(asked.values()) <= len(batch.labels) + kills * crew  # those in flight alone


def test_small_shards_are_merged_and_a_kill_on_the_way_doubles_nothing(tmp_path, monkeypatch):
    store = ShardStore(tmp_path, {"format": 1})
    keys = [content_key(torch.tensor([i])) for i in range(30)]
    for i, key in enumerate(keys):
        store.append([key], [2], {"x": torch.full((2, 1), float(i))}, {"tokens": 3})
    other = ShardStore(tmp_path)  # another process with the same shards
    monkeypatch.setattr("pathlib.Path.unlink", lambda self, missing_ok=False: None)  # killed before the old ones go
    store.compact()
    monkeypatch.undo()
    for one in (store, ShardStore(tmp_path)):
        assert len(one) == 30 and one.rows == 60 and one.spent == {"tokens": 90}
        assert torch.equal(one.read(keys)["x"][::2, 0], torch.arange(30.0))
    other.refresh()
    assert other.spent == {"tokens": 90} and torch.equal(other.read(keys[3:4])["x"], torch.full((2, 1), 3.0))
    store.append([content_key(torch.tensor([99]))], [1], {"x": torch.zeros(1, 1)}, {"tokens": 1})
    store.compact()
    assert len(list(tmp_path.glob("shard-*"))) == 1
    final = ShardStore(tmp_path)
    assert len(final) == 31 and final.spent == {"tokens": 91}


def test_what_is_no_distribution_of_these_tokens_is_refused():
    asked = Asked(b"k", (1, 2, 3), (0, 1))
    positions = [Position(-1.0, {2: -1.0, 7: -2.0}), Position(-0.5, {3: -0.5, 4: -1.5})]
    found = kept(positions, asked, Score.parse("top_k:2"), 10)
    assert found.ids.tolist() == [[2, 7], [3, 4]]
    with pytest.raises(InputError, match="names token 7 and the run's tokenizer has 7"):
        kept(positions, asked, Score.parse("top_k:2"), 7)
    with pytest.raises(InputError, match="gives 2 tokens a position of the 5"):
        kept(positions, asked, Score.parse("top_k:5"), 10)
    with pytest.raises(InputError, match="raw_logprobs"):
        target(torch.tensor([[0, 1]]), torch.tensor([[0.5, 3.0]]))
    assert target(torch.tensor([[0]]), torch.tensor([[1e-9]])).log_tail.exp().item() == pytest.approx(1e-7)
    with pytest.raises(InputError, match=r"top_k:N, ids:N, sampled"):
        Score.parse("top:3")
    choice = {"logprobs": {"tokens": ["a", "z", "c"], "token_logprobs": [None, -1, -1], "top_logprobs": None}}
    with pytest.raises(SourceError, match="other tokens than were sent"):
        echoed(choice, asked, False, lambda i: " abc"[i], int)


def test_tokens_named_by_text(home, tmp_path):
    words = load_tokenizer(str(home))
    teacher = ServedTeacher(
        "toy", Endpoint(url="http://127.0.0.1:9/v1"), Score("top_k", 2), tmp_path, {"classes": len(words)}, words
    )
    ids = [words.convert_tokens_to_ids(t) for t in "abc"]
    top = [None, {"b": -1.0, "a": -2.0}, {"c": -0.5, "token_id:7": -3.0}]
    choice = {"logprobs": {"tokens": list("abc"), "token_logprobs": [None, -1.0, -0.5], "top_logprobs": top}}
    asked = Asked(b"k", tuple(ids), (0, 1))
    found = kept(echoed(choice, asked, True, teacher._text, teacher._id), asked, teacher.score, len(words))
    assert found.ids.tolist() == [[ids[1], ids[0]], [ids[2], 7]] and found.log_probs.tolist() == [[-1, -2], [-0.5, -3]]
    top[2] = {"\ufffd": -0.1, "c": -0.5}
    with pytest.raises(InputError, match="no single token of the run's tokenizer"):
        echoed(choice, asked, True, teacher._text, teacher._id)


def test_a_server_that_is_down_is_one_line(home, tmp_path):
    with pytest.raises(FailedRequests, match="connection failed"):
        opened(recipe(home, "http://127.0.0.1:9/v1", endpoint={"retries": 1}), tmp_path / "store")
