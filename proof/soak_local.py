"""Runs on this machine that are killed at random moments and started again end as the uninterrupted run does, to the bit.

`python -m proof.soak_local --kills 100 --seed 0` trains tiny models with every method: one run without interruption, and runs
that get SIGKILL, SIGTERM or SIGINT at a random moment, in a step, inside a save, or after the last step. A supervisor repeats the same
command, with --resume, until it ends with status 0. Each start is a fork of this process, which has imported the libraries already.
"""

import argparse
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from proof.small_runs import SHORT, every, on_rows, write_inputs
from whet.loops import checkpoint
from whet.loops.record import read_metrics
from whet.runs.verify import first_difference

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PLACES = ("anywhere", "step", "save", "end")
"""Where a kill is aimed: any moment of the process, after its first step, inside a checkpoint, or after the last step."""
LATE = {"anywhere": 0.0, "step": 0.1, "save": 0.004, "end": 0.03}
"""Seconds from the moment when the place is seen to the signal, at most: about the length of what happens there."""
FELL = ("start", "step", "save", "end")
"""Where a kill fell: before the first step of the process, in a step, in a save, or after the last step."""
WITHIN = 60.0
"""Seconds in which a process must end after a signal, or after its start if it gets none."""
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")
"""Events of Python's audit hooks that change files. An event comes before its operation."""
TRIES = 10
"""Runs in a row that may end before the kill that is aimed at them."""
USED = ("transformers.models.qwen3.modeling_qwen3", "transformers.models.auto.modeling_auto", "peft", "pyarrow.parquet",
        "whet.cli.main", "whet.runs.train", "whet.runs.config")  # fmt: skip
"""What the children import; this process imports it once."""


@dataclass(frozen=True)
class Kill:
    """One signal to a run, and where it is aimed."""

    signal: signal.Signals
    place: str


@dataclass(frozen=True)
class Seen:
    """The state of a run folder: unfinished checkpoints, the last saved step, and when metrics.jsonl changed, in ns."""

    aside: set[str]
    saved: int
    changed: int


NOTHING = Seen(set(), 0, 0)
"""The state of a run folder that does not exist."""


@dataclass
class Line:
    """What happened to one configuration: the signals sent, where they fell, and the differences found."""

    name: str
    signals: Counter[str] = field(default_factory=Counter)
    fell: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    runs: int = 0
    mismatches: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        """Return the cells of the line in the printed table."""
        counts = [*(self.signals[one.name] for one in SIGNALS), *(self.fell[place] for place in FELL)]
        return [self.name, *map(str, [*counts, self.runs, self.starts, len(self.mismatches)])]


class Supervisor:
    """Starts one command again and again until it ends with status 0, and sends the signals of `kills` to its processes.

    `last` is the last step of the run, `life` the seconds of an uninterrupted process.
    """

    def __init__(self, words: Sequence[str], home: Path, out: str, *, last: int = 0, life: float = 0.0) -> None:
        self.words, self.home, self.out = [*words, "--out", out], home, home / out
        self.last, self.life = last, life

    def run(self, kills: list[Kill], line: Line, stream: random.Random) -> None:
        """Run the command to its end. Kills that reached a process are removed from `kills`. Raises RuntimeError if a process
        fails, or does not end after a signal."""
        while True:
            before, child = self._seen(), forked(self._command)
            line.starts += 1
            place = self._send(kills[0], child, before, stream) if kills else None
            child.join(WITHIN)
            if child.exitcode is None:
                child.kill()
                after = kills[0].signal.name if place else "its start"
                raise RuntimeError(f"{line.name}: it did not end {WITHIN:g} s after {after}; {self._log()}")
            if place:
                done = kills.pop(0)
                line.signals[done.signal.name] += 1
                line.fell[place] += 1
            elif child.exitcode:
                raise RuntimeError(f"{line.name}: status {child.exitcode} without a signal; {self._log()}")
            if child.exitcode == 0:
                return

    def stopped_at(self, number: int) -> int:
        """Run the command in a process that is killed before its file operation `number` in the run folder. Return the number
        of operations before. Raises RuntimeError if the process fails."""
        counted = multiprocessing.get_context("fork").RawValue("i", 0)
        child = forked(partial(self._command, partial(_count, str(self.out), counted, number)))
        child.join(WITHIN)
        if child.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"status {child.exitcode} before file operation {number}; {self._log()}")
        return counted.value

    def _command(self, hook: Callable[..., None] | None = None) -> None:
        from whet.cli.main import main

        os.chdir(self.home)
        handle = os.open(self.home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if hook is not None:
            sys.addaudithook(hook)
        sys.exit(main([*self.words, "--resume"]))

    def _send(self, kill: Kill, child: BaseProcess, before: Seen, stream: random.Random) -> str | None:
        """Wait for the moment, send the signal, and return where it fell. Return None if the process ended before it."""
        moment, late = time.monotonic() + stream.uniform(0.0, self.life), stream.uniform(0.0, LATE[kill.place])
        while time.monotonic() < moment if kill.place == "anywhere" else self.place(before) != kill.place:
            time.sleep(0.0005)
            if not child.is_alive():
                return None
        time.sleep(late)
        place = self.place(before)
        if not child.is_alive():
            return None
        assert child.pid is not None
        with suppress(ProcessLookupError):
            os.kill(child.pid, kill.signal)
        return place

    def last_step(self) -> int:
        """Return the last saved step."""
        return self._seen().saved

    def _seen(self) -> Seen:
        saves, metrics = self.out / "checkpoints", self.out / "metrics.jsonl"
        saved = max((int(path.name[5:]) for path in saves.glob("step-*")), default=0)
        changed = metrics.stat().st_mtime_ns if metrics.is_file() else 0
        return Seen({path.name for path in saves.glob(f"{checkpoint.ASIDE}*")}, saved, changed)

    def place(self, before: Seen) -> str:
        """Return where the process is, which has found the run folder as `before`."""
        now = self._seen()
        if now.aside - before.aside:
            return "save"
        if now.saved == self.last:
            return "end"
        begun = now.changed != before.changed and len(read_metrics(self.out)) > before.saved
        return "step" if begun else "start"

    def _log(self) -> str:
        return "the end of its output:\n" + (self.home / "log").read_text()[-2000:]


def _count(folder: str, counted: Any, number: int, event: str, given: tuple[Any, ...]) -> None:
    """Count the file operations in a folder, as an audit hook, and kill this process before operation `number`."""
    names = [os.fspath(one) for one in given if isinstance(one, (str, os.PathLike))]
    reads = event == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR)
    if event not in OPERATIONS or reads or not any(folder in os.path.abspath(name) for name in names):
        return
    if counted.value + 1 == number:
        os.kill(os.getpid(), signal.SIGKILL)
    counted.value += 1


def forked(work: Callable[[], None]) -> BaseProcess:
    """Start a fork of this process. This process itself uses no library that has locks, which a killed child would leave closed."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def soak(home: Path, configurations: Mapping[str, Sequence[str]], kills: int, seed: int) -> Iterator[Line]:
    """Deal the kills to the configurations, run each of these, and yield what happened."""
    stream = random.Random(seed)
    deck = [Kill(kind, place) for kind in SIGNALS for place in PLACES]
    dealt = [kill for _ in range(kills // len(deck) + 1) for kill in stream.sample(deck, len(deck))][:kills]
    for number, (name, words) in enumerate(configurations.items()):
        left, line, folder = dealt[number :: len(configurations)], Line(name), f"runs/{number}"
        began = time.monotonic()
        whole = Supervisor(words, home, f"{folder}/whole")
        whole.run([], Line(name), stream)
        life, last = time.monotonic() - began, whole.last_step()
        missed = 0
        while left and missed < TRIES:
            before = len(left)
            killed = Supervisor(words, home, f"{folder}/{line.runs}", last=last, life=life)
            killed.run(left, line, stream)
            line.runs += 1
            missed = missed + 1 if len(left) == before else 0
            line.mismatches += differences(whole.out, killed.out)
        if left:
            raise RuntimeError(f"{name}: {left[0]} missed {TRIES} runs")
        shutil.rmtree(home / folder)
        yield line


def at_each_operation(home: Path, name: str, words: Sequence[str]) -> Line:
    """Kill a run before each of its file operations in turn, in a run of its own each time, and return what happened."""
    line, folder, stream = Line(f"{name}: each file operation"), "runs/each", random.Random(0)
    whole = Supervisor(words, home, f"{folder}/whole")
    operations = whole.stopped_at(0)
    for number in range(1, operations + 1):
        killed = Supervisor(words, home, f"{folder}/{number}", last=whole.last_step())
        killed.stopped_at(number)
        line.signals["SIGKILL"] += 1
        line.fell[killed.place(NOTHING)] += 1
        killed.run([], line, stream)
        line.runs += 1
        line.starts += 1
        line.mismatches += [f"operation {number}: {one}" for one in differences(whole.out, killed.out)]
        shutil.rmtree(killed.out)
    shutil.rmtree(home / folder)
    return line


def differences(whole: Path, killed: Path) -> list[str]:
    """Return where a killed run differs from the uninterrupted one, and files that only one of them has."""
    found = first_difference(whole, killed)
    names = [
        {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "/step-" not in str(path)}
        for run in (whole, killed)
    ]
    return [*([found] if found else []), *(f"{name}: only one run has it" for name in sorted(names[0] ^ names[1]))]


def prepare(home: Path) -> None:
    """Write the inputs of all runs, in a fork, and train the reward model that some of them read."""
    forked(partial(write_inputs, home)).join()
    Supervisor(on_rows("reward", "ranked"), home, "rm").run([], Line("reward"), random.Random(0))


def table(lines: Sequence[Line]) -> str:
    """Return the table: a line per configuration, with its signals, where they fell, and the mismatches."""
    head = ["configuration", *(one.name for one in SIGNALS), *FELL, "runs", "starts", "mismatches"]
    rows = [one.cells() for one in lines]
    sums = ["all", *(str(sum(int(row[place]) for row in rows)) for place in range(1, len(head)))]
    widths = [max(len(row[place]) for row in (head, *rows, sums)) for place in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows, sums)
    )


def main() -> int:
    """Run the soak and print its table. Return 1 if a run differs from the uninterrupted one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(every()), choices=list(every()), metavar="NAME")
    parser.add_argument("--skip-operations", action="store_true", help="leave out the kills at each file operation")
    given = parser.parse_args()
    for module in USED:
        importlib.import_module(module)
    lines = []
    with TemporaryDirectory() as name:
        home = Path(name)
        prepare(home)
        each = [] if given.skip_operations else list(SHORT.items())
        for line in chain(
            soak(home, {one: every()[one] for one in given.only}, given.kills, given.seed),
            (at_each_operation(home, *one) for one in each),
        ):
            lines.append(line)
            told = f"{line.name}: {sum(line.signals.values())} kills, {line.mismatches or 'equal'}"
            print(told, file=sys.stderr, flush=True)
    print(table(lines))
    return 1 if any(line.mismatches for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
