"""Restore the global state of this process after a user's code."""

import contextlib
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals whose handlers are restored: those that save and end a run."""
DEVICES = ("cpu", "cuda")
"""Devices whose autocast is restored."""


USERS: dict[str, Any] = {}
"""The state of the random generators at the end of the last of the user's calls or imports."""


@contextmanager
def restored() -> Iterator[None]:
    """Restore global state at the end of the context, also after an error. It takes less than 1 ms.

    Restored are: the random generators of Python, numpy and torch (also on GPUs); torch's default dtype, default device, grad mode,
    inference mode, autocast, number of threads, deterministic algorithms, float32 matmul precision and cuDNN flags; the working
    directory, `sys.stdout` and `sys.stderr`, and in the main thread the handlers of `HANDLED`. Not restored are environment
    variables and attributes of modules.

    The user's code has random numbers of its own: each call continues those of the last one, also of another function, and of the
    imports. So a seed that a file sets counts, and functions do not draw the same numbers.
    """
    drawn, before = _random(), [(read, write, read()) for read, write in _settings()]
    if USERS:
        _set_random(USERS)
    with _modes():
        try:
            yield
        finally:
            USERS.update(_random())
            _set_random(drawn)
            for read, write, value in before:
                if read() != value:  # some writes are slow
                    write(value)


def _random() -> dict[str, Any]:
    """Return the state of all random generators of the libraries that are imported."""
    out: dict[str, Any] = {"random": random.getstate()}
    if "numpy" in sys.modules:
        out["numpy"] = sys.modules["numpy"].random.get_state()
    torch = sys.modules.get("torch")
    if torch is not None:
        out["torch"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            out["cuda"] = torch.cuda.get_rng_state_all()
    return out


def _set_random(state: dict[str, Any]) -> None:
    random.setstate(state["random"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])
    if "torch" in state:
        sys.modules["torch"].set_rng_state(state["torch"])
    if "cuda" in state:
        sys.modules["torch"].cuda.set_rng_state_all(state["cuda"])


Setting = tuple[Callable[[], Any], Callable[[Any], Any]]
"""A setting as (read, write)."""


def _settings() -> list[Setting]:
    """Return the settings of this process and thread."""
    out: list[Setting] = [(_folder, _chdir), _attribute(sys, "stdout"), _attribute(sys, "stderr")]
    if threading.current_thread() is threading.main_thread():
        out += [(partial(signal.getsignal, one), partial(_handle, one)) for one in HANDLED]
        out.append(
            (partial(signal.pthread_sigmask, signal.SIG_BLOCK, ()), partial(signal.pthread_sigmask, signal.SIG_SETMASK))
        )
    torch = sys.modules.get("torch")
    if torch is None:
        return out
    cudnn = torch.backends.cudnn
    return [
        *out,
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_default_device, lambda value: torch.set_default_device(None if value.type == "cpu" else value)),
        (torch.get_num_threads, torch.set_num_threads),
        (_deterministic, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        *(_attribute(cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
        *((partial(torch.is_autocast_enabled, one), partial(torch.set_autocast_enabled, one)) for one in DEVICES),
        *((partial(torch.get_autocast_dtype, one), partial(torch.set_autocast_dtype, one)) for one in DEVICES),
        (_autocast_depth, _leave_autocast),
    ]


def _autocast_depth() -> int:
    """Return how many autocast contexts of this thread were entered and not left."""
    torch = sys.modules["torch"]
    depth: int = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def _leave_autocast(depth: int) -> None:
    """Leave autocast contexts. While one is open, torch keeps the weights that it has cast, also after they have changed."""
    torch = sys.modules["torch"]
    while _autocast_depth() > depth:
        torch.autocast_decrement_nesting()
    if not depth:
        torch.clear_autocast_cache()


@contextmanager
def _modes() -> Iterator[None]:
    """Restore grad mode and inference mode of this thread."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    with torch.inference_mode(inference):  # its end restores both modes, even if the user's code never left its own
        torch.set_grad_enabled(grad)
        yield


def _attribute(thing: Any, name: str) -> Setting:
    return partial(getattr, thing, name), partial(setattr, thing, name)


def _folder() -> str | None:
    """Return the working directory, or None if it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return None


def _chdir(folder: str | None) -> None:
    if folder is not None:
        with contextlib.suppress(OSError):
            os.chdir(folder)


def _handle(signum: signal.Signals, handler: Any) -> None:
    if handler is not None:  # None is a handler that Python did not set
        signal.signal(signum, handler)


def _deterministic() -> tuple[bool, bool]:
    torch = sys.modules["torch"]
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
