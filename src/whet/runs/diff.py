"""whet.diff: the first step and the first column or tensor in which two runs differ."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.data import COLUMNS
from whet.errors import RecipeError
from whet.learner.store import Stored
from whet.loops import checkpoint, rollouts
from whet.loops.metrics import timed
from whet.loops.record import read_metrics
from whet.runs.early import begun
from whet.runs.folder import differing
from whet.runs.yaml_text import read_yaml
from whet.terminal import visible

STAGES = ("prompt", "generate", "record", "reward", "measure", "advantage", "select", "update")
"""The stages of a step, in order. A difference in one causes those in later ones."""
PROMPT = ("prompt_ids", "prompt", "prompt_id", "draw", "answer")
"""The columns of a rollout that are known before an answer is generated."""
FIRST = ("prompt_ids", "completion_ids")
"""Columns that are named before others with a difference at the same place."""
SHARD = re.compile(r"(-\d{5}-of-\d{5})?\.safetensors$")
"""The end of the name of a file of tensors."""
ROW = 2**31
"""The position of a column with one value per answer: differences at a position are named before it."""
LAST = 2**62
"""The step of the exported model, after all others."""


@dataclass(frozen=True)
class Difference:
    """A place where two runs differ: the step, what differs there, and both values."""

    step: int
    where: str
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        at = "in the exported model" if self.step == LAST else f"at step {self.step}"
        return f"{at}, {self.where}: {self.ours!r} against {self.theirs!r}"


@dataclass(frozen=True)
class Compared:
    """The result of `whet.diff`: the first difference, the number of steps of both runs, the fields in which the recipes differ
    as (name, value, value), and the first difference of each part of the record. `equal` is False if a number, a tensor or the
    number of steps differs; recipes may."""

    parting: Difference | None
    steps: tuple[int, int]
    recipe: list[tuple[str, Any, Any]]
    parts: Mapping[str, Difference | None]

    @property
    def equal(self) -> bool:
        """Whether the records of the runs are equal."""
        return self.parting is None and self.steps[0] == self.steps[1]

    def __str__(self) -> str:
        first = f"no difference in {min(self.steps)} steps" if self.parting is None else f"the runs part {self.parting}"
        if self.steps[0] != self.steps[1]:
            first += f"; the first run has {self.steps[0]} steps, the second {self.steps[1]}"
        lines = [f"  recipe, {name}: {ours!r} against {theirs!r}" for name, ours, theirs in self.recipe]
        lines += [f"  {name}: {one or 'no difference'}" for name, one in self.parts.items()]
        return visible("\n".join([first, *lines]), layout=True)


def diff(run: str | Path, other: str | Path) -> Compared:
    """Compare two run folders: recipes, metrics (without times), rollouts, the checkpoints of steps that both have, and the
    exported models. `print(result)` shows the first difference; `result.equal` is True if there is none.

    Raises RecipeError if a folder contains no run, DataError if a file is not as whet writes it.
    """
    folders = Path(run), Path(other)
    for one in folders:
        check_run(one)
    trees = [read_yaml(one / "recipe.yaml") for one in folders]
    fields = [name for name in differing(trees[0], trees[1]) if name != "out"]
    recipe = [(name, *(_at(tree, name) for tree in trees)) for name in fields]
    parts = {
        name: next(found(*folders), None)
        for name, found in (
            ("rollouts", _rollouts),
            ("metrics", _metrics),
            ("checkpoints", _checkpoints),
            ("model", _models),
        )
    }
    known = [one for one in parts.values() if one is not None]
    parting = min(known, key=lambda one: one.step) if known else None  # the first part of those with the same step
    lengths = [max((row["step"] for row in lines_of(one)), default=0) for one in folders]
    return Compared(parting, (int(lengths[0]), int(lengths[1])), recipe, parts)


def check_run(folder: Path) -> None:
    """Raise RecipeError if a folder contains no run."""
    if not begun(folder):
        raise RecipeError(f"{folder}: no run is there; give a run folder, with its recipe.yaml and metrics.jsonl")


def lines_of(folder: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl of a run, [] if no step was finished."""
    return read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []


def _at(tree: Any, name: str) -> Any:
    for key in name.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def same(ours: Any, theirs: Any) -> bool:
    """Whether two values of a record are equal; a NaN equals itself."""
    return bool(ours == theirs or (ours != ours and theirs != theirs))


def _metrics(folder: Path, other: Path) -> Iterator[Difference]:
    mine, its = ({int(row["step"]): row for row in lines_of(one)} for one in (folder, other))
    for step in sorted(mine.keys() & its.keys()):
        for name in {**mine[step], **its[step]}:
            ours, theirs = mine[step].get(name), its[step].get(name)
            if not timed(name) and not same(ours, theirs):
                yield Difference(step, f"metric {name}", ours, theirs)


def _rollouts(folder: Path, other: Path) -> Iterator[Difference]:
    for step in sorted(set(rollouts.steps(folder)) & set(rollouts.steps(other))):
        found = first_difference(step, rollouts.read(folder, step), rollouts.read(other, step))
        if found is not None:
            yield found


def first_difference(step: int, ours: Mapping[str, list[Any]], theirs: Mapping[str, list[Any]]) -> Difference | None:
    """Return the first difference of two rollouts of a step: of the earliest stage, the first row and position."""
    known: list[tuple[tuple[int, int, int, int], Difference]] = []
    for place, name in enumerate({**ours, **theirs}):
        found: tuple[int, int, str, Any, Any] | None
        if name not in ours or name not in theirs:
            have = ["present" if name in one else "missing" for one in (ours, theirs)]
            found = (0, 0, "", have[0], have[1])
        elif len(ours[name]) != len(theirs[name]):
            return Difference(step, "number of answers", len(ours[name]), len(theirs[name]))
        else:
            found = _first_cell(ours[name], theirs[name])
        if found is not None:
            row, position, where, mine, its = found
            order = (_stage(name), row, position, -1 if name in FIRST or name.startswith("reward/") else place)
            known.append((order, Difference(step, f"column {name}{where}", mine, its)))
    return min(known, key=lambda one: one[0])[1] if known else None


def _stage(name: str) -> int:
    if name in PROMPT:
        return 0
    known = COLUMNS[name].stage if name in COLUMNS else "reward" if name.startswith("reward/") else "generate"
    return STAGES.index(known) if known in STAGES else len(STAGES)


def _first_cell(ours: list[Any], theirs: list[Any]) -> tuple[int, int, str, Any, Any] | None:
    """Return (row, position, place in words, value, value) of the first difference of two columns, None if there is none."""
    for row, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        if same(mine, its):
            continue
        if not isinstance(mine, list) or not isinstance(its, list):
            return row, ROW, f", row {row}", mine, its
        for position, (one, another) in enumerate(zip(mine, its, strict=False)):
            if not same(one, another):
                return row, position, f", row {row}, position {position}", one, another
        if len(mine) != len(its):
            return row, min(len(mine), len(its)), f", length of row {row}", len(mine), len(its)
    return None


def _checkpoints(folder: Path, other: Path) -> Iterator[Difference]:
    mine, its = ({one.name: one for one in (run / "checkpoints").glob("step-????????")} for run in (folder, other))
    for name in sorted(mine.keys() & its.keys()):
        if checkpoint.fault(mine[name]) or checkpoint.fault(its[name]):
            continue  # one that is not complete is never loaded
        step = int(name.removeprefix("step-"))
        yield from _files(step, mine[name], its[name], "checkpoint", ("manifest.json",))


def _models(folder: Path, other: Path) -> Iterator[Difference]:
    for name in ("model", "ema"):
        mine, its = folder / name, other / name
        if mine.is_dir() and its.is_dir():
            yield from _files(LAST, mine, its, name)
        elif mine.is_dir() != its.is_dir():
            yield Difference(LAST, name, *("present" if one.is_dir() else "missing" for one in (mine, its)))


def _files(step: int, folder: Path, other: Path, what: str, left_out: Sequence[str] = ()) -> Iterator[Difference]:
    """Yield the differences of two folders: first of their tensors, then of their other files."""
    mine, its = (
        {
            str(path.relative_to(one)): path
            for path in sorted(one.rglob("*"))
            if path.is_file() and path.name not in left_out
        }
        for one in (folder, other)
    )
    held = [{SHARD.sub("", name) for name in one if SHARD.search(name)} for one in (mine, its)]
    for name in sorted(held[0] ^ held[1]):
        yield Difference(step, f"{what}, tensors of {name}", *("present" if name in one else "missing" for one in held))
    for name in sorted(held[0] & held[1]):
        yield from _tensors(step, Stored(folder, name), Stored(other, name), f"{what}, {Path(name).name}")
    for name in {**mine, **its}:
        if name.endswith((".safetensors", ".safetensors.index.json")):
            continue
        if name not in mine or name not in its:
            yield Difference(
                step, f"{what}, file {name}", *("present" if name in one else "missing" for one in (mine, its))
            )
        elif mine[name].read_bytes() != its[name].read_bytes():
            yield Difference(
                step, f"{what}, file {name}", *(f"{one[name].stat().st_size} bytes" for one in (mine, its))
            )


def _tensors(step: int, ours: Stored, theirs: Stored, what: str) -> Iterator[Difference]:
    for key in sorted(ours.keys() | theirs.keys()):
        where = f"{what}, tensor {key}"
        if key not in ours or key not in theirs:
            yield Difference(step, where, *("present" if key in one else "missing" for one in (ours, theirs)))
            continue
        mine, its = ours[key], theirs[key]
        if mine.shape != its.shape or mine.dtype != its.dtype:
            yield Difference(step, where, *(f"{one.dtype} {tuple(one.shape)}" for one in (mine, its)))
        elif not torch.equal(_bits(mine), _bits(its)):
            off = (_bits(mine) != _bits(its)).any(1).nonzero()
            place = int(off[0])
            index = [int(one) for one in torch.unravel_index(torch.tensor(place), mine.shape)] if mine.ndim else []
            values = (one.reshape(-1)[place].item() for one in (mine, its))
            yield Difference(step, f"{where}, {len(off)} of {mine.numel()} numbers, the first at {index}", *values)


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes of each number, (n, bytes)."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).reshape(-1, tensor.element_size())
