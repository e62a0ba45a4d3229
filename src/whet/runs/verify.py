"""`whet verify-resume`: train a recipe without interruption and with kills and resumes, and compare the runs to the bit."""

import itertools
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whet.distributed import launched
from whet.errors import RecipeError, WhetError
from whet.loops.interrupt import graceful
from whet.loops.record import read_metrics
from whet.runs import config, early, inputs
from whet.runs import recipe as fields
from whet.runs.diff import diff
from whet.runs.yaml_text import yaml_tree
from whet.terminal import caution

OUT = "runs/verify-resume"
"""The folder without `out`; if it exists, a number is added."""
WHOLE, KILLED = "whole", "killed"
"""The folders of the run without interruption and of the killed one."""
METRICS, SAVED = "metrics.jsonl", "checkpoints/step-*"
EVALUATED = ("eval/*.parquet", "best/*")
"""The files of evaluations and of the best model, which are compared byte by byte."""
GLANCE = 0.002
"""Seconds between two looks at a running process."""


def taken(given: Mapping[str, Any]) -> tuple[fields.VerifyOptions, Path, dict[str, Any]]:
    """Split arguments into the options of verify-resume, its folder, and recipe fields. Raises RecipeError for an invalid
    option, or for a folder that is not empty."""
    names = config.fields_of(fields.VerifyOptions)
    own = config.converted({key: one for key, one in given.items() if key in names}, fields.VerifyOptions, "")
    rest = {key: one for key, one in given.items() if key not in {*names, "out"}}
    if "out" not in given:
        free = (Path(OUT if number == 1 else f"{OUT}-{number}") for number in itertools.count(1))
        return own, next(path for path in free if not path.exists()), rest
    out = Path(str(given["out"]))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"out: {out} is not empty; verify-resume needs a folder of its own, name another with --out")
    return own, out, rest


def verified(
    method: str, recipe: fields.TrainingRecipe, options: fields.VerifyOptions, out: Path, quiet: bool
) -> str | None:
    """Train twice below `out`. Return what differs first, or None if the runs are equal to the bit.

    Raises RecipeError if the recipe cannot be verified or a run refuses it, WhetError if a run fails.
    """
    _check(recipe)
    recipe = _prepared(recipe, options.steps)
    whole = Run(method, recipe, out / WHOLE, quiet)
    with graceful(at_once=True) as stop:  # a signal ends the process of the run too
        stop.saved = f"the runs in {out} were not compared"
        whole.say(f"first a run without interruption, in {whole.folder}")
        seconds = whole.to_the_end()
        rows = [row for row in read_metrics(whole.folder) if row["step"]]  # without the evaluation of the start
        steps, each = len(rows), sum(row["seconds"] for row in rows) / len(rows)
        every = save_interval(steps, options.kills)
        stream = random.Random(options.kill_seed)
        moments = kill_steps(steps, every, options.kills, stream)
        killed = Run(method, _saving(recipe, every), out / KILLED, quiet)
        more = seconds + options.kills * (seconds - steps * each + every * each)
        told = f"kills after step {', '.join(map(str, moments))}, a save every {every} steps"
        killed.say(f"it took {seconds:.0f} s; now {told}, in {killed.folder}: about {more:.0f} s")
        found = [killed.kill_after(step, stream.uniform(0.0, each)) for step in moments]
        inside = sum(one is not None and one < steps for one in found)
        if inside < options.kills:
            caution(f"{options.kills - inside} of {options.kills} kills came after the last step")
        killed.to_the_end()
    return first_difference(whole.folder, killed.folder)


def first_difference(whole: Path, killed: Path) -> str | None:
    """Return the first difference of two runs of one recipe, or None. `diff` compares what both runs have; here what only one of
    them has is a difference too: the metrics or the rollout of a step, or the last checkpoint."""
    found = diff(whole, killed)
    if found.parting is not None:
        return str(found.parting)
    for ours, theirs in zip(_parts(whole), _parts(killed), strict=True):
        if alone := sorted((Counter(ours) - Counter(theirs)) + (Counter(theirs) - Counter(ours))):
            return f"{alone[0]}: it is in one run alone"
    for name in (str(one.relative_to(whole)) for pattern in EVALUATED for one in sorted(whole.glob(pattern))):
        if (whole / name).read_bytes() != (killed / name).read_bytes():
            return f"{name}: the files differ"
    return None


def _parts(run: Path) -> list[list[str]]:
    """Return the names of the metrics, of the rollouts, of the answers of evaluations and of the files of the best model, and of the
    last checkpoint of a run."""
    metrics = [f"metrics of step {row['step']}" for row in read_metrics(run)]
    patterns = ("rollouts/*.parquet", *EVALUATED, SAVED)
    files = [sorted(str(one.relative_to(run)) for one in run.glob(name)) for name in patterns]
    return [metrics, *files[:-1], files[-1][-1:]]


def save_interval(steps: int, kills: int) -> int:
    """Return the steps between checkpoints: about two intervals for each kill, and 2 steps if there are few, so that a kill can
    lose a step.

    >>> [save_interval(steps, 3) for steps in (3, 4, 10, 100)]
    [1, 2, 2, 12]
    """
    return 1 if steps < 4 else max(2, steps // (2 * (kills + 1)))


def kill_steps(steps: int, every: int, kills: int, stream: random.Random) -> list[int]:
    """Return the steps after which a run of `steps` steps is killed, in order: steps without a save, after the first save."""
    free = [step for step in range(every, steps) if every == 1 or step % every] or [steps - 1]
    return sorted(stream.sample(free, kills) if kills <= len(free) else stream.choices(free, k=kills))


@dataclass(frozen=True)
class Run:
    """A run in processes of its own. Each start is the same command, with --resume if the folder holds the run already."""

    method: str
    recipe: Any
    folder: Path
    quiet: bool

    def to_the_end(self) -> float:
        """Run the command until it ends. Return its seconds. Raises RecipeError or WhetError if it fails."""
        began = time.monotonic()
        with self._process() as process:
            self._succeeded(process.wait())
        return time.monotonic() - began

    def kill_after(self, step: int, seconds: float) -> int | None:
        """Start the command and kill it `seconds` after it has written the metrics of a step. Return the number of steps that it
        had written then, or None if it ended before. Raises RecipeError or WhetError if it fails."""
        before = last = self._changed()
        with self._process() as process:
            while last == before or self._lines() < step:
                while self._changed() == last:
                    if process.poll() is not None:
                        self._succeeded(process.returncode)
                        return None
                    time.sleep(GLANCE)
                last = self._changed()
            time.sleep(seconds)
            process.kill()
        return self._lines()

    def say(self, text: str) -> None:
        """Print a line on the terminal, unless the run is quiet."""
        if not self.quiet:
            caution(text)

    @contextmanager
    def _process(self) -> Iterator[subprocess.Popen]:
        """Start the command. Its process is killed at the end of the context, if it still runs."""
        path = self.folder.with_suffix(".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config.to_yaml(self.recipe, self.method), encoding="utf-8")
        flags = [*(["--resume"] if early.begun(self.folder) else []), *(["--quiet"] if self.quiet else [])]
        words = [sys.executable, "-m", "whet", self.method, str(path), "--out", str(self.folder), *flags]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def _changed(self) -> int:
        """Return when metrics.jsonl was changed last, in nanoseconds; 0 if there is none."""
        file = self.folder / METRICS
        return file.stat().st_mtime_ns if file.is_file() else 0

    def _lines(self) -> int:
        return (self.folder / METRICS).read_bytes().count(b"\n")

    def _succeeded(self, status: int) -> None:
        if status:
            kind = RecipeError if status == 2 else WhetError
            raise kind(f"verify-resume: the run in {self.folder} ended with status {status}; its message is above")


def _check(recipe: fields.TrainingRecipe) -> None:
    """Raise RecipeError for a recipe whose runs cannot be started by this process, or are not equal to the bit."""
    if launched():
        raise RecipeError("verify-resume: it starts its own processes; call it without torchrun")
    if isinstance(recipe, fields.OnlineRecipe) and recipe.generator.max_staleness:
        raise RecipeError(
            "generator.max_staleness: answers that are generated ahead depend on time, so no two runs are equal; verify with "
            "--generator.max-staleness 0"
        )
    for name, value in inputs.strings(yaml_tree(config.to_yaml(recipe))):
        if value.startswith("python:"):
            raise RecipeError(
                f'{name}: the runs have processes of their own, which a function or object cannot reach; give "file.py:name"'
            )


def _prepared(recipe: fields.TrainingRecipe, steps: int | None) -> fields.TrainingRecipe:
    """Return the recipe without saves between steps and without trackers, and with the given number of steps."""
    recipe = replace(_saving(recipe, 0), trackers=[])
    if steps is None:
        return recipe
    if isinstance(recipe, fields.OnlineRecipe):
        return replace(recipe, rollout=replace(recipe.rollout, num_steps=steps, num_epochs=None))
    return replace(recipe, train=replace(recipe.train, num_steps=steps))


def _saving(recipe: fields.TrainingRecipe, every: int) -> fields.TrainingRecipe:
    train: Any = replace(recipe.train, save_every=every, save_last=True)
    return replace(recipe, train=train)
