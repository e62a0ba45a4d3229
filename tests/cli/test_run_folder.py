"""What a run does to its folder: nothing of others is overwritten, a resume continues the same run, a signal saves it."""

import json
import os
import shutil
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

import whet
from whet.errors import CheckpointError, DataError, Interrupted, RecipeError
from whet.loops import checkpoint
from whet.loops.record import read_metrics

from .helpers import on_disk, one_message
from .helpers import whet as command

ROWS = [{"prompt": f"{a} {b}", "completion": f"{b} yes"} for a, b in zip(tiny.WORDS, tiny.WORDS[1:], strict=False)]
PROMPTS = [{"prompt": "a yes"}, {"prompt": "b no"}, {"prompt": "c d"}]
RULES = "import {module}\n\ndef reward(prompts, completions, **columns):\n    return [float(len(one)) for one in completions]\n"
SFT: dict[str, Any] = {"model": "m", "data": "rows.jsonl", "out": "runs/r", "num_steps": 4, "batch_size": 4, "lr": 1e-3}
GRPO: dict[str, Any] = {
    "model": "m", "data": "prompts.jsonl", "reward": "rules.py:reward", "out": "runs/r", "num_steps": 4, "prompts_per_step": 2,
    "num_generations": 2, "max_new_tokens": 4, "lr": 1e-3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.folder(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    tiny.write_jsonl(Path("rows.jsonl"), ROWS)
    tiny.write_jsonl(Path("prompts.jsonl"), PROMPTS)
    Path("rules.py").write_text(RULES.format(module="math"))
    return tmp_path


def words(given: dict[str, Any], *more: str) -> list[str]:
    out = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*out, "--quiet", *more]


def result(out: str = "runs/r") -> tuple[bytes, list[dict[str, float]]]:
    """The weights and the metrics of a run, without its times."""
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in read_metrics(Path(out))]
    return (Path(out) / "model" / "model.safetensors").read_bytes(), rows


# --- nothing is overwritten ------------------------------------------------------------------------------------------


FOREIGN = {
    "notes": "notes.txt",
    "a recipe": "recipe.yaml",
    "metrics": "metrics.jsonl",
    "a model": "model/config.json",
    "a model of its own": "config.json",
    "a checkpoint": "checkpoints/step-00000001/x",
    "rollouts": "rollouts/step-00000001.parquet",
    "a hidden file": ".env",
}


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["start", "resume"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_anything_else_is_refused_and_unchanged(name: str, resume: list[str], capsys: Any) -> None:
    file = Path("runs/r") / FOREIGN[name]
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    before = on_disk(Path())
    said = command(capsys, "sft", *words(SFT, *resume))
    first = Path(FOREIGN[name]).parts[0]
    assert said.status == 2
    assert f"out: runs/r contains {first}, which is not of this run" in said.error
    assert on_disk(Path()) == before


INSIDE: dict[str, tuple[str, dict[str, Any], str]] = {
    "the base model": ("sft", SFT | {"out": ".", "data": "../rows.jsonl"}, "model.path: m is in the run folder"),
    "the data": ("sft", SFT | {"out": "d", "data": "d/rows.jsonl"}, "data.train: d/rows.jsonl is in the run folder d"),
    "the reward": (
        "grpo",
        GRPO | {"out": "d", "reward": "d/rules.py:reward"},
        "reward.0.source: d/rules.py:reward is in",
    ),
    "the recipe": ("sft", SFT | {"out": "d"}, "recipe: d/mine.yaml is in the run folder d"),
    "its own result": ("sft", SFT | {"out": "m/..", "data": "../rows.jsonl"}, "model.path: m is in the run folder"),
}


@pytest.mark.parametrize("name", INSIDE)
def test_an_input_inside_the_run_folder_is_refused(name: str, place: Path, capsys: Any) -> None:
    verb, given, said = INSIDE[name]
    Path("d").mkdir()
    for one in ("rows.jsonl", "rules.py"):
        shutil.copy(one, Path("d") / one)
        shutil.copy(one, place.parent / one)
    Path("d/mine.yaml").write_text("seed: 1\n")
    before = on_disk(Path())
    recipe = ["d/mine.yaml"] if name == "the recipe" else []
    found = command(capsys, verb, *recipe, *words(given))
    assert found.status == 2
    assert said in found.error
    assert on_disk(Path()) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "model", "recipe.yaml", ".lock", "rollouts"])
def test_a_link_in_the_run_folder_is_not_followed(name: str, capsys: Any) -> None:
    Path("runs/r").mkdir(parents=True)
    Path("precious").write_text("kept")
    (Path("runs/r") / name).symlink_to(Path("precious").resolve())
    said = command(capsys, "sft", *words(SFT))
    assert said.status == 2
    assert f"out: runs/r/{name} is a link, which a run does not follow" in said.error
    assert Path("precious").read_text() == "kept"


def test_temporary_names_that_are_links_are_not_followed(capsys: Any) -> None:
    Path("runs/r/rollouts").mkdir(parents=True)
    Path("precious").write_text("kept")
    names = [".recipe.yaml.writing", ".environment.json.writing", ".inputs.json.writing", ".model.writing"]
    for name in names:
        (Path("runs/r") / name).symlink_to(Path("precious").resolve())
    said = command(capsys, "grpo", *words(GRPO | {"num_steps": 1}))
    assert said.status == 0, said.error
    assert Path("precious").read_text() == "kept"
    assert not any((Path("runs/r") / name).is_symlink() for name in ("recipe.yaml", "environment.json", "model"))


def test_the_output_of_the_command_may_stand_in_the_folder_and_so_may_an_attempt_that_failed_early(capsys: Any) -> None:
    Path("runs/r").mkdir(parents=True)
    Path("runs/r/train.log").write_text("")
    Path("rules.py").write_text("def reward(prompts, completions, **columns):\n    return 1 / 0\n")
    assert command(capsys, "grpo", *words(GRPO)).status == 1
    assert Path("runs/r/recipe.yaml").is_file()
    Path("rules.py").write_text(RULES.format(module="math"))
    assert command(capsys, "grpo", *words(GRPO | {"lr": 1e-4})).status == 0


BEGINNING = [
    "environment.json", "recipe.yaml", "inputs.json", "rollouts/.step-00000001.parquet.writing", "rollouts/step-00000001.parquet",
    "metrics.jsonl", "checkpoints/.writing-00000001-x/learner/policy.safetensors",
]  # fmt: skip
"""What a run writes up to its first checkpoint, in this order."""


@pytest.mark.parametrize("count", range(1, 1 + len(BEGINNING)), ids=lambda count: BEGINNING[count - 1])
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(count: int, capsys: Any) -> None:
    given = GRPO | {"num_steps": 2, "save_every": 1}
    assert command(capsys, "grpo", *words(given | {"out": "runs/whole"})).status == 0
    for name in BEGINNING[:count]:
        place, source = Path("runs/r") / name, Path("runs/whole") / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(source.read_bytes() if source.is_file() else b"half")
    if count > BEGINNING.index("rollouts/step-00000001.parquet"):
        (Path("runs/r") / "rollouts/.step-00000001.parquet.writing").unlink()
    said = command(capsys, "grpo", *words(given, "--resume"))
    assert said.status == 0, said.error
    assert result() == result("runs/whole")
    assert on_disk(Path("runs/r")).keys() == on_disk(Path("runs/whole")).keys()


@pytest.mark.parametrize("verb", ["eval", "sample", "rank"])
def test_an_output_file_that_exists_is_refused_before_any_work(verb: str, capsys: Any) -> None:
    Path("out.json").write_text("mine")
    model = [] if verb == "rank" else ["--model", "m", "--max-new-tokens", "4"]
    said = command(capsys, verb, *model, "--data", "rows.jsonl", "--out", "out.json")
    one_message(said.error, ["out: out.json already exists"])
    assert said.status == 2
    assert Path("out.json").read_text() == "mine"


def test_kept_answers_of_two_failures_are_two_files(capsys: Any) -> None:
    Path("bad.py").write_text("def reward(prompts, completions, **columns):\n    return 1 / 0\n")
    given = [
        "--model",
        "m",
        "--data",
        "prompts.jsonl",
        "--out",
        "a.jsonl",
        "--reward",
        "bad.py:reward",
        "--max-new-tokens",
        "2",
    ]
    for name in ("a.unscored.jsonl", "a.1.unscored.jsonl"):
        said = command(capsys, "sample", *given)
        assert said.status == 1
        assert name in said.error
        assert len(Path(name).read_text().splitlines()) == len(PROMPTS)


def test_an_export_replaces_only_exports_of_the_run(place: Path) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    with whet.Session("sft", **SFT) as session:
        for where in ("mine", "m", ".", "runs", "runs/r/checkpoints", "runs/r"):
            with pytest.raises(RecipeError, match="already exists or is of the run"):
                session.export(where)
        for where in ("new", "new", "runs/r/at_step_2", "runs/r/at_step_2", "runs/r/model"):
            assert (session.export(where) / "model.safetensors").is_file()
    assert Path("mine/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("mask", [0o077, 0o002, 0o022])
def test_every_file_of_a_run_follows_the_umask(mask: int, capsys: Any) -> None:
    before = os.umask(mask)
    try:
        assert command(capsys, "grpo", *words(GRPO | {"num_steps": 1, "out": f"runs/{mask}"})).status == 0
    finally:
        os.umask(before)
    for path in Path(f"runs/{mask}").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, path


# --- one run, continued ----------------------------------------------------------------------------------------------


def test_the_same_command_starts_continues_and_ends_a_run(capsys: Any) -> None:
    for status in (0, 0, 0):
        said = command(capsys, "sft", *words(SFT, "--resume"))
        assert said.status == status, said.error
    first = result()
    assert command(capsys, "sft", *words(SFT | {"out": "runs/plain"})).status == 0
    assert result("runs/plain") == first


def test_starting_with_resume_is_said(capsys: Any) -> None:
    assert "there is no run in runs/r yet; it starts" in command(capsys, "sft", *words(SFT, "--resume")).error


CHANGES: dict[str, tuple[str, str, list[str]]] = {
    "data": ("prompts.jsonl", "data.train", []),
    "a reward": ("rules.py", "reward.0.source", []),
    "what a reward imports": ("helper.py", "reward.0.source", []),
    "the reference": ("ref/model.safetensors", "reference", ["--reference", "ref", "--kl-in-reward.coef", "0.1"]),
    "a reward model": ("rm/model.safetensors", "reward1", []),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_input_is_refused_by_name_and_accepted_by_name(
    name: str, capsys: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(place)
    file, input_, more = CHANGES[name]
    Path("helper.py").write_text("X = 1\n")
    Path("rules.py").write_text(RULES.format(module="helper"))
    tiny.folder(Path("ref"), seed=1)
    _reward_model(capsys)
    given = words(GRPO, "--save-every", "1", *more)
    if name == "a reward model":
        given += ["--reward", "rm"]
    assert command(capsys, "grpo", *given).status == 0
    _change(Path(file))
    before = on_disk(Path("runs/r"))
    said = command(capsys, "grpo", *given, "--resume")
    assert said.status in (1, 2)
    assert input_ in said.error
    assert f"--accept-changed {input_}" in said.error
    assert {k: v for k, v in on_disk(Path("runs/r")).items() if k != "environment.json"} == {
        k: v for k, v in before.items() if k != "environment.json"
    }
    said = command(capsys, "grpo", *given, "--resume", "--accept-changed", "nothing")
    assert (said.status, "--accept-changed nothing: the run has no such input" in said.error) == (2, True)
    assert command(capsys, "grpo", *given, "--resume", "--accept-changed", input_).status == 0
    said = command(capsys, "grpo", *given, "--resume")
    assert (said.status == 0) == (name not in ("the reference", "a reward model")), said.error  # no step was made since


def _reward_model(capsys: Any) -> None:
    pairs = [{"prompt": "a", "chosen": "b yes", "rejected": "c"}, {"prompt": "d", "chosen": "e yes", "rejected": "no"}]
    tiny.write_jsonl(Path("pairs.jsonl"), pairs)
    given = {"model": "m", "data": "pairs.jsonl", "out": "rm_run", "num_steps": 1, "batch_size": 2}
    assert command(capsys, "reward", *words(given)).status == 0
    shutil.copytree("rm_run/model", "rm")


def _change(file: Path) -> None:
    """Change a file so that it stays valid."""
    if file.suffix != ".safetensors":
        file.write_text(file.read_text() + "\n")
        return
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    save_file({name: value * 1.01 for name, value in tensors.items()}, file, metadata={"format": "pt"})


MAY_CHANGE = [
    "--save-every 3",
    "--train.keep 1",
    "--threads 1",
    "--trackers console",
    "--save-minutes 1",
    "--save-last false",
]


@pytest.mark.parametrize("change", MAY_CHANGE)
def test_what_changes_no_number_may_change_on_a_resume(change: str, capsys: Any) -> None:
    assert command(capsys, "sft", *words(SFT)).status == 0
    whole = result()
    shutil.rmtree("runs/r/checkpoints/step-00000004")
    assert command(capsys, "sft", *words(SFT, "--resume", *change.split())).status == 0
    assert result() == whole


LENGTHS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "a constant rate": ("sft", SFT, ["--optim.schedule", "constant"]),
    "a schedule with an end": ("sft", SFT, ["--optim.schedule-steps", "5", "--warmup-ratio", "0.4"]),
    "a constant rate online": ("grpo", GRPO, ["--optim.schedule", "constant"]),
    "a schedule with an end online": ("ppo", GRPO, ["--optim.schedule-steps", "5", "--mini-batch-size", "2"]),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_an_extended_run_has_the_bits_of_a_longer_one(name: str, capsys: Any) -> None:
    verb, given, more = LENGTHS[name]
    assert command(capsys, verb, *words(given | {"num_steps": 2}, *more)).status == 0
    assert command(capsys, verb, *words(given | {"num_steps": 5}, "--resume", *more)).status == 0
    assert command(capsys, verb, *words(given | {"num_steps": 5, "out": "runs/whole"}, *more)).status == 0
    assert result() == result("runs/whole")


def test_a_run_whose_learning_rate_depends_on_its_length_cannot_be_extended(capsys: Any) -> None:
    for more in ([], ["--optim.schedule", "constant", "--warmup-ratio", "0.5"]):
        shutil.rmtree("runs", ignore_errors=True)
        assert command(capsys, "sft", *words(SFT, *more)).status == 0
        before = on_disk(Path("runs"))
        said = command(capsys, "sft", *words(SFT | {"num_steps": 6}, "--resume", *more))
        one_message(
            said.error, ["--resume: train.num_steps changed", "depends on the number of steps", "optim.schedule_steps"]
        )
        assert on_disk(Path("runs")) == before


def test_a_run_cannot_become_shorter_than_it_is(capsys: Any) -> None:
    more = ["--optim.schedule", "constant"]
    assert command(capsys, "sft", *words(SFT, *more)).status == 0
    said = command(capsys, "sft", *words(SFT | {"num_steps": 3}, "--resume", *more))
    one_message(said.error, ["has made 4 steps already, and would have 3"])


def test_a_run_over_passes_does_not_become_one_over_steps(capsys: Any) -> None:
    more = ["--optim.schedule", "constant"]
    given = {name: value for name, value in GRPO.items() if name != "num_steps"}
    assert command(capsys, "grpo", *words(given | {"num_epochs": 1}, *more)).status == 0
    said = command(capsys, "grpo", *words(given | {"num_steps": 6}, "--resume", *more))
    one_message(said.error, ["rollout.num_epochs"])


# --- checkpoints and metrics that are not what they should be --------------------------------------------------------


def _tear(path: Path) -> None:
    weights = path / "learner" / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


TORN = {
    "torn weights": (_tear, "learner/policy.safetensors has changed since it was written"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "a manifest that is a list": (
        lambda path: (path / "manifest.json").write_text("[]"),
        "manifest.json:1: not the JSON of an object (expected an object, got list)",
    ),
    "an empty manifest": (lambda path: (path / "manifest.json").write_text("{}"), "manifest.json does not list"),
    "half a manifest": (
        lambda path: (path / "manifest.json").write_text('{"a": '),
        "manifest.json:1: not the JSON of an object (Expecting value",
    ),
    "a missing file": (lambda path: (path / "loop.json").unlink(), "loop.json is missing"),
}


@pytest.mark.parametrize("name", TORN)
def test_a_torn_checkpoint_is_named_and_a_run_does_not_start_over(name: str, capsys: Any) -> None:
    tear, reason = TORN[name]
    given = words(SFT, "--save-every", "2")
    assert command(capsys, "sft", *given).status == 0
    whole = result()
    newest = Path("runs/r/checkpoints/step-00000004")
    tear(newest)
    said = command(capsys, "sft", *given, "--resume")
    assert said.status == 0
    assert f"whet: {newest}: {reason}" in said.error
    assert result() == whole
    for path in sorted(Path("runs/r/checkpoints").iterdir()):
        tear(path)
    before = on_disk(Path("runs/r"))
    said = command(capsys, "sft", *given, "--resume")
    assert said.status == 1
    assert "no checkpoint is complete. Restore one, or remove runs/r/checkpoints to start the run again" in said.error
    assert on_disk(Path("runs/r")) == before


def test_a_torn_checkpoint_does_not_count_as_a_kept_one(capsys: Any) -> None:
    given = words(SFT | {"num_steps": 6}, "--save-every", "1", "--optim.schedule", "constant")
    assert (
        command(
            capsys, "sft", *words(SFT, "--save-every", "1", "--optim.schedule", "constant", "--train.keep", "3")
        ).status
        == 0
    )
    folder = Path("runs/r/checkpoints")
    assert [path.name[-1] for path in sorted(folder.iterdir())] == ["2", "3", "4"]
    _tear(folder / "step-00000003")

    def stop(*_: Any) -> bool:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:  # the run ends after the checkpoint of step 5
        real = checkpoint._commit
        patch.setattr(
            checkpoint, "_commit", lambda aside, final, loop: real(aside, final, loop) if loop["step"] < 6 else stop()
        )
        assert command(capsys, "sft", *given, "--resume", "--train.keep", "3").status == 1
    assert [path.name[-1] for path in sorted(folder.iterdir())] == ["2", "3", "4", "5"]  # 5, 4 and 2 are complete


@pytest.mark.parametrize("line", ["[]", "{}", "nothing", '{"step": "x"}', '{"step": 1.5}', ""])
def test_a_line_of_metrics_that_is_none_is_named_and_nothing_is_lost(line: str, capsys: Any) -> None:
    assert command(capsys, "sft", *words(SFT, "--save-every", "2")).status == 0
    metrics = Path("runs/r/metrics.jsonl")
    lines = metrics.read_text().splitlines()
    lines[1] = line
    metrics.write_text("\n".join(lines) + "\n")
    before = metrics.read_bytes()
    shutil.rmtree("runs/r/checkpoints/step-00000004")
    said = command(capsys, "sft", *words(SFT, "--save-every", "2", "--resume"))
    assert said.status == 2
    assert "runs/r/metrics.jsonl:2: not a line of metrics" in said.error
    assert metrics.read_bytes() == before
    with pytest.raises(DataError):
        read_metrics(Path("runs/r"))


def test_missing_metrics_are_said(capsys: Any) -> None:
    assert command(capsys, "sft", *words(SFT, "--save-every", "2")).status == 0
    metrics = Path("runs/r/metrics.jsonl")
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]))
    said = command(capsys, "sft", *words(SFT, "--save-every", "2", "--resume"))
    assert said.status == 0
    assert "the lines of 3 steps are missing, the first is 2" in said.error


def test_a_checkpoint_of_another_kind_of_file_is_a_message(capsys: Any) -> None:
    assert command(capsys, "sft", *words(SFT)).status == 0
    path = Path("runs/r/checkpoints/step-00000004")
    (path / "learner" / "learner.json").write_text("[]")
    sums = json.loads((path / "manifest.json").read_text())
    sums["learner/learner.json"] = checkpoint.sha256(path / "learner" / "learner.json")
    (path / "manifest.json").write_text(json.dumps(sums))
    said = command(capsys, "sft", *words(SFT, "--resume"))
    one_message(said.error, [f"{path}/learner/learner.json:1: ", "expected an object, got list"])


# --- saves -----------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that advances by a number of seconds at each reading."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def monotonic(self) -> float:
        self.now += self.seconds
        return self.now


@pytest.mark.parametrize(("seconds", "saved"), [(1.0, 0), (61.0, 3)], ids=["quick", "slow"])
def test_a_save_is_due_by_time(seconds: float, saved: int, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading advances the clock by 61 s: a save takes 61 s, so the next one is due after 20 of these, not after 1 minute."""
    saves, real = [], checkpoint.save

    def counted(folder: Path, step: int, *given: Any, **named: Any) -> Path:
        saves.append(step)
        return real(folder, step, *given, **named)

    monkeypatch.setattr(checkpoint, "save", counted)
    monkeypatch.setattr(checkpoint, "time", Clock(seconds))
    given = SFT | {"num_steps": 50, "batch_size": 1, "save_minutes": 1, "save_last": False}
    assert command(capsys, "sft", *words(given)).status == 0
    assert len(saves) == saved
    assert saves == [1, 21, 41][:saved]


def test_without_the_last_checkpoint_a_run_ends_once_and_can_be_extended(capsys: Any) -> None:
    more = ["--save-last", "false", "--save-every", "3", "--optim.schedule", "constant"]
    assert command(capsys, "sft", *words(SFT, *more)).status == 0
    assert [path.name for path in Path("runs/r/checkpoints").iterdir()] == ["step-00000003"]
    before = on_disk(Path("runs/r"))
    said = command(capsys, "sft", *words(SFT, "--resume", *more))
    assert said.status == 0
    assert "the run in runs/r has ended; its model is runs/r/model" in said.error
    assert on_disk(Path("runs/r")) == before
    session = whet.Session("sft", resume=True, **SFT, save_last=False, save_every=3, **{"optim.schedule": "constant"})
    with pytest.raises(RecipeError, match="has ended, without a checkpoint of its end"):
        session.__enter__()
    assert command(capsys, "sft", *words(SFT | {"num_steps": 6}, "--resume", *more)).status == 0
    assert command(capsys, "sft", *words(SFT | {"num_steps": 6, "out": "runs/whole"}, *more)).status == 0
    assert result() == result("runs/whole")


def test_rollouts_are_recorded_as_often_as_asked_and_a_resume_may_change_it(capsys: Any) -> None:
    steady = ["--optim.schedule", "constant"]
    assert command(capsys, "grpo", *words(GRPO, *steady, "--rollout.record-every", "2")).status == 0
    assert sorted(path.name for path in Path("runs/r/rollouts").iterdir()) == [
        "step-00000002.parquet", "step-00000004.parquet",
    ]  # fmt: skip
    longer = GRPO | {"num_steps": 5}
    assert command(capsys, "grpo", *words(longer, *steady, "--rollout.record-every", "1", "--resume")).status == 0
    assert Path("runs/r/rollouts/step-00000005.parquet").is_file()
    none = longer | {"out": "runs/none"}
    assert command(capsys, "grpo", *words(none, *steady, "--rollout.record-every", "0")).status == 0
    assert not Path("runs/none/rollouts").exists()
    assert result() == result("runs/none")


# --- signals ---------------------------------------------------------------------------------------------------------


SIGNALING = """
import os, time
calls = []

def reward(prompts, completions, **columns):
    calls.append(1)
    if len(calls) == 3 and os.environ.get("SIGNAL"):
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        time.sleep(60)
    return [float(len(one)) for one in completions]
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_inside_a_rollout_saves_and_ends_the_run_at_once(
    signum: signal.Signals, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run does not wait for the 60 seconds of the reward, and its last whole step is saved."""
    Path("rules.py").write_text(SIGNALING)
    monkeypatch.setenv("SIGNAL", str(int(signum)))
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    said = command(capsys, "grpo", *words(GRPO))
    assert said.status == 128 + signum
    one_message(said.error, ["interrupted; the checkpoint of step 2 is saved; continue with --resume"])
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert [path.name for path in Path("runs/r/checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.setenv("SIGNAL", "")
    assert command(capsys, "grpo", *words(GRPO, "--resume")).status == 0
    assert command(capsys, "grpo", *words(GRPO | {"out": "runs/whole"})).status == 0
    assert result() == result("runs/whole")


def test_a_signal_between_the_updates_of_a_step_waits_for_its_end_and_says_so(
    capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whet.learner.local import LocalLearner

    real, steps = LocalLearner.optim_step, []

    def signaled(self: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:  # the first of the two updates of step 2
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    monkeypatch.setattr(LocalLearner, "optim_step", signaled)
    given = words(GRPO, "--mini-batch-size", "2")
    said = command(capfd, "grpo", *given)
    assert said.status == 143
    assert said.error == (
        "whet: SIGTERM: waiting for the end of step 2; a second signal ends the run at once\n"
        "whet: interrupted; the checkpoint of step 2 is saved; continue with --resume\n"
    )
    assert len(steps) == 4


def test_a_second_signal_ends_the_run_at_once(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from whet.learner.local import LocalLearner

    def signaled(self: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the second signal did not end the run")

    monkeypatch.setattr(LocalLearner, "optim_step", signaled)
    said = command(capfd, "sft", *words(SFT))
    assert said.status == 143
    assert said.error.endswith(
        "whet: interrupted; no checkpoint was saved yet; the same command with --resume starts the run again\n"
    )
    assert not list(Path("runs/r").glob("checkpoints/*"))


def test_a_signal_during_a_save_waits_for_it(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint._commit

    def signaled(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        real(*given)

    monkeypatch.setattr(checkpoint, "_commit", signaled)
    said = command(capfd, "sft", *words(SFT, "--save-every", "2"))
    assert said.status == 129
    assert "whet: SIGHUP: waiting for the checkpoint of step 2" in said.error
    assert [path.name for path in Path("runs/r/checkpoints").iterdir()] == ["step-00000002"]


def test_a_signal_that_was_ignored_stays_ignored(capsys: Any) -> None:
    """As under nohup: the terminal closes, and the run goes on."""
    Path("rules.py").write_text(SIGNALING.replace("time.sleep(60)", "pass"))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SIGNAL", str(int(signal.SIGHUP)))
            assert command(capsys, "grpo", *words(GRPO)).status == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_python_user_gets_the_signal_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rules.py").write_text(SIGNALING)
    monkeypatch.setenv("SIGNAL", str(int(signal.SIGTERM)))
    with pytest.raises(Interrupted, match="the checkpoint of step 2 is saved") as found:
        whet.train("grpo", **GRPO)
    assert found.value.signum == signal.SIGTERM


def test_no_checkpoint_can_be_loaded_from_a_folder_without_one(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest.json is missing; no checkpoint is complete"):
        checkpoint.newest(tmp_path)


# --- found by breaking it ----------------------------------------------------------------------------------------------


def test_a_run_that_has_ended_without_a_checkpoint_is_not_started_over(capsys: Any) -> None:
    more = ["--save-last", "false", "--optim.schedule", "constant"]
    assert command(capsys, "sft", *words(SFT, *more)).status == 0
    before = on_disk(Path("runs/r"))
    tiny.write_jsonl(Path("rows.jsonl"), ROWS[:8])
    for steps in (3, 6):
        said = command(capsys, "sft", *words(SFT | {"num_steps": steps}, "--resume", *more))
        assert said.status == 2
        one_message(
            said.error, ["runs/r has ended after 4 steps and has no checkpoint", "name another folder with --out"]
        )
    assert on_disk(Path("runs/r")) == before


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("from lib import rules as own", "lib/rules.py"),
        ("from lib.deep import rules as own", "lib/__init__.py"),
        ("import lib.deep.rules as own", "lib/deep/rules.py"),
    ],
)
def test_a_changed_module_of_a_package_beside_the_reward_is_refused_by_name(
    text: str, file: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    for name in [one for one in sys.modules if one.partition(".")[0] == "lib"]:
        monkeypatch.delitem(sys.modules, name)
    Path("lib/deep").mkdir(parents=True)
    for one in ("lib/__init__.py", "lib/deep/__init__.py", "lib/rules.py", "lib/deep/rules.py"):
        Path(one).write_text("W = 1.0\n")
    Path("rules.py").write_text(f"{text}\n" + RULES.format(module="math"))
    more = ["--save-every", "1", "--optim.schedule", "constant"]
    assert command(capsys, "grpo", *words(GRPO | {"num_steps": 2}, *more)).status == 0
    Path(file).write_text("W = 2.0\n")
    said = command(capsys, "grpo", *words(GRPO, "--resume", *more))
    assert said.status == 2
    one_message(said.error, ["rules.py:reward", "changed"])
    assert command(capsys, "grpo", *words(GRPO, "--resume", "--accept-changed", "rules.py:reward", *more)).status == 0


def test_a_changed_template_without_a_suffix_is_refused_by_name(capsys: Any) -> None:
    Path("template").write_text("{% for one in messages %}{{ one.content }}{% endfor %}")
    given = GRPO | {"num_steps": 2, "chat_template": "template"}
    assert command(capsys, "grpo", *words(given, "--save-every", "1", "--optim.schedule", "constant")).status == 0
    Path("template").write_text("{% for one in messages %}{{ one.content }} {% endfor %}")
    said = command(
        capsys,
        "grpo",
        *words(given | {"num_steps": 3}, "--resume", "--save-every", "1", "--optim.schedule", "constant"),
    )
    assert said.status == 2
    one_message(said.error, ["model.chat_template", "template", "changed"])


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_text("")], ids=["folder", "file"])
@pytest.mark.parametrize("name", ["step-00000009", "step-abcdefgh"])
def test_names_that_are_no_checkpoint_do_not_stop_a_resume(name: str, make: Any, capsys: Any) -> None:
    more = ["--save-every", "1", "--optim.schedule", "constant"]
    assert command(capsys, "sft", *words(SFT | {"num_steps": 2}, *more)).status == 0
    make(Path("runs/r/checkpoints") / name)
    said = command(capsys, "sft", *words(SFT, "--resume", *more))
    assert said.status == 0, said.error
    assert len(read_metrics(Path("runs/r"))) == 4


PIPES = [
    "runs/r/metrics.jsonl",
    "runs/r/checkpoints/step-00000002/loop.json",
    "m/config.json",
    "m/tokenizer_config.json",
]


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_in_the_place_of_a_file_is_named_and_does_not_block(name: str, capsys: Any) -> None:
    more = ["--save-every", "1", "--save-last", "true", "--optim.schedule", "constant"]
    assert command(capsys, "sft", *words(SFT | {"num_steps": 2}, *more)).status == 0
    if name.startswith("m/"):
        Path("runs/r").rename("runs/old")
    Path(name).unlink()
    os.mkfifo(name)
    signal.alarm(60)  # a run that blocks ends this test
    try:
        said = command(capsys, "sft", *words(SFT, *(["--resume"] if not name.startswith("m/") else []), *more))
    finally:
        signal.alarm(0)
    if "checkpoints" in name:  # the one before is used
        assert said.status == 0
        assert "step-00000002" in said.error
    else:
        assert said.status == 2
        one_message(said.error, [str(Path(name).parent)])
