"""Check an implementation of the formulas against docs/conformance: `python -m whet.conformance MODULE [--vectors FILE]`.

MODULE has functions with the names in the file. They get the inputs as float64 torch tensors (bool for masks, int64 for
groups and ranks) by position, in the order of the file, and the options as keywords. Missing functions are skipped and
listed.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whet.terminal import say

VECTORS = Path(__file__).parent.parent.parent / "docs" / "conformance" / "vectors.json"


def check(module: Any, vectors: Sequence[Mapping[str, Any]], tolerance: float) -> tuple[list[str], list[str], int]:
    """Return (descriptions of the vectors that disagree, missing functions, number of vectors that agree)."""
    wrong, missing, right = [], [], 0
    for one in vectors:
        function = getattr(module, one["function"], None)
        if function is None:
            missing.append(one["function"])
            continue
        told = _difference(function, one, tolerance)
        if told:
            wrong.append(f"{one['function']}({one['formula']}; {one['options']}): {told}")
        else:
            right += 1
    return wrong, sorted(set(missing)), right


def _difference(function: Any, one: Mapping[str, Any], tolerance: float) -> str:
    """Describe how the result for one vector differs, or return "" if it agrees."""
    import torch

    expected = _tensor(one["expected"])
    try:
        got = function(*(_tensor(value) for value in one["inputs"].values()), **one["options"])
        got = torch.as_tensor(got, dtype=torch.float64)
    except Exception as error:  # another implementation may fail in any way
        return f"{type(error).__name__}: {error}"
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    off = float((got - expected).abs().max())
    return "" if off <= tolerance else f"off by up to {off:.3g}"


def _tensor(value: Any) -> Any:
    """Convert numbers to float64, integers to int64 and booleans to bool tensors."""
    import torch

    found = torch.tensor(value)
    return torch.tensor(value, dtype=torch.float64) if found.is_floating_point() else found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the vectors that disagree. Return 0 if all agree, 1 if not, 2 for invalid arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m whet.conformance", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    parser.add_argument("module", help="an importable module with the functions, such as whet.ops")
    parser.add_argument("--vectors", type=Path, default=VECTORS, help="the vectors' file")
    given = parser.parse_args(argv)
    if not given.vectors.is_file():
        say(
            f"{given.vectors}: no such file; it is docs/conformance/vectors.json of the project, give it with --vectors"
        )
        return 2
    sys.path.insert(0, "")
    try:
        module = importlib.import_module(given.module)
    except ImportError as error:
        say(f"{given.module}: {error}")
        return 2
    file = json.loads(given.vectors.read_text(encoding="utf-8"))
    wrong, missing, right = check(module, file["vectors"], file["tolerance"])
    for line in wrong:
        say(f"wrong: {line}")
    if missing:
        say(f"not there: {', '.join(missing)}")
    say(f"{right} of {len(file['vectors'])} vectors agree to {file['tolerance']}")
    return 1 if wrong or not right else 0


if __name__ == "__main__":
    sys.exit(main())
