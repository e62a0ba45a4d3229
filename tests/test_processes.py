"""The identity of processes holds when the clock is set, and a watcher never kills strangers."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from whet import processes
from whet.processes import Process, descendants, end


@pytest.fixture
def child() -> Iterator[subprocess.Popen]:
    with subprocess.Popen(["sleep", "60"]) as one:
        yield one
        one.kill()


def test_a_process_is_alive_after_the_clock_was_set(child: subprocess.Popen, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Process.of(child.pid)
    real, boot = psutil.Process.create_time, psutil.boot_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 3600)
    monkeypatch.setattr(psutil, "boot_time", lambda: boot() + 3600)
    assert one.alive
    assert Process.of(child.pid).alive


def test_a_killed_process_and_its_children_have_ended(child: subprocess.Popen) -> None:
    found = descendants(child.pid)
    assert [one.pid for one in found] == [child.pid]
    end(found, 0.0)
    assert not found[0].alive
    child.wait()
    assert descendants(child.pid) == []
    assert not Process.of(child.pid).alive


def test_a_watcher_whose_owner_is_gone_kills_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(psutil.Process, "kill", lambda self: killed.append(self.pid))
    with subprocess.Popen(["true"]) as owner:
        owner.wait()
    processes.watch(owner.pid)
    assert killed == [os.getpid()]


def test_a_watcher_kills_what_is_between_it_and_its_owner() -> None:
    inner = "import sys; from whet.processes import watch; print('up', flush=True); watch(int(sys.argv[1]))"
    middle = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}, sys.argv[1]])"
    outer = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {middle!r}, str(os.getpid())])"
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "up\n"
        found = descendants(run.pid)
        assert len(found) == 3
        found[0].kill()
        until = time.monotonic() + 20
        while any(one.alive for one in found) and time.monotonic() < until:
            time.sleep(0.1)
        assert not any(one.alive for one in found)


def test_a_folder_of_a_process_that_was_killed_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from whet.processes import engine_folder\n"
        "print(engine_folder(Path(sys.argv[1])), flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    left = Path(done.stdout.strip())
    (tmp_path / "whet-engine-00000000-1-1.00-x").mkdir()  # of another machine
    assert left.is_dir()
    own, other = (processes.engine_folder(tmp_path) for _ in range(2))
    assert own.is_dir()
    assert other.is_dir()
    assert not left.exists()
    assert (tmp_path / "whet-engine-00000000-1-1.00-x").is_dir()
