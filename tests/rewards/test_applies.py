"""None says that a reward does not apply to an answer: it adds nothing, and an answer without any reward is refused."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from servers import serving

from whet.data import Group, Prompt, Sample
from whet.errors import RewardError
from whet.loops.experience import RolloutScores, batch_of, rollout_numbers
from whet.methods.options import Sampling
from whet.rewards import Scores, Weighted, score_all
from whet.rewards.base import joined, shares
from whet.rewards.functions import FunctionReward, ObjectReward
from whet.rewards.http import HttpReward
from whet.rewards.openai import OpenAIJudge, Options

LENGTHS = (3, 1, 2, 2)


def groups() -> list[Group]:
    """Two prompts with two answers each, of 3, 1, 2 and 2 tokens."""
    samples = [
        Sample(n // 2, n % 2, (7,) * long, (-1.0,) * long, 0, "stop", f"answer {n}") for n, long in enumerate(LENGTHS)
    ]
    prompts = [
        Prompt(name, (5,), ({"role": "user", "content": f"why {name}"},), {"prompt": f"why {name}"}) for name in "ab"
    ]
    return [Group(prompts[0], tuple(samples[:2])), Group(prompts[1], tuple(samples[2:]))]


def giving(returned: Any) -> FunctionReward:
    return FunctionReward(lambda **columns: returned, "judge")


FORMS: dict[str, tuple[Any, list[float], Any]] = {
    "numbers": ([1.0, None, 3, None], [1.0, 0.0, 3.0, 0.0], None),
    "tokens": (
        [[1.0, 0.0, 2.0], None, [0.5, 0.5], None], [3.0, 0.0, 1.0, 0.0], [[1.0, 0.0, 2.0], [0.0], [0.5, 0.5], [0.0, 0.0]]),
    "segments": (
        [[(2, 3.0)], None, [(0, 1.0)], None], [3.0, 0.0, 1.0, 0.0], [[0.0, 0.0, 3.0], [0.0], [1.0, 0.0], [0.0, 0.0]]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_none_is_a_reward_that_does_not_apply(form: str) -> None:
    returned, answer, token = FORMS[form]
    scores = giving(returned).score(groups())
    assert scores.applies is not None
    assert scores.applies.tolist() == [True, False, True, False]
    assert scores.answer.tolist() == answer
    assert (scores.token is None) == (token is None)
    if token is not None and scores.token is not None:
        assert [one.tolist() for one in scores.token] == token
    assert scores.listed() == [answer[0], None, answer[2], None]


def test_a_reward_that_applies_to_all_answers_says_nothing_of_it() -> None:
    assert giving([1.0, 2.0, 3.0, 4.0]).score(groups()).applies is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_runs_of_answers_without_a_score_join_any_form(form: str, workers: int) -> None:
    """The first group has scores and the second none, or the other way round, and each worker sees its own groups alone."""
    returned, answer, token = FORMS[form]
    whole = groups()

    def judge(completions: list[str], **columns: Any) -> list[Any]:
        places = [int(one.split()[1]) for one in completions]
        return [returned[place] if place == only else None for place in places]

    for only in (0, 2):
        parts = [FunctionReward(judge).score(part) if part else None for part in shares(whole, workers)]
        scores = joined(parts)
        assert scores.applies is not None
        assert scores.applies.tolist() == [place == only for place in range(4)]
        assert scores.answer.tolist() == [answer[place] if place == only else 0.0 for place in range(4)]
        assert (scores.token is None) == (token is None)
        if token is not None and scores.token is not None:
            assert [one.tolist() for one in scores.token] == [
                token[place] if place == only else [0.0] * LENGTHS[place] for place in range(4)
            ]
    nowhere = joined([giving([None] * 2).score([one]) for one in whole])
    assert nowhere.applies is not None
    assert (nowhere.applies.tolist(), nowhere.answer.tolist()) == ([False] * 4, [0.0] * 4)


def test_answers_with_scores_of_two_forms_are_still_refused() -> None:
    one, two = groups()
    parts = [giving([[1.0, 1.0, 1.0], None]).score([one]), giving([1.0, None]).score([two])]
    with pytest.raises(RewardError, match="some answers per token and others as a whole"):
        joined(parts)


def test_a_reward_ends_no_step_of_an_answer_to_which_it_does_not_apply() -> None:
    rewards = [
        Weighted("whole", giving([1.0, 2.0, None, 3.0]), 2.0),
        Weighted("dense", giving([None, None, [1.0, 5.0], None])),
    ]
    named, token, step, applies = score_all(rewards, groups())
    assert {name: one.tolist() for name, one in named.items()} == {"whole": [1, 2, 0, 3], "dense": [0, 0, 6, 0]}
    assert {name: one.tolist() for name, one in applies.items()} == {
        "whole": [True, True, False, True], "dense": [False, False, True, False]}  # fmt: skip
    assert token.tolist() == [[0, 0, 0], [0, 0, 0], [1, 5, 0], [0, 0, 0]]
    assert step.int().tolist() == [[0, 0, 1], [1, 0, 0], [1, 1, 0], [0, 1, 0]]


def test_an_answer_to_which_no_reward_applies_is_named() -> None:
    rewards = [Weighted("first", giving([1.0, None, 2.0, None])), Weighted("second", giving([None, 1.0, 2.0, None]))]
    with pytest.raises(
        RewardError, match=r"no reward applies to answer 1 of the prompt row b \('why b'\): first, second returned"
    ):
        score_all(rewards, groups())
    every = [*rewards, Weighted("third", giving([0.0, 0.0, 0.0, 0.0]))]
    assert list(score_all(every, groups())[3]) == ["first", "second"]


class Own:
    """A reward class with scores of its own."""

    def __init__(self, scores: Any) -> None:
        self.scores = scores

    def score(self, groups: Sequence[Group]) -> Any:
        return self.scores


def test_a_class_says_with_applies_where_its_scores_do_not_count() -> None:
    applies = torch.tensor([True, False, True, True])
    scores = ObjectReward(Own(Scores(torch.tensor([1.0, 9.0, 2.0, 3.0]), applies=applies)), "own").score(groups())
    assert scores.answer.tolist() == [1.0, 0.0, 2.0, 3.0]
    token = tuple(torch.ones(long) for long in LENGTHS)
    scores = ObjectReward(Own(Scores(torch.ones(4), token, applies=applies)), "own").score(groups())
    assert scores.token is not None
    assert [one.tolist() for one in scores.token] == [[1, 1, 1], [0], [1, 1], [1, 1]]
    assert scores.answer.tolist() == [3.0, 0.0, 2.0, 2.0]
    nan = Scores(torch.tensor([1.0, float("nan"), 2.0, 3.0]), applies=applies)
    assert ObjectReward(Own(nan), "own").score(groups()).answer.tolist() == [1.0, 0.0, 2.0, 3.0]
    assert ObjectReward(Own([1, None, 2, 3]), "own").score(groups()).listed() == [1.0, None, 2.0, 3.0]


@pytest.mark.parametrize("applies", [torch.ones(3, dtype=torch.bool), torch.ones(4), [True] * 4])
def test_a_class_with_another_form_of_applies_is_refused(applies: Any) -> None:
    with pytest.raises(RewardError, match=r"reward own: Scores.applies must be a bool tensor of shape \(4,\)"):
        ObjectReward(Own(Scores(torch.ones(4), applies=applies)), "own").score(groups())


def test_a_server_answers_null_where_it_does_not_apply() -> None:
    with serving() as start:
        server = start(
            lambda body, number: (200, {"rewards": [None if "1" in one else 2.5 for one in body["completions"]]})
        )
        assert HttpReward(server.url).score(groups()).listed() == [2.5, None, 2.5, 2.5]


def test_a_judge_model_says_that_it_cannot_say_in_the_given_words_alone() -> None:
    def reply(body: dict, number: int) -> tuple[int, Any]:
        text = "N/A\n" if "answer 2" in body["messages"][0]["content"] else "7"
        return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}

    with serving() as start:
        server = start(reply)
        assert OpenAIJudge(Options(server.url, "big", no_score="N/A")).score(groups()).listed() == [7.0, 7.0, None, 7.0]
        with pytest.raises(RewardError, match=r"asked for a number and replied 'N/A"):
            OpenAIJudge(Options(server.url, "big")).score(groups())


def test_metrics_of_a_reward_are_over_the_answers_to_which_it_applies() -> None:
    scores = RolloutScores.of(
        groups(), {"a": [1.0, None, 3.0, None], "b": torch.tensor([1.0, 2.0, 3.0, 6.0]), "c": [None] * 4}
    )
    batch = batch_of(groups(), scores, Sampling(4))
    assert batch["reward_applies"].T.tolist() == [[True, False, True, False], [True] * 4, [False] * 4]
    numbers = rollout_numbers(batch.with_columns(score=torch.zeros(4)), ["a", "b", "c"])
    assert {name: one for name, one in numbers.items() if name.startswith("reward/")} == {
        "reward/a": 2.0,
        "reward/b": 3.0,
    }


def test_scores_that_are_given_to_a_stage_may_not_apply_either() -> None:
    with pytest.raises(RewardError, match=r"no reward applies to answer 0 of the prompt row b .*: a, b returned None"):
        RolloutScores.of(groups(), {"a": [1.0, 1.0, None, 2.0], "b": [None, None, None, None]})
    with pytest.raises(ValueError, match=r"scores a: expected a tensor of shape \(4,\)"):
        RolloutScores.of(groups(), {"a": [1.0, None]})


def test_parts_of_a_rollout_keep_where_a_reward_applies() -> None:
    one, two = ([group] for group in groups())
    parts = [
        RolloutScores.of(one, {"a": [None, 1.0], "b": [1.0, 1.0]}),
        RolloutScores.of(two, {"a": [2.0, 3.0], "b": [4.0, 5.0]}),
    ]
    whole = RolloutScores.joined(parts)
    assert {name: known.tolist() for name, known in whole.applies.items()} == {"a": [False, True, True, True]}
    assert whole.take([2, 0], 2).where("a").tolist() == [True, False]
    assert whole.take([2, 0], 2).where("b").tolist() == [True, True]
