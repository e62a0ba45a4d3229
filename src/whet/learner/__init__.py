"""The Learner protocol and its implementations."""

from whet.learner.base import Learner, UpdateResult, Work, look_across

__all__ = ["Learner", "UpdateResult", "Work", "look_across"]
