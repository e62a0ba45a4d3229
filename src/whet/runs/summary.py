"""The end of a run in words: start, end and best of the numbers that matter, where everything lies, and the next commands."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whet.loops.history import History
from whet.loops.metrics import direction, timed
from whet.loops.record import read_metrics
from whet.loops.tables import table
from whet.methods.catalogue import ONLINE, ONLINE_PREFERENCE, PREFERENCE
from whet.runs.yaml_text import read_yaml

LIES: Mapping[str, str] = {
    "model": "the trained model, in Hugging Face format",
    "best": "the model of the best step",
    "ema": "the moving average of the model",
    "report.html": "the report of the run",
    "metrics.jsonl": "the numbers of each step (docs/metrics.md)",
    "rollouts": "the answers of each step",
    "eval": "the answers of each evaluation",
    "recipe.yaml": "the whole recipe; whet train runs it again",
}
"""What a run folder holds, in the order of the summary."""


def summary(folder: Path) -> str:
    """Return the summary of the run in a folder: a table of the numbers that matter at its first and its last step and at their
    best one, and the files that are there. Numbers come from metrics.jsonl, so a resumed run is summed up whole."""
    rows, past = read_metrics(folder), History()
    for row in rows:
        past.add({name: value for name, value in row.items() if name != "step"})
    cells = [[name, *_ends(name, rows)] for name in past.shown() if not timed(name)]
    steps, seconds = max((int(row["step"]) for row in rows), default=0), sum(row.get("seconds", 0.0) for row in rows)
    lines = [f"{steps} step{'' if steps == 1 else 's'} in {_duration(seconds)}", ""]
    lines += [table(["", "start", "end", "best", "at step"], cells), ""] if cells else []
    there = [name for name in LIES if (folder / name).exists()]
    width = max((len(str(folder / name)) for name in there), default=0)
    return "\n".join([*lines, *(f"{folder / name!s:<{width}}  {LIES[name]}" for name in there)])


def _ends(name: str, rows: Sequence[Mapping[str, float]]) -> list[Any]:
    """Return the first, the last and the best value of a number, and the step of the best one; None where there is none."""
    known = [(row[name], int(row["step"])) for row in rows if name in row]
    better = direction(name)
    finite = [one for one in known if math.isfinite(one[0])]
    if better is None or not finite:
        return [_digits(known[0][0]), _digits(known[-1][0]), None, None]
    if len({value for value, _ in finite}) == 1:  # it never moved
        return [_digits(known[0][0]), _digits(known[-1][0]), None, None]
    value, step = (max if better == "higher" else min)(finite, key=lambda one: one[0])
    return [_digits(known[0][0]), _digits(known[-1][0]), _digits(value), step]


def _digits(value: float) -> float:
    """Return a number with four digits."""
    return float(f"{value:.4g}")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{seconds:.1f} s" if seconds < 60 else f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def following(folder: Path) -> list[str]:
    """Return commands that make sense after the run in a folder, with its paths. A word in capitals is to be filled in.

    SFT: look at answers, then train with a reward. Reward models: train a policy against it. Preference and online methods: compare
    the model with the one that the run started from, on the held-out rows and under the held-out judge if the run had them.
    """
    recipe = read_yaml(folder / "recipe.yaml")
    method, start = str(recipe.get("method")), _path(recipe.get("model", {}).get("path"), "MODEL")
    data, model = _data(recipe), str(folder / ("best" if (folder / "best").is_dir() else "model"))
    held_out = _path((recipe.get("eval") or {}).get("data"), data)
    length = (recipe.get("sampling") or {}).get("max_new_tokens", 64)
    limit = ["--max-new-tokens", str(length)]
    if method == "reward":
        return [_command("ppo", "--model", start, "--data", data, "--reward", model)]
    if method in {*ONLINE, *ONLINE_PREFERENCE, *PREFERENCE}:
        return [
            _command(
                "eval", "--model", model, "--against", start, "--data", held_out, "--judge", _judge(recipe), *limit
            )
        ]
    sample = ["sample", "--model", model, "--data", data, *limit, "--out", f"{folder}-answers.jsonl"]
    ppo = ["ppo", "--model", model, "--data", data, "--reward", "REWARD"]
    return (
        [_command(*sample), _command(*ppo)]
        if method == "sft"
        else [_command("sft", "--model", model, "--data", "DATA")]
    )


def _command(*words: str) -> str:
    return shlex.join(["whet", *words])


def _path(value: Any, otherwise: str) -> str:
    """Return a path or a name of a recipe; a word to be filled in for an object of a Python program."""
    return value if isinstance(value, str) and value and not value.startswith("python:") else otherwise


def _data(recipe: Mapping[str, Any]) -> str:
    """Return the file of the rows that the run trained on, the first one of several."""
    rows = (recipe.get("data") or {}).get("train")
    first = rows[0] if isinstance(rows, list) and rows else rows
    return _path(first.get("path") if isinstance(first, Mapping) else first, "DATA")


def _judge(recipe: Mapping[str, Any]) -> str:
    """Return the held-out judge of a run, "JUDGE" if it has none: the reward that it was trained on is no judge of it. One with options
    is left out, since the command would lack them."""
    for one in (recipe.get("eval") or {}).get("judge") or []:
        source = _path(one.get("source") if isinstance(one, Mapping) else one, "")
        if source and not (isinstance(one, Mapping) and one.get("options")):
            return source
    return "JUDGE"
