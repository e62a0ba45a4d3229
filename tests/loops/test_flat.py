"""Rewards that give equal scores in the first steps: said once, after the steps in which they gave no other."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import helpers as h

from loops.helpers import go, method_of
from whet.data import Batch, Group, Row
from whet.loops.selfcheck import FlatScores
from whet.rewards import Scores


class Made:
    """A reward that is a function of the number of its call, the group and the answer."""

    def __init__(self, function: Callable[[int, int, int], float]) -> None:
        self.function, self.calls = function, 0

    def score(self, groups: Sequence[Group]) -> Scores:
        places = [(group, answer) for group, one in enumerate(groups) for answer in range(len(one.samples))]
        self.calls += 1
        return Scores(torch.tensor([self.function(self.calls, *place) for place in places]))


EACH = "equal for each prompt, and nothing is learned from equal scores"
ALL = "equal, and nothing is learned from equal scores"
RUNS: list[tuple[str, Any, int, str | None]] = [
    ("grpo", lambda call, group, answer: 0.5, 4, f"in the first 2 steps the scores of the 18 answers are {EACH}"),
    ("grpo", lambda call, group, answer: float(group), 3, f"in the first 2 steps the scores of the 18 answers are {EACH}"),
    ("grpo", lambda call, group, answer: float(call), 1, f"in the first 1 steps the scores of the 9 answers are {EACH}"),
    ("grpo", lambda call, group, answer: float(call == 2 and group == 2 and answer == 1), 4, None),
    ("grpo", lambda call, group, answer: float(call < 3 or answer), 5, "in the first 2 steps"),
    ("ppo", lambda call, group, answer: -2.0, 3, f"in the first 2 steps the scores of the 6 answers are {ALL}"),
    ("ppo", lambda call, group, answer: float(call), 3, None),
    ("ppo", lambda call, group, answer: float(group), 3, None),
    ("online_dpo", lambda call, group, answer: 1.0, 2, f"in the first 2 steps the scores of the 18 answers are {EACH}"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "score", "steps", "what"), RUNS)
def test_equal_scores_of_the_first_steps_are_said_once(
    method: str, score: Any, steps: int, what: str | None, tmp_path: Path, capsys: Any
) -> None:
    made = method_of(method, num_generations=1 if method == "ppo" else 3)
    go(tmp_path, made, reward=Made(score), steps=steps)
    lines = [one for one in capsys.readouterr().err.splitlines() if "nothing is learned" in one]
    if what is None:
        assert lines == []
        return
    (line,) = lines
    assert line.startswith("whet: reward table: ")
    assert what in line


def test_of_several_rewards_those_with_equal_scores_are_named(tmp_path: Path, capsys: Any) -> None:
    table = h.TableReward(lambda ids: 0.5 * len(ids) - 0.25 * (sum(ids) % 5))
    go(tmp_path, method_of("grpo", weights=(1.0, 1.0)), reward=[table, Made(lambda *_: 0.0)], steps=3)
    assert "whet: reward table1: in the first 2 steps" in capsys.readouterr().err


def test_a_run_that_was_resumed_in_between_says_nothing_and_one_answer_is_not_compared() -> None:
    batch = Batch.of([Row(torch.tensor([1, 2]), 1, torch.tensor([True]))] * 2)
    every = torch.ones(2, 1, dtype=torch.bool)
    batch = batch.with_columns(rewards=torch.zeros(2, 1), reward_applies=every, group=torch.tensor([0, 0]))
    flat = FlatScores(["judge"], 10)
    assert [flat.caution(step, batch) for step in (2, 3, 4)] == [None] * 3
    flat = FlatScores(["judge"], 1)
    assert flat.caution(1, batch.take([0])) is None


def test_answers_to_which_a_reward_does_not_apply_are_not_compared() -> None:
    """Their score is 0, which is not the score of an answer."""
    batch = Batch.of([Row(torch.tensor([1, 2]), 1, torch.tensor([True]))] * 5)
    applies = torch.tensor([[True, True], [True, True], [False, True], [True, False], [True, True]])
    rewards = torch.tensor([[0.5, 0.0], [0.5, 0.0], [0.0, 1.0], [0.5, 0.0], [0.5, 0.0]])
    batch = batch.with_columns(rewards=rewards, reward_applies=applies, group=torch.tensor([0, 0, 0, 1, 1]))
    line = FlatScores(["a", "b"], 1).caution(1, batch)
    assert line is not None
    assert line.startswith("reward a: in the first 1 steps the scores of the 4 answers are equal for each prompt")
