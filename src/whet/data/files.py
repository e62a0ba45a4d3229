"""Atomic writes of files and folders (a temporary one, then a rename), file hashes, and the shared-memory folder."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    """Write a text file in UTF-8. A kill at any moment leaves the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder. At the end of the context its files get their places in `folder`, and replace older files
    of the same names. So an error or a kill while they are written changes nothing; the next call removes what it left."""
    exists = folder.exists()
    aside = folder / ".writing" if exists else folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if exists:
            for path in [one for one in aside.rglob("*") if one.is_file()]:
                place = folder / path.relative_to(aside)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
        else:
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def shared_memory() -> Path:
    """Return the shared-memory folder on Linux, or the folder for temporary files elsewhere."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def sha256(path: Path) -> str:
    """Return the SHA-256 hash of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
