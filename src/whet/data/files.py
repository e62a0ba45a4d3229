"""Atomic writes of small files (a temporary file, then a rename), file hashes, and the shared-memory folder."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SPECIAL = re.compile("[\x85\u2028\u2029\ud800-\udfff]")
"""Characters that are written as escapes: the line separators of Unicode, and halves of surrogate pairs."""


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file that ends with a newline."""
    _write(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file, one row per line."""
    _write(path, "".join(json_line(row) for row in rows))


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON in UTF-8, with its line feed.

    The work of hours is not lost for one value: what JSON cannot hold is written as its text, and a half of a surrogate
    pair as its escape. The line separators of Unicode are escapes too, since many programs split lines at them.
    """
    line = json.dumps(row, ensure_ascii=False, default=str)
    line = line if line.isascii() else SPECIAL.sub(lambda found: f"\\u{ord(found[0]):04x}", line)
    return line + "\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)


def shared_memory() -> Path:
    """Return the shared-memory folder on Linux, or the folder for temporary files elsewhere."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def sha256(path: Path) -> str:
    """Return the SHA-256 hash of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
