"""Read the rows of data files: JSONL, JSON, Parquet, CSV, and datasets of the Hugging Face hub."""

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.data.files import once
from whet.data.values import plain_row
from whet.errors import DataError, first_line

BOM = b"\xef\xbb\xbf"
"""The byte-order mark of UTF-8."""
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
"""Endings of compressed files."""


@dataclass(frozen=True)
class Located:
    """A data row and its location, such as "my.jsonl:12" (lines and rows count from 1)."""

    row: Mapping[str, Any]
    where: str


def read_rows(source: str) -> list[Located]:
    """Read all rows of a JSONL, Parquet or CSV file, of a JSON file with one array, or of a `datasets` name ("name",
    "name:split"). Fields with the value null are left out; `whet.data.values.plain_row` says what the values may be.

    Raises DataError with the line (Parquet: the row) for a missing, empty or damaged file, text that is not UTF-8, invalid
    JSON or CSV, a row that is not an object, a name that stands twice, a value that JSON cannot hold, and two rows with the
    same `id`.
    """
    path = Path(source)
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}
    if path.suffix in readers:
        if not path.is_file():
            raise DataError(f"{source}: no such file")
        try:
            found = list(readers[path.suffix](path))
        except OSError as error:
            raise DataError(f"{source}: the file cannot be read ({first_line(error)})") from error
    elif path.exists():
        advice = f"; unpack {path.name} first" if path.suffix in PACKED else ""
        raise DataError(f"{source}: expected a .jsonl, .parquet or .csv file or the name of a dataset{advice}")
    else:
        found = list(_hub(source))
    if not found:
        raise DataError(f"{source}: the file is empty; at least one row is needed")
    filled = path.suffix not in (".jsonl", ".json")
    rows = []
    seen: dict[str, str] = {}
    for where, raw in found:
        row = {name: value for name, value in plain_row(raw, where, filled=filled).items() if value is not None}
        rows.append(Located(row, where))
        if "id" in row:
            name = str(row["id"])
            if name in seen:
                raise DataError(f"{where}: id {row['id']!r} was already used at {seen[name]}; ids must be unique")
            seen[name] = where
    return rows


def _jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            line = _utf8(raw, path, number)
            if line.strip():
                value = _parsed(DECODER.decode, (line,), path, number)
                yield f"{path}:{number}", _object(value, path, number)


def _json(path: Path) -> Iterator[tuple[str, dict]]:
    """Read a file with one array of objects, object by object for their lines; a file without an array is read as JSONL."""
    data = path.read_bytes()
    if not data.lstrip().startswith(b"["):
        yield from _jsonl(path)
        return
    text = _utf8(data, path, 1)
    place = _after_spaces(text, text.index("[") + 1)
    number, counted, more = 1, 0, text[place : place + 1] != "]"
    while more:
        number, counted = number + text.count("\n", counted, place), place
        value, end = _parsed(DECODER.raw_decode, (text, place), path, number)
        yield f"{path}:{number}", _object(value, path, number)
        end = _after_spaces(text, end)
        more = text[end : end + 1] == ","
        place = _after_spaces(text, end + 1) if more else end
    if text[place : place + 1] != "]" or text[place + 1 :].strip():
        number += text.count("\n", counted, place)
        raise DataError(
            f"{path}:{number}: expected the end of the array or a comma, got {text[place : place + 20]!r}; "
            "the file must be one array of objects"
        )


def _after_spaces(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place


def _object(value: Any, path: Path, number: int) -> dict:
    """Return a row as it is. Raises DataError for anything else than an object."""
    if not isinstance(value, dict):
        advice = "; write one object a line, or name a file with one array .json" if isinstance(value, list) else ""
        raise DataError(f"{path}:{number}: expected a JSON object, got {type(value).__name__}{advice}")
    return value


def _utf8(data: bytes, path: Path, number: int) -> str:
    """Decode text that begins at this line of a file. Raises DataError for other encodings, BOM and NUL bytes."""
    if number == 1 and data.startswith(BOM):
        raise DataError(f"{path}:1: the file begins with a byte-order mark (BOM); save it as UTF-8 without one")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        place = error.start - (data.rfind(b"\n", 0, error.start) + 1)
        raise DataError(
            f"{path}:{number + line}: not valid UTF-8 at byte {place} of the line, got {data[error.start : error.end]!r}; "
            "save the file as UTF-8"
        ) from error
    if "\0" in text:
        line = number + text.count("\n", 0, text.index("\0"))
        raise DataError(f"{path}:{line}: a NUL byte; the file is damaged or not UTF-8, save it again as UTF-8")
    return text


def _parsed(parse: Callable[..., Any], given: tuple[Any, ...], path: Path, number: int) -> Any:
    """Return what `parse` reads from the text `given`, at this line of a file. Raises DataError for invalid JSON."""
    try:
        return parse(*given)
    except json.JSONDecodeError as error:
        line, advice = number, "write one object a line"
        if len(given) > 1:  # the text is that of the whole file
            line, advice = error.lineno, "separate the objects of the array by commas"
        got = error.doc[error.pos : error.pos + 20]
        raise DataError(
            f"{path}:{line}: not valid JSON ({error.msg} at column {error.colno}), got {got!r}; {advice}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}:{number}: lists and objects are nested too deeply; write them as text") from error
    except ValueError as error:  # of once and _integer
        raise DataError(f"{path}:{number}: {error}") from error


def _integer(digits: str) -> int:
    if len(digits) > 4300:  # the limit of Python
        raise ValueError(f"a number of {len(digits)} digits; write it as text")
    return int(digits)


DECODER = json.JSONDecoder(object_pairs_hook=once, parse_int=_integer)


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        _check_names(file.schema_arrow.names, str(path))
        for batch in file.iter_batches():
            for row in _rows_of(batch, path, number):
                number += 1
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: column names that are not UTF-8
        after = f" after row {number}" if number else ""
        raise DataError(
            f"{path}: not a readable Parquet file{after} ({first_line(error)}); it is damaged or incomplete, write it again"
        ) from error


def _rows_of(batch: Any, path: Path, before: int) -> list[dict]:
    """Return the rows of a record batch, which follows `before` rows. Raises DataError with the row and the column of a
    value that Python cannot hold: text that is not UTF-8, or a date after the year 9999."""
    try:
        return batch.to_pylist()
    except Exception:  # pyarrow raises ValueError, OverflowError and others; the loop below finds the value
        for number in range(batch.num_rows):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    column[number].as_py()
                except Exception as error:
                    reason = f"{column.type}, {first_line(error)}"
                    if isinstance(error, UnicodeDecodeError):
                        reason = f"not valid UTF-8 at byte {error.start}, got {error.object!r:.60}"
                    raise DataError(
                        f"{path}:{before + number + 1}: field {name!r} cannot be read ({reason}); mend it, or leave the "
                        "column out"
                    ) from error
        raise


def _csv(path: Path) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(1 << 30)
    text = _utf8(path.read_bytes().removeprefix(BOM), path, 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    first = 1
    try:
        for row in reader:
            where, first = f"{path}:{first}", reader.line_num + 1
            if row and header is None:
                header = row
                _check_names(header, where)
            elif row and header is not None:
                if len(row) != len(header):
                    raise DataError(
                        f"{where}: the row has another number of fields than the header: {len(row)}, not {len(header)}; "
                        "put fields with commas or line breaks in quotes"
                    )
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{path}:{first}: not valid CSV ({error}) in the row that begins here; close each quote, and write a quote "
            'inside quotes as ""'
        ) from error


def _check_names(names: Sequence[str], where: str) -> None:
    """Raise DataError if a column has no name, or the name of another one."""
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise DataError(
                f"{where}: column {number} has no name; name it, or leave it out (pandas writes such an index without index=False)"
            )
        if name in names[: number - 1]:
            raise DataError(f"{where}: two columns have the name {name!r}; rename or remove one")


def _hub(source: str) -> Iterator[tuple[str, dict]]:
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
        rows = iter(datasets.load_dataset(name, split=split or "train"))
    except Exception as error:  # any error of the hub client: offline, unknown name, unknown split
        raise DataError(f"{source}: neither a file nor a dataset that can be loaded ({first_line(error)})") from error
    number = 0
    while True:
        number += 1
        try:
            row = next(rows, None)
        except Exception as error:  # a value that its library cannot decode
            raise DataError(f"{source}:{number}: the row cannot be read ({first_line(error)})") from error
        if row is None:
            return
        yield f"{source}:{number}", row
