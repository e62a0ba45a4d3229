"""Collecting: refilled groups, the greedy baseline, pairs from own answers, as they stand in the run folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import helpers as h

from loops.helpers import PROMPTS, by_prompt, cast, go, learner_of, loop_state, method_of, rollout
from whet.generate import Request
from whet.generate.local import LocalGenerator
from whet.loops.record import read_metrics
from whet.methods.options import Sampling
from whet.rewards import Scores

# --- refill ----------------------------------------------------------------------------------------------------------


def rare(ids: tuple[int, ...]) -> float:
    """0 or 1, so that many groups of two have no spread."""
    return float(ids[0] % 3 == 0)


@pytest.mark.parametrize("refill", [1, 3])
def test_groups_without_spread_are_replaced_within_bounds(tmp_path: Path, refill: int) -> None:
    go(
        tmp_path,
        method_of("grpo", num_generations=2, dynamic_sampling=refill),
        reward=h.TableReward(rare),
        steps=6,
        save_every=1,
    )
    handed = 0
    lines = read_metrics(tmp_path)
    for step, line in enumerate(lines, 1):
        groups = by_prompt(rollout(tmp_path, step))
        assert [len(group) for group in groups] == [2, 2, 2]  # a rollout keeps its size
        spread = [len({answer["score"] for answer in group}) > 1 for group in groups]
        kept = line["groups_with_spread"]
        assert sum(spread) == kept
        assert spread == sorted(spread, reverse=True)  # those without spread only make up for what is missing
        assert 1 <= line["rounds"] <= refill + 1
        assert line["rounds"] == refill + 1 or kept == 3
        handed += int(3 + line["groups_replaced"])
    assert any(line["rounds"] > 1 and line["groups_with_spread"] == 3 for line in lines)
    assert refill > 1 or any(line["groups_with_spread"] == 2 for line in lines)
    assert loop_state(tmp_path)["drawn"] == handed


def test_where_no_group_ever_has_spread_the_first_ones_are_trained(tmp_path: Path) -> None:
    go(
        tmp_path,
        method_of("grpo", num_generations=2, dynamic_sampling=2),
        reward=h.TableReward(lambda ids: 1.0),
        steps=2,
    )
    for step, line in enumerate(read_metrics(tmp_path), 1):
        assert (line["rounds"], line["groups_with_spread"], line["groups_replaced"]) == (3, 0, 6)
        first = 9 * (step - 1)
        assert [answer["draw"] for answer in rollout(tmp_path, step)[::2]] == [first, first + 1, first + 2]


def test_a_rollout_whose_groups_all_have_spread_asks_for_no_more(tmp_path: Path) -> None:
    go(
        tmp_path,
        method_of("grpo", num_generations=4, dynamic_sampling=3),
        reward=h.TableReward(lambda ids: sum(ids) + len(ids) / 9),
    )
    line = read_metrics(tmp_path)[0]
    assert (line["rounds"], line["groups_with_spread"], line["groups_replaced"]) == (1, 3, 0)


def test_steps_of_unlike_reward_are_spread_too(tmp_path: Path) -> None:
    """Both answers earn 1 in all, at other places: a method that credits steps learns from them."""

    class Placed:
        def score(self, groups: Sequence[Any]) -> Scores:
            samples = [sample for group in groups for sample in group.samples]
            token = tuple(torch.eye(len(s.ids))[s.answer % len(s.ids)] for s in samples)
            return Scores(torch.ones(len(samples)), token)

    go(tmp_path, method_of("grpo_process", num_generations=4, dynamic_sampling=2), reward=Placed(), end_ids=())
    line = read_metrics(tmp_path)[0]
    assert (line["rounds"], line["groups_with_spread"]) == (1, 3)


@pytest.mark.parametrize("changes", [{"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 4}], ids=str)
def test_refilled_rollouts_keep_their_supports(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Rounds whose widest support differs are joined all the same."""
    own = go(
        tmp_path, method_of("grpo", num_generations=2, dynamic_sampling=3), reward=h.TableReward(rare), steps=3,
        sampling=Sampling(6, **changes),
    )  # fmt: skip
    assert max(line["rounds"] for line in read_metrics(tmp_path)) > 1
    assert own.version == 3
    for line in read_metrics(tmp_path):
        assert line["sampler_gap"] < 1e-5


# --- the greedy baseline ---------------------------------------------------------------------------------------------


def greedy(model: Any, prompt: Sequence[int], end: Sequence[int], limit: int) -> tuple[int, ...]:
    """The most probable token, again and again, by transformers' own forward."""
    ids: list[int] = []
    while len(ids) < limit and not (ids and ids[-1] in end):
        ids.append(int(h.full_logits(model, torch.tensor([*prompt, *ids]))[-1].argmax()))
    return tuple(ids)


@pytest.mark.parametrize(
    ("changes", "cut", "end"),
    [
        ({}, 0.0, (1, 5, 9)),
        ({"truncated": {"rule": "penalize", "amount": 0.75}}, 0.75, ()),
        ({"num_generations": 2, "dynamic_sampling": 2}, 0.0, (1, 5, 9)),
    ],
    ids=["plain", "every answer is cut off and pays", "refilled"],
)
def test_remax_subtracts_the_score_of_the_greedy_answer(
    tmp_path: Path, changes: dict[str, Any], cut: float, end: tuple[int, ...]
) -> None:
    def score(ids: tuple[int, ...]) -> float:
        return float(ids[0] % 3 == 0) if "refill" in changes else 0.5 * len(ids) + 0.1 * (sum(ids) % 7)

    method = method_of("remax", **changes)
    roles = cast(method)
    model = h.clone(roles)["policy"].model
    own = go(
        tmp_path, method, roles, reward=h.TableReward(score), sampling=Sampling(6, 0.8), end_ids=end, equal_start=True
    )
    answers = rollout(tmp_path)
    for answer in answers:
        best = greedy(model, answer["prompt_ids"], end, 6)
        assert answer["baseline"] == pytest.approx(score(best) - cut)
        assert answer["score"] == pytest.approx(score(tuple(answer["completion_ids"])) - cut)
        assert answer["advantage"] == pytest.approx(
            [answer["score"] - answer["baseline"]] * len(answer["mask"]), abs=1e-6
        )
    assert len(answers) == 3 * method.collect.num_generations
    assert len({answer["baseline"] for answer in answers}) > 1 or "refill" in changes
    assert own.version == 1


def test_the_greedy_answer_does_not_follow_the_sampling_dials(tmp_path: Path) -> None:
    asked: list[Sampling] = []

    class Listening(LocalGenerator):
        def generate(self, requests: Sequence[Request]) -> Any:
            asked.extend(request.sampling for request in requests)
            return super().generate(requests)

    go(tmp_path, method_of("remax"), generator=Listening, sampling=Sampling(5, 1.3, 0.8, 9, 0.01))
    assert asked == [Sampling(5, 1.3, 0.8, 9, 0.01)] * 3 + [Sampling(5, 0.0)] * 3


# --- pairs from own answers ------------------------------------------------------------------------------------------


def test_online_dpo_trains_the_best_against_the_worst_answer_of_each_prompt(tmp_path: Path) -> None:
    own = go(tmp_path, method_of("online_dpo", num_generations=5), steps=2, mini_batch_size=2)
    answers = rollout(tmp_path, 2)
    expected = []
    for group in by_prompt(answers):
        best = max(group, key=lambda one: one["score"])  # the first of equally good ones
        worst = min(group, key=lambda one: one["score"])
        assert best["score"] > worst["score"]
        expected.append((*(tuple(one["prompt_ids"] + one["completion_ids"]) for one in (best, worst)),))
    trained = []
    for work in own.works[-2:]:
        batch = work[0][1]
        assert batch["index"].tolist() == [0, 1] * len(batch.elements())
        assert torch.equal(batch["chosen_mask"], batch["mask"] & (batch["index"] == 0)[:, None])
        trained += [tuple(tuple(batch.rows[row].ids.tolist()) for row in rows) for rows in batch.elements()]
    assert sorted(trained) == sorted(expected)
    assert [len(work[0][1].elements()) for work in own.works] == [2, 1, 2, 1]
    assert read_metrics(tmp_path)[1]["ratio_mean"] != 1.0  # the second mini-batch of a rollout is off-policy


def test_groups_of_equal_scores_give_no_pair(tmp_path: Path) -> None:
    own = go(tmp_path, method_of("online_dpo", num_generations=2), reward=h.TableReward(rare), steps=4)
    for step, work in zip([s for s in range(1, 5) if paired(tmp_path, s)], own.works, strict=True):
        assert len(work[0][1].elements()) == paired(tmp_path, step)
    assert 0 < len(own.works) <= 4
    assert {paired(tmp_path, step) for step in range(1, 5)} != {3}


def paired(folder: Path, step: int) -> int:
    """How many groups of a rollout have answers of unlike score."""
    return sum(len({answer["score"] for answer in group}) > 1 for group in by_prompt(rollout(folder, step)))


def test_a_rollout_without_any_pair_changes_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    method = method_of("online_dpo", num_generations=2, loss="bco_pair")
    own = learner_of(cast(method))
    before = h.weights(own)

    class Late(h.TableReward):
        """All answers are equal in the first two rollouts."""

        def score(self, groups: Any) -> Scores:
            scores = super().score(groups)
            return scores if self.calls > 2 else Scores(torch.zeros_like(scores.answer))

    late = Late(lambda ids: 0.5 * len(ids) + 0.01 * sum(ids))
    go(tmp_path, method, learner=own, reward=late, steps=4, save_every=1, keep=9)
    lines = read_metrics(tmp_path)
    assert own.version == 2
    assert [len(rollout(tmp_path, step)) for step in range(1, 5)] == [6] * 4
    h.equal_weights(own.befores[0], before)
    assert all("loss/policy/rollout/bco_pair" not in line for line in lines[:2])
    assert all("loss/policy/rollout/bco_pair" in line for line in lines[2:])
    assert [line["state/term0.delta"] for line in lines[:3]] == [0.0] * 3


def test_a_running_mean_stays_where_a_rollout_has_nothing_to_tell(tmp_path: Path) -> None:
    """The last rollout has no pairs: the mean that BCO subtracts is that of the pairs before."""

    class Early(h.TableReward):
        def score(self, groups: Any) -> Scores:
            scores = super().score(groups)
            return scores if self.calls < 3 else Scores(torch.zeros_like(scores.answer))

    early = Early(lambda ids: 0.5 * len(ids) + 0.01 * sum(ids))
    go(tmp_path, method_of("online_dpo", num_generations=2, loss="bco_pair"), reward=early, steps=4)
    deltas = [line["state/term0.delta"] for line in read_metrics(tmp_path)]
    assert deltas[2] != 0.0
    assert deltas[3] == deltas[2]


def test_prompts_of_pairs_are_those_that_were_drawn(tmp_path: Path) -> None:
    go(tmp_path, method_of("online_dpo", num_generations=2), steps=2)
    for step in (1, 2):
        assert sorted(tuple(group[0]["prompt_ids"]) for group in by_prompt(rollout(tmp_path, step))) == sorted(
            prompt.ids for prompt in PROMPTS
        )
