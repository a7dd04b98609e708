"""Policies of the preference worlds: small modules that score candidates, and their rows."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from understudy.data import Batch, ListBatch
from understudy.data.worlds import Chains, ChoiceBatch
from understudy.errors import InputError
from understudy.models.adapters import ModelAdapter, ModelOutput
from understudy.models.small import load_weights
from understudy.models.weights import read_object, reason
from understudy.targets import Dense, Scores


class _Saved(nn.Module):
    """A module that writes `config.json` with its name, and its weights."""

    name: str

    def save_pretrained(self, folder: str) -> None:
        """Write `config.json` and `model.safetensors`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, f"{folder}/model.safetensors")
        Path(folder, "config.json").write_text(json.dumps({"policy": self.name}))


class ChoicePolicy(_Saved):
    """`policy:64,64`: an MLP that scores each item by its features."""

    def __init__(self, name: str, inputs: int) -> None:
        super().__init__()
        self.name = name
        widths = [inputs, *(int(v) for v in name.partition(":")[2].split(","))]
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.body(features).squeeze(-1)


class Bigram(_Saved):
    """`bigram:16`: logits of the next token from the last one alone, of the given rank."""

    def __init__(self, name: str, tokens: int) -> None:
        super().__init__()
        self.name = name
        rank = int(name.partition(":")[2] or 16)
        self.into, self.out = nn.Embedding(tokens, rank), nn.Linear(rank, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.log_softmax(self.out(self.into(ids)).float(), -1)


class ChoiceAdapter(ModelAdapter):
    """Answers with `Scores`: the log-probability with which the policy picks each item."""

    def __init__(self, model: ChoicePolicy) -> None:
        super().__init__()
        self.model, self.padding = model, 0

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        assert isinstance(batch, ChoiceBatch)
        scores = self.model(batch.features.to(next(self.model.parameters()).dtype))
        log_p = torch.log_softmax(scores.masked_fill(~batch.candidates, -torch.inf), -1)
        return ModelOutput(Scores(log_p.masked_fill(~batch.candidates, 0.0), batch.candidates))


class BigramAdapter(ModelAdapter):
    """Answers with `Scores`: the log-probability of each candidate's transitions, and of each of them alone. Features are
    the embeddings of the tokens before them, `[tokens, rank]`.

    Args:
        world: the chains that judge it.
    """

    def __init__(self, model: Bigram, world: Chains | None = None) -> None:
        super().__init__()
        self.model, self.padding, self.world = model, 0, world

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        assert isinstance(batch, ListBatch)
        tokens = batch.tokens
        read = batch.inputs["input_ids"][:, :-1][tokens.mask]
        log_p = self.model(read)
        values = log_p.gather(-1, tokens.row_labels[:, None])[:, 0]
        found = Scores(batch.sum_tokens(values), batch.candidates, values, Dense(log_p))
        return ModelOutput(found, self.model.into(read) if features else None)


def exact_policy(name: str, log_p: Tensor) -> Bigram:
    """A bigram of full rank with these log-probabilities `[tokens, tokens]`."""
    model = Bigram(name, len(log_p))
    with torch.no_grad():
        model.into.weight.copy_(torch.eye(len(log_p)))
        model.out.weight.copy_(log_p.T)
        model.out.bias.zero_()
    return model


def load_policy(name: str, source: Path | nn.Module | None, size: int, world: Chains | None = None) -> ModelAdapter:
    """Rows of a policy by its name, from a folder, or around a module; `size` is the feature width or token count.

    Of chains there are two policies that nobody trains: `reference`, which samples its sequences, and `soft_optimal`.
    """
    if isinstance(source, nn.Module):
        model = source
    else:
        if source is not None:
            name = str(read_object(source / "config.json").get("policy"))
        if world is not None and source is None and name in ("reference", "soft_optimal"):
            log_p = world.log_p if name == "reference" else world.soft_optimal()
            return BigramAdapter(exact_policy(f"bigram:{len(log_p)}", log_p), world)
        kinds = {"policy": ChoicePolicy, "bigram": Bigram}
        kind = kinds.get(name.partition(":")[0])
        if kind is None:
            raise InputError(
                f"Model {name!r} is no policy of these worlds: give policy:64,64 (bandit), bigram:16, reference or "
                "soft_optimal (chains)."
            )
        try:
            model = kind(name, size)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise InputError(f"Model {name!r} cannot be made: {reason(error)}") from None
        if source is not None:
            load_weights(model, source / "model.safetensors")
    if isinstance(model, Bigram):
        return BigramAdapter(model, world)
    if isinstance(model, ChoicePolicy):
        return ChoiceAdapter(model)
    raise InputError(f"{type(model).__name__} is no policy of these worlds: give a ChoicePolicy or a Bigram.")
