"""Trackers by name, from a user's file, and what is refused before a run begins."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

import whet
from whet.errors import RecipeError
from whet.trackers import TRACKERS

MINE = """
import json

class Jsonl:
    def __init__(self, *, path: str = "log.jsonl") -> None:
        self.file = open(path, "a")

    def write(self, **row):
        self.file.write(json.dumps(row) + "\\n")

    def start(self, run):
        self.write(start=run.name, method=run.recipe["method"])

    def log(self, step, metrics):
        self.write(step=step, loss=metrics.get("loss"))

    def samples(self, step, rows):
        self.write(step=step, samples=[sorted(row) for row in rows])

    def end(self):
        self.write(end=True)
        self.file.close()

class Half:
    def start(self, run):
        pass
"""


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    tiny.folder(tmp_path / "m")
    (tmp_path / "mine.py").write_text(MINE)
    rows = [{"prompt": "a", "completion": "yes"}, {"prompt": "b", "completion": "no"}]
    return {"model": f"{tmp_path}/m", "data": rows, "num_steps": 2, "batch_size": 2, "out": f"{tmp_path}/run"}


def test_a_tracker_of_ones_own_is_one_file(given: dict[str, Any], tmp_path: Path) -> None:
    whet.train("sft", trackers=[{"name": f"{tmp_path}/mine.py:Jsonl", "path": f"{tmp_path}/log.jsonl"}], **given)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0] == {"start": "run", "method": "sft"}
    assert [row["step"] for row in rows[1:3]] == [1, 2]
    assert rows[-1] == {"end": True}


@pytest.mark.parametrize("record_every", [1, 0])
def test_an_online_run_shows_samples(given: dict[str, Any], tmp_path: Path, record_every: int) -> None:
    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [1.0] * len(prompts)

    more = {"num_steps": 1, "prompts_per_step": 1, "num_generations": 2, "max_new_tokens": 4, "reward": reward}
    given = {
        **{k: v for k, v in given.items() if k not in ("batch_size", "num_steps")},
        "data": [{"prompt": "a"}],
        **more,
        "rollout.record_every": record_every,
    }
    whet.train("grpo", trackers=[{"name": f"{tmp_path}/mine.py:Jsonl", "path": f"{tmp_path}/log.jsonl"}], **given)
    (shown,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if "samples" in line]
    assert shown["samples"] == [["completion", "prompt", "score"]] * 2
    assert (tmp_path / "run" / "rollouts").exists() == (record_every > 0)


def test_the_console_prints_a_line_per_step(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    whet.train("sft", trackers=["console"], **given)
    told = capsys.readouterr().err.splitlines()
    assert [line.partition("  ")[0] for line in told if line.startswith("step")] == ["step 1", "step 2"]


WRONG = {
    "consol": "trackers: unknown name 'consol'; known are .*console",
    "nowhere.py:T": "no such file nowhere.py",
    "{place}/mine.py:Half": r"mine.py:\d+: class Half has no method end\(\)",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_tracker_that_cannot_work_is_named_before_anything_is_loaded(
    name: str, given: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=WRONG[name]):
        whet.train("sft", trackers=[name.format(place=tmp_path)], **given)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_option_that_a_tracker_lacks_is_named(given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"unknown field 'trackers.evry'; did you mean 'trackers.every'\?"):
        whet.train("sft", trackers=[{"name": "console", "evry": 2}], **given)
    assert {"console", "tensorboard", "wandb"} <= set(TRACKERS.names())


def test_a_tracker_that_cannot_be_started_is_named(given: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    broken = [
        "",
        "",
        "class Broken(Jsonl):",
        "    def __init__(self):",
        "        pass",
        "",
        "    def start(self, run):",
    ]
    file.write_text(MINE + "\n".join([*broken, "        raise ValueError('no server')", ""]))
    with pytest.raises(RecipeError, match=r"Broken cannot be started: ValueError: no server \(at .*broken.py:\d+\)"):
        whet.train("sft", **given | {"trackers": [f"{file}:Broken"]})
