"""The tokens that a tokenizer adds at the beginning and end of a text."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


class Ends(NamedTuple):
    """The tokens that a tokenizer adds before and after a text.

    Args:
        begin: by its own rule (`add_bos_token`, its post-processor).
        end: likewise, and EOS if it has one.
    """

    begin: list[int]
    end: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Ends:
        """The ends of a tokenizer, found with a short text."""
        bare, whole = token_ids(tokenizer, "a"), tokenizer("a", verbose=False)["input_ids"]
        size = len(bare)
        at = next((i for i in range(len(whole) - size + 1) if whole[i : i + size] == bare), None)
        begin, end = ([], []) if at is None else (list(whole[:at]), list(whole[at + size :]))
        eos = tokenizer.eos_token_id
        return cls(begin, end if eos is None or eos in end else [*end, eos])

    def before(self, ids: list[int]) -> list[int]:
        """`ids` with the beginning, unless they already start with it."""
        return ids if ids[: len(self.begin)] == self.begin else self.begin + ids

    def behind(self, ids: list[int]) -> list[int]:
        """`ids` with the end, unless they already end with it."""
        return ids if not self.end or ids[-len(self.end) :] == self.end else ids + self.end
