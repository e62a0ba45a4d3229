"""Frozen roles in CPU memory between uses: the numbers stay, each reading moves the weights once there and once back."""

from typing import Any

import pytest
import torch
from models import helpers as h

from whet.data import Batch
from whet.errors import RecipeError
from whet.learner.local import LocalLearner
from whet.methods.options import Optim
from whet.models.roles import Role
from whet.runs import config, learners
from whet.runs import recipe as fields

OPTIM = Optim(lr=0.02, schedule="constant", max_grad_norm=1e30)
COMPUTES = torch.device("cpu:0")
"""A name of the device that differs from "cpu", so that moves are made and seen on a machine without a GPU."""


def roles() -> dict[str, Role]:
    reward = h.scorer(name="reward", seed=2)
    reward.trained = False
    return {"policy": h.policy(), "reference": h.policy(name="reference", seed=1), "reward": reward}


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    moves: list[tuple[str, str]] = []
    real = Role._move

    def move(self: Role, device: torch.device) -> None:
        moves.append((self.name, str(device)))
        real(self, device)

    monkeypatch.setattr(Role, "_move", move)
    return moves


def learner(own: dict[str, Role], **more: Any) -> LocalLearner:
    for role in own.values():
        role.home = COMPUTES if more and not role.trained else None
    return LocalLearner(own, {"policy": OPTIM}, total=10, budget=20, **more)


def test_a_reading_of_many_micro_batches_moves_a_frozen_role_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = watched(monkeypatch)
    batch, columns = Batch.of(h.rows()), frozenset({"ref_logp", "old_logp"})
    expected = learner(roles()).measure(batch, columns)
    assert moves == []
    own = learner(roles(), offload_frozen=True)
    assert moves == [("reference", "cpu"), ("reward", "cpu")]
    moves.clear()
    got = own.measure(batch, columns)
    assert moves == [("reference", "cpu:0"), ("reference", "cpu")]
    for name in columns:
        assert torch.equal(got[name], expected[name])
    moves.clear()
    assert own.columns("reward", batch, frozenset({"score"}))["score"].shape == (len(batch.rows),)
    assert moves == [("reward", "cpu:0"), ("reward", "cpu")]


def test_an_exact_kl_has_the_reference_present_while_the_policy_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = watched(monkeypatch)
    batch = Batch.of(h.rows()[:2])
    expected = learner(roles()).columns("policy", batch, frozenset({"exact_kl"}))
    own = learner(roles(), offload_frozen=True)
    moves.clear()
    got = own.columns("policy", batch, frozenset({"exact_kl"}))
    assert torch.equal(got["exact_kl"], expected["exact_kl"])
    assert moves[0] == ("reference", "cpu:0")
    assert moves[-1] == ("reference", "cpu")
    assert {name for name, _ in moves} == {"reference"}


def test_a_role_goes_back_when_its_reading_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = watched(monkeypatch)
    own = learner(roles(), offload_frozen=True)
    moves.clear()
    monkeypatch.setattr("whet.learner.local.read", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        own.measure(Batch.of(h.rows()), frozenset({"ref_logp"}))
    assert moves == [("reference", "cpu:0"), ("reference", "cpu")]


def test_roles_on_the_model_of_a_trained_one_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = watched(monkeypatch)
    own = h.trunk()
    LocalLearner(own, {n: OPTIM for n, role in own.items() if role.trained}, total=10, budget=20, offload_frozen=True)
    assert moves == []


@pytest.mark.parametrize("backend", ["auto", "local", "ddp"])
def test_it_is_an_option_of_learners_that_hold_whole_models(backend: str) -> None:
    given = [("model", "m"), ("data", "rows.jsonl"), ("learner.backend", backend), ("learner.offload_frozen", True)]
    recipe = config.resolve(fields.OfflineRecipe, "sft", None, given)
    found, _ = learners.chosen_of(recipe, 1)
    assert found.options.offload_frozen is True
    if backend != "local":
        assert learners.chosen_of(recipe, 2)[1].name == "ddp"


def test_learners_that_shard_do_not_have_it() -> None:
    given = [("model", "m"), ("data", "rows.jsonl"), ("learner.backend", "fsdp"), ("learner.offload_frozen", True)]
    recipe = config.resolve(fields.OfflineRecipe, "sft", None, given)
    with pytest.raises(RecipeError, match="offload_frozen"):
        learners.chosen_of(recipe, 2)


def test_the_reference_stays_present_during_an_update_with_an_exact_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = watched(monkeypatch)
    own = learner(roles(), offload_frozen=True)
    reads: list[bool] = []
    monkeypatch.setattr(own, "_forward", lambda *_, **__: (reads.append(len(moves) % 2 == 1), ({}, {}))[1])
    moves.clear()
    term = type("Term", (), {"reads": lambda self: {"exact_kl"}})()
    own.evaluate([(term, None, None)])  # type: ignore[list-item]
    assert reads == [True]
    assert moves == [("reference", "cpu:0"), ("reference", "cpu")]
