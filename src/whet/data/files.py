"""Atomic writes of files (a temporary file, then a rename), file hashes, and the shared-memory folder."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from whet.errors import WhetError, first_line

SPECIAL = re.compile("[\x85\u2028\u2029\ud800-\udfff]")
"""Characters that are written as escapes: the line separators of Unicode, and halves of surrogate pairs."""


LARGEST_JSON = 64 << 20
"""Largest number of bytes of a JSON file that is read whole: records of runs, and configurations of models."""


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file that ends with a newline."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def regular(path: Path) -> Path:
    """Return the path of a file. Raises OSError for a pipe or a device, which could block for ever or never end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: not a regular file; put one there, or remove it")
    return path


def read_json(
    path: Path, error: type[WhetError], advice: str = "restore it, or write it again", *, unique: bool = True
) -> dict[str, Any]:
    """Return the object of a JSON file. Raises an `error` with the file, the line and the advice if it is not UTF-8, not JSON,
    not an object, larger than `LARGEST_JSON`, or (with `unique`) has a name twice. Raises OSError if the file cannot be read."""
    with regular(path).open("rb") as file:
        data = file.read(LARGEST_JSON + 1)
    line = 1
    try:
        if len(data) > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON} bytes")
        found = json.loads(data.decode("utf-8"), object_pairs_hook=once if unique else dict)
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, got {type(found).__name__}")
    except (ValueError, RecursionError) as reason:
        if isinstance(reason, json.JSONDecodeError):
            line = reason.lineno
        elif isinstance(reason, UnicodeDecodeError):
            line = 1 + data.count(b"\n", 0, reason.start)
        what = "objects and lists are nested too deeply" if isinstance(reason, RecursionError) else first_line(reason)
        raise error(f"{path}:{line}: not the JSON of an object ({what}); {advice}") from reason
    return found


def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these names and values. Raises ValueError for a name that stands twice: one would be lost."""
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in one object; remove one of them")
    return out


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file, one row per line."""
    write_text(path, "".join(json_line(row) for row in rows))


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON in UTF-8, with its line feed.

    The work of hours is not lost for one value: what JSON cannot hold is written as its text, and a half of a surrogate
    pair as its escape. The line separators of Unicode are escapes too, since many programs split lines at them.
    """
    line = json.dumps(row, ensure_ascii=False, default=str)
    line = line if line.isascii() else SPECIAL.sub(lambda found: f"\\u{ord(found[0]):04x}", line)
    return line + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8. A reader sees the old content or the new one, also after a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new binary file beside `path`, and rename it to `path` at the end. No link is followed: the new file must not
    exist, and the rename replaces a link at `path`. If the block raises, `path` is unchanged."""
    aside = path.with_name(f".{path.name}.writing")
    aside.unlink(missing_ok=True)
    try:
        with aside.open("xb") as file:
            yield file
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def replace_folder(aside: Path, folder: Path) -> None:
    """Rename a folder that was written beside to its final name, and remove what had this name. See `follow_umask`.
    Raises OSError if it cannot be removed."""
    follow_umask(aside)
    remove(folder)
    aside.rename(folder)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to), or a folder with everything in it, if there is one. Raises OSError if a part
    cannot be removed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def follow_umask(folder: Path) -> None:
    """Give the files below a folder the modes that the umask gives to new files. (safetensors writes files with 0600.)"""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def shared_memory() -> Path:
    """Return the shared-memory folder on Linux, or the folder for temporary files elsewhere."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def sha256(path: Path) -> str:
    """Return the SHA-256 hash of a file's content in hexadecimal."""
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
