"""The Ranker protocol and its implementations: scores and judges. A page for people does not exist yet."""

from whet.feedback.base import RANKERS, Question, Ranker

__all__ = ["RANKERS", "Question", "Ranker"]
