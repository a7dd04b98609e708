"""Folders of documents, queries and relevance grades (qrels) as rows of queries with candidates from BM25.

Such a folder has tables that end in docs, queries and qrels, or it is laid out as BEIR's sets are (Thakur et al. 2021, arXiv
2104.08663): `corpus.jsonl` with title and text, `queries.jsonl`, and a table a split in the folder `qrels`; or as MS MARCO's:
`collection.tsv`, `queries.tsv` and `qrels.tsv` without headers.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from understudy.data.folders import split_of, visible, words_of
from understudy.data.records import absent, read_records
from understudy.data.retrieval_batches import IDEAL
from understudy.data.scored_triples import read_rows
from understudy.data.tables import LARGEST
from understudy.errors import InputError

COLUMNS = {"docs": ("doc_id", "text"), "queries": ("query_id", "text"), "qrels": ("query_id", "doc_id", "grade")}
BEIR = {"query-id": "query_id", "corpus-id": "doc_id", "score": "grade"}
TREC = ("query_id", "iteration", "doc_id", "grade")
WIDTHS = {3: COLUMNS["qrels"], 4: TREC}
"""Columns of grades without a header, by their number."""
TABLES = (".parquet", ".jsonl", ".csv", ".tsv")
LINES = (".txt", ".qrels", ".trec")
"""Endings of grades as TREC has them: query, iteration, document and grade with spaces between."""
_QUERIES_AT_ONCE = 256


def is_judged(path: Path) -> bool:
    """Whether a path is a folder with documents and relevance grades; a folder without grades holds triples, whose texts may
    be in a file of documents beside them."""
    if not path.is_dir():
        return False
    return bool(_files(path, "qrels")) or any(f.suffix == ".parquet" for f in _files(path, "docs"))


def split_queries(queries: Sequence[Any], named: Sequence[str | None], notes: list[str]) -> dict[str, list[Any]]:
    """Assign whole queries to splits: those that their file names, and of every ten training queries the first to test
    and the sixth to validation if these splits are missing."""
    out: dict[str, list[Any]] = {"train": [], "validation": [], "test": []}
    kind = {place: split for split, place in (("test", 0), ("validation", 5)) if split not in named}
    seen = 0
    for query, split in zip(queries, named, strict=True):
        if split in (None, "train"):
            split = kind.get(seen % 10, "train")
            seen += 1
        out[split].append(query)
    notes.append(
        f"{len(queries)} queries, {'split by query' if kind else 'split as their files are named'}: "
        + ", ".join(f"{len(v)} {k}" for k, v in out.items())
        + "."
    )
    return out


def judged_folder(
    path: Path, spec: Mapping[str, Any], notes: list[str]
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Rows of a folder with documents, queries and relevance grades; candidates come from BM25."""
    (docs,), (asked_in,) = (_tables(path, kind) for kind in ("docs", "queries"))
    documents, queries = _texts(docs, "docs", "doc_id"), _texts(asked_in, "queries", "query_id")
    kept = {name: text for name, text in documents.items() if text.strip()}
    if len(kept) < len(documents):
        notes.append(f"{path.name}: {len(documents) - len(kept)} documents without text were left out.")
    empty = next((name for name, text in queries.items() if not text.strip()), None)
    if empty is not None:
        raise InputError(f"{asked_in}: query {empty!r} is empty. Remove it, or fix its text.")
    place = {name: i for i, name in enumerate(kept)}
    grades, named = _judged(path, place, queries.keys(), notes)
    if not {"train", None} & set(named.values()):
        raise InputError(
            f"{path} has no grades for training, only for {', '.join(sorted({str(s) for s in named.values()}))}. Add them, or "
            "give all in one file, qrels.tsv, whose queries are then split."
        )
    asked = [q for q in queries if any(g > 0 for g in grades.get(q, {}).values())]
    if len(asked) < len(queries):
        notes.append(f"{path.name}: {len(queries) - len(asked)} queries without a relevant document were left out.")
    if not asked:
        raise InputError(
            f"{path}: no query has a relevant document. Check that qrels, queries and docs belong together."
        )
    texts = list(kept.values())
    ranks = bm25([queries[q] for q in asked], texts, min(int(spec.get("candidates", 50)), len(texts)))
    lists = [(queries[q], grades[q], list(map(int, r))) for q, r in zip(asked, ranks, strict=True)]
    said: list[str] = []
    parts, number, out = split_queries(lists, [named[q] for q in asked], said), 0, {}
    generator = random.Random(int(spec.get("seed", 0)))
    for split, chosen in parts.items():
        rows: list[dict[str, Any]] = []
        for query, judged, first in chosen:
            made = (
                _sampled(query, judged, first, texts, int(spec.get("negatives", 8)), generator)
                if split == "train"
                else [_judged_row(query, judged, first, texts)]
            )
            for row in made:
                rows.append({"id": number, **row})
                number += 1
        out[split] = rows
    notes += [f"{path.name}: {said[0]}"]
    return out, texts


def _judged(
    path: Path, place: Mapping[str, int], asked: Collection[str], notes: list[str]
) -> tuple[dict[str, dict[int, float]], dict[str, str | None]]:
    """For each query the grades of documents by index, and the split that its file is named after."""
    grades: dict[str, dict[int, float]] = {}
    named: dict[str, str | None] = {}
    unknown = unasked = 0
    for file in _tables(path, "qrels"):
        for place_in_file, j in enumerate(_rows(file, "qrels")):
            where = f"{file}, row {place_in_file}"
            query, document = (_id(where, key, j[key]) for key in ("query_id", "doc_id"))
            split, grade = split_of(file.stem), _grade(where, j["grade"])
            if named.setdefault(query, split) != split:
                raise InputError(f"{file}: the query {query!r} is graded in another split too. Keep it in one.")
            unasked += query not in asked
            if document not in place:
                unknown += 1
                continue
            first = grades.setdefault(query, {}).setdefault(place[document], grade)
            if first != grade:
                raise InputError(
                    f"{where}: document {document[:60]!r} has the grade {grade:g} for query {query[:60]!r}, and {first:g} in an "
                    "earlier row. Keep one."
                )
    if unknown:
        notes.append(f"{path.name}: {unknown} judgements of documents that are not there were skipped.")
    if unasked:
        notes.append(f"{path.name}: {unasked} judgements of queries that are not there were skipped.")
    return grades, named


def _sampled(
    query: str,
    judged: Mapping[int, float],
    first: Sequence[int],
    texts: Sequence[str],
    negatives: int,
    generator: random.Random,
) -> list[dict[str, Any]]:
    """Triples: each relevant document with some candidates of the first stage that are not graded as relevant."""
    others = [i for i in first if judged.get(i, 0.0) <= 0]
    rows = []
    for positive in (i for i, g in judged.items() if g > 0):
        for negative in generator.sample(others, min(negatives, len(others))):
            rows.append({"query": query, "documents": [texts[positive], texts[negative]], "labels": [1.0, 0.0]})
    return rows


def _judged_row(query: str, judged: Mapping[int, float], first: Sequence[int], texts: Sequence[str]) -> dict[str, Any]:
    best = sorted(judged.values(), reverse=True)
    return {
        "query": query,
        "documents": [texts[i] for i in first],
        "labels": [judged.get(i, 0.0) for i in first],
        "grades": dict(judged),
        "ideal": best[:IDEAL],
        "total": sum(g > 0 for g in best),
    }


def _files(path: Path, kind: str) -> list[Path]:
    """The tables of a kind, by their names; BEIR calls documents the corpus and MS MARCO the collection; BEIR has a folder of grades."""
    names = {"docs": ("docs", "corpus", "collection")}.get(kind, (kind,))
    found = [
        f
        for f in visible(path)
        if f.suffix in TABLES and any(f.stem.endswith(name) or name in words_of(f.stem) for name in names)
    ]
    inside = path / kind
    if not found and inside.is_dir():
        found = [f for f in visible(inside) if f.suffix in TABLES]
    if found or kind != "qrels":
        return found
    # Only where there is no table: beside one, a text is a note.
    found = [f for f in visible(path) if f.suffix in LINES and "qrels" in f.name]
    return found or ([f for f in visible(inside) if f.suffix in LINES] if inside.is_dir() else [])


def _tables(path: Path, kind: str) -> list[Path]:
    """The one file of a kind; for grades one per split, if their names indicate it."""
    files = _files(path, kind)
    splits = [split_of(f.stem) for f in files]
    several = kind == "qrels" and "train" in splits and None not in splits and len(set(splits)) == len(files)
    if len(files) != 1 and not several:
        endings = ", ".join((*TABLES, *LINES) if kind == "qrels" else TABLES)
        raise InputError(
            f"{path} has {len(files)} files that end in {kind} ({endings}); expected one of docs, queries and qrels "
            "each (of qrels also one for each split, train_qrels and so on)."
        )
    return files


def _rows(file: Path, kind: str) -> list[dict[str, Any]]:
    read: Mapping[str, Callable[[Path], Sequence[dict[str, Any]]]] = {
        ".parquet": read_rows,
        ".tsv": partial(_tab_separated, kind),
        **dict.fromkeys(LINES, _spaced),
    }
    names = BEIR | {"_id": COLUMNS[kind][0]}
    rows = []
    for number, row in enumerate(read.get(file.suffix, read_records)(file)):
        row |= {ours: row[theirs] for theirs, ours in names.items() if theirs in row and ours not in row}
        missing = [c for c in COLUMNS[kind] if c not in row]
        if missing:
            raise InputError(
                f"{file}, row {number}, has no column {missing[0]!r}; expected {', '.join(COLUMNS[kind])}."
            )
        if file.stem == "corpus" and row.get("title"):  # what is embedded in BEIR is both, with a space
            row["text"] = f"{row['title']} {row['text'] or ''}".strip()
        rows.append(row)
    if not rows:
        raise InputError(f"{file} is empty; expected {', '.join(COLUMNS[kind])}.")
    return rows


def _tab_separated(kind: str, file: Path) -> list[dict[str, Any]]:
    """The rows of a file whose cells have no quotes, with a header or, as MS MARCO's and TREC's, without."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            first = opened.readline().rstrip("\r\n").split("\t")
            opened.seek(0)
            if kind == "qrels" and len(first) == 1:
                return _spaced(file)
            bare = not {*COLUMNS[kind], *BEIR, "_id", "id"} & set(first)
            names = {2: COLUMNS[kind][:2], **WIDTHS}.get(len(first)) if bare else None
            rows = list(csv.DictReader(opened, names, delimiter="\t", quoting=csv.QUOTE_NONE, restval=""))
    except (UnicodeDecodeError, OSError, csv.Error) as error:
        raise InputError(f"{file} is not tab-separated UTF-8 text: {str(error).splitlines()[0]}") from error
    wrong = next((i for i, row in enumerate(rows) if None in row), None)
    if wrong is not None:
        raise InputError(f"{file}, row {wrong}, has more columns than the header. Texts with tabs belong into .jsonl.")
    return rows


def _spaced(file: Path) -> list[dict[str, Any]]:
    """The grades of a file as TREC has them, of three columns or four, with any space between."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{file} is not UTF-8 text: {str(error).splitlines()[0]}") from error
    rows = []
    for number, cells in enumerate(lines):
        if len(cells) not in WIDTHS:
            raise InputError(f"{file}, row {number}, has {len(cells)} columns; expected {', '.join(TREC)}.")
        rows.append(dict(zip(WIDTHS[len(cells)], cells, strict=True)))
    return rows


def _texts(file: Path, kind: str, key: str) -> dict[str, str]:
    """Id → text; "" for an empty text."""
    found: dict[str, str] = {}
    for number, row in enumerate(_rows(file, kind)):
        name, text = _id(f"{file}, row {number}", key, row[key]), "" if row["text"] is None else row["text"]
        if name in found or not isinstance(text, str):
            what = (
                f"{key} {name[:60]!r} is there twice"
                if name in found
                else f"{key} is {name[:60]} and text {text!r:.60}"
            )
            raise InputError(f"{file}, row {number}: {what}. Give each {key} once, with its text.")
        found[name] = text
    return found


def _id(where: str, key: str, value: Any) -> str:
    if absent(value):
        raise InputError(f"{where}: {key} is {value}. Give every row its {key}, or remove the row.")
    return str(value)


def _grade(where: str, value: Any) -> float:
    if isinstance(value, str):  # a cell of text
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise InputError(f"{where}: grade is {value!r:.60} and must be a number; relevant ones are above 0.")
    return float(value)


def bm25(queries: Sequence[str], documents: Sequence[str], k: int, *, k1: float = 0.9, b: float = 0.4) -> np.ndarray:
    """The k best documents of each query by BM25 (Robertson and Zaragoza 2009), best first, ties by index: `[queries, k]`."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(token_pattern=r"(?u)\w+")
    if not any(map(counter.build_tokenizer(), documents)):
        raise InputError("No document holds a word, so none can be found by BM25. Check the text column.")
    counts = counter.fit_transform(documents).tocsr().astype(np.float64)
    length = np.asarray(counts.sum(1)).ravel()
    df = np.asarray((counts > 0).sum(0)).ravel()
    idf = np.log1p((len(documents) - df + 0.5) / (df + 0.5))
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    norm = k1 * (1 - b + b * length / max(length.mean(), 1e-12))
    counts.data = counts.data * (k1 + 1) / (counts.data + norm[rows]) * idf[counts.indices]
    asked, found = counter.transform(queries).astype(np.float64), []
    for first in range(0, len(queries), _QUERIES_AT_ONCE):  # scores of all documents at once
        scores = (asked[first : first + _QUERIES_AT_ONCE] @ counts.T).toarray()
        found.append(np.argsort(-scores, axis=1, kind="stable")[:, :k])
    return np.concatenate(found)
