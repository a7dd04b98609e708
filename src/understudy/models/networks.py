"""Small networks named with options, `gcn:hidden=128,layers=2,dropout=0.5`: graph networks and the MLP."""

from __future__ import annotations

from typing import Any

from torch import nn

from understudy.errors import InputError, nearest

GRAPH = ("gcn", "sage", "gat")
DEFAULTS: dict[str, float] = {"hidden": 128, "layers": 2, "dropout": 0.5, "heads": 4}


def has_options(name: str) -> bool:
    """Whether `name` is a graph network, or an MLP with named options (`mlp:64,64` lists widths instead)."""
    kind, _, rest = name.partition(":")
    return kind in GRAPH or (kind == "mlp" and "=" in rest)


def read_options(name: str) -> tuple[str, dict[str, Any]]:
    """The kind and its options: `hidden`, `layers`, `dropout`, and `heads` of a GAT (hidden is their total width)."""
    kind, _, rest = name.partition(":")
    known = {k: v for k, v in DEFAULTS.items() if k != "heads" or kind == "gat"}
    options: dict[str, Any] = dict(known)
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in known:
            raise InputError(f"{name!r}: unknown option {key!r}.{nearest(key, known)} Known: {', '.join(known)}.")
        try:
            options[key] = float(value) if key == "dropout" else int(value)
        except ValueError:
            raise InputError(f"{name!r}: {key} is {value!r}, not a number.") from None
    if not 0 <= options["dropout"] < 1 or min(v for k, v in options.items() if k != "dropout") < 1:
        raise InputError(f"{name!r}: dropout must lie in [0, 1) and the other options be at least 1.")
    if options["hidden"] % options.get("heads", 1):
        raise InputError(f"{name!r}: hidden ({options['hidden']}) must be a multiple of heads ({options['heads']}).")
    return kind, options


def graph_network(kind: str, options: dict[str, Any], classes: int, shape: tuple[int, ...]) -> nn.Module:
    """A network of torch-geometric that reads features `[nodes, features]` and edges `[2, edges]`."""
    if len(shape) != 1:
        raise InputError(
            f"{kind} reads a graph, and this task has none: choose another model, or task=node_classification."
        )
    try:
        from torch_geometric.nn import GAT, GCN, GraphSAGE
    except ImportError:
        raise InputError(f"{kind} needs the extra: pip install understudy[graph].") from None
    network = {"gcn": GCN, "sage": GraphSAGE, "gat": GAT}[kind]
    more = {"heads": options["heads"]} if kind == "gat" else {}
    # Dropout is on the hidden units between layers. A single layer maps features to classes at once.
    return network(
        shape[0], options["hidden"], options["layers"], out_channels=classes, dropout=options["dropout"], **more
    )
