"""Loading rankers: a saved one, or any encoder with a scorer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from understudy.data.folders import find, hub_id
from understudy.data.retrieval_batches import View
from understudy.errors import InputError
from understudy.models.encoders import load_cross, load_encoder
from understudy.models.rankers import FACTS, BiEncoderAdapter, CrossEncoderAdapter, RankerAdapter, Towers
from understudy.models.sentence_folders import is_new_encoder, located
from understudy.models.weights import check_folder, read_object, reason

MEANINGS = {
    "scorer": (
        "dot or late or cross",
        "dot",
        "How a query and a document are compared; that of the folder, if it says.",
    ),
    "pooling": ("mean or cls", "mean", "How the vectors of tokens become one."),
    "towers": ("1 or 2", "1", "One encoder for both sides, or two."),
    "normalize": ("true or false", "–", "Vectors of length 1; as the folder says if not given."),
    "scale": ("number > 0 or learn", "1", "Factor of the scores; learned where vectors are normalised."),
    "members": ("list", "–", "Further models whose scores are averaged with the first."),
}
OPTIONS = set(MEANINGS)
"""Keys of `options`; `MEANINGS` has the type, default and meaning of each."""
SCORERS = ("dot", "late", "cross")


def load_ranker(
    name: str,
    view: View,
    options: Mapping[str, Any],
    *,
    dtype: str = "auto",
    quantization: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> RankerAdapter:
    """Load a saved ranker, or an encoder with a scorer.

    Args:
        name: `embedding:24`, `bert:hidden=…` (new), a package, a folder or Hub id.
        options: `scorer` (`dot` unless the folder names another, or holds a classifier), `pooling` (`mean` or `cls`)
            and `normalize` (by default as a `sentence-transformers` folder pools and compares), `towers` (1 shared, 2 separate),
            `scale` (a number, or `learn`, which is the default for normalised vectors).
    """
    name = located(name)
    folder = find(name)
    saved = _saved(folder) if folder is not None else {}
    options = {**saved, **options}
    scorer = options.get("scorer") or ("cross" if is_classifier(name, folder, trust_remote_code) else "dot")
    if scorer not in SCORERS:
        raise InputError(f"options.scorer is {scorer!r}; known: {', '.join(SCORERS)}.")
    if scorer == "cross":
        _check_logit(name, folder, trust_remote_code)
        return CrossEncoderAdapter(load_cross(name, view, dtype, trust_remote_code, quantization), view)
    towers = options.get("towers", 1)
    if towers not in (1, 2):
        raise InputError(f"options.towers is {towers!r} and must be 1 (shared) or 2.")
    parts = [name] * towers if not saved or towers == 1 else [f"{name}/query", f"{name}/document"]
    encoders = [load_encoder(part, view, options, dtype, trust_remote_code) for part in parts]
    if scorer == "late" and not encoders[0].special:
        raise InputError(f"{name} has one vector a word without context; scorer=late needs an encoder such as bert:...")
    scale, learn = _scale(options, encoders[0].normalize)
    return BiEncoderAdapter(Towers(encoders, scale, learn), view, scorer)


def _scale(options: Mapping[str, Any], normalised: bool) -> tuple[float, bool]:
    """The factor of scores, and whether it is learned: plain cosines could not reach a teacher's margins."""
    asked = options.get("scale", "learn" if normalised else 1.0)
    learn = asked == "learn" or bool(options.get("learn_scale"))
    if asked == "learn":
        return 20.0, True
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not asked > 0:
        raise InputError(f"options.scale is {asked!r} and must be a number above 0, or learn.")
    return float(asked), learn


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _saved(folder: Path) -> dict[str, Any]:
    file = folder / FACTS
    return read_object(file) if file.is_file() else {}


def _check_logit(name: str, folder: Path | None, trust_remote_code: bool) -> None:
    """Refuse a classifier of several classes: none of its logits is the score of a pair."""
    config = _classifier_config(name, folder, trust_remote_code)
    if config is not None and config.num_labels != 1:
        raise InputError(
            f"{name} has {config.num_labels} logits and scorer=cross needs one: name a cross-encoder, or an encoder, which gets "
            "a new head."
        )


def is_classifier(name: str, folder: Path | None, trust_remote_code: bool) -> bool:
    """Whether a saved model has the head of a sequence classifier."""
    return _classifier_config(name, folder, trust_remote_code) is not None


def _classifier_config(name: str, folder: Path | None, trust_remote_code: bool) -> Any:
    """The configuration of a saved sequence classifier, `None` for any other model."""
    if is_new_encoder(name) or (folder is not None and not (folder / "config.json").is_file()):
        return None
    if folder is not None:
        check_folder(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder or hub_id(name)), trust_remote_code=trust_remote_code)
    except Exception as error:  # the Hub client raises many types; the model is not available
        raise InputError(f"Model {name!r} cannot be loaded: {reason(error)}") from error
    found = any(str(a).endswith("ForSequenceClassification") for a in _list(config.architectures))
    return config if found else None
