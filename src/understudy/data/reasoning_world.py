"""Running sums: questions with a known step-by-step solution, whose difficulty is their number of digits.

A question is `3529=`. Its solution is the running sums modulo 10, `3809`, and its answer the last of them. Whoever writes the
sums down needs one small step at a time; whoever writes the answer alone needs all of them at once. Digits stand side by
side, so a sum is always as far from its digit as the question is long. `STYLES` are other ways to write a solution.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import numpy as np

from understudy.errors import InputError

MODULUS = 10


def digits_of(question: str) -> list[int]:
    """The digits of the last question in a text.

    Raises:
        InputError: there is none.
    """
    found = re.findall(r"(\d+)=", question)
    if not found:
        raise InputError(f"{question[-60:]!r} holds no question of the running sums, such as 3529=.")
    return [int(digit) for digit in found[-1]]


def running_sums(digits: Sequence[int]) -> list[int]:
    """The sums of the first one, two, … digits, modulo 10."""
    return list(accumulate(digits, lambda a, b: (a + b) % MODULUS))


def attempt(
    digits: Sequence[int], error: float, chance: np.random.Generator, always: Sequence[int] | None = None
) -> list[int]:
    """Running sums of one who errs: each step is wrong with probability `error`, and the error is carried on.

    Args:
        always: a sum so far and a digit whose sum is one too much each time.
    """
    sums = [digits[0]]
    for digit in digits[1:]:
        wrong = int(chance.integers(1, MODULUS)) if chance.random() < error else 0
        if always is not None and (sums[-1], digit) == tuple(always):
            wrong = 1
        sums.append((sums[-1] + digit + wrong) % MODULUS)
    return sums


def shown(sums: Sequence[int]) -> str:
    """Sums as text."""
    return "".join(map(str, sums))


def _partial(digits: Sequence[int], chance: np.random.Generator) -> str:
    """Two of the running sums, at places that nothing tells."""
    sums = running_sums(digits)
    return shown(sorted(sums[int(i)] for i in chance.permutation(len(sums))[:2]))


def _shuffled(digits: Sequence[int], chance: np.random.Generator) -> str:
    """Sums of the digits in a random order, each behind the letter of the digit's place."""
    order = chance.permutation(len(digits)).tolist()
    return "".join(f"{chr(97 + i)}{s}" for i, s in zip(order, running_sums([digits[i] for i in order]), strict=True))


def _paired(digits: Sequence[int], chance: np.random.Generator) -> str:
    """The sums of neighbours two by two, then the total."""
    pairs = [sum(digits[i : i + 2]) % MODULUS for i in range(0, len(digits), 2)]
    return shown([*pairs, sum(digits) % MODULUS])


STYLES: dict[str, Callable[[Sequence[int], np.random.Generator], str]] = {
    "ordered": lambda digits, chance: shown(running_sums(digits)),
    "partial": _partial,
    "shuffled": _shuffled,
    "paired": _paired,
    "reversed": lambda digits, chance: shown(running_sums(digits[::-1])),
    "bare": lambda digits, chance: "",
}
"""How a solution is written, by name. All lead to the right answer; a student learns more from some than from others."""


def on_the_way(text: str) -> bool:
    """Whether the digits behind the last question in a text are the beginning of its sums, and what follows `####` their end."""
    sums = shown(running_sums(digits_of(text)))
    steps = re.findall(r"\d", text.rpartition("=")[2])
    return shown(steps[: len(sums)]) == sums[: len(steps)] and steps[len(sums) :] in ([], [sums[-1]])


def questions(levels: tuple[int, int], number: int, seed: int) -> Iterator[str]:
    """Different questions, with each number of digits from the first to the second level equally often.

    Raises:
        InputError: levels that are none, or fewer questions than are wanted.
    """
    least, most = levels
    if not 1 <= least <= most:
        raise InputError(f"data.digits is {list(levels)}: give the least and the most digits, at least 1.")
    kinds = range(least, most + 1)
    if number > len(kinds) * MODULUS**least * 4 // 5:  # the last ones would be found by many draws
        raise InputError(
            f"There are {MODULUS**least} questions of {least} digits, too few for {number} different ones with "
            f"data.digits={list(levels)}: ask for more digits, or fewer questions (data.size)."
        )
    chance, seen = np.random.default_rng([seed, 0x5C]), set()
    for i in range(number):
        while True:
            question = "".join(map(str, chance.integers(0, MODULUS, kinds[i % len(kinds)]))) + "="
            if question not in seen:
                break
        seen.add(question)
        yield question
