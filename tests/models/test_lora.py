"""Adapters: exactly the base until trained, one trunk for all roles, and folders that other tools read alike."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from whet.data import Batch
from whet.errors import ModelError
from whet.learner.local import LocalLearner
from whet.methods import compose
from whet.methods.compose import SFT
from whet.methods.options import LoRA
from whet.models import load, lora
from whet.models.readers import read
from whet.models.roles import Role, readout_of

from . import helpers as h

LOGP = frozenset({"logp"})
DIALS = LoRA(rank=4, alpha=8.0)


def logp(role: Role) -> torch.Tensor:
    return read(role, Batch.of(h.rows()), LOGP)["logp"].detach()


def train(roles: dict[str, Role], name: str = "policy", updates: int = 3) -> LocalLearner:
    """A few updates of one role."""
    terms = SFT.terms if name == "policy" else compose.reward("k_way").terms
    batch = Batch.of(h.rows() if name == "policy" else h.rankings())
    own = LocalLearner({name: roles[name]}, {name: h.FREE}, total=updates)
    for _ in range(updates):
        own.update([(term, batch, batch.counts()) for term in terms])
    return own


def adapted(kind: str, folder: Path, dtype: str = "float32") -> dict[str, Role]:
    """A policy with a fresh adapter on a model loaded from a folder."""
    tiny.folder(folder, kind)
    model = load.load_causal_lm(load.ModelSource(str(folder), dtype=dtype, device="cpu"))
    return {
        "policy": Role("policy", model, True, wrapped=lora.attach(model, DIALS, ("policy",), seed=5), adapter="policy")
    }


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_a_fresh_adapter_is_the_base_to_the_bit(kind: str) -> None:
    plain = h.policy(kind, dtype=torch.float32)
    roles = h.trunk(kind)
    assert torch.equal(logp(roles["policy"]), logp(plain))
    assert torch.equal(logp(roles["reference"]), logp(plain))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_the_reference_on_the_trunk_stays_the_base_to_the_bit_while_the_policy_learns(kind: str) -> None:
    base, roles = logp(h.policy(kind, dtype=torch.float32)), h.trunk(kind)
    train(roles)
    assert (logp(roles["policy"]) - base).abs().max() > 0.1
    assert torch.equal(logp(roles["reference"]), base)
    assert (logp(roles["policy"]) - base).abs().max() > 0.1  # in this order too: switching back works


def test_the_critic_is_not_the_policy_and_neither_moves_the_other() -> None:
    roles = h.trunk()
    value = read(roles["critic"], Batch.of(h.rows()), frozenset({"value"}))["value"].detach()
    train(roles)
    assert torch.equal(read(roles["critic"], Batch.of(h.rows()), frozenset({"value"}))["value"].detach(), value)


def test_gradients_reach_only_the_parameters_of_the_active_role() -> None:
    roles = h.trunk(dtype=torch.float64)
    model = roles["policy"].model
    for name, column in (("policy", "logp"), ("critic", "value")):
        model.zero_grad()
        roles["critic"].head.zero_grad()  # type: ignore[union-attr]
        train(roles) if name == "critic" else None
        for parameter in roles["policy"].parameters().values():
            parameter.grad = None
        read(roles[name], Batch.of(h.rows()), frozenset({column}))[column].sum().backward()
        reached = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached
        assert all(f".{name}." in key and "lora_" in key for key in reached)
        assert (roles["critic"].head.weight.grad is not None) == (name == "critic")  # type: ignore[union-attr]


def test_one_update_of_policy_and_critic_on_the_trunk_has_both_gradients() -> None:
    """As with separate models: neither role's pass switches off the other's gradient."""
    roles = h.trunk(dtype=torch.float64)
    names = ("old_logp", "old_value", "returns", "advantage")
    batch = Batch.of(h.rows())
    batch = batch.with_columns(
        **{
            name: torch.randn(batch["mask"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
            for i, name in enumerate(names)
        }
    )
    terms = compose.online("ppo").terms
    both = h.Recorder(h.clone(roles), {"policy": h.FREE, "critic": h.FREE}, total=2)
    step = both.update([(term, batch, batch.counts()) for term in terms])
    for term in terms:
        alone = h.Recorder(h.clone(roles), {"policy": h.FREE, "critic": h.FREE}, total=2)
        alone.update([(term, batch, batch.counts())])
        assert torch.equal(alone.grads[term.role], both.grads[term.role])
        assert step.grad_norm[term.role] > 1e-4


def test_a_role_owns_its_adapter_and_head_and_nothing_twice() -> None:
    roles = h.trunk()
    names = {name: set(role.parameters()) for name, role in roles.items()}
    assert not names["reference"]
    assert not names["policy"] & names["critic"]
    assert names["critic"] - {"head.weight"} == {name.replace("policy", "critic") for name in names["policy"]}
    tied = h.policy(dtype=torch.float32)
    owned = [p.data_ptr() for p in tied.parameters().values()]
    assert len(owned) == len(set(owned))
    assert sum(p.numel() for p in tied.parameters().values()) == sum(p.numel() for p in tied.model.parameters())


def test_fresh_adapters_are_the_same_at_the_same_seed_and_others_at_another() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        model = tiny.causal_lm()
        role = Role("policy", model, True, wrapped=lora.attach(model, DIALS, ("policy",), seed=seed), adapter="policy")
        return {key: value.detach() for key, value in role.parameters().items() if "lora_A" in key}

    first, again, other = drawn(1), drawn(1), drawn(2)
    torch.manual_seed(99)
    for key, value in first.items():
        assert torch.equal(value, again[key])
        assert not torch.equal(value, other[key])
        assert float(value.abs().max()) <= value.shape[1] ** -0.5


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("merge", [True, False])
def test_a_trained_adapter_is_reloaded_by_other_tools_to_the_same_log_probs(
    tmp_path: Path, kind: str, merge: bool
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    roles = adapted(kind, tmp_path / "base")
    train(roles)
    expected = logp(roles["policy"])
    roles["policy"].export(tmp_path / "out", tiny.tokenizer(), merge=merge)
    assert torch.equal(logp(roles["policy"]), expected)  # exporting changes nothing
    if merge:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    else:
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out"
        ).eval()
    for number, row in enumerate(h.rows()):
        own = (
            h.full_logits(model, row.ids)
            .log_softmax(-1)[row.start - 1 : -1]
            .gather(1, row.ids[row.start :, None])[:, 0]
        )
        torch.testing.assert_close(expected[number, : row.response], own * row.mask, rtol=1e-4, atol=1e-4)
    again = load.load_causal_lm(load.ModelSource(str(tmp_path / "out"), device="cpu"))
    torch.testing.assert_close(logp(Role("policy", again, False)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_a_trained_reward_adapter_is_reloaded_to_the_same_scores(tmp_path: Path, kind: str, merge: bool) -> None:
    tiny.folder(tmp_path / "base", kind)
    tokenizer = tiny.tokenizer()
    model = load.load_scorer(load.ModelSource(str(tmp_path / "base"), device="cpu"), tokenizer, seed=0)
    wrapped = lora.attach(model, DIALS, ("reward",), seed=5, scorer=True)
    role = Role("reward", model, True, wrapped=wrapped, adapter="reward", readout="mean")
    before = role.head.weight.detach().clone()  # type: ignore[union-attr]
    train({"reward": role}, "reward")
    assert not torch.equal(before, role.head.weight.detach())  # type: ignore[union-attr]
    batch, names = Batch.of(h.rows()), frozenset({"score"})
    expected = read(role, batch, names)["score"].detach()
    role.export(tmp_path / "out", tokenizer, merge=merge)
    again = load.load_scorer(load.ModelSource(str(tmp_path / "out"), device="cpu"), tokenizer)
    got = read(Role("reward", again, False, **readout_of(str(tmp_path / "out"))), batch, names)["score"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_saved_reward_adapter_lies_on_a_causal_trunk_of_the_same_base(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "base")
    source = load.ModelSource(str(tmp_path / "base"), device="cpu")
    model = load.load_scorer(source, tiny.tokenizer(), seed=0)
    role = Role(
        "reward", model, True, wrapped=lora.attach(model, DIALS, ("reward",), seed=5, scorer=True), adapter="reward"
    )
    train({"reward": role}, "reward")
    expected = read(role, Batch.of(h.rows()), frozenset({"score"}))["score"].detach()
    role.export(tmp_path / "out", merge=False)
    policy = adapted("qwen3", tmp_path / "base")["policy"]
    head = lora.add_from_folder(policy.wrapped, "critic", str(tmp_path / "out"))
    critic = Role("critic", policy.model, True, wrapped=policy.wrapped, adapter="critic", head=head)
    got = read(critic, Batch.of(h.rows()), frozenset({"score"}))["score"].detach()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "base", "llama")
    model = load.load_scorer(load.ModelSource(str(tmp_path / "base"), device="cpu"), tiny.tokenizer())
    role = Role(
        "reward", model, True, wrapped=lora.attach(model, DIALS, ("reward",), seed=5, scorer=True), adapter="reward"
    )
    role.export(tmp_path / "out", merge=False)
    other: Any = h.trunk("gpt2")["policy"]
    with pytest.raises(ModelError, match=r"does not fit|expected a reward adapter"):
        lora.add_from_folder(other.wrapped, "late", str(tmp_path / "out"))


def test_targets_that_are_not_there_are_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.lora"):
        lora.attach(tiny.causal_lm(), LoRA(targets=("nowhere",)), ("policy",), seed=0)
