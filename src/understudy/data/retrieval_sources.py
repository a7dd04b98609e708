"""Sources of queries with documents: embedded sets, files of scored triples, folders with relevance grades."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from understudy.data.folders import find, split_files
from understudy.data.judgements import is_judged, judged_folder, split_queries
from understudy.data.memory import MEMORY
from understudy.data.retrieval_batches import RankingSet
from understudy.data.scored_triples import COLUMNAR, Held, Triple, read_triples
from understudy.data.text import read_source
from understudy.errors import InputError, nearest

OPTIONS = {"name", "queries", "collection", "members", "candidates", "negatives", "seed", "limit", "foreign"}

Embedded = Callable[[Mapping[str, Any]], tuple[dict[str, list[dict[str, Any]]], Sequence[str], float]]


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
        """The distinct texts of the training split, for training a tokenizer."""
        found: dict[str, None] = {}
        for row in self.train.records:
            found.update(dict.fromkeys([row["query"], *row["documents"]]))
        return list(found)


def load_rankings(spec: Mapping[str, Any], embedded: Mapping[str, Embedded] = MappingProxyType({})) -> RankingSplits:
    """Read a ranking set.

    Args:
        spec: `name`: one of `embedded`, a file of triples (`.tsv`, `.parquet`, `.jsonl`, `.json`, `.csv`), a set of the Hub or in
            memory, or a folder with such files of
            each split, or a folder with files that end in `docs`, `queries` and `qrels`, or as BEIR lays them out. `queries`,
            `collection`: texts of the ids of triples. `members`: files that score the same triples by other teachers.
            `candidates`: of the first stage, for each query. `negatives`: for each relevant document of a folder. `seed`: of
            the world and of the choice of negatives. `limit`: most training rows. `foreign`: whether a made-up teacher has a
            scale of its own and an offset a query.
        embedded: sets that need no file, by name: from `spec` to the rows of each split, the collection, and the label
            above which a document is relevant.
    """
    for key in spec:
        if key not in OPTIONS:
            raise InputError(f"Unknown key data.{key}.{nearest(key, OPTIONS)} Known: {', '.join(sorted(OPTIONS))}.")
    for key in ("candidates", "negatives", "limit"):
        if spec.get(key) is not None and (type(spec[key]) is not int or spec[key] < 1):
            raise InputError(f"data.{key} is {spec[key]!r} and must be a whole number of at least 1.")
    if type(spec.get("seed", 0)) is not int or spec.get("seed", 0) < 0:
        raise InputError(f"data.seed is {spec['seed']!r} and must be a whole number of at least 0.")
    if not isinstance(spec.get("foreign", True), bool):
        raise InputError(f"data.foreign is {spec['foreign']!r} and must be true or false.")
    if not isinstance(spec.get("members") or [], list) or not all(
        isinstance(m, str) for m in spec.get("members") or []
    ):
        raise InputError(f"data.members is {spec['members']!r} and must be a list of files.")
    name = str(spec["name"])
    notes: list[str] = []
    path = None if name in embedded or name.startswith(MEMORY) else find(name)
    if name in embedded:
        found, collection, threshold = embedded[name](spec)
    elif path is None or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        held = read_source(name, spec, tuple(embedded), notes)  # in memory, of the Hub, or as `datasets` saves it
        shown = "data" if path is None and name.startswith(MEMORY) else name
        own = {split: [Held(shown, records)] for split, records in held.items()}
        found, collection, threshold = scored_triples(shown, own, spec, notes), [], 0.0
    elif is_judged(path):
        found, collection = judged_folder(path, spec, notes)
        threshold = 0.0
    else:
        ends = (".tsv", ".txt", *COLUMNAR)
        files = {"train": [path]} if path.is_file() else split_files(path, ends, notes)
        if not files:
            raise InputError(
                f"{path} holds neither triples ({', '.join(ends)}) nor files that end in docs, queries, qrels."
            )
        found, collection, threshold = scored_triples(path.name, files, spec, notes), [], 0.0
    found["train"] = found["train"][: spec.get("limit")]
    for split, rows_ in found.items():
        if not rows_:
            raise InputError(f"{name}: the {split} split is empty. Give more queries (at least ten).")
    digest = hashlib.sha256(json.dumps([found, list(collection)], sort_keys=True).encode()).hexdigest()
    sets = {
        split: RankingSet(rows_, collection if split != "train" else [], threshold) for split, rows_ in found.items()
    }
    recorded = all("members" in row for rows_ in found.values() for row in rows_)
    return RankingSplits(**sets, recorded=recorded, notes=notes, hash=digest)


def scored_triples(
    path: str, files: Mapping[str, Sequence[Path | Held]], spec: Mapping[str, Any], notes: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """Rows of triples, split by the names of files or by query; each of `members` adds the scores of another teacher.

    Args:
        path: what the data are called. files: of each split.
    """
    texts = {"queries": spec.get("queries"), "collection": spec.get("collection")}
    members = [str(member) for member in spec.get("members") or []]
    if members and len(files) > 1:
        raise InputError(f"data.members score the triples of one file, and {path} has {', '.join(sorted(files))}.")
    by_query: dict[str, list[list[Triple]]] = {}
    named: dict[str, str] = {}
    for split, shards in files.items():
        first = [t for file in shards for t in read_triples(file, **texts, notes=notes)]
        others = [read_triples(file, **texts, notes=notes) for file in members]
        for file, other in zip(members, others, strict=True):
            mine, theirs = ([(t.query, t.positive, t.negative) for t in side] for side in (first, other))
            if mine != theirs:
                raise InputError(
                    f"{file} scores {len(theirs)} triples that are not those of {path} ({len(mine)}), line by line."
                )
        if members and any(side[0].pos_score is None for side in (first, *others)):
            raise InputError(f"data.members are files of scores, and {path} or one of them has triples without scores.")
        for same in zip(first, *others, strict=True):
            if named.setdefault(same[0].query, split) != split:
                raise InputError(
                    f"{path}: the query {same[0].query[:60]!r} is in the {named[same[0].query]} and the {split} split. Keep it in one."
                )
            by_query.setdefault(same[0].query, []).append(list(same))
    if len({t[0].pos_score is None for group in by_query.values() for t in group}) > 1:
        raise InputError(f"{path} has files with scores and files without. Score every triple, or none.")
    said: list[str] = []
    parts, out, number = split_queries(list(by_query), list(named.values()), said), {}, 0
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
    notes += [f"{path}: {said[0]}"]
    return out


def _triple_row(query: str, same: Sequence[Triple]) -> dict[str, Any]:
    documents, members = [same[0].positive, same[0].negative], [[t.pos_score, t.neg_score] for t in same]
    row = {"query": query, "documents": documents, "labels": [1.0, 0.0]}
    return row if same[0].pos_score is None else row | {"members": members}


def _list_row(query: str, triples: Sequence[Sequence[Triple]]) -> dict[str, Any]:
    labels: dict[str, float] = {}
    scores: dict[str, list[float | None]] = {}
    for same in triples:
        for document, label in ((same[0].negative, 0.0), (same[0].positive, 1.0)):
            labels[document] = max(label, labels.get(document, 0.0))
            scores[document] = [t.pos_score if label else t.neg_score for t in same]
    members = [list(column) for column in zip(*scores.values(), strict=True)]
    row = {"query": query, "documents": list(labels), "labels": list(labels.values())}
    return row if triples[0][0].pos_score is None else row | {"members": members}
