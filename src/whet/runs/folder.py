"""The run folder: check it before any model is loaded, and open it before the first step."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from whet.distributed import Workers, first, free_port, join, launched, leave, note, noted
from whet.errors import RecipeError, WhetError
from whet.generate import GENERATORS
from whet.learner.base import LEARNERS
from whet.loops import checkpoint
from whet.loops.evaluation import PENDING
from whet.loops.metrics import EVALUATED
from whet.loops.record import CAUTIONS, RunFolder, read_metrics
from whet.registry import told
from whet.runs import adapters, config, inputs, learners
from whet.runs.early import begun, check_out, contains
from whet.runs.recipe import OnlineRecipe, TrainingRecipe
from whet.runs.yaml_text import read_yaml, yaml_tree
from whet.terminal import caution
from whet.trackers import TRACKERS, RunInfo, Tracker

LOCK = ".lock"
"""The file of a run folder that a session locks while it trains."""
INPUTS = "inputs"
"""The folder of a run folder with the rows and models that were given as Python objects."""
UNBEGUN = (LOCK, INPUTS, "environment.json", inputs.FILE, "stopped", CAUTIONS)
"""What a run may leave that ended before its first step, beside its recipe."""
WRITTEN = (
    *UNBEGUN,
    "recipe.yaml",
    "metrics.jsonl",
    "rollouts",
    "checkpoints",
    "model",
    "ema",
    "eval",
    "best",
    "report.html",
)
"""What a run writes to its folder."""
LOGS = (".log", ".out", ".err")
"""Endings of files that a run never writes, and that often stand in its folder: the output of the command."""
UNCHANGING = ("cluster", "threads", "trackers")
"""Fields that change no result, and that a resumed run may change."""
SAVING = ("save_every", "save_minutes", "save_last", "keep", "on_divergence", "record_every")
"""Fields of the sections `train` and `rollout` that change no result, and that a resumed run may change."""
LENGTH = ("num_steps", "num_epochs")
"""Fields of the sections `train` and `rollout` that a resumed run may change if the learning rate does not depend on them."""

RecipeT = TypeVar("RecipeT", bound=TrainingRecipe)


@dataclass(frozen=True)
class Options:
    """Options of a run that are not in the recipe: `resume` continues a run, `quiet` prints no progress, and `accepted` names
    inputs that may have changed since the run began."""

    resume: bool = False
    quiet: bool = False
    accepted: tuple[str, ...] = ()


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


def of(recipe: TrainingRecipe, verb: str) -> Path:
    """Return the run folder of a recipe."""
    return Path(recipe.out or f"runs/{verb}")


def checked(recipe: TrainingRecipe, verb: str, options: Options, recipe_file: Path | None = None) -> Options:
    """Check the run folder without creating it. Return the options, with `resume` False if there is no run to continue.

    Raises RecipeError if it contains a run and `resume` is False, if its run has another recipe, if it contains anything
    that is not of this run, a link, or an input of the run.
    """
    folder = of(recipe, verb)
    if folder.exists() and not folder.is_dir():
        check_out(folder)
    if not first():  # only rank 0 reads the folder; it broadcasts `resume`
        return options
    _refuse_inputs_inside(folder, recipe, recipe_file)
    for name in WRITTEN:
        if (folder / name).is_symlink():
            raise RecipeError(f"out: {folder / name} is a link, which a run does not follow; remove it")
        if (folder / name).exists() and not ((folder / name).is_file() or (folder / name).is_dir()):
            raise RecipeError(f"out: {folder / name} is neither a file nor a folder; remove it")
    if not begun(folder):
        _refuse_foreign(folder)
        return replace(options, resume=False)
    check_out(folder, resume=options.resume)
    _refuse_changes(folder, recipe, verb, options.accepted)
    return options


def _refuse_foreign(folder: Path) -> None:
    """Raise RecipeError if a folder without a run contains anything that such a run did not leave there."""
    if not folder.is_dir():
        return
    own = UNBEGUN if not (folder / "environment.json").is_file() else (*UNBEGUN, "recipe.yaml", "eval")
    for path in sorted(folder.iterdir()):
        empty = path.name in ("checkpoints", "rollouts") and not contains(path)
        if path.name.startswith(PENDING) and "recipe.yaml" in own:  # it was ended in its first evaluation
            continue
        if path.name not in own and path.suffix not in LOGS and not path.name.endswith(".writing") and not empty:
            raise RecipeError(
                f"out: {folder} contains {path.name}, which is not of this run and could be overwritten; name another folder "
                "with --out"
            )


def _refuse_inputs_inside(folder: Path, recipe: TrainingRecipe, recipe_file: Path | None) -> None:
    """Raise RecipeError if an input of the run is in the run folder. Only `inputs` may be there."""
    root = folder.resolve()
    located = [("recipe", str(recipe_file), recipe_file.resolve())] if recipe_file is not None else []
    for field_, value, path in [*located, *inputs.located(yaml_tree(config.to_yaml(recipe)))]:
        if path.is_relative_to(root) and not path.is_relative_to(root / INPUTS):
            raise RecipeError(
                f"{field_}: {value} is in the run folder {folder}, where the run could overwrite it; name another folder with --out"
            )


def _refuse_changes(folder: Path, recipe: TrainingRecipe, verb: str, accepted: Sequence[str]) -> None:
    """Raise RecipeError if the run in a folder has another recipe, except for what may change on a resume."""
    saved = config.completed(read_yaml(folder / "recipe.yaml"), type(recipe))
    changed = differing(_kept(saved), _kept(yaml_tree(config.to_yaml(_sized(recipe, saved), verb))))
    changed = [
        name for name in changed if not (name in accepted and name.startswith(("data.", "eval.", "reward.", "ptx.")))
    ]
    length = [name for name in changed if name.rpartition(".")[2] in LENGTH]
    if changed and changed == length:
        return _check_length(saved, recipe, length)
    if changed:
        raise RecipeError(
            f"--resume: the recipe of {folder} differs in {', '.join(changed)}; a resumed run needs the recipe with which it began: "
            "give the same options, or name another folder with --out"
        )


def _sized(recipe: RecipeT, saved: Mapping[str, Any]) -> RecipeT:
    """Return the recipe of a resumed run with the size of its micro-batches, if it names none: it determines the rounding."""
    tokens = (saved.get("train") or {}).get("max_tokens_per_micro_batch")
    if recipe.train.max_tokens_per_micro_batch is not None or type(tokens) is not int:
        return recipe
    return replace(recipe, train=replace(recipe.train, max_tokens_per_micro_batch=tokens))  # type: ignore[arg-type]


def resumed(recipe: RecipeT, verb: str) -> RecipeT:
    """Return the recipe of a resumed run, with what its first attempt chose for the machine that it was on."""
    file = of(recipe, verb) / "recipe.yaml"
    return _sized(recipe, read_yaml(file)) if file.is_file() else recipe


def _check_length(saved: Mapping[str, Any], recipe: TrainingRecipe, changed: Sequence[str]) -> None:
    """Raise RecipeError if the first steps of a run would have been others with the new length."""
    optims = {"optim": recipe.optim}
    if isinstance(recipe, OnlineRecipe):
        optims |= {"critic.optim": recipe.critic.optim} if recipe.critic.optim is not None else {}
        if ((saved.get("rollout") or {}).get("num_epochs") is None) != (recipe.rollout.num_epochs is None):
            raise RecipeError(
                "--resume: rollout.num_epochs: a run over whole passes has smaller last steps; give the same of num_steps and "
                "num_epochs as before"
            )
    for name, optim in optims.items():
        if optim.depends_on_length() and recipe.optim.schedule_steps is None:
            raise RecipeError(
                f"--resume: {', '.join(changed)} changed, and the learning rate of {name} ({optim.words()}) depends on the number of "
                f"steps; a run can be extended if {name}.schedule is constant without warm-up, or if optim.schedule_steps was set "
                "when it began"
            )


def check_inputs(recipe: TrainingRecipe, verb: str, options: Options) -> None:
    """Raise RecipeError if a run is resumed with data, Python files or tokenizers that have changed since it began."""
    if options.resume and first():
        inputs.check(of(recipe, verb), yaml_tree(config.to_yaml(recipe, verb)), options.accepted)


def check_steps(folder: Path, steps: int, options: Options) -> None:
    """Raise RecipeError if a resumed run has made more steps already than it should have, or if it has ended with another number
    of steps and has no checkpoint from which it could go on."""
    if not options.resume:
        return
    saved = checkpoint.steps(folder / "checkpoints")
    for done in reversed(saved):
        if done <= steps:
            break
        if not checkpoint.fault(folder / "checkpoints" / f"step-{done:08d}"):
            raise RecipeError(
                f"--resume: the run in {folder} has made {done} steps already, and would have {steps}; give more"
            )
    rows = read_metrics(folder) if not saved and (folder / "metrics.jsonl").is_file() else []
    if rows and (folder / "model").is_dir() and not _is_last(rows[-1], steps):
        raise RecipeError(
            f"--resume: the run in {folder} has ended after {rows[-1]['step']:g} steps and has no checkpoint, so it cannot go on, and "
            "starting over would replace its model; name another folder with --out"
        )


def check_export(where: Path, folder: Path, exported: Collection[Path] = ()) -> None:
    """Raise RecipeError if an export would replace anything else than an earlier export of this run: a folder inside the run
    folder that a run does not write, or one of `exported`."""
    resolved, root = where.resolve(), folder.resolve()
    inside = resolved.relative_to(root).parts if resolved.is_relative_to(root) else ()
    own = inside and (inside in (("model",), ("ema",), ("best",)) or inside[0] not in WRITTEN)
    if own or resolved in exported:
        return
    if inside or where.is_symlink() or (where.exists() and not (where.is_dir() and not contains(where))):
        raise RecipeError(
            f"export: {where} already exists or is of the run, and could be overwritten; name a new folder"
        )


def finished(folder: Path, steps: int, options: Options) -> bool:
    """Return True if a run is resumed that has made all its steps, wrote its model, and has no checkpoint of its end."""
    if not options.resume or not (folder / "model").is_dir() or (folder / "checkpoints" / f"step-{steps:08d}").is_dir():
        return False
    rows = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    return bool(rows) and _is_last(rows[-1], steps)


def _is_last(row: Mapping[str, float], steps: int) -> bool:
    """Return True if a line of metrics is the last one of a run of `steps` steps, or of one that ended early."""
    return row["step"] == steps or f"{EVALUATED}stopped_early" in row


@contextmanager
def locked(recipe: TrainingRecipe, verb: str, options: Options) -> Iterator[None]:
    """Hold the lock of the run folder, which is created. Raises RecipeError if another session holds it or has used it since
    this one was checked. Only rank 0 takes the lock."""
    if not first():
        yield
        return
    folder = of(recipe, verb)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=1.0):
            if checked(recipe, verb, options) != options:
                raise RecipeError(
                    f"out: the run in {folder} has been removed since this one was checked; start it again"
                )
            yield
    except Timeout as error:
        raise RecipeError(
            f"out: another session is training in {folder}; wait for its end, or name another folder with --out"
        ) from error


def in_use(where: Path) -> bool:
    """Return True if a session holds the lock of a run folder. The file of the lock is only read."""
    with suppress(ImportError, FileNotFoundError, PermissionError):  # no fcntl on Windows
        import fcntl

        with (where / LOCK).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
    return False


def opened(folder: Path, recipe: TrainingRecipe, options: Options, verb: str, workers: Workers) -> RunFolder:
    """Create or reopen the run folder, after all checks have passed. Only rank 0 writes to it."""
    reads = options.resume and workers.first
    (found, *_) = workers.together(lambda: checkpoint.newest(folder / "checkpoints") if reads else None)
    if options.resume and found is None and workers.first:
        caution(f"no checkpoint was saved in {folder} yet; the run starts over")
    step = int(found.name.removeprefix("step-")) if found else -1  # also the evaluation of the start comes again
    text = config.to_yaml(recipe, verb)
    info = RunInfo(folder.name, folder, yaml_tree(text))
    started = trackers(recipe.trackers, info) if workers.first else []
    run = RunFolder(
        folder,
        resume_at=step if options.resume else None,
        trackers=started,
        writes=workers.first,
        accepted=options.accepted,
    )
    run.environment(text, workers.size)
    if workers.first:
        inputs.write(folder, yaml_tree(text), options.accepted, resumed=found is not None)
        note("begun")
    return run


def _kept(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that must not change on resume: all except those that say how a run is saved and reported, where and
    how fast it is computed, and such options of adapters. Options with their default value are left out."""
    out = {name: value for name, value in recipe.items() if name not in (*UNCHANGING, "out")}
    if isinstance(out.get("eval"), Mapping) and isinstance(out["eval"].get("judge"), list):
        out["eval"] = {
            **out["eval"],
            "judge": [_untimed(one) for one in out["eval"]["judge"] if isinstance(one, Mapping)],
        }
    for section in ("train", "rollout"):
        out[section] = {name: value for name, value in (out.get(section) or {}).items() if name not in SAVING}
    if isinstance(out.get("learner"), Mapping):
        out["learner"] = adapters.fixed_options(LEARNERS, out["learner"], "backend")
    if isinstance(out.get("generator"), Mapping):
        own = out["generator"]
        out["generator"] = {**own, "options": adapters.fixed_options(GENERATORS, own, "name")}
    if isinstance(out.get("reward"), list):
        out["reward"] = [_untimed(one) if isinstance(one, Mapping) else one for one in out["reward"]]
    return out


def _untimed(reward: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reward of a saved recipe without its option `timeout`: a limit of time, which changes no score. A user's class may
    have an option of this name with another meaning; it may change too (docs/rewards.md)."""
    options = reward.get("options") or {}
    return {**reward, "options": {name: value for name, value in options.items() if name != "timeout"}}


def differing(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """Return the dotted names of the fields in which two recipes differ."""
    out = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differing(a, b, f"{where}{key}.")
        elif a != b:
            out.append(f"{where}{key}")
    return out


def trackers(specs: Sequence[Any], info: RunInfo | None) -> list[Tracker]:
    """Check the trackers of a recipe. With the `info` of a run, start them and return them; else return an empty list. Raises
    RecipeError if one cannot be started."""
    found = [
        (adapters.chosen(TRACKERS, one, "trackers"), one if isinstance(one, str) else one["name"]) for one in specs
    ]
    for one, name in found:
        one.check(name)
    out: list[Tracker] = [one.make(name) for one, name in found] if info else []
    for tracker, (_, name) in zip(out, found, strict=bool(info)):
        assert info is not None
        try:
            tracker.start(info)
        except WhetError:
            raise
        except (Exception, SystemExit) as error:
            raise RecipeError(
                f"trackers: {name} cannot be started: {told(error)}; correct it, or leave it out"
            ) from error
    return out
