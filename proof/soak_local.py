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
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from proof.recorder import make_inputs
from whet.data.files import write_jsonl
from whet.loops import checkpoint
from whet.loops.record import read_metrics
from whet.methods.catalogue import PREFERENCE, TRAINED
from whet.runs.compare import first_difference

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PLACES = ("anywhere", "step", "save", "end")
"""Where a kill is aimed: any moment of the process, after its first step, inside a checkpoint, or after the last step."""
LATE = {"anywhere": 0.0, "step": 0.1, "save": 0.004, "end": 0.03}
"""Seconds from the moment when the place is seen to the signal, at most: about the length of what happens there."""
FELL = ("start", "step", "save", "end")
"""Where a kill fell: before the first step of the process, in a step, in a save, or after the last step."""
UPDATES, STEPS = 6, 5
"""Steps of the runs on rows, and of the runs on generated answers."""
WITHIN = 60.0
"""Seconds in which a process must end after a signal, or after its start if it gets none."""
TRIES = 10
"""Runs in a row that may end before the kill that is aimed at them."""
USED = ("transformers.models.qwen3.modeling_qwen3", "transformers.models.auto.modeling_auto", "peft", "pyarrow.parquet",
        "whet.cli.main", "whet.runs.train", "whet.runs.config")  # fmt: skip
"""What the children import; this process imports it once."""

COMMON = ["--model", "model", "--seed", "3", "--threads", "1", "--quiet", "--train.save-every", "2"]
LORA = ["--model.lora.rank", "4"]


def on_rows(method: str, data: str, *more: str) -> list[str]:
    """The words of a short run on the rows of a file."""
    size = ["--train.num-steps", str(UPDATES), "--train.batch-size", "6", "--lr", "1e-3"]
    return [method, *COMMON, "--data", f"{data}.jsonl", *size, *more]


def on_answers(method: str, *more: str, reward: str = "rules.py:count", steps: int | None = STEPS) -> list[str]:
    """The words of a short run on generated answers."""
    size = [
        "--rollout.prompts-per-step",
        "6",
        "--rollout.mini-batch-size",
        "null",
        "--max-new-tokens",
        "6",
        "--lr",
        "3e-3",
    ]
    length = [] if steps is None else ["--rollout.num-steps", str(steps)]
    return [method, *COMMON, "--data", "prompts.jsonl", "--reward", reward, *size, *length, *more]


GROUPS = ["--num-generations", "3"]
HALVES = ["--rollout.mini-batch-size", "9"]
CONFIGURATIONS: dict[str, list[str]] = {
    "pretrain, muon": on_rows("pretrain", "text", "--optim.kind", "muon"),
    "sft, packed, dropout": on_rows("sft", "sft", "--train.packing", "--train.dropout", "0.1"),
    "sft, LoRA with dropout": on_rows("sft", "sft", *LORA, "--train.dropout", "0.1"),
    "sft, two epochs, a smaller last batch": on_rows(
        "sft", "sft", "--train.num-steps", "null", "--train.num-epochs", "2", "--train.batch-size", "15"
    ),
    "reward, K-way, standardized": on_rows("reward", "ranked", "--head.standardize"),
    "reward, process (BCE)": on_rows("reward", "steps", "--algorithm.name", "process", "--data.separator", "w39"),
    "dpo": on_rows("dpo", "ranked"),
    "dpo, BCO, reference follows": on_rows(
        "dpo", "ranked", "--loss", "bco_pair", "--sync-reference.every", "2", "--sync-reference.mix", "0.5"
    ),
    "ipo, reference computed once": on_rows("ipo", "ranked", "--precompute"),
    "kto": on_rows("kto", "kto"),
    "orpo": on_rows("orpo", "ranked"),
    "online_dpo": on_answers("online_dpo"),
    "ppo, separate, reward model": on_answers(
        "ppo", "--rollout.mini-batch-size", "3", "--rollout.ppo-epochs", "2", reward="rm/model"
    ),
    "instructgpt, shared trunk, adaptive KL": on_answers(
        "instructgpt", "--trunk", "shared", *LORA, "--ptx", "text.jsonl", "--ptx.batch-size", "4",
        "--kl-in-reward", "{coef: 0.1, controller: adaptive, target: 0.5, horizon: 20}",
    ),
    "ppo, running rewards, critic warm-up": on_answers(
        "ppo", "--reward-normalization", "running", "--critic.warmup-steps", "2"
    ),
    "grpo, EMA, reference follows": on_answers(
        "grpo", *GROUPS, *HALVES, "--rollout.ema", "0.9", "--rollout.sync-reference.every", "2"
    ),
    "grpo, dynamic sampling": on_answers("grpo", *GROUPS, "--dynamic-sampling", "2"),
    "grpo, LoRA": on_answers("grpo", *GROUPS, *LORA, "--model.export", "adapter"),
    "grpo, two epochs, a smaller last step": on_answers(
        "grpo", *GROUPS, "--rollout.num-epochs", "2", "--rollout.prompts-per-step", "12", steps=None
    ),
    "rloo, top-p": on_answers("rloo", *GROUPS, "--sampling.top-p", "0.9"),
    "remax": on_answers("remax"),
    "reinforce_pp, entropy target": on_answers("reinforce_pp", "--entropy", "{target: 2.0}"),
    "dapo": on_answers("dapo", *GROUPS, *HALVES, "--overlong.buffer", "3"),
    "gspo": on_answers("gspo", *GROUPS, *HALVES),
    "clip_cov": on_answers("clip_cov", *GROUPS, *HALVES),
    "kl_cov": on_answers("kl_cov", *GROUPS, *HALVES),
    "grpo_process": on_answers("grpo_process", *GROUPS, reward="own.py:ids"),
}  # fmt: skip
"""Name -> the words of the command line. Every other training method has its own line with few options: see `every`."""


def every() -> dict[str, list[str]]:
    """Return the configurations, and one for each training method that has none."""
    named = {words[0] for words in CONFIGURATIONS.values()}
    rest = [method for method in TRAINED if method not in named]
    return CONFIGURATIONS | {
        one: on_rows(one, "ranked") if one in PREFERENCE else on_answers(one, *GROUPS, reward="own.py:thirds")
        for one in rest
    }


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

    def _command(self) -> None:
        from whet.cli.main import main

        os.chdir(self.home)
        handle = os.open(self.home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.exit(main([*self.words, "--resume"]))

    def _send(self, kill: Kill, child: BaseProcess, before: Seen, stream: random.Random) -> str | None:
        """Wait for the moment, send the signal, and return where it fell. Return None if the process ended before it."""
        moment, late = time.monotonic() + stream.uniform(0.0, self.life), stream.uniform(0.0, LATE[kill.place])
        while time.monotonic() < moment if kill.place == "anywhere" else self._place(before) != kill.place:
            time.sleep(0.0005)
            if not child.is_alive():
                return None
        time.sleep(late)
        place = self._place(before)
        if not child.is_alive():
            return None
        assert child.pid is not None
        with suppress(ProcessLookupError):
            os.kill(child.pid, kill.signal)
        return place

    def _seen(self) -> Seen:
        saves, metrics = self.out / "checkpoints", self.out / "metrics.jsonl"
        saved = max((int(path.name[5:]) for path in saves.glob("step-*")), default=0)
        changed = metrics.stat().st_mtime_ns if metrics.is_file() else 0
        return Seen({path.name for path in saves.glob(f"{checkpoint.ASIDE}*")}, saved, changed)

    def _place(self, before: Seen) -> str:
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
        life, last = time.monotonic() - began, whole._seen().saved
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


def differences(whole: Path, killed: Path) -> list[str]:
    """Return where a killed run differs from the uninterrupted one, and files that only one of them has."""
    found = first_difference(whole, killed)
    names = [
        {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "/step-" not in str(path)}
        for run in (whole, killed)
    ]
    return [*([found] if found else []), *(f"{name}: only one run has it" for name in sorted(names[0] ^ names[1]))]


def prepare(home: Path) -> None:
    """Write a tiny model, rows of every kind, reward functions, and a reward model."""
    forked(partial(make_inputs, home)).join()
    text = [f"w{number} w{number + 1}" for number in range(24)]
    steps = [
        {"prompt": one, "completions": [f"{one} ", " w3 ", " w4"], "labels": [1, n % 2, 0]}
        for n, one in enumerate(text)
    ]
    write_jsonl(home / "steps.jsonl", steps)
    (home / "own.py").write_text(
        "def ids(prompts, completions, completion_ids, **columns):\n"
        "    return [[float(one % 3) for one in own] for own in completion_ids]\n\n\n"
        "def thirds(prompts, completions, completion_ids, **columns):\n"
        "    return [float(sum(one % 3 == 0 for one in own)) for own in completion_ids]\n"
    )
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
    given = parser.parse_args()
    for module in USED:
        importlib.import_module(module)
    lines = []
    with TemporaryDirectory() as name:
        home = Path(name)
        prepare(home)
        for line in soak(home, {one: every()[one] for one in given.only}, given.kills, given.seed):
            lines.append(line)
            print(
                f"{line.name}: {sum(line.signals.values())} kills, {line.mismatches or 'equal'}",
                file=sys.stderr,
                flush=True,
            )
    print(table(lines))
    return 1 if any(line.mismatches for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
