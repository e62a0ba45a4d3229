"""Optimizers of bitsandbytes: what they train, what their moments are, and that a resume is exact."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import tiny
import torch
from models import helpers as h

from whet.data import Batch
from whet.errors import CheckpointError, RecipeError
from whet.learner.local import LocalLearner
from whet.learner.state import optimizers_of
from whet.methods.compose import SFT
from whet.methods.options import Optim
from whet.models.roles import Role
from whet.runs import config, learners
from whet.runs import recipe as fields

KINDS = ("adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
OPTIM = Optim(lr=0.01, schedule="constant", max_grad_norm=1e30, weight_decay=0.1)
WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""Matrices of 4,096 numbers or more, which is where 8 bits begin."""
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def policy(seed: int = 0) -> Role:
    return h.policy("llama", dtype=torch.float32, seed=seed, **WIDE)


def learner(kind: str, seed: int = 0) -> LocalLearner:
    return LocalLearner({"policy": policy(seed)}, {"policy": replace(OPTIM, kind=kind)}, total=10, budget=80)


def update(own: LocalLearner) -> None:
    batch = Batch.of(h.rows())
    own.update([(term, batch, batch.counts()) for term in SFT.terms])


def states(own: LocalLearner) -> dict[str, dict[str, Any]]:
    """The states of each weight, by the name of the weight."""
    names = {id(p): name for name, p in own.roles["policy"].parameters().items()}
    return {names[id(p)]: dict(one) for optimizer, _ in own._optimizers["policy"] for p, one in optimizer.state.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_library(kind: str) -> None:
    """Each weight as if the class of the library had it alone, from the same gradient."""
    own = learner(kind)
    before = {name: p.detach().clone() for name, p in own.roles["policy"].parameters().items()}
    batch = Batch.of(h.rows())
    own.forward_backward([(term, batch, batch.counts()) for term in SFT.terms])
    gradients = {name: p.grad.clone() for name, p in own.roles["policy"].parameters().items()}
    own.optim_step()
    embedding = own.roles["policy"].model.get_input_embeddings().weight
    eight = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "AdamW8bit", "paged_adamw_32bit": "AdamW"}[kind]
    for name, after in own.roles["policy"].parameters().items():
        twin = torch.nn.Parameter(before[name])
        twin.grad = gradients[name]
        library = "AdamW" if after is embedding else eight
        decay = 0.1 if twin.ndim > 1 else 0.0
        getattr(bitsandbytes.optim, library)([twin], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay).step()
        torch.testing.assert_close(after, twin, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_moments_of_matrices_have_8_bits_and_those_of_embeddings_32(kind: str) -> None:
    own = learner(kind)
    update(own)
    small = 0
    for name, one in states(own).items():
        first = one.get("state1", one.get("exp_avg"))
        large = own.roles["policy"].parameters()[name].numel() >= 4096 and "embed" not in name
        assert first.dtype is (torch.uint8 if large else torch.float32), name
        small += large
    assert small >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_gives_the_weights_of_the_uninterrupted_run_to_the_bit(kind: str, tmp_path: Path) -> None:
    whole = learner(kind)
    update(whole)
    update(whole)
    whole.save(tmp_path)
    resumed = learner(kind, seed=8)
    resumed.load(tmp_path)
    for own in (whole, resumed):
        update(own)
        update(own)
    h.equal_weights(h.weights(whole), h.weights(resumed))
    one, other = states(whole), states(resumed)
    assert {name: type(value["step"]) for name, value in one.items()} == {
        name: type(value["step"]) for name, value in other.items()
    }


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    own = learner("adamw_8bit")
    update(own)
    own.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"its optimizers are .*AdamW8bit"):
        learner("adamw").load(tmp_path)


def test_without_8_bits_there_is_one_optimizer() -> None:
    for kind, name in (("adamw", "AdamW"), ("paged_adamw_32bit", "PagedAdamW")):
        assert [type(one).__name__ for one, _ in optimizers_of(policy(), replace(OPTIM, kind=kind))] == [name]


@pytest.mark.parametrize(("backend", "kind"), [("fsdp", "adamw_8bit"), ("zero2", "paged_adamw_8bit")])
def test_a_learner_that_shards_weights_refuses_it(backend: str, kind: str) -> None:
    given = [("model", "m"), ("data", "rows.jsonl"), ("out", "o"), ("optim.kind", kind)]
    recipe = config.resolve(fields.OfflineRecipe, "sft", None, [*given, ("learner.backend", backend)])
    with pytest.raises(
        RecipeError, match=f"optim.kind: {kind} needs whole matrices, but {backend} shards them; use adamw or ddp"
    ):
        learners.chosen_of(recipe, 2)


def test_positions_of_gpt2_keep_32_bits_too() -> None:
    own = Role("policy", tiny.causal_lm("gpt2", hidden_size=64, max_position_embeddings=128), True)
    (eight, rest) = optimizers_of(own, replace(OPTIM, kind="adamw_8bit"))
    names = {id(p): name for name, p in own.parameters().items()}
    kept = {names[id(p)] for group in rest[0].param_groups for p in group["params"]}
    assert {name.split(".")[1] for name in kept} == {"wte", "wpe"}
    assert type(eight[0]).__name__ == "AdamW8bit"


def test_the_package_is_required_for_the_critic_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.extras.installed", lambda module: False)
    given = [("model", "m"), ("data", "rows.jsonl"), ("reward", "r"), ("optim.kind", "muon")]
    recipe = config.resolve(fields.OnlineRecipe, "ppo", None, [*given, ("critic.optim.kind", "adamw_8bit")])
    with pytest.raises(RecipeError, match=r"optim.kind: adamw_8bit needs the package bitsandbytes"):
        learners.chosen_of(recipe, 1)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.extras.installed", lambda module: False)
    given = [("model", "m"), ("data", "rows.jsonl"), ("out", "o"), ("optim.kind", "adamw_8bit")]
    recipe = config.resolve(fields.OfflineRecipe, "sft", None, given)
    with pytest.raises(RecipeError, match=r"optim.kind: adamw_8bit needs the package bitsandbytes.*pip install"):
        learners.chosen_of(recipe, 1)
