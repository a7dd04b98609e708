"""The student's own samples: which texts, their masks and provenance, batches of any cut, and what is refused."""

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from own_texts import batches, examples, model, rows, words
from understudy.data import IGNORE, UNLABELLED, Batch, collate_text, encode
from understudy.data.samples import Sample, pack, prompt_length, sampled_row, unpack
from understudy.errors import InputError
from understudy.generation.decoding import choose, sample
from understudy.methods import get as get_method
from understudy.training import OnPolicy, Rollouts, TrainState
from understudy.training import rollouts as rollouts_module


@pytest.fixture(scope="module")
def tokenizer():
    return words()


@pytest.fixture
def student(tokenizer):
    return rows(tokenizer, seed=3)


def rollouts(student, tokenizer, total=8, **policy):
    values = {"max_new_tokens": 5, "steps": 2, **policy}
    return Rollouts(OnPolicy(**values), student, tokenizer, collate_text, seed=7, total=total)


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_draws_follow_the_distribution_and_its_cuts():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0], dtype=torch.float64)
    keys = torch.arange(20_000)
    many = logits.expand(len(keys), -1)
    for temperature in (1.0, 0.5):
        shares = choose(many, keys, 0, temperature).bincount(minlength=5).double() / len(keys)
        assert torch.allclose(shares, (logits / temperature).softmax(-1), atol=0.012)
    assert set(choose(many, keys, 0, 1.0, top_k=2).tolist()) == {0, 1}
    assert set(choose(many, keys, 0, 1.0, 0.6).tolist()) == {0}  # the first token alone holds 0.64
    assert set(choose(many, keys, 0, 1.0, 0.7).tolist()) == {0, 1}
    share = (choose(many, keys, 0, 1.0, 0.7) == 0).double().mean()
    assert share == pytest.approx(float(logits[:2].softmax(-1)[0]), abs=0.012)
    assert (choose(many, keys, 0, 0.0) == 0).all()
    assert not torch.equal(choose(many, keys, 0, 1.0), choose(many, keys, 1, 1.0))


def test_greedy_samples_are_those_of_generate_and_leave_the_model_as_it_was(tokenizer):
    own = model(tokenizer, seed=1)
    own.train()
    own.model.layers[0].eval()  # a part that somebody froze stays frozen
    own.generation_config.repetition_penalty = 3.0  # the model's own recipe has no part in it
    modes, config = [m.training for m in own.modules()], own.generation_config
    prompts = [[1, 20], [1, 30, 31, 32, 33], [1, 40, 41], [1]]
    settings = {"most": 9, "vocabulary": len(tokenizer), "ends": {tokenizer.eos_token_id}, "pad": 0}
    found = sample(own, prompts, torch.arange(4), temperature=0.0, in_flight=3, **settings)
    assert [m.training for m in own.modules()] == modes and own.generation_config is config
    assert all(p.grad is None for p in own.parameters())
    own.generation_config.repetition_penalty = 1.0
    own.eval()
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        whole = own.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9)
        assert whole[0, len(prompt) :].tolist() == text


def test_a_text_hangs_on_its_prompt_and_key_alone(tokenizer, student):
    prompts = [[1, 20 + i, 7][: 1 + i % 3] for i in range(9)]
    settings = {"most": 6, "vocabulary": len(tokenizer), "ends": {2}, "pad": 0}
    keys = torch.arange(9) * 991 + 5
    whole = sample(student.model, prompts, keys, **settings)
    assert whole == sample(student.model, prompts, keys, in_flight=2, **settings)
    back = sample(student.model, prompts[::-1], keys.flip(0), in_flight=4, **settings)
    assert whole == back[::-1] and len({tuple(t) for t in whole}) > 5
    assert whole != sample(student.model, prompts, keys + 1, **settings)


def test_padded_rows_of_the_head_are_never_written(tokenizer):
    own = model(tokenizer, seed=1)
    own.resize_token_embeddings(len(tokenizer) + 64)
    with torch.no_grad():
        own.get_output_embeddings().weight[len(tokenizer) :] = 50.0
    found = sample(own, [[1, 5]] * 8, torch.arange(8), most=6, vocabulary=len(tokenizer), ends=set(), pad=0)
    assert all(len(t) == 6 and max(t) < len(tokenizer) for t in found)


# -- which prompt, which rows -----------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=2, max_size=20), st.floats(0.001, 0.999), st.floats(0.01, 0.99))
@settings(max_examples=80, deadline=None)
def test_a_prompt_ends_where_the_last_answer_begins(trained, draw, cut):
    labels = torch.tensor([5 if t else IGNORE for t in trained])
    for how in (cut, "random"):
        start = prompt_length(labels, how, draw)
        assert 1 <= start < len(labels)
        last = max((i for i, t in enumerate(trained) if t and (i == 0 or not trained[i - 1])), default=0)
        assert start == last or last == 0


def test_a_conversation_is_continued_at_its_last_answer(student):
    tokenizer = words()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    chat = [{"role": r, "content": c} for r, c in turns]
    items = encode([{"id": 4, "messages": chat}], tokenizer, max_length=64, pack=False)[0]
    (taken,) = rollouts(student, tokenizer, fraction=1.0).take(batches(items, 1), 1, 0)
    batch = Batch.from_dict(taken)
    kept = batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0].bool()].tolist()
    begin = tokenizer("<user>one</s><assistant>two</s><user>three</s><assistant>", add_special_tokens=False)[
        "input_ids"
    ]
    assert kept[: len(begin)] == begin
    counted = (batch.labels[0] != IGNORE).nonzero()[:, 0].tolist()
    assert counted == list(range(len(begin), len(kept)))  # the first answer is prompt now


def test_plain_text_is_cut_at_a_share_or_anywhere(tokenizer, student):
    items = encode(
        [{"id": i, "text": " ".join(["one two three"] * 9)} for i in range(8)], tokenizer, max_length=20, pack=False
    )[0]
    for cut, starts in ((0.25, {5}), ("random", None)):
        taken = rollouts(student, tokenizer, fraction=1.0, cut=cut).take(batches(items, 8), 1, 0)
        found = set((Batch.from_dict(taken[0]).labels != IGNORE).int().argmax(1).tolist())
        assert found == starts if starts else len(found) > 2


def test_only_what_was_written_counts_and_the_end_is_learned(tokenizer, student, monkeypatch):
    """Nothing of the prompt, nothing after the end, and a sample that ends at once still says when to end."""
    end = tokenizer.eos_token_id
    texts = [[40, 41, end], [end], [42, 43, 44, 45, 46]]
    monkeypatch.setattr(rollouts_module, "sample", lambda *args, **kwargs: texts)
    items = examples(tokenizer, 3)
    mine = rollouts(student, tokenizer, fraction=1.0)
    (taken,) = mine.take(batches(items, 3), 1, 0)
    batch = Batch.from_dict(taken)
    assert batch.num_items == 3 + 1 + 5 and set(batch.row_labels.tolist()) == {UNLABELLED}
    for i, text in enumerate(texts):
        start = prompt_length(items[i]["labels"], "random", 0.5)
        assert (batch.labels[i] != IGNORE).nonzero()[:, 0].tolist() == list(range(start, start + len(text)))
        assert batch.inputs["input_ids"][i, start : start + len(text)].tolist() == text
        assert batch.inputs["attention_mask"][i].sum() == start + len(text)
    log = mine.logs()["on_policy"]
    assert (log["written"], log["tokens"], log["empty"], log["unended"]) == (3, 9, 1, 1)
    assert mine.logs()["on_policy"]["tokens"] == 0  # since the last log


def test_samples_survive_packing():
    texts = [Sample(3, 0, 2, (1, 5, 6)), Sample(9, 4, 1, (1,)), Sample(2, 1, 1, (1, 2))]
    assert unpack(pack(texts)) == texts and unpack(pack([])) == []


# -- the mixture ------------------------------------------------------------------------------------------------------


def test_a_share_of_one_never_shows_a_completion_of_the_data(tokenizer, student):
    items, mine = examples(tokenizer), rollouts(student, tokenizer, fraction=1.0)
    stream = batches(items, 4)
    for step in range(4):
        (taken,) = mine.take(stream, 1, step)
        batch = Batch.from_dict(taken)
        assert (batch.source == 1).all() and set(batch.row_labels.tolist()) == {UNLABELLED}
        assert batch.sampled.tolist() == [step - step % 2] * 4  # written with the weights of the window's first step
        assert batch.to("cpu").source is not None and batch.ids.tolist() == [4 * step + i for i in range(4)]
    assert mine.logs()["on_policy"]["share"] == 1.0


def test_a_share_of_none_leaves_every_batch_as_it_is(tokenizer, student, monkeypatch):
    monkeypatch.delattr(rollouts_module, "token_rows")  # nor is any batch taken apart for it
    items, mine = examples(tokenizer), rollouts(student, tokenizer, fraction=0.0)
    stream, plain = batches(items, 4), batches(items, 4)
    for step, values in enumerate(islice(plain, 4)):
        (taken,) = mine.take(stream, 1, step)
        assert all(torch.equal(taken[k], v) for k, v in values.items()) and not taken["source"].any()


def test_a_batch_of_any_cut_and_a_resumed_run_hold_the_same_texts(tokenizer, student):
    items = examples(tokenizer, 24)

    def texts(mine, size, number, steps, stream):
        for step in steps:
            for values in mine.take(stream, number, step):
                b = Batch.from_dict(values)
                for i in range(len(b.ids)):
                    kept = b.inputs["attention_mask"][i].bool()
                    yield (
                        step,
                        int(b.ids[i]),
                        int(b.source[i]),
                        int(b.sampled[i]),
                        tuple(b.inputs["input_ids"][i][kept].tolist()),
                    )

    policy = {"steps": 3, "replay": {"size": 4, "probability": 0.6}}
    whole = list(texts(rollouts(student, tokenizer, **policy), 4, 1, range(6), batches(items, 4)))
    halves = list(texts(rollouts(student, tokenizer, **policy, in_flight=2), 2, 2, range(6), batches(items, 2)))
    assert whole == halves and {source for _, _, source, *_ in whole} == {0, 1, 2}
    assert any(step - at > 2 for step, _, source, at, _ in whole if source == 2)
    first, second = rollouts(student, tokenizer, **policy), rollouts(student, tokenizer, **policy)
    begun = list(texts(first, 4, 1, range(4), batches(items, 4)))
    second.load_state_dict(first.state_dict())  # in the middle of a window
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(-1.0)  # what is written already does not change with the weights
    rest = list(texts(second, 4, 1, range(4, 6), islice(batches(items, 4), 4, None)))
    assert begun + rest == whole


def test_the_buffer_is_full_before_anything_is_replayed(tokenizer, student):
    mine = rollouts(student, tokenizer, total=6, fraction=1.0, steps=1, replay={"size": 6, "probability": 1.0})
    stream = batches(examples(tokenizer, 24), 4)
    found = [set(mine.take(stream, 1, step)[0]["source"].tolist()) for step in range(6)]
    assert found == [{1}, {1}, {2}, {2}, {2}, {2}] and len(mine.buffer) == 6
    assert mine.logs()["on_policy"]["replay_age"] > 1
    linear = rollouts(student, tokenizer, total=6, fraction=1.0, steps=1, replay={"size": 1})
    stream = batches(examples(tokenizer, 24), 4)
    shares = [int((linear.take(stream, 1, step)[0]["source"] == 2).sum()) for step in range(6)]
    assert shares[0] == 0 and sum(shares[3:]) > sum(shares[:3])


def test_the_share_rises_with_the_validation_loss(tokenizer, student):
    mine = rollouts(student, tokenizer, fraction=0.0, adaptive={"by": 0.4, "tolerance": 0.1})
    for loss, share in ((2.0, 0.0), (2.05, 0.0), (2.2, 0.4), (1.0, 0.4), (1.1, 0.8), (1.3, 1.0)):
        mine.on_evaluate({"nll": loss})
        assert mine.fraction == pytest.approx(share)
    with pytest.raises(InputError, match="reads nll"):
        mine.on_evaluate({"accuracy": 1.0})


# -- objectives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,options", [("kd", {"ce_weight": 0.7, "kd_weight": 0.3}), ("taid", {"distil_ratio": 0.3})]
)
def test_labels_are_read_where_the_data_has_them_alone(name, options, tokenizer, student):
    """Own samples have no cross-entropy: its value is 0 there, and its gradient that of the data's rows."""
    method = get_method(name)(**options)
    teacher = rows(tokenizer, seed=8)
    items = examples(tokenizer, 2)
    own = sampled_row(Sample(1, 0, 2, tuple(items[1]["input_ids"].tolist())), tokenizer)
    for marks, rest in (([0, 1], [items[0], own]), ([1, 1], [own, own]), ([0, 0], [items[0], items[1]])):
        source = torch.tensor(marks)
        batch = Batch.from_dict({**collate_text(rest), "source": source, "sampled": -1 + source})
        state = TrainState(method_state=method.init_state(10))
        terms = method.loss(student(batch), teacher(batch), batch, state)
        ce, from_data = terms["ce"].values, source[batch.sequence] == 0
        assert len(ce) == batch.num_items and (ce[from_data] > 0).all() and (ce[~from_data] == 0).all()
        student.zero_grad()
        ce.sum().backward()
        got = [p.grad.clone() for p in student.parameters()]
        student.zero_grad()
        data = [r for r, m in zip(rest, marks, strict=True) if m == 0]
        if data:
            plain = Batch.from_dict(collate_text(data))
            method.loss(student(plain), teacher(plain), plain, state)["ce"].values.sum().backward()
        want = [p.grad if p.grad is not None else torch.zeros_like(p) for p in student.parameters()]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))
