"""Evaluation: held-out losses, reward-model accuracy, win rates with a bootstrap interval, KL to another model."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from whet.data import Batch, Element, Group, Prompt
from whet.generate import Generator
from whet.learner import Learner, look_across
from whet.loops.source import answered
from whet.methods import Objective, answer_scores
from whet.methods.options import Sampling
from whet.ops import Counts, address, addressed_uniform


def held_out(
    learner: Learner, objective: Objective, elements: Sequence[Element], *, batch: int = 64
) -> dict[str, float]:
    """Return the losses of the objective over all held-out elements, with global counts.

    Selections across a mini-batch see `batch` elements at a time. If the elements are rankings or pairs and the objective scores
    answers (a reward model, or an implicit reward), the numbers of `pair_numbers` over their untied pairs are there too. Single
    answers (KTO) have no such pairs.
    """
    terms = objective.terms
    counts = [Counts(0, 0, 0)] * len(terms)
    for part in _batches(elements, batch):
        counts = [own + part.counts(term.mask) for own, term in zip(counts, terms, strict=True)]
    losses: dict[str, float] = {}
    margins: list[Tensor] = []
    columns = objective.reads() & {"ref_logp"}
    for part in _batches(elements, batch):
        part = learner.measure(part, columns) if columns else part
        part = look_across(learner, objective.select, part)
        step = learner.evaluate([(term, part, own) for term, own in zip(terms, counts, strict=True)])
        for name, value in step.losses.items():
            losses[name] = losses.get(name, 0.0) + value
        now = step.now.get("train", {})
        scores = now.get("score") if "score" in now else answer_scores(terms, {**part.columns, **now})
        if scores is not None and not {"target", "good"} & part.columns.keys():
            ranks = part["rank"] if "rank" in part.columns else part["index"] + 1
            margins += [pair_margins(scores[rows], ranks[rows]) for rows in part.elements()]
    every = torch.cat(margins) if margins else torch.zeros(0)
    return losses | (pair_numbers(every) if len(every) else {})


def pair_margins(scores: Tensor, ranks: Tensor) -> Tensor:
    """Return the score of the better answer minus that of the worse one for each pair of different rank, (pairs,). `scores` (K,) are
    of the answers to one prompt, and `ranks` (K,) their ranks, 1 the best.

    >>> pair_margins(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([1, 2, 2])).tolist()
    [1.0, 0.5]
    """
    better, worse = (ranks[:, None] < ranks).nonzero(as_tuple=True)
    return scores[better] - scores[worse]


def pair_numbers(margins: Tensor, bins: int = 10) -> dict[str, float]:
    """Return accuracy, mean margin and calibration error of pairs, from their margins (n,) (see `pair_margins`).

    accuracy is the share of positive margins; 0 counts one half. The calibration error compares the probability that
    Bradley and Terry's model gives to the answer with the higher score, c = sigmoid(|margin|), with how often this answer
    is the better one: sum over `bins` equal bins of c in [0.5, 1] of (share of pairs) |accuracy - mean c| (Guo et al. 2017, eq. 3).
    """
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    sure = margins.double().abs().sigmoid()
    place = ((sure - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, place, right - sure)
    return {
        "accuracy": float(right.mean()),
        "margin": float(margins.double().mean()),
        "calibration_error": float(gap.abs().sum() / len(margins)),
    }


def kl(learner: Learner, groups: Sequence[Group], temperature: float = 1.0, *, batch: int = 64) -> Tensor:
    """Return log policy(y) - log reference(y) of each answer, (n,), in nats. The mean estimates KL(policy || reference).

    The answers must be sampled from the policy at this temperature; both distributions are taken at it.
    """
    rows = [row for group in groups for row in group.rows()]
    out = []
    for start in range(0, len(rows), batch):
        part = Batch.of(rows[start : start + batch])
        part = part.with_columns(temperature=torch.full((len(part.rows),), temperature))
        part = learner.measure(part, frozenset({"old_logp", "ref_logp"}))
        out.append(((part["old_logp"] - part["ref_logp"]) * part["mask"]).sum(1))
    return torch.cat(out)


def _batches(elements: Iterable[Element], size: int) -> Iterator[Batch]:
    """Yield the elements in batches of `size`; the last may be smaller."""
    rest = iter(elements)
    while taken := list(islice(rest, size)):
        yield Batch.of(taken)


def scores(learner: Learner, objective: Objective, elements: Iterable[Element], *, batch: int = 64) -> Tensor:
    """Return the reward model's score of every row of these elements, in order, (n,)."""
    out = []
    for part in _batches(elements, batch):
        out.append(
            learner.evaluate([(term, part, part.counts(term.mask)) for term in objective.terms]).now["train"]["score"]
        )
    return torch.cat(out)


def ordered_pairs(scores: Sequence[float], ranks: Sequence[int]) -> tuple[float, int]:
    """Return (correctly ordered pairs, all pairs) of different rank; a pair with equal scores counts one half as correct.

    >>> ordered_pairs([1.0, 0.0, 0.0], [1, 2, 3])
    (2.5, 3)
    """
    right, pairs = 0.0, 0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if ranks[i] < ranks[j]:
                pairs += 1
                right += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    return right, pairs


def win_rate(
    ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0, draws: int = 2000
) -> tuple[float, float, float]:
    """Return (share of prompts where ours scores higher, lower end, upper end); a tie counts one half.

    The ends are those of the 95 % bootstrap interval.

    >>> win_rate([1.0, 2.0], [0.0, 2.0])[0]
    0.75
    """
    a, b = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    return interval((a > b).double() + 0.5 * (a == b).double(), seed=seed, draws=draws)


def interval(values: Tensor | Sequence[float], *, seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """Return (mean, lower end, upper end) of the 95 % percentile bootstrap interval over the values (n,)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    count = len(values)
    places = torch.arange(draws)[:, None], torch.arange(count)
    picked = (addressed_uniform(address(seed, "bootstrap"), *places) * count).long()
    means = values[picked].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.mean()), low, high


def answers(
    generator: Generator,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    count: int = 1,
    seed: int = 0,
    first: int = 0,
) -> list[Group]:
    """Generate `count` answers for every prompt; prompt i has draw `first` + i."""
    drawn = [(first + number, prompt) for number, prompt in enumerate(prompts)]
    return answered(generator, drawn, count, sampling, seed)


def rank_agreement(scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[int]]) -> float:
    """Return the share of pairs with different rank that the scores order correctly, over all questions."""
    totals = [ordered_pairs(own, given) for own, given in zip(scores, ranks, strict=True)]
    return sum(right for right, _ in totals) / max(1, sum(pairs for _, pairs in totals))
