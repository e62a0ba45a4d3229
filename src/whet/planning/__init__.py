"""Estimates for `whet plan`: GPU memory, communication, time per step, and a simulated schedule. Does not import torch."""

from whet.planning.memory import Activations, Bytes, Layout, Serving, activations, frozen, serving, trained
from whet.planning.placement import GpuPlacement, Hardware, PlannedRun
from whet.planning.report import parse_backend, report
from whet.planning.schedule import Engines, Outcome, Schedule, Window, drawn_from, lognormal, simulate
from whet.planning.shape import Shape
from whet.planning.traffic import Network, Traffic, WeightPush

__all__ = [
    "Activations",
    "Bytes",
    "Engines",
    "GpuPlacement",
    "Hardware",
    "Layout",
    "Network",
    "Outcome",
    "PlannedRun",
    "Schedule",
    "Serving",
    "Shape",
    "Traffic",
    "WeightPush",
    "Window",
    "activations",
    "drawn_from",
    "frozen",
    "lognormal",
    "parse_backend",
    "report",
    "serving",
    "simulate",
    "trained",
]
