"""`whet report`, and the report and the cautions that every run writes into its folder."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny

from whet.runs import report as reporting
from whet.runs.folder import locked

from .helpers import one_message, whet


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny.folder(home / "m")
    tiny.write_jsonl(
        home / "sft.jsonl", [{"prompt": "hello", "completion": "yes"}, {"prompt": "a b", "completion": "no"}]
    )
    tiny.write_jsonl(home / "prompts.jsonl", [{"prompt": "hello"}, {"prompt": "a b"}, {"prompt": "c"}, {"prompt": "d"}])
    (home / "judge.py").write_text(
        "def count(prompts, completions, **columns):\n    return [float(len(text.split())) for text in completions]\n"
        "def same(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n"
    )
    return home


@pytest.fixture
def inside(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is empty."""
    monkeypatch.chdir(tmp_path)
    return home


def online(home: Path, out: str, *more: object, judge: str = "count", steps: int = 3) -> list[object]:
    return [
        "grpo", "--model", home / "m", "--data", home / "prompts.jsonl", "--reward", f"{home}/judge.py:{judge}", "--out", out, "--quiet",
        "--num-generations", 2, "--rollout.prompts-per-step", 2, "--rollout.mini-batch-size", 4, "--rollout.num-steps", steps,
        "--sampling.max-new-tokens", 4, "--threads", 1, "--optim.schedule", "constant", *more,
    ]  # fmt: skip


def sft(home: Path, out: str, *more: object) -> list[object]:
    return [
        "sft",
        "--model",
        home / "m",
        "--data",
        home / "sft.jsonl",
        "--out",
        out,
        "--quiet",
        "--train.num-steps",
        2,
        *more,
    ]


def cautions(folder: str) -> list[dict[str, Any]]:
    path = Path(folder) / "cautions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_every_run_writes_its_report(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, kind in ((online(inside, "online"), "grpo"), (sft(inside, "offline"), "sft")):
        said = whet(capsys, *words)
        assert said.status == 0, said.error
        out = Path(said.out.strip())
        text = (out / "report.html").read_text()
        assert f"<title>{kind}: {out.name}</title>" in text
        assert "Finished:" in text  # the session holds its lock, and yet the run has ended


def test_the_command_writes_a_page_and_prints_its_path(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        assert whet(capsys, *sft(inside, name, "--seed", int(name == "b"))).status == 0
    Path("a/report.html").unlink()
    assert whet(capsys, "report", "a").out == "a/report.html\n"
    assert whet(capsys, "report", "a", "--out", "deep/one.html").out == "deep/one.html\n"
    assert Path("deep/one.html").read_bytes() == Path("a/report.html").read_bytes()
    said = whet(capsys, "report", "a", "b")
    assert said.out == "report.html\n"
    assert "one recipe with different seeds" in Path("report.html").read_text()
    assert whet(capsys, "report", "a", "b", "--out=report.html").status == 0  # an earlier report is replaced


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ([], ["expected whet report RUN [RUN ...]"]),
        (["--out", "x.html"], ["expected whet report RUN [RUN ...]"]),
        (["nothing"], ["nothing: no run is there", "recipe.yaml"]),
        (["a", "a/"], ["this run is given twice"]),
        (["a", "--step", "1"], ["unknown option 'step'", "--out"]),
        (["a", "--resume"], ["unknown option 'resume'"]),
        (["--out", "x.html", "a"], ["expected whet report RUN"]),
        (["a", "--out", "a"], ["a is a folder, a link or a device"]),
        (["a", "--out", "a/metrics.jsonl"], ["metrics.jsonl exists and is not a report of whet"]),
        (["a", "--out", "link.html"], ["link.html is a folder, a link or a device"]),
        (["a", "--out", "a/recipe.yaml/x.html"], ["cannot be written"]),
        (["torn"], ["torn/metrics.jsonl:1: not a line of metrics"]),
        (["bad"], ["bad/recipe.yaml"]),
    ],
)
def test_what_cannot_be_reported_is_one_message(
    inside: Path, capsys: pytest.CaptureFixture[str], words: list[str], fragments: list[str]
) -> None:
    for name in ("a", "torn", "bad"):
        Path(name).mkdir()
        Path(name, "recipe.yaml").write_text("method: sft\n")
        Path(name, "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    Path("torn/metrics.jsonl").write_text('{"step": \n{"step": 2}\n')
    Path("bad/recipe.yaml").write_text("method: [\n")
    Path("link.html").symlink_to("elsewhere.html")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    said = whet(capsys, "report", *words)
    assert said.status == 2
    one_message(said.error, fragments)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_report_that_cannot_be_written_is_a_caution_and_the_run_is_kept(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting, "report_page", fails)
    said = whet(capsys, *sft(inside, "run"))
    assert said.status == 0
    assert said.out == "run\n"
    assert "run/report.html: the report could not be written ([Errno 28] No space left on device)" in said.error
    assert Path("run/model/model.safetensors").is_file()
    assert not Path("run/report.html").exists()


def test_a_run_that_stops_itself_has_its_report(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every answer is cut off and masked: five rollouts are skipped, and the sixth stops the run."""
    more = ["--algorithm.truncated.rule", "mask", "--sampling.max-new-tokens", 1, "--sampling.top-k", 1]
    said = whet(capsys, *online(inside, "run", *more, steps=8))
    assert said.status == 1
    text = Path("run/report.html").read_text()
    assert "Stopped by a self-check in step 6, after 5 of 8 steps." in text
    assert "A self-check stopped the run. step 6: all 4 answers are truncated and masked" in text
    assert "Skipped rollouts, in which no weight changed" not in text  # no step has a number of an update
    assert text.count("this rollout is skipped and no weight changes") == 5


def test_a_link_named_report_html_is_refused_before_the_run(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/report.html").symlink_to("../precious")
    one_message(whet(capsys, *sft(inside, "run")).error, ["run/report.html is a link"])


def test_a_run_that_goes_on_and_one_that_was_killed_can_be_reported(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from whet.runs import config
    from whet.runs.folder import Options
    from whet.runs.recipe import kind_of
    from whet.runs.yaml_text import read_yaml

    assert whet(capsys, *sft(inside, "run", "--train.save-every", 1)).status == 0
    recipe = config.converted(
        {key: value for key, value in read_yaml(Path("run/recipe.yaml")).items() if key != "method"}, kind_of("sft"), ""
    )
    with locked(recipe, "sft", Options(resume=True)):
        assert whet(capsys, "report", "run").status == 0
    assert "Not finished: a session is training in this folder" in Path("run/report.html").read_text()
    lines = Path("run/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("run/metrics.jsonl").write_text(lines[0] + lines[1][:20])
    assert whet(capsys, "report", "run").status == 0
    assert "Not finished: 1 of 2 steps are done; continue it with --resume." in Path("run/report.html").read_text()


def test_cautions_of_a_run_are_kept_and_are_exact_when_it_is_resumed(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal scores are named once, in the fifth step. A run that is resumed before or after it names them once too."""
    assert whet(capsys, *online(inside, "whole", judge="same", steps=8)).status == 0
    told = cautions("whole")
    assert told
    assert all(type(one["step"]) is int and one["text"] for one in told)
    assert told[0]["text"] in json.dumps(told)
    for first in (2, 6):
        name = f"resumed{first}"
        assert whet(capsys, *online(inside, name, judge="same", steps=first)).status == 0
        # what an attempt wrote after the checkpoint, before it was killed
        with (Path(name) / "cautions.jsonl").open("a") as file:
            file.write('{"step": 7, "text": "of a step that is made again"}\n{"step": 8, "te')
        said = whet(capsys, *online(inside, name, "--resume", judge="same", steps=8))
        assert said.status == 0, said.error
        assert [one for one in cautions(name) if one["text"] != "of a step that is made again"] == cautions(name)
        assert [(one["step"], one["text"]) for one in cautions(name)] == [(one["step"], one["text"]) for one in told]
        assert json.loads((Path(name) / "environment.json").read_text())["resumed_at"] == [first]
        text = (Path(name) / "report.html").read_text()
        assert f"The run was resumed 1 times, after steps {first}." in text


def test_a_damaged_file_of_cautions_does_not_stop_a_resume(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert whet(capsys, *online(inside, "run", steps=2)).status == 0
    Path("run/cautions.jsonl").write_bytes(b"\xff\n\n")
    said = whet(capsys, *online(inside, "run", "--resume", steps=3))
    assert said.status == 0, said.error
    assert "cautions.jsonl:1: not a caution" in said.error
    assert not Path("run/cautions.jsonl").exists()


def test_a_caution_that_cannot_be_written_does_not_end_the_run(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.open

    def full(path: Any, *rest: Any, **named: Any) -> int:
        if str(path).endswith("cautions.jsonl"):
            raise OSError(28, "No space left on device")
        return original(path, *rest, **named)

    monkeypatch.setattr(os, "open", full)
    said = whet(capsys, *online(inside, "run", judge="same", steps=6))
    assert said.status == 0
    assert "the caution could not be written" in said.error
