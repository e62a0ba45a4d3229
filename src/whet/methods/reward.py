"""Reward-model methods: from comparisons or scores to a scalar head."""

from collections.abc import Callable, Mapping
from typing import Literal

from whet import ops
from whet.dials import NotNegative
from whet.methods.part import Part, Term, part


def _column(name: str, place: int) -> Part:
    return part(ops.nth, x=name, n=place)


def _with_centring(loss: Part, weight: float) -> tuple[Term, ...]:
    term = Term("reward", "train", loss, ops.element_mean)
    if weight == 0:
        return (term,)
    centring = part(ops.centring, chosen=_column("score", 0), rejected=_column("score", 1))
    return (term, Term("reward", "train", centring, ops.element_mean, weight))


def pairwise(*, centring: NotNegative = 0.0) -> tuple[Term, ...]:
    """-log sigmoid(chosen - rejected - margin), a mean over pairs; `margin` comes with the data, 0 without."""
    loss = part(ops.pairwise, chosen=_column("score", 0), rejected=_column("score", 1), margin=_column("margin", 0))
    return _with_centring(loss, centring)


def log_exp(*, centring: NotNegative = 0.0) -> tuple[Term, ...]:
    """log(1 + exp(rejected - chosen)), a mean over pairs: pairwise without margin under its other name."""
    return _with_centring(part(ops.log_exp, chosen=_column("score", 0), rejected=_column("score", 1)), centring)


def k_way(*, ties: Literal["drop", "half"] = "drop") -> tuple[Term, ...]:
    """All pairs of one ranking as one element, divided by their number (Ouyang et al. 2022, equation 1).

    `ties`: see `whet.ops.k_way`.
    """
    return (Term("reward", "train", part(ops.ranking_loss, ties=ties), ops.element_mean),)


def absolute() -> tuple[Term, ...]:
    """(score - target)^2 / 2, a mean over answers: absolute scores as data."""
    return (Term("reward", "train", part(ops.regression), ops.element_mean),)


METHODS: Mapping[str, Callable[..., tuple[Term, ...]]] = {
    "pairwise": pairwise,
    "log_exp": log_exp,
    "k_way": k_way,
    "absolute": absolute,
}
"""Every reward-model method by name."""

READS = {"pairwise": "pairs", "log_exp": "pairs", "k_way": "rankings", "absolute": "labelled"}
"""Which records each method is trained on: the name of a reading of `whet.records.Reader`."""
