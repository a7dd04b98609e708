"""Any row-wise loss over hidden states and a head, without a `[rows, classes]` tensor: fast path and reference."""

from understudy.streaming.chunked import rowwise
from understudy.streaming.plain import plain, project

__all__ = ["plain", "project", "rowwise"]
