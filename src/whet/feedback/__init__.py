"""The Ranker protocol and its implementations."""

from whet.feedback.base import Question, Ranker, ScoreRanker

__all__ = ["Question", "Ranker", "ScoreRanker"]
