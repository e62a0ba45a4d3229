"""YAML with two readings, YAML that grows without bound, and numbers without a sane size: one line, at once."""

import os
from pathlib import Path
from typing import Any

import pytest
import tiny

from proof.limits import limited
from whet.cli.main import main
from whet.runs.yaml_text import NotYaml, parsed

from .helpers import one_message, whet

ALIASES = "a: &a0 [x, x]\n" + "".join(f"b{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 27))
REFUSED: dict[str, tuple[str, list[str]]] = {
    "a name that stands twice": ("out: a\nseed: 1\nout: b\n", [":3: ", "'out'", "twice", "first on line 1"]),
    "a name that stands twice inside": ("train: {batch_size: 1, batch_size: 2}\n", [":1: ", "'batch_size'", "twice"]),
    "a leading zero": ("out: a\nseed: 010\n", [":2: ", "010", "base 8", 'write 10 or "010"']),
    "a leading zero that is no octal": ("seed: 09\n", [":1: ", "09", 'write 9 or "09"']),
    "a negative number": ("seed: -07\n", ["write -7 or"]),
    "a leading zero before a point": ("optim: {lr: 00.5}\n", ["write 0.5 or"]),
    "base 60": ("seed: 12:30:45\n", [":1: ", "12:30:45", "base 60"]),
    "aliases of aliases": (ALIASES, ["more than 20000 values", "alias"]),
    "an alias inside itself": ("trackers: &a [*a]\n", [":1: ", "*a", "inside"]),
    "deep lists": ("trackers: " + "[" * 100_000, [":1: ", "more than 50"]),
    "deep mappings": ("trackers: " + "{a: " * 100_000, [":1: ", "more than 50"]),
    "many values": ("trackers:\n" + "- 1\n" * 100_000, ["more than 20000 values"]),
    "a tag": ("out: !!python/object/apply:os.system [ls]\n", [":1: ", "tags are not read", "os.system"]),
    "a tag of a text": ("out: !mine a\n", ["tags are not read"]),
    "a name that is a number": ("1: 2\n", [":1: ", "'1'", "not text"]),
    "a name that is a list": ("? [a]\n: 1\n", [":1: ", "not valid YAML"]),
    "a NUL": ("out: a\nx: \0\n", [":2: ", "not valid YAML", "'\\x00'"]),
    "two documents": ("out: a\n---\nout: b\n", ["not valid YAML", "document"]),
    "a number of 5000 digits": ("seed: " + "9" * 5000 + "\n", [":1: ", "5000 characters"]),
    "a file that is too large": ("# " + "x" * (1 << 20), ["at most 1048576 bytes"]),
    "a list": ("- 1\n", ["mapping of fields", "list"]),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny.folder(home / "m")
    tiny.write_jsonl(home / "sft.jsonl", [{"prompt": "hello a", "completion": "yes b c"}] * 4)
    return home


@pytest.mark.parametrize("name", REFUSED)
def test_yaml_is_refused_with_its_line_at_once(name: str, tmp_path: Path) -> None:
    text, fragments = REFUSED[name]
    (tmp_path / "recipe.yaml").write_text(text)
    ended = limited(lambda: main(["sft", "recipe.yaml"]), tmp_path, seconds=10, mebibytes=512)
    assert (ended.status, ended.out) == (2, "")
    one_message(ended.error, ["recipe.yaml", *fragments])


READ: dict[str, Any] = {
    "1_000": 1000, "0x1f": 31, "0": 0, "-3": -3, "0.5": 0.5, "1e-5": "1e-5", ".inf": float("inf"), "yes": True,
    "off": False, "~": None, "": None,
    "2026-11-02": "2026-11-02", "'010'": "010", '"12:30"': "12:30", "12:99": "12:99", "=": "=", "a:b": "a:b", "0a": "0a",
    "[&a 1, *a]": [1, 1], "{a: &x {b: 1}, c: {<<: *x, d: 2}}": {"a": {"b": 1}, "c": {"b": 1, "d": 2}}, "|\n  010\n": "010\n",
}  # fmt: skip


@pytest.mark.parametrize("text", READ)
def test_what_is_read_as_before(text: str) -> None:
    assert parsed(f"x: {text}") == {"x": READ[text]}


def test_the_expanded_size_of_aliases_counts_and_not_their_number() -> None:
    parsed("[&a 1" + ", *a" * 10_000 + "]")
    with pytest.raises(NotYaml, match="20000"):
        parsed("[&a [1, 1, 1]" + ", *a" * 10_000 + "]")


WORDS: dict[str, tuple[list[str], list[str]]] = {
    "inf": (["--optim.lr", "inf"], ["optim.lr", "inf"]),
    "nan": (["--optim.lr", ".nan"], ["optim.lr", "nan"]),
    "1e9999": (["--optim.lr", "1e9999"], ["optim.lr", "out of range", "1e9999"]),
    "1e300": (["--optim.lr", "1e300"], ["optim.lr", "at most 1e+30", "1e+300"]),
    "an infinite weight": (["--optim.weight-decay", "inf"], ["optim.weight_decay", "inf"]),
    "a negative infinity of the norm": (["--optim.max-grad-norm", "-inf"], ["optim.max_grad_norm"]),
    "a decay of 1": (["--optim.betas", "[0.9, 1.0]"], ["optim.betas", "< 1"]),
    "a leading zero": (["--train.batch-size", "010"], ["--train.batch-size", "two readings"]),
    "base 60": (["--train.save-minutes", "1:30"], ["--train.save-minutes", "two readings"]),
    "a name twice": (["--train", "{batch_size: 1, batch_size: 2}"], ["--train", "'batch_size'", "twice"]),
    "a million threads": (["--threads", "1000000"], ["threads", "4096", "1000000"]),
    "more threads than CPUs": (["--threads", str(min(4096, 64 + 4 * (os.cpu_count() or 1)))], ["threads", "CPUs"]),
    "a billion steps": (["--train.num-steps", "1000000000"], ["train.num_steps", "99999999", "1000000000"]),
    "a billion epochs": (["--train.num-epochs", "1e9"], ["train.num_epochs", "99999999"]),
    "a rank beyond every matrix": (["--model.lora.rank", "1000"], ["model.lora.rank", "above 32", "1000"]),
    "a rank of a million": (["--model.lora.rank", "1000000"], ["model.lora.rank", "65536", "1000000"]),
    "a batch of a billion": (["--train.batch-size", "1000000000"], ["train.batch_size", "1000000"]),
    "a seed of 70 bits": (["--seed", str(2**70)], ["seed", str(2**70)]),
    "an integer of 100 digits": (["--seed", "9" * 100], ["seed"]),
    "a microbatch of 2**40": (["--train.max-tokens-per-micro-batch", str(2**40)], ["max_tokens_per_micro_batch"]),
    "ten thousand learners": (["--cluster.learners", "10001"], ["cluster.learners", "10000"]),
    "a timer beyond Python's": (["--cluster.timeout", "1e10"], ["cluster.timeout"]),
    "a tracker that never prints": (["--trackers", "[{name: console, every: 0}]"], ["trackers.every", ">= 1"]),
}


@pytest.mark.parametrize("name", WORDS)
def test_a_number_without_a_sane_size_is_refused_at_once(name: str, home: Path, tmp_path: Path) -> None:
    words, fragments = WORDS[name]
    given = ["sft", "--model", f"{home}/m", "--data", f"{home}/sft.jsonl", "--out", "out", "--quiet", *words]
    ended = limited(lambda: main(given), tmp_path, seconds=20, mebibytes=1024)
    assert (ended.status, ended.out) == (2, ""), ended.error
    one_message(ended.error, fragments)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_run_of_the_largest_length_begins_at_once(home: Path, tmp_path: Path) -> None:
    """It is stopped in its first steps, by the limit of CPU time: the order of 99,999,999 batches is never built."""
    given = [
        "sft",
        "--model",
        f"{home}/m",
        "--data",
        f"{home}/sft.jsonl",
        "--out",
        "out",
        "--quiet",
        "--train.num-steps",
        "99999999",
    ]
    ended = limited(lambda: main([*given, "--threads", "1"]), tmp_path, seconds=6, mebibytes=1024)
    assert ended.status < 0
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) > 5


def test_no_norm_is_still_no_clipping(home: Path, tmp_path: Path, capsys: Any) -> None:
    given = [
        "--model",
        home / "m",
        "--data",
        home / "sft.jsonl",
        "--out",
        tmp_path / "out",
        "--quiet",
        "--train.num-steps",
        "1",
    ]
    assert whet(capsys, "sft", *given, "--optim.max-grad-norm", ".inf").status == 0


def test_a_long_value_is_shown_in_part(capsys: Any) -> None:
    said = whet(capsys, "sft", "--seed", "x" * 50_000)
    one_message(said.error, ["seed", "xxx ... xxx"])
    assert len(said.error) < 2100
