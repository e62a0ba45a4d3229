"""The online loop through real tiny models: on-policy exactness, early stop, averages, and what the run folder says."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from models import helpers as h

from whet.dials import KL, Sampling, Truncated
from whet.errors import RunStopped
from whet.generate import Request
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.loops import online, selfcheck
from whet.loops.record import Run, read_metrics
from whet.methods import Algorithm, credited
from whet.methods import online as methods
from whet.models.roles import Role
from whet.records import COLUMNS, Batch, Group, Weights
from whet.rewards import Scores, Weighted

END = (1, 5, 9)
PROMPTS = [h.prompt(i, range(3 + i, 5 + 3 * i)) for i in range(3)]


def separate(dtype: torch.dtype = torch.float32) -> dict[str, Role]:
    return {
        "policy": h.policy(dtype=dtype), "reference": h.policy(dtype=dtype, name="reference"), "critic": h.scorer(dtype=dtype, seed=2)
    }  # fmt: skip


def learner_of(roles: dict[str, Role], *, lr: float = 0.02, **dials: Any) -> h.Recorder:
    optims = {name: replace(h.FREE, lr=lr) for name, role in roles.items() if role.trained}
    return h.Recorder(roles, optims, total=50, **({"budget": 64} | dials))


def go(
    folder: Path,
    method: Algorithm,
    roles: dict[str, Role] | None = None,
    *,
    generator: Any = LocalGenerator,
    learner: LocalLearner | None = None,
    reward: Any = None,
    sampling: Sampling = Sampling(6),
    end_ids: Sequence[int] = END,
    **plan: Any,
) -> h.Recorder:
    """One run of the loop; returns its learner."""
    own: Any = learner or learner_of(roles or separate())
    given = {"steps": 1, "prompts": 3, "minibatch": 3 * method.answers, "canary": 20, "end_ids": tuple(end_ids)} | plan
    table = reward or h.TableReward(lambda ids: 0.5 * len(ids) - 0.25 * (sum(ids) % 5))
    source = generator(own.roles["policy"], end_ids, str)
    online.train(
        method,
        own,
        source,
        [Weighted("table", table)],
        PROMPTS,
        sampling,
        online.Plan(**given),
        Run(folder),
        quiet=True,
    )
    return own


def rollout(folder: Path, step: int = 1) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(folder / "rollouts" / f"step-{step:08d}.parquet").to_pylist()


# --- on-policy exactness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dials", [{"budget": 1}, {"budget": 64}, {"budget": 64, "packed": True}], ids=str)
@pytest.mark.parametrize("make", [separate, h.trunk], ids=["separate copies", "one trunk"])
def test_on_the_first_step_ratio_is_one_and_kl_is_zero_to_the_bit(
    tmp_path: Path, make: Any, dials: dict, temperature: float
) -> None:
    own = go(
        tmp_path,
        methods.ppo(answers=2),
        learner=learner_of(make(), **dials),
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
    own = go(tmp_path, methods.ppo(), make(), steps=3)
    assert [line["ratio_mean"] for line in read_metrics(tmp_path)] == [1.0] * 3
    assert read_metrics(tmp_path)[0]["kl"] == 0.0
    assert read_metrics(tmp_path)[-1]["kl"] != 0.0
    assert own.version == 3


def test_several_mini_batches_and_epochs_start_at_ratio_one(tmp_path: Path) -> None:
    """Measured mini-batch by mini-batch: the first update of each rollout is exact although there are four of them."""
    own = go(tmp_path, methods.ppo(answers=4), steps=2, minibatch=5, epochs=2)
    assert own.version == 2 * 2 * 3


# --- the self-checks -------------------------------------------------------------------------------------------------


class Deaf(LocalGenerator):
    """Takes no push."""

    def adopt(self, weights: Weights) -> None:
        pass


class Stale(LocalGenerator):
    """Says the new version and keeps the old weights."""

    def adopt(self, weights: Weights) -> None:
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
        with torch.no_grad():
            next(iter(self.roles["policy"].parameters().values())).add_(1e-3)
        return out


class NotANumber:
    def score(self, groups: Sequence[Group]) -> Scores:
        return Scores(torch.full((sum(len(group.samples) for group in groups),), torch.nan))


MASKED = Truncated("mask")


@pytest.mark.parametrize(
    ("why", "given"),
    [
        ("version 0, the learner is at 1", {"generator": Deaf}),
        ("canary", {"generator": Stale}),
        ("generator and learner disagree", {"generator": Off}),
        ("rewards holds a NaN", {"reward": NotANumber()}),
        ("not a single token", {"method": methods.ppo(truncated=MASKED), "sampling": Sampling(2), "end_ids": ()}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_run_that_goes_wrong_stops_and_says_why(tmp_path: Path, why: str, given: dict[str, Any]) -> None:
    with pytest.raises(RunStopped, match=why):
        go(tmp_path, **({"method": methods.ppo()} | given))


def test_a_policy_that_moved_since_it_was_measured_stops_the_run(tmp_path: Path) -> None:
    roles = separate()
    learner = Moving(roles, {"policy": h.FREE, "critic": h.FREE}, total=5)
    with pytest.raises(RunStopped, match="ratio is not 1"):
        go(tmp_path, methods.ppo(), learner=learner)


def test_a_reference_that_is_not_the_policy_at_the_start_stops_the_run(tmp_path: Path) -> None:
    roles = separate() | {"reference": h.policy(name="reference", seed=1, dtype=torch.float32)}
    with pytest.raises(RunStopped, match="began with equal weights"):
        go(tmp_path, methods.ppo(), roles, equal_start=True)


def test_a_sampler_at_another_temperature_stops_the_run(tmp_path: Path) -> None:
    class Hotter(LocalGenerator):
        def generate(self, requests: Sequence[Request]) -> Any:
            return super().generate([replace(one, sampling=replace(one.sampling, temperature=1.3)) for one in requests])

    with pytest.raises(RunStopped, match="temperature"):
        go(tmp_path, methods.ppo(), generator=Hotter)


def test_an_untrained_end_token_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = online.gathered

    def gathered(*given: Any) -> Batch:
        batch = original(*given)
        cut = tuple(
            replace(row, mask=row.mask.clone().index_fill(0, torch.tensor([row.response - 1]), False))
            for row in batch.rows
        )
        return replace(batch, rows=cut)

    monkeypatch.setattr(online, "gathered", gathered)
    with pytest.raises(RunStopped, match="never learn to stop"):
        go(tmp_path, methods.grpo(), {k: v for k, v in separate().items() if k != "critic"}, end_ids=range(27))


def test_a_group_whose_advantages_do_not_sum_to_zero_is_found() -> None:
    batch = Batch.of([h.row(i, 2, 3) for i in range(4)]).with_columns(
        group=torch.tensor([0, 0, 1, 1]), advantage=torch.tensor([1.0, -1.0, 1.0, -0.9])[:, None].expand(4, 3)
    )
    with pytest.raises(RunStopped, match=r"sum to 0\.0526 of their sizes"):
        selfcheck.groups_centred(0, batch)
    selfcheck.groups_centred(0, batch.take([0, 1]))


def test_nothing_is_wrong_with_a_right_run(tmp_path: Path) -> None:
    for number, name in enumerate(methods.METHODS):
        method = methods.METHODS[name]()
        if name == "instructgpt":
            continue
        roles = {key: role for key, role in separate().items() if key in method.roles()}
        go(tmp_path / str(number), method, roles, equal_start=True)


# --- masks, early stop, averages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "grpo", "reinforce"])
def test_a_truncated_answer_that_is_masked_gives_no_gradient(tmp_path: Path, name: str) -> None:
    """The gradient is that of the batch without those rows."""
    method = methods.METHODS[name](answers=6, truncated=MASKED)
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
    own = go(tmp_path, methods.ppo(), epochs=4, stop_kl=1e-4)
    assert own.version == 2  # the first update sees 0, the second what the first one did
    assert read_metrics(tmp_path)[0]["stopped"] > 0
    assert go(tmp_path / "free", methods.ppo(), epochs=4).version == 4


def test_an_average_of_the_policy_follows_it_by_hand(tmp_path: Path) -> None:
    roles = separate(torch.float64) | {"ema": h.policy(name="ema")}
    start = h.weights(h.Recorder(roles, {"policy": h.FREE, "critic": h.FREE}, total=1))["policy"]
    own = go(tmp_path, methods.ppo(), roles, steps=2, ema=0.9)
    first, second = (one["policy"] for one in own.trail)
    for key, value in own.roles["ema"].parameters().items():
        torch.testing.assert_close(
            value.detach(), 0.9 * (0.9 * start[key] + 0.1 * first[key]) + 0.1 * second[key], rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize(("name", "versions"), [("ppo", 2 * 2 * 2), ("reinforce", 2)])
def test_every_sample_carries_the_version_that_made_it(tmp_path: Path, name: str, versions: int) -> None:
    method = methods.METHODS[name](answers=2)
    dials = {"epochs": 2, "minibatch": 3} if name == "ppo" else {}
    roles = {key: role for key, role in separate().items() if key in method.roles()}
    own = go(tmp_path, method, roles, steps=2, **dials)
    assert own.version == versions
    assert {answer["version"] for answer in rollout(tmp_path, 2)} == {versions // 2}


# --- the run folder --------------------------------------------------------------------------------------------------


def test_a_rollout_is_written_with_per_token_columns_as_long_as_each_answer(tmp_path: Path) -> None:
    own = go(tmp_path, methods.ppo(answers=4))
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
    go(tmp_path, methods.ppo(kl=KL(coef=0.3), answers=2), reward=reward, steps=2)
    for answer in rollout(tmp_path, 2):
        kl = [new - old for new, old in zip(answer["old_logp"], answer["ref_logp"], strict=True)]
        assert answer["score"] == pytest.approx(0.5 * len(answer["completion_ids"]) - 1)
        assert answer["reward/table"] == pytest.approx(answer["score"])
        assert sum(answer["token_reward"]) == pytest.approx(answer["score"] - 0.3 * sum(kl), abs=1e-5)
        if dense:
            share = answer["score"] / len(kl)
            assert answer["token_reward"] == pytest.approx([share - 0.3 * one for one in kl], abs=1e-5)


def test_prompts_are_handed_out_epoch_by_epoch(tmp_path: Path) -> None:
    go(tmp_path, methods.ppo(), steps=4, prompts=2, minibatch=2)
    seen = [answer["prompt_id"] for step in range(1, 5) for answer in rollout(tmp_path, step)]
    assert sorted(seen[:3]) == sorted(seen[3:6]) == ["0", "1", "2"]
    assert [answer["draw"] for step in range(1, 5) for answer in rollout(tmp_path, step)] == list(range(8))


def test_crediting_a_recorded_rollout_again_gives_the_same_columns(tmp_path: Path) -> None:
    method = methods.ppo(answers=2)
    batch = go(tmp_path, method).work[0][1]
    again = credited(method.at(method.init()), batch)
    for name in ("advantage", "returns", "token_reward"):
        if name != "advantage" or method.whiten is None:
            assert torch.allclose(again[name], batch[name], atol=1e-6), name
