"""Known answers with rewards that do not apply: sums, normalizations and running statistics leave them out."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from whet.data import Batch, Row
from whet.errors import RewardError
from whet.methods import online, spread
from whet.methods.algorithm import outcome, shaped
from whet.registry import register

REWARDS = [[1.0, 0.0], [3.0, 6.0], [0.0, 2.0], [5.0, 4.0]]
APPLIES = [[True, False], [True, True], [False, True], [True, True]]


def batch(rewards: Any = REWARDS, applies: Any = APPLIES, group: tuple[int, ...] = (0, 0, 0, 0)) -> Batch:
    """Four answers of one token with two rewards."""
    rows = [Row(torch.tensor([1, 2]), 1, torch.tensor([True]))] * len(rewards)
    return Batch.of(rows).with_columns(
        rewards=torch.tensor(rewards, dtype=torch.float64),
        reward_applies=torch.tensor(applies),
        token_score=torch.zeros(len(rewards), 1, dtype=torch.float64),
        group=torch.tensor(group),
        truncated=torch.zeros(len(rewards), dtype=torch.bool),
    )


def made(**slots: Any) -> Any:
    return online("grpo", num_generations=4, weights=(1.0, 0.5), **slots)


def test_a_reward_that_does_not_apply_adds_nothing() -> None:
    assert outcome(made(), batch()).tolist() == [1.0, 3.0 + 3.0, 1.0, 5.0 + 2.0]


def test_the_least_is_over_the_rewards_that_apply() -> None:
    assert outcome(made(combine="minimum"), batch()).tolist() == [1.0, 3.0, 1.0, 2.0]


def test_the_lower_bound_is_over_the_rewards_that_apply() -> None:
    # weighted: 1 | 3, 3 | 1 | 5, 2 with mean 3.5 and deviation 1.5
    assert outcome(made(combine={"name": "lower_bound", "k": 2.0}), batch()).tolist() == [1.0, 3.0, 1.0, 0.5]


def test_each_reward_is_normalized_over_the_answers_to_which_it_applies() -> None:
    # 1, 3, 5: mean 3, sample deviation 2; 6, 2, 4: mean 4, sample deviation 2
    method = made(normalize={"name": "group_normalized", "eps": 0.0})
    assert outcome(method, batch()).tolist() == [-1.0, 0.0 + 0.5, -0.5, 1.0 + 0.0]


def test_running_statistics_are_of_the_scores_from_the_rewards_that_apply() -> None:
    method = made(reward_normalization="running", advantage="group_center")
    state = method.observe(method.init(), batch())
    scores = [1.0, 6.0, 1.0, 7.0]
    mean = sum(scores) / 4
    assert (state["running.count"], state["running.mean"]) == (4, mean)
    assert state["running.square"] == pytest.approx(sum((one - mean) ** 2 for one in scores))
    deviation = math.sqrt(state["running.square"] / 3)
    expected = [(one - mean) / deviation for one in scores]
    assert shaped(method.at(state), batch())["score"].tolist() == pytest.approx(expected)


SPREADS: list[tuple[Any, Any, list[bool]]] = [
    ([[1.0, 0.0], [1.0, 0.0], [2.0, 3.0], [2.0, 3.0]], [[True, True]] * 4, [False] * 4),
    # the second reward is 5 where it applies; 0 is the score of an answer to which it does not
    ([[1.0, 5.0], [1.0, 0.0], [2.0, 0.0], [2.0, 5.0]], [[True, True], [True, False], [True, False], [True, True]], [False] * 4),
    ([[1.0, 5.0], [0.0, 4.0], [2.0, 0.0], [0.0, 5.0]], [[True, True], [False, True], [True, False], [False, True]],
     [True, True, False, False]),
]  # fmt: skip


@pytest.mark.parametrize(("rewards", "applies", "expected"), SPREADS)
def test_rewards_that_are_normalized_apart_have_a_spread_among_the_answers_to_which_they_apply(
    rewards: Any, applies: Any, expected: list[bool]
) -> None:
    method = made(normalize="group_normalized")
    assert spread(method, batch(rewards, applies, (0, 0, 1, 1))).tolist() == expected


def test_the_sum_has_a_spread_if_a_reward_applies_to_one_answer_alone() -> None:
    rewards, applies = (
        [[1.0, 5.0], [1.0, 0.0], [2.0, 3.0], [2.0, 3.0]],
        [[True, True], [True, False], [True] * 2, [True] * 2],
    )
    assert spread(made(), batch(rewards, applies, (0, 0, 1, 1))).tolist() == [True, True, False, False]


def centered(rewards: Tensor, group: Tensor) -> Tensor:
    return rewards - rewards.mean(0)


def centered_where(rewards: Tensor, reward_applies: Tensor) -> Tensor:
    return rewards - rewards.sum(0) / reward_applies.sum(0)


def largest(rewards: Tensor) -> Tensor:
    return rewards.amax(1)


@pytest.mark.parametrize(("slot", "own"), [("normalize", centered), ("combine", largest)])
def test_a_function_that_does_not_read_which_rewards_apply_is_refused_only_where_one_does_not(
    slot: str, own: Any
) -> None:
    method = made(**{slot: register(own)})
    every = [[True, True]] * 4
    assert outcome(method, batch(applies=every)).shape == (4,)
    with pytest.raises(
        RewardError, match=rf"^algorithm.{slot}: {own.__name__} .* does not read the column reward_applies"
    ):
        outcome(method, batch())


def test_a_function_that_reads_which_rewards_apply_is_used_and_adds_nothing_elsewhere() -> None:
    # 1, 3, 5 have the mean 3, and 6, 2, 4 the mean 4; -3 and -4 where they do not apply are not added
    method = made(normalize=register(centered_where))
    assert outcome(method, batch()).tolist() == [-2.0, 0.0 + 1.0, -1.0, 2.0 + 0.0]


def test_a_batch_that_does_not_say_it_has_rewards_that_apply() -> None:
    given = batch()
    columns = {name: one for name, one in given.columns.items() if name != "reward_applies"}
    assert outcome(made(combine="minimum"), Batch(given.rows, columns)).tolist() == [0.0, 3.0, 0.0, 2.0]
