"""The answers and scores of a recorded rollout come back as they were, to the bit and the dtype."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import helpers as h

from whet.data import Batch, Group, Sample, Segment
from whet.errors import DataError
from whet.loops import rollouts
from whet.loops.experience import RolloutScores, batch_of
from whet.loops.replay import recorded
from whet.loops.tables import table
from whet.methods.options import Sampling

SAMPLES = (
    Sample(0, 0, (4, 9, 7, 1), (-0.1, -1 / 3, float("nan"), -1e-30), 5, "stop", "x", ((4, 2), (9,), (), (1, 3, 8)),
           (3, 3, 5, 5), (Segment("policy", 2), Segment("tool", 1), Segment("policy", 1))),
    Sample(0, 1, (6,), (-2.5,), 5, "length", "half of a pair \ud83d", ((6, 5),)),
    Sample(3, 0, (1, 2), (-0.7, -16777217.0), 4, "stop", "", ((1,), (2,))),
)  # fmt: skip


def written(folder: Path, *, support: bool = True) -> tuple[list[Group], Batch]:
    """The rollout of step 2 of a run, with what `advantages` adds."""
    samples = SAMPLES if support else tuple(replace(one, support=None) for one in SAMPLES)
    groups = [Group(h.prompt(0, (3, 8)), samples[:2]), Group(h.prompt(1, (5,)), samples[2:])]
    token = torch.zeros(3, 4, dtype=torch.float64)
    token[0, 1] = 1 / 3  # as a reward class of a user may score
    scores = RolloutScores(
        {"b": torch.tensor([0.1, 2.0, -0.3]), "a": torch.tensor([1.0, 1e-9, 4.0])},
        token,
        torch.tensor([[False, True, False, True], [True, False, False, False], [False, True, False, False]]),
        torch.tensor([0.5, 0.5, 0.1]),
    )
    batch = batch_of(groups, scores, Sampling(6))
    rollouts.write(folder, 2, groups, batch.with_columns(score=torch.zeros(3)), ["b", "a"])
    return groups, batch


@pytest.mark.parametrize("support", [True, False])
def test_a_recorded_rollout_gives_the_batch_that_it_was_written_from(tmp_path: Path, support: bool) -> None:
    _, batch = written(tmp_path, support=support)
    again = batch_of(*recorded(tmp_path, 2, ["b", "a"]), Sampling(6))
    assert again.columns.keys() == batch.columns.keys()
    for name, column in batch.columns.items():
        assert again[name].dtype == column.dtype, name
        torch.testing.assert_close(again[name], column, rtol=0, atol=0, equal_nan=True, msg=name)
    for mine, its in zip(batch.rows, again.rows, strict=True):
        assert (mine.start, mine.ids.tolist(), mine.mask.tolist()) == (its.start, its.ids.tolist(), its.mask.tolist())


def test_a_rollout_that_is_missing_or_lacks_a_column_is_named(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(DataError, match=r"step-00000003.parquet: there is no rollout of step 3"):
        recorded(tmp_path, 3, ["b", "a"])
    with pytest.raises(DataError, match=r"step-00000002.parquet: it has no column 'reward/c'"):
        recorded(tmp_path, 2, ["b", "c"])


def test_a_table_keeps_a_line_for_each_row_whatever_its_cells_contain() -> None:
    rows = [(1, "a\nb\x1b[31m[bold]\u202e"), (2, "x" * 300), (None, True)]
    lines = table(("n", "text"), rows).splitlines()
    assert lines == ["n  text", "1  a\\nb\\x1b[31m[bold]\\u202e", "2  " + "x" * 300, "   yes"]
