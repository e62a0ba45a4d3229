"""Text of `whet explain`: the objective of a method in formulas with its values, and its optimum."""

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from whet.methods import catalogue
from whet.methods.choices import ONLINE_SLOTS, PREFERENCE_SLOTS, REWARD_SLOTS, Choice, named
from whet.methods.compose import choice_options, found, record
from whet.methods.options import KL, Entropy, Truncated, Value

Slots = Mapping[str, Any]


def formula(choice: Choice, spec: Slots, **more: Any) -> str:
    """Return the choice's formula with the values of its options; `more` are values that the method sets.

    >>> formula(ONLINE_SLOTS["surrogate"]["clip"], {"name": "clip", "clip_high": 0.28})
    '-min(rho A, clip(rho, 1 - 0.2, 1 + 0.28) A)'
    """
    values = {**choice_options(choice), **{key: value for key, value in spec.items() if key != "name"}, **more}
    names = [name for _, name, _, _ in Formatter().parse(choice.formula) if name]
    text = choice.formula.format(**{name: _shown(values.get(name)) for name in names})
    return text.replace(",  clamped to null", "")


def online_lines(slots: Slots, *, longest: int | None = None, weights: Sequence[float] = (1.0,)) -> list[str]:
    """Describe the objective of an online method, one line per step."""
    limit = (slots.get("overlong") or {}).get("limit") or longest
    out = _line(slots, "normalize", "normalize") + _line(slots, "combine", "score", weights=tuple(weights))
    out += _line(slots, "reward_normalization", "reward_normalization") + _line(slots, "reward_clip", "reward_clip")
    out += _line(slots, "overlong", "overlong", limit=limit) + _truncated(slots["truncated"])
    if "loss" in slots:
        out.append(_step("pairs", "w = the best, l = the worst answer of each prompt by s", ""))
        labels = found("pairs", PREFERENCE_SLOTS["pairs"], slots["pairs"]["name"])
        out.append(_step("labels", formula(labels, slots["pairs"]), labels.source))
        return [*out, *preference_lines(slots)]
    value = None if slots["value"] is None else record(Value, slots["value"])
    out += (
        _line(slots, "reward_placement", "reward_placement")
        + _penalty(slots["kl_in_reward"])
        + _line(slots, "advantage", "advantage")
    )
    if value is not None and value.gae_lambda is not None:
        out.append(_step("critic's target", f"R_t = gae with lambda {_shown(value.gae_lambda)}, plus V_t", "VAPO"))
    elif value is not None:
        out.append(_step("critic's target", "R_t = A_t + V_t, with A before whitening", ""))
    out += (
        _line(slots, "normalize_advantage", "normalize_advantage")
        + _line(slots, "importance_correction", "importance_correction")
        + _line(slots, "ratio", "ratio")
    )
    return out + _term_lines(slots, value, longest)


def _line(slots: Slots, slot: str, about: str, **more: Any) -> list[str]:
    """Describe the choice of a slot with its values; return no line if the slot is empty."""
    spec = slots.get(slot)
    if not spec:
        return []
    choice = found(slot, ONLINE_SLOTS[slot], spec["name"])
    return [_step(about, formula(choice, spec, **more), choice.source)]


def _term_lines(slots: Slots, value: Value | None, longest: int | None) -> list[str]:
    """Describe the terms of the objective."""
    spec, reduce = slots["surrogate"], slots["reduction"]
    surrogate = found("surrogate", ONLINE_SLOTS["surrogate"], spec["name"])
    reduction = ONLINE_SLOTS["reduction"][reduce["name"]]
    total = formula(reduction, reduce, length=reduce.get("length") or longest)
    weighed = "c_t " if slots["importance_correction"] else ""
    out = [_step("policy loss", f"{weighed}[{formula(surrogate, spec)}]", surrogate.source)]
    out += _line(slots, "select", "select")
    out.append(_step("reduced by", f"{reduce['name']}: {total}", reduction.source))
    out += _line(slots, "kl_in_loss", "+ KL in the loss")
    kl = None if slots["kl_in_reward"] is None else record(KL, slots["kl_in_reward"])
    if kl is not None and kl.estimator == "exact":
        own = f"{_shown(kl.coef)} KL(policy || reference) of the token's own state"
        out.append(_step("+ KL in the loss", own, ""))
    if value is not None:
        near = f"V_old + clip(V - V_old, -{value.clip_range_vf}, {value.clip_range_vf})"
        squared = "(V - R)^2 / 2" if value.clip_range_vf is None else f"max((V - R)^2, ({near} - R)^2) / 2"
        out.append(_step("critic loss", f"{_shown(value.vf_coef)} x mean over all tokens of {squared}", ""))
    if slots["entropy"] is not None:
        bonus = record(Entropy, slots["entropy"])
        steered = f", steered to {bonus.target} nats per token" if bonus.target else ""
        out.append(_step("- entropy", f"{_shown(bonus.ent_coef)} x mean over all tokens of H{steered}", ""))
    if slots["ptx_coef"]:
        ptx = f"{_shown(slots['ptx_coef'])} x mean over the pre-training tokens of -log pi"
        out.append(_step("+ ptx", ptx, "Ouyang et al. 2022, eq. 2"))
    return out


def preference_lines(slots: Slots) -> list[str]:
    """Describe the objective of a preference method."""
    score = slots["implicit_reward"]
    choice = PREFERENCE_SLOTS["implicit_reward"][score["name"]]
    out = [_step("implicit reward", formula(choice, score), choice.source)]
    if "beta" in slots:
        out.append(_step("beta", _shown(slots["beta"]), ""))
    for spec in map(named, slots["loss"] if isinstance(slots["loss"], list) else [slots["loss"]]):
        one = found("loss", PREFERENCE_SLOTS["loss"], spec["name"])
        weight = spec.get("weight", 1.0)
        told = formula(one, {key: value for key, value in spec.items() if key != "weight"})
        out.append(_step("loss", f"{_shown(weight)} x mean over pairs or answers of [{told}]", one.source))
    if slots.get("sft_weight"):
        out.append(
            _step("+ sft", f"{_shown(slots['sft_weight'])} x mean over the chosen answers' tokens of -log pi", "")
        )
    return out


def reward_lines(slots: Slots) -> list[str]:
    """Describe the objective of a reward model."""
    choice = REWARD_SLOTS["loss"][slots["loss"]["name"]]
    out = [_step("loss", formula(choice, slots["loss"]), choice.source)]
    if slots.get("centering"):
        out.append(
            _step("+ centering", f"{_shown(slots['centering'])} x (s_chosen + s_rejected)^2", "Eisenstein et al. 2023")
        )
    return out


def ending(slots: Slots, *, truncates: bool = False) -> list[str]:
    """Describe the optimum of an online method: pi*(y) = pi_ref(y) exp(s(y) / beta) / Z, or why it differs.

    `truncates` means that some tokens cannot be sampled (top-p, top-k, min-p).
    """
    if "loss" in slots:
        return _ending_of_pairs(slots, truncates)
    kl = None if slots["kl_in_reward"] is None else record(KL, slots["kl_in_reward"])
    moved = _moved(slots, truncates)
    if kl is not None and kl.coef > 0:
        return _ending_in_reward(slots, kl, moved)
    kl_in_loss = slots["kl_in_loss"]
    if not kl_in_loss or kl_in_loss.get("coef", _coef(kl_in_loss["name"])) == 0:
        return [
            "no KL limits the distance to the reference: the policy moves towards the answers with the highest score",
            *moved,
        ]
    return _ending_in_loss(slots, kl_in_loss["name"], moved)


def preference_ending(slots: Slots) -> list[str]:
    """Describe the optimum of a preference method on rows with labels."""
    losses = _losses(slots)
    moved = _moved_preference(slots, losses)
    if [name for name in losses if name != "sft"] != ["sigmoid"]:
        return [*_ends_of(losses), *moved]
    if moved:
        return ["not pi*(y|x) = pi_ref(y|x) exp(r / beta) / Z", *moved, _UNCERTAIN]
    return [
        "pi*(y|x) = pi_ref(y|x) exp(r / beta) / Z, for labels that give the probability sigmoid(r_w - r_l), or are drawn with it",
        _UNCERTAIN,
    ]


_UNCERTAIN = (
    "pairs that are always labeled the same way (probability 1, the default of a row) have no such r: their gap grows as long as "
    "they are trained and beta sets only how fast; give rows a `probability`, or stop early by held-out rows"
)

_ENDS: Mapping[str, str] = {
    "hinge": "a gap w - l of 1 or more for every pair, whatever the difference of its scores",
    "ipo": "a gap of the log-ratios of 1 / (2 beta) for every pair, whatever the difference of its scores",
    "exo_pair": "a gap w - l of log((1 - e) / e), e = label_smoothing, for every pair, whatever the difference of its scores",
    "sppo_hard": "w = 1/2 and l = -1/2 for every pair, whatever the difference of its scores",
    "kto": "no policy: an answer that is good more often than bad (by the weights desirable and undesirable) is raised and another one "
    "lowered for as long as they are trained. beta sets only where the gradient begins to fade; it bounds neither the KL to the "
    "reference nor lengths and scores. Stop early by held-out rows",
    "apo_zero_unpaired": "no policy, as in kto: good answers are raised and bad ones lowered for as long as they are trained",
}
"""Where losses end that do not end at pi*; other losses of pairs without noise end nowhere."""


def _losses(slots: Slots) -> list[str]:
    given = slots["loss"] if isinstance(slots["loss"], list) else [slots["loss"]]
    return [named(one)["name"] for one in given]


def _ends_of(losses: Sequence[str]) -> list[str]:
    """Describe the end of losses, none of which reads soft labels."""
    if losses == ["sft"]:
        return ["the distribution of the chosen answers"]
    nowhere = "no policy: a pair's loss falls as long as its gap grows, and beta sets only how fast"
    return [f"{name}: {_ENDS.get(name, nowhere)}" for name in losses if name != "sft"]


def _moved_preference(slots: Slots, losses: Sequence[str]) -> list[str]:
    """Return the reasons why the optimum of the sigmoid loss on soft labels is not pi*."""
    score = slots["implicit_reward"]
    given = slots["loss"] if isinstance(slots["loss"], list) else [slots["loss"]]
    options: Slots = next((named(one) for one in given if named(one)["name"] == "sigmoid"), {})
    smoothing, divergence = options.get("label_smoothing", 0.0), score.get("divergence", "reverse_kl")
    reasons = {
        "the implicit reward has no reference, so nothing bounds the distance to it": score["name"]
        != "implicit_reward",
        "log-ratios are divided by the answer's length": bool(score.get("mean")),
        f"the divergence is {divergence}, so the ratio is another function of the reward": divergence != "reverse_kl",
        f"label_smoothing {_shown(smoothing)} bounds every gap by log((1 - e) / e)": smoothing > 0,
        "the margin adds to every gap": options.get("margin", 0.0) > 0,
        "the SFT loss has another optimum": bool(slots.get("sft_weight")) or "sft" in losses,
    }
    return [f"moved: {why}" for why, holds in reasons.items() if holds]


def _ending_of_pairs(slots: Slots, truncates: bool) -> list[str]:
    """Describe the optimum of an online preference method."""
    losses, labels = _losses(slots), slots["pairs"]
    own = [name for name in losses if name != "sft"]
    moved = _moved_preference(slots, losses)
    if truncates:
        moved.append("moved: some tokens cannot be sampled, so pairs with them are never seen")
    if slots["normalize"]:
        moved.append("moved: scores are divided by statistics of the policy's own answers, so they have no fixed unit")
    if labels["name"] == "bradley_terry" and own == ["sigmoid"]:
        scale = slots["beta"] * labels.get("temperature", 1.0) if "beta" in slots else None
        if moved or scale is None:
            return ["not pi*(y|x) = pi_ref(y|x) exp(s / (beta temperature)) / Z", *moved]
        return [
            f"pi*(y|x) = pi_ref(y|x) exp(s / {_shown(float(scale))}) / Z with the score s of the steps above: each pair's loss is least at "
            "w - l = (s_w - s_l) / temperature; the divisor is beta x temperature",
        ]
    if labels["name"] != "hard":
        return ["where the labels of your function lead", *moved]
    if own != ["sigmoid"]:
        return [*_ends_of(losses), *(moved if own else [])]
    if any("label_smoothing" in one for one in moved):
        return [
            "the same gap w - l = log((1 - e) / e), e = label_smoothing, for every pair, whatever the difference of its scores",
            *moved,
        ]
    return [
        "no policy: a judge without noise always prefers the answer with the higher score, so hard labels are 1 for certain; a pair's loss "
        "falls as long as its gap grows, and beta bounds nothing: the KL to the reference, lengths and scores run off",
        "to end at pi_ref exp(s / beta) / Z: --pairs bradley_terry, whose labels are sigmoid((s_w - s_l) / temperature)",
        *moved,
    ]


def _coef(name: str) -> float:
    """Return the default coefficient of a KL in the loss."""
    return ONLINE_SLOTS["kl_in_loss"][name].extra["coef"] if name in ONLINE_SLOTS["kl_in_loss"] else 1.0


def _moved(slots: Slots, truncates: bool) -> list[str]:
    """Return the reasons why the optimum is not pi*, for a KL in the reward or in the loss."""
    credit, rule = slots["advantage"], record(Truncated, slots["truncated"]).rule
    uncentered = credit["name"] in ("monte_carlo", "against_greedy") and slots["reduction"]["name"] == "sequence_mean"
    reasons = {
        "the pre-training term has another optimum": slots["ptx_coef"] > 0,
        "the entropy bonus rewards distributions of high entropy": slots["entropy"] is not None,
        "gamma below 1 discounts later rewards, both score and KL": credit.get("gamma", 1.0) < 1,
        "scores are divided by statistics of the policy's own answers, so they have no fixed unit": bool(
            slots["normalize"] or (slots["reward_normalization"] and slots["reward_normalization"]["name"] == "batch")
        ),
        f"answers cut off at the limit follow the rule {rule}": rule in ("mask", "bootstrap"),
        "some tokens cannot be sampled, so the optimum is that of the truncated distributions": truncates,
        "each answer is divided by its length while its advantage is not centered": uncentered,
    }
    return [f"moved: {why}" for why, holds in reasons.items() if holds]


def _ending_in_reward(slots: Slots, kl: KL, moved: list[str]) -> list[str]:
    """Describe the optimum with a KL in the reward."""
    if kl.estimator in ("k2", "k3"):
        moved = [
            f"moved: the {kl.estimator} in the reward misses the gradient of the KL through the policy; k1 and exact do not",
            *moved,
        ]
    if kl.where == "sequence":
        moved = ["moved: the KL is divided by the answer's length, so long answers have a smaller penalty", *moved]
    if slots["kl_in_loss"]:
        moved = ["moved: there is another KL in the loss", *moved]
    out = ["not pi*(y|x) = pi_ref(y|x) exp(s / beta) / Z", *moved]
    if not moved:
        out = [
            "pi*(y|x) = pi_ref(y|x) exp(s / beta) / Z with the score s of the steps above: this is the optimum with the KL in the reward"
        ]
    out.append(
        "beta is kl_in_reward.coef"
        if kl.controller == "fixed"
        else f"beta is where the {kl.controller} controller converges"
    )
    if slots["reward_placement"]["name"] == "linear" and not slots["reward_placement"].get("normalized", False):
        out.append("s is the sum of what was placed, (|y| + 1) / 2 times the score: a longer answer earns more")
    if _scaled(slots) and slots["advantage"]["name"] not in ("group_center",):
        out.append(
            "the deviation goes to 0 near the optimum, and dividing by it keeps the noise large, so the policy does not settle"
        )
    return out


def _ending_in_loss(slots: Slots, name: str, moved: list[str]) -> list[str]:
    """Describe the optimum with a KL only in the loss."""
    credit, scaled = slots["advantage"]["name"], _scaled(slots)
    whole = slots["reduction"]["name"] in ("sequence_sum", "fixed_length")
    if name == "k2_sequence" and credit == "leave_one_out" and whole and not scaled and not moved:
        return [
            "pi*(y|x) = pi_ref(y|x) exp(s / beta) / Z: the sequence form of k2 has the gradient of the KL over whole answers"
        ]
    why = {
        "k2_sequence": "the sequence form of k2 leads to pi* with leave_one_out and sequence_sum, and nothing that rescales",
        "k3": "the gradient of k3 is that of KL(reference || policy), which has another optimum even for answers of one token",
    }
    out = [
        f"not pi*: {why.get(name, 'the gradient of a KL in the loss ignores that a token changes the KL of later tokens')}"
    ]
    if scaled:
        out.append(
            "the deviation divides the reward but not the KL, so the effective beta differs from the coefficient"
        )
    elif credit == "group_center":
        g = slots["num_generations"]
        out.append(
            f"the group's mean includes the answer itself, so the effective beta is {g}/{g - 1} of kl_in_loss.coef"
        )
    return [
        *out,
        *moved,
        "to reach pi*: --kl-in-loss null --kl-in-reward.coef BETA with an advantage that only centers (leave_one_out, group_center)",
    ]


def _scaled(slots: Slots) -> bool:
    """Return whether advantages are divided by statistics of the policy's own answers."""
    return bool(slots["normalize_advantage"]) or slots["advantage"]["name"] in (
        "group_zscore",
        "group_mean_scaled",
        "group_steps",
    )


def differences(verb: str, slots: Slots, name: str | None = None) -> list[str]:
    """List how the defaults differ from the paper, and how the recipe differs from the defaults."""
    table = {**catalogue.ONLINE, **catalogue.ONLINE_PREFERENCE, **catalogue.PREFERENCE}
    method = catalogue.REWARD[name or "k_way"] if verb == "reward" else table[verb]
    out = [f"by default: {one}" for one in method.differs]
    for slot, value in method.slots.items():
        if slots.get(slot) != value:
            out.append(f"in this recipe: {slot} is {in_words(slots.get(slot))}, the method's is {in_words(value)}")
    return out


def _penalty(given: Any) -> list[str]:
    if given is None:
        return []
    kl = record(KL, given)
    where = {"token": "r_t <- r_t - ", "sequence": "r_T <- r_T - (1/|y|) sum_t ", "sequence_sum": "r_T <- r_T - sum_t "}
    meaning = {
        "k1": "(log pi_old - log pi_ref)", "k2": "(log pi_old - log pi_ref)^2 / 2",
        "k3": "(pi_ref / pi_old - 1 - log(pi_ref / pi_old))", "exact": "KL(pi_old || pi_ref) over the vocabulary",
    }  # fmt: skip
    steered = f"; {kl.controller} coefficient, target {kl.target} nats per answer" if kl.controller != "fixed" else ""
    told = f"{where[kl.where]}{_shown(kl.coef)} {meaning[kl.estimator]}{steered}"
    return [_step("KL in the reward", told, "Ziegler et al. 2019, eq. 2")]


def _truncated(given: Any) -> list[str]:
    rule = record(Truncated, given)
    told = {
        "keep": "an answer cut off at the limit is scored and trained like any other",
        "mask": "an answer cut off at the limit counts in its group but is not trained",
        "penalize": f"s <- s - {_shown(rule.amount)} for an answer cut off at the limit",
        "bootstrap": "a cut-off answer gets the critic's value after its last token in place of the missing rewards",
    }
    return [_step("cut-off answers", told[rule.rule], "")]


def _step(about: str, told: str, source: str) -> str:
    return f"  {about:<18} {told}" if len(about) > 17 else f"  {about:<18}{told}" + (f"   [{source}]" if source else "")


def in_words(value: Any) -> str:
    """Format the value of a slot: a part with its options, a record with its fields, or a number."""
    if isinstance(value, Mapping) and "name" in value:
        rest = ", ".join(f"{key} {_shown(one)}" for key, one in value.items() if key != "name")
        return f"{value['name']}{f' ({rest})' if rest else ''}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(one)}" for key, one in value.items())
    if isinstance(value, list):
        return " + ".join(map(in_words, value))
    return "nothing" if value is None else _shown(value)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
