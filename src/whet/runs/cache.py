"""Cache of tokenized rows: a file for each combination of rows, tokenizer, chat template and options, written once and memory-mapped."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

import whet.data
from whet import distributed
from whet.data import Chat, Store
from whet.data.files import read_json, replacing, sha256, write_json
from whet.data.places import contents, files_of, kind_of, named
from whet.errors import DataError
from whet.runs.sources import tokenizer_text
from whet.terminal import caution

AUTO, OFF = "auto", "none"
"""Values of `data.cache` that are no folder: the cache of this user, and no cache."""
SMALL = 1 << 20
"""Sources with fewer bytes are tokenized for each run and kept in memory."""
LIBRARIES = ("transformers", "tokenizers", "jinja2")
"""Packages whose versions can change the tokens."""


def folder_of(cache: str) -> Path:
    """Return the folder of the cache: the given one, or `data` in $WHET_CACHE, which is `whet` in $XDG_CACHE_HOME (~/.cache) unless
    it is set."""
    if cache != AUTO:
        return Path(os.path.expanduser(cache))
    home = os.environ.get("WHET_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "whet")
    return Path(os.path.expanduser(home)) / "data"


def place_of(cache: str, source: str, chat: Chat, options: Mapping[str, Any]) -> Path | None:
    """Return the file of the cache for the records of a source. Its name is a hash of everything that changes them: the contents
    of the source, the tokenizer, the chat template and its arguments, the `options` of the reader, the code of whet and the
    versions of `LIBRARIES`.

    Return None if they are not cached: the cache is off, the source is small or not on this machine, or the tokenizer has code of
    its own.
    """
    tokenizer, files = chat.tokenizer, contents(source)
    if cache == OFF or not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers."):
        return None
    try:
        if sum(one.stat().st_size for one in files) < SMALL:
            return None
        found = [(kind_of(one), one.suffix, sha256(one)) for one in files]
    except OSError:  # it is told when the rows are read
        return None
    split = named(source) if files_of(source) is None else None
    beside = [Path(__file__).with_name(name) for name in ("cache.py", "data.py", "sources.py")]
    code = [*sorted(Path(whet.data.__file__).parent.glob("*.py")), *beside]
    about = {
        "files": found,
        "split": split and (split.config, split.split),
        "options": options,
        "tokenizer": (tokenizer_text(tokenizer), getattr(tokenizer, "split_special_tokens", False)),
        "chat": (chat.raw, chat.end_ids, chat.closing_ids, chat.leading, chat.spaced, chat.skip_special_tokens, chat.arguments),
        "date": str(date.today()) if "strftime_now" in str(tokenizer.chat_template) else "",
        "code": [sha256(one) for one in code],
        "versions": [version(one) for one in LIBRARIES],
    }  # fmt: skip
    text = json.dumps(about, sort_keys=True, default=str)
    return folder_of(cache) / f"{hashlib.sha256(text.encode()).hexdigest()}.arrow"


def opened(
    path: Path, source: str, build: Callable[[BinaryIO], dict[str, Any]], place: Callable[[], Path | None]
) -> tuple[Store, dict[str, Any]]:
    """Return the records of a source in a file of the cache, and what is said about them. If it is not there or damaged, `build` writes the
    records to a new file and returns what is said about them (as JSON); other processes wait for it. `place` returns the path of
    what is in the source at that time.

    Raises OSError if the cache cannot be written, DataError if the source changed while it was read, and what `build` raises.
    """
    found = _read(path)
    if found is not None:
        return found
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path):
        found = _read(path)  # another process may have written it
        if found is None:
            if path.exists() and distributed.first():
                caution(f"data.cache: {path} is damaged or incomplete; it is written again")
            with replacing(path) as file:
                about = build(file)
                if place() != path:
                    raise DataError(
                        f"{source}: the data changed while they were read; start again when nothing writes to them"
                    )
            write_json(_beside(path), about | {"sha256": sha256(path)})
            found = Store(path), about
    return found


def _read(path: Path) -> tuple[Store, dict[str, Any]] | None:
    """Return the records in a file of the cache and what is said about them, or None if it is not as it was written."""
    try:
        about = read_json(_beside(path), DataError)
        return (Store(path), about) if about.get("sha256") == sha256(path) else None
    except (OSError, DataError, ValueError):
        return None


def _beside(path: Path) -> Path:
    """Return the file with the hash of a file of the cache, and what is said about its records."""
    return path.with_suffix(".json")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file of the cache."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=1.0)
    except Timeout:
        if distributed.first():
            caution("data.cache: another process tokenizes these rows; this one waits for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
