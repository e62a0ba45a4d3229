"""A function with a limit runs in a process of its own, which keeps its state, is killed when it is late, and ends with the run."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from whet.data import Group, Prompt, Sample
from whet.errors import Interrupted, RecipeError, RewardError
from whet.registry import load_object
from whet.rewards import Scores
from whet.rewards.base import Weighted
from whet.rewards.functions import FunctionReward
from whet.runs.rewards import check_columns, made

SOURCE = """
import os, signal, subprocess, sys, time
calls = 0

def judge(prompts, completions, **columns):
    global calls
    calls += 1
    print("a line of the function", calls)
    what = completions[0]
    if what == "stuck":
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_IGN)
        children = [subprocess.Popen(["sleep", "600"], start_new_session=new) for new in (False, True)]
        with open(columns["note"][0], "w") as file:
            print(os.getpid(), *(one.pid for one in children), file=file)
        time.sleep(600)
    if what == "holds":  # a call in C that holds the GIL
        import ctypes
        ctypes.PyDLL(None).sleep(600)
    if what == "leaves":
        os._exit(7)
    if what == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exits":
        sys.exit("wrong")
    if what == "pool":  # as sandboxes of code and mathematics do
        import multiprocessing
        context = multiprocessing.get_context("fork")
        late = context.Process(target=time.sleep, args=(600,))
        late.start(), late.terminate(), late.join()
        with context.Pool(1) as pool:
            return pool.map(len, completions)
    if what == "own error":
        raise Wrong("the compiler", "gave up")
    if what == "unreadable":
        return [Here()] * len(completions)
    if what == "unsendable":
        return [lambda: 1]
    if what == "none":
        return [None] * len(completions)
    if what == "tensor":
        import torch
        return torch.tensor([0.1] * len(completions))
    columns["edited"][0].append(9)
    return [calls + 0.1] * len(completions)

from whet import RewardError

class Wrong(RewardError):
    def __init__(self, what, why):
        super().__init__(f"{what} {why}")

class Here:
    def __reduce__(self):
        return (__import__, ("no_such_module",))

class Judge:
    per_group = True

    def __init__(self, *, scale: float = 1.0):
        self.scale, self.calls = scale, 0

    def score(self, groups):
        import torch
        from whet import Scores
        self.calls += 1
        if groups[0].samples[0].text == "stuck":
            time.sleep(600)
        return Scores(torch.full((len(groups[0].samples),), self.scale * self.calls))
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(SOURCE)
    return f"{tmp_path}/mine.py"


def groups(text: str = "a", note: str = "") -> list[Group]:
    user = {"role": "user", "content": "q"}
    row = {"prompt": "q", "edited": [1], "note": note}
    return [
        Group(Prompt("7", (1,), (user,), row), tuple(Sample(0, n, (3,), (-1.0,), 0, "stop", text) for n in range(2)))
    ]


def reward(mine: str, seconds: float = 30.0) -> FunctionReward:
    own = made(f"{mine}:judge", {"timeout": seconds}, "reward.0")
    assert isinstance(own, FunctionReward)
    return own


def pid_of(own: Any) -> int:
    return own.call.child._running.process.pid


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether none of these processes runs; waits a little."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        alive = [one for one in pids if psutil.pid_exists(one) and psutil.Process(one).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.02)
    return False


def test_the_function_keeps_its_state_between_calls_and_gets_copies(mine: str, capfd: Any) -> None:
    own, given = reward(mine), groups()
    scores = [own.score(given).answer for _ in range(3)]
    assert [one.tolist() for one in scores] == [pytest.approx([n + 0.1] * 2) for n in (1, 2, 3)]
    assert torch.equal(scores[0], FunctionReward(load_object(f"{mine}:judge")).score(given).answer)  # the same bits
    assert given[0].prompt.row["edited"] == [1]
    lines = [one for one in capfd.readouterr().out.splitlines() if one.startswith("a line")]
    assert lines == [
        "a line of the function 1",
        "a line of the function 2",
        "a line of the function 3",
        "a line of the function 1",
    ]
    assert pid_of(own) != os.getpid()


@pytest.mark.parametrize(("text", "listed"), [("none", [None, None]), ("tensor", [pytest.approx(0.1)] * 2)])
def test_results_of_every_form_come_back(mine: str, text: str, listed: list) -> None:
    assert reward(mine).score(groups(text)).listed() == listed


@pytest.mark.parametrize("text", ["stuck", "holds"])
def test_a_late_call_is_killed_with_all_that_it_started_and_the_next_one_starts_anew(
    mine: str, text: str, tmp_path: Path
) -> None:
    own, note = reward(mine, 2.0), tmp_path / "note"
    assert own.score(groups()).listed() == [pytest.approx(1.1)] * 2
    first, began = pid_of(own), time.monotonic()
    with pytest.raises(
        RewardError, match=r"^reward judge took more than 2 s for 2 answers to the prompt row 7; its process was killed"
    ):
        own.score(groups(text, str(note)))
    assert 2.0 <= time.monotonic() - began < 12
    assert gone([first, *(map(int, note.read_text().split()) if text == "stuck" else ())])
    assert own.score(groups()).listed() == [pytest.approx(1.1)] * 2  # its state was in the process
    assert pid_of(own) != first


ENDS = {
    "leaves": "reward judge: its process ended with status 7 during 2 answers to the prompt row 7",
    "dies": "reward judge: its process was ended by SIGSEGV during 2 answers to the prompt row 7",
    "exits": "reward judge raised SystemExit: wrong",
    "unsendable": "reward judge: what it returned cannot be sent to the run: ",
}


@pytest.mark.parametrize("text", ENDS)
def test_a_process_that_ends_by_itself_is_an_error_of_the_function(mine: str, text: str) -> None:
    own = reward(mine)
    with pytest.raises(RewardError) as caught:
        own.score(groups(text))
    assert str(caught.value).startswith(ENDS[text])
    if text == "exits":
        assert str(caught.value).endswith(f"(at {mine}:{1 + SOURCE[: SOURCE.index('sys.exit')].count(chr(10))})")
    assert len(own.score(groups()).answer) == 2


def test_the_process_ends_with_the_reward(mine: str) -> None:
    own = reward(mine)
    own.score(groups())
    running = psutil.Process(pid_of(own))
    pids = [running.pid, *(one.pid for one in running.children())]
    assert len(pids) == 2  # the process, and the one that watches for the end of the run
    del own
    assert gone(pids)


@pytest.mark.parametrize("busy", [False, True])
def test_the_process_ends_with_a_run_that_is_killed(mine: str, busy: bool, tmp_path: Path) -> None:
    """With kill -9 while the function is idle, or stuck with signals ignored and children of its own."""
    note = tmp_path / "note"
    code = (
        "import sys; sys.path[:] = " + repr(sys.path) + "\n"
        "from calling.test_process import groups, pid_of, reward\n"
        f"own = reward({mine!r}, 600.0); own.score(groups()); print('pid', pid_of(own), flush=True)\n"
        + (f"own.score(groups('stuck', {str(note)!r}))\n" if busy else "import time; time.sleep(600)\n")
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    pid = next(int(line.split()[1]) for line in run.stdout if line.startswith("pid"))
    pids = [pid, *(one.pid for one in psutil.Process(pid).children())]
    until = time.monotonic() + 60
    while busy and not (note.exists() and len(note.read_text().split()) == 3):
        assert time.monotonic() < until
        time.sleep(0.02)
    pids += [int(one) for one in note.read_text().split()] if busy else []
    run.kill()
    run.wait()
    assert gone(pids)
    run.stdout.close()


def test_a_signal_to_the_job_does_not_end_the_process_and_one_to_the_run_does(mine: str) -> None:
    """A batch system sends SIGTERM to all processes: the run waits for its function, and saves."""
    own = reward(mine)
    own.score(groups())
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.killpg(pid_of(own), signum)
    time.sleep(0.2)
    assert own.score(groups()).listed() == [pytest.approx(2.1)] * 2
    first = pid_of(own)

    def receive(*_: Any) -> None:
        raise Interrupted("saved", signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, receive)
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(Interrupted):
            own.score(groups("holds"))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert gone([first])
    assert own.score(groups()).listed() == [pytest.approx(1.1)] * 2


def test_a_class_with_a_limit_is_built_in_its_process_alone(mine: str) -> None:
    own = made(f"{mine}:Judge", {"timeout": 2, "scale": 0.5}, "reward.0")
    assert getattr(own, "per_group", False)
    assert [own.score(groups()).answer.tolist() for _ in range(2)] == [[0.5, 0.5], [1.0, 1.0]]
    with pytest.raises(RewardError, match=r"^reward Judge took more than 2 s for 2 answers"):
        own.score(groups("stuck"))


class Counts:
    """An own reward that is given as an object."""

    def __init__(self, *, scale: float = 2.0) -> None:
        self.scale, self.pid = scale, os.getpid()

    def score(self, groups: Any) -> Scores:
        return Scores(torch.full((2,), self.scale if os.getpid() != self.pid or self.scale == 2.0 else -1.0))


def plain(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(os.getpid())] * len(completions)


def test_objects_of_modules_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    from whet.registry import register

    own = made(register(plain), {"timeout": 30.0}, "reward.0")
    assert own.score(groups()).answer[0] != os.getpid()
    assert made(register(Counts), {"timeout": 30.0}, "reward.0").score(groups()).answer.tolist() == [2.0, 2.0]
    assert made(register(Counts(scale=3.0)), {"timeout": 30.0}, "reward.0").score(groups()).answer.tolist() == [
        3.0,
        3.0,
    ]


def test_what_cannot_be_sent_is_refused_by_name() -> None:
    from whet.registry import register

    with pytest.raises(
        RecipeError, match=r"^reward.0.timeout: reward .*<lambda>.* cannot be sent there .*FILE.py:NAME"
    ):
        made(register(lambda **columns: [1.0]), {"timeout": 3.0}, "reward.0")


@pytest.mark.parametrize("seconds", [0, -1.0, "soon"])
def test_a_limit_is_a_positive_number_of_seconds(mine: str, seconds: Any) -> None:
    with pytest.raises(RecipeError, match=r"reward\.0\.timeout"):
        made(f"{mine}:judge", {"timeout": seconds}, "reward.0")


def test_a_file_that_fails_in_its_process_is_named_before_the_run(mine: str, tmp_path: Path) -> None:
    text = f"import os\nassert os.getpid() == {os.getpid()}, 'only in the run'\n{SOURCE}"
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(RecipeError, match=r"importing .*mine.py failed with AssertionError: only in the run"):
        check_columns([Weighted("judge", reward(mine))], [])


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[Callable[[], list[int]]]:
    """Every test leaves no process behind."""
    yield lambda: []
    import gc

    gc.collect()
    left = [
        one.pid for one in psutil.Process().children(recursive=True) if "whet.calling.child" in " ".join(one.cmdline())
    ]
    assert gone(left)


def test_processes_of_the_function_end_when_it_ends_them(mine: str) -> None:
    assert reward(mine).score(groups("pool")).answer.tolist() == [4.0, 4.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("own error", "the compiler gave up"),
        ("unreadable", "what it returned cannot be read here .*no_such_module"),
    ],
)
def test_what_cannot_be_sent_back_is_an_error_of_the_function(mine: str, text: str, said: str) -> None:
    own = reward(mine)
    with pytest.raises(RewardError, match=said):
        own.score(groups(text))
    assert len(own.score(groups()).answer) == 2


def test_a_process_that_cannot_load_the_function_says_so_each_time(mine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [Path("/elsewhere"), *sys.path])  # a path as an object is no fault
    own = reward(mine)
    Path(mine).write_text("raise OSError('moved')")
    for _ in range(2):
        with pytest.raises((RewardError, RecipeError), match="moved"):
            own.score(groups())
    Path(mine).write_text(SOURCE)
    assert len(own.score(groups()).answer) == 2
