"""Hashes of the files that a recipe names, so that a resumed run can tell if one has changed."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from whet.data.files import sha256, write_json
from whet.errors import RecipeError

FILE = "inputs.json"
"""The file of a run folder with the hashes."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Endings of weight files. They are not hashed: checkpoints contain the trained weights and fingerprints of the others."""


MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""The form "package.module:name"."""


def digests(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return "field: path" -> hash for the files and model folders that a recipe names: data, users' Python files,
    configurations and tokenizers. Hub names, URLs, files without a suffix, and what a Python file imports are not
    covered."""
    found = {}
    for field_, value in strings({key: one for key, one in tree.items() if key not in ("out", "cluster", "trackers")}):
        files = _files_of(value)
        if files:
            sums = [f"{one.name} {sha256(one)}" for one in files]
            found[f"{field_}: {value}"] = hashlib.sha256("\n".join(sums).encode()).hexdigest()
    return found


def strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the text of each string in nested dicts and lists."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, (Mapping, list)):
        for key, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from strings(one, f"{name}.{key}".strip("."))


def _files_of(value: str) -> list[Path]:
    """Return the files that a recipe value names: a file, the file of "place:name", or the small files of a model folder."""
    path = Path(value)
    if ".py:" in value:
        path = Path(value.rpartition(":")[0])
    elif MODULE.fullmatch(value):
        try:
            found = importlib.util.find_spec(value.partition(":")[0])
        except Exception:  # a package of the user may fail in any way while it is imported
            found = None
        path = Path(found.origin) if found is not None and found.origin else path
    try:
        if path.is_file():
            return [path] if path.suffix and path.suffix not in WEIGHTS else []
        if any((path / one).is_file() for one in ("config.json", "adapter_config.json")):
            return sorted(one for one in path.iterdir() if one.is_file() and one.suffix not in WEIGHTS)
    except OSError:  # a text that is too long for a path
        pass
    return []


def write(folder: Path, tree: Mapping[str, Any], *, resumed: bool) -> None:
    """Write the hashes of the files that a recipe names to the run folder. A resumed run adds those that are missing."""
    file = folder / FILE
    old = json.loads(file.read_text(encoding="utf-8")) if resumed and file.is_file() else {}
    write_json(file, digests(tree) | old)


def check(folder: Path, tree: Mapping[str, Any]) -> None:
    """Raise RecipeError if a file that the recipe names has changed since the run began. Without a checkpoint the run starts
    over, so its files may change."""
    file = folder / FILE
    if not file.is_file() or not any((folder / "checkpoints").glob("step-*")):
        return
    now = digests(tree)
    for name, old in json.loads(file.read_text(encoding="utf-8")).items():
        if name in now and now[name] != old:
            raise RecipeError(
                f"--resume: {name}: the file has changed since the run in {folder} began; restore it, or remove its "
                f"entry from {file} to continue with the changed file"
            )
