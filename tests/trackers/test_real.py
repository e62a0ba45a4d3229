"""The real packages of the trackers, offline: what a run logs is read back with the package's own reader."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from whet.errors import RecipeError
from whet.trackers.accelerate import Options, check, flat

HOSTILE = "<b>bold</b> | **x** \x1b[31m"
RUN = """
import sys
from whet.data import Group, Prompt, Sample
from whet.loops.record import RunFolder
metrics = RunFolder.metrics
def with_evaluation(self, step, *given, **numbers):
    if step == 2:
        numbers = {**numbers, "eval/pass@4/exact": 0.5, "eval/score": 1.5}
        prompt = Prompt("0", (3,), ({"role": "user", "content": "held out"},))
        group = Group(prompt, (Sample(0, 0, (5,), (-1.0,), 0, "stop", sys.argv[1]),))
        self.evaluation(step, [group], {"score": [1.5], "length": [1], "truncated": [False]})
    metrics(self, step, *given, **numbers)
RunFolder.metrics = with_evaluation
from whet.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
"""A run with an evaluation after its second step, whose sample is the first argument."""
MAIN = "from whet.cli.main import main\nsys.exit(main(sys.argv[1:]))"
ENVIRONMENT = {
    "WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": "{home}/trackio", "MLFLOW_TRACKING_URI": "sqlite:///{home}/mlflow.db",
    "WANDB_CACHE_DIR": "{home}/cache", "WANDB_CONFIG_DIR": "{home}/config", "HOME": "{home}",
}  # fmt: skip
RECIPE = """
method: ppo
model: {path: m}
data: {train: p.jsonl}
reward: [{source: "j.py:long"}]
rollout: {num_steps: 3, prompts_per_step: 4, mini_batch_size: 4}
sampling: {max_new_tokens: 4}
threads: 1
out: run
"""
READ: dict[str, str] = {
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator("run/run", size_guidance={"tensors": 0, "scalars": 0})
found.Reload()
out["numbers"] = {name: [[one.step, one.value] for one in found.Scalars(name)] for name in found.Tags()["scalars"]}
texts = {name: [[one.step, one.tensor_proto.string_val[0].decode()] for one in found.Tensors(name)] for name in found.Tags()["tensors"]}
out["samples"] = {name.removesuffix("/text_summary"): rows for name, rows in texts.items() if name.endswith("/text_summary")}
import pathlib
out["config"] = pathlib.Path("run/run/hparams.yml").read_text() if pathlib.Path("run/run/hparams.yml").exists() else next(
    path.read_text() for path in pathlib.Path("run/run").rglob("hparams.yml"))
""",
    "mlflow": """
import mlflow
client = mlflow.MlflowClient()
(experiment,) = [one for one in client.search_experiments() if one.name == "run"]
(run,) = client.search_runs([experiment.experiment_id])
out["numbers"] = {name: [[one.step, one.value] for one in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
out["config"], out["name"] = run.data.params, run.info.run_name
files = [file.path for folder in ("samples", "eval/samples") for file in client.list_artifacts(run.info.run_id, folder)]
out["samples"] = {file: mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/{file}") for file in files}
""",
    "trackio": """
import trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("run")
out["config"], out["name"] = run.config, run.name
out["numbers"], out["samples"] = {}, {}
for row in SQLiteStorage.get_logs("run", run.name):
    for name, value in row.items():
        if isinstance(value, (int, float)):
            out["numbers"].setdefault(name, []).append([row["step"], value])
        elif isinstance(value, dict) and value.get("_type") == "trackio.table":
            out["samples"].setdefault(name, []).append([row["step"], value])
""",
    "wandb": """
import pathlib, struct
from wandb.proto import wandb_internal_pb2
(file,) = pathlib.Path("run/wandb").rglob("run-*.wandb")
def records(data, block=32768):  # LevelDB's log: checksum, length and kind (whole, first, middle, last) before each part
    place, parts = 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""
out["numbers"], out["samples"], out["config"] = {}, {}, {}
for data in records(file.read_bytes()):
    record = wandb_internal_pb2.Record()
    record.ParseFromString(data)
    kind = record.WhichOneof("record_type")
    if kind == "run":
        out["name"] = record.run.display_name
    for update in [*record.run.config.update, *record.config.update]:
        out["config"][update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
    for item in record.history.item:
        keys, value = list(item.nested_key) or [item.key], json.loads(item.value_json)
        if len(keys) == 1 and isinstance(value, (int, float)):
            out["numbers"].setdefault(keys[0], []).append([record.history.step.num, value])
        elif keys[1:] == ["path"]:
            table = json.loads((file.parent / "files" / value).read_text())
            out["samples"].setdefault(keys[0], []).append([record.history.step.num, table])
""",
}


def program(code: str, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    own = {name: value.format(home=home) for name, value in ENVIRONMENT.items()}
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=home, env=os.environ | own, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_run_is_in_the_tracker_with_its_numbers_samples_and_recipe(name: str, tmp_path: Path) -> None:
    tiny.folder(tmp_path / "m")
    tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": word} for word in tiny.WORDS[:4]])
    (tmp_path / "j.py").write_text(
        "def long(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    (tmp_path / "r.yaml").write_text(RECIPE)
    words = ["train", "r.yaml", "--quiet", "--trackers", f"[{name}]"]
    done = program(RUN, tmp_path, HOSTILE, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run\n", done.stdout
    assert "is not used any more" not in done.stderr
    read = program(f"import json\nout = {{}}\n{READ[name]}\nprint('JSON' + json.dumps(out, default=str))", tmp_path)
    assert read.returncode == 0, read.stderr
    found: dict[str, Any] = json.loads(read.stdout.rpartition("JSON")[2])

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    renamed = {"eval/pass@4/exact": "eval/pass_4/exact", "seconds": "seconds/step"} if name == "mlflow" else {}
    for own in (
        "score",
        "kl",
        "entropy",
        "tokens_per_second",
        "eval/score",
        "eval/pass@4/exact",
        "seconds",
        "loss/policy/rollout/clip",
    ):
        logged = dict(found["numbers"][renamed.get(own, own)])
        assert logged == pytest.approx({line["step"]: line[own] for line in lines if own in line}, rel=1e-5), own
    assert all(value > 0.01 for _, value in found["numbers"]["system/memory_gib"])
    assert len(found["numbers"]["system/cpu_percent"]) == 3
    assert "sampling.max_new_tokens" in found["config"]
    assert found.get("name", "run") == "run"

    samples = json.dumps(found["samples"])
    kinds = {key.partition("/step-")[0] for key in found["samples"]}
    assert kinds == {"samples", "eval/samples"}
    assert "held out" in samples
    if name == "tensorboard":  # Markdown shows the text itself
        assert r"&lt;b&gt;bold&lt;/b&gt; &#124; &#42;&#42;x&#42;&#42; \\x1b&#91;31m" in samples
        assert samples.count("| prompt | completion | score |") == 4
    else:
        assert json.dumps(HOSTILE)[1:-1] in samples
        assert samples.count('"completion"') >= 4 or name == "trackio"


def test_a_tracker_that_cannot_start_is_named_before_the_first_step(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "m")
    tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "completion": "b"}])
    words = [
        "sft",
        "--model",
        "m",
        "--data",
        "p.jsonl",
        "--train.num-steps",
        "1",
        "--out",
        "run",
        "--trackers",
        "[mlflow]",
    ]
    code = "import os, sys\nos.environ['MLFLOW_TRACKING_URI'] = 'sqlite:////dev/null/x.db'\n" + MAIN
    done = program(code, tmp_path, *words)
    assert done.returncode == 2
    assert "whet: trackers: mlflow could not start: " in done.stderr
    assert "Traceback" not in done.stderr.split("whet: trackers")[1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_package_that_cannot_be_imported_is_named_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "swanlab.py").write_text("raise ImportError('its library is missing')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        RecipeError, match=r"trackers: swanlab: importing it failed with ImportError: its library is missing"
    ):
        check(Options(), "swanlab")


def test_a_recipe_is_flat_for_a_tracker() -> None:
    assert flat({"a": {}, "b": {"c": [1, None]}, "d": True}) == {"a": "{}", "b.c": "[1, null]", "d": True}
