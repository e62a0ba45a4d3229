import time
from collections import Counter
from itertools import chain

import pytest
import torch

from whet.data import (
    COLUMNS,
    Batch,
    Labeled,
    Pair,
    Ranking,
    Stepped,
    Unpaired,
    epoch_batches,
    micro_batches,
    minibatches,
    order,
    pad,
    pad_ids,
    pad_support,
    take_elements,
)
from whet.loops.steps import OnlinePlan

from .helpers import row


def test_every_element_comes_once_per_epoch_in_a_new_order_each() -> None:
    places = order([3, 4], 21, seed=5)
    everything = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]
    epochs = [places[start : start + 7] for start in (0, 7, 14)]
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_without_shuffling_the_order_is_that_of_the_files() -> None:
    assert list(order([2, 1], 7, seed=5, shuffle=False)) == [(0, 0), (0, 1), (1, 0)] * 2 + [(0, 0)]


@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_the_order_is_a_function_of_the_seed_alone_and_a_longer_run_begins_like_a_shorter_one(weights: tuple) -> None:
    long = order([5, 9], 60, seed=1, weights=weights)
    assert order([5, 9], 60, seed=1, weights=weights)[:] == long[:]
    assert order([5, 9], 17, seed=1, weights=weights)[:] == long[:17]
    assert order([5, 9], 60, seed=2, weights=weights)[:] != long[:]


@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_an_element_is_the_same_whatever_was_read_before(weights: tuple) -> None:
    in_order = list(order([5, 9], 140_000, seed=1, weights=weights))
    for places in ([139_999, 3, 70_000], [65_535, 65_536, 0]):
        fresh = order([5, 9], 140_000, seed=1, weights=weights)
        assert [fresh[place] for place in places] == [in_order[place] for place in places]
    with pytest.raises(IndexError):
        order([5, 9], 10, seed=1, weights=weights)[10]


def test_a_run_of_the_largest_number_of_steps_begins_at_once() -> None:
    began = time.process_time()
    batches = epoch_batches([1000, 7], 99_999_999, 64, seed=5)
    assert (len(batches[0]), len(batches[99_999_998])) == (64, 64)
    assert len(epoch_batches([1000, 7], 99_999_999, 64, seed=5, weights=(1.0, 2.0))[0]) == 64
    plan = OnlinePlan(99_999_999, 4, 4, per_pass=6)
    assert plan.summed(plan.steps, lambda prompts: prompts) == 3 * 99_999_999 + 1
    assert time.process_time() - began < 2


@pytest.mark.parametrize("weights", [(1.0, 3.0), (2.0, 6.0)])
def test_weights_are_the_shares_of_the_draws_whatever_the_files_sizes(weights: tuple) -> None:
    places = order([50, 7], 4000, seed=3, weights=weights)
    share = sum(source for source, _ in places) / 4000
    assert abs(share - 0.75) < 3 * (0.75 * 0.25 / 4000) ** 0.5


def test_under_weights_each_file_still_goes_through_all_its_rows_before_any_comes_again() -> None:
    places = [index for source, index in order([5, 9], 400, seed=3, weights=(1.0, 1.0)) if source == 0]
    whole = len(places) // 5
    assert whole > 30
    assert all(sorted(places[5 * turn : 5 * turn + 5]) == [0, 1, 2, 3, 4] for turn in range(whole))


def test_a_source_of_weight_next_to_nothing_is_hardly_drawn() -> None:
    assert Counter(source for source, _ in order([4, 4], 500, seed=0, weights=(1.0, 1e-9))) == {0: 500}


def test_minibatches_hold_every_element_once_and_the_last_may_be_smaller() -> None:
    turns = minibatches(10, 4, key=7)
    assert [len(turn) for turn in turns] == [4, 4, 2]
    assert sorted(chain(*turns)) == list(range(10))
    assert minibatches(10, 4, key=7) == turns != minibatches(10, 4, key=8)


def elements() -> list:
    pair, three = Pair(row(5), row(9)), Ranking((row(4), row(4), row(6)), (1, 2, 3))
    return [row(3), pair, row(12), three, row(2), Pair(row(3), row(3)), row(7)]


BATCH = {  # rows 0 | 1 2 | 3 | 4 5 6 | 7 | 8 9 | 10 with lengths 3 | 5 9 | 12 | 4 4 6 | 2 | 3 3 | 7
    24: [[7, 0, 8, 9], [4, 5, 6], [10], [1, 2], [3]],
    8: [[7, 0], [8, 9], [4, 5, 6], [10], [1, 2], [3]],
    1000: [[7, 0, 8, 9, 4, 5, 6, 10, 1, 2, 3]],
}


def mixed() -> Batch:
    """The rows of `elements`, each a plain element of several rows (one batch has one kind of element in training)."""
    rows, index = [], []
    for number, element in enumerate(elements()):
        own = (
            [element]
            if hasattr(element, "ids")
            else getattr(element, "rows", None) or [element.chosen, element.rejected]
        )
        rows += own
        index += [number] * len(own)
    return Batch.of(rows).with_columns(element=torch.tensor(index))


@pytest.mark.parametrize(("budget", "expected"), BATCH.items())
def test_micro_batches_put_like_lengths_together_within_the_budget(budget: int, expected: list) -> None:
    assert micro_batches(mixed(), budget) == expected


@pytest.mark.parametrize("budget", [1, 5, 8, 13, 24, 36, 50, 1000])
def test_micro_batches_never_split_an_element_and_hold_every_row_once(budget: int) -> None:
    batch = mixed()
    micros = micro_batches(batch, budget)
    assert sorted(chain(*micros)) == list(range(11))
    where = {place: number for number, micro in enumerate(micros) for place in micro}
    assert all(len({where[place] for place in element}) == 1 for element in batch.elements())
    for micro in micros:
        alone = len({int(batch["element"][place]) for place in micro}) == 1
        assert alone or len(micro) * max(batch.rows[place].length for place in micro) <= budget


def test_a_batch_carries_its_elements_own_columns() -> None:
    pairs = Batch.of([Pair(row(3), row(4), 0.75, 2.0), Pair(row(2), row(2))])
    assert pairs["probability"].tolist() == [0.75, 0.75, 1.0, 1.0]
    assert pairs["margin"].tolist() == [2.0, 2.0, 0.0, 0.0]
    assert pairs["element"].tolist() == [0, 0, 1, 1]
    assert pairs["index"].tolist() == [0, 1, 0, 1]
    assert pairs["mask"].int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert pairs["chosen_mask"].int().tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert Batch.of([Ranking((row(2), row(2), row(2)), (2, 1, 2))])["rank"].tolist() == [2, 1, 2]
    assert Batch.of([Labeled(row(2), 0.5), Labeled(row(2), -1.0)])["target"].tolist() == [0.5, -1.0]
    assert set(pairs.columns) <= set(COLUMNS)


def test_taking_rows_shrinks_to_the_longest_of_them_and_numbers_elements_anew() -> None:
    batch = Batch.of([Pair(row(3), row(4)), Pair(row(2), row(2)), Pair(row(3), row(2))])
    batch = batch.with_columns(advantage=torch.arange(18.0).reshape(6, 3), score=torch.arange(6.0))
    part = batch.take([2, 3, 4, 5])
    assert part["element"].tolist() == [0, 0, 1, 1]
    assert part["mask"].shape == (4, 2)
    assert part["advantage"].tolist() == [[6.0, 7.0], [9.0, 10.0], [12.0, 13.0], [15.0, 16.0]]
    assert part["score"].tolist() == [2.0, 3.0, 4.0, 5.0]
    again = take_elements(batch, [2, 0])
    assert [one.length for one in again.rows] == [3, 2, 3, 4]
    assert again["score"].tolist() == [4.0, 5.0, 0.0, 1.0]


def test_counts_are_trained_tokens_sequences_with_any_and_elements() -> None:
    untrained = row(4, start=1, trained="000")
    counts = Batch.of([Pair(row(4, start=2, trained="10"), untrained), Pair(row(3), row(2))]).counts()
    assert (counts.tokens, counts.sequences, counts.elements) == (4, 3, 2)


def test_ids_are_padded_with_each_rows_own_last_id_and_values_with_zero() -> None:
    assert pad_ids([row(2), row(4)]).tolist() == [[10, 11, 11, 11], [10, 11, 12, 13]]
    assert pad([torch.tensor([1.0]), torch.tensor([2.0, 3.0])], 3).tolist() == [[1.0, 0.0, 0.0], [2.0, 3.0, 0.0]]
    assert pad([torch.tensor([True]), torch.tensor([True, True])]).tolist() == [[True, False], [True, True]]


def test_unpaired_answers_stand_beside_their_mismatched_ones_with_one_label_for_both() -> None:
    batch = Batch.of([Unpaired(row(3), row(4), True), Unpaired(row(2), row(2), False)])
    assert batch["good"].tolist() == [True, True, False, False]
    assert batch["good"].dtype == torch.bool
    assert (batch["element"].tolist(), batch["index"].tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert batch.counts().elements == 2
    assert set(batch.columns) <= set(COLUMNS)


def stepped(length: int, ends: str, labels: list[float]) -> Stepped:
    mask = torch.tensor([bit == "1" for bit in ends])
    values = torch.zeros(length)
    values[mask] = torch.tensor(labels)
    return Stepped(row(length + 1), values, mask)


def test_steps_are_columns_as_wide_as_the_longest_answer() -> None:
    batch = Batch.of([stepped(4, "0101", [1.0, 0.25]), stepped(2, "01", [0.5])])
    assert batch["segment_end"].int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert batch["segment_label"].tolist() == [[0, 1.0, 0, 0.25], [0, 0.5, 0, 0]]
    assert batch["element"].tolist() == [0, 1]
    assert (batch.counts("segment_end").tokens, batch.counts().tokens) == (3, 6)
    short = batch.take([1])
    assert (short["segment_end"].shape, short["segment_label"].tolist()) == ((1, 2), [[0, 0.5]])


SUPPORTS = [[[3, 4], [5]], [[7, 8, 9]], [[1], [2, 6], [3]]]


def test_a_support_is_padded_with_what_is_no_token() -> None:
    assert pad_support(SUPPORTS).tolist() == [
        [[3, 4, -1], [5, -1, -1], [-1, -1, -1]],
        [[7, 8, 9], [-1, -1, -1], [-1, -1, -1]],
        [[1, -1, -1], [2, 6, -1], [3, -1, -1]],
    ]
    assert pad_support([]).shape == (0, 0, 0)


def rollout(lengths: list[int], supports: list, group: list[int]) -> Batch:
    """Rows with one column of each shape."""
    batch = Batch.of([row(length + 1) for length in lengths])
    count = sum(lengths)
    values = torch.arange(1.0, count + 1).split(lengths)
    return batch.with_columns(
        sampler_logp=pad(values),
        support=pad_support(supports),
        score=torch.tensor([float(one[0]) for one in values]),
        rewards=torch.tensor([[float(length), 0.5] for length in lengths]),
        group=torch.tensor(group),
    )


def test_taking_rows_keeps_a_column_of_three_axes_whole_but_for_the_positions() -> None:
    part = rollout([2, 1, 3], SUPPORTS, [0, 0, 1]).take([1, 0])
    assert part["support"].tolist() == [[[7, 8, 9], [-1, -1, -1]], [[3, 4, -1], [5, -1, -1]]]
    assert part["rewards"].tolist() == [[1.0, 0.5], [2.0, 0.5]]
    assert part["sampler_logp"].tolist() == [[3.0, 0.0], [1.0, 2.0]]


def test_joined_batches_are_the_batch_that_was_cut_up() -> None:
    """Longest answer, widest support and numbers of elements and groups come out as if it had never been cut."""
    whole = rollout([2, 1, 3], SUPPORTS, [0, 0, 1])
    again = Batch.joined([whole.take([0, 1]), whole.take([2])])
    assert [one.length for one in again.rows] == [one.length for one in whole.rows]
    assert again.columns.keys() == whole.columns.keys()
    for name in whole.columns:
        assert again[name].tolist() == whole[name].tolist(), name


def test_joined_batches_number_their_groups_and_elements_on_from_the_first_whatever_numbers_they_had() -> None:
    whole = rollout([2, 1, 3, 1], [*SUPPORTS, [[5]]], [0, 0, 1, 2])
    again = Batch.joined([whole.take([3]), whole.take([0, 1]), whole.take([2])])
    assert again["group"].tolist() == [0, 1, 1, 2]
    assert again["element"].tolist() == [0, 1, 2, 3]
    pairs = Batch.of([Pair(row(3), row(4)), Pair(row(2), row(2))])
    assert Batch.joined([pairs, pairs])["element"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert Batch.joined([pairs, pairs])["index"].tolist() == [0, 1] * 4


@pytest.mark.parametrize(
    ("elements", "size", "lengths"), [(9, 8, [8, 1]), (5, 8, [5]), (8, 4, [4, 4]), (7, 3, [3, 3, 1])]
)
def test_an_epoch_is_one_pass_and_its_last_batch_is_smaller(elements: int, size: int, lengths: list[int]) -> None:
    batches = epoch_batches([elements - 2, 2], 2 * len(lengths), size, seed=5)
    assert [len(batch) for batch in batches] == 2 * lengths
    passes = [list(chain(*batches[start : start + len(lengths)])) for start in (0, len(lengths))]
    everything = [(0, index) for index in range(elements - 2)] + [(1, 0), (1, 1)]
    assert [sorted(one) for one in passes] == [everything] * 2
    assert passes[0] != passes[1]
    assert epoch_batches([elements - 2, 2], 1, size, seed=5)[:] == batches[:1]


def test_drop_last_leaves_out_the_smaller_batch_alone() -> None:
    kept, dropped = (epoch_batches([9], 4, 4, 5, drop_last=drop) for drop in (False, True))
    assert [len(batch) for batch in dropped] == [4, 4, 4, 4]
    assert dropped[:2] == kept[:2]
    assert dropped[2] == kept[3]
    assert [len(batch) for batch in epoch_batches([3], 2, 8, 5, drop_last=True)] == [3, 3]


def test_sources_mixed_by_weight_have_full_batches() -> None:
    assert [len(batch) for batch in epoch_batches([3, 4], 3, 4, 5, weights=(1.0, 2.0))] == [4, 4, 4]
