"""Two tokenizers over one text: groups of bytes, the vocabularies' common part, and what a teacher of other tokens says."""

import functools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from understudy import InputError, losses
from understudy.data import Batch, collate_text, train_tokenizer
from understudy.models import CausalLMAdapter
from understudy.models.tokenizers import token_bytes
from understudy.streaming import logits_of, rowwise
from understudy.targets import Dense, TopK
from understudy.teachers import Aligner, LocalTeacher, OtherTokenizer
from understudy.teachers.alignment import groups

TEXTS = [
    "the cat sat on the mat, naïvely",
    "日本語の猫 🙂 cat",
    "🙂🙃 def f(x):\n\treturn x  # 12345",
    "thereafter the other",
] * 4
NAMES = ("bytes", "bytes_bare", "unigram", "fallback", "wordpiece")


@functools.cache
def tokenizer(name, size=330):
    """One of each family; `bytes_bare` has no beginning, `unigram` an unknown token, `wordpiece` keeps no spaces."""
    if name == "bytes":
        return train_tokenizer(TEXTS, size)
    if name == "small":
        return train_tokenizer(TEXTS[:1], 270)
    special = ["<unk>", "<s>", "</s>"]
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if name == "bytes_bare":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=290, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        )
        ends = {"eos_token": "<|end|>"}
    elif name == "unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    elif name == "fallback":
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = special + [f"<0x{b:02X}>" for b in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=special, show_progress=False, limit_alphabet=30)
    else:
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    core.train_from_iterator(TEXTS, trainer)
    if name == "fallback":  # the trainer marks bytes as special; in released tokenizers they are ordinary tokens
        state = __import__("json").loads(core.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
        core = Tokenizer.from_str(__import__("json").dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=core, **ends)


@functools.cache
def aligner(one, other):
    return Aligner(tokenizer(one), tokenizer(other))


def marked(name, text):
    """Ids as the data give them: beginning, text, end."""
    t = tokenizer(name)
    ids = t(text, add_special_tokens=False)["input_ids"]
    return [i for i in (t.bos_token_id, *ids, t.eos_token_id) if i is not None]


LETTERS = st.text(st.sampled_from(list("theca st,n\n1é日本語猫🙂🙃👩‍👩ñ")), min_size=1, max_size=24)
PAIRS = [(a, b) for a in NAMES for b in NAMES]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PAIRS), LETTERS)
def test_groups_are_monotone_and_cover_the_same_bytes(pair, text):
    one, other = (tokenizer(n) for n in pair)
    ids = marked(pair[0], text)
    found = aligner(*pair).align(ids)
    mine, theirs = token_bytes(one)[0], token_bytes(other)[0]
    at = other_at = 0
    for g in found.groups:
        assert at <= g.start < g.stop <= len(ids) and other_at <= g.other_start < g.other_stop <= len(found.ids)
        at, other_at = g.stop, g.other_stop
        left = [mine[i] for i in ids[g.start : g.stop]]
        right = [theirs[i] for i in found.ids[g.other_start : g.other_stop]]
        if None in left or None in right:
            assert g.single and g.size == 0
        elif "wordpiece" not in pair:
            assert b"".join(left).lstrip(b" ") == b"".join(right).lstrip(b" ")
            assert len(b"".join(left)) - g.size in (0, 1)
            for i in range(1, len(left)):  # none could be cut in two
                assert all(b"".join(left[:i]) != b"".join(right[:j]) for j in range(1, len(right))) or g.start < 2
    assert sum(g.size for g in found.groups) <= found.size
    if not {"unigram", "wordpiece"} & set(pair):
        assert sum(g.size for g in found.groups) == found.size  # nothing is lost


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES[:4]), LETTERS)
def test_one_tokenizer_with_itself_is_one_to_one(name, text):
    ids = marked(name, text)
    assume(tokenizer(name).unk_token_id not in ids or name == "bytes_bare")  # its text is not to be had back
    found = aligner(name, name).align(ids)
    assert found.ids == ids and len(found.groups) == len(ids) and all(g.single for g in found.groups)
    if sum(g.size for g in found.groups):
        assert aligner(name, name).shares([ids]) == (1.0, 0.0)


def test_groups_by_hand():
    # th|e cat against the| |c|at, in bytes: ends 2 3 4+3 and 3 4 5 7
    assert [tuple(g) for g in groups([2, 3, 7], [3, 4, 5, 7])] == [(0, 2, 0, 1, 3), (2, 3, 1, 4, 4)]
    # the first two tokens of the row hold the rest of a character that the text lacks
    assert [tuple(g) for g in groups([None, 0, 1, 2], [1, 2], before=2)] == [(2, 3, 0, 1, 1), (3, 4, 1, 2, 1)]
    # one straddles the beginning: its group is dropped, the next is not
    assert [tuple(g) for g in groups([1, 2], [1, 2], before=1)] == [(1, 2, 1, 2, 1)]


def test_a_character_cut_by_the_row_is_left_out_and_no_more():
    one = tokenizer("small")  # 🙂 is four tokens
    ids = one("🙂cat🙂", add_special_tokens=False)["input_ids"]
    found = aligner("small", "bytes").align(ids[2:-2])
    letters = one("cat", add_special_tokens=False)["input_ids"]
    assert sum(g.size for g in found.groups) == 3
    assert {s for g in found.groups for s in range(g.start, g.stop)} == set(range(2, 2 + len(letters)))


def test_beginning_and_end_on_one_side_only():
    text = "the cat"
    ids = marked("bytes_bare", text)
    read = aligner("bytes_bare", "bytes").align(ids)
    other = tokenizer("bytes")
    assert read.ids[0] == other.bos_token_id and read.ids[-1] == other.eos_token_id
    assert read.groups[-1].single and read.groups[-1].start == len(ids) - 1  # the ends are one token
    back = aligner("bytes", "bytes_bare").align(marked("bytes", text))
    assert tokenizer("bytes_bare").decode(back.ids[:-1]).strip() == text  # no beginning there: nothing in its place
    assert back.groups[0].start == 1 and sum(g.size for g in back.groups) == len(text)


def test_the_common_vocabulary_is_by_bytes():
    pair = aligner("bytes", "fallback")
    mine, theirs = token_bytes(tokenizer("bytes"))[0], token_bytes(tokenizer("fallback"))[0]
    ordinary = {i: j for i, j in pair.partner.items() if mine[i] is not None}
    assert len(set(pair.partner.values())) == len(pair.partner)
    assert all(mine[i] == theirs[j] for i, j in ordinary.items()) and len(ordinary) > 250
    assert pair.partner[tokenizer("bytes").eos_token_id] == tokenizer("fallback").eos_token_id
    name = tokenizer("fallback").convert_ids_to_tokens(pair.partner[tokenizer("bytes").convert_tokens_to_ids("t")])
    assert name == "t"  # and not <0x74>


# -- what the teacher says -------------------------------------------------------------------------------------------


def llama(name, seed=0):
    torch.manual_seed(seed)
    size = len(tokenizer(name))
    config = LlamaConfig(
        vocab_size=size + 3,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return CausalLMAdapter(LlamaForCausalLM(config).eval(), size)


def batch_of(name, texts, masked=0):
    rows = []
    for i, text in enumerate(texts):
        ids = torch.tensor(marked(name, text))
        labels = ids.clone()
        labels[: masked + 1] = -100
        rows.append({"input_ids": ids, "labels": labels, "id": i, "bytes": 0})
    return Batch.from_dict(collate_text(rows))


def test_with_the_students_own_tokenizer_it_is_the_teacher_itself():
    model, batch = llama("bytes"), batch_of("bytes", TEXTS[:4])
    other = OtherTokenizer(model, aligner("bytes", "bytes"), support=10**6)
    said = LocalTeacher(other, "t")(batch).signal
    alone = LocalTeacher(model, "t")(batch).signal
    student = torch.randn(batch.num_items, len(tokenizer("bytes")))
    # the padding token is no text: it stays in the bucket with its mass
    for loss in (losses.forward_kl, losses.jsd, losses.total_variation):
        torch.testing.assert_close(loss(student, said), loss(student, Dense(logits_of(alone))), atol=2e-3, rtol=1e-3)
    truth = logits_of(alone).log_softmax(-1)
    torch.testing.assert_close(said.log_probs, truth.gather(-1, said.ids))


def test_every_group_keeps_the_texts_likelihood():
    """Σ of the rows' log-probabilities over a group is the chain rule over the teacher's tokens."""
    model, batch = llama("bytes"), batch_of("small", TEXTS[:4])
    pair = aligner("small", "bytes")
    said = OtherTokenizer(model, pair, support=5)(batch).signal
    rows = torch.full(batch.labels.shape, -1)
    rows[:, 1:][batch.mask] = torch.arange(batch.num_items)
    longer = 0
    for b in range(4):
        ids = batch.inputs["input_ids"][b][batch.inputs["attention_mask"][b].bool()].tolist()
        found = pair.align(ids)
        read = torch.tensor([found.ids])
        log_p = model.model(input_ids=read).logits[0, :, : model.vocabulary].log_softmax(-1)
        for g in found.groups:
            numbers = rows[b, g.start : g.stop]
            if g.other_start == 0 or (numbers < 0).any():
                continue
            chain = sum(log_p[t - 1, found.ids[t]] for t in range(g.other_start, g.other_stop))
            label = batch.row_labels[numbers]
            at = (said.ids[numbers] == label[:, None]).float()
            assert (at.sum(-1) == 1).all()
            torch.testing.assert_close(
                (said.log_probs[numbers].nan_to_num(neginf=0) * at).sum(), chain, atol=1e-4, rtol=1e-4
            )
            mass = said.log_probs[numbers].exp().sum(-1) + said.log_tail[numbers, 0].exp()
            torch.testing.assert_close(mass, torch.ones_like(mass))
            longer += not g.single
    assert longer > 5


@pytest.mark.parametrize("one", ["small", "bytes_bare", "fallback", "unigram", "wordpiece"])
@pytest.mark.parametrize(
    "name", ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "cross_entropy_soft"]
)
def test_any_divergence_is_finite_and_silent_rows_say_nothing(one, name):
    model, batch = llama("bytes"), batch_of(one, TEXTS[:4])
    said = OtherTokenizer(model, aligner(one, "bytes"), support=6, limit=5)(batch).signal
    assert isinstance(said, TopK) and said.rows == batch.num_items
    silent = (said.ids < 0).all(-1)
    assert silent.any() and not silent.all()
    student = (torch.randn(batch.num_items, len(tokenizer(one)), dtype=torch.float64)).requires_grad_()
    values = rowwise(getattr(losses, name), Dense(student), said)
    (grad,) = torch.autograd.grad(values.sum(), student)
    assert values.isfinite().all() and grad.isfinite().all()
    assert values[silent].abs().max() < 1e-6 and grad[silent].abs().max() < 1e-6
    assert values[~silent].abs().max() > 1e-3
    if name != "cross_entropy_soft":
        assert (values > -1e-6).all()


def test_a_batch_may_be_cut_anywhere_and_prompts_are_context():
    model, pair = llama("bytes"), aligner("small", "bytes")
    other = OtherTokenizer(model, pair, support=5)
    batch = batch_of("small", TEXTS[:4], masked=3)
    whole = other(batch).signal
    parts = [other(batch.take(torch.tensor(i))).signal for i in ([0], [1, 2], [3])]
    for field in ("ids", "log_probs", "log_tail"):
        torch.testing.assert_close(
            torch.cat([getattr(p, field) for p in parts]), getattr(whole, field), atol=1e-5, rtol=1e-5
        )
    every = batch_of("small", TEXTS[:4])
    said = other(every).signal
    keep = (batch.labels[:, 1:] != -100)[every.mask]
    torch.testing.assert_close(said.log_probs[keep], whole.log_probs, atol=1e-5, rtol=1e-5)


def test_padded_buckets_equal_shorter_ones():
    student = torch.randn(3, 9, dtype=torch.float64)
    p = torch.randn(3, 9, dtype=torch.float64).log_softmax(-1)
    ids = torch.tensor([[0, 4], [3, 0], [8, 1]])
    kept = p.gather(-1, ids)
    tail = p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    pad = lambda x, v: torch.cat([x[:, :1], torch.full((3, 1), v, dtype=x.dtype), x[:, 1:]], 1)  # noqa: E731
    for loss in (losses.forward_kl, losses.reverse_kl, losses.jsd, losses.total_variation):
        for truncation in ("tail", "renorm"):
            a = loss(student, TopK(ids, kept, tail), truncation=truncation)
            b = loss(student, TopK(pad(ids, -1), pad(kept, -torch.inf), tail), truncation=truncation)
            torch.testing.assert_close(a, b)


def test_bad_sides_are_one_line():
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(InputError, match="student's tokenizer Slow gives no offsets"):
        Aligner(slow, tokenizer("bytes"))
    with pytest.raises(InputError, match="no features for the student's tokens"):
        OtherTokenizer(llama("bytes"), aligner("small", "bytes"))(batch_of("small", TEXTS[:2]), features=True)
