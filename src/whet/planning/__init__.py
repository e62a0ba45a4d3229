"""A plan for scale: what fits where, what travels, where the time goes, and the schedule on a virtual clock. No torch here."""

from whet.planning.memory import Activations, Bytes, Layout, Serving, activations, frozen, serving, trained
from whet.planning.placement import Hardware, Placement, Run
from whet.planning.report import parse_engine, report
from whet.planning.schedule import Engines, Outcome, Schedule, Window, drawn_from, lognormal, simulate
from whet.planning.shape import Shape
from whet.planning.traffic import Network, Push, Traffic

__all__ = [
    "Activations",
    "Bytes",
    "Engines",
    "Hardware",
    "Layout",
    "Network",
    "Outcome",
    "Placement",
    "Push",
    "Run",
    "Schedule",
    "Serving",
    "Shape",
    "Traffic",
    "Window",
    "activations",
    "drawn_from",
    "frozen",
    "lognormal",
    "parse_engine",
    "report",
    "serving",
    "simulate",
    "trained",
]
