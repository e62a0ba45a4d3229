"""From groups to a batch: the scores of every reward, the columns that a method reads, and the numbers of a rollout."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whet.data import Batch, Group, Row, order, pad, pad_support, take_elements
from whet.data.types import Element
from whet.learner import Learner, UpdateResult
from whet.methods.options import Sampling
from whet.ops import address, masked_mean, masked_sum
from whet.rewards import Weighted, score_all


@dataclass(frozen=True)
class RolloutScores:
    """What every reward says of the answers of a rollout, in the order of the groups' samples.

    `named` has one tensor (B,) per reward, before weights; `token` (B, T) is the weighted sum of the rewards that score
    tokens or segments; `segment_end` (B, T) is True where a scored segment ends. `baseline` (B,) is the score of the greedy
    answer to the same prompt, where the method asks for one.
    """

    named: dict[str, Tensor]
    token: Tensor
    segment_end: Tensor
    baseline: Tensor | None = None

    def take(self, rows: Sequence[int], length: int) -> "RolloutScores":
        """The scores of these answers, with per-token columns of this length."""
        index = torch.tensor(rows)
        named = {name: values[index] for name, values in self.named.items()}
        return RolloutScores(named, self.token[index, :length], self.segment_end[index, :length])

    @staticmethod
    def joined(parts: Sequence["RolloutScores"]) -> "RolloutScores":
        """The scores of several lists of answers as one."""
        named = {name: torch.cat([one.named[name] for one in parts]) for name in parts[0].named}
        token = pad([row for one in parts for row in one.token])
        return RolloutScores(named, token, pad([row for one in parts for row in one.segment_end]))


def scores_of(rewards: Sequence[Weighted], groups: Sequence[Group]) -> RolloutScores:
    """Score the answers with every reward."""
    return RolloutScores(*score_all(rewards, groups))


def batch_of(groups: Sequence[Group], scores: RolloutScores, sampling: Sampling) -> Batch:
    """The answers as rows with group, address, truncated, temperature, token_version, sampler_logp, rewards, token_score,
    segment_end, the baseline where there is one, and the support where some tokens could not be drawn."""
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
        token_score=scores.token,
        segment_end=scores.segment_end,
        **extra,
    )


def gathered(groups: Sequence[Group], rewards: Sequence[Weighted], sampling: Sampling) -> Batch:
    """`batch_of` the groups with their scores."""
    return batch_of(groups, scores_of(rewards, groups), sampling)


def measured(learner: Learner, batch: Batch, turn: Sequence[Sequence[int]], columns: frozenset[str]) -> Batch:
    """The batch with its measured columns, mini-batch by mini-batch of the first epoch.

    The learner then splits as it will in the first updates, so the ratio there is 1 to the bit.
    """
    out: dict[str, Tensor] = {}
    elements = batch.elements()
    for index in turn:
        part = learner.measure(take_elements(batch, index), columns)
        rows = [row for one in index for row in elements[one]]
        for name in columns:
            batch.scatter(out, name, rows, part[name])
    return batch.with_columns(**out)


def scored(learner: Learner, ids: Tensor) -> Tensor:
    """The learner's log-probs of a sequence's tokens after the first, (S - 1,)."""
    row = Row(ids, 1, torch.ones(len(ids) - 1, dtype=torch.bool))
    return learner.measure(Batch.of([row]), frozenset({"old_logp"}))["old_logp"][0]


def moved_from(learner: Learner, batch: Batch) -> float:
    """KL(old || new) after a rollout's last update: the mean over its tokens of ratio - 1 - log ratio, in nats."""
    now = learner.measure(batch, frozenset({"old_logp"}))["old_logp"]
    log_ratio = now - batch["old_logp"]
    return float(masked_mean(torch.expm1(log_ratio) - log_ratio, batch["mask"]))


def rollout_numbers(batch: Batch, names: Sequence[str]) -> dict[str, float]:
    """Metrics of a rollout's answers: score and its deviation, each reward, length in tokens, share of truncated ones."""
    lengths = torch.tensor([float(row.mask.sum()) for row in batch.rows])
    out = {"score": float(batch["score"].mean()), "score_std": float(batch["score"].std(correction=0))}
    out |= {"length": float(lengths.mean()), "truncated": float(batch["truncated"].float().mean())}
    return out | {f"reward/{name}": float(batch["rewards"][:, number].mean()) for number, name in enumerate(names)}


def policy_numbers(batch: Batch) -> dict[str, float]:
    """Metrics of the policy on a rollout: KL to the reference in nats per trained answer, entropy in nats per token,
    and the mean difference of the sampler's log-probs to the learner's."""
    if not batch.rows:
        return {}
    out = {}
    own = batch["old_full_logp"] if "old_full_logp" in batch.columns else batch["old_logp"]
    if "old_exact_kl" in batch.columns or "ref_logp" in batch.columns:
        each = batch["old_exact_kl"] if "old_exact_kl" in batch.columns else own - batch["ref_logp"]
        total = masked_sum(each, batch["mask"], 1)
        out["kl"] = float(total.sum() / batch["mask"].any(1).sum().clamp(min=1))
    out["entropy"] = float(masked_mean(batch["old_entropy"], batch["mask"]))
    gap = (batch["sampler_logp"] - batch["old_logp"])[batch["mask"]].abs()
    return out | {"sampler_gap": float(gap.mean()) if len(gap) else 0.0}


def update_numbers(update: UpdateResult) -> dict[str, float]:
    """An update's losses, gradient norms and learning rates under the names of the metrics."""
    norms = {f"grad_norm/{role}": norm for role, norm in update.grad_norm.items()}
    rates = {f"lr/{role}": rate for role, rate in update.lr.items()}
    return {f"loss/{name}": value for name, value in update.losses.items()} | norms | rates


class PtxStream:
    """The pre-training stream: which of its rows go into which update, by address."""

    def __init__(self, elements: Sequence[Element], size: int, seed: int) -> None:
        self.elements, self.size, self.seed = elements, size, seed
        self.drawn: list[tuple[int, int]] = []

    def batch(self, step: int, number: int, per_step: int) -> dict[str, Batch]:
        """The "ptx" batch of update `number` of this step; nothing without rows."""
        if not self.elements or not self.size:
            return {}
        first = (step * per_step + number) * self.size
        if len(self.drawn) < first + self.size:
            self.drawn = order([len(self.elements)], 2 * (first + self.size), address(self.seed, "ptx") >> 1)
        return {"ptx": Batch.of([self.elements[index] for _, index in self.drawn[first : first + self.size]])}
