"""Comparing the numbers of two runs that should be equal but for rounding."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
from torch import Tensor


class Failed(str):
    """A case that raised, with its traceback."""


NATS = math.log(27)
"""The log-prob of a token under a uniform distribution over the 27 words of the tiny models."""
SCALES = (
    (re.compile(r"kl|logp|gap|entropy"), NATS),
    (re.compile(r"norm"), 0.1),
    (re.compile(r"\blr\b"), 1e-3),
    (re.compile(r"loss|score|reward|value|advantage|returns|ratio|fraction|variance"), 1.0),
)
"""The size of what a number is a difference or a sum of, by its name; rounding has that size, however small the number is.
A KL is a difference of log-probs. A policy's loss is a sum of advantages of size 1 that nearly cancel."""
SMALL = 0.1
"""The same for every other number, and for a tensor, whose largest element is its scale otherwise."""
LEFT_OUT = re.compile(r"second|explained_variance")
"""Times, and a number that trains nothing and divides by a variance near 0."""


def leaves(thing: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every number, tensor and string in nested results, with its path."""
    if isinstance(thing, Mapping):
        for key, value in thing.items():
            yield from leaves(value, f"{where}/{key}")
    elif isinstance(thing, (list, tuple)):
        for number, value in enumerate(thing):
            yield from leaves(value, f"{where}/{number}")
    else:
        yield where, thing


def scale_of(where: str) -> float:
    """The scale below which a difference of the number at this path counts absolutely."""
    return next((scale for pattern, scale in SCALES if pattern.search(where)), SMALL)


def gap(got: Any, expected: Any) -> tuple[float, str]:
    """(the largest difference of nested results relative to its scale, its path). Strings, whole numbers and lengths must be equal."""
    ours, theirs = dict(leaves(got)), dict(leaves(expected))
    if ours.keys() != theirs.keys():
        return float("inf"), f"only on one side: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    worst, place = 0.0, ""
    for where, one in ours.items():
        other = theirs[where]
        if LEFT_OUT.search(where):
            continue
        if isinstance(one, Tensor):
            scale = max(float(other.abs().max()), SMALL) if other.numel() else 1.0
            fits = one.shape == other.shape
            off = float((one.double() - other.double()).abs().max()) / scale if fits and one.numel() else 0.0
            off = off if fits else float("inf")
        elif isinstance(one, float):
            off = abs(one - other) / max(abs(other), scale_of(where))
        else:
            off = 0.0 if one == other or isinstance(one, Failed) else float("inf")  # a traceback is another's own
        if not off <= worst:
            worst, place = off if off == off else float("inf"), where
    return worst, place


TOLERANCE = 1e-5


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rollouts(folder: Path) -> list[dict[str, list]]:
    return [pyarrow.parquet.read_table(file).to_pydict() for file in sorted((folder / "rollouts").glob("*.parquet"))]
