"""The peer (TRL), the lean loops and whet in turns on the same work: medians, and ratios with their spread.

    python -m benchmarks.pairs ALGORITHM SIZE [--n 3] [--fixed] [--skip trl] [--whet NAME=VALUE,...] [--trl FLAG,...]
    python -m benchmarks.pairs --lines sft:nano grpo:nano:fixed ... --out FILE.jsonl

Judge by real tokens per CPU second; one thread each. whet runs with its defaults; every `--whet` and `--trl` adds a variant.
The peer runs first, and the others take the rows in its order. The command fails if the programs did not do the same work:
the same rows and tokens in every step, the same number of updates, the first losses equal to 1e-4 where they are
defined alike (sft, reward, dpo), and with --fixed the same number of sampled tokens.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.workloads import ALGORITHMS, OFFLINE, SIZES

ROOT = Path(__file__).parent.parent
CLOSE = 1e-4
"""Largest relative difference between the losses of the first update; DPO starts at log 2, so its second update counts too."""
DEFAULT = (
    "sft:nano", "reward:nano", "dpo:nano", "grpo:nano:fixed", "grpo:nano", "rloo:nano:fixed", "ppo:nano:fixed",
    "generation:nano:fixed", "sft:micro", "reward:micro", "dpo:micro", "grpo:micro:fixed", "rloo:micro:fixed",
    "generation:micro:fixed",
)  # fmt: skip
"""The lines of `make bench`."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """Where the programs run: interpreters, the folder of TRL 1.12.0 for PPO, and the worlds."""

    whet: str
    lean: str
    peer: str
    peer_ppo: str
    world: Path
    steps: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Line:
    """One line of the benchmark."""

    algorithm: str
    size: str
    fixed: bool = False

    @classmethod
    def of(cls, text: str) -> "Line":
        """Read "sft:nano" or "grpo:nano:fixed"."""
        algorithm, size, *rest = text.split(":")
        if algorithm not in ALGORITHMS or size not in SIZES or rest not in ([], ["fixed"]):
            raise SystemExit(f"not a line: {text}; write ALGORITHM:SIZE or ALGORITHM:SIZE:fixed")
        return cls(algorithm, size, bool(rest))


@dataclass
class Programs:
    """Variants of each program, by name: (module, flags)."""

    of: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)

    @classmethod
    def chosen(cls, skip: Sequence[str], trl: Sequence[str], whet: Sequence[str]) -> "Programs":
        """The three programs without those that are skipped, and their variants."""
        found = {"trl": ("trl", ())} | {f"trl {one}": ("trl", tuple(one.split(","))) for one in trl}
        found |= {"lean": ("lean", ()), "whet": ("whet", ())}
        found |= {f"whet {one}": ("whet", tuple(one.split(","))) for one in whet}
        return cls({name: one for name, one in found.items() if one[0] not in skip})


def run(setup: Setup, line: Line, program: str, flags: Sequence[str], order: Path | None) -> Result:
    """Run one program once, in a process of its own. Raise SystemExit with the end of its output if it fails."""
    python = {"trl": setup.peer, "lean": setup.lean, "whet": setup.whet}[program]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [python, "-m", f"benchmarks.{program}_run", line.algorithm, line.size, "--world", str(setup.world)]
        command += ["--result", str(result), *(["--fixed"] if line.fixed else [])]
        command += [*(["--order", str(order)] if order else []), *(word for one in flags for word in ("--flag", one))]
        command += ["--steps", str(setup.steps)] if setup.steps else []
        command += ["--device", setup.device]
        paths = [str(ROOT / "src")] if program == "whet" else []
        if program == "trl" and line.algorithm == "ppo":
            paths = [setup.peer_ppo]
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        own |= {"PYTHONPATH": os.pathsep.join(paths), "BENCH_BEGAN": str(time.time())}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True)
        if not result.is_file():
            raise SystemExit(f"{' '.join(command)}\nfailed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        return dict(json.loads(result.read_text()))


def built(setup: Setup, size: str) -> None:
    """Build the world of a size if it is not there."""
    if not (setup.world / size / "world.json").is_file():
        build = [setup.whet, "-m", "benchmarks.world", size, "--out", str(setup.world / size)]
        subprocess.run(build, cwd=ROOT, check=True)


def turns(setup: Setup, line: Line, programs: Programs, count: int) -> dict[str, list[Result]]:
    """Run all programs alternately, `count` times."""
    rows: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory() as folder:
        order: Path | None = None
        for _ in range(count):
            for name, (program, flags) in programs.of.items():
                if program == "trl" and flags == ("grouplen",) and line.algorithm != "sft":
                    continue
                plain = program != "trl" or not flags
                rows.setdefault(name, []).append(run(setup, line, program, flags, None if program == "trl" else order))
                taken = rows[name][-1].get("order")
                if taken and plain and order is None:
                    order = Path(folder) / "order.json"
                    order.write_text(json.dumps(taken))
            done = {name: each[-1]["tokens_per_cpu_s"] for name, each in rows.items()}
            print(f"  {line.algorithm} {line.size}: {done}", file=sys.stderr, flush=True)
    return rows


def check(line: Line, rows: Mapping[str, Sequence[Result]], close: float = CLOSE) -> list[str]:
    """Return what differs between the work of the programs; [] if it is the same. Variants of the peer with another order
    (packed, or grouped by length) are compared by their totals alone."""
    found = []
    base_name = next(iter(rows))
    base = rows[base_name][0]
    for name, each in rows.items():
        for one in each:
            own = name.startswith("trl ")
            found += [f"{name}: {text} (and {base_name})" for text in differences(line, base, one, own, close)]
    return sorted(set(found))


def differences(line: Line, base: Result, one: Result, own_order: bool, close: float = CLOSE) -> list[str]:
    """Return in words how the work of one result differs from that of another."""
    found = []
    for number in ("updates",) if line.algorithm != "generation" else ():
        if base[number] != one[number]:
            found.append(f"{one[number]} {number}, not {base[number]}")
    if own_order:
        return found
    same = ["step_prompt_tokens"] if line.algorithm not in OFFLINE else ["step_tokens"]
    same += ["step_answer_tokens"] if line.fixed else []
    for name in same:
        if base[name] != one[name]:
            found.append(f"{name} {one[name][:4]} ..., not {base[name][:4]} ...")
    if line.algorithm in OFFLINE:
        for step, (ours, theirs) in enumerate(zip(one["losses"][:2], base["losses"][:2], strict=True)):
            if abs(ours - theirs) > close * abs(theirs):
                found.append(f"loss {ours:.6f} of update {step + 1}, not {theirs:.6f}")
    return found


def summary(line: Line, rows: Mapping[str, Sequence[Result]]) -> list[Result]:
    """Return one line per program: medians over the turns, and ratios to the peer and to the lean loop of the same turn."""
    out = []
    for name, each in rows.items():
        median = {key: statistics.median(one[key] for one in each) for key in MEDIANS}
        ratios = {
            f"to_{other}": spread([one[SPEED] / two[SPEED] for one, two in zip(each, rows[other], strict=True)])
            for other in ("trl", "lean")
            if other in rows
        }
        memory = {
            f"memory_to_{other}": round(
                median["peak_rss_mb"] / statistics.median(two["peak_rss_mb"] for two in rows[other]), 3
            )
            for other in ("trl", "lean")
            if other in rows
        }
        about = {"algorithm": line.algorithm, "size": line.size, "fixed": line.fixed, "program": name, "n": len(each)}
        last = {key: each[-1][key] for key in ("phases", "updates", "samples", "tokens", "losses", "versions")}
        last["losses"] = last["losses"][:2]
        out.append(about | median | ratios | memory | last | {"date": time.strftime("%Y-%m-%d"), "machine": machine()})
    return out


SPEED = "tokens_per_cpu_s"
MEDIANS = (
    SPEED, "tokens_per_s", "samples_per_s", "samples_per_cpu_s", "cpu_s", "wall_s", "peak_rss_mb", "import_s",
    "first_step_s",
)  # fmt: skip


def spread(ratios: Sequence[float]) -> list[float]:
    """Return [median, smallest, largest]."""
    return [round(one, 3) for one in (statistics.median(ratios), min(ratios), max(ratios))]


def machine() -> dict[str, Any]:
    """Return the machine without its name: cores, memory in GiB, kind of processor."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cores": os.cpu_count(), "memory_gib": round(memory), "kind": os.uname().machine}


def show(lines: Sequence[Result]) -> None:
    """Print the summary of one line as a table."""
    print(f"\n{lines[0]['algorithm']} {lines[0]['size']}{' (fixed lengths)' if lines[0]['fixed'] else ''}")
    for one in lines:
        ratios = "  ".join(
            f"{other} x{one[f'to_{other}'][0]:.2f} ({one[f'to_{other}'][1]:.2f}-{one[f'to_{other}'][2]:.2f})"
            for other in ("trl", "lean")
            if f"to_{other}" in one
        )
        phases = " ".join(f"{name} {100 * share:.0f}%" for name, share in list(one["phases"].items())[:5])
        print(
            f"  {one['program']:<24} {one[SPEED]:>9.1f} tokens/CPU s  {one['samples_per_s']:>8.2f} samples/s  "
            f"{one['peak_rss_mb']:>6.0f} MB  import {one['import_s']:.1f} s, first step {one['first_step_s']:.1f} s  {ratios}  {phases}"
        )
    sys.stdout.flush()


def measured(setup: Setup, line: Line, programs: Programs, count: int, out: Path | None) -> list[str]:
    """Run, print and write one line. Return what was not the same work."""
    built(setup, line.size)
    rows = turns(setup, line, programs, count)
    lines = summary(line, rows)
    show(lines)
    wrong = check(line, rows)
    if out is not None and not wrong:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.writelines(json.dumps(one) + "\n" for one in lines)
    return [f"{line.algorithm} {line.size}: {one}" for one in wrong]


def main() -> None:
    """Measure one line, or several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", nargs="?", choices=ALGORITHMS)
    parser.add_argument("size", nargs="?", choices=SIZES)
    parser.add_argument("--fixed", action="store_true", help="answers of exactly max_new tokens")
    parser.add_argument("--lines", nargs="*", help=f"several lines; without any: {' '.join(DEFAULT)}")
    parser.add_argument("--n", type=int, default=3, help="repetitions")
    parser.add_argument("--steps", type=int, help="fewer steps than the workload has")
    parser.add_argument("--skip", nargs="*", default=[], choices=["trl", "lean", "whet"])
    parser.add_argument("--trl", action="append", default=[], help="a variant of the peer, such as grouplen or bf16,gc")
    parser.add_argument("--whet", action="append", default=[], help="a variant of whet, such as train.packing=true")
    parser.add_argument("--out", type=Path, help="file that gets one JSON line per program")
    parser.add_argument("--world", type=Path, default=ROOT / ".cache" / "bench", help="folder with one folder per size")
    parser.add_argument("--python", default=sys.executable, help="interpreter of whet")
    parser.add_argument("--lean-python", help="interpreter of the lean loops; default: whet's")
    parser.add_argument("--peer", default=str(ROOT / ".venv-peer" / "bin" / "python"), help="interpreter with TRL")
    parser.add_argument("--peer-ppo", default=str(ROOT / ".venv-peer" / "ppo"), help="folder with trl 1.12.0, for PPO")
    given = parser.parse_args()
    if given.lines is None and (given.algorithm is None or given.size is None):
        parser.error("name an algorithm and a size, or --lines")
    lines = [Line.of(one) for one in given.lines or DEFAULT] if given.lines is not None else [
        Line(given.algorithm, given.size, given.fixed)
    ]  # fmt: skip
    lean = given.lean_python or given.python
    setup = Setup(given.python, lean, given.peer, given.peer_ppo, given.world.resolve(), given.steps)
    programs = Programs.chosen(given.skip, given.trl, given.whet)
    wrong = [text for line in lines for text in measured(setup, line, programs, given.n, given.out)]
    if wrong:
        raise SystemExit("not the same work:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
