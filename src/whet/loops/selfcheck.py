"""Checks of a run during training. A failed check raises RunStopped with a message that explains the cause; a caution is returned."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from whet.data import Batch
from whet.data.degenerate import constant
from whet.errors import RunStopped
from whet.generate import Generator
from whet.generate.base import all_logprobs
from whet.ops import masked_sum

GAP = {torch.float64: 1e-6, torch.float32: 2e-3}
"""Largest mean |sampler_logp - old_logp| in nats, by the precision of the log-probs."""
FIRST = 3
"""Number of steps after which a reward that gave one score alone is named."""
HALF = 0.1
"""The same bound for weights in half precision."""


def stop(step: int, fact: str) -> None:
    """Raise RunStopped with the step and this fact."""
    raise RunStopped(f"step {step}: {fact}")


def tokens(step: int, batch: Batch, end_ids: Sequence[int]) -> None:
    """Stop the run if no token is trained, or if the end token of an answer is not trained: after the last trained token of a
    row, there must be none."""
    if not bool(batch["mask"].any()):
        stop(step, "no token of this batch is trained; is every answer truncated and masked, or empty?")
    for number, row in enumerate(batch.rows):
        trained = (row.mask & batch["mask"][number, : row.response]).nonzero()
        rest = row.ids[row.start + (int(trained[-1]) + 1 if len(trained) else 0) :]
        if any(one in end_ids for one in rest.tolist()):
            stop(
                step,
                f"answer {number} has an end token that is not trained; the model would never learn to stop",
            )


def finite(step: int, columns: Mapping[str, Tensor]) -> None:
    """Stop the run if a column contains a NaN or an infinity."""
    for name, values in columns.items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            stop(step, f"column {name} contains a NaN or an infinity")


class FlatScores:
    """Notice a reward that gives all answers to a prompt the same score in the first steps of a run, or, with one answer per
    prompt, all answers. These are the first `FIRST` steps, or the `steps` of a shorter run."""

    def __init__(self, names: Sequence[str], steps: int) -> None:
        self.names, self.last = names, min(FIRST, steps)
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def caution(self, step: int, batch: Batch) -> str | None:
        """Return what to print after this step (from 1) with these answers, or None. Reads `rewards`, `reward_applies` and
        `group`. Answers to which a reward does not apply are left out."""
        if step > self.last:
            return None
        self._seen.append((batch["rewards"], batch["reward_applies"], batch["group"]))
        if len(self._seen) < self.last:  # also a run that was resumed in between
            return None
        found = {name: self._compared(place) for place, name in enumerate(self.names)}
        flat = [name for name, compared in found.items() if compared and all(map(constant, compared))]
        if not flat:
            return None
        compared = found[flat[0]]
        return (
            f"reward {', '.join(flat)}: in the first {self.last} steps the scores of the {sum(map(len, compared))} answers are "
            f"equal{' for each prompt' if len(compared) > 1 else ''}, and nothing is learned from equal scores; does it read "
            "the answers and the right columns?"
        )

    def _compared(self, place: int) -> list[list[float]]:
        """Return the scores of a reward that are compared with each other: those of each prompt, or of all answers if each
        prompt has one."""
        whole = [rewards[group == number] for rewards, _, group in self._seen for number in group.unique()]
        groups = [
            rewards[(group == number) & applies[:, place], place].tolist()
            for rewards, applies, group in self._seen
            for number in group.unique()
        ]
        if all(len(one) == 1 for one in whole):
            groups = [[score for one in groups for score in one]]
        return [one for one in groups if len(one) > 1]


def sampler_agrees(step: int, batch: Batch, version: int, low_precision: bool = False) -> float:
    """Return the mean gap, in nats, between the log-probs of generator and learner on the tokens of this version.

    Stop the run if the gap exceeds the bound of the precision.
    """
    mask = batch["mask"] & (batch["token_version"] == version)
    gap = float((batch["sampler_logp"] - batch["old_logp"])[mask].abs().mean()) if bool(mask.any()) else 0.0
    bound = HALF if low_precision else GAP[batch["old_logp"].dtype]
    if gap > bound:
        stop(
            step,
            f"generator and learner disagree on the sampled tokens' log-probs by {gap:.4f} nats on average (bound {bound}); "
            "does the generator have old weights, or another temperature?",
        )
    return gap


def ratio_is_one(step: int, batch: Batch, now: Mapping[str, Tensor]) -> None:
    """Stop the run if logp differs from old_logp in the first mini-batch of a rollout, before any update."""
    if "logp" not in now:
        return
    mask = batch["mask"]
    off = (now["logp"] - batch["old_logp"])[mask].abs()
    if bool((off != 0).any()):
        stop(
            step,
            f"the ratio is not 1 in the first mini-batch after the rollout (log-ratio up to {float(off.max()):.3g}); the "
            "policy is not the one that was measured, or its forward pass is not deterministic",
        )


def kl_is_zero(step: int, batch: Batch) -> None:
    """Stop the run if the log-probs of policy and reference differ. Call it when both still have equal weights."""
    own = batch["old_full_logp"] if "old_full_logp" in batch.columns else batch["old_logp"]
    off = (own - batch["ref_logp"])[batch["mask"]].abs()
    if bool((off != 0).any()):
        stop(
            step,
            f"policy and reference should have equal weights at the start, but differ by up to {float(off.max()):.3g} nats",
        )


def groups_centered(step: int, batch: Batch) -> None:
    """Stop the run if the advantages of a group, one per answer, do not sum to 0. Call it for centered advantages only."""
    first = torch.where(
        batch["mask"].any(1), batch["advantage"].gather(1, batch["mask"].int().argmax(1)[:, None])[:, 0], 0.0
    )
    groups, count = batch["group"], int(batch["group"].max()) + 1
    earned = masked_sum(batch["token_reward"].double(), batch["mask"], 1)

    def of_groups(values: Tensor, reduce: str) -> Tensor:
        """Reduce one value per answer to one per group."""
        return torch.zeros(count, dtype=values.dtype).scatter_reduce(0, groups, values, reduce, include_self=False)

    spread = of_groups((earned - of_groups(earned, "mean")[groups]).abs(), "amax")
    scale = torch.where(spread > 0, of_groups(first.abs().double(), "amax") / spread, 0.0)
    # the rounding error of rewards and their mean, multiplied as the advantages are
    rounding = 2 * torch.finfo(first.dtype).eps * of_groups(earned.abs(), "sum") * scale
    sums, sizes = of_groups(first, "sum").abs(), of_groups(first.abs() + 0.02 * earned.abs(), "sum")
    off = (sums - rounding).clamp(min=0) / sizes.clamp(min=1e-3)
    if bool((off > 1e-3).any()):
        stop(step, f"the advantages of a group sum to {float(off.max()):.4f} of their sizes instead of 0")


def published(
    step: int,
    generator: Generator,
    version: int,
    canary: Tensor,
    before: Tensor,
    expected: Tensor,
    low_precision: bool = False,
) -> None:
    """Stop the run if the generator does not have the learner's weights: same version, same log-probs of a fixed sequence.

    `before` and `expected` are the learner's log-probs (S - 1,) before and after the updates of this rollout. If they
    differ by more than a tenth of the bound of the precision, the generator's must be nearer to `expected`.
    """
    if generator.version != version:
        stop(step, f"the generator has weights of version {generator.version}, the learner is at {version}")
    precision = HALF if low_precision else GAP[expected.dtype]
    moved = float((expected - before).norm())
    for (got,) in all_logprobs(generator, [canary]):
        gap = float((got - expected).abs().max())
        if not gap <= 10 * precision:
            stop(
                step,
                f"after the push the generator scores the canary {gap:.4f} nats off the learner's score (bound {10 * precision})",
            )
        off, stale = float((got - expected).norm()), float((got - before).norm())
        if moved > 0.1 * precision * len(expected) ** 0.5 and stale < off:
            stop(
                step,
                f"after the push the generator still scores the canary as the learner did before its updates ({stale:.2g} nats "
                f"from those scores, {off:.2g} from the new ones); the new weights did not arrive",
            )
