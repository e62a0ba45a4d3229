"""The record of a run in words: its state, its best step, its numbers, and what was skipped, resumed or stopped."""

import json
from pathlib import Path

import pytest

from tests.view.helpers import evaluated, online_rows, saved, write_metrics, write_rollout
from whet.errors import DataError
from whet.runs.report import record
from whet.view.record import resumes, skipped


def test_the_state_of_a_run(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "run", steps=8, every=4)
    assert record(folder).state == "finished: 8 steps"
    write_metrics(folder, online_rows(8)[:5])
    assert record(folder).state == "not finished: 5 of 8 steps are done; continue it with --resume"
    (folder / "stopped").mkdir()
    (folder / "stopped" / "step-00000006.json").write_text(
        json.dumps({"step": 6, "message": "step 6: the loss is NaN"})
    )
    assert record(folder).state == "stopped by a self-check in step 6, after 5 of 8 steps"
    (folder / "stopped" / "step-00000006.json").unlink()
    rows = online_rows(8, every=2)[:6]
    write_metrics(folder, [*rows[:-1], {**rows[-1], "eval/stopped_early": 1.0}])
    assert record(folder).state == "stopped early after 5 of 8 steps: eval/judge/gold no longer improved"
    recipe = (folder / "recipe.yaml").read_text()
    assert "metric: null" in recipe
    (folder / "recipe.yaml").write_text(recipe.replace("metric: null", "metric: eval/score"))
    assert record(folder).state == "stopped early after 5 of 8 steps: eval/score no longer improved"
    (folder / "metrics.jsonl").unlink()
    assert record(folder).state == "no step has finished yet"


def test_a_run_over_passes_has_no_planned_number_of_steps(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", "sft", steps=4)
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("num_steps: 4", "num_steps: null"))
    write_metrics(folder, [{"step": 1, "loss": 1.0}])
    assert record(folder).planned is None
    assert record(folder).state == "finished: 1 step"
    (folder / "model").rmdir()
    assert record(folder).state == "not finished: 1 steps are done; continue it with --resume"


@pytest.mark.parametrize(
    ("rows", "judged_by", "best"),
    [
        (
            [{"eval/judge/gold": v, "eval/score": s} for v, s in [(1.0, 0.0), (3.0, 1.0), (2.0, 9.0)]],
            "eval/judge/gold",
            2,
        ),
        ([{"eval/judge/gold": v, "eval/best_step": 3.0} for v in (1.0, 3.0, 2.0)], "eval/judge/gold", 3),
        ([{"score": v} for v in (1.0, 2.0, 3.0)], "score", 3),
        ([{"other": v} for v in (1.0, 2.0, 3.0)], "score", None),
    ],
)
def test_the_best_step_of_an_online_run(tmp_path: Path, rows: list[dict], judged_by: str, best: int | None) -> None:
    folder = saved(tmp_path / "run", steps=3)
    write_metrics(folder, [{"step": number, **row} for number, row in enumerate(rows, 1)])
    assert record(folder).judged_by == judged_by
    assert record(folder).best == best


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("eval/loss", [3.0, 1.0, 2.0], 2),
        ("eval/accuracy", [0.2, 0.9, 0.5], 2),
        ("eval/policy/train/nll", [3.0, 2.0, 1.0], 3),
        ("loss", [3.0, 1.0, 2.0], 2),
    ],
)
def test_the_best_step_of_an_offline_run(tmp_path: Path, name: str, values: list[float], best: int) -> None:
    folder = saved(tmp_path / "run", "dpo", steps=3)
    write_metrics(folder, [{"step": number, name: value} for number, value in enumerate(values, 1)])
    assert record(folder).best == best


def test_numbers_at_a_step_are_means_of_training_and_the_newest_evaluation(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", steps=40)
    rows: list[dict] = [{"step": step, "score": float(step)} for step in range(1, 41)]
    rows[9] |= {"eval/score": 7.0}
    write_metrics(folder, rows)
    run = record(folder)
    assert run.window == 2
    assert run.at("score", 1) == 1.0
    assert run.at("score", 40) == 39.5
    assert run.at("eval/score", 9) is None
    assert run.at("eval/score", 40) == 7.0


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", steps=2)
    text = '{"step": 1, "a": NaN, "b": "x", "c": true, "d": [1], "e": Infinity, "f": 1%s}\n{"step": 2, "a": 1.5}\n' % (
        "0" * 400
    )
    (folder / "metrics.jsonl").write_text(text)
    assert record(folder).series == {"a": [(2, 1.5)]}


def test_a_torn_last_line_is_left_out_and_another_damage_is_an_error(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", steps=3)
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1, "score": 1.0}\n{"step": 2, "sco')
    assert record(folder).steps == 1
    path.write_text('{"step": 1, "score": 1.0}\n{"step": 2, "sco\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2: not a line of metrics"):
        record(folder)


def test_a_line_without_a_possible_step_is_left_out_and_told(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", steps=3)
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "a": 1.0}\n{"step": -1, "a": 2.0}\n{"step": 1%s, "a": 2.0}\n' % ("0" * 400)
    )
    run = record(folder)
    assert run.series == {"a": [(1, 1.0)]}
    assert "2 lines have no number of a step, such as -1" in run.notes[0]


def test_damage_beside_the_metrics_is_a_note(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "run", steps=4, every=2)
    (folder / "environment.json").write_text("{")
    (folder / "cautions.jsonl").write_text("[]\n[]\n")
    run = record(folder)
    assert len(run.notes) == 2
    assert "environment.json" in " ".join(run.notes)
    assert "cautions.jsonl:1" in " ".join(run.notes)


def test_skipped_rollouts_and_resumes(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", steps=4)
    rows = online_rows(4)
    for name in [name for name in rows[2] if name.startswith("grad_norm")]:
        del rows[2][name]
    write_metrics(folder, rows)
    (folder / "environment.json").write_text(json.dumps({"resumed_at": [1, 2, 4]}))
    run = record(folder)
    assert skipped(run) == [3]
    assert resumes(run) == [1, 2]


def test_answers_are_those_of_the_evaluations_or_else_of_the_rollouts(tmp_path: Path) -> None:
    from whet.view.record import answer_files

    folder = evaluated(tmp_path / "run", steps=4, every=2)
    write_rollout(folder, 1)
    assert [answer_files(folder)[0], list(answer_files(folder)[1])] == ["evaluation", [0, 2, 4]]
    for path in (folder / "eval").iterdir():
        path.unlink()
    assert [answer_files(folder)[0], list(answer_files(folder)[1])] == ["rollout", [1]]
