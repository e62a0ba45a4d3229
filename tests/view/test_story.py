"""The report of a run and of several: what stands in it, and what it says where something is missing."""

import os
import re
import time
from pathlib import Path

import pytest

import whet
from tests.view.helpers import Parsed, evaluated, online_rows, saved, write_evaluation, write_metrics, write_rollout
from whet.runs.report import record
from whet.view import curves, samples, story


def shown(*runs: Path, out: Path | None = None) -> str:
    """The text of the report, with spaces made single."""
    path = whet.report(*runs, out=out)
    return " ".join(Parsed(path.read_text(encoding="utf-8")).text.split())


def titles(text: str) -> list[str]:
    return re.findall(r"<figcaption>(.*?)</figcaption>", text)


def test_a_run_with_evaluations(tmp_path: Path) -> None:
    text = shown(evaluated(tmp_path / "run", steps=40, every=8))
    for one in (
        "Finished: 40 steps. Best step: 16, by held-out judge/gold.", "ppo on base; rows of prompts.jsonl; 40 steps of 512 prompts",
        "training score (proxy)", "same score, held-out prompts", "held-out judge/gold", "best, step 16", "0.692 (0.592 to 0.792)",
        "The band is the 95 % interval.", "start (step 0)", "middle, best (step 16)", "end (step 40)", "step 40, prompt 2, answer 0",
        "Extreme answers among the 12 of the evaluation of step 40", "best score", "worst score", "longest", "highest KL",
        "The self-checks found nothing to report.", "rollout.num_steps 40 100", "lr/critic has the same values as lr/policy.",
    ):  # fmt: skip
        assert one in text, one
    assert text.index("Result") < text.index("Training score and held-out scores over sqrt(KL)") < text.index("Curves")


def test_a_run_without_evaluations_says_so(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run")
    write_metrics(folder, online_rows(40))
    for step in (1, 20, 40):
        write_rollout(folder, step)
    text = shown(folder)
    assert "There is no evaluation, so nothing here says whether the answers became better" in text
    assert "No prompt stands in all of these rollouts" in text
    assert "answer 0 of step 20" in text
    page = (folder / "report.html").read_text()
    assert titles(page)[:3] == ["Training score (proxy) over sqrt(KL)", "Score over the steps", "KL to the reference"]
    assert len(titles(page)) == len(set(titles(page)))


def test_prompts_that_stand_in_all_rollouts_are_side_by_side(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", steps=3)
    write_metrics(folder, online_rows(3))
    path = write_rollout(folder, 1)
    for step in (2, 3):
        (folder / "rollouts" / f"step-{step:08d}.parquet").write_bytes(path.read_bytes())
    assert "The first answer to the same training prompts of the rollouts" in shown(folder)


def test_the_numbers_of_an_answer_are_those_of_its_columns(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", steps=1)
    found = samples.read(write_rollout(folder, 1, rows=3, tokens=4))
    assert [one.length for one in found] == [4, 4, 4]
    assert found[0].kl == pytest.approx(4 * 0.2 + 0.01 * (0 + 1 + 2 + 3))  # old_logp -0.5, ref_logp -0.7 - 0.01 i
    assert found[2].score == 2.0
    assert "KL 0.86, 4 tokens" in found[0].note()
    evaluation = samples.read(write_evaluation(folder, 1))
    assert [one.kl for one in evaluation[-2:]] == [None, None]
    assert evaluation[2].note() == "score 1, judge/gold 1, KL 0.5, 7 tokens, cut off"
    extremes = samples._extremes(evaluation, "the test")[1]
    assert [answer.text for answer in extremes.answers] == [  # type: ignore[union-attr]
        "step 1, prompt 5, answer 0", "step 1, prompt 0, answer 1", "step 1, prompt 5, answer 0", "step 1, prompt 4, answer 0",
    ]  # fmt: skip


def test_a_run_of_pairs(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", "dpo", steps=3)
    numbers = {
        "loss": 0.5,
        "accuracy": 0.7,
        "margin": 0.2,
        "rewards/chosen": 0.1,
        "rewards/rejected": -0.1,
        "grad_norm/policy": 1.0,
    }
    held = {"eval/loss": 0.6, "eval/accuracy": 0.6, "eval/margin": 0.1, "eval/calibration_error": 0.05}
    write_metrics(
        folder, [{"step": 0, **held}, *({"step": step, **numbers} for step in (1, 2)), {"step": 3, **numbers, **held}]
    )
    text = shown(folder)
    page = (folder / "report.html").read_text()
    assert titles(page)[:3] == ["Loss", "Accuracy", "Margin"]
    assert "Rewards of chosen and rejected" in titles(page)
    assert "held-out calibration_error 0.05 0.05" in text
    assert "This run has no answers" in text


def test_several_seeds_are_a_mean_with_a_band(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / f"seed{seed}", seed=seed) for seed in range(3)]
    out = tmp_path / "all.html"
    text = shown(*runs, out=out)
    assert "3 runs of one recipe with different seeds: seed0, seed1, seed2." in text
    assert "Mean of 3 runs; the band goes from the lowest to the highest." in text
    assert "seed 0 1 2" in text
    records = [record(run) for run in runs]
    (plot, *_) = curves.plots_of(curves.Group("KL", "nats", "kl"), ["kl"], records, ["a", "b", "c"], seeds=True)
    (line,) = plot.lines
    values = [dict(one.points("kl", one.window)) for one in records]
    for (step, mean), (_, low, high) in zip(line.points, line.band, strict=True):
        own = [one[step] for one in values]
        assert (mean, low, high) == (pytest.approx(sum(own) / 3), min(own), max(own))


def test_the_mean_over_sqrt_kl_is_of_the_same_steps(tmp_path: Path) -> None:
    """The second run skipped the rollout of step 2, which has no KL."""
    rows = [{"step": step, "score": float(step), "kl": float(step * step)} for step in (1, 2, 3)]
    for seed, own in enumerate((rows, [rows[0], {"step": 2, "score": 9.0}, rows[2]])):
        write_metrics(saved(tmp_path / f"seed{seed}", steps=3), own)
    plots, _ = curves.main_plots([record(tmp_path / f"seed{seed}") for seed in (0, 1)], ["a", "b"], seeds=True)
    (mean,) = [line for line in plots[0].lines if not line.faint]
    assert mean.points == [(1.0, 1.0), (3.0, 3.0)]


def test_other_recipes_are_a_line_each_with_a_table_of_fields(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / "slow" / "run"), evaluated(tmp_path / "fast" / "run", seed=1)]
    saved(runs[1], **{"optim.lr": 0.5})
    text = shown(*runs, out=tmp_path / "both.html")
    assert "2 runs of different recipes: slow/run, fast/run." in text
    assert re.search(r"optim\.lr [0-9.e-]+ 0\.5", text)
    assert "Mean of" not in text


def test_a_run_of_another_length_has_its_own_line(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / "short", steps=8, every=4), evaluated(tmp_path / "long", steps=16, every=4)]
    text = shown(*runs, out=tmp_path / "both.html")
    assert "rollout.num_steps 8 16" in text


def test_cautions_stops_skips_and_resumes_are_told(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "run", steps=8, every=4)
    (folder / "cautions.jsonl").write_text(
        '{"step": 2, "text": "step 2: the KL is 9 nats"}\n{"step": 3, "text": "all flat"}\n'
    )
    (folder / "stopped").mkdir()
    (folder / "stopped" / "step-00000005.json").write_text('{"step": 5, "message": "step 5: the loss is NaN"}')
    (folder / "environment.json").write_text('{"resumed_at": [4, 8], "torch": "2.13"}')
    rows = online_rows(8, every=4)
    for name in [name for name in rows[3] if name.startswith("grad_norm")]:
        del rows[3][name]
    write_metrics(folder, rows)
    text = shown(folder)
    for one in (
        "step 2: the KL is 9 nats", "step 3: all flat", "A self-check stopped the run. step 5: the loss is NaN A later session",
        "Skipped rollouts, in which no weight changed: steps 3.", "The run was resumed 1 times, after steps 4.",
    ):  # fmt: skip
        assert one in text, one


def test_an_unreadable_file_of_answers_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "run", steps=8, every=4)
    (folder / "eval" / "step-00000008.parquet").write_bytes(b"PAR1 torn")
    text = shown(folder)
    assert "The answers of step 8 cannot be shown." in text
    assert "not a readable Parquet file" in text
    assert "step 4, prompt 0, answer 0" in text


def test_a_run_without_steps_and_one_without_a_single_number(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run")
    assert "has no finished step yet" in shown(folder)
    write_metrics(folder, [{"step": 1}])
    assert "not finished: 1 of 40 steps" in shown(folder).lower()
    other = evaluated(tmp_path / "other")
    assert "2 runs of" in shown(folder, other, out=tmp_path / "both.html")


def test_a_recipe_of_another_version_is_shown_without_its_differences(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "run")
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace("seed: 0", "seed: later"))
    text = shown(folder)
    assert "The recipe does not fit this version of whet" in text
    assert "seed: later" in text


def test_many_numbers_of_a_user_do_not_blow_up_the_page(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", steps=2)
    rows = online_rows(2)
    write_metrics(folder, [{**row, **{f"mine/{i}": i + row["step"] for i in range(5000)}} for row in rows])
    shown(folder)
    page = (folder / "report.html").read_text()
    assert len(page) < 1_000_000
    assert page.count("<svg") < 120


def test_a_long_run_is_small_and_fast(tmp_path: Path) -> None:
    """1,000 steps of 64 answers with token columns: below 5 MB, and below 10 s of CPU time."""
    folder = saved(tmp_path / "run", steps=1000)
    write_metrics(folder, online_rows(1000, every=50))
    first = write_rollout(folder, 1, rows=64, tokens=256, text="word " * 400)
    for step in range(2, 1001):
        os.link(first, folder / "rollouts" / f"step-{step:08d}.parquet")
    for step in range(0, 1001, 50):
        write_evaluation(folder, step, text="word " * 400, prompts=64)
    read: list[Path] = []
    original = samples.read
    began = time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "read", lambda path: read.append(path) or original(path))
        path = whet.report(folder)
        for one in (folder / "eval").iterdir():
            one.unlink()
        whet.report(folder)  # with the rollouts
    assert time.process_time() - began < 10.0
    assert path.stat().st_size < 5_000_000
    assert [len([one for one in read if one.parent.name == kind]) for kind in ("eval", "rollouts")] == [4, 4]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0, "0 s"), (59.9, "59.9 s"), (3599, "59 min 59 s"), (90_000, "25 h 0 min")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert story.duration(seconds) == words
