"""Folders in shared memory for weights on their way: one per attempt, removed with it, and found and removed if it could not."""

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

from whet.data import Weights
from whet.data.files import shared_memory
from whet.distributed import Workers, host
from whet.generate.base import whole
from whet.learner.store import write

PREFIX = "whet-push-"
LOCK = "lock"
PART = 1 << 30
"""Bytes after which another file is begun: the writer holds no more than one."""


class PushFolders:
    """The pushes of one attempt: numbered folders, of which the newest two stay.

    The attempt's id is in the path, and nothing here makes the path again once it is gone: a worker of a lost attempt that
    lives on can only write where nobody reads. The lock says that the owner lives; `sweep` removes shelves without owner.
    """

    def __init__(self, attempt: str, name: str) -> None:
        sweep()
        self.folder = shared_memory() / f"{PREFIX}{attempt}-{name}"
        self.folder.mkdir()
        aside = self.folder / "locking"
        self._lock = aside.open("w")
        _locked(self._lock)
        aside.rename(self.folder / LOCK)  # only now may a sweep look at it

    def put(self, number: int, tensors: Iterator[tuple[str, Tensor]]) -> Path:
        """Write the tensors as push `number`. Raises FileNotFoundError when the shelf was removed."""
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
        """An empty folder in which push `number` is written."""
        aside = self.folder / f"{number}.writing"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        return aside

    def end(self, number: int) -> Path:
        """Push `number` is whole; those before the last one go."""
        final = self.folder / str(number)
        (self.folder / f"{number}.writing").rename(final)
        for old in self.folder.glob("[0-9]*"):
            if old.name.isdigit() and int(old.name) < number - 1:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


class WeightWriter:
    """A learner's weights laid on a shelf, whole, before any engine takes them.

    Gathering them is collective, while engines take them one by one, and one that was started again takes them once more:
    so all workers lay them down together, and engines read. The first worker writes; with `everywhere` the first one of each
    machine does.
    """

    def __init__(self, workers: Workers, attempt: str, *, adapter: bool, everywhere: bool) -> None:
        self.workers, self.adapter, self.number = workers, adapter, 0
        self.folder = shared_memory() / f"{PREFIX}{attempt}-learner"
        machines = workers.gather(host())
        writes = machines.index(machines[workers.rank]) == workers.rank if everywhere else workers.first
        self.shelf = PushFolders(attempt, "learner") if writes else None

    def __call__(self, role: Any, number: int | None = None) -> Path:
        """Where the role's weights of now are, or its adapter alone."""
        self.number = self.number + 1 if number is None else number
        aside = self.shelf.begin(self.number) if self.shelf else Path(os.devnull)
        if self.adapter:
            role.export(aside, None, merge=False, write=self.shelf is not None)
            if self.shelf:
                self.shelf.end(self.number)
        elif self.shelf:
            self.shelf.put(self.number, ((name, value.detach()) for name, value in role.whole()))
        else:
            for _ in role.whole():  # gathering is collective
                pass
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # an engine that slept on this GPU wakes for these weights
        self.workers.barrier()
        return self.folder / str(self.number)

    def close(self) -> None:
        """Remove what is there."""
        if self.shelf:
            self.shelf.close()


def contents(handle: Any) -> dict[str, bytes]:
    """The files of a pushed folder, or of a folder made of what another handle gives."""
    if isinstance(handle, (str, Path)):
        return {path.name: path.read_bytes() for path in sorted(Path(handle).iterdir()) if path.is_file()}
    with tempfile.TemporaryDirectory(dir=shared_memory()) as folder:
        _written(Path(folder), "weights", whole(Weights(0, handle)))
        return contents(folder)


@contextmanager
def unpacked(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A folder with these files, which goes with the context."""
    shelf = PushFolders(secrets.token_hex(8), "files")
    try:
        aside = shelf.begin(0)
        for name, content in files.items():
            (aside / name).write_bytes(content)
        yield shelf.end(0)
    finally:
        shelf.close()


def remove(attempt: str) -> None:
    """Every shelf of an attempt on this machine."""
    for folder in shared_memory().glob(f"{PREFIX}{attempt}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def sweep() -> None:
    """Remove the shelves on this machine whose owner is gone."""
    for lock in shared_memory().glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError), lock.open("w") as file:
            _locked(file)
            shutil.rmtree(lock.parent, ignore_errors=True)


def _written(folder: Path, name: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for error in write(folder, name, tensors, Workers()):
        raise error


def _locked(file: Any) -> None:
    """Take the lock, which the system drops when this process ends. Raises OSError where another process has it."""
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
