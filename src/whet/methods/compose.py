"""Build methods from slots (names and options, as in the catalogue and recipes), and reject contradictory slots."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whet import ops
from whet.errors import RecipeError
from whet.methods import catalogue
from whet.methods.algorithm import Algorithm, Collect, Penalty
from whet.methods.choices import (
    ONLINE_SLOTS,
    OPTIONAL,
    PLAIN_SLOTS,
    PREFERENCE_SLOTS,
    changed,
)
from whet.methods.options import KL, Entropy, Truncated, Value
from whet.methods.own import op_of
from whet.methods.pairs import preference_of, reward_of
from whet.methods.parts import Objective, Part, Term, part
from whet.methods.pick import (
    Slots,
    choice_options,
    chosen,
    found,
    given_options,
    known_in,
    record,
    short_name,
    with_length,
)
from whet.ops import AdaptiveEntropy, AdaptiveKL, Controller, FixedKL, HalvingKL

ESTIMATORS = {
    "k1": part(ops.k1, logp="old_full_logp"),
    "k2": part(ops.k2, logp="old_full_logp"),
    "k3": part(ops.k3, logp="old_full_logp"),
    "exact": part(ops.dense, token_score="old_exact_kl"),
}
CHARGES = {
    "token": part(ops.per_token),
    "sequence": part(ops.per_sequence),
    "sequence_sum": part(ops.per_sequence, mean=False),
}
WHOLE = part(ops.masked_sum, x="token_reward", dim=1)
"""Total reward of an answer: the placed score, the per-token scores and the KL."""


def online(name: str, *, longest: int | None = None, weights: Sequence[float] = (1.0,), **changes: Any) -> Algorithm:
    """Build an online method of the catalogue with changed slots.

    `longest` is the length limit of answers in tokens, `weights` are the weights of the rewards. Raises RecipeError for
    slots that contradict each other.

    >>> online("grpo", num_generations=4, surrogate={"clip_high": 0.28}).terms[0].loss.options
    {'clip_low': 0.2, 'clip_high': 0.28}
    """
    table = {**catalogue.ONLINE, **catalogue.ONLINE_PREFERENCE}
    return online_of(_changed(table, name, changes), longest=longest, weights=weights)


def preference(name: str, **changes: Any) -> Objective:
    """Build a preference method of the catalogue with changed slots."""
    return preference_of(_changed(catalogue.PREFERENCE, name, changes))


def reward(name: str, **changes: Any) -> Objective:
    """Build a reward-model method of the catalogue with changed slots."""
    return reward_of(_changed(catalogue.REWARD, name, changes))


def _changed(table: Mapping[str, catalogue.Method], name: str, changes: Slots) -> Slots:
    """Return the slots of a method with changes. Raises RecipeError for an unknown method or slot."""
    slots = known_in("method", table, name).slots
    for slot, value in changes.items():
        known_in(f"method {name}", slots, slot)
        if value is None and slot not in OPTIONAL and slot not in PLAIN_SLOTS:
            raise RecipeError(f"algorithm.{slot}: it cannot be left out")
    return changed(slots, changes)


def online_of(slots: Slots, *, longest: int | None = None, weights: Sequence[float] = (1.0,)) -> Algorithm:
    """Build the algorithm from its slots. Raises RecipeError for slots that contradict each other."""
    truncated = record(Truncated, slots["truncated"])
    _check_truncated(truncated)
    front = _front(slots, truncated, weights, longest)
    if "loss" in slots:
        objective = preference_of(slots, stream="rollout")
        if "good" in objective.reads():
            raise RecipeError(
                "algorithm.loss: an online method makes pairs of its answers; use a loss on pairs, such as sigmoid"
            )
        _least(slots["num_generations"], 2, "a pair needs two answers")
        if truncated.rule in ("mask", "bootstrap"):
            raise RecipeError(
                f"algorithm.truncated.rule: {truncated.rule} does not work with pairs of answers; use keep or penalize"
            )
        return replace(front, terms=objective.terms, select=objective.select, pairs=_labels(slots, objective))
    return _credit_front(front, slots, longest)


def _labels(slots: Slots, objective: Objective) -> Part:
    """Build the part that labels pairs. Raises RecipeError for soft labels with a loss that does not read them."""
    labels = chosen("pairs", slots["pairs"], gap=part(ops.gap, score="score"))
    blind = [one.name for one in objective.terms if one.name != "sft" and "probability" not in one.reads()]
    if labels.op is not ops.hard_label and blind:
        raise RecipeError(
            f"algorithm.pairs: the loss {blind[0]} does not read the probability of a label; use the loss sigmoid, or pairs hard"
        )
    return labels


def _front(slots: Slots, truncated: Truncated, weights: Sequence[float], longest: int | None) -> Algorithm:
    """Build the first part of an algorithm, up to one score per answer."""
    combine = chosen("combine", slots["combine"], weights=tuple(weights))
    normalize = slots.get("normalize") and chosen("normalize", slots["normalize"])
    rescale = None
    if slots.get("reward_normalization"):
        name = slots["reward_normalization"].get("name")
        given = {"shift": 0.0, "scale": 1.0} if name == "running" else {}
        rescale = chosen("reward_normalization", slots["reward_normalization"], **given)
    shape = []
    if slots.get("reward_clip"):
        shape.append(chosen("reward_clip", slots["reward_clip"]))
    if slots.get("overlong"):
        penalty = chosen("overlong", with_length("overlong", slots["overlong"], "limit", longest))
        if penalty.options["buffer"] > penalty.options["limit"]:
            raise RecipeError(
                f"algorithm.overlong.buffer: at most the limit of {penalty.options['limit']} tokens; "
                f"got {penalty.options['buffer']}"
            )
        shape.append(penalty)
    if normalize or slots["dynamic_sampling"]:
        _least(slots["num_generations"], 2, "normalize and dynamic_sampling compare the answers of a group")
    collect = Collect(slots["num_generations"], dynamic_sampling=slots["dynamic_sampling"])
    return Algorithm(
        collect, combine, truncated, (), normalize=normalize or None, reward_normalization=rescale, shape=tuple(shape)
    )


def _credit_front(front: Algorithm, slots: Slots, longest: int | None) -> Algorithm:
    """Add the second part of an algorithm: reward placement, KL, advantage and terms."""
    choice = found("advantage", ONLINE_SLOTS["advantage"], slots["advantage"]["name"])
    parameters = inspect.signature(op_of(choice)).parameters
    value = None if slots["value"] is None else record(Value, slots["value"])
    _check_credit(slots, front, parameters, value)
    cost = None if slots["kl_in_reward"] is None else record(KL, slots["kl_in_reward"])
    given: dict[str, Any] = {}
    if front.truncated.rule == "bootstrap":
        given["final_value"] = part(_after_truncation)
    target = None
    if value is not None and value.gae_lambda is not None:
        gamma = slots["advantage"].get("gamma", 1.0)
        target = part(
            ops.gae, rewards="token_reward", values="old_value", gamma=gamma, gae_lambda=value.gae_lambda, **given
        )
    whole = "score" in parameters
    credit = chosen("advantage", slots["advantage"], **given, **({"score": WHOLE} if whole else {}))
    return replace(
        front,
        collect=replace(front.collect, greedy="baseline" in parameters),
        reward_placement=_placed(slots["reward_placement"]),
        penalty=_penalty(cost) if cost is not None else None,
        advantage=part(ops.broadcast, answer_advantage=credit) if whole else credit,
        target=target,
        normalize_advantage=chosen("normalize_advantage", slots["normalize_advantage"])
        if slots["normalize_advantage"]
        else None,
        importance_correction=chosen("importance_correction", slots["importance_correction"])
        if slots["importance_correction"]
        else None,
        select=_selection(slots),
        terms=_terms(slots, value, cost, longest),
    )


def _check_credit(slots: Slots, front: Algorithm, parameters: Mapping[str, Any], value: Value | None) -> None:
    """Raise RecipeError for slots that contradict the advantage; `parameters` are those of its op."""
    name, place = slots["advantage"]["name"], slots["reward_placement"]
    if _reads_values(parameters) != (value is not None):
        fix = "set value to null" if value else "set value, for example --value.clip-range-vf 0.2"
        raise RecipeError(f"algorithm.value: the advantage {name} {'has no' if value else 'needs a'} critic; {fix}")
    if front.truncated.rule == "bootstrap" and value is None:
        raise RecipeError(
            f"algorithm.truncated.rule: bootstrap needs a critic, and the advantage {name} has none; use keep, mask or penalize"
        )
    if "group" in parameters:
        _least(slots["num_generations"], 2, f"the advantage {name} compares the answers of a group")
    raw = place["name"] == "linear" and not place.get("normalized", False)
    if "score" in parameters and place["name"] != "terminal" and not raw:
        raise RecipeError(
            f"algorithm.reward_placement: the advantage {name} gives one value to the whole answer, so a placement that "
            "sums to the score changes nothing; use terminal"
        )
    if name == "group_steps" and slots["kl_in_reward"] is not None:
        raise RecipeError(
            "algorithm.kl_in_reward: the advantage group_steps reads rewards only at the ends of steps; use kl_in_loss instead"
        )
    alone = next(
        (slot for slot in ("normalize", "reward_normalization") if slots[slot] and slots[slot]["name"] != "running"),
        None,
    )
    if "baseline" in parameters and alone is not None:
        raise RecipeError(
            f"algorithm.{alone}: it uses statistics of the sampled answers, and the greedy answers of against_greedy are not "
            f"among them; leave {alone} out"
        )
    cost = None if slots["kl_in_reward"] is None else record(KL, slots["kl_in_reward"])
    if "score" in parameters and cost is not None and cost.where == "sequence_sum":
        raise RecipeError(
            f"algorithm.kl_in_reward.where: the advantage {name} gives one value to the whole answer, so sequence_sum is the "
            "same as token; use token"
        )
    affine = name == "group_zscore" or (slots["normalize_advantage"] and not _reads_values(parameters))
    if affine and slots["reward_normalization"] and cost is None:
        raise RecipeError(
            "algorithm.reward_normalization: the advantage is divided by its deviation later, so this changes nothing; leave it out"
        )
    if name == "group_zscore" and slots["normalize"] and cost is None and len(front.combine.options["weights"]) == 1:
        raise RecipeError(
            "algorithm.normalize: the advantage group_zscore already normalizes a single reward; leave it out"
        )
    if name == "group_mean_scaled" and cost is not None:
        raise RecipeError(
            "algorithm.kl_in_reward: group_mean_scaled divides by the group's mean, so rewards must not be negative, and a KL "
            "in the reward can make them negative; use kl_in_loss"
        )


def _reads_values(parameters: Mapping[str, Any]) -> bool:
    """Return whether an advantage with these parameters needs a critic."""
    return bool({"values", "old_value"} & parameters.keys())


def _terms(slots: Slots, value: Value | None, cost: KL | None, longest: int | None) -> tuple[Term, ...]:
    """Return the terms of the objective: policy loss, critic loss, KL in the loss, entropy and ptx."""
    reduce, options = reduction(slots["reduction"], longest)
    terms = [
        Term(
            "policy",
            "rollout",
            policy_loss(slots),
            reduce,
            options=options,
            name=short_name(slots["surrogate"]["name"]),
        )
    ]
    if value is not None:
        terms.append(
            Term("critic", "rollout", part(ops.value_loss, clip=value.clip_range_vf), ops.token_mean, value.vf_coef)
        )
    if slots["kl_in_loss"]:
        spec, penalty = slots["kl_in_loss"], chosen("kl_in_loss", slots["kl_in_loss"])
        coef = spec.get("coef", found("kl_in_loss", ONLINE_SLOTS["kl_in_loss"], spec["name"]).extra.get("coef", 1.0))
        if coef > 0:
            terms.append(Term("policy", "rollout", penalty, reduce, coef, options=options, name=spec["name"]))
    if cost is not None and cost.estimator == "exact":
        _check_exact(slots, cost)
        # the reward covers the KL of later states; the gradient of the KL in the token's own state needs a loss
        here = part(ops.dense, token_score="exact_kl")
        terms.append(Term("policy", "rollout", here, reduce, "penalty", options=options, name="exact_kl"))
    if slots["entropy"] is not None:
        bonus, standard = record(Entropy, slots["entropy"]), Entropy()
        if bonus.target is None and (bonus.increment, bonus.max_coef) != (standard.increment, standard.max_coef):
            raise RecipeError("algorithm.entropy.target: increment and max_coef steer towards a target; set one")
        steered = bonus.target is not None
        weight = (
            AdaptiveEntropy(bonus.ent_coef, bonus.target, bonus.increment, bonus.max_coef)
            if steered
            else bonus.ent_coef
        )
        terms.append(Term("policy", "rollout", part(ops.entropy_bonus), ops.token_mean, weight, name="entropy"))
    if slots["ptx_coef"] > 0:
        terms.append(Term("policy", "ptx", part(ops.nll), ops.token_mean, slots["ptx_coef"], name="ptx"))
    return tuple(terms)


def policy_loss(slots: Slots) -> Part:
    """Build the policy loss per token: the surrogate on its ratio, the selection, and the importance correction."""
    spec = slots["surrogate"]
    choice = found("surrogate", ONLINE_SLOTS["surrogate"], spec["name"])
    given: dict[str, Any] = {}
    has = "ratio" in inspect.signature(op_of(choice)).parameters
    if has != bool(slots["ratio"]):
        fix = "set ratio, for example --ratio token" if has else "set ratio to null"
        raise RecipeError(f"algorithm.ratio: the surrogate {spec['name']} {'needs one' if has else 'has none'}; {fix}")
    if has:
        given["ratio"] = chosen("ratio", slots["ratio"])
    if choice.op == "kl_penalized":
        steering = {**choice.extra, **spec}
        given["beta"] = HalvingKL(steering["beta"], steering["target"])
    loss = chosen("surrogate", spec, **given)
    if slots["select"] and slots["select"]["name"] == "clip_cov":
        loss = part(ops.kept, loss=loss)
    elif slots["select"]:
        coef = slots["select"].get("coef", ONLINE_SLOTS["select"]["kl_cov"].extra["coef"])
        loss = part(ops.kl_on, loss=loss, coef=coef)
    return part(ops.weighted, loss=loss, weight="correction") if slots["importance_correction"] else loss


def _selection(slots: Slots) -> tuple[tuple[str, Part], ...]:
    if not slots["select"]:
        return ()
    spec, given = slots["select"], {}
    if spec["name"] == "kl_cov" and slots["surrogate"]["name"] == "reinforce":
        raise RecipeError(
            "algorithm.select: kl_cov needs several updates per rollout, and reinforce makes one; use another surrogate"
        )
    if spec["name"] == "clip_cov":
        if slots["surrogate"]["name"] not in ("clip", "dual_clip"):
            raise RecipeError("algorithm.select: clip_cov needs a clipped surrogate; use clip or dual_clip")
        clip = ONLINE_SLOTS["surrogate"][slots["surrogate"]["name"]]
        options = {**choice_options(clip), **slots["surrogate"]}
        given = {"clip_low": options["clip_low"], "clip_high": options["clip_high"]}
    return (("selected", chosen("select", spec, **given)),)


def _after_truncation(final_value: Tensor, truncated: Tensor) -> Tensor:
    """Return the critic's value after the last token of cut-off answers, 0 for the others: (B,)."""
    return torch.where(truncated, final_value, torch.zeros_like(final_value))


def _placed(spec: Slots) -> Part:
    if spec["name"] != "attention":
        return chosen("reward_placement", spec)
    choice = ONLINE_SLOTS["reward_placement"]["attention"]
    heads = {**choice.extra, **given_options("reward_placement", choice, spec)}["heads"]
    return part(ops.attention, attention_weight=f"attention_{heads}")


def controller(kl: KL) -> Controller:
    """Build the controller of the KL. Raises RecipeError for a missing target, or for options the controller does not use."""
    if kl.controller == "fixed" and kl.target is not None:
        raise RecipeError(
            f"algorithm.kl_in_reward.target: the fixed controller has no target; use adaptive or halving, or "
            f"leave it out; got {kl.target}"
        )
    if kl.controller != "adaptive" and kl.horizon != KL().horizon:
        raise RecipeError(
            f"algorithm.kl_in_reward.horizon: only the adaptive controller has a horizon; got {kl.horizon}, leave it out"
        )
    if kl.controller == "fixed":
        return FixedKL(kl.coef)
    if kl.target is None:
        raise RecipeError(
            f"algorithm.kl_in_reward.target: the {kl.controller} controller needs a target KL, in nats per answer; got nothing"
        )
    return AdaptiveKL(kl.coef, kl.target, kl.horizon) if kl.controller == "adaptive" else HalvingKL(kl.coef, kl.target)


def _check_exact(slots: Slots, kl: KL) -> None:
    """Raise RecipeError if the exact KL, which is in the reward and in the loss, would be rescaled in only one of them."""
    rescaled = "normalize_advantage" if slots["normalize_advantage"] else None
    if slots["advantage"]["name"] in ("group_center", "group_zscore", "group_mean_scaled", "group_steps"):
        rescaled = f"the advantage {slots['advantage']['name']}"
    if slots["reduction"]["name"] == "sequence_mean":
        rescaled = "reduction sequence_mean"
    if rescaled is not None:
        raise RecipeError(
            f"algorithm.kl_in_reward.estimator: exact puts the KL of later tokens in the reward and that of the token in the loss, and "
            f"{rescaled} rescales only the reward; use an advantage or reduction that does not rescale (leave_one_out, sequence_sum), or k1"
        )
    if kl.where != "token":
        raise RecipeError(f"algorithm.kl_in_reward.where: the exact KL is a per-token cost; use token; got {kl.where}")


def _penalty(kl: KL) -> Penalty:
    return Penalty(ESTIMATORS[kl.estimator], CHARGES[kl.where], controller(kl))


def supervised_of(slots: Slots) -> Objective:
    """Build the objective of SFT and pre-training from its slots."""
    op, options = reduction(slots["reduction"], None)
    loss = part(op_of(found("loss", PREFERENCE_SLOTS["loss"], slots["loss"]["name"])))
    return Objective((Term("policy", "train", loss, op, options=options, name="nll"),))


def reduction(spec: Slots, longest: int | None) -> tuple[Any, dict[str, Any]]:
    """Return (the reduction op, its options) of a slot."""
    choice = found("reduction", ONLINE_SLOTS["reduction"], spec["name"])
    if "length" in choice_options(choice):
        spec = with_length("reduction", spec, "length", longest)
    return op_of(choice), given_options("reduction", choice, spec)


def _least(got: int, least: int, why: str) -> None:
    if got < least:
        raise RecipeError(f"algorithm.num_generations: {why}, so it takes at least {least}; got {got}")


def _check_truncated(truncated: Truncated) -> None:
    if truncated.rule != "penalize" and truncated.amount != Truncated().amount:
        raise RecipeError(
            f"algorithm.truncated.amount: only the rule penalize uses it; got {truncated.amount} with {truncated.rule}"
        )


SFT = supervised_of(catalogue.SUPERVISED["sft"].slots)
"""The objective of SFT and pre-training: the mean over all trained tokens of -log pi."""
