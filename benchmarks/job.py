"""What every program of the benchmark is told: the line, the world, the order of the rows, and where its result goes."""

import argparse
import json
import os
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.meter import BEGAN, Meter
from benchmarks.workloads import ALGORITHMS, SIZES, WORK, Work


@dataclass(frozen=True)
class Job:
    """One run of one program. `order` are row numbers in the order in which they are to be taken; `fixed` means that every
    answer has exactly `max_new` tokens; `flags` are variants of the program."""

    algorithm: str
    work: Work
    world: Path
    order: tuple[int, ...]
    fixed: bool
    flags: tuple[str, ...]
    result: Path | None
    device: str = "cpu"

    def rows(self, name: str, count: int | None = None) -> list[dict[str, Any]]:
        """Return the first rows of a file of the world, in the order of the job; rows that it does not name come last."""
        found = [json.loads(line) for line in (self.world / f"{name}.jsonl").read_text().splitlines()][:count]
        first = [number for number in self.order if number < len(found)]
        named = set(first)
        return [found[number] for number in (*first, *(one for one in range(len(found)) if one not in named))]

    def meter(self) -> Meter:
        """Return the meter. Call it when everything is imported."""
        found = Meter(self.work.warmup, imported=time.time() - BEGAN)
        if self.device != "cpu":
            import torch

            found.sync = torch.cuda.synchronize
        return found

    def done(self, program: str, meter: Meter, **more: Any) -> None:
        """Write the result, and print it."""
        line = {"program": program, "algorithm": self.algorithm, "size": self.world.name, "fixed": self.fixed}
        line |= {"flags": list(self.flags), **meter.result(), **more, "versions": versions()}
        if self.device != "cpu":
            import torch

            line |= {"peak_gpu_mb": torch.cuda.max_memory_allocated() // 2**20, "gpu": torch.cuda.get_device_name()}
        if self.result is not None:
            self.result.write_text(json.dumps(line))
        print(json.dumps(line), flush=True)


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on, those that are installed."""
    found = {}
    for name in ("torch", "transformers", "trl", "whet"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def job_of(about: str) -> Job:
    """Read the job from the command line, and set up this process: one thread, nothing from the network."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=ALGORITHMS)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--world", type=Path, required=True, help="folder with one folder per size (benchmarks.world)")
    parser.add_argument("--order", type=Path, help="JSON list of row numbers")
    parser.add_argument("--steps", type=int, help="fewer steps than the workload has")
    parser.add_argument("--fixed", action="store_true", help="answers of exactly max_new tokens")
    parser.add_argument("--flag", action="append", default=[], help="a variant of the program; may be repeated")
    parser.add_argument("--result", type=Path, help="JSON file for the result")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="on cuda: bfloat16")
    given = parser.parse_args()
    for name, value in (("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ.setdefault(name, value)
    work = WORK[given.algorithm][given.size]
    if given.steps is not None:
        work = replace(work, steps=given.steps, rows=given.steps * work.batch, warmup=min(work.warmup, given.steps - 1))
    order = tuple(json.loads(given.order.read_text())) if given.order else ()
    return Job(
        given.algorithm,
        work,
        given.world / given.size,
        order,
        given.fixed,
        tuple(given.flag),
        given.result,
        given.device,
    )
