"""Two processes give the result of one: DDP and FSDP2, uneven rounds, a sharded teacher, killed and resumed."""

import json
import signal
from pathlib import Path

import pytest
import torch

import ranks_cases as cases
from engine_cases import weights
from two_ranks import two_ranks
from understudy import distill
from understudy.errors import InputError
from understudy.runs.recipe import make
from understudy.training import zero
from understudy.training.order import EpochSampler, Share

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All that two processes do, in two launches: the first ends with a kill, the second resumes."""
    root = tmp_path_factory.mktemp("ranks")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = {**cases.TEXT, "method": "sft", "trainer": {"max_steps": 8, "learning_rate": 1e-2}}
    distill({**start, "output": str(root / "start-run")})
    for name in ("start", "teacher"):
        (root / name).symlink_to(root / "start-run" / "student")
    first = two_ranks(HERE / "ranks_cases.py", root, "first")
    assert (root / "whole" / "evaluation.json").is_file(), first.stderr
    assert f"Signal {int(signal.SIGKILL)}" in first.stderr or "SIGKILL" in first.stderr
    assert not (root / "cut" / "evaluation.json").exists()
    second = two_ranks(HERE / "ranks_cases.py", root, "second")
    assert second.returncode == 0, second.stderr
    yield root
    torch.set_num_threads(threads)


def read(folder, name):
    return torch.load(folder / f"{name}.pt")


def same(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("way", cases.WAYS)
def test_two_ranks_give_weights_and_clipped_norms_of_one(folder, way, name, tmp_path):
    """Uneven last rounds, accumulation, a tied head with padding rows, clipping by the norm over all shards."""
    alone = cases.end_of(cases.case(tmp_path, name, 1))
    assert (alone["norms"] > 0.05).any()  # clipping did something
    same(read(folder, f"{way}-{name}"), alone, 1e-9)


@pytest.mark.parametrize("way", cases.WAYS)
def test_own_modules_are_trained_alike(folder, way, tmp_path):
    alone = cases.end_of(cases.trainer_of(tmp_path, cases.OWN, 8, 1, 13))
    same(read(folder, f"{way}-own"), alone, 1e-9)


def test_what_cannot_be_sharded_is_refused_in_one_line(folder):
    line = read(folder, "refused")
    assert "dhkd" in line and "DDP" in line and "\n" not in line


def test_a_sharded_teacher_says_the_same(folder):
    same(read(folder, "sharded-kd"), read(folder, "fsdp-kd"), 1e-12)


def test_the_head_is_gathered_once_however_many_tiles_it_takes(folder):
    one_tile, many_tiles = read(folder, "collectives")
    assert one_tile == many_tiles and sum(one_tile.values()) > 0


def test_whole_runs_end_in_the_student_folder_of_one_process(folder):
    """Run as a user runs it: evaluation on the way, best checkpoint, save format, metrics; text and preferences."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_steps": 3}
    distill(cases.text_recipe(folder, "text-alone", 1, **cases.SGD, **evaluated))
    distill(cases.pairs_recipe(folder, "pairs-alone", 1))
    for kind in ("text", "pairs"):
        alone, sharded = folder / f"{kind}-alone", folder / f"{kind}-fsdp"
        same(weights(sharded), weights(alone), 1e-6)
        assert {p.name for p in (sharded / "student").iterdir()} == {p.name for p in (alone / "student").iterdir()}
        mine, theirs = (json.loads((f / "evaluation.json").read_text())["metrics"] for f in (sharded, alone))
        for metric, value in theirs.items():
            assert mine[metric] == pytest.approx(value, rel=1e-4, abs=1e-6), metric


def test_killed_and_resumed_is_uninterrupted_to_the_bit(folder):
    a, b = weights(folder / "whole"), weights(folder / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = [(folder / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "cut")]
    losses = [[json.loads(line)["loss"] for line in run] for run in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    sealed = json.loads((folder / "cut" / "checkpoints" / "checkpoint-6" / "complete.json").read_text())
    assert {"model.safetensors", "optimizer.safetensors", "rank0-state.safetensors", "rank1-state.safetensors"} <= set(
        sealed
    )


def test_a_stop_that_one_rank_hears_of_stops_all_and_changes_nothing(folder):
    a, b = weights(folder / "whole-ddp"), weights(folder / "stopped")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("examples,micro,ranks", [(13, 4, 2), (9, 4, 2), (8, 4, 2), (3, 4, 4), (1, 1, 3), (10, 3, 3)])
def test_shares_are_even_and_hold_each_example_once(examples, micro, ranks):
    shares = [list(Share(EpochSampler(examples, 0), micro, ranks, rank)) for rank in range(ranks)]
    sampler = EpochSampler(examples, 0)
    assert {len(s) for s in shares} == {len(Share(sampler, micro, ranks, 0))} == {-(-examples // (micro * ranks))}
    order = list(sampler)
    for i, blocks in enumerate(zip(*shares, strict=True)):
        block = order[i * micro * ranks : (i + 1) * micro * ranks]
        assert [x for share in blocks for x in share if x >= 0] == block
        sizes = [sum(x >= 0 for x in share) for share in blocks]
        assert max(sizes) - min(sizes) <= 1 and all(blocks)
    dropped = [list(Share(sampler, micro, ranks, rank, drop_last=True)) for rank in range(ranks)]
    assert all(len(s) == examples // (micro * ranks) and all(len(b) == micro for b in s) for s in dropped)


def test_bad_places_are_one_line(tmp_path):
    base = {**cases.TEXT, "output": str(tmp_path)}
    with pytest.raises(InputError, match="device 'gpu0' is not cpu, cuda:N or sharded"):
        make({**base, "teacher": {"model": "llama", "device": "gpu0"}})
    with pytest.raises(InputError, match="quantised weights cannot be sharded"):
        make({**base, "teacher": {"model": "llama", "device": "sharded", "quantization": {"load_in_8bit": True}}})
    with pytest.raises(InputError, match="torchrun"):
        cases.trainer_of(tmp_path, cases.METHODS["sft"], 4, 1, 8, fsdp=True)


def test_one_process_places_a_sharded_teacher_whole(tmp_path):
    trainer = cases.trainer_of(tmp_path, cases.METHODS["kd"], 4, 1, 8, sharded=True, max_steps=1)
    trainer.train()
    assert not cases.is_sharded(trainer.teacher.model)


def test_zero_3_gathers_a_tied_head_and_gives_the_same_weights(tmp_path):
    pytest.importorskip("deepspeed")
    done = two_ranks(HERE / "ranks_cases.py", tmp_path, "zero3")
    assert done.returncode == 0, done.stderr
    same(read(tmp_path, "zero3"), cases.narrow({}), 1e-6)


def test_deepspeed_that_could_not_resume_or_split_the_data_is_one_line(tmp_path, monkeypatch):
    args = cases.trainer_of(tmp_path, cases.METHODS["sft"], 4, 1, 8).args
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were started and transformers sees 1"):
        zero.check(args)
    monkeypatch.setenv("WORLD_SIZE", "1")
    zero.check(args)
    args.save_strategy = "steps"
    with pytest.raises(InputError, match=r"save_strategy=steps.*trainer\.fsdp"):
        zero.check(args)
