"""The online loop through real tiny models: on-policy exactness, early stop, averages, and what the run folder says."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import helpers as h

from loops.helpers import END, ONLINE, Rough, cast, go, learner_of, method_of, rollout, separate
from whet import ops
from whet.data import COLUMNS, Batch, Group, Weights, pad
from whet.errors import RunStopped
from whet.generate import Request
from whet.generate.local import LocalGenerator
from whet.loops import online, selfcheck
from whet.loops.record import read_metrics
from whet.methods import advantages
from whet.methods.choices import ONLINE_SLOTS
from whet.methods.options import KL, Sampling, Truncated
from whet.rewards import Scores

# --- on-policy exactness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("options", [{"budget": 1}, {"budget": 64}, {"budget": 64, "packed": True}], ids=str)
@pytest.mark.parametrize("make", [separate, h.trunk], ids=["separate copies", "one trunk"])
def test_on_the_first_step_ratio_is_one_and_kl_is_zero_to_the_bit(
    tmp_path: Path, make: Any, options: dict, temperature: float
) -> None:
    own = go(
        tmp_path,
        method_of("ppo", num_generations=2),
        learner=learner_of(make(), **options),
        sampling=Sampling(6, temperature),
        equal_start=True,
    )
    batch = own.work[0][1]
    mask = batch["mask"]
    assert int(mask.sum()) > 6
    assert torch.equal(own.step.now["rollout"]["logp"][mask], batch["old_logp"][mask])
    assert torch.equal(batch["old_logp"], batch["ref_logp"])
    for answer in rollout(tmp_path):
        assert set(answer["kl"]) == {0.0}
        assert set(answer["ratio"]) == {1.0}


@pytest.mark.parametrize("make", [separate, h.trunk], ids=["separate copies", "one trunk"])
def test_in_every_later_step_the_first_ratio_is_one_although_the_policy_moved(tmp_path: Path, make: Any) -> None:
    own = go(tmp_path, method_of("ppo"), make(), steps=3)
    assert [line["ratio_mean"] for line in read_metrics(tmp_path)] == [1.0] * 3
    assert read_metrics(tmp_path)[0]["kl"] == 0.0
    assert read_metrics(tmp_path)[-1]["kl"] != 0.0
    assert own.version == 3


def test_several_mini_batches_and_epochs_start_at_ratio_one(tmp_path: Path) -> None:
    """Measured mini-batch by mini-batch: the first update of each rollout is exact although there are four of them."""
    own = go(tmp_path, method_of("ppo", num_generations=4), steps=2, mini_batch_size=5, epochs=2)
    assert own.version == 2 * 2 * 3


# --- the self-checks -------------------------------------------------------------------------------------------------


class Deaf(LocalGenerator):
    """Takes no push."""

    def load_weights(self, weights: Weights) -> None:
        pass


class Stale(LocalGenerator):
    """Says the new version and keeps the old weights."""

    def load_weights(self, weights: Weights) -> None:
        if self.version == 0 and weights.version == 0:
            self.role = h.clone({"policy": weights.handle})["policy"]
        self.version = weights.version


class Off(LocalGenerator):
    """Reports log-probs that are a little off."""

    def generate(self, requests: Sequence[Request]) -> Any:
        for sample in super().generate(requests):
            yield replace(sample, sampler_logp=tuple(value - 0.01 for value in sample.sampler_logp))


class Moving(h.Recorder):
    """Its policy moves between measuring and training."""

    def measure(self, batch: Batch, columns: frozenset[str]) -> Batch:
        out = super().measure(batch, columns)
        if len(columns) > 1:  # not when a canary is scored
            with torch.no_grad():
                next(iter(self.roles["policy"].parameters().values())).add_(1e-3)
        return out


class NotANumber:
    def score(self, groups: Sequence[Group]) -> Scores:
        return Scores(torch.full((sum(len(group.samples) for group in groups),), torch.nan))


MASKED = Truncated("mask")
ALL_CUT: dict[str, Any] = {"sampling": Sampling(2), "end_ids": (), "steps": 6}


@pytest.mark.parametrize(
    ("why", "given"),
    [
        ("version 0, the learner is at 1", {"generator": Deaf}),
        ("canary", {"generator": Stale}),
        ("generator and learner disagree", {"generator": Off}),
        ("rewards contains a NaN", {"reward": NotANumber()}),
        ("no token is trained, as in the 5 steps before", {"method": method_of("ppo", truncated=MASKED), **ALL_CUT}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_run_that_goes_wrong_stops_and_says_why(tmp_path: Path, why: str, given: dict[str, Any]) -> None:
    with pytest.raises(RunStopped, match=why):
        go(tmp_path, **({"method": method_of("ppo")} | given))


def test_a_policy_that_moved_since_it_was_measured_stops_the_run(tmp_path: Path) -> None:
    roles = separate()
    learner = Moving(roles, {"policy": h.FREE, "critic": h.FREE}, total=5)
    with pytest.raises(RunStopped, match="ratio is not 1"):
        go(tmp_path, method_of("ppo"), learner=learner)


def test_a_reference_that_is_not_the_policy_at_the_start_stops_the_run(tmp_path: Path) -> None:
    roles = separate() | {"reference": h.policy(name="reference", seed=1, dtype=torch.float32)}
    with pytest.raises(RunStopped, match="should have equal weights"):
        go(tmp_path, method_of("ppo"), roles, equal_start=True)


def test_a_sampler_at_another_temperature_stops_the_run(tmp_path: Path) -> None:
    class Hotter(LocalGenerator):
        def generate(self, requests: Sequence[Request]) -> Any:
            return super().generate([replace(one, sampling=replace(one.sampling, temperature=1.3)) for one in requests])

    with pytest.raises(RunStopped, match="temperature"):
        go(tmp_path, method_of("ppo"), generator=Hotter)


def test_an_untrained_end_token_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = online.batch_of

    def batch_of(*given: Any) -> Batch:
        batch = original(*given)
        ends = torch.tensor(END)
        cut = tuple(replace(row, mask=row.mask & ~torch.isin(row.ids[row.start :], ends)) for row in batch.rows)
        return replace(batch, rows=cut, columns={**batch.columns, "mask": pad([row.mask for row in cut])})

    monkeypatch.setattr(online, "batch_of", batch_of)
    with pytest.raises(RunStopped, match="never learn to stop"):
        go(tmp_path, method_of("grpo"), end_ids=END)


@pytest.mark.parametrize(("earned", "share"), [(0.0, "0526"), (1.0, "0505")])
def test_a_group_whose_advantages_do_not_sum_to_zero_is_found(earned: float, share: str) -> None:
    """0.1 of 1.9, and of 1.9 + 2 x 0.02 x 2 where two answers earned 2 each: they are rounded at their own size."""
    batch = Batch.of([h.row(i, 2, 3) for i in range(4)]).with_columns(
        group=torch.tensor([0, 0, 1, 1]),
        advantage=torch.tensor([1.0, -1.0, 1.0, -0.9])[:, None].expand(4, 3),
        token_reward=torch.tensor([[0.0, 0.0, 2 * earned]]).expand(4, 3),
    )
    with pytest.raises(RunStopped, match=rf"sum to 0\.{share} of their sizes"):
        selfcheck.groups_centered(0, batch)
    selfcheck.groups_centered(0, batch.take([0, 1]))


@pytest.mark.parametrize("name", ONLINE)
def test_every_method_of_the_catalogue_stands_the_self_checks(tmp_path: Path, name: str) -> None:
    method = method_of(name)
    table = [h.TableReward(lambda ids: float(sum(ids) % 5)), h.TableReward(len)][: 1 + (name == "gdpo")]
    if name == "gdpo":
        method = method_of(name, weights=(1.0, 0.5))
    ptx = h.rows() if name == "instructgpt" else ()
    own = go(tmp_path, method, reward=table, equal_start=True, steps=2, ptx=ptx, ptx_batch=2)
    assert own.version == 2
    assert all(0 < norm < float("inf") for norm in own.step.grad_norm.values())
    assert own.step.grad_norm.keys() == {"policy", "critic"} & method.roles()


# --- what could be drawn ---------------------------------------------------------------------------------------------

NARROW = [{"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.2}, {"top_p": 0.9, "top_k": 9, "min_p": 0.02}]


def drawable(logp: torch.Tensor, sampling: Sampling) -> list[int]:
    """The tokens that could be drawn, one after the other from the most probable one."""
    order = sorted(range(len(logp)), key=lambda token: -float(logp[token]))
    kept = order[: sampling.top_k or None]
    if sampling.top_p < 1:
        p, total, short = logp.exp(), sum(float(logp[token].exp()) for token in kept), []
        for token in kept:
            if sum(float(p[one]) for one in short) / total < sampling.top_p:
                short.append(token)
        kept = short
    return [token for token in kept if float((logp[token] - logp[order[0]]).exp()) >= sampling.min_p]


@pytest.mark.parametrize("options", NARROW, ids=str)
@pytest.mark.parametrize("name", ["ppo", "grpo", "optimal_baseline"])
def test_where_some_tokens_cannot_be_drawn_the_ratio_is_of_what_was_drawn_from(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    method, sampling = method_of(name), Sampling(6, 0.8, **options)
    roles = cast(method)
    model = h.clone(roles)["policy"].model
    own = go(tmp_path, method, roles, sampling=sampling, steps=3, equal_start=True)
    for line in read_metrics(tmp_path):
        assert line["ratio_mean"] == 1.0
        assert line["sampler_gap"] < 1e-5
        assert line["entropy"] > 0
    assert all(set(answer["ratio"]) == {1.0} for step in (1, 2, 3) for answer in rollout(tmp_path, step))
    batch = own.works[0][0][1]
    seen = 0
    for number, one in enumerate(batch.rows):
        logp = (h.full_logits(model, one.ids) / 0.8).log_softmax(-1)[one.start - 1 : -1]
        for place, (own_logp, token) in enumerate(zip(logp, one.ids[one.start :].tolist(), strict=True)):
            could = drawable(own_logp, sampling)
            assert sorted(could) == sorted(batch["support"][number, place].tolist())[-len(could) :]
            inside = own_logp[could].logsumexp(0)
            assert float(batch["old_logp"][number, place]) == pytest.approx(float(own_logp[token] - inside), abs=1e-5)
            if "ref_logp" in batch.columns:
                assert float(batch["ref_logp"][number, place]) == pytest.approx(float(own_logp[token]), abs=1e-5)
            seen += len(could) < 27
    assert seen == int(batch["mask"].sum())


@pytest.mark.parametrize("options", NARROW[:2], ids=str)
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_kl_is_that_of_the_whole_vocabulary_where_some_tokens_cannot_be_drawn(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """log pi - log pi_ref of the sampled tokens by transformers' own forwards, nothing left out of the softmax."""
    method = method_of(name)
    roles = cast(method) | {"reference": h.policy(name="reference", seed=1, dtype=torch.float32)}
    ours, theirs = (h.clone(roles)[name].model for name in ("policy", "reference"))
    go(tmp_path, method, roles, sampling=Sampling(6, **options))
    total = 0.0
    answers = rollout(tmp_path)
    for answer in answers:
        ids, start = torch.tensor(answer["prompt_ids"] + answer["completion_ids"]), len(answer["prompt_ids"])
        both = [h.full_logits(model, ids).log_softmax(-1)[start - 1 : -1] for model in (ours, theirs)]
        kl = [float(both[0][t, token] - both[1][t, token]) for t, token in enumerate(ids[start:].tolist())]
        total += sum(kl)
        if name == "ppo":
            assert answer["kl"] == pytest.approx(kl, abs=1e-5)
    assert read_metrics(tmp_path)[0]["kl"] == pytest.approx(total / len(answers), abs=1e-4)


@pytest.mark.parametrize("options", NARROW[:2], ids=str)
def test_own_pairs_are_compared_with_the_reference_over_the_whole_vocabulary(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Policy and reference are equal at the start, so every implicit reward is 0 and the loss log 2."""
    own = go(tmp_path, method_of("online_dpo"), sampling=Sampling(6, **options), equal_start=True)
    assert read_metrics(tmp_path)[0]["loss/policy/rollout/sigmoid"] == pytest.approx(math.log(2), abs=1e-6)
    batch, now = own.work[0][1], own.step.now["rollout"]
    assert torch.equal(now["full_logp"][batch["mask"]], batch["ref_logp"][batch["mask"]])
    assert float((now["full_logp"] - now["logp"])[batch["mask"]].max()) < -0.01  # less was left to draw from


# --- importance correction -------------------------------------------------------------------------------------------


def corrected(kind: str, gap: list[float]) -> list[float]:
    """The weights of one answer by the formulas, from log pi_old - log pi_sampler of its tokens."""
    whole = math.exp(sum(gap))
    mean = math.exp(sum(gap) / len(gap))
    return {
        "token_weight": [min(math.exp(one), 1.2) for one in gap],
        "sequence_weight": [min(whole, 1.2)] * len(gap),
        "token_mask": [math.exp(one) if 0.7 <= math.exp(one) <= 1.5 else 0.0 for one in gap],
        "sequence_mask": [whole if 0.7 <= whole <= 1.5 else 0.0] * len(gap),
        "geometric_mask": [1.0 if 0.7 <= mean <= 1.5 else 0.0] * len(gap),
    }[kind]


@pytest.mark.parametrize("kind", ONLINE_SLOTS["importance_correction"])
@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_a_sampler_that_is_off_is_weighed_where_the_method_says_so(tmp_path: Path, name: str, kind: str) -> None:
    """The column is the formula, it multiplies each token's policy loss, and the run is not stopped."""
    options = {"cap": 1.2} if kind.endswith("weight") else {"low": 0.7, "high": 1.5}
    method = method_of(name, num_generations=4, importance_correction={"name": kind, **options})
    own = go(tmp_path, method, cast(method, torch.float64), generator=Rough)
    answers = rollout(tmp_path)
    found = []
    for answer in answers:
        gap = [old - told for old, told in zip(answer["old_logp"], answer["sampler_logp"], strict=True)]
        assert answer["correction"] == pytest.approx(corrected(kind, gap), rel=1e-5)
        found += answer["correction"]
    assert len(set(found)) > 1
    assert 0.05 < read_metrics(tmp_path)[0]["sampler_gap"] < 0.6
    logp = own.step.now["rollout"]["logp"]
    _, batch, counts = own.work[0]
    if name == "ppo":  # the ratio is 1: each token's loss is -A, and the mean is over all tokens
        expected = -(batch["correction"] * batch["advantage"])[batch["mask"]].sum() / counts.tokens
    else:
        expected = -(batch["correction"] * batch["advantage"] * logp)[batch["mask"]].sum() / counts.sequences
    assert own.step.losses[own.work[0][0].label] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_without_a_correction_such_a_sampler_stops_the_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunStopped, match="generator and learner disagree"):
        go(tmp_path, method_of(name), generator=Rough)


@pytest.mark.parametrize("kind", ONLINE_SLOTS["importance_correction"])
def test_where_the_sampler_is_right_nothing_is_corrected(tmp_path: Path, kind: str) -> None:
    go(tmp_path, method_of("grpo", importance_correction=kind))
    weights = torch.tensor([one for answer in rollout(tmp_path) for one in answer["correction"]])
    assert torch.allclose(weights, torch.ones(()), atol=1e-5)


# --- masks, early stop, averages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "grpo", "reinforce"])
def test_a_truncated_answer_that_is_masked_gives_no_gradient(tmp_path: Path, name: str) -> None:
    """The gradient is that of the batch without those rows."""
    method = method_of(name, num_generations=6, truncated=MASKED)
    roles = {key: role for key, role in separate(torch.float64).items() if key in method.roles()}
    own = go(tmp_path, method, roles, sampling=Sampling(3))
    _, batch, _ = own.work[0]
    kept = [number for number, cut in enumerate(batch["truncated"].tolist()) if not cut]
    assert 0 < len(kept) < len(batch.rows)
    again = h.Recorder(h.with_weights(roles, own.before), own.optims, total=50)
    rest = batch.take(kept)
    again.update([(term, rest, rest.counts()) for term, _, _ in own.work])
    for role, gradient in own.grads.items():
        assert (gradient - again.grads[role]).norm() < 1e-7 * gradient.norm()


def test_updates_of_a_rollout_end_once_kl_exceeds_its_limit(tmp_path: Path) -> None:
    own = go(tmp_path, method_of("ppo"), epochs=4, target_kl=1e-4)
    assert own.version == 2  # the first update sees 0, the second what the first one did
    assert read_metrics(tmp_path)[0]["stopped"] > 0
    assert go(tmp_path / "free", method_of("ppo"), epochs=4).version == 4


def test_an_average_of_the_policy_follows_it_by_hand(tmp_path: Path) -> None:
    roles = separate(torch.float64) | {"ema": h.policy(name="ema")}
    start = h.weights(h.Recorder(roles, {"policy": h.FREE, "critic": h.FREE}, total=1))["policy"]
    own = go(tmp_path, method_of("ppo"), roles, steps=2, ema=0.9)
    first, second = (one["policy"] for one in own.trail)
    for key, value in own.roles["ema"].parameters().items():
        torch.testing.assert_close(
            value.detach(), 0.9 * (0.9 * start[key] + 0.1 * first[key]) + 0.1 * second[key], rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize(("name", "versions"), [("ppo", 2 * 2 * 2), ("reinforce", 2)])
def test_every_sample_carries_the_version_that_made_it(tmp_path: Path, name: str, versions: int) -> None:
    method = method_of(name, num_generations=2)
    options = {"epochs": 2, "mini_batch_size": 3} if name == "ppo" else {}
    roles = {key: role for key, role in separate().items() if key in method.roles()}
    own = go(tmp_path, method, roles, steps=2, **options)
    assert own.version == versions
    assert {answer["version"] for answer in rollout(tmp_path, 2)} == {versions // 2}


# --- the run folder --------------------------------------------------------------------------------------------------


def test_a_rollout_is_written_with_per_token_columns_as_long_as_each_answer(tmp_path: Path) -> None:
    own = go(tmp_path, method_of("ppo", num_generations=4))
    answers = rollout(tmp_path)
    assert len(answers) == 12
    assert len({len(answer["completion_ids"]) for answer in answers}) > 1
    expected = {
        "mask",
        "old_logp",
        "ref_logp",
        "sampler_logp",
        "old_value",
        "kl",
        "token_reward",
        "advantage",
        "returns",
        "ratio",
    }
    for answer in answers:
        per_token = {name for name in answer if name in COLUMNS and COLUMNS[name].per_token}
        assert expected <= per_token
        for name in per_token:
            assert len(answer[name]) == len(answer["completion_ids"]), name
    assert {answer["draw"] for answer in answers} == {0, 1, 2}
    assert sum(len(a["completion_ids"]) for a in answers) == int(own.work[0][1]["mask"].sum())


@pytest.mark.parametrize("dense", [False, True])
def test_the_written_token_rewards_add_up_to_score_minus_kl(tmp_path: Path, dense: bool) -> None:
    reward = h.TableReward(lambda ids: 0.5 * len(ids) - 1, dense=dense)
    go(tmp_path, method_of("ppo", kl_in_reward=KL(coef=0.3), num_generations=2), reward=reward, steps=2)
    for answer in rollout(tmp_path, 2):
        kl = [new - old for new, old in zip(answer["old_logp"], answer["ref_logp"], strict=True)]
        assert answer["score"] == pytest.approx(0.5 * len(answer["completion_ids"]) - 1)
        assert answer["reward/table"] == pytest.approx(answer["score"])
        assert sum(answer["token_reward"]) == pytest.approx(answer["score"] - 0.3 * sum(kl), abs=1e-5)
        if dense:
            share = answer["score"] / len(kl)
            assert answer["token_reward"] == pytest.approx([share - 0.3 * one for one in kl], abs=1e-5)


def test_prompts_are_handed_out_epoch_by_epoch(tmp_path: Path) -> None:
    go(tmp_path, method_of("ppo"), steps=4, prompts=2, mini_batch_size=2)
    seen = [answer["prompt_id"] for step in range(1, 5) for answer in rollout(tmp_path, step)]
    assert sorted(seen[:3]) == sorted(seen[3:6]) == ["0", "1", "2"]
    assert [answer["draw"] for step in range(1, 5) for answer in rollout(tmp_path, step)] == list(range(8))


def test_crediting_a_recorded_rollout_again_gives_the_same_columns(tmp_path: Path) -> None:
    method = method_of("ppo", num_generations=2)
    batch = go(tmp_path, method).work[0][1]
    again = advantages(method.at(method.init()), batch)
    for name in ("advantage", "returns", "token_reward"):
        if name != "advantage" or method.normalize_advantage is None:
            assert torch.allclose(again[name], batch[name], atol=1e-6), name


def test_the_rounding_of_nearly_equal_rewards_is_no_error_of_the_advantages() -> None:
    """Rewards that differ by a KL of 1e-5 are divided by their deviation, and so is the rounding of their mean."""
    score = 6 + torch.tensor([1.0, -2.0, 3.0, -1.0]) * 2e-6
    batch = Batch.of([h.row(i, 2, 1) for i in range(4)]).with_columns(
        group=torch.zeros(4, dtype=torch.long), token_reward=score[:, None]
    )
    advantage = ops.group_zscore(score, batch["group"], eps=0.0)[:, None]
    assert advantage.sum().abs() > 1e-3 * advantage.abs().sum()
    selfcheck.groups_centered(0, batch.with_columns(advantage=advantage))
    with pytest.raises(RunStopped, match="advantages of a group sum to"):
        selfcheck.groups_centered(0, batch.with_columns(advantage=advantage + 1.0))
