"""Who learns: the Learner seam and its adapters."""

from whet.learner.base import Learner, UpdateResult, Work, look_across

__all__ = ["Learner", "UpdateResult", "Work", "look_across"]
