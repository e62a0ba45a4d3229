"""The run folder: check it before any model is loaded, and open it before the first step."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from whet.distributed import Workers, first, free_port, join, launched, leave, note, noted
from whet.errors import RecipeError
from whet.generate import GENERATORS
from whet.learner.base import LEARNERS
from whet.loops import offline
from whet.loops.record import RunFolder
from whet.runs import adapters, config, inputs, learners
from whet.runs.recipe import TrainingRecipe
from whet.trackers import TRACKERS, RunInfo, Tracker

LOCK = ".lock"
"""The file of a run folder that a session locks while it trains."""


@dataclass(frozen=True)
class Options:
    """Options of a run that are not in the recipe: `resume` continues a run, `quiet` prints no progress."""

    resume: bool = False
    quiet: bool = False


@contextmanager
def working(recipe: TrainingRecipe, options: Options) -> Iterator[tuple[Workers, Options]]:
    """Join the process group of torchrun's workers. Yield the workers and the options; only rank 0 prints progress.

    Without torchrun, yield a single worker. Learner backends other than "local" need a process group, even of size 1.
    """
    engine = learners.backend_of(recipe, int(os.environ["WORLD_SIZE"]) if launched() else 1)
    if not launched() and engine == "local":
        yield Workers(), options
        return
    workers = join() if launched() else join(0, 1, "127.0.0.1", free_port())
    resume = workers.broadcast(options.resume)
    try:
        yield workers, replace(options, resume=resume, quiet=options.quiet or not workers.first)
    except BaseException:
        if workers.size == 1:  # with more workers, the launcher ends the others
            leave()
        raise
    leave()


def restarted(options: Options) -> Options:
    """Return the options, with `resume` set on rank 0 if an earlier attempt of this torchrun launch has begun the run."""
    return replace(options, resume=options.resume or (first() and noted("begun")))


def begun(recipe: TrainingRecipe, verb: str) -> bool:
    """Return True if the run folder of this recipe contains a recipe and metrics or checkpoints."""
    where = Path(recipe.out or f"runs/{verb}")
    return (where / "recipe.yaml").is_file() and (
        (where / "metrics.jsonl").is_file() or (where / "checkpoints").is_dir()
    )


def checked(recipe: TrainingRecipe, verb: str, options: Options) -> Path:
    """Return the run folder without creating it. Raises RecipeError if it contains a run and `resume` is
    False, or if `resume` is True and it contains no run or one with another recipe."""
    folder = Path(recipe.out or f"runs/{verb}")
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"out: {folder} is a file; name a folder with --out")
    if not first():  # only rank 0 reads the folder; it broadcasts `resume`
        return folder
    saved = folder / "recipe.yaml"
    began = (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir()
    if saved.is_file() and began and not options.resume:
        raise RecipeError(
            f"out: {folder} already holds a run; continue it with --resume or name another folder with --out"
        )
    if options.resume:
        if not saved.is_file():
            raise RecipeError(f"--resume: there is no run in {folder}")
        text = config.to_yaml(recipe, verb)
        changed = _changed(
            _kept(config.completed(config.read_yaml(saved), type(recipe))), _kept(config.yaml_tree(text))
        )
        if changed:
            raise RecipeError(
                f"--resume: the recipe of {folder} differs in {', '.join(changed)}; a resumed run needs the recipe with which it began: "
                "give the same options, or name another folder with --out"
            )
    return folder


def check_inputs(recipe: TrainingRecipe, verb: str, options: Options) -> None:
    """Raise RecipeError if a run is resumed with data, Python files or tokenizers that have changed since it began."""
    if options.resume and first():
        inputs.check(Path(recipe.out or f"runs/{verb}"), config.yaml_tree(config.to_yaml(recipe, verb)))


@contextmanager
def locked(recipe: TrainingRecipe, verb: str, options: Options) -> Iterator[None]:
    """Hold the lock of the run folder, which is created. Raises RecipeError if another session holds it or has used it since
    this one was checked. Only rank 0 takes the lock."""
    if not first():
        yield
        return
    folder = Path(recipe.out or f"runs/{verb}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=1.0):
            checked(recipe, verb, options)
            yield
    except Timeout as error:
        raise RecipeError(
            f"out: another session is training in {folder}; wait for its end, or name another folder with --out"
        ) from error


def opened(folder: Path, recipe: TrainingRecipe, options: Options, verb: str, workers: Workers) -> RunFolder:
    """Create or reopen the run folder, after all checks have passed. Only rank 0 writes to it."""
    workers.barrier()
    found = offline.checkpoint.latest(folder / "checkpoints") if options.resume and workers.first else None
    if options.resume and found is None and workers.first:
        print(f"whet: no checkpoint was saved in {folder} yet; the run starts over", file=sys.stderr)
    step = json.loads((found / "loop.json").read_text(encoding="utf-8"))["step"] if found else 0
    text = config.to_yaml(recipe, verb)
    info = RunInfo(folder.name, folder, config.yaml_tree(text))
    told = trackers(recipe.trackers, info) if workers.first else []
    run = RunFolder(folder, resume_at=step if options.resume else None, trackers=told, writes=workers.first)
    run.environment(text)
    if workers.first:
        inputs.write(folder, config.yaml_tree(text), resumed=found is not None)
        note("begun")
    return run


def _kept(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that must not change on resume: all except the cluster, the backend of the learner, and the options of
    adapters that say where and how fast they run. Options with their default value are left out."""
    out = {name: value for name, value in recipe.items() if name != "cluster"}
    if isinstance(out.get("learner"), Mapping):
        out["learner"] = adapters.fixed_options(LEARNERS, out["learner"], "backend")
    if isinstance(out.get("generator"), Mapping):
        own = out["generator"]
        out["generator"] = {**own, "options": adapters.fixed_options(GENERATORS, own, "name")}
    return out


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    out = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += _changed(a, b, f"{where}{key}.")
        elif a != b:
            out.append(f"{where}{key}")
    return out


def trackers(specs: Sequence[Any], info: RunInfo | None) -> list[Tracker]:
    """Check the trackers of a recipe. With the `info` of a run, start them and return them; else return an empty list."""
    found = [
        (adapters.chosen(TRACKERS, one, "trackers"), one if isinstance(one, str) else one["name"]) for one in specs
    ]
    for one, name in found:
        one.check(name)
    out: list[Tracker] = [one.make(name) for one, name in found] if info else []
    for tracker in out:
        assert info is not None
        tracker.start(info)
    return out
