"""Checkpoints in safetensors and JSON files, without pickle.

A checkpoint is written to a temporary folder with checksums, then renamed. Incomplete checkpoints are never loaded, and are
not counted as kept ones.
"""

import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from whet.data.files import read_json, replace_folder, sha256, write_json
from whet.errors import CheckpointError, Interrupted, WhetError, WorkerDied, first_line
from whet.learner import Learner
from whet.loops.interrupt import Stop
from whet.terminal import caution

MANIFEST = "manifest.json"
ASIDE = ".writing-"


RARELY = 20.0
"""Smallest time between two saves that are due by time, as a multiple of the duration of a save: at most 5 % of a run."""


def save(
    folder: Path, step: int, learner: Learner, loop: Mapping[str, Any], *, keep: int = 2, good: set[Path] | None = None
) -> Path:
    """Write the checkpoint `folder/step-00000042` with the states of learner and loop. Keep the newest `keep` complete
    checkpoints. `good` has those that are known to be complete.

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
        last = latest(folder)
        left_over = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise CheckpointError(
            f"{final}: the checkpoint could not be written ({error}); {left_over}, continue with --resume"
        ) from error
    if workers.first:
        _thin(folder, keep, {final} if good is None else good | {final})
    return final


def _thin(folder: Path, keep: int, good: set[Path]) -> None:
    """Remove the checkpoints that are older than the newest `keep` complete ones."""
    complete = 0
    for path in reversed(_all(folder)):
        if complete == keep:
            shutil.rmtree(path, ignore_errors=True)
        elif path in good or not fault(path):
            complete += 1


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
    replace_folder(aside, final)
    _sync(final.parent)


class Keeper:
    """Save a run and continue it. A run is saved every `every` steps, after `minutes`, at its end, on a stop request, and if a
    step fails before it changed any weights.

    A save is due by time when `minutes` have passed since the last one, and `RARELY` times the duration of that one; 0 is
    never. Without `last`, the end of the run is not saved. Use it as a context manager around the steps.
    """

    def __init__(
        self,
        folder: Path,
        learner: Learner,
        *,
        total: int,
        every: int = 0,
        minutes: float = 0.0,
        keep: int = 2,
        last: bool = True,
        stop: Stop | None = None,
    ) -> None:
        self.folder, self.learner, self.total, self.every, self.minutes = folder, learner, total, every, minutes
        self.keep, self.last, self.stop = keep, last, stop or Stop()
        self.step = self.saved = 0
        self.version = learner.version
        self.state: Mapping[str, Any] = {}
        self._good: set[Path] = set()
        self._saved_at, self._took = time.monotonic(), 0.0

    def restore(self, begin: Mapping[str, Any], accepted: Collection[str] = ()) -> dict[str, Any] | None:
        """Load the newest complete checkpoint into the learner and return the state of the loop, or None without a checkpoint.
        `begin` is the state with which a run begins. `accepted` names frozen roles whose weights may have changed. Raises
        CheckpointError if no checkpoint is complete, or if its state lacks a value of `begin` or has another type there."""
        workers = self.learner.workers
        (found, *_) = workers.together(lambda: newest(self.folder, quiet=True) if workers.first else None)
        if found is None:
            return None
        loop = load(found, self.learner, accepted)
        _check_state(loop, begin, f"{found}: loop.json: ")
        self.step = self.saved = loop["step"]
        self.version, self._good = self.learner.version, {found}
        self._tell_saved()
        return loop

    def done(self, step: int, state: Mapping[str, Any], *, ended: bool = False, save: bool = False) -> None:
        """Record that `step` steps are complete, and save if due. On a stop request, save and raise Interrupted. `state` is
        the state of the loop without its step. `ended` says that no step follows, also if there were to be `total`. `save` says
        that it is due."""
        ended = ended or step == self.total
        self.step, self.state, self.version = step, state, self.learner.version
        facts = self.learner.workers.gather((self.stop.signum, self._due_by_time()))  # the first worker's clock decides
        asked, by_time = next((signum for signum, _ in facts if signum), 0), facts[0][1]
        due = save or asked or by_time or ended or (self.every and step % self.every == 0)
        if due and (save or not ended or self.last):
            self._save()
        self.stop.wait_for(None)
        if self.stop.at_once:  # a signal during the save
            asked = asked or self.stop.signum
        if asked and not ended:
            raise Interrupted(self.stop.saved, asked)

    def _due_by_time(self) -> bool:
        passed = time.monotonic() - self._saved_at
        return bool(self.minutes) and passed >= max(60 * self.minutes, RARELY * self._took)

    def __enter__(self) -> "Keeper":
        self._saved_at = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        """Save what is not saved yet if the step that failed changed no weights."""
        if error is None or self.learner.version != self.version or self.step <= self.saved:
            return
        alone = self.learner.workers.size == 1
        # all workers must take part in a save; with several of them, only a WhetError is raised on all
        common = (Exception, Interrupted) if alone else WhetError
        if isinstance(error, common) and not isinstance(error, CheckpointError):
            try:
                self._save()
            except WorkerDied:
                pass  # report the first error, not this one
            except CheckpointError as failed:  # a full disk must not hide why the run ended
                if not isinstance(error, Interrupted):
                    if self.learner.workers.first:
                        caution(failed)
                    return
                raise Interrupted(str(failed), error.signum) from error
            if isinstance(error, Interrupted):
                raise Interrupted(self.stop.saved, error.signum) from None

    def _save(self) -> None:
        self.stop.wait_for(f"the checkpoint of step {self.step}")
        began = time.monotonic()
        state = {"step": self.step, **self.state}
        self._good.add(save(self.folder, self.step, self.learner, state, keep=self.keep, good=self._good))
        self.saved, self._saved_at = self.step, time.monotonic()
        self._took = self._saved_at - began
        self._tell_saved()

    def _tell_saved(self) -> None:
        self.stop.saved = f"the checkpoint of step {self.saved} is saved; continue with --resume"


def latest(folder: Path, most: int | None = None) -> Path | None:
    """Return the newest complete checkpoint (of at most `most` steps, if given), or None. Complete: all files of the manifest
    exist with their checksums."""
    found = (path for path in reversed(_all(folder)) if most is None or int(path.name.removeprefix("step-")) <= most)
    return next((path for path in found if not fault(path)), None)


def newest(folder: Path, *, quiet: bool = False) -> Path | None:
    """Return the newest complete checkpoint, and name newer ones that are not complete on stderr unless `quiet`. Return None if
    there are no checkpoints. Raises CheckpointError if none of them is complete."""
    torn = []
    for path in reversed(_all(folder)):
        reason = fault(path)
        if not reason:
            return path
        torn.append(f"{path}: {reason}")
        if not quiet:
            caution(f"{torn[-1]}; this checkpoint is not used")
    if torn:
        raise CheckpointError(
            f"{'; '.join(torn)}; no checkpoint is complete. Restore one, or remove {folder} to start the run again"
        )
    return None


def fault(path: Path) -> str:
    """Return why a checkpoint is not complete, or "" if it is."""
    try:
        sums = read_json(path / MANIFEST, CheckpointError)
        if not {"loop.json", "learner/learner.json"} <= sums.keys():
            return f"{MANIFEST} does not list the files of a checkpoint"
        for name, value in sums.items():
            if not (path / name).resolve().is_relative_to(path.resolve()):
                return f"{MANIFEST} lists {name!r:.80}, which is not in the folder"
            if sha256(path / name) != value:
                return f"{name} has changed since it was written"
        loop = read_json(path / "loop.json", CheckpointError)
        if loop.get("step") != int(path.name.removeprefix("step-")):
            return f"loop.json is not of step {int(path.name.removeprefix('step-'))}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(path)} is missing"
    except (OSError, ValueError, CheckpointError) as error:
        return first_line(error).removeprefix(f"{path}/")
    return ""


def load(path: Path, learner: Learner, accepted: Collection[str] = ()) -> dict[str, Any]:
    """Load a checkpoint into the learner and return the state of the loop. `accepted`: see `Keeper.restore`. Raises
    CheckpointError if its files are not those that whet writes."""
    try:
        learner.load(path / "learner", accepted)
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{path}: its files are not those of a checkpoint (a value is missing or of a wrong type: {first_line(error)})"
        ) from error
    return read_json(path / "loop.json", CheckpointError)


def _check_state(loop: Mapping[str, Any], begin: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError if a value of `begin` is missing in the state of a loop, or has another type there."""
    for name, value in begin.items():
        found = loop.get(name)
        kinds = (int, float) if isinstance(value, (int, float)) else type(value)
        counted = name in ("step", "drawn") and (type(found) is not int or found < 0)
        if name not in loop or counted or not isinstance(found, (kinds, type(None)) if value is None else kinds):
            got = f"got {found!r:.80}" if name in loop else "it is missing"
            raise CheckpointError(f"{where}{name}: expected a {type(value).__name__}, {got}; restore the checkpoint")
        if isinstance(value, Mapping) and isinstance(found, Mapping):
            _check_state(found, value, f"{where}{name}.")


def steps(folder: Path) -> list[int]:
    """Return the steps of all checkpoints in a folder, complete or not, in order."""
    return [int(path.name.removeprefix("step-")) for path in _all(folder)]


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
