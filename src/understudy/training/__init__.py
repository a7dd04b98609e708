"""Training: the method interface, the one trainer, checkpoints that resume exactly."""

from understudy.training.apprentice import Apprentice
from understudy.training.checkpoint import last_complete
from understudy.training.method import Live, Method, State, Term
from understudy.training.on_policy import OnPolicy
from understudy.training.players import Player, Scene
from understudy.training.procedure import Bench, Procedure
from understudy.training.rollouts import Rollouts
from understudy.training.shapes import Shapes
from understudy.training.stage import Stage
from understudy.training.trainer import DistillationTrainer

__all__ = [
    "Apprentice",
    "Bench",
    "DistillationTrainer",
    "Live",
    "Method",
    "OnPolicy",
    "Player",
    "Procedure",
    "Rollouts",
    "Scene",
    "Shapes",
    "Stage",
    "State",
    "Term",
    "last_complete",
]
