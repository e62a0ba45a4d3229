"""Preference and reward-model methods: value and gradient of their terms by independent formulas in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from whet.methods import Term, preference, reward
from whet.records import Batch, Labelled, Pair, Ranking, Row

LENGTHS = ((3, 1), (2, 4), (1, 1))
PROBABILITY, MARGIN = (1.0, 0.75, 0.5), (0.0, 0.5, -0.25)
RANKS = ((2, 1), (1, 3, 3, 2), (1, 1), (3, 1, 2))


def row(length: int) -> Row:
    return Row(torch.arange(2, 4 + length), 2, torch.ones(length, dtype=torch.bool))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pairs(**columns: Tensor) -> Batch:
    own = [Pair(row(a), row(b), p, m) for (a, b), p, m in zip(LENGTHS, PROBABILITY, MARGIN, strict=True)]
    batch = Batch.of(own)
    return batch.with_columns(**{name: batch[name].double() for name in ("probability", "margin")} | columns)


def value_and_gradient(terms: tuple[Term, ...], batch: Batch, name: str, leaf: Tensor) -> tuple[float, Tensor]:
    """The sum of the terms' shares, and its gradient with respect to the column that carries it."""
    leaf = leaf.clone().requires_grad_()
    total = sum(term.share({**batch.columns, name: leaf}, batch.counts(term.mask)) for term in terms)
    assert isinstance(total, Tensor)
    total.backward()
    assert leaf.grad is not None
    return float(total.detach()), leaf.grad


def numerical(function: Callable[[list[list[float]]], float], at: Tensor) -> Tensor:
    """Central differences of a plain-Python function."""
    out = torch.zeros_like(at)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in at.shape]).reshape(-1, at.ndim).tolist():
        step = torch.zeros_like(at)
        step[tuple(index)] = 1e-6
        out[tuple(index)] = (function((at + step).tolist()) - function((at - step).tolist())) / 2e-6
    return out


def check(terms: tuple[Term, ...], batch: Batch, name: str, leaf: Tensor, by_hand: Callable[[Any], float]) -> None:
    value, gradient = value_and_gradient(terms, batch, name, leaf)
    assert value == pytest.approx(by_hand(leaf.tolist()), rel=1e-10)
    torch.testing.assert_close(gradient, numerical(by_hand, leaf), rtol=1e-6, atol=1e-8)
    assert gradient.norm() > 1e-3


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


# --- preference ------------------------------------------------------------------------------------------------------

REF = numbers(6, 4, seed=1)
PREFERENCE: dict[str, tuple[tuple[Term, ...], dict[str, Any]]] = {
    "dpo": (preference.dpo(beta=0.3), {}),
    "dpo, smoothed": (preference.dpo(beta=0.3, label_smoothing=0.1), {"smooth": 0.1}),
    "dpo, mean": (preference.dpo(beta=2.0, mean=True), {"beta": 2.0, "mean": True}),
    "dpo, with sft": (preference.dpo(beta=0.3, sft_weight=0.7), {"sft": 0.7}),
    "slic": (preference.dpo(beta=0.3, link="hinge"), {"link": "hinge"}),
    "ipo": (preference.ipo(beta=0.3), {"link": "ipo"}),
    "ipo, mean, with sft": (
        preference.ipo(beta=0.3, mean=True, sft_weight=0.2),
        {"link": "ipo", "mean": True, "sft": 0.2},
    ),
}


def preference_by_hand(
    logp: list[list[float]],
    *,
    beta: float = 0.3,
    smooth: float = 0.0,
    mean: bool = False,
    sft: float = 0.0,
    link: str = "sigmoid",
) -> float:
    """The SFT loss is a mean over the tokens it is trained on: those of the chosen answers."""
    total, nll = 0.0, 0.0
    for pair, (lengths, p) in enumerate(zip(LENGTHS, PROBABILITY, strict=True)):
        score = []
        for side, length in enumerate(lengths):
            ratio = sum(logp[2 * pair + side][t] - float(REF[2 * pair + side, t]) for t in range(length))
            score.append(ratio / length if mean else ratio)
        h = score[0] - score[1]
        if link == "sigmoid":
            q = p * (1 - smooth) + (1 - p) * smooth
            total += -q * log_sigmoid(beta * h) - (1 - q) * log_sigmoid(-beta * h)
        else:
            total += max(0.0, 1 - beta * h) if link == "hinge" else (h - 1 / (2 * beta)) ** 2
        nll -= sum(logp[2 * pair][: lengths[0]])
    return total / len(LENGTHS) + sft * nll / sum(a for a, _ in LENGTHS)


@pytest.mark.parametrize("name", PREFERENCE)
def test_a_preference_loss_and_its_gradient(name: str) -> None:
    terms, dials = PREFERENCE[name]
    check(terms, pairs(ref_logp=REF), "logp", numbers(6, 4), lambda logp: preference_by_hand(logp, **dials))


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_methods_read_the_reference(name: str) -> None:
    for number, term in enumerate(PREFERENCE[name][0]):
        assert (term.role, term.stream) == ("policy", "train")
        assert ("ref_logp" in term.reads()) == (number == 0)


def test_every_preference_method_is_here() -> None:
    assert {name.split(",")[0] for name in PREFERENCE} - {"slic"} == preference.METHODS.keys()


def test_dpo_where_policy_is_reference_is_log_two() -> None:
    batch = pairs(ref_logp=REF)
    value, _ = value_and_gradient(preference.dpo(beta=0.7), batch, "logp", REF)
    assert value == pytest.approx(math.log(2))


# --- reward models ---------------------------------------------------------------------------------------------------


def pairwise_by_hand(scores: list[float], *, margins: Any = (0.0,) * 3, centring: float = 0.0) -> float:
    total = 0.0
    for pair, margin in enumerate(margins):
        chosen, rejected = scores[2 * pair], scores[2 * pair + 1]
        total += -log_sigmoid(chosen - rejected - margin) + centring * (chosen + rejected) ** 2
    return total / 3


def k_way_by_hand(scores: list[float], *, ties: str) -> float:
    total, start = 0.0, 0
    for ranks in RANKS:
        own = scores[start : start + len(ranks)]
        start += len(ranks)
        losses = []
        for i in range(len(ranks)):
            for j in range(i):
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                if ranks[i] != ranks[j]:
                    losses.append(-log_sigmoid(own[better] - own[worse]))
                elif ties == "half":
                    losses.append(-0.5 * log_sigmoid(own[i] - own[j]) - 0.5 * log_sigmoid(own[j] - own[i]))
        total += sum(losses) / len(losses) if losses else 0.0
    return total / len(RANKS)


REWARD: dict[str, tuple[tuple[Term, ...], Callable[[], Batch], Callable[[list[float]], float]]] = {
    "pairwise": (reward.pairwise(), pairs, lambda s: pairwise_by_hand(s, margins=MARGIN)),
    "pairwise, centred": (
        reward.pairwise(centring=0.3),
        pairs,
        lambda s: pairwise_by_hand(s, margins=MARGIN, centring=0.3),
    ),
    "log_exp": (reward.log_exp(), pairs, pairwise_by_hand),
    "log_exp, centred": (reward.log_exp(centring=0.3), pairs, lambda s: pairwise_by_hand(s, centring=0.3)),
    "k_way": (reward.k_way(), lambda: rankings(), lambda s: k_way_by_hand(s, ties="drop")),
    "k_way, half": (reward.k_way(ties="half"), lambda: rankings(), lambda s: k_way_by_hand(s, ties="half")),
    "absolute": (
        reward.absolute(),
        lambda: labelled(),
        lambda s: sum((x - t) ** 2 / 2 for x, t in zip(s, (1.0, -0.5, 2.0), strict=True)) / 3,
    ),
}


def rankings() -> Batch:
    return Batch.of([Ranking(tuple(row(1 + i) for i in range(len(ranks))), ranks) for ranks in RANKS])


def labelled() -> Batch:
    batch = Batch.of([Labelled(row(2), target) for target in (1.0, -0.5, 2.0)])
    return batch.with_columns(target=batch["target"].double())


@pytest.mark.parametrize("name", REWARD)
def test_a_reward_loss_and_its_gradient(name: str) -> None:
    terms, make, by_hand = REWARD[name]
    batch = make()
    check(terms, batch, "score", 2 * numbers(len(batch.rows)), by_hand)
    assert {(term.role, term.stream) for term in terms} == {("reward", "train")}


def test_every_reward_method_is_here_and_has_its_records() -> None:
    assert {name.split(",")[0] for name in REWARD} == reward.METHODS.keys() == reward.READS.keys()


def test_k_way_of_two_is_pairwise_without_margin() -> None:
    scores = 2 * numbers(4)
    two = Batch.of([Ranking((row(1), row(2)), (1, 2)), Ranking((row(3), row(1)), (1, 2))])
    flat = Batch.of([Pair(row(1), row(2)), Pair(row(3), row(1))])
    flat = flat.with_columns(margin=flat["margin"].double())
    ours, theirs = (
        value_and_gradient(reward.k_way(), two, "score", scores),
        value_and_gradient(reward.pairwise(), flat, "score", scores),
    )
    assert ours[0] == pytest.approx(theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
