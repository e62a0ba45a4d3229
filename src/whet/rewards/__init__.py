"""Who scores: the Reward seam and its adapters."""

from whet.rewards.base import Reward, Scores, Weighted, score_all

__all__ = ["Reward", "Scores", "Weighted", "score_all"]
