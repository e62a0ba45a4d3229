"""`make oldest-newest`: the versions that its environments have, and that a failure in one ends it with an error."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from proof import versions

ROOT = Path(__file__).parent.parent


def test_the_oldest_versions_are_the_lower_bounds_of_the_dependencies() -> None:
    text = versions.constraints("oldest").splitlines()
    (torch,) = [one for one in text if one.startswith("torch==")]
    assert torch in (ROOT / "constraints.txt").read_text().splitlines()
    found = dict(one.split("==") for one in text if one != torch)
    assert {"transformers", "peft", "numpy", "pyarrow", "tokenizers", "safetensors"} <= found.keys()
    for requirement in map(Requirement, versions.dependencies()):
        if requirement.name == "torch":
            continue
        lower = Version(found[requirement.name])
        assert lower in requirement.specifier
        assert min(Version(one.version) for one in requirement.specifier if one.operator == ">=") == lower
    assert versions.constraints("newest") == f"{torch}\n"


@pytest.mark.parametrize(("failing", "told"), [("", ""), ("oldest", "the oldest"), ("newest", "the newest")])
def test_both_run_and_a_failure_is_told(
    failing: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[list[str]] = []

    def fake(command: list[str], **_: Any) -> Any:
        run.append(command)
        wrong = "pytest" in command and bool(failing) and failing in command[0]
        return SimpleNamespace(returncode=int(wrong), stdout="torch==1\nnumpy==2\n")

    monkeypatch.setattr(versions, "made", lambda which: tmp_path / f".venv-{which}" / "bin" / "python")
    monkeypatch.setattr(subprocess, "run", fake)
    if failing:
        with pytest.raises(SystemExit, match=told):
            versions.main([])
    else:
        versions.main([])
    tests = [one for one in run if "pytest" in one]
    assert [".venv-oldest" in one[0] for one in tests] == [True, False]
    assert all(one[-len(versions.TESTS) :] == [*versions.TESTS] for one in tests)


def test_an_environment_is_made_again_when_the_requirements_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[list[str]] = []
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=2", "numpy>=2"]\n')
    (tmp_path / "constraints.txt").write_text("numpy==2.1\ntorch==2.13.0\n")
    monkeypatch.setattr(versions, "ROOT", tmp_path)

    def fake(command: list[str], **_: Any) -> Any:
        run.append(command)
        (tmp_path / ".venv-oldest").mkdir(exist_ok=True)

    monkeypatch.setattr(subprocess, "run", fake)
    assert versions.made("oldest") == tmp_path / ".venv-oldest" / "bin" / "python"
    assert (tmp_path / ".venv-oldest" / "constraints.txt").read_text() == "torch==2.13.0\nnumpy==2\n"
    assert len(run) == 4
    versions.made("oldest")
    assert len(run) == 4
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=2", "numpy>=2.2"]\n')
    versions.made("oldest")
    assert len(run) == 8
