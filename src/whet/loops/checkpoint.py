"""Checkpoints in safetensors and JSON files, without pickle.

A checkpoint is written to a temporary folder with checksums, then renamed. Incomplete checkpoints are never loaded.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from whet.data.files import sha256, write_json
from whet.errors import CheckpointError, WhetError, WorkerDied
from whet.learner import Learner
from whet.loops.interrupt import Stop

MANIFEST = "manifest.json"
ASIDE = ".writing-"


def save(folder: Path, step: int, learner: Learner, loop: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write the checkpoint `folder/step-00000042` with the states of learner and loop. Keep the newest `keep` checkpoints.

    Each attempt writes to a new temporary folder with a random name, and only the first worker renames it. So a worker
    that still runs after its machine was given up cannot damage a good checkpoint. Raise CheckpointError on every worker
    if the checkpoint cannot be written (for example, a full disk); the last good one is then unchanged.
    """
    workers, final = learner.workers, folder / f"step-{step:08d}"
    aside = folder / workers.broadcast(f"{ASIDE}{step:08d}-{secrets.token_hex(4)}")
    try:
        workers.together(lambda: _begin(folder, aside) if workers.first else None)
        workers.together(lambda: learner.save(aside / "learner"))
        workers.together(lambda: _commit(aside, final, loop) if workers.first else None)
    except WorkerDied:  # a worker failed, not the disk
        shutil.rmtree(aside, ignore_errors=True)
        raise
    except Exception as error:  # OSError, or SafetensorError for the same cause
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
    """Write the state of the loop and the checksums, sync all files to disk, and rename the folder.

    Raise OSError if a part of the learner's state is missing.
    """
    for part in (aside / "learner").glob("*-of-*.safetensors"):
        name, _, count = part.stem.rpartition("-of-")
        every = list(part.parent.glob(f"{name[:-5]}[0-9]*-of-{count}.safetensors"))
        if len(every) != int(count):
            raise OSError(
                f"{part.parent}: {len(every)} of {int(count)} parts are here; do all machines see this folder?"
            )
    write_json(aside / "loop.json", dict(loop))
    sums = {str(path.relative_to(aside)): sha256(path) for path in sorted(aside.rglob("*")) if path.is_file()}
    write_json(aside / MANIFEST, sums)
    for path in [*(aside / name for name in sums), aside / MANIFEST, aside / "learner", aside]:
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _sync(final.parent)


class Keeper:
    """Save a run every `every` steps, at its end, on a stop request, and if a step fails before it changed any weights.

    Use it as a context manager around the steps. `state` is the state of the loop without its step.
    """

    def __init__(
        self, folder: Path, learner: Learner, *, every: int, total: int, keep: int, first: int, stop: Stop | None
    ) -> None:
        self.folder, self.learner, self.every, self.total, self.keep = folder, learner, every, total, keep
        self.stop, self.step, self.saved, self.version = stop, first, first, learner.version
        self.state: Mapping[str, Any] = {}

    def done(self, step: int, state: Mapping[str, Any]) -> None:
        """Record that `step` steps are complete, and save if due. On a stop request, save and raise KeyboardInterrupt."""
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
        # all workers must take part in a save; with several of them, only a WhetError is raised on all
        common = Exception if self.learner.workers.size == 1 else WhetError
        if isinstance(error, common) and not isinstance(error, CheckpointError) and whole:
            with suppress(WorkerDied):  # report the first error, not this one
                self._save()

    def _save(self) -> None:
        save(self.folder, self.step, self.learner, {"step": self.step, **self.state}, keep=self.keep)
        self.saved = self.step


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None. Complete: all files of the manifest exist with their checksums."""
    for path in reversed(_all(folder)):
        try:
            sums = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            if all(sha256(path / name) == value for name, value in sums.items()):
                return path
        except (OSError, ValueError):
            continue
    return None


def resumed(folder: Path, learner: Learner) -> dict[str, Any] | None:
    """Load the newest complete checkpoint into the learner and return the state of the loop, or None without a checkpoint."""
    found = learner.workers.broadcast(latest(folder) if learner.workers.first else None)
    return load(found, learner) if found else None


def load(path: Path, learner: Learner) -> dict[str, Any]:
    """Load a checkpoint into the learner and return the state of the loop."""
    learner.load(path / "learner")
    return json.loads((path / "loop.json").read_text(encoding="utf-8"))


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
