"""Paper 32 as a method: DPO with projected gradients. Its value is DPO's, its step does not lower the better answers."""

import pytest
import torch

from engine_cases import killed_run, weights
from golden_vectors import close
from split_cases import ends_alike
from test_preference_methods import staged
from test_preferences import PAIRS, anchored, lists, scorer
from test_preferences import tokenizer as tokenizer
from understudy import InputError, distill
from understudy.methods.dpo import DPO
from understudy.methods.dpo_pg import DPOPG
from understudy.training import TrainState

WORLD = {"task": "preference_world", "data": {"name": "chains"}, "method": "dpo-pg"}


def gradients(terms, parameters):
    return {
        name: list(torch.autograd.grad(term.values.mean(), parameters, retain_graph=True))
        for name, term in terms.items()
    }


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def test_both_terms_together_are_dpo_and_the_step_spares_the_better_side(tokenizer, tmp_path):
    student, reference, examples = scorer(tokenizer, 0), scorer(tokenizer, 1), lists(tokenizer, PAIRS)
    method, state = DPOPG(beta=0.3, reference="teacher"), TrainState(step=1)
    batch = staged(method, examples, student, tmp_path, reference)
    terms = method.loss(student(batch), None, batch, state)
    wanted = DPO(beta=0.3, reference="teacher").loss(student(batch), None, batch, state)["dpo"].values
    close(terms["dpo"].values + terms["rejected"].values, wanted)
    parameters = list(student.parameters())
    found = gradients(terms, parameters)
    plain = flat(torch.autograd.grad(wanted.mean(), parameters))
    close(flat(found["dpo"]) + flat(found["rejected"]), plain, rtol=1e-7, atol=1e-10)
    chosen, rejected = flat(found["dpo"]), flat(found["rejected"])
    assert chosen @ rejected < 0  # the sides conflict here, so that there is something to project
    step = flat(method.merge(found, ["backbone"] * len(parameters)))
    by_hand = rejected - (chosen @ rejected) / chosen.square().sum() * chosen
    close(step, chosen + by_hand, rtol=1e-7, atol=1e-10)
    assert step @ chosen >= chosen.square().sum() * (1 - 1e-9) and plain @ chosen < step @ chosen


def test_what_does_not_conflict_is_dpo():
    chosen, rejected = [torch.tensor([1.0, 0.0]), None], [torch.tensor([0.5, 2.0]), torch.ones(1)]
    merged = DPOPG().merge({"dpo": chosen, "rejected": rejected}, ["backbone"] * 2)
    assert merged[0].tolist() == [1.5, 2.0] and merged[1].tolist() == [1.0]


def test_any_split_of_a_batch_gives_the_same_update(tokenizer, tmp_path):
    ends_alike(lambda micro, n: anchored(DPOPG(), tokenizer, tmp_path / f"{micro}", micro, n), ((4, 1), (2, 2), (1, 4)))


def test_it_keeps_the_better_answers_likelier_than_dpo_does(tmp_path):
    found = {}
    for method in ("dpo", "dpo-pg"):
        trainer = {"max_steps": 60, "learning_rate": 5.0, "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no"}
        recipe = {**WORLD, "method": method, "trainer": trainer, "output": str(tmp_path / method)}
        found[method] = distill(recipe).metrics
    assert found["dpo-pg"]["logps/chosen"] > found["dpo"]["logps/chosen"]
    assert found["dpo-pg"]["displacement/preferred_falls"] < found["dpo"]["displacement/preferred_falls"]
    assert found["dpo-pg"]["rewards/margins"] > 0


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    recipe = {**WORLD, "trainer": {"max_steps": 12, "save_steps": 2, "logging_steps": 1}}
    distill({**recipe, "output": str(tmp_path / "whole")})
    cut = {**recipe, "output": str(tmp_path / "cut")}
    assert killed_run(cut, 5, "after")
    distill(cut)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_bad_input(tokenizer, tmp_path):
    examples = lists(tokenizer, PAIRS)
    with pytest.raises(InputError, match="needs a teacher as its reference"):
        staged(DPOPG(reference="teacher"), examples, scorer(tokenizer), tmp_path)
    for row in examples.records:
        row["scores"] = [1.0, 1.0]
    with pytest.raises(InputError, match="dpo-pg: train list 0 has one candidate or equal scores"):
        staged(DPOPG(), examples, scorer(tokenizer), tmp_path)
