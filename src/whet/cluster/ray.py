"""Connection to Ray: to a running cluster, or to one that is started on loopback for this run only."""

import importlib.util
import logging
import math
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whet.errors import RecipeError

STORE = 1 << 30
"""Largest size in bytes of Ray's object store if Ray is started here. Only the used part takes up memory."""


@contextmanager
def connected(address: str, *, cpus: float = 1.0) -> Iterator[None]:
    """Connect this process to Ray for the duration of the context. A Ray that was started for it is stopped on exit.

    With "auto" this is the cluster that RAY_ADDRESS names or that runs on this machine; without one, a new local Ray with
    at least `cpus` logical CPUs is started. Any other address is the host:port of a cluster. A process that is already
    connected stays connected. Raises RecipeError if Ray is not installed or nothing answers at the address.
    """
    require()
    found = running() if address == "auto" else address
    if not found:
        _loopback()
    import ray

    if ray.is_initialized():
        yield
        return
    given: dict[str, Any] = {"address": found}
    if not found:
        whole = max(os.cpu_count() or 1, math.ceil(cpus))
        given = {"address": "local", "include_dashboard": False, "num_cpus": whole, "object_store_memory": STORE}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(**given, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RecipeError(f"cluster.address: no Ray answers at {found or 'this machine'} ({error})") from error
    try:
        yield
    finally:
        ray.shutdown()


def require() -> None:
    """Raise RecipeError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise RecipeError('cluster.address: ray is not installed; pip install "whet[ray]"')


def there(what: str) -> float:
    """Return the amount of a resource in the whole cluster."""
    import ray

    return float(ray.cluster_resources().get(what, 0.0))


def running() -> str:
    """Return the address of the running cluster, from RAY_ADDRESS or the file that `ray start` wrote; "" if there is none."""
    given = os.environ.get("RAY_ADDRESS", "")
    if given:
        return given
    file = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    found = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    host, _, port = found.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), 2.0):
            return found
    except (OSError, ValueError):
        return ""  # the file belongs to a cluster that no longer runs


def _loopback() -> None:
    """Make a Ray that is started from now on listen on loopback only. Ray has no option for this."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    constants = sys.modules.get("ray._private.ray_constants")
    if constants is not None:  # Ray was imported before and has already read the variable
        constants.ENABLE_RAY_CLUSTER = False  # type: ignore[attr-defined]
