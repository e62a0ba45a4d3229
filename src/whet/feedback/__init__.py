"""Who ranks: the Ranker seam and its adapters."""

from whet.feedback.base import Question, Ranker, ScoreRanker

__all__ = ["Question", "Ranker", "ScoreRanker"]
