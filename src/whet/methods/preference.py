"""Preference methods: pairs go straight into the policy. Two slots: how an answer is scored, how a gap becomes a loss."""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import msgspec

from whet import ops
from whet.dials import NotNegative, Positive
from whet.errors import RecipeError
from whet.methods.part import Part, Term, part


def _gap(beta: float, mean: bool) -> Part:
    return part(ops.gap, score=part(ops.implicit_reward, beta=beta, mean=mean))


def _with_sft(term: Term, weight: float) -> tuple[Term, ...]:
    """The term, and the SFT loss on the chosen answers (a mean per token) where its weight is not 0."""
    sft = Term("policy", "train", part(ops.nll), ops.token_mean, weight, mask="chosen_mask")
    return (term, sft) if weight > 0 else (term,)


def dpo(
    *,
    beta: Positive = 0.1,
    label_smoothing: Annotated[float, msgspec.Meta(ge=0, lt=0.5)] = 0.0,
    link: Literal["sigmoid", "hinge"] = "sigmoid",
    mean: bool = False,
    sft_weight: NotNegative = 0.0,
) -> tuple[Term, ...]:
    """DPO (Rafailov et al. 2023, equation 7); cDPO with `label_smoothing`; soft labels through `probability`.

    `mean` divides each answer's log-prob by its length; `link="hinge"` is SLiC's; `sft_weight` adds the SFT loss on
    the chosen answer.
    """
    if link == "hinge" and label_smoothing > 0:
        raise RecipeError("method.label_smoothing: the hinge link has no smoothing; leave it at 0")
    gap = _gap(beta, mean)
    if link == "sigmoid":
        probability = part(ops.nth, x="probability", n=0)
        loss = part(ops.sigmoid, gap=gap, probability=probability, label_smoothing=label_smoothing)
    else:
        loss = part(ops.hinge, gap=gap)
    return _with_sft(Term("policy", "train", loss, ops.element_mean), sft_weight)


def ipo(
    *,
    beta: Positive = 0.1,
    mean: bool = False,
    sft_weight: NotNegative = 0.0,
) -> tuple[Term, ...]:
    """IPO (Azar et al. 2023, equation 17): (gap - 1 / (2 beta))^2 on the plain log-ratio gap.

    The paper and OpenRLHF sum over the answer; TRL divides by its length (`mean=True`).
    """
    return _with_sft(
        Term("policy", "train", part(ops.ipo, gap=_gap(beta, mean), beta=beta), ops.element_mean), sft_weight
    )


METHODS: Mapping[str, Callable[..., tuple[Term, ...]]] = {"dpo": dpo, "ipo": ipo}
"""Every preference method by name; its keyword parameters are the dials of the recipe's `method:` section."""
