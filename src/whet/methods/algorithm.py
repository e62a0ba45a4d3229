"""Online methods: sample answers, score them, compute advantages and train. Each method is a record of named parts.

The order of the steps is collect -> normalize -> combine -> reward_normalization -> reward_clip, overlong -> truncated ->
reward_placement -> kl_in_reward -> advantage -> normalize_advantage -> importance_correction -> terms.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whet import ops
from whet.data import COLUMNS, Batch, take_elements
from whet.errors import RewardError
from whet.methods.options import Truncated
from whet.methods.parts import Objective, Part, State, Term, fixed, part, settled, steered
from whet.ops import Controller


@dataclass(frozen=True)
class Penalty:
    """The KL penalty in the reward: the estimator, its placement on tokens, and its coefficient."""

    estimator: Part
    charge: Part
    coef: float | Controller


@dataclass(frozen=True)
class Collect:
    """The generator's task: answers per prompt, an extra greedy answer, and the rounds of dynamic sampling."""

    num_generations: int
    greedy: bool = False
    dynamic_sampling: int = 0


@dataclass(frozen=True)
class Algorithm:
    """An online method. Make a variant with `dataclasses.replace(algorithm, slot=...)`; no slot depends on the method's name.

    `normalize` (B, R) -> (B, R); `combine` (B, R) -> (B,); `reward_normalization` and each part of `shape` (B,) -> (B,);
    `reward_placement` -> (B, T); `penalty` is subtracted from the reward; `advantage` -> (B, T); `target` is the
    advantage for the critic's returns if it differs; `normalize_advantage` rescales the advantage after the returns are
    computed; `importance_correction` -> weights (B, T). With `pairs` there is no advantage: the best and the worst answer
    of each group form a pair for the terms, and `pairs` (E,) is the probability that the best one is preferred.
    """

    collect: Collect
    combine: Part
    truncated: Truncated
    terms: tuple[Term, ...]
    normalize: Part | None = None
    reward_normalization: Part | None = None
    shape: tuple[Part, ...] = ()
    reward_placement: Part | None = None
    penalty: Penalty | None = None
    advantage: Part | None = None
    target: Part | None = None
    normalize_advantage: Part | None = None
    importance_correction: Part | None = None
    select: tuple[tuple[str, Part], ...] = ()
    pairs: Part | None = None

    def reads(self) -> frozenset[str]:
        """Return the columns measured once per rollout; they determine whether a critic and a reference are needed."""
        names = {"old_logp"}.union(*(one.reads() for one in self._parts()), *(term.reads() for term in self.terms))
        names |= {"old_value"} if "returns" in names else set()
        return frozenset(name for name in names if COLUMNS[name].role is not None and COLUMNS[name].stage == "measure")

    def _parts(self) -> list[Part]:
        """Return the parts that are computed before the updates of a rollout."""
        parts = [
            self.normalize,
            self.combine,
            self.reward_normalization,
            *self.shape,
            self.reward_placement,
            self.advantage,
            self.target,
            self.normalize_advantage,
            self.importance_correction,
            *(one for _, one in self.select),
        ]
        parts += [self.penalty.estimator, self.penalty.charge] if self.penalty is not None else []
        return [one for one in parts if one is not None]

    def deferrable(self) -> frozenset[str]:
        """Return the measured columns that only the losses of the terms read. With one update per rollout, that update has them:
        the log-probs of its own forward pass, without gradient."""
        early = frozenset[str]().union(*(one.reads() for one in self._parts()))
        return frozenset() if self.select else frozenset({"old_logp"}) - early

    def roles(self) -> frozenset[str]:
        """Return the roles that the method needs: those trained and those measured."""
        columns = [COLUMNS[name] for name in self.reads().union(*(term.reads() for term in self.terms))]
        beside = {"reference"} if any("exact_kl" in (column.name, column.reads) for column in columns) else set()
        return frozenset({term.role for term in self.terms} | {one.role for one in columns if one.role} | beside)

    @property
    def centered(self) -> bool:
        """Whether advantages are centered within each group, so that they sum to 0 per group."""
        ops_of = [] if self.advantage is None else [one.op for one in self.advantage.walk()]
        within = (ops.group_center, ops.group_zscore, ops.group_mean_scaled, ops.leave_one_out)
        return self.normalize_advantage is None and any(op in within for op in ops_of)

    def has_ratio(self) -> bool:
        """Return whether each policy loss with an advantage uses the old policy; this allows several updates per rollout."""
        losses = [term.loss for term in self.terms if term.role == "policy" and "advantage" in term.reads()]
        return all("old_logp" in loss.reads() for loss in losses)

    def steered(self) -> bool:
        """Return whether a controller reads KL(old || new), the change of the policy by the updates."""
        return any(controller.by == "kl_old" for controller in steered(self.terms).values())

    @property
    def objective(self) -> Objective:
        """Return the objective that one update minimizes."""
        return Objective(self.terms, self.select)

    def init(self) -> State:
        """Return the initial state: the coefficient of each controller, and the running statistics."""
        running = (
            {} if self._running is None else dict.fromkeys(("running.count", "running.mean", "running.square"), 0.0)
        )
        return {**{name: controller.coef for name, controller in self._controllers().items()}, **running}

    def observe(self, state: State, batch: Batch) -> State:
        """Return the state after adding the outcomes of a rollout to the running statistics.

        Call it before the advantages are computed. The mean of the first rollout becomes the shift.
        """
        if self._running is None:
            return state
        count, mean, square = (state[f"running.{name}"] for name in ("count", "mean", "square"))
        score = outcome(self, batch).double()
        for value in score.tolist():
            count += 1
            step = value - mean
            mean += step / count
            square += step * (value - mean)
        shift = state.get("running.shift", float(score.mean()))
        seen = {"count": count, "mean": mean, "square": square, "shift": shift}
        return {**state, **{f"running.{name}": value for name, value in seen.items()}}

    def at(self, state: State) -> "Algorithm":
        """Return the method with controllers and running statistics replaced by numbers from the state."""
        penalty = self.penalty and replace(self.penalty, coef=state["penalty"])
        rescale, running = self.reward_normalization, self._running
        if running is not None and state["running.count"] > 0:
            deviation = (state["running.square"] / max(state["running.count"] - 1, 1)) ** 0.5
            numbers = {"shift": state["running.shift"], "scale": deviation if deviation > 0 else 1.0}
            rescale = replace(running, options={**running.options, **numbers})
        return replace(self, penalty=penalty, reward_normalization=rescale, terms=settled(self.terms, state))

    def next(self, state: State, measured: Mapping[str, float]) -> State:
        """Return the state after a rollout.

        `measured` has "kl" (nats per answer, to the reference), "kl_old" (nats per token, KL(old || new) at the end of
        the updates), "entropy" (nats per token), "reward" and "sequences".
        """
        out = dict(state)
        for name, controller in self._controllers().items():
            by = "kl" if name == "penalty" else controller.by
            out[name] = controller.next(state[name], measured[by], int(measured["sequences"]))
        return out

    @property
    def _running(self) -> Part | None:
        """Return the part that needs running statistics, or None."""
        return (
            self.reward_normalization
            if self.reward_normalization is not None and self.reward_normalization.op is ops.standardize
            else None
        )

    def _controllers(self) -> dict[str, Controller]:
        found: dict[str, Controller] = {} if self.penalty is None else {"penalty": fixed(self.penalty.coef)}
        return found | steered(self.terms)


def outcome(algorithm: Algorithm, batch: Batch) -> Tensor:
    """Compute the combined score of each answer before any penalty, (B,). Reads rewards and reward_applies (B, R).

    A reward that does not apply to an answer adds nothing to its score and is in no mean or deviation with it. Raises RewardError
    if a user's `normalize` or `combine` does not read `reward_applies` and some reward does not apply to some answer.
    """
    batch = batch.with_columns(reward_applies=_applies(batch))
    applies = batch["reward_applies"]
    for slot, one in (("normalize", algorithm.normalize), ("combine", algorithm.combine)):
        if one is not None and one.own and "reward_applies" not in one.reads() and not bool(applies.all()):
            raise RewardError(
                f"algorithm.{slot}: {one} does not read the column reward_applies, and a reward returned None (does not apply) for "
                "an answer; add the parameter reward_applies (B, R) and leave those scores out"
            )
    if algorithm.normalize is not None:
        rewards = algorithm.normalize.filled(batch.columns, tuple(batch["rewards"].shape))
        batch = batch.with_columns(rewards=torch.where(applies, rewards, torch.zeros_like(rewards)))
    return algorithm.combine.filled(batch.columns, (len(batch.rows),))


def _applies(batch: Batch) -> Tensor:
    """Return which rewards apply to which answers, (B, R) bool; all if the batch does not say it."""
    return batch.columns.get("reward_applies", torch.ones_like(batch["rewards"], dtype=torch.bool))


def spread(algorithm: Algorithm, batch: Batch) -> Tensor:
    """Return which rows belong to a group whose answers differ in outcome before any penalty, (B,) bool.

    If each reward is normalized separately, the rewards are compared instead of the outcome, each among the answers to which
    it applies. A method that compares answers within a group learns nothing from the other groups.
    """
    index = torch.unique(batch["group"], return_inverse=True)[1]
    score = batch["rewards"] if algorithm.normalize is not None else outcome(algorithm, batch)[:, None]
    rewards = torch.cat([score, batch["token_score"]], 1)
    known = torch.ones_like(rewards, dtype=torch.bool)
    if algorithm.normalize is not None:
        known[:, : score.shape[1]] = _applies(batch)
    where, ends = index[:, None].expand_as(rewards), []
    for how, none in (("amax", -torch.inf), ("amin", torch.inf)):
        empty = torch.full((int(index.max()) + 1, rewards.shape[1]), none, dtype=rewards.dtype)
        ends.append(empty.scatter_reduce(0, where, torch.where(known, rewards, none), how))
    return (ends[0] > ends[1]).any(1)[index]


def shaped(algorithm: Algorithm, batch: Batch) -> Batch:
    """Add the column score (B,): combined, normalized, bounded and penalized."""
    batch = batch.with_columns(score=outcome(algorithm, batch))
    for one in (algorithm.reward_normalization, *algorithm.shape):
        batch = batch if one is None else batch.with_columns(score=one.filled(batch.columns, (len(batch.rows),)))
    if algorithm.truncated.rule == "penalize":
        amount = algorithm.truncated.amount
        batch = batch.with_columns(score=ops.penalize(batch["score"], batch["truncated"], amount=amount))
    return batch


def advantages(algorithm: Algorithm, batch: Batch) -> Batch:
    """Add the columns score, kl, token_reward, advantage and (with a critic) returns; once per rollout, without gradient.

    Reads rewards (B, R), token_score (B, T), truncated, group, the mask, and the columns of `algorithm.reads()`. Per-token
    scores keep their positions; the rest of the score is placed. Controllers must be resolved with `Algorithm.at`. Raises
    RewardError if the method cannot use per-token scores.
    """
    mask, dense = batch["mask"], batch["token_score"]
    rescaled = (
        algorithm.normalize is not None or algorithm.reward_normalization is not None or algorithm.pairs is not None
    )
    if bool(dense.any()) and (rescaled or algorithm.combine.op is not ops.weighted_sum):
        raise RewardError(
            "scores per token only go with combine weighted_sum, without normalize, reward_normalization or pairs: they keep their size"
        )
    batch = shaped(algorithm, batch)
    if algorithm.advantage is None or algorithm.reward_placement is None:
        return batch
    placed = batch["score"] - ops.dense(dense, mask).sum(1)  # per-token scores keep their positions
    rounding = 1e-6 * dense.abs().sum(1)
    placed = torch.where(placed.abs() <= rounding, torch.zeros_like(placed), placed)
    if algorithm.truncated.rule == "bootstrap":
        # the critic's value estimates all later reward, including the score
        placed = torch.where(batch["truncated"], torch.zeros_like(placed), placed)
    token_reward = algorithm.reward_placement.filled(batch.with_columns(score=placed).columns, tuple(mask.shape))
    if "segment_end" in batch.columns:  # a penalty may be on a token that ends no step
        batch = batch.with_columns(segment_end=batch["segment_end"] | (token_reward != 0))
    token_reward = token_reward + ops.dense(dense, mask)
    if algorithm.penalty is not None:
        kl = torch.where(mask, algorithm.penalty.estimator(batch.columns), torch.zeros_like(token_reward))
        batch = batch.with_columns(kl=kl)
        coef = algorithm.penalty.coef
        assert isinstance(coef, (int, float)), "controllers are resolved with Algorithm.at before credit"
        token_reward = token_reward - coef * algorithm.penalty.charge(batch.columns)
    batch = batch.with_columns(token_reward=token_reward)
    try:
        advantage = algorithm.advantage.filled(batch.columns, tuple(mask.shape))
        target = advantage if algorithm.target is None else algorithm.target(batch.columns)
    except ValueError as error:  # scores that this advantage does not allow
        raise RewardError(str(error)) from error
    if algorithm.truncated.rule == "mask":  # cut-off answers count in the group statistics but are not trained
        mask = mask & ~batch["truncated"][:, None]
        batch = batch.with_columns(mask=mask)
    batch = batch.with_columns(advantage=torch.where(mask, advantage, torch.zeros_like(advantage)))
    if "old_value" in batch.columns:
        returns = torch.where(mask, target + batch["old_value"], torch.zeros_like(target))
        batch = batch.with_columns(returns=returns)
    if algorithm.normalize_advantage is not None:
        batch = batch.with_columns(advantage=algorithm.normalize_advantage.filled(batch.columns, tuple(mask.shape)))
    return (
        batch
        if algorithm.importance_correction is None
        else batch.with_columns(correction=algorithm.importance_correction.filled(batch.columns, tuple(mask.shape)))
    )


HARD = part(ops.hard_label, gap=part(ops.gap, score="score"))
"""Labels of pairs that are certain."""


def paired(batch: Batch, labels: Part = HARD) -> Batch:
    """Return the best and the worst answer of each group as pairs, chosen first, with their labels. Reads score.

    Among answers of equal score, the first is taken. With hard labels, groups of equal scores give no pair.
    """
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(batch["group"].tolist()):
        groups.setdefault(group, []).append(row)
    score, rows = batch["score"].tolist(), []
    for own in groups.values():
        best = max(own, key=lambda row: score[row])
        worst = min((row for row in own if row != best), key=lambda row: score[row], default=best)
        known = score[best] > score[worst] or labels.op is not ops.hard_label
        rows += [best, worst] if known and best != worst else []
    count = len(rows) // 2
    out = take_elements(batch, rows) if rows else batch.take([])
    place = torch.tensor([0, 1] * count)
    out = out.with_columns(
        element=torch.arange(count).repeat_interleave(2), index=place, chosen_mask=out["mask"] & (place == 0)[:, None]
    )
    return out.with_columns(probability=labels.filled(out.columns, (count,)).float().repeat_interleave(2))


def diagnostics(batch: Batch, clip: Part | None, critic: Part | None = None) -> dict[str, float]:
    """Compute metrics of a mini-batch after the forward pass of its update: ratio, clip fraction, KL(old || new) per token.

    `batch` has logp (current) and old_logp. `clip` is the clipping part of the surrogate, or None; `critic` is the part of the
    critic's loss. kl_old and kl_old_k1 are the estimators k3 and k1 of KL(old || new). With the clip's ratio (of a token or of
    the whole answer):
    - clip_fraction: share of the tokens whose gradient the clip stops, ratio > 1 + clip_high with A > 0 or
      ratio < 1 - clip_low with A < 0 (pg_clipfrac in verl, clip_ratio/region_mean in TRL's GRPO);
    - ratio_outside: share of the tokens with a ratio outside the interval, whatever the advantage;
    - dual_clip_fraction: share of the tokens with A < 0 and ratio > bound of dual_clip (pg_clipfrac_lower in verl).
    """
    mask, log_ratio = batch["mask"], batch["logp"] - batch["old_logp"]
    ratio = log_ratio.exp()
    out = {
        "ratio_mean": float(ops.masked_mean(ratio, mask)),
        "kl_old": float(ops.masked_mean(torch.expm1(log_ratio) - log_ratio, mask)),
        "kl_old_k1": float(ops.masked_mean(-log_ratio, mask)),
    }
    out["ratio_std"] = float(ops.masked_mean((ratio - out["ratio_mean"]) ** 2, mask)) ** 0.5
    if clip is not None:
        shares = clipped(batch.columns, clip)[1]
        out |= {name: float(ops.masked_mean(share.to(ratio.dtype), mask)) for name, share in shares.items()}
    if "value" in batch.columns:
        value, old, returns = batch["value"], batch["old_value"], batch["returns"]
        out["explained_variance"] = float(ops.explained_variance(old, returns, mask))
        out["value_error"] = float(ops.masked_mean((value - returns) ** 2, mask))
        limit = None if critic is None else critic.options.get("clip")
        if limit is not None:
            bounded = old + (value - old).clamp(-limit, limit)
            worse = (bounded - returns) ** 2 > (value - returns) ** 2
            out["value_clip_fraction"] = float(ops.masked_mean(worse.to(value.dtype), mask))
    return out


def clipped(columns: Mapping[str, Tensor], clip: Part) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the ratio that the part `clip` bounds, and for each share of `diagnostics` where it counts, each (B, T)."""
    own = clip.columns["ratio"]
    held = own(columns) if isinstance(own, Part) else (columns["logp"] - columns["old_logp"]).exp()
    below, above = held < 1 - clip.options["clip_low"], held > 1 + clip.options["clip_high"]
    better, worse = columns["advantage"] > 0, columns["advantage"] < 0
    shares = {"clip_fraction": (above & better) | (below & worse), "ratio_outside": below | above}
    if "bound" in clip.options:
        shares["dual_clip_fraction"] = (held > clip.options["bound"]) & worse
    return held, shares


def critic_loss(algorithm: Algorithm) -> Part | None:
    """Return the part of the critic's loss, or None."""
    return next((term.loss for term in algorithm.terms if term.role == "critic"), None)


def clipping(algorithm: Algorithm) -> Part | None:
    """Return the part of the policy loss that clips a ratio, or None."""
    parts = (one for term in algorithm.terms for one in term.loss.walk())
    return next((one for one in parts if one.op in (ops.clip, ops.dual_clip)), None)
