"""Text encoders: any Auto encoder, a `sentence-transformers` folder, or the mean of word embeddings.

An encoder is saved as a `sentence-transformers` folder, so that `SentenceTransformer(folder)` loads it. The format is a
few JSON files beside the weights, so neither reading nor writing needs that library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerBase

from understudy.data.folders import find
from understudy.data.retrieval_batches import View
from understudy.errors import InputError
from understudy.models.loading import auto_model
from understudy.models.positions import positions
from understudy.models.sentence_folders import MODULES, SETTINGS, is_new_encoder
from understudy.models.small import load_weights
from understudy.models.weights import read_object, reason, write_model

POOLINGS = ("mean", "cls")
SIMILARITIES = ("cosine", "dot")
ACTIVATIONS = {kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid)}
"""What a `Dense` module may apply, by the last part of its name."""


class Static(nn.Module):
    """One vector per token, without context: `sentence-transformers`' StaticEmbedding."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.embedding(ids)


class Dense(nn.Module):
    """A linear map of a text's vector with an activation: `sentence-transformers`' Dense."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, activation: str = "Identity") -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(inputs, outputs, bias), ACTIVATIONS[activation]()

    def forward(self, vectors: Tensor) -> Tensor:
        return self.activation(self.linear(vectors))


class Encoder(nn.Module):
    """Token vectors, and one vector per text.

    Args:
        body: `Static`, or an encoder of transformers.
        pooling: `mean` or `cls`.
        normalize: scale vectors to length 1.
        dense: maps of a text's vector, before it is scaled.
    """

    def __init__(
        self, body: nn.Module, pooling: str = "mean", normalize: bool = False, dense: Sequence[Dense] = ()
    ) -> None:
        super().__init__()
        self.body, self.pooling, self.normalize = body, pooling, normalize
        self.dense = nn.Sequential(*dense)
        self.special = not isinstance(body, Static)

    @property
    def maps(self) -> list[Dense]:
        """Its maps of a text's vector, in order."""
        return [layer for layer in self.dense if isinstance(layer, Dense)]

    @property
    def width(self) -> int:
        """Of a text's vector."""
        if self.maps:
            return self.maps[-1].linear.out_features
        body: Any = self.body
        return int(body.embedding.embedding_dim if isinstance(body, Static) else body.config.hidden_size)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`[texts, tokens, width]`."""
        if isinstance(self.body, Static):
            return self.body(ids, mask)
        return self.body(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """`[texts, width]`: of the first token's vector, or the mean over tokens, which is zeros for a text without any."""
        if self.pooling == "cls":
            return self.scaled(self.dense(tokens[:, 0]))
        weights = mask[:, :, None].to(tokens.dtype)
        return self.scaled(self.dense((tokens * weights).sum(1) / weights.sum(1).clamp(min=1)))

    def scaled(self, vectors: Tensor) -> Tensor:
        """Vectors of length 1, if the encoder normalises."""
        return F.normalize(vectors, dim=-1) if self.normalize else vectors


def load_encoder(name: str, view: View, options: Mapping[str, Any], dtype: str, trust_remote_code: bool) -> Encoder:
    """An encoder: new, a `sentence-transformers` folder with its pooling and similarity, or any Auto encoder."""
    folder = find(name)
    found = _modules(folder) | _comparison(folder) if folder is not None else {}
    pooling, normalize = options.get("pooling", found.get("pooling", "mean")), options.get("normalize")
    if pooling not in POOLINGS:
        raise InputError(f"options.pooling is {pooling!r}; known: {', '.join(POOLINGS)}.")
    normalize = found.get("normalize", False) if normalize is None else bool(normalize)
    if name.startswith("embedding") and is_new_encoder(name):
        width = name.partition(":")[2] or "24"
        if not width.isdigit() or not int(width):
            raise InputError(f"{name!r}: the width must be a whole number, for example embedding:24.")
        body: nn.Module = Static(len(view.tokenizer), int(width))
    elif found.get("static"):
        assert folder is not None
        body = _load_static(folder)
    elif is_new_encoder(name):
        body = AutoModel.from_config(bert_config(name, view.tokenizer), add_pooling_layer=False)
    else:
        part = folder / found.get("transformer", "") if folder is not None else None
        body = auto_model(AutoModel, name, part, dtype, None, trust_remote_code, new_head=True)
    if isinstance(getattr(body, "pooler", None), nn.Module):
        # It is not used here, and if a folder has none its weights would be random at each loading.
        body.pooler = None  # type: ignore[assignment]
    dense = [_load_dense(folder / path) for path in found.get("dense", ())] if folder is not None else []
    encoder = Encoder(body, pooling, normalize, dense)
    encoder.dense.to(next(body.parameters()).dtype)
    check_fit(name, encoder.body, view, pair=False)
    _try(name, encoder.eval())
    return encoder


def load_cross(name: str, view: View, dtype: str, trust_remote_code: bool, quantization: Any = None) -> nn.Module:
    """A classifier with one logit, from any Auto encoder (with a new head) or classifier."""
    if name.startswith("embedding"):
        raise InputError(f"{name!r} has no context, so it cannot compare a pair: use bert:... or a pretrained encoder.")
    if is_new_encoder(name):
        config = bert_config(name, view.tokenizer)
        config.num_labels = 1
        model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    else:
        folder = find(name)
        if folder is not None and _modules(folder).get("static"):
            raise InputError(f"{name!r} is a static embedding and cannot compare a pair.")
        kind = AutoModelForSequenceClassification
        model = auto_model(kind, name, folder, dtype, quantization, trust_remote_code, new_head=True, num_labels=1)
    check_fit(name, model, view, pair=True)
    set_ends(name, model, view.tokenizer)
    pair = torch.tensor(view.tokenizer("a", "a")["input_ids"])
    _try(name, lambda ids, mask: model(input_ids=ids, attention_mask=mask.long()).logits, pair)
    return model


def set_ends(name: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a classifier the token by which it finds the end of each text of a batch: what pads them, for a decoder. Refuse
    an encoder-decoder, which classifies at the ending token, if its tokenizer adds none, and what reads padding (XLNet)."""
    config = model.config
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if hasattr(model, "sequence_summary") and getattr(config, "summary_type", None) == "last":
        raise InputError(
            f"{name} classifies at the last position, which is padding in a batch, for texts are padded on the right here. Name a "
            "model that classifies at the first one, or at the end of the text."
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if getattr(config, "is_encoder_decoder", False) and not set(ends) & set(tokenizer("a")["input_ids"]):
        raise InputError(
            f"{name} classifies at the ending token of a text (eos_token_id {ends[0]}), and its tokenizer adds none. Save it "
            "with one that does, or name that one."
        )


@torch.no_grad()
def _try(name: str, model: Callable[[Tensor, Tensor], Tensor], ids: Tensor | None = None) -> None:
    """Run on one short text: settings that contradict each other only show there."""
    ids = (torch.arange(4) if ids is None else ids)[None]
    try:
        model(ids, torch.ones_like(ids, dtype=torch.bool))
    except Exception as error:  # models raise any type on inputs that they do not support
        raise InputError(f"{name} cannot read a text of {ids.shape[1]} tokens: {reason(error)}") from error


def check_fit(name: str, model: nn.Module, view: View, *, pair: bool) -> None:
    """Raise an error for texts longer than the model's positions, or a tokenizer with more tokens than the embeddings."""
    config = getattr(model, "config", None)
    before, after, *of_pair = view.template
    special = sum(map(len, of_pair)) if pair else len(before) + len(after)
    texts = sum(view.most.values()) if pair else max(view.most.values())
    limit = min(positions(model) or 10**9, view.tokenizer.model_max_length)
    if config is not None and texts + special > limit:
        raise InputError(
            f"{name} reads {limit} tokens and the texts may have {texts} with {special} special ones. Lower "
            "data.query_length or data.document_length."
        )
    size = getattr(config, "vocab_size", None) or (
        model.embedding.num_embeddings if isinstance(model, Static) else None
    )
    if size is not None and size < len(view.tokenizer):
        raise InputError(
            f"{name} has {size} token embeddings and its tokenizer {len(view.tokenizer)} tokens. Use the model's own tokenizer."
        )


def bert_config(name: str, tokenizer: PreTrainedTokenizerBase) -> BertConfig:
    """That of a new BERT: `bert:hidden=64,layers=2,heads=4,context=512`."""
    values = {"hidden": 64, "layers": 2, "heads": 4, "context": 512}
    for item in filter(None, name.partition(":")[2].split(",")):
        key, _, value = item.partition("=")
        if key not in values or not value.isdigit():
            raise InputError(f"{name!r}: {item!r} is not one of {', '.join(f'{k}=N' for k in values)}.")
        values[key] = int(value)
    if values["hidden"] % values["heads"]:
        raise InputError(f"{name!r}: hidden must be a multiple of heads.")
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=values["hidden"],
        intermediate_size=4 * values["hidden"],
        num_hidden_layers=values["layers"],
        num_attention_heads=values["heads"],
        max_position_embeddings=values["context"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )


def _modules(folder: Path) -> dict[str, Any]:
    """What follows the transformer in a `sentence-transformers` folder; empty for any other."""
    file = folder / MODULES
    if not file.is_file():
        return {}
    found: dict[str, Any] = {}
    try:
        for module in json.loads(file.read_text(encoding="utf-8")):
            kind = module["type"].rsplit(".", 1)[-1]
            if found.get("normalize"):
                raise InputError(
                    f"{folder} has a {kind} module after Normalize, which is understood as the last one alone."
                )
            if kind == "Pooling":
                found["pooling"] = _pooling(read_object(folder / module["path"] / "config.json"), folder)
            elif kind == "Normalize":
                found["normalize"] = True
            elif kind == "StaticEmbedding":
                found |= {"static": True, "path": module["path"]}
            elif kind == "Dense":
                found["dense"] = [*found.get("dense", ()), module["path"]]
            elif kind == "Transformer":
                found["transformer"] = module["path"]
            else:
                raise InputError(
                    f"{folder} has a {kind} module; understood are Transformer, Pooling, Dense and Normalize."
                )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder} is not a whole sentence-transformers folder: {reason(error)}") from error
    return found


def _comparison(folder: Path) -> dict[str, Any]:
    """Normalisation of a `sentence-transformers` folder that compares vectors by their angle; a folder that does not say
    how it compares them is read as its modules are."""
    file = folder / SETTINGS
    facts = read_object(file) if file.is_file() else {}
    similarity, kept = facts.get("similarity_fn_name"), facts.get("truncate_dim")
    if similarity not in (None, *SIMILARITIES):
        raise InputError(
            f"{file}: similarity_fn_name is {similarity!r}; understood are {', '.join(SIMILARITIES)}. Scores are products of "
            "vectors here: set one of these, or name another model."
        )
    if kept is not None:
        raise InputError(
            f"{file}: truncate_dim is {kept!r}, and vectors are compared whole here: remove it, or name another model."
        )
    return {"normalize": True} if similarity == "cosine" else {}


def _pooling(config: Mapping[str, Any], folder: Path) -> str:
    mode = config.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode or [])
    if not modes:
        names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
        modes = [names.get(k, k) for k, v in config.items() if k.startswith("pooling_mode_") and v]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise InputError(f"{folder} pools by {', '.join(modes) or 'nothing'}; understood are {', '.join(POOLINGS)}.")
    return str(modes[0])


def _load_static(folder: Path) -> Static:
    from safetensors import safe_open

    weights = folder / _modules(folder)["path"] / "model.safetensors"
    try:
        with safe_open(str(weights), "pt") as file:
            shape = file.get_slice("embedding.weight").get_shape()
    except Exception as error:  # safetensors raises its own types
        raise InputError(f"Weights {weights} cannot be read: {reason(error)}") from error
    if len(shape) != 2:
        raise InputError(f"Weights {weights}: embedding.weight has shape {shape}, not one row of numbers a token.")
    body = Static(*shape)
    load_weights(body, weights)
    return body


def _load_dense(folder: Path) -> Dense:
    facts = read_object(folder / "config.json")
    sizes: list[Any] = [facts.get(key) for key in ("in_features", "out_features")]
    name = str(facts.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    named = facts.get("module_input_name", "sentence_embedding")
    if not all(isinstance(size, int) and size > 0 for size in sizes) or named != "sentence_embedding":
        raise InputError(
            f"{folder}: a Dense module maps a text's vector, by in_features and out_features. It says {facts}."
        )
    if name not in ACTIVATIONS:
        raise InputError(f"{folder}: activation_function is {name}; understood are {', '.join(ACTIVATIONS)}.")
    found = Dense(sizes[0], sizes[1], bool(facts.get("bias", True)), name)
    load_weights(found, folder / "model.safetensors")
    return found


def _save_dense(dense: Dense, folder: Path) -> None:
    write_model(dense, folder)
    linear, kind = dense.linear, type(dense.activation)
    facts: dict[str, Any] = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
    }
    facts["activation_function"] = f"{kind.__module__}.{kind.__name__}"
    (folder / "config.json").write_text(json.dumps(facts, indent=1))


def save_encoder(encoder: Encoder, folder: Path, view: View) -> None:
    """Write a `sentence-transformers` folder: the transformer at its root, what follows it beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    view.tokenizer.save_pretrained(str(folder))
    if isinstance(encoder.body, Static):
        write_model(encoder.body, folder)
        kinds = [("StaticEmbedding", "")]
    else:
        encoder.body.save_pretrained(str(folder))  # type: ignore[operator]
        template = view.template
        length = max(view.most.values()) + len(template[0]) + len(template[1])
        (folder / "sentence_bert_config.json").write_text(
            json.dumps({"max_seq_length": length, "do_lower_case": False})
        )
        width = encoder.body.config.hidden_size  # type: ignore[union-attr]
        config = {
            "word_embedding_dimension": width,
            **{
                f"pooling_mode_{k}": k.startswith(encoder.pooling)
                for k in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
            },
        }
        config["pooling_mode_mean_sqrt_len_tokens"] = False
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(config, indent=1))
        kinds = [("Transformer", ""), ("Pooling", "1_Pooling")]
    for dense in encoder.maps:
        path = f"{len(kinds)}_Dense"
        (folder / path).mkdir(exist_ok=True)
        _save_dense(dense, folder / path)
        kinds.append(("Dense", path))
    if encoder.normalize:
        (folder / f"{len(kinds)}_Normalize").mkdir(exist_ok=True)
        kinds.append(("Normalize", f"{len(kinds)}_Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    (folder / MODULES).write_text(json.dumps(modules, indent=1))
    similarity = "cosine" if encoder.normalize else "dot"
    prompts = {"query": view.query_prompt, "document": view.document_prompt}
    facts = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": similarity}
    (folder / SETTINGS).write_text(json.dumps(facts))
