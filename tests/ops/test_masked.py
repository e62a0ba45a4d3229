"""Masked sums, means and whitening: by hand, against scipy, and blind to what the padding holds."""

import inspect
import math

import pytest
import torch
from scipy import stats

from whet import ops
from whet.ops import Counts, masked_mean, masked_sum, whiten

from .helpers import bits, close, f64, grad_of, nan

X = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
MASK = bits("110", "011")


@pytest.mark.parametrize(
    ("dim", "total", "mean"),
    [
        (None, 14.0, 3.5),  # 1 + 2 + 5 + 6, over 4 positions
        (0, [1.0, 7.0, 6.0], [1.0, 3.5, 6.0]),  # columns hold 1 | 2 5 | 6
        (1, [3.0, 11.0], [1.5, 5.5]),  # rows hold 1 2 | 5 6
        (-1, [3.0, 11.0], [1.5, 5.5]),
    ],
)
def test_sum_and_mean_by_hand(dim: int | None, total: object, mean: object) -> None:
    close(masked_sum(f64(X), MASK, dim), total)
    close(masked_mean(f64(X), MASK, dim), mean)


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean])
def test_an_empty_mask_gives_zero(reduce) -> None:
    x = f64([[nan, 1.0], [2.0, 3.0]])
    close(reduce(x, bits("00", "00")), 0.0)
    close(reduce(x, bits("00", "01"), 1), [0.0, 3.0])  # one empty row beside a full one


@pytest.mark.parametrize("junk", [nan, math.inf, -math.inf])
@pytest.mark.parametrize(("reduce", "value", "share"), [(masked_sum, 4.0, 1.0), (masked_mean, 2.0, 0.5)])
def test_padding_counts_neither_in_value_nor_in_gradient(junk: float, reduce, value: float, share: float) -> None:
    x, mask = f64([[1.0, junk, 3.0]]), bits("101")
    close(reduce(x, mask), value)
    close(grad_of(lambda x: reduce(x, mask, 1), x)[0], [[share, 0.0, share]])


def test_the_mean_keeps_the_dtype() -> None:
    assert masked_mean(torch.ones(1, 2), bits("11")).dtype == torch.float32


# 1, 2, 3 lie under the mask: mean 2, squares 1 + 0 + 1 = 2, so the deviation is 1 (n - 1) or sqrt(2/3) (n).
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"eps": 1.0}, [-0.5, 0.0, 0.5]),
        ({"eps": 1.0, "shift_mean": False}, [0.5, 1.0, 1.5]),
        ({"eps": 0.0, "ddof": 0}, [-math.sqrt(1.5), 0.0, math.sqrt(1.5)]),
        ({"eps": 0.0, "ddof": 0, "shift_mean": False}, [math.sqrt(1.5), 2 * math.sqrt(1.5), 3 * math.sqrt(1.5)]),
    ],
)
@pytest.mark.parametrize("junk", [7.0, nan])
def test_whiten_by_hand_over_all_rows_at_once(options: dict, expected: list[float], junk: float) -> None:
    a, b, c = expected
    close(whiten(f64([[1.0, 3.0, junk], [junk, junk, 2.0]]), bits("110", "001"), **options), [[a, c, 0], [0, 0, b]])


@pytest.mark.parametrize("ddof", [0, 1])
def test_whiten_equals_scipy(ddof: int) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 4 + 3
    close(whiten(x, torch.ones_like(x, dtype=torch.bool), ddof=ddof, eps=0.0), stats.zscore(x.numpy(), None, ddof))


def test_by_default_the_sample_deviation_and_1e_8_added_after_the_root() -> None:
    # x - mean = -+1e-8, sample deviation sqrt(2) 1e-8, so -+1e-8 / ((sqrt(2) + 1) 1e-8)
    close(whiten(f64([[0.0, 2e-8]]), bits("11")), [[-1 / (math.sqrt(2) + 1), 1 / (math.sqrt(2) + 1)]])


@pytest.mark.parametrize("ddof", [0, 1])
def test_one_position_is_shifted_to_zero(ddof: int) -> None:
    close(whiten(f64([[5.0, nan]]), bits("10"), ddof=ddof), [[0.0, 0.0]])


@pytest.mark.parametrize("ddof", [0, 1])
def test_one_position_keeps_its_scale_where_the_mean_stays(ddof: int) -> None:
    close(whiten(f64([[5.0, nan]]), bits("10"), ddof=ddof, shift_mean=False), [[5.0, 0.0]])


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
def test_whiten_without_positions_is_zero(ddof: int, shift_mean: bool) -> None:
    close(whiten(f64([[5.0, nan]]), bits("00"), ddof=ddof, shift_mean=shift_mean), [[0.0, 0.0]])


def test_whiten_without_variance_is_zero() -> None:
    close(whiten(f64([[3.0, 3.0, 3.0, 9.0]]), bits("1110")), [[0.0] * 4])


@pytest.mark.parametrize("junk", [9.0, -9.0, nan])
@pytest.mark.parametrize("ddof", [0, 1])
def test_the_rounding_of_a_mean_is_no_variance(junk: float, ddof: int) -> None:
    x = torch.tensor([[0.1] * 7 + [junk]])  # in float32 their mean is another number
    assert whiten(x, bits("11111110"), ddof=ddof).tolist() == [[0.0] * 8]
    assert torch.equal(whiten(x, bits("11111110"), ddof=ddof, shift_mean=False)[:, :7], x[:, :7])


def test_the_gradient_of_whiten_goes_through_mean_and_deviation() -> None:
    # z = 0 -1 1 of deviation 1 and weights w = 5 -2 6 of mean 3: (w - mean w - z (w . z) / (n - 1)) / deviation
    weights, mask = f64([[5.0, -2.0, 6.0, 9.0]]), bits("1110")
    grad = grad_of(lambda x: weights * whiten(x, mask, eps=0.0), f64([[2.0, 1.0, 3.0, 8.0]]))[0]
    close(grad, [[2.0, -5.0 + 4.0, 3.0 - 4.0, 0.0]])  # w . z = 8


def test_nan_in_the_padding_leaves_the_gradient_of_whiten_alone() -> None:
    assert grad_of(lambda x: whiten(x, bits("1110")) ** 3, f64([[1.0, 2.0, 4.0, nan]]))[0].isfinite().all()


def test_whiten_along_a_dimension_equals_scipy() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 4 + 3
    for dim in (0, 1, -1):
        for ddof in (0, 1):
            close(whiten(x, torch.ones_like(x).bool(), dim, ddof=ddof, eps=0.0), stats.zscore(x.numpy(), dim, ddof))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_each_row_is_whitened_as_if_alone(shift_mean: bool) -> None:
    x = f64([[1.0, nan, 3.0, 2.0], [5.0, 5.0, nan, 5.0], [nan, 7.0, nan, nan], [nan] * 4, [4.0, 8.0, 1.0, 1.0]])
    mask = bits("1011", "1101", "0100", "0000", "1111")
    got = whiten(x, mask, 1, shift_mean=shift_mean)
    for row in range(5):
        close(got[row : row + 1], whiten(x[row : row + 1], mask[row : row + 1], shift_mean=shift_mean))
    close(whiten(x.T, mask.T, 0, shift_mean=shift_mean), got.T)
    assert grad_of(lambda x: whiten(x, mask, 1, shift_mean=shift_mean) ** 3, x)[0].isfinite().all()


# --- masks of other dtypes --------------------------------------------------------------------------------------------

INPUTS: dict[str, object] = {
    **{
        name: f64([[-0.5, -1.5, -0.25], [-2.0, -0.75, -1.0]]) * scale + shift
        for name, scale, shift in [
            ("x", 1, 0), ("logp", 1, 0), ("now_logp", 1, 0), ("old_logp", 1.2, 0), ("ref_logp", 0.8, 0), ("sampler_logp", 0.9, 0),
            ("rewards", 2, 1), ("values", 0.5, 1), ("advantage", 1, 0.8), ("token_reward", 1, 1), ("token_score", 1, 2), ("kl", -1, 0),
            ("loss", 1, 3), ("value", 1, 1), ("returns", 1.5, 1), ("old_collision", -0.1, 0.1), ("attention_weight", -1, 0.1),
        ]
    },
    **{name: f64([0.5, -1.0]) for name in ("score", "baseline", "answer_advantage", "kl_baseline")},
    "scores": f64([[0.5, 2.0, 1.0], [1.0, 0.0, 3.0]]), "ranks": torch.tensor([[1, 2, 3], [2, 1, 1]]),
    "group": torch.tensor([0, 0]), "address": torch.tensor([3, 9]), "counts": Counts(4, 2, 2),
    "mask": bits("101", "011"), "segment_end": bits("001", "010"), "selected": bits("110", "010"), "valid": bits("111", "110"),
    "good": torch.tensor([True, False]), "truncated": torch.tensor([False, True]),
    "beta": 0.5, "limit": 2, "amount": 1.0, "length": 4,
}  # fmt: skip
MASKS = {"mask", "segment_end", "selected", "valid", "good", "truncated"}


def with_masks() -> list[str]:
    functions = {name: getattr(ops, name) for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    return [name for name, op in functions.items() if callable(op) and MASKS & inspect.signature(op).parameters.keys()]


def called(name: str, dtype: torch.dtype) -> torch.Tensor:
    given = {}
    for one, parameter in inspect.signature(getattr(ops, name)).parameters.items():
        if one in MASKS:
            given[one] = INPUTS[one].to(dtype)
        elif parameter.default is inspect.Parameter.empty:
            given[one] = INPUTS[one]
    return getattr(ops, name)(**given)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", with_masks())
def test_a_mask_of_any_dtype_is_the_mask(name: str, dtype: torch.dtype) -> None:
    torch.testing.assert_close(called(name, dtype), called(name, torch.bool), rtol=0, atol=0)


def test_every_op_with_a_mask_is_compared() -> None:
    assert len(with_masks()) >= 40


def test_counts_of_masks_of_any_dtype() -> None:
    for dtype in (torch.bool, torch.int64, torch.float32):
        mask = bits("1101", "0000", "0100", "1111").to(dtype)
        assert Counts.of(mask) == Counts(tokens=8, sequences=3, elements=4)
        assert Counts.of(mask, elements=2) == Counts(tokens=8, sequences=3, elements=2)
        assert sum((Counts.of(one[None]) for one in mask), Counts(0, 0, 0)) == Counts.of(mask)


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, nan])
def test_a_mask_of_other_numbers_is_refused(value: float) -> None:
    mask = torch.tensor([[1.0, value]])
    for refuses in (lambda: masked_mean(mask, mask), lambda: whiten(mask, mask), lambda: Counts.of(mask)):
        with pytest.raises(ValueError, match=f"0 and 1; got {value}"):
            refuses()
