"""The Ranker protocol and its implementations: scores and judges. There is no page for people yet."""

from whet.feedback.base import RANKERS, Question, Ranker

__all__ = ["RANKERS", "Question", "Ranker"]
