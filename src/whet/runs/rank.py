"""whet.rank: rank answers by a judge, by their scores, or with a ranker of the user's."""

from pathlib import Path
from typing import Any

from whet.data import Prompt
from whet.data.degenerate import constant
from whet.data.files import write_jsonl
from whet.errors import RecipeError, RewardError, UserError
from whet.feedback import RANKERS, Question
from whet.feedback.base import check_ranks
from whet.feedback.judge import RewardJudge
from whet.registry import called
from whet.runs import adapters, data, rewards
from whet.runs import recipe as fields
from whet.runs.early import NO_ANSWERS, out_file
from whet.terminal import caution


def run_rank(recipe: fields.RankRecipe) -> Path:
    """Rank the answers of each row and write the rows with `ranks`. Return the path of the written file.
    Raises UserError for invalid options or rows, RewardError if the judge or ranker fails."""
    out = out_file(recipe.out, "rank")
    for name in ("judge_form", "judge_options"):
        if recipe.judge is None and getattr(recipe, name) != getattr(fields.RankRecipe(), name):
            raise RecipeError(f"{name}: there is no judge; give --judge FILE.py:FUNCTION, or leave it out")
    if recipe.judge is not None and recipe.ranker.name is not None:
        raise RecipeError("ranker: the judge ranks; leave one of judge and ranker out")
    if not recipe.data.train:
        raise RecipeError(NO_ANSWERS)
    rows = data.located_rows(recipe.data)
    for located in rows:
        answers = located.row.get("responses")
        if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(answer, str) for answer in answers):
            raise UserError(
                f"{located.where}: field 'responses' must be a list of at least two answers, got {answers!r:.80}"
            )
    ranker = _ranker_of(recipe, rows)
    questions = [
        Question(
            one.row.get("prompt"),
            tuple(one.row["responses"]),
            {k: v for k, v in one.row.items() if k not in ("prompt", "responses")},
        )
        for one in rows
    ]
    ranks = called(ranker.rank, f"ranker {recipe.ranker.name or type(ranker).__name__}", (questions,))
    if not isinstance(ranks, list) or len(ranks) != len(questions):
        raise RewardError(f"ranker: expected a list of ranks for each of {len(questions)} questions, got {ranks!r:.80}")
    for place, (own, question) in enumerate(zip(ranks, questions, strict=True)):
        check_ranks(own, question, place)
    if all(map(constant, ranks)):
        caution(f"{len(ranks)} of {len(ranks)} rankings have ties alone")
    old = ("probability", "margin")  # of other judgments
    kept = [{name: value for name, value in one.row.items() if name not in old} for one in rows]
    write_jsonl(out, [{**row, "ranks": list(own)} for row, own in zip(kept, ranks, strict=True)])
    return out


def _ranker_of(recipe: fields.RankRecipe, rows: list[Any]) -> Any:
    """Build the ranker of a recipe."""
    spec: dict[str, Any] = {**recipe.ranker.options, "name": recipe.ranker.name or "scores"}
    if recipe.judge is not None:
        source, options = recipe.judge, recipe.judge_options
        if rewards.is_model(source):
            raise RecipeError(f"judge: {source} is not a function; give FILE.py:FUNCTION, a URL, or openai")
        if rewards.kind_of(source) != "object" or rewards.has_score(source):
            if recipe.judge_form != "score":
                raise RecipeError("judge_form: only a function can rank by itself; leave it out")
            judge = rewards.made(source, options, "judge_options")
            if hasattr(getattr(judge, "own", None), "check_rows"):
                prompts = [Prompt(located.where, (), (), located.row) for located in rows]
                judge.own.check_rows(prompts, "judge_options", True)  # type: ignore[attr-defined]
            return RewardJudge(judge)
        for option in options.keys() - {"timeout"}:
            raise RecipeError(f"judge_options.{option}: a function has no option but timeout; leave it out")
        spec = {**options, "name": "judge", "function": source, "form": recipe.judge_form}
    chosen = adapters.chosen(RANKERS, spec, "ranker")
    chosen.check(rows)
    return chosen.make(rows)
