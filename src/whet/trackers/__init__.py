"""Who is told how a run goes: the Tracker protocol and its adapters."""

from whet.trackers.base import TRACKERS, RunInfo, Tracker

__all__ = ["TRACKERS", "RunInfo", "Tracker"]
