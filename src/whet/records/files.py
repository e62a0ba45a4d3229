"""Small files, written whole: aside first, then renamed, so that a half one never stands under the name."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """A JSON file, indented, with a last newline."""
    _write(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A JSONL file, one row a line."""
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)
