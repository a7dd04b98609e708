"""Text from anywhere: local models, chat endpoints, synthetic oracles behind one interface, with a log that resumes."""

from understudy.generation.request import Completion, Request, Source, SourceError

__all__ = ["Completion", "Request", "Source", "SourceError"]
