"""Model adapters: from a batch to the outputs of the rows that count, as logits, or as hidden states and a head."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError
from understudy.losses.subclasses import marginal_logits
from understudy.losses.two_heads import mixed_log_probabilities
from understudy.models.bodies import body, try_head, watched
from understudy.models.expert_files import EXPERTS, save_experts
from understudy.models.heads import head_name
from understudy.models.layouts import Layouts, Packing, needs_gpu
from understudy.models.modes import evaluating
from understudy.models.processors import Processor
from understudy.models.sharding import is_sharded, whole, whole_state
from understudy.models.taps import tapped
from understudy.models.weights import merged, reason, save_network
from understudy.targets import Dense, Projected


class ModelOutput(NamedTuple):
    """A model's outputs for the rows of a batch.

    Args:
        signal: `Dense` logits or `Projected` hidden states, `[rows, …]`; of a teacher any target.
        features: `[rows, width]` before the head, if requested.
        taps: outputs of tapped layers by name, `[examples, …]`, unchanged.
        router: the loss that balances the experts of a mixture, a scalar with its coefficient; `None` of other models.
    """

    signal: Any
    features: Tensor | None = None
    taps: Mapping[str, Tensor] = MappingProxyType({})
    router: Tensor | None = None

    def detach(self) -> ModelOutput:
        """The same values without gradient."""
        features = self.features.detach() if self.features is not None else None
        return ModelOutput(self.signal.detach(), features, {k: v.detach() for k, v in self.taps.items()})

    def to(self, device: torch.device | str) -> ModelOutput:
        """The same values on another device."""
        features = self.features.to(device) if self.features is not None else None
        return ModelOutput(self.signal.to(device), features, {k: v.to(device) for k, v in self.taps.items()})


class ModelAdapter(nn.Module):
    """Base class of the adapters. Subclasses implement `answer`; `forward` adds the taps."""

    model: Any

    def forward(self, batch: Batch, features: bool = False, taps: Mapping[str, nn.Module] | None = None) -> ModelOutput:
        """The model's outputs for the rows of the batch, with features and tapped layers if requested."""
        if not taps:
            return self.answer(batch, features)
        with tapped(taps) as seen:
            rows = self.answer(batch, features)
        return rows._replace(taps=seen)

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        """Signal and, if requested, features of the rows."""
        raise NotImplementedError

    def text(self, batch: Batch) -> tuple[str, Tensor] | None:
        """The tokens that the model reads: which tokenizer's they are, and `[examples, length]`, which are text; `None` for
        other inputs."""
        return None

    @property
    def balances(self) -> bool:
        """Whether outputs in training mode hold a loss of the model's routers."""
        return False

    def save(self, folder: Path) -> None:
        """Save with `save_pretrained`, in the small networks' own format, or as the module's state. PEFT adapters are
        saved as adapters, unless their base has no name (a new model): then all of it is saved, merged.

        A sharded model is gathered first: every rank must call, and the first one writes.
        """
        state = whole_state(self.model) if is_sharded(self.model) else None
        if state is not None and dist.get_rank() > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(getattr(self.model, "config", None), EXPERTS):
            save_experts(self.model, folder)
        else:
            save_network(merged(self.model) if state is None else self.model, folder, state)

    def add_adapters(self, options: dict[str, Any]) -> None:
        """Add LoRA adapters, which are trained instead of the model; `options` are those of `peft.LoraConfig`."""
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise InputError("student.peft needs the extra: pip install understudy[peft].") from None
        try:
            self.model = get_peft_model(self.model, LoraConfig(**options))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise InputError(f"Bad student.peft options: {str(error).splitlines()[0]}") from error


class ClassifierAdapter(ModelAdapter):
    """An image classifier. A subclass that reads other inputs writes `logits`.

    Args:
        model: takes `[images, channels, height, width]`, returns logits or an output with `logits`.
        classes: number of classes.
        normalise: mean and standard deviation of the channels, applied to pixels in [0, 1].
        processor: instead of `normalise`, the steps of a processor of transformers; it is saved with the model.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        normalise: tuple[list[float], list[float]] | None = None,
        processor: Processor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.classes, self.normalise, self.processor = model, classes, normalise, processor
        self.padding = 0
        self.class_names: tuple[dict[int, str], dict[str, int]] | None = None  # kept while the model has another head

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        if not features:
            return ModelOutput(Dense(batch.select(self.logits(batch))))
        head = find_head(self)
        if head is None:
            raise InputError(
                f"{type(self.model).__name__} has no linear head of {self.classes} classes to read features at."
            )
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            logits = self.logits(batch)
        finally:
            hook.remove()
        if not seen:
            raise InputError(f"The head of {type(self.model).__name__} was never called: its features cannot be read.")
        return ModelOutput(Dense(batch.select(logits)), batch.select(self.head_inputs(seen[-1], batch)))

    def logits(self, batch: Batch) -> Tensor:
        """`[examples, classes]`."""
        pixels = self.shown(batch.inputs["pixel_values"]).to(next(self.model.parameters()).dtype)
        return self.checked(self.model(pixels), len(pixels))

    def head_inputs(self, seen: Tensor, batch: Batch) -> Tensor:
        """`[examples, width]`, of what the head was given."""
        return seen

    def shown(self, pixels: Tensor) -> Tensor:
        """Preprocess pixels in [0, 1] for the model."""
        if self.processor is not None:
            return self.processor(pixels)
        if self.normalise is None:
            return pixels
        mean, deviation = (pixels.new_tensor(v)[:, None, None] for v in self.normalise)
        return (pixels - mean) / deviation

    def save(self, folder: Path) -> None:
        """As for every model, with its processor, so that a pipeline of transformers can load both."""
        super().save(folder)
        if self.processor is not None and (not is_sharded(self.model) or dist.get_rank() == 0):
            self.processor.save(folder)

    @torch.no_grad()
    def try_on(self, shape: tuple[int, ...]) -> None:
        """Classify two blank images of `shape`, as a test.

        Raises:
            InputError: the model does not accept them, or returns no logits for them.
        """
        first = next(self.model.parameters(), None)
        if first is None or first.is_meta or not first.numel():
            return
        blank = self.shown(torch.zeros(2, *shape, device=first.device)).to(first.dtype)
        with evaluating(self.model):
            try:
                self.checked(self.model(blank), len(blank))
            except InputError:
                raise
            except Exception as error:  # models raise any type on inputs that they do not support
                raise InputError(
                    f"{type(self.model).__name__} cannot read images of {list(shape)}: {reason(error)}. Choose a model for "
                    "such images, or one with a preprocessor_config.json that makes them its size."
                ) from error

    def checked(self, output: Any, examples: int) -> Tensor:
        """The logits in what a model returned for so many examples."""
        held = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        logits = output if isinstance(output, Tensor) else held
        if not isinstance(logits, Tensor):
            raise InputError(
                f"{type(self.model).__name__} returns a {type(output).__name__}, not logits: return a tensor [images, classes], or "
                "a mapping or an object with logits."
            )
        if self.classes == 2 and logits.shape[-1] == 1:  # one sigmoid output: the logit of the second class
            return torch.cat([torch.zeros_like(logits), logits], -1)
        if logits.shape != (examples, self.classes):
            raise InputError(
                f"{type(self.model).__name__} gives {tuple(logits.shape)} for {examples} examples of {self.classes} classes: "
                "one row of logits an example is expected. Choose a model of these classes, or data of its."
            )
        return logits


class MarginalAdapter(ModelAdapter):
    """A classifier with several outputs per class; the log-sum-exp of the outputs of a class is its logit."""

    def __init__(self, wide: ModelAdapter, classes: int) -> None:
        super().__init__()
        self.wide, self.classes = wide, classes

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        rows: ModelOutput = self.wide(batch, features)
        return rows._replace(signal=Dense(marginal_logits(rows.signal.logits, self.classes)))


class MixtureAdapter(ModelAdapter):
    """A classifier with two heads side by side, read as their mixture: α softmax(first) + (1 − α) softmax(second / β)."""

    def __init__(self, wide: ModelAdapter, alpha: float, beta: float) -> None:
        super().__init__()
        self.wide, self.alpha, self.beta = wide, alpha, beta

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        rows: ModelOutput = self.wide(batch, features)
        first, second = rows.signal.logits.chunk(2, -1)
        return rows._replace(signal=Dense(mixed_log_probabilities(first, second, alpha=self.alpha, beta=self.beta)))


class CausalLMAdapter(ModelAdapter):
    """A causal language model. The loss applies the head, so that no `[tokens, vocabulary]` tensor exists.

    Args:
        model: a causal LM of transformers, or one wrapped by PEFT.
        vocabulary: number of tokens; further rows of the head (padding) are left out.
        packing: layout of batches, as in `understudy.models.layouts`; it does not change the outputs.

    A head that is more than a matrix (with LoRA, or quantised) is called on the selected rows and gives `Dense`. If a
    trial at loading shows that this differs from the model's own logits, those are used (`own_logits`).
    """

    def __init__(self, model: Any, vocabulary: int, packing: Packing = "none") -> None:
        super().__init__()
        self.model, self.vocabulary = model, vocabulary
        if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
            raise InputError(
                f"{type(model).__name__} is no causal language model of transformers (it has no get_output_embeddings): derive "
                "it from PreTrainedModel with GenerationMixin, or name one."
            )
        head = model.get_output_embeddings()
        if head is None:
            raise InputError(f"{type(model).__name__} has no output head: it is not a causal language model.")
        self.padding = max(0, head.weight.shape[0] - vocabulary)
        self.processor: Any = None  # of a vision-language model; it is saved with it
        self.own_logits: bool | None = None
        if not needs_gpu(self._inner):
            self._try_head()
        self.layouts, self.as_collated = Layouts(packing, self._inner), Layouts("none", self._inner)

    @property
    def _inner(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _try_head(self) -> None:
        inner = self._inner
        if next(inner.parameters()).is_meta or not inner.get_input_embeddings().weight.numel():
            return  # on the meta device, or partitioned by DeepSpeed
        self.own_logits = not try_head(inner, lambda hidden: self._logits(inner, hidden), self.vocabulary)

    def forward(self, batch: Batch, features: bool = False, taps: Mapping[str, nn.Module] | None = None) -> ModelOutput:
        """As for every model; taps return the outputs in the layout of the collated batch."""
        if not taps:
            return self.answer(batch, features)
        layouts, self.layouts = self.layouts, self.as_collated
        try:
            return super().forward(batch, features, taps)
        finally:
            self.layouts = layouts

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        return self.token_rows(batch, features)

    def save(self, folder: Path) -> None:
        """As for every model, with its processor, so that transformers can load both."""
        super().save(folder)
        if self.processor is not None and (not is_sharded(self.model) or dist.get_rank() == 0):
            self.processor.save_pretrained(str(folder))

    def token_rows(
        self, tokens: Batch, features: bool = False, groups: Sequence[Sequence[int]] | None = None
    ) -> ModelOutput:
        """The rows of a batch of tokens. Sequences of one of `groups` may share the computation of their common prefix."""
        inner = self._inner
        balanced = self.balances and self.training  # the routers' loss reads the mask of a batch as it is collated
        laid = (self.as_collated if balanced else self.layouts).lay(inner, tokens, groups)
        asked = {"use_cache": False, **({"output_router_logits": balanced} if self.balances else {})}
        if self.own_logits is None:
            self._try_head()
        if self.own_logits:
            with watched(inner) as seen:
                found = inner(**laid.inputs, **asked)
            logits = laid.rows(found.logits, tokens)[..., : self.vocabulary]
            if features and not seen:
                raise InputError(
                    f"{type(inner).__name__} does not show its hidden states: choose a method without them."
                )
            hidden = laid.rows(seen[-1], tokens) if features else None
            return ModelOutput(Dense(logits.float()), hidden, router=self._router(inner, found))
        if balanced:  # the loss is made above the body, with the logits of one token
            with watched(inner) as seen:
                found = inner(**laid.inputs, **asked, logits_to_keep=1)
            hidden, router = laid.rows(seen[-1], tokens), self._router(inner, found)
        else:
            hidden, router = laid.rows(body(inner)(**laid.inputs, **asked).last_hidden_state, tokens), None
        return ModelOutput(self._signal(inner, hidden), hidden if features else None, router=router)

    @property
    def balances(self) -> bool:
        """Whether its configuration asks for the loss of the routers, by `output_router_logits`."""
        return bool(getattr(self._inner.config.get_text_config(), "output_router_logits", False))

    def _router(self, inner: Any, found: Any) -> Tensor | None:
        """The coefficient times the loss of the routers in an output of the model."""
        loss = getattr(found, "aux_loss", None)
        return None if loss is None else inner.config.get_text_config().router_aux_loss_coef * loss

    def _signal(self, inner: Any, hidden: Tensor) -> Dense | Projected:
        head = inner.get_output_embeddings()
        if type(head) is not nn.Linear:
            return Dense(self._logits(inner, hidden))
        bias = head.bias[: self.vocabulary] if head.bias is not None else None
        weight = head.weight if self.padding == 0 else head.weight[: self.vocabulary]
        return Projected(hidden, weight, bias, *_scaling(inner))

    def _logits(self, inner: Any, hidden: Tensor) -> Tensor:
        scale, softcap = _scaling(inner)
        logits = inner.get_output_embeddings()(hidden)[..., : self.vocabulary].float() * scale
        return softcap * torch.tanh(logits / softcap) if softcap is not None else logits


def _scaling(inner: Any) -> tuple[float, float | None]:
    """The factor of a model's logits, and the soft-cap applied after it."""
    config = inner.config.get_text_config()
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    found = {name: getattr(config, name, None) or None for name in names}
    for name, value in found.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise InputError(f"{type(inner).__name__}: {name} is {value!r} in its configuration and must be a number.")
    return (found["logit_scale"] or 1.0) / (found["logits_scaling"] or 1.0), found["final_logit_softcapping"]


def find_head(rows: ModelAdapter) -> nn.Module | None:
    """The classifier or output head of a model: an LM's output embeddings, or the last linear layer of its classes."""
    if isinstance(rows, ClassifierAdapter):
        name = head_name(rows.model, rows.classes)
        return rows.model.get_submodule(name) if name is not None else None
    getter = getattr(rows.model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def state_hash(model: nn.Module) -> str:
    """SHA-256 of all weights with their names. Every rank of a sharded model must call it."""
    digest = hashlib.sha256()
    for name, held in sorted(model.state_dict().items()):
        digest.update(name.encode())
        value = whole(held)
        digest.update(
            value.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy().tobytes()
            if value.dim()
            else str(value.item()).encode()
        )
    return digest.hexdigest()
