import math
from typing import Any

import pytest

from whet.errors import RewardError
from whet.feedback import Question
from whet.feedback.judge import RankJudge, ScoreJudge
from whet.feedback.scores import ScoreRanker

QUESTIONS = [
    Question("a", ("yes", "no", "yes yes"), {"scores": [1, 0, 2], "target": "yes"}),
    Question([{"role": "user", "content": "b"}], ("no", "no"), {"scores": [0.5, 0.5]}),
]


def test_scores_that_the_rows_carry_become_ranks_with_ties() -> None:
    assert ScoreRanker().rank(QUESTIONS) == [[2, 3, 1], [1, 1]]


def test_a_scoring_judge_is_asked_once_for_all_answers_with_the_rows_columns() -> None:
    asked: list[dict[str, Any]] = []

    def judge(**given: Any) -> list[int]:
        asked.append(given)
        return [text.split().count("yes") for text in given["completions"]]

    assert ScoreJudge(judge).rank(QUESTIONS) == [[2, 3, 1], [1, 1]]
    talk = [{"role": "user", "content": "b"}]
    assert asked == [
        {
            "prompts": ["a", "a", "a", talk, talk],
            "completions": ["yes", "no", "yes yes", "no", "no"],
            "scores": [[1, 0, 2]] * 3 + [[0.5, 0.5]] * 2,
            "target": ["yes", "yes", "yes", None, None],
        }
    ]


def test_a_ranking_judge_is_asked_question_by_question_with_the_rows_columns() -> None:
    asked = []

    def judge(prompt: Any, responses: list[str], **columns: Any) -> list[int]:
        asked.append((prompt, responses, columns))
        return [1, 2, 2][: len(responses)]

    assert RankJudge(judge).rank(QUESTIONS) == [[1, 2, 2], [1, 2]]
    assert asked == [
        ("a", ["yes", "no", "yes yes"], {"scores": [1, 0, 2], "target": "yes"}),
        ([{"role": "user", "content": "b"}], ["no", "no"], {"scores": [0.5, 0.5]}),
    ]


SCORES = [
    ([1.0, 2.0], "5 answers and returned 2 scores"),
    ([1.0, math.nan, 2.0, 3.0, 4.0], "nan"),
    ([1.0, None, 2.0, 3.0, 4.0], "None"),
    ([1.0, "good", 2.0, 3.0, 4.0], "good"),
    (None, "None"),
]


@pytest.mark.parametrize(("returned", "what"), SCORES)
def test_a_scoring_judge_may_not_return_a_wrong_count_or_what_is_no_number(returned: Any, what: str) -> None:
    with pytest.raises(RewardError, match=what):
        ScoreJudge(lambda **given: returned).rank(QUESTIONS)


@pytest.mark.parametrize("returned", [[1, 2], [1, 2, 0], [1, 2, "3"], [1, 2, 3.5], [1, 2, math.nan], None])
def test_a_ranking_judge_may_not_return_a_wrong_count_or_what_is_no_rank(returned: Any) -> None:
    with pytest.raises(RewardError, match="question 0"):
        RankJudge(lambda prompt, responses, **columns: returned).rank(QUESTIONS)
