"""Training: the interface of a method, the trainer, and checkpoints that resume exactly."""

from understudy.models import ModelOutput
from understudy.training.auxiliary import AuxiliaryContext, AuxiliaryOptimizer
from understudy.training.checkpoint import last_complete
from understudy.training.collapse import CollapseMonitored
from understudy.training.method import Method, MethodState, Requirements, Role, TeacherUse, TrainState
from understudy.training.on_policy import OnPolicy
from understudy.training.phases import Phase
from understudy.training.pipeline import Pipeline, PipelineContext
from understudy.training.reduction import Term
from understudy.training.rollouts import Rollouts
from understudy.training.setup import SetupContext
from understudy.training.shapes import Shapes
from understudy.training.token_columns import add_token_columns
from understudy.training.train_module import TrainModule
from understudy.training.trainer import DistillationTrainer

__all__ = [
    "AuxiliaryContext",
    "AuxiliaryOptimizer",
    "CollapseMonitored",
    "DistillationTrainer",
    "Method",
    "MethodState",
    "ModelOutput",
    "OnPolicy",
    "Phase",
    "Pipeline",
    "PipelineContext",
    "Requirements",
    "Role",
    "Rollouts",
    "SetupContext",
    "Shapes",
    "TeacherUse",
    "Term",
    "TrainModule",
    "TrainState",
    "add_token_columns",
    "last_complete",
]
