"""The `Generator` protocol and its implementations."""

from whet.generate.base import GENERATORS, Generator, Request, ScriptedGenerator

__all__ = ["GENERATORS", "Generator", "Request", "ScriptedGenerator"]
