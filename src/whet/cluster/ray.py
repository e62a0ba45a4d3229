"""Connection to Ray: to a running cluster, or to one that is started on loopback for this run only."""

import logging
import math
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whet.errors import RecipeError, first_line
from whet.extras import require as require_packages
from whet.private import private_folder, remove_owned, user
from whet.terminal import caution

STORE = 1 << 30
"""Largest size in bytes of Ray's object store if Ray is started here. Only the used part takes up memory."""
LISTENS = "0A"
"""The state of a listening socket in /proc/net/tcp."""
ADVICE = "give the address to join it all the same (--cluster HOST:PORT), or set RAY_TMPDIR to a folder of your own"


@contextmanager
def connected(address: str, *, cpus: float = 1.0) -> Iterator[None]:
    """Connect this process to Ray for the duration of the context. A Ray that was started for it is stopped on exit.

    With "auto" this is the cluster that RAY_ADDRESS names or that this user runs on this machine; without one, a new local
    Ray with at least `cpus` logical CPUs is started, in a private folder. Any other address is the host:port of a cluster. A
    process that is already connected stays connected. Raises RecipeError if Ray is not installed, nothing answers at the
    address, or "auto" finds the cluster of another user.
    """
    require()
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield
        return
    found = running() if address == "auto" else address
    if found:
        with _joined({"address": found}, found):
            yield
        return
    _loopback()
    # Ray gives its folders mode 0777, so they are below one that only this user can enter
    folder = private_folder(_root(), "whet-ray-")
    given: dict[str, Any] = {
        "address": "local", "include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, math.ceil(cpus)),
        "object_store_memory": STORE, "_temp_dir": str(folder / "r"),
    }  # fmt: skip
    try:
        with _joined(given, "this machine"):
            yield
    except Exception:
        caution(f"the logs of Ray are in {folder}")
        raise
    except BaseException:
        remove_owned(folder)
        raise
    remove_owned(folder)


@contextmanager
def _joined(given: Mapping[str, Any], where: str) -> Iterator[None]:
    """Connect to Ray with these arguments of `ray.init`, and disconnect on exit."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(**given, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RecipeError(f"cluster.address: no Ray answers at {where} ({error})") from error
    try:
        yield
    finally:
        ray.shutdown()


def require() -> None:
    """Raise RecipeError if Ray is not installed."""
    require_packages("cluster.address: a cluster", "ray")


def there(what: str) -> float:
    """Return the amount of a resource in the whole cluster."""
    import ray

    return float(ray.cluster_resources().get(what, 0.0))


def running() -> str:
    """Return the address of the running cluster, from RAY_ADDRESS or the file that `ray start` wrote; "" if there is none.

    Every user can write that file. Raises RecipeError if the file, the session's folder, or the process that listens at the
    address does not belong to this user, because workers of the cluster execute what its owner wants.
    """
    given = os.environ.get("RAY_ADDRESS", "")
    if given not in ("", "auto"):
        return "" if given == "local" else given
    folder = _root() / "ray"
    file, session = folder / "ray_current_cluster", folder / "session_latest"
    if file.is_symlink():
        raise RecipeError(
            f"cluster.address: auto does not follow the link {file} of {user(file.lstat().st_uid)}; {ADVICE}"
        )
    found = _begin_of(file)
    host, _, port = found.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), 2.0) as connection:
            near = connection.getsockname()[0] == connection.getpeername()[0]
    except (OSError, ValueError, OverflowError):
        return ""  # the file belongs to a cluster that no longer runs
    owners = {str(path): path.lstat().st_uid for path in (file, session, session.resolve()) if os.path.lexists(path)}
    owners |= {f"the process at {found}": uid for uid in (_listeners(int(port)) if near else ())}
    for what, owner in owners.items():
        if owner != os.geteuid():
            raise RecipeError(
                f"cluster.address: auto found a Ray cluster of another user in {file}: {what} belongs to {user(owner)}; {ADVICE}"
            )
    return found


def _root() -> Path:
    """Return the folder in which Ray creates its own."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())


def _begin_of(file: Path) -> str:
    """Return the first 300 bytes of a file as text, or "" if it is none."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise RecipeError(f"cluster.address: auto cannot read {file} ({first_line(error)}); {ADVICE}") from error
    with os.fdopen(descriptor, "rb") as opened:
        return opened.read(300).decode("utf-8", "replace").strip() if file.is_file() else ""


def _listeners(port: int) -> set[int]:
    """Return the ids of the users whose processes listen on a TCP port of this machine; none where /proc does not tell."""
    found = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.is_file() else ():
            words = line.split()
            if words[3] == LISTENS and int(words[1].rpartition(":")[2], 16) == port:
                found.add(int(words[7]))
    return found


def _loopback() -> None:
    """Make a Ray that is started from now on listen on loopback only. Ray has no option for this."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    constants = sys.modules.get("ray._private.ray_constants")
    if constants is not None:  # Ray was imported before and has already read the variable
        constants.ENABLE_RAY_CLUSTER = False  # type: ignore[attr-defined]
