"""The steps that confine a process of a sandbox: namespaces, a root of its own, limits, another user. They run in the process."""

import os
import resource
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from whet.sandbox import kernel

HOME = "/tmp"
"""The only folder of a root of its own that can be written."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
USERS, FEW_USERS = (3_000_000_000, 1 << 28), (60_000, 5_000)
"""First user id and number of user ids of which a program gets one. No directory of people has such large ones. The second is for
containers, which have no large ones."""


def end_with_parent(signum: int = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when the thread that started it ends."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signum)


def enter_namespaces() -> None:
    """Leave the processes, mounts, network, shared memory and host name of this machine. The next child is process 1. Without
    privileges this is in a namespace of users. Raises OSError."""
    wanted = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    user, group = os.getuid(), os.getgid()
    if user == 0:
        try:
            return kernel.unshare(wanted)
        except PermissionError:  # root of a container without the capability
            pass
    kernel.unshare(wanted | kernel.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def make_root(folder: str, visible: Sequence[str], disk: int) -> None:
    """Make a root of its own in an empty folder, and enter it: a memory disk of `disk` bytes, with the paths `visible` of this
    machine, which can only be read, a few devices, and an empty folder /tmp. There is no /proc. Raises OSError."""
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    options = f"size={disk},nr_inodes=4096,mode=755"
    kernel.mount("none", folder, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    for path in (*visible, *DEVICES):
        target = folder + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            with suppress(FileExistsError):
                os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
            _bind(path, target)
        elif os.path.exists(path):
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
            _bind(path, target)
    os.makedirs(folder + HOME, exist_ok=True)
    os.chmod(folder + HOME, 0o1777)
    kernel.enter_root(folder)


def _bind(path: str, target: str) -> None:
    """Show a path at a target, for reading only."""
    try:
        kernel.mount(path, target, None, kernel.MS_BIND)
    except OSError:  # mounts below it are locked to it in a namespace of users
        kernel.mount(path, target, None, kernel.MS_BIND | kernel.MS_REC)
    if path not in DEVICES:
        found = os.statvfs(target).f_flag  # flags of the machine's mount may not be taken away
        kept = found & (kernel.MS_NOEXEC | 0x400 | 0x800) | (1 << 21 if found & 0x1000 else 0)
        only = kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
        kernel.mount(None, target, None, kernel.MS_BIND | kernel.MS_REMOUNT | only | kept)


def limit(job: Mapping[str, Any]) -> None:
    """Set the limits of a program. They are hard limits: it cannot raise them."""
    cpu = max(1, int(job["cpu_time"] + 0.999))
    limits = {
        resource.RLIMIT_CPU: (cpu, cpu),
        resource.RLIMIT_AS: (job["memory"],) * 2,
        resource.RLIMIT_FSIZE: (job["file_size"],) * 2,
        resource.RLIMIT_NOFILE: (job["open_files"],) * 2,
        resource.RLIMIT_NPROC: (job["processes"],) * 2,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
        resource.RLIMIT_STACK: (min(job["memory"], 64 << 20),) * 2,
    }
    for kind, pair in limits.items():
        resource.setrlimit(kind, pair)


def user_of(number: int) -> int:
    """Return the user id of the sandbox with this number."""
    with open("/proc/self/uid_map") as file:
        ranges = [[int(one) for one in line.split()] for line in file]
    first, count = (
        USERS if any(start <= USERS[0] and sum(USERS) <= start + size for start, _, size in ranges) else FEW_USERS
    )
    return first + number % count


def leave_user(user: int) -> None:
    """Become a user without any rights, if this is root. The number of processes is counted by user, so each sandbox has another."""
    if os.getuid() == 0:
        with suppress(PermissionError):  # in a namespace of users, groups cannot be set
            os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def drop_capabilities() -> None:
    """Give up all capabilities, which the first process of a namespace of users has. Raises OSError."""
    header = (0x20080522).to_bytes(4, "little") + bytes(4)
    kernel.checked(kernel.LIBC.capset(header, bytes(24)), "capset")


def confine(job: Mapping[str, Any], *, secret: bool) -> None:
    """Confine this process, which then runs a program. `secret` also hides it from other processes of the same user."""
    with suppress(OSError):
        os.setsid()
    alone = not job["namespaces"]
    limit(job)
    leave_user(job["user"])
    drop_capabilities()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    end_with_parent()
    if secret:
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    home = job["folder"] if alone else HOME
    os.chdir(home)
    os.environ.clear()
    os.environ.update(
        HOME=home, TMPDIR=home, PATH="/usr/bin:/bin", LANG="C.UTF-8", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"
    )
    if job["landlock"]:
        kernel.landlock(job["visible"] if alone else ["/"], [home, "/dev/null", "/dev/zero", "/dev/full"])
    if job["seccomp"]:
        kernel.seccomp(alone)
