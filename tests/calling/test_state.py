"""What a user's code changes in this process is as it was before."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from whet.calling import state
from whet.calling.guard import UserCall
from whet.calling.state import restored
from whet.registry import load_object

LEFT: list[Any] = []
"""Contexts that the code entered and never left."""


def entered(context: Any) -> None:
    LEFT.append(context)
    context.__enter__()


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "default dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "default device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "grad mode": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(False)),
    "inference mode": (torch.is_inference_mode_enabled, lambda: entered(torch.inference_mode())),
    "no_grad": (torch.is_grad_enabled, lambda: entered(torch.no_grad())),
    "autocast": (lambda: torch.is_autocast_enabled("cpu"), lambda: entered(torch.autocast("cpu", torch.bfloat16))),
    "autocast dtype": (lambda: torch.get_autocast_dtype("cpu"), lambda: torch.set_autocast_dtype("cpu", torch.float16)),
    "threads": (torch.get_num_threads, lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    "deterministic": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda: torch.use_deterministic_algorithms(True, warn_only=True)),
    "matmul precision": (torch.get_float32_matmul_precision, lambda: torch.set_float32_matmul_precision("medium")),
    "cudnn": (lambda: torch.backends.cudnn.benchmark, lambda: setattr(torch.backends.cudnn, "benchmark", True)),
    "torch random": (lambda: torch.get_rng_state().tolist(), lambda: torch.manual_seed(3)),
    "random": (random.getstate, lambda: random.seed(3)),
    "numpy random": (lambda: numpy.random.get_state()[1].tolist(), lambda: numpy.random.seed(3)),
    "folder": (os.getcwd, lambda: os.chdir("/")),
    "SIGTERM": (lambda: signal.getsignal(signal.SIGTERM), lambda: signal.signal(signal.SIGTERM, lambda *_: None)),
    "SIGINT": (lambda: signal.getsignal(signal.SIGINT), lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)),
    "stderr": (lambda: sys.stderr, lambda: setattr(sys, "stderr", None)),
}  # fmt: skip


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_ends_with_the_context(name: str, fails: bool) -> None:
    read, change = CHANGES[name]
    before = read()
    after = None
    try:
        with restored():
            change()
            after = read()
            if fails:
                raise KeyError("a")
    except KeyError:
        assert fails
    assert after != before  # the change works
    assert read() == before
    if name in ("grad mode", "inference mode", "no_grad", "default dtype"):
        out = torch.ones(1, requires_grad=True) * 2
        assert (out.requires_grad, out.dtype, out.is_inference()) == (True, torch.float32, False)
    LEFT.clear()
    assert read() == before


def test_modes_that_the_caller_has_set_are_kept() -> None:
    with torch.no_grad(), torch.inference_mode(), restored():
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_functions_go_on_with_random_numbers_of_their_own_and_change_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.random()), float(torch.rand(()))

    def seed() -> None:
        random.seed(7), numpy.random.seed(7), torch.manual_seed(7)

    seed()
    own = [draw() for _ in range(3)]
    seed()
    monkeypatch.setattr(state, "USERS", {})
    calls = [UserCall(draw, "reward draw"), UserCall(lambda: draw(), "reward other")]
    got, between = [], []
    for number in range(3):
        got.append(calls[number % 2]("1 answer"))
        between.append(draw())
    assert got == own
    assert between == own  # as if the function had drawn none


def test_a_folder_that_was_removed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with restored():
        (tmp_path / "a").rmdir()
    with restored():
        os.chdir(tmp_path)


def test_the_first_context_of_a_process_takes_no_time() -> None:
    """Some setters of torch import its compiler, which takes seconds; they are called only after a change."""
    code = (
        "import sys, torch\nfrom whet.calling.state import restored\nheavy = {'torch._dynamo', 'torch._inductor', 'sympy'}\n"
        "before = heavy & set(sys.modules)\nwith restored(): pass\nprint(heavy & set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_seed_that_a_reward_file_sets_counts(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import random\nrandom.seed(5)\n\ndef judge(completions, **columns):\n    return [random.random() for _ in completions]\n"
    )
    before = random.getstate()
    with restored():
        function = load_object(f"{tmp_path / 'own.py'}:judge")
    expected = random.Random(5)
    call = UserCall(function, "reward judge")
    got = [call("2 answers", named={"completions": ["a", "b"]}) for _ in range(2)]
    assert got == [[expected.random(), expected.random()] for _ in range(2)]
    assert random.getstate() == before


def test_an_autocast_that_was_never_left_ends_with_the_call() -> None:
    """While one is open, torch keeps the weights that it has cast: later updates would not be seen."""
    layer = torch.nn.Linear(2, 2)
    with restored():
        entered(torch.autocast("cpu", dtype=torch.bfloat16))
        layer(torch.ones(1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(torch.ones(1, 2))
    with torch.no_grad():
        layer.weight.add_(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = layer(torch.ones(1, 2))
    assert not torch.equal(before, after)
