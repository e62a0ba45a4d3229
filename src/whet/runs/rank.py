"""whet.rank: rank answers by a judge or by their scores."""

from pathlib import Path
from typing import Any

from whet.data import numbers, read_rows
from whet.data.files import write_jsonl
from whet.errors import RecipeError, UserError
from whet.feedback import Question, ScoreRanker
from whet.feedback.judge import RankJudge, ScoreJudge
from whet.rewards.functions import called, load_function
from whet.runs import recipe as fields
from whet.runs import sample


def run_rank(recipe: fields.RankRecipe) -> Path:
    """Rank answers by a judge function or by the `scores` in their rows. Return the path of the written file.
    Raises UserError for invalid options or rows, RewardError if the judge fails."""
    out = sample.out_file(recipe.out, "rank")
    if recipe.judge is None and recipe.judge_form != fields.RankRecipe().judge_form:
        raise RecipeError("judge_form: there is no judge; give --judge FILE.py:FUNCTION, or leave it out")
    ranker: Any = ScoreRanker()
    if recipe.judge is not None:
        function = load_function(recipe.judge)

        def guarded(*given: Any, **named: Any) -> Any:
            return called(function, recipe.judge or "", *given, **named)

        ranker = ScoreJudge(guarded) if recipe.judge_form == "score" else RankJudge(guarded)
    if not recipe.data.train:
        raise RecipeError("data.train: which answers? give --data with one file of `responses` rows")
    rows = read_rows(recipe.data.train)
    for located in rows:
        answers = located.row.get("responses")
        if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(answer, str) for answer in answers):
            raise UserError(
                f"{located.where}: field 'responses' must be a list of at least two answers, got {answers!r:.80}"
            )
        if recipe.judge is None:
            numbers(located, "scores", len(answers))
    questions = [
        Question(
            one.row.get("prompt"),
            tuple(one.row["responses"]),
            {k: v for k, v in one.row.items() if k not in ("prompt", "responses")},
        )
        for one in rows
    ]
    ranks = ranker.rank(questions)
    write_jsonl(out, [{**one.row, "ranks": own} for one, own in zip(rows, ranks, strict=True)])
    return out
