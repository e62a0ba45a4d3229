"""What looks across a mini-batch: covariances, who is selected, and who is matched with whom, by hand."""

import math

import pytest
import torch

from whet.ops import clip_cov, covariance, kl_baseline, kl_cov, sorted_partner, sorted_rival

from .helpers import bits, close, f64, nan

# five trained tokens: log-probs -1 -2 -3 -4 -5 of mean -3, advantages 4 1 -2 0 -3 of mean 0
MASK = bits("101", "011", "010")
LOGP = f64([[-1.0, nan, -2.0], [nan, -3.0, -4.0], [nan, -5.0, nan]])
ADVANTAGE = f64([[4.0, nan, 1.0], [nan, -2.0, 0.0], [nan, -3.0, nan]])
COVARIANCE = [[8.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 6.0, 0.0]]  # 2 4, 1 1, 0 -2, -1 0, -2 -3


def test_covariance_by_hand_over_the_whole_mini_batch() -> None:
    close(covariance(LOGP, ADVANTAGE, MASK), COVARIANCE)
    close(covariance(LOGP + 7, ADVANTAGE - 3, MASK), COVARIANCE)  # only deviations from the means count


def test_the_mean_covariance_is_that_of_the_two_columns() -> None:
    p, a = f64([0.1, 0.2, 0.3, 0.4]).log(), f64([1.0, -2.0, 0.5, 3.0])
    mean_p, mean_a = sum(p.tolist()) / 4, sum(a.tolist()) / 4
    expected = sum((x - mean_p) * (y - mean_a) for x, y in zip(p.tolist(), a.tolist(), strict=True))
    close(covariance(p[None], a[None], bits("1111")).sum(), expected)


CLIP_COV = [  # share of five tokens, interval, tokens without gradient (flat places)
    ("inside the interval", 0.4, (0.5, 7.0), {2, 7}),  # 1 and 6
    ("at least one is drawn", 1e-9, (5.0, 7.0), {7}),
    ("no more than there are", 1.0, (5.0, 7.0), {7}),
    ("the largest may be too large", 1.0, (0.5, 9.0), {0, 2, 7}),
    ("none inside, none drawn", 1.0, (20.0, 30.0), set()),
    ("negative ones too", 1.0, (-1.0, 0.5), {4, 5}),  # the two zeros that are trained
]


@pytest.mark.parametrize(("share", "interval", "out"), [pytest.param(*row[1:], id=row[0]) for row in CLIP_COV])
def test_clip_cov_draws_among_the_candidates(share: float, interval: tuple[float, float], out: set[int]) -> None:
    options = {"share": share, "cov_low": interval[0], "cov_high": interval[1]}
    got = clip_cov(LOGP, LOGP, ADVANTAGE, torch.arange(len(MASK)), MASK, **options)
    assert got.dtype == torch.bool
    assert got.shape == MASK.shape
    assert {place for place, keep in enumerate(got.flatten().tolist()) if not keep} == out


@pytest.mark.parametrize(
    ("moved", "out"),
    [
        ({}, {0, 7}),  # ratio 1: nothing is stopped
        ({(0, 0): 1.19}, {0, 7}),
        ({(0, 0): 1.21}, {7}),  # A 4 > 0 and ratio above 1 + 0.2: the clip stops it already
        ({(0, 0): 0.5}, {0, 7}),  # towards the old policy: not stopped
        ({(2, 1): 0.69}, {0}),  # A -3 < 0 and ratio below 1 - 0.3
        ({(2, 1): 0.71}, {0, 7}),
        ({(2, 1): 1.5}, {0, 7}),
        ({(0, 0): 2.0, (2, 1): 0.1}, set()),
    ],
)
def test_clip_cov_leaves_out_what_the_clip_stops_anyway(moved: dict, out: set[int]) -> None:
    ratio = torch.ones_like(LOGP)
    for place, value in moved.items():
        ratio[place] = value
    options = {"clip_low": 0.3, "clip_high": 0.2, "share": 1.0, "cov_low": 5.0, "cov_high": 9.0}
    got = clip_cov(LOGP, LOGP - ratio.log(), ADVANTAGE, torch.arange(len(MASK)), MASK, **options)
    assert {place for place, keep in enumerate(got.flatten().tolist()) if not keep} == out


def test_clip_cov_counts_its_share_of_the_trained_tokens_and_draws_alike_every_time() -> None:
    noise = torch.Generator().manual_seed(0)
    logp, advantage = torch.randn(2, 8, 50, dtype=torch.float64, generator=noise)
    mask = torch.rand(8, 50, generator=noise) < 0.8
    options = {"share": 0.05, "cov_low": 0.0, "cov_high": 9.0}
    got = clip_cov(logp, logp, advantage, torch.arange(len(mask)), mask, **options)
    assert int((~got).sum()) == int(0.05 * int(mask.sum()))
    assert not (~got & ~(mask & (covariance(logp, advantage, mask) > 0))).any()
    assert torch.equal(got, clip_cov(logp, logp, advantage, torch.arange(len(mask)), mask, **options))
    first = (mask & (covariance(logp, advantage, mask) > 0)).flatten().nonzero()[:, 0][: int((~got).sum())]
    assert set(first.tolist()) != set((~got).flatten().nonzero()[:, 0].tolist())  # drawn, not the first ones


def test_clip_cov_draws_the_same_tokens_whatever_the_padding_and_the_order() -> None:
    noise = torch.Generator().manual_seed(1)
    logp, advantage = torch.randn(2, 8, 30, dtype=torch.float64, generator=noise)
    mask, address = torch.rand(8, 30, generator=noise) < 0.8, torch.arange(100, 108)
    options = {"share": 0.05, "cov_low": 0.0, "cov_high": 9.0}
    got = clip_cov(logp, logp, advantage, address, mask, **options)
    wide = [
        torch.nn.functional.pad(one, (0, 7), value=fill) for one, fill in ((logp, 0.0), (advantage, 0.0), (mask, False))
    ]
    assert torch.equal(clip_cov(wide[0], wide[0], wide[1], address, wide[2], **options)[:, :30], got)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    turned = clip_cov(logp[order], logp[order], advantage[order], address[order], mask[order], **options)
    assert torch.equal(turned, got[order])
    assert not torch.equal(
        clip_cov(logp, logp, advantage, address + 1000, mask, **options), got
    )  # another update, other tokens


def test_default_dials_of_clip_cov() -> None:
    # 5 tokens: one is drawn among 1 < covariance < 5; covariances 8 1 0 0 6 have none, halved 4 0.5 0 0 3 have two
    assert clip_cov(LOGP, LOGP, ADVANTAGE, torch.arange(len(MASK)), MASK).all()
    assert int((~clip_cov(LOGP, LOGP, ADVANTAGE / 2, torch.arange(len(MASK)), MASK)).sum()) == 1
    moved = LOGP - f64([[math.log(1.21), 0, 0], [0, 0, 0], [0, math.log(0.79), 0]])
    assert clip_cov(LOGP, moved, ADVANTAGE / 2, torch.arange(len(MASK)), MASK).all()  # low and high are 0.2


@pytest.mark.parametrize(
    ("share", "chosen"), [(1e-9, {0}), (0.4, {0, 7}), (0.5, {0, 7}), (0.6, {0, 2, 7}), (1.0, {0, 2, 4, 5, 7})]
)
def test_kl_cov_takes_the_largest_covariances(share: float, chosen: set[int]) -> None:
    got = kl_cov(LOGP, ADVANTAGE, MASK, share=share)
    assert {place for place, take in enumerate(got.flatten().tolist()) if take} == chosen


def test_kl_cov_by_default_takes_two_in_a_thousand() -> None:
    logp = torch.linspace(-3, 0, 2000, dtype=torch.float64).reshape(4, 500)
    got = kl_cov(logp, logp, torch.ones_like(logp, dtype=torch.bool))  # largest at both ends
    assert got.flatten().nonzero()[:, 0].tolist() == [0, 1, 1998, 1999]


def test_nothing_to_select_from() -> None:
    none = torch.zeros_like(MASK)
    assert clip_cov(LOGP, LOGP, ADVANTAGE, torch.arange(len(none)), none).all()
    assert not kl_cov(LOGP, ADVANTAGE, none).any()


PAIRS = torch.tensor([0, 1] * 4)


def test_a_sorted_partner_has_the_same_rank_by_hand() -> None:
    # own gaps 5 -1 2 0 have ranks 3 0 2 1; the others' gaps 10 40 20 30 are 10 20 30 40 when sorted
    score, other = f64([6, 1, 0, 1, 2, 0, 3, 3]), f64([10, 0, 45, 5, 20, 0, 29, -1])
    close(sorted_partner(score, other, PAIRS), [40, 40, 10, 10, 30, 30, 20, 20.0])


def test_a_sorted_rival_stands_on_the_other_side_by_hand() -> None:
    # chosen 3 1 2 0 have ranks 3 1 2 0; rejected 7 5 8 6 have ranks 2 0 3 1
    score = f64([3, 7, 1, 5, 2, 8, 0, 6])
    # chosen 3 -> 8, 1 -> 6, 2 -> 7, 0 -> 5; rejected 7 -> 2, 5 -> 0, 8 -> 3, 6 -> 1
    close(sorted_rival(score, PAIRS), [8, 2, 6, 0, 7, 3, 5, 1.0])


def test_equal_scores_are_matched_in_the_order_of_the_rows() -> None:
    score = f64([1, 0, 1, 0, 1, 0, 1, 0])
    other = f64([4, 0, 3, 0, 2, 0, 1, 0])
    close(sorted_partner(score, other, PAIRS), [1, 1, 2, 2, 3, 3, 4, 4.0])
    close(sorted_rival(other, PAIRS), [0, 1, 0, 2, 0, 3, 0, 4.0])


def test_matching_is_the_cheapest_transport() -> None:
    from itertools import permutations

    noise = torch.Generator().manual_seed(0)
    own, other = torch.randn(2, 5, dtype=torch.float64, generator=noise)
    rows = torch.stack([own, torch.zeros(5, dtype=torch.float64)], 1).flatten()
    theirs = torch.stack([other, torch.zeros(5, dtype=torch.float64)], 1).flatten()
    matched = sorted_partner(rows, theirs, torch.tensor([0, 1] * 5))[::2]
    cheapest = min(sum((own[i] - other[j]) ** 2 for i, j in enumerate(order)) for order in permutations(range(5)))
    close(((own - matched) ** 2).sum(), cheapest)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([5.0, 1.0, 7.0, 2.0], 1.5),  # mismatched 1 and 2
        ([5.0, -3.0, 7.0, 2.0], 0.0),  # their mean is negative
        ([-5.0, 4.0, -7.0, 0.0], 2.0),
    ],
)
def test_the_kl_baseline_is_the_mean_of_the_mismatched_answers_at_least_zero(ratios: list, expected: float) -> None:
    close(kl_baseline(f64(ratios), torch.tensor([0, 1, 0, 1])), [expected] * 4)


def test_without_mismatched_answers_the_kl_baseline_is_zero() -> None:
    close(kl_baseline(f64([5.0, 7.0]), torch.tensor([0, 0])), [0.0, 0.0])


def test_nothing_to_match() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert sorted_partner(f64([]), f64([]), none).shape == (0,)
    assert sorted_rival(f64([]), none).shape == (0,)
    assert kl_baseline(f64([]), none).shape == (0,)
