"""Read the rows of data sources: JSONL, JSON, Parquet, CSV and TSV files, folders of them, and datasets."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from whet.data.files import once
from whet.data.forms import Forms
from whet.data.hub import dataset_rows
from whet.data.places import files_of, kind_of, missing
from whet.data.values import Located, plain_row
from whet.errors import DataError, first_line

BOM = b"\xef\xbb\xbf"
"""The byte-order mark of UTF-8."""
PARQUET_ROWS = 1024
"""Number of rows of a Parquet file that are decoded at once."""


def read_rows(
    source: str, *, columns: Mapping[str, str] | None = None, num_rows: int | None = None, streaming: bool = False
) -> list[Located]:
    """Read the rows of a data source, with the columns of whet.

    A source is a JSONL, JSON, Parquet, CSV or TSV file (also `.jsonl.gz`), a folder or a pattern ("rows/*.jsonl") of such
    files, a folder written by `save_to_disk` of the library datasets, or the name of a dataset: "name", "name:split",
    "name:configuration:split". `columns` renames columns (whet's name -> the column of the source), and rows of other tools get whet's
    columns (see `whet.data.forms.Forms`). Only the first `num_rows` rows are read. With `streaming` a dataset of the hub
    is not downloaded whole; it needs `num_rows`. Fields with the value null are left out; `whet.data.values.plain_row` says
    what the values may be.

    Raises DataError with the line (Parquet: the row) for a missing, empty or damaged file, text that is not UTF-8, invalid
    JSON or CSV, a row that is not an object, a name that stands twice, a value that JSON cannot hold, and two rows with the
    same `id`.
    """
    return list(iterate_rows(source, columns=columns, num_rows=num_rows, streaming=streaming))


def iterate_rows(
    source: str, *, columns: Mapping[str, str] | None = None, num_rows: int | None = None, streaming: bool = False
) -> Iterator[Located]:
    """Yield the rows of a data source one by one, see `read_rows`. JSONL and Parquet files are not read whole. If a row cannot
    be converted, the rest is read first, since an error of the file itself, or of `columns`, is told before."""
    if not source:
        raise DataError("data: the path is empty; name a file, a folder or a dataset")
    files = files_of(source)
    if streaming and files is not None:
        raise DataError(f"{source}: data.streaming is for datasets by name, and this is a file or folder; leave it out")
    if streaming and num_rows is None:
        raise DataError(
            f"{source}: data.streaming reads the first rows of a dataset; say how many with --data.num-rows 10000"
        )
    found = _rows_of_files(files) if files is not None else _rows_of_dataset(source, streaming)
    forms = Forms(columns or {}, source)
    seen: dict[str, str] = {}
    empty, late = True, None
    for where, raw, filled in islice(found, num_rows):
        row = {name: value for name, value in plain_row(raw, where, filled=filled).items() if value is not None}
        one, empty = forms.renamed(Located(row, where)), False
        if late is not None:
            continue
        try:
            one = forms.converted(one)
            _check_id(one, seen)
        except DataError as error:
            late = error
            continue
        yield one
    if empty:
        raise DataError(f"{source}: the file is empty; at least one row is needed")
    forms.check()
    if late is not None:
        raise late


def _check_id(located: Located, seen: dict[str, str]) -> None:
    """Note the `id` of a row, and raise DataError if an earlier row has it."""
    if "id" in located.row:
        name = str(located.row["id"])
        if name in seen:
            raise DataError(
                f"{located.where}: id {located.row['id']!r} was already used at {seen[name]}; ids must be unique"
            )
        seen[name] = located.where


def _rows_of_dataset(source: str, streaming: bool) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    return ((where, row, True) for where, row in dataset_rows(source, streaming=streaming))


def _rows_of_files(files: Sequence[Path]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Yield the location and the raw row of each row of these files, and whether the file fills every key of an object."""
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv, ".tsv": _csv}
    for path in files:
        if not path.is_file():
            raise missing(str(path))
        try:
            kind = kind_of(path)
            yield from ((where, row, kind not in (".jsonl", ".json")) for where, row in readers[kind](path))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: the file cannot be read ({first_line(error)})") from error


def _opened(path: Path) -> BinaryIO:
    """Open a file, unpacked if it is compressed with gzip."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    with _opened(path) as lines:
        for number, raw in enumerate(lines, 1):
            line = _utf8(raw, path, number)
            if line.strip():
                value = _parsed(DECODER.decode, (line,), path, number)
                yield f"{path}:{number}", _object(value, path, number)


def _json(path: Path) -> Iterator[tuple[str, dict]]:
    """Read a file with one array of objects, object by object for their lines; a file without an array is read as JSONL."""
    with _opened(path) as file:
        data = file.read()
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
        for batch in file.iter_batches(PARQUET_ROWS):
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
    with _opened(path) as file:
        text = _utf8(file.read().removeprefix(BOM), path, 1)
    between = "\t" if kind_of(path) == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=between)
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
                        f"put fields with {'tabs' if between != ',' else 'commas'} or line breaks in quotes"
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
