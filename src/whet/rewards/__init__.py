"""Who scores: the Reward seam and its adapters."""

from whet.rewards.base import REWARDS, Reward, Scores, Weighted, score_all

__all__ = ["REWARDS", "Reward", "Scores", "Weighted", "score_all"]
