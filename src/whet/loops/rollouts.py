"""Write and read rollouts: a Parquet file per step, a row per answer, every column of the batch, per-token ones as lists."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from whet.data import COLUMNS, Batch, Group
from whet.data.files import replacing
from whet.data.values import valid_text
from whet.errors import DataError, first_line

SCHEMA = 1
"""Version of the columns, stored in the metadata of a file. A file without a version has version 1."""
TEXTS = ("prompt_id", "prompt", "completion", "finish", "authors")
"""Columns with text."""
WHOLE = (
    "prompt_ids",
    "completion_ids",
    "draw",
    "answer",
    "version",
    "segment_lengths",
    "group",
    "token_version",
    "support",
)
"""Columns with whole numbers."""
LISTS = dict.fromkeys(("prompt_ids", "completion_ids", "authors", "segment_lengths"), 1)
"""Columns with lists that are not columns of the batch, and their depth."""
LEFT_OUT = ("element", "index", "rewards", "reward_applies", "address")
"""Columns of the batch that are not written."""
REWARD = "reward/"
"""What the name of a column with the scores of one reward begins with."""


EVALUATIONS = "eval"
"""The folder of the answers of evaluations in a run folder."""


def path_of(folder: Path, step: int) -> Path:
    """Return the path of the file of a step of the run in this folder."""
    return folder / "rollouts" / f"step-{step:08d}.parquet"


def table_of(groups: Sequence[Group], batch: Batch, names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the columns of the file of a step, as column name -> one value per answer. Per-token columns are cut to the length
    of the answer. `names` are the names of the rewards in the column `rewards`; each is the column `reward/NAME`, with None where
    the reward does not apply."""
    samples = [(group.prompt, sample) for group in groups for sample in group.samples]
    table: dict[str, list[Any]] = {
        "prompt_id": [prompt.id for prompt, _ in samples],
        "prompt": [prompt.text for prompt, _ in samples],
        "completion": [valid_text(sample.text) for _, sample in samples],
        "prompt_ids": [list(prompt.ids) for prompt, _ in samples],
        "completion_ids": [list(sample.ids) for _, sample in samples],
        "draw": [sample.draw for _, sample in samples],
        "answer": [sample.answer for _, sample in samples],
        "version": [sample.version for _, sample in samples],
        "finish": [sample.finish for _, sample in samples],
        "authors": [[one.author for one in sample.segments] or ["policy"] for _, sample in samples],
        "segment_lengths": [[one.length for one in sample.segments] or [len(sample.ids)] for _, sample in samples],
    }
    return table | columns_of(batch, names)


def columns_of(batch: Batch, names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the columns of a batch, as column name -> one value per row. Per-token columns are cut to the length of the
    response. `names` are the names of the rewards in the column `rewards`; each is the column `reward/NAME`."""
    table: dict[str, list[Any]] = {}
    for name, values in batch.columns.items():
        if name in LEFT_OUT:
            continue
        rows = values.tolist()
        if COLUMNS[name].per_token:
            rows = [row[: batch.rows[number].response] for number, row in enumerate(rows)]
        if values.ndim == 3:  # the support, without its padding
            rows = [[[token for token in step if token >= 0] for step in row] for row in rows]
        table[name] = rows
    for number, name in enumerate(names if "rewards" in batch.columns else ()):
        both = zip(batch["rewards"][:, number].tolist(), batch["reward_applies"][:, number].tolist(), strict=True)
        table[f"{REWARD}{name}"] = [value if applies else None for value, applies in both]
    return table


def write(folder: Path, step: int, groups: Sequence[Group], batch: Batch, names: Sequence[str]) -> Path:
    """Write the file of a step, with the columns of `table_of`, and return its path."""
    path = path_of(folder, step)
    path.parent.mkdir(exist_ok=True)
    write_table(path, table_of(groups, batch, names), batch)
    return path


def write_table(path: Path, table: Mapping[str, list[Any]], batch: Batch) -> None:
    """Write a Parquet file of these columns, with the schema version and the dtypes of the batch in its metadata."""
    import pyarrow
    import pyarrow.parquet

    typed: dict[str, Any] = dict(table)
    for name in table:  # a reward that applies to no answer of this step has the same type as in others
        if name.startswith(REWARD):
            typed[name] = pyarrow.array(table[name], pyarrow.float64())
    kinds = {name: str(column.dtype).removeprefix("torch.") for name, column in batch.columns.items()}
    about = {"whet.schema": str(SCHEMA), "whet.dtypes": json.dumps(kinds)}
    whole = pyarrow.table(typed).replace_schema_metadata(about)
    with replacing(path) as file:
        pyarrow.parquet.write_table(whole, file)


def write_evaluation(folder: Path, step: int, groups: Sequence[Group], numbers: Mapping[str, list[Any]]) -> Path:
    """Write `eval/step-00000042.parquet`, a row per answer of an evaluation, and return its path: index (of the held-out prompt),
    answer, prompt_id, prompt, completion, and the columns of `numbers`, None where a reward or judge does not apply."""
    import pyarrow
    import pyarrow.parquet

    each = [(index, group.prompt, sample) for index, group in enumerate(groups) for sample in group.samples]
    table: dict[str, Any] = {
        "index": [index for index, _, _ in each],
        "answer": [sample.answer for _, _, sample in each],
        "prompt_id": [prompt.id for _, prompt, _ in each],
        "prompt": [valid_text(prompt.text) for _, prompt, _ in each],
        "completion": [valid_text(sample.text) for _, _, sample in each],
    }
    for name, values in numbers.items():  # a column without any value has the type of the others
        table[name] = values if name in ("length", "truncated") else pyarrow.array(values, pyarrow.float64())
    path = folder / EVALUATIONS / f"step-{step:08d}.parquet"
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        pyarrow.parquet.write_table(pyarrow.table(table), file)
    return path


def read(folder: Path, step: int, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Read all columns (or the given ones) of a step, as column name -> one value per answer.

    Raises DataError if a newer version of whet wrote the file, or if it is damaged.
    """
    table = _table(path_of(folder, step), columns)
    for name in table.column_names:
        _check_column(path_of(folder, step), name, table[name])
    return table.to_pydict()


def read_file(path: Path, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Read a Parquet file, also one with the answers of an evaluation, as `read` does. The types of its values are not checked."""
    return _opened(path, lambda one: _table(one, columns).to_pydict())


def _table(path: Path, columns: Sequence[str] | None) -> Any:
    """Return a file as a table of pyarrow. Raises DataError for a newer schema version or a damaged file."""
    import pyarrow.parquet

    names = None if columns is None else list(columns)
    table = _opened(path, lambda one: pyarrow.parquet.read_table(one, columns=names))
    found = (table.schema.metadata or {}).get(b"whet.schema", b"1")
    version = int(found) if found.isdigit() and len(found) < 10 else SCHEMA + 1
    if version > SCHEMA:
        raise DataError(f"{path}: schema version {version}; this whet reads up to {SCHEMA}, update it")
    return table


def names_in(path: Path) -> list[str]:
    """Return the names of the columns of a file. Raises DataError if it is damaged."""
    import pyarrow.parquet

    return list(_opened(path, pyarrow.parquet.read_schema).names)


def _check_column(path: Path, name: str, column: Any) -> None:
    """Raise DataError if a column of a file has values of another type than whet writes, or lacks some."""
    from pyarrow import types

    if name not in {*TEXTS, *WHOLE, *LISTS, *COLUMNS} and not name.startswith(REWARD):
        return  # of a newer version
    kind, values, depth, missing = column.type, column.combine_chunks(), 0, column.null_count
    while types.is_list(kind) or types.is_large_list(kind):
        kind, values, depth = kind.value_type, values.flatten(), depth + 1
        missing += values.null_count
    text = name in TEXTS
    known = types.is_string(kind) or types.is_large_string(kind)
    if not text:
        known = types.is_integer(kind) or (name not in WHOLE and (types.is_floating(kind) or types.is_boolean(kind)))
    if types.is_null(kind):  # lists without any value
        known = depth > 0
    lists = LISTS.get(name, 0)
    if name in COLUMNS:
        lists = len(COLUMNS[name].shape.split(",")) - (2 if COLUMNS[name].shape.endswith(",)") else 1)
    if not known or depth != lists or (missing and not name.startswith(REWARD)):
        fault = "has no value in some rows" if known and depth == lists else f"has the type {column.type}"
        raise DataError(f"{path}: the column {name} {fault}, which whet does not write; restore the file")


def dtype(folder: Path, step: int, name: str) -> torch.dtype:
    """Return the dtype that a column of the batch had; float32 if the file does not say it. Raise DataError for another word."""
    import pyarrow.parquet

    path = path_of(folder, step)
    metadata = _opened(path, pyarrow.parquet.read_schema).metadata or {}
    try:
        found = getattr(torch, json.loads(metadata.get(b"whet.dtypes", b"{}")).get(name, "float32"))
    except (ValueError, AttributeError, TypeError, RecursionError):
        found = None
    if not isinstance(found, torch.dtype):
        raise DataError(f"{path}: its metadata whet.dtypes are not as whet writes them; restore the file")
    return found


def _opened(path: Path, read: Callable[[Path], Any]) -> Any:
    """Return what `read` finds in a Parquet file. Raises DataError if it is damaged."""
    import pyarrow

    try:
        return read(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)}); restore it") from error


def steps(folder: Path) -> list[int]:
    """Return the steps that have a file, in order."""
    return sorted(int(path.stem.split("-")[1]) for path in (folder / "rollouts").glob("step-*.parquet"))


def remove_after(folder: Path, step: int) -> None:
    """Remove the files of steps after `step`; a resumed run writes them again."""
    for one in steps(folder):
        if one > step:
            path_of(folder, one).unlink()
    for path in (folder / EVALUATIONS).glob("step-*.parquet"):
        if path.stem[5:].isdigit() and int(path.stem[5:]) > step:
            path.unlink()
