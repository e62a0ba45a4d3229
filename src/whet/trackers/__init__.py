"""The Tracker protocol and its implementations."""

from whet.trackers.base import TRACKERS, RunInfo, Tracker

__all__ = ["TRACKERS", "RunInfo", "Tracker"]
