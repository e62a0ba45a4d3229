"""Read the rows of data files: JSONL, Parquet, CSV, and datasets of the Hugging Face hub."""

import csv
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.errors import DataError


@dataclass(frozen=True)
class Located:
    """A data row and its location, such as "my.jsonl:12" (lines and rows count from 1)."""

    row: Mapping[str, Any]
    where: str


def read_rows(source: str) -> list[Located]:
    """Read all rows of a JSONL, Parquet or CSV file, or of a `datasets` name ("name", "name:split").

    Raises DataError for a missing or empty file, invalid UTF-8, invalid JSON, a line that is not an object, and two rows
    with the same `id`.
    """
    path = Path(source)
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".parquet": _parquet, ".csv": _csv}
    if path.suffix in readers:
        if not path.is_file():
            raise DataError(f"{source}: no such file")
        rows = list(readers[path.suffix](path))
    elif path.exists():
        raise DataError(f"{source}: expected a .jsonl, .parquet or .csv file or the name of a dataset")
    else:
        rows = list(_hub(source))
    if not rows:
        raise DataError(f"{source}: the file is empty; at least one row is needed")
    rows = [Located({key: value for key, value in one.row.items() if value is not None}, one.where) for one in rows]
    seen: dict[Any, str] = {}
    for located in rows:
        name = located.row.get("id")
        if name is not None and str(name) in seen:
            raise DataError(f"{located.where}: id {name!r} was already used at {seen[str(name)]}; ids must be unique")
        if name is not None:
            seen[str(name)] = located.where
    return rows


def _jsonl(path: Path) -> Iterator[Located]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: not valid UTF-8 at byte {error.start} of the line; save the file as UTF-8"
                ) from error
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: not valid JSON ({error.msg} at column {error.colno}); one object a line"
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
            yield Located(row, where)


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield Located(row, f"{path}:{number}")


def _csv(path: Path) -> Iterator[Located]:
    csv.field_size_limit(1 << 30)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path}:{reader.line_num}: the row has another number of fields than the header")
                yield Located(row, f"{path}:{reader.line_num}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}: not valid CSV ({error})") from error


def _hub(source: str) -> Iterator[Located]:
    path = Path(source.partition(":")[0])
    if path.suffix or source.startswith((".", "/", "~")):
        near = (
            difflib.get_close_matches(path.name, [one.name for one in path.parent.glob("*")], n=1)
            if path.parent.is_dir()
            else []
        )
        raise DataError(f"{source}: no such file" + (f"; did you mean {path.with_name(near[0])}?" if near else ""))
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: no such file; for a dataset by name install whet[datasets]") from error
    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # any error of the hub client: offline, unknown name, unknown split
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{source}: neither a file nor a dataset that can be loaded ({reason})") from error
    for number, row in enumerate(rows, 1):
        yield Located(row, f"{source}:{number}")
