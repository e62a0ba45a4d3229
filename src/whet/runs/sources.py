"""Python objects where a recipe has a path or a name: functions, loaded models, rows. What each one is, is decided here.

A function is registered under "python:module:name#hash of its source", which stands in the recipe; a resumed run is given the
same function again. A model and rows are written into the folder `inputs` of the run, and the recipe has their path.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whet.errors import DataError, ModelError
from whet.registry import register


@dataclass
class Sources:
    """The fields of a call with paths and names in place of its Python objects; `write` makes the files they name.

    `folder` is where inputs are written, and `tokenizer` belongs to every model that is given as an object.
    """

    folder: Path
    tokenizer: Any = None
    _writes: list[Callable[[], None]] = field(default_factory=list)

    def plain(self, name: str, value: Any) -> Any:
        """The value as a recipe can hold it. Raises DataError and ModelError for objects of another kind."""
        if isinstance(value, Mapping):
            return {key: self.plain(f"{name}.{key}", one) for key, one in value.items()}
        if hasattr(value, "save_pretrained") and hasattr(value, "state_dict"):
            return self._model(name, value)
        if callable(value):
            return register(value)
        if hasattr(value, "column_names") and hasattr(value, "to_list"):  # a datasets.Dataset
            return self._rows(name, value.to_list())
        if (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and value
            and name.partition(".")[0] in ("data", "ptx")
        ):
            return self._rows(name, list(value)) if not _are_files(value) else list(value)
        if isinstance(value, (list, tuple)):
            return [self.plain(f"{name}.{number}", one) for number, one in enumerate(value)]
        return value

    def write(self) -> None:
        """Write the inputs that are not there yet."""
        for one in self._writes:
            one()

    def _rows(self, name: str, rows: list[Any]) -> str:
        lines = []
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise DataError(f"{name}[{number}]: a row is a dict, got {type(row).__name__}")
            try:
                lines.append(json.dumps(dict(row), ensure_ascii=False))
            except (TypeError, ValueError) as error:
                raise DataError(f"{name}[{number}]: the row cannot be written as JSON ({error})") from error
        text = "".join(line + "\n" for line in lines)
        path = self.folder / f"{name.replace('.', '-')}-{_digest(text.encode())}.jsonl"
        self._writes.append(lambda: _put(path, lambda aside: aside.write_text(text, encoding="utf-8")))
        return str(path)

    def _model(self, name: str, model: Any) -> str:
        if self.tokenizer is None:
            raise ModelError(f"{name}: a model that is given as an object needs its tokenizer too; give tokenizer=")
        from whet.learner.local import fingerprint

        mark = _digest(fingerprint(dict(model.named_parameters())).encode())
        path = self.folder / f"{name.replace('.', '-')}-{type(model).__name__}-{mark}"

        def save(aside: Path) -> None:
            model.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)

        self._writes.append(lambda: _put(path, save))
        return str(path)


def _are_files(value: Sequence[Any]) -> bool:
    """A list of {path, weight} mixes several files."""
    return all(isinstance(one, str) or (isinstance(one, Mapping) and "path" in one) for one in value)


def _put(path: Path, write: Callable[[Path], Any]) -> None:
    """Write aside, then rename; what is there already is the same, since its name has its hash."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".writing-{path.name}")
    write(aside)
    aside.rename(path)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
