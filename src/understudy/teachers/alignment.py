"""Alignment of two tokenizations of one text: the smallest groups of tokens that cover the same bytes.

Both token sequences are mapped to the UTF-8 bytes of the text. A group ends wherever both have a token boundary.
Special tokens are matched separately, by their function (beginning, end) or by their name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from understudy.data.ends import Ends
from understudy.errors import InputError
from understudy.models.tokenizers import token_bytes


class Group(NamedTuple):
    """Tokens `start:stop` of the student's and `other_start:other_stop` of the teacher's that cover the same bytes."""

    start: int
    stop: int
    other_start: int
    other_stop: int
    size: int

    @property
    def single(self) -> bool:
        """Whether the group has one token on each side."""
        return self.stop - self.start == 1 == self.other_stop - self.other_start


@dataclass
class Aligned:
    """A row of the student's tokens: the teacher's tokens of the same text, and the groups."""

    ids: list[int] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    size: int = 0
    """Bytes of the student's tokens."""


class Reader:
    """A tokenizer with the bytes of each of its tokens."""

    def __init__(self, tokenizer: Any, side: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"The {side}'s tokenizer {type(tokenizer).__name__} gives no offsets, so its tokens cannot be laid over "
                "another's: give a fast one (tokenizer.json)."
            )
        self.tokenizer = tokenizer
        self.bytes, self.lossless = token_bytes(tokenizer)
        alone, spaced = (self._join(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("a", " a"))
        self.begins = bool(Ends.of(tokenizer).begin)  # what it adds, not which tokens it has
        self.prepends, self.always = alone == b" a", spaced == b"  a"  # adds a space before a text, also a second one

    def first(self) -> dict[bytes, int]:
        """The first token of each byte string; an ordinary token precedes a byte fallback of the same byte."""
        names = self.tokenizer.convert_ids_to_tokens(range(len(self.bytes)))
        found: dict[bytes, int] = {}
        for fallback in (False, True):
            for i, (piece, name) in enumerate(zip(self.bytes, names, strict=True)):
                if piece and fallback == bool(re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name)):
                    found.setdefault(piece, i)
        return found

    def read(self, text: str) -> tuple[list[int], list[int | None]]:
        """Ids of a text without special tokens, and the byte offset where each ends; `None` inside of a character."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = found["input_ids"]
        pieces, whole = [self.bytes[i] for i in ids], text.encode()
        if self.lossless and all(p is not None for p in pieces):
            ends = lay([p or b"" for p in pieces], whole)
            if ends is not None:
                return ids, list(ends)
        sizes = [0]
        for character in text:
            sizes.append(sizes[-1] + len(character.encode()))
        spans = found["offset_mapping"]
        last: list[int | None] = [sizes[stop] for _, stop in spans]
        for i, (one, following) in enumerate(zip(spans, spans[1:], strict=False)):
            if following[0] < one[1]:  # both belong to one character: only the last offset is right
                last[i] = None
        return ids, last

    def _join(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.bytes[i] or b"" for i in ids)

    def cut(self, ids: Sequence[int], within: bool) -> int:
        """1 if the tokens begin with a space that the tokenizer itself adds before a text."""
        whole = self._join(ids)
        own = self.prepends and not within and whole[:1] == b" " != whole
        return int(own and (self.always or whole[:2] != b"  "))

    def text(self, ids: Sequence[int], within: bool) -> tuple[str, list[int | None], int] | None:
        """The text of ordinary tokens, the byte offset where each ends, and the number of tokens that begin before it.

        Args:
            ids: the tokens.
            within: the tokens continue an earlier text, so a leading space belongs to them.

        A character that is cut off at an end is left out. `None` if the text cannot be recovered.
        """
        if not self.lossless:
            text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            again, ends = self.read(text)
            return (text, ends, 0) if again == list(ids) else None
        whole = self._join(ids)
        cut, skip = self.cut(ids, within), 0
        while skip < min(4, len(whole)) and whole[skip] & 0xC0 == 0x80:
            skip += 1
        try:
            text = whole[cut + skip :].decode()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                return None
            text = whole[cut + skip : cut + skip + error.start].decode()
        size, at, ends = len(text.encode()), -cut - skip, []
        before = 0
        for i in ids:
            begins, at = at, at + len(self.bytes[i] or b"")
            before += bool(skip) and begins < 0
            ends.append(at if 0 <= at <= size else None)
        return text, ends, before


def lay(pieces: Sequence[bytes], whole: bytes) -> list[int] | None:
    """The byte offset in `whole` where each piece ends, without a space that a tokenizer adds before a text. `None` if
    they do not match."""
    joined = b"".join(pieces)
    extra = len(joined) - len(whole)
    if extra not in (0, 1) or joined[extra:] != whole or joined[:extra] not in (b"", b" "):
        return None
    at, ends = -extra, []
    for piece in pieces:
        at += len(piece)
        ends.append(max(0, at))
    return ends


def groups(ends: Sequence[int | None], other: Sequence[int | None], before: int = 0) -> list[Group]:
    """The smallest groups: split wherever tokens of both sides end, monotone, each byte in at most one group.

    Args:
        ends, other: byte offsets where the tokens of each side end.
        before: number of leading tokens of the first side that the other does not have.
    """
    first: dict[int, int] = {}
    for j, end in enumerate(other):
        if end is not None:
            first.setdefault(end, j + 1)  # an empty token belongs to the next one
    found: list[Group] = []
    whole = before == 0 or ends[before - 1] == 0
    start, other_start, at = (before if whole else before - 1), 0, 0
    if before == 0 and [*ends[:1]] == [0] == [*other[:1]]:  # both add a space before the text
        found.append(Group(0, 1, 0, 1, 0))
        start = other_start = 1
    for i in range(start, len(ends)):
        end = ends[i]
        if end is None or end <= at or first.get(end, 0) <= other_start:
            continue
        if whole:  # its first token does not begin before the text
            found.append(Group(start, i + 1, other_start, first[end], end - at))
        start, other_start, at, whole = i + 1, first[end], end, True
    return found


class Aligner:
    """Aligns token rows of the student with the teacher's tokenizer.

    Args:
        student, teacher: fast tokenizers.

    If the student's rows have no beginning-of-text token, the teacher's is added. `partner` maps ids of the student to
    those of the teacher: ordinary tokens with the same bytes, and special tokens with the same function or name.
    """

    def __init__(self, student: Any, teacher: Any) -> None:
        self.student, self.teacher = Reader(student, "student"), Reader(teacher, "teacher")
        self.marks = self._marks()
        theirs, mine = self.teacher.first(), self.student.first()
        self.partner = {i: theirs[b] for b, i in mine.items() if b in theirs}
        for i, j in self.marks.items():
            if j not in self.partner.values():
                self.partner[i] = j

    def _marks(self) -> dict[int, int]:
        """The special tokens of the student that the teacher has too; the end-of-text token takes precedence over the
        beginning."""
        mine, theirs = self.student.tokenizer, self.teacher.tokenizer
        found: dict[int, int] = {}
        for role in ("eos_token_id", "bos_token_id"):
            i, j = getattr(mine, role), getattr(theirs, role)
            if i is not None and j is not None:
                found.setdefault(i, j)
        names = {
            t: j for t, j in theirs.get_vocab().items() if self.teacher.bytes[j] is None and j != theirs.unk_token_id
        }
        for token, i in mine.get_vocab().items():
            if self.student.bytes[i] is None and i != mine.unk_token_id and token in names:
                found.setdefault(i, names[token])
        return found

    def align(self, ids: Sequence[int]) -> Aligned:
        """The teacher's tokens of a row, and the groups."""
        out = Aligned()
        theirs, mine = self.teacher.tokenizer, self.student.tokenizer
        begin, end = mine.bos_token_id, mine.eos_token_id
        bare = begin is None or (self.teacher.begins and ids[0] != begin)
        if bare and theirs.bos_token_id is not None:
            out.ids.append(theirs.bos_token_id)
        at = 0
        while at < len(ids):
            stop = at
            while stop < len(ids) and self.student.bytes[ids[stop]] is not None:
                stop += 1
            if stop > at:
                self._segment(out, ids, at, stop, within=at == 0 and self.student.begins)
                at = stop
                continue
            partner = self.marks.get(ids[at])
            if at == 0 and ids[at] == begin and theirs.bos_token_id is not None:
                partner = theirs.bos_token_id
            if partner is not None and not (out.ids[-1:] == [partner] == [theirs.bos_token_id]):
                out.ids.append(partner)
                out.groups.append(Group(at, at + 1, len(out.ids) - 1, len(out.ids), 0))
            if at and begin == end == ids[at] and theirs.bos_token_id not in (None, theirs.eos_token_id):
                out.ids.append(theirs.bos_token_id)
            at += 1
        return out

    def _segment(self, out: Aligned, ids: Sequence[int], at: int, stop: int, within: bool) -> None:
        part = list(ids[at:stop])
        found = self.student.text(part, within)
        if found is not None and not self.student.lossless:
            out.size += len(found[0].encode())
        else:
            out.size += sum(len(self.student.bytes[i] or b"") for i in part) - self.student.cut(part, within)
        if found is None or not found[0]:
            return
        text, ends, before = found
        read, other = self.teacher.read(text)
        base = len(out.ids)
        out.ids += read
        for group in groups(ends, other, before):
            if all(self.teacher.bytes[i] is not None for i in read[group.other_start : group.other_stop]):
                a, b, c, d, size = group
                out.groups.append(Group(a + at, b + at, c + base, d + base, size))

    def shares(self, rows: Sequence[Sequence[int]]) -> tuple[float, float]:
        """Fractions of the rows' bytes in groups of one token to one, and in longer groups."""
        found = [self.align(row) for row in rows]
        total = max(1, sum(a.size for a in found))
        single = sum(g.size for a in found for g in a.groups if g.single)
        every = sum(g.size for a in found for g in a.groups)
        return min(1.0, single / total), min(1.0, (every - single) / total)
