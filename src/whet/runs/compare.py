"""Compare two run folders to the bit: metrics and rollouts step by step, then the last checkpoint and the exported models."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.data.files import sha256
from whet.learner.store import Stored
from whet.loops import checkpoint, rollouts
from whet.loops.record import read_metrics

PART = re.compile(r"-\d{5}-of-\d{5}$")
"""The end of the name of a file of tensors that is one of several."""
SAMPLED = ("prompt_id", "prompt", "prompt_ids", "draw", "answer", "version", "completion_ids", "completion", "finish")
"""Columns of a rollout that exist before the answers are scored."""
EXPORTED = ("model", "ema")
"""Folders of a run with an exported model."""


def first_difference(one: Path, other: Path) -> str | None:
    """Return what differs first between two run folders, with its place and both values, or None if nothing differs.

    Metrics (except seconds) and rollouts are compared in the order in which a run computes them. Then follow the tensors and
    states of the last checkpoint, and the exported models. Numbers are equal if their bits are. Raises CheckpointError if
    files of a checkpoint are missing.
    """
    parts = (_steps(one, other), _checkpoints(one, other), *(_folders(one, other, name) for name in EXPORTED))
    return next((found for part in parts for found in part), None)


def _steps(one: Path, other: Path) -> Iterator[str]:
    metrics = [{int(row["step"]): row for row in read_metrics(run)} for run in (one, other)]
    written = [rollouts.steps(run) for run in (one, other)]
    for step in sorted({*metrics[0], *metrics[1], *written[0], *written[1]}):
        name = str(rollouts.path_of(one, step).relative_to(one))
        if found := _only(name, [step in steps for steps in written]):
            yield found
        elif step in written[0]:
            yield from _columns(name, rollouts.read(one, step), rollouts.read(other, step))
        if found := _only(f"metrics.jsonl: step {step}", [step in lines for lines in metrics]):
            yield found
        elif step in metrics[0]:
            rows = [{key: value for key, value in lines[step].items() if not _is_time(key)} for lines in metrics]
            yield from _values(f"metrics.jsonl: step {step}", *rows)


def _is_time(name: str) -> bool:
    return name.partition("/")[0] == "seconds"


def _columns(name: str, one: Mapping[str, list[Any]], other: Mapping[str, list[Any]]) -> Iterator[str]:
    """Compare the columns of a rollout: of the answers first, then the rewards, then what is computed from them."""
    rewards = [key for key in one if key.startswith("reward/")]
    order = dict.fromkeys([*(key for key in SAMPLED if key in one), *rewards, *one, *other])
    for key in order:
        if found := _only(f"{name}: column {key}", [key in one, key in other]):
            yield found
            continue
        if len(one[key]) != len(other[key]):
            yield f"{name}: {len(one[key])} answers and {len(other[key])}"
            continue
        for answer, (first, second) in enumerate(zip(one[key], other[key], strict=True)):
            if repr(first) != repr(second):
                yield f"{name}: column {key}, answer {answer}{_inside(first, second)}"
                break


def _inside(one: Any, other: Any) -> str:
    """Return the first place in which two values differ, with both values: for lists, down to the element."""
    if isinstance(one, list) and isinstance(other, list):
        for token, (first, second) in enumerate(zip(one, other, strict=False)):
            if repr(first) != repr(second):
                return f", token {token}{_inside(first, second)}"
        return f": {len(one)} tokens and {len(other)}"
    return f": {one!r} and {other!r}"


def _values(where: str, one: Any, other: Any) -> Iterator[str]:
    """Compare nested mappings of plain values."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys([*one, *other]):
            if found := _only(f"{where}: {key}", [key in one, key in other]):
                yield found
            else:
                yield from _values(f"{where}: {key}", one[key], other[key])
    elif repr(one) != repr(other):
        yield f"{where}: {one!r} and {other!r}"


def _only(what: str, has: Sequence[bool]) -> str | None:
    """Return the message for something that only one of two runs has."""
    return None if has[0] == has[1] else f"{what}: only the {'first' if has[0] else 'second'} run has it"


def _checkpoints(one: Path, other: Path) -> Iterator[str]:
    found = [checkpoint.latest(run / "checkpoints") for run in (one, other)]
    first, second = found
    if first is None or second is None:
        if told := _only("checkpoints", [path is not None for path in found]):
            yield told
    elif first.name != second.name:
        yield f"checkpoints: the last one is {first.name} and {second.name}"
    else:
        name = f"checkpoints/{first.name}"
        yield from _folders(one, other, f"{name}/learner")
        yield from _folders(one, other, name)


def _folders(one: Path, other: Path, name: str) -> Iterator[str]:
    """Compare the files of a folder that both runs should have: tensors by name, JSON files by value, others by hash."""
    first, second = one / name, other / name
    if found := _only(name, [first.is_dir(), second.is_dir()]):
        yield found
        return
    if not first.is_dir():
        return
    kinds: dict[str, list[Path]] = {}
    for path in sorted([*first.iterdir(), *second.iterdir()]):
        stem = PART.sub("", path.stem)
        if path.is_file() and path.name != checkpoint.MANIFEST:
            kinds.setdefault(f"{stem}{path.suffix}", []).append(path)
    for file, paths in kinds.items():
        has = [any(path.parent == folder for path in paths) for folder in (first, second)]
        if found := _only(f"{name}/{file}", has):
            yield found
        elif file.endswith(".safetensors"):
            stem = file.removesuffix(".safetensors")
            yield from _tensors(f"{name}/{file}", Stored(first, stem), Stored(second, stem))
        elif file.endswith(".json"):
            trees = [json.loads((folder / file).read_text(encoding="utf-8")) for folder in (first, second)]
            yield from _values(f"{name}/{file}", *trees)
        elif sha256(first / file) != sha256(second / file):
            yield f"{name}/{file}: the files differ"


def _tensors(where: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Iterator[str]:
    for key in dict.fromkeys([*one, *other]):
        if found := _only(f"{where}: {key}", [key in one, key in other]):
            yield found
        elif told := tensor_difference(one[key], other[key]):
            yield f"{where}: {key}{told}"


def tensor_difference(one: Tensor, other: Tensor) -> str | None:
    """Return the first element whose bits differ, with both values, or the shapes and dtypes if these differ."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return f": {tuple(one.shape)} {one.dtype} and {tuple(other.shape)} {other.dtype}"
    flat = [value.contiguous().flatten() for value in (one, other)]
    first, second = (value.view(torch.uint8).view(-1, value.element_size()) for value in flat)
    differ = (first != second).any(dim=1).nonzero()
    if not len(differ):
        return None
    place = int(differ[0, 0])
    index = tuple(int(number) for number in torch.unravel_index(torch.tensor(place), one.shape))
    return f": element {index}: {flat[0][place].item()!r} and {flat[1][place].item()!r}"
