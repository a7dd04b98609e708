"""Text generation by local models, chat endpoints or functions behind one interface, with a log that allows resuming."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from understudy.generation.budget import Budget, Spent
from understudy.generation.endpoint import EndpointSource
from understudy.generation.engine import BudgetSpent, FailedRequests, generate
from understudy.generation.limits import Endpoint, Limits
from understudy.generation.log import RequestLog, tally
from understudy.generation.pool import ServerPool, ShardedLog, log_of, tally_all
from understudy.generation.prompts import Prompt, draw_names, few_shot, name_people, restore_people
from understudy.generation.request import Completion, RefusedRequest, Request, Source, SourceError
from understudy.generation.sources import OracleSource, limits_from, source_from

if TYPE_CHECKING:
    from understudy.generation.local import LocalSource

__all__ = [
    "Budget",
    "BudgetSpent",
    "Completion",
    "Endpoint",
    "EndpointSource",
    "FailedRequests",
    "Limits",
    "LocalSource",
    "OracleSource",
    "Prompt",
    "RefusedRequest",
    "Request",
    "RequestLog",
    "ServerPool",
    "ShardedLog",
    "Source",
    "SourceError",
    "Spent",
    "draw_names",
    "few_shot",
    "generate",
    "limits_from",
    "log_of",
    "name_people",
    "restore_people",
    "source_from",
    "tally",
    "tally_all",
]


def __getattr__(name: str) -> Any:
    """`LocalSource` is imported at first use, since it imports transformers."""
    if name == "LocalSource":
        from understudy.generation.local import LocalSource

        return LocalSource
    raise AttributeError(f"module 'understudy.generation' has no attribute {name!r}")
