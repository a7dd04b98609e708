"""Tasks: data with a default teacher, a default student and a metric, each with an embedded default that needs no
download."""

from __future__ import annotations

from understudy.errors import InputError, nearest
from understudy.tasks.base import Prepared, Task
from understudy.tasks.conversation import Conversations
from understudy.tasks.image_classification import ImageClassification
from understudy.tasks.image_generation import ImageGeneration
from understudy.tasks.language_modeling import LanguageModeling
from understudy.tasks.multimodal_classification import MultimodalClassification
from understudy.tasks.node_classification import NodeClassification
from understudy.tasks.preference_world import PreferenceWorld
from understudy.tasks.preferences import Preferences
from understudy.tasks.ranking import Ranking
from understudy.tasks.reasoning import Reasoning
from understudy.tasks.scene_completion import SceneCompletion
from understudy.tasks.statement_generation import StatementGeneration
from understudy.tasks.text_classification import TextClassification
from understudy.tasks.text_generation import TextGeneration
from understudy.tasks.text_world import TextWorld
from understudy.tasks.vision_language import VisionLanguage

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ImageClassification(),
        LanguageModeling(),
        Preferences(),
        PreferenceWorld(),
        NodeClassification(),
        MultimodalClassification(),
        ImageGeneration(),
        SceneCompletion(),
        Ranking(),
        Reasoning(),
        TextGeneration(),
        StatementGeneration(),
        TextClassification(),
        Conversations(),
        VisionLanguage(),
        TextWorld(),
    )
}


def get(name: str) -> Task:
    """The task called `name`.

    Raises:
        InputError: an unknown name; the message names the nearest.
    """
    if name not in TASKS:
        raise InputError(f"Unknown task {name!r}.{nearest(name, TASKS)} Known: {', '.join(TASKS)}.")
    return TASKS[name]


__all__ = ["TASKS", "Prepared", "Task", "get"]
