"""Tokenized elements in an Arrow file: written in batches, and read one by one from a memory map."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np
import torch

from whet.data.types import Element, Labeled, Pair, Ranking, Row, Stepped, Unpaired

BATCH_TOKENS = 1 << 20
"""A record batch is written when it has this number of tokens."""
KINDS = {one.__name__: one for one in (Row, Pair, Ranking, Labeled, Unpaired, Stepped)}
COLUMNS = {"ids": np.int32, "mask": np.uint8, "lengths": np.int32, "starts": np.int32, "values": np.float64}
"""Columns of the file, each a list per element: the ids and the masks of its rows one after the other, the length and the start of
each row, and the numbers of the element (see `_parts`)."""


class _Part(NamedTuple):
    """A record batch: for each column of `COLUMNS` its values, and where the list of each element begins."""

    values: dict[str, np.ndarray]
    offsets: dict[str, np.ndarray]

    def of(self, name: str, element: int) -> np.ndarray:
        """Return the list of an element in a column."""
        begin, end = self.offsets[name][element : element + 2].tolist()
        return self.values[name][begin:end]


class Store(Sequence[Element]):
    """The elements of a file that `write` wrote. Each is made when it is read, and owns its tensors.

    Raises OSError for a file that is not there, ValueError (of pyarrow) for one that is not whole.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._file = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        self._kind = KINDS[self._file.schema.metadata[b"kind"].decode()]
        self._parts: list[_Part | None] = [None] * self._file.num_record_batches
        counts = (self._file.get_batch(number).num_rows for number in range(len(self._parts)))
        self._ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Element: ...

    @overload
    def __getitem__(self, index: slice) -> list[Element]: ...

    def __getitem__(self, index: int | slice) -> Element | list[Element]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"element {index} of {len(self)}")
        index %= len(self)
        number = bisect_right(self._ends, index)
        return self._element(self._part(number), index - (self._ends[number - 1] if number else 0))

    def lengths(self) -> np.ndarray:
        """Return the length of the longest row of each element, (elements,) int64, in tokens."""
        parts = map(self._part, range(len(self._parts)))
        found = [np.maximum.reduceat(one.values["lengths"], one.offsets["lengths"][:-1]) for one in parts]
        return np.concatenate(found).astype(np.int64)

    def _part(self, number: int) -> _Part:
        part = self._parts[number]
        if part is None:
            batch = self._file.get_batch(number)
            lists = {name: batch.column(name) for name in COLUMNS}
            part = self._parts[number] = _Part(
                {name: _array(one.values, COLUMNS[name]) for name, one in lists.items()},
                {name: _array(one.offsets, np.int32) for name, one in lists.items()},
            )
        return part

    def _element(self, part: _Part, number: int) -> Element:
        """Return an element of a record batch."""
        ids, mask = part.of("ids", number).astype(np.int64), part.of("mask", number).astype(bool)
        rows, place, trained = [], 0, 0
        for length, start in zip(part.of("lengths", number).tolist(), part.of("starts", number).tolist(), strict=True):
            end = trained + length - start
            own, kept = ids[place : place + length], mask[trained:end]
            rows.append(Row(torch.from_numpy(own), start, torch.from_numpy(kept)))
            place, trained = place + length, end
        values = part.of("values", number)
        if self._kind is Row:
            return rows[0]
        if self._kind is Pair:
            return Pair(rows[0], rows[1], *values.tolist())
        if self._kind is Ranking:
            return Ranking(tuple(rows), tuple(map(int, values.tolist())))
        if self._kind is Labeled:
            return Labeled(rows[0], *values.tolist())
        if self._kind is Unpaired:
            return Unpaired(rows[0], rows[1], bool(values[0]))
        labels, ends = np.split(values, 2)
        return Stepped(rows[0], torch.from_numpy(labels.astype(np.float32)), torch.from_numpy(ends.astype(bool)))


def _array(values: Any, dtype: type) -> np.ndarray:
    """Return the values of a pyarrow array without a copy. (Its `to_numpy` imports pandas, if it is installed.)"""
    buffer = values.buffers()[1]
    return (
        np.frombuffer(buffer, dtype, len(values), values.offset * np.dtype(dtype).itemsize)
        if len(values)
        else np.zeros(0, dtype)
    )


def lengths_of(elements: Sequence[Element]) -> np.ndarray:
    """Return the length of the longest row of each element, (elements,) int64, in tokens."""
    if isinstance(elements, Store):
        return elements.lengths()
    return np.array([max(row.length for row in _parts(one)[0]) for one in elements], dtype=np.int64)


def write(file: BinaryIO, elements: Iterable[Element]) -> None:
    """Write elements of one kind to an Arrow file (IPC format). Only the elements of a record batch are kept in memory. Raises
    ValueError if there is none."""
    import pyarrow

    batches = _batches(elements)
    first = next(batches, None)
    if first is None:
        raise ValueError("write: there is no element")
    kinds = {name: pyarrow.list_(pyarrow.from_numpy_dtype(dtype)) for name, dtype in COLUMNS.items()}
    schema = pyarrow.schema(kinds, {"kind": type(first[0]).__name__})
    with pyarrow.ipc.new_file(file, schema) as writer:
        for batch in chain([first], batches):
            columns = [_list_array(kind, *one) for kind, one in zip(kinds.values(), _lists(batch), strict=True)]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))


def _list_array(kind: Any, offsets: np.ndarray, values: np.ndarray) -> Any:
    """Return a pyarrow array of lists without a copy. (Arrays from numpy import pandas, see `_array`.)"""
    from pyarrow import Array, py_buffer

    inner = Array.from_buffers(kind.value_type, len(values), [None, py_buffer(values)])
    return Array.from_buffers(kind, len(offsets) - 1, [None, py_buffer(offsets)], children=[inner])


def _batches(elements: Iterable[Element]) -> Iterator[list[Element]]:
    """Yield the elements in lists of about `BATCH_TOKENS` tokens."""
    batch: list[Element] = []
    tokens = 0
    for one in elements:
        batch.append(one)
        tokens += sum(row.length for row in _parts(one)[0])
        if tokens >= BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def _lists(batch: Sequence[Element]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for each column of `COLUMNS`, where the list of each element begins, and the values of all lists."""
    parts = [_parts(one) for one in batch]
    rows = [row for own, _ in parts for row in own]
    counts = np.array([len(own) for own, _ in parts])
    first = counts.cumsum() - counts
    lengths, starts = np.array([row.length for row in rows]), np.array([row.start for row in rows])
    columns = (
        (np.concatenate([row.ids.numpy() for row in rows]), np.add.reduceat(lengths, first)),
        (np.concatenate([row.mask.numpy() for row in rows]), np.add.reduceat(lengths - starts, first)),
        (lengths, counts),
        (starts, counts),
        (np.array([one for _, own in parts for one in own]), np.array([len(own) for _, own in parts])),
    )
    for dtype, (values, sizes) in zip(COLUMNS.values(), columns, strict=True):
        yield np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32), values.astype(dtype)


def _parts(element: Element) -> tuple[tuple[Row, ...], Sequence[float]]:
    """Return the rows of an element and its numbers: probability and margin, ranks, score, label, or the labels and ends of steps."""
    match element:
        case Row():
            return (element,), ()
        case Pair():
            return (element.chosen, element.rejected), (element.probability, element.margin)
        case Ranking():
            return element.rows, element.ranks
        case Labeled():
            return (element.row,), (element.score,)
        case Unpaired():
            return (element.row, element.mismatched), (element.good,)
        case Stepped():
            return (element.row,), [*element.labels.tolist(), *element.ends.tolist()]
