"""Evaluation while training: its numbers by hand, the best step, early stopping, and what a kill leaves of the best model."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from whet.errors import CheckpointError, RecipeError
from whet.loops.evaluate import pair_margins, pair_numbers
from whet.loops.evaluation import EvalPlan, Evaluation, pass_at, powers
from whet.loops.record import RunFolder, read_metrics


class Alone:
    """The learner of one process."""

    class workers:
        first, size = True, 1

        @staticmethod
        def broadcast(thing: Any) -> Any:
            return thing

        @staticmethod
        def gather(thing: Any) -> list[Any]:
            return [thing]


def evaluation(folder: Path, values: list[float], **plan: Any) -> Evaluation:
    """An evaluation that measures these values of eval/score at steps 0, 1, 2 ... and exports the step as a file."""

    def export(where: Path) -> None:
        where.mkdir()
        (where / "step").write_text(where.name)

    given: dict[str, Any] = {"every": 1, "higher": frozenset({"eval/score"})} | plan
    learner: Any = Alone()
    return Evaluation(
        EvalPlan(**given), lambda step, _: {"eval/score": values[step]}, export, RunFolder(folder), learner
    )


def go(one: Evaluation, total: int, saved: int | None = None) -> list[dict[str, float]]:
    """Evaluate after each step until the run ends. A checkpoint is saved after each step up to `saved`, or after all of them."""
    found = []
    for step in range(total + 1):
        found.append(one.numbers(step, total, {"score": 0.0}))
        one.settle(step if saved is None else min(step, saved))
        if one.ended:
            break
    return found


def test_pass_at_k_is_one_minus_the_share_of_draws_without_a_right_answer() -> None:
    """With 2 right of 5 answers, 3 of the 10 pairs and 1 of the 10 triples have none."""
    assert [pass_at(k, 5, 2) for k in (1, 2, 3, 4)] == pytest.approx([2 / 5, 7 / 10, 9 / 10, 1.0])
    assert pass_at(1, 1, 0) == 0.0
    assert [powers(count) for count in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2], [1, 2, 4, 8]]


def test_margins_are_of_the_pairs_of_different_rank() -> None:
    margins = pair_margins(torch.tensor([2.0, 0.5, 1.0]), torch.tensor([2, 1, 2]))
    assert sorted(margins.tolist()) == [-1.5, -0.5]


def test_the_calibration_error_is_worked_by_hand() -> None:
    """Margins log 3, log 3, -log 3 have confidence 3/4 (the bin of [0.75, 0.8)), and 2 of 3 are right: |2/3 - 3/4| x 3/4 of the pairs.
    The margin log 19 has confidence 0.95 and is right: 0.05 x 1/4."""
    margins = torch.tensor([math.log(3), math.log(3), -math.log(3), math.log(19)], dtype=torch.float64)
    found = pair_numbers(margins)
    assert found["accuracy"] == 0.75
    assert found["margin"] == pytest.approx((math.log(3) + math.log(19)) / 4)
    assert found["calibration_error"] == pytest.approx(3 / 4 * (3 / 4 - 2 / 3) + 1 / 4 * 0.05)


def test_the_best_step_and_its_model_are_kept(tmp_path: Path) -> None:
    one = evaluation(tmp_path, [0.1, 0.3, 0.2, 0.3], keep_best="eval/score")
    assert [row["eval/best_step"] for row in go(one, 3)] == [0, 1, 1, 1]
    assert (tmp_path / "best/step").read_text() == "best.step-1"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_lower_is_better_for_a_loss(tmp_path: Path) -> None:
    one = evaluation(tmp_path, [0.5, 0.3, 0.4], keep_best="eval/score", higher=frozenset())
    assert [row["eval/best_step"] for row in go(one, 2)] == [0, 1, 1]


def test_patience_counts_evaluations_without_an_improvement_of_min_delta(tmp_path: Path) -> None:
    values = [0.0, 1.0, 1.05, 1.15, 1.2, 1.2, 9.0]
    one = evaluation(tmp_path, values, metric="eval/score", patience=2, min_delta=0.1)
    rows = go(one, 6)  # 1.05 is no improvement, 1.15 is one of 0.15 over 1.0; 1.2 and 1.2 are none over 1.15
    assert len(rows) == 6
    assert one.state["waited"] == 2
    assert ["eval/stopped_early" in row for row in rows] == [False] * 5 + [True]


def test_nan_is_no_improvement(tmp_path: Path) -> None:
    nan = math.nan
    one = evaluation(tmp_path, [nan, 0.1, nan, 0.2, nan], keep_best="eval/score", metric="eval/score", patience=3)
    assert [row.get("eval/best_step") for row in go(one, 4)] == [None, 1, 1, 3, 3]


def test_no_run_ends_before_its_first_step(tmp_path: Path) -> None:
    one = evaluation(tmp_path, [math.nan, 1.0, 2.0], metric="eval/score", patience=1)
    assert len(go(one, 2)) == 3


def test_patience_that_ends_with_the_last_step_does_not_end_it_early(tmp_path: Path) -> None:
    one = evaluation(tmp_path, [1.0, 0.0, 0.0], metric="eval/score", patience=2)
    assert not any("eval/stopped_early" in row for row in go(one, 2))
    assert not one.ended


def test_all_workers_decide_by_the_numbers_of_the_first_one(tmp_path: Path) -> None:
    """A worker whose own number differs must not export a best model alone: the export takes all workers."""

    class Second(Alone):
        class workers(Alone.workers):
            @staticmethod
            def broadcast(thing: Any) -> Any:
                logged, numbers = thing
                return {**logged, "mine": 0.25}, numbers

    one = evaluation(tmp_path, [0.0, 0.0], keep_best="mine", higher=frozenset({"mine"}))
    one.learner = Second()  # type: ignore[assignment]
    one.numbers(1, 2, {"mine": 0.75})
    assert one.state["best"] == 0.25


def test_a_run_is_evaluated_at_its_start_and_end_and_between(tmp_path: Path) -> None:
    one = evaluation(tmp_path, [0.0] * 8, every=3)
    assert [bool(one.numbers(step, 7, {})) for step in range(8)] == [True, False, False, True, False, False, True, True]
    assert not one.due(7, 7), "no step is evaluated twice"


def test_a_number_that_is_not_logged_is_refused_by_name(tmp_path: Path) -> None:
    one = evaluation(tmp_path, [0.0, 0.0], keep_best="eval/loss")
    assert one.numbers(0, 1, {}) == {}
    with pytest.raises(RecipeError, match=r"eval\.keep_best: no number 'eval/loss' is logged; known are eval/score"):
        one.raise_failure()
    late = evaluation(tmp_path, [0.0, 0.0], keep_best="mine")
    assert late.numbers(0, 1, {}), "a number of the steps is not known before the first one"
    late.numbers(1, 1, {"score": 1.0})
    with pytest.raises(RecipeError, match="'mine'"):
        late.raise_failure()


def test_a_number_that_is_missing_in_one_evaluation_is_no_improvement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A judge may apply to no answer of an evaluation. The run goes on: a resume would find the same."""
    one = evaluation(tmp_path, [0.1, 0.2, 0.3], keep_best="eval/score", metric="eval/score", patience=2)
    found = one.measure
    one.measure = lambda step, start: {} if step == 1 else found(step, start)
    rows = [one.numbers(step, 3, {}) for step in range(3)]
    one.raise_failure()
    assert [row["eval/best_step"] for row in rows] == [0, 0, 2]
    assert one.state["waited"] == 0
    assert "step 1: eval/score is not logged in this evaluation" in capsys.readouterr().err


def test_a_best_model_that_cannot_be_written_is_no_best_step(tmp_path: Path) -> None:
    """The disk is full at step 1. The step is not lost, and a resume evaluates it again and writes its model."""
    one = evaluation(tmp_path, [0.1, 0.2, 0.3], keep_best="eval/score")
    one.numbers(0, 2, {})
    one.settle(1)
    export = one.export

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    one.export = full
    assert one.numbers(1, 2, {}) == {}
    with pytest.raises(CheckpointError, match=r"best model could not be written .*No space left on device"):
        one.raise_failure()
    assert (one.state["best_step"], one.state["at"]) == (0, 0)
    again = evaluation(tmp_path, [0.1, 0.2, 0.3], keep_best="eval/score")
    again.restore(one.saved())
    again.export = export
    assert again.start(1, 2)["eval/best_step"] == 1


def test_the_best_model_of_a_step_that_no_checkpoint_has_is_dropped_on_resume(tmp_path: Path) -> None:
    """Step 1 is saved, step 2 is better, and the run is killed before a checkpoint names it."""
    one = evaluation(tmp_path, [0.1, 0.2, 0.3], keep_best="eval/score")
    for step in (0, 1):
        one.numbers(step, 5, {})
        one.settle(step)
    saved = {"eval": {**one.state, "start": dict(one.state["start"])}}
    one.numbers(2, 5, {})
    one.settle(1)
    assert (tmp_path / "best/step").read_text() == "best.step-1"
    assert (tmp_path / "best.step-2").is_dir()
    again = evaluation(tmp_path, [0.1, 0.2, 0.0], keep_best="eval/score")
    again.restore(saved)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best"]
    assert again.numbers(2, 5, {})["eval/best_step"] == 1


def test_the_best_model_that_a_checkpoint_names_is_moved_on_resume(tmp_path: Path) -> None:
    """The run is killed between the checkpoint of its best step and the move of the model."""
    one = evaluation(tmp_path, [0.1, 0.2], keep_best="eval/score")
    for step in (0, 1):
        one.numbers(step, 5, {})
    again = evaluation(tmp_path, [0.1, 0.2], keep_best="eval/score")
    again.restore(one.saved())
    assert (tmp_path / "best/step").read_text() == "best.step-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best"]


def test_a_best_model_that_was_removed_is_named_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = evaluation(tmp_path, [0.1, 0.2], keep_best="eval/score")
    go(one, 1)
    shutil.rmtree(tmp_path / "best")
    evaluation(tmp_path, [0.1, 0.2], keep_best="eval/score").restore(one.saved())
    assert "the best model, of step 1, is missing" in capsys.readouterr().err


def test_the_start_is_logged_as_step_0(tmp_path: Path) -> None:
    one = evaluation(tmp_path, [0.5], every=0)
    one.start(0, 9)
    (row,) = read_metrics(tmp_path)
    assert (row["step"], row["eval/score"]) == (0, 0.5)
    assert one.start(4, 9) == {}
    assert len(read_metrics(tmp_path)) == 1


def test_an_evaluation_that_failed_is_added_to_the_line_of_its_step(tmp_path: Path) -> None:
    one = evaluation(tmp_path, [0.5, 0.6, 0.7])
    one.start(0, 2)
    one.run.metrics(1, {"mine": 3.0}, score=0.25)
    one.start(1, 2)
    assert [(row["step"], row["eval/score"]) for row in read_metrics(tmp_path)] == [(0, 0.5), (1, 0.6)]
    assert read_metrics(tmp_path)[1].items() >= {"score": 0.25, "mine": 3.0}.items()
