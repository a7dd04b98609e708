"""Several processes as one: DDP, FSDP2 and DeepSpeed through transformers' Trainer, and each rank's share of the data."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object, str_to_bool
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.training_args import ParallelMode

from understudy.data import Batch
from understudy.data.batch import IGNORE
from understudy.errors import InputError
from understudy.models import ModelAdapter
from understudy.models.sharding import fill, outline, unwrap
from understudy.training import zero
from understudy.training.arguments import rehearse_arguments
from understudy.training.method import Method
from understudy.training.order import COUNTS, Share, Shared
from understudy.training.train_module import TrainModule

LAUNCHED = "ACCELERATE_USE_FSDP"
"""Set by `accelerate launch` whose configuration says FSDP, and by accelerate itself where a plugin is given."""


class OnRanks(Trainer):
    """`Trainer` whose result does not depend on how many processes share the work, or on how its weights are held."""

    model: Any
    data_collator: Any
    rollouts: Any = None
    _outline: Any = None

    def __init__(self, model: TrainModule, args: TrainingArguments, **rest: Any) -> None:
        if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
            raise InputError(
                "trainer.fsdp shards over processes and there is one: start with `torchrun --nproc_per_node N -m understudy`, "
                "or drop it."
            )
        if args.n_gpu > 1:
            args._n_gpu = 1  # replicas in threads copy weights at each step; several GPUs are for several processes
        super().__init__(model=model, args=args, **rest)
        self.zero_stage = zero.stage_of(self.accelerator)
        if self.is_deepspeed_enabled:
            zero.check(args)
            _refuse_what_needs_whole_weights(model.method, "trainer.deepspeed")
        if self.zero_stage == 3:
            zero.share_head(model)
        if self.is_fsdp_enabled:
            _refuse_what_cannot_be_sharded(model.method, model.student, self.accelerator.state.fsdp_plugin)
            own_end = (
                type(model.method).export is not Method.export or type(model.student).save is not ModelAdapter.save
            )
            self._outline = outline(model.student) if own_end else None

    def create_accelerator_and_postprocess(self) -> None:
        """FSDP2 works on CPUs too, where accelerate would leave the plugin aside without a word and run DDP."""
        launched = os.environ.get(LAUNCHED)
        super().create_accelerator_and_postprocess()
        os.environ.pop(LAUNCHED, None)  # what this run's arguments put there is not for the next run in this process
        if launched is not None:
            os.environ[LAUNCHED] = launched
        state, wanted = self.accelerator.state, self.args.fsdp_plugin_args
        if state.distributed_type == DistributedType.MULTI_CPU and (wanted or str_to_bool(launched or "false")):
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**(wanted or {}))
            if self.accelerator.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(self.accelerator.mixed_precision)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        plugin: Any = getattr(state, "fsdp_plugin", None)
        policy = getattr(plugin, "mixed_precision_policy", None)
        if isinstance(policy, MixedPrecisionPolicy):
            # Half precision is for the products, not for sums of losses or gradients.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(policy.param_dtype, reduce_dtype=torch.float32)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One process: as transformers makes it. Several: each rank's share, without the examples that are repeated
        elsewhere to make the last round even."""
        args = self.args
        if args.world_size == 1:
            return super().get_train_dataloader()
        order = self._get_train_sampler(self.train_dataset)
        assert order is not None
        share = Share(order, args.train_batch_size, args.world_size, args.process_index, args.dataloader_drop_last)
        data = Shared(self.train_dataset, self.data_collator)
        return DataLoader(
            data,
            batch_sampler=share,
            collate_fn=data.collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def make_whole(self) -> None:
        """After training: a student that DeepSpeed partitioned, or that a method or its kind ends in a way of its own, is
        an ordinary model again, on every rank."""
        if self.is_deepspeed_enabled:
            zero.whole_again(self.model_wrapped, self.model)
        if self.is_fsdp_enabled:
            unwrap(self.model)
        if self._outline is not None:
            fill(self._outline, self.model.student)
            self.model.student = self.model.train_state.student = self._outline

    def _take(self, epoch_iterator: Iterator[Any], number: int) -> tuple[list[Any], list[bool]]:
        """The micro-batches of an update, and which of them count on this rank."""
        if self.rollouts is not None:
            samples = self.rollouts.take(epoch_iterator, number, self.state.global_step, self.accelerator.autocast)
        else:
            samples = list(itertools.islice(epoch_iterator, number))
        return samples, [bool(sample.pop(COUNTS, True)) for sample in samples]

    def _company(self, batches: Sequence[Batch], counting: Sequence[bool]) -> list[Batch]:
        """Those that count, and the others without a row that does: a teacher that is spread over the ranks waits for all."""
        pairs = zip(batches, counting, strict=True)
        kept = [b if counts else replace(b, labels=torch.full_like(b.labels, IGNORE)) for b, counts in pairs]
        return [b for b, counts in zip(kept, counting, strict=True) if counts or not b.num_items]

    def _of_all(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """A player's sums, and 0 for those of other ranks alone: one that nothing is left for has none of its own, and all
        are to reduce the same."""
        if self.args.world_size == 1:
            return sums
        return {name: sums.get(name, torch.zeros((), device=self.args.device)) for name in gather_object(list(sums))}


def check_sharding(method: Method, options: Mapping[str, Any]) -> None:
    """Refuse a method that cannot be sharded, and trainer options that this machine cannot carry out: before a model is
    loaded, by the options and the launcher alone.

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
    rehearse_arguments(options)


def _refuse_what_cannot_be_sharded(
    method: Method, student: ModelAdapter, plugin: FullyShardedDataParallelPlugin
) -> None:
    """One line for whatever needs whole weights or gradients outside of a forward and backward pass."""
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
        "has players with optimisers of their own": bool(method.auxiliary_optimizers()),
        "merges gradients of whole weights": method.merges_gradients,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"Method {method.name!r} {reason}, and {option} would split both over the ranks: run it with DDP "
                f"(no {option})."
            )
