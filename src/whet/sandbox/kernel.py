"""Linux system calls that Python does not have: namespaces, mounts, Landlock and seccomp. This runs in the processes of a sandbox."""

import ctypes
import os
import platform
import struct
from collections.abc import Mapping, Sequence

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
CLONE_NEW = 0x02000000 | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
NUMBERS: Mapping[str, Mapping[str, int]] = {
    "x86_64": {
        "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "execve": 59, "execveat": 322, "mount": 165,
        "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "bpf": 321, "perf_event_open": 298,
        "userfaultfd": 323, "keyctl": 250, "add_key": 248, "request_key": 249, "kexec_load": 246, "kexec_file_load": 320,
        "init_module": 175, "finit_module": 313, "delete_module": 176, "reboot": 169, "swapon": 167, "swapoff": 168,
        "open_by_handle_at": 304, "name_to_handle_at": 303, "kcmp": 312, "acct": 163, "settimeofday": 164, "clock_settime": 227,
        "adjtimex": 159, "clock_adjtime": 305, "quotactl": 179, "syslog": 103, "iopl": 172, "ioperm": 173, "vhangup": 153,
        "personality": 135, "modify_ldt": 154, "memfd_create": 319, "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240,
        "socket": 41, "clone": 56, "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297,
        "chmod": 90, "fchmod": 91, "fchmodat": 268, "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260, "utime": 132,
        "utimes": 235, "futimesat": 261, "utimensat": 280, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190,
        "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "truncate": 76,
    },
    "aarch64": {
        "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "execve": 221, "execveat": 281, "mount": 40,
        "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268, "bpf": 280, "perf_event_open": 241,
        "userfaultfd": 282, "keyctl": 219, "add_key": 217, "request_key": 218, "kexec_load": 104, "kexec_file_load": 294,
        "init_module": 105, "finit_module": 273, "delete_module": 106, "reboot": 142, "swapon": 224, "swapoff": 225,
        "open_by_handle_at": 265, "name_to_handle_at": 264, "kcmp": 272, "acct": 89, "settimeofday": 170, "clock_settime": 112,
        "adjtimex": 171, "clock_adjtime": 266, "quotactl": 60, "syslog": 116, "vhangup": 58, "personality": 92,
        "memfd_create": 279, "shmget": 194, "msgget": 186, "semget": 190, "mq_open": 180, "socket": 198, "clone": 220,
        "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "fchmod": 52,
        "fchmodat": 53, "fchown": 55, "fchownat": 54, "utimensat": 88, "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7,
        "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16, "truncate": 45,
    },
}  # fmt: skip
"""Numbers of system calls by machine. Those above 423 are the same everywhere."""
NEWER = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434, "clone3": 435,
    "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "landlock_create_ruleset": 444, "memfd_secret": 447,
    "fchmodat2": 452,
}  # fmt: skip
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SIGNALS = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
ATTRIBUTES = (
    "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat", "utime", "utimes", "futimesat", "utimensat",
    "setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr", "truncate",
)  # fmt: skip
"""What changes a file and is not covered by Landlock, or only by its later versions."""
BY_ARGUMENT = ("socket", "clone", "clone3")
EPERM, ENOSYS, AF_UNIX = 1, 38, 1


def checked(result: int, what: str) -> int:
    """Return the result of a call of the C library. Raises OSError with `what` if it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int) -> None:
    """Call prctl(2). Raises OSError."""
    checked(LIBC.prctl(option, value, 0, 0, 0), f"prctl {option}")


def unshare(flags: int) -> None:
    """Call unshare(2). Raises OSError."""
    checked(LIBC.unshare(flags), "unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Call mount(2). Raises OSError with the target."""
    texts = [None if one is None else os.fsencode(one) for one in (source, target, kind, data)]
    checked(LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def enter_root(folder: str) -> None:
    """Make a mounted folder the root of this mount namespace, and detach the old root. Raises OSError."""
    os.chdir(folder)
    checked(LIBC.syscall(NUMBERS[platform.machine()]["pivot_root"], b".", b"."), "pivot_root")
    checked(LIBC.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")


def landlock_version() -> int:
    """Return the version of Landlock that the kernel has, 0 without it."""
    return max(0, int(LIBC.syscall(NEWER["landlock_create_ruleset"], None, ctypes.c_size_t(0), 1)))


READ = 1 << 2 | 1 << 3
"""Landlock's rights to read files and folders. The right to execute files is given nowhere."""
WRITE = READ | 1 << 1 | sum(1 << bit for bit in (4, 5, 7, 8, 9, 10, 12, 13, 14))
"""... and to write, make, remove and rename files, folders, symbolic links, sockets and pipes. Devices cannot be made."""
OF_FILES = 1 << 1 | 1 << 2 | 1 << 14


def landlock(read: Sequence[str], write: Sequence[str]) -> None:
    """Restrict this process and its children: they can read below the paths `read`, also write below `write`, and nothing else; they
    can use no TCP port, and send signals to and connect abstract sockets of their own processes alone. What the kernel's version does
    not know is left out. Raises OSError."""
    version = landlock_version()
    files = 1 << (13, 13, 14, 15, 15, 16)[min(version, 5)]  # the first bit after those that the version knows
    attributes = struct.pack("QQQ", files - 1, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = checked(LIBC.syscall(444, attributes, ctypes.c_size_t(size), 0), "landlock_create_ruleset")
    for rights, paths in ((READ, read), (WRITE, write)):
        for path in paths:
            if not os.path.exists(path):
                continue
            allowed = rights & (files - 1) & (-1 if os.path.isdir(path) else OF_FILES)
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", allowed, parent)
            checked(LIBC.syscall(445, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
            os.close(parent)
    checked(LIBC.syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def has_seccomp() -> bool:
    """Return True if the numbers of system calls of this machine are known here."""
    return platform.machine() in NUMBERS


def seccomp(alone: bool) -> None:
    """Forbid system calls to this process and its children: those to trace others, execute files, mount, make namespaces, use the
    network (sockets other than AF_UNIX), keys, io_uring, memory that no limit counts, and the administration of the machine.

    If the process is not in namespaces (`alone`), also signals, all sockets, and changes of the attributes of files. Raises OSError.
    """
    machine = platform.machine()
    known = {**NUMBERS[machine], **NEWER}
    left = {"landlock_create_ruleset", *BY_ARGUMENT, *(() if alone else (*SIGNALS, *ATTRIBUTES))}
    denied = sorted(number for name, number in known.items() if name not in left)
    if alone:
        denied.append(known["socket"])
    lines: list[tuple[int, int, int, int]] = []

    def load(offset: int) -> None:
        lines.append((0x20, 0, 0, offset))

    def answer(value: int) -> None:
        lines.append((0x06, 0, 0, value))

    def unless_equal(value: int, skip: int) -> None:
        lines.append((0x15, 0, skip, value))

    kill, allow, error = 0x80000000, 0x7FFF0000, 0x00050000
    load(4)
    lines += [(0x15, 1, 0, AUDIT_ARCH[machine]), (0x06, 0, 0, kill)]
    load(0)
    if machine == "x86_64":  # numbers of x32 would pass the table
        lines += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, kill)]
    for number in denied:
        unless_equal(number, 1)
        answer(error | EPERM)
    unless_equal(
        known["clone3"], 1
    )  # its flags are in memory, where no filter sees them; the C library then uses clone
    answer(error | ENOSYS)
    unless_equal(known["clone"], 4)
    load(16)
    lines.append((0x45, 0, 1, CLONE_NEW))
    answer(error | EPERM)
    answer(allow)
    if not alone:
        unless_equal(known["socket"], 4)
        load(16)
        lines.append((0x15, 1, 0, AF_UNIX))
        answer(error | EPERM)
        answer(allow)
    answer(allow)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code))
    checked(LIBC.prctl(PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")
