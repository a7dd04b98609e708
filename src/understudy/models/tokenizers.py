"""Tokenizers: loading, and comparing two by content."""

from __future__ import annotations

import hashlib
import json

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from understudy.data.folders import find
from understudy.errors import InputError


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, a set in `UNDERSTUDY_DATA` or the Hub."""
    path = find(name)
    try:
        return AutoTokenizer.from_pretrained(str(path or name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"No tokenizer can be loaded from {name!r}: {str(error).splitlines()[0]}") from error


def tokenizer_hashes(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Content hashes of the tokens with their ids, and of the chat template (empty where there is none)."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    template = tokenizer.chat_template
    return {
        "tokenizer": hashlib.sha256(tokens.encode()).hexdigest(),
        "template": hashlib.sha256(str(template).encode()).hexdigest() if template else "",
    }


def compare_tokenizers(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """What differs between two tokenizers, or `None`. Tokens are compared, not vocabulary sizes."""
    left, right = a.get_vocab(), b.get_vocab()
    if left != right:
        moved = [t for t, i in left.items() if right.get(t) != i]
        other = [t for t in right if t not in left]
        some = ", ".join(repr(t) for t in (moved or other)[:3])
        return f"{len(left)} against {len(right)} tokens, {len(moved) + len(other)} differ (for example {some})"
    probe = "Aé 日本 🙂\n\tdef f(x):  # 12345"
    if a(probe)["input_ids"] != b(probe)["input_ids"]:
        return "the same tokens, but text is split or marked differently (merges or special tokens differ)"
    return None
