"""Processes of this and other machines: their identity, whether they run, and their end. With psutil."""

import hashlib
import os
import re
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from whet.private import private_folder, remove_owned


def host() -> str:
    """Return an id of this machine, or of this container on it, which changes when the machine is restarted."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"


@dataclass(frozen=True)
class Process:
    """A process, identified by machine, process id and start time in seconds since the boot of the machine (0 if it did not
    run). A process id alone can be reused by a later process."""

    host: str
    pid: int
    began: float

    @classmethod
    def of(cls, pid: int) -> "Process":
        """Return the process that has this id on this machine now."""
        return cls(host(), pid, _began(pid))

    @property
    def alive(self) -> bool:
        """True if the process runs on this machine. A zombie process counts as ended."""
        return self.host == host() and self.began > 0 and abs(_began(self.pid) - self.began) < 0.5

    def kill(self) -> None:
        """Kill the process if it is on this machine. This also ends an orphan process that Ray no longer knows."""
        if self.alive:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                psutil.Process(self.pid).kill()


def _began(pid: int) -> float:
    """Return the start time of a process, in seconds since the boot, or 0 if it does not run."""
    try:
        found = psutil.Process(pid)
        # both times contain the clock's time of the boot, which changes when the clock is set
        return 0.0 if found.status() == psutil.STATUS_ZOMBIE else found.create_time() - psutil.boot_time()
    except psutil.NoSuchProcess:
        return 0.0


def descendants(pid: int) -> list[Process]:
    """Return a process and all its descendants on this machine; none if it has ended."""
    try:
        root = psutil.Process(pid)
        return [Process.of(one.pid) for one in (root, *root.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def end(processes: Sequence[Process], seconds: float) -> None:
    """Wait `seconds` for the processes to end, then kill the others and wait until they have ended (at most 5 s)."""
    for grace, last in ((seconds, False), (5.0, True)):
        until = time.monotonic() + grace
        while any(one.alive for one in processes) and time.monotonic() < until:
            time.sleep(0.02)
        for one in () if last else processes:
            one.kill()


def engine_folder(root: Path) -> Path:
    """Create a private folder of this process in `root`. This user's folders of processes that have ended without removing
    them are removed."""
    # the processes of other machines and containers are not known here
    machine = hashlib.sha256(host().encode()).hexdigest()[:8]
    for old in root.glob(f"whet-engine-{machine}-*"):
        owner = re.match(r"(\d{1,9})-(\d{1,12}\.\d{2})-", old.name.removeprefix(f"whet-engine-{machine}-"), re.ASCII)
        if owner and not Process(host(), int(owner[1]), float(owner[2])).alive:
            remove_owned(old)
    own = Process.of(os.getpid())
    return private_folder(root, f"whet-engine-{machine}-{own.pid}-{own.began:.2f}-")


def watch(owner: int) -> None:
    """Wait until the process `owner` has ended, then kill the processes between it and this one, and this one.

    If it is not an ancestor (it may have ended already), only this process is killed.
    """
    whose, parents = Process.of(owner), psutil.Process().parents()
    place = next((number for number, one in enumerate(parents) if one.pid == owner), 0)
    while whose.alive:
        time.sleep(1.0)
    for one in (*parents[:place], psutil.Process()):
        with suppress(psutil.Error):
            one.kill()
