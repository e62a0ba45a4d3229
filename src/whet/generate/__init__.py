"""Who answers: the Generator seam and its adapters."""

from whet.generate.base import Generator, Request, ScriptedGenerator

__all__ = ["Generator", "Request", "ScriptedGenerator"]
