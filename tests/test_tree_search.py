"""The engine of tree searches: its budget, its journal through kills at any point, and what it refuses."""

import json

import numpy as np
import pytest

from understudy import InputError
from understudy.generation.tree_search import Expansion, SearchOptions, Step, TreeJournal, distinct, search_trees

OPTIONS = SearchOptions(simulations=3, width=3, first_width=4, depth=4, calls=60, calls_per_step=2)
NAMES = ["a", "b", "c"]


class Killed(BaseException):
    """In the place of a kill."""


class Model:
    """Proposes seeded steps of three letters; counts its calls, and each state that it was asked about."""

    def __init__(self):
        self.calls, self.asked = 0, []

    def __call__(self, leaves):
        for leaf in leaves:
            self.asked.append((leaf.tree, leaf.node))
            chance = np.random.default_rng([ord(leaf.tree), *(ord(c) for s in leaf.steps for c in s)])
            steps = []
            for i in range(leaf.width):
                self.calls += 2
                end = leaf.last or chance.random() < 0.2
                outcome = float(chance.choice([1.0, -1.0])) if end else None
                text = "".join(chance.choice(list("xyz"), 1)) + (str(i) if chance.random() < 0.8 else "")
                steps.append(Step(text, -float(chance.exponential()), 2, float(chance.random()), outcome, end))
            yield Expansion(steps, 2 * leaf.width)


def search(path, model, options=OPTIONS, names=NAMES):
    with TreeJournal(path, {"width": options.width}) as journal:
        return search_trees(names, model, options, journal)


def shown(trees):
    """All numbers of all nodes."""
    rows = [(t.id, n.number, n.step, n.visits, n.q, n.v, n.prior, n.value) for t in trees for n in t.root.walk()]
    return rows, [[n.number for n in t.path] for t in trees], [(t.calls, t.cut) for t in trees]


def lines(path):
    """The whole lines of a file; a torn last one is none."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


@pytest.mark.parametrize("calls", [8, 9, 13, 14, 31, 60, None])
def test_no_tree_exceeds_its_budget_and_the_answer_is_as_long_as_it_allows(tmp_path, calls):
    model = Model()
    options = SearchOptions(simulations=5, width=3, first_width=4, depth=4, calls=calls, calls_per_step=2)
    trees = search(tmp_path / "j", model, options)
    assert sum(t.calls for t in trees) == model.calls
    for tree in trees:
        assert calls is None or tree.calls <= calls
        assert tree.cut or tree.path[-1].terminal
        open_nodes = [n for n in tree.root.walk() if n.children is None and not n.terminal and n.visits]
        assert tree.cut == bool(open_nodes)
        numbers = [n.number for n in tree.root.walk()]
        assert sorted(numbers) == list(range(len(numbers)))
    if calls == 8:
        assert all(len(t.path) <= 2 and t.calls == 8 for t in trees)


def test_twenty_kills_lose_and_double_no_node(tmp_path, monkeypatch):
    """Killed before a node's expansion is written, in the middle of its line, or behind it."""
    whole = Model()
    expected = shown(search(tmp_path / "whole", whole))
    append, chance, kills = TreeJournal.append, np.random.default_rng(5), 0
    path, model = tmp_path / "killed", Model()
    while True:
        left, moment = iter(range(int(chance.integers(0, 3)), -1, -1)), ("before", "within", "behind")[kills % 3]

        def stop(self, tree, node, expansion, left=left, moment=moment):
            killed = next(left) == 0
            if killed and moment == "before":
                raise Killed
            append(self, tree, node, expansion)
            if killed and moment == "within":
                data = self.path.read_bytes()
                self.path.write_bytes(data[: -int(chance.integers(1, 40))])
            if killed:
                raise Killed

        monkeypatch.setattr(TreeJournal, "append", stop)
        held = lines(path) if kills else []
        try:
            found = search(path, model)
        except Killed:
            kills += 1
            assert lines(path)[: len(held)] == held
            continue
        break
    assert kills >= 20 and shown(found) == expected
    keys = [(row["tree"], row["node"]) for row in lines(path)[1:]]
    assert len(keys) == len(set(keys)) and set(keys) == set(whole.asked)
    assert sorted(map(json.dumps, lines(path))) == sorted(map(json.dumps, lines(tmp_path / "whole")))


def test_a_finished_search_is_repeated_without_a_call(tmp_path):
    first = shown(search(tmp_path / "j", Model()))
    again = Model()
    assert shown(search(tmp_path / "j", again)) == first and not again.calls
    more = Model()  # further trees join, the others are as they were
    found = search(tmp_path / "j", more, names=[*NAMES, "d"])
    assert {tree for tree, _ in more.asked} == {"d"} and shown(found[:3]) == first


def test_trees_do_not_depend_on_each_other(tmp_path):
    together = search(tmp_path / "all", Model())
    for tree in together:
        (alone,) = search(tmp_path / tree.id, Model(), names=[tree.id])
        assert shown([alone]) == shown([tree])


def test_a_step_is_proposed_once_and_not_empty():
    steps = [Step(t, -1.0, 1) for t in ("a  b", " ", "a b\n", "", "c")]
    assert [s.text for s in distinct(steps)] == ["a  b", "c"]


def test_bad_input(tmp_path):
    for name in ("simulations", "width", "depth"):
        with pytest.raises(InputError, match=f"{name}=0 finds nothing"):
            SearchOptions(**{name: 0})
    with pytest.raises(
        InputError, match="A budget of 3 calls does not cover the first 2 proposals, which take up to 4"
    ):
        SearchOptions(calls=3, calls_per_step=2)

    def proposes(*steps, calls=1):
        return lambda leaves: [Expansion(steps, calls) for _ in leaves]

    one = SearchOptions(depth=1)
    with pytest.raises(InputError, match=r"node 0 of tree a is at the last depth \(1\) and has a step without"):
        search(tmp_path / "1", proposes(Step("x", -1.0, 1)), one)
    with pytest.raises(InputError, match="took 5 calls and may take 2"):
        search(tmp_path / "2", proposes(calls=5), one)
    with pytest.raises(InputError, match="has 3 steps and 2 were wanted"):
        search(tmp_path / "3", proposes(*(Step(t, -1.0, 1, 0, 1.0) for t in "xyz")), one)
    with pytest.raises(InputError, match=r"must be a probability, in \[0, 1\]"):
        search(tmp_path / "4", proposes(Step("x", -1.0, 1, 1.5, 1.0)), one)
    search(tmp_path / "5", Model())
    with pytest.raises(InputError, match=r"other settings \(width: 3, now 2\)"):
        TreeJournal(tmp_path / "5", {"width": 2})
    damaged = (tmp_path / "5").read_text().replace('"calls"', '"cells"', 1)
    (tmp_path / "5").write_text(damaged)
    with pytest.raises(InputError, match="is damaged in line 2"):
        TreeJournal(tmp_path / "5", {"width": 3})
