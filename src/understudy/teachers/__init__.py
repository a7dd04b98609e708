"""Teachers: each answers `rows(batch)`; a method never asks where the answer came from."""

from understudy.teachers.cached import CachedTeacher
from understudy.teachers.ensemble import Ensemble
from understudy.teachers.local import LocalTeacher, Teacher

__all__ = ["CachedTeacher", "Ensemble", "LocalTeacher", "Teacher"]
