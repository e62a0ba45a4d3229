"""Hashes of the files that a recipe names, so that a resumed run can tell if one has changed."""

import ast
import hashlib
import importlib.util
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from whet.data.files import read_json, sha256, write_json
from whet.data.places import contents, place_of
from whet.errors import RecipeError

FILE = "inputs.json"
"""The file of a run folder with the hashes."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Endings of weight files. They are not hashed: checkpoints contain the trained weights and fingerprints of the others."""


MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""The form "package.module:name"."""
PLACES = ("path", "source", "reference", "train", "data")
"""Last names of the fields that hold a path or a name of a model or of data."""
DATA = ("data", "eval", "ptx")
"""Sections with data sources."""
FROZEN = re.compile(r"reference|critic|reward\d+|judge\d+")
"""The names of roles whose weights a checkpoint has fingerprints of."""


def digests(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return "field: path" -> hash for the files and model folders that a recipe names: data, users' Python files with the
    files beside them that they import, configurations and tokenizers. For a folder or a pattern of data files, and for a saved
    dataset, it is one hash of all files. Hub names, URLs, files without a suffix, and installed packages are not covered."""
    found = {}
    for field_, value in named(tree):
        files = _files_of(value, field_)
        if files:
            sums = [f"{one.name} {sha256(one)}" for one in files]
            found[f"{field_}: {value}"] = hashlib.sha256("\n".join(sums).encode()).hexdigest()
    return found


def named(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the text of each field of a recipe that can name an input."""
    found = strings({key: one for key, one in tree.items() if key not in ("out", "cluster", "trackers")})
    return ((name, value) for name, value in found if value)  # an empty text names nothing, and not the current folder


def located(tree: Mapping[str, Any]) -> Iterator[tuple[str, str, Path]]:
    """Yield the dotted name, the text, and the resolved path of each field of a recipe that names a file or folder. A word without
    a dot, slash or colon can be a folder only in a field for models and data; elsewhere it is a name."""
    for name, value in named(tree):
        if name.rpartition(".")[2] not in PLACES and not re.search("[./:]", value):
            continue
        with suppress(OSError):  # a text that is too long for a path
            found = next((Path(one) for one in (value, value.rpartition(":")[0]) if one and Path(one).exists()), None)
            found = place_of(value) if found is None and _is_data(name) else found
            if found is not None:
                yield name, value, found.resolve()


def strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the text of each string in nested dicts and lists."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, (Mapping, list)):
        for key, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from strings(one, f"{name}.{key}".strip("."))


def _is_data(field_: str) -> bool:
    """Whether a field names a data source."""
    return field_.partition(".")[0] in DATA and field_.rpartition(".")[2] in ("path", "train", "data")


def _files_of(value: str, field_: str) -> list[Path]:
    """Return the files that a recipe value names: a file, the file of "place:name", the files of a data source, or the small files
    of a model folder."""
    path = Path(value)
    if _is_data(field_) and not path.is_file():
        return contents(value)
    if ".py:" in value:
        path = Path(value.rpartition(":")[0])
    elif MODULE.fullmatch(value):
        try:
            found = importlib.util.find_spec(value.partition(":")[0])
        except Exception:  # a package of the user may fail in any way while it is imported
            found = None
        path = Path(found.origin) if found is not None and found.origin else path
    try:
        if path.is_file() and path.suffix == ".py":
            return _with_imports(path)
        if path.is_file():
            named = path.suffix or field_.endswith("chat_template")
            return [path] if named and path.suffix not in WEIGHTS else []
        if any((path / one).is_file() for one in ("config.json", "adapter_config.json")):
            return sorted(one for one in path.iterdir() if one.is_file() and one.suffix not in WEIGHTS)
    except OSError:  # a text that is too long for a path
        pass
    return []


def _with_imports(path: Path) -> list[Path]:
    """Return a Python file and the files beside it or in the current folder that it imports, also through each other, in a
    fixed order."""
    found, rest = {path}, [path]
    while rest:
        file = rest.pop()
        try:
            nodes = list(ast.walk(ast.parse(file.read_bytes())))
        except (SyntaxError, ValueError, RecursionError):  # it is told when the file is loaded
            continue
        for place in _imported(nodes, file, path.parent):
            for one in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
                if one.is_file() and not any(one.samefile(other) for other in found):
                    found.add(one)
                    rest.append(one)
    return sorted(found)


def _imported(nodes: Sequence[ast.AST], file: Path, home: Path) -> Iterator[Path]:
    """Yield the places, without suffix, of the modules that a file may import: packages on the way, and names that may be modules
    of a package. Names without dots are looked for in `home` and in the current folder, others from the file."""
    for node in nodes:
        starts, names = (home, Path()), list[str]()
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = f"{node.module}." if node.module else ""
            names = [*([node.module] if node.module else []), *(f"{module}{one.name}" for one in node.names)]
            if node.level:
                starts = (file.parents[min(node.level, len(file.parents)) - 1],) * 2
        for name in names:
            parts = [one for one in name.split(".") if one not in ("", "*")]
            for count in range(1, len(parts) + 1):
                yield from (start.joinpath(*parts[:count]) for start in starts)


def write(folder: Path, tree: Mapping[str, Any], accepted: Collection[str] = (), *, resumed: bool) -> None:
    """Write the hashes of the files that a recipe names to the run folder. A resumed run adds those that are missing, and
    replaces those that are `accepted`."""
    old = {name: mark for name, mark in _read(folder).items() if not _is_named(name, accepted)} if resumed else {}
    write_json(folder / FILE, digests(tree) | old)


def check(folder: Path, tree: Mapping[str, Any], accepted: Collection[str] = ()) -> None:
    """Raise RecipeError if a file that the recipe names has changed since the run began and is not `accepted`, or for an
    accepted name that is no input. Without a checkpoint the run starts over, so its files may change."""
    if not any((folder / "checkpoints").glob("step-*")):
        return
    now = digests(tree)
    fields_ = [name for name, _ in named(tree)]
    for one in accepted:
        if not (FROZEN.fullmatch(one) or one in fields_ or any(_is_named(name, [one]) for name in now)):
            known = ", ".join(dict.fromkeys(name.partition(": ")[0] for name in now))
            raise RecipeError(f"--accept-changed {one}: the run has no such input; it has {known}")
    for name, found in changed(folder, tree, accepted).items():
        if found:
            raise RecipeError(
                f"--resume: {name}: the file has changed since the run in {folder} began; restore it, or continue with the "
                f"changed file with --accept-changed {name.partition(': ')[0]}"
            )


def changed(folder: Path, tree: Mapping[str, Any], accepted: Collection[str] = ()) -> dict[str, bool]:
    """Return the entries "field: path" of the run folder whose files are not as when the run began, and not `accepted`. The
    value is True if the file is there, False if it is missing."""
    now, named_ = digests(tree), {f"{field_}: {value}" for field_, value in named(tree)}
    old = {name: mark for name, mark in _read(folder).items() if name in named_ and not _is_named(name, accepted)}
    return {name: name in now for name, mark in old.items() if now.get(name) != mark}


def _is_named(name: str, accepted: Collection[str]) -> bool:
    """Return True if an entry "field: path" is accepted: by its field, its path, or both."""
    field_, _, path = name.partition(": ")
    return not {name, field_, path}.isdisjoint(accepted)


def _read(folder: Path) -> dict[str, str]:
    """Return the hashes of a run folder. Raises RecipeError if the file is not as whet writes it."""
    file = folder / FILE
    found = read_json(file, RecipeError, "restore it, or remove it") if file.is_file() else {}
    if not all(isinstance(one, str) for one in found.values()):
        raise RecipeError(f"--resume: {file} is not as whet writes it, got {found!r:.80}; restore it, or remove it")
    return found
