"""`whet verify-resume`: train a recipe without interruption and with kills and resumes, and compare the runs to the bit."""

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whet.distributed import launched
from whet.errors import RecipeError, WhetError
from whet.loops.record import read_metrics
from whet.runs import config, folder, inputs
from whet.runs import recipe as fields
from whet.runs.compare import first_difference

OUT = "runs/verify-resume"
"""The folder without `out`; if it exists, a number is added."""
WHOLE, KILLED = "whole", "killed"
"""The folders of the run without interruption and of the killed one."""
GLANCE = 0.01
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


def verified(method: str, recipe: fields.TrainingRecipe, options: fields.VerifyOptions, out: Path, quiet: bool) -> str | None:
    """Train twice below `out`. Return what differs first, or None if the runs are equal.

    Raises RecipeError if the recipe cannot be verified or a run refuses it, WhetError if a run fails.
    """
    _check(recipe)
    recipe = _shortened(recipe, options.steps)
    whole, killed = Run(method, recipe, out / WHOLE, quiet), Run(method, recipe, out / KILLED, quiet)
    say(f"the run without interruption: {whole.folder}")
    seconds = whole.to_the_end()
    rows = read_metrics(whole.folder)
    steps, each = len(rows), sum(row["seconds"] for row in rows) / len(rows)
    every = max(1, min(steps // 2, max(2, steps // (2 * (options.kills + 1)))))
    stream = random.Random(options.kill_seed)
    moments = kill_steps(steps, every, options.kills, stream)
    more = seconds + len(moments) * (seconds - steps * each + every * each)
    say(f"it took {seconds:.0f} s; the run with {len(moments)} kills takes about {more:.0f} s: {killed.folder}")
    killed.recipe = replace(recipe, train=replace(recipe.train, save_every=every))
    for step in moments:
        killed.kill_after(step, stream.uniform(0.0, each))
    killed.to_the_end()
    return first_difference(whole.folder, killed.folder)


def kill_steps(steps: int, every: int, kills: int, stream: random.Random) -> list[int]:
    """Return the steps after which a run of `steps` steps is killed, in order: steps that are not saved, if there are any.

    >>> kill_steps(10, 2, 3, random.Random(0))
    [3, 7, 9]
    """
    free = [step for step in range(1, steps) if step % every] or list(range(steps))
    return sorted(stream.sample(free, kills) if kills <= len(free) else stream.choices(free, k=kills))


@dataclass
class Run:
    """A run in processes of its own: each start is the command `whet METHOD RECIPE`, with --resume if it has begun."""

    method: str
    recipe: Any
    folder: Path
    quiet: bool

    def to_the_end(self) -> float:
        """Run the command until it ends. Return its seconds. Raises RecipeError or WhetError if it fails."""
        began = time.monotonic()
        with self._started() as process:
            self._ended(process.wait())
        return time.monotonic() - began
