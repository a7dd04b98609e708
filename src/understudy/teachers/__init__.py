"""Teachers: each answers `rows(batch)`; a method never asks where the answer came from."""

from understudy.teachers.alignment import Aligner
from understudy.teachers.cached import CachedTeacher
from understudy.teachers.ensemble import Ensemble
from understudy.teachers.local import LocalTeacher, Teacher
from understudy.teachers.other_tokenizer import OtherTokenizer

__all__ = ["Aligner", "CachedTeacher", "Ensemble", "LocalTeacher", "OtherTokenizer", "Teacher"]
