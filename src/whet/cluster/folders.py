"""Folders in shared memory for weight updates: removed when their attempt ends, or by a later cleanup."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.data import HasWeights, Weights
from whet.data.files import shared_memory
from whet.distributed import Workers
from whet.generate.base import whole
from whet.learner.store import write
from whet.private import opened, private_folder, remove_owned
from whet.processes import host

PREFIX = "whet-push-"
LOCK = "lock"
PART = 1 << 30
"""Size in bytes at which the writer starts a new file. The writer holds at most one file in memory."""


class PushFolders:
    """The weight updates of one attempt, each in a numbered folder. The newest two are kept.

    Only this user can enter the folder. Its name contains the id of the attempt and random characters, and a removed path
    is never created again. So a worker that is still running after its attempt was lost cannot write to a folder that
    another attempt reads. The owner holds a file lock while it runs; `sweep` removes folders whose lock is free.
    """

    def __init__(self, attempt: str, name: str) -> None:
        sweep()
        self.folder = private_folder(shared_memory(), f"{PREFIX}{attempt}-{name}-")
        aside = self.folder / "locking"
        self._lock = aside.open("x")
        _locked(self._lock)
        aside.rename(self.folder / LOCK)  # `sweep` sees the folder only from here on, when the lock is held

    def put(self, number: int, tensors: Iterator[tuple[str, Tensor]]) -> Path:
        """Write the tensors as weight update `number`. Raises FileNotFoundError if the folder was removed."""
        aside = self.begin(number)
        part: list[tuple[str, Tensor]] = []
        size = count = 0
        for name, value in tensors:
            part.append((name, value))
            size += value.numel() * value.element_size()
            if size >= PART:
                _written(aside, f"weights-{count:05d}", part)
                part, size, count = [], 0, count + 1
        if part:
            _written(aside, f"weights-{count:05d}", part)
        return self.end(number)

    def begin(self, number: int) -> Path:
        """Create an empty folder into which weight update `number` is written."""
        aside = self.folder / f"{number}.writing"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        return aside

    def end(self, number: int) -> Path:
        """Mark weight update `number` as complete, and remove all but it and the one before."""
        final = self.folder / str(number)
        (self.folder / f"{number}.writing").rename(final)
        for old in self.folder.glob("[0-9]*"):
            if old.name.isdigit() and int(old.name) < number - 1:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def close(self) -> None:
        """Remove the folder and release the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


class WeightWriter:
    """Write a learner's complete weights to shared memory before any engine loads them.

    It is needed if several workers gather the weights together, if several engines read the same files, or if an engine that
    is restarted must load weights that the learner has changed since. Rank 0 writes; with `everywhere` the first worker of
    each machine writes.
    """

    def __init__(self, workers: Workers, attempt: str, *, adapter: bool, everywhere: bool) -> None:
        self.workers, self.adapter, self.number = workers, adapter, 0
        machines = workers.gather(host())
        writer = machines.index(machines[workers.rank]) if everywhere else 0
        self.folders: PushFolders | None = None

        def create() -> Path | None:
            if writer == workers.rank:
                self.folders = PushFolders(attempt, "learner")
            return self.folders.folder if self.folders else None

        folder = workers.together(create)[writer]
        assert folder is not None
        self.folder = folder

    def __call__(self, role: Any, number: int | None = None) -> Path:
        """Write the role's current weights, or only its adapter, and return their folder."""
        self.number = self.number + 1 if number is None else number
        if self.adapter:
            aside = self.folders.begin(self.number) if self.folders else Path(os.devnull)
            role.export(aside, None, merge=False, write=self.folders is not None)
            if self.folders:
                self.folders.end(self.number)
        elif self.folders:
            self.folders.put(self.number, ((name, value.detach()) for name, value in role.whole()))
        else:
            for _ in role.whole():  # gathering is collective
                pass
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # a sleeping engine on this GPU needs the memory when it wakes to load these weights
        self.workers.barrier()
        return self.folder / str(self.number)

    def close(self) -> None:
        """Remove the written folders."""
        if self.folders:
            self.folders.close()


def contents(handle: HasWeights | Path) -> dict[str, bytes]:
    """Return file name -> content of a weight update. A handle that is not a folder is first written to one."""
    if isinstance(handle, Path):
        return {path.name: path.read_bytes() for path in sorted(handle.iterdir()) if path.is_file()}
    with tempfile.TemporaryDirectory(dir=shared_memory()) as folder:
        _written(Path(folder), "weights", whole(Weights(0, handle)))
        return contents(Path(folder))


@contextmanager
def unpacked(files: Mapping[str, bytes]) -> Iterator[Path]:
    """Write these files to a temporary folder and yield it. The folder is removed when the context exits."""
    folders = PushFolders(secrets.token_hex(8), "files")
    try:
        aside = folders.begin(0)
        for name, content in files.items():
            (aside / name).write_bytes(content)
        yield folders.end(0)
    finally:
        folders.close()


def remove(attempt: str) -> None:
    """Remove every folder of an attempt on this machine."""
    for folder in shared_memory().glob(f"{PREFIX}{attempt}-*"):
        remove_owned(folder)


def sweep() -> None:
    """Remove this user's folders on this machine whose owner process has ended."""
    for folder in shared_memory().glob(f"{PREFIX}*"):
        with suppress(OSError), opened(folder, LOCK) as file:
            _locked(file)
            remove_owned(folder)


def _written(folder: Path, name: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for error in write(folder, name, tensors, Workers()):
        raise error


def _locked(file: Any) -> None:
    """Take the lock, which the system releases when this process ends. Raises OSError if another process holds it."""
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
