"""Scene completion: the streets, scans from files, the denoiser of points, its evaluation, and distillation on it."""

import json
import math
import pickle

import numpy as np
import pytest
import torch

from engine_cases import killed_run, weights
from golden_vectors import close, golden
from understudy import InputError, distill
from understudy.cli import main
from understudy.data import Batch
from understudy.data.scenes import Reduction, SceneSet, collate_scenes, farthest_points, read_scenes, voxel_points
from understudy.evaluation.pictures import clouds
from understudy.evaluation.sample_costs import cloud_costs
from understudy.evaluation.scenes import complete
from understudy.losses.diffusion import noised
from understudy.models.denoisers import load_denoiser
from understudy.models.diffusion import Sampler, trajectory
from understudy.models.scenes import LocalNoise
from understudy.synthetic.street import FARTHEST, GROUND, Street, street_scene, streets

TINY = {
    "task": "scene_completion",
    "method": "distillation-dpo",
    "data": {"size": 12, "samples": 4, "points": 8, "repeat": 4, "compare_steps": [1, 2], "teacher_steps": 3},
    "teacher": {"model": "pointnet:8,8", "train": {"max_steps": 4, "save_strategy": "no"}},
    "trainer": {"max_steps": 8, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1},
}
NUMBERS = {"train": 3, "validation": 2, "test": 2}


def batch_of(points=8, repeat=4, many=3):
    scenes = SceneSet(streets("street2d", NUMBERS, 0).splits["train"], Reduction(points, repeat, 10.0), "train")
    return Batch.from_dict(collate_scenes([scenes[i] for i in range(many)]))


@pytest.mark.golden
def test_golden_local_noise():
    g = golden("04-distillation-dpo")
    levels = LocalNoise(float(g["beta_start"]), float(g["beta_end"]), int(g["num_train_timesteps"]))
    alpha, sigma = levels.at(g["t"] / (int(g["num_train_timesteps"]) - 1))
    close(sigma, g["sqrt_one_minus_abar"], rtol=1e-9, atol=1e-9)
    assert alpha.eq(1).all()
    winner = torch.where(g["a_wins"][:, None, None], g["cand_a"], g["cand_b"])
    close(noised(winner, g["noise"], alpha, sigma), g["x_t_w"], rtol=1e-9, atol=1e-9)


def test_a_step_moves_by_the_noise_that_is_predicted():
    """x_s = x_t + (σ_s − σ_t) ε, the consistent rule of noise that leaves the signal's scale."""
    torch.manual_seed(0)
    levels, batch = LocalNoise(), batch_of()
    x, eps = torch.randn(2, 3, 32, 2, dtype=torch.float64)
    ask = lambda b: b.inputs["x"] - levels.at(b.inputs["t"])[1][:, None, None] * eps  # noqa: E731
    times = torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64)
    first, last = (float(levels.at(t)[1]) for t in (times[0], times[-1]))
    found = trajectory(ask, levels, batch, x, times, torch.zeros_like(x))
    close(found, x + (last - first) * eps)


@pytest.mark.parametrize("flat", [True, False], ids=["street2d", "street"])
def test_a_street_is_as_described(flat):
    scan, truth = street_scene("train", 1, 0, flat)
    again, other = street_scene("train", 1, 0, flat), street_scene("test", 1, 0, flat)
    assert (
        np.array_equal(scan, again[0]) and np.array_equal(truth, again[1]) and len(other[0]) and len(truth) > len(scan)
    )
    assert not np.array_equal(scan[:9], other[0][:9])
    assert scan.shape[1] == (2 if flat else 3) and np.linalg.norm(scan, axis=1).max() < FARTHEST + 0.2
    street = Street.draw(np.random.default_rng([0, 0, 1]))
    assert 3 <= len(street.boxes) <= 6 and (np.abs(street.walls[:, 0]) >= 5).all()
    axes = scan.shape[1]
    off = [np.abs(truth[:, 1] - place) for place, _ in street.walls]
    for low, high in street.boxes[..., :axes]:  # on a side of the box: inside, and at one of its faces
        inside = ((truth >= low - 1e-9) & (truth <= high + 1e-9)).all(1)
        face = np.minimum(np.abs(truth - low), np.abs(truth - high)).min(1)
        off.append(np.where(inside, face, np.inf))
    if not flat:
        off.append(np.abs(truth[:, 2] - GROUND))
    assert np.min(off, 0).max() < 1e-9  # every point of the truth lies on a wall, a car or the ground


def test_clouds_are_reduced():
    random = np.random.default_rng(0)
    cloud = random.uniform(-9, 9, (500, 3))
    chosen = farthest_points(cloud, 12)
    assert np.array_equal(chosen[0], cloud[0]) and len(np.unique(chosen, axis=0)) == 12
    gaps = np.linalg.norm(chosen[:, None] - chosen[None], axis=-1) + 99 * np.eye(12)
    near = np.linalg.norm(cloud[:, None] - chosen[None], axis=-1).min(1)
    assert near.max() <= gaps.min()  # every point is nearer to a chosen one than any two of these
    line = np.stack([np.arange(0, 1, 0.01), np.zeros(100)], 1)
    assert len(voxel_points(line, 0.1)) == 10 and np.array_equal(voxel_points(line, 0.1)[0], line[0])
    scan, truth = Reduction(4, 3, 5.0)("a", cloud, line, 0)
    assert scan.shape == (4, 3) and truth.shape == (12, 2) and float(scan.norm(dim=1).max()) < 5


@pytest.mark.parametrize(
    "scan,says",
    [
        (np.zeros((0, 2)), "scene 5: 0 of 0 points of the scan"),
        (np.ones((3, 2)), "3 of 3 points of the scan lie within data.radius=10 m, and at least 8"),
        (np.full((9, 2), 50.0), "0 of 9 points"),
        (np.full((9, 2), math.nan), "scene 5: the scan has coordinates that are not finite"),
    ],
)
def test_scans_that_cannot_be_completed_are_named(scan, says):
    with pytest.raises(InputError, match=says):
        Reduction(8, 4, 10.0)("scene 5", scan, np.ones((9, 2)), 0)


def test_scans_are_read_from_files(tmp_path):
    random = np.random.default_rng(0)
    cloud = random.uniform(-9, 9, (400, 3)).astype(np.float32)
    for i in range(3):
        np.concatenate([cloud + i, cloud[:, :1]], 1).tofile(tmp_path / f"{i}.bin")
    np.save(tmp_path / "3.npy", cloud)
    found = read_scenes(str(tmp_path))
    assert {s: len(v) for s, v in found.splits.items()} == {"train": 2, "validation": 1, "test": 1}
    assert found.dimensions == 3 and np.allclose(found.splits["train"][1][1]()[1], cloud + 1)
    np.savez(tmp_path / "4.npz", scan=cloud[:50], truth=cloud)
    pair = read_scenes(str(tmp_path)).splits["test"][0]
    assert pair[0] == "4.npz" and [len(v) for v in pair[1]()] == [50, 400]
    (tmp_path / "b").mkdir()
    points, offsets = (cloud * 100).round().astype(np.int16), np.array([0, 100, 200, 300, 400])
    np.savez(tmp_path / "b" / "s.npz", xyz_cm=points, offsets=offsets)
    split = read_scenes(str(tmp_path)).splits  # the smaller of two groups is the test split
    assert {n for n, _ in split["test"]} == {f"s.npz, scan {i}" for i in range(4)} and len(split["train"]) == 4
    assert np.allclose(split["test"][1][1]()[1], points[100:200] / 100)
    (tmp_path / "5.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match=r"5\.npy is not a readable \.npy file"):
        read_scenes(str(tmp_path)).splits["validation"][0][1]()


@pytest.mark.parametrize("kind", ["folders", "sequences"])
def test_scans_of_named_splits_stay_in_them(kind, tmp_path):
    cloud = np.random.default_rng(0).normal(size=(60, 3))
    for split, number in (("train", 5), ("dev", 3), ("test", 6), (".ipynb_checkpoints", 2), ("__MACOSX", 2)):
        folder = tmp_path / split
        if kind == "folders" or split[0] in "._":
            folder.mkdir()
            for i in range(number):
                np.save(folder / f"{split.strip('._')}{i}.npy", cloud)
        else:
            np.savez(tmp_path / f"{split}.npz", xyz_cm=cloud, offsets=[0, *range(1, number), 60])
    found = read_scenes(str(tmp_path))
    assert {s: len(v) for s, v in found.splits.items()} == {"train": 5, "validation": 3, "test": 6}
    own = {"train": "train", "validation": "dev", "test": "test"}
    assert all(name.startswith(own[s]) for s, scenes in found.splits.items() for name, _ in scenes)
    (tmp_path / "more").mkdir()
    np.save(tmp_path / "more" / "a.npy", cloud)
    found = read_scenes(str(tmp_path))
    assert [len(v) for v in found.splits.values()] == [5, 3, 6] and any(
        "1 files that no split" in n for n in found.notes
    )


def test_hidden_folders_hold_no_scans(tmp_path):
    cloud = np.random.default_rng(0).normal(size=(60, 3))
    for folder in (tmp_path, tmp_path / ".ipynb_checkpoints", tmp_path / "__MACOSX"):
        folder.mkdir(exist_ok=True)
        for i in range(5 if folder == tmp_path else 2):
            np.save(folder / f"{i}.npy", cloud)
    assert sum(map(len, read_scenes(str(tmp_path)).splits.values())) == 5


def test_a_point_very_far_away_has_a_voxel_of_its_own():
    cloud = np.random.default_rng(0).uniform(-1, 1, (500, 3))
    near = voxel_points(cloud, 0.5)
    far = voxel_points(np.concatenate([cloud, [[1e12, -1e12, 1e12]]]), 0.5)
    assert len(near) <= 5**3 and len(far) > 1 and far[-1, 0] == 1e12


def test_scenes_of_other_dimensions_and_cut_files_are_named(tmp_path):
    cloud = np.random.default_rng(0).normal(size=(60, 3)).astype("<f4")
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", scan=cloud[:, :2], truth=cloud[:, : 3 if i == 1 else 2])
    scenes = dict(scene for part in read_scenes(str(tmp_path)).splits.values() for scene in part)
    with pytest.raises(
        InputError, match=r"1.npz: the truth has points of 3 coordinates, and the truth of 0.npz .* of 2"
    ):
        scenes["1.npz"]()
    (tmp_path / "scans").mkdir()
    for i in range(3):
        (tmp_path / "scans" / f"{i}.BIN").write_bytes(
            np.pad(cloud, ((0, 0), (0, 1))).tobytes() + b"cut"[: 3 * (i == 2)]
        )
    (last,) = read_scenes(str(tmp_path / "scans")).splits["test"]
    with pytest.raises(InputError, match=r"2\.BIN ends within a point"):
        last[1]()
    with pytest.raises(InputError, match="holds no scans"):
        read_scenes(__file__)


@pytest.mark.parametrize(
    "arrays,says",
    [
        ({"points": np.ones((3, 3))}, "holds points: a scene has scan and truth"),
        (
            {"xyz_cm": np.ones((3, 3)), "offsets": np.array([0, 2])},
            "offsets must be whole numbers that rise from 0 to the number of points, 3",
        ),
        ({"xyz_cm": np.ones((3, 3)), "offsets": np.array([0.0, 3.0])}, "offsets must be whole numbers"),
        ({"xyz_cm": np.float64(3), "offsets": np.array([0, 1])}, r"not \[\]"),
        ({"scan": np.ones(3), "truth": np.ones((3, 3))}, r"not \[3\]"),
        ({"scan": np.ones((3, 3)), "truth": np.ones((3, 3))}, "1 scenes, and three splits need at least 3"),
    ],
)
def test_files_that_hold_no_scenes(arrays, says, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=says):
        read_scenes(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no scans"):
        read_scenes(str(tmp_path / "empty"))


def test_the_network_is_one_of_sets_and_is_told_the_scan():
    torch.manual_seed(0)
    model = load_denoiser("pointnet:8,8", shape=(32, 2)).double()
    batch = batch_of()
    eps = torch.randn(3, 32, 2, dtype=torch.float64)
    start = model.initial(batch, eps)
    close(start - eps, batch.inputs["scan"].double().repeat(1, 4, 1))
    seen = batch.at(start, 0.7)
    said, order = model.epsilon(seen), torch.randperm(32)
    close(model.epsilon(batch.at(start[:, order], 0.7)), said[:, order])  # points in another order
    hidden = batch.at(start, 0.7, torch.full((3,), -1))
    batch.inputs["scan"] = batch.inputs["scan"][:, torch.randperm(8)]
    close(model.epsilon(batch.at(start, 0.7)), said)  # the scan's as well
    assert not torch.allclose(model.epsilon(hidden), said)
    batch.inputs["scan"] = torch.zeros_like(batch.inputs["scan"])
    close(model.epsilon(hidden), model.epsilon(batch.at(start, 0.7)))


def test_a_saved_denoiser_completes_as_before(tmp_path):
    model = load_denoiser("pointnet:8", shape=(32, 2), sampler=Sampler(2, 0.0, 1.0, 3.5))
    model.save(tmp_path)
    again, batch = load_denoiser(tmp_path), batch_of()
    assert again.calls == 4 and torch.equal(complete(model, [batch]), complete(again, [batch]))
    with torch.no_grad():
        again.model.body[-1].bias.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        complete(again, [batch])


def test_clouds_are_drawn_from_above():
    pixels = clouds(
        [torch.tensor([[0.0, 0.0, 1.0], [9.0, 9.0, 2.0], [99.0, 0.0, 0.0]]), torch.zeros(2, 2)], 10.0, side=40
    )
    assert pixels.shape == (84, 168, 3) and pixels.dtype == np.uint8
    first = pixels[2:82, 2:82].reshape(-1, 3)
    assert len(np.unique(first, axis=0)) == 3  # the ground of the picture and two heights


def test_from_a_scan_to_a_cloud_on_the_command_line(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True}
    recipe = {**TINY, "data": {**TINY["data"], "guidance": 2.0}, "trainer": {**TINY["trainer"], **best}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as stop:
        main(["train", str(tmp_path / "recipe.yaml"), f"output={tmp_path / 'run'}"])
    assert stop.value.code in (0, None)
    tmp_path = tmp_path / "run"
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    m = evaluation["metrics"]
    validation = [json.loads(x) for x in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [v["step"] for v in validation] == [4, 8] and validation[0].keys() >= {"chamfer", "jsd", "iou", "nfe"}
    assert m["nfe"] == 2 and m["teacher_nfe"] == 6  # guidance asks twice
    assert m.keys() >= {"chamfer", "jsd", "iou", "input_chamfer", "student_2_chamfer", "teacher_1_chamfer"}
    assert len(evaluation["pictures"]) == 4 and "base64" in (tmp_path / "report.html").read_text()
    terms = [json.loads(x)["terms"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(t["metric/winner"] <= t["metric/loser"] for t in terms) and "assistant/loser" in terms[0]


@pytest.mark.parametrize("metric", ["chamfer", "jsd", "iou", "emd"])
def test_every_metric_ranks_the_nearer_cloud_first(metric):
    truth = batch_of().inputs["clean"]
    order = torch.randperm(truth.shape[1])
    same, near, far = (
        cloud_costs(metric, truth[:, order] + by, truth, voxel=0.5) for by in (0.0, 0.2, torch.tensor([1.1, 0.6]))
    )
    assert same.abs().max() < 1e-6 and bool(((same < near) & (near < far)).all())


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    distill({**TINY, "output": str(tmp_path / "whole")})
    cut = {**TINY, "output": str(tmp_path / "cut")}
    for step, moment in ((1, "after"), (5, "before")):
        assert killed_run(cut, step, moment)
    distill(cut)
    a, b = (weights(tmp_path / f) for f in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Touch:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("kind", ["objects", "a pickle", "an archive", "a terabyte", "empty"])
def test_a_scan_that_is_no_array_of_numbers_is_one_line(kind, tmp_path):
    for i in range(6):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).normal(size=(60, 3)))
    wrong, touched = tmp_path / "3.npy", tmp_path.parent / f"{tmp_path.name}-touched"
    if kind == "objects":
        np.save(wrong, np.array([Touch(str(touched))], dtype=object), allow_pickle=True)
    elif kind == "a pickle":
        wrong.write_bytes(pickle.dumps(Touch(str(touched))))
    elif kind == "an archive":
        with wrong.open("wb") as file:
            np.savez(file, scan=np.zeros((9, 3)))
    elif kind == "a terabyte":
        facts = {"descr": "<f4", "fortran_order": False, "shape": (10**11, 3)}
        with wrong.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, facts)
    else:
        wrong.write_bytes(b"")
    with pytest.raises(InputError, match=r"3\.npy") as stop:
        for _, make in read_scenes(str(tmp_path)).splits["train"]:
            make()
    assert "\n" not in str(stop.value) and not touched.exists()


def test_real_scans(data_folder, tmp_path):
    if not (data_folder / "lidar_street").is_dir():
        pytest.skip("needs lidar_street")
    scenes = read_scenes("lidar_street")
    assert {s: len(v) for s, v in scenes.splits.items()} == {"train": 22, "validation": 2, "test": 6}
    one = SceneSet(scenes.splits["test"], Reduction(128, 8, 20.0), "test")[0]
    assert one[1].shape == (128, 3) and one[2].shape == (1024, 3) and 5 < float(one[2].norm(dim=1).max()) < 20


@pytest.mark.parametrize(
    "keys,says",
    [
        ({"data": {"name": "streat"}}, "holds no scans: name street"),
        ({"data": {**TINY["data"], "points": 0}}, "data.points"),
        (
            {"data": {**TINY["data"], "radius": 1e12}},
            "data.radius=1e.12 m in voxels of data.voxel=.* lower data.radius",
        ),
        ({"data": {**TINY["data"], "pionts": 3}}, "Did you mean 'points'"),
        ({"data": {**TINY["data"], "points": 400}}, "street2d, .* scene 0: .* points of the scan lie within"),
        ({"teacher": "denoiser:8", "student": "teacher"}, "completes no scans"),
        ({"teacher": "unet:8", "student": "teacher"}, "square images"),
        ({"options": {"metric": "nearest"}}, "ranked by chamfer, jsd, iou and emd"),
        (
            {"task": "image_generation", "data": "ring8", "student": "pointnet:8", "teacher": "exact"},
            r"\[points, 2 or 3\]",
        ),
    ],
)
def test_bad_input(keys, says, tmp_path):
    with pytest.raises(InputError, match=says):
        distill({**TINY, **keys, "output": str(tmp_path)})


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_scans_may_have_their_points_along_the_second_axis(rows, tmp_path):
    """`[3, points]`, as MATLAB and some sensors write them: four rows at most of many columns are no points."""
    points = np.random.default_rng(0).normal(size=(64, rows)).astype(np.float32)
    for folder, values in (("rows", points), ("columns", points.T)):
        (tmp_path / folder).mkdir()
        for i in range(4):
            np.save(tmp_path / folder / f"{i}.npy", values + i)
    found = [read_scenes(str(tmp_path / folder)) for folder in ("rows", "columns")]
    assert [f.dimensions for f in found] == [min(rows, 3)] * 2
    clouds = [f.splits["train"][0][1]()[1] for f in found]
    assert np.array_equal(*clouds) and len(clouds[0]) == 64
