"""Checks of a run during training. A failed check raises RunStopped with a message that explains the cause; a caution is returned."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whet import ops
from whet.data import Batch, Group, pad
from whet.data.degenerate import constant
from whet.errors import RunStopped
from whet.generate import Generator
from whet.generate.base import all_logprobs
from whet.methods import Algorithm, Term
from whet.ops import masked_sum

GAP = {torch.float64: 1e-6, torch.float32: 2e-3}
"""Largest mean |sampler_logp - old_logp| in nats, by the precision of the log-probs."""
FIRST = 2
"""Number of steps after which a reward that gave one score alone is named."""
HALF = 0.1
"""The same bound for weights in half precision."""
KL: Mapping[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda gap: gap,
    "k2": lambda gap: gap**2 / 2,
    "k3": lambda gap: torch.exp(-gap) - 1 + gap,
}
"""Estimators of KL(policy || reference) per token, as functions of policy's minus reference's log-prob."""
NEVER_NEGATIVE = ("k2", "k3", "k3_weighted", "k2_sequence", "exact_kl")
"""Losses that are never negative."""


def stop(step: int, fact: str, **seen: Any) -> None:
    """Raise RunStopped with the step, counted from 0, and this fact. `seen` has what the check compared, by name."""
    raise RunStopped(f"step {step + 1}: {fact}", **seen)


def tokens(step: int, batch: Batch, end_ids: Sequence[int], *, alone: bool = True) -> None:
    """Stop the run if no token is trained, if the mask of a row is not its own, or if the end token of an answer is not trained:
    after the last trained token of a row, there must be none of `end_ids` if the model `alone` writes end tokens. Rows without any
    trained token are left out."""
    if not bool(batch["mask"].any()):
        stop(step, "no token of this batch is trained; is every answer truncated and masked, or empty?")
    for number, row in enumerate(batch.rows):
        own = batch["mask"][number]
        trained = own[: row.response].nonzero()
        if not len(trained) and not bool(own.any()):
            continue
        lost = row.ids[row.start :][row.mask & ~own[: row.response]]
        rest = row.ids[row.start + (int(trained[-1]) + 1 if len(trained) else 0) :] if alone else lost
        if any(one in end_ids for one in [*rest.tolist(), *lost.tolist()]):
            _end_not_trained(step, number)
        if not bool((own[: row.response] == row.mask).all()) or bool(own[row.response :].any()):
            stop(
                step,
                f"the mask of row {number} is not the one of its tokens: other tokens would be trained; was it shifted? A row can be "
                "left out, with a mask that is False everywhere",
                row=number, expected=row.mask,
            )  # fmt: skip


def _end_not_trained(step: int, number: int) -> None:
    stop(step, f"answer {number} has an end token that is not trained; the model would never learn to stop", row=number)


def answers_in_place(step: int, batch: Batch, groups: Sequence[Group], end_ids: Sequence[int]) -> None:
    """Stop the run if the rows of a batch are not the answers of the groups in their order: the same tokens, of which those are
    trained that the policy wrote, with its end tokens (`end_ids`), and the same number of the group."""
    answers = [(number, group, sample) for number, group in enumerate(groups) for sample in group.samples]
    if len(answers) != len(batch.rows):
        stop(step, f"the batch has {len(batch.rows)} rows, and {len(answers)} answers were generated")
    wrote = [
        [one.author == "policy" for one in sample.segments for _ in range(one.length)] or [True] * len(sample.ids)
        for _, _, sample in answers
    ]
    for place, ((number, group, sample), row) in enumerate(zip(answers, batch.rows, strict=True)):
        if int(batch["group"][place]) != number:
            stop(
                step,
                f"answer {place} belongs to prompt {number} of this step, and its group is {int(batch['group'][place])}; answers to "
                "different prompts would be compared",
                row=place,
            )
        if row.ids.tolist() != [*group.prompt.ids, *sample.ids]:
            stop(step, f"row {place} does not have the tokens of its prompt and its answer", row=place)
        trained = zip(sample.ids, wrote[place], row.mask.tolist(), strict=True)
        if any(one in end_ids and own and not kept for one, own, kept in trained):
            _end_not_trained(step, place)
        if row.mask.tolist() != wrote[place] or row.start != len(group.prompt.ids):
            stop(
                step,
                f"the mask of answer {place} is not the tokens that the policy wrote; was it shifted?",
                row=place, expected=wrote[place],
            )  # fmt: skip


def kl_in_reward(step: int, batch: Batch, algorithm: Algorithm) -> None:
    """Stop the run if the KL penalty in the reward is not the coefficient times the estimator of KL(policy || reference), which
    is subtracted. Computes both again with formulas of its own."""
    penalty = algorithm.penalty
    if penalty is None or "token_reward" not in batch.columns:
        return
    mask = pad([row.mask for row in batch.rows])  # the column has lost answers that are counted and not trained
    kl, name, estimator = masked(batch["kl"], mask), penalty.estimator.op.__name__, penalty.estimator
    if name in KL and not estimator.own:
        own = batch["old_full_logp"] if "old_full_logp" in batch.columns else batch["old_logp"]
        known = masked(KL[name](own.double() - batch["ref_logp"].double()), mask)
        bound = estimator.options.get("bound")
        known = known if bound is None else known.clamp(max=bound)
        off = (kl - known).abs()
        if bool((off > 1e-4 * (1 + known.abs())).any()):
            stop(
                step,
                f"the KL in the reward is not {name} of policy and reference; it differs by up to {float(off.max()):.3g} nats. Is its "
                "sign or its direction reversed?",
            )
    place = algorithm.reward_placement
    if place is None or place.own or (place.op is ops.linear and not place.options.get("normalized")):
        return  # such a placement does not sum to the score
    assert isinstance(penalty.coef, (int, float))
    mean = penalty.charge.op is ops.per_sequence and penalty.charge.options.get("mean", True)
    charge = penalty.coef * kl.sum(1) / (mask.sum(1).clamp(min=1) if mean else 1)
    score = batch["score"].double()
    if algorithm.truncated.rule == "bootstrap":
        score = torch.where(batch["truncated"], masked(batch["token_score"], mask).sum(1), score)
    earned = masked(batch["token_reward"], mask)
    off = (earned.sum(1) - (score - charge)).abs()
    rounding = 1e-5 * (1 + score.abs() + earned.abs().sum(1))
    if bool((off > 1e-3 * charge.abs() + rounding)[mask.any(1)].any()):
        stop(
            step,
            f"the rewards of an answer do not sum to its score minus {penalty.coef:.4g} times its KL; they differ by up to "
            f"{float(off.max()):.3g}. Is the sign of the KL penalty reversed?",
        )


def kl_in_loss(step: int, terms: Sequence[Term], losses: Mapping[str, float], longest: int) -> None:
    """Stop the run if the loss of a KL estimator that is never negative is negative: its sign is reversed. Answers have at most
    `longest` tokens; the rounding errors of so many can add up."""
    for term in terms:
        value = losses.get(term.label, 0.0)
        rounding = 1e-6 * (1 + longest) * abs(term.weight) if isinstance(term.weight, (int, float)) else 0.0
        if term.name in NEVER_NEGATIVE and not term.loss.own and value < -rounding:
            stop(
                step,
                f"the KL in the loss ({term.label}) is {value:.3g}, and it is never negative; is the sign of the term reversed?",
            )


def diverging(run: Any, step: int, signs: Sequence[tuple[str, bool]], mode: str) -> None:
    """Print the signs of divergence in a step, counted from 0. Stop the run at the first fatal one if `mode` is "stop"."""
    for text, fatal in signs:
        if fatal and mode == "stop":
            stop(
                step,
                f"{text}. The run stops here since train.on_divergence is stop; the last checkpoint is from before",
            )
        run.caution(f"step {step + 1}: {text}", step + 1)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return the values in float64, 0 where the mask is False."""
    return torch.where(mask, values.double(), 0.0)


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


def sampler_agrees(
    step: int, batch: Batch, version: int, low_precision: bool = False, corrected: bool = False
) -> str | None:
    """Stop the run if the mean gap between the log-probs of generator and learner, on the tokens of this version, exceeds the
    bound of the precision. A gap that an importance correction corrects stops no run; above `HALF` nats, return a caution.
    """
    mask = batch["mask"] & (batch["token_version"] == version)
    gap = float((batch["sampler_logp"] - batch["old_logp"])[mask].abs().mean()) if bool(mask.any()) else 0.0
    bound = HALF if low_precision or corrected else GAP[batch["old_logp"].dtype]
    if not gap <= bound:
        fact = (
            f"generator and learner disagree on the sampled tokens' log-probs by {gap:.4f} nats on average (bound {bound}); "
            "does the generator have old weights, or another temperature?"
        )
        if corrected:
            return fact
        stop(step, fact)
    return None


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
            logp=now["logp"],
        )  # fmt: skip


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
    differ by more than a tenth of the bound of the precision, the generator's must not be clearly nearer to `before`. Twice
    as near is clear: a difference that is only the rounding of half precision is as far from one as from the other.
    """
    bad = [name for name, one in (("before", before), ("expected", expected)) if not bool(torch.isfinite(one).all())]
    if bad:
        stop(
            step,
            "the policy's own log-probs contain a NaN or an infinity after the updates: its weights are no longer finite; lower "
            "optim.lr, or set optim.max_grad_norm",
            canary=canary, before=before, expected=expected,
        )  # fmt: skip
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
                canary=canary, before=before, expected=expected, got=got,
            )  # fmt: skip
        off, stale = float((got - expected).norm()), float((got - before).norm())
        if moved > 0.1 * precision * len(expected) ** 0.5 and 2 * stale < off:
            stop(
                step,
                f"after the push the generator still scores the canary as the learner did before its updates ({stale:.2g} nats "
                f"from those scores, {off:.2g} from the new ones); the new weights did not arrive",
                canary=canary, before=before, expected=expected, got=got,
            )  # fmt: skip
