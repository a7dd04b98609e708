"""Preference worlds: exact values against sampling, determinism, which pairs of a list are learned from."""

import pytest
import torch

from golden_vectors import close
from understudy import InputError, distill
from understudy.data import Batch
from understudy.losses import preference
from understudy.methods.dpo import DPO
from understudy.models import ModelOutput
from understudy.runs.check import evaluate_run
from understudy.synthetic.bandit import ChoiceAdapter, ChoicePolicy, bandit, collate_choices
from understudy.synthetic.chains import chains
from understudy.targets import Scores
from understudy.training import TrainState


def test_the_value_of_a_chain_is_exact():
    world = chains(3, "own")
    at_home = world.value(world.log_p)
    assert at_home["kl_to_reference"] == pytest.approx(0, abs=1e-12)
    assert at_home["value"] == pytest.approx(at_home["return"])
    policy = torch.randn(16, 16, dtype=torch.float64).log_softmax(-1)
    exact = world.value(policy)
    number = 40_000
    at = torch.randint(16, (number,))
    gained = torch.zeros(number, dtype=torch.float64)
    distance = torch.zeros(number, dtype=torch.float64)
    for _ in range(world.length):
        then = torch.multinomial(policy.exp()[at], 1)[:, 0]
        gained += world.reward[at, then]
        distance += policy[at, then] - world.log_p[at, then]
        at = then
    for name, sampled in (("return", gained), ("kl_to_reference", distance)):
        assert abs(exact[name] - sampled.mean()) < 5 * sampled.std() / number**0.5


def test_labels_of_chains_follow_their_returns():
    world = chains(0, "own", pairs=4000)
    wins = []
    for row in world.splits["train"].records:
        (a, _), (b, _) = row["sequences"]
        gain = [world.reward[s[:-1], s[1:]].sum() for s in (a, b)]
        wins.append((float(gain[0] - gain[1]), row["scores"][0]))
    margin, won = torch.tensor(wins).T
    assert won[margin > 3].mean() > 0.9 and won[margin < -3].mean() < 0.1
    assert abs(won[margin.abs() < 0.3].mean() - 0.5) < 0.1


def test_noise_of_labels_flips_training_pairs_of_chains_and_nothing_else():
    clean, noisy, again = (chains(1, "own", label_noise=share) for share in (0.0, 0.25, 0.25))
    flipped = []
    for split, examples in clean.splits.items():
        for a, b, c in zip(examples.records, noisy.splits[split].records, again.splits[split].records, strict=True):
            assert b["scores"] == c["scores"]
            assert all(torch.equal(x, y) for x, y in zip(a["sequences"][0], b["sequences"][0], strict=True))
            if split == "train":
                flipped.append(a["scores"] == b["scores"][::-1])
            else:
                assert a["scores"] == b["scores"]
    assert 0.2 < sum(flipped) / len(flipped) < 0.3
    every = chains(1, "own", label_noise=1.0).splits["train"].records
    assert all(a["scores"] == b["scores"][::-1] for a, b in zip(clean.splits["train"].records, every, strict=True))


@pytest.mark.parametrize("noise", ["none", "heavy", "outlier", "adversarial", "shift"])
def test_bandits_are_the_same_again_and_noisy_in_training_alone(noise):
    a, b = bandit(noise, 1, train=50, test=20), bandit(noise, 1, train=50, test=20)
    assert a["train"].records[7]["scores"] == b["train"].records[7]["scores"]
    assert all(r["scores"] == r["truth"] for split in ("clean", "validation", "test") for r in a[split].records)
    same = [r["scores"] == r["truth"] for r in a["train"].records]
    assert all(same) if noise == "none" else not any(same)


def test_which_pairs_of_a_list_count():
    batch = Batch.from_dict(collate_choices(bandit("none", 0, train=8, test=1)["train"].records))
    batch.reference = torch.zeros(8, 6, dtype=torch.float64)
    values = ChoiceAdapter(ChoicePolicy("policy:8", 24)).double()(batch).signal.values
    student = ModelOutput(Scores(values, batch.candidates))

    def loss(pairs):
        return (
            DPO(beta=1.0, pairs=pairs, reference="teacher").loss(student, None, batch, TrainState(step=1))["dpo"].values
        )

    zero = torch.zeros(1, dtype=torch.float64)
    by_hand = []
    for i in range(8):
        order = [(a, b) for a in range(6) for b in range(6) if batch.scores[i, a] > batch.scores[i, b]]
        each = [preference.dpo(values[i, a], values[i, b], zero, zero, beta=1.0) for a, b in order]
        by_hand.append(torch.stack(each))
    assert all(len(x) == 15 for x in by_hand)
    close(loss("all"), torch.stack([x.mean() for x in by_hand]))
    drawn = loss("random")
    assert all((x - d).abs().min() < 1e-12 for x, d in zip(by_hand, drawn, strict=True))
    close(loss("random"), drawn)  # drawn for good


@pytest.mark.slow
@pytest.mark.parametrize("data", [{"name": "bandit", "noise": "heavy"}, {"name": "chains"}])
@pytest.mark.parametrize("method", ["sft", "dpo", "adpo"])
def test_methods_run_and_are_judged_again_from_their_folder(data, method, tmp_path):
    recipe = {"task": "preference_world", "data": data, "trainer": {"max_steps": 20}, "output": str(tmp_path / "run")}
    metrics = distill({**recipe, "method": method}).metrics
    again = evaluate_run(tmp_path / "run")["metrics"]
    assert again["value"] == pytest.approx(metrics["value"], rel=1e-6)


def test_a_policy_learns_what_is_best(tmp_path):
    recipe = {"task": "preference_world", "data": {"name": "bandit", "noise": "none"}, "output": str(tmp_path / "run")}
    metrics = distill({**recipe, "method": "adpo", "trainer": {"max_steps": 300, "learning_rate": 2e-3}}).metrics
    assert metrics["value"] > 0.4  # one of six by chance


def test_a_policy_wins_against_a_worse_one_by_the_true_reward():
    world = chains(0, "own")
    chance, begin = torch.Generator().manual_seed(0), torch.arange(16).repeat(300)
    best, usual = (world.returns(p, begin, chance) for p in (world.soft_optimal(), world.log_p))
    for found, policy in ((best, world.soft_optimal()), (usual, world.log_p)):
        exact = world.value(policy)["return"]  # of a first token drawn evenly, as `begin` is
        assert abs(found.mean() - exact) < 4 * found.std() / len(found) ** 0.5
    assert best.mean() > usual.mean()


@pytest.mark.slow
@pytest.mark.parametrize("data", [{"name": "bandit", "noise": "none"}, {"name": "chains"}])
def test_a_run_says_how_often_it_wins_against_its_start(data, tmp_path):
    recipe = {"task": "preference_world", "method": "dpo", "data": data, "trainer": {"max_steps": 60}}
    result = distill(recipe, output=str(tmp_path / "run"))
    still = distill(recipe | {"trainer": {"max_steps": 1, "learning_rate": 0.0}}, output=str(tmp_path / "still"))
    assert result.metrics["win_rate"] > 0.55 and abs(still.metrics["win_rate"] - 0.5) < 0.03
    assert (still.metrics["win_rate"] == pytest.approx(0.5, abs=1e-9)) == (data["name"] == "bandit")
    assert "win_rate" in (tmp_path / "run" / "report.html").read_text()
    other = distill(recipe | {"data": {"name": "responses"}, "trainer": {"max_steps": 2}}, output=str(tmp_path / "o"))
    assert "win_rate" not in other.metrics


@pytest.mark.parametrize(
    "change,says",
    [
        ({"data": {"name": "bandits"}}, "Did you mean 'bandit'"),
        ({"data": {"name": "bandit", "noise": "pink"}}, "data.noise is 'pink'"),
        ({"data": {"name": "chains", "start": "none"}}, "data.start is 'none'"),
        ({"data": {"name": "chains", "label_noise": 1.5}}, "data.label_noise"),
        ({"data": {"name": "bandit", "label_noise": 0.2}}, "Unknown key data.label_noise"),
        ({"data": {"name": "bandit", "nois": "heavy"}}, "Did you mean 'noise'"),
        ({"student": "mlp:8"}, "is no policy of this world"),
    ],
)
def test_bad_input(change, says, tmp_path):
    with pytest.raises(InputError, match=says):
        distill({"task": "preference_world", "method": "dpo", "output": str(tmp_path / "run"), **change})
