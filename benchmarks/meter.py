"""The meter of a benchmark run: real tokens, seconds, memory and phases per step. Needs no package, so every environment has it."""

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BEGAN = float(os.environ.get("BENCH_BEGAN", time.time()))
"""Second (Unix time) at which the process was started."""


@dataclass
class Step:
    """One update, or one rollout with its updates. Tokens are real ones: padding is not counted."""

    wall: float
    cpu: float
    samples: int
    tokens: int
    prompt_tokens: int
    answer_tokens: int
    phases: dict[str, float]


@dataclass
class Meter:
    """Collect steps. The first `warmup` ones are left out of the result."""

    warmup: int
    steps: list[Step] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    updates: int = 0
    imported: float = 0.0
    first: float = 0.0
    last: tuple[float, float] = (0.0, 0.0)
    phases: dict[str, float] = field(default_factory=dict)
    sync: Callable[[], None] = lambda: None
    """Waits for the device, so that a step ends when its work has ended."""

    def begin(self) -> None:
        """Start the clock, right before the first step."""
        self.sync()
        self.last = (time.perf_counter(), time.process_time())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall seconds of the block to a phase of this step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - began

    def timed(self, owner: Any, name: str, phase: str) -> None:
        """Replace a function of an object by one whose seconds count for a phase."""
        inner = getattr(owner, name)

        def outer(*given: Any, **options: Any) -> Any:
            with self.phase(phase):
                return inner(*given, **options)

        setattr(owner, name, outer)

    def step(self, samples: int, tokens: int = 0, *, prompt_tokens: int = 0, answer_tokens: int = 0) -> None:
        """End a step. `tokens` are all real tokens; without it they are those of prompts and answers."""
        self.sync()
        now = (time.perf_counter(), time.process_time())
        tokens = tokens or prompt_tokens + answer_tokens
        wall, cpu = now[0] - self.last[0], now[1] - self.last[1]
        self.steps.append(Step(wall, cpu, samples, tokens, prompt_tokens, answer_tokens, self.phases))
        self.phases, self.last = {}, now
        self.first = self.first or time.time() - BEGAN

    def result(self) -> dict[str, Any]:
        """Return the numbers of the steps after the first ones, as JSON."""
        rows = self.steps[self.warmup :]
        wall, cpu = sum(row.wall for row in rows), sum(row.cpu for row in rows)
        samples, tokens = sum(row.samples for row in rows), sum(row.tokens for row in rows)
        shares: dict[str, float] = {}
        for row in rows:
            for name, seconds in row.phases.items():
                shares[name] = shares.get(name, 0.0) + seconds / wall
        return {
            "steps": len(rows), "updates": self.updates, "samples": samples, "tokens": tokens,
            "wall_s": round(wall, 3), "cpu_s": round(cpu, 3),
            "samples_per_s": round(samples / wall, 3), "tokens_per_s": round(tokens / wall, 1),
            "samples_per_cpu_s": round(samples / cpu, 3), "tokens_per_cpu_s": round(tokens / cpu, 1),
            "phases": {name: round(share, 3) for name, share in sorted(shares.items(), key=lambda one: -one[1])},
            "peak_rss_mb": peak_rss_mb(), "import_s": round(self.imported, 2), "first_step_s": round(self.first, 2),
            "losses": self.losses, "step_tokens": [row.tokens for row in self.steps],
            "step_prompt_tokens": [row.prompt_tokens for row in self.steps],
            "step_answer_tokens": [row.answer_tokens for row in self.steps],
        }  # fmt: skip


def peak_rss_mb() -> int:
    """Return the peak resident memory of this process in MiB, without what the process that started it had."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
