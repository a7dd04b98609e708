"""A small world of customer support whose truth is known: twelve types of request, each with one best action of eight.

A request is a paraphrase of its type (five of the type's words between common ones) and further common words. A student
does what it is used to, which is right for a third of the types, unless advice names an action; then it mostly follows. A
teacher knows the best action of nearly every request. A judge is content with the best action alone.
"""

from __future__ import annotations

import re

import numpy as np

ACTIONS = (
    "refund the full price",
    "ship a replacement",
    "escalate to a specialist",
    "apologise and explain",
    "offer a discount",
    "ask for a photograph",
    "reset the profile",
    "book a technician",
)
TOPICS = tuple(
    tuple(line.split())
    for line in (
        "parcel courier delivery shipment tracking doorstep depot postcode",
        "invoice billing charge payment bank statement fee tax",
        "password login account email verification locked username security",
        "battery charger cable plug voltage overheating socket power",
        "screen display pixel brightness flicker cracked touch glass",
        "subscription renewal membership plan monthly cancel trial upgrade",
        "jacket sleeve zipper size fabric colour seam button",
        "flight boarding luggage airport seat passport departure gate",
        "hotel room reservation breakfast checkout towel lobby reception",
        "router internet wireless signal broadband modem outage speed",
        "washing machine drum leak detergent spin hose rinse",
        "course lecture certificate exam tutor homework lesson grade",
    )
)
COMMON = (
    "today yesterday morning again still week problem help hello thanks please trouble wrong strange sadly honestly simply "
    "really quite friend family office home weekend summer winter reason answer question moment story truth matter point way"
).split()
PARAPHRASES, SEEN, HABITS = 30, 6, 4
"""Paraphrases of a type, those of them in training, and the types that a student is right about by itself."""


class SupportWorld:
    """Requests, best actions, and how student, teacher, judge and customer write.

    Args:
        seed: of everything in it.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        chance = np.random.default_rng([seed, 0])
        self.best = [int(a) for a in chance.integers(len(ACTIONS), size=len(TOPICS))]
        self.paraphrases = [
            [[*chance.choice(topic, 5, replace=False), *chance.choice(COMMON, 2)] for _ in range(PARAPHRASES)]
            for topic in TOPICS
        ]

    def habits(self, name: str) -> list[int]:
        """The action that the student called `name` takes for each type by itself: the best one for `HABITS` types."""
        chance = np.random.default_rng([self.seed, 1, *name.encode()])
        right = set(chance.permutation(len(TOPICS))[:HABITS].tolist())
        other = chance.integers(1, len(ACTIONS), size=len(TOPICS)).tolist()
        return [
            b if t in right else (b + o) % len(ACTIONS) for t, (b, o) in enumerate(zip(self.best, other, strict=True))
        ]

    def request(self, topic: int, paraphrase: int, chance: np.random.Generator) -> str:
        """What a customer writes, with two common words of its own."""
        return " ".join([*self.paraphrases[topic][paraphrase], *chance.choice(COMMON, 2)])

    def records(self, split: str, number: int) -> list[dict[str, str]]:
        """Requests of all types in turn, shuffled: `train` has the first paraphrases of each, other splits the rest."""
        chance = np.random.default_rng([self.seed, 2, *split.encode()])
        seen = range(SEEN) if split == "train" else range(SEEN, PARAPHRASES)
        made = []
        for i in range(number):
            topic = i % len(TOPICS)
            paraphrase = seen[i // len(TOPICS) % len(seen)]
            made.append({"prompt": self.request(topic, paraphrase, chance), "type": TOPICS[topic][0]})
        return [made[i] for i in chance.permutation(number)]

    def topic(self, text: str) -> int:
        """The type with the most words in a text."""
        words = re.findall(r"\w+", text.lower())
        return int(np.argmax([sum(w in topic for w in words) for topic in TOPICS]))

    def answer(self, student: str, request: str, advice: str, follows: float, chance: np.random.Generator) -> str:
        """A student's answer: the first action that the advice names, with probability `follows`; else its habit."""
        topic, named = self.topic(request), actions(advice)
        obeys = bool(named) and chance.random() < follows
        return said(named[0] if obeys else self.habits(student)[topic])

    def best_known(self, text: str, chance: np.random.Generator, error: float) -> int:
        """The action that the teacher holds for best: another one with probability `error`."""
        best = self.best[self.topic(text)]
        return (best + int(chance.integers(1, len(ACTIONS)))) % len(ACTIONS) if chance.random() < error else best

    def rated(self, text: str, chance: np.random.Generator) -> str:
        """The judge's score of the last action in a text: 8 for the best one of its type, else 4, with an error of at most 1."""
        place, last = max((text.rfind(action), i) for i, action in enumerate(ACTIONS))
        right = place >= 0 and last == self.best[self.topic(text)]
        return f"{(8 if right else 4) + chance.uniform(-1, 1):.2f}"


def actions(text: str) -> list[int]:
    """The actions that a text names, in order."""
    places = [(text.find(action), i) for i, action in enumerate(ACTIONS) if action in text]
    return [i for _, i in sorted(places)]


def said(action: int) -> str:
    """An answer that takes an action."""
    return f"I will {ACTIONS[action]}."
