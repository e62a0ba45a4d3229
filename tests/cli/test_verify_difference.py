"""What verify-resume takes for a difference of two runs: all that `whet diff` finds, and what only one of them has."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from whet.cli.main import main
from whet.data.files import sha256
from whet.loops import rollouts
from whet.runs.verify import first_difference

CHECKPOINT = "checkpoints/step-00000002"
REWARD = "def size(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a checkpoint after each."""
    home = tmp_path_factory.mktemp("home")
    tiny.folder(home / "m")
    tiny.write_jsonl(home / "prompts.jsonl", [{"prompt": word} for word in tiny.WORDS[:6]])
    (home / "size.py").write_text(REWARD)
    size = ["--num-steps", "2", "--prompts-per-step", "3", "--num-generations", "2", "--max-new-tokens", "4"]
    given = ["--model", f"{home}/m", "--data", f"{home}/prompts.jsonl", "--reward", f"{home}/size.py:size"]
    more = ["--save-every", "1", "--threads", "1", "--lr", "1e-2", "--out", f"{home}/out", "--quiet"]
    assert main(["grpo", *given, *size, *more]) == 0
    return home / "out"


def metrics(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path], None]:
    def changed(run: Path) -> None:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        change(rows)
        tiny.write_jsonl(run / "metrics.jsonl", rows)

    return changed


def column(step: int, change: Callable[[dict[str, list[Any]]], Any]) -> Callable[[Path], None]:
    def changed(run: Path) -> None:
        table = rollouts.read(run, step)
        change(table)
        pyarrow.parquet.write_table(pyarrow.table(table), rollouts.path_of(run, step))

    return changed


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(run: Path) -> None:
        found = load_file(run / file)
        change(found)
        save_file(found, run / file)

    return changed


def values(file: str, **new: Any) -> Callable[[Path], None]:
    return lambda run: (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | new))


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda run: [change(run) for change in changes] and None


def put(place: tuple[int, ...], value: float) -> Callable[[torch.Tensor], Any]:
    return lambda tensor: tensor.__setitem__(place, value)


NORM = "model.norm.weight"
CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a metric": (metrics(lambda rows: rows[1].update(entropy=7.5)), r"at step 2, metric entropy: \S+ against 7.5"),
    "a lost line": (metrics(lambda rows: rows.pop()), "metrics of step 2: it is in one run alone"),
    "a lost line before others": (metrics(lambda rows: rows.pop(0)), "metrics of step 1: it is in one run alone"),
    "a lost rollout": (
        lambda run: rollouts.path_of(run, 2).unlink(), "rollouts/step-00000002.parquet: it is in one run alone"
    ),
    "an earlier step first": (
        both(metrics(lambda rows: rows[0].update(score=1.5)), column(2, lambda table: table["draw"].reverse())),
        r"at step 1, metric score: \S+ against 1.5",
    ),
    "a reward before what follows from it": (
        column(1, lambda table: [table[one].__setitem__(4, 9.5) for one in ("score", "reward/size")]),
        r"at step 1, column reward/size, row 4: \S+ against 9.5",
    ),
    "an answer before its reward": (
        column(1, lambda table: [table["reward/size"].reverse(), table["completion_ids"][2].__setitem__(1, 99)]),
        r"at step 1, column completion_ids, row 2, position 1: \d+ against 99",
    ),
    "a moment of the optimizer": (
        tensors(f"{CHECKPOINT}/learner/policy.optimizer.safetensors", lambda found: put((0,), 0.5)(next(
            value for key, value in sorted(found.items()) if NORM in key and value.ndim == 1
        ))),
        rf"at step 2, checkpoint, policy.optimizer, tensor \S*{NORM}\S*, 1 of 32 numbers, the first at \[0\]: \S+ against 0.5",
    ),
    "the state of the loop": (
        values(f"{CHECKPOINT}/loop.json", drawn=99), r"at step 2, checkpoint, file loop.json: '\d+ bytes' against '\d+ bytes'"
    ),
    "no last checkpoint": (
        lambda run: shutil.rmtree(run / CHECKPOINT), "checkpoints/step-0000000[12]: it is in one run alone"
    ),
    "the exported model": (
        tensors("model/model.safetensors", lambda found: put((0, 1), -1.5)(found["model.embed_tokens.weight"])),
        r"in the exported model, model, model, tensor model.embed_tokens.weight, 1 of 864 numbers, .* \[0, 1\]: \S+ against -1.5",
    ),
    "its configuration": (
        values("model/config.json", eos_token_id=5), "in the exported model, model, file config.json: .* bytes'"
    ),
}  # fmt: skip
"""Name -> the change of one run, and the whole message as a regular expression."""


@pytest.mark.parametrize("name", CHANGES)
def test_the_first_difference_is_named_with_its_place_and_both_values(name: str, run: Path, tmp_path: Path) -> None:
    change, expected = CHANGES[name]
    shutil.copytree(run, tmp_path / "other")
    change(tmp_path / "other")
    seal(tmp_path / "other" / "checkpoints")
    found = first_difference(run, tmp_path / "other")
    assert found is not None
    assert re.fullmatch(expected, found), found


def seal(checkpoints: Path) -> None:
    """Write the checksums of checkpoints anew."""
    for folder in checkpoints.iterdir():
        names = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({name: sha256(folder / name) for name in names}))


def test_two_runs_that_differ_in_seconds_alone_are_equal(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other")
    metrics(lambda rows: rows[0].update({"seconds": 9.0, "seconds/generate": 8.0}))(tmp_path / "other")
    (tmp_path / "other" / "checkpoints" / "step-00000001" / "loop.json").unlink()  # not the last one
    assert first_difference(run, tmp_path / "other") is None
