"""Checking final answers: numbers, choices, yes or no, text; found by a mark, in a box, or at the end of a text.

Whatever cannot be read is wrong, with the reason why it cannot. Answers are compared as canonical text, so they can be
counted and voted on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from understudy.errors import InputError

Kind = Literal["number", "choice", "yes_no", "text"]
Form = Literal["mark", "box", "last"]
MARK = "####"
"""What stands before the final answer in GSM8K's solutions."""


@dataclass(frozen=True)
class Parsed:
    """An answer as canonical text, or the reason why there is none."""

    value: str | None
    reason: str | None = None


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = re.compile(rf"(?<![\w.])[-+−]?[$€£]?\s?(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:\s?/\s?{_DIGITS})?(?!\d)")
_FIRST_CHOICE = re.compile(r"\s*\(?([A-H])(?:[).:,]|\s*$)")
_CHOICE = re.compile(r"(?<![\w'])([A-H])(?![\w'+])")
_YES_NO = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
_YES = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
Reader = Callable[[str], list[str]]


def numbers(text: str) -> list[str]:
    """Every number in a text, as a reduced fraction: `1,200.50`, `$3`, `50%`, `1/2`, `−4`. The sign of a difference is its own.

    A model that repeats a digit without end writes no number: more than 1,000 characters are none.
    """
    found = []
    for match in _NUMBER.finditer(text):
        if len(match.group()) > 1000:
            continue
        plain = re.sub(r"[\s$€£,+]", "", match.group()).replace("−", "-")
        above, _, below = plain.partition("/")
        if not below or Fraction(below):
            found.append(str(Fraction(above) / Fraction(below or 1)))
    return found


def choices(text: str) -> list[str]:
    """Every capital letter from A to H that stands alone; of a text that begins with one, as in `B) a car`, that one."""
    first = _FIRST_CHOICE.match(text)
    return [first.group(1)] if first else _CHOICE.findall(text)


def yes_no(text: str) -> list[str]:
    """Every yes and no (or true and false)."""
    return [_YES[word.lower()] for word in _YES_NO.findall(text)]


def words(text: str) -> list[str]:
    """The last line without case, space and punctuation around it, as one answer; none where nothing is left."""
    lines = text.strip().lower().split("\n")
    plain = " ".join(lines[-1].split()).strip(" .,;:!?'\"()")
    return [plain] if plain else []


READERS: dict[Kind, Reader] = {"number": numbers, "choice": choices, "yes_no": yes_no, "text": words}


def marked(text: str, mark: str = MARK) -> Parsed:
    """What stands behind the last mark, to the end of its line."""
    _, found, rest = text.rpartition(mark)
    if not found:
        return Parsed(None, "no mark")
    line = rest.strip().split("\n")[0].strip()
    return Parsed(line) if line else Parsed(None, "nothing behind the mark")


def boxed(text: str) -> Parsed:
    r"""What stands in the last `\boxed{…}`; braces inside may nest."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return Parsed(None, "no box")
    depth, begin = 0, start + len("\\boxed{")
    for end in range(begin - 1, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            inside = text[begin:end].strip()
            return Parsed(inside) if inside else Parsed(None, "empty box")
    return Parsed(None, "box without end")


@dataclass(frozen=True)
class Checker:
    """Reads and compares final answers of one kind.

    Args:
        kind: what an answer is. form: where it stands: behind a mark, in a box, or last in the text.
        mark: for `form="mark"`.

    Behind a mark or in a box there must be one answer: of several different ones none counts. `form="last"` takes the last.
    """

    kind: Kind
    form: Form = "mark"
    mark: str = MARK

    def parse(self, text: str) -> Parsed:
        """The final answer of a text."""
        if self.form == "last":
            return self._read(text)
        found = boxed(text) if self.form == "box" else marked(text, self.mark)
        return found if found.value is None else self._read(found.value)

    def before(self, text: str) -> str:
        """What stands before the final answer: the rationale; the whole text if there is no mark or box, or `form="last"`."""
        start = {"mark": self.mark, "box": "\\boxed{"}.get(self.form)
        head, found, _ = text.rpartition(start) if start is not None else ("", "", "")
        return (head if found else text).strip()

    def _read(self, text: str) -> Parsed:
        found = READERS[self.kind](text)
        if not found:
            return Parsed(None, f"no {_NAMES[self.kind]}")
        if self.form != "last" and len(set(found)) > 1:
            return Parsed(None, f"several {_PLURALS[self.kind]}")
        return Parsed(found[-1])

    def gold(self, text: str) -> str:
        """A reference answer, given alone, as `parse` would write it.

        Raises:
            InputError: it is none of this kind.
        """
        found = READERS[self.kind](text.strip())
        if len(set(found)) != 1:
            raise InputError(f"The answer {text[:60]!r} is not one {_NAMES[self.kind]}: name its kind in data.answers.")
        return found[0]

    def correct(self, text: str, gold: str) -> bool:
        """Whether a text's final answer is `gold` (as of `Checker.gold`); what cannot be read is wrong."""
        return self.parse(text).value == gold


_NAMES = {"number": "number", "choice": "letter of a choice", "yes_no": "yes or no", "text": "text"}
_PLURALS = {"number": "numbers", "choice": "choices", "yes_no": "answers", "text": "texts"}


def kind_of(answers: Sequence[str]) -> Kind:
    """The kind that all reference answers are of: numbers, letters of choices, yes or no, else text."""
    for kind in ("number", "choice", "yes_no"):
        if answers and all(len(READERS[kind](a)) == 1 and _alone(kind, a) for a in answers):
            return kind
    return "text"


def _alone(kind: Kind, answer: str) -> bool:
    """Whether nothing else is in the answer but a unit sign or brackets."""
    pattern = {"number": _NUMBER, "choice": _CHOICE, "yes_no": _YES_NO}[kind]
    return not re.sub(r"[\s.%()]", "", pattern.sub("", answer))


@dataclass(frozen=True)
class Vote:
    """What most of several answers say.

    Args:
        value: `None` where no answer could be read. count: votes for it. voters: answers that could be read.
        tied: another answer has as many votes.
    """

    value: str | None
    count: int
    voters: int
    tied: bool


def majority(answers: Sequence[str | None]) -> Vote:
    """The most frequent answer; of equally frequent ones that which came first. `None` does not vote (paper 21)."""
    counts = Counter(a for a in answers if a is not None)
    if not counts:
        return Vote(None, 0, 0, False)
    most = max(counts.values())
    best = [a for a in counts if counts[a] == most]  # in the order in which they came
    return Vote(best[0], most, counts.total(), len(best) > 1)
