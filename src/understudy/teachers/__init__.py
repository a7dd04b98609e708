"""Teachers: each answers `targets(batch)`; a method never asks where the answer came from."""

from understudy.teachers.local import LocalTeacher, Teacher

__all__ = ["LocalTeacher", "Teacher"]
