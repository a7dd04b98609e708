"""The trainer of all methods, a subclass of `transformers.Trainer`.

It adds: the teacher's targets; one division by the count over the whole update and all ranks; the mean of each term,
for the method's state; separate gradients of terms, for methods that merge them; steps of auxiliary optimisers;
validation with the task's own metrics; checkpoints that resume exactly. These parts are in `ranks`, `saving`,
`validation` and `auxiliary`; this class calls them from the hooks of `transformers.Trainer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from understudy.data import Batch, augment
from understudy.errors import InputError
from understudy.files import append_line
from understudy.models.sharding import agreed, is_sharded, load_optimizer, load_state, together, usable, whole_state
from understudy.teachers import Teacher
from understudy.training import checkpoint as ck
from understudy.training import saving
from understudy.training.alarm import new_alarm, write_line
from understudy.training.arguments import epoch_length
from understudy.training.auxiliary import AuxiliaryContext, AuxiliaryOptimizers
from understudy.training.method import Method
from understudy.training.order import EpochSampler, draw
from understudy.training.ranks import Ranks
from understudy.training.reduction import Counts, TermSums
from understudy.training.rollouts import Rollouts
from understudy.training.train_module import TrainModule
from understudy.training.update import FollowSteps, Update
from understudy.training.validation import Validation


class DistillationTrainer(Trainer):
    """Trains a `TrainModule` with a teacher. The result does not depend on the number of processes.

    Args:
        train_module: student and method.
        args: the training arguments of `transformers`.
        train_dataset, collate: examples, and the function that collates them into the tensors of a `Batch`.
        teacher: returns the targets of a batch; `None` for a method that needs none.
        validation_dataset: examples that auxiliary losses may draw from.
        validation: the task's metrics during training (`eval_strategy`), or `None`.
        augmentation: keyword options of `understudy.data.augment`, or `None`.
        meter: a cost meter with contexts `teacher()`, `student()`, `head()` and `step()`, or `None`.
        metrics_file: JSON lines, one per log.
        rollouts: replaces completions by the student's samples, or `None`.
        steps_before: optimizer steps of earlier phases, which are added to the step in log files.
    """

    model: TrainModule
    data_collator: Any
    control: Any

    def __init__(
        self,
        train_module: TrainModule,
        args: TrainingArguments,
        train_dataset: Dataset[Any],
        collate: Any,
        *,
        teacher: Teacher | None = None,
        validation_dataset: Dataset[Any] | None = None,
        validation: Validation | None = None,
        augmentation: Mapping[str, Any] | None = None,
        meter: Any = None,
        metrics_file: Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        rollouts: Rollouts | None = None,
        steps_before: int = 0,
    ) -> None:
        method = train_module.method
        if method.requires.in_steps and teacher is None:
            raise InputError(f"Method {method.name!r} needs a teacher and none was given: set `teacher`.")
        args.remove_unused_columns = False
        Ranks.check_arguments(args)
        super().__init__(
            model=train_module,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=validation_dataset,
            data_collator=collate,
            callbacks=callbacks,
        )
        self.ranks = Ranks(self, train_module)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(FollowSteps(self))
        self.loss_is_scaled_for_ga = True  # `compute_loss` already divides by the count of the whole update
        self.teacher, self.meter, self.metrics_file = teacher, meter, metrics_file
        self.augmentation, self.validation, self.rollouts = augmentation, validation, rollouts
        self.validation_dataset = validation_dataset
        self.steps_before, self._epoch = steps_before, 0
        self._resumed_epoch: int | None = None
        seed = args.data_seed if args.data_seed is not None else args.seed
        data: Any = train_dataset
        self.sampler = EpochSampler(len(data), seed, epoch_length(method, args))
        self._update = Update((), (), Counts())
        self._sums: tuple[Mapping[str, Tensor], Counts] = {}, Counts()
        train_module.train_state.teacher = teacher
        self.auxiliary = AuxiliaryOptimizers(method.auxiliary_optimizers(), train_module.train_state.modules)
        if (method.merges_gradients or self.auxiliary.optimizers) and args.fp16:
            raise InputError(f"Method {method.name!r} makes gradients of its own and cannot scale them: use bf16.")
        if meter is not None:
            meter.watch("student", train_module.student)
            train_module.head_timer = meter.head
            if teacher is not None:
                meter.watch("teacher", getattr(teacher, "model", None))

    # -- processes and data -------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers, with FSDP2 on CPUs too."""
        with Ranks.own_environment() as launched:
            super().create_accelerator_and_postprocess()
        if Ranks.apply_fsdp(self.accelerator, self.args, launched):
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """With one process that of transformers; with several, each rank's share of every round."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        return self.ranks.dataloader(self._get_train_sampler(), self.train_dataset, self.data_collator)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def begin_epoch(self, epoch: int) -> None:
        """Set the epoch that order and augmentation depend on, and ask the method how it draws its examples.

        A run that is resumed inside an epoch keeps the `Sampling` that was chosen when the epoch began.
        """
        self._epoch = epoch
        if self.rollouts is not None:
            self.rollouts.epoch = epoch
        if self._resumed_epoch != epoch:
            self.model.train_state.step = self.state.global_step
            self.sampler.begin(epoch, self.model.method.sampling(self.model.train_state))
        self._resumed_epoch = None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Collect the micro-batches of one update and count its divisors over all ranks."""
        samples, counting = self.ranks.take(epoch_iterator, num_batches)
        prepare = super()._prepare_inputs
        batches = [Batch.from_dict(prepare(sample)) for sample in samples]
        parts = [self._counts(b).scaled(float(c)) for b, c in zip(batches, counting, strict=True)]
        counts = Counts.total(parts, self.ranks.sum_numbers) if parts else Counts()
        self._update = Update(batches, counting, counts)
        return samples, counts.units

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As they are: `get_batch_samples` has put them on the device, and steps read the update's batches."""
        return inputs

    def _counts(self, batch: Batch) -> Counts:
        return Counts.of(batch, self.model.reduction, self.model.counts(batch))

    def shown(self, batch: Batch) -> Batch:
        """A micro-batch as both sides see it: augmented, and as the method transforms it."""
        if self.augmentation is not None:
            pixels = augment(
                batch.inputs["pixel_values"], batch.ids, seed=self.args.seed, epoch=self._epoch, **self.augmentation
            )
            batch = replace(batch, inputs={**batch.inputs, "pixel_values": pixels})
        return self.model.method.transform_batch(batch, self.model.train_state)

    # -- the step -----------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of one micro-batch; auxiliary optimisers step before the first one of an update."""
        update, train_state = self._update, self.model.train_state
        if update.roles is None:
            train_state.step = self.state.global_step
            update.roles = tuple(self.model.method.update_schedule(train_state))
        with self.meter.step("+".join(update.roles)) if self.meter is not None else nullcontext():
            if update.done == 0:
                self._step_auxiliary()
                self.model.sum_ahead(
                    map(self.shown, update.batches),
                    update.counting,
                    self.ranks.sum_tensors,
                    self.compute_loss_context_manager,
                )
            if "student" not in update.roles:
                loss = torch.zeros((), device=self.args.device)
            elif self.model.method.merges_gradients:
                loss = self._backward_by_term(model)
            else:
                loss = super().training_step(model, inputs, num_items_in_batch)
        update.done += 1
        if update.done == len(update.batches):
            self._end_update()
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the update's next micro-batch, divided by the count of the whole update."""
        losses = self.term_sums(model).losses
        first, *others = (self._update.counts.divide(name, value) for name, value in losses.items())
        return self._over_ranks(sum(others, start=first))

    def _over_ranks(self, loss: Tensor) -> Tensor:
        """DDP averages gradients over ranks; the count is already global, so the average is undone here."""
        ranks = self.accelerator.num_processes
        return loss if ranks == 1 else loss * ranks

    def term_sums(self, model: Any) -> TermSums:
        """The teacher's and student's forward pass on the update's next micro-batch, and the sum of each term over its rows."""
        update = self._update
        batch, target = self.shown(update.batches[update.done]), None
        if self.teacher is not None and self.model.method.requires.teacher == "outputs":
            with self.meter.teacher() if self.meter is not None else nullcontext():
                target = self.teacher(batch)
        sums: TermSums = model(batch, target)
        if not update.counting[update.done]:
            # Another rank has the last examples; this one runs the same collectives and adds nothing.
            sums = TermSums(*({name: value * 0 for name, value in part.items()} for part in sums))
        update.add(sums.values)
        if self.meter is not None:
            self.meter.rows += batch.num_items
        return sums

    def _step_auxiliary(self) -> None:
        """The steps of auxiliary optimisers that the method schedules in this update, before the student's step."""
        update, method, train_state = self._update, self.model.method, self.model.train_state
        names = [name for name in update.roles or () if name != "student"]
        if not names:
            return
        context = AuxiliaryContext(
            student=self.model.student,
            teacher=self.teacher,
            batches=self.ranks.companions([self.shown(b) for b in update.batches], update.counting),
            counts=update.counts,
            reduction=self.model.reduction,
            validation=self._draw_validation,
            total=self.ranks.sum_tensors,
        )
        for name in names:
            sums = self.auxiliary.step(name, partial(method.auxiliary_loss, name, context, train_state), context)
            update.add(self.ranks.same_names(sums))

    def _draw_validation(self, number: int | None) -> Batch:
        if self.validation_dataset is None:
            raise InputError(
                f"Method {self.model.method.name!r} needs validation examples and the run has none: set data with a "
                "validation split."
            )
        data: Any = self.validation_dataset
        chosen = draw(len(data), number, self.args.seed, self.model.train_state.step)
        return Batch.from_dict(self.data_collator([data[i] for i in chosen])).to(self.args.device)

    def _backward_by_term(self, model: Any) -> Tensor:
        """Backward of each term apart, accumulated over the update; `Method.merge` then writes the gradients."""
        model.train()
        with self.compute_loss_context_manager():
            losses = self.term_sums(self.model).losses
        owners = [p for _, p in self.model.owners()]
        total = torch.zeros((), device=self.args.device)
        for i, (name, value) in enumerate(losses.items()):
            loss = self._update.counts.divide(name, value)
            total = total + loss.detach()
            grads = torch.autograd.grad(loss, owners, retain_graph=i + 1 < len(losses), allow_unused=True)
            self._update.add_gradients(name, grads)
        return self._over_ranks(total)

    def _end_update(self) -> None:
        """After the last backward pass: merged gradients, and the method's own state."""
        update, method = self._update, self.model.method
        if update.values:
            self._sums = update.values, update.counts
        if update.gradients:
            named = self.model.owners()
            gradients = {name: self.ranks.sum_gradients(held, named) for name, held in update.gradients.items()}
            merged = method.merge(gradients, [owner for owner, _ in named])
            for (_, parameter), gradient in zip(named, merged, strict=True):
                parameter.grad = gradient
        # The means wait for the device and the other ranks: they are taken for a method that reads them, and for logs.
        if update.counts.items and type(method).on_pre_optimizer_step is not Method.on_pre_optimizer_step:
            method.on_pre_optimizer_step(self.model.train_state, self._means())

    def _means(self) -> dict[str, float]:
        """Each term's mean over the last update that had terms, over all ranks; every rank must ask."""
        values, counts = self._sums
        if not (names := sorted(values)):
            return {}
        (sums,) = self.ranks.sum_tensors([torch.stack([values[n].float() for n in names])])
        means = torch.stack([counts.mean(n, v) for n, v in zip(names, sums, strict=True)])
        return {n: mean for n, mean in zip(names, means.tolist(), strict=True) if counts.own.get(n, 1.0)}

    # -- validation ---------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train. A checkpoint at which training had ended is loaded, and no further step is made."""
        if resume_from_checkpoint is not None:
            self.state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            # A run with more steps than its checkpoint recorded is continued.
            if self.settled or self.state.global_step >= max(self.state.max_steps, self.model.train_state.total):
                self._load_from_checkpoint(resume_from_checkpoint)
                self._load_rng_state(resume_from_checkpoint, early=("rollouts", "sampler"))
                self.model.train_state.step = self.state.global_step
                if self.args.load_best_model_at_end and self._best_folder.is_dir():
                    self._load_best_model()
                self.model.method.on_train_end(self.model.train_state)
                return None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def settled(self) -> bool:
        """Whether the last `patience` evaluations brought no improvement, or the method raises an alarm that ends training."""
        history, alarm = self.state.log_history, self.model.method.alarm(self.state.log_history)
        idle = self.validation is not None and self.validation.settled(history, self.args)
        return idle or (alarm is not None and alarm.ends)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The validation metrics of the present student; logged, and written to `validation.jsonl`.

        Evaluation does not affect training: random states are restored.
        """
        assert self.validation is not None
        before = ck.rng_state()
        with usable(self.model):
            student = self.model.method.eval_model(self.model.student, self.model.train_state)
            found = agreed(dict(self.validation.metrics(student)))
        ck.set_rng_state(before)
        if self.rollouts is not None:
            self.rollouts.on_evaluate(found)
        if self.metrics_file is not None and self.args.should_save:
            line = {"step": self.steps_before + self.state.global_step, **found}
            append_line(self.metrics_file.with_name("validation.jsonl"), line)
        named = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(named))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save at every new best evaluation, so that the weights loaded at the end are those of the best evaluation."""
        best: bool = super()._determine_best_metric(metrics, trial)
        if best and self.args.load_best_model_at_end:
            self.control.should_save = True
        if self.settled:
            self.control.should_training_stop = True
        return best

    @property
    def _best_folder(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"

    def _finalize_training(self, *args: Any) -> Any:
        if self._best_folder.is_dir():  # also if the run folder was moved
            self.state.best_model_checkpoint = str(self._best_folder)
        with self._no_deletion():  # old checkpoints were deleted when the newest was sealed
            return super()._finalize_training(*args)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self._best_folder))

    # -- checkpoints --------------------------------------------------------------------------------------------

    @contextmanager
    def _no_deletion(self) -> Iterator[int | None]:
        """Prevent transformers from deleting old checkpoints before the newest is sealed; yields the limit it would
        apply."""
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield keep
        finally:
            self.args.save_total_limit = keep

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._no_deletion() as keep:
            super()._save_checkpoint(model, trial)
        together()  # the seal covers the files of all ranks
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            ck.seal(folder / f"checkpoint-{self.state.global_step}")
            saving.delete_old(folder, keep or 2)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights of student and method; sharded weights are gathered, and the first rank writes."""
        state = whole_state(self.model) if is_sharded(self.model) else self.model.state_dict()
        if self.args.should_save:
            saving.save_weights(Path(output_dir or self.args.output_dir), state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_state(self.model, saving.load_weights(Path(resume_from_checkpoint)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        saving.save_optimizer(
            Path(output_dir), self.optimizer, self.lr_scheduler, is_sharded(self.model), self.args.should_save
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        early = ck.load_tree(self._state_file(checkpoint))  # the first batches are drawn before the rest is loaded
        if self.rollouts is not None:
            self.rollouts.load_state_dict(early["rollouts"])
        self.sampler.load_state_dict(early["sampler"])
        self._resumed_epoch = self.sampler.epoch
        if early["method"] is not None:  # `Method.sampling` may read it, and be asked before the rest is loaded
            self.model.train_state.method_state.load_state_dict(early["method"])
        tree = saving.load_optimizer_tree(Path(checkpoint))
        load_optimizer(self.optimizer, tree["optimizer"])
        self.lr_scheduler.load_state_dict(tree["scheduler"])

    def _state_file(self, folder: str) -> Path:
        return saving.state_file(Path(folder), self.args.world_size, self.args.process_index)

    def _stateful(self) -> dict[str, Any]:
        """Objects whose state a checkpoint holds beside weights, optimiser and random states, by name."""
        state = self.model.train_state.method_state
        parts = {"method": state, "auxiliary": self.auxiliary, "meter": self.meter}
        return {**parts, "rollouts": self.rollouts, "sampler": self.sampler}

    def _save_rng_state(self, output_dir: str) -> None:
        saving.save_state(self._state_file(output_dir), self._stateful())

    def _load_rng_state(
        self, checkpoint: str | None, early: tuple[str, ...] = ("method", "rollouts", "sampler")
    ) -> None:
        if checkpoint is not None:
            parts = self._stateful() | dict.fromkeys(early)  # already there, see `_load_optimizer_and_scheduler`
            saving.load_state(self._state_file(checkpoint), parts, self.args.world_size)

    # -- logs ---------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log to the trackers and, during training, write one line to `metrics.jsonl`. The terms of the update are
        logged with the loss: those with TRL's names (`rewards/chosen`) as they are, others as `terms/NAME`, and the
        method's state as `state/NAME`. A method's alarm is a warning, and may end training."""
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        terms = dict(self.model.method.logged(self._means()))
        state = self.model.train_state.method_state.logs() if self.model.train_state.method_state is not None else {}
        named = {name if "/" in name else f"terms/{name}": value for name, value in terms.items()}
        super().log({**logs, **named, **{f"state/{name}": value for name, value in state.items()}}, start_time)
        alarm = new_alarm(self.model.method, self.state.log_history)
        if alarm is not None and alarm.ends:
            self.control.should_training_stop = True
        write_line(self, logs, terms, state, alarm)
