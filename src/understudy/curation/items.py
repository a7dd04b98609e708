"""Items of a procedure: a result that says which requests and which earlier items it was made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Item(BaseModel):
    """Base of what a stage makes. One item is one line of the stage's file.

    Args:
        id: `STAGE/N`, given by the stage where it is empty. parents: ids of the items that it was made of.
        requests: ids of the requests whose answers are in it, as in the request log.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    id: str = ""
    parents: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()
