"""Weights spread over ranks with FSDP2: a frozen model sharded, its own use outside of a step, and its state in one piece."""

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
    """How many processes work together; 1 where none were started together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def together() -> None:
    """Wait for the other ranks, where there are any."""
    if ranks() > 1:
        dist.barrier()


def agreed(value: Any) -> Any:
    """What the first rank has, on all of them: decisions that hang on it are then the same everywhere."""
    held = [value]
    if ranks() > 1:
        dist.broadcast_object_list(held, src=0)
    return held[0]


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    if ranks() == 1:
        return flag
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def block_names(model: nn.Module) -> list[str]:
    """Class names of the blocks that a model of transformers says are sharded as a whole; those it really has."""
    named = {n for m in model.modules() for n in getattr(m, "_no_split_modules", None) or ()}
    return sorted(named & {type(m).__name__ for m in model.modules()})


def shard(model: nn.Module, device: torch.device | str) -> None:
    """Spread a model over all ranks, in place: block by block, each gathered when it is used.

    What is outside of the blocks (embeddings, last norm, head) is one group. It is gathered at the model's first forward
    pass and stays, so a head that is read after it, tile by tile, is whole and was gathered once.
    """
    mesh = init_device_mesh(torch.device(device).type, (ranks(),))
    names = block_names(model)
    for module in [m for m in model.modules() if type(m).__name__ in names]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def is_sharded(model: nn.Module) -> bool:
    """Whether any weight is spread over ranks."""
    return any(isinstance(p, DTensor) for p in model.parameters())


@contextmanager
def usable(model: nn.Module) -> Iterator[None]:
    """Inside the block a part of a sharded model may be called by itself. Every rank must make the same calls."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def whole(value: Tensor) -> Tensor:
    """A tensor in one piece; every rank must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def unwrap(model: nn.Module) -> None:
    """Take the wrappers of FSDP's activation checkpointing away: PEFT, for one, finds none of its layers inside."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, CheckpointWrapper):
                setattr(module, name, child._checkpoint_wrapped_module)


def outline(model: nn.Module) -> nn.Module:
    """A copy of a model that has its buffers but no weights: those are on the meta device."""
    blank = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, dict(blank))


def fill(blank: nn.Module, model: nn.Module) -> None:
    """Make an outline an ordinary model again, with the whole weights of a sharded one of its kind.

    Every rank must ask, and each holds all of it. Weights that were shared still are.
    """
    pairs = zip(blank.parameters(), model.parameters(), strict=True)
    weights = {id(a): nn.Parameter(whole(b.detach()), requires_grad=a.requires_grad) for a, b in pairs}
    for module in blank.modules():
        module._parameters.update({k: weights[id(p)] for k, p in module._parameters.items() if p is not None})
    for old, new in zip(blank.buffers(), model.buffers(), strict=True):
        old.data = new.detach().clone()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A sharded model's state in one piece, on the CPU of the first rank; empty on the others. Every rank must ask.

    Names that share a weight share its tensor, as in an ordinary state.
    """
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
    """`load_state_dict` of a whole state into a model that may be sharded; every rank has read all of it."""
    held = model.state_dict(keep_vars=True)
    model.load_state_dict({k: placed(v, held[k]) if k in held else v for k, v in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict` of a whole optimiser state, each entry placed as its parameter is."""
    owners = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        i: {k: placed(v, owners[i]) if isinstance(v, Tensor) else v for k, v in entry.items()}
        for i, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread})
