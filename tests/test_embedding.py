"""Embedding distillation: distances, principal directions, and an encoder that becomes a narrower one."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from understudy import InputError, distill
from understudy.data import Batch
from understudy.data.retrieval_batches import RankingCollator, RankingSet, View, train_encoder_tokenizer
from understudy.losses.embeddings import cosine_distance, embedding_mse, principal_directions
from understudy.methods.embedding import Embedding
from understudy.models.ranker_loading import load_ranker
from understudy.training import TrainState
from understudy.training.reduction import Counts, sum_terms


def test_distances_at_their_limits():
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    near = dict(atol=1e-12, rtol=0)
    torch.testing.assert_close(cosine_distance(x, 3 * x), torch.zeros(5).double(), **near)
    torch.testing.assert_close(cosine_distance(x, -x), 2 * torch.ones(5).double(), **near)
    torch.testing.assert_close(embedding_mse(x, x + 2), 4 * torch.ones(5).double(), **near)
    zero = torch.zeros(1, 4, requires_grad=True)
    value = cosine_distance(zero, torch.ones(1, 4))
    value.sum().backward()
    assert value.item() == 1 and torch.isfinite(zero.grad).all()


def test_principal_directions_are_those_of_the_singular_values():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).double() * torch.tensor([5, 4, 3, 2, 1, 0.5])
    found = principal_directions(x + 7, 3)
    wanted = torch.linalg.svd(x - x.mean(0)).Vh[:3].T
    torch.testing.assert_close((found.T @ wanted).abs(), torch.eye(3).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(found.T @ found, torch.eye(3).double(), atol=1e-10, rtol=0)


def triples(path, number=80):
    """Queries of one word, with a document that has it and one that has not."""
    words = [f"{a}{b}" for a in "bdfgklmn" for b in ("ala", "omo", "iri", "utu", "ene")]
    rows = []
    for i in range(number):
        word, other = words[i % len(words)], words[(i * 7 + 3) % len(words)]
        rows.append(
            {"query": f"{word} {i // len(words)}", "positive": f"the {word} text", "negative": f"a {other} text"}
        )
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def recipe(tmp_path, **more):
    return {
        "task": "ranking",
        "method": "embedding",
        "data": {"name": str(triples(tmp_path / "triples.jsonl")), "vocab_size": 300},
        "teacher": "embedding:12",
        "student": "embedding:6",
        "trainer": {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 3e-2, "logging_steps": 5},
    } | more


def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["terms"]["embedding"] for row in rows if "terms" in row]


@pytest.mark.parametrize("options", [{"reduce": "pca", "distance": "mse"}, {"reduce": "pca"}, {"reduce": "projection"}])
def test_a_narrower_encoder_learns_the_vectors(tmp_path, options):
    result = distill(recipe(tmp_path, options=options), output=str(tmp_path / "run"))
    losses = logged(tmp_path / "run")
    assert losses[-1] < 0.6 * losses[0], losses
    assert (tmp_path / "run" / "student" / "modules.json").is_file() and "ndcg_10" in result.metrics


@pytest.mark.parametrize("more", [{}, {"towers": 2}, {"normalize": True}])
def test_a_kept_projection_is_the_saved_encoders_last_layer(tmp_path, more):
    """The saved encoder has the teacher's width, here and in plain sentence-transformers, whose vectors are the same."""
    options = {"reduce": "projection", "keep_projection": True}
    student = {"model": "embedding:6", "options": more}
    distill(recipe(tmp_path, options=options, student=student), output=str(tmp_path / "run"))
    losses = logged(tmp_path / "run")
    assert losses[-1] < 0.6 * losses[0], losses
    folder = tmp_path / "run" / "student"
    tower = folder / "query" if "towers" in more else folder
    plain = pytest.importorskip("sentence_transformers").SentenceTransformer(str(tower), device="cpu")
    ours = load_ranker(str(folder), View(AutoTokenizer.from_pretrained(tower), 12, 12), {})
    texts = ["bala 0", "the domo text"]
    found = ours.embed(texts, "query")
    assert found.shape == (2, 12)
    torch.testing.assert_close(found, torch.from_numpy(plain.encode(texts)), atol=1e-6, rtol=1e-5)


def test_a_dense_module_of_sentence_transformers_is_read(tmp_path):
    models = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer

    tokenizer = train_encoder_tokenizer(["the bala text", "a domo text"] * 9, 300)
    torch.manual_seed(0)
    parts = [models.StaticEmbedding(tokenizer, embedding_dim=8), models.Dense(8, 5), models.Normalize()]
    plain = SentenceTransformer(modules=parts, device="cpu")
    plain.save(str(tmp_path / "model"))
    view = View(AutoTokenizer.from_pretrained(tmp_path / "model"), 8, 8)
    ours = load_ranker(str(tmp_path / "model"), view, {})
    texts = ["the bala text", "domo"]
    torch.testing.assert_close(ours.embed(texts, "query"), torch.from_numpy(plain.encode(texts)), atol=1e-6, rtol=1e-5)
    half = load_ranker(str(tmp_path / "model"), view, {}, dtype="bfloat16")
    assert half.embed(texts, "query").shape == (2, 5)
    with pytest.raises(InputError, match="scorer=late"):
        load_ranker(str(tmp_path / "model"), view, {"scorer": "late"})
    config = json.loads((tmp_path / "model" / "1_Dense" / "config.json").read_text())
    for change, says in (
        ({"activation_function": "x.Mish"}, "activation_function is Mish"),
        ({"in_features": 0}, "maps a text"),
    ):
        (tmp_path / "model" / "1_Dense" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=says):
            load_ranker(str(tmp_path / "model"), view, {})


def test_widths_that_differ_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(InputError, match=r"have 6 entries and the teacher's 12: set options\.reduce=projection or pca"):
        distill(recipe(tmp_path), output=str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"have 24 entries and the teacher's 12: set options\.reduce=projection, or"):
        wide = recipe(tmp_path, student="embedding:24", options={"reduce": "pca"})
        distill(wide, output=str(tmp_path / "other"))


def test_the_gradient_of_a_batch_is_that_of_any_split():
    """Also where queries share a document, and lists are of different length."""
    words = ["bala", "domo", "firi", "gutu", "kene", "lala"]
    rows = [
        {
            "id": i,
            "query": w,
            "documents": [w + " text", "the text", "no text"][: 1 + i % 3],
            "labels": [1.0, 0.0, 0.0][: 1 + i % 3],
        }
        for i, w in enumerate(words)
    ]
    view = View(train_encoder_tokenizer(words, 300), 8, 8)
    items, collate, method = RankingSet(rows).records, RankingCollator([view]), Embedding()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, teacher = (load_ranker("embedding:4", view, {}) for _ in range(2))

    def gradient(*sizes):
        student.zero_grad()
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        batches = [Batch.from_dict(collate(items[a : a + n])) for a, n in zip(starts, sizes, strict=True)]
        counts = Counts.total([Counts.of(b, "token_mean", method.counts(b)) for b in batches], list)
        assert counts.own["embedding"] == sum(1 + len(r["documents"]) for r in rows)
        for batch in batches:
            terms = method.loss(
                student(batch, features=True), teacher(batch, features=True).detach(), batch, TrainState()
            )
            assert [t.values.shape for t in terms.values()] == [(batch.num_items,)]
            sums = sum_terms(terms, batch, "token_mean", own=["embedding"])
            counts.divide("embedding", sums.losses["embedding"]).backward()
        return student.model.encoders[0].body.embedding.weight.grad.clone()

    whole = gradient(6)
    assert whole.abs().max() > 1e-2
    for sizes in ((3, 3), (1, 5), (1,) * 6):
        torch.testing.assert_close(gradient(*sizes), whole, rtol=1e-6, atol=1e-7)
