"""Understudy: teach small models from large ones, and show that it worked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from understudy.errors import InputError

if TYPE_CHECKING:
    from understudy.planning.plan import plan
    from understudy.runs.capture import capture_recipe
    from understudy.runs.comparison import compare
    from understudy.runs.run import distill
    from understudy.runs.search import search
    from understudy.runs.study import study
    from understudy.training import Method, Term

__version__ = "0.14.0"
__all__ = ["InputError", "Method", "Term", "capture_recipe", "compare", "distill", "plan", "search", "study"]

_LAZY = {
    "distill": "understudy.runs.run",
    "capture_recipe": "understudy.runs.capture",
    "compare": "understudy.runs.comparison",
    "plan": "understudy.planning",
    "search": "understudy.runs.search",
    "study": "understudy.runs.study",
    "Method": "understudy.training",
    "Term": "understudy.training",
}


def __getattr__(name: str) -> Any:
    """Import the heavy parts at first use, so that `import understudy` stays fast."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'understudy' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, those that are not imported yet too."""
    return [*__all__, "__version__"]
