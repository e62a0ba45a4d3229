"""Which elements are trained when: the order over epochs and sources, mini-batches, and micro-batches under a token budget."""

from collections.abc import Sequence

import torch

from whet.ops import address, addressed_uniform, permutation
from whet.records.types import Batch, Row


def order(
    sizes: Sequence[int], count: int, seed: int, *, weights: Sequence[float] | None = None, shuffle: bool = True
) -> list[tuple[int, int]]:
    """The first `count` elements of a run as (source, index in the source).

    Without weights the sources are one list, gone through once per epoch in a new order. With weights each place
    first draws its source with that probability; every source goes through its own rows epoch by epoch.
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


def minibatches(elements: int, size: int, key: int) -> list[list[int]]:
    """All of `elements` elements in a random order, cut into mini-batches of `size` (the last may be smaller)."""
    turn = permutation(key, elements).tolist()
    return [turn[start : start + size] for start in range(0, elements, size)]


def take_elements(batch: Batch, elements: Sequence[int]) -> Batch:
    """These elements of a batch, whole, in this order."""
    rows = batch.elements()
    return batch.take([row for element in elements for row in rows[element]])


def micro_batches(batch: Batch, budget: int) -> list[list[int]]:
    """The rows of a batch split so that rows x longest row stays within `budget` tokens, elements whole.

    Elements of like length sit together, so little is padded; an element over the budget is alone. The split depends
    on the lengths and their order alone, so `measure` and `update` split alike.
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


def pad_ids(rows: Sequence[Row]) -> torch.Tensor:
    """The ids of the rows as (B, S), right-padded with each row's own last id.

    With causal attention nothing real ever looks at what stands behind it, so no pad token is needed.
    """
    longest = max(row.length for row in rows)
    return torch.stack([torch.cat([row.ids, row.ids[-1:].expand(longest - row.length)]) for row in rows])
