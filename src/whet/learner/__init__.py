"""Who learns: the Learner seam and its adapters."""

from whet.learner.base import Learner, Step, Work

__all__ = ["Learner", "Step", "Work"]
