"""`make wheel`: the wheel in an environment of its own, used as somebody does who has no checkout.

The wheel is built from the tracked files, and installed with constraints.txt into a new environment in a temporary folder.
The command, every module and the short demo run there, from another folder. `make pythons` does the same for every supported
Python that this machine has, and runs a part of the tests on each. Linux and macOS; a Python is found as `python3.X` on the
PATH or among those of pyenv.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTS = ("tests/ops", "tests/data", "tests/test_house.py", "tests/cli/test_help.py")
"""The tests that run on each Python."""
FOR_TESTS = ("pytest", "hypothesis", "scipy", "datasets", "pyyaml")
MODULES = """
import importlib, pkgutil, sys, whet
names = [one.name for one in pkgutil.walk_packages(whet.__path__, "whet.") if not one.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(len(names), *sorted({getattr(one, "__file__", None) or "" for one in sys.modules.values()}), sep="\\n")
"""
"""Imports every module of whet, and prints their number and the files of all modules."""


def supported() -> list[str]:
    """The versions of Python that the classifiers name, such as "3.11"."""
    return [found[1] for one in PROJECT["classifiers"] if (found := re.fullmatch(r"Programming .* (3\.\d+)", one))]


def pythons() -> dict[str, str]:
    """The programs of the supported versions that are on this machine."""
    found = {}
    for name in supported():
        own = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        programs = [f"python{name}", *map(str, sorted(own.glob(f"{name}.*/bin/python"), reverse=True))]
        for program in programs:
            path = shutil.which(program)
            asked = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
            if path and subprocess.run([path, "-c", asked], capture_output=True, text=True).stdout.strip() == name:
                found[name] = path
                break
    return found


def tracked() -> list[str]:
    """The tracked files of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [one for one in listed.split("\0") if one and (ROOT / one).is_file()]


def built(folder: Path) -> Path:
    """Build the wheel from a copy of the tracked files, since a `build` folder can have files of earlier versions. It must hold
    the tracked files of the package, and nothing else."""
    names = tracked()
    for name in names:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    wheel = next(folder.glob("whet-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        inside = {one for one in archive.namelist() if ".dist-info/" not in one}
    wanted = {one.removeprefix("src/") for one in names if one.startswith("src/whet/")}
    expect(inside == wanted, f"the wheel differs from the tracked files in {sorted(inside ^ wanted)}")
    return wheel


def expect(holds: bool, otherwise: str) -> None:
    """End the program with a message if a check does not hold."""
    if not holds:
        sys.exit(f"make wheel: {otherwise}")


class Place:
    """A new environment with the wheel, and an empty folder from which its commands run."""

    def __init__(self, folder: Path, python: str) -> None:
        self.bin, self.away = folder / "venv" / "bin", folder / "away"
        self.away.mkdir(parents=True)
        left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.environment = {name: value for name, value in os.environ.items() if name not in left_out}
        subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)

    def install(self, *what: str) -> None:
        """Install with the versions of constraints.txt."""
        pip = [str(self.bin / "python"), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, *what], check=True, cwd=self.away)

    def run(self, *words: str, cwd: Path | None = None, status: int = 0) -> str:
        """Run a program of the environment and return what it prints: of one that is refused, with status 2, its errors."""
        done = subprocess.run(
            [str(self.bin / words[0]), *words[1:]],
            cwd=cwd or self.away, env=self.environment, capture_output=True, text=True,
        )  # fmt: skip
        expect(done.returncode == status, f"{' '.join(words)[:60]}: {done.stdout[-2000:]}\n{done.stderr[-3000:]}")
        return done.stderr if status else done.stdout


def check(place: Place) -> None:
    """What an installed wheel must be able to do."""
    said = f"whet {PROJECT['version']}\n"
    expect(place.run("whet", "--version") == said, "whet --version tells another version")
    expect(place.run("python", "-m", "whet", "--version") == said, "python -m whet tells another version")
    expect("usage: whet VERB" in place.run("whet", "--help"), "whet --help tells no usage")
    count, *files = place.run("python", "-c", MODULES).split("\n")
    foreign = [one for one in files if one and Path(one).is_relative_to(ROOT)]
    expect(not foreign, f"imported from the checkout: {foreign[:3]}")
    modules = [one for one in tracked() if re.fullmatch(r"src/whet/.*\.py", one)]
    expect(int(count) == len(modules) - 2, f"{count} modules imported")  # without whet itself and __main__
    place.run("whet", "demo", "--quick", "--out", "demo")
    page, numbers = place.away / "demo" / "report.html", json.loads((place.away / "demo" / "summary.json").read_text())
    expect(page.stat().st_size > 10_000 and "</html>" in page.read_text(), "the report of the demo is not whole")
    expect(numbers["seconds"] > 0 and len(numbers) > 3, f"summary.json has only {list(numbers)}")
    given = ["--model", "demo/sft/model", "--data", "demo/world/demonstrations.jsonl", "--out", "lacking"]
    lacking = place.run("whet", "sft", *given, "--trackers", "[tensorboard]", status=2)
    expect(re.fullmatch(r"whet: trackers: .* not installed; pip install .*\n", lacking) is not None, lacking)
    expect(not (place.away / "lacking").exists(), "a refused run has a folder")


def tried(name: str, python: str, folder: Path, wheel: Path, *, tests: bool) -> str:
    """Install the wheel for one Python, run everything, and return a line that says what it took."""
    began, place = time.perf_counter(), Place(folder, python)
    place.install("torch")
    place.install(str(wheel))
    size = sum(one.lstat().st_size for one in folder.rglob("*")) / 2**20
    installed = time.perf_counter()
    check(place)
    told = f"Python {name}: installed in {installed - began:.0f} s ({size:.0f} MB), runs ({time.perf_counter() - installed:.0f} s)"
    if tests:
        place.install(*FOR_TESTS)
        passed = place.run("python", "-m", "pytest", "-q", *TESTS, cwd=ROOT).strip().split("\n")[-1]
        told += f", tests: {passed}"
    return told


def main(argv: Sequence[str] | None = None) -> int:
    """Build, install and try the wheel: with this Python, or with all supported ones and their tests (`--pythons`)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pythons", action="store_true", help="every supported Python of this machine, with tests")
    given = parser.parse_args(argv)
    here = {f"{sys.version_info[0]}.{sys.version_info[1]}": sys.executable}
    programs = pythons() if given.pythons else here
    with tempfile.TemporaryDirectory(prefix="whet-wheel-") as temporary:
        wheel = built(Path(temporary))
        print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} KB", flush=True)
        failed = 0
        for name, python in programs.items():
            try:
                print(tried(name, python, Path(temporary) / name, wheel, tests=given.pythons), flush=True)
            except SystemExit as error:  # the other versions are tried all the same
                print(f"Python {name}: {error}", flush=True)
                failed += 1
            shutil.rmtree(Path(temporary) / name)
    missing = [one for one in supported() if one not in programs]
    if given.pythons and missing:
        print(f"not on this machine: Python {', '.join(missing)}")
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{spent.ru_utime + spent.ru_stime:.0f} CPU seconds")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
