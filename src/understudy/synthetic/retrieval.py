"""A synthetic world of retrieval whose true relevance is known, with a teacher that orders well on a foreign scale.

Words belong to topics and have hidden vectors; a document's relevance to a query is a token-interaction score,
Σ over query words of idf · max over document words of sim³, which no single-vector student represents exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

WORDS, TOPICS, DOCUMENTS, WIDTH = 400, 20, 3000, 16
SPLITS = {"train": 600, "validation": 100, "test": 300}
GRADES = (0.05, 0.15, 0.35, 0.6)
"""The best twentieth of a query's candidates has grade 4, the best 15 % at least 3, and so on."""
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def world(
    candidates: int = 100, seed: int = 0, foreign: bool = True
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Rows of each split and the collection.

    Each query of 3 words has noisy candidates out of 3,000 documents of 16 words. Evaluation rows hold them all with
    grades 0 to 4, by their place in the true order (`GRADES`). Training rows are triples: one relevant document,
    drawn from the true best five, with each other candidate, however relevant it is in truth.

    Args:
        candidates: of each query. seed: of the whole world.
        foreign: the teacher's score is 6 · relevance + noise − 8 + an offset of each query with standard deviation 4. If
            false, the same without offset and brought to mean 0 and standard deviation 1.
    """
    rng = np.random.default_rng(seed)
    names = _names(rng)
    topic = np.arange(WORDS) % TOPICS
    centres = rng.normal(size=(TOPICS, WIDTH))
    vectors = centres[topic] + 0.8 * rng.normal(size=(WORDS, WIDTH))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    documents = np.stack([_words(rng, topic, 16, 3) for _ in range(DOCUMENTS)])
    frequency = np.array([(documents == w).any(1).sum() for w in range(WORDS)])
    idf = np.log((DOCUMENTS + 1) / (frequency + 1))
    similar = np.clip(vectors @ vectors.T, 0, None) ** 3
    queries = np.stack([_words(rng, topic, 3, 1) for _ in range(sum(SPLITS.values()))])
    best = np.stack([row[documents].max(1) for row in similar])  # [words, documents]: each word's match in a document
    relevance = (idf[queries][:, :, None] * best[queries]).sum(1)
    noisy = relevance + rng.normal(size=relevance.shape) * relevance.std()
    chosen = np.argsort(-noisy, axis=1, kind="stable")[:, :candidates]
    true = np.take_along_axis(relevance, chosen, 1)
    taught = 6 * true + 0.5 * rng.normal(size=true.shape) - 8
    taught = taught + 4 * rng.normal(size=(len(queries), 1)) if foreign else (taught - taught.mean()) / taught.std()
    texts = [" ".join(names[w] for w in d) for d in documents]
    order = np.argsort(-true, axis=1, kind="stable")
    place = order.argsort(1) / candidates
    grades = (place[None] < np.array(GRADES)[:, None, None]).sum(0)
    labelled = order[np.arange(len(queries)), rng.integers(0, min(5, candidates), len(queries))]
    out: dict[str, list[dict[str, Any]]] = {}
    start = number = 0
    for split, size in SPLITS.items():
        rows: list[dict[str, Any]] = []
        for q in range(start, start + size):
            query = " ".join(names[w] for w in queries[q])
            for made in _rows(split, q, chosen[q], grades[q], taught[q], int(labelled[q]), texts):
                rows.append({"id": number, "query": query, **made})
                number += 1
        out[split], start = rows, start + size
    return out, texts


def _rows(
    split: str, q: int, chosen: Any, grades: Any, taught: Any, labelled: int, texts: list[str]
) -> list[dict[str, Any]]:
    scores = [float(t) for t in taught]
    if split == "train":
        return [
            {
                "documents": [texts[chosen[labelled]], texts[chosen[other]]],
                "labels": [1.0, 0.0],
                "members": [[scores[labelled], scores[other]]],
            }
            for other in range(len(chosen))
            if other != labelled
        ]
    judged = {int(d): float(g) for d, g in zip(chosen, grades, strict=True)}
    documents = [texts[d] for d in chosen]
    return [{"documents": documents, "labels": [float(g) for g in grades], "members": [scores], "grades": judged}]


def _names(rng: np.random.Generator) -> list[str]:
    """Distinct words of two syllables."""
    every = [a + b for a in SYLLABLES for b in SYLLABLES]
    return [every[i] for i in rng.choice(len(every), WORDS, replace=False)]


def _words(rng: np.random.Generator, topic: Any, size: int, topics: int) -> Any:
    """Words mostly of a few topics, a fifth of them of any."""
    chosen = rng.choice(TOPICS, topics, replace=False)
    inside = rng.choice(np.flatnonzero(np.isin(topic, chosen)), size)
    return np.where(rng.random(size) < 0.2, rng.integers(0, WORDS, size), inside)


def embedded(spec: Mapping[str, Any]) -> tuple[dict[str, list[dict[str, Any]]], list[str], float]:
    """For `load_rankings`: rows, collection, and the grade above which a document is relevant."""
    return *world(**{k: spec[k] for k in ("candidates", "seed", "foreign") if k in spec}), 2.0
