"""Loading denoisers: new ones by name, folders and Hub ids of diffusers, and the small format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from understudy.data.folders import find
from understudy.data.noise_sets import DEVIATION
from understudy.errors import InputError
from understudy.models.diffusion import SAMPLER, DenoiserAdapter, MixtureDenoiser, PointDenoiser, Sampler
from understudy.models.noise_levels import Cosine, levels_of
from understudy.models.small import load_weights

NEW = re.compile(r"(unet|denoiser):(\d+(?:,\d+)*)")


def load_denoiser(
    name: str | Path | nn.Module,
    *,
    shape: tuple[int, ...] = (),
    classes: int = 0,
    centres: Tensor | None = None,
    sampler: Sampler | None = None,
    prediction: str | None = None,
    null: bool = False,
) -> DenoiserAdapter:
    """A denoiser.

    Args:
        name: `exact` (the world's own posterior mean), `denoiser:128,128` (an MLP), `unet:32,64` (a new UNet2DModel),
            a folder, a Hub id, or a `DenoiserAdapter`.
        shape: of an example; a model from a folder knows its own. classes: to be asked for, 0 for none.
        centres: of the world. sampler, null, prediction: of models whose folder has no `sampler.json`. `null`
            means that the last class of a model stands for none; `prediction` goes over what its scheduler says.
    """
    if isinstance(name, DenoiserAdapter):
        return name
    if isinstance(name, nn.Module):
        raise InputError(
            "A denoiser handed over as a module needs its schedule: wrap it in understudy.models.DenoiserAdapter."
        )
    text = str(name)
    if text == "exact":
        if centres is None:
            raise InputError("Model 'exact' is the closed form of a world with known modes: use data=ring8.")
        levels = Cosine()
        mixture = MixtureDenoiser(centres.float(), DEVIATION, levels)
        return DenoiserAdapter(mixture, levels, "sample", shape, classes=classes, sampler=sampler)
    new = NEW.fullmatch(text)
    if new is not None and not shape:
        raise InputError(f"{text} is a new network, and data=noise does not say what shape an example has.")
    if new is not None:
        widths = [int(v) for v in new[2].split(",")]
        rows = _points(text, shape, classes) if new[1] == "denoiser" else _unet(widths, shape, classes)
        rows.sampler = sampler or rows.sampler
        return rows
    return _load(text, sampler, prediction, null)


def _points(name: str, shape: tuple[int, ...], classes: int) -> DenoiserAdapter:
    hidden = [int(v) for v in name.partition(":")[2].split(",")]
    model = PointDenoiser(torch.Size(shape).numel(), hidden, classes)
    model.understudy = {"understudy_model": name, "classes": classes, "shape": list(shape)}  # type: ignore[assignment]
    return DenoiserAdapter(model, Cosine(), "sample", shape, classes=classes)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise InputError("Diffusion models of images need the extra: pip install understudy[diffusion].") from None
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def _unet(widths: list[int], shape: tuple[int, ...], classes: int) -> DenoiserAdapter:
    """A UNet2DModel with a v-prediction cosine schedule of 1,000 entries, which is well read at any noise."""
    diffusers = _diffusers()
    if len(shape) != 3 or shape[-1] % 2 ** (len(widths) - 1):
        raise InputError(f"unet of {len(widths)} levels needs square images divisible by {2 ** (len(widths) - 1)}.")
    model = diffusers.UNet2DModel(
        sample_size=shape[-1],
        in_channels=shape[0],
        out_channels=shape[0],
        layers_per_block=1,
        block_out_channels=tuple(widths),
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        norm_num_groups=min(8, *widths),
        attention_head_dim=min(8, *widths),
        num_class_embeds=classes + 1 if classes else None,
    )
    scheduler = diffusers.DDPMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    )
    return _wrapped(model, scheduler, null=True)


def _wrapped(
    model: Any, scheduler: Any, *, null: bool, prediction: str | None = None, **options: Any
) -> DenoiserAdapter:
    config = model.config
    size = config.sample_size if isinstance(config.sample_size, (list, tuple)) else (config.sample_size,) * 2
    embeds = config.num_class_embeds or 0
    clip = float(scheduler.config.clip_sample_range) if scheduler.config.get("clip_sample") else None
    return DenoiserAdapter(
        model,
        levels_of(scheduler),
        prediction or scheduler.config.prediction_type,
        (config.in_channels, *size),
        classes=embeds - 1 if embeds and null else embeds,
        null=null,
        scheduler=scheduler,
        **{"clip": clip, **options},
    )


def _load(name: str, sampler: Sampler | None, prediction: str | None, null: bool) -> DenoiserAdapter:
    path = find(name)
    facts = _json(path / SAMPLER) if path is not None else {}
    options: dict[str, Any] = {"sampler": sampler}
    read_at = None
    if facts:
        try:
            null, prediction, read_at = (facts.pop(key) for key in ("null", "prediction", "read_at"))
            options = {"clip": facts.pop("clip"), "sampler": Sampler(**facts)}
        except (KeyError, TypeError) as error:
            raise InputError(f"{name}/{SAMPLER} is damaged ({error}): save the model again.") from None
    config = _json(path / "config.json") if path is not None else {}
    if "understudy_model" in config:
        assert path is not None
        rows = _points(config["understudy_model"], tuple(config["shape"]), config["classes"])
        load_weights(rows.model, path / "model.safetensors")
        rows.sampler, rows.read_at = options["sampler"] or rows.sampler, read_at
        return rows
    diffusers = _diffusers()
    model = _either(diffusers.UNet2DModel, name, path, "unet", use_safetensors=True)
    scheduler = _either(diffusers.DDPMScheduler, name, path, "scheduler")
    rows = _wrapped(model, scheduler, null=null, prediction=prediction, **options)
    rows.read_at = read_at
    return rows


def _either(kind: Any, name: str, path: Path | None, part: str, **options: Any) -> Any:
    """`part` of a pipeline, or the same at the top of a folder."""
    reason = ""
    for where in ({"subfolder": part}, {}):
        try:
            return kind.from_pretrained(str(path or name), **where, **options)
        except Exception as error:  # loaders raise a dozen kinds; the user can mend each by naming another model
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise InputError(
        f"{kind.__name__} of {name!r} cannot be loaded: {reason} A diffusion model is a folder or Hub id with a "
        "UNet2DModel and its scheduler."
    )


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not valid JSON: {error}.") from error
    return values if isinstance(values, dict) else {}
