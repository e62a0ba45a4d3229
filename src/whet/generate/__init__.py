"""Who answers: the Generator seam and its adapters."""

from whet.generate.base import GENERATORS, Generator, Request, ScriptedGenerator

__all__ = ["GENERATORS", "Generator", "Request", "ScriptedGenerator"]
