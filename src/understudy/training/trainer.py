"""One trainer for every method, on `transformers.Trainer`.

What it adds: the teacher's targets, the one division (by the count over the whole update and all ranks), term means
for the method's state, gradients of terms apart where a method merges them, and checkpoints that resume exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from understudy.data import Batch, augment
from understudy.errors import InputError
from understudy.losses.reduction import row_weights
from understudy.teachers import Teacher
from understudy.training.auxiliary import AuxiliaryContext, AuxiliaryOptimizers
from understudy.training.order import EpochShuffle, draw
from understudy.training.rollouts import Rollouts
from understudy.training.train_module import TrainModule
from understudy.training.validation import Validate, Validating


class _Follow(TrainerCallback):
    """Tells the trainer which epoch begins; at its first call it is also the place a resumed run lands in."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_epoch(int((state.epoch or 0) + 1e-9))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        train_state = self.trainer.model.train_state
        train_state.step = state.global_step
        self.trainer.model.method.on_step_end(train_state)


class DistillationTrainer(Validating):
    """Trains an `TrainModule` against a teacher.

    Args:
        apprentice: student and method.
        teacher: gives targets, or `None` for a method that needs none.
        args: the training arguments of `transformers`.
        train_dataset, collate: examples, and how they become the tensors of a `Batch`.
        validation: examples that players may draw from. validate: the validation metrics of a student, for evaluation on
            the way (`eval_strategy`). patience: evaluations without gain after which training ends.
        augmentation: keyword options of `understudy.data.augment`, or `None`.
        meter: a cost meter with contexts `teacher()`, `student()`, `head()` and `step()`, or `None`.
        metrics_file: JSON lines, one per log. rollouts: puts the student's own samples into the batches, or `None`.
    """

    model: TrainModule

    def __init__(
        self,
        train_module: TrainModule,
        args: TrainingArguments,
        train_dataset: Dataset[Any],
        collate: Any,
        *,
        teacher: Teacher | None = None,
        validation: Dataset[Any] | None = None,
        validate: Validate | None = None,
        patience: int | None = None,
        augmentation: Mapping[str, Any] | None = None,
        meter: Any = None,
        metrics_file: Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        rollouts: Rollouts | None = None,
    ) -> None:
        if "teacher" in train_module.method.asks and teacher is None:
            raise InputError(f"Method {train_module.method.name!r} needs a teacher and none was given: set `teacher`.")
        args.remove_unused_columns = False
        super().__init__(
            model=train_module,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=validation,
            data_collator=collate,
            callbacks=callbacks,
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(_Follow(self))
        self.loss_is_scaled_for_ga = True  # `compute_loss` already divides by the count of the whole update
        self.teacher, self.meter, self.metrics_file = teacher, meter, metrics_file
        self.augmentation, self.validate, self.patience = augmentation, validate, patience
        self.rollouts = rollouts
        self._epoch = 0
        self._counts: dict[str, Tensor] = {}
        self._left = 0
        self._sums: dict[str, Tensor] = {}
        self._means: dict[str, float] = {}
        self._absent: set[str] = set()
        self._term_gradients: dict[str, list[Tensor | None]] = {}
        self._update_schedule: Sequence[str] = ("student",)
        self.validation = validation
        train_module.train_state.teacher = teacher
        self.auxiliary = AuxiliaryOptimizers(
            train_module.method.auxiliary_optimizers(), train_module.train_state.modules
        )
        if (train_module.method.merges_gradients or self.auxiliary.optimizers) and args.fp16:
            raise InputError(
                f"Method {train_module.method.name!r} makes gradients of its own and cannot scale them: use bf16."
            )
        if meter is not None:
            meter.watch("student", train_module.student)
            if teacher is not None:
                meter.watch("teacher", getattr(teacher, "model", None))

    # -- data ---------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        self._sampler = EpochShuffle(len(self.train_dataset), seed)
        return self._sampler

    def begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._sampler.set_epoch(epoch)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        """Collect the micro-batches of one update and count what the update divides by, over all ranks."""
        samples, self._counting = self._take(epoch_iterator, num_batches)
        found: dict[str, float] = {}
        for sample, counts in zip(samples, self._counting, strict=True):
            for name, number in self._units(Batch.from_dict(sample)).items():
                found[name] = found.get(name, 0.0) + counts * number
        total = torch.tensor(list(found.values()), device=self.args.device, dtype=torch.float32)
        total = self.accelerator.reduce(total, "sum") if self.args.world_size > 1 else total
        self._counts, self._left = dict(zip(found, total.clamp(min=1.0), strict=True)), len(samples)
        whole = dict(zip(found, total, strict=True))
        self._absent = {name for name, number in whole.items() if not number}
        self._samples, self._moved, self._empty = samples, False, not bool(whole["/rows"])
        return samples, whole[""]

    def _units(self, batch: Batch) -> dict[str, float]:
        """What a micro-batch adds to each count; a sum adds nothing, and nothing divides by 1, but for the means."""
        _, unit = row_weights(self.model.reduction, batch.sequence)
        units = {"rows": batch.num_items, "sequences": batch.sequence.unique().numel(), "none": 0}[unit]
        return {"": units, "/rows": batch.num_items, **self.model.method.counts(batch)}

    def _count(self, term: str) -> Tensor:
        """What a term of this update is divided by: its own count, or that of the rows."""
        return self._counts.get(term, self._counts[""])

    # -- the step -----------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one micro-batch: this is the one place that divides."""
        self._sums_of_batch = self._terms(model, inputs)
        # DDP averages gradients over ranks; the count is already global, so the average is undone here.
        sums = ((k, v) for k, v in self._sums_of_batch.items() if not k.endswith("/value"))
        return sum(v * (self.accelerator.num_processes / self._count(k)) for k, v in sums)

    def _batch(self, inputs: Any) -> Batch:
        batch = Batch.from_dict(inputs).to(self.args.device)
        if self.augmentation is not None:
            batch.inputs["pixel_values"] = augment(
                batch.inputs["pixel_values"], batch.ids, seed=self.args.seed, epoch=self._epoch, **self.augmentation
            )
        return self.model.method.transform_batch(batch, self.model.train_state)

    def _terms(self, model: Any, inputs: Any) -> dict[str, Tensor]:
        batch = self._batch(inputs)
        meter = self.meter
        if meter is not None:
            self.model.head_timer = meter.head
        target = None
        if self.teacher is not None and not self.model.method.queries:
            with meter.teacher() if meter is not None else nullcontext():
                target = self.teacher(batch)
        sums: dict[str, Tensor] = model(batch, target)
        if not self._counting[-self._left]:  # another rank has the last examples; this one only keeps it company
            sums = {name: value * 0 for name, value in sums.items()}
        for name, value in sums.items():
            if name.endswith("/value"):
                key = name.removesuffix("/value")
                self._sums[key] = self._sums.get(key, torch.zeros_like(value)) + value
        if meter is not None:
            meter.rows += batch.num_items
        return sums

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not self._moved:
            self.model.train_state.step = self.state.global_step
            self._update_schedule = tuple(self.model.method.update_schedule(self.model.train_state))
        with self.meter.step("+".join(self._update_schedule)) if self.meter is not None else nullcontext():
            if not self._moved:
                self._players_move()
            if "student" not in self._update_schedule:
                loss = torch.zeros((), device=self.args.device)
            elif self.model.method.merges_gradients:
                loss = self._apart_step(model, inputs)
            else:
                loss = super().training_step(model, inputs, num_items_in_batch)
        self._left -= 1
        if self._left == 0:
            self._close_update()
        return loss

    def _players_move(self) -> None:
        """The moves of an update before the student's own; a turn without the student leaves its weights alone."""
        self._moved = True
        method, train_state = self.model.method, self.model.train_state
        movers = [name for name in self._update_schedule if name != "student"]
        if not movers:
            return

        def validation(number: int | None) -> Batch:
            if self.validation is None:
                raise InputError(f"Method {method.name!r} asks for validation examples and the run has none.")
            chosen = draw(len(self.validation), number, self.args.seed, train_state.step)  # type: ignore[arg-type]
            return Batch.from_dict(self.data_collator([self.validation[i] for i in chosen])).to(self.args.device)

        def total(values: Sequence[Tensor]) -> list[Tensor]:
            return [self.accelerator.reduce(v, "sum") if self.args.world_size > 1 else v for v in values]

        batches = self._company([self._batch(s) for s in self._samples], self._counting)
        context = AuxiliaryContext(
            train_state.student, self.teacher, batches, float(self._counts[""]), validation, total
        )  # type: ignore[arg-type]
        for name in movers:
            sums = self.auxiliary.move(name, partial(method.auxiliary_loss, name, context, train_state), context)
            for term, value in self._of_all(sums).items():
                self._sums[term] = self._sums.get(term, torch.zeros_like(value)) + value

    def _close_update(self) -> None:
        names = sorted(self._sums)
        if names:
            sums = torch.stack([self._sums[n].float() for n in names])
            if self.args.world_size > 1:
                sums = self.accelerator.reduce(sums, "sum")
            unit = "/rows" if self.model.reduction == "sum" else ""
            counts = torch.stack([self._counts.get(n, self._counts[unit]) for n in names])
            means = zip(names, (sums / counts).tolist(), strict=True)
            self._means = {name: mean for name, mean in means if name not in self._absent}
        self._sums = {}
        if self._term_gradients:
            self._merge()
        if not self._empty:
            self.model.method.on_pre_optimizer_step(self.model.train_state, self._means)

    def _apart_step(self, model: Any, inputs: Any) -> Tensor:
        """Backward of each term apart, accumulated over the update; `merge` then writes the gradients."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            sums = self._terms(self.model, inputs)
        owners = [p for _, p in self.model.owners()]
        names = [n for n in sums if not n.endswith("/value")]
        total = torch.zeros((), device=self.args.device)
        for i, name in enumerate(names):
            loss = sums[name] / self._count(name)
            total = total + loss.detach()
            grads = torch.autograd.grad(loss, owners, retain_graph=i + 1 < len(names), allow_unused=True)
            held = self._term_gradients.setdefault(name, [None] * len(owners))
            for j, grad in enumerate(grads):
                if grad is not None:
                    held[j] = grad if held[j] is None else held[j] + grad  # type: ignore[operator]
        return total * self.accelerator.num_processes

    def _merge(self) -> None:
        named = self.model.owners()
        if self.args.world_size > 1:
            for grads in self._term_gradients.values():
                for i, (_, parameter) in enumerate(named):
                    grad = grads[i] if grads[i] is not None else torch.zeros_like(parameter)
                    grads[i] = self.accelerator.reduce(grad, "sum")
        merged = self.model.method.merge(self._term_gradients, [owner for owner, _ in named])
        for (_, parameter), gradient in zip(named, merged, strict=True):
            parameter.grad = gradient
        self._term_gradients = {}

    # -- logs ---------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log to the trackers and, of training, one line to `metrics.jsonl`: with the loss go all terms of the update, those
        named after TRL (`rewards/chosen`) as they are, others as `terms/NAME`, and the method's state as `state/NAME`."""
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        terms = dict(self.model.method.reported(self._means))
        state = self.model.train_state.method_state.logs() if self.model.train_state.method_state is not None else {}
        named = {name if "/" in name else f"terms/{name}": value for name, value in terms.items()}
        super().log({**logs, **named, **{f"state/{name}": value for name, value in state.items()}}, start_time)
        if self.metrics_file is None or not self.args.should_save:
            return
        line = {
            "step": self.state.global_step,
            "epoch": round(self.state.epoch or 0.0, 6),
            "loss": logs["loss"],
            "terms": terms,
            "lr": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "state": state,
        }
        if self.rollouts is not None:
            line |= self.rollouts.logs()
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
