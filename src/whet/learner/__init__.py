"""Who learns: the Learner seam and its adapters."""

from whet.learner.base import Learner, Step, Work, look_across

__all__ = ["Learner", "Step", "Work", "look_across"]
