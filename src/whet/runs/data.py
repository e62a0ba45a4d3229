"""Read the rows of a recipe, and check that the data options fit the method."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from whet import distributed
from whet.data import Chat, Element, Located, Prompt, Reader, iterate_rows, read_rows
from whet.data.degenerate import Tally, common_name
from whet.data.fields import check_fields
from whet.data.places import files_of
from whet.data.store import write
from whet.errors import DataError, RecipeError, first_line
from whet.methods import Objective, catalogue
from whet.models import load
from whet.runs import cache, models
from whet.runs import recipe as fields
from whet.runs.early import longest_of, sources
from whet.terminal import caution

FEW = 1000
"""With `num_rows` up to this number, rows are not cached: it takes longer to tell whether a large file has changed."""
SHOWN = 3
"""Number of rows that are left out whose places are printed."""


def reader_of(
    model: fields.Frozen, data: fields.Data | fields.Rows, chat: Chat, *, room: int = 0, closing: bool = False
) -> Reader:
    """Build the reader of the rows. Keep `room` positions free for an answer. With `closing` it reads answers as a reward model
    does. Raises RecipeError if lengths do not fit."""
    limit = load.positions(models.source_of(model))
    longest = longest_of(data, limit, room)
    advice = "raise --data.max-tokens" if longest < limit - room else "the model has no more positions"
    if room:
        advice = "lower --max-new-tokens" if advice.startswith("the") else advice
    more: dict[str, Any] = {"turns": data.turns, "separator": data.separator} if isinstance(data, fields.Data) else {}
    return Reader(chat, longest, advice, data.too_long, closing=closing, **more)


@dataclass(frozen=True)
class Reading:
    """How the rows of a source become records: by the method `name` of the reader. `refused` are the columns that the losses of the
    training method do not use. `cached` is the option `data.cache` (see `whet.runs.cache`)."""

    reader: Reader
    name: str
    method: str = ""
    refused: tuple[str, ...] = ()
    cached: str = cache.OFF

    def read(
        self, source: str, columns: Mapping[str, str], num_rows: int | None = None, *, streaming: bool = False
    ) -> Sequence[Any]:
        """Return the records of a source: a list, or a sequence that reads them from the cache. Print what is degenerate in them,
        one line each, in the first of several workers.

        Raises DataError for a row that cannot be read or has a refused column, and for records from which nothing can be learned
        (see `whet.data.degenerate`).
        """
        begin = partial(iterate_rows, source, columns=columns, num_rows=num_rows, streaming=streaming)
        options = {"columns": dict(columns), "num_rows": num_rows, "reading": self.name, "refused": self.refused}
        path = None if num_rows is not None and num_rows <= FEW else self._place(source, options)
        read = None if path is None else self._from_cache(path, source, begin, options)
        if read is None:
            tally = self._tally()
            rows = [self._checked(one) for one in list(begin())]
            read = list(self._records(rows, tally)), tally.lines(), list(tally.files)
        records, lines, files = read
        for one in lines if distributed.first() else ():
            caution(f"{common_name(files)}: {one}")
        return records

    def _place(self, source: str, options: Mapping[str, Any]) -> Path | None:
        """Return the file of the cache for the records of a source, or None if they are not cached."""
        own = ("max_tokens", "too_long", "turns", "separator", "closing")
        more = {name: getattr(self.reader, name) for name in own}
        return cache.place_of(self.cached, source, self.reader.chat, {**options, **more})

    def _from_cache(
        self, path: Path, source: str, begin: Callable[[], Iterator[Located]], options: Mapping[str, Any]
    ) -> tuple[Sequence[Any], list[str], list[str]] | None:
        """Return the records of a source from the cache, what is degenerate in them, and the files of the rows; None if the cache
        cannot be written."""
        left_out, names = self.reader.left_out, [str(one) for one in files_of(source) or (source,)]
        before = len(left_out)
        try:
            records, about = cache.opened(
                path, source, lambda file: self._write(file, begin, names), lambda: self._place(source, options)
            )
        except (OSError, NotImplementedError) as error:  # a file system without locks
            if distributed.first():
                reason = f"{path.parent} cannot be written ({first_line(error)})"
                caution(f"data.cache: {reason}; the rows are kept in memory, name another folder with --data.cache")
            return None
        finally:
            del left_out[before:]
        places = [f"{names[number]}:{line}" for number, line in about["first_left_out"]]
        left_out.extend(places + places[-1:] * (about["left_out"] - len(places)))
        return records, about["cautions"], [names[number] for number in about["files"]]

    def _tally(self) -> Tally:
        return Tally(self.reader.chat.end_ids, pairs=self.name == "pairs")

    def _records(self, rows: Iterable[Located], tally: Tally) -> Iterator[Any]:
        """Yield the records of the rows, and count them."""
        for block, records in self.reader.stream(self.name, rows):
            tally.add(block, records)
            yield from records

    def _checked(self, located: Located) -> Located:
        """Return a row. Raises DataError if it has a refused column."""
        for column in self.refused:
            if column in located.row:
                raise DataError(
                    f"{located.where}: {self.method} does not read the field {column!r}; leave it out or take another method"
                )
        return located

    def _write(self, file: BinaryIO, begin: Callable[[], Iterator[Located]], names: Sequence[str]) -> dict[str, Any]:
        """Write the records of the rows to a file of the cache. Return what is printed about them, with the positions of their files
        in `names`, since files may be moved. The rows are read twice: what is wrong is told before any is tokenized."""
        for one in map(self._checked, begin()):
            check_fields(self.name, one)
        tally, left_out = self._tally(), self.reader.left_out
        before = len(left_out)
        write(file, self._records(begin(), tally))
        first = [one.rpartition(":") for one in left_out[before : before + SHOWN]]
        return {
            "cautions": tally.lines(),
            "files": [names.index(one) for one in tally.files],
            "left_out": len(left_out) - before,
            "first_left_out": [(names.index(name), int(line)) for name, _, line in first],
        }


def located_rows(data: fields.Rows) -> list[Located]:
    """Read the rows of a section with a single source."""
    one = _single(data)
    return read_rows(one.source, columns=one.columns or data.columns, num_rows=data.num_rows, streaming=data.streaming)


def rows_of(data: fields.Rows, reading: Reading) -> Sequence[Any]:
    """Return the records of a section with a single source."""
    return _records_of(data, _single(data), reading)


def sources_of(data: fields.Data, reading: Reading) -> tuple[list[Sequence[Any]], list[float] | None]:
    """Return the elements of each training source, and the weights of the sources (None for a single one)."""
    given = sources(data)
    weights = [one.weight for one in given] if len(given) > 1 else None
    return [_records_of(data, one, reading) for one in given], weights


def _single(data: fields.Rows) -> fields.DataSource:
    """Return the source of a section. Raises RecipeError without one, or for several."""
    given = sources(data)
    if len(given) > 1:
        raise RecipeError(f"data.train: one source is read here, got {len(given)}; join them to one file or one folder")
    return given[0]


def _records_of(data: fields.Data | fields.Rows, one: fields.DataSource, reading: Reading) -> Sequence[Any]:
    """Return the records of a source as its section says: renamed columns, the first rows, streaming."""
    return reading.read(one.source, one.columns or data.columns, data.num_rows, streaming=data.streaming)


def tell_left_out(reader: Reader) -> None:
    """Print how many rows were left out because they are too long."""
    if reader.left_out and distributed.first():
        places = ", ".join(reader.left_out[:SHOWN]) + (", ..." if len(reader.left_out) > SHOWN else "")
        caution(
            f"{len(reader.left_out)} rows or answers longer than {reader.max_tokens} tokens are left out ({places})"
        )


def refused_by(objective: Objective) -> tuple[str, ...]:
    """Return which of the columns `margin` and `probability` the losses of a method do not use."""
    compared = [term.reads() for term in objective.terms if term.name not in ("sft", "centering")]
    return tuple(one for one in ("margin", "probability") if not all(one in reads for reads in compared))


def held_out_of(evaluation: fields.Evaluation, data: fields.Data | fields.Rows, reading: Reading) -> Sequence[Any]:
    """Return the held-out records, with the renamed columns of the training rows; an empty list without `eval.data`."""
    return reading.read(evaluation.data, data.columns, evaluation.num_rows) if evaluation.data else []


def ptx_of(ptx: fields.Ptx, reading: Reading) -> Sequence[Element]:
    """Return the pre-training elements; an empty list without `ptx.data`."""
    return reading.read(ptx.data, ptx.columns) if ptx.data else []


def with_all_columns(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts with the same columns in each row, None where a row lacks one: each step scores other prompts, and a
    reward function gets the same arguments in all of them."""
    names = {name: None for prompt in prompts for name in prompt.row}
    return [one if one.row.keys() == names.keys() else replace(one, row=names | dict(one.row)) for one in prompts]


def check_columns(prompts: Sequence[Prompt], where: str = "data.train") -> None:
    """Raise RecipeError if a prompt row has a column with the name of an argument that whet passes to reward functions."""
    for prompt in prompts:
        for name in ("prompts", "completions", "completion_ids"):
            if name in prompt.row:
                raise RecipeError(
                    f"{where}: the prompt rows have a column {name!r}, which reward functions get from whet; rename it"
                )


def reading(name: str, objective: Objective) -> str:
    """Return the name of the method of `whet.data.Reader` that reads the rows of a training method."""
    return "unpaired" if "good" in objective.reads() else catalogue.READS.get(name, "pairs")


def check_data(data: fields.Data, records: str) -> None:
    """Raise RecipeError for data options that do not apply to this kind of records."""
    if data.separator != fields.Data().separator and records != "steps":
        raise RecipeError(
            "data.separator: only rows with steps (reward --algorithm.name process) have one; leave it out"
        )
    if data.turns != "all" and records != "demonstrations":
        raise RecipeError("data.turns: only demonstrations have several turns to train; leave it out")
