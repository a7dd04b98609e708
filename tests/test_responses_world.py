"""The world of paper 32: what its policies are, and that DPO reaches the target where rejected answers allow it."""

import math

import pytest
import torch

from golden_vectors import close
from understudy import InputError, distill
from understudy.claims import get
from understudy.synthetic.chains import chains
from understudy.synthetic.responses import responses

RECIPE = {
    "task": "preference_world",
    "method": "dpo",
    "options": {"beta": 0.5, "reference": "recorded"},
    "trainer": {"max_steps": 300, "per_device_train_batch_size": 128, "save_strategy": "no"},
}


def share(rows, side, number=32):
    ids = torch.tensor([row["sequences"][side][0][1] for row in rows])
    return torch.bincount(ids, minlength=number) / len(ids)


def test_pairs_come_from_the_policies_they_say():
    world = responses(0, "optimal", pairs=20_000)
    rows = world.splits["train"].records
    away = world.log_reference + 0.5 * (world.log_reference - world.log_target)
    for side, log_p in ((0, world.log_reference), (1, away.log_softmax(-1))):
        assert (share(rows, side) - log_p.exp()).abs().max() < 0.015
    assert (share(responses(0, "target").splits["train"].records, 1) - world.log_target.exp()).abs().max() < 0.015
    ids = [int(s[0][1]) for s in rows[7]["sequences"]]
    assert rows[7]["log_probs"] == [float(world.log_reference[i]) for i in ids]


def test_values_are_exact():
    world = responses(1, "optimal", pairs=10)
    at_target, at_start = world.value(world.soft_optimal()), world.value(world.log_p)
    assert at_target["value"] == pytest.approx(0, abs=1e-12)
    assert at_start["value"] == at_start["start_value"] < -0.1
    assert at_start["did_entropy"] == pytest.approx(math.log(32)) and at_target["did_entropy"] < math.log(32)


@pytest.mark.slow
def test_dpo_reaches_the_target_and_wrong_rejections_lead_away(tmp_path):
    found = {}
    for rejected in ("optimal", "target"):
        data = {"name": "responses", "rejected": rejected, "seed": 0}
        found[rejected] = distill({**RECIPE, "data": data, "output": str(tmp_path / rejected)}).metrics
    assert found["optimal"]["value"] > 0.2 * found["optimal"]["start_value"]
    assert found["target"]["value"] < 2 * found["target"]["start_value"]


@pytest.mark.parametrize(
    "data,says",
    [
        ({"name": "responses", "rejected": "best"}, "rejected"),
        ({"name": "responses", "beta": 0}, "beta"),
        ({"name": "responses", "start": "own"}, "Unknown key data.start"),
    ],
)
def test_bad_input(data, says, tmp_path):
    with pytest.raises(InputError, match=says):
        distill({**RECIPE, "data": data, "output": str(tmp_path / "run")})


def test_a_tuned_start_prefers_rewards():
    tuned, own = chains(0, "tuned", pairs=10), chains(0, "own", pairs=10)

    def gain(world):
        rows = world.splits["clean"].records
        return torch.stack([world.reward[s[:-1], s[1:]].sum() for s in (row["sequences"][0][0] for row in rows)]).mean()

    close(tuned.reward, own.reward)
    assert gain(tuned) > gain(own) + 0.3


def test_every_arm_of_these_claims_is_a_valid_recipe(tmp_path):
    for claim in (get("dpo-pg"), get("dpo").at("losses")):
        assert claim.candidates == 2
        for label in claim.arms:
            claim.judging(label, 1, 0, tmp_path).build_method()
        assert {name for check in claim.checks for name in (check.arm, check.other)} <= set(claim.arms)
