"""The Reward protocol and its implementations."""

from whet.rewards.base import REWARDS, Reward, Scores, Weighted, score_all

__all__ = ["REWARDS", "Reward", "Scores", "Weighted", "score_all"]
