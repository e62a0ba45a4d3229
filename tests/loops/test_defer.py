"""With one update per rollout, old_logp is the update's own log-prob: the same bits as a measured one, with one pass less."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import helpers as h

from whet.data import Batch
from whet.errors import RunStopped
from whet.loops.experience import SAMPLED, entropy_sample
from whet.loops.record import read_metrics
from whet.methods.options import Sampling
from whet.ops import address

from .helpers import Recorder, cast, go, method_of, rollout


class Counting(Recorder):
    """Keeps the names of the columns that are measured of rollouts (not of the canary)."""

    asked: tuple[frozenset[str], ...] = ()

    def measure(self, batch: Batch, columns: frozenset[str]) -> Batch:
        if len(batch.rows) > 1 and columns:
            self.asked += (columns,)
        return super().measure(batch, columns)


def run(
    folder: Path, name: str, defer: bool, sampling: Sampling = Sampling(6), changes: Any = None, **plan: Any
) -> Counting:
    method = method_of(name, **(changes or {}))
    roles = cast(method)
    learner = Counting(roles, {key: h.FREE for key, role in roles.items() if role.trained}, total=50, budget=64)
    go(folder, method, learner=learner, sampling=sampling, steps=3, defer=defer, **plan)
    return learner


KL = {"kl_in_loss": {"name": "k3", "coef": 0.1}}


@pytest.mark.parametrize(
    ("name", "changes"),
    [("grpo", {}), ("grpo", KL), ("reinforce", {"kl_in_reward": None}), ("dr_grpo", {}), ("online_dpo", {})],
)
def test_a_deferred_run_has_the_bits_of_a_measured_one(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    late, early = (run(tmp_path / str(defer), name, defer, changes=changes) for defer in (True, False))
    policy = {"old_logp", "old_entropy"}
    assert all(not (one & policy) for one in late.asked)
    assert all("old_logp" in one for one in early.asked)
    assert len(early.asked) == 3
    for key, value in h.weights(early)["policy"].items():
        assert torch.equal(h.weights(late)["policy"][key], value)
    lines = [
        [
            {k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_per"))}
            for line in read_metrics(tmp_path / one)
        ]
        for one in ("True", "False")
    ]
    assert lines[0] == lines[1]
    assert rollout(tmp_path / "True", 2) == rollout(tmp_path / "False", 2)


@pytest.mark.parametrize(
    ("name", "changes", "plan"),
    [
        ("grpo", {}, {"epochs": 2}),
        ("grpo", {}, {"mini_batch_size": 4}),
        ("rloo", {}, {}),
        ("grpo", {"importance_correction": "token_mask"}, {}),
        ("grpo", {"entropy": {"ent_coef": 0.01}}, {}),
    ],
    ids=["two epochs", "several mini-batches", "KL in the reward", "importance correction", "an entropy bonus"],
)
def test_what_something_reads_before_the_update_is_measured(
    tmp_path: Path, name: str, changes: dict[str, Any], plan: dict[str, Any]
) -> None:
    own = run(tmp_path, name, True, changes=changes, **plan)
    assert all("old_logp" in one for one in own.asked)
    assert own.asked


def test_a_sampler_with_other_weights_stops_the_run_before_any_weight_changes(tmp_path: Path) -> None:
    from whet.generate.local import LocalGenerator

    class Stale(LocalGenerator):
        def load_weights(self, weights: Any) -> None:
            self.version = weights.version

        def logprobs(self, ids: Any) -> Any:
            with torch.no_grad():
                return [
                    h.full_logits(learner.roles["policy"].model, one)[:-1]
                    .log_softmax(-1)
                    .gather(1, one[1:, None])[:, 0]
                    for one in ids
                ]

    method = method_of("grpo")
    roles = cast(method)
    learner = Counting(roles, {"policy": h.FREE}, total=50, budget=64)
    other = h.policy(seed=9)
    before = {key: value.clone() for key, value in h.weights(learner)["policy"].items()}
    with pytest.raises(RunStopped, match="generator and learner disagree"):
        go(tmp_path, method, learner=learner, generator=lambda role, *given: Stale(other, *given), steps=2)
    for key, value in before.items():
        assert torch.equal(h.weights(learner)["policy"][key], value)


def test_the_entropy_of_a_large_rollout_is_that_of_an_addressed_sample() -> None:
    rows = [h.row(seed, 3, 40) for seed in range(400)]
    batch = Batch.of(rows).with_columns(address=torch.tensor([address(7, number) >> 1 for number in range(len(rows))]))
    key = address(0, "entropy", 3) >> 1
    drawn, count = entropy_sample(batch, key), 400 * 40
    assert abs(int(drawn.sum()) - count / 8) < 5 * (count * 7 / 64) ** 0.5
    turn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(entropy_sample(batch.take(turn), key), drawn[turn])
    few = batch.take(range(SAMPLED // 40))
    assert torch.equal(entropy_sample(few, key), few["mask"])
