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

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")
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
    with pytest.raises(ModelError, match=rf"trained on {tmp_path / 'base'}, .* other weights"):
        lora.add_from_folder(other.wrapped, "late", str(tmp_path / "out"))


def test_targets_that_are_not_there_are_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.lora"):
        lora.attach(tiny.causal_lm(), LoRA(targets=("nowhere",)), ("policy",), seed=0)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 7, 8, 4, 14, 9]])).logits


def sharded(role: Role, folder: Path) -> None:
    """Export as a learner does whose weights are in several processes."""
    role.shell = role.model
    role.export(folder)


def unsharded(role: Role, folder: Path) -> None:
    role.export(folder)


def moved(folder: Path, kind: str, *targets: str) -> Role:
    """A policy whose adapter on these modules has trained; every one of its matrices has moved."""
    tiny.folder(folder, kind)
    model = load.load_causal_lm(load.ModelSource(str(folder), device="cpu"))
    wrapped = lora.attach(model, LoRA(rank=4, alpha=8.0, targets=targets), ("policy",), seed=5)
    role = Role("policy", model, True, wrapped=wrapped, adapter="policy")
    before = {name: value.detach().clone() for name, value in role.parameters().items()}
    train({"policy": role})
    assert all(not torch.equal(value, before[name]) for name, value in role.parameters().items())
    assert {name.split(".lora_")[0].split(".")[-1] for name in before} == {*targets}
    return role


TARGETS = [("lm_head",), ("embed_tokens",), ("embed_tokens", "lm_head", "q_proj"), ("wte", "wpe", "lm_head", "c_attn")]


@pytest.mark.parametrize("write", [unsharded, sharded])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_adapters_on_embeddings_and_head_train_and_are_saved_as_trained(
    tmp_path: Path, targets: tuple[str, ...], kind: str, write: Any
) -> None:
    """qwen3 and gpt2 have tied embeddings, which one merged weight cannot stand for."""
    from transformers import AutoModelForCausalLM

    if ("wte" in targets) != (kind == "gpt2"):
        targets = tuple({"embed_tokens": "wte"}.get(one, one) for one in targets if one in ("lm_head", "embed_tokens"))
    tied = kind != "llama"
    role = moved(tmp_path / "base", kind, *targets)
    with role.active():
        expected = logits(role.model)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))).abs().max() > 0.1
    assert role.unties == tied
    write(role, tmp_path / "out")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4
    )
    assert not load._configuration(str(tmp_path / "out")).tie_word_embeddings
    plain = tiny.causal_lm(kind, tie_word_embeddings=False)
    plain.load_state_dict(dict(role.whole()))  # strict: what engines get, both weights under their names
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_an_adapter_on_embeddings_and_head_is_reloaded_by_peft(tmp_path: Path, kind: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    role = moved(tmp_path / "base", kind, "embed_tokens", "lm_head", "q_proj")
    with role.active():
        expected = logits(role.model)
    role.export(tmp_path / "out", merge=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, tmp_path / "out")), expected, rtol=1e-4, atol=1e-4
    )


def test_a_fresh_adapter_on_embeddings_is_the_base_and_depends_on_the_seed_only() -> None:
    from scipy.stats import kstest

    plain, drawn = logits(tiny.causal_lm("llama", vocabulary=200)), []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        model = tiny.causal_lm("llama", vocabulary=200)
        wrapped = lora.attach(model, LoRA(rank=16, targets=("embed_tokens",)), ("policy",), seed=seed)
        assert torch.equal(logits(model), plain)
        own = Role("policy", model, True, wrapped=wrapped, adapter="policy").parameters()
        drawn.append(next(value.detach() for name, value in own.items() if "lora_embedding_B" in name))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert kstest(drawn[0].flatten().numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("targets", ["all-linear", ("gate_proj", "up_proj", "q_proj")])
def test_adapters_on_experts_are_published_and_saved_as_trained(tmp_path: Path, targets: Any) -> None:
    """transformers keeps experts in one parameter, which peft adapts without a module of its own."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    given = tiny.config("qwen3", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16).to_dict()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **{key: value for key, value in given.items() if key not in ("model_type", "architectures")}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = load.load_causal_lm(load.ModelSource(str(tmp_path / "base"), device="cpu"))
    wrapped = lora.attach(model, LoRA(rank=2, alpha=8.0, targets=targets), ("policy",), seed=5)
    role = Role("policy", model, True, wrapped=wrapped, adapter="policy")
    assert any("experts" in name for name in role.parameters())
    train({"policy": role})
    with role.active():
        expected = logits(model)
    twin = AutoModelForCausalLM.from_config(config)
    assert (logits(twin) - expected).abs().max() > 0.1
    left = twin.load_state_dict(dict(role.whole()), strict=False)
    assert not left.unexpected_keys
    assert not set(left.missing_keys) - {"lm_head.weight"}  # tied
    torch.testing.assert_close(logits(twin.eval()), expected, rtol=1e-4, atol=1e-4)
    for write, folder in ((unsharded, tmp_path / "out"), (sharded, tmp_path / "shards")):
        write(role, folder)
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), expected, rtol=1e-4, atol=1e-4)
    role.export(tmp_path / "adapter", merge=False)
    back = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(back), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [("q_proj", "nowhere"), ("q_proj", "input_layernorm"), ("_proj",), ("score",)])
def test_targets_of_which_one_matches_nothing_are_refused(targets: tuple[str, ...]) -> None:
    """peft refuses only if none matches: a misspelt name beside another would be left out without a word."""
    with pytest.raises(ModelError, match=r"model\.lora\.targets"):
        lora.attach(tiny.causal_lm(), LoRA(targets=targets), ("policy",), seed=0)


def test_a_saved_reward_adapter_of_any_kind_is_exported_as_the_critic_that_it_became(tmp_path: Path) -> None:
    """Merged by peft, or refused where the learner's weights are in several processes."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    tiny.folder(tmp_path / "base")
    given = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["norm"], use_dora=True)
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    get_peft_model(scorer, given).save_pretrained(tmp_path / "rm")
    policy = adapted("qwen3", tmp_path / "base")["policy"]
    head = lora.add_from_folder(policy.wrapped, "reward", str(tmp_path / "rm"))
    critic = Role("reward", policy.model, True, wrapped=policy.wrapped, adapter="reward", head=head)
    assert {"lora_magnitude_vector", "modules_to_save"} <= {
        part for name in critic.parameters() for part in name.split(".")
    }
    train({"policy": policy})
    train({"reward": critic}, "reward")
    with policy.active():
        expected = logits(policy.model)
    with critic.active():
        pass  # the last active adapter is not the exported one
    policy.export(tmp_path / "out")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4
    )
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    twin.load_state_dict(dict(policy.whole()), strict=False)
    torch.testing.assert_close(logits(twin), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="not exported on its own"):
        critic.export(tmp_path / "critic")
    with pytest.raises(ModelError, match="DoRA of the adapter reward"):
        list(critic.whole())


def test_a_resume_with_another_reward_adapter_on_the_trunk_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from whet.errors import CheckpointError

    tiny.folder(tmp_path / "base")
    for seed in (1, 2):
        torch.manual_seed(seed)
        scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
        given = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(scorer, given).save_pretrained(tmp_path / str(seed))

    def learner(seed: int) -> LocalLearner:
        policy = adapted("qwen3", tmp_path / "base")["policy"]
        head = lora.add_from_folder(policy.wrapped, "reward0", str(tmp_path / str(seed)))
        reward = Role("reward0", policy.model, False, wrapped=policy.wrapped, adapter="reward0", head=head)
        return LocalLearner({"policy": policy, "reward0": reward}, {"policy": h.FREE}, total=3)

    learner(1).save(tmp_path / "checkpoint")
    learner(1).load(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError):
        learner(2).load(tmp_path / "checkpoint")
