"""Write benchmarks/RESULTS.md from the JSON lines of pairs, growth, real and gpu.

python -m benchmarks.results FILE.jsonl ... [--out benchmarks/RESULTS.md]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pairs import SPEED

COLUMNS = (
    "work",
    "program",
    "real tokens / CPU s",
    "samples / s",
    "over TRL",
    "over lean",
    "peak MB",
    "memory over TRL",
    "first step s",
    "phases %",
)


def cells(one: dict[str, Any]) -> list[str]:
    """Return the cells of one program of one line."""
    name = f"{one['algorithm']} {one['size']}{', fixed lengths' if one['fixed'] else ''}"
    phases = ", ".join(f"{phase} {100 * share:.0f}" for phase, share in list(one["phases"].items())[:4])
    memory = f"{one['memory_to_trl']:.2f}" if "memory_to_trl" in one else "-"
    return [
        name, one["program"], f"{one[SPEED]:.0f}", f"{one['samples_per_s']:.2f}", ratio(one.get("to_trl")), ratio(one.get("to_lean")),
        f"{one['peak_rss_mb']:.0f}", memory, f"{one['first_step_s']:.1f}", phases,
    ]  # fmt: skip


def ratio(found: Sequence[float] | None) -> str:
    """Return a ratio with its spread.

    >>> ratio([1.5, 1.25, 2.0])
    '1.50 (1.25-2.00)'
    """
    return "-" if found is None else f"{found[0]:.2f} ({found[1]:.2f}-{found[2]:.2f})"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines) + "\n"


def page(lines: Sequence[dict[str, Any]]) -> str:
    """Return the page."""
    pairs = [one for one in lines if "algorithm" in one]
    growth = [one for one in lines if "series" in one]
    out = [
        "# Results\n",
        "Written by `python -m benchmarks.results`. Ratios are medians, with the smallest and the largest of the repetitions.\n",
    ]
    if pairs:
        out.append(about(pairs))
        out.append(table(COLUMNS, [cells(one) for one in pairs]))
    if growth:
        out.append("## Growth of cost\n")
        rows = [[one["series"], f"{one['fitted']:.3f}", f"{one['bound']:.3f}"] for one in growth]
        out.append(table(("series", "exponent (memory: share of full logits)", "bound"), rows))
    real = [one for one in lines if "real" in one]
    if real:
        out.append("## The real model, over plain loops\n")
        names = ("whet_tokens_per_cpu_s", "plain_tokens_per_cpu_s", "whet_peak_rss_mb", "plain_peak_rss_mb")
        rows = [[one["real"], ratio(one["over_plain"]), *(f"{one[name]:.0f}" for name in names)] for one in real]
        out.append(table(("work", "over plain", "whet tokens / CPU s", "plain", "whet peak MB", "plain"), rows))
    gpu = [one for one in lines if "gpu_line" in one]
    if gpu:
        out.append("## On a GPU, bfloat16\n")
        rows = [
            [one["gpu_line"], one["size"], one["program"], str(one["gpu"]), f"{one['tokens_per_s']:.0f}", ratio(one["to_trl"]),
             str(one["peak_gpu_mb"]), str(one["utilisation"])]
            for one in gpu
        ]  # fmt: skip
        out.append(table(("work", "size", "program", "GPU", "tokens / s", "over TRL", "peak MB", "utilisation"), rows))
    return "\n".join(out)


def about(pairs: Sequence[dict[str, Any]]) -> str:
    """Return dates, repetitions, versions and machine of the lines, in words."""
    dates = sorted({one["date"] for one in pairs})
    counts = sorted({one["n"] for one in pairs})
    machines = sorted({"{cores} cores, {memory_gib} GiB, {kind}".format(**one["machine"]) for one in pairs})
    versions: dict[str, set[str]] = {}
    for one in pairs:
        for name, version in one["versions"].items():
            versions.setdefault(f"{name} ({one['program'].split()[0]})", set()).add(version)
    told = ", ".join(f"{name} {'/'.join(sorted(found))}" for name, found in sorted(versions.items()))
    return (
        f"Measured on {dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}; one thread, float32; repetitions: "
        f"{', '.join(map(str, counts))}. Machine: {'; '.join(machines)}. Versions: {told}.\n"
    )


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "RESULTS.md")
    given = parser.parse_args()
    lines = [json.loads(line) for file in given.files for line in file.read_text().splitlines()]
    given.out.write_text(page(lines))
    print(given.out)


if __name__ == "__main__":
    main()
