"""Planning: memory, time and cost of a recipe, computed from configurations before anything is loaded."""

from understudy.planning.machine import CARDS, Machine, machine, resident
from understudy.planning.plan import Plan, plan
from understudy.planning.show import lines, markdown

__all__ = ["CARDS", "Machine", "Plan", "lines", "machine", "markdown", "plan", "resident"]
