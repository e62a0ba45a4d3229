"""Parts and terms: what they read, how columns are bound, which options they have."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from whet import ops
from whet.methods import Objective, Term, part
from whet.methods.parts import Part, fixed, mean_reward, settled, steered
from whet.ops import AdaptiveEntropy, Counts, FixedKL, HalvingKL, RunningMean


def weird(first: Tensor, second: Tensor, third: Tensor | None = None, *, option: float = 2.0) -> Tensor:
    """first + 10 second + 100 third, times the option."""
    return option * (first + 10 * second + (0 if third is None else 100 * third))


COLUMNS = {
    name: torch.tensor([number])
    for name, number in zip(("first", "second", "third", "a"), (1.0, 2.0, 3.0, 4.0), strict=True)
}


@pytest.mark.parametrize(
    ("given", "reads", "value"),
    [
        ({}, {"first", "second"}, 42.0),
        ({"option": 1.0}, {"first", "second"}, 21.0),
        ({"second": "a"}, {"first", "a"}, 82.0),
        ({"third": "third"}, {"first", "second", "third"}, 642.0),
        ({"first": part(weird, option=1.0), "option": 1.0}, {"first", "second"}, 41.0),
        ({"first": part(weird, second="a"), "option": 1.0}, {"first", "second", "a"}, 102.0),
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
    term = Term("policy", "train", part(ops.nll), ops.fixed_length, options={"length": 8})
    columns = {"logp": torch.tensor([[-1.0, -2.0]]), "mask": torch.ones(1, 2, dtype=torch.bool)}
    assert float(term.share(columns, Counts(2, 2, 2))) == 3.0 / (2 * 8)


def test_a_dial_that_is_not_given_is_the_ops_own() -> None:
    assert part(weird).options == {"option": 2.0}
    assert part(weird, option=1.0).options == {"option": 1.0}
    assert part(ops.kl_penalized).options == {}  # beta has no default


def test_a_term_is_called_by_its_name_where_it_has_one() -> None:
    assert Term("policy", "ptx", part(ops.nll), ops.token_mean, name="ptx").label == "policy/ptx/ptx"


TERMS = (
    Term("policy", "rollout", part(ops.unclipped, ratio=part(ops.token_ratio)), ops.token_mean),
    Term("policy", "rollout", part(ops.kl_penalized, beta=HalvingKL(1.0, 0.1)), ops.token_mean, FixedKL(0.5)),
    Term("policy", "rollout", part(ops.entropy_bonus), ops.token_mean, AdaptiveEntropy(0.3, 0.2)),
)


def test_controllers_become_numbers() -> None:
    assert set(steered(TERMS)) == {"term1.weight", "term1.beta", "term2.weight"}
    plain = settled(TERMS, {"term1.weight": 0.25, "term1.beta": 4.0, "term2.weight": 0.125, "penalty": 9.0})
    assert [term.weight for term in plain] == [1.0, 0.25, 0.125]
    assert plain[1].loss.options["beta"] == 4.0
    assert not steered(plain)
    assert plain[0] == TERMS[0]
    differ = {f.name for f in fields(Term) if getattr(TERMS[1], f.name) != getattr(plain[1], f.name)}
    assert differ == {"loss", "weight"}
    assert set(steered([replace(TERMS[1], weight=1.0)])) == {"term0.beta"}


def test_controllers_are_found_and_settled_within_other_parts() -> None:
    inner = part(ops.kl_penalized, beta=HalvingKL(1.0, 0.1))
    term = Term(
        "policy", "rollout", part(ops.weighted, loss=part(ops.kept, loss=inner), weight="correction"), ops.token_mean
    )
    assert set(steered([term])) == {"term0.beta"}
    plain = settled([term], {"term0.beta": 3.0})[0]
    assert [one.options.get("beta") for one in plain.loss.walk()] == [None, None, 3.0]
    assert plain.reads() == term.reads()


def test_the_tenth_term_does_not_take_the_number_of_the_first() -> None:
    many = tuple(Term("policy", "train", part(ops.nll), ops.token_mean, FixedKL(float(n))) for n in range(12))
    state = {name: one.coef for name, one in steered(many).items()}
    assert [term.weight for term in settled(many, state)] == [float(n) for n in range(12)]


def test_a_weight_may_be_the_name_of_another_number_of_the_state() -> None:
    term = Term("policy", "rollout", part(ops.nll), ops.token_mean, "penalty")
    assert not steered([term])
    assert settled([term], {"penalty": 0.3, "term0.weight": 9.0})[0].weight == 0.3


def test_what_stands_outside_its_mask_reaches_no_term() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    logp = torch.tensor([[-1.0, float("nan")], [-2.0, -4.0]], requires_grad=True)
    # |nan| has no gradient, and 0 times that neither
    loss = part(ops.kl_on, loss=part(ops.nll), old_logp="ref_logp", selected="mask")
    columns = {"logp": logp, "ref_logp": torch.full((2, 2), -3.0), "mask": mask}
    total = Term("policy", "train", loss, ops.token_mean).share(columns, Counts(3, 2, 2))
    total.backward()
    assert float(total.detach()) == pytest.approx((1 + 2 + 2 + 1 + 4 + 1) / 3)
    assert logp.grad.tolist() == [[0.0, 0.0], [0.0, pytest.approx(-2 / 3)]]


def test_an_objective_reads_its_terms_and_what_it_selects_and_keeps_its_state() -> None:
    shift = RunningMean(coef=0.5)
    loss = part(ops.bco, score=part(ops.nth, x=part(ops.implicit_reward, beta=0.5), n=0), good="good", delta=shift)
    term = Term("policy", "train", loss, ops.element_mean)
    objective = Objective((term,), (("kl_baseline", part(ops.kl_baseline, log_ratio="now_logp")),))
    assert objective.reads() == {"logp", "ref_logp", "mask", "index", "good", "now_logp"}
    state = objective.init()
    assert state == {"term0.delta": 0.5} == json.loads(json.dumps(state))
    assert objective.at(state).terms[0].loss.options == {"delta": 0.5}
    after = objective.next(state, {"reward": 2.0})
    assert after == {"term0.delta": pytest.approx(0.9 * 0.5 + 0.1 * 2.0)}
    assert objective.at(after).terms[0].loss.options["delta"] == after["term0.delta"]
    assert Objective(()).init() == Objective(()).next({}, {"reward": 1.0}) == {}


def test_the_mean_reward_is_that_of_the_answers_that_are_labeled() -> None:
    score = part(ops.implicit_reward, beta=0.5)
    columns = {
        "logp": torch.tensor([[1.0, 2.0], [8.0, 0.0], [4.0, 9.0], [16.0, 0.0]]), "ref_logp": torch.zeros(4, 2),
        "mask": torch.tensor([[True, True], [True, False], [True, False], [True, False]]),
        "index": torch.tensor([0, 1, 0, 1]),
    }  # fmt: skip
    term = Term("policy", "train", part(ops.sigmoid, gap=part(ops.gap, score=score)), ops.element_mean)
    assert mean_reward([term], columns) == 0.5 * (3 + 8 + 4 + 16) / 4
    # with labels the rows of place 1 are answers to other prompts
    assert mean_reward([term], {**columns, "good": torch.ones(4, dtype=torch.bool)}) == 0.5 * (3 + 4) / 2
    assert mean_reward([TERMS[0]], columns) == 0.0


def test_a_number_is_a_controller_that_never_changes() -> None:
    assert fixed(0.3).next(0.3, 9.0, 100) == 0.3
    halving = HalvingKL(1.0, 0.1)
    assert fixed(halving) is halving
