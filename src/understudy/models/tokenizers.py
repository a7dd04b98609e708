"""Tokenizers: loading, and comparing two by content."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from understudy.data.folders import find, hub_id
from understudy.errors import InputError
from understudy.models.weights import read_object, reason

FILES = ("tokenizer.json", "vocab*", "*.model", "spiece*", "*.tiktoken", "tekken.json", "tokenizer_config.json", "*.py")
"""Files of which the folder of a tokenizer holds at least one."""
SENTENCES = "sentence_*_config.json"
"""Files in which `sentence-transformers` says how a folder reads its texts."""


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, a set in `UNDERSTUDY_DATA` or the Hub."""
    path = find(name)
    if path is not None and not any(file for pattern in FILES for file in path.glob(pattern)):
        raise InputError(
            f"No tokenizer can be loaded from {name!r}: the folder has no tokenizer.json or other vocabulary. Save the "
            "model's tokenizer into it (tokenizer.save_pretrained), or name another."
        )
    try:
        found = AutoTokenizer.from_pretrained(str(path or hub_id(name)), trust_remote_code=trust_remote_code)
        found("a")  # settings of a wrong type fail at the first text
    except Exception as error:  # readers of vocabularies raise their own types
        raise InputError(f"No tokenizer can be loaded from {name!r}: {reason(error)}") from error
    if not len(found):
        raise InputError(f"The tokenizer of {name!r} has no token: its files are incomplete.")
    if path is not None and any(read_object(file).get("do_lower_case") for file in path.glob(SENTENCES)):
        _lower(found, name)
    return found


def _lower(tokenizer: Any, name: str) -> None:
    """Lower-case texts in the tokenizer itself, so that it does so wherever it is saved."""
    if not tokenizer.is_fast:
        raise InputError(
            f"{name!r} lower-cases its texts (do_lower_case), which needs a fast tokenizer: save one beside it."
        )
    core = tokenizer.backend_tokenizer
    own = [core.normalizer] if core.normalizer is not None else []
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])


def tokenizer_hashes(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Content hashes of the tokens with their ids and of the chat template (empty without one), and the ids that begin
    and end a text."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    template = tokenizer.chat_template
    return {
        "tokenizer": hashlib.sha256(tokens.encode()).hexdigest(),
        "template": hashlib.sha256(str(template).encode()).hexdigest() if template else "",
        "ends": f"{tokenizer.bos_token_id} {tokenizer.eos_token_id}",
    }


def compare_tokenizers(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """The difference between two tokenizers, or `None`. Tokens are compared, not vocabulary sizes."""
    left, right = a.get_vocab(), b.get_vocab()
    if left != right:
        moved = [t for t, i in sorted(left.items(), key=lambda item: item[1]) if right.get(t) != i]
        other = [t for t in sorted(right) if t not in left]
        some = ", ".join(repr(t) for t in (moved or other)[:3])
        return f"{len(left)} against {len(right)} tokens, {len(moved) + len(other)} differ (for example {some})"
    probe = "Aé 日本 🙂\n\tdef f(x):  # 12345"
    if a(probe)["input_ids"] != b(probe)["input_ids"]:
        return "the same tokens, but text is split or marked differently (merges or special tokens differ)"
    return None


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[bytes | None], bool]:
    """The bytes of each token of a fast tokenizer, by id, and whether their concatenation gives the text.

    Byte-level tokens stand for their bytes, `▁` for a space, `<0xE6>` for one byte. WordPiece (`##`) keeps no spaces: a
    space is assumed before each word. Special tokens have no text: `None`.
    """
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    core = json.loads(backend.to_str())
    kinds = _kinds(core["decoder"]) | _kinds(core["pre_tokenizer"])
    prefix = core["model"].get("continuing_subword_prefix") if core["model"]["type"] == "WordPiece" else None
    special = set(tokenizer.all_special_ids) | {a["id"] for a in core["added_tokens"] if a["special"]}
    literal = {a["id"] for a in core["added_tokens"]}
    levels = _byte_characters() if "ByteLevel" in kinds else None
    found: list[bytes | None] = [None] * len(tokenizer)
    for token, i in tokenizer.get_vocab().items():
        if i in special or i >= len(found):
            continue
        if i in literal:
            found[i] = token.encode()
        elif levels is not None:
            found[i] = bytes(levels[c] for c in token) if all(c in levels for c in token) else token.encode()
        elif prefix is not None:
            word = not token.startswith(prefix)
            spaced = word and any(c.isalnum() for c in token)
            found[i] = (f" {token}" if spaced else token if word else token[len(prefix) :]).encode()
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token) and core["model"].get("byte_fallback"):
            found[i] = bytes([int(token[3:5], 16)])
        else:
            found[i] = token.replace("▁", " ").encode()
    lossless = levels is not None or (prefix is None and bool(kinds & {"Metaspace", "Replace", "ByteFallback"}))
    return found, lossless


def _kinds(part: Any) -> set[str]:
    """The types of a component of a tokenizer and of its parts."""
    if not isinstance(part, dict):
        return set()
    inner = (p for key in ("decoders", "pretokenizers") for p in part.get(key, ()))
    return {part["type"]}.union(*(_kinds(p) for p in inner))


def _byte_characters() -> dict[str, int]:
    """The character that byte-level tokenizers use for each byte: itself if printable, else one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in seen]
    return {chr(b): b for b in seen} | {chr(256 + n): b for n, b in enumerate(hidden)}
