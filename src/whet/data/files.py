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

SPECIAL = re.compile("[\x85\u2028\u2029\ud800-\udfff]")
"""Characters that are written as escapes: the line separators of Unicode, and halves of surrogate pairs."""


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file that ends with a newline."""
    write_text(path, json.dumps(value, indent=2) + "\n")


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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
