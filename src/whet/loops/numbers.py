"""Numbers of one update for its metrics: token accuracy, implicit rewards of answers, and the scores of reward models.

They are computed from the whole batch of the update and its columns (`UpdateResult.now`), so no split into micro-batches or over
workers changes them, and without gradient.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whet import ops
from whet.data import Batch
from whet.loops.evaluate import ordered_pairs
from whet.methods import Part, Term


def update_columns(terms: Sequence[Term], batch: Batch, now: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the numbers of an offline update. `now` has the columns that the update computed, of the batch's rows.

    Reward models: see `score_numbers`. Preference methods: see `answer_numbers`. SFT: `token_accuracy`, the share of the trained
    tokens than which none was more likely.
    """
    if "score" in now or "token_score" in now:
        return score_numbers(batch, now)
    out = {}
    if "correct" in now:
        out["token_accuracy"] = float(ops.masked_mean(now["correct"], batch[terms[0].mask]))
    compared = "probability" in batch.columns or "good" in batch.columns
    return out | (answer_numbers(terms, {**batch.columns, **now}) if compared else {})


def answer_numbers(terms: Sequence[Term], columns: Mapping[str, Tensor]) -> dict[str, float]:
    """Return means of the implicit rewards and of the log-probs of chosen and rejected answers, under the names of TRL.

    `columns` has logp (B, T), mask (B, T), and index (B,) for pairs, good (B,) for single answers, whose mismatched answers do not
    count. The implicit reward of an answer is beta sum_t (log pi - log pi_ref), with `mean` of the implicit reward the mean over t;
    without a reference it is the method's own score of the answer, and for log_odds weight x mean_t log pi, as in TRL. Without
    such a part in the terms there are log-probs alone. A label that no answer has gives no number.
    """
    scorers = (ops.implicit_reward, ops.policy_score, ops.log_odds)
    found = ((term, one) for term in terms for one in term.loss.walk() if one.op in scorers)
    term, part = next(found, (None, None))
    source = part.columns["logp"] if part is not None else "logp"
    if not isinstance(source, str) or source not in columns:
        return {}
    logp, mask, first = columns[source], columns["mask"], columns["index"] == 0
    good = columns["good"].bool() if "good" in columns else None
    sides = {
        "chosen": first if good is None else first & good,
        "rejected": ~first if good is None else first & ~good,
    }
    out: dict[str, float] = {}
    rewards = None if term is None or part is None else _implicit(term, part, source, columns)
    if rewards is not None:
        out |= {f"rewards/{name}": float(rewards[rows].double().mean()) for name, rows in sides.items() if rows.any()}
    if rewards is not None and good is None:
        gaps = (rewards[first] - rewards[~first]).double()
        out["rewards/accuracy"] = float(((gaps > 0).double() + 0.5 * (gaps == 0)).mean())
    if {"rewards/chosen", "rewards/rejected"} <= out.keys():
        out["rewards/margin"] = out["rewards/chosen"] - out["rewards/rejected"]
    total = ops.answer_logp(logp, mask).double()
    out |= {f"logps/{name}": float(total[rows].mean()) for name, rows in sides.items() if rows.any()}
    if part is not None and part.op is ops.log_odds and good is None:
        odds = part(columns).double()
        out["log_odds"] = float((odds[first] - odds[~first]).mean())
    return out | ({"kl_baseline": float(columns["kl_baseline"].mean())} if "kl_baseline" in columns else {})


def _implicit(term: Term, part: Part, source: str, columns: Mapping[str, Tensor]) -> Tensor:
    """Return the implicit reward of each row, (B,)."""
    logp, mask = columns[source], columns["mask"]
    if part.op is ops.log_odds:
        assert isinstance(term.weight, (int, float)), "controllers are resolved before an update"
        return term.weight * ops.answer_logp(logp, mask, mean=True)
    if "ref_logp" not in columns:
        return part(columns)
    options: dict[str, Any] = {"beta": part.options["beta"], "mean": part.options.get("mean", False)}
    return ops.implicit_reward(logp, columns["ref_logp"], mask, **options)


def score_numbers(batch: Batch, now: Mapping[str, Tensor]) -> dict[str, float]:
    """Return numbers of the scores of a reward model: mean, standard deviation, and for compared answers accuracy and margin.

    Pairs have the chosen answer first; rankings have ranks, and answers of equal rank are not compared. A model that scores steps
    (token_score, segment_end) has the accuracy of the sign of its scores, over the steps with a label other than 0.5.
    """
    if "score" not in now:
        ends = batch["segment_end"] & batch["mask"]
        found, labels = now["token_score"][ends].double(), batch["segment_label"][ends].double()
        certain = labels != 0.5
        right = torch.where(found == 0, 0.5, ((found > 0) == (labels > 0.5)).double())[certain]
        return _spread(found) | ({"accuracy": float(right.mean())} if len(right) else {})
    out = _spread(now["score"].double())
    if "target" in batch.columns:
        return out
    scores = [float(one) for one in now["score"]]
    ranks = [int(one) for one in (batch["rank"] if "rank" in batch.columns else batch["index"] + 1)]
    good, gaps = 0.0, list[float]()
    for rows in batch.elements():
        own = [(ranks[row], scores[row]) for row in rows]
        good += ordered_pairs([score for _, score in own], [rank for rank, _ in own])[0]
        gaps += [better - worse for first, better in own for second, worse in own if first < second]
    return out | ({"accuracy": good / len(gaps), "margin": sum(gaps) / len(gaps)} if gaps else {})


def _spread(scores: Tensor) -> dict[str, float]:
    """Return mean and standard deviation of scores, {} if there are none."""
    if not len(scores):
        return {}
    return {"score_mean": float(scores.mean()), "score_std": float(scores.std(correction=0))}


def per_second(tokens: int, seconds: float) -> dict[str, float]:
    """Return the number of tokens of a step, and how many of them there were in a second."""
    return {"tokens": tokens, "tokens_per_second": tokens / max(seconds, 1e-9)}
