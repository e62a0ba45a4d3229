"""whet beside TRL on a GPU: the shapes of Qwen2.5 0.5B and 1.5B with random weights, bfloat16; DPO, GRPO and PPO steps.

    python -m benchmarks.gpu [--n 3] [--sizes qwen05 qwen15] [--only dpo grpo ppo] [--skip trl] [--tiny]

The work and its check are those of `benchmarks.pairs`. Prints real tokens per second, the ratio over TRL with its spread, the
peak of allocated GPU memory, and the model FLOP utilisation: FLOPs of the matrix products that the method needs (2 per
parameter and token forward, 4 backward, no recomputation) over seconds times `--peak`. `--tiny` runs it on a CPU at a size that
shows that the code works.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.pairs import ROOT, Line, Programs, Setup, built, check, spread, turns
from benchmarks.world import SIZES

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 FLOP per second, by a part of the name of the GPU."""
FLOPS = {"dpo": 6 + 2, "grpo": 6 + 2, "ppo": 4 * 2 * 6 + 4 * 2}
"""FLOPs per parameter and real token. DPO: update, reference. GRPO: update, generation. PPO: four epochs of policy and critic;
generation, reference, value and reward."""


def parameters(size: str) -> int:
    """Return the parameters in matrix products of a model: its layers and its head.

    >>> parameters("qwen05") // 10**6
    493
    """
    about: dict[str, Any] = SIZES[size]
    hidden, kv = about["hidden"], about["hidden"] // about["heads"] * about["kv"]
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * about["inter"]
    return int(about["layers"] * layer + hidden * about.get("ids", about["vocab"]))


def utilisation(line: Line, tokens_per_s: float, peak: float) -> float:
    """Return the share of the peak FLOPs that the method needed."""
    return FLOPS[line.algorithm] * parameters(line.size) * tokens_per_s / peak


def measured(setup: Setup, line: Line, programs: Programs, count: int, peak: float | None) -> list[dict[str, Any]]:
    """Run one line and return one JSON line per program. Raise SystemExit if the work differed."""
    rows = turns(setup, line, programs, count)
    wrong = check(line, rows, close=0.02)  # bfloat16
    if wrong:
        raise SystemExit("not the same work:\n" + "\n".join(wrong))
    out = []
    for name, each in rows.items():
        speed = statistics.median(one["tokens_per_s"] for one in each)
        limit = peak or next((flops for part, flops in PEAK.items() if part in each[0].get("gpu", "")), None)
        ratios = [
            one["tokens_per_s"] / two["tokens_per_s"] for one, two in zip(each, rows.get("trl", each), strict=True)
        ]
        told = {"gpu_line": line.algorithm, "size": line.size, "program": name, "n": count, "tokens_per_s": speed}
        told |= {"to_trl": spread(ratios), "utilisation": round(utilisation(line, speed, limit), 4) if limit else None}
        out.append(told | {key: each[-1].get(key) for key in ("peak_gpu_mb", "gpu", "phases", "versions")})
    return out


def main() -> None:
    """Measure every line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=3)
    parser.add_argument("--sizes", nargs="*", default=["qwen05", "qwen15"])
    parser.add_argument("--only", nargs="*", default=["dpo", "grpo", "ppo"], choices=list(FLOPS))
    parser.add_argument("--skip", nargs="*", default=[], choices=["trl"])
    parser.add_argument("--tiny", action="store_true", help="on a CPU, at the size tiny")
    parser.add_argument("--peak", type=float, help="peak bfloat16 FLOP per second; default: known for some GPUs")
    parser.add_argument("--world", type=Path, default=ROOT / ".cache" / "bench")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--peer", default=str(ROOT / ".venv-peer-gpu" / "bin" / "python"))
    parser.add_argument("--peer-ppo", default=str(ROOT / ".venv-peer-gpu" / "ppo"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device, sizes = ("cpu", ["tiny"]) if given.tiny else ("cuda", given.sizes)
    setup = Setup(given.python, given.python, given.peer, given.peer_ppo, given.world.resolve(), None, device)
    programs = Programs.chosen(["lean", *given.skip], [], [])
    for size in sizes:
        built(setup, size)
        for algorithm in given.only:
            line = Line(algorithm, size, fixed=algorithm == "grpo")
            for told in measured(setup, line, programs, given.n, given.peak):
                print(json.dumps(told), flush=True)
                if given.out is not None:
                    with given.out.open("a") as file:
                        file.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
