"""The record of a stop: when a self-check ends a run, what it looked at is written to `stopped/` in the run folder."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from whet.data import Batch, Group
from whet.data.files import write_json
from whet.data.values import valid_text
from whet.errors import RunStopped, first_line
from whet.loops import rollouts

FOLDER = "stopped"
"""The folder of these records in a run folder."""


def path_of(folder: Path, step: int) -> Path:
    """Return the path of the record of a step (from 1): a JSON file. The rows are beside it, in a Parquet file."""
    return folder / FOLDER / f"step-{step:08d}.json"


def record(
    folder: Path,
    error: RunStopped,
    step: int,
    version: int,
    batch: Batch | None,
    groups: Sequence[Group] = (),
    names: Sequence[str] = (),
    *,
    writes: bool = True,
) -> None:
    """Write what a self-check looked at, and add the name of the file to the message of the error.

    The JSON file has the message, the step (from 1), the version of the learner's weights, and the numbers that the check
    compared (`error.seen`). The Parquet file has a row per row of `batch`, with all its columns. `names` are those of the
    rewards. With several workers, `writes` is True for only one.
    """
    path, message = path_of(folder, step), str(error)
    where = f"; {'the rows and columns are' if batch is not None else 'what the check saw is'} in "
    try:
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = path.with_suffix(".parquet")
            rows.unlink(missing_ok=True)
            about: dict[str, Any] = {"message": message, "step": step, "version": version}
            if batch is not None:
                rollouts.write_table(rows, table_of(batch, groups, names), batch)
            write_json(path, about | {"seen": {name: _plain(value) for name, value in error.seen.items()}})
        error.args = (f"{message}{where}{path.with_suffix('.parquet') if batch is not None else path}",)
    except Exception as failed:  # a full disk, or a column that no file can hold, must not hide why the run ended
        error.args = (f"{message}; what the check saw could not be written to {path.parent} ({first_line(failed)})",)


def table_of(batch: Batch, groups: Sequence[Group] = (), names: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Return a batch as column name -> one value per row. Per-token columns are cut to the response of the row. The texts are
    added if the rows are the answers of the groups."""
    table: dict[str, list[Any]] = {
        "prompt_ids": [row.ids[: row.start].tolist() for row in batch.rows],
        "completion_ids": [row.ids[row.start :].tolist() for row in batch.rows],
    }
    samples = [(group.prompt.text, sample) for group in groups for sample in group.samples]
    if [list(sample.ids) for _, sample in samples] == table["completion_ids"]:
        table |= {
            "prompt": [valid_text(prompt) for prompt, _ in samples],
            "completion": [valid_text(sample.text) for _, sample in samples],
            "draw": [sample.draw for _, sample in samples],
            "answer": [sample.answer for _, sample in samples],
        }
    return table | rollouts.columns_of(batch, names)


def _plain(value: Any) -> Any:
    """Return tensors as lists, and numbers that JSON does not have (NaN, infinities) as text."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
