"""The demo's story in its quick form: every phase runs through the verbs, and the report tells the run's own numbers."""

import json
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markupsafe import escape

from proof import demo_seeds
from whet.cli.main import main
from whet.demo import world
from whet.demo.run import with_edit
from whet.loops import rollouts
from whet.runs.yaml_text import read_yaml
from whet.view import plots


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    assert main(["demo", "--seed", "1", "--quick", "--out", str(out)]) == 0
    return out


def test_the_summary_has_its_fields(story: Path) -> None:
    summary = json.loads((story / "summary.json").read_text())
    assert summary["seed"] == 1
    assert summary["seconds"] > 0
    assert 0 <= summary["reward_model_accuracy"] <= 1
    assert list(summary["models"]) == ["base", "sft", "ppo"]
    early = summary["early_stopping"]
    assert early["gold_best"] <= early["gold_top"]
    assert 0 <= early["best_step"] <= early["stopped_at"] <= 3
    for found in summary["models"].values():
        assert found.keys() == {"gold", "gold_ci", "reward_model", "kl_to_sft", "win_rate_vs_sft", "win_rate_ci"}
        low, high = found["gold_ci"]
        assert low <= found["gold"] <= high
    assert summary["models"]["sft"]["win_rate_vs_sft"] == 0.5


def test_the_report_is_one_page_that_loads_nothing(story: Path) -> None:
    page = (story / "report.html").read_text()
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]
    assert "default-src 'none'" in page
    summary = json.loads((story / "summary.json").read_text())
    assert f"{summary['models']['ppo']['gold']:.2f}" in page
    parts = re.findall(r"<h2>(.*?)</h2>", page)
    assert parts == [
        "Before and after", "Result", "Proxy and gold", "What the answers do", "The reward model", "What ptx does",
        "What these models cannot do", "The stages before PPO", "The PPO run: Result", "The PPO run: Curves", "The PPO run: Samples",
        "The PPO run: Self-checks", "The PPO run: Recipe and environment",
    ]  # fmt: skip
    assert page.index("before (SFT)") < page.index("after (PPO)") < page.index("Over-optimized: proxy and gold")


def test_the_report_shows_answers_of_the_over_optimized_run(story: Path) -> None:
    page = (story / "report.html").read_text()
    table = rollouts.read(story / "over_optimized", 3, ["completion", "score"])
    best = max(range(len(table["score"])), key=table["score"].__getitem__)
    assert str(escape(table["completion"][best])) in page
    assert f"proxy {plots.number(table['score'][best])}" in page


def test_every_run_of_the_demo_has_its_report(story: Path) -> None:
    for run in ("base", "sft", "reward", "ppo", "ppo_without_ptx", "small_reward", "over_optimized"):
        assert "Finished" in (story / run / "report.html").read_text()


def test_the_judge_reached_training_through_rankings_alone(story: Path) -> None:
    """No recipe of a run that trained names the judge or a column of its scores, except to evaluate the run."""
    for run in ("base", "sft", "reward", "ppo", "ppo_without_ptx", "small_reward", "over_optimized", "early_stopped"):
        recipe = read_yaml(story / run / "recipe.yaml")
        evaluation = recipe.pop("eval")
        assert "judge" not in json.dumps(recipe)
        assert ("judge" in json.dumps(evaluation.get("judge") or [])) == (
            run in ("ppo", "over_optimized", "early_stopped")
        )
    assert set(json.loads((story / "ranked.jsonl").read_text().splitlines()[0])) == {
        "prompt",
        "responses",
        "finish",
        "prompt_ids",
        "response_ids",
        "seed",
        "ranks",
    }


def test_prompts_of_ppo_are_others_than_those_of_sft_and_the_ranking(story: Path) -> None:
    def prompts(path: Path) -> set[str]:
        return {json.loads(line)["prompt"] for line in path.read_text().splitlines()}

    ppo = prompts(story / "world" / "prompts_ppo.jsonl")
    assert not ppo & (prompts(story / "world" / "demonstrations.jsonl") | prompts(story / "ranked.jsonl"))


def test_a_folder_that_is_no_demo_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("precious")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "is not an earlier demo" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"


def test_an_earlier_demo_is_set_aside(tmp_path: Path) -> None:
    from whet.demo.run import _set_aside

    for number in (1, 2):
        (tmp_path / "demo" / "world").mkdir(parents=True)
        (tmp_path / "demo" / "summary.json").write_text(str(number))
        _set_aside(tmp_path / "demo")
    assert [(tmp_path / f"demo.{n}" / "summary.json").read_text() for n in (1, 2)] == ["1", "2"]


def test_an_edited_answer_has_no_sampled_ids_and_is_complete() -> None:
    """A row of the full demo whose ids belong to another text would be refused, so edited answers have none."""
    streams = [random.Random(number) for number in range(60)]
    rows = []
    for stream in streams:
        card = world.draw_card(stream)
        texts = [world.write_answer(stream, card, world.DEMONSTRATOR) for _ in range(4)]
        rows.append({"prompt": card.prompt(), "responses": texts, "response_ids": [[7]] * 4, "finish": ["length"] * 4})
    changed = 0
    for row in rows:
        edited = with_edit(row, 0)
        for number, text in enumerate(edited["responses"]):
            same = text == row["responses"][number]
            changed += not same
            assert (edited["response_ids"][number], edited["finish"][number]) == (
                ([7], "length") if same else (None, "stop")
            )
    assert changed > 5


def test_the_page_over_seeds_has_the_numbers_and_pictures_of_a_demo(story: Path, tmp_path: Path) -> None:
    (tmp_path / "1").symlink_to(story)
    (story / demo_seeds.MADE).write_text(json.dumps(demo_seeds.made()))
    assert demo_seeds.main(["--seeds", "1", "--out", str(tmp_path), "--docs", str(tmp_path / "docs")]) == 0
    page = (tmp_path / "docs/demo.md").read_text()
    found = json.loads((story / "summary.json").read_text())
    gold = [found["models"][name]["gold"] for name in ("sft", "ppo")]
    assert f"| gold, SFT -> PPO (at most 3) | {gold[0]:.2f} -> {gold[1]:.2f} |" in page
    assert f"{found['early_stopping']['best_step']} -> {found['early_stopping']['stopped_at']}" in page
    for name in ("proxy_gold", "terminal"):
        picture = (tmp_path / f"docs/images/{name}.svg").read_text()
        ElementTree.fromstring(picture)
        assert not re.search(r"(?:href|src)=|url\((?!#)|@import|@font-face", picture)
