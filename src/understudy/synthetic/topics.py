"""A graph of documents whose topics, words and links are drawn from `data.seed`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def topics(spec: Mapping[str, Any], nodes: int = 1000, classes: int = 5, words: int = 300) -> dict[str, Any]:
    """A citation-like graph: documents of 5 topics, weak bags of words, and links that mostly stay in a topic.

    A contextual stochastic block model: each document has about 8 of 300 words, half of them its topic's own; each
    has about 4 links, four in five of them inside the topic. 20 labels a topic, 300 validation and 500 test nodes.
    """
    rng = np.random.default_rng(int(spec.get("seed", 0)))
    y = rng.permutation(np.arange(nodes) % classes)
    own = np.arange(words) % classes == y[:, None]
    x = (rng.random((nodes, words)) < np.where(own, 4.0, 1.0) / (words / classes)).astype(np.float32)
    same = y[:, None] == y
    size = nodes / classes
    chance = np.where(same, 4 * 0.8 / size, 4 * 0.2 / (nodes - size))
    edges = np.argwhere(np.triu(rng.random((nodes, nodes)) < chance, 1))
    order = rng.permutation(nodes)
    train = np.concatenate([order[y[order] == c][:20] for c in range(classes)])
    rest = order[~np.isin(order, train)]
    return {"x": x, "y": y, "edges": edges, "train_idx": train, "val_idx": rest[:300], "test_idx": rest[300:800]}
