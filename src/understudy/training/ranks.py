"""Multi-process training with DDP, FSDP2 or DeepSpeed through transformers' Trainer, and each rank's share of the data."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object, str_to_bool
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from understudy.data import Batch
from understudy.data.batch import IGNORE
from understudy.errors import InputError
from understudy.models import ModelAdapter
from understudy.models.sharding import fill, outline, unwrap
from understudy.training import zero
from understudy.training.arguments import dry_run_arguments
from understudy.training.method import Method
from understudy.training.order import COUNTS, Share, Shared
from understudy.training.train_module import TrainModule

LAUNCHED = "ACCELERATE_USE_FSDP"
"""Set by `accelerate launch` with an FSDP configuration, and by accelerate itself if a plugin is given."""


class Ranks:
    """The processes of a run: each rank's share of the data, all-reduces, and gathering a sharded student after
    training.

    Args:
        trainer: its accelerator, arguments and rollouts are used.
        train_module: student and method.
    """

    def __init__(self, trainer: Any, train_module: TrainModule) -> None:
        self.trainer, self.accelerator, self.args = trainer, trainer.accelerator, trainer.args
        self.model = train_module
        self.several = self.args.world_size > 1
        self._outline: Any = None
        method, student = train_module.method, train_module.student
        self.zero_stage = zero.stage_of(self.accelerator)
        if trainer.is_deepspeed_enabled:
            zero.check(self.args)
            _refuse_what_needs_whole_weights(method, "trainer.deepspeed")
        if self.zero_stage == 3:
            zero.share_head(train_module)
        if trainer.is_fsdp_enabled:
            _refuse_what_cannot_be_sharded(method, student, self.accelerator.state.fsdp_plugin)
            own_end = type(method).export is not Method.export or type(student).save is not ModelAdapter.save
            self._outline = outline(student) if own_end else None

    # -- setting up ---------------------------------------------------------------------------------------------

    @staticmethod
    def check_arguments(args: TrainingArguments) -> None:
        """Refuse sharding with a single process; restrict a single process to one GPU."""
        if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
            raise InputError(
                "trainer.fsdp shards over processes and there is one: start with `torchrun --nproc_per_node N -m understudy`, "
                "or drop it."
            )
        if args.n_gpu > 1:
            args._n_gpu = 1  # `nn.DataParallel` copies the weights at each step; several GPUs need several processes

    @staticmethod
    @contextmanager
    def own_environment() -> Iterator[str | None]:
        """Yield the launcher's FSDP setting; environment variables that this run's arguments set are removed for the
        next run."""
        launched = os.environ.get(LAUNCHED)
        try:
            yield launched
        finally:
            os.environ.pop(LAUNCHED, None)
            if launched is not None:
                os.environ[LAUNCHED] = launched

    @staticmethod
    def apply_fsdp(accelerator: Any, args: TrainingArguments, launched: str | None) -> bool:
        """Apply FSDP2 on CPUs too, where accelerate would silently ignore the plugin and run DDP. True if it was
        applied."""
        state, wanted, changed = accelerator.state, args.fsdp_plugin_args, False
        if state.distributed_type == DistributedType.MULTI_CPU and (wanted or str_to_bool(launched or "false")):
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**(wanted or {}))
            if accelerator.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
            state.distributed_type = DistributedType.FSDP
            changed = True
        plugin: Any = getattr(state, "fsdp_plugin", None)
        policy = getattr(plugin, "mixed_precision_policy", None)
        if isinstance(policy, MixedPrecisionPolicy):
            # Matrix products are in half precision; sums of losses and gradients are not.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(policy.param_dtype, reduce_dtype=torch.float32)
        return changed

    # -- data ---------------------------------------------------------------------------------------------------

    def dataloader(self, order: Any, data: Any, collate: Any) -> DataLoader[Any]:
        """This rank's share of every round, without the examples that accelerate would repeat to fill the last one."""
        args = self.args
        share = Share(order, args.train_batch_size, args.world_size, args.process_index, args.dataloader_drop_last)
        shared = Shared(data, collate)
        return DataLoader(
            shared,
            batch_sampler=share,
            collate_fn=shared.collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def take(self, epoch_iterator: Iterator[Any], number: int) -> tuple[list[Any], list[bool]]:
        """The micro-batches of an update, and for each whether it counts on this rank."""
        rollouts = self.trainer.rollouts
        if rollouts is not None:
            step = self.trainer.state.global_step
            samples = rollouts.take(epoch_iterator, number, step, self.accelerator.autocast)
        else:
            samples = list(itertools.islice(epoch_iterator, number))
        return samples, [bool(sample.pop(COUNTS, True)) for sample in samples]

    def companions(self, batches: Sequence[Batch], counting: Sequence[bool]) -> list[Batch]:
        """The micro-batches, where those that do not count on this rank have their labels ignored; or are left out, if
        no row would remain."""
        pairs = zip(batches, counting, strict=True)
        kept = [b if counts else replace(b, labels=torch.full_like(b.labels, IGNORE)) for b, counts in pairs]
        return [b for b, counts in zip(kept, counting, strict=True) if counts or not b.num_items]

    # -- sums ---------------------------------------------------------------------------------------------------

    def sum_numbers(self, values: list[float]) -> list[float]:
        """All-reduce (sum) of each number."""
        if not self.several:
            return values
        found: list[float] = self.sum_tensors([torch.tensor(values, device=self.args.device)])[0].tolist()
        return found

    def sum_tensors(self, values: Sequence[Tensor]) -> list[Tensor]:
        """All-reduce (sum) of each tensor."""
        return [self.accelerator.reduce(v, "sum") if self.several else v for v in values]

    def sum_gradients(self, gradients: list[Tensor | None], named: Sequence[tuple[str, Tensor]]) -> list[Tensor | None]:
        """All-reduce (sum) of the gradients of `named` parameters; a gradient that a rank does not have counts as 0."""
        if not self.several:
            return gradients
        pairs = zip(gradients, named, strict=True)
        return list(self.sum_tensors([g if g is not None else torch.zeros_like(p) for g, (_, p) in pairs]))

    def same_names(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add a 0 for each term of an auxiliary loss that only other ranks have, so that all ranks reduce the same
        tensors."""
        if not self.several:
            return sums
        return {name: sums.get(name, torch.zeros((), device=self.args.device)) for name in gather_object(list(sums))}

    # -- the end ------------------------------------------------------------------------------------------------

    def make_whole(self) -> None:
        """After training, turn a student that was sharded, or that its method or kind exports in a special way, into an
        ordinary model on every rank."""
        if self.trainer.is_deepspeed_enabled:
            zero.whole_again(self.trainer.model_wrapped, self.model)
        if self.trainer.is_fsdp_enabled:
            unwrap(self.model)
        if self._outline is not None:
            fill(self._outline, self.model.student)
            self.model.student = self.model.train_state.student = self._outline


def check_sharding(method: Method, options: Mapping[str, Any]) -> None:
    """Refuse a method that cannot be sharded and trainer options that this machine cannot run, before a model is
    loaded, from the options and the launcher's environment alone.

    Raises:
        InputError: the run is to be sharded and the method cannot be, or the options cannot be used.
    """
    if options.get("deepspeed"):
        _refuse_what_needs_whole_weights(method, "trainer.deepspeed")
        if type(method).export is not Method.export:
            raise InputError(
                f"Method {method.name!r} changes the head after training, which was not tried on weights that DeepSpeed split: "
                "use trainer.fsdp=true, or DDP (no trainer.deepspeed)."
            )
    elif options.get("fsdp") or str_to_bool(os.environ.get(LAUNCHED, "false")):
        _refuse_what_needs_whole_weights(method, "trainer.fsdp")
        _refuse_empty_weights(bool(str_to_bool(os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false"))))
        return
    dry_run_arguments(options)


def _refuse_what_cannot_be_sharded(
    method: Method, student: ModelAdapter, plugin: FullyShardedDataParallelPlugin
) -> None:
    """Raise an `InputError` for each use of whole weights or gradients outside of forward and backward passes."""
    if plugin.fsdp_version != 2:
        raise InputError("FSDP 1 is not supported: set fsdp_version: 2 (trainer.fsdp_config.version=2).")
    _refuse_empty_weights(plugin.cpu_ram_efficient_loading)
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy) and not torch.accelerator.is_available():
        raise InputError(
            "fsdp_config.cpu_offload moves weights from a GPU to the CPU and there is no GPU: leave it out."
        )
    _refuse_what_needs_whole_weights(method, "trainer.fsdp")
    if getattr(student.model, "is_quantized", False):
        raise InputError(
            "The student's weights are quantised and trainer.fsdp would cut them up: run DDP (no trainer.fsdp), or leave "
            "student.quantization out."
        )


def _refuse_empty_weights(asked: bool) -> None:
    if asked:
        raise InputError(
            "fsdp_config.cpu_ram_efficient_loading leaves models empty on all ranks but the first and unties their heads, and "
            "each rank is to look at its models before training: set it to false."
        )


def _refuse_what_needs_whole_weights(method: Method, option: str) -> None:
    reasons = {
        "has auxiliary optimisers": bool(method.auxiliary_optimizers()),
        "merges gradients of whole weights": method.merges_gradients,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"Method {method.name!r} {reason}, and {option} would split both over the ranks: run it with DDP "
                f"(no {option})."
            )
