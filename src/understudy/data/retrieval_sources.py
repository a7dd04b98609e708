"""Sources of queries with documents: a synthetic world, files of scored triples, folders with graded judgements."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from understudy.data.folders import find
from understudy.data.retrieval_batches import IDEAL, RankingSet
from understudy.data.retrieval_world import world
from understudy.data.scored_triples import Triple, read_parquet, read_triples
from understudy.errors import InputError, nearest

OPTIONS = {"name", "queries", "collection", "members", "candidates", "negatives", "seed", "limit", "foreign"}


@dataclass
class RankingSplits:
    """The rows of each split. Training rows are triples; the others hold every candidate of a query."""

    train: RankingSet
    validation: RankingSet
    test: RankingSet
    recorded: bool
    notes: list[str] = field(default_factory=list)
    hash: str = ""

    def texts(self) -> list[str]:
        """The texts of the training split, each once, for training a tokenizer."""
        found: dict[str, None] = {}
        for row in self.train.records:
            found.update(dict.fromkeys([row["query"], *row["documents"]]))
        return list(found)


def load_rankings(spec: Mapping[str, Any]) -> RankingSplits:
    """Read a ranking set.

    Args:
        spec: `name`: `world` (embedded), a file of scored triples (`.tsv`, `.parquet`), or a folder with files that end
            in `docs`, `queries` and `qrels`. `queries`, `collection`: texts of the ids of triples. `members`: files that
            score the same triples by other teachers. `candidates`: of the first stage, for each query. `negatives`: for
            each relevant document of a folder. `seed`: of the world and of the choice of negatives. `limit`: most
            training rows. `foreign`: whether the world's teacher has a scale of its own and an offset a query.
    """
    for key in spec:
        if key not in OPTIONS:
            raise InputError(f"Unknown key data.{key}.{nearest(key, OPTIONS)} Known: {', '.join(sorted(OPTIONS))}.")
    for key in ("candidates", "negatives", "limit"):
        if spec.get(key) is not None and (not isinstance(spec[key], int) or spec[key] < 1):
            raise InputError(f"data.{key} is {spec[key]!r} and must be a whole number of at least 1.")
    name = str(spec["name"])
    notes: list[str] = []
    path = find(name)
    if name == "world":
        values = {k: spec[k] for k in ("candidates", "seed", "foreign") if k in spec}
        rows, collection = world(**values)
        found, relevant = rows, 3.0
    elif path is None:
        raise InputError(
            f"Data {name!r} is neither built in (world), nor a path, nor in UNDERSTUDY_DATA.{nearest(name, ['world'])}"
        )
    elif path.is_dir():
        found, collection = judged_folder(path, spec, notes)
        relevant = 1.0
    else:
        found, collection, relevant = scored_triples(path, spec, notes), [], 1.0
    found["train"] = found["train"][: spec.get("limit")]
    for split, rows_ in found.items():
        if not rows_:
            raise InputError(f"{name}: the {split} split is empty. Give more queries (at least ten).")
    digest = hashlib.sha256(json.dumps([found, list(collection)], sort_keys=True).encode()).hexdigest()
    sets = {
        split: RankingSet(rows_, collection if split != "train" else [], relevant) for split, rows_ in found.items()
    }
    recorded = all("members" in row for rows_ in found.values() for row in rows_)
    return RankingSplits(**sets, recorded=recorded, notes=notes, hash=digest)


def _parts(queries: Sequence[Any]) -> dict[str, list[Any]]:
    """Whole queries to splits: of every ten the first is test, the sixth validation."""
    kind = {0: "test", 5: "validation"}
    out: dict[str, list[Any]] = {"train": [], "validation": [], "test": []}
    for i, query in enumerate(queries):
        out[kind.get(i % 10, "train")].append(query)
    return out


def scored_triples(path: Path, spec: Mapping[str, Any], notes: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows of a file of triples, split by query; each of `members` adds the scores of another teacher."""
    texts = {"queries": spec.get("queries"), "collection": spec.get("collection")}
    files = [path, *(spec.get("members") or [])]
    teachers = [read_triples(file, **texts, notes=notes) for file in files]
    for file, other in zip(files[1:], teachers[1:], strict=True):
        mine, theirs = ([(t.query, t.positive, t.negative) for t in side] for side in (teachers[0], other))
        if mine != theirs:
            raise InputError(
                f"{file} scores {len(theirs)} triples that are not those of {path} ({len(mine)}), line by line."
            )
    by_query: dict[str, list[list[Triple]]] = {}
    for same in zip(*teachers, strict=True):
        by_query.setdefault(same[0].query, []).append(list(same))
    parts, out, number = _parts(list(by_query)), {}, 0
    for split, queries in parts.items():
        rows = []
        for query in queries:
            made = (
                [_triple_row(query, t) for t in by_query[query]]
                if split == "train"
                else [_list_row(query, by_query[query])]
            )
            for row in made:
                rows.append({"id": number, **row})
                number += 1
        out[split] = rows
    notes.append(
        f"{path.name}: {len(by_query)} queries, split by query: "
        + ", ".join(f"{len(v)} {k}" for k, v in parts.items())
        + "."
    )
    return out


def _triple_row(query: str, same: Sequence[Triple]) -> dict[str, Any]:
    documents, members = [same[0].positive, same[0].negative], [[t.pos_score, t.neg_score] for t in same]
    return {"query": query, "documents": documents, "labels": [1.0, 0.0], "members": members}


def _list_row(query: str, triples: Sequence[Sequence[Triple]]) -> dict[str, Any]:
    labels: dict[str, float] = {}
    scores: dict[str, list[float]] = {}
    for same in triples:
        for document, label in ((same[0].negative, 0.0), (same[0].positive, 1.0)):
            labels[document] = max(label, labels.get(document, 0.0))
            scores[document] = [t.pos_score if label else t.neg_score for t in same]
    members = [list(column) for column in zip(*scores.values(), strict=True)]
    return {"query": query, "documents": list(labels), "labels": list(labels.values()), "members": members}


def judged_folder(
    path: Path, spec: Mapping[str, Any], notes: list[str]
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Rows of a folder with documents, queries and graded judgements; candidates come from BM25."""
    documents, queries, judgements = (_table(path, kind) for kind in ("docs", "queries", "qrels"))
    kept = [d for d in documents if str(d["text"] or "").strip()]
    if len(kept) < len(documents):
        notes.append(f"{path.name}: {len(documents) - len(kept)} documents without text were left out.")
    place = {str(d["doc_id"]): i for i, d in enumerate(kept)}
    grades: dict[str, dict[int, float]] = {}
    unknown = 0
    for j in judgements:
        if str(j["doc_id"]) in place:
            grades.setdefault(str(j["query_id"]), {})[place[str(j["doc_id"])]] = float(j["grade"])
        else:
            unknown += 1
    if unknown:
        notes.append(f"{path.name}: {unknown} judgements of documents that are not there were skipped.")
    asked = [q for q in queries if any(g > 0 for g in grades.get(str(q["query_id"]), {}).values())]
    if len(asked) < len(queries):
        notes.append(f"{path.name}: {len(queries) - len(asked)} queries without a relevant document were left out.")
    if not asked:
        raise InputError(
            f"{path}: no query has a relevant document. Check that qrels, queries and docs belong together."
        )
    texts = [str(d["text"]) for d in kept]
    ranks = bm25([str(q["text"]) for q in asked], texts, min(int(spec.get("candidates", 50)), len(texts)))
    lists = [(str(q["text"]), grades[str(q["query_id"])], list(map(int, r))) for q, r in zip(asked, ranks, strict=True)]
    parts, number, out = _parts(lists), 0, {}
    generator = random.Random(int(spec.get("seed", 0)))
    for split, chosen in parts.items():
        rows: list[dict[str, Any]] = []
        for query, graded, first in chosen:
            made = (
                _sampled(query, graded, first, texts, int(spec.get("negatives", 8)), generator)
                if split == "train"
                else [_graded_row(query, graded, first, texts)]
            )
            for row in made:
                rows.append({"id": number, **row})
                number += 1
        out[split] = rows
    notes.append(
        f"{path.name}: {len(asked)} queries, split by query: "
        + ", ".join(f"{len(v)} {k}" for k, v in parts.items())
        + "."
    )
    return out, texts


def _sampled(
    query: str,
    grades: Mapping[int, float],
    first: Sequence[int],
    texts: Sequence[str],
    negatives: int,
    generator: random.Random,
) -> list[dict[str, Any]]:
    """Triples: each relevant document with some candidates of the first stage that nobody judged relevant."""
    others = [i for i in first if grades.get(i, 0.0) <= 0]
    rows = []
    for positive in (i for i, g in grades.items() if g > 0):
        for negative in generator.sample(others, min(negatives, len(others))):
            rows.append({"query": query, "documents": [texts[positive], texts[negative]], "labels": [1.0, 0.0]})
    return rows


def _graded_row(query: str, grades: Mapping[int, float], first: Sequence[int], texts: Sequence[str]) -> dict[str, Any]:
    best = sorted(grades.values(), reverse=True)
    return {
        "query": query,
        "documents": [texts[i] for i in first],
        "labels": [grades.get(i, 0.0) for i in first],
        "grades": dict(grades),
        "ideal": best[:IDEAL],
        "total": sum(g >= 1 for g in best),
    }


def _table(path: Path, kind: str) -> list[dict[str, Any]]:
    files = [f for f in sorted(path.glob(f"*{kind}.parquet"))]
    if len(files) != 1:
        raise InputError(
            f"{path} has {len(files)} files that end in {kind}.parquet; expected one of docs, queries and qrels each."
        )
    rows = read_parquet(files[0])
    wanted = {"docs": ("doc_id", "text"), "queries": ("query_id", "text"), "qrels": ("query_id", "doc_id", "grade")}[
        kind
    ]
    missing = [c for c in wanted if not rows or c not in rows[0]]
    if missing:
        raise InputError(f"{files[0]} has no column {missing[0]!r}; expected {', '.join(wanted)}.")
    if kind == "queries":
        empty = [r["query_id"] for r in rows if not str(r["text"] or "").strip()]
        if empty:
            raise InputError(f"{files[0]}: query {empty[0]!r} is empty. Remove it, or mend its text.")
    return rows


def bm25(queries: Sequence[str], documents: Sequence[str], k: int, *, k1: float = 0.9, b: float = 0.4) -> np.ndarray:
    """The k best documents of each query by BM25 (Robertson and Zaragoza 2009), best first, ties by index: `[queries, k]`."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(token_pattern=r"(?u)\w+")
    counts = counter.fit_transform(documents).tocsr().astype(np.float64)
    length = np.asarray(counts.sum(1)).ravel()
    df = np.asarray((counts > 0).sum(0)).ravel()
    idf = np.log1p((len(documents) - df + 0.5) / (df + 0.5))
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    norm = k1 * (1 - b + b * length / max(length.mean(), 1e-12))
    counts.data = counts.data * (k1 + 1) / (counts.data + norm[rows]) * idf[counts.indices]
    scores = (counter.transform(queries).astype(np.float64) @ counts.T).toarray()
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]
