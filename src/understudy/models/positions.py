"""How many tokens a model of transformers reads."""

from __future__ import annotations

from typing import Any


def positions(model: Any) -> int | None:
    """The most tokens that a model reads; `None` where it has no limit, or does not say one.

    A limit below 1 means none (XLNet says -1). Where positions are counted from the padding token's on, as in RoBERTa and
    its relatives, the rows of the table up to that token's are no positions of a text.
    """
    config = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    if limit is None or limit < 1:
        return None
    for name, module in model.named_modules():
        start = getattr(module, "padding_idx", None)
        if "position" in name.rsplit(".", 1)[-1] and start is not None:
            return int(limit) - int(start) - 1
    return int(limit)
