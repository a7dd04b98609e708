"""Triples: the embedded world, prompts and what is kept of answers, critics of text pairs."""

import pytest
import torch

from understudy import InputError
from understudy.curation import Funnel
from understudy.curation import triples as knowledge
from understudy.data import train_tokenizer
from understudy.data.knowledge import MARKS, bracketed, load_relations, marked_tokenizer
from understudy.generation import Completion, Prompt, Request
from understudy.models.pairs import WordPairs, load_pairs
from understudy.synthetic.events import ADVERBS, RELATIONS, TAILS, VERBS, EventsWorld, choose
from understudy.training.critic import Fit, fit_critic, probabilities


def test_the_world_is_the_cards():
    world = EventsWorld(3)
    assert (len(VERBS), len(ADVERBS), len(TAILS), len(RELATIONS)) == (40, 8, 200, 5) and len(set(TAILS)) == 200
    assert (
        len(world.heads) == 320
        and world.valid_sets.sum(-1).eq(10).all()
        and set(world.types.tolist()) == set(range(16))
    )
    mass = [
        float(torch.softmax(world.preferences(h, r), 0)[world.valid_sets[world.types[h // 8], r]].sum())
        for h in range(0, 320, 7)
        for r in range(5)
    ]
    assert sum(mass) / len(mass) == pytest.approx(0.79, abs=0.03)
    relation = world.relations()["xWant"]
    assert all(world.valid(head, "xWant", tail) for head, tail in relation.examples)
    assert not world.valid("PersonX bakes bread", "xNeed", "lamp") and not world.valid("x", "xWant", "lamp")
    asked = {
        n: world.write(f"7. Robin bakes today. {r.ask.replace('PersonX', 'Robin')}", (0.0, 0.5), 1.0, 0.1)[0]
        for n, r in world.relations().items()
    }
    best = {
        n: TAILS[int(world.preferences(VERBS.index("bakes") * 8 + ADVERBS.index("today"), i).argmax())]
        for i, n in enumerate(RELATIONS)
    }
    assert asked == best
    assert world.write("11. Event:", (0.4, 0.5), 1.0, 1.0)[0] in world.heads


def test_choose_is_inversion_inside_the_nucleus():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64).log()
    assert [choose(logits, d, 1.0, 1.0)[0] for d in (0.1, 0.6, 0.85, 0.95)] == [0, 1, 2, 3]
    assert [choose(logits, d, 1.0, 0.6)[0] for d in (0.1, 0.8, 0.999999)] == [0, 1, 1]
    assert choose(logits, 0.9, 0.0, 1.0)[0] == 0 and choose(logits, 0.1, 1.0, 1.0)[1] == pytest.approx(
        -0.6931, abs=1e-3
    )


def test_prompts_hold_names_that_map_back():
    relation, item = load_relations()["xIntent"], Prompt.load("inference")
    requests, names = knowledge.tail_requests(item, "PersonX thanks PersonY", relation, 3, 0, "t", top_p=0.5)
    lines = requests[0].prompt.split("\n")
    assert len(lines) == 8 and "PersonX" not in requests[0].prompt and len({r.draw for r in requests}) == 3
    assert lines[-1] == f"8. {names['PersonX']} thanks {names['PersonY']}. Because {names['PersonX']} wanted:"
    _, others = knowledge.tail_requests(item, f"PersonX calls {names['PersonX']}", relation, 1, 0, "t")
    assert names["PersonX"] not in others.values()


def test_tails_are_tidied_and_empty_ones_skipped():
    names = {"PersonX": "Alex", "PersonY": "Sam"}
    texts = [" to meet Sam.", "", " . ", "to meet Sam", " Alexander's Alex", " ok"]
    event = knowledge.Event(id="events/0", text="h")
    asked = [(event, "xWant", names, f"id{i}") for i in range(len(texts))]
    funnel = Funnel()
    found = knowledge.sift_tails(asked, [Completion(t, "stop") for t in texts], funnel)
    assert [(t.tail, t.requests, t.parents) for t in found] == [
        ("to meet PersonY", ("id0", "id3"), ("events/0",)),
        ("Alexander's PersonX", ("id4",), ("events/0",)),
    ]
    assert funnel.rows[0]["dropped"] == {"empty": 2, "two characters or fewer": 1}


def test_heads_are_sifted_in_the_official_order():
    texts = [
        "PersonX runs far",
        "PersonX runs far",
        "PersonX",
        "Somebody runs",
        "PersonX <hides>",
        "PersonX swims home",
    ]
    log_probs = [-1.0, -9.0, -1.0, 0.0, -2.0, -3.0]
    answers = [Completion(f" {t}", "stop", p, 1, 3) for t, p in zip(texts, log_probs, strict=True)]
    answers.append(Completion(" PersonX is cut", "length", 0.0, 1, 12))
    funnel = Funnel()
    asked = [Request("", f"heads/{i}") for i in range(len(answers))]

    def sifted(keep, counts):
        return [(e.text, e.requests) for e in knowledge.sift_heads(asked, answers, keep, False, 8, counts)]

    assert sifted(1.0, funnel) == [("PersonX runs far", ("heads/0",)), ("PersonX swims home", ("heads/5",))]
    assert sifted(0.75, Funnel()) == [("PersonX swims home", ("heads/5",))]  # the later −9 counts
    assert [r["after"] for r in funnel.rows] == [6, 5, 4, 4, 2]


def test_marks_are_single_tokens_and_text_round_trips():
    text = f"{bracketed('PersonX runs home', 'xWant')} to rest"
    tokenizer = marked_tokenizer([text] * 3, 300)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [t for t in tokenizer.convert_ids_to_tokens(ids) if t in MARKS] == list(MARKS)
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == ["PersonX", "runs", "home", "xWant", "to", "rest"]


def test_a_critic_learns_keeps_its_best_epoch_and_survives_the_disk(tmp_path):
    torch.manual_seed(0)
    pairs = [(f"PersonX {a}", f"wants {b}") for a in "abcdefgh" for b in "abcdefgh"] * 2
    labels = [int(p[0][-1] <= p[1][-1]) for p in pairs]
    model = WordPairs([w for p in pairs for w in " ".join(p).split()], 16, 32, 0.0)
    result = fit_critic(
        model, (pairs, labels), (pairs, labels), Fit(1e-2, 32, 40, warmup=5, patience=5), knowledge.naming
    )
    assert result.best_precision > 0.95 and result.epochs <= 40
    assert result.history[result.best_epoch] == max(result.history)
    model.save(tmp_path / "critic")
    views = [knowledge.naming(v) for v in range(3)]
    assert probabilities(load_pairs(tmp_path / "critic"), pairs, views) == probabilities(model, pairs, views)
    with pytest.raises(InputError, match="validation labels hold only label 1"):
        fit_critic(model, (pairs, labels), (pairs[:1], [1]), Fit(1e-2), knowledge.naming)


def test_any_sequence_classifier_is_a_critic(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = train_tokenizer(["PersonX wants to rest"], 300)
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    critic = load_pairs(tmp_path / "bert", dropout=0.2)
    pairs = [("PersonX runs", "wants to rest"), ("PersonX", "x")] * 2
    fit_critic(critic, (pairs, [1, 0, 1, 0]), (pairs, [1, 0, 1, 0]), Fit(1e-3, epochs=2, warmup=0), knowledge.naming)
    critic.save(tmp_path / "saved")
    views = [knowledge.naming(0)]
    again = probabilities(load_pairs(tmp_path / "saved"), pairs, views)
    assert (
        again == pytest.approx(probabilities(critic, pairs, views)) and critic.model.config.hidden_dropout_prob == 0.2
    )
