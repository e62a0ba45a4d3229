"""`make oldest-newest`: the tests on the oldest and on the newest versions of the packages that pyproject.toml allows.

    python -m proof.versions [--only oldest] [--tests tests/ops ...]

Each has an environment of its own, `.venv-oldest` and `.venv-newest`, which is made anew when pyproject.toml changes. The
oldest versions are the lower bounds of the dependencies. torch is that of constraints.txt in both, since other versions
have no build for a CPU alone in every registry; so the lower bound of torch is not tried.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ("-n", "2", "--dist", "worksteal", "--ignore", "tests/engines")
"""How all tests are run, as `make test` does."""
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def dependencies() -> list[str]:
    """Return the dependencies in pyproject.toml, with their ranges."""
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


def bounds() -> dict[str, str]:
    """Return the lower bound of each dependency that has one, without torch."""
    found = (re.match(r"([\w-]+)>=([\w.]+)", one) for one in dependencies())
    return {one[1]: one[2] for one in found if one and one[1] != "torch"}


def constraints(which: str) -> str:
    """Return the text of the constraints of an environment."""
    torch = next(one for one in (ROOT / "constraints.txt").read_text().split() if one.startswith("torch=="))
    oldest = [f"{name}=={version}" for name, version in bounds().items()] if which == "oldest" else []
    return "\n".join([torch, *oldest]) + "\n"


def made(which: str) -> Path:
    """Make the environment if it is not there, and return its Python."""
    folder = ROOT / f".venv-{which}"
    python, ready, wanted = folder / "bin" / "python", folder / "ready", constraints(which)
    about = wanted + (ROOT / "pyproject.toml").read_text()
    if ready.is_file() and ready.read_text() == about:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    limits = folder / "constraints.txt"
    limits.write_text(wanted)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(limits)]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, "setuptools>=77", "wheel"], check=True)
    subprocess.run([*pip, "--no-build-isolation", "--editable", f"{ROOT}[dev]"], check=True)
    ready.write_text(about)
    return python


def main(given: Sequence[str] | None = None) -> None:
    """Run the tests in both environments. End with an error if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["oldest", "newest"], help="default: both")
    parser.add_argument("--tests", nargs="+", default=[], help="these tests alone")
    asked = parser.parse_args(given)
    failed = []
    for which in [asked.only] if asked.only else ["oldest", "newest"]:
        python = made(which)
        listed = [str(python), "-m", "pip", "list", "--format", "freeze"]
        versions = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()
        names = {*bounds(), "torch"}
        print(f"{which}:", *(one for one in versions if one.split("==")[0].lower() in names), flush=True)
        command = [str(python), "-m", "pytest", "-q", *TESTS, *asked.tests]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | ALONE, check=False)
        failed += [which] if done.returncode else []
    if failed:
        sys.exit(f"tests failed on the {' and the '.join(failed)} versions")


if __name__ == "__main__":
    main()
