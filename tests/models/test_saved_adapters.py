"""Adapters that peft made: the numbers of peft's own forward, merged, on a shared trunk, and after another save; or words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from whet.data import Batch
from whet.errors import ModelError
from whet.methods.options import LoRA
from whet.models import load, lora, saved_adapters
from whet.models.readers import read
from whet.models.roles import Role

from . import helpers as h

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
IDS = torch.tensor([[3, 7, 8, 4, 14, 9]])
SMALL = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
SCORES = frozenset({"score"})


def source(path: Path) -> load.ModelSource:
    return load.ModelSource(str(path), device="cpu")


def adapter(
    folder: Path, base: Path, *, scorer: bool = False, config: Any = None, rows: int = 0, **options: Any
) -> Path:
    """Save an adapter of random weights as peft does it."""
    if scorer:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows)
    task = "SEQ_CLS" if scorer else "CAUSAL_LM"
    torch.manual_seed(1)
    wrapped = get_peft_model(model, config or LoraConfig(task_type=task, **(SMALL | options)))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder, save_embedding_layers=bool(rows))
    return folder


def by_peft(folder: Path, base: Path, ids: torch.Tensor = IDS, *, scorer: bool = False, rows: int = 0) -> torch.Tensor:
    """The logits of a fresh peft model of this folder, in eval mode."""
    if scorer:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, folder).eval()(ids).logits


def on_trunk(base: Path, folder: Path) -> tuple[Role, Role, Role]:
    """Policy, reference and reward on one trunk."""
    model = load.load_causal_lm(source(base))
    wrapped = lora.attach(model, LoRA(rank=4, alpha=8.0), ("policy",), seed=5)
    policy = Role("policy", model, True, wrapped=wrapped, adapter="policy")
    reference = Role("reference", model, False, wrapped=wrapped)
    head = lora.add_from_folder(wrapped, "reward0", str(folder))
    return policy, reference, Role("reward0", model, False, wrapped=wrapped, adapter="reward0", head=head)


def score(role: Role) -> torch.Tensor:
    with torch.no_grad():
        return read(role, Batch.of([h.Row(row, 1, torch.ones(len(row) - 1, dtype=torch.bool)) for row in IDS]), SCORES)[
            "score"
        ]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 64}},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True},
    "one layer": {"layers_to_transform": [1]},
    "a norm": {"modules_to_save": ["norm"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole embeddings": {"modules_to_save": ["embed_tokens"]},
    "dropout": {"lora_dropout": 0.5},
    "gaussian": {"init_lora_weights": "gaussian"},
    "a pattern": {"target_modules": r".*layers\.1.*(q|o)_proj"},
}
CHANGE_THE_BASE: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "bias": {"bias": "all"},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 4]}},
}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("name", KINDS | CHANGE_THE_BASE)
def test_a_reward_adapter_gives_the_score_of_peft_merged_and_on_a_trunk(tmp_path: Path, name: str, kind: str) -> None:
    base = tiny.folder(tmp_path / "base", kind)
    folder = adapter(tmp_path / "rm", base, scorer=True, **(KINDS | CHANGE_THE_BASE)[name])
    expected = by_peft(folder, base, scorer=True)[:, 0]
    torch.testing.assert_close(
        score(Role("r", load.load_scorer(source(folder)), False)), expected, rtol=1e-4, atol=1e-4
    )
    if name in CHANGE_THE_BASE:
        with pytest.raises(ModelError, match="a shared trunk cannot carry this adapter"):
            on_trunk(base, folder)
        return
    plain = by_plain(base)
    policy, reference, reward = on_trunk(base, folder)
    torch.testing.assert_close(score(reward), expected, rtol=1e-4, atol=1e-4)
    for other in (policy, reference):  # a fresh policy is the base; neither sees the reward's modules
        with torch.no_grad(), other.active():
            torch.testing.assert_close(other.logits(IDS), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score(reward), expected, rtol=1e-4, atol=1e-4)


def by_plain(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        *KINDS.values(),
        *CHANGE_THE_BASE.values(),
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_a_policy_adapter_is_merged_as_peft_reads_it_and_saved_so(
    tmp_path: Path, options: dict[str, Any], kind: str
) -> None:
    base = tiny.folder(tmp_path / "base", kind)
    folder = adapter(tmp_path / "policy", base, **options)
    expected = by_peft(folder, base)
    role = Role("policy", load.load_causal_lm(source(folder)), True)
    with torch.no_grad():
        torch.testing.assert_close(role.logits(IDS), expected, rtol=1e-4, atol=2e-4)
    role.export(tmp_path / "out")
    torch.testing.assert_close(by_plain(tmp_path / "out"), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    ],
    ids=["ia3", "loha"],
)
def test_other_kinds_of_adapters_are_merged_as_peft_reads_them(tmp_path: Path, config: Any) -> None:
    base = tiny.folder(tmp_path / "base", "llama")
    folder = adapter(tmp_path / "policy", base, config=config)
    with torch.no_grad():
        got = load.load_causal_lm(source(folder))(IDS).logits
    torch.testing.assert_close(got, by_peft(folder, base), rtol=1e-4, atol=1e-4)


def test_prompts_are_no_weights_and_are_refused(tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base", "llama")
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ModelError, match="PROMPT_TUNING adds inputs and no weights"):
        load.load_causal_lm(source(adapter(tmp_path / "policy", base, config=prompts)))


def test_a_merge_that_is_not_the_adapters_forward_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging into a weight that the head shares changes both; the comparison on a few tokens must see it."""
    folder = adapter(tmp_path / "policy", tiny.folder(tmp_path / "base"), target_modules=["lm_head"])
    load.load_causal_lm(source(folder))
    monkeypatch.setattr(saved_adapters, "separate", lambda _: None)
    with pytest.raises(ModelError, match="logits that are off by"):
        load.load_causal_lm(source(folder))


def test_an_adapter_that_acts_on_some_tokens_only_is_refused(tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base", "llama")
    with pytest.raises(ModelError, match="cannot be merged"):
        load.load_causal_lm(source(adapter(tmp_path / "policy", base, alora_invocation_tokens=[25, 26])))
    folder = adapter(tmp_path / "rm", base, scorer=True)
    _about(alora_invocation_tokens=[25, 26])(folder)
    with pytest.raises(ModelError, match="alora_invocation_tokens"):
        on_trunk(base, folder)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_added_tokens_come_with_the_adapter(tmp_path: Path, kind: str) -> None:
    base = tiny.folder(tmp_path / "base", kind)
    ids = torch.tensor([[3, 28, 8, 27, 14]])
    folder = adapter(tmp_path / "policy", base, rows=29, modules_to_save=["embed_tokens", "lm_head"])
    expected = by_peft(folder, base, ids, rows=29)
    role = Role("policy", load.load_causal_lm(source(folder)), False)
    with torch.no_grad():
        torch.testing.assert_close(role.logits(ids), expected, rtol=1e-4, atol=1e-4)
    role.export(tmp_path / "out")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


def test_added_tokens_on_a_trunk_are_refused(tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base")
    with pytest.raises(ModelError, match="embeddings of its own"):
        on_trunk(base, adapter(tmp_path / "rm", base, scorer=True, rows=29))


def test_the_base_of_a_reward_adapter_is_compared_by_name_then_by_weights(tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base", seed=0)
    twin, other = tiny.folder(tmp_path / "twin", seed=0), tiny.folder(tmp_path / "other", seed=1)
    folder = adapter(tmp_path / "rm", base, scorer=True)
    expected = by_peft(folder, base, scorer=True)[:, 0]
    (tmp_path / "link").symlink_to(base)
    for trunk in (base, tmp_path / "link", twin):
        torch.testing.assert_close(score(on_trunk(trunk, folder)[2]), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match=rf"trained on {base}, and the trunk is {other}, which has other weights"):
        on_trunk(other, folder)
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=rf"set base_model_name_or_path in its adapter_config.json to {twin}"):
        on_trunk(twin, folder)


def test_a_policy_that_was_merged_is_not_its_base(tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base", "llama")
    policy, reward = adapter(tmp_path / "policy", base), adapter(tmp_path / "rm", base, scorer=True)
    with pytest.raises(ModelError, match="other weights"):
        on_trunk(policy, reward)


def _write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def _about(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        about = json.loads(file.read_text()) | values
        file.write_text(json.dumps({key: value for key, value in about.items() if value != "drop"}))

    return change


def _weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], Any]:
    def rewrite(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return rewrite


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "torn weights": (_write("adapter_model.safetensors", b"\0" * 40), "cannot be read"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model"),
    "torn settings": (_write("adapter_config.json", b"{"), "adapter_config.json:1: not the JSON of an object"),
    "a list": (_write("adapter_config.json", b"[]"), "adapter_config.json:1: not the JSON of an object"),
    "no base": (_about(base_model_name_or_path="drop"), "has no base_model_name_or_path; add it"),
    "null base": (_about(base_model_name_or_path=None), "has no base_model_name_or_path; add it"),
    "no kind": (_about(peft_type="drop"), "has no peft_type"),
    "unknown kind": (_about(peft_type="NEW"), "no adapter of the kind NEW"),
    "unknown option": (_about(use_newest=True), "does not know the adapter's option use_newest"),
    "base gone": (_about(base_model_name_or_path="/nowhere/base"), "the base of this adapter is not there"),
    "revision": (_about(base_model_name_or_path="owner/name", revision="v2"), "download that revision"),
    "half": (
        _weights(lambda given: {key: value for key, value in given.items() if "layers.1" not in key}),
        "saved in part|lacks",
    ),
    "another base": (
        _weights(lambda given: {key.replace("layers.1", "layers.7"): value for key, value in given.items()}),
        "another base|lacks",
    ),
    "another shape": (
        _weights(lambda given: {key: value.repeat(2, 1) if "lora_A" in key else value for key, value in given.items()}),
        "size mismatch",
    ),
    "not finite": (_weights(lambda given: {key: value * torch.inf for key, value in given.items()}), "NaN or infinite"),
    "no head": (
        _weights(lambda given: {key: value for key, value in given.items() if "score" not in key}),
        "no scalar head|lacks .*score",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_reward_adapter_is_refused_with_words(tmp_path: Path, name: str) -> None:
    damage, words = BROKEN[name]
    base = tiny.folder(tmp_path / "base", "llama")
    folder = adapter(tmp_path / "rm", base, scorer=True)
    damage(folder)
    with pytest.raises(ModelError, match=words):
        load.load_scorer(source(folder))
    if name not in ("base gone", "revision"):  # there the trunk could not be loaded by that name
        with pytest.raises(ModelError, match=words):
            on_trunk(base, folder)


@pytest.mark.parametrize("name", sorted(set(BROKEN) - {"no head"}))
def test_a_broken_policy_adapter_is_refused_with_words(tmp_path: Path, name: str) -> None:
    damage, words = BROKEN[name]
    folder = adapter(tmp_path / "policy", tiny.folder(tmp_path / "base", "llama"))
    damage(folder)
    with pytest.raises(ModelError, match=words):
        load.load_causal_lm(source(folder))


def test_a_pickled_adapter_is_read_if_it_has_tensors_only(tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base", "llama")
    folder = adapter(tmp_path / "rm", base, scorer=True)
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    expected = by_peft(folder, base, scorer=True)[:, 0]
    torch.testing.assert_close(score(on_trunk(base, folder)[2]), expected, rtol=1e-4, atol=1e-4)
    torch.save({"code": Path}, folder / "adapter_model.bin")
    for call in (lambda: load.load_scorer(source(folder)), lambda: on_trunk(base, folder)):
        with pytest.raises(ModelError, match=r"adapter_model.bin.*save them again as safetensors"):
            call()


def test_an_adapter_that_only_transformers_sees_is_refused(tmp_path: Path) -> None:
    """Under a hub name transformers puts the adapter into the base without merging it."""
    folder = adapter(tmp_path / "policy", tiny.folder(tmp_path / "base", "llama"))
    with pytest.raises(ModelError, match="it is an adapter; download it"):
        load._loaded(AutoModelForCausalLM.from_pretrained, source(folder), str(folder))


def test_adapters_are_not_taken_for_another_function(tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base", "llama")
    policy, reward = adapter(tmp_path / "policy", base), adapter(tmp_path / "rm", base, scorer=True)
    with pytest.raises(ModelError, match="adapter of a reward model"):
        load.load_causal_lm(source(reward))
    with pytest.raises(ModelError, match="task_type is CAUSAL_LM"):
        on_trunk(base, policy)
    with pytest.raises(ModelError, match="this is a whole model"):
        on_trunk(base, base)
    two = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    get_peft_model(two, LoraConfig(task_type="SEQ_CLS", **SMALL)).save_pretrained(tmp_path / "two")
    for call in (lambda: load.load_scorer(source(tmp_path / "two")), lambda: on_trunk(base, tmp_path / "two")):
        with pytest.raises(ModelError, match=r"one label, this one has 2|size mismatch"):
            call()


def test_a_parameter_says_whose_it_is() -> None:
    assert saved_adapters.owner("model.layers.0.q_proj.lora_A.policy.weight") == "policy"
    assert saved_adapters.owner("model.embed_tokens.lora_embedding_B.critic") == "critic"
    assert saved_adapters.owner("score.modules_to_save.reward.weight") == "reward"
    assert saved_adapters.owner("q_proj.lora_magnitude_vector.policy.weight") == "policy"
    for name in ("model.norm.weight", "q_proj.base_layer.weight", "score.original_module.weight"):
        assert saved_adapters.owner(name) is None
