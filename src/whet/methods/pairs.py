"""Compose the objectives of preference methods and of reward models from their slots."""

import inspect
from collections.abc import Mapping
from typing import Any

from whet import ops
from whet.errors import RecipeError
from whet.methods.choices import (
    PAIR_LOSSES,
    REWARD_SLOTS,
    SINGLE_LOSSES,
    named,
)
from whet.methods.own import op_of
from whet.methods.parts import Objective, Part, Term, part
from whet.methods.pick import Slots, chosen, found, given_options, part_of, short_name
from whet.ops import RunningMean


def preference_of(slots: Slots, stream: str = "train") -> Objective:
    """Build the objective from its slots: a weighted sum of losses on scored answers, and the SFT loss."""
    losses = [named(one) for one in (slots["loss"] if isinstance(slots["loss"], list) else [slots["loss"]])]
    beta = slots.get("beta")
    # sampled answers may come from a truncated distribution; the log-ratio to the reference uses the full distributions
    now, before = ("logp", "now_logp") if stream == "train" else ("full_logp", "now_full_logp")
    score = _answer_score(slots["implicit_reward"], beta, now)
    columns = {
        "gap": part(ops.gap, score=score),
        "chosen": part(ops.nth, x=score, n=0),
        "rejected": part(ops.nth, x=score, n=1),
        "score": part(ops.nth, x=score, n=0),
        "probability": part(ops.nth, x="probability", n=0),
        "good": part(ops.nth, x="good", n=0),
        "kl_baseline": part(ops.nth, x="kl_baseline", n=0),
        "policy_gap": part(ops.gap, score=part(ops.policy_score, logp=now, beta=beta or 1.0)),
        "matched": part(ops.nth, x="matched", n=0),
        "rival": part(ops.nth, x="rival", n=0),
        "rival_of_rejected": part(ops.nth, x="rival", n=1),
    }
    terms: list[Term] = []
    select: dict[str, Part] = {}
    if not losses:
        raise RecipeError("algorithm.loss: the list is empty; give at least one loss")
    single = [one["name"] in SINGLE_LOSSES for one in losses if one["name"] != "sft"]
    plain = {"beta": 0.1, "implicit_reward": {"name": "implicit_reward"}}
    if not single and any(named(slots.get(slot)) != value for slot, value in plain.items() if slot in slots):
        raise RecipeError("algorithm.loss: the sft loss reads neither beta nor implicit_reward; leave them out")
    if any(single) and not all(single):
        raise RecipeError(
            "algorithm.loss: losses on single answers and losses on pairs need different rows; use one kind"
        )
    for spec in losses:
        spec = dict(spec)
        weight = spec.pop("weight", 1.0)
        choice = found("loss", PAIR_LOSSES | SINGLE_LOSSES, spec["name"])
        if spec["name"] == "sft":
            given_options("loss", choice, spec)
            terms.append(_sft(stream, weight, now))
            continue
        parameters = inspect.signature(op_of(choice)).parameters
        _check_score(spec["name"], slots["implicit_reward"], parameters)
        given: dict[str, Any] = {name: columns[name] for name in parameters if name in columns}
        if "delta" in parameters:
            given["delta"] = RunningMean()
        if "beta" in parameters:
            given["beta"] = beta
        loss = chosen("loss", spec, **given)
        terms.append(Term("policy", stream, loss, ops.element_mean, weight, name=short_name(spec["name"])))
        select |= _across(parameters, slots["implicit_reward"], beta, before)
    if slots.get("sft_weight", 0) > 0:
        terms.append(_sft(stream, slots["sft_weight"], now))
    return Objective(tuple(terms), tuple(select.items()))


def _sft(stream: str, weight: float, logp: str) -> Term:
    return Term("policy", stream, part(ops.nll, logp=logp), ops.token_mean, weight, mask="chosen_mask", name="sft")


def _answer_score(spec: Slots, beta: float | None, logp: str) -> Part:
    if (spec["name"] == "log_odds") != (beta is None):
        raise RecipeError(
            "algorithm.beta: the implicit_reward log_odds has no beta (in orpo the weight of the loss is its strength); every other "
            "implicit_reward needs one"
        )
    return chosen("implicit_reward", spec, logp=logp, **({} if beta is None else {"beta": beta}))


def _across(parameters: Mapping[str, Any], score: Slots, beta: float | None, logp: str) -> dict[str, Part]:
    """Return the mini-batch statistics that a loss needs, by column; `logp` is the policy's log-prob before the update."""
    now = part(ops.policy_score, logp=logp, beta=beta or 1.0)
    out = {}
    if "matched" in parameters:
        reference = part(ops.policy_score, logp="ref_logp", beta=beta or 1.0)
        out["matched"] = part(ops.sorted_partner, score=now, other=reference)
    if "rival" in parameters:
        implicit = chosen("implicit_reward", score, logp=logp, beta=beta)
        out["rival"] = part(ops.sorted_rival, score=implicit)
    if "kl_baseline" in parameters:
        ratio = part(ops.implicit_reward, logp=logp, beta=1.0, mean=score.get("mean", False))
        out["kl_baseline"] = part(ops.kl_baseline, log_ratio=ratio)
    return out


def _check_score(loss: str, score: Slots, parameters: Mapping[str, Any]) -> None:
    """Raise RecipeError for an implicit reward that the loss cannot use.

    Losses on the reward of each answer, not only on the gap, need the implicit reward with the reverse_kl divergence.
    """
    if "beta" in parameters and score["name"] == "log_odds":
        raise RecipeError(f"algorithm.loss: {loss} is scaled by beta, and log_odds has no beta")
    plain = score["name"] == "implicit_reward" and score.get("divergence", "reverse_kl") == "reverse_kl"
    if parameters.keys() & {"chosen", "rejected", "score", "policy_gap"} and not plain:
        raise RecipeError(
            f"algorithm.implicit_reward: the loss {loss} reads each answer's own reward, so it needs implicit_reward with the reverse_kl "
            f"divergence; got {score['name']} {score.get('divergence', '')}".rstrip()
        )
    if "policy_gap" in parameters and score.get("mean"):
        raise RecipeError(f"algorithm.implicit_reward.mean: the loss {loss} sorts sums of log-probs; leave it out")
    if score.get("divergence") != "alpha" and "alpha" in score and score["alpha"] != 0.5:
        raise RecipeError(
            f"algorithm.implicit_reward.alpha: only the alpha divergence has an alpha; got {score['alpha']}, leave it out"
        )


def reward_of(slots: Slots) -> Objective:
    """Build the objective of a reward model from its slots."""
    spec = slots["loss"]
    choice = found("loss", REWARD_SLOTS["loss"], spec["name"])
    columns = {
        name: part(ops.nth, x=x, n=n)
        for name, x, n in (
            ("chosen", "score", 0),
            ("rejected", "score", 1),
            ("margin", "margin", 0),
            ("probability", "probability", 0),
        )
    }
    parameters = inspect.signature(op_of(choice)).parameters
    given = {name: columns[name] for name in parameters if name in columns}
    loss = part_of("loss", REWARD_SLOTS["loss"], spec, given)
    if "token_score" in parameters:
        return Objective((Term("reward", "train", loss, ops.token_mean, mask="segment_end", name=spec["name"]),))
    terms = [Term("reward", "train", loss, ops.element_mean, name=spec["name"])]
    if slots.get("centering", 0) > 0:
        centering = part(ops.centering, chosen=columns["chosen"], rejected=columns["rejected"])
        terms.append(Term("reward", "train", centering, ops.element_mean, slots["centering"], name="centering"))
    return Objective(tuple(terms))
