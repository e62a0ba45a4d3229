"""What moves between rollouts and updates: the reference, running numbers, controllers; each followed by hand."""

import json
import math
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from models import helpers as h
from torch import Tensor

from loops.helpers import Recorder, cast, go, method_of, rollout
from whet.data import Batch, Pair, Unpaired
from whet.loops import offline
from whet.loops.record import RunFolder, read_metrics
from whet.methods import Objective, preference
from whet.methods.options import KL, Sampling

# --- the reference ---------------------------------------------------------------------------------------------------


def mixed(old: dict[str, Tensor], new: dict[str, Tensor], mix: float) -> dict[str, Tensor]:
    return {key: (1 - mix) * old[key] + mix * new[key] for key in old}


def close(role: Any, expected: dict[str, Tensor]) -> None:
    for key, value in role.parameters().items():
        torch.testing.assert_close(value.detach(), expected[key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["reinforce", "grpo", "online_dpo"])
@pytest.mark.parametrize("mix", [1.0, 0.3])
def test_every_second_rollout_the_reference_moves_towards_the_policy(tmp_path: Path, name: str, mix: float) -> None:
    method = method_of(name)
    roles = cast(method, torch.float64)
    start = {key: value.detach().clone() for key, value in roles["reference"].parameters().items()}
    own = go(tmp_path, method, roles, steps=5, sync_every=2, sync_mix=mix)
    second, fourth = own.trail[1]["policy"], own.trail[3]["policy"]
    close(own.roles["reference"], mixed(mixed(start, second, mix), fourth, mix))


@pytest.mark.parametrize(("mix", "share"), [(1.0, 0.0), (0.5, 0.8)])
def test_a_refreshed_reference_is_nearer(tmp_path: Path, mix: float, share: float) -> None:
    """Once the reference is the policy the KL is exactly 0; half-way there it is smaller than without."""
    measured = []
    for refresh in (0, 2):
        go(tmp_path / str(refresh), method_of("grpo"), steps=3, sync_every=refresh, sync_mix=mix)
        measured.append([line["kl"] for line in read_metrics(tmp_path / str(refresh))])
    without, refreshed = measured
    assert without[:2] == refreshed[:2]
    assert without[2] > 0.01
    assert abs(refreshed[2]) <= share * without[2]


def pairs(count: int = 7) -> list[Pair]:
    return [Pair(h.row(i, 2 + i % 3, 1 + i % 5), h.row(50 + i, 2 + i % 3, 5 - i % 4)) for i in range(count)]


def preferred(
    folder: Path, objective: Objective, *, learner: type[Recorder] = Recorder, lr: float = 0.02, **plan: Any
) -> Recorder:
    """Five updates of three pairs each."""
    roles = {"policy": h.policy(), "reference": h.policy(name="reference", seed=1)}
    own = learner(roles, {"policy": replace(h.FREE, lr=lr)}, total=20, budget=40)
    offline.train(objective, own, [pairs()], offline.OfflinePlan(5, 3, **plan), RunFolder(folder), quiet=True)
    return own


def test_the_reference_of_pairs_moves_every_second_update(tmp_path: Path) -> None:
    own = preferred(tmp_path, preference("dpo"), sync_every=2, sync_mix=0.6)
    start = {key: p.detach() for key, p in h.policy(name="reference", seed=1).parameters().items()}
    close(own.roles["reference"], mixed(mixed(start, own.trail[1]["policy"], 0.6), own.trail[3]["policy"], 0.6))


@pytest.mark.parametrize("changes", [{}, {"loss": "aot"}, {"loss": "bco_pair"}, {"loss": "aot_unpaired"}], ids=str)
def test_a_reference_measured_before_gives_the_numbers_of_one_measured_in_between(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    class Without(Recorder):
        """Has no reference any more once the first update is done."""

        asked = 0

        def measure(self, batch: Batch, columns: frozenset[str]) -> Batch:
            self.asked += "ref_logp" in columns
            assert self.version == 0 or "ref_logp" not in columns
            return super().measure(batch, columns)

    objective = preference("dpo", **changes)
    one = preferred(tmp_path / "between", objective)
    other = preferred(tmp_path / "before", objective, learner=Without, precompute=True)
    assert other.asked == 3  # seven pairs, three at a time
    for key, value in h.weights(one)["policy"].items():
        torch.testing.assert_close(h.weights(other)["policy"][key], value, rtol=1e-9, atol=1e-11)
    lines = [read_metrics(tmp_path / name) for name in ("between", "before")]
    for ours, theirs in zip(*lines, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)


def test_the_reference_of_pairs_is_measured_in_the_first_epoch_alone(tmp_path: Path) -> None:
    class Counting(Recorder):
        """Counts the rows whose reference is measured, by the version of the policy."""

        def measure(self, batch: Batch, columns: frozenset[str]) -> Batch:
            if "ref_logp" in columns:
                asked[self.version] = asked.get(self.version, 0) + len(batch.rows)
            return super().measure(batch, columns)

    asked: dict[int, int] = {}
    own = preferred(tmp_path / "kept", preference("dpo"), learner=Counting)
    assert asked == {0: 6, 1: 6, 2: 2}  # seven pairs, three at a time; steps 3 and 4 are of the second epoch
    moving = preferred(tmp_path / "moving", preference("dpo"), sync_every=100)  # it measures in each step
    for key, value in h.weights(moving)["policy"].items():
        torch.testing.assert_close(h.weights(own)["policy"][key], value, rtol=1e-9, atol=1e-11)


def test_what_drop_last_leaves_out_of_the_first_epoch_is_measured_later(tmp_path: Path) -> None:
    own, moving = (
        preferred(tmp_path / str(every), preference("dpo"), drop_last=True, sync_every=every) for every in (0, 100)
    )
    for key, value in h.weights(moving)["policy"].items():
        torch.testing.assert_close(h.weights(own)["policy"][key], value, rtol=1e-9, atol=1e-11)


# --- running numbers -------------------------------------------------------------------------------------------------


def test_scores_are_normalized_by_the_first_mean_and_the_running_deviation(tmp_path: Path) -> None:
    table = h.TableReward(lambda ids: 3.0 + 0.5 * len(ids) - 0.25 * (sum(ids) % 5))
    method = method_of("reinforce", num_generations=3, kl_in_reward={"coef": 0.1}, reward_normalization="running")
    go(tmp_path, method, reward=table, steps=4)
    seen: list[float] = []
    for step in range(1, 5):
        answers = rollout(tmp_path, step)
        raw = [answer["reward/table"] for answer in answers]
        seen += raw
        first, deviation = statistics.mean(seen[: len(raw)]), statistics.stdev(seen)
        expected = [(one - first) / deviation for one in raw]
        assert [answer["score"] for answer in answers] == pytest.approx(expected, abs=1e-5)
        for answer, score in zip(answers, expected, strict=True):
            assert sum(answer["token_reward"]) == pytest.approx(score - 0.1 * sum(answer["kl"]), abs=1e-5)
    last = read_metrics(tmp_path)[-1]
    assert last["state/running.count"] == len(seen)
    assert last["state/running.shift"] == pytest.approx(first)
    assert last["state/running.mean"] == pytest.approx(statistics.mean(seen))


def test_equal_scores_have_no_deviation_to_divide_by(tmp_path: Path) -> None:
    method = method_of("reinforce", num_generations=2, reward_normalization="running")
    go(tmp_path, method, reward=h.TableReward(lambda ids: 2.5), steps=2)
    assert {answer["score"] for step in (1, 2) for answer in rollout(tmp_path, step)} == {0.0}


def test_the_order_is_running_then_bound_then_overlong_then_penalty(tmp_path: Path) -> None:
    """By hand for answers that are all cut off at the limit of 6: clip((r - m) / d, -0.5, 0.5) - 1 - 0.25."""
    method = method_of(
        "reinforce", num_generations=4, reward_normalization="running", reward_clip={"name": "clip_score", "bound": 0.5},
        overlong={"name": "soft_overlong", "buffer": 3}, truncated={"rule": "penalize", "amount": 0.25},
    )  # fmt: skip
    go(tmp_path, method, end_ids=())
    answers = rollout(tmp_path)
    raw = [answer["reward/table"] for answer in answers]
    mean, deviation = statistics.mean(raw), statistics.stdev(raw)
    expected = [min(max((one - mean) / deviation, -0.5), 0.5) - 1.25 for one in raw]
    assert [answer["score"] for answer in answers] == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) > 2


# --- controllers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coef", "target", "most", "expected"),
    [
        (0.0, 100.0, 1.0, [0.0, 0.01, 0.02, 0.03]),
        (0.025, 1e-3, 1.0, [0.025, 0.015, 0.005, 0.0]),
        (0.0, 100.0, 0.015, [0.0, 0.01, 0.015, 0.015]),
    ],
    ids=["too little entropy", "too much", "at its bound"],
)
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_the_weight_of_the_entropy_bonus_follows_its_target(
    tmp_path: Path, name: str, coef: float, target: float, most: float, expected: list[float]
) -> None:
    bonus = {"ent_coef": coef, "target": target, "increment": 0.01, "max_coef": most}
    own = go(tmp_path, method_of(name, entropy=bonus), steps=4)
    used = [next(term.weight for term, _, _ in work if term.name == "entropy") for work in own.works]
    assert used == pytest.approx(expected)
    lines = read_metrics(tmp_path)
    for line, work, now, weight in zip(lines, own.works, own.nows, expected, strict=True):
        batch = work[0][1]
        entropy = float(now["rollout"]["full_entropy"][batch["mask"]].mean())
        assert line["entropy"] == pytest.approx(entropy, rel=1e-5)  # of the rollout: the policy had not moved yet
        assert line["loss/policy/rollout/entropy"] == pytest.approx(-weight * entropy, rel=1e-5)


def test_a_fixed_entropy_bonus_is_its_weight_times_the_entropy(tmp_path: Path) -> None:
    go(tmp_path, method_of("grpo", entropy={"ent_coef": 0.2}), steps=2)
    for line in read_metrics(tmp_path):
        assert line["loss/policy/rollout/entropy"] == pytest.approx(-0.2 * line["entropy"], rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
def test_the_kl_controller_reads_the_kl_of_the_rollout(tmp_path: Path, estimator: str) -> None:
    """Ziegler et al. 2019: coef <- coef (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon)."""
    kl = KL(coef=0.5, controller="adaptive", target=0.05, horizon=30, estimator=estimator)  # type: ignore[arg-type]
    method = method_of("ppo", num_generations=2, kl_in_reward=kl, normalize_advantage=None)
    roles = cast(method) | {"reference": h.policy(name="reference", seed=1, dtype=torch.float32)}
    own = go(tmp_path, method, roles, steps=3)
    lines = read_metrics(tmp_path)
    if estimator == "exact":  # what a token does to its own state's KL is a loss, under the same coefficient
        weights = [term.weight for work in own.works for term, _, _ in work if term.name == "exact_kl"]
        assert weights == pytest.approx([line["state/penalty"] for line in lines])
    for before, after in pairwise(lines):
        error = min(max(before["kl"] / 0.05 - 1, -0.2), 0.2)
        assert error == 0.2  # the two models are far apart
        assert after["state/penalty"] == pytest.approx(before["state/penalty"] * (1 + error * 6 / 30))


def test_the_exact_kl_is_that_of_the_two_whole_distributions(tmp_path: Path) -> None:
    """By transformers' own forwards, in the reward, in the loss and in the log."""
    method = method_of("ppo", num_generations=2, kl_in_reward=KL(coef=0.3, estimator="exact"), normalize_advantage=None)
    roles = cast(method) | {"reference": h.policy(name="reference", seed=1, dtype=torch.float32)}
    ours, theirs = (h.clone(roles)[name].model for name in ("policy", "reference"))
    go(tmp_path, method, roles, sampling=Sampling(6, 0.7))
    totals, answers = [], rollout(tmp_path)
    for answer in answers:
        ids, start = torch.tensor(answer["prompt_ids"] + answer["completion_ids"]), len(answer["prompt_ids"])
        both = [(h.full_logits(model, ids) / 0.7).log_softmax(-1)[start - 1 : -1] for model in (ours, theirs)]
        kl = (both[0].exp() * (both[0] - both[1])).sum(-1)
        assert answer["kl"] == pytest.approx(kl.tolist(), abs=1e-5)
        assert sum(answer["token_reward"]) == pytest.approx(answer["score"] - 0.3 * float(kl.sum()), abs=1e-4)
        totals.append(float(kl.sum()))
    assert read_metrics(tmp_path)[0]["kl"] == pytest.approx(statistics.mean(totals), rel=1e-4)


# --- BCO's running mean ----------------------------------------------------------------------------------------------


def rewards_of(now: Any, batch: Batch, beta: float) -> list[float]:
    """beta (log pi - log pi_ref) of each row, at the weights of its update."""
    rows = zip(now["train"]["logp"].tolist(), batch["ref_logp"].tolist(), batch["mask"].tolist(), strict=True)
    return [beta * math.fsum(a - b for a, b, m in zip(*row, strict=True) if m) for row in rows]


@pytest.mark.parametrize("loss", ["bco_pair", "bco"])
def test_bco_subtracts_a_running_mean_of_the_rewards_before(tmp_path: Path, loss: str) -> None:
    """d <- 0.9 d + 0.1 (mean reward of the mini-batch's own answers); it stands in the checkpoint."""
    objective = preference("dpo", loss=loss) if loss == "bco_pair" else preference("kto", loss=loss)
    roles = {"policy": h.policy(), "reference": h.policy(name="reference", seed=1)}
    own = Recorder(roles, {"policy": replace(h.FREE, lr=0.02)}, total=20, budget=40)
    unpaired = [Unpaired(p.chosen, p.rejected, bool(i % 2)) for i, p in enumerate(pairs())]
    source = pairs() if loss == "bco_pair" else unpaired
    offline.train(objective, own, [source], offline.OfflinePlan(5, 3), RunFolder(tmp_path), quiet=True)
    delta = 0.0
    for work, now in zip(own.works, own.nows, strict=True):
        term, batch, _ = work[0]
        assert term.loss.options["delta"] == pytest.approx(delta, abs=1e-12)
        rewards = rewards_of(now, batch, 0.1)
        answers = rewards if loss == "bco_pair" else rewards[::2]  # every second row belongs to another prompt
        delta = 0.9 * delta + 0.1 * statistics.mean(answers)
    assert delta != 0.0
    state = json.loads((tmp_path / "checkpoints" / "step-00000005" / "loop.json").read_text())["state"]
    assert state == {"term0.delta": pytest.approx(delta, abs=1e-12)}
