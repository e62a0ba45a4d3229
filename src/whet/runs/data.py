"""Read the rows of a recipe, and check that the data options fit the method."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from whet import distributed
from whet.data import Chat, Element, Located, Prompt, Reader, degenerate, read_rows
from whet.errors import DataError, RecipeError
from whet.methods import Objective, catalogue
from whet.models import load
from whet.runs import models
from whet.runs import recipe as fields
from whet.runs.early import longest_of, sources
from whet.terminal import caution


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


def located(data: fields.Data | fields.Rows, one: fields.DataSource) -> list[Located]:
    """Read the rows of a source as its section says: renamed columns, the first rows, streaming."""
    columns = one.columns or data.columns
    return read_rows(one.source, columns=columns, num_rows=data.num_rows, streaming=data.streaming)


def located_rows(data: fields.Rows) -> list[Located]:
    """Read the rows of a section with a single source. Raises RecipeError without one, or for several."""
    given = sources(data)
    if len(given) > 1:
        raise RecipeError(f"data.train: one source is read here, got {len(given)}; join them to one file or one folder")
    return located(data, given[0])


def rows_of(data: fields.Rows, read: Callable[[Sequence[Any]], list]) -> list:
    """Read the records of a section with a single source."""
    return read(located_rows(data))


def sources_of(data: fields.Data, read: Callable[[Sequence[Any]], list]) -> tuple[list[list], list[float] | None]:
    """Return the elements of each training source, and the weights of the sources (None for a single one)."""
    given = sources(data)
    weights = [one.weight for one in given] if len(given) > 1 else None
    return [read(located(data, one)) for one in given], weights


def cautioned(read: Callable[[Sequence[Any]], list], chat: Chat) -> Callable[[Sequence[Any]], list]:
    """Wrap `read` to print what is degenerate in the records, one line each, in the first of several workers. It raises
    DataError for records from which nothing can be learned (see `whet.data.degenerate`)."""

    def checked(rows: Sequence[Any]) -> list:
        records = read(rows)
        for one in degenerate.cautions(rows, records, chat.end_ids):
            if distributed.first():
                caution(one)
        return records

    return checked


def tell_left_out(reader: Reader) -> None:
    """Print how many rows were left out because they are too long."""
    if reader.left_out and distributed.first():
        places = ", ".join(reader.left_out[:3]) + (", ..." if len(reader.left_out) > 3 else "")
        caution(
            f"{len(reader.left_out)} rows or answers longer than {reader.max_tokens} tokens are left out ({places})"
        )


def guarded(read: Callable[[Sequence[Any]], list], objective: Objective, name: str) -> Callable[[Sequence[Any]], list]:
    """Wrap `read` to raise DataError if a row has a `margin` or `probability` that the losses of the method do not use."""
    compared = [term.reads() for term in objective.terms if term.name not in ("sft", "centering")]

    def checked(rows: Sequence[Any]) -> list:
        for column in ("margin", "probability"):
            first = next((one for one in rows if column in one.row), None)
            if first is not None and not all(column in reads for reads in compared):
                raise DataError(
                    f"{first.where}: {name} does not read the field {column!r}; leave it out or take another method"
                )
        return read(rows)

    return checked


def held_out_of(
    evaluation: fields.Evaluation, data: fields.Data | fields.Rows, read: Callable[[Sequence[Any]], list]
) -> list:
    """Read the held-out records, with the renamed columns of the training rows; an empty list without `eval.data`."""
    if not evaluation.data:
        return []
    return read(read_rows(evaluation.data, columns=data.columns, num_rows=evaluation.num_rows))


def ptx_of(ptx: fields.Ptx, read: Callable[[Sequence[Any]], list]) -> list[Element]:
    """Read the pre-training elements; an empty list without `ptx.data`."""
    return read(read_rows(ptx.data, columns=ptx.columns)) if ptx.data else []


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
