"""Which elements are trained when: the order over epochs and sources, mini-batches, and micro-batches under a token budget."""

from collections.abc import Sequence

import torch

from whet.data.types import Batch, Row
from whet.ops import address, addressed_uniform, permutation


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


def dealt(batch: Batch, budget: int, workers: int) -> list[list[list[int]]]:
    """The rows of a batch cut into micro-batches for several workers: one list per worker, all equally long.

    As few rounds as the budget allows. Elements of like length sit together, the cuts make all micro-batches cost as
    nearly the same as contiguous cuts can (rows x longest row), and each round takes the next costliest ones, so that
    no worker waits long for another. Where there are fewer micro-batches than places, a worker's list ends with empty
    ones. For one worker these are the micro-batches of `micro_batches`.
    """
    if workers == 1:
        return [micro_batches(batch, budget)]
    elements = batch.elements()
    longest = [max(batch.rows[row].length for row in element) for element in elements]
    turn = sorted(range(len(elements)), key=lambda number: (longest[number], number))

    def cut(most: int) -> list[tuple[int, list[int]]]:
        """Contiguous cuts of at most `most` tokens each (a larger element is alone), with their costs."""
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
    while low < high:  # the smallest bound under which there are no more cuts than places
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= places else (middle + 1, high)
    parts = sorted(cut(low), key=lambda part: -part[0])
    parts += [(0, [])] * (places - len(parts))
    return [[rows for _, rows in parts[worker::workers]] for worker in range(workers)]


def pad_ids(rows: Sequence[Row]) -> torch.Tensor:
    """The ids of the rows as (B, S), right-padded with each row's own last id.

    With causal attention nothing real ever looks at what stands behind it, so no pad token is needed.
    """
    longest = max(row.length for row in rows)
    return torch.stack([torch.cat([row.ids, row.ids[-1:].expand(longest - row.length)]) for row in rows])
