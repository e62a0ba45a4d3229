"""Conversion of groups to a batch: columns from samples and rewards, measured columns, and metrics of a rollout."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from whet.data import Batch, Group, Row, order, pad, pad_support, take_elements
from whet.data.types import Element
from whet.learner import Learner, UpdateResult
from whet.loops.progress import Shown
from whet.methods.options import Sampling
from whet.ops import address, addressed_uniform, masked_mean, masked_sum
from whet.rewards import Weighted, score_all
from whet.rewards.base import check_scored, checked, ends_of

SAMPLED = 512
"""Smallest expected number of tokens whose entropy is logged; its mean then has an error of about 0.05 nats."""


@dataclass(frozen=True)
class RolloutScores:
    """The scores of the answers of a rollout from every reward, in the order of the groups' samples.

    `named` has one tensor (B,) per reward, before weights; `token` (B, T) is the weighted sum of the rewards that score
    tokens or segments. `segment_end` (B, T) is True on the last token of a scored segment. `baseline` (B,) is the score of
    the greedy answer to the same prompt, if the method uses one. `applies` has one bool tensor (B,) for each reward that does not
    apply to every answer; where it is False, the score is 0 and does not count.
    """

    named: dict[str, Tensor]
    token: Tensor
    segment_end: Tensor
    baseline: Tensor | None = None
    applies: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(groups: Sequence[Group], named: Mapping[str, Tensor | Sequence[float | None]]) -> "RolloutScores":
        """Return the scores of whole answers, given by the name of each reward as a tensor, or as a list with None where the
        reward does not apply. Raises ValueError for a wrong shape, RewardError for an answer to which no reward applies."""
        answers = [sample for group in groups for sample in group.samples]
        known, applies = dict[str, Tensor](), dict[str, Tensor]()
        for name, values in named.items():
            if isinstance(values, list) and len(values) == len(answers):
                scores = checked(values, answers, name)
                if any(isinstance(one, (list, tuple)) for one in values):
                    raise ValueError(
                        f"scores {name}: expected one number per answer, got numbers per token; return them from a reward, and pass "
                        "the result of score()"
                    )
                known[name] = scores.answer
                applies |= {name: scores.applies} if scores.applies is not None else {}
            elif isinstance(values, Tensor) and tuple(values.shape) == (len(answers),):
                known[name] = values.float()
            else:
                raise ValueError(
                    f"scores {name}: expected a tensor of shape ({len(answers)},), or a list of as many numbers or None, got {values!r:.80}"
                )
        check_scored(list(known), groups, applies)
        longest = max(len(sample.ids) for sample in answers)
        return RolloutScores(known, torch.zeros(len(answers), longest), ends_of(answers), applies=applies)

    def take(self, rows: Sequence[int], length: int) -> "RolloutScores":
        """Return the scores of these answers, with per-token scores of this length."""
        index = torch.tensor(rows)
        named = {name: values[index] for name, values in self.named.items()}
        applies = {name: values[index] for name, values in self.applies.items()}
        return RolloutScores(named, self.token[index, :length], self.segment_end[index, :length], applies=applies)

    @staticmethod
    def joined(parts: Sequence["RolloutScores"]) -> "RolloutScores":
        """Concatenate the scores of several lists of answers."""
        named = {name: torch.cat([one.named[name] for one in parts]) for name in parts[0].named}
        token = pad([row for one in parts for row in one.token])
        partial = {name for one in parts for name in one.applies}
        applies = {name: torch.cat([one.where(name) for one in parts]) for name in named if name in partial}
        return RolloutScores(named, token, pad([row for one in parts for row in one.segment_end]), applies=applies)

    def where(self, name: str) -> Tensor:
        """Return to which answers a reward applies, (B,) bool."""
        return self.applies.get(name, torch.ones_like(self.named[name], dtype=torch.bool))


def scores_of(rewards: Sequence[Weighted], groups: Sequence[Group]) -> RolloutScores:
    """Score the answers with every reward. Raises RewardError for an answer to which none applies."""
    named, token, ends, applies = score_all(rewards, groups)
    return RolloutScores(named, token, ends, applies=applies)


def batch_of(groups: Sequence[Group], scores: RolloutScores, sampling: Sampling) -> Batch:
    """Return a batch with one row per answer and the columns of the sampler and the rewards.

    These are group, address, truncated, temperature, token_version, sampler_logp, rewards, reward_applies, token_score and
    segment_end; baseline if the scores have one; and support if every sample has one.
    """
    pairs = [(number, group.prompt, sample) for number, group in enumerate(groups) for sample in group.samples]
    rows = [row for group in groups for row in group.rows()]
    supports = [sample.support for _, _, sample in pairs]
    extra = {"support": pad_support([one for one in supports if one is not None])} if None not in supports else {}
    if scores.baseline is not None:
        extra["baseline"] = scores.baseline
    return Batch.of(rows).with_columns(
        group=torch.tensor([number for number, _, _ in pairs]),
        address=torch.tensor([address(sample.draw, sample.answer) >> 1 for _, _, sample in pairs]),
        truncated=torch.tensor([sample.truncated for _, _, sample in pairs]),
        temperature=torch.full((len(rows),), sampling.temperature),
        token_version=pad([torch.tensor(sample.token_versions()) for _, _, sample in pairs]),
        sampler_logp=pad([torch.tensor(sample.sampler_logp) for _, _, sample in pairs]),
        rewards=torch.stack(list(scores.named.values()), 1),
        reward_applies=torch.stack([scores.where(name) for name in scores.named], 1),
        token_score=scores.token,
        segment_end=scores.segment_end,
        **extra,
    )


def gathered(groups: Sequence[Group], rewards: Sequence[Weighted], sampling: Sampling) -> Batch:
    """Score the groups and return their batch (see `batch_of`)."""
    return batch_of(groups, scores_of(rewards, groups), sampling)


def measured(learner: Learner, batch: Batch, turn: Sequence[Sequence[int]], columns: frozenset[str]) -> Batch:
    """Return the batch with its measured columns, computed per mini-batch of the first epoch.

    The learner thus uses the same micro-batches as in the first updates, so the ratio in the first one is exactly 1.
    """
    out: dict[str, Tensor] = {}
    elements = batch.elements()
    for index in turn:
        part = learner.measure(take_elements(batch, index), columns)
        rows = [row for one in index for row in elements[one]]
        for name in columns:
            batch.scatter(out, name, rows, part[name])
    return batch.with_columns(**out)


def entropy_sample(batch: Batch, key: int) -> Tensor:
    """Return the tokens whose entropy is logged if no part reads it, (B, T) bool: each with a probability of 1 / 8, or higher in
    rollouts of fewer than 8 x `SAMPLED` trained tokens. They depend only on `key` and the address of the answer."""
    mask = batch["mask"]
    share = max(1 / 8, SAMPLED / max(1, int(mask.sum())))
    drawn = addressed_uniform(key, batch["address"][:, None], torch.arange(mask.shape[1])[None])
    return mask & (drawn < share)


def scored(learner: Learner, ids: Tensor) -> Tensor:
    """Return the learner's log-probs of all tokens of a sequence but the first, (S - 1,), in nats."""
    row = Row(ids, 1, torch.ones(len(ids) - 1, dtype=torch.bool))
    return learner.measure(Batch.of([row]), frozenset({"old_logp"}))["old_logp"][0]


def moved_from(learner: Learner, batch: Batch) -> float:
    """Estimate KL(old || new) after the last update of a rollout: the mean of ratio - 1 - log ratio per token, in nats."""
    now = learner.measure(batch, frozenset({"old_logp"}))["old_logp"]
    log_ratio = now - batch["old_logp"]
    return float(masked_mean(torch.expm1(log_ratio) - log_ratio, batch["mask"]))


def rollout_numbers(batch: Batch, names: Sequence[str]) -> dict[str, float]:
    """Return metrics of the answers: mean and deviation of the score, each reward, length in tokens, truncated share, and for
    groups the share whose answers all have the same score (`zero_spread`), from which a group method learns nothing. The mean of
    a reward is over the answers to which it applies; a reward that applies to none of them has none."""
    lengths = torch.tensor([float(row.mask.sum()) for row in batch.rows])
    out = {"score": float(batch["score"].mean()), "score_std": float(batch["score"].std(correction=0))}
    out |= {"length": float(lengths.mean()), "truncated": float(batch["truncated"].float().mean())}
    group, score = batch["group"], batch["score"]
    if len(group.unique()) < len(group):
        each = [score[group == number] for number in group.unique()]
        out["zero_spread"] = sum(bool((one == one[0]).all()) for one in each) / len(each)
    known = [(name, batch["rewards"][batch["reward_applies"][:, place], place]) for place, name in enumerate(names)]
    return out | {f"reward/{name}": float(values.mean()) for name, values in known if len(values)}


def policy_numbers(batch: Batch) -> dict[str, float]:
    """Return metrics of the policy on a rollout: KL to the reference in nats per trained answer, entropy in nats per token,
    and the mean absolute difference between the log-probs of sampler and learner in nats."""
    if not batch.rows:
        return {}
    out = {}
    own = batch["old_full_logp"] if "old_full_logp" in batch.columns else batch["old_logp"]
    if "old_exact_kl" in batch.columns or "ref_logp" in batch.columns:
        each = batch["old_exact_kl"] if "old_exact_kl" in batch.columns else own - batch["ref_logp"]
        total = masked_sum(each, batch["mask"], 1)
        out["kl"] = float(total.sum() / batch["mask"].any(1).sum().clamp(min=1))
    known = batch["mask"] & batch["entropy_at"] if "entropy_at" in batch.columns else batch["mask"]
    out["entropy"] = float(masked_mean(batch["old_entropy"], known))
    gap = (batch["sampler_logp"] - batch["old_logp"])[batch["mask"]].abs()
    return out | {"sampler_gap": float(gap.mean()) if len(gap) else 0.0} | advantage_numbers(batch)


def advantage_numbers(batch: Batch) -> dict[str, float]:
    """Return metrics of the advantages of a rollout, {} for pairs: their mean and standard deviation over the trained tokens, with a
    critic those of returns and values, and with a KL in the reward the total reward of an answer."""
    if "advantage" not in batch.columns:
        return {}
    mask = batch["mask"]
    mean, deviation = _spread(batch["advantage"][mask])
    out = {"advantage_mean": mean, "advantage_std": deviation}
    if "kl" in batch.columns:
        out["total_reward"] = float(batch["token_reward"].sum(1).double().mean())
    if "old_value" in batch.columns:
        out["value_mean"] = _spread(batch["old_value"][mask])[0]
        out["returns_mean"], out["returns_std"] = _spread(batch["returns"][mask])
    return out


def _spread(values: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of values (n,), 0 if there are none."""
    values = values.double()
    return (float(values.mean()), float(values.std(correction=0))) if len(values) else (0.0, 0.0)


def shown_answer(groups: Sequence[Group], batch: Batch | None, step: int) -> Shown | None:
    """Return one answer of a step, from 1, that is shown on the terminal: another prompt in each step."""
    if batch is None or "score" not in batch.columns or not groups:
        return None
    place = step % len(groups)
    row = sum(len(group.samples) for group in groups[:place])
    if row >= len(batch.rows):
        return None
    return Shown(groups[place].prompt.text, groups[place].samples[0].text, float(batch["score"][row]), step)


def update_numbers(update: UpdateResult) -> dict[str, float]:
    """Return the losses, gradient norms and learning rates of an update under their metric names."""
    norms = {f"grad_norm/{role}": norm for role, norm in update.grad_norm.items()}
    rates = {f"lr/{role}": rate for role, rate in update.lr.items()}
    return {f"loss/{name}": value for name, value in update.losses.items()} | norms | rates


class PtxStream:
    """Select the pre-training rows of each update. The selection depends only on the seed and the number of the update."""

    def __init__(self, elements: Sequence[Element], size: int, seed: int) -> None:
        self.elements, self.size = elements, size
        self.drawn = order([len(elements)], sys.maxsize, address(seed, "ptx") >> 1)

    def batch(self, step: int, number: int, per_step: int) -> dict[str, Batch]:
        """Return {"ptx": batch} for update `number` of this step, or {} without pre-training rows."""
        if not self.elements or not self.size:
            return {}
        first = (step * per_step + number) * self.size
        return {"ptx": Batch.of([self.elements[index] for _, index in self.drawn[first : first + self.size]])}
