"""Parts and terms: what they read, how columns are bound, which dials they have."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from whet import ops
from whet.methods import Term, part
from whet.methods.part import Part, controllers, fixed, resolved
from whet.ops import Counts, FixedKL, HalvingKL


def weird(first: Tensor, second: Tensor, third: Tensor | None = None, *, dial: float = 2.0) -> Tensor:
    """first + 10 second + 100 third, times the dial."""
    return dial * (first + 10 * second + (0 if third is None else 100 * third))


COLUMNS = {
    name: torch.tensor([number])
    for name, number in zip(("first", "second", "third", "a"), (1.0, 2.0, 3.0, 4.0), strict=True)
}


@pytest.mark.parametrize(
    ("given", "reads", "value"),
    [
        ({}, {"first", "second"}, 42.0),
        ({"dial": 1.0}, {"first", "second"}, 21.0),
        ({"second": "a"}, {"first", "a"}, 82.0),
        ({"third": "third"}, {"first", "second", "third"}, 642.0),
        ({"first": part(weird, dial=1.0), "dial": 1.0}, {"first", "second"}, 41.0),
        ({"first": part(weird, second="a"), "dial": 1.0}, {"first", "second", "a"}, 102.0),
    ],
)
def test_positional_parameters_are_columns_and_keywords_are_dials(
    given: dict[str, Any], reads: set[str], value: float
) -> None:
    one = part(weird, **given)
    assert one.reads() == reads
    assert float(one(COLUMNS)) == value
    assert len(list(one.walk())) == 1 + sum(isinstance(source, Part) for source in given.values())


def test_a_part_gets_only_what_it_says_it_reads() -> None:
    with pytest.raises(KeyError):
        part(weird, third="nowhere")(COLUMNS)
    assert float(part(weird)({"first": torch.tensor([1.0]), "second": torch.tensor([2.0])})) == 42.0


def test_a_parameter_the_op_does_not_have_is_refused() -> None:
    with pytest.raises(TypeError, match=r"weird has no parameter 'lowe'"):
        part(weird, lowe=0.1)


def test_a_term_reads_its_loss_and_its_mask_and_gives_its_weighted_share() -> None:
    term = Term("policy", "train", part(ops.nll), ops.token_mean, 3.0, mask="chosen_mask")
    assert term.reads() == {"logp", "chosen_mask"}
    columns = {"logp": torch.tensor([[-1.0, -2.0, float("nan")]]), "chosen_mask": torch.tensor([[True, True, False]])}
    assert float(term.share(columns, Counts(6, 1, 1))) == 3.0 * 3.0 / 6
    assert term.label == "policy/train/nll"


def test_dials_of_the_reduction_are_handed_on() -> None:
    term = Term("policy", "train", part(ops.nll), ops.fixed_length, dials={"length": 8})
    columns = {"logp": torch.tensor([[-1.0, -2.0]]), "mask": torch.ones(1, 2, dtype=torch.bool)}
    assert float(term.share(columns, Counts(2, 2, 2))) == 3.0 / (2 * 8)


def test_controllers_become_numbers() -> None:
    term = Term("policy", "rollout", part(ops.kl_penalised, beta=HalvingKL(1.0, 0.1)), ops.token_mean, FixedKL(0.5))
    assert set(controllers(term)) == {"weight", "beta"}
    plain = resolved(term, {"weight": 0.25, "beta": 4.0})
    assert (plain.weight, plain.loss.dials["beta"]) == (0.25, 4.0)
    assert not controllers(plain)
    assert {f.name for f in fields(term) if getattr(term, f.name) != getattr(plain, f.name)} == {"loss", "weight"}
    assert controllers(replace(term, weight=1.0)).keys() == {"beta"}


def test_a_number_is_a_controller_that_never_changes() -> None:
    assert fixed(0.3).next(0.3, 9.0, 100) == 0.3
    halving = HalvingKL(1.0, 0.1)
    assert fixed(halving) is halving
