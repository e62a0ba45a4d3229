"""Replace Python objects (functions, loaded models, rows) by paths and names that a recipe can contain.

A function is registered as "python:module:name#hash of its source", and the recipe contains this name. To resume the run,
pass the same function again. Models and rows are written to the folder `inputs` of the run; the recipe has their paths.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whet.data.files import follow_umask, json_line
from whet.data.values import plain_row
from whet.errors import DataError, ModelError, first_line
from whet.registry import register


@dataclass
class Sources:
    """Convert the arguments of a call to recipe values; `write` then writes the files that they name.

    `folder` is the folder of these files. `tokenizer` is the tokenizer of every model that is given as an object.
    """

    folder: Path
    tokenizer: Any = None
    _writes: list[Callable[[], None]] = field(default_factory=list)

    def plain(self, name: str, value: Any) -> Any:
        """Return the value of field `name` with objects replaced. Raises DataError if a row is not a dict or not valid as
        JSON (see `plain_row`), ModelError for a model object without a tokenizer."""
        if isinstance(value, Path):
            return str(value)
        if hasattr(value, "column_names") and isinstance(value, Mapping):
            raise DataError(
                f"{name}: a DatasetDict has the splits {', '.join(value)}; give one of them, such as data['train']"
            )
        if hasattr(value, "to_dict") and hasattr(value, "columns"):
            raise DataError(f"{name}: a DataFrame is not read; give its rows, as frame.to_dict('records')")
        if isinstance(value, Mapping):
            return {key: self.plain(f"{name}.{key}", one) for key, one in value.items()}
        if hasattr(value, "save_pretrained") and hasattr(value, "state_dict"):
            return self._model(name, value)
        if callable(value) or any(hasattr(value, one) for one in ("score", "generate", "rank", "log")):
            return register(value)
        if hasattr(value, "column_names") and hasattr(value, "to_list"):  # a datasets.Dataset
            return self._rows(name, _listed(name, value), filled=True)
        if hasattr(value, "column_names"):
            raise DataError(f"{name}: a {type(value).__name__} is not read; give a list of its rows")
        if isinstance(value, (list, tuple)) and (
            name.partition(".")[0] in ("data", "ptx") or name in ("eval", "eval.data")
        ):
            if not value:
                raise DataError(f"{name}: the list is empty; give at least one row or file")
            return self._rows(name, list(value)) if not _are_files(value) else [self.plain(name, one) for one in value]
        if isinstance(value, (list, tuple)):
            return [self.plain(f"{name}.{number}", one) for number, one in enumerate(value)]
        return value

    @property
    def pending(self) -> bool:
        """Whether `write` has anything to write."""
        return bool(self._writes)

    def write(self) -> None:
        """Write the models and rows whose files do not exist yet."""
        for one in self._writes:
            one()

    def _rows(self, name: str, rows: list[Any], *, filled: bool = False) -> str:
        lines = []
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise DataError(f"{name}[{number}]: a row is a dict, got {type(row).__name__}")
            lines.append(json_line(plain_row(row, f"{name}[{number}]", filled=filled)))
        text = "".join(lines)
        path = self.folder / f"{name.replace('.', '-')}-{_digest(text.encode())}.jsonl"
        self._writes.append(lambda: _put(path, lambda aside: aside.write_text(text, encoding="utf-8")))
        return str(path)

    def _model(self, name: str, model: Any) -> str:
        if self.tokenizer is None:
            raise ModelError(f"{name}: a model that is given as an object needs its tokenizer too; give tokenizer=")
        if not hasattr(self.tokenizer, "save_pretrained"):
            raise ModelError(f"tokenizer: expected a tokenizer object, got {self.tokenizer!r:.80}; load it first")
        from whet.learner.local import fingerprint
        from whet.models.load import quiet

        about = [
            fingerprint(dict(model.named_parameters())),
            model.config.to_json_string(),
            tokenizer_text(self.tokenizer),
        ]
        mark = _digest("\n".join(about).encode())
        path = self.folder / f"{name.replace('.', '-')}-{type(model).__name__}-{mark}"

        def save(aside: Path) -> None:
            quiet()
            model.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)

        self._writes.append(lambda: _put(path, save))
        return str(path)


def _are_files(value: Sequence[Any]) -> bool:
    """Return True if each entry is a path or a mapping with a path, as in a mix of several files."""
    return all(isinstance(one, (str, Path)) or (isinstance(one, Mapping) and "path" in one) for one in value)


def _listed(name: str, data: Any) -> list[Any]:
    """Return the rows of a `datasets.Dataset`. Raises DataError if one has text that is not UTF-8, or a date after 9999."""
    try:
        return data.to_list()
    except Exception as error:  # pyarrow raises ValueError, OverflowError and others
        raise DataError(
            f"{name}: a row cannot be read as Python objects ({first_line(error)}); mend it, or remove its column"
        ) from error


def _put(path: Path, write: Callable[[Path], Any]) -> None:
    """Write to a temporary path, then rename. An existing path is kept: its name contains the hash of its content."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".writing-{os.getpid()}-{path.name}")
    write(aside)
    try:
        follow_umask(aside)
        aside.rename(path)
    except OSError:
        if not path.exists():
            raise
        shutil.rmtree(aside)  # another process has written the same folder


def tokenizer_text(tokenizer: Any) -> str:
    """Return what a tokenizer is made of: its backend (fast tokenizers), special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps({name: str(one) for name, one in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return "\n".join([vocabulary, special, str(tokenizer.chat_template)])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
