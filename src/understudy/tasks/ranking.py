"""Ranking: order documents for a query. Embedded: a synthetic world; also files of scored triples, folders with
relevance grades."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from understudy.data import Batch, find
from understudy.data.judgements import is_judged
from understudy.data.retrieval_batches import RankingBatch, RankingCollator, View, train_encoder_tokenizer
from understudy.data.retrieval_sources import RankingSplits, load_rankings
from understudy.errors import InputError
from understudy.evaluation.ranking import evaluate_ranking
from understudy.models import ModelAdapter, load_tokenizer, tokenizer_hashes
from understudy.models.ranker_loading import OPTIONS, load_ranker
from understudy.models.rankers import BiEncoderAdapter, RankerEnsemble
from understudy.models.sentence_folders import is_new_encoder, transformer_of, view_of
from understudy.models.weights import notes_of
from understudy.synthetic import retrieval
from understudy.tasks.base import MODULE, Prepared, TaskDefaults, merged

_WORLD = {"max_steps": 2500, "per_device_train_batch_size": 64, "learning_rate": 3e-3}
_REAL = {"max_steps": 1000, "per_device_train_batch_size": 32, "learning_rate": 2e-5}
_TEACHER = {"max_steps": 600, "per_device_train_batch_size": 16, "learning_rate": 5e-4}
_TRAINER = {"lr_scheduler_type": "constant", "weight_decay": 0.0}


class _RankingData(Prepared):
    """With the tokenized view of each model, by its name."""

    views: dict[str, View]


class Ranking(TaskDefaults):
    """Order the documents of a query."""

    name = "ranking"
    kind = "ranking"
    unit = "queries"
    metric = "ndcg_10"
    higher_is_better = True
    model_options = frozenset(OPTIONS)

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Default: the synthetic world with its recorded teacher; on a folder with relevance grades a cross-encoder is
        trained first."""
        data = recipe.get("data") or {}
        data.setdefault("name", "world")
        small = data["name"] == "world"
        data.setdefault("query_length", 30)
        data.setdefault("document_length", 200)
        recipe["data"] = data
        path = None if small else find(str(data["name"]))
        if recipe.get("teacher") is None and path is not None and is_judged(path):
            cross = {"scorer": "cross"}
            recipe["teacher"] = {"model": "bert:hidden=64,layers=2,heads=4", "options": cross, "train": dict(_TEACHER)}
        if recipe.get("student") is None:
            recipe["student"] = {"model": "embedding:24" if small else "bert:hidden=64,layers=2,heads=4"}
        new = is_new_encoder(recipe["student"]["model"])
        trainer = merged(_TRAINER, _WORLD if small else _REAL)
        if new and not small:  # untrained encoders need larger steps
            trainer["learning_rate"] = 1e-3
        recipe["trainer"] = merged(trainer, recipe.get("trainer") or {})
        return recipe

    def prepare(self, recipe: Any) -> Prepared:
        data = dict(recipe.data)
        lengths = data.pop("query_length"), data.pop("document_length")
        for key, length in zip(("query_length", "document_length"), lengths, strict=True):
            if not isinstance(length, int) or length < 1:
                raise InputError(f"data.{key} is {length!r} and must be a whole number of at least 1.")
        vocabulary, own = data.pop("vocab_size", 4000), data.pop("tokenizer", None)
        splits = load_rankings(data, {"world": retrieval.embedded})
        views: dict[str, View] = {}
        trained: list[PreTrainedTokenizerBase] = []
        said: list[str] = []
        for spec in (recipe.student, recipe.teacher):
            for name in _names(spec):
                tokenizer = self._tokenizer(spec, name, own, splits, vocabulary, trained)
                views[name] = view_of(name, tokenizer, lengths, said)
        mine = views[recipe.student.model]
        same = {view.key: view for view in reversed(views.values())}
        prepared = _RankingData(
            train=splits.train,
            validation=splits.validation,
            test=splits.test,
            teacher_train=splits.train,
            collate=RankingCollator(list(same.values())),
            classes=0,
            tokenizer=mine.tokenizer,
            notes=[*splits.notes, *said],
            hashes={"data": splits.hash, **tokenizer_hashes(mine.tokenizer)},
            show=lambda batch: show_ranking(batch, mine),
        )
        prepared.views = {name: same[view.key] for name, view in views.items()}
        return prepared

    def _tokenizer(
        self,
        spec: Any,
        name: str,
        own: str | None,
        splits: RankingSplits,
        vocabulary: int,
        trained: list[PreTrainedTokenizerBase],
    ) -> PreTrainedTokenizerBase:
        """A model's own tokenizer; new models share `data.tokenizer`, or one learned from the training texts."""
        if name.startswith(MODULE):
            raise InputError("The ranking task takes models by name: a folder, a Hub id, or a new encoder.")
        if spec.tokenizer is not None or not is_new_encoder(name):
            found = load_tokenizer(spec.tokenizer or transformer_of(name), trust_remote_code=spec.trust_remote_code)
        else:
            if not trained:
                trained.append(
                    load_tokenizer(own) if own is not None else train_encoder_tokenizer(splits.texts(), vocabulary)
                )
            found = trained[0]
        if not found.is_fast:
            raise InputError(f"The tokenizer of {name!r} is not a fast one, which the ranking task needs.")
        return found

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        assert isinstance(prepared, _RankingData) and not isinstance(source, nn.Module)
        options = {k: v for k, v in (spec.options or {}).items() if k != "members"}
        kept = {"dtype": spec.dtype, "quantization": spec.quantization, "trust_remote_code": spec.trust_remote_code}
        names = list(_names(spec)) if source is None else [spec.model]
        rankers = []
        for name in names:
            ranker = load_ranker(str(source or name), prepared.views[name], options if source is None else {}, **kept)
            note = _warning(name, ranker)
            prepared.say([*notes_of(ranker), *([note] if note else [])])
            rankers.append(ranker)
        return rankers[0] if len(rankers) == 1 else RankerEnsemble(rankers)

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """Re-ranking of the candidates and, for dot products, retrieval from the whole collection."""
        return evaluate_ranking(student, teacher, loader)


def _names(spec: Any) -> Iterator[str]:
    """The model of a side, and the other members of an ensemble."""
    if spec is not None:
        yield spec.model
        yield from (spec.options or {}).get("members") or []


def _warning(name: str, ranker: ModelAdapter) -> str | None:
    if not isinstance(ranker, BiEncoderAdapter) or not ranker.model.encoders[0].normalize:
        return None
    if ranker.model.learns:
        return f"{name} gives vectors of length 1, whose products cannot reach a teacher's margins: a scale is learned."
    return (
        f"{name} gives vectors of length 1: its scores cannot leave ±{ranker.model.fixed:g}, and a teacher's margins may be "
        "larger. Set options.scale=learn or options.normalize=false."
    )


def show_ranking(batch: Batch, view: View) -> Text:
    """The first query of a batch with its candidates and their grades, as the model gets them."""
    assert isinstance(batch, RankingBatch)
    ids = {side: batch.inputs[f"{view.key}/{side}_ids"] for side in ("query", "document")}
    masks = {side: batch.inputs[f"{view.key}/{side}_mask"] for side in ("query", "document")}
    read = lambda side, i: view.tokenizer.decode(ids[side][i][masks[side][i]])  # noqa: E731
    out = Text(read("query", 0) + "\n", style="bold")
    for slot, grade in zip(batch.slots[0].tolist(), batch.labels[0].tolist(), strict=True):
        if slot >= 0:
            out.append(f"  {grade:g}  {read('document', slot)}\n", style="green" if grade > 0 else "dim")
    return out
