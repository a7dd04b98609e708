"""A library of strategies: advice per scenario, kept as text that people read and edit, and retrieved into a prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from torch import Tensor

from understudy.curation.filters import Funnel
from understudy.curation.groups import shuffled
from understudy.curation.items import Item
from understudy.data.records import place, read_records
from understudy.errors import InputError, nearest
from understudy.generation import Prompt

Message = Mapping[str, str]
Conversation = Sequence[Message]
Encode = Callable[[Sequence[str]], Tensor]
_CUSTOMER_DATA = re.compile(r"\S+@\S+\.\w|\d(?:[ -]?\d){6,}")


class Strategy(Item):
    """One entry of the library. `scenario` and `strategy` are required, so that people can add entries by hand.

    Args:
        scenario: the conversation that it was written for; it is found by its similarity to this text.
        strategy: what to do in such a situation.
        status: `banned` entries are never retrieved, `pending` ones not in an audited run.
        score: of the student's answer with it, 1 to 10. base_score: without it. teacher_score: of the teacher's answer.
        rounds: refinements until it was accepted. converged: whether the student then was as good as the teacher.
        type: of the scenario, where the data have such a column.
    """

    scenario: str = Field(min_length=1)
    strategy: str = Field(min_length=1)
    status: Literal["pending", "approved", "banned"] = "approved"
    score: float | None = None
    base_score: float | None = None
    teacher_score: float | None = None
    rounds: int | None = None
    converged: bool | None = None
    type: str | None = None


def similarities(queries: Tensor, library: Tensor) -> Tensor:
    """Cosine similarities `[queries, entries]`, float64, rounded to 12 decimals so that ties are exact.

    Args:
        queries: `[queries, width]`. library: `[entries, width]`. A zero vector has similarity 0 to all.
    """
    unit = [F.normalize(x.double(), dim=-1, eps=1e-300) for x in (queries, library)]
    return (unit[0] @ unit[1].T).round(decimals=12)


def nearest_entries(similarity: Tensor, k: int) -> Tensor:
    """Indices `[queries, min(k, entries)]` of the most similar entries, best first; ties go to the earlier entry."""
    return similarity.argsort(dim=-1, descending=True, stable=True)[:, :k]


def distinct(similarity: Tensor, threshold: float) -> list[bool]:
    """Whether each entry is kept: in order, if its similarity to every kept entry is below the threshold.

    Args:
        similarity: `[entries, entries]`. threshold: above 1 keeps all, −1 the first alone.
    """
    kept: list[int] = []
    for i, row in enumerate(similarity.tolist()):
        if all(row[j] < threshold for j in kept):
            kept.append(i)
    return [i in set(kept) for i in range(len(similarity))]


def rating(text: str) -> float | None:
    """The number between 1 and 10 in a judge's reply; `None` where there is not exactly one, or it is out of range."""
    found = re.fullmatch(r"\D*?(-?\d+(?:\.\d+)?)\s*(?:/\s*10\b)?\D*", text)
    value = float(found.group(1)) if found else 0.0
    return value if 1 <= value <= 10 else None


def transcript(conversation: Conversation) -> str:
    """A conversation as the text of a scenario: that of a single message, else lines of role and text."""
    said = [m for m in conversation if m["role"] != "system"]
    return said[0]["content"] if len(said) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in said)


def refusal(strategy: str, answer: str, denied: Sequence[str], longest: int) -> str | None:
    """Why a strategy may not enter the library, or `None`.

    Args:
        answer: the teacher's, which the strategy must not contain. denied: words or phrases, in any case.
        longest: most words.
    """
    if len(strategy.split()) > longest:
        return f"longer than {longest} words"
    if answer.strip() and answer.strip().lower() in strategy.lower():
        return "contains the answer"
    if _CUSTOMER_DATA.search(strategy):
        return "contains an address or a long number"
    word = next((w for w in denied if re.search(rf"(?<!\w){re.escape(w)}(?!\w)", strategy, re.IGNORECASE)), None)
    return None if word is None else f"contains {word!r}"


def read_library(path: str | Path) -> list[Strategy]:
    """The entries of a library file (.jsonl, .json, .csv or .parquet), as people may have edited it.

    Raises:
        InputError: no such file, an unknown key or a bad value, with the line.
    """
    file, entries = Path(path), []
    if not file.is_file():
        raise InputError(f"Strategy library {file} is not a file: give the library.jsonl of a run.")
    for i, record in enumerate(read_records(file)):
        try:
            entries.append(Strategy.model_validate({k: v for k, v in record.items() if v is not None}))
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            known = nearest(key, Strategy.model_fields) if key not in Strategy.model_fields else ""
            where = place(f"{file}, entry {i}", record)
            raise InputError(f"{where}: {key}: {first['msg']}.{known}") from None
    return entries


class StrategyLibrary:
    """Retrieves the strategies for a conversation and puts them into its system message.

    Args:
        entries: of the library, in order.
        encode: texts to vectors `[texts, width]`.
        prompt: template with the slot `strategies`, one on a line.
        k: most strategies. min_score: least cosine similarity. most_words: of all strategies together; those that do not fit
            are left out from the first of them on, in the order of their similarity.
        audited: retrieve approved entries alone; otherwise all that are not banned.
        choose: `similar` retrieves by similarity. Controls: `random` entries, or `global`, those of the largest gain.
        seed: of the random choice, which depends on it and the scenario alone.
    """

    def __init__(
        self,
        entries: Sequence[Strategy],
        encode: Encode,
        prompt: Prompt,
        *,
        k: int = 3,
        min_score: float = 0.25,
        most_words: int = 200,
        audited: bool = False,
        choose: Literal["similar", "random", "global"] = "similar",
        seed: int = 0,
    ) -> None:
        usable = ("approved",) if audited else ("approved", "pending")
        self.entries = [e for e in entries if e.status in usable]
        self.encode, self.prompt, self.k, self.min_score = encode, prompt, k, min_score
        self.most_words, self.choose, self.seed = most_words, choose, seed
        self._vectors = encode([e.scenario for e in self.entries]) if self.entries else None
        gain = lambda e: (e.score or 0.0) - (e.base_score or 0.0)  # noqa: E731
        self._by_gain = sorted(self.entries, key=lambda e: -gain(e))

    def similarity(self, scenarios: Sequence[str]) -> Tensor:
        """Of each scenario to the nearest entry, `[scenarios]`; −1 where the library has none."""
        if self._vectors is None or not scenarios:
            return torch.full((len(scenarios),), -1.0, dtype=torch.double)
        return similarities(self.encode(scenarios), self._vectors).amax(1)

    def retrieve(self, scenarios: Sequence[str]) -> list[list[Strategy]]:
        """The strategies for each scenario, best first; none where nothing qualifies."""
        if self._vectors is None or not self.k or not scenarios:
            return [[] for _ in scenarios]
        if self.choose == "global":
            return [self._cut(self._by_gain[: self.k]) for _ in scenarios]
        if self.choose == "random":
            by_place = {str(i): e for i, e in enumerate(self.entries)}
            draws = [shuffled(by_place, self.seed, scenario)[: self.k] for scenario in scenarios]
            return [self._cut([by_place[i] for i in draw]) for draw in draws]
        scores = similarities(self.encode(scenarios), self._vectors)
        chosen = nearest_entries(scores, self.k)
        usable = scores.gather(1, chosen) >= self.min_score
        pairs = zip(chosen.tolist(), usable.tolist(), strict=True)
        return [self._cut([self.entries[i] for i, good in zip(*pair, strict=True) if good]) for pair in pairs]

    def messages(self, conversation: Conversation | str) -> list[dict[str, str]]:
        """A conversation (or its first message) with the strategies for it in the system message; unchanged without any."""
        given = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
        return self.prompts([given])[0]

    def prompts(self, conversations: Sequence[Conversation]) -> list[list[dict[str, str]]]:
        """`messages` of several conversations."""
        found = self.retrieve([transcript(c) for c in conversations])
        return [self.advised(c, [e.strategy for e in some]) for c, some in zip(conversations, found, strict=True)]

    def advised(self, conversation: Conversation, strategies: Sequence[str]) -> list[dict[str, str]]:
        """A conversation with these strategies in the system message, which is added where it has none."""
        messages = [dict(m) for m in conversation]
        if not strategies:
            return messages
        text = self.prompt.render(strategies="\n".join(f"- {' '.join(s.split())}" for s in strategies))
        if messages and messages[0]["role"] == "system":
            return [{"role": "system", "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
        return [{"role": "system", "content": text}, *messages]

    def _cut(self, entries: Sequence[Strategy]) -> list[Strategy]:
        """The entries in order as far as all of them together fit into the prompt."""
        kept, words = [], 0
        for entry in entries:
            words += len(entry.strategy.split())
            if words > self.most_words:
                break
            kept.append(entry)
        return kept


def merged(
    library: Sequence[Strategy], new: Sequence[Strategy], encode: Encode, threshold: float, funnel: Funnel
) -> list[Strategy]:
    """The library with the new entries whose scenarios are not near-duplicates of earlier ones, banned ones included."""
    every = [*library, *new]
    if not every:
        return []
    vectors = encode([e.scenario for e in every])
    found = distinct(similarities(vectors, vectors), threshold)
    kept = [every[i] for i in range(len(every)) if i < len(library) or found[i]]
    dropped: Any = {"near-duplicate": len(every) - len(kept)} if len(kept) < len(every) else {}
    funnel.note("distinct scenarios", len(every), len(kept), dropped)
    return kept
