"""Zero-shot classifiers: a model of images and texts, such as CLIP or SigLIP, whose classes are texts.

    logits_k = s · cos(image, prototype_k) + b

The prototype of a class is the mean of the embeddings of its prompts, each of length 1, made length 1 again (Radford et al.
2021, section 3.1.4). s and b are the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES

from understudy.data.folders import find, hub_id
from understudy.errors import InputError
from understudy.models.loading import ADAPTERS, auto_model
from understudy.models.modes import evaluating
from understudy.models.small import is_small
from understudy.models.weights import check_folder, reason

OPTIONS = {
    "prompts": ("list of texts", "a photo of a {}.", "Of a zero-shot model, such as CLIP: `{}` is the name of a class.")
}
"""Keys of `options`, with the type, default and meaning of each."""
PROMPTS = ("a photo of a {}.",)
_TEXTS = 256
"""Prompts that are embedded together."""


def is_zero_shot(name: str, trust_remote_code: bool = False) -> bool:
    """Whether a model compares images with texts, and has no classes of its own."""
    path = find(name)
    if is_small(name) or (path is None and find(f"{name}.safetensors") is not None):
        return False
    if path is not None:
        facts = {} if (path / ADAPTERS).is_file() else check_folder(path)
        kind, kinds = facts.get("model_type"), facts.get("architectures")
    else:
        try:
            config = AutoConfig.from_pretrained(hub_id(name), trust_remote_code=trust_remote_code)
        except (OSError, ValueError):  # the loader says what is wrong
            return False
        kind, kinds = config.model_type, config.architectures
    own = any(str(k).endswith("ForImageClassification") for k in kinds or ())
    return kind in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES and not own


class ZeroShotClassifier(nn.Module):
    """An image classifier of a model of images and texts. Nothing of it is trained.

    Args:
        body: with `get_image_features` and `logit_scale`.
        prototypes: of the classes, `[classes, width]`, of length 1.

    With an `adapter` (`understudy.models.few_shot`), what it returns for the embeddings is added to the logits.
    """

    adapter: nn.Module | None

    def __init__(self, body: Any, prototypes: Tensor) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(prototypes.shape[1], len(prototypes))
        bias = getattr(body, "logit_bias", None)
        with torch.no_grad():
            self.head.weight.copy_(body.logit_scale.exp() * prototypes)
            self.head.bias.fill_(0.0 if bias is None else float(bias))
        self.adapter = None
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits `[images, classes]`."""
        features = F.normalize(_pooled(self.body.get_image_features(pixel_values=pixels)).float(), dim=-1)
        logits: Tensor = self.head(features)
        return logits if self.adapter is None else logits + self.adapter(features)


def load_zero_shot(
    name: str,
    classes: Sequence[str],
    prompts: Sequence[str] = PROMPTS,
    *,
    dtype: str = "auto",
    quantization: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> ZeroShotClassifier:
    """A folder's or a Hub id's model as a classifier of these classes; `_` in a name is read as a space.

    Raises:
        InputError: prompts without one place for the name, or a model that cannot embed both images and texts.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    for prompt in prompts:
        if not isinstance(prompt, str) or prompt.count("{}") != 1:
            raise InputError(
                f"options.prompts: {prompt!r} must be text with one {{}} where the name of a class stands."
            )
    if not prompts:
        raise InputError("options.prompts is empty: give a text such as 'a photo of a {}.', or leave it out.")
    path = find(name)
    body: Any = auto_model(AutoModelForZeroShotImageClassification, name, path, dtype, quantization, trust_remote_code)
    missing = [part for part in ("get_image_features", "get_text_features", "logit_scale") if not hasattr(body, part)]
    if missing:
        raise InputError(
            f"{name} is {type(body).__name__}, which has no {missing[0]}: a zero-shot teacher compares embeddings, as CLIP and "
            "SigLIP do."
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(path or hub_id(name)), trust_remote_code=trust_remote_code)
    except Exception as error:  # many types, as for models
        raise InputError(
            f"The tokenizer of {name!r}, which reads its prompts, cannot be loaded: {reason(error)}"
        ) from error
    texts = [prompt.format(label.replace("_", " ")) for label in classes for prompt in prompts]
    length = int(body.config.text_config.max_position_embeddings)
    found = []
    with torch.no_grad(), evaluating(body):
        for start in range(0, len(texts), _TEXTS):
            some = texts[start : start + _TEXTS]
            read = tokenizer(some, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            found.append(F.normalize(_pooled(body.get_text_features(**read.to(body.device))).float(), dim=-1))
        prototypes = F.normalize(torch.cat(found).view(len(classes), len(prompts), -1).mean(1), dim=-1)
    return ZeroShotClassifier(body, prototypes)


def load_tower(name: str, classes: int, **how: Any) -> nn.Module:
    """The part of such a model that reads images, with a new head of `classes`: an ordinary classifier of transformers.

    Args:
        how: as of `load_zero_shot`: `dtype`, `quantization`, `trust_remote_code`.
    """
    return auto_model(AutoModelForImageClassification, name, find(name), new_head=True, num_labels=classes, **how)


def _pooled(output: Any) -> Tensor:
    """The embedding, from what a model returns for it."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found
