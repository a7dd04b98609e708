"""Triples (head event, relation, tail) from a text source: the prompts, and the filters of the completions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from understudy.curation.filters import Funnel, first_occurrences, most_likely, spelling
from understudy.curation.groups import shuffled
from understudy.data.knowledge import NAMES, PEOPLE, Relation, bracketed, marked_tokenizer
from understudy.data.text import write_records
from understudy.generation import Completion, Prompt, Request, draw_names, few_shot, name_people, restore_people

Triple = dict[str, Any]
Pair = tuple[str, str]


def key(triple: Mapping[str, Any]) -> tuple[str, str, str]:
    """Head, relation and tail."""
    return triple["head"], triple["relation"], triple["tail"]


def tidy(text: str) -> str:
    """A tail without surrounding space and final period; empty if nothing was generated."""
    return text.strip().removesuffix(".").rstrip()


def head_requests(
    item: Prompt, seeds: Sequence[str], samples: int, per_prompt: int, seed: int, **how: Any
) -> list[Request]:
    """Requests for new events. Each prompt lists ten seed events, drawn again for every `per_prompt` samples.

    Args:
        item: template of one event, with slots `number` and `event`.
        how: sampling, as fields of `Request`.
    """
    requests = []
    for group in range(ceil(samples / per_prompt)):
        chosen = np.random.default_rng([seed, group]).permutation(np.asarray(seeds, dtype=object))[:10]
        prompt = few_shot(item, [{"event": e} for e in chosen], {}, open_slot="event", separator="\n\n")
        draws = range(min(per_prompt, samples - group * per_prompt))
        requests += [Request(prompt, f"heads/{group}/{d}", d, stop=("\n\n",), **how) for d in draws]
    return requests


def sift_heads(answers: Sequence[Completion], keep: float, per_token: bool, shortest: int, funnel: Funnel) -> list[str]:
    """Events that ended by themselves and begin with PersonX: distinct, the most likely fraction `keep`, well spelled,
    best first."""
    items = [(a.text.strip(), a) for a in answers]
    items = funnel.sieve("events written", items, lambda x: None if x[1].finish == "stop" else "cut off")
    items = funnel.sieve("about PersonX", items, lambda x: None if x[0].startswith("PersonX") else "other start")
    keys = [text for text, _ in items]
    best = first = first_occurrences(keys)
    if keep < 1:
        tokens = [a.tokens for _, a in items] if per_token else None
        best = most_likely(keys, [a.log_prob for _, a in items], keep=keep, tokens=tokens)  # type: ignore[misc]
    funnel.pick("distinct events", items, first, "seen before")
    likely = funnel.pick("likely events", [keys[i] for i in first], [first.index(i) for i in best], "less likely")
    return funnel.sieve("well spelled", likely, lambda text: spelling(text, shortest=shortest))


def tail_requests(
    item: Prompt, head: str, relation: Relation, samples: int, seed: int, name: str, **how: Any
) -> tuple[list[Request], dict[str, str]]:
    """Requests for the tails of one question, and the names used in it for PersonX and PersonY.

    Each example has its own names; the question has the same names in every prompt (others if the event holds one of
    them).

    Args:
        item: template of one example, with slots `head`, `ask` and `tail`.
        name: prefix of the requests' ids.
    """

    def filled(names: Mapping[str, str], *texts: str) -> list[str]:
        return [name_people(text, names) for text in texts]

    examples = []
    for i, (h, t) in enumerate(relation.examples):
        names = draw_names(PEOPLE, NAMES, np.random.default_rng([seed, i]), avoid=f"{h} {t}")
        examples.append(dict(zip(("head", "ask", "tail"), filled(names, h, relation.ask, t), strict=True)))
    names = draw_names(PEOPLE, NAMES, np.random.default_rng(seed), avoid=f"{head} {relation.ask}")
    query = dict(zip(("head", "ask"), filled(names, head, relation.ask), strict=True))
    prompt = few_shot(item, examples, query, open_slot="tail")
    return [Request(prompt, f"{name}/{d}", d, stop=("\n",), **how) for d in range(samples)], names


def sift_tails(
    asked: Sequence[tuple[str, str, Mapping[str, str], str]], answers: Sequence[Completion], funnel: Funnel
) -> list[Triple]:
    """Distinct triples, with names mapped back as whole words; empty and very short tails are dropped.

    Args:
        asked: for each completion the head, relation, names and the request's id, which the triple keeps as `source`.

    `times` counts how often a triple was generated.
    """
    written = [
        {"head": head, "relation": relation, "tail": tidy(restore_people(a.text, names)), "source": source}
        for (head, relation, names, source), a in zip(asked, answers, strict=True)
    ]

    def problem(triple: Triple) -> str | None:
        return "empty" if not triple["tail"] else "two characters or fewer" if len(triple["tail"]) <= 2 else None

    written = funnel.sieve("tails written", written, problem)
    found = funnel.pick("distinct triples", written, first_occurrences(map(key, written)), "seen before")
    counts: dict[tuple[str, str, str], int] = {}
    for triple in written:
        counts[key(triple)] = counts.get(key(triple), 0) + 1
    return [{**triple, "times": counts[key(triple)]} for triple in found]


def draw(triples: Sequence[Triple], split: str, number: int, seed: int, what: str) -> list[Triple]:
    """Random triples of a split, by their content; different for each `what`."""
    mine = {json.dumps(key(t)): t for t in triples if t["split"] == split}
    return [mine[k] for k in shuffled(mine, seed, what)[:number]]


def text_pairs(
    sets: Mapping[str, Sequence[Triple]], relations: Mapping[str, Relation]
) -> dict[str, list[tuple[str, str]]]:
    """Triples as text pairs for a critic: the head, and the relation's words with the tail."""
    return {
        name: [(t["head"], f"{relations[t['relation']].text} {t['tail']}") for t in part] for name, part in sets.items()
    }


def naming(view: int) -> Callable[[int, Pair], Pair]:
    """A view of text pairs in which PersonX and PersonY become two different names, drawn by (view, position)."""

    def named(position: int, pair: Pair) -> Pair:
        names = draw_names(PEOPLE, NAMES, np.random.default_rng([view, position]), avoid=" ".join(pair))
        return name_people(pair[0], names), name_people(pair[1], names)

    return named


def write_corpus(folder: Path, triples: Sequence[Triple], splits: Sequence[str]) -> None:
    """Write `triples.jsonl`, with the source, score and outcome of each triple, and the kept ones as text in
    `corpus/SPLIT.jsonl`."""
    write_records(folder / "triples.jsonl", triples)
    for split in splits:
        rows = [t for t in triples if t["split"] == split and t["kept"]]
        texts = [{"prompt": bracketed(t["head"], t["relation"]), "completion": f" {t['tail']}"} for t in rows]
        write_records(folder / "corpus" / f"{split}.jsonl", texts)


def save_tokenizer(folder: Path, triples: Sequence[Triple], vocab_size: int) -> None:
    """Train and save a tokenizer for a new student on the kept training triples."""
    rows = [t for t in triples if t["split"] == "train" and t["kept"]]
    texts = (f"{bracketed(t['head'], t['relation'])} {t['tail']}" for t in rows)
    marked_tokenizer(texts, vocab_size).save_pretrained(str(folder))


def write_to_label(path: Path, triples: Sequence[Triple]) -> None:
    """Write triples for human labelling, in the format in which labels are read."""
    write_records(
        path, [{**dict(zip(("head", "relation", "tail"), key(t), strict=True)), "label": None} for t in triples]
    )
