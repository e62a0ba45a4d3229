"""Text that the model did not write: a tool's result in the middle of an answer goes through every online method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import helpers as h

from loops.helpers import ONLINE, TOOL, WithTool, go, method_of
from whet.data import Group, Prompt, Sample, Segment
from whet.loops import rollouts
from whet.loops.record import read_metrics
from whet.methods.options import Sampling
from whet.rewards import Scores, Weighted, score_all


class Spoiled(WithTool):
    spoiled = -1234.5


def given(name: str) -> dict[str, Any]:
    options: dict[str, Any] = {"sampling": Sampling(7)}
    if name == "instructgpt":
        options |= {"ptx": h.rows()[:3], "ptx_batch": 2}
    return options


@pytest.mark.parametrize("name", ONLINE)
def test_no_number_of_a_foreign_token_reaches_an_update(name: str, tmp_path: Path) -> None:
    runs = {
        kind: go(tmp_path / kind.__name__, method_of(name), generator=kind, **given(name))
        for kind in (WithTool, Spoiled)
    }
    h.equal_weights(h.weights(runs[WithTool]), h.weights(runs[Spoiled]))
    assert any(bool(one.any()) for one in runs[WithTool].grads.values())
    batch = next(batch for term, batch, _ in runs[WithTool].work if term.stream == "rollout")
    foreign = 0
    for number, row in enumerate(batch.rows):
        ids = row.ids[row.start :].tolist()
        if len(ids) > 2 and tuple(ids[2:4]) == TOOL:
            foreign += 1
            assert row.mask.tolist()[:4] == [True, True, False, False]
            assert not batch["mask"][number, 2:4].any()
            for column in ("advantage", "token_reward", "returns"):
                if column in batch.columns:
                    assert not batch[column][number, 2:4].any(), column
    assert foreign


def test_a_foreign_token_counts_for_the_context_and_for_no_length(tmp_path: Path) -> None:
    go(tmp_path, method_of("ppo"), generator=WithTool, sampling=Sampling(7))
    table = rollouts.read(tmp_path, 1)
    assert all(len(ids) <= 7 for ids in table["completion_ids"])
    own = [sum(mask) for mask in table["mask"]]
    assert read_metrics(tmp_path)[0]["length"] == pytest.approx(sum(own) / len(own))
    marked = [(a, n) for a, n in zip(table["authors"], table["segment_lengths"], strict=True) if len(a) > 1]
    assert marked
    assert all(authors == ["policy", "tool", "policy"] and lengths[:2] == [2, 2] for authors, lengths in marked)


def test_the_score_lands_on_the_last_token_that_is_trained(tmp_path: Path) -> None:
    def group(segments: tuple[Segment, ...]) -> Group:
        return Group(
            Prompt("0", (5,), ()), (Sample(0, 0, (7, 8, 9), (0.0, 0.0, 0.0), 0, "stop", "", segments=segments),)
        )

    class One:
        def score(self, groups: Sequence[Group]) -> Scores:
            return Scores(torch.ones(1))

    for segments, last in (((), 2), ((Segment("policy", 2), Segment("tool", 1)), 1)):
        _, _, ends, _ = score_all([Weighted("one", One())], [group(segments)])
        assert ends.tolist() == [[place == last for place in range(3)]]


def test_segments_of_a_continued_answer_are_joined_and_checked() -> None:
    one = Sample(0, 0, (7, 8), (0.0, 0.0), 0, "paused", "")
    tool = Sample(0, 0, (9,), (99.0,), 0, "paused", "", segments=(Segment("tool", 1),))
    assert one.continued(one).segments == ()
    whole = one.continued(tool)
    assert whole.segments == (Segment("policy", 2), Segment("tool", 1))
    assert whole.trained() == (True, True, False)
    with pytest.raises(ValueError, match="the segments have 2 tokens, the answer 1"):
        Sample(0, 0, (9,), (0.0,), 0, "stop", "", segments=(Segment("tool", 2),))
