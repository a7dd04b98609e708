"""A small world of generic statements whose truth is known: for trying what is generated, filtered and learned.

A concept is `ADJECTIVE NOUN`. The noun's latent type decides which properties are true for a relation, the adjective says
nothing; a property belongs to one type. Half of the world's text is narrative with function words and connectives; of
its plain statements half are true, and the others say what is true of the next type. Words are English, facts are
arbitrary.
"""

from __future__ import annotations

import numpy as np

from understudy.synthetic.events import TAILS

ADJECTIVES = ("young", "old", "wild")
NOUNS = (
    "wolves owls farmers sailors robots dragons bakers spiders giants monks pilots foxes miners whales painters bears witches "
    "tigers doctors ravens"
).split()
RELATIONS = ("need", "like", "fear", "carry", "guard", "sell")
TYPES, OWN, VALID = 8, 20, 12
PROPERTIES = TAILS[: TYPES * OWN]
LINKS = ("because", "and", "when")


class GenericsWorld:
    """Concepts, relations, properties, what is true, and text about it.

    Args:
        seed: of everything in it.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.concepts = [f"{adjective} {noun}" for noun in NOUNS for adjective in ADJECTIVES]
        draw = np.random.default_rng(seed)
        self.types = dict(zip(NOUNS, (draw.permutation(len(NOUNS)) % TYPES).tolist(), strict=True))
        own = draw.permutation(len(PROPERTIES)).reshape(TYPES, OWN)
        self.facts = {
            (kind, relation): [PROPERTIES[i] for i in draw.permutation(own[kind])[:VALID]]
            for kind in range(TYPES)
            for relation in RELATIONS
        }

    def valid(self, concept: str, relation: str, completion: str) -> bool:
        """Whether a statement is true; what is not of this world is false."""
        noun = concept.split()[-1] if concept in self.concepts else ""
        return noun in self.types and completion in self.facts.get((self.types[noun], relation), ())

    def text(self, number: int) -> list[str]:
        """Sentences: half narrative, a quarter true statements, a quarter false ones."""
        draw = np.random.default_rng([self.seed, 1])
        found = []
        for _ in range(number):
            concept = self.concepts[draw.integers(len(self.concepts))]
            relation = RELATIONS[draw.integers(len(RELATIONS))]
            kind, share = self.types[concept.split()[-1]], draw.random()
            source = self.facts[(kind + (share >= 0.25)) % TYPES, relation]
            start = f"{concept} {relation}"
            if share < 0.5:
                found.append(f"{start} {source[draw.integers(VALID)]}.")
            else:
                noun, link = NOUNS[draw.integers(len(NOUNS))], LINKS[draw.integers(len(LINKS))]
                thing = PROPERTIES[draw.integers(len(PROPERTIES))]
                found.append(f"{start} the {thing} {link} the {noun} {RELATIONS[draw.integers(len(RELATIONS))]} it.")
        return found
