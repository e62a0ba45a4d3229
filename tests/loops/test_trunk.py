"""One trunk against separate copies: the same adapters on models of their own give the same losses and gradients."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import helpers as h

from loops import helpers as o
from loops.helpers import unpaired
from whet.loops import offline
from whet.loops.record import RunFolder
from whet.methods import catalogue, compose
from whet.models.roles import Role

PAIRS = {name: h.pairs for name in catalogue.PREFERENCE if name != "kto"}


def trunk() -> dict[str, Role]:
    """Policy and critic as adapters on one model, moved off their start; the reference is the model without."""
    roles = h.trunk(dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for role in (roles["policy"], roles["critic"]):
            for name, parameter in role.parameters().items():
                if "lora_B" in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return roles


def copies(roles: dict[str, Role]) -> dict[str, Role]:
    """Each role with a whole copy of the trunk to itself; the reference is the plain base without any adapter."""
    out = {}
    for name, role in roles.items():
        wrapped, head = copy.deepcopy((role.wrapped, role.head))
        model = wrapped.get_base_model()
        if name == "reference":
            out[name] = Role(name, wrapped.unload(), False)
        else:
            out[name] = Role(name, model, True, wrapped=wrapped, adapter=name, head=head)
    return out


def agree(ours: o.Recorder, theirs: o.Recorder) -> None:
    assert ours.step.losses.keys() == theirs.step.losses.keys()
    for name, loss in ours.step.losses.items():
        assert theirs.step.losses[name] == pytest.approx(loss, rel=1e-6, abs=1e-9), name
    for name, gradient in ours.grads.items():
        assert gradient.norm() > 1e-6
        assert (gradient - theirs.grads[name]).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("name", o.ONLINE)
def test_a_trunk_gives_the_losses_and_gradients_of_separate_copies(name: str, tmp_path: Path) -> None:
    method = o.method_of(name)
    runs = []
    for number, roles in enumerate((trunk(), copies(trunk()))):
        own = {key: role for key, role in roles.items() if key in method.roles()}
        reward = [h.TableReward(lambda ids: 0.5 + 0.5 * len(ids) % 1.5)] * (2 if name == "gdpo" else 1)
        if name == "gdpo":
            method = o.method_of(name, weights=(1.0, 0.5))
            reward[1] = h.TableReward(lambda ids: 0.25 * (sum(ids) % 5))
        ptx = h.rows() if name == "instructgpt" else ()
        plan = {"ptx_batch": 4} if ptx else {}
        if name == "grpo_process":
            reward = h.TableReward(lambda ids: 0.5 * len(ids) - 0.25 * (sum(ids) % 5), dense=True)
        epochs = 2 if method.has_ratio() and name != "gspo" else 1  # gspo's clip would stop all of the second
        run = o.go(tmp_path / str(number), method, own, reward=reward, ptx=ptx, epochs=epochs, **plan)
        runs.append(run)
    agree(*runs)


@pytest.mark.parametrize("name", catalogue.PREFERENCE)
def test_a_trunk_gives_what_separate_copies_give_on_preferences(name: str, tmp_path: Path) -> None:
    objective = compose.preference(name)
    runs = []
    for number, roles in enumerate((trunk(), copies(trunk()))):
        used = ("policy", "reference") if "ref_logp" in objective.reads() else ("policy",)
        learner = o.Recorder(
            {key: roles[key] for key in used}, {"policy": replace(h.FREE, lr=0.01)}, total=4, budget=64
        )
        elements = PAIRS[name]() if name in PAIRS else unpaired()
        offline.train(
            objective,
            learner,
            [elements],
            offline.OfflinePlan(2, len(elements)),
            RunFolder(tmp_path / str(number)),
            quiet=True,
        )
        runs.append(learner)
    agree(*runs)
