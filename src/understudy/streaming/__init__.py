"""Streaming: any row-wise loss over hidden states and a head without a `[rows, classes]` tensor, as a fast path and a
reference."""

from understudy.streaming.chunked import rowwise
from understudy.streaming.plain import logits_of, plain, project

__all__ = ["logits_of", "plain", "project", "rowwise"]
