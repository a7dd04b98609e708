"""Constrained beam search: golden vectors of the official decoder, brute force, limits, and constraints no text satisfies."""

import itertools
import time

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from golden_vectors import close, golden
from understudy import InputError
from understudy.generation.constrained import BeamSettings, CausalLMScorer, constrained_search, select
from understudy.generation.constraints import AtMost, Constraints, Literal, Tracker


class Bigram:
    """A next-token scorer that knows the last token alone."""

    def __init__(self, log_probs):
        self.log_probs = log_probs

    def start(self, prompts):
        return self.log_probs[[p[-1] for p in prompts]]

    def step(self, rows, tokens):
        return self.log_probs[tokens]


def read(g):
    """The golden file's clauses; a literal of polarity −1 is absent."""
    clauses = []
    for phrases, polarity in zip(g["clauses"].tolist(), g["polarity"].tolist(), strict=True):
        clause = [
            Literal(tuple(t for t in p if t >= 0), bool(q)) for p, q in zip(phrases, polarity, strict=True) if q >= 0
        ]
        clauses.append(tuple(clause))
    return Constraints(tuple(c for c in clauses if c))


def after(tracker, sequences):
    state = tracker.start().at(torch.zeros(1, len(sequences), dtype=torch.long))
    yield state
    for column in sequences.T:
        yield (state := tracker.advance(state, column[None]))


@pytest.mark.golden
def test_the_tracker_agrees_with_the_official_states():
    g = golden("15-i2d2")
    tracker, vocabulary = Tracker([read(g)], int(g["V"])), int(g["V"])
    lengths = [{len(x.phrase) for x in clause if x.positive} for clause in read(g).clauses]
    for t, state in enumerate(after(tracker, g["seqs"])):
        positive = [c for c, clause in enumerate(read(g).clauses) if any(x.positive for x in clause)]
        met = tracker.met(state)[0]
        assert met.long()[:, positive].equal(g["met_mask"][:, t, positive]) and not met[:, tracker.hard[0]].any()
        assert met.sum(-1).equal(g["num_met"][:, t]) and tracker.complete(state)[0].long().equal(g["finished"][:, t])
        close(tracker.progress(state)[0], g["paper_progress"][:, t], rtol=0, atol=1e-9)
        if max(map(len, lengths)) == 1:  # the official value is another where a clause has phrases of several lengths
            close(tracker.progress(state)[0], g["official_progress"][:, t], rtol=0, atol=1e-9)
        scores = torch.zeros(1, len(g["seqs"]), vocabulary)
        tracker.ban(scores, state)
        assert scores[0].isinf().long().equal(g["banned_next"][:, t])


@pytest.mark.golden
def test_one_step_selects_as_the_official_code():
    g = golden("15-i2d2")
    beam = int(g["step_beam"])
    settings = BeamSettings(
        num_beams=beam,
        prune=int(g["step_prune_factor"]),
        tolerance=int(g["step_sat_tolerance"]),
        progress=float(g["step_beta"]),
        log_progress=True,
        early_stop=float(g["step_early_stop"]),
    )
    tracker = Tracker([read(g)], int(g["V"]))
    *_, state = after(tracker, g["step_prefixes"])
    ends, length = g["eos"].view(1), int(g["step_timestep"]) + 1
    found = select(g["step_scores"][None], state, tracker, ends, length, settings, beam)
    assert found.rows[0].equal(g["step_out_row"]) and found.tokens[0].equal(g["step_out_col"])
    close(found.scores[0], g["step_out_score"], rtol=0, atol=1e-9)
    assert tracker.met(found.state)[0].sum(-1).equal(g["step_out_num_met"])


@pytest.mark.golden
def test_a_wide_beam_finds_the_optimum_of_brute_force():
    g = golden("15-i2d2")
    constraints, body, end = read(g), int(g["max_body"]), int(g["eos"])
    hard = Constraints(tuple(c for c in constraints.clauses if not any(x.positive for x in c)))
    for i, penalty in enumerate(g["length_penalties"].tolist()):
        for name, asked in (("exact_constrained", constraints), ("exact_unconstrained", hard)):
            settings = BeamSettings(
                num_beams=(int(g["V"]) - 1) ** body,
                max_new_tokens=body + 1,
                min_new_tokens=1,
                length_penalty=penalty,
                no_repeat_ngram_size=0,
                tolerance=len(constraints.clauses),
            )
            best = constrained_search(Bigram(g["bigram_logprobs"]), [[0]], [asked], ends=[end], settings=settings)[0][0]
            expected = g[name][i].tolist()
            assert best.tokens == expected[: expected.index(end) + 1] and best.ended and not best.unmet
            close(torch.tensor(best.score, dtype=torch.float64), g[f"{name}_score"][i], rtol=0, atol=1e-9)
            if name == "exact_constrained":
                close(
                    torch.tensor(best.log_prob, dtype=torch.float64), g["exact_constrained_logp"][i], rtol=0, atol=1e-9
                )
        assert g["exact_constrained_score"][i] <= g["exact_unconstrained_score"][i]  # limit 6


def words(*phrases):
    return tuple(Literal(p) for p in phrases)


def table(seed, size=6):
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)


def brute(log_probs, accepts, longest, penalty, start=0, end=0):
    """The best score over all bodies of 1 … `longest` − 1 tokens that `accepts` allows."""
    best = None
    for n in range(1, longest):
        for body in itertools.product(range(1, len(log_probs)), repeat=n):
            if accepts(body):
                path = (start, *body, end)
                score = sum(float(log_probs[a, b]) for a, b in itertools.pairwise(path)) / (n + 1) ** penalty
                best = max(best or (score, body), (score, body))
    return best


def inside(body, phrase):
    return any(body[i : i + len(phrase)] == phrase for i in range(len(body) - len(phrase) + 1))


CASES = {
    "overlap": (Constraints((words((1, 1, 2)),)), lambda b: inside(b, (1, 1, 2))),
    "prefix": (Constraints((words((1, 2)), words((1, 2, 3)))), lambda b: inside(b, (1, 2, 3))),
    "shared": (
        Constraints((words((1,), (2, 3)), words((2, 3)))),
        lambda b: inside(b, (2, 3)),
    ),
    "mixed": (
        Constraints(((Literal((1,)), Literal((2,), False)), words((2,)))),
        lambda b: 2 in b and 1 in b,
    ),
    "one of two is absent": (
        Constraints(((Literal((1,), False), Literal((2,), False)), words((1,)))),
        lambda b: 1 in b and 2 not in b,
    ),
    "count": (
        Constraints((words((4, 5)),), (AtMost(((1,), (2, 3)), 1), AtMost(((5, 5),)))),
        lambda b: inside(b, (4, 5)) and sum(b[i] == 1 or b[i : i + 2] == (2, 3) for i in range(len(b))) <= 1
        and not inside(b, (5, 5)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_every_kind_of_constraint_agrees_with_brute_force(name, penalty):
    constraints, accepts = CASES[name]
    settings = BeamSettings(5**4, 5, 1, penalty, no_repeat_ngram_size=0, tolerance=9)
    for seed in range(3):
        score, body = brute(table(seed), accepts, 5, penalty)
        found = constrained_search(Bigram(table(seed)), [[0]], [constraints], ends=[0], settings=settings)[0][0]
        assert found.tokens == [*body, 0] and found.score == pytest.approx(score, abs=1e-12)


def test_prompts_of_a_batch_do_not_change_each_other():
    settings = BeamSettings(4, 6, 1, no_repeat_ngram_size=0)
    asked = [constraints for constraints, _ in CASES.values()] + [Constraints()]
    prompts = [[1 + i % 5] for i in range(len(asked))]
    together = constrained_search(Bigram(table(0)), prompts, asked, ends=[0], settings=settings, num_return_sequences=3)
    for prompt, one, found in zip(prompts, asked, together, strict=True):
        alone = constrained_search(
            Bigram(table(0)), [prompt], [one], ends=[0], settings=settings, num_return_sequences=3
        )[0]
        assert alone == found and len(found) <= 3
        assert [len(h.unmet) for h in found] == sorted(len(h.unmet) for h in found)


def small(kind, seed=0, **more):
    torch.manual_seed(seed)
    common = {"vocab_size": 41, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.5}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common, **more)).eval()
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **common, **more
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("ends", [[], [0]])
def test_without_constraints_it_is_the_beam_search_of_transformers(kind, beams, ends):
    """Limits 1 and 2, with prompts of different lengths; one beam is greedy."""
    model, penalty = small(kind), 0.0 if ends else 1.0
    model.generation_config.eos_token_id = ends or None
    prompts = [[3, 7, 9], [5], [8, 8]]
    mask = torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 1]])
    ids = torch.tensor([[0] * (3 - len(p)) + p for p in prompts])
    more = {"length_penalty": penalty, "early_stopping": "never"} if beams > 1 else {}
    expected = model.generate(
        ids, attention_mask=mask, num_beams=beams, do_sample=False, max_new_tokens=12, pad_token_id=0, **more
    )[:, 3:]
    settings = BeamSettings(beams, 12, 0, penalty, no_repeat_ngram_size=0)
    found = constrained_search(CausalLMScorer(model, 41), prompts, [Constraints()] * 3, ends=ends, settings=settings)
    for row, one in zip(expected.tolist(), found, strict=True):
        assert one[0].tokens == (row[: row.index(0) + 1] if ends and 0 in row else row)


def test_one_beam_without_constraints_ends_where_the_most_likely_token_ends():
    """Limit 1: an ending token that is not the first choice ends no text."""
    table = torch.tensor([[0.1, 0.8, 0.1], [0.45, 0.0, 0.55], [0.5, 0.49, 0.01]], dtype=torch.float64).log()
    settings = BeamSettings(1, 6, 1, no_repeat_ngram_size=0)
    (found,) = constrained_search(Bigram(table), [[0]], [Constraints()], ends=[0], settings=settings)
    assert found[0].tokens == [1, 2, 0]


def test_a_model_satisfies_clauses_and_never_writes_what_is_forbidden():
    """Limits 4 and 5, on a model that likes other tokens."""
    model, prompts = small("gpt2"), [[3, 7], [5]]
    asked = [
        Constraints((words((11, 12)), words((30,), (31, 32))), (AtMost(((7,), (9,), (3,))), AtMost(((2,), (4,)), 1))),
        Constraints((words((6,)),)),
    ]
    settings = BeamSettings(6, 16, no_repeat_ngram_size=2)
    found = constrained_search(
        CausalLMScorer(model, 41), prompts, asked, ends=[0], settings=settings, num_return_sequences=4
    )
    for one in found[0]:
        body = tuple(one.tokens)
        assert one.ended and not one.unmet and inside(body, (11, 12)) and (30 in body or inside(body, (31, 32)))
        assert not {7, 9, 3} & set(body) and sum(t in (2, 4) for t in body) <= 1 and len(body) > 5
        pairs = list(itertools.pairwise(body))
        assert len(set(pairs)) == len(pairs)
    assert all(6 in one.tokens for one in found[1])
    full = torch.tensor([prompts[0] + found[0][0].tokens])
    log_probs = model(full).logits.detach()[0, 1:-1].log_softmax(-1).gather(1, full[0, 2:, None])
    assert found[0][0].log_prob == pytest.approx(float(log_probs.sum()), abs=1e-4)  # the cache does not change it


def test_what_cannot_be_satisfied_is_reported_and_the_search_ends():
    never = torch.full((6, 6), -torch.inf, dtype=torch.float64)
    never[:, 1:3] = -0.7
    settings = BeamSettings(3, 5, 0, no_repeat_ngram_size=0)
    asked = Constraints((words((1,)), words((4,))))
    best = constrained_search(Bigram(never), [[0]], [asked], ends=[0], settings=settings)[0][0]
    assert best.unmet == [1] and not best.ended and len(best.tokens) == 5 and 1 in best.tokens
    stuck = Constraints((), (AtMost(((1,), (2,)), 1),))  # everything that is possible is forbidden after one token
    best = constrained_search(Bigram(never), [[0]], [stuck], ends=[0], settings=settings)[0][0]
    assert best.exceeded == [0] and len(best.tokens) == 5
    ended = torch.full((6, 6), -torch.inf, dtype=torch.float64)
    ended[:, 0] = 0  # only the ending token is possible, and the clause is not satisfied
    best = constrained_search(Bigram(ended), [[0]], [asked], ends=[0], settings=settings)[0][0]
    assert best.tokens == [] and best.unmet == [0, 1]


def test_ties_go_to_the_smaller_row_and_token():
    even = torch.zeros(6, 6, dtype=torch.float64).log_softmax(-1)
    settings = BeamSettings(3, 3, 3, 0.0, no_repeat_ngram_size=0)
    found = constrained_search(
        Bigram(even), [[0]], [Constraints()], ends=[5], settings=settings, num_return_sequences=2
    )[0]
    assert [h.tokens for h in found] == [[0, 0, 0], [0, 0, 1]]


def test_bad_constraints_are_one_line():
    search = lambda constraints, **how: constrained_search(  # noqa: E731
        Bigram(table(0)), [[0]], [constraints], ends=[0], settings=BeamSettings(2, 4, **how)
    )
    for says, constraints in {
        "asks for tokens \\[1, 2\\], and the constraints forbid them": Constraints(
            (words((1, 2)),), (AtMost(((2,),)),)
        ),
        "asks for tokens \\[3\\]": Constraints((words((3,)), (Literal((3,), False),))),
        "phrase of 5 tokens and max_new_tokens is 4": Constraints((words((1, 2, 3, 4, 5)),)),
        "clause or a phrase of the constraints is empty": Constraints((words(()),)),
        "is empty": Constraints(((),)),
        "name token 6 and the vocabulary has 6": Constraints((words((6,)),)),
        "There are 63 clauses": Constraints((words((1,)),) * 63),
    }.items():
        with pytest.raises(InputError, match=says) as caught:
            search(constraints)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="num_beams is 0"):
        BeamSettings(0)
    with pytest.raises(InputError, match="prune is 0"):
        BeamSettings(prune=0)
    with pytest.raises(InputError, match="2 constraints"):
        constrained_search(Bigram(table(0)), [[0]], [Constraints()] * 2, ends=[0])


def test_the_progress_term_prefers_more_and_the_official_one_less():
    """After one step, of two tokens that are equally likely, one of which begins an unmet phrase of four."""
    even = torch.zeros(1, 1, 6, dtype=torch.float64).log_softmax(-1)
    tracker = Tracker([Constraints((words((3, 4, 5, 2)),))], 6)
    first = {
        log: select(
            even, tracker.start(), tracker, torch.tensor([0]), 1, BeamSettings(1, log_progress=log, tolerance=0), 4
        )
        for log in (False, True)
    }
    assert first[False].tokens[0, 0] == 3 and first[True].tokens[0, 0] == 3  # −log(1/4) is positive too
    *_, state = after(tracker, torch.tensor([[3], [1]]))
    both = even.expand(1, 2, 6).clone()
    order = {
        log: select(both, state, tracker, torch.tensor([0]), 2, BeamSettings(1, log_progress=log), 4).tokens[0, 0]
        for log in (False, True)
    }
    assert (order[False], order[True]) == (4, 3)  # half a phrase, or a quarter


@pytest.mark.slow
def test_it_takes_less_than_three_times_as_long_as_beam_search():
    model = small("gpt2", n_inner=64)
    prompts = [[1 + i % 40, 2] for i in range(8)]
    limits = (AtMost(tuple((t,) for t in range(10, 20)), 1),)
    asked = [Constraints((words((3, 4)), words((5,))), limits)] * 8
    settings = BeamSettings(8, 24, 23, 1.0, no_repeat_ngram_size=0)

    def ours():
        constrained_search(CausalLMScorer(model, 41), prompts, asked, ends=[0], settings=settings)

    def theirs():
        model.generate(
            torch.tensor(prompts), num_beams=8, max_new_tokens=24, min_new_tokens=23, do_sample=False, pad_token_id=0,
            attention_mask=torch.ones(8, 2, dtype=torch.long), early_stopping="never",
        )  # fmt: skip

    seconds = {}
    for name, call in (("ours", ours), ("theirs", theirs)):
        call()
        started = time.perf_counter()
        for _ in range(3):
            call()
        seconds[name] = time.perf_counter() - started
    assert seconds["ours"] < 3 * seconds["theirs"], seconds
