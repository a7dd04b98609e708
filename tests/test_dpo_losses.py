"""Every loss and weight of `dpo` that TRL's trainer has, in value and gradient against it; their limits; which options go together."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from golden_vectors import close
from split_cases import ends_alike
from test_preferences import PAIRS, anchored, lists, scorer
from test_preferences import tokenizer as tokenizer
from understudy import InputError
from understudy.data import ListBatch
from understudy.data.numeric_columns import Column
from understudy.losses import preference
from understudy.losses.pair_weights import log_collision, policy_weight
from understudy.methods import variants
from understudy.methods.dpo import DPO, OF_RATIOS
from understudy.models import ModelOutput
from understudy.targets import Dense, Scores
from understudy.training import TrainState
from understudy.training.reduction import Counts, sum_terms

PROMPT = 2
LENGTHS = torch.tensor([3, 5, 6, 1, 2, 5, 4, 4])  # of chosen and rejected of four pairs
TRL_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # chosen before rejected


def batch_and_values(dtype=torch.float64):
    """A batch of four pairs, and log-probabilities of their completion tokens under policy and reference, `[tokens]`."""
    torch.manual_seed(0)
    width = PROMPT + int(LENGTHS.max())
    there = torch.arange(width) < PROMPT + LENGTHS[:, None]
    ids = torch.randint(5, 60, there.shape)
    labels = ids.masked_fill(~there | (torch.arange(width) < PROMPT), -100)
    batch = ListBatch(
        inputs={"input_ids": ids, "attention_mask": there.long()},
        labels=labels,
        ids=torch.arange(4),
        slots=torch.arange(8).view(4, 2),
        scores=torch.tensor([[1.0, 0.0]] * 4),
    )
    number = int(LENGTHS.sum())
    ours = (-3 * torch.rand(number, dtype=dtype)).requires_grad_()
    theirs = -3 * torch.rand(number, dtype=dtype)
    batch.reference = batch.sum_tokens(theirs).double()
    return batch, ours, theirs


def logits_of_tokens(ours):
    """Logits `[tokens, 7]` of which the tokens' classes, 0, have the log-probabilities `ours`."""
    rest = torch.randn(len(ours), 6, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    return torch.cat([ours[:, None], torch.log_softmax(rest, -1) + torch.log1p(-ours.exp())[:, None]], 1)


def value_of(method, batch, ours, theirs):
    """The loss of an update of one batch, as the trainer divides it."""
    state = TrainState(step=1, columns={"reference": Column.by_token("reference", batch.ids, by_list(theirs))})
    student = ModelOutput(Scores(batch.sum_tokens(ours), batch.candidates, ours, Dense(logits_of_tokens(ours))))
    sums = sum_terms(method.loss(student, None, batch, state), batch, "token_mean", own := method.counts(batch))
    counts = Counts.of(batch, "token_mean", own)
    return sum(counts.divide(name, total) for name, total in sums.losses.items())


def by_list(tokens):
    return list(tokens.split(LENGTHS.view(4, 2).sum(1).tolist()))


def value_of_trl(options, batch, ours, theirs):
    trl = pytest.importorskip("trl")
    there = batch.tokens.mask
    mask = torch.cat([torch.zeros(8, 1, dtype=torch.bool), there], 1)

    class Model(torch.nn.Module):
        is_gradient_checkpointing = False

        def __init__(self, tokens):
            super().__init__()
            squares = logits_of_tokens(tokens.detach()).softmax(-1).square().sum(-1).log()
            blank = torch.zeros(there.shape, dtype=tokens.dtype)
            self.said, self.squares = (blank.masked_scatter(there, x)[TRL_ORDER] for x in (tokens, squares))

        def forward(self, **_):
            rest = torch.zeros(self.said.shape, dtype=torch.bool)
            same = {"entropy": rest, "mean_logits": rest, "is_top1": rest}
            return SimpleNamespace(log_probs=self.said, log_sum_sq_probs=self.squares, **same)

    stub = SimpleNamespace(
        model=Model(ours),
        ref_model=Model(theirs),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=options.get("discopop_tau", 0.05)),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        use_weighting=options.get("use_weighting", False),
        ld_alpha=options.get("ld_alpha"),
        f_divergence_type=options.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha_divergence_coef", 0.5),
        loss_types=options["loss_type"],
        loss_weights=options.get("loss_weights") or [1.0] * len(options["loss_type"]),
        label_smoothing=options.get("label_smoothing", 0.0),
        beta=options.get("beta", 0.1),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {k: v[TRL_ORDER] for k, v in {**batch.inputs, "completion_mask": mask.long()}.items()}
    return trl.DPOTrainer._compute_loss(stub, stub.model, inputs, False)


CASES = [
    {"loss_type": ["sigmoid"]},
    {"loss_type": ["hinge"]},
    {"loss_type": ["ipo"], "beta": 0.3},
    {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    {"loss_type": ["nca_pair"]},
    {"loss_type": ["robust"], "label_smoothing": 0.2},
    {"loss_type": ["bco_pair"]},
    {"loss_type": ["sppo_hard"], "beta": 0.7},
    {"loss_type": ["aot"], "label_smoothing": 0.1},
    {"loss_type": ["aot_unpaired"]},
    {"loss_type": ["apo_zero"]},
    {"loss_type": ["apo_down"]},
    {"loss_type": ["discopop"], "beta": 0.02, "discopop_tau": 0.1},
    {"loss_type": ["sft"]},
    {"loss_type": ["sigmoid_norm"], "beta": 2.0},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
    {"loss_type": ["sigmoid", "ipo"]},
    {"loss_type": ["sigmoid"], "ld_alpha": 0.3},
    {"loss_type": ["apo_zero"], "ld_alpha": 0.0},
    *(
        {"loss_type": losses, "use_weighting": True, **more}
        for losses, more in (
            (["sigmoid"], {}),
            (["ipo"], {"beta": 0.3}),
            (["nca_pair"], {}),
            (["sigmoid"], {"ld_alpha": 0.3}),
            (["robust"], {"f_divergence_type": "js_divergence", "label_smoothing": 0.1}),
            (["sigmoid", "bco_pair"], {"loss_weights": [0.8, 0.2]}),
        )
    ),
    *(
        {"loss_type": [loss], "f_divergence_type": divergence, **more}
        for loss, divergence, more in (
            ("sigmoid", "forward_kl", {}),
            ("hinge", "js_divergence", {}),
            ("sigmoid_norm", "js_divergence", {"ld_alpha": 0.5}),
            ("ipo", "forward_kl", {}),
            ("robust", "alpha_divergence", {"label_smoothing": 0.1}),
            ("sigmoid", "alpha_divergence", {"f_alpha_divergence_coef": 1.5}),
            ("sigmoid", "alpha_divergence", {"f_alpha_divergence_coef": 1.0}),
        )
    ),
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_values_and_gradients_are_those_of_trl(options):
    # TRL's alpha divergence knows no float64.
    single = options.get("f_divergence_type") == "alpha_divergence"
    batch, ours, theirs = batch_and_values(torch.float32 if single else torch.float64)
    wanted = value_of_trl(options, batch, ours, theirs)
    found = value_of(
        DPO(reference="teacher" if options["loss_type"] != ["sft"] else "start", **options), batch, ours, theirs
    )
    assert abs(float(wanted.detach())) > 1e-3
    single |= options["loss_type"] == ["exo_pair"]  # whose e is a float32
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if single else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(found.to(wanted), wanted, **tolerance)
    (expected,) = torch.autograd.grad(wanted, ours)
    (gradient,) = torch.autograd.grad(found, ours)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(gradient, expected, **tolerance)


def test_every_loss_of_trl_has_its_name_here():
    trl = pytest.importorskip("trl")
    said = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    names = [part for part in said.split("'")[1::2] if part.replace("_", "").isalpha()]
    assert len(names) == 15 and names == [c for c in names if DPO(loss_type=c, pairs="extremes")]
    assert {"apo_zero", "discopop", "kto"} <= set(variants()) and "sft" not in variants()


def at(loss, w, lo, rw, rl, **options):
    return loss(*(torch.tensor([float(x)], dtype=torch.float64) for x in (w, lo, rw, rl)), **options)


def test_limits():
    same = (-5.0, -7.0, -5.0, -7.0)
    for loss, value in (
        (preference.nca_pair, 2 * math.log(2)),
        (preference.bco_pair, 2 * math.log(2)),
        (preference.sppo_hard, 2 * (0.5 / 0.1) ** 2),
        (preference.apo_zero, 1.0),
        (preference.apo_down, 1.0),
        (preference.aot, math.log(2)),
        (preference.aot_unpaired, math.log(2)),
        (preference.discopop, 0.5 * math.log(2) + 0.5),
    ):
        close(at(loss, *same), torch.tensor([value]).double(), rtol=1e-7)
    pair = (-3.0, -9.0, -5.0, -7.0)
    close(at(preference.aot, *pair), at(preference.dpo, *pair))  # one pair has one order
    close(at(preference.aot_unpaired, *pair), at(preference.dpo, *pair))
    h, e = math.log(0.9 / 0.1) / 0.1, 0.1
    close(at(preference.exo_pair, h, 0, 0, 0, label_smoothing=e), torch.zeros(1).double(), atol=1e-12)
    longer = at(preference.dpo, *pair, offset=0.5 * torch.tensor([4.0]).double())
    close(longer, -torch.nn.functional.logsigmoid(torch.tensor([2.4], dtype=torch.float64)))
    batch, ours, theirs = batch_and_values()
    whole = value_of(DPO(reference="teacher"), batch, ours, theirs)
    close(value_of(DPO(reference="teacher", ld_alpha=1.0), batch, ours, theirs), whole)
    for name in ("forward_kl", "js_divergence", "alpha_divergence"):  # all are log t near t = 1
        x = torch.tensor([1e-6], dtype=torch.float64, requires_grad=True)
        score = preference.f_divergence_score(x, name)
        (slope,) = torch.autograd.grad(score, x)
        assert slope.item() == pytest.approx(0.5 if name == "js_divergence" else 1.0, rel=1e-5)
        assert score.item() == pytest.approx(slope.item() * 1e-6, rel=1e-4)
    penalty = 0.2 * (LENGTHS[::2] - LENGTHS[1::2])
    margins = (batch.sum_tokens(ours) - batch.reference).diff(dim=1)[:, 0] * -0.1
    by_hand = torch.nn.functional.softplus(-(margins + penalty)).mean()
    close(value_of(DPO(reference="teacher", length_penalty=0.2), batch, ours, theirs), by_hand, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(OF_RATIOS))
def test_extreme_margins_stay_finite(name):
    w = torch.tensor([1e4, -1e4], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(2).double()
    value = OF_RATIOS[name](w, zero, zero, zero, beta=1.0).sum()
    value.backward()
    assert value.isfinite() and w.grad.isfinite().all()


@pytest.mark.parametrize(
    "options,says",
    [
        ({"loss_type": ["dpo", "kto"]}, "cannot be added up"),
        ({"loss_type": ["dpo", "sigmoid"]}, "cannot be added up"),
        ({"loss_type": []}, "cannot be added up"),
        ({"loss_type": ["dpo", "sft"], "loss_weights": [1.0]}, "1 values for 2 losses"),
        ({"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "not defined for apo_zero"),
        ({"loss_weights": [2.0]}, "1 values for 1 losses"),
        ({"loss_type": "sft", "f_divergence_type": "forward_kl"}, "not defined for sft"),
        ({"f_alpha_divergence_coef": 0.2}, "no effect with f_divergence_type=reverse_kl"),
        ({"loss_type": "exo_pair", "label_smoothing": 0.0}, "exo_pair is infinite"),
        ({"loss_type": "aot", "pairs": "all"}, "sorts one pair of each list"),
        ({"loss_type": "kto", "pairs": "random"}, "pairs has no effect on kto"),
        ({"ld_alpha": 0.5, "pairs": "all"}, "needs pairs=extremes"),
        ({"ld_alpha": 0.5, "reference": "recorded"}, "no recorded reference"),
        ({"loss_type": "cpo", "ld_alpha": 0.5}, "ld_alpha has no effect with loss_type=cpo"),
        ({"loss_type": "ipo", "length_penalty": 0.1}, "length_penalty has no effect with loss_type=ipo"),
        ({"discopop_tau": 0.1}, "discopop_tau has no effect with loss_type=dpo"),
        ({"use_weighting": True, "loss_type": "kto"}, "use_weighting has no effect with loss_type=kto"),
        ({"use_weighting": True, "loss_type": ["dpo", "sft"]}, "use_weighting is not defined for dpo . sft"),
        ({"use_weighting": True, "loss_type": ["dpo", "aot"]}, "use_weighting is not defined for dpo . aot"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        DPO(**options)


def test_an_option_of_one_loss_leaves_the_others_of_a_mix_alone():
    batch, ours, theirs = batch_and_values()
    sides = {"reference": "teacher"}
    mix = value_of(DPO(loss_type=("hinge", "bco_pair"), length="mean", **sides), batch, ours, theirs)
    alone = [DPO(loss_type="hinge", length="mean", **sides), DPO(loss_type="bco_pair", **sides)]
    close(mix, sum(value_of(method, batch, ours, theirs) for method in alone))


def test_the_weights_of_pairs():
    alike = torch.full((3, 5), 0.7).double()
    close(log_collision(alike), torch.full((3,), -math.log(5), dtype=torch.float64), rtol=1e-12)
    sure = torch.tensor([[40.0, 0.0, 0.0]]).double()
    close(log_collision(sure), torch.zeros(1).double(), atol=1e-12)
    close(policy_weight(torch.zeros(2)), torch.ones(2))
    with pytest.raises(InputError, match="nan logits"):
        log_collision(torch.tensor([[0.0, 0.0], [math.nan, 0.0]]))
    batch, ours, theirs = batch_and_values()
    squares = logits_of_tokens(ours).softmax(-1).square().sum(-1)
    weights = batch.mean_tokens(ours - squares.log()).exp().prod(1).detach()
    log_probs, lengths = batch.sum_tokens(ours), batch.lengths
    plain = preference.simpo(*log_probs.unbind(1), *lengths.unbind(1))
    simpo = value_of(DPO(loss_type="simpo", use_weighting=True), batch, ours, theirs)
    close(simpo, (weights * plain).mean(), rtol=1e-9)
    every = DPO(reference="teacher", use_weighting=True, pairs="all")  # one pair of each list here
    close(
        value_of(every, batch, ours, theirs),
        value_of(DPO(reference="teacher", use_weighting=True), batch, ours, theirs),
    )


def test_bad_input():
    with pytest.raises(InputError, match="label_smoothing is 0"):
        at(preference.exo_pair, 0, 0, 0, 0, label_smoothing=0.0)
    with pytest.raises(InputError, match="tau is 0"):
        at(preference.discopop, 0, 0, 0, 0, tau=0.0)
    with pytest.raises(InputError, match="Unknown f-divergence 'kl'"):
        preference.f_divergence_score(torch.zeros(1), "kl")


@pytest.mark.parametrize(
    "method",
    [
        DPO(loss_type=("dpo", "sft"), loss_weights=(1.0, 0.5)),
        DPO(ld_alpha=0.5),
        DPO(f_divergence_type="js_divergence"),
        DPO(use_weighting=True),
    ],
    ids=("sft", "ld", "js", "wpo"),
)
def test_any_split_of_a_batch_gives_the_same_update(method, tokenizer, tmp_path):
    ends_alike(lambda micro, n: anchored(method, tokenizer, tmp_path / f"{micro}", micro, n), ((4, 1), (1, 4)))


def test_setup_keeps_the_references_tokens(tokenizer, tmp_path):
    student, reference, method = scorer(tokenizer, 0), scorer(tokenizer, 1), DPO(ld_alpha=0.0, reference="teacher")
    examples = lists(tokenizer, PAIRS)
    from understudy.data import Batch, collate_lists
    from understudy.training import SetupContext

    context = SetupContext(student, reference, {"train": examples}, collate_lists, 300, tmp_path / "store", "key")
    method.setup(context)
    batch = Batch.from_dict(collate_lists(list(examples.records)))
    state = TrainState(student=student, step=1, columns=context.columns)
    found = method.loss(student(batch), None, batch, state)["dpo"].values
    said = [model(batch).signal.by_token("test")[0] for model in (student, reference)]
    kept = batch.token_places < batch.lengths.amin(1)[batch.token_lists]
    ratio = batch.sum_tokens(torch.where(kept, said[0] - said[1], 0.0))
    close(found, -torch.nn.functional.logsigmoid(0.1 * (ratio[:, 0] - ratio[:, 1])), rtol=1e-6)
