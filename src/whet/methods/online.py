"""Online methods: answers are sampled, scored, credited and trained on. Each is a value made of named parts.

collect -> combine rewards -> bound -> truncated -> place over tokens -> KL in the reward -> credit -> whiten -> terms
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec
import torch
from torch import Tensor

from whet import ops
from whet.dials import KL, Count, NotNegative, Positive, Share, Truncated
from whet.errors import RecipeError
from whet.methods.part import Part, Term, controllers, fixed, part, resolved
from whet.ops import AdaptiveKL, Controller, FixedKL, HalvingKL
from whet.records import COLUMNS, Batch

State = Mapping[str, float]

ESTIMATORS = {"k1": ops.k1, "k2": ops.k2, "k3": ops.k3}
PLACES = {"terminal": ops.terminal, "uniform": ops.uniform, "linear": ops.linear}


@dataclass(frozen=True)
class Penalty:
    """The KL in the reward: an estimator from (old_logp, ref_logp), where it is charged, and its coefficient."""

    estimator: Part
    charge: Part
    coef: float | Controller


@dataclass(frozen=True)
class Algorithm:
    """A whole online method. A variant is `dataclasses.replace(algorithm, slot=...)`; no slot knows the method's name.

    `answers` are asked for per prompt; `combine` (B, R) -> (B,); `bound` (B,) -> (B,); `place` -> (B, T); `penalty` is
    subtracted; `credit` -> advantage (B, T); `whiten` rescales it after returns = advantage + value were taken.
    """

    answers: int
    combine: Part
    bound: Part | None
    truncated: Truncated
    place: Part
    penalty: Penalty | None
    credit: Part
    whiten: Part | None
    terms: tuple[Term, ...]

    def reads(self) -> frozenset[str]:
        """The measured columns this method needs: they decide whether there is a critic and a reference."""
        parts = [self.combine, self.bound, self.place, self.credit, self.whiten]
        if self.penalty is not None:
            parts.append(self.penalty.estimator)
        names = {"old_logp"}.union(
            *(one.reads() for one in parts if one is not None), *(term.reads() for term in self.terms)
        )
        names |= {"old_value"} if "returns" in names else set()
        return frozenset(name for name in names if COLUMNS[name].role is not None)

    def roles(self) -> frozenset[str]:
        """The roles that take part: those trained, and those measured."""
        return frozenset({term.role for term in self.terms} | {COLUMNS[name].role or "" for name in self.reads()})

    @property
    def centred(self) -> bool:
        """Credit is centred within each group, so a group's advantages sum to 0."""
        return any(one.op in (ops.group_center, ops.group_zscore) for one in self.credit.walk())

    def has_ratio(self) -> bool:
        """Every policy loss compares with the old policy, so several updates a rollout are allowed."""
        losses = [term.loss for term in self.terms if term.role == "policy" and "advantage" in term.reads()]
        return all("old_logp" in loss.reads() for loss in losses)

    def steered(self) -> bool:
        """A controller reads how far the updates moved the policy."""
        return any(name != "penalty" for name in self._controllers())

    def init(self) -> State:
        """The small state at the start: the coefficient of every controller."""
        return {name: controller.coef for name, controller in self._controllers().items()}

    def at(self, state: State) -> "Algorithm":
        """The method with plain numbers in place of its controllers."""
        penalty = self.penalty and replace(self.penalty, coef=state["penalty"])
        values = [
            {key.split(".")[1]: value for key, value in state.items() if key.startswith(f"term{i}.")}
            for i in range(len(self.terms))
        ]
        return replace(self, penalty=penalty, terms=tuple(map(resolved, self.terms, values)))

    def next(self, state: State, measured: Mapping[str, float]) -> State:
        """The state after a rollout: `measured` has "kl" (nats per answer, to the reference), "kl_old" (nats per
        token, KL(old || new) at the end of the updates) and "sequences"."""
        out = {}
        for name, controller in self._controllers().items():
            kl = measured["kl"] if name == "penalty" else measured["kl_old"]
            out[name] = controller.next(state[name], kl, int(measured["sequences"]))
        return out

    def _controllers(self) -> dict[str, Controller]:
        found = {} if self.penalty is None else {"penalty": fixed(self.penalty.coef)}
        for number, term in enumerate(self.terms):
            found |= {f"term{number}.{name}": controller for name, controller in controllers(term).items()}
        return found


def credited(algorithm: Algorithm, batch: Batch) -> Batch:
    """The batch with score, kl, token_reward, advantage and (with a critic) returns; once per rollout, no gradient.

    Reads rewards (B, R), token_score (B, T), truncated, group, the mask, and what `algorithm.reads()` names; scores
    that are dense keep their places, the rest of the score is placed. Controllers must be resolved.
    """
    mask = batch["mask"]
    if algorithm.truncated.rule == "mask":
        mask = mask & ~batch["truncated"][:, None]
    batch = batch.with_columns(mask=mask, score=algorithm.combine(batch.columns))
    if algorithm.bound is not None:
        batch = batch.with_columns(score=algorithm.bound(batch.columns))
    if algorithm.truncated.rule == "penalise":
        batch = batch.with_columns(
            score=ops.penalise(batch["score"], batch["truncated"], amount=algorithm.truncated.amount)
        )
    dense = batch["token_score"]
    placed = batch["score"] - dense.sum(1)  # what is dense stays where it arose
    if (
        algorithm.truncated.rule == "bootstrap"
    ):  # the critic's value stands for all that would have followed, the score too
        placed = torch.where(batch["truncated"], torch.zeros_like(placed), placed)
    outcome = batch.with_columns(score=placed)
    token_reward = algorithm.place(outcome.columns) + ops.dense(dense, mask)
    if algorithm.penalty is not None:
        kl = torch.where(mask, algorithm.penalty.estimator(batch.columns), torch.zeros_like(token_reward))
        batch = batch.with_columns(kl=kl)
        coef = algorithm.penalty.coef
        assert isinstance(coef, (int, float)), "controllers are resolved with Algorithm.at before credit"
        token_reward = token_reward - coef * algorithm.penalty.charge(batch.columns)
    batch = batch.with_columns(token_reward=token_reward)
    advantage = algorithm.credit(batch.columns)
    batch = batch.with_columns(advantage=advantage)
    if "old_value" in batch.columns:
        batch = batch.with_columns(
            returns=torch.where(mask, advantage + batch["old_value"], torch.zeros_like(advantage))
        )
    return batch if algorithm.whiten is None else batch.with_columns(advantage=algorithm.whiten(batch.columns))


def _after_truncation(final_value: Tensor, truncated: Tensor) -> Tensor:
    """The critic's value after the last token where the answer was cut off, 0 where it ended: (B,)."""
    return torch.where(truncated, final_value, torch.zeros_like(final_value))


def _advantages(gamma: float, lam: float, truncated: Truncated) -> Part:
    given = {"final_value": part(_after_truncation)} if truncated.rule == "bootstrap" else {}
    return part(ops.gae, rewards="token_reward", values="old_value", gamma=gamma, lam=lam, **given)


def _placed(place: str, normalised: bool) -> Part:
    return part(ops.linear, normalised=normalised) if place == "linear" else part(PLACES[place])


def controller(kl: KL) -> Controller:
    """The controller these dials describe. Raises RecipeError for one without target."""
    if kl.controller == "fixed":
        return FixedKL(kl.coef)
    if kl.target is None:
        raise RecipeError(
            f"method.kl.target: the {kl.controller} controller needs the KL to aim at, in nats per answer; got nothing"
        )
    return AdaptiveKL(kl.coef, kl.target, kl.horizon) if kl.controller == "adaptive" else HalvingKL(kl.coef, kl.target)


def _penalty(kl: KL) -> Penalty:
    charge = part(ops.per_token) if kl.where == "token" else part(ops.per_sequence)
    return Penalty(part(ESTIMATORS[kl.estimator], logp="old_logp"), charge, controller(kl))


def _value_term(clip: float | None, weight: float) -> Term:
    return Term("critic", "rollout", part(ops.value_loss, clip=clip), ops.token_mean, weight)


def _clipped(low: float, high: float) -> Part:
    return part(ops.clip, ratio=part(ops.token_ratio), low=low, high=high)


def ppo(
    *,
    kl: KL = KL(),
    gamma: Share = 1.0,
    lam: Share = 0.95,
    clip: Positive = 0.2,
    clip_high: Positive | None = None,
    value_clip: Positive | None = 0.2,
    value_weight: Positive = 1.0,
    whiten: bool = True,
    place: Literal["terminal", "uniform", "linear"] = "terminal",
    place_normalised: bool = False,
    truncated: Truncated = Truncated(),
    answers: Count = 1,
) -> Algorithm:
    """PPO on a reward model, OpenAI's form (Ziegler et al. 2019; Ouyang et al. 2022 without ptx).

    r_t = placed score - beta k1_t; GAE; clipped surrogate and clipped value loss, each a mean over all tokens.
    Differs from Ziegler et al.: the critic is a model of its own, so `value_weight` only scales its gradient.
    """
    return Algorithm(
        answers=answers,
        combine=part(ops.weighted_sum, weights=(1.0,)),
        bound=None,
        truncated=truncated,
        place=_placed(place, place_normalised),
        penalty=_penalty(kl),
        credit=_advantages(gamma, lam, truncated),
        whiten=part(ops.whiten, x="advantage") if whiten else None,
        terms=(
            Term("policy", "rollout", _clipped(clip, clip if clip_high is None else clip_high), ops.token_mean),
            _value_term(value_clip, value_weight),
        ),
    )


def with_policy_loss(algorithm: Algorithm, loss: Part) -> Algorithm:
    """The same method with another surrogate in the policy's first term."""
    return replace(algorithm, terms=(replace(algorithm.terms[0], loss=loss), *algorithm.terms[1:]))


def ppo_kl(
    *,
    kl: KL = KL(),
    beta: Positive = 1.0,
    target: Positive = 0.01,
    gamma: Share = 1.0,
    lam: Share = 0.95,
    value_clip: Positive | None = 0.2,
    whiten: bool = True,
    truncated: Truncated = Truncated(),
    answers: Count = 1,
) -> Algorithm:
    """PPO with an adaptive KL penalty instead of the clip (Schulman et al. 2017, section 4).

    -ratio A + beta KL(old || new); beta is halved when that KL, a mean over the rollout's tokens after its last update, is below
    target / 1.5, and doubled when above 1.5 target (nats per token). `kl` is the cost towards the reference, as in ppo.
    """
    base = ppo(kl=kl, gamma=gamma, lam=lam, value_clip=value_clip, whiten=whiten, truncated=truncated, answers=answers)
    return with_policy_loss(base, part(ops.kl_penalised, beta=HalvingKL(beta, target)))


def instructgpt(
    *,
    ptx_weight: NotNegative = 0.1,
    kl: KL = KL(coef=0.02),
    gamma: Share = 1.0,
    lam: Share = 0.95,
    clip: Positive = 0.2,
    value_clip: Positive | None = 0.2,
    whiten: bool = True,
    truncated: Truncated = Truncated(),
    answers: Count = 1,
) -> Algorithm:
    """PPO-ptx (Ouyang et al. 2022, equation 2): ppo plus ptx_weight x the pre-training loss in the same gradient.

    The ptx loss is a mean per token here, and so is PPO's; the paper's coefficient 27.8 belongs to its own
    normalisation and is not comparable. `ptx_weight` 0 leaves the term out.
    """
    base = ppo(
        kl=kl,
        gamma=gamma,
        lam=lam,
        clip=clip,
        value_clip=value_clip,
        whiten=whiten,
        truncated=truncated,
        answers=answers,
    )
    ptx = Term("policy", "ptx", part(ops.nll), ops.token_mean, ptx_weight)
    return replace(base, terms=(*base.terms, ptx)) if ptx_weight > 0 else base


def deepspeed_chat(
    *,
    kl: KL = KL(coef=0.1),
    score_clip: Positive = 5.0,
    gamma: Share = 1.0,
    lam: Share = 0.95,
    clip: Positive = 0.2,
    value_clip: Positive | None = 0.2,
    truncated: Truncated = Truncated(),
) -> Algorithm:
    """DeepSpeed-Chat's PPO: clip(score, -c, c) at the end, -0.1 k1 per token, no whitening.

    Their code lands the score one slot after the last token where the row has room; here it is on the last token.
    """
    base = ppo(kl=kl, gamma=gamma, lam=lam, clip=clip, value_clip=value_clip, whiten=False, truncated=truncated)
    return replace(base, bound=part(ops.clip_score, bound=score_clip))


def unclipped(
    *,
    kl: KL = KL(),
    gamma: Share = 1.0,
    lam: Share = 0.95,
    value_clip: Positive | None = 0.2,
    whiten: bool = True,
    truncated: Truncated = Truncated(),
) -> Algorithm:
    """ppo with TRPO's surrogate -ratio A and nothing that holds it: a baseline. Use `stop_kl` with it."""
    base = ppo(kl=kl, gamma=gamma, lam=lam, value_clip=value_clip, whiten=whiten, truncated=truncated)
    return with_policy_loss(base, part(ops.unclipped, ratio=part(ops.token_ratio)))


def policy_gradient(
    *,
    kl: KL = KL(),
    gamma: Share = 1.0,
    lam: Share = 0.95,
    value_clip: Positive | None = 0.2,
    whiten: bool = True,
    truncated: Truncated = Truncated(),
) -> Algorithm:
    """L_PG = -A log pi with a critic and GAE (Schulman et al. 2017, equation 2): one update a rollout."""
    base = ppo(kl=kl, gamma=gamma, lam=lam, value_clip=value_clip, whiten=whiten, truncated=truncated)
    return with_policy_loss(base, part(ops.reinforce))


def reinforce(
    *,
    kl: KL = KL(),
    gamma: Share = 1.0,
    whiten: bool = False,
    place: Literal["terminal", "uniform", "linear"] = "terminal",
    place_normalised: bool = False,
    truncated: Truncated = Truncated(),
    answers: Count = 1,
) -> Algorithm:
    """REINFORCE (Williams 1992): returns to go of score - beta k1, no critic, one update a rollout."""
    if truncated.rule == "bootstrap":
        raise RecipeError(
            "truncated.rule: bootstrap needs a critic, and reinforce has none; use keep, mask or penalise"
        )
    return Algorithm(
        answers=answers,
        combine=part(ops.weighted_sum, weights=(1.0,)),
        bound=None,
        truncated=truncated,
        place=_placed(place, place_normalised),
        penalty=_penalty(kl),
        credit=part(ops.monte_carlo, rewards="token_reward", gamma=gamma),
        whiten=part(ops.whiten, x="advantage") if whiten else None,
        terms=(Term("policy", "rollout", part(ops.reinforce), ops.token_mean),),
    )


def grpo(
    *,
    answers: Annotated[int, msgspec.Meta(ge=2)] = 8,
    beta: NotNegative = 0.04,
    clip: Positive = 0.2,
    clip_high: Positive | None = None,
    scale: bool = True,
    eps: NotNegative = 1e-6,
    truncated: Truncated = Truncated(),
) -> Algorithm:
    """GRPO (Shao et al. 2024, equation 3): A = (score - group mean) / group deviation, clip, beta k3 in the loss.

    Sample deviation (n - 1), eps added to it. `beta` 0 leaves the term out, and with it the reference. `scale=False`
    only centres. Each answer weighs the same (sequence_mean), as in the paper. Credit is per answer: scores that a
    function gives per token are added up.
    """
    if truncated.rule == "bootstrap":
        raise RecipeError("truncated.rule: bootstrap needs a critic, and grpo has none; use keep, mask or penalise")
    within = part(ops.group_zscore, eps=eps) if scale else part(ops.group_center)
    surrogate = Term("policy", "rollout", _clipped(clip, clip if clip_high is None else clip_high), ops.sequence_mean)
    penalty = Term("policy", "rollout", part(ops.k3), ops.sequence_mean, beta)
    return Algorithm(
        answers=answers,
        combine=part(ops.weighted_sum, weights=(1.0,)),
        bound=None,
        truncated=truncated,
        place=part(ops.terminal),
        penalty=None,
        credit=part(ops.broadcast, answer_advantage=within),
        whiten=None,
        terms=(surrogate, penalty) if beta > 0 else (surrogate,),
    )


METHODS: Mapping[str, Callable[..., Algorithm]] = {
    "ppo": ppo,
    "ppo_kl": ppo_kl,
    "instructgpt": instructgpt,
    "deepspeed_chat": deepspeed_chat,
    "unclipped": unclipped,
    "policy_gradient": policy_gradient,
    "reinforce": reinforce,
    "grpo": grpo,
}
"""Every online method by name; its keyword parameters are the dials of the recipe's `method:` section."""


def diagnostics(batch: Batch, clip: tuple[float, float] | None) -> dict[str, float]:
    """What to watch of a mini-batch after its update's forward pass: ratio, clip fraction, KL(old || new) per token.

    `batch` has logp (now) beside old_logp; `clip` is (low, high) where the surrogate has one.
    """
    mask, log_ratio = batch["mask"], batch["logp"] - batch["old_logp"]
    ratio = log_ratio.exp()
    out = {
        "ratio_mean": float(ops.masked_mean(ratio, mask)),
        "kl_old": float(ops.masked_mean(torch.expm1(log_ratio) - log_ratio, mask)),
    }
    if clip is not None:
        beyond = (ratio < 1 - clip[0]) | (ratio > 1 + clip[1])
        out["clip_fraction"] = float(ops.masked_mean(beyond.to(ratio.dtype), mask))
    if "value" in batch.columns:
        out["explained_variance"] = float(ops.explained_variance(batch["old_value"], batch["returns"], mask))
    return out


def clip_bounds(algorithm: Algorithm) -> tuple[float, float] | None:
    """(low, high) of the policy's clipped surrogate, None where it has none."""
    for term in algorithm.terms:
        for one in term.loss.walk():
            if one.op in (ops.clip, ops.dual_clip):
                return one.dials["low"], one.dials["high"]
    return None
