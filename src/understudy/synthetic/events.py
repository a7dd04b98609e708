"""A small world of events whose truth is known: for trying what is generated, filtered and learned without a download.

A head is `PersonX VERB ADVERB`. The verb's latent type decides which tails are valid for a relation, the adverb says
nothing. A teacher likes the valid tails, and nearly as much those of the neighbouring relation, so it errs in a way
that a critic can learn to see. Words are English, facts are arbitrary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from understudy.data.knowledge import Relation, load_relations
from understudy.data.noise import normal, uniform

VERBS = (
    "bakes builds buys calls carries catches cleans climbs cooks dances digs draws drives eats fights fishes gardens "
    "hides hunts jumps laughs learns listens paints plays prays reads rides rows runs sails sells sews shouts sings "
    "skates sleeps studies swims travels"
).split()
ADVERBS = "again alone carefully outside quickly slowly today together".split()
TAILS = (
    "anchor apple apron arrow badge balloon banana basket battery beard bell belt berry bicycle blanket boat bonnet book "
    "boot bottle bowl box bracelet branch bread brick bridge brush bucket button cabin cable cage cake calendar camel "
    "camera candle canoe carpet carrot castle ceiling chain chair chalk cheese cherry chest chimney circle clock cloth "
    "cloud coat coffee collar comb compass cookie cork corner cotton cradle crayon crown cup curtain cushion desk diamond "
    "dish doll donkey door dragon drawer drum duck dust eagle elbow engine envelope farm feather fence fiddle finger flag "
    "flame flute forest fork fountain frog garlic gate ghost glass globe glove goat gold grape grass guitar hammer harp "
    "hat helmet honey hook horn horse hotel island ivory jacket jar jewel kettle key kitchen kite knife ladder lake lamp "
    "lantern leaf leather lemon lens letter lion lock magnet map marble mask meadow melon mirror money moon mountain "
    "mouse mug nail napkin necklace needle nest net notebook oar oil olive onion orange oven paddle palace paper parcel "
    "parrot path pear pebble pencil pepper piano picture pillow pin pipe plate plum pocket pond potato purse puzzle "
    "rabbit radio raft ribbon ring river road rocket roof rope rose rug saddle sail salt sandal"
).split()
RELATIONS = ("xAttr", "xReact", "xEffect", "xIntent", "xWant")
TYPES, VALID = 16, 10


class EventsWorld:
    """Heads, relations, tails, what is valid, and how a teacher would answer.

    Args:
        seed: of everything in it: types, valid sets, the teacher's preferences.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.heads = [f"PersonX {verb} {adverb}" for verb in VERBS for adverb in ADVERBS]
        order = torch.argsort(uniform(torch.arange(len(VERBS)), (), seed=seed, step=0))
        self.types = torch.empty(len(VERBS), dtype=torch.long)
        self.types[order] = torch.arange(len(VERBS)) % TYPES
        cells = torch.arange(TYPES * len(RELATIONS))
        ranks = uniform(cells, (len(TAILS),), seed=seed, step=1).argsort(1).argsort(1)
        self.valid_sets = (ranks < VALID).view(TYPES, len(RELATIONS), len(TAILS))
        self._wording = {name: relation for name, relation in load_relations().items() if name in RELATIONS}
        self._preferences: dict[tuple[int, int], Tensor] = {}

    def relations(self) -> dict[str, Relation]:
        """Wording as of ATOMIC's relations, with examples that are true here."""
        found = {}
        for r, name in enumerate(RELATIONS):
            verbs = range(r, len(VERBS), 6)
            examples = [
                (
                    self.heads[v * len(ADVERBS) + v % len(ADVERBS)],
                    TAILS[int(self.valid_sets[self.types[v], r].nonzero()[0, 0])],
                )
                for v in verbs
            ]
            found[name] = replace(self._wording[name], examples=tuple(examples))
        return found

    def valid(self, head: str, relation: str, tail: str) -> bool:
        """Whether a tail is true; what is not of this world is false."""
        words = head.split()
        if len(words) < 2 or words[1] not in VERBS or relation not in RELATIONS or tail not in TAILS:
            return False
        kind = self.types[VERBS.index(words[1])]
        return bool(self.valid_sets[kind, RELATIONS.index(relation), TAILS.index(tail)])

    def preferences(self, head: int, relation: int) -> Tensor:
        """The teacher's logits over all tails: N(0, 1), + 4.6 where valid, + 2.6 where valid for the next relation."""
        if (head, relation) in self._preferences:
            return self._preferences[head, relation]
        kind = self.types[head // len(ADVERBS)]
        noise = normal(torch.tensor([head * len(RELATIONS) + relation]), (len(TAILS),), seed=self.seed, step=2)[0]
        near = self.valid_sets[kind, (relation + 1) % len(RELATIONS)]
        self._preferences[head, relation] = noise + 4.6 * self.valid_sets[kind, relation] + 2.6 * near
        return self._preferences[head, relation]

    def write(self, question: str, draws: Sequence[float], temperature: float, top_p: float) -> tuple[str, float]:
        """What the teacher writes after a prompt's last line, and its log-probability.

        A line with an event and the words of a relation is answered with a tail, any other with an event. About one
        event in thirty is not about PersonX.

        Args:
            draws: two numbers in (0, 1), from which everything follows.
        """
        words = question.replace(".", " ").replace(":", " ").split()
        verb, adverb = (next((w for w in words if w in known), None) for known in (VERBS, ADVERBS))
        asked = self._asked(question)
        if verb is None or adverb is None or asked is None:
            who = "Somebody" if draws[1] < 1 / 30 else "PersonX"
            liking = normal(torch.arange(len(self.heads)), (), seed=self.seed, step=3) / 2
            index, log_prob = choose(liking, draws[0], temperature, top_p)
            return self.heads[index].replace("PersonX", who), log_prob
        head = VERBS.index(verb) * len(ADVERBS) + ADVERBS.index(adverb)
        index, log_prob = choose(self.preferences(head, asked), draws[0], temperature, top_p)
        return TAILS[index], log_prob

    def _asked(self, question: str) -> int | None:
        """The relation whose words are in the question: the longest that fit, without the person's name."""
        given = set(question.replace(":", "").split())
        asks = [set(self._wording[r].ask.replace("PersonX", "").replace(":", "").split()) for r in RELATIONS]
        fits = [(len(words), r) for r, words in enumerate(asks) if words <= given]
        return max(fits)[1] if fits else None


def choose(logits: Tensor, draw: float, temperature: float, top_p: float) -> tuple[int, float]:
    """One class by inversion from the nucleus, with its log-probability (temperature and nucleus included)."""
    if temperature == 0:
        return int(logits.argmax()), 0.0
    p = torch.softmax(logits.double() / temperature, 0)
    ordered, index = p.sort(descending=True, stable=True)
    inside = ordered.cumsum(0) - ordered < top_p  # at least the first
    ordered = ordered * inside / (ordered * inside).sum()
    position = int((ordered.cumsum(0) < draw).sum().clamp(max=int(inside.sum()) - 1))
    return int(index[position]), math.log(float(ordered[position]))
