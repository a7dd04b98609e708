"""Layouts of the tokens of a batch in rows without padding and with common prefixes computed once.

A *tree* is the common prefix of its sequences, followed by the rest of each, its *branches*: `prompt ‖ completion 1 ‖
completion 2 …`. A sequence without a common prefix is a tree without branches. Trees are placed side by side in rows as
wide as the largest of them. Positions in every branch continue those of the prefix; a token attends to the prefix of
its tree and to its own branch, up to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MULTIPLE = 8
"""The width of rows is a multiple of this, as for padded batches."""


@dataclass(frozen=True)
class Tree:
    """Indices of the sequences of a tree, and the length of their common prefix in tokens."""

    members: tuple[int, ...]
    shared: int = 0

    def size(self, lengths: Sequence[int]) -> int:
        """Number of tokens, with the prefix counted once."""
        return self.shared + sum(lengths[m] - self.shared for m in self.members)


@dataclass(frozen=True)
class Layout:
    """Rows of tokens, `[rows, width]`, on the CPU.

    Args:
        source: index of the token in the flattened padded batch; −1 for none.
        positions: of each token in its own sequence.
        trees, branches: the tree and branch of each token; branch 0 is the prefix of a tree, tree −1 is no token.
        place: `[sequences, length]`, flattened index in the layout of each token of the padded batch; 0 for padding.
    """

    source: Tensor
    positions: Tensor
    trees: Tensor
    branches: Tensor
    place: Tensor

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """`[rows, 1, width, width]`, True where a token (third axis) attends to another (fourth)."""
        trees, branches = self.trees.to(device), self.branches.to(device)
        width = trees.shape[1]
        before = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        own = branches[:, None, :] == branches[:, :, None]
        seen = before & (trees[:, None, :] == trees[:, :, None]) & (own | (branches[:, None, :] == 0))
        return seen[:, None]

    def starts(self) -> list[int]:
        """The starts of sequences in one row of trees without branches, and the end of the last one."""
        trees = self.trees.flatten()
        kept = trees[trees >= 0]
        changes = (kept.diff(prepend=kept.new_tensor([-1])) != 0).nonzero()[:, 0]
        return [*changes.tolist(), len(kept)]


def lay_out(lengths: Sequence[int], trees: Sequence[Tree], length: int, *, one_row: bool = False) -> Layout:
    """Arrange trees in rows.

    Args:
        lengths: number of tokens of each sequence, before padding.
        trees: to arrange.
        length: of the padded batch.
        one_row: all in one row without padding, as kernels for variable-length sequences require.
    """
    sizes = [tree.size(lengths) for tree in trees]
    width = sum(sizes) if one_row else -(-max(sizes) // MULTIPLE) * MULTIPLE
    rows = [list(range(len(trees)))] if one_row else fill(sizes, width)
    source, positions, tree_of, branch = (np.full((len(rows), width), v) for v in (-1, 0, -1, 0))
    place = np.zeros((len(lengths), length), dtype=np.int64)
    for r, chosen in enumerate(rows):
        at = 0
        for t in chosen:
            tree, start = trees[t], at
            parts = [(tree.members[0], 0, tree.shared)] + [(m, tree.shared, lengths[m]) for m in tree.members]
            for number, (member, first, last) in enumerate(parts):
                here = slice(at, at + last - first)
                source[r, here] = np.arange(member * length + first, member * length + last)
                positions[r, here] = np.arange(first, last)
                branch[r, here] = number
                if number:
                    place[member, first:last] = np.arange(r * width + here.start, r * width + here.stop)
                at = here.stop
            for member in tree.members:
                place[member, : tree.shared] = np.arange(r * width + start, r * width + start + tree.shared)
            tree_of[r, start:at] = t
    return Layout(*(torch.from_numpy(a) for a in (source, positions, tree_of, branch, place)))


def fill(sizes: Sequence[int], width: int) -> list[list[int]]:
    """First-fit decreasing bin packing into rows of `width`: the largest first, each into the fullest row with room for
    it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = [r for r, left in enumerate(room) if left >= sizes[i]]
        if fitting:
            best = min(fitting, key=lambda r: (room[r], r))
        else:
            best = len(rows)
            rows.append([])
            room.append(width)
        rows[best].append(i)
        room[best] -= sizes[i]
    return rows


def shared_beginnings(ids: Tensor, kept: Tensor, group: Tensor) -> Tensor:
    """`[sequences]`: length of the common prefix of each sequence with the first of its group.

    Args:
        ids, kept: `[sequences, length]`, tokens, and True where they are not padding.
        group: `[sequences]`, index of the first sequence of the group.
    """
    same = (ids == ids[group]) & kept & kept[group]
    return same.long().cumprod(1).sum(1)


def group_trees(lengths: Sequence[int], common: Sequence[int], groups: Sequence[Sequence[int]]) -> list[Tree]:
    """The tree of each group, whose prefix is common to all of its sequences."""
    return [
        Tree(tuple(g), min(min(common[m], lengths[m]) for m in g)) if len(g) > 1 else Tree(tuple(g)) for g in groups
    ]


def is_padded_right(kept: Tensor) -> Tensor:
    """Whether every sequence has a token and all padding is on the right: a boolean scalar."""
    return kept[:, 0].all() & (kept[:, 1:] <= kept[:, :-1]).all()


def waste(batches: Sequence[tuple[Sequence[int], Sequence[Tree]]]) -> tuple[float, float, float]:
    """For some batches (lengths and trees): fraction of padding when padded, fraction when packed, and packed tokens,
    padding included, as a fraction of padded ones."""
    padded = real = own = packed = 0
    for lengths, trees in batches:
        sizes = [tree.size(lengths) for tree in trees]
        width = -(-max(sizes) // MULTIPLE) * MULTIPLE
        padded += len(lengths) * -(-max(lengths) // MULTIPLE) * MULTIPLE
        packed += len(fill(sizes, width)) * width
        real, own = real + sum(lengths), own + sum(sizes)
    return 1 - real / padded, 1 - own / packed, packed / padded
