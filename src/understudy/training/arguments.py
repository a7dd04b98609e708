"""Arguments of transformers' Trainer with this project's defaults, checked before anything starts, and a stop that can be
resumed from."""

from __future__ import annotations

import copy
import dataclasses
import time
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import UnionType
from typing import Annotated, Any, Literal, Union

import torch
from accelerate.utils import DynamoBackend
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, ValidationInfo
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from understudy.errors import InputError, nearest
from understudy.models.sharding import anywhere
from understudy.stopping import AGAIN, listen, restore

RUN = frozenset(
    {"output_dir", "seed", "remove_unused_columns", "do_train", "do_eval", "do_predict", "resume_from_checkpoint"}
)
"""Arguments that the run sets itself."""

_UNSUPPORTED = {
    "noise on the student's embeddings is not added here": ("neftune_noise_alpha",),
    "losses are the methods' own here; dpo has options.label_smoothing": ("label_smoothing_factor",),
    "losses are computed chunk by chunk without it here": ("use_liger_kernel", "liger_kernel_config"),
    "several devices are used by DDP, trainer.fsdp or trainer.deepspeed here": ("parallelism_config",),
    "an update is divided by the counts of all devices here": ("average_tokens_across_devices",),
    "the order is that of trainer.data_seed here, or the method's own": (
        "train_sampling_strategy",
        "length_column_name",
    ),
    "labels are columns of the data here (data.columns)": ("label_names",),
    "evaluations are the task's own here, in the dtype of the weights": (
        *("bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "eval_do_concat_batches"),
        *("eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"),
    ),
    "a resumed run goes on with the next examples here": ("ignore_data_skip",),
    "a run goes on from its checkpoints here; trainer.save_strategy=no writes none": ("save_only_model",),
    "a finished student is pushed by `understudy push RUN REPO`": (
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
    ),
    "the Hub's token is the one of the environment variable HF_TOKEN, so that no recipe holds it": ("hub_token",),
}
UNSUPPORTED = {name: why for why, names in _UNSUPPORTED.items() for name in names}
"""Arguments of transformers that would have no effect, or not theirs, and why."""

DEFAULTS: dict[str, Any] = {
    "save_steps": 200,
    "save_total_limit": 2,
    "logging_steps": 10,
    "report_to": "none",
    "disable_tqdm": True,
    "log_level": "error",
}
"""Defaults that differ from transformers'. A task has further ones, which it writes into the recipe."""

_COUNT = Annotated[int, Field(ge=1, lt=2**31)]
_AMOUNT = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_STEPS = Annotated[float, Field(gt=0, lt=2**31)]
_MOMENTUM = Annotated[float, Field(ge=0, lt=1)]
_RANGES: dict[str, Any] = {
    "max_steps": Annotated[int, Field(ge=-1, lt=2**31)],
    "num_train_epochs": Annotated[float, Field(gt=0, lt=2**31)],
    "learning_rate": _AMOUNT,
    "weight_decay": _AMOUNT,
    "max_grad_norm": _AMOUNT,
    "adam_epsilon": _AMOUNT,
    "adam_beta1": _MOMENTUM,
    "adam_beta2": _MOMENTUM,
    "warmup_steps": Annotated[float, Field(ge=0, lt=2**31)],
    "eval_delay": Annotated[float, Field(ge=0, lt=2**31)],
    "logging_steps": _STEPS,
    "save_steps": _STEPS,
    "eval_steps": _STEPS | None,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "ddp_timeout": _COUNT,
    "save_total_limit": _COUNT | None,
    "eval_accumulation_steps": _COUNT | None,
    "torch_empty_cache_steps": _COUNT | None,
    "dataloader_prefetch_factor": _COUNT | None,
    "ddp_bucket_cap_mb": _COUNT | None,
    "dataloader_num_workers": Annotated[int, Field(ge=0, le=1024)],
    "fsdp": bool | str | list[str] | None,
    "data_seed": Annotated[int, Field(ge=0, lt=2**32)] | None,
    "log_level": Literal["detail", "debug", "info", "warning", "error", "critical", "passive"],
    "log_level_replica": Literal["detail", "debug", "info", "warning", "error", "critical", "passive"],
    "ddp_backend": Literal["nccl", "mpi", "xccl", "gloo", "hccl"] | None,
    "torch_compile_mode": Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None,
    "dataloader_multiprocessing_context": Literal["fork", "forkserver", "spawn"] | None,
}
_MODEL_BOUND = {"galore": "galore_torch", "apollo": "apollo_torch", "lomo": "lomo_optim"}
"""Optimisers that need a model's layers, and their packages."""


@cache
def fields() -> dict[str, dataclasses.Field[Any]]:
    """The arguments that a recipe may set, by name."""
    return {f.name: f for f in dataclasses.fields(TrainingArguments) if f.init and f.name not in RUN}


def checked_arguments(values: Any, where: str) -> dict[str, Any]:
    """Check values for arguments of `transformers.TrainingArguments`; text that spells a number is read as a number.

    Args:
        where: `trainer`, or the key in the recipe that holds them (`teacher.train`).

    Raises:
        InputError: an unknown argument, a wrong type, sign, range or choice, or an argument that has no effect here.
    """
    if not isinstance(values, Mapping):
        raise InputError(
            f"{where} = {values!r}: it holds arguments of transformers' Trainer, for example max_steps: 100."
        )
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields():
            raise InputError(
                f"Unknown key {where}.{key}.{nearest(str(key), fields())} Keys are those of TrainingArguments; list them "
                "with `understudy keys trainer`."
            )
        found[key] = _checked(key, value, f"{where}.{key}")
    return found


def _of_option(values: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    return checked_arguments(values, f"options.{info.field_name}")


TrainerOptions = Annotated[dict[str, Any], AfterValidator(_of_option)]
"""Type of a method's option that holds arguments of Trainer, checked when the recipe is read."""


def _checked(key: str, value: Any, name: str) -> Any:
    if key in UNSUPPORTED and not is_default(key, value):
        raise InputError(f"{name} is not supported: {UNSUPPORTED[key]}. Leave it out.")
    if key == "report_to":
        return _trackers(value, name)
    if key == "max_steps" and not isinstance(value, bool) and value in (0, "0"):
        raise InputError(
            f"{name} = 0: transformers takes it for no bound and trains all epochs. Give 1 or more, or leave it out for "
            "num_train_epochs."
        )
    number = kind(key) in ("int", "float")
    if number and isinstance(value, bool):
        raise InputError(f"{name} = {value!r}: it is a number, not true or false.")
    try:
        read = _adapter(key).validate_python(value)
    except ValidationError as error:
        known = choices(key)
        if known:
            raise InputError(f"{name} = {value!r}.{nearest(str(value), known)} Known: {', '.join(known)}.") from None
        raise InputError(f"{name} = {value!r}: {error.errors()[0]['msg']}.") from None
    if isinstance(read, float) and read.is_integer() and not isinstance(value, float) and key.endswith(_COUNTED):
        return int(read)
    return read


def is_default(key: str, value: Any) -> bool:
    """Whether an argument asks for nothing but what happens without it."""
    held = fields()[key].default
    return value == held or (held in (False, None, dataclasses.MISSING) and value in (None, 0, False, [], {}))


_COUNTED = ("_steps", "_delay", "_epochs")


def choices(key: str) -> list[str]:
    """The values that an argument allows, if it is an enumeration."""
    parts = typing.get_args(_type(key)) if _is_union(_type(key)) else (_type(key),)
    return [str(c) for part in parts if typing.get_origin(part) is Literal for c in typing.get_args(part)]


def kind(key: str) -> str:
    """A short name of the type of an argument."""
    if choices(key):
        return "text"
    parts = typing.get_args(_type(key)) if _is_union(_type(key)) else (_type(key),)
    plain = [typing.get_args(p)[0] if typing.get_origin(p) is Annotated else typing.get_origin(p) or p for p in parts]
    return " or ".join(dict.fromkeys(p.__name__ for p in plain if p is not type(None)))


def default(key: str) -> str:
    """The default of an argument as text: this project's, or else that of transformers."""
    value = fields()[key].default if key not in DEFAULTS else DEFAULTS[key]
    if value is None or value is dataclasses.MISSING:
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


def meaning(key: str) -> str:
    """The first sentence of the description that transformers gives of an argument."""
    text = " ".join(str(fields()[key].metadata.get("help", "")).split())
    return text.split(". ")[0].rstrip(".") + "." if text else ""


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, UnionType)


@cache
def _type(key: str) -> Any:
    """The type of an argument, with its range; of an enumeration its values as literals."""
    if key in _RANGES:
        return _RANGES[key]
    found = _hints()[key]
    words = [p for p in typing.get_args(found) if isinstance(p, type) and issubclass(p, Enum)]
    named = words or ([found] if isinstance(found, type) and issubclass(found, Enum) else [])
    return Literal[tuple(str(m.value) for m in named[0])] if named else found


@cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(TrainingArguments)


@cache
def _adapter(key: str) -> TypeAdapter[Any]:
    return TypeAdapter(_type(key), config={"arbitrary_types_allowed": True})


def _trackers(value: Any, name: str) -> Any:
    """Check `report_to`: `none`, `all`, or names of trackers. YAML reads `no` as false."""
    if value is None or value is False:
        return "none"
    names = value if isinstance(value, list) else [value]
    known = ["none", "all", *INTEGRATION_TO_CALLBACK]
    for one in names:
        if one not in known:
            raise InputError(f"{name} = {value!r}.{nearest(str(one), known)} Known: {', '.join(known)}.")
    return value


def training_arguments(values: Mapping[str, Any], output: Path, seed: int) -> TrainingArguments:
    """`transformers.TrainingArguments` with this project's defaults; a bad value is an `InputError` of one line."""
    defaults: dict[str, Any] = {
        **DEFAULTS,
        # With `use_cpu` transformers silently ignores DeepSpeed, which chooses its device itself, also a CPU.
        "use_cpu": not torch.cuda.is_available() and not values.get("deepspeed"),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    try:
        return TrainingArguments(output_dir=str(output), seed=seed, **{**defaults, **copy.deepcopy(dict(values))})
    except Exception as error:  # whatever its type, the values caused it
        raise InputError(f"Bad trainer options: {' '.join(str(error).split()) or type(error).__name__}") from error


def dry_run_arguments(values: Mapping[str, Any]) -> None:
    """Build the optimiser, schedule and trackers that the arguments request for a single weight, as a test.

    Raises:
        InputError: values that contradict each other, or a package that is not installed.
    """
    if values.get("deepspeed") and find_spec("deepspeed") is None:
        raise InputError(
            "trainer.deepspeed needs the package deepspeed, which is not installed: pip install deepspeed."
        )
    if values.get("deepspeed") or values.get("fsdp"):
        return  # these change the state of the whole process, so they are set up once, with the model
    with TemporaryDirectory() as scratch:
        args = training_arguments(values, Path(scratch), 0)
    _dry_run_trackers(args)
    if args.torch_compile:
        backends = [backend.value.lower() for backend in DynamoBackend]
        if args.torch_compile_backend not in backends:
            raise InputError(
                f"trainer.torch_compile_backend={args.torch_compile_backend} is none of accelerate's: {', '.join(backends)}."
            )
    name = str(args.optim.value)
    package = next((p for part, p in _MODEL_BOUND.items() if part in name), None)
    if package is not None:
        if find_spec(package) is None:
            raise InputError(f"trainer.optim={name} needs the package {package}, which is not installed.")
        return
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([torch.nn.Parameter(torch.zeros(2, 2))], **options)
    except Exception as error:  # many packages raise here, each its own types
        raise InputError(f"trainer.optim={name} cannot be used: {_said(error)}.") from error
    total = args.max_steps if args.max_steps > 0 else 100
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            args.get_warmup_steps(total),
            total,
            scheduler_specific_kwargs=copy.deepcopy(args.lr_scheduler_kwargs),
        )
    except Exception as error:
        raise InputError(
            f"trainer.lr_scheduler_type={args.lr_scheduler_type.value} cannot be used: {_said(error)}. Check "
            "trainer.lr_scheduler_kwargs and trainer.warmup_steps."
        ) from error


def _dry_run_trackers(args: TrainingArguments) -> None:
    for name in args.report_to:
        if name not in get_available_reporting_integrations():
            raise InputError(
                f"trainer.report_to={name}: {name} is not installed. Install it (pip install {name.removesuffix('_ml')}), or "
                "leave report_to out: metrics.jsonl holds the same values."
            )
    get_reporting_integration_callbacks(args.report_to)


def _said(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def autocast_dtype(values: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of the run's mixed precision, `None` without any."""
    return torch.bfloat16 if values.get("bf16") else torch.float16 if values.get("fp16") else None


def update_size(args: TrainingArguments) -> int:
    """Number of examples in one update, over all micro-batches and ranks."""
    return int(args.train_batch_size * max(1, args.world_size) * args.gradient_accumulation_steps)


def epoch_length(method: Any, args: TrainingArguments) -> int | None:
    """Number of examples in an epoch if the method sets its length; `None` means each example once."""
    return method.epoch_steps * update_size(args) if method.epoch_steps is not None else None


def check_epoch(args: TrainingArguments, examples: int) -> None:
    """Raise an error for an epoch without a whole batch where only whole ones are used: no step would be taken."""
    batch = update_size(args) // args.gradient_accumulation_steps
    if args.dataloader_drop_last and examples < batch:
        raise InputError(
            f"trainer.dataloader_drop_last leaves out batches that are not whole, and {examples} training examples fill none "
            f"of {batch}: lower trainer.per_device_train_batch_size, or leave it out."
        )


def total_steps(args: TrainingArguments, examples: int) -> int:
    """Optimizer steps of a run whose epochs have `examples` examples."""
    if args.max_steps > 0:
        return int(args.max_steps)
    size = update_size(args)
    left_out = examples % (size // args.gradient_accumulation_steps) if args.dataloader_drop_last else 0
    return int(-(-(examples - left_out) // size) * args.num_train_epochs)


class StopOnSignal(TrainerCallback):
    """Finish the step, write a checkpoint and stop on Ctrl-C, SIGTERM or SIGHUP; a later second signal stops at once."""

    def __init__(self) -> None:
        self.asked: float | None = None
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def ask(number: int, frame: Any) -> None:
            now = time.monotonic()
            if self.asked is None:
                self.asked = now
            elif now - self.asked > AGAIN:
                raise KeyboardInterrupt

        self.before = listen(ask)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # the signal reaches ranks at different steps
        if anywhere(self.asked is not None, args.device) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Put the former handlers back. `on_train_end` is not called when training ends with an exception."""
        restore(self.before)
