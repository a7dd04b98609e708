"""Spaces of networks: names with blanks, `cnn:{width}x{depth}k3`, and the values that each blank takes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from string import Formatter
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from understudy.errors import InputError, nearest


class Range(BaseModel):
    """The integers from `low` to `high`, both included, every `step`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: int
    high: int
    step: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"high ({self.high}) is below low ({self.low})")
        return self

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(range(self.low, self.high + 1, self.step))


@dataclass(frozen=True)
class Genotype:
    """One network of a space: a template, and the value of each of its blanks."""

    template: str
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The network's name, as a recipe has it."""
        return self.template.format(**self.values)


class Space:
    """All networks that templates name when their blanks are filled.

    Args:
        templates: names of small networks with blanks in braces.
        ranges: the values of each blank, as a `Range` or a list.

    Raises:
        InputError: no template, a blank without values, values without a blank, or a template that cannot be read.
    """

    def __init__(self, templates: Sequence[str], ranges: Mapping[str, Range | Sequence[Any]]) -> None:
        if not templates:
            raise InputError("The space of students is empty: name one or more, such as `convnet:{width}`.")
        self.blanks = {template: _blanks(template) for template in templates}
        self.ranges = {k: v.values if isinstance(v, Range) else tuple(v) for k, v in ranges.items()}
        used = {blank for blanks in self.blanks.values() for blank in blanks}
        for blank in used:
            if not self.ranges.get(blank):
                raise InputError(
                    f"The space has no values for {{{blank}}}.{nearest(blank, self.ranges)} Set its range."
                )
        for name in self.ranges:
            if name not in used:
                raise InputError(f"Range {name!r} belongs to no student.{nearest(name, used)} Write {{{name}}} in one.")

    @property
    def size(self) -> int:
        """The number of genotypes."""
        return sum(map(self._size, self.blanks))

    def _size(self, template: str) -> int:
        return math.prod(len(self.ranges[blank]) for blank in self.blanks[template])

    def every(self) -> Iterator[Genotype]:
        """All genotypes, in order."""
        for template, blanks in self.blanks.items():
            for values in product(*(self.ranges[b] for b in blanks)):
                yield Genotype(template, dict(zip(blanks, values, strict=True)))

    def draw(self, generator: random.Random) -> Genotype:
        """One genotype, each with the same probability."""
        templates = list(self.blanks)
        (template,) = generator.choices(templates, [self._size(t) for t in templates])
        return Genotype(template, {b: generator.choice(self.ranges[b]) for b in self.blanks[template]})

    def mutate(self, parent: Genotype, generator: random.Random) -> Genotype:
        """The parent with one blank, or its template, changed to another value. A space of one genotype returns it."""
        open_blanks: list[str | None] = [b for b in self.blanks[parent.template] if len(self.ranges[b]) > 1]
        if len(self.blanks) > 1:
            open_blanks.append(None)
        if not open_blanks:
            return parent
        blank = generator.choice(open_blanks)
        if blank is not None:
            other = generator.choice([v for v in self.ranges[blank] if v != parent.values[blank]])
            return Genotype(parent.template, {**parent.values, blank: other})
        template = generator.choice([t for t in self.blanks if t != parent.template])
        new = {b: generator.choice(self.ranges[b]) for b in self.blanks[template]}
        return Genotype(template, {b: parent.values.get(b, v) for b, v in new.items()})


def _blanks(template: str) -> tuple[str, ...]:
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise InputError(f"Student {template!r} cannot be read: {error}.") from None
    for name, spec, conversion in parts:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise InputError(f"Student {template!r}: {{{name}}} is no blank; write a name in braces, {{width}}.")
    return tuple(dict.fromkeys(name for name, _, _ in parts if name is not None))
