"""The run folder of a call: checked before anything is loaded, opened when everything is ready."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whet.distributed import Workers, first, free_port, join, launched, leave, note, noted
from whet.errors import RecipeError
from whet.loops import offline
from whet.loops.record import RunFolder
from whet.runs import adapters, config, learners
from whet.trackers import TRACKERS, RunInfo, Tracker


@dataclass(frozen=True)
class Options:
    """What a call says beside the recipe: continue a run; show no progress."""

    resume: bool = False
    quiet: bool = False


@contextmanager
def working(recipe: Any, options: Options) -> Iterator[tuple[Workers, Options]]:
    """This process alone, or as one of torchrun's workers, of which the first one talks.

    An engine for several workers needs a group of processes, if only of one.
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
        if workers.size == 1:  # else the launcher ends the others
            leave()
        raise
    leave()


def restarted(options: Options) -> Options:
    """What torchrun started again goes on where it was, if an earlier attempt had begun; the first worker asks."""
    return replace(options, resume=options.resume or (first() and noted("begun")))


def begun(recipe: Any, verb: str) -> bool:
    """The run folder of this recipe holds a run."""
    where = Path(recipe.out or f"runs/{verb}")
    return (where / "recipe.yaml").is_file() and (
        (where / "metrics.jsonl").is_file() or (where / "checkpoints").is_dir()
    )


def checked(recipe: Any, verb: str, options: Options) -> Path:
    """The run folder, checked but not made: free, or with --resume one whose recipe is the same."""
    folder = Path(recipe.out or f"runs/{verb}")
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"out: {folder} is a file; name a folder with --out")
    if not first():  # the first worker looks, and tells whether to resume
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
        changed = _changed(_kept(config.read_yaml(saved)), _kept(config.yaml_tree(text)))
        if changed:
            raise RecipeError(
                f"--resume: the recipe of {folder} differs in {', '.join(changed)}; a resumed run goes on unchanged"
            )
    return folder


def opened(folder: Path, recipe: Any, options: Options, verb: str, workers: Workers) -> RunFolder:
    """The run's record, made once everything that can be refused has been. One worker writes it."""
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
        note("begun")
    return run


def _kept(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe a resumed run goes on with unchanged: all but where the work is done."""
    elsewhere = {
        "learner": ("backend", "offload"),
        "generator": ("count", "urls", "transfer", "gpu_memory_utilization", "kv_cache_mib"),
    }
    out = {name: value for name, value in recipe.items() if name != "cluster"}
    for section, names in elsewhere.items():
        if isinstance(out.get(section), Mapping):
            out[section] = {name: value for name, value in out[section].items() if name not in names}
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
    """The trackers of a recipe; with a run's `info` they are started."""
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
