"""Folders and files of this user in places that all users of the machine share, such as shared memory. Links are not followed."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def private_folder(root: Path, prefix: str) -> Path:
    """Create a folder in `root` that only this user can enter, whatever the umask is, and return it.

    Its name is `prefix` and random characters, so no other user can create it first.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    folder.chmod(0o700)  # a umask may have removed bits
    return folder


def owned(path: Path) -> bool:
    """Return True if `path` itself, not what a link points to, belongs to this user. False if there is nothing."""
    try:
        return path.lstat().st_uid == os.geteuid()
    except OSError:
        return False


def owned_folder(path: Path) -> bool:
    """Return True if `path` is a folder of this user, and not a link to one."""
    return owned(path) and stat.S_ISDIR(path.lstat().st_mode)


def remove_owned(folder: Path) -> None:
    """Remove a folder of this user as far as possible. Links, and folders of other users, are left alone."""
    if owned_folder(folder):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def opened(folder: Path, name: str) -> Iterator[int]:
    """Open the existing regular file `name` in a folder and yield its descriptor, for reading and writing. Its content is kept.

    Raises OSError if the folder or the file is a link, belongs to another user, or is something else.
    """
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # O_NONBLOCK: do not wait for the other end of a named pipe
    inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | flags)
    try:
        _refuse_foreign(inside, folder)
        file = os.open(name, os.O_RDWR | flags, dir_fd=inside)
    finally:
        os.close(inside)
    try:
        _refuse_foreign(file, folder / name)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(f"{folder / name}: not a regular file")
        yield file
    finally:
        os.close(file)


def _refuse_foreign(descriptor: int, path: Path) -> None:
    owner = os.fstat(descriptor).st_uid
    if owner != os.geteuid():
        raise PermissionError(f"{path}: belongs to {user(owner)}")


def user(uid: int) -> str:
    """Return the name and number of a user for messages: "alice (1000)", or "user 1000" if it has no name here."""
    with suppress(ImportError, KeyError):
        import pwd

        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    return f"user {uid}"
