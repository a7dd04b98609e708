"""Training: the method interface, the one trainer, checkpoints that resume exactly."""

from understudy.training.apprentice import Apprentice
from understudy.training.checkpoint import last_complete
from understudy.training.method import Live, Method, State, Term
from understudy.training.shapes import Shapes
from understudy.training.trainer import DistillationTrainer

__all__ = ["Apprentice", "DistillationTrainer", "Live", "Method", "Shapes", "State", "Term", "last_complete"]
