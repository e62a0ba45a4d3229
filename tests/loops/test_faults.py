"""Runs that are broken on purpose: each fault is named within two steps. What a check saw is in the run folder."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from models import helpers as h

from loops.helpers import END, cast, go, learner_of, method_of
from whet import methods
from whet.data import Batch, Group, Row, Sample
from whet.errors import CheckpointError, Interrupted, RewardError, RunStopped
from whet.generate import Request
from whet.generate.local import LocalGenerator
from whet.loops import offline, online
from whet.loops.record import RunFolder, read_metrics
from whet.methods import algorithm
from whet.methods.compose import SFT
from whet.methods.options import KL
from whet.rewards import Scores

RATE = 0.002
PENALTY = KL(coef=0.3)


def stopped(folder: Path, error: Any) -> list[dict[str, Any]]:
    """Check what is in the record of a stop, and return its rows."""
    path = Path(str(error.value).rpartition(" are in ")[2])
    about = json.loads(path.with_suffix(".json").read_text())
    assert path.parent == folder / "stopped"
    assert str(error.value).startswith(about["message"])
    assert path.stem == f"step-{about['step']:08d}"
    assert type(about["version"]) is int
    return pyarrow.parquet.read_table(path).to_pylist()


def broken(folder: Path, what: str, method: Any, steps: int = 2, **options: Any) -> list[dict[str, Any]]:
    """Run the loop, which must stop within two steps for this reason. Return the rows of the record."""
    with pytest.raises(RunStopped, match=what) as error:
        go(folder, method, learner=learner_of(cast(method), lr=options.pop("lr", RATE)), steps=steps, **options)
    assert "step 1: " in str(error.value) or "step 2: " in str(error.value)
    return stopped(folder, error)


# --- the generator ---------------------------------------------------------------------------------------------------


class Stale(LocalGenerator):
    """Keeps the weights that it had first, and says that it has the new ones."""

    def load_weights(self, weights: Any) -> None:
        first = self.__dict__.setdefault("_first", h.policy(dtype=torch.float32))
        super().load_weights(replace(weights, handle=first))


class Hot(LocalGenerator):
    """Samples at twice the temperature that was asked for."""

    def generate(self, requests: Sequence[Request]) -> Any:
        warmer = [replace(one, sampling=replace(one.sampling, temperature=2.0)) for one in requests]
        return super().generate(warmer)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_generator_with_stale_weights(tmp_path: Path, name: str) -> None:
    rows = broken(tmp_path, "the new weights did not arrive|scores the canary", method_of(name), generator=Stale)
    assert all(len(row["old_logp"]) == len(row["completion_ids"]) for row in rows)


@pytest.mark.parametrize("name", ["ppo", "grpo", "online_dpo"])
def test_a_generator_at_another_temperature(tmp_path: Path, name: str) -> None:
    rows = broken(tmp_path, "another temperature", method_of(name), generator=Hot)
    off = [abs(a - b) for row in rows for a, b in zip(row["sampler_logp"], row["old_logp"], strict=True)]
    assert sum(off) / len(off) > 2e-3


def test_a_gap_that_is_corrected_is_said_once_and_stops_nothing(tmp_path: Path, capsys: Any) -> None:
    class Hotter(Hot):
        def generate(self, requests: Sequence[Request]) -> Any:
            for sample in LocalGenerator.generate(self, requests):
                yield replace(sample, sampler_logp=tuple(one - 0.5 for one in sample.sampler_logp))

    method = method_of("grpo", importance_correction="token_weight")
    go(tmp_path, method, generator=Hotter, steps=3, learner=learner_of(cast(method), lr=RATE))
    lines = [one for one in capsys.readouterr().err.splitlines() if "another temperature" in one]
    assert len(lines) == 1
    assert lines[0].startswith("whet: generator and learner disagree on the sampled tokens' log-probs by 0.5")


# --- the KL ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_kl_estimator_with_the_other_sign(tmp_path: Path, estimator: str) -> None:
    method = method_of("ppo", kl_in_reward=replace(PENALTY, estimator=estimator))
    own = method.penalty.estimator

    def flipped(**columns: Any) -> torch.Tensor:
        return -own.op(**columns)

    flipped.__name__, flipped.__module__ = own.op.__name__, own.op.__module__
    penalty = replace(method.penalty, estimator=replace(own, op=flipped))
    broken(
        tmp_path, f"the KL in the reward is not {estimator} of policy and reference", replace(method, penalty=penalty)
    )


@pytest.mark.parametrize(
    ("name", "where"),
    [("ppo", "token"), ("ppo", "sequence_sum"), ("ppo", "sequence"), ("reinforce", "token"), ("reinforce", "sequence")],
)
def test_a_kl_penalty_that_is_a_bonus(tmp_path: Path, monkeypatch: Any, where: str, name: str) -> None:
    method = method_of(name, kl_in_reward=replace(PENALTY, where=where))
    original = algorithm.advantages

    def flipped(made: Any, batch: Batch) -> Batch:
        out = original(made, batch)
        twice = 2 * made.penalty.coef * made.penalty.charge(out.columns)
        return out.with_columns(token_reward=out["token_reward"] + twice)

    monkeypatch.setattr(online, "advantages", flipped)
    rows = broken(tmp_path, "Is the sign of the KL penalty reversed", method, lr=0.02)
    assert any(abs(value) > 1e-4 for row in rows for value in row["kl"])


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_weighted"])
def test_a_kl_in_the_loss_with_the_other_sign(tmp_path: Path, estimator: str) -> None:
    method = method_of("grpo", kl_in_loss={"name": estimator, "coef": 0.3})
    terms = tuple(replace(one, weight=-one.weight) if one.name == estimator else one for one in method.terms)
    broken(tmp_path, "it is never negative; is the sign", replace(method, terms=terms), lr=0.02)


# --- masks, groups, end tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("name", ["ppo", "grpo", "online_dpo"])
def test_a_shifted_mask_of_the_answers(tmp_path: Path, monkeypatch: Any, shift: int, name: str) -> None:
    def shifted(self: Sample) -> tuple[bool, ...]:
        whole = [True] * len(self.ids)
        return tuple([False, *whole[1:]] if shift > 0 else [*whole[:-1], False])

    monkeypatch.setattr(Sample, "trained", shifted)
    broken(tmp_path, "was it shifted|an end token that is not trained", method_of(name))


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_a_shifted_mask_of_a_batch(tmp_path: Path, monkeypatch: Any, shift: int, kind: str) -> None:
    original = Batch.of

    def of(elements: Any) -> Batch:
        batch = original(elements)
        moved = torch.roll(batch["mask"], shift, 1)
        return Batch(batch.rows, {**batch.columns, "mask": moved})

    monkeypatch.setattr(Batch, "of", staticmethod(of))
    if kind == "grpo":
        broken(tmp_path, "was it shifted|an end token that is not trained", method_of(kind))
        return
    with pytest.raises(RunStopped, match=r"step 1: (the mask of row|answer . has an end token)") as error:
        trained(tmp_path, kind)
    assert stopped(tmp_path, error)


def test_permuted_groups(tmp_path: Path, monkeypatch: Any) -> None:
    original = online.batch_of

    def permuted(groups: Sequence[Group], *given: Any) -> Batch:
        batch = original(groups, *given)
        order = torch.randperm(len(batch.rows), generator=torch.Generator().manual_seed(3))
        return batch.with_columns(group=batch["group"][order])

    monkeypatch.setattr(online, "batch_of", permuted)
    rows = broken(tmp_path, "answers to different prompts would be compared", method_of("grpo"))
    assert [row["group"] for row in rows] != sorted(row["group"] for row in rows)


def test_rows_with_the_tokens_of_another_answer(tmp_path: Path, monkeypatch: Any) -> None:
    original = Group.rows
    monkeypatch.setattr(Group, "rows", lambda self: original(self)[::-1])
    broken(tmp_path, "does not have the tokens of its prompt and its answer", method_of("grpo"))


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_an_end_token_that_is_not_trained(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    monkeypatch.setattr(Sample, "trained", lambda self: tuple(one not in END for one in self.ids))
    broken(tmp_path, "an end token that is not trained; the model would never learn to stop", method_of(name))


def test_an_end_token_of_a_demonstration_that_is_not_trained(tmp_path: Path) -> None:
    rows = h.rows()
    cut = rows[2]
    ids = torch.cat([cut.ids[:-1], torch.tensor([END[0]])])
    rows[2] = Row(ids, cut.start, cut.mask & (torch.arange(cut.response) < cut.response - 1))
    with pytest.raises(RunStopped, match="an end token that is not trained") as error:
        trained(tmp_path, "sft", rows)
    assert len(stopped(tmp_path, error)) == len(rows)


# --- learning rate and rewards -----------------------------------------------------------------------------------------


def trained(
    folder: Path, kind: str, elements: Any = None, rate: float = RATE, mode: str = "stop", steps: int = 2
) -> None:
    """Run an offline loop on all elements per step."""
    given = elements or (h.pairs() if kind == "dpo" else h.rankings() if kind == "reward" else h.rows())
    objective: Any = {"sft": SFT, "dpo": methods.preference("dpo"), "reward": methods.reward("k_way")}[kind]
    roles = (
        {"reward": h.scorer(name="reward", dtype=torch.float32)}
        if kind == "reward"
        else {"policy": h.policy(dtype=torch.float32)}
    )
    if kind == "dpo":
        roles["reference"] = h.policy(dtype=torch.float32, name="reference")
    plan = offline.OfflinePlan(steps, len(given), end_ids=END[:1], on_divergence=mode)
    offline.train(objective, learner_of(roles, lr=rate), [given], plan, RunFolder(folder), quiet=True)


@pytest.mark.parametrize("name", ["ppo", "grpo", "reinforce", "online_dpo"])
def test_a_learning_rate_a_thousand_times_too_high(tmp_path: Path, capsys: Any, name: str) -> None:
    method = method_of(name)
    broken(
        tmp_path / "stop", "Probably the learning rate is too high .now 2", method, lr=1000 * RATE, on_divergence="stop"
    )
    assert 1 <= len(read_metrics(tmp_path / "stop")) <= 2
    go(tmp_path / "warn", method, learner=learner_of(cast(method), lr=1000 * RATE), steps=2)
    lines = [one for one in capsys.readouterr().err.splitlines() if "learning rate is too high" in one]
    assert len(lines) == 1
    assert lines[0].startswith("whet: step ")
    assert not (tmp_path / "warn" / "stopped").exists()


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_a_learning_rate_a_thousand_times_too_high_on_data(tmp_path: Path, capsys: Any, kind: str) -> None:
    with pytest.raises(RunStopped, match=r"step 2: the loss is .* Probably the learning rate is too high .now 2"):
        trained(tmp_path / "stop", kind, rate=1000 * RATE)
    trained(tmp_path / "warn", kind, rate=1000 * RATE, mode="warn")
    lines = [one for one in capsys.readouterr().err.splitlines() if "learning rate is too high" in one]
    assert len(lines) == 1


class Constant:
    def score(self, groups: Sequence[Group]) -> Scores:
        return Scores(torch.zeros(sum(len(group.samples) for group in groups)))


@pytest.mark.parametrize("name", ["ppo", "grpo", "online_dpo"])
def test_a_constant_reward(tmp_path: Path, capsys: Any, name: str) -> None:
    method = method_of(name)
    go(tmp_path, method, reward=Constant(), steps=2, learner=learner_of(cast(method), lr=RATE))
    lines = [one for one in capsys.readouterr().err.splitlines() if "nothing is learned from equal scores" in one]
    assert len(lines) == 1
    assert lines[0].startswith("whet: reward table: in the first 2 steps")


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_not_blamed_on_the_generator(tmp_path: Path) -> None:
    method = method_of("grpo")
    own = learner_of(cast(method), lr=RATE)
    original: Callable[..., Any] = own.optim_step

    def poisoned() -> Any:
        out = original()
        with torch.no_grad():
            next(iter(own.roles["policy"].parameters().values())).mul_(float("inf"))
        return out

    own.optim_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(RunStopped, match=r"its weights are no longer finite; lower optim\.lr") as error:
        go(tmp_path, method, learner=own)
    assert stopped(tmp_path, error)


# --- reasons ----------------------------------------------------------------------------------------------------------


class FailsLater(h.TableReward):
    """Raises in its third call."""

    error: BaseException = RewardError("reward table: the judge answered with 500")

    def score(self, groups: Sequence[Group]) -> Scores:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            raise self.error
        return super().score(groups)


def test_a_disk_that_is_full_at_the_end_hides_no_reason(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """The run fails, and its checkpoint cannot be written either: both are said."""
    from whet.loops import checkpoint

    def full(*given: Any, **options: Any) -> None:
        raise CheckpointError(
            "checkpoints/step-00000002: the checkpoint could not be written (No space left on device)"
        )

    monkeypatch.setattr(checkpoint, "save", full)
    given = {"reward": FailsLater(lambda ids: float(len(ids))), "steps": 4}
    with pytest.raises(RewardError, match="the judge answered with 500"):
        go(tmp_path / "fails", method_of("grpo"), **given)
    assert "whet: checkpoints/step-00000002: the checkpoint could not be written" in capsys.readouterr().err
    signal = FailsLater(lambda ids: float(len(ids)))
    signal.error = Interrupted("no checkpoint was saved yet", 15)
    with pytest.raises(Interrupted, match="No space left on device") as error:
        go(tmp_path / "ends", method_of("grpo"), **given | {"reward": signal})
    assert error.value.signum == 15


def test_a_stop_whose_record_cannot_be_written_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    from whet.loops import stopped as records

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.rollouts, "write_table", full)
    with pytest.raises(
        RunStopped, match=r"another temperature\?; what the check saw could not be written to .*No space left"
    ):
        go(tmp_path, method_of("ppo"), generator=Hot, learner=learner_of(cast(method_of("ppo")), lr=RATE))
