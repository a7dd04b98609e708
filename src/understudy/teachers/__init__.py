"""Teachers: each answers `rows(batch)`; a method never asks where the answer came from."""

from understudy.teachers.cached import CachedTeacher
from understudy.teachers.local import LocalTeacher, Teacher
from understudy.teachers.served import ServedTeacher

__all__ = ["CachedTeacher", "LocalTeacher", "ServedTeacher", "Teacher"]
