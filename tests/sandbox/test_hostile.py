"""Hostile programs in the sandbox: each scores 0 with its reason, nothing outside changes, and the next call works."""

import json
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox.hostile import HOSTILE
from whet.rewards.verifiers.unit_tests import UnitTests, run
from whet.sandbox import outside

OPTIONS = UnitTests(cpu_time=1.0, timeout=30.0, memory=256)


def open_to_all(folder: Path, mode: int) -> None:
    """Let every user read a temporary folder and those above it, which pytest makes for one user."""
    root = Path(tempfile.gettempdir()).resolve()
    for one in (folder, *folder.parents):
        if one.resolve() == root or root not in one.resolve().parents:
            break
        one.chmod(mode)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret").write_text("secret")
    open_to_all(folder, 0o777)
    (folder / "secret").chmod(0o666)
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        port = server.getsockname()[1]
        abstract.bind(f"\0whet-test-{port}")
        abstract.listen()
        server.settimeout(0.05)
        abstract.settimeout(0.05)
        yield {
            "OUTSIDE": str(folder),
            "PORT": port,
            "VICTIM": victim.pid,
            "servers": (server, abstract),
            "process": victim,
        }
    victim.kill()
    victim.wait()


def judged(row: tuple[str, str, str, str], place: dict[str, Any]) -> tuple[str, float | None, str]:
    name, kind, code, expected = row
    options = replace(OPTIONS, timeout=3.0) if "more than 3 s" in expected else OPTIONS
    head = "".join(f"{one} = {place[one]!r}\n" for one in ("OUTSIDE", "PORT", "VICTIM"))
    tests: Any = ["assert f(2) == 4"] if kind == "call" else [{"input": "", "output": "right"}]
    verdict = run(head + code, tests, options=options)
    return name, verdict.score, verdict.reason


def settles(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether a condition holds within some seconds. Another test process may be using sandboxes at the same time."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.1)
    return condition()


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def confined() -> list[psutil.Process]:
    """The processes of users without rights."""
    found = [(one, one.info["uids"]) for one in psutil.process_iter(["uids"])]
    return [one for one, uids in found if uids and 60_000 <= uids.real < 65_000]


def listing(folder: str) -> list[tuple[str, float, int]]:
    return sorted((str(one), one.stat().st_mtime, one.stat().st_mode) for one in Path(folder).rglob("*"))


def test_hostile_programs_score_0_with_their_reason_and_nothing_outside_changes(
    place: dict[str, Any], monkeypatch: Any
) -> None:
    monkeypatch.setenv("WHET_TEST_KEY", "key")
    assert len(HOSTILE) >= 40
    assert outside.found_abilities() == outside.Abilities(True, True, True), (
        "this machine confines programs less than CI's"
    )
    before, family = listing(place["OUTSIDE"]), children()
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: judged(row, place), HOSTILE))
    wrong = [
        (name, score, reason, expected)
        for (name, score, reason), (*_, expected) in zip(found, HOSTILE, strict=True)
        if score != 0.0 or not re.fullmatch(expected, reason)
    ]
    assert not wrong
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 60
    assert listing(place["OUTSIDE"]) == before
    assert place["process"].poll() is None
    for server in place["servers"]:
        with pytest.raises(TimeoutError):
            server.accept()
    assert children() <= family
    assert settles(lambda: not confined())
    assert run("def f(x): return x * x", ["assert f(2) == 4"]).score == 1.0


def test_processes_of_a_program_are_killed_at_once_at_its_end(place: dict[str, Any]) -> None:
    daemon = "import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(20)\nprint('right')"
    began, family = time.monotonic(), children()
    assert run(daemon, [{"input": "", "output": "right"}]).score == 1.0
    assert time.monotonic() - began < 15
    assert children() <= family


def test_pairs_of_one_answer_do_not_meet_processes_of_the_last_one() -> None:
    code = "import os, time\nprint(len([1 for _ in range(6) if os.fork() or time.sleep(9)]))"
    pairs = [{"input": "", "output": "6"}] * 3
    assert run(code, pairs, options=UnitTests(processes=8)).score == 1.0


def test_the_run_that_is_killed_leaves_no_process_behind() -> None:
    code = (
        "import sys\nfrom whet.rewards.verifiers.unit_tests import run\nprint('go', flush=True)\n"
        "run('import time\\nprint(1, flush=True)\\ntime.sleep(60)', [{'input': '', 'output': '1'}])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"go\n"
        until = time.monotonic() + 30
        family: list[psutil.Process] = []
        while len(family) < 3 and time.monotonic() < until:  # launcher, process 1, program
            family = psutil.Process(owner.pid).children(recursive=True)
            time.sleep(0.02)
        assert len(family) >= 3
        owner.kill()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


ALONE = """
import json, sys
sys.path[:0] = {path!r}
from sandbox.hostile import HOSTILE
from whet.sandbox.outside import Abilities, Limits, Runner
runner = Runner(Limits(cpu_time=1.0, timeout=20.0, memory=256 << 20), Abilities(False, True, True))
head = {head!r}
found = {{}}
for name, kind, code, _ in HOSTILE:
    if name in {names!r}:
        if kind == "call":
            found[name] = runner.tests(head + code, ["assert f(2) == 4"], "", apart=True)[0]
        else:
            result = runner.programs(head + code, [""])[0]
            found[name] = result.reason or result.output.decode()
found["right"] = runner.tests("import csv\\ndef f(x): return x * x", ["assert f(2) == 4"], "", apart=True)[0]
print(json.dumps(found))
"""
WITHOUT = {
    "fork bomb": "BlockingIOError", "read a file outside": "PermissionError|FileNotFoundError", "connect to loopback": "PermissionError",
    "write a file outside": "PermissionError|FileNotFoundError", "abstract socket": "PermissionError", "kill the parent": "PermissionError",
    "read passwords": "PermissionError|FileNotFoundError", "environment of the parent": "PermissionError", "kill all": "PermissionError",
    "kill a process outside": "PermissionError", "execute another program": "PermissionError", "trace the parent": "PermissionError",
    "daemon in a session of its own": "DONE\n", "remove the working folder": "PermissionError", "memory": "MemoryError", "right": "",
    "exit before the tests": "the program ended", "one large file": "OSError", "namespace of its own": "PermissionError",
}  # fmt: skip
"""What programs get to see that run without namespaces."""


def test_landlock_and_seccomp_confine_where_there_are_no_namespaces(place: dict[str, Any], tmp_path: Path) -> None:
    head = "".join(f"{one} = {place[one]!r}\n" for one in ("OUTSIDE", "PORT", "VICTIM"))
    code = ALONE.format(
        path=[one for one in sys.path if one and not one.startswith(sys.base_prefix)], head=head, names=list(WITHOUT)
    )
    open_to_all(tmp_path, 0o755)
    python, mounted = tmp_path / "python", ""
    python.mkdir()
    own = Path(getattr(sys, "_base_executable", sys.executable)).resolve().relative_to(Path(sys.base_prefix).resolve())
    if os.getuid() == 0:  # Python may be in a folder of root's, which the user without rights cannot read
        mounted = f"mount --bind {sys.base_prefix} {python} && "
        command = ["unshare", "-m", "sh", "-c", f'{mounted}exec {python / own} -c "$0"', code]
    else:
        command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: found[name] for name in WITHOUT if not re.fullmatch(WITHOUT[name], found[name])} == {}
    assert place["process"].poll() is None
    assert os.listdir(place["OUTSIDE"]) == ["secret"]


def test_empty_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["true"]) as dead:
        pass
    kept = [tmp_path / f"{outside.FOLDER}{os.getpid()}-a", tmp_path / f"{outside.FOLDER}x-b", tmp_path / "other-1-c"]
    for one in (tmp_path / f"{outside.FOLDER}{dead.pid}-d", *kept):
        one.mkdir()
    (tmp_path / f"{outside.FOLDER}{dead.pid}-full").mkdir()
    (tmp_path / f"{outside.FOLDER}{dead.pid}-full" / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outside._sweep.__wrapped__()
    assert {one.name for one in tmp_path.iterdir()} == {one.name for one in kept} | {f"{outside.FOLDER}{dead.pid}-full"}
