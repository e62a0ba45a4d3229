"""How rows are dealt over workers, by brute force over many batches."""

import random
from collections.abc import Sequence
from itertools import chain, pairwise

import pytest
import torch

from whet.data import Batch, Pair, Row, micro_batches
from whet.data.batching import dealt


def plain(length: int) -> Row:
    """A row of so many tokens, the first of which is the prompt."""
    return Row(torch.ones(length, dtype=torch.long), 1, torch.ones(length - 1, dtype=torch.bool))


def singles(lengths: Sequence[int]) -> Batch:
    return Batch.of([plain(length) for length in lengths])


def pairs(lengths: Sequence[int]) -> Batch:
    """Elements of two rows each."""
    half = len(lengths) // 2
    return Batch.of([Pair(plain(a), plain(b), 1.0, 0.0) for a, b in zip(lengths[:half], lengths[half:], strict=False)])


def cost(batch: Batch, rows: Sequence[int]) -> int:
    return len(rows) * max((batch.rows[row].length for row in rows), default=0)


def batches() -> list[tuple[Batch, int, int]]:
    """(batch, budget, workers): even, skewed and constant lengths, tight and wide budgets, more workers than rows."""
    draw = random.Random(5)
    out = []
    for number in range(240):
        count, workers = draw.randint(2, 24), draw.randint(2, 5)
        kind = number % 3
        lengths = [
            draw.randint(2, 20) if kind == 0 else 2 + int(draw.paretovariate(1.0)) % 90 if kind == 1 else 7
            for _ in range(count)
        ]
        batch = singles(lengths) if number % 2 else pairs(lengths)
        out.append((batch, draw.choice([4, 30, 60, 200, 5000]), workers))
    return out


BATCHES = batches()


def test_every_row_is_dealt_exactly_once_and_elements_stay_whole() -> None:
    for batch, budget, workers in BATCHES:
        lists = dealt(batch, budget, workers)
        assert sorted(chain(*chain(*lists))) == list(range(len(batch.rows)))
        home = {
            row: (worker, turn) for worker, own in enumerate(lists) for turn, rows in enumerate(own) for row in rows
        }
        for element in batch.elements():
            assert len({home[row] for row in element}) == 1


def test_all_workers_have_as_many_rounds() -> None:
    for batch, budget, workers in BATCHES:
        lists = dealt(batch, budget, workers)
        assert len(lists) == workers
        assert len({len(own) for own in lists}) == 1


def test_every_micro_batch_is_within_the_budget_unless_it_is_one_element() -> None:
    singled = 0
    for batch, budget, workers in BATCHES:
        elements = {frozenset(element) for element in batch.elements()}
        for rows in chain(*dealt(batch, budget, workers)):
            if cost(batch, rows) > budget:
                singled += 1
                assert frozenset(rows) in elements
    assert singled  # such elements were among them


def fewest_cuts(batch: Batch, most: int) -> int:
    """The fewest micro-batches of at most `most` tokens, by trying all contiguous cuts of the elements in order of length
    (cuts that are not contiguous never need fewer)."""
    elements = sorted(batch.elements(), key=lambda rows: max(batch.rows[row].length for row in rows))
    best = [0] + [10**9] * len(elements)
    for end in range(1, len(elements) + 1):
        for start in range(end):
            rows = list(chain(*elements[start:end]))
            if end - start == 1 or cost(batch, rows) <= most:
                best[end] = min(best[end], best[start] + 1)
    return best[-1]


def test_there_are_as_few_rounds_as_the_budget_allows() -> None:
    for batch, budget, workers in BATCHES:
        assert len(dealt(batch, budget, workers)[0]) == -(-fewest_cuts(batch, budget) // workers)


def test_no_contiguous_cut_of_as_many_micro_batches_has_a_smaller_largest_one() -> None:
    """The balance: the costliest micro-batch is as small as it can be, found by trying every bound."""
    for batch, budget, workers in BATCHES[:120]:
        lists = dealt(batch, budget, workers)
        places = len(lists[0]) * workers
        largest = max(cost(batch, rows) for rows in chain(*lists))
        smaller = [bound for bound in range(1, min(largest, 400)) if fewest_cuts(batch, bound) <= places]
        alone = max(cost(batch, rows) for rows in batch.elements())
        assert largest == alone or not smaller


def test_each_round_takes_the_next_costliest_so_nobody_waits_long() -> None:
    """Over all rounds the waiting is at most one micro-batch: what a worker has less than another, round by round,
    telescopes, because no cost of a round is above any of the round before."""
    for batch, budget, workers in BATCHES:
        costs = [[cost(batch, rows) for rows in own] for own in dealt(batch, budget, workers)]
        rounds = list(zip(*costs, strict=True))
        for before, after in pairwise(rounds):
            assert min(before) >= max(after)
        waiting = sum(max(one) for one in rounds) - min(map(sum, costs))
        assert waiting <= max(rounds[0])
        assert max(map(sum, costs)) - min(map(sum, costs)) <= max(rounds[0]) - min(rounds[-1])


def test_like_rows_are_shared_out_evenly() -> None:
    lists = dealt(singles([10] * 24), 60, 4)
    assert [[len(rows) for rows in own] for own in lists] == [[6]] * 4
    sizes = [[len(rows) for rows in own] for own in dealt(singles([10] * 25), 60, 4)]  # a second round is needed
    assert sizes == [[4, 4], [4, 4], [4, 1], [4, 0]]  # and both are as short as they can be, not one of 6 and one of 1


def test_workers_without_work_have_empty_lists_at_the_end() -> None:
    for batch, budget, workers in BATCHES:
        for own in dealt(batch, budget, workers):
            sizes = [bool(rows) for rows in own]
            assert sizes == sorted(sizes, reverse=True)
    assert dealt(singles([5]), 100, 3) == [[[0]], [[]], [[]]]


def test_for_one_worker_they_are_the_micro_batches() -> None:
    for batch, budget, _ in BATCHES:
        assert dealt(batch, budget, 1) == [micro_batches(batch, budget)]


def test_the_deal_depends_on_the_lengths_and_their_order_alone() -> None:
    for batch, budget, workers in BATCHES[:60]:
        other = Batch.of([plain(row.length) for row in batch.rows]) if "place" not in batch.columns else batch
        again = dealt(batch, budget, workers)
        assert again == dealt(batch, budget, workers)
        if other is not batch and len(batch.elements()) == len(batch.rows):
            assert again == dealt(other, budget, workers)


@pytest.mark.parametrize("workers", [2, 3])
def test_turning_rows_of_unlike_lengths_turns_the_deal_with_them(workers: int) -> None:
    """Without equal lengths the order in the batch does not matter: the same lengths meet in the same place."""
    lengths = random.Random(1).sample(range(2, 60), 17)
    turned = lengths[::-1]
    ours, theirs = (
        [[sorted(given[row] for row in rows) for rows in own] for own in dealt(singles(given), 90, workers)]
        for given in (lengths, turned)
    )
    assert ours == theirs
