"""whet.replay: compute a step of a run again from its record, and compare the numbers with those of its log."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from whet.data.files import read_json
from whet.distributed import Workers, first
from whet.errors import RecipeError
from whet.loops import checkpoint, rollouts
from whet.loops.offline import run_steps as offline_steps
from whet.loops.online import run_steps as online_steps
from whet.loops.record import environment
from whet.loops.replay import OfflineReplay, OnlineReplay, RecomputedRun
from whet.loops.tables import table
from whet.methods import catalogue
from whet.registry import forget_modules
from whet.runs import adapters, config, folder, inputs, offline, online, rewards
from whet.runs import recipe as fields
from whet.runs.diff import Difference, check_run, first_difference, lines_of, same
from whet.runs.yaml_text import read_yaml
from whet.terminal import caution, visible


@dataclass(frozen=True)
class PastRun:
    """A run that is only read: its folder, method, checked inputs, the logged numbers of a step, and the checkpoint from which
    the step is computed (None: the start of the run). `notes` say what may make the numbers differ; `accepted` names inputs that
    may have changed."""

    folder: Path
    method: str
    job: online.OnlineJob | offline.OfflineJob
    step: int
    logged: Mapping[str, float]
    found: Path | None
    notes: list[str] = field(default_factory=list)
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Replayed:
    """The result of `whet.replay`. `numbers` has (name, logged, recomputed) of every metric that was computed again, `left` the
    names of the others, `column` the first difference from the recorded rollout."""

    step: int
    begin: str
    numbers: list[tuple[str, float, float]]
    left: list[str]
    columns: int
    column: Difference | None
    notes: list[str]

    @property
    def differing(self) -> list[tuple[str, float, float]]:
        """The numbers that differ from the log."""
        return [one for one in self.numbers if not same(one[1], one[2])]

    @property
    def equal(self) -> bool:
        """Whether every number and every column is the same."""
        return not self.differing and self.column is None

    def verdict(self) -> str:
        """Return the result in one line: "same bits", or the first number that differs."""
        if self.differing:
            name, logged, now = self.differing[0]
            return (
                f"step {self.step} differs in {len(self.differing)} of {len(self.numbers)} numbers, the first is {name}: logged "
                f"{logged!r}, recomputed {now!r}"
            )
        if self.column is not None:
            return f"step {self.step}: the numbers are the same, the rollout differs {self.column}"
        columns = f" and {self.columns} columns of the rollout" if self.columns else ""
        return f"step {self.step}: same bits, {len(self.numbers)} numbers{columns}"

    def __str__(self) -> str:
        rows = [
            (name, repr(old), repr(new), "same" if same(old, new) else "differs") for name, old, new in self.numbers
        ]
        left = [f"not computed again: {', '.join(self.left)}"] if self.left else []
        shown = table(("number", "logged", "recomputed", ""), rows)
        return visible("\n".join([self.verdict(), self.begin, *self.notes, shown, *left]), layout=True)


def replay(run: str | Path, step: int, *, accept_changed: str | Sequence[str] = (), quiet: bool = True) -> Replayed:
    """Compute a step (from 1) of the run in a folder again, from the newest checkpoint before it and the recorded answers and
    scores, and compare the numbers with metrics.jsonl and the rollout. The folder is only read; nothing is generated or
    scored. `print(result)` shows the numbers; `result.equal` is True if all are the same.

    Raises RecipeError if the folder contains no run or the step was not made, and for inputs that have changed since the run
    began; `accept_changed` names those that may. Raises DataError if the rollout of a step is missing.
    """
    past = opened(run, step, accept_changed)
    loop = recomputed(past, quiet=quiet)
    return compared(past, loop)


def compared(past: PastRun, loop: OnlineReplay | OfflineReplay) -> Replayed:
    """Compare the numbers of a recomputed step with those of the record."""
    now = loop.numbers()
    both = [(name, value, now[name]) for name, value in past.logged.items() if name in now]
    left = [name for name in past.logged if name not in now and name != "step"]
    column, columns = None, 0
    if isinstance(loop, OnlineReplay):
        before = rollouts.read(past.folder, past.step)
        kept = {name: values for name, values in before.items() if name in loop.run.table}
        columns = len(kept)
        column = first_difference(past.step, kept, {name: loop.run.table[name] for name in kept})
    return Replayed(past.step, beginning(past), both, left, columns, column, past.notes)


def beginning(past: PastRun) -> str:
    """Return from where a step is computed, in words."""
    if past.found is None:
        several = "" if past.step == 1 else f"; steps 1 to {past.step} were computed"
        return f"no checkpoint before step {past.step} is there: computed from the start of the run{several}"
    before = int(past.found.name.removeprefix("step-"))
    several = "" if before + 1 == past.step else f"; steps {before + 1} to {past.step} were computed"
    return f"computed from the checkpoint of step {before}{several}"


def opened(run: str | Path, step: int, accept_changed: str | Sequence[str] = ()) -> PastRun:
    """Check a run folder, the step and the inputs; load no weights. Raises as `replay`."""
    where = Path(run)
    check_run(where)
    if isinstance(step, bool) or not isinstance(step, int):
        raise RecipeError(f"step: expected the number of a step, from 1, got {step!r:.80}")
    lines = {int(row["step"]): row for row in lines_of(where) if row["step"]}  # the evaluation of the start is no step
    if step not in lines:
        have = f"it has the steps {min(lines)} to {max(lines)}" if lines else "no step of it was finished"
        raise RecipeError(f"--step {step}: {where} has no such step; {have}")
    if folder.in_use(where) and first():
        caution(f"a session is training in {where}; its checkpoints may be removed in the meantime")
    forget_modules()
    tree = read_yaml(where / "recipe.yaml")
    method = str(tree.get("method", ""))
    if method not in catalogue.TRAINED:
        raise config.unknown_method(method)
    accepted = (accept_changed,) if isinstance(accept_changed, str) else tuple(accept_changed)
    _check_inputs(where, tree, accepted)
    recipe = adapters.completed(config.resolve(fields.kind_of(method), method, where / "recipe.yaml", [], tree))
    notes = _notes(where, recipe)
    plain: Any = type(recipe.eval)()  # an evaluation is not computed again
    recipe = replace(recipe, cluster=fields.Cluster(), eval=plain)
    job: online.OnlineJob | offline.OfflineJob
    if isinstance(recipe, fields.OnlineRecipe):
        job = online.prepare(method, recipe, recorded=True)
    else:
        job = offline.prepare(method, recipe)
    found = checkpoint.latest(where / "checkpoints", step - 1)
    return PastRun(where, method, job, step, lines[step], found, notes, accepted)


def _check_inputs(where: Path, tree: Mapping[str, Any], accepted: Sequence[str]) -> None:
    """Raise RecipeError if an input that a replay reads is missing or has changed since the run began. Reward functions and
    generators are not read: their results are in the record. Held-out rows are not either:
    an evaluation is not computed again."""
    for name, there in inputs.changed(where, tree, accepted).items():
        value = name.partition(": ")[2]
        if name.startswith(("generator.", "eval.")) or (name.startswith("reward.") and ":" in Path(value).name):
            continue
        told = "has changed since the run began" if there else "is not there; paths are relative to the current folder"
        raise RecipeError(
            f"{name}: the file {told}; restore it, or continue with --accept-changed {name.partition(': ')[0]}"
        )


def _notes(where: Path, recipe: fields.TrainingRecipe) -> list[str]:
    """Return what differs from the environment of the run, and may change the last digits."""
    before = environment_of(where)
    now = environment() | {"workers": int(os.environ.get("WORLD_SIZE", "1")), "threads": before.get("threads")}
    notes = [
        f"the run had {name} {before[name]}, this replay {now[name]}: the last digits may differ"
        for name in now
        if name in before and before[name] != now[name]
    ]
    if recipe.cluster.address is not None:
        notes.append("the run was on a cluster, this replay is in one process: the last digits may differ")
    return notes


def environment_of(where: Path) -> dict[str, Any]:
    """Return environment.json of a run, {} if it is not there. Raises RecipeError if it is not as whet writes it."""
    path = where / "environment.json"
    found = read_json(path, RecipeError) if path.is_file() else {}
    threads = found.get("threads", 1)
    if type(threads) is not int or not 1 <= threads <= fields.MOST_THREADS:
        raise RecipeError(
            f"{path}: threads: expected the number of threads of the run, got {threads!r:.40}; restore the file"
        )
    return found


def recomputed(past: PastRun, *, watch: bool = False, quiet: bool = True) -> OnlineReplay | OfflineReplay:
    """Load the models, compute the steps up to that of `past`, and return the loop. With `watch`, it keeps the losses before the
    reductions. Raises CheckpointError if the weights of a frozen model have changed."""
    job = past.job
    with ExitStack() as stack:
        workers, options = stack.enter_context(folder.working(job.recipe, folder.Options(False, quiet)))
        stack.enter_context(_threads(environment_of(past.folder).get("threads")))
        learner = _learner(job, workers)
        stack.enter_context(closing(learner))
        run = RecomputedRun(past.folder, past.step, past.accepted)
        given: dict[str, Any] = {"found": past.found, "watch": watch, "title": "replay", "quiet": options.quiet}
        if isinstance(job, online.OnlineJob):
            loop = OnlineReplay(
                job.algorithm, learner, rewards.unbuilt(job.recipe), job.prompts, job.recipe.sampling, job.plan, run, ptx=job.ptx,
                **given,
            )  # fmt: skip
            with loop:
                online_steps(loop)
            return loop
        rows = OfflineReplay(job.objective, learner, job.sources, job.plan, run, weights=job.weights, **given)
        with rows:
            offline_steps(rows)
        return rows


def _learner(job: online.OnlineJob | offline.OfflineJob, workers: Workers) -> Any:
    """Build the learner of a job. That of an online run has no reward models, since the scores are recorded."""
    make: Any = job.make
    return make(workers, scores=False) if isinstance(job, online.OnlineJob) else make(workers)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with this number of threads, as the run did."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
