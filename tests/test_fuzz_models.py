"""Model folders with damage of every kind: they load, or one line says what is wrong; nothing else comes out."""

import json
import random
import shutil

import pytest
import torch
import transformers

from understudy.data import train_tokenizer
from understudy.data.retrieval_batches import View, train_encoder_tokenizer
from understudy.errors import InputError
from understudy.models import CausalLMAdapter, ClassifierAdapter, load_causal_lm, load_classifier, load_tokenizer
from understudy.models.denoisers import load_denoiser
from understudy.models.encoders import Encoder, Static, save_encoder
from understudy.models.processors import Processor, load_processor, plain_processor
from understudy.models.ranker_loading import load_ranker
from understudy.models.sentence_folders import prompts_of
from understudy.models.small import build_small, normalisation, save_small
from understudy.synthetic.bandit import ChoicePolicy
from understudy.synthetic.policies import load_policy

WORDS = ["the cat sits over the mat and sees the dog"] * 9
SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "pad_token_id": 0,
}
VALUES = [None, "x", -1, 0, [], {}, 1.5, True, "", [1, "x"], 10**12]


def causal(folder):
    tokenizer = load_tokenizer(str(folder))
    return CausalLMAdapter(load_causal_lm(str(folder), tokenizer=tokenizer), len(tokenizer), "auto")


def adapters(folder):
    tokenizer = load_tokenizer(str(folder.parent / "causal"))
    return CausalLMAdapter(load_causal_lm(str(folder), tokenizer=tokenizer), len(tokenizer), "auto")


def image(folder):
    model = load_classifier(str(folder), classes=3, input_shape=(3, 8, 8))
    held = load_processor(str(folder), folder) or plain_processor((3, 8, 8))
    processor = Processor(held, (3, 8, 8), 3) if hasattr(model, "config") else None
    ClassifierAdapter(model, 3, normalise=normalisation(model), processor=processor).try_on((3, 8, 8))


def ranker(folder):
    view = View(load_tokenizer(str(folder)), 8, 8, *prompts_of(str(folder)))
    load_ranker(str(folder), view, {}).embed(["the cat"], "query")


def denoiser(folder):
    load_denoiser(str(folder))


def policy(folder):
    load_policy(ChoicePolicy, "policy:4", folder, 3)


KINDS = {
    "causal": causal,
    "adapters": adapters,
    "image": image,
    "small": image,
    "ranker": ranker,
    "static": ranker,
    "denoiser": denoiser,
    "points": denoiser,
    "policy": policy,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One whole folder of each kind."""
    peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("models")
    tokenizer, words = train_tokenizer(WORDS, 300), train_encoder_tokenizer(WORDS, 300)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.save_pretrained(home / "causal")
    tokenizer.save_pretrained(home / "causal")
    base = load_causal_lm(str(home / "causal"), tokenizer=tokenizer)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(home / "adapters")
    body = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "pad_token_id")}
    vision = transformers.ViTConfig(**body, image_size=16, patch_size=8, num_labels=3)
    transformers.ViTForImageClassification(vision).save_pretrained(home / "image")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(home / "image")
    save_small(build_small("resnet8:4", 3, (3, 8, 8)), home / "small")
    view = View(words, 8, 8, "the ", "")
    bert = transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False)
    save_encoder(Encoder(bert, "mean", True), home / "ranker", view)
    save_encoder(Encoder(Static(len(words), 4)), home / "static", view)
    rows = load_denoiser("unet:8", shape=(1, 8, 8))
    rows.scheduler = diffusers.DDIMScheduler()
    rows.save(home / "denoiser")
    load_denoiser("denoiser:4", shape=(2,)).save(home / "points")
    ChoicePolicy("policy:4", 3).save_pretrained(str(home / "policy"))
    for kind, load in KINDS.items():
        load(home / kind)  # as it is, each is right
    return home


def damages(folder, kind):
    """`(name, change)` of everything that is done to a folder; a change is called with the copy's folder."""
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "README.md"):
        name, content = str(file.relative_to(folder)), file.read_bytes()

        def put(data, name=name):
            return lambda copy: (copy / name).write_bytes(data)

        yield f"{name} gone", lambda copy, name=name: (copy / name).unlink()
        cuts = {0, 4, 8, 20, len(content) // 2, len(content) - 1}
        for cut in sorted(c for c in cuts if c < len(content)):
            yield f"{name} cut at {cut}", put(content[:cut])
        yield f"{name} binary", put(bytes(range(256)))
        if file.suffix == ".safetensors":
            length = int.from_bytes(content[:8], "little")
            yield f"{name} with a long header", put((2**62).to_bytes(8, "little") + content[8:])
            draw = random.Random(f"{kind} {name}")
            for place in sorted(draw.sample(range(8 + length), min(24, length))):
                flipped = bytearray(content)
                flipped[place] ^= 1 << draw.randrange(8)
                yield f"{name} with byte {place} flipped", put(bytes(flipped))
        if file.suffix == ".json":
            for value in ([], 3, "x", None, {}):
                yield f"{name} is {value!r}", put(json.dumps(value).encode())
            yield f"{name} nested without end", put(b"[" * 5000 + b"]" * 5000)
            held = json.loads(content)
            if name in ("tokenizer.json", "README.md") or not isinstance(held, dict):
                continue
            for key in held:
                yield f"{name} without {key}", put(json.dumps({k: v for k, v in held.items() if k != key}).encode())
                for value in VALUES:
                    if "layers" in key and value == 10**12:  # so many are built one by one, for hours
                        continue
                    yield f"{name}: {key} is {value!r}", put(json.dumps({**held, key: value}).encode())


def tried(kind, folders, tmp_path, damages):
    """What came out of each damage beside a model or one line."""
    wrong = []
    for name, change in damages:
        copy = shutil.copytree(folders / kind, tmp_path / kind)
        change(copy)
        try:
            KINDS[kind](copy)
        except InputError as error:
            if "\n" in str(error) or not str(error):
                wrong.append(f"{name}: {str(error)!r}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
        shutil.rmtree(copy)
    return wrong


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_folders_load_or_are_one_line(kind, folders, tmp_path):
    if kind == "adapters":
        shutil.copytree(folders / "causal", tmp_path / "causal")
    found = list(damages(folders / kind, kind))
    chosen = random.Random(kind).sample(found, min(16, len(found)))
    assert not tried(kind, folders, tmp_path, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_loads_or_is_one_line(kind, folders, tmp_path):
    if kind == "adapters":
        shutil.copytree(folders / "causal", tmp_path / "causal")
    assert not tried(kind, folders, tmp_path, damages(folders / kind, kind))
