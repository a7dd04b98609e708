"""DeepSpeed ZeRO: gathering the head where the loss reads it, and an ordinary model after training."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from understudy.errors import InputError
from understudy.models import find_head
from understudy.training.train_module import TrainModule


def stage_of(accelerator: Any) -> int:
    """The ZeRO stage of a run, 0 without DeepSpeed."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return int(plugin.zero_stage) if plugin is not None else 0


def check(args: Any) -> None:
    """Refuse options that would lose updates or give wrong results."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != args.world_size:
        raise InputError(
            f"DeepSpeed: {started} processes were started and transformers sees {args.world_size}, as it does without a GPU; "
            "each would train on all of the data. Use trainer.fsdp=true."
        )
    for option in ("save_strategy", "eval_strategy"):
        value = getattr(getattr(args, option), "value", getattr(args, option))
        if value != "no":
            raise InputError(
                f"DeepSpeed with trainer.{option}={value}: its states are pickles that only it can read, and parts of its "
                f"models cannot be called. Set trainer.{option}=no, or use trainer.fsdp=true, which does both."
            )


def share_head(train_module: TrainModule) -> None:
    """Gather the head for the forward and backward pass of the whole module, not only for the head's own call."""
    import deepspeed  # type: ignore[import-not-found,unused-ignore]

    head = find_head(train_module.student)
    for parameter in head.parameters() if head is not None else ():
        deepspeed.zero.register_external_parameter(train_module, parameter)


def whole_again(engine: Any, model: nn.Module) -> None:
    """Turn a partitioned model into an ordinary one on every rank; the engine cannot be used afterwards."""
    import deepspeed

    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                parameter.whole = parameter.data.clone()  # type: ignore[attr-defined]
    engine.destroy()
    unset_hf_deepspeed_config()  # so that models loaded later are not partitioned
    for module in model.modules():
        for kind in ("forward", "forward_pre", "backward", "backward_pre"):
            getattr(module, f"_{kind}_hooks").clear()
    for parameter in model.parameters():
        if hasattr(parameter, "whole"):
            parameter.data = parameter.whole  # type: ignore[assignment]
            del parameter.whole
