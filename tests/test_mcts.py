"""Paper 26, tree search: its golden vectors, the limits of search and loss, exhaustive enumeration, bad input."""

import itertools
import math

import numpy as np
import pytest
import torch

from golden_vectors import close, golden, reduce
from understudy import InputError
from understudy.curation.step_pairs import chain, sibling_pairs
from understudy.generation.tree import (
    Node,
    attach,
    chosen_child,
    most_visited_child,
    prior,
    puct,
    simulation,
    state_value,
    tree_search,
)
from understudy.losses.pair_weights import visit_label_smoothing
from understudy.losses.preference import dpo


@pytest.fixture(scope="module")
def g():
    return golden("26-mcts-dpo")


def driven(search, expand):
    """The result of a search whose nodes are expanded by `expand`."""
    try:
        node = next(search)
        while True:
            node = search.send(expand(node))
    except StopIteration as end:
        return end.value


def world(g):
    """The nodes of the golden tree and what expands them; `step` is the number of a node."""
    parent, nodes, values = g["parent"].tolist(), [Node(step=0)], [0.0]
    for i in range(1, len(parent)):
        end = bool(g["is_terminal"][i])
        outcome = float(g["outcome"][i]) if end else None
        depth = int(g["node_depth"][parent[i]])
        values.append(state_value(float(g["self_eval"][i]), outcome, values[parent[i]], depth))
        ntok = int(g["step_ntok"][i])
        p = prior(float(g["step_token_logp"][i, :ntok].sum()), ntok, float(g["length_penalty"]))
        nodes.append(Node(step=i, prior=p, value=values[i], terminal=end))
    return nodes, lambda node: [n for n in nodes if n.step and parent[n.step] == node.step]


def played(g, c=None, simulations=None):
    nodes, expand = world(g)
    c = float(g["c_puct"]) if c is None else c
    number = int(g["n_sim"]) if simulations is None else simulations
    paths = [driven(simulation(nodes[0], c=c, gamma=float(g["gamma"])), expand) for _ in range(number)]
    return nodes, [[n.step for n in path] for path in paths]


@pytest.mark.golden
def test_the_search_is_the_golden_one(g):
    nodes, paths = played(g)
    close(torch.tensor([n.value for n in nodes], dtype=torch.float64), g["value"])
    width = g["trace"].shape[1]
    assert [path + [-1] * (width - len(path)) for path in paths] == g["trace"].tolist()
    seen = torch.tensor([n.parent is not None or n.step == 0 for n in nodes])
    assert seen.tolist() == g["visited"].tolist()
    for name, values in (
        ("prior", [n.prior if n.step else 0.0 for n in nodes]),
        ("N", [n.visits for n in nodes]),
        ("Q", [n.q for n in nodes]),
        ("V", [n.v for n in nodes]),
    ):
        close(torch.tensor(values, dtype=torch.float64) * seen, g[name])
    close(torch.tensor([n.reward for n in nodes], dtype=torch.float64)[seen], g["reward"][seen])
    assert chosen_child(nodes[0]).step == int(g["selected_root_child"])
    path = [nodes[0]]
    while path[-1].children:
        path.append(most_visited_child(path[-1]))
    pairs = [[p.better.step, p.worse.step, p.better.visits, p.worse.visits] for p in sibling_pairs(path)]
    close(torch.tensor(pairs, dtype=torch.float64).view(-1, 4), g["depth_pairs"].double())


@pytest.mark.golden
def test_the_loss_is_the_golden_one(g):
    smoothing = visit_label_smoothing(g["pair_visits_better"], g["pair_visits_worse"])
    close(smoothing, g["pair_label_smoothing"])
    better, worse = (g[f"pair_logp_{side}"].clone().requires_grad_() for side in ("better", "worse"))
    values = dpo(
        better, worse, g["pair_ref_better"], g["pair_ref_worse"], beta=float(g["beta"]), label_smoothing=smoothing
    )
    close(values, g["pair_loss"])
    total = reduce(values, "token_mean")
    close(total, g["loss"])
    for found, side in zip(torch.autograd.grad(total, [better, worse]), ("better", "worse"), strict=True):
        close(found, g[f"grad_{side}"])


# -- limits of the loss -------------------------------------------------------------------------------------------------


def test_the_label_smoothing_lies_between_dpo_and_no_preference():
    h = torch.linspace(-3, 3, 7, dtype=torch.float64)
    zero = torch.zeros_like(h)
    close(dpo(h, zero, zero, zero, beta=1.0, label_smoothing=zero), dpo(h, zero, zero, zero, beta=1.0))
    half = dpo(h, zero, zero, zero, beta=1.0, label_smoothing=torch.full_like(h, 0.5))
    close(half, half.flip(0))
    assert int(half.argmin()) == 3
    at_start = dpo(h, zero, h, zero, label_smoothing=torch.linspace(0, 0.5, 7, dtype=torch.float64))
    close(at_start, torch.full_like(h, math.log(2)))
    n = torch.arange(6.0, dtype=torch.float64)
    table = visit_label_smoothing(n[:, None].expand(6, 6), n[None].expand(6, 6))  # [better, worse]
    assert (table.diff(dim=0) <= 0).all() and (table.diff(dim=1) >= 0).all()
    assert table.max() == 0.5 and not table[:, 0].any()


def test_the_label_smoothing_of_counts_is_exact():
    close(visit_label_smoothing(torch.tensor([7]), torch.tensor([3])), torch.tensor([0.3]).double(), rtol=1e-7)
    assert float(visit_label_smoothing(torch.tensor([7]), torch.tensor([3]))) == 0.3


def test_tokens_that_both_steps_begin_with_get_no_gradient():
    logits = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    said = logits.log_softmax(-1)
    same = said[0, 3] + said[1, 7]
    better, worse = (same + said[2, 1])[None], (same + said[3, 2] + said[4, 4])[None]
    zero = torch.zeros(1, dtype=torch.float64)
    smoothing = torch.full((1,), 0.3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(dpo(better, worse, zero, zero, label_smoothing=smoothing).sum(), logits)
    assert gradient[:2].abs().max() < 1e-15 and gradient[2:].abs().sum(1).min() > 1e-3


def test_bad_input_of_the_loss():
    one = torch.ones(2)
    with pytest.raises(InputError, match=r"label_smoothing of pair 1 is 0\.6"):
        dpo(one, one, one, one, label_smoothing=torch.tensor([0.5, 0.6]))
    with pytest.raises(InputError, match=r"-1\.0 visits of the rejected side of pair 1"):
        visit_label_smoothing(one, torch.tensor([0.0, -1.0]))


# -- limits of the search -----------------------------------------------------------------------------------------------


def full_tree(width, depth, seed, shift=0.0):
    """A root and what expands it: every path of `depth` steps, with seeded values and priors by path."""
    made = {}

    def expand(node):
        path = node.step
        if path not in made:
            made[path] = []
            for i in range(width):
                chance = np.random.default_rng([seed, *path, i])
                value, p = float(chance.normal()), float(chance.uniform(0.1, 1))
                made[path].append(Node((*path, i), p, value + shift, terminal=len(path) + 1 == depth))
        return made[path]

    return Node((), value=shift), expand


def test_without_exploration_the_search_is_greedy():
    root, expand = full_tree(3, 3, 0)
    for _ in range(8):
        driven(simulation(root, c=0.0), expand)
        for node in root.walk():
            if node.children and node.visits:
                assert puct(node, 0.0).q == max(child.q for child in node.children)


def test_visits_follow_the_prior_as_exploration_grows():
    root, expand = full_tree(3, 1, 1)
    for _ in range(3000):
        driven(simulation(root, c=1e6), expand)
    visits, priors = (np.array(x) for x in zip(*((n.visits, n.prior) for n in root.children), strict=True))
    assert np.abs(visits / visits.sum() - priors / priors.sum()).max() < 2e-3


def test_counts_rewards_and_values_keep_their_laws(g):
    for simulations in (1, 7, int(g["n_sim"])):
        nodes, paths = played(g, simulations=simulations)
        root = nodes[0]
        assert root.visits == 2 * simulations
        for node in root.walk():
            through = sum(node.step in path for path in paths)
            assert node.visits == (2 if node is root else 1) * through
            assert sum(n.reward for n in node.path) == pytest.approx(node.value - root.value, abs=1e-12)
            if node.children and node.visits:
                values = [child.q for child in node.children]
                assert min(values) - 1e-12 <= node.v <= max(values) + 1e-12


def test_a_constant_added_to_all_values_changes_no_selection():
    found = []
    for shift in (0.0, 2.0):  # a power of two: the differences stay what they were to the last bit but rounding
        root, expand = full_tree(3, 3, 4, shift)
        found.append([[n.step for n in driven(simulation(root), expand)] for _ in range(30)])
    assert found[0] == found[1]


@pytest.mark.parametrize("seed", range(5))
def test_values_converge_to_those_of_exhaustive_enumeration(seed):
    """With exact values at the leaves and many simulations the path ends at the best of all leaves, and V tends to its R, by
    the root of the number of simulations."""
    width, depth = 3, 3
    root, expand = full_tree(width, depth, seed)
    leaves = {}
    for path in itertools.product(range(width), repeat=depth):
        node = root
        for step in path:
            node = expand(node)[step]
        leaves[path] = node.value
    best = max(leaves, key=leaves.__getitem__)
    near = []
    for number in (60, 600, 6000):
        while root.visits < 2 * number:
            driven(simulation(root), expand)
        near.append(abs(root.v - leaves[best]))
    assert near[2] < 0.5 * near[1] < 0.35 * near[0] and near[2] < 0.15
    root, expand = full_tree(width, depth, seed)
    assert driven(tree_search(root, simulations=3000), expand)[-1].step == best


def test_pairs_need_two_values_and_chains_are_one_step():
    root = Node()
    steps = [Node("a"), Node("b"), Node("c")]
    attach(root, steps)
    for node, (q, n) in zip(steps, ((1.0, 2), (1.0, 5), (0.5, 1)), strict=True):
        node.q, node.visits = q, n
    only = Node("d", terminal=True)
    attach(steps[1], [only])
    (pair,) = sibling_pairs([root, steps[1], only])  # of equal Q the more visited; a single child has no alternative
    assert [n.step for n in pair] == ["b", "c"]
    assert sibling_pairs([root], worst=False) == []  # the second best has the same Q
    assert [n.step for n in chain(pair.better)] == ["b", "d"] and chain(pair.worse) == [steps[2]]
    for node in steps:
        node.q = 1.0
    assert sibling_pairs([root]) == []


def test_a_search_that_gets_no_children_ends_where_it_stands():
    root, expand = full_tree(2, 4, 0)
    given = itertools.count()
    path = driven(tree_search(root, simulations=3), lambda node: expand(node) if next(given) < 3 else None)
    assert 1 < len(path) <= 4 and not path[-1].terminal and path[-1].children is None
    assert sum(n.children is not None for n in root.walk()) == 3
    assert driven(tree_search(Node(), simulations=2), lambda node: [])[-1].parent is None


def test_bad_input_of_the_search():
    with pytest.raises(InputError, match="A search of 0 simulations"):
        driven(tree_search(Node(), simulations=0), lambda node: [])
    with pytest.raises(InputError, match="step of 0 tokens"):
        prior(-1.0, 0)
    with pytest.raises(InputError, match="log-probability of a step is nan"):
        prior(math.nan, 3)
    assert prior(-math.inf, 3) == 0.0
    with pytest.raises(InputError, match="evaluation of a step is nan"):
        state_value(math.nan, None)
    with pytest.raises(InputError, match="outcome of an answer is inf"):
        state_value(0.5, math.inf)
    assert state_value(0.0, 1.0, 0.4, 9) == 1.4 and state_value(0.6, None, 0.4, 5) == 0.3
