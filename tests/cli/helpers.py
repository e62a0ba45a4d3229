"""The command line called in process, and what it leaves on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.cli.main import main


@dataclass(frozen=True)
class Said:
    """What one command returned and printed."""

    status: int
    out: str
    error: str


def whet(capsys: Any, *words: object) -> Said:
    """One command: `whet(capsys, "sft", "--model", folder)`."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    said = capsys.readouterr()
    return Said(status, said.out, said.err)


def on_disk(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, and every empty folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


def one_message(error: str, fragments: Sequence[str]) -> None:
    """Exactly one line, from whet, without a traceback, that says all of this."""
    assert error.startswith("whet: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    missing = [fragment for fragment in fragments if fragment not in error]
    assert not missing, f"{missing} not in: {error}"
