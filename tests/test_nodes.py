"""Node classification: graphs as they are read and split, models of nodes, runs that are killed, bad input."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from engine_cases import killed_run, weights
from understudy import InputError, distill
from understudy.cli import main
from understudy.data import Batch, GraphBatch, collate_graph, load_graph
from understudy.data.graph_sources import clean_edges, read_graph
from understudy.models import NodeAdapter, load_nodes, load_small
from understudy.runs.capture import capture_recipe
from understudy.runs.check import evaluate_run
from understudy.synthetic.topics import topics

TOPICS = {"topics": topics}
RUN = {
    "task": "node_classification",
    "teacher": {"model": "gcn:hidden=8", "train": {"max_steps": 10}},
    "student": "mlp:hidden=16,layers=2,dropout=0.5",
    "trainer": {"max_steps": 24, "save_steps": 8, "eval_steps": 4, "logging_steps": 1},
}


def batch(data):
    return Batch.from_dict(collate_graph([data[0]]))


def saved(path, **changes):
    """A small graph of two classes as a file; the last node has no edge."""
    values = {
        "x": np.eye(9, 4, dtype=np.float32),
        "y": np.arange(9) % 2,
        "edges": np.array([[i, i + 1] for i in range(7)]),
        "train_idx": np.array([0, 1]),
        "val_idx": np.array([2, 3]),
        "test_idx": np.array([4, 5, 6, 7, 8]),
    }
    np.savez(path, **{k: v for k, v in {**values, **changes}.items() if v is not None})
    return str(path)


def test_a_graph_is_one_example_of_its_own_kind():
    splits = load_graph({"name": "topics"}, TOPICS)
    train, test = batch(splits.train), batch(splits.test)
    assert isinstance(train, GraphBatch) and train.kind == "graph" and len(splits.train) == 1
    assert train.num_items == 1000 and train.labelled == 100 and test.num_items == test.labelled == 500
    assert (train.labels[test.chosen] == -100).all() and (test.labels[train.labels >= 0] == -100).all()
    pairs = {tuple(p) for p in train.edges.T.tolist()}
    assert len(pairs) == train.edges.shape[1] and all((j, i) in pairs and i != j for i, j in pairs)
    assert train.loops.shape[1] == len(pairs) + 1000
    assert (
        splits.hash
        == load_graph({"name": "topics"}, TOPICS).hash
        != load_graph({"name": "topics", "seed": 1}, TOPICS).hash
    )
    sums = train.inputs["nodes"].sum(1)
    assert ((sums - 1).abs() < 1e-5).logical_or(sums == 0).all()
    assert load_graph({"name": "topics", "normalize": False}, TOPICS).train[0]["nodes"].max() == 1


def test_the_inductive_split_hides_nodes_with_their_edges():
    whole, part = (
        load_graph({"name": "topics"}, TOPICS),
        load_graph({"name": "topics", "split": "inductive", "seed": 0}, TOPICS),
    )
    train, validation, test = (batch(s) for s in (part.train, part.validation, part.test))
    hidden = set(test.ids[test.chosen].tolist())
    assert len(hidden) == 100 and hidden <= set(batch(whole.test).ids[batch(whole.test).chosen].tolist())
    assert train.num_items == 900 and not hidden & set(train.ids.tolist()) and train.labelled == 100
    assert len(test.ids) == 1000 and validation.num_items == 300 and len(validation.ids) == 900
    inside = {(i, j) for i, j in batch(whole.train).edges.T.tolist() if i not in hidden and j not in hidden}
    assert {tuple(p) for p in train.ids[train.edges].T.tolist()} == inside
    for k in ("nodes", "labels"):
        close = batch(whole.train).inputs["nodes"] if k == "nodes" else batch(whole.train).labels
        assert torch.equal((train.inputs["nodes"] if k == "nodes" else train.labels), close[train.ids])


def test_edges_are_cleaned_and_what_was_changed_is_said():
    notes, warnings = [], []
    edges = clean_edges("g", [[0, 1], [0, 1], [2, 2], [2, 1]], 4, notes, warnings)
    assert edges.T.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    assert "1 self-loops" in notes[0] and "1 edges listed more than once" in notes[1]
    assert "directed (2 have no reverse)" in warnings[0]
    for pairs in ([[0, 1], [1, 2]], [[0, 1], [1, 0]]):  # listed once, or both ways: not directed
        warnings = []
        clean_edges("g", pairs, 3, [], warnings)
        assert not warnings


def test_files_with_columns_masks_and_missing_labels(tmp_path):
    masks = {f"{s}_mask": np.zeros((2, 9), bool) for s in ("train", "val", "test")}
    for row in range(2):
        masks["train_mask"][row, row], masks["val_mask"][row, 3], masks["test_mask"][row, 4:] = True, True, True
    name = saved(
        tmp_path / "m.npz",
        train_idx=None,
        val_idx=None,
        test_idx=None,
        y=np.array([0, 1, 0, 1, -1, 0, 1, 0, 1]),
        **masks,
    )
    splits = load_graph({"name": name, "fold": 1})
    assert (
        batch(splits.train).labelled == 1 and batch(splits.train).labels[1] == 1 and batch(splits.test).num_items == 4
    )
    assert any("1 test nodes have no label" in n for n in splits.notes)
    drawn = load_graph(
        {
            "name": saved(
                tmp_path / "d.npz", train_idx=None, val_idx=None, test_idx=None, x=np.ones((90, 2)), y=np.arange(90) % 2
            )
        }
    )
    assert (
        batch(drawn.train).labelled == 40
        and batch(drawn.validation).num_items == 16
        and batch(drawn.test).num_items == 25
    )


def test_files_of_other_number_types_say_the_same(tmp_path):
    """Masks as 0 and 1 are masks, not node ids; small and big-endian integers are numbers too."""
    plain = batch(load_graph({"name": saved(tmp_path / "a.npz")}).train)
    mask = np.isin(np.arange(9), (0, 1)).astype(np.uint8)
    edges = np.array([[i, i + 1] for i in range(7)])
    for number, (ends, features) in enumerate((("u1", "f2"), (">i8", ">f4"), ("u4", "u2"))):
        x = np.eye(9, 4).astype(features)
        name = saved(tmp_path / f"{number}.npz", x=x, edges=edges.astype(ends), train_idx=None, train_mask=mask)
        other = batch(load_graph({"name": name}).train)
        assert torch.equal(plain.edges, other.edges) and torch.equal(plain.labels, other.labels)
        assert torch.equal(plain.inputs["nodes"], other.inputs["nodes"])


def test_real_graphs(data_folder):
    splits = load_graph({"name": "cora"})
    assert (splits.classes, splits.features, batch(splits.train).labelled, batch(splits.test).num_items) == (
        7,
        1433,
        140,
        1000,
    )
    assert batch(splits.train).edges.shape[1] == 2 * 5278 and not splits.warnings
    texas = load_graph({"name": "texas", "fold": 3})
    assert "directed" in texas.warnings[0] and batch(texas.train).num_items == 183


def test_planetoid_is_read_from_its_raw_files(tmp_path):
    """The files of the original release, made small."""
    pytest.importorskip("torch_geometric")
    from scipy.sparse import csr_matrix

    raw = tmp_path / "Cora" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    x, y = rng.random((1100, 5)), np.eye(2)[np.arange(1100) % 2]
    links = {i: [(i + 1) % 1100, (i - 1) % 1100] for i in range(1100)}
    parts = {"x": csr_matrix(x[:10]), "allx": csr_matrix(x[:600]), "tx": csr_matrix(x[600:]), "graph": links}
    parts |= {"y": y[:10], "ally": y[:600], "ty": y[600:]}
    for name, value in parts.items():
        (raw / f"ind.cora.{name}").write_bytes(pickle.dumps(value))
    (raw / "ind.cora.test.index").write_text("".join(f"{i}\n" for i in range(600, 1100)))
    splits = load_graph({"name": "planetoid:Cora", "root": str(tmp_path)})
    assert (splits.classes, splits.features) == (2, 5) and batch(splits.train).edges.shape[1] == 2200
    assert [batch(s).labelled for s in (splits.train, splits.validation, splits.test)] == [10, 500, 500]


def test_models_of_nodes_are_saved_and_read_and_a_student_sees_no_edge(tmp_path):
    pytest.importorskip("torch_geometric")
    data = batch(load_graph({"name": "topics"}, TOPICS).test)
    for name in ("gcn:hidden=8", "sage:hidden=8,layers=3", "gat:hidden=8,heads=2,dropout=0", "mlp:hidden=8,layers=3"):
        model = NodeAdapter(load_nodes(name, classes=5, features=300), 5).eval()
        model.save(tmp_path / name)
        again = NodeAdapter(load_nodes(tmp_path / name, classes=5, features=300), 5).eval()
        answer = model(data).signal.logits
        assert torch.equal(answer, again(data).signal.logits) and answer.shape == (500, 5)
        torch.testing.assert_close(answer, model(data.everywhere).signal.logits[data.chosen])
        without = GraphBatch(
            data.inputs, data.labels, data.ids, edges=data.edges[:, :0], loops=data.loops, chosen=data.chosen
        )
        assert torch.equal(answer, model(without).signal.logits) == name.startswith("mlp")
    assert [type(m).__name__ for m in load_small(tmp_path / "mlp:hidden=8,layers=3").body] == [
        "Flatten",
        *["Linear", "ReLU", "Dropout"] * 2,
    ]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The teacher, trained once; also the check that baselines run on graphs."""
    root = tmp_path_factory.mktemp("taught")
    distill({**RUN, "method": "kd", "output": str(root)})
    return root / "teacher"


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_best_weights(taught, tmp_path):
    whole, cut = ({**RUN, "method": "ff-g2m", "output": str(tmp_path / name)} for name in ("whole", "cut"))
    for run in (whole, cut):
        shutil.copytree(taught, f"{run['output']}/teacher")
    distill(whole)
    for step, moment in [(6, "after"), (13, "before"), (17, "saving")]:
        assert killed_run(cut, step, moment), f"the kill at step {step} did not land"
    distill(cut)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for log, what in (("metrics.jsonl", "loss"), ("validation.jsonl", "accuracy")):
        lines = [(tmp_path / n / log).read_text().splitlines() for n in ("whole", "cut")]
        values = [[(json.loads(x)["step"], json.loads(x)[what]) for x in ls] for ls in lines]
        assert values[0] == values[1]
    best = max(accuracy for _, accuracy in values[0])
    assert evaluate_run(tmp_path / "cut", "validation")["metrics"]["accuracy"] == best


class Teacher(torch.nn.Module):
    """A user's own network on a graph."""

    def __init__(self, bad=None):
        super().__init__()
        self.linear, self.bad = torch.nn.Linear(300, 5), bad

    def forward(self, x, edge_index):
        out = self.linear(x)
        out = out.index_add(0, edge_index[0], out[edge_index[1]])
        return out.where(torch.arange(len(out))[:, None] != self.bad, float("nan")) if self.bad else out


def test_a_users_own_teacher_is_read_whole_and_left_as_it_was(tmp_path):
    teacher = Teacher().train()
    before = teacher.linear.weight.clone()
    result = distill({**RUN, "method": "ff-g2m", "output": str(tmp_path)}, teacher=teacher)
    assert "teacher_accuracy" in result.metrics and torch.equal(before, teacher.linear.weight)
    assert teacher.training and all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_the_command_line_trains_without_evaluations(taught, tmp_path):
    """YAML reads the `no` of a strategy as false; it is meant as the word."""
    shutil.copytree(taught, tmp_path / "run" / "teacher")
    words = {"task": "node_classification", "method": "ff-g2m", "output": tmp_path / "run", "student": RUN["student"]}
    words |= {"teacher": json.dumps(RUN["teacher"]), "trainer.max_steps": 3}
    with pytest.raises(SystemExit) as stop:
        main(["train", *(f"{k}={v}" for k, v in words.items()), "trainer.eval_strategy=no", "trainer.save_strategy=no"])
    assert stop.value.code in (0, None)
    assert not (tmp_path / "run" / "validation.jsonl").exists()
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "student").is_dir()


def test_inductive_runs_and_graphs_without_edges(taught, tmp_path):
    inductive = {**RUN, "data": {"name": "topics", "split": "inductive"}, "method": "ff-g2m"}
    result = distill({**inductive, "output": str(tmp_path / "i")})
    assert json.loads((tmp_path / "i" / "evaluation.json").read_text())["rows"] == 100
    assert result.metrics["accuracy"] > 0.25  # chance is 0.2
    bare = saved(tmp_path / "bare.npz", edges=np.zeros((0, 2), np.int64))
    result = distill({**RUN, "data": bare, "method": "ff-g2m", "output": str(tmp_path / "b")})
    assert "high_frequency_cosine" not in result.metrics
    assert "has no edges" in json.loads((tmp_path / "b" / "run.json").read_text())["preflight"]["warnings"][0]


BAD = {
    "an edge out of range": ({"edges": np.array([[0, 9]])}, "edge 0 is \\[0, 9\\] and the nodes are 0 … 8"),
    "edges of a bad shape": ({"edges": np.zeros((3, 3), np.int64)}, "give pairs of nodes"),
    "edges that are not whole": ({"edges": np.zeros((3, 2))}, "whole numbers"),
    "one class": ({"y": np.zeros(9, np.int64)}, "there is 1 class"),
    "labels that are words": ({"y": np.array(list("abcdefghi"))}, "one class number a node"),
    "a negative label": ({"y": np.arange(9) - 3}, "label of node 0 is -3"),
    "as many labels as nodes": ({"y": np.arange(8) % 2}, "there are 8 labels"),
    "nan features": ({"x": np.full((9, 2), np.nan)}, "features of node 0"),
    "splits that share a node": ({"val_idx": np.array([1, 2])}, "node 1 is in the train and validation splits"),
    "a split out of range": ({"val_idx": np.array([11])}, "outside 0 … 8"),
    "an empty split": ({"test_idx": np.array([], np.int64)}, "no node of the test split"),
    "half a split": ({"test_idx": None}, "a split without test_idx or test_mask"),
    "no labels at all": ({"y": None}, "lacks y"),
    "no features": ({"x": None}, "lacks x"),
    "features without a column": ({"x": np.zeros((9, 0))}, "give a row of numbers a node"),
    "features that are words": ({"x": np.array([["a"]] * 9)}, "features are <U1"),
    "a split of halves": ({"train_idx": np.array([0.5, 1.2])}, "train_idx is float64"),
    "a split of words": ({"train_idx": np.array(["a"])}, "train_idx is <U1"),
    "a mask of other numbers": (
        {"train_idx": None, "train_mask": np.array([0, 1, 2, 0, 0, 0, 0, 0, 0])},
        "other values than 0 and 1",
    ),
    "a short mask": ({"train_idx": None, "train_mask": np.zeros(8, bool)}, "and there are 9 nodes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_graphs(case, tmp_path):
    changes, says = BAD[case]
    with pytest.raises(InputError, match=says):
        load_graph({"name": saved(tmp_path / "g.npz", **changes)})


def test_other_bad_input(tmp_path):
    (tmp_path / "x.npz").write_text("no")
    for spec, says in (
        ({"name": "topic"}, "Did you mean 'topics'"),
        ({"name": str(tmp_path / "x.npz")}, "not a readable .npz"),
        ({"name": "topics", "spilt": 1}, "Did you mean 'split'"),
        ({"name": "topics", "split": "half"}, "transductive or inductive"),
        ({"name": "topics", "seed": -1}, "data.seed is -1"),
        ({"name": "planetoid:Core"}, "Did you mean 'Cora'"),
    ):
        with pytest.raises(InputError, match=says):
            load_graph(spec, TOPICS)
    run = {**RUN, "method": "ff-g2m"}
    unlabelled = saved(tmp_path / "u.npz", train_idx=np.array([], np.int64))
    unjudged = int(batch(load_graph({"name": "topics"}, TOPICS).train).labels.ge(0).nonzero()[-1, 0])  # a training node
    cases = [
        ({"student": "mpl:8"}, "neither gcn, sage, gat or mlp"),
        ({"student": "mlp:hiden=8"}, "Did you mean 'hidden'"),
        ({"student": "mlp:dropout=1"}, "dropout must lie"),
        ({"student": "gat:hidden=9"}, "multiple of heads"),
        ({"method": "pld"}, "graph task"),
        ({"data": unlabelled, "teacher": torch.nn.Linear(4, 2)}, "lam is 0.4: set options.lam=0"),
        ({"teacher": Teacher(bad=unjudged)}, f"logits of node {unjudged} are not finite"),
        ({"teacher": torch.nn.Linear(300, 4)}, r"gives \(300, 4\) for 300 nodes of 5 classes"),
        ({"task": "image_classification", "method": "sft", "data": "digits", "student": "gcn"}, "gcn reads a graph"),
    ]
    for number, (changes, says) in enumerate(cases):
        with pytest.raises(InputError, match=says):
            distill({**run, **changes, "output": str(tmp_path / str(number))})
    quiet = {
        "data": unlabelled,
        "teacher": torch.nn.Linear(4, 2),
        "options": {"lam": 0.0},
        "output": str(tmp_path / "ok"),
    }
    assert 0 <= distill({**run, **quiet}).metrics["accuracy"] <= 1


@pytest.mark.parametrize("support", [None, "dense"])
def test_a_graph_is_captured_once_and_learned_from(support, tmp_path):
    teacher = distill(RUN | {"method": "sft", "student": "gcn:hidden=8", "output": str(tmp_path / "teacher")})
    recipe = RUN | {"method": "kd", "teacher": str(teacher.folder / "student")}
    found = capture_recipe(recipe, tmp_path / "cache", support)
    assert found.examples == found.rows == 1000
    live = distill(recipe | {"output": str(tmp_path / "live")})
    cached = {"model": recipe["teacher"], "cache": str(tmp_path / "cache")}
    stored = distill(recipe | {"teacher": cached, "output": str(tmp_path / "stored")})
    assert stored.metrics["accuracy"] == pytest.approx(live.metrics["accuracy"], abs=0 if support else 0.05)


GRAPH_FORMS = {
    "names": lambda g: {"features": g["x"], "labels": g["y"], "edge_index": g["edges"].T},
    "adjacency": lambda g: {"x": g["x"], "y": g["y"], "adj": g["adj"]},
    "one column": lambda g: {"x": g["x"], "y": g["y"][:, None], "edges": g["edges"]},
    "one hot": lambda g: {"x": g["x"], "y": np.eye(3)[g["y"]], "edges": g["edges"]},
    "fractions": lambda g: {"x": g["x"], "y": g["y"].astype(np.float64), "edges": g["edges"]},
    "sparse": lambda g: {
        **{"adj_data": g["csr"].data, "adj_indices": g["csr"].indices, "adj_indptr": g["csr"].indptr},
        **{"adj_shape": np.array(g["csr"].shape), "attr_matrix": g["x"], "labels": g["y"]},
    },
}


@pytest.mark.parametrize("form", GRAPH_FORMS)
def test_a_graph_is_the_same_in_every_form(form, tmp_path):
    """Other names of columns, a matrix of edges, labels as a column or one of each class; and a graph so small that twenty of
    each class would leave nothing to evaluate on is split too."""
    from scipy.sparse import csr_matrix

    random = np.random.default_rng(0)
    upper = np.triu(random.random((30, 30)) < 0.15, 1)
    graph = {"x": random.normal(size=(30, 4)).astype(np.float32), "y": np.arange(30) % 3}
    graph |= {"edges": np.argwhere(upper), "adj": (upper | upper.T).astype(np.float32)}
    graph["csr"] = csr_matrix(graph["adj"])
    np.savez(tmp_path / "graph.npz", **GRAPH_FORMS[form](graph))
    found = read_graph({"name": str(tmp_path / "graph.npz")}, {})
    assert found.labels.tolist() == graph["y"].tolist() and np.allclose(found.nodes, graph["x"])
    assert (
        found.edges.shape[1] == 2 * upper.sum() and upper[tuple(found.edges[:, found.edges[0] < found.edges[1]])].all()
    )
    assert {split: len(index) for split, index in found.splits.items()} == {"train": 9, "validation": 7, "test": 10}
