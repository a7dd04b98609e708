"""Files of training triples with teacher scores, as published with Hofstätter et al. 2020, or without scores.

A line holds `pos_score  neg_score  query_id  pos_id  neg_id`, separated by tabs, or texts in place of the ids; parquet,
JSON, JSON Lines and CSV have columns of these names (`query`, `positive`, `negative` for texts; as in sentence-transformers
the query may be the `anchor`, and there may be several negatives, `negative_1`, `negative_2`, … or a list). Where no line has
scores, a teacher scores the triples. Ids are joined with the files `queries` and `collection` (id and text, of the same three formats).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from understudy.data.folders import find
from understudy.data.records import place, read_records
from understudy.data.tables import LARGEST, read_parquet
from understudy.errors import InputError
from understudy.files import replacing

log = logging.getLogger(__name__)
NUMBERS = ("pos_score", "neg_score")
COLUMNAR = (".parquet", ".jsonl", ".json", ".csv")
IDS, TEXTS = ("query_id", "pos_id", "neg_id"), ("query", "positive", "negative")


@dataclass(frozen=True)
class Held:
    """Records with the columns of triples that lie in no file of their own: of the Hub, or in memory.

    Args:
        path: what they are called. records: a mapping of columns each.
    """

    path: str
    records: Sequence[Mapping[str, Any]]
    suffix = ".jsonl"

    def __str__(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        return self.path


@dataclass(frozen=True)
class Triple:
    """A query with a relevant and another document, as texts, and a teacher's score of each, `None` without one."""

    pos_score: float | None
    neg_score: float | None
    query: str
    positive: str
    negative: str


def read_triples(
    path: str | Path | Held,
    *,
    queries: str | Path | None = None,
    collection: str | Path | None = None,
    notes: list[str] | None = None,
) -> list[Triple]:
    """Read scored triples.

    Args:
        queries, collection: files with the texts of ids; without them the file holds texts.
        notes: gets a sentence for whatever was skipped or looks wrong.

    Raises:
        InputError: a line with another number of columns than five or three, a score that is not a finite number, an
            empty or invalid text (each with its line), or a file with only unknown ids.
    """
    path = path if isinstance(path, Held) else located(path)
    if (queries is None) != (collection is None):
        raise InputError("Ids need both data.queries and data.collection; give the one that is missing.")
    names = None if queries is None or collection is None else (read_texts(queries), read_texts(collection))
    triples: list[Triple] = []
    skipped = same = 0
    for where, said, named in _rows(path, TEXTS if names is None else IDS):
        pos_score, neg_score = (
            (_number(where, name, v) for name, v in zip(NUMBERS, said, strict=True)) if said else (None,) * 2
        )
        words = [_text(where, name, v) for name, v in zip(TEXTS, named, strict=True)]
        same += words[1] == words[2]
        if names is not None:
            texts = [names[0].get(words[0]), names[1].get(words[1]), names[1].get(words[2])]
            if None in texts:
                skipped += 1
                continue
            words = [str(t) for t in texts]
            words = [_text(where, name, text) for name, text in zip(TEXTS, words, strict=True)]
        triples.append(Triple(pos_score, neg_score, *words))
    if not triples and skipped:
        raise InputError(
            f"{path}: none of the ids of its {skipped} triples is in {queries} and {collection}. Check that they belong together."
        )
    if not triples:
        raise InputError(f"{path} holds no triples.")
    _remark(path, triples, skipped, same, notes if notes is not None else [])
    return triples


def _remark(path: Path | Held, triples: Sequence[Triple], skipped: int, same: int, notes: list[str]) -> None:
    said = []
    if skipped:
        said.append(f"{path.name}: {skipped} of {skipped + len(triples)} triples have unknown ids and were skipped.")
    if same:
        said.append(f"{path.name}: {same} triples have one document as positive and negative; they teach nothing.")
    scores = [s for t in triples for s in (t.pos_score, t.neg_score) if s is not None]
    if not scores:
        said.append(f"{path.name}: the triples have no scores: they are a teacher's to give.")
    elif min(scores) >= 0 and max(scores) <= 1:
        said.append(
            f"{path.name}: all scores lie in [0, 1], like probabilities; their margins are squeezed into [-1, 1]. Give "
            "the teacher's logits."
        )
    for sentence in said:
        log.warning(sentence)
    notes += said


def write_triples(path: str | Path, triples: Iterable[Triple]) -> None:
    """Write scored triples with their texts: tab-separated, or parquet or JSON Lines by the suffix; complete or not at
    all.

    Raises:
        InputError: a text has a tab or line break and the file is tab-separated.
    """
    path, every = Path(path), list(triples)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            columns = (*NUMBERS, *TEXTS)
            pq.write_table(pa.table({c: [getattr(t, c) for t in every] for c in columns}), temporary)
        elif path.suffix == ".jsonl":
            lines = (json.dumps(asdict(t), ensure_ascii=False) + "\n" for t in every)
            temporary.write_text("".join(lines), encoding="utf-8")
        else:
            temporary.write_text("".join(_tab_separated(every)), encoding="utf-8", newline="")


def _tab_separated(triples: Sequence[Triple]) -> Iterator[str]:
    for number, t in enumerate(triples):
        texts = (t.query, t.positive, t.negative)
        if any(c in text for text in texts for c in "\t\n\r"):
            raise InputError(f"Triple {number} has a tab or a line break in a text: write a .parquet or .jsonl file.")
        yield "\t".join([repr(t.pos_score), repr(t.neg_score), *texts]) + "\n"


def read_texts(path: str | Path) -> dict[str, str]:
    """Id → text, of a tab-separated file or one with columns, an id (`id`, `_id`, `doc_id`, `query_id`) and `text`."""
    path = located(path)
    found: dict[str, str] = {}
    for where, name, text in _texts(path):
        if name in found:
            raise InputError(f"{where}: the id {name[:60]!r} is there twice. Keep one of its texts.")
        # A missing text is an error only if a triple uses it; an empty one is a mistake in the file.
        found[name] = "" if text is None else _text(where, f"text of {name[:60]!r}", text)
    return found


def _texts(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Location, id and text of each record; the text is `None` if it is missing."""
    if path.suffix not in COLUMNAR:
        yield from ((where, row[0], row[1]) for where, row in _lines(path, {2: "id text"}))
        return
    for where, record in _records(path):
        key = next((n for n in record if n in ("id", "doc_id", "query_id", "_id")), None)
        if key is None or "text" not in record:
            raise InputError(
                f"{where} has columns {', '.join(record)}; expected an id (id, doc_id, query_id) and text."
            )
        yield where, _text(where, key, record[key]), record["text"] or None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a parquet file; a damaged file is an `InputError` of one line."""
    table = read_parquet(path)
    try:
        return list(table.to_pylist())
    except ValueError as error:  # not UTF-8, or times out of range
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def located(path: str | Path) -> Path:
    """A path as given or in the data folder.

    Raises:
        InputError: it does not exist.
    """
    found = find(str(path))
    if found is None or not found.is_file():
        raise InputError(f"{path} is not a file, neither as a path nor in UNDERSTUDY_DATA.")
    return found


def _rows(path: Path | Held, columns: tuple[str, ...]) -> Iterator[tuple[str, Sequence[Any] | None, Sequence[Any]]]:
    """Location, scores (`None` if the file has none) and texts or ids of each triple."""
    if isinstance(path, Path) and path.suffix not in COLUMNAR:
        shown = {5: " ".join((*NUMBERS, *columns)), 3: " ".join(columns)}
        for where, row in _lines(path, shown):
            yield where, row[:-3] or None, row[-3:]
        return
    scored: bool | None = None
    for where, record in ((at, row) for at, one in _records(path) for row in _triples_of(at, one)):
        scored = any(n in record for n in NUMBERS) if scored is None else scored
        missing = [c for c in (*(NUMBERS if scored else ()), *columns) if c not in record]
        if missing:
            raise InputError(
                f"{where} has no column {missing[0]!r} (it has {', '.join(record)}); expected {', '.join((*NUMBERS, *columns))}"
                + (". For ids give data.queries and data.collection." if columns == TEXTS else ".")
            )
        if not scored and any(n in record for n in NUMBERS):
            raise InputError(f"{where} has scores, and the first record has none. Score every triple, or none.")
        yield where, [record[c] for c in NUMBERS] if scored else None, [record[c] for c in columns]


_NEGATIVE = re.compile(r"negative_\d+")


def _triples_of(where: str, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A record with sentence-transformers' names of columns as triples: one for each of its negatives."""
    one = dict(record)
    if "anchor" in one and "query" not in one:
        one["query"] = one.pop("anchor")
    given = one.get("negative", one.get("negatives"))
    several = [one.pop(c) for c in [c for c in one if isinstance(c, str) and _NEGATIVE.fullmatch(c)]]
    negatives = [*(given if isinstance(given, (list, tuple)) else [given] if given is not None else []), *several]
    if len(negatives) < 2 and not several and not isinstance(given, (list, tuple)):
        yield one
        return
    if not negatives:
        raise InputError(f"{where} has no negative: its list is empty. Give it one, or remove the record.")
    scores = one.get("neg_score")
    listed = scores if isinstance(scores, (list, tuple)) else [scores] * len(negatives)
    if len(listed) != len(negatives) or (scores is not None and listed is not scores and len(negatives) > 1):
        raise InputError(f"{where} has {len(negatives)} negatives and neg_score {scores}: give a list of one for each.")
    for negative, score in zip(negatives, listed, strict=True):
        yield {**one, "negative": negative, **({} if scores is None else {"neg_score": score})}


def _records(path: Path | Held) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Location and content of each record of a file with columns, or of records that lie in none."""
    if isinstance(path, Held):
        yield from ((place(f"{path}, record {number}", row), row) for number, row in enumerate(path.records))
        return
    if path.suffix in (".csv", ".json"):
        yield from ((place(f"{path}, row {number}", row), row) for number, row in enumerate(read_records(path)))
        return
    if path.suffix == ".parquet":
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(read_rows(path)))
        return
    for where, line in _text_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {str(error).splitlines()[0]}") from error
        if not isinstance(row, dict):
            raise InputError(f"{where} is {type(row).__name__}, not an object with columns.")
        yield where, row


def _lines(path: Path, shown: Mapping[int, str]) -> Iterator[tuple[str, list[str]]]:
    """The columns of each line; all lines have as many as the first, one of the numbers in `shown`. A header line is
    skipped."""
    first = None
    for where, line in _text_lines(path):
        row = line.split("\t")
        known = shown if first is None else {first: shown[first]}
        if len(row) not in known:
            raise InputError(
                f"{where}: {len(row)} columns where {' or '.join(map(str, known))} are expected, tab-separated: "
                f"{'; or '.join(known.values())}. Texts with tabs belong into a .parquet or .jsonl file."
            )
        header = first is None and " ".join(row) in shown.values()
        first = len(row)
        if not header:
            yield where, row


def _text_lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield f"{path}, line {number}", line.rstrip("\r\n")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is not UTF-8 text: {getattr(error, 'reason', error)}.") from error


def _text(where: str, name: str, value: Any) -> str:
    """A non-empty text; for ids also an integer."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise InputError(f"{where}: the {name} is {type(value).__name__}, not text.")
    if not str(value).strip():
        raise InputError(f"{where}: the {name} is empty. Remove the line, or fix its text.")
    return str(value)


def _number(where: str, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: {name} is {str(value)[:60]!r} and must be a number.") from None
    if not abs(number) <= LARGEST:
        raise InputError(
            f"{where}: {name} is {number}, not a finite number in single precision. Score that pair again, or remove the line."
        )
    return number
