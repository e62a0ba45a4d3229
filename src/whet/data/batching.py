"""Batching: order over epochs and sources, mini-batches, micro-batches in a token budget that counts padding."""

from collections.abc import Sequence

import torch

from whet.data.types import Batch, Row
from whet.ops import address, addressed_uniform, permutation


def order(
    sizes: Sequence[int], count: int, seed: int, *, weights: Sequence[float] | None = None, shuffle: bool = True
) -> list[tuple[int, int]]:
    """Return the first `count` elements of a run as (source, index in the source).

    Without weights, the sources are concatenated and used once per epoch, in a new order each epoch. With weights, each
    element first draws its source with that probability; each source has its own epochs.
    """
    if weights is None:
        flat = [(source, index) for source, size in enumerate(sizes) for index in range(size)]
        total = len(flat)
        places: list[tuple[int, int]] = []
        for epoch in range(-(-count // total)):
            turn = permutation(address(seed, "order", epoch), total).tolist() if shuffle else range(total)
            places.extend(flat[index] for index in turn)
        return places[:count]
    share = torch.tensor(weights, dtype=torch.float64)
    draws = addressed_uniform(address(seed, "mix"), torch.arange(count))
    sources = torch.searchsorted((share / share.sum()).cumsum(0), draws, right=True).clamp(max=len(sizes) - 1).tolist()
    queues: list[list[int]] = [[] for _ in sizes]
    epochs = [0] * len(sizes)
    out = []
    for source in sources:
        if not queues[source]:
            key = address(seed, "order", source, epochs[source])
            turn = permutation(key, sizes[source]).tolist() if shuffle else list(range(sizes[source]))
            queues[source] = turn[::-1]
            epochs[source] += 1
        out.append((source, queues[source].pop()))
    return out


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
) -> list[list[tuple[int, int]]]:
    """Return the elements of the first `count` batches of a run as (source, index in the source), see `order`.

    Without weights, a batch never spans two epochs: the last batch of an epoch is smaller, or left out with `drop_last`.
    """
    total = sum(sizes)
    each = per_epoch(total, size, drop_last)
    if weights is not None or total % size == 0:
        flat = order(sizes, count * size, seed, weights=weights, shuffle=shuffle)
        return [flat[start : start + size] for start in range(0, count * size, size)]
    flat = order(sizes, -(-count // each) * total, seed, shuffle=shuffle)
    starts = [epoch * total + batch * size for epoch in range(-(-count // each)) for batch in range(each)]
    return [flat[start : min(start + size, (start // total + 1) * total)] for start in starts[:count]]


def minibatches(elements: int, size: int, key: int) -> list[list[int]]:
    """Split `elements` elements, in random order, into mini-batches of `size` (the last may be smaller)."""
    turn = permutation(key, elements).tolist()
    return [turn[start : start + size] for start in range(0, elements, size)]


def take_elements(batch: Batch, elements: Sequence[int]) -> Batch:
    """Return the rows of these elements of a batch, in this order."""
    rows = batch.elements()
    return batch.take([row for element in elements for row in rows[element]])


def micro_batches(batch: Batch, budget: int) -> list[list[int]]:
    """Split the rows of a batch so that rows x longest row is at most `budget` tokens, without splitting elements.

    Elements of similar length are grouped, which reduces padding. An element over the budget forms its own micro-batch.
    The split depends only on the lengths and their order, so `measure` and `update` split in the same way.
    """
    elements = batch.elements()
    longest = [max(batch.rows[row].length for row in element) for element in elements]
    out: list[list[int]] = []
    width = 0
    for number in sorted(range(len(elements)), key=lambda number: (longest[number], number)):
        width = max(width, longest[number])
        if out and (len(out[-1]) + len(elements[number])) * width <= budget:
            out[-1].extend(elements[number])
        else:
            out.append(list(elements[number]))
            width = longest[number]
    return out


def dealt(batch: Batch, budget: int, workers: int) -> list[list[list[int]]]:
    """Split the rows of a batch into micro-batches for several workers: one list per worker, all of the same length.

    The number of rounds is the smallest that the budget allows. Elements are sorted by length and cut into contiguous
    micro-batches, so that the largest cost (rows x longest row) is as small as possible. Each round takes the next most
    expensive micro-batches, so the workers of a round have similar work. If there are too few micro-batches, the lists
    are filled with empty ones. For one worker, the result is that of `micro_batches`.
    """
    if workers == 1:
        return [micro_batches(batch, budget)]
    elements = batch.elements()
    longest = [max(batch.rows[row].length for row in element) for element in elements]
    turn = sorted(range(len(elements)), key=lambda number: (longest[number], number))

    def cut(most: int) -> list[tuple[int, list[int]]]:
        """Cut into contiguous parts of at most `most` tokens (a larger element is alone); return (cost, rows) of each."""
        parts: list[tuple[int, list[int]]] = []
        for number in turn:
            rows = elements[number]
            cost = (len(parts[-1][1]) + len(rows)) * longest[number] if parts else most + 1
            if cost <= most:
                parts[-1] = (cost, parts[-1][1] + list(rows))
            else:
                parts.append((len(rows) * longest[number], list(rows)))
        return parts

    places = -(-len(cut(budget)) // workers) * workers
    low, high = 1, budget
    while low < high:  # binary search for the smallest bound that gives at most `places` parts
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= places else (middle + 1, high)
    parts = sorted(cut(low), key=lambda part: -part[0])
    parts += [(0, [])] * (places - len(parts))
    return [[rows for _, rows in parts[worker::workers]] for worker in range(workers)]


def pad_ids(rows: Sequence[Row]) -> torch.Tensor:
    """Return the ids of the rows as (B, S), right-padded with the last id of each row.

    With causal attention no token attends to later positions, so no pad token is needed.
    """
    longest = max(row.length for row in rows)
    return torch.stack([torch.cat([row.ids, row.ids[-1:].expand(longest - row.length)]) for row in rows])
