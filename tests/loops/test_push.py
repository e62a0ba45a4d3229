"""A push that is dropped, delayed, reordered or corrupted stops the run by name before the next update."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import helpers as h

from loops.helpers import cast, go, learner_of, method_of
from whet.data import Weights
from whet.errors import RunStopped
from whet.generate.local import LocalGenerator


class Snapshot:
    """The weights of a role as they are now."""

    def __init__(self, role: Any) -> None:
        self.named = [(name, value.clone()) for name, value in role.whole()]

    def whole(self) -> Any:
        yield from self.named


class Faulty(LocalGenerator):
    """Has its own copy of the weights, and something happens to what is pushed to it."""

    def __init__(self, role: Any, *given: Any, fault: Callable[["Faulty", Weights, list[Snapshot]], None]) -> None:
        super().__init__(h.policy(dtype=torch.float32, name="sampler"), *given, copy=True)
        self.fault, self.seen = fault, list[Snapshot]()

    def load_weights(self, weights: Weights) -> None:
        self.seen.append(Snapshot(weights.handle))
        if len(self.seen) < 3:  # the first push, and that of the first rollout, are whole
            super().load_weights(weights)
        else:
            self.fault(self, weights, self.seen)

    def take(self, version: int, snapshot: Any) -> None:
        super().load_weights(Weights(version, snapshot))


def dropped(own: Faulty, weights: Weights, seen: list[Snapshot]) -> None:
    pass


def dropped_but_said_to_be_there(own: Faulty, weights: Weights, seen: list[Snapshot]) -> None:
    own.version = weights.version


def delayed(own: Faulty, weights: Weights, seen: list[Snapshot]) -> None:
    own.take(weights.version - 1, seen[-2])


def delayed_under_the_new_name(own: Faulty, weights: Weights, seen: list[Snapshot]) -> None:
    own.take(weights.version, seen[-2])


def reordered(own: Faulty, weights: Weights, seen: list[Snapshot]) -> None:
    own.take(weights.version, seen[-1])
    own.take(weights.version - 1, seen[-2])


def one_tensor_zeroed(own: Faulty, weights: Weights, seen: list[Snapshot]) -> None:
    seen[-1].named = [(n, torch.zeros_like(v) if "1.mlp.down" in n else v) for n, v in seen[-1].named]
    own.take(weights.version, seen[-1])


def one_tensor_old(own: Faulty, weights: Weights, seen: list[Snapshot]) -> None:
    old = dict(seen[-2].named)
    seen[-1].named = [(n, old[n] if "embed" in n else v) for n, v in seen[-1].named]
    own.take(weights.version, seen[-1])


def no_number(own: Faulty, weights: Weights, seen: list[Snapshot]) -> None:
    seen[-1].named = [(n, v * torch.nan if "norm" in n else v) for n, v in seen[-1].named]
    own.take(weights.version, seen[-1])


def one_tensor_missing(own: Faulty, weights: Weights, seen: list[Snapshot]) -> None:
    seen[-1].named = seen[-1].named[:-1]
    own.take(weights.version, seen[-1])


FAULTS = [
    (dropped, "weights of version 1, the learner is at 2"),
    (dropped_but_said_to_be_there, "the generator|still scores the canary"),
    (delayed, "weights of version 1, the learner is at 2"),
    (delayed_under_the_new_name, "scores the canary"),
    (reordered, "weights of version 1, the learner is at 2"),
    (one_tensor_zeroed, "scores the canary"),
    (one_tensor_old, "scores the canary"),
    (no_number, "scores the canary"),
    (one_tensor_missing, "lacks model"),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS, ids=lambda one: getattr(one, "__name__", ""))
def test_a_push_that_goes_wrong_stops_the_run_before_the_next_update(fault: Any, said: str, tmp_path: Path) -> None:
    method = method_of("ppo")
    own = learner_of(cast(method), lr=0.05)

    def generator(*given: Any) -> Faulty:
        return Faulty(*given, fault=fault)

    with pytest.raises(RunStopped, match=said):
        go(tmp_path, method, learner=own, generator=generator, steps=4)
    assert own.version == 2  # two rollouts were learned from; the second one's weights never arrived


@pytest.mark.parametrize("rate", [3e-5, 1e-5])
def test_a_lost_push_is_seen_where_the_scores_are_still_within_the_bound(rate: float, tmp_path: Path) -> None:
    """The weights moved so little that old and new scores agree to the canary's bound; the old ones are nearer."""
    method = method_of("ppo")

    def generator(*given: Any) -> Faulty:
        return Faulty(*given, fault=dropped_but_said_to_be_there)

    with pytest.raises(RunStopped, match="step 2: after the push the generator still scores"):
        go(tmp_path, method, learner=learner_of(cast(method), lr=rate), generator=generator, steps=4)


def test_a_push_that_arrives_is_not_suspected(tmp_path: Path) -> None:
    method = method_of("ppo")

    def whole(own: Faulty, weights: Weights, seen: list[Snapshot]) -> None:
        own.take(weights.version, seen[-1])

    for rate in (0.05, 1e-4, 1e-7):
        go(
            tmp_path / str(rate), method, learner=learner_of(cast(method), lr=rate), steps=3,
            generator=lambda *given: Faulty(*given, fault=whole),
        )  # fmt: skip
