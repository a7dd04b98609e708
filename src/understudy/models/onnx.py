"""Models as ONNX files: written by torch's exporter, read by onnxruntime, evaluated like any other model."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError
from understudy.files import writing
from understudy.models.adapters import CausalLMAdapter, ClassifierAdapter, ModelAdapter, ModelOutput
from understudy.models.modalities import ModalitiesAdapter
from understudy.models.modes import evaluating
from understudy.models.text_classifiers import TextClassifierAdapter
from understudy.models.weights import reason
from understudy.targets import Dense

EXTRA = "pip install understudy[onnx]"


class _Logits(nn.Module):
    """A model as a function of named tensors; pixels are in [0, 1], so that its preprocessing is in the file too."""

    def __init__(self, adapter: ModelAdapter, names: list[str]) -> None:
        super().__init__()
        self.adapter, self.names = adapter, names

    def forward(self, *inputs: Tensor) -> Tensor:
        named, adapter = dict(zip(self.names, inputs, strict=True)), self.adapter
        if isinstance(adapter, CausalLMAdapter):
            logits: Tensor = adapter.model(**named, use_cache=False).logits
            return logits[..., : adapter.vocabulary].float()
        assert isinstance(adapter, ClassifierAdapter)
        if isinstance(adapter, TextClassifierAdapter):
            return adapter.checked(adapter.model(**named), inputs[0].shape[0])
        return adapter.checked(adapter.model(*map(adapter.shown, inputs)), inputs[0].shape[0])


def model_inputs(adapter: ModelAdapter, batch: Batch) -> Mapping[str, Tensor]:
    """What the model of an adapter is given for a batch, by name: the inputs of its ONNX file."""
    if isinstance(adapter, TextClassifierAdapter):
        return adapter.inputs(batch)
    names: Sequence[str] = ("pixel_values",)
    if isinstance(adapter, CausalLMAdapter):
        names = ("input_ids", "attention_mask")
    elif isinstance(adapter, ModalitiesAdapter):
        names = adapter.reads
    return {name: batch.inputs[name] for name in names}


def write_onnx(adapter: ModelAdapter, batch: Batch, file: Path) -> None:
    """Export a classifier or causal LM with weights of 32 bits; number of examples and length of texts stay free.

    Args:
        batch: of two examples or more, of two tokens or more; shows the exporter what inputs look like.

    Raises:
        InputError: the extra is missing, the model is of another kind, or torch cannot export it.
    """
    _runtime()
    if not isinstance(adapter, (ClassifierAdapter, CausalLMAdapter)):
        raise InputError(
            f"A {type(adapter.model).__name__} is no classifier and no causal language model: only these can be exported."
        )
    inputs = {name: value.cpu().contiguous() for name, value in model_inputs(adapter, batch).items()}
    free = torch.export.Dim.DYNAMIC
    texts = isinstance(adapter, (CausalLMAdapter, TextClassifierAdapter))
    sizes = tuple({0: free, 1: free} if texts else {0: free} for _ in inputs)
    module = _Logits(adapter, list(inputs)).cpu()
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
        module = copy.deepcopy(module).float()  # onnxruntime has no bfloat16 on CPUs
    silenced = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)  # the exporter logs each of its tries, with tracebacks
        with warnings.catch_warnings(), evaluating(module), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=(sizes,),
                input_names=list(inputs),
                output_names=["logits"],
                verbose=False,
            )
        assert program is not None
        with _whole(file) as scratch:
            program.save(str(scratch))
    except InputError:
        raise
    except Exception as error:  # torch raises any type on models that it cannot trace
        said = reason(error.__cause__ or error).rstrip(".")
        raise InputError(f"torch cannot export {type(adapter.model).__name__} to ONNX: {said}.") from error
    finally:
        logging.disable(silenced)


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A path of the same name in a folder of its own, from where the file moves into place when it is complete, with what
    lies beside it (weights above 2 GB, which it names): one that was cut off would look like an export.

    Raises:
        InputError: as `writing`.
    """
    scratch = file.parent / f"{file.name}.{uuid.uuid4().hex}.tmp"
    with writing(file):
        try:
            scratch.mkdir(parents=True)
            yield scratch / file.name
            for path in sorted(scratch.iterdir(), reverse=True):  # the file itself last
                os.replace(path, file.parent / path.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def write_int8(file: Path, output: Path) -> None:
    """The same model with weights of matrix products in int8, and activations quantised as it runs (dynamic quantisation)."""
    _runtime()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a preprocessing that dynamic quantisation does not need
    try:
        with _whole(output) as scratch:
            quantize_dynamic(str(file), str(scratch), weight_type=QuantType.QInt8)
    except InputError:
        raise
    except Exception as error:  # of any type, as for a file of its own that a full disk has cut
        raise InputError(
            f"onnxruntime cannot write {output}: {reason(error).rstrip('.')}. Free space if the disk is full, or export "
            "without --int8."
        ) from error
    finally:
        root.setLevel(level)


class OnnxAdapter(ModelAdapter):
    """An ONNX file as a model.

    Args:
        file: written by `write_onnx` or `write_int8`.
        source: the model that it was exported from; says how batches become inputs.
    """

    def __init__(self, file: Path, source: ModelAdapter) -> None:
        super().__init__()
        options = _runtime().SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = _runtime().InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.takes = [value.name for value in self.session.get_inputs()]
        self.source = [source]  # in a list: its parameters are not this model's
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # callers move batches to a parameter's device

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        given = model_inputs(self.source[0], batch)
        (logits,) = self.session.run(None, {name: given[name].numpy() for name in self.takes})
        return ModelOutput(Dense(batch.select(torch.from_numpy(logits))))


def _runtime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError:
        raise InputError(f"Export to ONNX needs the extra: {EXTRA}.") from None
    return onnxruntime
