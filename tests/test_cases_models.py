"""Models from outside: which are loaded and which refused, that what is used is the model's own, and what is saved."""

import json
import shutil

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import nn

from understudy import distill
from understudy.data import Batch, train_tokenizer
from understudy.data.classified_batches import Reading
from understudy.data.retrieval_batches import View, train_encoder_tokenizer
from understudy.errors import InputError
from understudy.models import CausalLMAdapter, load_causal_lm, load_classifier, load_tokenizer, save_small
from understudy.models.denoisers import load_denoiser
from understudy.models.encoders import Encoder, save_encoder, set_ends
from understudy.models.loading import auto_model
from understudy.models.positions import positions
from understudy.models.processors import Processor
from understudy.models.ranker_loading import load_ranker
from understudy.models.sentence_folders import SETTINGS, prompts_of, transformer_of, view_of
from understudy.models.small import build_small
from understudy.models.text_classifiers import load_text_classifier
from understudy.models.weights import notes_of
from understudy.runs.check import evaluate_run
from understudy.runs.recipe import make, own_training
from understudy.tasks import get as get_task

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WORDS = [
    f"the {a} {b} over the {c} and sees the {a}"
    for a in ("cat", "dog", "fox")
    for b in ("runs", "sits")
    for c in ("mat", "log")
]
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}
DIGITS = {"name": "digits", "limit": 64}
TRAINER = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}


def notes_in(folder):
    return json.loads((folder / "evaluation.json").read_text())["notes"]


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(WORDS * 9, 300)


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS * 5))
    return {"name": str(file), "max_length": 16}


@pytest.fixture
def llama(tmp_path, tokenizer):
    """A folder with a small causal LM and a tokenizer of its own."""
    torch.manual_seed(0)
    folder = tmp_path / "llama"
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer)}, num_key_value_heads=4)
    config.eos_token_id = tokenizer.eos_token_id
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -- no teacher unless one is asked for ----------------------------------------------------------------------------------


def test_a_method_without_a_teacher_trains_and_loads_none(tmp_path, llama, texts):
    run = {"task": "language_modeling", "method": "sft", "student": str(llama), "data": texts, "trainer": TRAINER}
    distill(run, output=str(tmp_path / "run"))
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    metrics = json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]
    assert facts["teacher"] is None and "teacher" not in facts["hashes"]
    assert not (tmp_path / "run" / "teacher").exists() and not any(k.startswith("teacher_") for k in metrics)


@pytest.mark.parametrize("task", ["image_classification", "language_modeling", "node_classification", "ranking"])
def test_no_task_gives_sft_a_teacher(task):
    methods = {"ranking": {"method": "margin-mse", "options": {"loss_type": "ranknet"}}}
    assert make({"task": task, "method": "sft"} | methods.get(task, {})).teacher is None


@pytest.mark.parametrize("none", ["none", "None", None])
def test_no_teacher_can_be_said(none, tmp_path):
    assert make({"method": "sft", "teacher": none}).teacher is None
    with pytest.raises(InputError, match="the recipe says there is none"):
        make({"method": "kd", "teacher": none})
    ranking = {"task": "ranking", "method": "margin-mse", "data": str(tmp_path)}
    (tmp_path / "qrels.parquet").touch()
    assert make(ranking).teacher is not None
    said = make({**ranking, "teacher": none})
    assert said.teacher is None and make(said.dump()).teacher is None


def test_a_named_teacher_is_kept_beside_a_method_without():
    assert make({"method": "sft", "teacher": "mlp:8"}).teacher.model == "mlp:8"


def test_a_default_teacher_takes_the_students_tokenizer(tmp_path, llama, texts, tokenizer):
    run = {"task": "language_modeling", "method": "kd", "student": str(llama), "data": texts, "trainer": TRAINER}
    recipe = make({**run, "output": str(tmp_path / "run")})
    small = recipe.teacher.model_copy(update={"model": "llama:hidden=16,layers=1,heads=2", "train": TRAINER})
    recipe = recipe.model_copy(update={"teacher": small})
    distill(recipe)
    taught = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "teacher" / "student")
    assert taught.get_vocab() == tokenizer.get_vocab()


def test_a_start_takes_the_teachers_tokenizer(llama, texts):
    start = {"model": "llama:hidden=16,layers=1,heads=2", "train": TRAINER}
    run = {"task": "language_modeling", "method": "kd", "teacher": str(llama), "student": start, "data": texts}
    assert own_training(make(run), "student", llama.parent / "x").data["tokenizer"] == str(llama)


def test_a_model_is_never_fed_the_ids_of_another_tokenizer(tmp_path, llama, texts):
    other = train_tokenizer(["quite other words in here"] * 9, 280)
    saved = shutil.copytree(llama, tmp_path / "earlier")
    other.save_pretrained(saved)
    recipe = make({"task": "language_modeling", "method": "sft", "student": str(llama), "data": texts})
    task = get_task("language_modeling")
    with pytest.raises(InputError, match="another tokenizer than this run has"):
        task.model(recipe.student, task.prepare(recipe), saved)


# -- the model's own logits ----------------------------------------------------------------------------------------------

HEADS = {
    "a transform before the matrix": lambda: transformers.ModernBertDecoderConfig(
        **SIZES, cls_token_id=1, sep_token_id=2
    ),
    "BERT as a decoder": lambda: transformers.BertConfig(**SIZES, is_decoder=True),
    "RoBERTa as a decoder": lambda: transformers.RobertaConfig(**SIZES, is_decoder=True),
    "RoFormer": lambda: transformers.RoFormerConfig(**SIZES, is_decoder=True),
    "MegatronBert": lambda: transformers.MegatronBertConfig(**SIZES, is_decoder=True),
    "a multiplier": lambda: transformers.FalconH1Config(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        lm_head_multiplier=0.3,
    ),
    "a soft cap under a name of its own": lambda: transformers.RecurrentGemmaConfig(
        **{**SIZES, "num_hidden_layers": 3, "intermediate_size": 96}, lru_width=32, logits_soft_cap=1.0
    ),
    "hidden states elsewhere": lambda: transformers.Llama4TextConfig(
        **SIZES, num_key_value_heads=4, num_local_experts=2, head_dim=8, intermediate_size_mlp=64
    ),
    "one matrix": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=4),
    "a scale": lambda: transformers.CohereConfig(**SIZES, num_key_value_heads=4, logit_scale=0.3),
    "a soft cap": lambda: transformers.Gemma2Config(
        **SIZES, num_key_value_heads=4, head_dim=8, final_logit_softcapping=2.0
    ),
}
OWN = set(list(HEADS)[:7])


def perturbed(config, scale=0.1):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def dense(signal):
    if not hasattr(signal, "hidden"):
        return signal.logits
    values = signal.hidden @ signal.weight.T + (0 if signal.bias is None else signal.bias)
    values = values * signal.scale
    return values if signal.softcap is None else signal.softcap * torch.tanh(values / signal.softcap)


@pytest.mark.parametrize("scale", [0.1, 0.0])
@pytest.mark.parametrize("name", HEADS)
def test_rows_hold_the_models_own_logits(name, scale):
    """A new model (scale 0) has logits so small that a bound on them does not show, and must be seen through too."""
    model = perturbed(HEADS[name](), scale)
    rows = CausalLMAdapter(model, 300)
    assert rows.own_logits is (name in OWN)
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, torch.arange(2))
    with torch.no_grad():
        found = rows(batch, features=True)
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(dense(found.signal), wanted.float(), rtol=1e-4, atol=1e-5)
    assert found.features.shape == (22, 32)


def test_own_logits_say_what_they_cost_and_train(tmp_path, tokenizer, texts):
    folder = tmp_path / "student"
    config = transformers.ModernBertDecoderConfig(
        **{**SIZES, "vocab_size": len(tokenizer)}, cls_token_id=1, sep_token_id=2
    )
    config.eos_token_id = tokenizer.eos_token_id
    perturbed(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = {"task": "language_modeling", "method": "sft", "student": str(folder), "data": texts, "trainer": TRAINER}
    found = distill(run, output=str(tmp_path / "run"))
    assert any("its own are used" in n for n in json.loads((found.folder / "evaluation.json").read_text())["notes"])


@pytest.mark.parametrize("kind", [transformers.BertForMaskedLM, transformers.BertModel])
def test_a_bidirectional_encoder_is_no_causal_lm(kind, tmp_path, tokenizer):
    torch.manual_seed(0)
    kind(transformers.BertConfig(**{**SIZES, "vocab_size": len(tokenizer)})).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="task=ranking"):
        CausalLMAdapter(load_causal_lm(str(tmp_path), tokenizer=tokenizer), len(tokenizer))


# -- every weight in its place -------------------------------------------------------------------------------------------


def edited(folder, name="config.json", **values):
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


@pytest.mark.parametrize(
    ("layers", "says"), [(5, "no weights for model.layers.2"), (1, "no place for model.layers.1"), (-1, "layers")]
)
def test_layers_that_the_weights_lack_or_exceed_are_refused(layers, says, llama, tokenizer):
    with pytest.raises(InputError, match=says):
        load_causal_lm(str(edited(llama, num_hidden_layers=layers)), tokenizer=tokenizer)


def test_a_head_may_be_new_where_a_method_trains_it_and_not_in_a_teacher(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**VIT, num_labels=10)
    transformers.ViTModel(config).save_pretrained(tmp_path / "base")
    student = {"method": "sft", "student": str(tmp_path / "base"), "data": DIGITS, "trainer": TRAINER}
    found = distill(student, output=str(tmp_path / "run"))
    assert any("classifier.bias, classifier.weight: they are new" in n for n in notes_in(found.folder))
    with pytest.raises(InputError, match="train it first"):
        distill(method="kd", teacher=str(tmp_path / "base"), student="mlp:8", data=DIGITS, output=str(tmp_path / "b"))
    with pytest.raises(InputError, match="no place for"):
        load_classifier(str(edited(tmp_path / "base", num_hidden_layers=1)), classes=10, input_shape=(3, 8, 8))


def test_layers_of_an_encoder_are_counted_too(tmp_path):
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path)
    load = lambda: auto_model(transformers.AutoModel, str(tmp_path), tmp_path, "auto", None, False, new_head=True)  # noqa: E731
    load()  # its head is left out, and a pooler it has not
    edited(tmp_path, num_hidden_layers=3)
    with pytest.raises(InputError, match=r"no weights for encoder.layer.2"):
        load()


@pytest.mark.parametrize("change", ["byte", "gone"])
def test_weights_of_a_run_that_changed_are_refused(change, tmp_path):
    run = {"method": "sft", "student": "mlp:8", "data": DIGITS, "trainer": TRAINER, "output": str(tmp_path / "run")}
    distill(run)
    file = tmp_path / "run" / "student" / "model.safetensors"
    evaluate_run(tmp_path / "run")  # as it was written
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content) if change == "byte" else file.rename(file.with_name("other.safetensors"))
    for again in (
        lambda: evaluate_run(tmp_path / "run"),
        lambda: distill(run),
        lambda: distill(
            method="kd", teacher=str(file.parent), student="mlp:4", data=DIGITS, output=str(tmp_path / "b")
        ),
    ):
        with pytest.raises(InputError, match=r"not as it was saved: model\.safetensors is missing or has another hash"):
            again()


def test_small_networks_of_other_shapes_are_named(tmp_path):
    save_small(load_classifier("mlp:4", classes=10, input_shape=(1, 8, 8)), tmp_path)
    edited(tmp_path, understudy_model="mlp:5")
    with pytest.raises(InputError, match=r"body.1.weight has shape \[4, 64\] in the file and \[5, 64\] in the network"):
        load_classifier(str(tmp_path), classes=10, input_shape=(1, 8, 8))


# -- folders that are incomplete -----------------------------------------------------------------------------------------


def test_what_a_folder_lacks_is_named(llama, tokenizer):
    load = lambda: load_causal_lm(str(llama), tokenizer=tokenizer)  # noqa: E731
    (llama / "model.safetensors").rename(llama / "weights")
    with pytest.raises(InputError, match=r"incomplete: it has a config.json and no weights"):
        load()
    (llama / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"as pickles \(pytorch_model.bin\)"):
        load()
    (llama / "weights").rename(llama / "model-1.safetensors")
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(InputError, match=r"names model-2.safetensors, which is not there"):
        load()
    for file in llama.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"the folder has no tokenizer.json"):
        load_tokenizer(str(llama))


ADAPTERS = {
    "a list": (lambda f: write(f / "adapter_config.json", []), "holds a list"),
    "a rank that is text": (lambda f: rewrite(f, r="x"), "cannot be loaded"),
    "an unknown kind": (lambda f: rewrite(f, peft_type="NEW"), "cannot be loaded"),
    "layers that are not there": (lambda f: rewrite(f, target_modules=["nope"]), "cannot be loaded"),
    "more layers": (lambda f: rewrite(f, target_modules=["q_proj", "v_proj"]), "missing or unexpected"),
    "no base": (lambda f: rewrite(f, base_model_name_or_path=None), "does not say of which model"),
    "itself as base": (lambda f: rewrite(f, base_model_name_or_path=str(f)), "are adapters themselves"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "is incomplete"),
    "damaged weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 20), "cannot be loaded"),
    "a weight too many": (lambda f: weights(f, extra=torch.zeros(2)), "missing or unexpected"),
    "a weight of another shape": (lambda f: weights(f, first=torch.zeros(2, 2)), "cannot be loaded"),
}


def write(file, value):
    file.write_text(json.dumps(value))


def rewrite(folder, **values):
    file = folder / "adapter_config.json"
    write(file, {**json.loads(file.read_text()), **values})


def weights(folder, **values):
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    first = values.pop("first", None)
    save_file({**held, **values, **({next(iter(held)): first} if first is not None else {})}, file)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_do_not_fit_are_one_line(name, tmp_path, llama, tokenizer):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapters")
    assert load_causal_lm(str(tmp_path / "adapters"), tokenizer=tokenizer).peft_config
    change, says = ADAPTERS[name]
    change(tmp_path / "adapters")
    with pytest.raises(InputError, match=says) as stop:
        load_causal_lm(str(tmp_path / "adapters"), tokenizer=tokenizer)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("model", ["llama:hidden=16,layers=1,heads=2", "llama"])
def test_adapters_of_a_new_model_are_saved_with_it(model, tmp_path, llama):
    """By themselves they would be all that is left of the run. Of a model in a folder they are saved alone."""
    pytest.importorskip("peft")
    student = {"model": str(llama) if model == "llama" else model, "peft": {"r": 2, "target_modules": ["q_proj"]}}
    trainer = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.1}
    recipe = {"task": "language_modeling", "method": "sft", "data": {"characters": 20000}, "student": student}
    done = distill({**recipe, "trainer": trainer, "output": str(tmp_path / "run")})
    assert (done.folder / "student" / "adapter_config.json").is_file() == (model == "llama")
    assert evaluate_run(done.folder)["metrics"]["nll"] == pytest.approx(done.metrics["nll"], rel=1e-6)
    if model != "llama":
        plain = transformers.AutoModelForCausalLM.from_pretrained(done.folder / "student")
        assert not any("lora" in name for name in plain.state_dict())


# -- the dtype to compute in ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="half precision is slow on a CPU alone")
def test_half_precision_is_widened_without_a_gpu_and_said(llama, tokenizer):
    transformers.AutoModelForCausalLM.from_pretrained(llama).half().save_pretrained(llama)
    model = load_causal_lm(str(llama), tokenizer=tokenizer)
    assert model.dtype == torch.float32 and "stored in float16 and there is no GPU" in notes_of(model)[0]
    model = load_causal_lm(str(llama), tokenizer=tokenizer, dtype="float16")
    assert model.dtype == torch.float16 and "slower on a CPU than float32" in notes_of(model)[0]


# -- how many tokens a model reads ---------------------------------------------------------------------------------------

FEW = {**SIZES, "max_position_embeddings": 42, "pad_token_id": 1}


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta", "Camembert", "MPNet", "Longformer", "Data2VecText"])
def test_a_model_reads_as_many_tokens_as_it_says(kind):
    """Positions of RoBERTa and its relatives begin behind that of the padding token."""
    body = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**FEW)).eval()
    assert positions(body) == (42 if kind == "Bert" else 40)
    ids = torch.full((1, positions(body)), 7)
    assert body(input_ids=ids).last_hidden_state.shape[1] == ids.shape[1]
    with pytest.raises((IndexError, RuntimeError)):
        body(input_ids=torch.full((1, ids.shape[1] + 1), 7))


def test_texts_beyond_the_positions_of_a_roberta_are_refused_before_they_are_read(tmp_path):
    words = train_encoder_tokenizer(WORDS * 9, 300)
    config = transformers.RobertaConfig(**{**FEW, "vocab_size": len(words)}, num_labels=3)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    load_text_classifier(str(tmp_path), Reading(words, 40), classes=3)
    with pytest.raises(InputError, match=r"reads 40 tokens and data\.max_length is 41"):
        load_text_classifier(str(tmp_path), Reading(words, 41), classes=3)
    load_ranker(str(tmp_path), View(words, 30, 38), {"scorer": "dot"})
    with pytest.raises(InputError, match="reads 40 tokens and the texts may have 39 with 2 special ones"):
        load_ranker(str(tmp_path), View(words, 30, 39), {"scorer": "dot"})


@pytest.fixture(scope="module")
def xlnet():
    return transformers.XLNetConfig(vocab_size=300, d_model=16, n_layer=1, n_head=2, d_inner=32, pad_token_id=0)


def test_a_model_that_says_minus_one_has_no_limit(xlnet, tmp_path):
    words = train_encoder_tokenizer(WORDS * 9, 300)
    body = transformers.XLNetModel(xlnet)
    assert positions(body) is None
    body.save_pretrained(tmp_path)
    rows = load_ranker(str(tmp_path), View(words, 30, 900), {}).eval()
    assert rows.embed(["the cat " * 300], "document").isfinite().all()


def test_a_classifier_that_reads_the_padding_of_a_batch_is_refused(xlnet):
    words, model = train_encoder_tokenizer(WORDS * 9, 300), transformers.XLNetForSequenceClassification(xlnet)
    with pytest.raises(InputError, match="classifies at the last position, which is padding"):
        set_ends("xlnet", model, words)
    model.config.summary_type = "first"
    set_ends("xlnet", model, words)


def test_a_permuted_language_model_is_no_causal_one(xlnet, tmp_path, tokenizer):
    """XLNet has a head over the vocabulary and sees a whole text: its loss would be that of copying."""
    model = transformers.XLNetLMHeadModel(xlnet)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="XLNetLMHeadModel reads later tokens to predict earlier ones"):
        CausalLMAdapter(load_causal_lm(str(tmp_path), tokenizer=tokenizer), 300)


@pytest.mark.parametrize("ends", [True, False])
def test_an_encoder_decoder_classifies_at_an_ending_token_that_its_tokenizer_adds(ends, tmp_path):
    words = train_encoder_tokenizer(WORDS * 9, 300)  # adds [SEP]
    end = words.sep_token_id if ends else words.mask_token_id
    sizes = {"vocab_size": len(words), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    for labels in (1, 3):
        more = {"eos_token_id": end, "decoder_start_token_id": 0, "num_labels": labels}
        transformers.T5ForSequenceClassification(transformers.T5Config(**sizes, **more)).save_pretrained(tmp_path)
        load = {
            1: lambda: load_ranker(str(tmp_path), View(words, 8, 8), {"scorer": "cross"}),
            3: lambda: load_text_classifier(str(tmp_path), Reading(words, 16), classes=3),
        }[labels]
        if ends:
            load()
        else:
            with pytest.raises(InputError, match=r"ending token of a text \(eos_token_id 4\), and its tokenizer adds"):
                load()


# -- prompts of sentence-transformers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        ({"query": "query: ", "document": "the passage "}, None),
        ({"all": "a text "}, "all"),
        ({"passage": "the "}, None),
    ],
)
def test_prompts_of_a_folder_stand_before_queries_and_documents(prompts, default, tmp_path, tokenizer):
    library = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    words = train_encoder_tokenizer(WORDS * 9, 300)
    sizes = {**SIZES, "vocab_size": len(words), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    body = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    settings = {"prompts": {"query": "", "document": "", **prompts}, "default_prompt_name": default}
    plain = View(words, 30, 60)
    save_encoder(Encoder(body, "mean", True), tmp_path, plain)
    write(tmp_path / SETTINGS, {**settings, "similarity_fn_name": "cosine"})
    view = View(words, 30, 60, *prompts_of(str(tmp_path)))
    rows = load_ranker(str(tmp_path), view, {"scale": 1.0})
    model = library.SentenceTransformer(str(tmp_path), device="cpu")
    text = ["the cat sits over the mat"]
    before = {"query": prompts.get("query", prompts.get(default, ""))}
    before["document"] = prompts.get("document", prompts.get("passage", prompts.get(default, "")))
    for side, prompt in before.items():
        wanted = torch.from_numpy(model.encode(text, prompt=prompt))
        torch.testing.assert_close(rows.embed(text, side), wanted, rtol=1e-4, atol=1e-5)
    rows.save(tmp_path / "saved")  # and they leave with the student
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(
        rows.embed(text, "query"), torch.from_numpy(again.encode_query(text)), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        rows.embed(text, "document"), torch.from_numpy(again.encode_document(text)), rtol=1e-4, atol=1e-5
    )


def sentence_folder(folder, words, settings=None, **more):
    """A `sentence-transformers` folder without a Normalize module."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(words), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    body = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    save_encoder(Encoder(body), folder, View(words, 30, 60))
    write(folder / SETTINGS, {"prompts": {}, "default_prompt_name": None, **(settings or {})})
    write(folder / "sentence_bert_config.json", {"max_seq_length": 62, **more})
    return str(folder)


@pytest.mark.parametrize(
    ("similarity", "normalize"), [("cosine", None), ("dot", None), (None, None), ("cosine", False)]
)
def test_a_folder_that_compares_by_cosine_is_scored_by_it(similarity, normalize, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    words = train_encoder_tokenizer(WORDS * 9, 300)
    name = sentence_folder(tmp_path, words, {"similarity_fn_name": similarity})
    rows = load_ranker(name, View(words, 30, 60), {"scale": 1.0, "normalize": normalize}).eval()
    texts = ["the cat sits over the mat", "a dog", "the fox sees the log and the frog"]
    model = library.SentenceTransformer(name, device="cpu")
    if similarity is None or normalize is False:  # the folder does not say, or the recipe says otherwise
        model.similarity_fn_name = "dot"
    wanted = model.similarity(*[model.encode(texts)] * 2)
    queries, documents = rows.embed(texts, "query"), rows.embed(texts, "document")
    torch.testing.assert_close((queries @ documents.T).detach(), wanted, rtol=1e-4, atol=1e-5)
    rows.save(tmp_path / "saved")  # and the student says what it does
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(again.similarity(*[again.encode(texts)] * 2), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"similarity_fn_name": "euclidean"}, "similarity_fn_name is 'euclidean'; understood are cosine, dot"),
        ({"similarity_fn_name": "manhattan"}, "similarity_fn_name is 'manhattan'"),
        ({"truncate_dim": 8}, "truncate_dim is 8, and vectors are compared whole"),
    ],
)
def test_what_a_folder_says_of_its_vectors_is_not_passed_over(settings, says, tmp_path):
    words = train_encoder_tokenizer(WORDS * 9, 300)
    name = sentence_folder(tmp_path, words, settings)
    with pytest.raises(InputError, match=says):
        load_ranker(name, View(words, 30, 60), {})


def test_a_folder_that_lower_cases_its_texts_still_does_so_when_it_is_saved(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(["[PAD]", "the", "cat", "[UNK]"])}, "[UNK]")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
    name = sentence_folder(tmp_path, words, do_lower_case=True)
    rows = load_ranker(name, View(load_tokenizer(name), 30, 60), {"scale": 1.0}).eval()
    wanted = torch.from_numpy(library.SentenceTransformer(name, device="cpu").encode(["The CAT", "the cat"]))
    torch.testing.assert_close(rows.embed(["The CAT", "the cat"], "query").detach(), wanted, rtol=1e-4, atol=1e-5)
    assert not wanted[0].equal(torch.from_numpy(library.SentenceTransformer(name).encode("dog")))
    rows.save(tmp_path / "saved")
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(torch.from_numpy(again.encode(["The CAT", "the cat"])), wanted, rtol=1e-4, atol=1e-5)


def test_prompts_take_no_room_from_the_text(tokenizer):
    view = View(tokenizer, 3, 4, "the cat ", "")
    text = "the dog sits over the log and sees the fox"
    assert (
        len(view.ids(text, "query"))
        == 3 + len(tokenizer("the cat ", add_special_tokens=False)["input_ids"])
        == view.most["query"]
    )
    assert len(view.ids(text, "document")) == 4


def test_a_model_of_the_hub_is_read_as_its_folder(tmp_path, monkeypatch):
    library = pytest.importorskip("sentence_transformers")
    words = train_encoder_tokenizer(WORDS * 9, 300)
    held = tmp_path / "models--me--enc"
    folder = held / "snapshots" / "abc"
    sentence_folder(folder, words, {"prompts": {"query": "the cat "}, "similarity_fn_name": "cosine"})
    edited(folder / "1_Pooling", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    view = view_of("me/enc", words, (30, 55), [])
    assert (view.query_prompt, view.document_prompt) == ("the cat ", "")
    rows = load_ranker("me/enc", view, {"scale": 1.0}).eval()
    plain = library.SentenceTransformer(str(folder), device="cpu")
    texts = ["the cat sits over the mat", "a dog"]
    for side, wanted in (("query", plain.encode_query(texts)), ("document", plain.encode_document(texts))):
        wanted = torch.nn.functional.normalize(torch.from_numpy(wanted), dim=-1)
        torch.testing.assert_close(rows.embed(texts, side).detach(), wanted, rtol=1e-4, atol=1e-5)


def test_texts_are_cut_where_the_folder_cuts_them(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    words = train_encoder_tokenizer(WORDS * 9, 300)
    name = sentence_folder(tmp_path, words, {"prompts": {"query": "the cat ", "document": ""}}, max_seq_length=12)
    notes = []
    view = view_of(name, words, (30, 55), notes)
    assert "reads 12 tokens of a text (max_seq_length)" in notes[0]
    rows = load_ranker(name, view, {"scale": 1.0}).eval()
    text, plain = [" ".join(WORDS * 4)], library.SentenceTransformer(name, device="cpu")
    for side, wanted in (("query", plain.encode_query(text)), ("document", plain.encode_document(text))):
        torch.testing.assert_close(rows.embed(text, side).detach(), torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)
    edited(tmp_path, "sentence_bert_config.json", max_seq_length="many")
    with pytest.raises(InputError, match="max_seq_length is 'many'"):
        view_of(name, words, (30, 55), [])


def test_the_transformer_of_an_older_folder_lies_in_one_of_its_own(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    words = train_encoder_tokenizer(WORDS * 9, 300)
    name, inner = sentence_folder(tmp_path, words), tmp_path / "0_Transformer"
    wanted = torch.from_numpy(library.SentenceTransformer(name, device="cpu").encode(["the cat sits"]))
    inner.mkdir()
    for file in [f for f in tmp_path.iterdir() if f.is_file() and f.name not in ("modules.json", SETTINGS)]:
        file.rename(inner / file.name)
    modules = json.loads((tmp_path / "modules.json").read_text())
    write(tmp_path / "modules.json", [{**m, "path": "0_Transformer"} if not m["idx"] else m for m in modules])
    assert transformer_of(name) == str(inner)
    rows = load_ranker(name, View(load_tokenizer(transformer_of(name)), 30, 60), {"scale": 1.0}).eval()
    torch.testing.assert_close(rows.embed(["the cat sits"], "query").detach(), wanted, rtol=1e-4, atol=1e-5)


# -- the scheduler of a diffusion model ----------------------------------------------------------------------------------


@pytest.fixture
def denoiser(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    rows = load_denoiser("unet:8,8", shape=(1, 8, 8))
    rows.model.save_pretrained(tmp_path / "unet")
    return diffusers, tmp_path


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "LCMScheduler"])
def test_a_scheduler_that_is_not_understood_is_refused_by_name(kind, denoiser):
    diffusers, folder = denoiser
    getattr(diffusers, kind)().save_pretrained(folder / "scheduler")
    with pytest.raises(InputError, match=kind):
        load_denoiser(str(folder))


def test_a_scheduler_is_read_as_its_own_class(denoiser):
    diffusers, folder = denoiser
    diffusers.EulerDiscreteScheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    rows = load_denoiser(str(folder))
    assert isinstance(rows.scheduler, diffusers.EulerDiscreteScheduler) and rows.prediction == "v_prediction"
    edited(folder / "scheduler", "scheduler_config.json", prediction_type="flow_prediction")
    with pytest.raises(InputError, match="flow_prediction"):
        load_denoiser(str(folder))
    edited(folder / "scheduler", "scheduler_config.json", prediction_type="epsilon", beta_start="x")
    with pytest.raises(InputError, match="cannot be made"):
        load_denoiser(str(folder))
    edited(folder / "unet", layers_per_block=2)
    edited(folder / "scheduler", "scheduler_config.json", beta_start=0.001)
    with pytest.raises(InputError, match="no weights for"):
        load_denoiser(str(folder))


# -- image processors ----------------------------------------------------------------------------------------------------

PROCESSORS = {
    "resize, mean and deviation": (transformers.ViTImageProcessor(size={"height": 24, "width": 20}), True),
    "smaller": (transformers.ViTImageProcessor(size={"height": 6, "width": 7}, resample=3), True),
    "nearest": (transformers.ViTImageProcessor(size={"height": 20, "width": 20}, resample=0), True),
    "a crop": (
        transformers.CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
        True,
    ),
    "a share": (transformers.ConvNextImageProcessor(size={"shortest_edge": 16}), True),
    "raw numbers": (transformers.ViTImageProcessor(do_resize=False, do_rescale=False, do_normalize=False), True),
    "steps of its own": (transformers.EfficientNetImageProcessor(size={"height": 20, "width": 20}), False),
    "a filter of its own": (transformers.ViTImageProcessor(size={"height": 24, "width": 24}, resample=1), False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processors_steps_are_those_of_the_library(name):
    held, exact = PROCESSORS[name]
    found = Processor(held, (3, 10, 14), 3)
    assert found.exact is exact
    images = torch.randint(0, 256, (2, 10, 14, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    wanted = held(images=list(images.numpy()), return_tensors="pt")["pixel_values"]
    given = found((images.permute(0, 3, 1, 2).float() / 255).requires_grad_())
    assert given.shape == wanted.shape and given.requires_grad is exact
    unit = float(wanted.abs().max()) / 255
    assert float((given - wanted).abs().mean()) < 2 * unit


@pytest.fixture
def colours(tmp_path):
    """A folder of blue, green and red images."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for c, name in enumerate(("blue", "green", "red")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(12):
                pixels = torch.randint(0, 90, (8, 8, 3), generator=generator, dtype=torch.uint8)
                pixels[:, :, 2 - c] += 60
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return tmp_path / "data"


def test_a_models_own_processor_is_applied_on_its_side(colours, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "teacher"
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**VIT, "image_size": 16, "num_channels": 3}, num_labels=3)
    )
    model.save_pretrained(folder)
    held = transformers.ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.4, 0.2, 0.1], image_std=[0.3] * 3
    )
    held.save_pretrained(folder)
    recipe = make({"method": "sft", "teacher": str(folder), "student": "mlp:8", "data": str(colours)})
    task = get_task("image_classification")
    prepared = task.prepare(recipe)
    rows = task.model(recipe.teacher, prepared)
    pixels = prepared.collate([prepared.test[0], prepared.test[1]])["pixel_values"]
    images = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        wanted = model.eval()(**held(images=list(images), return_tensors="pt")).logits
        found = rows(Batch.from_dict(prepared.collate([prepared.test[0], prepared.test[1]]))).signal.logits
        raw = model(nn.functional.interpolate(pixels, (16, 16))).logits
    assert float((found - wanted).abs().max()) < 0.1 * float((raw - wanted).abs().max())


class Conv(nn.Module):
    """A head that is no linear layer."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(width, 3, 1)

    def forward(self, features):
        return self.conv(features[..., None])[..., 0]


@pytest.mark.parametrize("kind", ["vit", "two heads", "small", "no linear head"])
def test_classes_that_a_model_has_in_another_order_are_put_in_that_of_the_data(kind, colours, tmp_path):
    torch.manual_seed(0)
    own, folder = ["red", "blue", "green"], tmp_path / "teacher"
    config = {**VIT, "num_channels": 3, "id2label": dict(enumerate(own)), "label2id": {n: i for i, n in enumerate(own)}}
    if kind == "small":
        model = build_small("mlp:8", 3, (3, 8, 8))
        model.understudy["labels"] = own
        save_small(model, folder)
    elif kind == "two heads":
        model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**config))
        model.save_pretrained(folder)
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**config))
        model.save_pretrained(folder)
    recipe = make({"method": "sft", "teacher": str(folder), "student": "mlp:8", "data": str(colours)})
    task = get_task("image_classification")
    prepared = task.prepare(recipe)
    if kind == "no linear head":
        model.classifier = Conv(VIT["hidden_size"])
        with pytest.raises(InputError, match=r"numbers the classes otherwise than the data .*no linear layer"):
            task.model(recipe.teacher, prepared, model)
        return
    batch = Batch.from_dict(prepared.collate([prepared.test[0], prepared.test[1]]))
    given = model.eval()(batch.inputs["pixel_values"])
    wanted = (given if kind == "small" else given.logits)[:, [own.index(c) for c in ("blue", "green", "red")]]
    rows = task.model(recipe.teacher, prepared)
    torch.testing.assert_close(rows.eval()(batch).signal.logits, wanted, rtol=1e-4, atol=1e-5)
    assert any("its outputs were put in their order" in note for note in prepared.notes)
    rows.save(tmp_path / "saved")  # and whoever loads it is told that order
    facts = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (facts["labels"] if kind == "small" else facts["id2label"]) in (
        ["blue", "green", "red"],
        {"0": "blue", "1": "green", "2": "red"},
    )


def test_classes_of_other_names_are_said_to_be_taken_in_order(colours, tmp_path):
    model = build_small("mlp:8", 3, (3, 8, 8))
    model.understudy["labels"] = ["cat", "dog", "bird"]
    save_small(model, tmp_path / "teacher")
    recipe = make({"method": "kd", "teacher": str(tmp_path / "teacher"), "student": "mlp:8", "data": str(colours)})
    task = get_task("image_classification")
    prepared = task.prepare(recipe)
    task.model(recipe.teacher, prepared)
    assert "names its classes cat, dog, bird, ..., and the data blue, green, red" in prepared.warnings[0]


def test_numbers_that_are_no_pixels_are_not_scaled_like_pixels(tmp_path):
    torch.manual_seed(0)
    folder, pixels = tmp_path / "teacher", torch.randint(0, 256, (60, 3, 8, 8)).numpy()
    transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**VIT, "num_channels": 3}, num_labels=3)
    ).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    labels = torch.arange(60).numpy() % 3
    task = get_task("image_classification")
    for name, values in (("bytes", pixels.astype("u1")), ("share", pixels / 255), ("wide", pixels * 1.0)):
        np.savez(tmp_path / f"{name}.npz", images=values, labels=labels)
        recipe = make({"method": "kd", "teacher": str(folder), "data": {"name": str(tmp_path / f"{name}.npz")}})
        prepared = task.prepare(recipe)
        if name == "wide":
            with pytest.raises(InputError, match=r"scales pixels in \[0, 1\] by itself, .* floats from 0 to 255"):
                task.model(recipe.teacher, prepared)
        else:
            task.model(recipe.teacher, prepared)


def test_a_module_is_said_to_have_no_processor(colours):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**{**VIT, "num_channels": 3}, num_labels=3))
    recipe = make({"method": "kd", "teacher": "mlp:8", "student": "mlp:8", "data": str(colours)})
    task = get_task("image_classification")
    prepared = task.prepare(recipe)
    task.model(recipe.teacher, prepared, model)
    assert any(
        n.startswith("A module (ViTForImageClassification) comes with no preprocessor_config") for n in prepared.notes
    )


def test_a_saved_student_works_in_a_pipeline(colours, tmp_path):
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**{**VIT, "num_channels": 3}, num_labels=3))
    model.save_pretrained(tmp_path / "new")
    trainer = {"max_steps": 30, "per_device_train_batch_size": 16, "learning_rate": 1e-2}
    found = distill(
        method="sft", student=str(tmp_path / "new"), data=str(colours), trainer=trainer, output=str(tmp_path / "run")
    )
    classify = transformers.pipeline("image-classification", model=str(found.folder / "student"), device="cpu")
    right = 0
    for name in ("blue", "green", "red"):
        answers = classify([str(file) for file in sorted((colours / "test" / name).glob("*.png"))])
        assert {a["label"] for a in answers[0]} == {"blue", "green", "red"}
        right += sum(a[0]["label"] == name for a in answers)
    assert right / 36 == pytest.approx(found.metrics["accuracy"], abs=1e-6)


def test_a_small_student_keeps_its_label_names(colours, tmp_path):
    found = distill(method="sft", student="mlp:4", data=str(colours), trainer=TRAINER, output=str(tmp_path / "run"))
    assert json.loads((found.folder / "student" / "config.json").read_text())["labels"] == ["blue", "green", "red"]


@pytest.mark.parametrize("values", [[], {"size": "large", "image_processor_type": "ViTImageProcessor"}])
def test_a_damaged_processor_is_one_line(values, tmp_path, colours):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**{**VIT, "num_channels": 3}, num_labels=3))
    model.save_pretrained(tmp_path / "model")
    write(tmp_path / "model" / "preprocessor_config.json", values)
    with pytest.raises(InputError, match=r"processor|prepare") as stop:
        distill(method="sft", student=str(tmp_path / "model"), data=str(colours), output=str(tmp_path / "run"))
    assert "\n" not in str(stop.value)


def test_a_model_of_another_size_is_named(tmp_path, colours):
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**VIT, "num_channels": 3, "image_size": 16}, num_labels=3)
    )
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"cannot read images of \[3, 8, 8\]"):
        distill(method="sft", student=str(tmp_path / "model"), data=str(colours), output=str(tmp_path / "run"))


# -- modules of the caller's own -----------------------------------------------------------------------------------------


class Own(nn.Module):
    """A network with one layer under two names."""

    def __init__(self, width=10):
        super().__init__()
        self.first, self.out = nn.Linear(64, width, bias=False), nn.Linear(width, 10)
        self.again = self.out

    def forward(self, pixels):
        return self.out(self.first(pixels.flatten(1)).relu())


class Writes(Own):
    def save_pretrained(self, folder):
        torch.save(self.state_dict(), f"{folder}/mine")

    @classmethod
    def from_pretrained(cls, folder):
        model = cls()
        model.load_state_dict(torch.load(f"{folder}/mine", weights_only=True))
        return model


class Unsaved(Own):
    def get_extra_state(self):
        return {"not": "a tensor"}


@pytest.mark.parametrize("kind", [Own, Writes])
def test_an_own_module_is_saved_and_read_again(kind, tmp_path):
    run = {"method": "sft", "data": DIGITS, "trainer": TRAINER, "output": str(tmp_path / "run")}
    torch.manual_seed(0)
    found = distill(run, student=kind())
    assert found.student.again is found.student.out
    again = distill(run, student=kind())  # a finished run is read, into the module that is handed over
    assert again.metrics == found.metrics
    for name, value in found.student.state_dict().items():
        torch.testing.assert_close(again.student.state_dict()[name], value)


def test_the_state_of_an_own_module_asks_for_the_module(tmp_path):
    run = {"method": "sft", "data": DIGITS, "trainer": TRAINER, "output": str(tmp_path / "run")}
    distill(run, student=Own())
    with pytest.raises(InputError, match="holds the state of your module Own"):
        evaluate_run(tmp_path / "run")
    with pytest.raises(InputError, match="does not hold the state of this Own"):
        distill(run, student=Own(12))


def test_a_module_that_cannot_be_saved_is_refused_before_it_is_trained(tmp_path):
    with pytest.raises(InputError, match="Unsaved cannot be saved"):
        distill(method="sft", data=DIGITS, trainer=TRAINER, output=str(tmp_path / "run"), student=Unsaved())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_module_that_does_not_fit_the_images_is_refused_before_it_is_trained(tmp_path):
    with pytest.raises(InputError, match=r"Linear cannot read images of \[1, 8, 8\]"):
        distill(method="sft", data=DIGITS, trainer=TRAINER, output=str(tmp_path / "run"), student=nn.Linear(3, 3))


def test_a_module_that_is_no_causal_lm_is_refused(tmp_path, texts, llama):
    run = {"task": "language_modeling", "method": "sft", "data": {**texts, "tokenizer": str(llama)}}
    with pytest.raises(InputError, match="Linear is no causal language model"):
        distill(run, student=nn.Linear(3, 3), output=str(tmp_path / "run"))


# -- the shape of what a trained diffusion model makes -------------------------------------------------------------------


def test_boot_takes_its_shape_from_the_teacher(denoiser, tmp_path):
    diffusers, folder = denoiser
    load_denoiser("unet:8,8", shape=(1, 16, 16)).model.save_pretrained(folder / "unet")
    diffusers.DDPMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    run = {"task": "image_generation", "method": "boot", "teacher": str(folder), "options": {"ema": 0}}
    assert make(run).data["name"] == "noise"
    assert make({**run, "data": "digits"}).data["name"] == "digits"
    assert make({"task": "image_generation", "method": "boot", "teacher": "unet:8,8"}).data["name"] == "digits"
    few = {"samples": 4, "teacher_steps": 1, "compare_steps": [1], "size": 8}
    found = distill(run, data=few, trainer=TRAINER, output=str(tmp_path / "run"))
    assert load_denoiser(str(found.folder / "student")).shape == (1, 16, 16)
