"""Files of training triples with teacher scores, as published with Hofstätter et al. 2020.

A line holds `pos_score  neg_score  query_id  pos_id  neg_id`, separated by tabs, or texts in place of the ids; a parquet
file has columns of these names (`query`, `positive`, `negative` for texts). Ids are joined with the files `queries` and
`collection` (id and text, tab-separated or parquet).
"""

from __future__ import annotations

import logging
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.data.folders import find
from understudy.errors import InputError

log = logging.getLogger(__name__)
NUMBERS = ("pos_score", "neg_score")
IDS, TEXTS = ("query_id", "pos_id", "neg_id"), ("query", "positive", "negative")


@dataclass(frozen=True)
class Triple:
    """A query with a relevant and another document, as texts, and what a teacher says of each."""

    pos_score: float
    neg_score: float
    query: str
    positive: str
    negative: str


def read_triples(
    path: str | Path,
    *,
    queries: str | Path | None = None,
    collection: str | Path | None = None,
    notes: list[str] | None = None,
) -> list[Triple]:
    """Read scored triples.

    Args:
        queries, collection: where the texts of ids are; the file holds texts if neither is given.
        notes: gets a sentence for whatever was skipped or looks wrong.

    Raises:
        InputError: a line of fewer than five columns, a score that is no finite number, an empty text (each with its
            line), or a file none of whose ids is known.
    """
    path = located(path)
    if (queries is None) != (collection is None):
        raise InputError("Ids need both data.queries and data.collection; give the one that is missing.")
    names = None if queries is None or collection is None else (read_texts(queries), read_texts(collection))
    triples: list[Triple] = []
    skipped = same = 0
    for where, row in _rows(path, TEXTS if names is None else IDS):
        pos_score, neg_score = (_number(where, name, value) for name, value in zip(NUMBERS, row[:2], strict=True))
        words = [str(v) for v in row[2:5]]
        same += words[1] == words[2]
        if names is not None:
            texts = [names[0].get(words[0]), names[1].get(words[1]), names[1].get(words[2])]
            if None in texts:
                skipped += 1
                continue
            words = [str(t) for t in texts]
        for name, text in zip(TEXTS, words, strict=True):
            if not text.strip():
                raise InputError(f"{where}: the {name} is empty. Remove the line, or mend its text.")
        triples.append(Triple(pos_score, neg_score, *words))
    if not triples and skipped:
        raise InputError(
            f"{path}: none of the ids of its {skipped} triples is in {queries} and {collection}. Check that they belong together."
        )
    if not triples:
        raise InputError(f"{path} holds no triples.")
    _remark(path, triples, skipped, same, notes if notes is not None else [])
    return triples


def _remark(path: Path, triples: Sequence[Triple], skipped: int, same: int, notes: list[str]) -> None:
    said = []
    if skipped:
        said.append(f"{path.name}: {skipped} of {skipped + len(triples)} triples have unknown ids and were skipped.")
    if same:
        said.append(f"{path.name}: {same} triples have one document as positive and negative; they teach nothing.")
    scores = [s for t in triples for s in (t.pos_score, t.neg_score)]
    if min(scores) >= 0 and max(scores) <= 1:
        said.append(
            f"{path.name}: all scores lie in [0, 1], like probabilities; their margins are squeezed into [-1, 1]. Give "
            "the teacher's logits."
        )
    for sentence in said:
        log.warning(sentence)
    notes += said


def write_triples(path: str | Path, triples: Iterable[Triple]) -> None:
    """Write scored triples with their texts: tab-separated, or parquet by the name; whole or not at all.

    Raises:
        InputError: a text has a tab or line break and the file is tab-separated.
    """
    path, every = Path(path), list(triples)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = (*NUMBERS, *TEXTS)
        pq.write_table(pa.table({c: [getattr(t, c) for t in every] for c in columns}), temporary)
    else:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            for number, t in enumerate(every):
                texts = (t.query, t.positive, t.negative)
                if any(c in text for text in texts for c in "\t\n\r"):
                    raise InputError(f"Triple {number} has a tab or a line break in a text: write a .parquet file.")
                file.write("\t".join([repr(t.pos_score), repr(t.neg_score), *texts]) + "\n")
    os.replace(temporary, path)


def read_texts(path: str | Path) -> dict[str, str]:
    """Id → text, of a tab-separated or parquet file; parquet columns end with `id` and are called `text`."""
    path = located(path)
    if path.suffix == ".parquet":
        rows = read_parquet(path)
        names = list(rows[0]) if rows else []
        key = next((n for n in names if n == "id" or n in ("doc_id", "query_id", "_id")), None)
        if key is None or "text" not in names:
            raise InputError(f"{path} has columns {', '.join(names)}; expected an id (id, doc_id, query_id) and text.")
        return {str(r[key]): str(r["text"] or "") for r in rows}
    found = {}
    for where, row in _lines(path, 2, "id and text"):
        if not row[1].strip():
            raise InputError(f"{where}: the text of {row[0]!r} is empty. Remove the line, or mend its text.")
        found[row[0]] = row[1]
    return found


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """All rows; a damaged file is one line."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def located(path: str | Path) -> Path:
    """A path as it is or in the data folder; one that does not exist is an `InputError`."""
    found = find(str(path))
    if found is None or not found.is_file():
        raise InputError(f"{path} is not a file, neither as a path nor in UNDERSTUDY_DATA.")
    return found


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Sequence[Any]]]:
    if path.suffix != ".parquet":
        yield from _lines(path, 5, " ".join((*NUMBERS, *columns)))
        return
    rows = read_parquet(path)
    missing = [c for c in (*NUMBERS, *columns) if rows and c not in rows[0]]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]!r} (it has {', '.join(rows[0])}); expected {', '.join((*NUMBERS, *columns))}"
            + (". For ids give data.queries and data.collection." if columns == TEXTS else ".")
        )
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", [row[c] for c in (*NUMBERS, *columns)]


def _lines(path: Path, columns: int, names: str) -> Iterator[tuple[str, list[str]]]:
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                row = line.rstrip("\r\n").split("\t")
                if len(row) < columns:
                    raise InputError(
                        f"{path}, line {number}: {len(row)} columns where {columns} are expected, tab-separated: {names}."
                    )
                yield f"{path}, line {number}", row
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}.") from error


def _number(where: str, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: {name} is {value!r} and must be a number.") from None
    if not math.isfinite(number):
        raise InputError(f"{where}: {name} is {number}. Score that pair again, or remove the line.")
    return number
