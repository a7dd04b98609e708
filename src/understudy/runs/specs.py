"""The specification of one model in a recipe: its name, device, dtype, and how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from understudy.errors import InputError
from understudy.generation.limits import Endpoint
from understudy.teachers.server.scores import Score

SHARDED = "sharded"
"""Device of a teacher whose weights are sharded over all ranks."""


def said_no(values: Any) -> Any:
    """Arguments of Trainer as intended: YAML reads `no` as false, but a strategy (`eval_strategy`) is a word."""
    if not isinstance(values, dict):
        return values
    return {k: "no" if v is False and str(k).endswith("_strategy") else v for k, v in values.items()}


class ModelSpec(BaseModel):
    """A model: a name, folder or Hub id, and how to load it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(description="Folder, Hub id, or a new small model such as `llama:hidden=64,layers=2,heads=4`.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Of the weights as loaded.")
    device: str | None = Field(
        None,
        description="Where a teacher lives: cpu, cuda:1, or `sharded` over the ranks; the student's device if not given.",
    )
    quantization: dict[str, Any] | None = Field(None, description="A quantisation config of transformers.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    tokenizer: str | None = Field(None, description="Folder or Hub id, where the model's own does not hold it.")
    peft: dict[str, Any] | None = Field(None, description="LoraConfig options; the student trains adapters only.")
    cache: str | None = Field(None, description="Folder of `understudy cache`: answer from it, without the model.")
    options: dict[str, Any] | None = Field(None, description="What the task's own models take.")
    train: dict[str, Any] | None = Field(
        None, description="Train this model first on the task's labels, with these trainer options."
    )
    endpoint: Endpoint | None = Field(
        None, description="An OpenAI-compatible server that writes, or scores tokens; `model` is its name."
    )
    score: str | None = Field(
        None, description="Scores of each token requested from a teacher behind an endpoint: top_k:N, ids:N or sampled."
    )

    members: dict[str, ModelSpec] | None = Field(None, description="Several teachers in one, by name.")
    weights: dict[str, float] | None = Field(None, description="Of the members in their mixture; equal if not given.")
    mix: Literal["probabilities", "logits"] = Field("probabilities", description="What of the members is averaged.")
    route: str | None = Field(None, description="A column of the data that names the member for each example.")

    @model_validator(mode="after")
    def _can_be_sharded(self) -> Self:
        if self.device == SHARDED and self.quantization is not None:
            raise ValueError("quantised weights cannot be sharded: leave device or quantization out")
        if self.device is not None and self.device != SHARDED:
            try:
                torch.device(self.device)
            except RuntimeError:
                raise ValueError(f"device {self.device!r} is not cpu, cuda:N or {SHARDED}") from None
        return self

    @model_validator(mode="before")
    @classmethod
    def _of_members(cls, values: Any) -> Any:
        members = values.get("members") if isinstance(values, dict) else None
        if not isinstance(members, dict) or not members:
            return values
        named = {n: {"model": m} if isinstance(m, str) else m for n, m in members.items()}
        return {"model": " + ".join(map(str, members)), **values, "members": named}

    def parts(self, where: str) -> dict[str, ModelSpec]:
        """The models of this specification by their place in the recipe: itself, or its members."""
        if not self.members:
            return {where: self}
        return {f"{where}.members.{name}": member for name, member in self.members.items()}

    @field_validator("train", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return said_no(value)

    @field_validator("endpoint", mode="before")
    @classmethod
    def _url_alone(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, (str, list)) else value

    @field_validator("score")
    @classmethod
    def _a_score(cls, value: str | None) -> str | None:
        return str(Score.parse(value)) if value is not None else None

    @model_validator(mode="after")
    def _score_of_a_server(self) -> Self:
        if self.score is not None and self.endpoint is None:
            raise ValueError("score is requested from a server: name it with endpoint, or leave score out")
        if self.score is not None and self.endpoint is not None and not isinstance(self.endpoint.url, str):
            raise ValueError("score is requested from one server: give endpoint.url one address, or leave score out")
        if self.score is not None and self.train is not None:
            raise ValueError("a model behind an endpoint is not trained here: leave train or score out")
        return self

    @property
    def served(self) -> bool:
        """Whether a server scores tokens instead of a model here."""
        return self.score is not None and self.cache is None


class OracleSpec(ModelSpec):
    """A stronger model that nothing is learned from: it tells how far the student is from the truth."""

    prompts: int = Field(
        256, ge=1, description="Held-out prompts at most, of each split, that oracle and teacher continue."
    )
    max_new_tokens: int = Field(128, ge=1, description="Tokens of a continuation at most.")

    @model_validator(mode="after")
    def _runs_here(self) -> Self:
        for key in ("cache", "train", "endpoint", "score", "members", "peft"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key}: an oracle is one model that is trained already and runs here: leave it out")
        return self


def take_unnamed(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take out of a recipe what it says of a teacher or student whose model it does not name, in place; by side."""
    sides = {s: values[s] for s in ("teacher", "student") if isinstance(values.get(s), Mapping)}
    naming = {"model", "endpoint", "members"}
    return {side: dict(values.pop(side)) for side, said in sides.items() if said and not naming & said.keys()}


def add_unnamed(values: dict[str, Any], unnamed: Mapping[str, dict[str, Any]]) -> None:
    """Add it to the task's own models, in place: `teacher.cache=FOLDER` alone is a cache of the task's own teacher.

    Raises:
        InputError: the task or its method has none.
    """
    for side, said in unnamed.items():
        if values.get(side) is None:
            raise InputError(f"{side}.{next(iter(said))} is of no model: the recipe has no {side}. Name {side}.model.")
        own = values[side]  # by its name alone, or a mapping
        values[side] = {**({"model": own} if isinstance(own, str) else own), **said}
