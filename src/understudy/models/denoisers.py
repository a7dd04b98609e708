"""Loading denoisers: new ones by name, folders and Hub ids of diffusers, and this project's small format."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from understudy.data.folders import find, hub_id
from understudy.errors import InputError
from understudy.models.diffusion import SAMPLER, DenoiserAdapter, MixtureDenoiser, PointDenoiser, Sampler
from understudy.models.masked_generator import MaskedGeneratorAdapter, build_masked_generator
from understudy.models.noise_levels import Cosine, levels_of
from understudy.models.scenes import scene_denoiser
from understudy.models.small import Facts, load_weights
from understudy.models.weights import check_complete, check_folder, read_object, reason

SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
)
"""Schedulers of models that were trained on noise levels of `alphas_cumprod`; they differ in how they sample."""
NEW = re.compile(r"(unet|denoiser|pointnet|mar):(\d+(?:,\d+)*)")


def is_new_denoiser(name: str) -> bool:
    """Whether `name` is not a folder or Hub id but an untrained network, or the closed form of a world."""
    return name == "exact" or NEW.fullmatch(name) is not None


def load_denoiser(
    name: str | Path | nn.Module,
    *,
    shape: tuple[int, ...] = (),
    classes: int = 0,
    centres: Tensor | None = None,
    deviation: float = 0.0,
    sampler: Sampler | None = None,
    prediction: str | None = None,
    null: bool = False,
) -> DenoiserAdapter | MaskedGeneratorAdapter:
    """Load or build a denoiser, or a masked generator.

    Args:
        name: `exact` (the world's own posterior mean), `denoiser:128,128` (an MLP), `unet:32,64` (a new UNet2DModel),
            `pointnet:64,64` (points told a scan), `mar:64,2,2` (a new masked generator), a folder, a Hub id, or an adapter.
        shape: of an example; a model from a folder has its own.
        classes: number of classes for conditioning, 0 for none.
        centres, deviation: of the world's modes.
        sampler, null, prediction: of models whose folder has no `sampler.json`. `null` means that the last class of a
            model is the unconditional one; `prediction` overrides that of its scheduler.
    """
    if isinstance(name, DenoiserAdapter | MaskedGeneratorAdapter):
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
        mixture = MixtureDenoiser(centres.float(), deviation, levels)
        return DenoiserAdapter(mixture, levels, "sample", shape, classes=classes, sampler=sampler)
    new = NEW.fullmatch(text)
    if new is not None and not shape:
        raise InputError(f"{text} is a new network, and data=noise does not say what shape an example has.")
    if new is not None:
        rows = _new(new, shape, classes)
        rows.sampler = sampler or rows.sampler
        return rows
    return _load(text, sampler, prediction, null)


def _new(name: re.Match[str], shape: tuple[int, ...], classes: int) -> DenoiserAdapter | MaskedGeneratorAdapter:
    if name[1] == "unet":
        return _unet([int(v) for v in name[2].split(",")], shape, classes)
    builders: dict[str, Callable[[str, tuple[int, ...], int], DenoiserAdapter | MaskedGeneratorAdapter]] = {
        "denoiser": _points,
        "pointnet": scene_denoiser,
        "mar": build_masked_generator,
    }
    return builders[name[1]](name[0], shape, classes)


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
    """A UNet2DModel with a v-prediction cosine schedule of 1,000 entries, whose output is well defined at any noise
    level."""
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


class _Drawn(BaseModel):
    """The content of `sampler.json`, as `DenoiserAdapter.save` writes it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    steps: int = Field(ge=0)
    t_min: float = Field(ge=0, le=1)
    t_max: float = Field(ge=0, le=1)
    guidance: float | None
    renoise: bool = False
    guided: bool = False
    clip: float | None
    null: bool
    read_at: float | None
    prediction: str


def _load(
    name: str, sampler: Sampler | None, prediction: str | None, null: bool
) -> DenoiserAdapter | MaskedGeneratorAdapter:
    path = find(name)
    facts = _json(path / SAMPLER) if path is not None else {}
    options: dict[str, Any] = {"sampler": sampler}
    read_at = None
    if facts:
        try:
            saved = _Drawn.model_validate(facts)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{name}/{SAMPLER} is damaged ({where}: {first['msg']}): save the model again.") from None
        null, prediction, read_at = saved.null, saved.prediction, saved.read_at
        sampler = Sampler(saved.steps, saved.t_min, saved.t_max, saved.guidance, saved.renoise, saved.guided)
        options = {"clip": saved.clip, "sampler": sampler}
    config = _json(path / "config.json") if path is not None else {}
    if "understudy_model" in config:
        assert path is not None
        small = _saved(path / "config.json")
        load_weights(small.model, path / "model.safetensors")
        small.sampler = options["sampler"] or small.sampler
        if isinstance(small, DenoiserAdapter):
            small.read_at = read_at
        return small
    diffusers = _diffusers()
    scheduler = _scheduler(diffusers, name, path)
    if path is not None:
        check_folder(path / "unet" if (path / "unet").is_dir() else path)
    load = diffusers.UNet2DModel.from_pretrained
    full = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    model, found = _either(load, "UNet2DModel", name, path, "unet", **full)
    check_complete(name, found)
    try:
        rows = _wrapped(model, scheduler, null=null, prediction=prediction, **options)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{name} has a configuration that cannot be read: {reason(error)}") from None
    rows.read_at = read_at
    return rows


def _saved(file: Path) -> DenoiserAdapter | MaskedGeneratorAdapter:
    facts = Facts.read(file)  # this project's format, which may have no classes
    new = NEW.fullmatch(facts.understudy_model)
    if new is None or new[1] == "unet":
        raise InputError(f"{file} describes no denoiser: {facts.understudy_model!r}.")
    try:
        return _new(new, tuple(facts.shape), facts.classes)
    except (RuntimeError, MemoryError) as error:  # sizes beyond the memory
        raise InputError(f"{file} describes no denoiser: {reason(error)}") from None


def _scheduler(diffusers: Any, name: str, path: Path | None) -> Any:
    """The scheduler of a folder, if its noise levels and predictions are supported."""
    config = _either(diffusers.DDPMScheduler.load_config, "The scheduler", name, path, "scheduler")
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in SCHEDULERS:
        raise InputError(
            f"{name} was trained with {kind or 'a scheduler without _class_name'}, which is not supported. Supported are the "
            f"variance-preserving ones: {', '.join(SCHEDULERS)}."
        )
    if config.get("use_flow_sigmas"):
        raise InputError(
            f"{name}: {kind} with use_flow_sigmas is a flow, and only variance-preserving schedules are read."
        )
    try:
        return getattr(diffusers, kind).from_config(config)
    except Exception as error:  # its arithmetic raises any type on bad values
        raise InputError(f"The {kind} of {name!r} cannot be made: {reason(error)}") from error


def _either(load: Callable[..., Any], what: str, name: str, path: Path | None, part: str, **options: Any) -> Any:
    """`part` of a pipeline, or the same at the top of a folder."""
    said = ""
    for where in ({"subfolder": part}, {}):
        if where and path is not None and not (path / part).is_dir():
            continue
        try:
            return load(str(path or hub_id(name)), **where, **options)
        except Exception as error:  # loaders raise many types, all fixed by another model name
            said = reason(error)
            if path is not None:
                break
    raise InputError(
        f"{what} of {name!r} cannot be loaded: {said} A diffusion model is a folder or Hub id with a UNet2DModel and its "
        "scheduler."
    )


def _json(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}
