"""Runs with the student's own samples: equal however they are cut, killed or mixed; what they log, learn and refuse."""

import json
import shutil

import pytest
import torch
import transformers

from engine_cases import killed_run, weights
from own_texts import recipe, rows, words, write_set
from understudy import distill
from understudy.data import Batch, collate_text
from understudy.data.samples import Sample, sampled_row
from understudy.errors import InputError
from understudy.generation.decoding import sample
from understudy.losses import reverse_kl
from understudy.runs.recipe import make
from understudy.streaming import rowwise


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, and a teacher trained once."""
    folder = tmp_path_factory.mktemp("world")
    data = write_set(folder / "set")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    distill(recipe(data, folder / "first", trainer={"max_steps": 1}))
    torch.set_num_threads(threads)
    return data, folder / "first" / "teacher"


def run(world, output, **keys):
    """A run with the teacher in place."""
    data, teacher = world
    if not (output / "teacher").exists():
        shutil.copytree(teacher, output / "teacher")
    return recipe(data, output, **keys)


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def same(a, b, atol=0.0):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if not atol else torch.allclose(a[k], b[k], atol=atol) for k in a)


TRAINER = {"max_steps": 11, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "logging_steps": 1}


@pytest.mark.parametrize(
    "method,options", [("kd", {"divergence": "jsd"}), ("taid", {"distil_ratio": 0.6, "alpha": 0.2})]
)
def test_a_share_of_none_is_the_off_policy_run_to_the_bit(method, options, world, tmp_path):
    """Over several epochs, the last update of each with fewer micro-batches."""
    keys = {"method": method, "options": options, "trainer": TRAINER}
    distill(run(world, tmp_path / "off", **keys, on_policy=None))
    distill(run(world, tmp_path / "none", **keys, on_policy={"fraction": 0.0, "steps": 4, "max_new_tokens": 9}))
    assert same(tmp_path / "off", tmp_path / "none")
    losses = [[line["loss"] for line in lines(tmp_path / f)] for f in ("off", "none")]
    assert losses[0] == losses[1] and lines(tmp_path / "none")[-1]["on_policy"]["share"] == 0
    assert not (tmp_path / "none" / "samples.jsonl").exists()
    assert "Own samples" not in (tmp_path / "none" / "report.html").read_text()


def test_an_update_is_the_same_however_it_is_cut(world, tmp_path):
    """Whole batches or halves: the same texts, and the same weights to rounding."""
    for name, micro, accumulate in (("whole", 4, 1), ("halves", 2, 2)):
        trainer = {"max_steps": 6, "per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate}
        distill(run(world, tmp_path / name, trainer={**trainer, "max_grad_norm": 0.0}))
    texts = [[line["text"] for line in lines(tmp_path / n, "samples.jsonl")] for n in ("whole", "halves")]
    assert texts[0] == texts[1] and len(texts[0]) > 6
    assert same(tmp_path / "whole", tmp_path / "halves", atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["padded", "continuous"])
def test_killed_and_resumed_ends_in_the_same_weights(engine, world, tmp_path):
    """Windows of 3 updates and checkpoints every 4: kills before, after and inside, with replay and a share that grows."""
    policy = {
        "engine": engine,
        "in_flight": 4,
        "max_new_tokens": 5,
        "steps": 3,
        "fraction": 0.6,
        "replay": {"size": 5, "probability": 0.5},
    }
    policy["adaptive"] = {"by": 0.05, "tolerance": 0.0}
    trainer = {"max_steps": 14, "per_device_train_batch_size": 4, "save_steps": 4, "logging_steps": 1}
    trainer |= {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.3, "warmup_steps": 0}
    both = [run(world, tmp_path / name, on_policy=policy, trainer=trainer) for name in ("whole", "cut")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    distill(both[0])
    for step, moment in ((2, "after"), (6, "before"), (8, "saving"), (10, "after")):
        assert killed_run(both[1], step, moment)
    distill(both[1])
    torch.set_num_threads(threads)
    assert same(tmp_path / "whole", tmp_path / "cut")
    written = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "cut")]
    assert written[0] == written[1] and written[0]
    found = [lines(tmp_path / name) for name in ("whole", "cut")]
    for line in (line for log in found for line in log):
        line.pop("time_share"), line["on_policy"].pop("seconds")
    assert found[0] == found[1]
    assert found[0][-1]["on_policy"]["fraction"] > 0.6
    assert any(line["on_policy"]["replay_age"] > 0 for line in found[0])


@pytest.mark.slow
@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
@pytest.mark.parametrize("student", [{}, {"peft": {"r": 4}}])
def test_both_engines_write_the_same_run(precision, student, world, tmp_path):
    """Text by text, with adapters or without. With `bf16` the batches are rounded and the other
    engine's weights are not, so the texts differ and the run holds."""
    for engine in ("padded", "continuous"):
        policy = {"engine": engine, "max_new_tokens": 6, "steps": 3, "in_flight": 3}
        trainer = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 6, "use_cpu": True, **precision}
        side = {"model": "llama:hidden=16,layers=1,heads=2,context=64,init=0.3", **student}
        distill(run(world, tmp_path / engine, on_policy=policy, trainer=trainer, student=side))
    texts = [lines(tmp_path / engine, "samples.jsonl") for engine in ("padded", "continuous")]
    logs = [lines(tmp_path / engine)[-1]["on_policy"] for engine in ("padded", "continuous")]
    assert [(t["step"], t["id"]) for t in texts[0]] == [(t["step"], t["id"]) for t in texts[1]] and len(texts[0]) > 5
    assert logs[0]["in_flight"] < logs[1]["in_flight"] <= 3
    if not precision:
        losses = [lines(tmp_path / engine)[-1]["loss"] for engine in ("padded", "continuous")]
        assert texts[0] == texts[1] and losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_log_says_where_texts_and_time_come_from(world, tmp_path):
    result = distill(run(world, tmp_path, on_policy={"max_new_tokens": 6, "steps": 3, "replay": {"size": 4}}))
    log, texts = lines(tmp_path), lines(tmp_path, "samples.jsonl")
    for line in log:
        assert set(line["time_share"]) == {"generate", "teacher", "head", "student"}
        assert sum(line["time_share"].values()) == pytest.approx(1)
    assert log[0]["time_share"]["generate"] > 0 and log[0]["on_policy"]["seconds"] > 0
    assert sum(line["on_policy"]["written"] for line in log) == len(texts)
    assert sum(line["on_policy"]["tokens"] for line in log) == sum(t["tokens"] for t in texts)
    assert all(t["step"] <= t["for_step"] < t["step"] + 3 and t["tokens"] <= 6 for t in texts)
    assert any(t["step"] < t["for_step"] for t in texts)
    assert any(line["on_policy"]["replayed"] > 0 for line in log)
    cost = json.loads((tmp_path / "evaluation.json").read_text())["cost"]
    assert cost["generated_tokens"] == sum(t["tokens"] for t in texts) and cost["time_share"]["generate"] > 0
    assert sum(cost["time_share"].values()) == pytest.approx(1)
    assert result.metrics["nll"] > 0
    assert all(line["on_policy"]["in_flight"] == line["on_policy"]["written"] for line in log)  # one batch a window
    report = (tmp_path / "report.html").read_text()
    assert "Own samples" in report and f"it wrote {len(texts)} texts of" in report


def test_it_learns_to_write_what_the_teacher_would(world, tmp_path):
    """Reverse KL along the student's own samples falls, with own samples alone and with a mixture."""
    from understudy.models import CausalLMAdapter, load_causal_lm, load_tokenizer

    found = {}
    for name, policy, steps in (
        ("start", None, 1),
        ("own", {"fraction": 1.0, "max_new_tokens": 8, "steps": 2}, 60),
        ("mixed", {"fraction": 0.5, "max_new_tokens": 8, "steps": 2}, 60),
    ):
        trainer = {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 0.02 if steps > 1 else 1e-9}
        options = {"divergence": "jsd" if name == "mixed" else "reverse_kl", "temperature": 1.0}
        options |= {"ce_weight": 0.0, "kd_weight": 1.0}
        distill(run(world, tmp_path / name, on_policy=policy, trainer=trainer, options=options))
        tokenizer = load_tokenizer(str(tmp_path / name / "student"))
        sides = [
            CausalLMAdapter(
                load_causal_lm(str(tmp_path / name / side / "student"), tokenizer=tokenizer), len(tokenizer)
            )
            for side in (".", "teacher")
        ]
        prompts = [
            [tokenizer.bos_token_id, *tokenizer(w, add_special_tokens=False)["input_ids"]] for w in ("one", "four")
        ]
        prompts = prompts * 16
        keys = torch.arange(len(prompts)) + 12345
        ends = {tokenizer.eos_token_id}
        texts = sample(sides[0].model, prompts, keys, most=8, vocabulary=len(tokenizer), ends=ends, pad=0)
        made = [Sample(i, 0, len(p), (*p, *t)) for i, (p, t) in enumerate(zip(prompts, texts, strict=True))]
        batch = Batch.from_dict(collate_text([sampled_row(s, tokenizer) for s in made]))
        with torch.no_grad():
            student, teacher = (side.eval()(batch).signal for side in sides)
            found[name] = float(rowwise(reverse_kl, student, teacher).mean())
    assert found["own"] < 0.5 * found["start"] and found["mixed"] < 0.5 * found["start"], found


def test_the_student_is_in_its_own_mode_after_writing(world):
    from understudy.training import OnPolicy, Rollouts

    tokenizer = words()
    student = rows(tokenizer).train()
    student.model.model.embed_tokens.eval()
    modes = [m.training for m in student.modules()]
    from own_texts import batches, examples

    mine = Rollouts(OnPolicy(fraction=1.0, max_new_tokens=3), student, tokenizer, collate_text, seed=0, total=4)
    mine.take(batches(examples(tokenizer), 4), 1, 0)
    assert [m.training for m in student.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in student.parameters())


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys,said",
    [
        ({"on_policy": {"fractoin": 1}}, "Unknown recipe key: 'on_policy.fractoin'. Did you mean 'fraction'"),
        ({"on_policy": {"replay": {"sise": 1}}}, "Did you mean 'size'"),
        ({"on_policy": {"fraction": 1.5}}, "on_policy.fraction = 1.5"),
        ({"on_policy": {"cut": 1.0}}, "on_policy.cut"),
        ({"on_policy": {"engine": "vllm"}}, "on_policy.engine"),
        ({"method": "sft", "options": {}}, "uses none"),
        ({"teacher": {"model": "llama:hidden=16", "cache": "nowhere"}}, "live teacher"),
        (
            {"task": "image_classification", "student": "mlp:8", "teacher": "mlp:8", "data": {"name": "digits"}},
            "image task",
        ),
        ({"on_policy": {"adaptive": {}}}, "set trainer.eval_strategy"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(keys, said, tmp_path):
    with pytest.raises(InputError) as error:
        make({**recipe("stdlib", tmp_path), **keys})
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys,said",
    [
        ({"on_policy": {"max_new_tokens": 62}}, "64 positions of the student"),
        ({"method": "pld", "options": {}}, "cannot learn from the student's own samples"),
    ],
)
def test_what_needs_models_to_be_seen_is_refused_before_training(keys, said, tmp_path):
    data = write_set(tmp_path / "set")
    teacher = {"model": "llama:hidden=16,layers=1,heads=2,context=64"}
    with pytest.raises(InputError) as error:
        distill(recipe(data, tmp_path / "run", teacher=teacher, **keys))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "samples.jsonl").exists()


@pytest.mark.parametrize(
    "kind,options,said",
    [
        ("Lfm2", {"hidden_size": 16, "num_hidden_layers": 2, "full_attn_idxs": [1]}, "Invalid layer type: conv"),
        ("GPTJ", {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 64}, "attention of its own"),
    ],
)
def test_a_student_that_cannot_write_continuously_is_refused_before_training(kind, options, said, world, tmp_path):
    tokenizer = words()
    sizes = {"eos_token_id": tokenizer.eos_token_id, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **sizes, **options)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    keys = {"student": str(tmp_path / "student"), "trainer": {"max_steps": 2}}
    data, teacher = world[0], str(world[1] / "student")  # of the set's words too
    keys["teacher"] = teacher
    with pytest.raises(InputError) as error:
        distill(recipe(data, tmp_path / "run", on_policy={"engine": "continuous", "max_new_tokens": 4}, **keys))
    assert said in str(error.value) and "on_policy.engine=padded" in str(error.value)
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    distill(recipe(data, tmp_path / "padded", on_policy={"max_new_tokens": 4}, **keys))
    assert (tmp_path / "padded" / "samples.jsonl").exists()
