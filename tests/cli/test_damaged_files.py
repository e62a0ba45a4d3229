"""Damaged files of runs and models: one line with the file, within limits of time and memory. Each case was found by proof.fuzz."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny

from proof.limits import Ended, limited
from whet.cli.main import main
from whet.data.files import read_json
from whet.errors import CheckpointError

from .helpers import one_message

RUN = "grpo --model m --data prompts.jsonl --reward rules.py:judge --num-generations 2 --rollout.prompts-per-step 2 --max-new-tokens 4"
WORDS = [
    *RUN.split(),
    "--rollout.num-steps",
    "2",
    "--rollout.mini-batch-size",
    "null",
    "--train.save-every",
    "1",
    "--out",
    "run",
    "--quiet",
]
SFT = ["sft", "--model", "m", "--data", "sft.jsonl", "--train.num-steps", "1", "--out", "other", "--quiet"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny.folder(home / "m")
    tiny.write_jsonl(home / "sft.jsonl", [{"prompt": "hello a", "completion": "yes b c"}] * 4)
    tiny.write_jsonl(home / "prompts.jsonl", [{"prompt": "hello a"}, {"prompt": "b c"}])
    (home / "rules.py").write_text(
        "def judge(completions, **columns):\n    return [float(len(one)) for one in completions]\n"
    )
    ended = limited(lambda: main(WORDS), home, seconds=60)
    assert ended.status == 0, ended.error
    return home


def told(world: Path, folder: Path, words: list[str], damage: Callable[[Path], Any]) -> Ended:
    home = folder / "home"
    shutil.copytree(world, home)
    damage(home)
    return limited(lambda: main(words), home, seconds=30, mebibytes=1024)


def written(file: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda home: (home / file).write_bytes(content.encode() if isinstance(content, str) else content)


def changed(file: str, **values: Any) -> Callable[[Path], Any]:
    def damage(home: Path) -> None:
        (home / file).write_text(json.dumps(json.loads((home / file).read_text()) | values))

    return damage


ROLLOUT = "run/rollouts/step-00000001.parquet"
LAST = "run/checkpoints/step-00000002"


def column(name: str, value: Any) -> Callable[[Path], Any]:
    def damage(home: Path) -> None:
        table = pyarrow.parquet.read_table(home / ROLLOUT)
        place = table.schema.names.index(name)
        own = pyarrow.array([value] * table.num_rows)
        pyarrow.parquet.write_table(table.set_column(place, name, own), home / ROLLOUT)

    return damage


def noted(name: str, value: str) -> Callable[[Path], Any]:
    def damage(home: Path) -> None:
        table = pyarrow.parquet.read_table(home / ROLLOUT)
        about = {key.decode(): one.decode() for key, one in table.schema.metadata.items()} | {name: value}
        pyarrow.parquet.write_table(table.replace_schema_metadata(about), home / ROLLOUT)

    return damage


def checkpoint(file: str, content: bytes) -> Callable[[Path], Any]:
    """Damage the last checkpoint, with the checksum of the new content."""

    def damage(home: Path) -> None:
        shutil.rmtree(home / "run/checkpoints/step-00000001")
        (home / LAST / file).write_bytes(content)
        sums = json.loads((home / LAST / "manifest.json").read_text())
        (home / LAST / "manifest.json").write_text(json.dumps(sums | {file: hashlib.sha256(content).hexdigest()}))

    return damage


def manifest(content: str) -> Callable[[Path], Any]:
    """Replace the manifest of the only checkpoint."""

    def damage(home: Path) -> None:
        shutil.rmtree(home / "run/checkpoints/step-00000001")
        (home / LAST / "manifest.json").write_text(content)

    return damage


REPLAY, WHY = ["replay", "run", "--step", "1", "--quiet"], ["why", "run", "--step", "1", "--quiet"]
RESUME = [*WORDS, "--resume"]
DAMAGES: dict[str, tuple[list[str], Callable[[Path], Any], list[str]]] = {
    "an environment with a BOM": (
        REPLAY,
        written("run/environment.json", b"\xef\xbb\xbf{}"),
        ["run/environment.json:1", "BOM"],
    ),
    "an environment that is no UTF-8": (
        REPLAY,
        written("run/environment.json", b"{\n\xa0}"),
        ["run/environment.json:2", "utf-8"],
    ),
    "an environment of a million threads": (
        WHY,
        changed("run/environment.json", threads=10**6),
        ["environment.json", "threads", "1000000"],
    ),
    "an environment with a text for threads": (
        WHY,
        changed("run/environment.json", threads="x"),
        ["environment.json", "threads", "'x'"],
    ),
    "a list for an environment": (
        REPLAY,
        written("run/environment.json", "[]"),
        ["environment.json", "object", "list"],
    ),
    "a rollout that is no Parquet": (REPLAY, written(ROLLOUT, b"PAR1xxxxPAR1"), [ROLLOUT, "Parquet"]),
    "a rollout of texts": (REPLAY, column("segment_end", "x"), [ROLLOUT, "segment_end has the type string"]),
    "a rollout of texts in lists": (REPLAY, column("sampler_logp", ["x"]), [ROLLOUT, "sampler_logp has the type list"]),
    "a rollout of fractions of tokens": (
        REPLAY,
        column("completion_ids", [1.5]),
        [ROLLOUT, "completion_ids has the type list"],
    ),
    "a rollout that lacks a number": (
        REPLAY,
        column("old_logp", [1.5, None]),
        [ROLLOUT, "old_logp has no value in some rows"],
    ),
    "a rollout without numbers": (WHY, column("token_score", None), [ROLLOUT, "token_score has the type null"]),
    "a rollout with unknown types": (REPLAY, noted("whet.dtypes", '{"rewards": "nothing"}'), [ROLLOUT, "whet.dtypes"]),
    "a rollout with types that are no JSON": (REPLAY, noted("whet.dtypes", "{"), [ROLLOUT, "whet.dtypes"]),
    "a rollout of a version that is no number": (REPLAY, noted("whet.schema", "x"), [ROLLOUT, "schema version"]),
    "a rollout of a huge version": (REPLAY, noted("whet.schema", "9" * 5000), [ROLLOUT, "schema version"]),
    "a manifest with a name twice": (
        RESUME,
        manifest('{"a": "1", "a": "2"}'),
        ["manifest.json", "'a'", "twice"],
    ),
    "a manifest of deep lists": (
        RESUME,
        manifest("[" * 100_000),
        ["manifest.json", "nested too deeply"],
    ),
    "a loop that is a list": (RESUME, checkpoint("loop.json", b"[]"), ["loop.json", "object", "list"]),
    "a loop without its state": (
        RESUME,
        checkpoint("loop.json", b'{"step": 2, "drawn": 8}'),
        [LAST, "loop.json", "state"],
    ),
    "a loop with a text for a number": (
        RESUME,
        checkpoint("loop.json", b'{"step": 2, "drawn": "8", "state": {}}'),
        [LAST, "loop.json", "drawn", "'8'"],
    ),
    "a learner without its parts": (
        RESUME,
        checkpoint("learner/learner.json", b"{}"),
        [LAST, "missing or of a wrong type"],
    ),
    "a header of 2**60 bytes": (
        RESUME,
        checkpoint("learner/policy.safetensors", b"\0" * 7 + b"\x10" + b"{}"),
        [LAST, "safetensors"],
    ),
    "an end token that is a text": (
        SFT,
        changed("m/generation_config.json", eos_token_id=["x"]),
        ["m: eos_token_id", "['x']"],
    ),
    "a configuration that ends early": (SFT, written("m/config.json", '{\n"a": [1,'), ["m/config.json:2", "JSON"]),
    "a tokenizer configuration of numbers": (
        SFT,
        changed("m/tokenizer_config.json", added_tokens_decoder=3),
        ["m: the tokenizer", "tokenizer_config.json"],
    ),
    "a list for a number of heads": (
        ["plan", "sft", "--model", "m", "--gpus", "8"],
        changed("m/config.json", num_key_value_heads=[2]),
        ["m/config.json", "missing or of a wrong type"],
    ),
    "a list for a length": (
        SFT,
        changed("m/tokenizer_config.json", model_max_length=[2]),
        ["m: the tokenizer cannot be used"],
    ),
    "a text for the positions": (SFT, changed("m/config.json", max_position_embeddings="x"), ["m: "]),
    "a tokenizer that ends early": (SFT, written("m/tokenizer.json", "{"), ["m: the tokenizer"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_told_in_one_line(name: str, world: Path, tmp_path: Path) -> None:
    words, damage, fragments = DAMAGES[name]
    ended = told(world, tmp_path, words, damage)
    assert ended.status in (1, 2), ended.error
    one_message(ended.error.splitlines(keepends=True)[-1], fragments)
    assert "Traceback" not in ended.error


def test_a_manifest_cannot_name_files_outside_the_checkpoint(world: Path, tmp_path: Path) -> None:
    ended = told(world, tmp_path, RESUME, checkpoint("../outside", b"a"))
    assert ended.status == 1
    one_message(ended.error.splitlines(keepends=True)[-1], ["'../outside'", "not in the folder"])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"a": 1,\n"a": 2}', "'a' stands twice"),
        (b"[1]", ":1: .*an object, got list"),
        (b'{"a":\n}', ":2: "),
        (b'{\n"a": "\xff"}', ":2: .*utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_json_files_are_read_strictly(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=what):
        read_json(tmp_path / "a.json", CheckpointError)


def test_a_large_json_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.data.files.LARGEST_JSON", 10)
    (tmp_path / "a.json").write_text('{"a": 12345}')
    with pytest.raises(CheckpointError, match="more than 10 bytes"):
        read_json(tmp_path / "a.json", CheckpointError)
