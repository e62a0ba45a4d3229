"""Batching: order over epochs and sources, mini-batches, micro-batches in a token budget that counts padding."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import overload

import torch

from whet.data.types import Batch, Row
from whet.ops import address, addressed_uniform, permutation

BLOCK = 65_536
"""Draws of the sources of elements that are computed at once."""


def order(
    sizes: Sequence[int], count: int, seed: int, *, weights: Sequence[float] | None = None, shuffle: bool = True
) -> "Order":
    """Return the first `count` elements of a run as (source, index in the source).

    Without weights, the sources are concatenated and used once per epoch, in a new order each epoch. With weights, each
    element first draws its source with that probability; each source has its own epochs.

    >>> list(order([2, 1], 4, seed=5, shuffle=False))
    [(0, 0), (0, 1), (1, 0), (0, 0)]
    """
    return Order(sizes, count, seed, weights, shuffle)


class Order(Sequence[tuple[int, int]]):
    """See `order`. The elements are computed when they are read, so a run of any length begins at once."""

    def __init__(
        self, sizes: Sequence[int], count: int, seed: int, weights: Sequence[float] | None, shuffle: bool
    ) -> None:
        self._count, self._seed, self._shuffle = count, seed, shuffle
        self._sizes = [sum(sizes)] if weights is None else list(sizes)
        self._ends = list(accumulate(sizes))
        share = torch.tensor([1.0] if weights is None else weights, dtype=torch.float64)
        self._shares = (share / share.sum()).cumsum(0)
        self._mixed = weights is not None
        self._turns: dict[tuple[int, int], torch.Tensor] = {}
        self._before: list[list[int]] = [[0] * len(self._sizes)]
        self._blocks: dict[int, list[tuple[int, int]]] = {}

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> tuple[int, int]: ...

    @overload
    def __getitem__(self, place: slice) -> list[tuple[int, int]]: ...

    def __getitem__(self, place: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(self._count))]
        if not 0 <= place < self._count:
            raise IndexError(f"element {place} of {self._count}")
        if self._mixed:
            return self._drawn(place)
        index = self._in_turn(0, place)
        source = bisect_right(self._ends, index)
        return source, index - (self._ends[source - 1] if source else 0)

    def _in_turn(self, source: int, number: int) -> int:
        """Return the index of element `number` of a source, which is used once per epoch."""
        epoch, place = divmod(number, self._sizes[source])
        if not self._shuffle:
            return place
        if (source, epoch) not in self._turns:
            self._turns = {key: turn for key, turn in self._turns.items() if key[0] != source or key[1] == epoch - 1}
            parts = (source, epoch) if self._mixed else (epoch,)
            self._turns[source, epoch] = permutation(address(self._seed, "order", *parts), self._sizes[source])
        return int(self._turns[source, epoch][place])

    def _drawn(self, place: int) -> tuple[int, int]:
        """Return element `place` of a mix: its source, and its index there."""
        number = place // BLOCK
        while len(self._before) <= number:
            self._block(len(self._before) - 1)
        source, earlier = self._block(number)[place % BLOCK]
        return source, self._in_turn(source, earlier)

    def _block(self, number: int) -> list[tuple[int, int]]:
        """Return the draws of a block: each source, and how many draws before had the same source."""
        if number not in self._blocks:
            places = torch.arange(number * BLOCK, (number + 1) * BLOCK)
            draws = addressed_uniform(address(self._seed, "mix"), places)
            sources = torch.searchsorted(self._shares, draws, right=True).clamp(max=len(self._sizes) - 1).tolist()
            counts, found = list(self._before[number]), []
            for source in sources:
                found.append((source, counts[source]))
                counts[source] += 1
            if len(self._before) == number + 1:
                self._before.append(counts)
            self._blocks = {key: block for key, block in self._blocks.items() if key == number - 1} | {number: found}
        return self._blocks[number]


def per_epoch(elements: int, size: int, drop_last: bool = False) -> int:
    """Return the number of batches of one pass over the elements; the last one may be smaller, or is left out.

    >>> per_epoch(9, 8), per_epoch(9, 8, drop_last=True)
    (2, 1)
    """
    return max(1, elements // size) if drop_last else -(-elements // size)


def epoch_batches(
    sizes: Sequence[int],
    count: int,
    size: int,
    seed: int,
    *,
    weights: Sequence[float] | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
) -> "EpochBatches":
    """Return the elements of the first `count` batches of a run as (source, index in the source), see `order`.

    Without weights, a batch never spans two epochs: the last batch of an epoch is smaller, or left out with `drop_last`.

    >>> list(epoch_batches([3], 3, 2, seed=5, shuffle=False))
    [[(0, 0), (0, 1)], [(0, 2)], [(0, 0), (0, 1)]]
    """
    return EpochBatches(sizes, count, size, seed, weights, shuffle, drop_last)


class EpochBatches(Sequence[list[tuple[int, int]]]):
    """See `epoch_batches`. The batches are computed when they are read, so a run of any length begins at once."""

    def __init__(
        self,
        sizes: Sequence[int],
        count: int,
        size: int,
        seed: int,
        weights: Sequence[float] | None,
        shuffle: bool,
        drop_last: bool,
    ) -> None:
        self._count, self._size, self._mixed, self._total = count, size, weights is not None, sum(sizes)
        self.each = per_epoch(self._total, size, drop_last)
        """Batches of one epoch."""
        most = count * size if self._mixed else -(-count // self.each) * self._total
        self._order = order(sizes, most, seed, weights=weights, shuffle=shuffle)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, batch: int) -> list[tuple[int, int]]: ...

    @overload
    def __getitem__(self, batch: slice) -> list[list[tuple[int, int]]]: ...

    def __getitem__(self, batch: int | slice) -> list[tuple[int, int]] | list[list[tuple[int, int]]]:
        if isinstance(batch, slice):
            return [self[one] for one in range(*batch.indices(self._count))]
        if not 0 <= batch < self._count:
            raise IndexError(f"batch {batch} of {self._count}")
        if self._mixed:
            return self._order[batch * self._size : (batch + 1) * self._size]
        epoch, number = divmod(batch, self.each)
        start = epoch * self._total + number * self._size
        return self._order[start : min(start + self._size, (epoch + 1) * self._total)]


def minibatches(elements: int, size: int, key: int) -> list[list[int]]:
    """Split `elements` elements, in random order, into mini-batches of `size` (the last may be smaller)."""
    turn = permutation(key, elements).tolist()
    return [turn[start : start + size] for start in range(0, elements, size)]


def take_elements(batch: Batch, elements: Sequence[int]) -> Batch:
    """Return the rows of these elements of a batch, in this order."""
    rows = batch.elements()
    return batch.take([row for element in elements for row in rows[element]])


def micro_batches(batch: Batch, budget: int, *, packed: bool = False, shared: bool = False) -> list[list[int]]:
    """Split the rows of a batch so that a forward has at most `budget` tokens, without splitting elements.

    A padded micro-batch has rows x longest row tokens, so elements of similar length are grouped. A `packed` one has the tokens of
    its rows, and with `shared` a prompt counts once for all rows that have it, so elements with the same prompt are grouped, and
    all micro-batches are of similar size. An element over the budget forms its own micro-batch.
    The split depends only on the rows and their order, so `measure` and `update` split in the same way.
    """
    return dealt(batch, budget, 1, packed=packed, shared=shared)[0]


def dealt(
    batch: Batch, budget: int, workers: int, *, packed: bool = False, shared: bool = False
) -> list[list[list[int]]]:
    """Split the rows of a batch into micro-batches for several workers: one list per worker, all of the same length.

    The number of rounds is the smallest that the budget allows, see `micro_batches`. Elements are sorted by length (packed: by
    prompt) and cut into contiguous micro-batches, so that the largest number of tokens is as small as possible. Each round takes
    the next most expensive micro-batches, so the workers of a round have similar work. If there are too few micro-batches, the
    lists are filled with empty ones. Padded rows of one worker are cut at the budget itself.
    """
    pieces = _sized(batch, packed, shared)
    if workers == 1 and not packed:
        return [[rows for _, rows in _cut(pieces, budget, packed)]]
    places = -(-len(_cut(pieces, budget, packed)) // workers) * workers
    low, high = 1, budget
    while low < high:  # binary search for the smallest bound that gives at most `places` parts
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(pieces, middle, packed)) <= places else (middle + 1, high)
    parts = _cut(pieces, low, packed)
    if workers > 1:
        parts = sorted(parts, key=lambda part: -part[0])
    parts += [(0, [])] * (places - len(parts))
    return [[rows for _, rows in parts[worker::workers]] for worker in range(workers)]


_Sized = tuple[list[int], int, tuple[bytes, int]]
"""An element: its rows, its size (packed: tokens outside its prompt; padded: its longest row), and its prompt with its length."""


def _sized(batch: Batch, packed: bool, shared: bool) -> list[_Sized]:
    """Return the elements of a batch in the order in which they are cut."""
    elements = batch.elements()
    if not packed:
        longest = [max(batch.rows[row].length for row in element) for element in elements]
        turn = sorted(range(len(elements)), key=lambda number: (longest[number], number))
        return [(elements[number], longest[number], (b"", 0)) for number in turn]
    out: list[_Sized] = []
    first: dict[bytes, int] = {}
    for rows in elements:
        key, start = b"", 0
        if shared:
            own = {batch.rows[row].ids[: batch.rows[row].start].numpy().tobytes() for row in rows}
            if len(own) == 1:  # an element of several prompts is whole
                key, start = own.pop(), batch.rows[rows[0]].start
        first.setdefault(key, len(first))
        out.append((rows, sum(batch.rows[row].length - start for row in rows), (key, start)))
    return sorted(out, key=lambda one: first[one[2][0]]) if shared else out


def _cut(elements: Sequence[_Sized], most: int, packed: bool) -> list[tuple[int, list[int]]]:
    """Cut into contiguous parts of at most `most` tokens (a larger element is alone); return (tokens, rows) of each."""
    parts: list[tuple[int, list[int]]] = []
    last = b""
    for rows, size, (key, start) in elements:
        alone = size + start if packed else len(rows) * size
        joined = most + 1
        if parts and packed:
            joined = parts[-1][0] + size + (0 if key == last and key else start)
        elif parts:
            joined = (len(parts[-1][1]) + len(rows)) * size
        if joined <= most:
            parts[-1] = (joined, parts[-1][1] + list(rows))
        else:
            parts.append((alone, list(rows)))
        last = key
    return parts


def pad_ids(rows: Sequence[Row]) -> torch.Tensor:
    """Return the ids of the rows as (B, S), right-padded with the last id of each row.

    With causal attention no token attends to later positions, so no pad token is needed.
    """
    longest = max(row.length for row in rows)
    return torch.stack([torch.cat([row.ids, row.ids[-1:].expand(longest - row.length)]) for row in rows])
