"""Addressed randomness: the same numbers everywhere, uniform, and blind to shape and order."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from scipy import stats

from whet.ops import address, addressed_uniform, permutation

WORD = 1 << 64


def finalise(z: int) -> int:
    """splitmix64's finaliser in unbounded integers (Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def splitmix64(seed: int, count: int) -> list[int]:
    """The first outputs of the generator."""
    return [finalise((seed + n * 0x9E3779B97F4A7C15) % WORD) for n in range(1, count + 1)]


def places(*indices: int) -> torch.Tensor:
    return torch.tensor(indices)


def test_the_independent_formula_gives_the_published_numbers() -> None:
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("key", [0, 7, (1 << 63) - 1, 1 << 63, WORD - 1, 0x9E3779B97F4A7C15])
def test_a_number_is_splitmix64_finalised_once_more(key: int) -> None:
    one = [(finalise(word) >> 11) / 2**53 for word in splitmix64(key, 50)]
    assert addressed_uniform(key, torch.arange(50)).tolist() == one
    two = [(finalise(splitmix64(word, 4)[3]) >> 11) / 2**53 for word in splitmix64(key, 50)]  # second place: 3
    assert addressed_uniform(key, torch.arange(50), places(3)).tolist() == two


def test_literals_that_must_never_change() -> None:
    assert address(0, "order", 3) == 3711057560728892766
    expected = [0.4558970808054451, 0.15143332108160057, 0.5064892242682739]
    assert addressed_uniform(7, torch.arange(3)).tolist() == expected
    assert permutation(7, 8).tolist() == [4, 7, 1, 6, 5, 3, 0, 2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1,), ("1",)),
        ((1, 2), (2, 1)),
        ((1, 23), (12, 3)),
        (("ab", "c"), ("a", "bc")),
        (("a",), ("a", "")),
        ((0,), ()),
        ((1,), (-1,)),
        ((3, "order", 0), (3, "order", 1)),
    ],
)
def test_another_address_has_another_key(one: tuple, other: tuple) -> None:
    assert address(*one) != address(*other)


def test_keys_fill_64_bits_without_collision() -> None:
    keys = [address(seed, "draw", n) for seed in range(20) for n in range(100)]
    assert len(set(keys)) == 2000
    assert min(keys) >= 0
    assert 1 << 63 < max(keys) < WORD
    assert stats.kstest([key / WORD for key in keys], "uniform").pvalue > 0.01


@pytest.mark.parametrize("key", [0, 1, address(5, "dropout")])
def test_numbers_are_uniform_and_uncorrelated(key: int) -> None:
    x = addressed_uniform(key, torch.arange(100)[:, None], torch.arange(100))
    assert x.dtype == torch.float64
    assert x.shape == (100, 100)
    assert x.min() >= 0
    assert x.max() < 1
    assert stats.kstest(x.flatten().numpy(), "uniform").pvalue > 0.01
    above = torch.ones_like(x).triu(1).bool()
    neighbors = {
        "right": (x[:, :-1], x[:, 1:]),
        "below": (x[:-1], x[1:]),
        "across": (x[above], x.T[above]),  # (i, j) and (j, i)
        "next key": (x, addressed_uniform(key + 1, torch.arange(100)[:, None], torch.arange(100))),
    }
    for name, (one, other) in neighbors.items():  # the correlation of 5,000 independent pairs has deviation 0.014
        assert abs(stats.pearsonr(one.flatten().numpy(), other.flatten().numpy()).statistic) < 0.05, name


def test_a_number_depends_on_its_place_alone_not_on_shape_or_order() -> None:
    whole = addressed_uniform(9, torch.arange(6)[:, None], torch.arange(7))
    rows, columns = places(5, 0, 3), places(6, 6, 1)
    assert torch.equal(addressed_uniform(9, rows, columns), whole[rows, columns])
    assert torch.equal(addressed_uniform(9, torch.arange(6).flip(0)[:, None], torch.arange(7)), whole.flip(0))
    assert torch.equal(addressed_uniform(9, torch.tensor(2), torch.tensor(4)), whole[2, 4])


def test_places_are_told_apart_by_order_and_count() -> None:
    one, two = places(1), places(2)
    assert len({addressed_uniform(9, *where).item() for where in [(one, two), (two, one), (one,), (two,)]}) == 4


def test_the_integer_type_of_a_place_does_not_matter() -> None:
    assert torch.equal(addressed_uniform(3, torch.arange(9, dtype=torch.int32)), addressed_uniform(3, torch.arange(9)))


@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_a_permutation_holds_every_index_once(count: int) -> None:
    order = permutation(3, count)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(count))


def test_another_key_is_another_order_and_the_same_key_the_same() -> None:
    orders = [permutation(address(0, "order", epoch), 50).tolist() for epoch in range(20)]
    assert all(one != other for one, other in pairwise(orders))
    assert orders[4] == permutation(address(0, "order", 4), 50).tolist()
    assert list(range(50)) not in orders


def test_every_order_of_three_is_equally_likely() -> None:
    seen = Counter(tuple(permutation(key, 3).tolist()) for key in range(900))
    assert len(seen) == 6
    assert stats.chisquare(list(seen.values())).pvalue > 0.01
