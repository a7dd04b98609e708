"""Weights sharded over ranks with FSDP2: sharding a frozen model, using it outside of a step, and gathering its state."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def ranks() -> int:
    """World size; 1 for a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def together() -> None:
    """Barrier, if there are several ranks."""
    if ranks() > 1:
        dist.barrier()


def agreed(value: Any) -> Any:
    """Broadcast the value of the first rank, so that decisions that depend on it are the same on all ranks."""
    held = [value]
    if ranks() > 1:
        dist.broadcast_object_list(held, src=0)
    return held[0]


def of_ranks(value: Any) -> list[Any]:
    """The values of all ranks, in their order; tensors must be on the CPU. Every rank must call it."""
    if ranks() == 1:
        return [value]
    held: list[Any] = [None] * ranks()
    dist.all_gather_object(held, value)
    return held


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    if ranks() == 1:
        return flag
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def block_names(model: nn.Module) -> list[str]:
    """Class names of the blocks that transformers shards as units, limited to those in the model."""
    named = {n for m in model.modules() for n in getattr(m, "_no_split_modules", None) or ()}
    return sorted(named & {type(m).__name__ for m in model.modules()})


def shard(model: nn.Module, device: torch.device | str) -> None:
    """Shard a model over all ranks, in place: block by block, each gathered when it is used.

    The weights outside of the blocks (embeddings, last norm, head) are one group. It is gathered at the model's first
    forward pass and stays, so that a head that is read tile by tile afterwards is gathered once.
    """
    mesh = init_device_mesh(torch.device(device).type, (ranks(),))
    names = block_names(model)
    for module in [m for m in model.modules() if type(m).__name__ in names]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def is_sharded(model: nn.Module) -> bool:
    """Whether any weight is sharded over ranks."""
    return any(isinstance(p, DTensor) for p in model.parameters())


@contextmanager
def usable(model: nn.Module) -> Iterator[None]:
    """Inside the block a part of a sharded model may be called alone. Every rank must make the same calls."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model._get_fsdp_state()._lazy_init()  # a part that is called first would take itself for the root
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def whole(value: Tensor) -> Tensor:
    """Gather a tensor; every rank must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def unwrap(model: nn.Module) -> None:
    """Remove the wrappers of FSDP's activation checkpointing, inside which for example PEFT does not find its layers."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, CheckpointWrapper):
                setattr(module, name, child._checkpoint_wrapped_module)


def outline(model: nn.Module) -> nn.Module:
    """A copy of a model with its buffers and with its weights on the meta device."""
    blank = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, dict(blank))


def fill(blank: nn.Module, model: nn.Module) -> None:
    """Turn the result of `outline` into an ordinary model, with the gathered weights of a sharded one of the same
    class.

    Every rank must call it and gets all weights. Tied weights stay tied.
    """
    pairs = zip(blank.parameters(), model.parameters(), strict=True)
    weights = {id(a): nn.Parameter(whole(b.detach()), requires_grad=a.requires_grad) for a, b in pairs}
    for module in blank.modules():
        module._parameters.update({k: weights[id(p)] for k, p in module._parameters.items() if p is not None})
    for old, new in zip(blank.buffers(), model.buffers(), strict=True):
        old.data = new.detach().clone()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The gathered state of a sharded model, on the CPU of the first rank; empty on the others. Every rank must call
    it."""
    return gathered(dict(model.state_dict(keep_vars=True)))  # type: ignore[no-any-return]


def gathered(tree: Any, memo: dict[int, Tensor] | None = None) -> Any:
    """A nest with every sharded tensor in one piece; on ranks other than the first without its tensors."""
    memo = {} if memo is None else memo
    keep = not dist.is_initialized() or dist.get_rank() == 0
    if isinstance(tree, Tensor):
        if id(tree) not in memo:
            full = whole(tree.detach())
            memo[id(tree)] = full.cpu() if keep else full.new_empty(0)
        return memo[id(tree)]
    if isinstance(tree, Mapping):
        return {k: gathered(v, memo) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(v, memo) for v in tree)
    return tree


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the way `like` is held: this rank's part of it, if that is sharded and of the same shape."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    here = value.to(like.device_mesh.device_type)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of a gathered state into a model that may be sharded; every rank has read all of it."""
    held = model.state_dict(keep_vars=True)
    model.load_state_dict({k: placed(v, held[k]) if k in held else v for k, v in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict` of a gathered optimiser state, with each entry sharded like its parameter."""
    owners = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        i: {k: placed(v, owners[i]) if isinstance(v, Tensor) else v for k, v in entry.items()}
        for i, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread})
