"""Reward-model losses: pairs enumerated in plain Python, ties, padding and rankings of any length."""

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from whet.ops import by_element, centering, k_way, log_exp, nth, pairwise, ranking_loss, regression, step_loss

from .helpers import close, f64, grad_of, nan


def cost(better: float, worse: float) -> float:
    """-log sigmoid(better - worse) in plain Python."""
    return math.log1p(math.exp(worse - better))


def enumerated(scores: list[float], ranks: list[int], ties: str = "drop") -> float:
    """The mean over all pairs of one ranking."""
    costs = []
    for i, j in combinations(range(len(scores)), 2):
        if ranks[i] != ranks[j]:
            costs.append(cost(scores[i], scores[j]) if ranks[i] < ranks[j] else cost(scores[j], scores[i]))
        elif ties == "half":
            costs.append(0.5 * cost(scores[i], scores[j]) + 0.5 * cost(scores[j], scores[i]))
    return sum(costs) / max(len(costs), 1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_pairwise_and_log_exp_by_hand() -> None:
    chosen, rejected = f64([1.0, 0.0, 3.0]), f64([1.0, 2.0, 0.0])
    expected = [math.log(2), math.log(1 + math.exp(2)), math.log(1 + math.exp(-3))]
    close(pairwise(chosen, rejected), expected)
    close(log_exp(chosen, rejected), expected)


def test_a_margin_is_taken_from_the_gap() -> None:
    expected = [cost(3.0 - 1.0, 0.0), cost(3.0 - 0.5, 1.0)]
    close(pairwise(f64([3.0, 3.0]), f64([0.0, 1.0]), f64([1.0, 0.5])), expected)
    close(pairwise(f64([3.0]), f64([0.0]), 1.0), expected[:1])


@pytest.mark.parametrize("gap", [-2.0, 0.0, 0.5])
@pytest.mark.parametrize("p", [1.0, 0.75, 0.5, 0.0])
def test_a_pair_that_is_only_probably_right(gap: float, p: float) -> None:
    # the margin 0.3 is taken off first: -p log sigmoid(g) - (1 - p) log sigmoid(-g), slope sigmoid(g) - p
    g = gap - 0.3
    given = f64([gap + 1.0]), f64([1.0]), f64([0.3]), f64([p])
    close(pairwise(*given), [p * cost(g, 0.0) + (1 - p) * cost(-g, 0.0)])
    close(grad_of(lambda c: pairwise(c, *given[1:]), given[0])[0], [sigmoid(g) - p])


@pytest.mark.parametrize("loss", [pairwise, log_exp])
def test_a_pair_pushes_by_the_probability_of_the_error(loss) -> None:
    for gap in (-2.0, 0.0, 0.5):
        chosen, rejected = grad_of(loss, f64([gap]), f64([0.0]))
        close(chosen, [-sigmoid(-gap)])
        close(rejected, [sigmoid(-gap)])
    close(loss(f64([-1000.0, 1000.0]), f64([0.0, 0.0])), [1000.0, 0.0])  # no overflow


RANKINGS = [  # scores, ranks (1 is best)
    ([1.0, 0.0], [1, 2]),
    ([1.0, 0.0], [2, 1]),
    ([0.3, -1.0, 2.0, 0.5], [3, 1, 4, 2]),
    ([0.3, -1.0, 2.0, 0.5], [1, 2, 2, 3]),
    ([0.3, -1.0, 2.0, 0.5], [2, 1, 2, 2]),
    ([0.7, -0.2, 0.1], [1, 1, 1]),
    ([0.7, 0.7], [1, 1]),
    ([5.0], [1]),
]


@pytest.mark.parametrize("ties", ["drop", "half"])
@pytest.mark.parametrize(("scores", "ranks"), RANKINGS)
def test_k_way_is_the_mean_over_all_pairs(scores: list[float], ranks: list[int], ties: str) -> None:
    close(k_way(f64([scores]), torch.tensor([ranks]), ties=ties), [enumerated(scores, ranks, ties)])


@pytest.mark.parametrize("junk", [1e6, nan])
@pytest.mark.parametrize("ties", ["drop", "half"])
def test_rankings_of_any_length_are_padded_and_the_padding_does_not_count(ties: str, junk: float) -> None:
    rows = [([*s, *[junk] * (4 - len(s))], [*r, *[1] * (4 - len(r))], len(s)) for s, r in RANKINGS]
    valid = torch.tensor([[k < length for k in range(4)] for _, _, length in rows])
    loss = k_way(f64([s for s, _, _ in rows]), torch.tensor([r for _, r, _ in rows]), valid, ties=ties)
    close(loss, [enumerated(s, r, ties) for s, r in RANKINGS])


def test_k_way_by_hand_with_and_without_ties() -> None:
    scores = f64([[2.0, 0.0, 0.0]])
    two, ln2 = math.log1p(math.exp(-2)), math.log(2)
    close(k_way(scores, torch.tensor([[1, 2, 3]])), [(2 * two + ln2) / 3])
    close(k_way(scores, torch.tensor([[1, 2, 2]])), [two])  # two pairs are left
    close(k_way(scores, torch.tensor([[1, 2, 2]]), ties="half"), [(2 * two + ln2) / 3])  # C(3, 2) stays
    close(k_way(scores, torch.tensor([[1, 1, 1]])), [0.0])


def test_the_gradient_of_k_way_by_hand() -> None:
    # pairs (0, 1), (0, 2) and the tie (1, 2): sigmoid of minus the gap, over 3; a tie pulls its scores together
    s, k = f64([[1.0, 0.5, -0.5]]), torch.tensor([[1, 2, 2]])
    one, two, tie = sigmoid(-0.5), sigmoid(-1.5), (sigmoid(1.0) - sigmoid(-1.0)) / 2
    close(grad_of(lambda s: k_way(s, k, ties="half"), s)[0] * 3, [[-one - two, one + tie, two - tie]])
    close(grad_of(lambda s: k_way(s, k), s)[0] * 2, [[-one - two, one, two]])


def test_nan_in_the_padding_of_a_ranking_reaches_no_gradient() -> None:
    valid = torch.tensor([[True, True, False]])
    grad = grad_of(lambda s: k_way(s, torch.tensor([[1, 2, 3]]), valid), f64([[0.0, 0.0, nan]]))[0]
    close(grad, [[-0.5, 0.5, 0.0]])


def test_an_unknown_rule_for_ties_is_refused() -> None:
    with pytest.raises(ValueError, match='"drop" or "half", got \'both\''):
        k_way(f64([[1.0, 0.0]]), torch.tensor([[1, 2]]), ties="both")


# three rankings given row by row, in no order: element 0 is places 0 1 2, element 1 is place 0, element 2 is places 0 1
ELEMENT, PLACE = torch.tensor([2, 0, 0, 1, 2, 0]), torch.tensor([0, 1, 0, 0, 1, 2])
ROWS = f64([20.0, 1.0, 0.5, 10.0, 21.0, 2.0])


def test_by_element_lays_rows_out_and_hands_the_gradient_back() -> None:
    out, valid = by_element(ROWS, ELEMENT, PLACE)
    close(out, [[0.5, 1.0, 2.0], [10.0, 0.0, 0.0], [20.0, 21.0, 0.0]])
    assert valid.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    weights = f64([[1.0, 2.0, 3.0], [4.0, 99.0, 99.0], [5.0, 6.0, 99.0]])
    close(grad_of(lambda x: weights * by_element(x, ELEMENT, PLACE)[0], ROWS)[0], [5.0, 2.0, 1.0, 4.0, 6.0, 3.0])


def test_no_rows_no_elements() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert [x.shape for x in by_element(torch.zeros(0), none, none)] == [(0, 0), (0, 0)]
    assert ranking_loss(torch.zeros(0), none, none, none).shape == (0,)


@pytest.mark.parametrize("ties", ["drop", "half"])
def test_ranking_loss_is_k_way_for_rows(ties: str) -> None:
    rank = torch.tensor([1, 1, 2, 1, 2, 1])  # element 0: ranks 2 1 1; element 2: ranks 1 2
    expected = [enumerated([0.5, 1.0, 2.0], [2, 1, 1], ties), 0.0, enumerated([20.0, 21.0], [1, 2], ties)]
    close(ranking_loss(ROWS, rank, ELEMENT, PLACE, ties=ties), expected)


def test_by_default_ranking_loss_drops_ties() -> None:
    zeros = torch.tensor([0, 0])
    close(ranking_loss(f64([1.0, 3.0]), torch.tensor([1, 1]), zeros, torch.tensor([0, 1])), [0.0])


@pytest.mark.parametrize(("n", "expected"), [(0, [0.5, 10.0, 20.0]), (1, [1.0, 21.0]), (2, [2.0]), (3, [])])
def test_nth_picks_one_row_of_every_element(n: int, expected: list[float]) -> None:
    order = [2, 1, 5, 3, 0, 4]  # element by element
    picked: Tensor = nth(ROWS[order], PLACE[order], n=n)
    assert picked.tolist() == expected


def test_regression_and_centering_by_hand() -> None:
    close(regression(f64([1.0, -2.0]), f64([4.0, -2.0])), [4.5, 0.0])
    close(grad_of(regression, f64([1.0]), f64([4.0]))[0], [-3.0])
    close(centering(f64([1.0, 2.0]), f64([3.0, -2.0])), [16.0, 0.0])
    for grad in grad_of(centering, f64([1.0]), f64([3.0])):
        close(grad, [8.0])


@pytest.mark.parametrize("score", [-2.0, 0.0, 0.5])
@pytest.mark.parametrize("label", [0.0, 0.25, 1.0])
def test_step_loss_is_the_cross_entropy_with_the_steps_label(score: float, label: float) -> None:
    expected = -label * math.log(sigmoid(score)) - (1 - label) * math.log(1 - sigmoid(score))
    close(step_loss(f64([[score]]), f64([[label]])), [[expected]])
    close(grad_of(lambda s: step_loss(s, f64([[label]])), f64([[score]]))[0], [[sigmoid(score) - label]])


def test_step_loss_does_not_overflow() -> None:
    close(step_loss(f64([[800.0, -800.0, 800.0]]), f64([[1.0, 1.0, 0.0]])), [[0.0, 800.0, 800.0]])
