"""Paper 37 on texts: which are chosen by each rule, embeddings that are optimised, the data sets that are kept, bad input."""

import json

import pytest
import torch

from golden_vectors import close
from test_symbolic_kd import tiny
from text_classes import as_csv, classifier, reviews
from understudy import InputError, distill
from understudy.curation import pruning
from understudy.curation.coresets import k_center
from understudy.methods.dataset_distillation import DatasetDistillation, _nearest
from understudy.training.checkpoint import load_tree
from understudy.training.set_matching import SELECTIONS, Examples, Matching

FEW = {"iterations": 10, "evaluations": 1, "experts": 1, "expert_steps": 6, "span": 3, "student_steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return as_csv(tmp_path_factory.mktemp("data") / "reviews.csv", reviews(90))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return classifier(tmp_path_factory.mktemp("models") / "teacher")


def recipe(data, output, **options):
    return {
        "task": "text_classification",
        "method": "dataset-distillation",
        "data": {"name": str(data), "max_length": 16, "vocab_size": 300},
        "student": "embedding:8",
        "trainer": {"max_steps": 4, "per_device_train_batch_size": 8, "save_strategy": "no"},
        "output": str(output),
        "options": {**FEW, **options},
        **({"teacher": None} if options.get("alpha") == 0 else {}),
    }


def kept(result):
    """The folder of the set, its texts, and the embeddings beside them."""
    (folder,) = (result.folder / "store").glob("distilled-set-*")
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return folder, lines, load_tree(folder / "embeddings.safetensors")


@pytest.fixture
def clouds():
    torch.manual_seed(0)
    y = torch.arange(60) % 3
    return Examples(torch.randn(3, 1, 1, 6)[y] + 0.5 * torch.randn(60, 1, 1, 6), y)


def chosen(clouds, rule, number=4):
    options = DatasetDistillation(match=rule, per_class=number, experts=2, expert_steps=20)
    return Matching(options, clouds, torch.arange(3).repeat_interleave(number), 3, "mlp:8", 0)


@pytest.mark.parametrize("rule", SELECTIONS)
def test_each_rule_chooses_distinct_examples_of_every_class(clouds, rule):
    index = chosen(clouds, rule)._choose()
    assert clouds.y[index].tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(index.unique()) == 12
    assert torch.equal(index, chosen(clouds, rule)._choose())


def test_rules_choose_what_they_say(clouds):
    own = (clouds.y == 1).nonzero()[:, 0]
    x = clouds.x[own].flatten(1)
    herded = chosen(clouds, "herding")._choose()[4:8]
    order = pruning.herding_scores(x, torch.zeros(len(x), dtype=torch.long)).sort(descending=True, stable=True).indices
    assert torch.equal(herded, own[order[:4]])
    middle = int((x - x.mean(0)).norm(dim=1).argmin())
    assert torch.equal(chosen(clouds, "k-center")._choose()[4:8], own[k_center(x, 4, start=middle).chosen])
    hardest = chosen(clouds, "el2n")
    logits, read = hardest._read()
    scores = pruning.el2n_scores(logits, clouds.y)
    rest = [i for i in own.tolist() if i not in hardest._choose().tolist()]
    assert scores[hardest._choose()[4:8]].min() >= scores[rest].max()
    # What the last layers read gives their logits: the gradients that `pursuit` sums are those of the heads.
    grand = chosen(clouds, "grand")._choose()[4:8]
    norms = pruning.grand_scores(logits, clouds.y, read.norm(dim=-1))
    assert norms[grand].min() >= norms[[i for i in own.tolist() if i not in grand.tolist()]].max()
    assert read.shape == (2, 60, 9) and bool((read[..., -1] == 1).all())


def test_pursued_gradients_sum_to_the_mean_better_than_random_ones(clouds):
    logits, read = chosen(clouds, "pursuit")._read()
    errors = logits.softmax(-1) - torch.nn.functional.one_hot(clouds.y, 3)
    slopes = torch.einsum("enc,enw->necw", errors, read).flatten(1)[clouds.y == 0]
    left = {}
    for rule in ("pursuit", "random"):
        own = chosen(clouds, rule)._choose()[:4]
        basis = slopes[[(clouds.y == 0).nonzero()[:, 0].tolist().index(i) for i in own.tolist()]].T
        fit = torch.linalg.lstsq(basis, slopes.mean(0)[:, None]).solution
        left[rule] = float((basis @ fit - slopes.mean(0)[:, None]).norm())
    assert left["pursuit"] < 0.8 * left["random"]


def test_embeddings_are_projected_to_distinct_texts_of_their_class():
    real = Examples(torch.tensor([0.0, 1.0, 2.0, 0.1]).view(4, 1, 1, 1), torch.tensor([0, 0, 0, 1]))
    x = torch.tensor([0.2, 0.3, 0.0]).view(3, 1, 1, 1)
    assert _nearest(x, torch.tensor([0, 0, 1]), real).tolist() == [0, 1, 3]


@pytest.mark.parametrize("match", ["herding", "pursuit", "distribution", "gradient"])
def test_the_set_is_an_ordinary_set_of_texts(match, data, teacher, tmp_path):
    result = distill(recipe(data, tmp_path / "run", match=match, per_class=3), teacher=str(teacher))
    folder, lines, beside = kept(result)
    texts = {row["text"] for row in reviews(90)}
    assert len(lines) == 6 and [r["label"] for r in lines] == [0] * 3 + [1] * 3
    assert len({r["text"] for r in lines}) == 6 and all(r["text"] in texts for r in lines)
    assert beside["embeddings"].shape == (6, 16) and beside["teacher_logits"].shape == (6, 2)
    synthetic = match in ("distribution", "gradient")
    assert ("fresh_accuracy_mlp:64,64_texts" in result.metrics) == synthetic
    assert ("projection_distance" in result.metrics) == synthetic and result.metrics["distilled_texts"] == 6
    assert lines[0]["text"] in (result.folder / "report.html").read_text()
    other = distill(
        task="text_classification",
        method="sft",
        data={"name": str(folder), "max_length": 16, "vocab_size": 300},
        student="embedding:4",
        output=str(tmp_path / "other"),
        trainer={"max_steps": 2, "save_strategy": "no"},
    )
    assert 0 <= other.metrics["accuracy"] <= 1


def test_soft_labels_are_those_of_the_teacher(data, teacher, tmp_path):
    """The head on the embedding of a real text is the teacher on the text."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    _, lines, beside = kept(distill(recipe(data, tmp_path, match="k-center", per_class=3), teacher=str(teacher)))
    model, tokenizer = (kind.from_pretrained(teacher) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    with torch.no_grad():
        logits = model(**tokenizer([r["text"] for r in lines], padding=True, return_tensors="pt")).logits
    close(beside["teacher_logits"], logits, rtol=1e-4, atol=1e-5)


def test_without_a_teacher_the_student_reads_as_it_begins(data, tmp_path):
    runs = [distill(recipe(data, tmp_path / str(n), match="distribution", alpha=0)) for n in range(2)]
    _, lines, beside = kept(runs[0])
    assert "teacher_logits" not in beside and len(lines) == 2
    assert runs[0].metrics == runs[1].metrics


def test_bad_input(data, tmp_path):
    with pytest.raises(InputError, match=r"Class 0 has .* options.per_class=1000 starts from as many"):
        distill(recipe(data, tmp_path, alpha=0, per_class=1000, initial="noise"))
    with pytest.raises(InputError, match="is about images or texts"):
        distill(
            task="multimodal_classification",
            method="dataset-distillation",
            teacher=None,
            data={"limit": 40},
            options={"alpha": 0, "network": "mlp:4"},
            output=str(tmp_path / "other"),
        )


@pytest.mark.slow
def test_matched_embeddings_train_better_than_those_of_random_texts(tmp_path):
    """Passages of five subjects, two a class, read as the mean of untrained word vectors."""
    shared = {"task": "text_classification", "method": "dataset-distillation", "student": "embedding:128"}
    steps = {"max_steps": 2, "per_device_train_batch_size": 32, "save_strategy": "no"}
    found = {
        match: distill(
            {**shared, "data": {"limit": 1000}, "teacher": None, "trainer": steps, "output": str(tmp_path / match)},
            options={"match": match, "per_class": 2, "alpha": 0, "evaluations": 2},
        ).metrics["fresh_accuracy_mlp:64,64"]
        for match in ("random", "distribution", "trajectory")
    }
    assert found["trajectory"] > found["random"] + 0.06 and found["distribution"] > found["random"] + 0.02


@pytest.mark.parametrize("match", ["herding", "pursuit", "gradient", "distribution"])
def test_texts_that_a_teacher_wrote_are_a_pool_to_select_from(match, pool, tmp_path):
    """The facts that symbolic-kd keeps, by relation: each stays in the few as it was written, with its class."""
    data = {"name": str(pool), "columns": {"text": "tail", "label": "relation"}, "max_length": 16, "vocab_size": 300}
    done = distill({**recipe(pool, tmp_path / "run", match=match, alpha=0, per_class=2), "data": data})
    _, lines, _ = kept(done)
    wrote = [json.loads(line) for line in pool.read_text().splitlines()]
    relations = sorted({row["relation"] for row in wrote})
    assert len(lines) == 2 * len(relations)
    assert {(r["text"], relations[r["label"]]) for r in lines} <= {(r["tail"], r["relation"]) for r in wrote}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """What a procedure's teacher wrote and its filter kept."""
    folder = distill(tiny(tmp_path_factory.mktemp("pool") / "run", filter="none")).folder
    return folder / "stages" / "kept.jsonl"


def test_embeddings_may_be_made_from_latents(data, tmp_path):
    latents = {"space": "latents", "latent": 4, "autoencoder_steps": 20}
    _, lines, beside = kept(distill(recipe(data, tmp_path, match="distribution", alpha=0, per_class=2, **latents)))
    assert len(lines) == 4 and beside["embeddings"].isfinite().all()
    with pytest.raises(InputError, match=r"is not a folder with a config\.json"):
        folder = {"space": "latents", "autoencoder": str(tmp_path / "none")}
        distill(recipe(data, tmp_path / "other", match="distribution", alpha=0, **folder))
