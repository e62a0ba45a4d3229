"""How the rows of a recipe are read, and which options of the data fit a method."""

from collections.abc import Callable, Sequence
from typing import Any

from whet.data import Chat, Element, Prompt, Reader, read_rows
from whet.errors import DataError, RecipeError
from whet.methods import Objective, catalogue
from whet.models import load
from whet.runs import models
from whet.runs import recipe as fields


def reader_of(model: fields.Frozen, data: fields.Data | fields.Rows, chat: Chat, *, room: int = 0) -> Reader:
    """The reader of this recipe's rows; `room` positions are kept free for an answer."""
    limit = load.positions(models.source_of(model))
    longest = min(data.max_tokens or limit, limit - room)
    if data.max_tokens and data.max_tokens > limit:
        raise RecipeError(f"data.max_tokens: the model has {limit} positions; got {data.max_tokens}")
    if longest < 2:
        raise RecipeError(
            f"sampling.max_new_tokens: the model has {limit} positions for prompt and answer; got {room}, lower it with "
            "--max-new-tokens"
        )
    mend = "raise --data.max-tokens" if longest < limit - room else "the model has no more positions"
    if room:
        mend = "lower --max-new-tokens" if mend.startswith("the") else mend
    return Reader(
        chat, longest, mend, data.too_long, *((data.turns, data.separator) if isinstance(data, fields.Data) else ())
    )


def rows_of(data: fields.Rows, read: Callable[[Sequence[Any]], list]) -> list:
    """The records of the one file of a recipe."""
    if not data.train:
        raise RecipeError("data.train: which rows? give --data with a file or a dataset's name")
    return read(read_rows(data.train))


def sources_of(data: fields.Data, read: Callable[[Sequence[Any]], list]) -> tuple[list[list], list[float] | None]:
    """(the elements of every training source, their weights or None for a single file)."""
    if isinstance(data.train, str):
        return [rows_of(fields.Rows(data.train), read)], None
    return [read(read_rows(one.path)) for one in data.train], [one.weight for one in data.train]


def guarded(read: Callable[[Sequence[Any]], list], objective: Objective, name: str) -> Callable[[Sequence[Any]], list]:
    """The reading, with rows refused whose `margin` or `probability` no term of the method reads."""
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


def evaluation_of(data: fields.Data, read: Callable[[Sequence[Any]], list]) -> list[Element]:
    """The held-out elements; none without data.eval."""
    return read(read_rows(data.eval)) if data.eval else []


def check_columns(prompts: Sequence[Prompt]) -> None:
    """Refuses prompt rows whose columns would hide what reward functions get from whet."""
    for prompt in prompts:
        for name in ("prompts", "completions", "completion_ids"):
            if name in prompt.row:
                raise RecipeError(
                    f"data.train: the prompt rows have a column {name!r}, which reward functions get from whet; rename it"
                )


def reading(name: str, objective: Objective) -> str:
    """Which records a method is trained on: the name of a reading of `whet.data.Reader`."""
    return "unpaired" if "good" in objective.reads() else catalogue.READS.get(name, "pairs")


def check_data(data: fields.Data, records: str) -> None:
    """Refuses options of the data that these records do not have."""
    if data.separator != fields.Data().separator and records != "steps":
        raise RecipeError(
            "data.separator: only rows with steps (reward --algorithm.name process) have one; leave it out"
        )
    if data.turns != "all" and records != "demonstrations":
        raise RecipeError("data.turns: only demonstrations have several turns to train; leave it out")
