"""Checkpoints: written aside, checksummed, renamed into place; read back only when whole. Safetensors and JSON, no pickle."""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from whet.data.files import write_json
from whet.errors import CheckpointError, WhetError, WorkerDied
from whet.learner import Learner
from whet.loops.interrupt import Stop

MANIFEST = "manifest.json"
ASIDE = ".writing-"


def save(folder: Path, step: int, learner: Learner, loop: Mapping[str, Any], *, keep: int = 2) -> Path:
    """The checkpoint `folder/step-00000042`: the learner's state and the loop's small one. The newest `keep` stay.

    Each attempt writes into a folder of its own that nobody else knows the name of, and the first worker alone renames
    it: a worker of a lost machine that lives on cannot touch what is good. Raises CheckpointError, on every worker, when
    it cannot be written (a full disk); the last good checkpoint is untouched then.
    """
    workers, final = learner.workers, folder / f"step-{step:08d}"
    aside = folder / workers.broadcast(f"{ASIDE}{step:08d}-{secrets.token_hex(4)}")
    try:
        workers.together(lambda: _begin(folder, aside) if workers.first else None)
        workers.together(lambda: learner.save(aside / "learner"))
        workers.together(lambda: _commit(aside, final, loop) if workers.first else None)
    except WorkerDied:  # a worker, not the disk
        shutil.rmtree(aside, ignore_errors=True)
        raise
    except Exception as error:  # OSError from the file system, SafetensorError for the same cause from safetensors
        shutil.rmtree(aside, ignore_errors=True)
        good = latest(folder)
        left_over = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
        raise CheckpointError(
            f"{final}: the checkpoint could not be written ({error}); {left_over}, continue with --resume"
        ) from error
    if workers.first:
        for old in _all(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _begin(folder: Path, aside: Path) -> None:
    for left in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)


def _commit(aside: Path, final: Path, loop: Mapping[str, Any]) -> None:
    """The loop's state and the checksums are written, all is on the disk, and the folder gets its name."""
    for part in (aside / "learner").glob("*-of-*.safetensors"):
        name, _, count = part.stem.rpartition("-of-")
        every = list(part.parent.glob(f"{name[:-5]}[0-9]*-of-{count}.safetensors"))
        if len(every) != int(count):
            raise OSError(
                f"{part.parent}: {len(every)} of {int(count)} parts are here; do all machines see this folder?"
            )
    write_json(aside / "loop.json", dict(loop))
    sums = {str(path.relative_to(aside)): _sum(path) for path in sorted(aside.rglob("*")) if path.is_file()}
    write_json(aside / MANIFEST, sums)
    for path in [*(aside / name for name in sums), aside / MANIFEST, aside / "learner", aside]:
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _sync(final.parent)


class Keeper:
    """Saves a run when it is time, at its end, when a stop is asked for, and when a step fails before any weight moved.

    Use as a context manager around the steps; `state` is what the loop wants back, without its step.
    """

    def __init__(
        self, folder: Path, learner: Learner, *, every: int, total: int, keep: int, first: int, stop: Stop | None
    ) -> None:
        self.folder, self.learner, self.every, self.total, self.keep = folder, learner, every, total, keep
        self.stop, self.step, self.saved, self.version = stop, first, first, learner.version
        self.state: Mapping[str, Any] = {}

    def done(self, step: int, state: Mapping[str, Any]) -> None:
        """Step number `step` is complete. Raises KeyboardInterrupt, once all is saved, when a stop was asked for."""
        self.step, self.state, self.version = step, state, self.learner.version
        asked = self.learner.workers.any(self.stop is not None and self.stop.asked)
        if asked or step == self.total or (self.every and step % self.every == 0):
            self._save()
        if asked and step < self.total:
            raise KeyboardInterrupt(f"the checkpoint of step {step} is saved; continue with --resume")

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        whole = self.learner.version == self.version and self.step > self.saved
        # of several workers one alone may have failed, and the others would not come to save; what whet raises, all raise
        common = Exception if self.learner.workers.size == 1 else WhetError
        if isinstance(error, common) and not isinstance(error, CheckpointError) and whole:
            with suppress(WorkerDied):  # what ended the run is what is told
                self._save()

    def _save(self) -> None:
        save(self.folder, self.step, self.learner, {"step": self.step, **self.state}, keep=self.keep)
        self.saved = self.step


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: every file of its manifest is there with its checksum. None without one."""
    for path in reversed(_all(folder)):
        try:
            sums = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if all(_sum(path / name) == value for name, value in sums.items()):
                return path
        except (OSError, ValueError):
            continue
    return None


def resumed(folder: Path, learner: Learner) -> dict[str, Any] | None:
    """The loop's state of the newest whole checkpoint, the learner's being put back; None where there is no checkpoint."""
    found = learner.workers.broadcast(latest(folder) if learner.workers.first else None)
    return load(found, learner) if found else None


def load(path: Path, learner: Learner) -> dict[str, Any]:
    """Puts the learner's state back and returns the loop's."""
    learner.load(path / "learner")
    return json.loads((path / "loop.json").read_text(encoding="utf-8"))


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
