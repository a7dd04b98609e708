"""Search of a space by aging evolution."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

from understudy.architectures.candidates import Candidate, ranked
from understudy.architectures.space import Genotype, Space
from understudy.errors import InputError

_DRAWS = 2000
"""Draws in a row that may all be beyond the budget, or known."""
_MUTATIONS = 50
"""Mutations of a parent that may all be beyond the budget, or known."""


def evolve(
    space: Space,
    examine: Callable[[str], Candidate],
    score: str,
    *,
    evaluations: int,
    population: int = 36,
    tournament: int = 8,
    first: int = 0,
    seed: int = 42,
) -> list[Candidate]:
    """Candidates within the budget, in the order in which they were examined.

    A population of random candidates; then the best of a random sample of the population gets a child with one mutation,
    which takes the place of the oldest. A space of no more than `evaluations` is examined as a whole, in random order.

    Args:
        examine: from a network's name to its costs and scores. score: the one that is maximised.
        evaluations: candidates to examine. population, tournament: sizes of the population and of the sample.
        first: candidates at least that are drawn at random from the space, before any selection.

    Raises:
        InputError: no candidate is within the budget, or none has a score.

    Source: Real et al. 2019 (aging evolution), as used by Dong et al. 2023 (DisWOT). The released code sorts the sample the
    wrong way round and mostly takes poor parents; here the parent is its best.
    """
    generator = random.Random(seed)
    found: dict[str, tuple[Genotype, Candidate]] = {}
    if space.size <= evaluations:
        every = list(space.every())
        generator.shuffle(every)
        seen = [examine(genotype.name) for genotype in every]
        return _scored(list({c.student: c for c in seen if c.fits}.values()), score, seen)
    failed: list[Candidate] = []
    misses = 0
    while len(found) < min(evaluations, max(population, first)) and misses < _DRAWS:
        genotype = space.draw(generator)
        misses += 1
        if genotype.name not in found:
            candidate = examine(genotype.name)
            if candidate.fits:
                found[genotype.name], misses = (genotype, candidate), 0
            else:
                failed.append(candidate)
    alive = deque(found.values(), maxlen=population)
    for _ in range(evaluations - len(found) if found else 0):
        sample = generator.sample(list(alive), min(tournament, len(alive)))
        best = ranked([candidate for _, candidate in sample], score)[0]
        parent = next(genotype for genotype, candidate in sample if candidate is best)
        child = parent, best
        for _ in range(_MUTATIONS):
            genotype = space.mutate(parent, generator)
            if genotype.name not in found:
                candidate = examine(genotype.name)
                if candidate.fits:
                    child = found[genotype.name] = (genotype, candidate)
                    break
        alive.append(child)
    return _scored([candidate for _, candidate in found.values()], score, failed)


def _scored(found: list[Candidate], score: str, seen: list[Candidate]) -> list[Candidate]:
    if not found:
        nearest = min(seen, key=lambda c: (not c.parameters, c.parameters), default=None)
        why = f"; the smallest, {nearest.student}: {nearest.why}" if nearest is not None else ""
        raise InputError(f"None of {len(seen)} candidates is within the budget{why}. Raise it, or change the space.")
    if all(candidate.score(score) is None for candidate in found):
        raise InputError(
            f"Score {score!r} is finite for none of {len(found)} candidates (networks that are too deep without "
            "normalisation): change the space, or choose another score."
        )
    return found
