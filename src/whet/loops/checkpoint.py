"""Checkpoints: written aside, checksummed, renamed into place; read back only when whole. Safetensors and JSON, no pickle."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whet.errors import CheckpointError
from whet.learner import Learner
from whet.models.load import write_json

MANIFEST = "manifest.json"


def save(folder: Path, step: int, learner: Learner, loop: Mapping[str, Any], *, keep: int = 2) -> Path:
    """The checkpoint `folder/step-00000042`: the learner's state and the loop's small one. The newest `keep` stay.

    Raises CheckpointError when it cannot be written (a full disk); the last good checkpoint is untouched then.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f".writing-{step:08d}-{os.getpid()}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        learner.save(aside / "learner")
        write_json(aside / "loop.json", dict(loop))
        sums = {str(path.relative_to(aside)): _sum(path) for path in sorted(aside.rglob("*")) if path.is_file()}
        write_json(aside / MANIFEST, sums)
        for path in [*(aside / name for name in sums), aside / MANIFEST, aside / "learner", aside]:
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync(folder)
    except Exception as error:  # OSError from the file system, SafetensorError for the same cause from safetensors
        shutil.rmtree(aside, ignore_errors=True)
        good = latest(folder)
        left = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
        raise CheckpointError(
            f"{final}: the checkpoint could not be written ({error}); {left}, continue with --resume"
        ) from error
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


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
