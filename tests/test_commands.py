"""Every command that the documentation or `make help` names is run by a test, in a short form where it is long."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = {
    "benchmarks.growth": ["--short", "--only", "training", "group"],
    "benchmarks.generation": ["--short"],
    "benchmarks.head": ["--short"],
    "proof.fuzz": ["--count", "12", "--keep", "{out}/fuzz"],
    "proof.gpu": ["--device", "cpu", "--only", "a short learning run"],
    "proof.mutants": ["ops/value"],
    "proof.page": [],
    "proof.recorder": ["{out}/record.json", "--only", "sft", "dpo"],
    "proof.run": ["--only", "exact KL by enumeration", "--seeds", "1", "--out", "{out}/proof.json"],
    "proof.soak_local": [
        "--kills", "16", "--skip-operations", "--only", "sft, LoRA with dropout", "reward, K-way, standardized",
        "dpo, BCO, reference follows", "instructgpt, shared trunk, adaptive KL",
    ],
    "proof.vectors": [],
    "tests.planning.page": [],
    "whet.conformance": ["whet.ops"],
    "whet": ["--help"],
}  # fmt: skip
"""The modules that are run with `python -m`, with the words that make the command short."""
ELSEWHERE = {
    "proof.demo_seeds": "tests/demo/test_story.py",
    "proof.soak": "tests/engines/test_cluster.py",
    "benchmarks.gpu": "tests/test_benchmarks.py",
    "benchmarks.pairs": "tests/test_benchmarks.py",
    "benchmarks.pushes": "tests/engines/test_vllm.py",
    "benchmarks.real": "tests/test_benchmarks.py",
    "benchmarks.results": "tests/test_benchmarks.py",
    "proof.real": ".ci/run (make real-short)",
    "proof.versions": "tests/test_versions.py",
    "proof.wheel": ".ci/run (make wheel)",
    "pytest": "make test",
    "pip": "make test",
    "venv": "make test",
}
"""Modules that need other software or are what runs the tests: where they are run."""
TARGETS = {
    "demo": "tests/demo/test_story.py", "test": ".ci/run", "engines": ".ci/run", "lint": ".ci/run", "mutants": ".ci/run",
    "engines-long": ".ci/run runs its short form",
    "zoo": "make test runs its short form",
    "format": "ruff, as lint", "help": "this file", "clean": "rm",
}  # fmt: skip
"""Targets whose recipe is no module of `SHORT`: where they are run."""


def named(pattern: str) -> set[str]:
    return {found for page in PAGES for found in re.findall(pattern, page.read_text())}


def recipes() -> dict[str, str]:
    """The Makefile's targets with their recipes."""
    blocks = re.findall(r"^([a-z-]+):.*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return dict(blocks)


def test_every_module_that_is_named_is_run_by_a_test() -> None:
    assert named(r"python[0-9.]* -m ([a-z_][a-z_.]*[a-z_])") <= SHORT.keys() | ELSEWHERE.keys()


def test_every_target_that_is_named_exists_and_is_run_by_a_test() -> None:
    known = recipes()
    assert named(r"`?make ([a-z]+(?:-[a-z]+)*)[` \n]") - {"sure", "sense", "it", "an", "a"} <= known.keys()
    for target, recipe in known.items():
        modules = re.findall(r"python -m ([a-z_.]+)", recipe)
        assert target in TARGETS or (modules and all(one in SHORT or one in ELSEWHERE for one in modules)), target


@pytest.mark.parametrize("module", SHORT)
def test_the_command_runs(module: str, tmp_path: Path) -> None:
    words = [word.format(out=tmp_path) for word in SHORT[module]]
    before = {page: page.read_bytes() for page in (ROOT / "docs").rglob("*") if page.is_file()}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {page: page.read_bytes() for page in before} == before


def test_make_help_runs() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"make {target}" in done.stdout for target in recipes() if target not in ("help", "clean", "format"))
