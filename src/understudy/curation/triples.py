"""Triples (head event, relation, tail) from a text source: the prompts, and the filters of the completions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from understudy.curation.critics import binary_labels
from understudy.curation.filters import Funnel, first_occurrences, most_likely, spelling
from understudy.curation.groups import shuffled, split_by_group
from understudy.curation.items import Item
from understudy.data.knowledge import NAMES, PEOPLE, Relation, bracketed, marked_tokenizer
from understudy.data.text import write_records
from understudy.errors import InputError
from understudy.generation import Completion, Prompt, Request, draw_names, few_shot, name_people, restore_people

Pair = tuple[str, str]


class Event(Item):
    """A head, as it was written."""

    text: str


class Triple(Item):
    """A head event, a relation and a tail.

    Args:
        split: of its head. score: a critic's probability. kept: whether the filter lets it through.
        requests: of every answer that was this triple.
    """

    head: str
    relation: str
    tail: str
    split: str = ""
    score: float | None = None
    kept: bool | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Head, relation and tail."""
        return self.head, self.relation, self.tail


class LabelledTriple(Triple):
    """A triple that was judged, in the split that it has for the critic.

    Args:
        good: 1 or 0.
    """

    good: int


class Answer(Triple):
    """What a student says.

    Args:
        greedy: its likeliest tail, not a sample.
    """

    greedy: bool


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


def sift_heads(
    requests: Sequence[Request],
    answers: Sequence[Completion],
    keep: float,
    per_token: bool,
    shortest: int,
    funnel: Funnel,
) -> list[Event]:
    """Events that ended by themselves and begin with PersonX, once each, the likeliest share, well spelled; best first."""
    items = [(a.text.strip(), a, r.id) for r, a in zip(requests, answers, strict=True)]
    items = funnel.sieve("events written", items, lambda x: None if x[1].finish == "stop" else "cut off")
    items = funnel.sieve("about PersonX", items, lambda x: None if x[0].startswith("PersonX") else "other start")
    keys = [text for text, *_ in items]
    best = first = first_occurrences(keys)
    if keep < 1:
        tokens = [a.tokens for _, a, _ in items] if per_token else None
        best = most_likely(keys, [a.log_prob for _, a, _ in items], keep=keep, tokens=tokens)  # type: ignore[misc]
    events = [Event(text=keys[i], requests=(items[i][2],)) for i in first]
    funnel.pick("distinct events", items, first, "seen before")
    likely = funnel.pick("likely events", events, [first.index(i) for i in best], "less likely")
    return funnel.sieve("well spelled", likely, lambda event: spelling(event.text, shortest=shortest))


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
    asked: Sequence[tuple[Event, str, Mapping[str, str], str]], answers: Sequence[Completion], funnel: Funnel
) -> list[Triple]:
    """Distinct triples, with names mapped back as whole words; empty and very short tails are dropped.

    Args:
        asked: of each answer head, relation, names and the request's id.
    """
    written = [
        Triple(
            head=event.text,
            relation=relation,
            tail=tidy(restore_people(a.text, names)),
            parents=(event.id,),
            requests=(name,),
        )
        for (event, relation, names, name), a in zip(asked, answers, strict=True)
    ]

    def problem(triple: Triple) -> str | None:
        return "empty" if not triple.tail else "two characters or fewer" if len(triple.tail) <= 2 else None

    written = funnel.sieve("tails written", written, problem)
    found = funnel.pick("distinct triples", written, first_occurrences(t.key for t in written), "seen before")
    requests: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for triple in written:
        requests[triple.key] = requests.get(triple.key, ()) + triple.requests
    return [triple.model_copy(update={"requests": requests[triple.key]}) for triple in found]


def draw(triples: Sequence[Triple], split: str, number: int, seed: int, what: str) -> list[Triple]:
    """Random triples of a split, by their content; other draws for another `what`."""
    mine = {json.dumps(t.key): t for t in triples if t.split == split}
    return [mine[k] for k in shuffled(mine, seed, what)[:number]]


def from_files(labels: Sequence[Mapping[str, Any]], triples: Sequence[Triple]) -> list[LabelledTriple]:
    """Labels that people gave, once each, without the heads that a student is judged on."""
    held = {t.head for t in triples if t.split != "train"}
    pool = [row for row in labels if row["head"] not in held]
    pool = [pool[i] for i in first_occurrences((t["head"], t["relation"], t["tail"]) for t in pool)]
    good = binary_labels([row["label"] for row in pool])
    return [
        LabelledTriple(head=t["head"], relation=t["relation"], tail=t["tail"], good=g)
        for t, g in zip(pool, good, strict=True)
    ]


def from_truth(triples: Sequence[Triple], is_valid: Callable[[str, str, str], bool]) -> list[LabelledTriple]:
    """Labels that a known truth gives."""
    return [
        LabelledTriple(head=t.head, relation=t.relation, tail=t.tail, good=int(is_valid(*t.key)), parents=(t.id,))
        for t in triples
    ]


def label_splits(pool: Sequence[LabelledTriple], sizes: Mapping[str, int], seed: int) -> list[LabelledTriple]:
    """Labels by split, in proportion to `sizes`, none of whose heads is in two splits."""
    total = sum(sizes.values())
    chosen = split_by_group([t.head for t in pool], {name: size / total for name, size in sizes.items()}, seed)
    return [pool[i].model_copy(update={"split": name}) for name, part in chosen.items() for i in part]


def sift_triples(
    triples: Sequence[Triple], stays: Callable[[Triple], bool], splits: Sequence[str], reason: str, funnel: Funnel
) -> list[Triple]:
    """All triples, with their fate.

    Raises:
        InputError: a split of which nothing is left.
    """
    for split in splits:
        mine = [t for t in triples if t.split == split]
        if not funnel.sieve(f"kept for {split}", mine, lambda t: None if stays(t) else reason):
            raise InputError(
                f"The filter keeps none of {len(mine)} triples of the {split} split: raise options.recall, or write more "
                "(options.head_samples)."
            )
    return [t.model_copy(update={"kept": stays(t)}) for t in triples]


def same_number(triples: Sequence[Triple], kept: Sequence[Triple], splits: Sequence[str], seed: int) -> set[str]:
    """Ids of random triples, of each split as many as are in `kept`."""
    numbers = {split: sum(t.split == split for t in kept) for split in splits}
    return {t.id for split, n in numbers.items() for t in draw(triples, split, n, seed, "random")}


def text_pairs(triples: Iterable[Triple], relations: Mapping[str, Relation]) -> list[Pair]:
    """Triples for a critic: the head, and the relation's words with the tail."""
    return [(t.head, f"{relations[t.relation].text} {t.tail}") for t in triples]


def naming(view: int) -> Callable[[int, Pair], Pair]:
    """A view of text pairs in which PersonX and PersonY become two different names, drawn by (view, position)."""

    def named(position: int, pair: Pair) -> Pair:
        names = draw_names(PEOPLE, NAMES, np.random.default_rng([view, position]), avoid=" ".join(pair))
        return name_people(pair[0], names), name_people(pair[1], names)

    return named


def student_requests(
    heads: Iterable[str], relations: Iterable[str], samples: int, max_tokens: int, top_p: float
) -> list[tuple[Request, Answer]]:
    """For each head and relation one greedy tail and several samples; each request with the answer that it fills."""
    found = []
    for i, head in enumerate(heads):
        for relation in relations:
            for number in range(1 + samples):
                how: dict[str, Any] = {"temperature": 0.0} if number == 0 else {"top_p": top_p}
                name, prompt = f"student/{i}/{relation}/{number}", bracketed(head, relation)
                request = Request(prompt, name, number, max_tokens=max_tokens, stop=(".", "\n"), **how)
                answer = Answer(head=head, relation=relation, tail="", greedy=number == 0, requests=(name,))
                found.append((request, answer))
    return found


def write_corpus(folder: Path, triples: Sequence[Triple], splits: Sequence[str]) -> None:
    """The kept triples as a student's text, in `corpus/SPLIT.jsonl`."""
    for split in splits:
        rows = [t for t in triples if t.split == split and t.kept]
        texts = [{"prompt": bracketed(t.head, t.relation), "completion": f" {t.tail}"} for t in rows]
        write_records(folder / f"{split}.jsonl", texts)


def save_tokenizer(folder: Path, triples: Sequence[Triple], vocab_size: int) -> None:
    """A tokenizer for a new student of the kept training triples."""
    rows = [t for t in triples if t.split == "train" and t.kept]
    texts = (f"{bracketed(t.head, t.relation)} {t.tail}" for t in rows)
    marked_tokenizer(texts, vocab_size).save_pretrained(str(folder))


def write_to_label(path: Path, triples: Sequence[Triple]) -> None:
    """Triples for people to label, in the format that labels are read in."""
    write_records(path, [{"head": t.head, "relation": t.relation, "tail": t.tail, "label": None} for t in triples])
