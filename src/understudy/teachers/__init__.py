"""Teachers: each is called as `teacher(batch)`, so a method does not depend on where the outputs come from."""

from understudy.teachers.alignment import Aligner
from understudy.teachers.cache.teacher import CachedTeacher
from understudy.teachers.ensemble import Ensemble
from understudy.teachers.local import LocalTeacher, Teacher
from understudy.teachers.other_tokenizer import OtherTokenizer
from understudy.teachers.server.teacher import ServedTeacher

__all__ = ["Aligner", "CachedTeacher", "Ensemble", "LocalTeacher", "OtherTokenizer", "ServedTeacher", "Teacher"]
