"""The connection to Ray: to a cluster that runs already, or to one that is started here, on loopback, for this run alone."""

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
"""Bytes of shared memory for what workers hand to one another, where Ray is started here. Only what is used is taken."""


@contextmanager
def connected(address: str, *, cpus: float = 1.0) -> Iterator[None]:
    """Within the context this process is connected to Ray; what was started for it is ended afterwards.

    "auto" is the cluster that RAY_ADDRESS names or that runs on this machine, and without one a Ray of this run's own with
    at least `cpus` logical CPUs. Anything else is a cluster's host:port. A process that is connected already stays so.
    Raises RecipeError without Ray, or where nobody answers at the address.
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
    """Raises RecipeError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise RecipeError('cluster.address: ray is not installed; pip install "whet[ray]"')


def there(what: str) -> float:
    """How much of a resource the whole cluster has."""
    import ray

    return float(ray.cluster_resources().get(what, 0.0))


def running() -> str:
    """The address of the cluster that this process belongs to, by RAY_ADDRESS or by what `ray start` left; "" without one."""
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
        return ""  # the file of a cluster that is gone


def _loopback() -> None:
    """A Ray that is started now listens on loopback only, whatever addresses this machine has. It has no option for that."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    constants = sys.modules.get("ray._private.ray_constants")
    if constants is not None:  # it was imported before, and has read the variable
        constants.ENABLE_RAY_CLUSTER = False  # type: ignore[attr-defined]
