"""Two run folders are compared to the bit, and the first difference is named with its place and both values."""

import json
import math
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
from whet.runs.compare import first_difference, tensor_difference

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


LAST, NORM = "checkpoints/step-00000002/learner", "model.norm.weight"
ANSWERS, OF_STEP = "rollouts/step-00000001.parquet", "rollouts/step-00000002.parquet"
CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a metric": (metrics(lambda rows: rows[1].update(entropy=7.5)), r"metrics.jsonl: step 2: entropy: \S+ and 7.5"),
    "a metric of one run": (
        metrics(lambda rows: rows[0].update(own=1)), "metrics.jsonl: step 1: own: only the second run has it"
    ),
    "a lost line": (metrics(lambda rows: rows.pop()), "metrics.jsonl: step 2: only the first run has it"),
    "a lost rollout": (lambda run: rollouts.path_of(run, 2).unlink(), f"{OF_STEP}: only the first run has it"),
    "an earlier step first": (
        both(metrics(lambda rows: rows[0].update(score=1.5)), column(2, lambda table: table["draw"].reverse())),
        r"metrics.jsonl: step 1: score: \S+ and 1.5",
    ),
    "a reward before what follows from it": (
        column(1, lambda table: [table[one].__setitem__(4, 9.5) for one in ("score", "reward/size")]),
        rf"{ANSWERS}: column reward/size, answer 4: \S+ and 9.5",
    ),
    "an answer before its reward": (
        column(1, lambda table: [table["reward/size"].reverse(), table["completion_ids"][2].__setitem__(1, 99)]),
        rf"{ANSWERS}: column completion_ids, answer 2, token 1: \d+ and 99",
    ),
    "a shorter answer": (
        column(1, lambda table: table["completion_ids"][0].pop()),
        rf"{ANSWERS}: column completion_ids, answer 0: 4 tokens and 3",
    ),
    "a column of one run": (
        column(2, lambda table: table.pop("advantage")), rf"{OF_STEP}: column advantage: only the first run has it"
    ),
    "a weight": (
        tensors(f"{LAST}/policy.safetensors", lambda found: put((3,), 2.5)(found[NORM])),
        rf"{LAST}/policy.safetensors: {NORM}: element \(3,\): \S+ and 2.5",
    ),
    "a moment of the optimizer": (
        tensors(f"{LAST}/policy.optimizer.safetensors", lambda found: put((0,), 0.5)(next(
            value for key, value in sorted(found.items()) if NORM in key and value.ndim == 1
        ))),
        rf"{LAST}/policy.optimizer.safetensors: \S*{NORM}\S*: element \(0,\): \S+ and 0.5",
    ),
    "a dtype": (
        tensors(f"{LAST}/policy.safetensors", lambda found: found.update({NORM: found[NORM].double()})),
        rf"{LAST}/policy.safetensors: {NORM}: \(32,\) torch.float32 and \(32,\) torch.float64",
    ),
    "a lost tensor": (
        tensors(f"{LAST}/policy.safetensors", lambda found: found.pop(NORM)),
        rf"{LAST}/policy.safetensors: {NORM}: only the first run has it",
    ),
    "the state of the loop": (
        values("checkpoints/step-00000002/loop.json", drawn=99), r"checkpoints/step-00000002/loop.json: drawn: 6 and 99"
    ),
    "the exported model": (
        tensors("model/model.safetensors", lambda found: put((0, 1), -1.5)(found["model.embed_tokens.weight"])),
        r"model/model.safetensors: model.embed_tokens.weight: element \(0, 1\): \S+ and -1.5",
    ),
    "its configuration": (values("model/config.json", eos_token_id=5), r"model/config.json: eos_token_id: .+ and 5"),
    "another file of it": (
        lambda run: (run / "model" / "chat_template.jinja").write_text("x"), "model/chat_template.jinja: the files differ"
    ),
    "no exported model": (lambda run: shutil.rmtree(run / "model"), "model: only the first run has it"),
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


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (torch.tensor(1.0), torch.tensor(2.0), ": element (): 1.0 and 2.0"),
        (torch.tensor([0.0]), torch.tensor([-0.0]), ": element (0,): 0.0 and -0.0"),
        (torch.tensor([math.nan]), torch.tensor([math.nan]), None),
        (torch.zeros(0, 3), torch.zeros(0, 3), None),
        (torch.eye(2, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.bfloat16), ": element (0, 1): 0.0 and 1.0"),
        (torch.tensor([5]), torch.tensor([5]), None),
    ],
)
def test_tensors_are_equal_if_their_bits_are(one: torch.Tensor, other: torch.Tensor, found: str | None) -> None:
    assert tensor_difference(one, other) == found
