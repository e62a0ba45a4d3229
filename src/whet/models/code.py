"""Refuse models and tokenizers that come with code of their own, unless the user allows it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from whet.data.files import regular
from whet.errors import ModelError

FILES = ("config.json", "tokenizer_config.json")
"""The files in which transformers looks for the code of a model or a tokenizer."""
KERNEL = re.compile(r"[^/]+/[^/]+")
"""A kernel that transformers would download and run: repository, with or without version and function."""


def refuse_code(path: str, trusted: bool) -> None:
    """Raise ModelError if the configuration of a folder or hub name names code that transformers would run: `auto_map` (Python
    files of the model), or an attention kernel of a repository. Do nothing if the code is `trusted`. No code is run here."""
    for name in () if trusted else FILES:
        for field, value in _code(_read(path, name)):
            raise ModelError(
                f"{path}: {field} in its {name} names code of its own ({value!r:.80}); read that code, and if you trust it set "
                f"model.trust_remote_code: true; if transformers has this model itself, remove {field}"
            )


def _code(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a configuration, and of those inside it, that name code."""
    if isinstance(config, list):
        for one in config:
            yield from _code(one)
    for field, value in config.items() if isinstance(config, dict) else ():
        kernels = value.values() if isinstance(value, dict) else [value]
        if (field == "auto_map" and value) or (
            field.strip("_") in ("attn_implementation", "experts_implementation")
            and any(isinstance(one, str) and KERNEL.search(one) for one in kernels)
        ):
            yield field, value
        yield from _code(value)


def _read(path: str, name: str) -> Any:
    """Return the content of a JSON file of a folder or hub name; None if it is not there or no JSON, which the loader reports."""
    file: Any = Path(path) / name
    if not Path(path).exists():
        from transformers.utils import cached_file

        quiet = {
            f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")
        }
        try:
            file = cached_file(path, name, **quiet)
        except (OSError, ValueError):
            return None
    try:
        return json.loads(regular(Path(file)).read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError, RecursionError):
        return None
