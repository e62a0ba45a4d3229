"""bfloat16 over float32 weights, and attention kernels by name: columns against the model's own forward under autocast."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from whet.data import Batch
from whet.errors import ModelError
from whet.generate import Request
from whet.generate.local import LocalGenerator
from whet.methods.options import LoRA, Sampling
from whet.models import probe as probing
from whet.models.probe import probe
from whet.models.readers import read
from whet.models.roles import Role
from whet.ops import linear_logprobs
from whet.runs import models
from whet.runs import recipe as fields

from . import helpers as h

ROWS = h.rows()
IDS = [row.ids for row in ROWS]
BF16 = torch.bfloat16


def role(kind: str = "qwen3", *, half: bool = True, **given: Any) -> Role:
    own = h.policy(kind, dtype=torch.float32, **given)
    own.compute_in(half)
    return own


def autocast() -> Any:
    return torch.autocast("cpu", BF16)


def expected(model: Any, number: int, temperature: float = 1.0) -> Tensor:
    """Log-probs of a row's response by transformers' own forward of the row alone under autocast."""
    row = ROWS[number]
    with torch.no_grad(), autocast():
        logits = model(row.ids[None]).logits[0].float() / temperature
    return logits.log_softmax(-1)[row.start - 1 : -1].gather(1, row.ids[row.start :, None])[:, 0] * row.mask


def logp(own: Role, **options: Any) -> Tensor:
    with torch.no_grad():
        return read(own, Batch.of(ROWS), frozenset({"logp"}), **options)["logp"]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("packed", [False, True])
def test_columns_are_those_of_the_models_own_forward_under_autocast(kind: str, packed: bool) -> None:
    """Rows in one batch take other kernels, so numbers of different rounding; on average they stay far below it."""
    own = role(kind)
    got, plain = logp(own, packed=packed), logp(role(kind, half=False))
    assert got.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in own.model.parameters())
    gaps = [one[: row.response] - expected(own.model, n) for n, (row, one) in enumerate(zip(ROWS, got, strict=True))]
    assert torch.cat(gaps).abs().mean() < 0.01
    off = (got - plain)[Batch.of(ROWS)["mask"]].abs()
    assert 1e-4 < off.mean() < 0.05


def test_a_row_alone_gives_the_bits_of_the_models_own_forward() -> None:
    own = role("llama")
    for number, row in enumerate(ROWS):
        with torch.no_grad():
            got = read(own, Batch.of([row]), frozenset({"logp"}))["logp"][0]
        torch.testing.assert_close(got, expected(own.model, number), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_temperature_is_not_rounded(dtype: torch.dtype) -> None:
    """0.7 in bfloat16 is 0.699; weights in bfloat16, or float32 weights under autocast."""
    own = Role("policy", tiny.causal_lm("llama", dtype=dtype), True)
    own.compute_in(True)
    for number, row in enumerate(ROWS):
        given = Batch.of([row]).with_columns(temperature=torch.tensor([0.7]))
        with torch.no_grad():
            got = read(own, given, frozenset({"logp"}))["logp"][0]
        torch.testing.assert_close(got, expected(own.model, number, 0.7), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("readout", ["last", "sum"])
def test_a_scalar_head_stays_in_float32(readout: Any) -> None:
    """Scores in bfloat16 would be rounded to 0.4 %, and near answers tied."""
    own = h.scorer("llama", dtype=torch.float32, readout=readout)
    own.compute_in(True)
    with torch.no_grad():
        got = read(own, Batch.of(ROWS[:1]), frozenset({"token_score"}))["token_score"][0]
        with autocast():
            states = own.model.base_model(ROWS[0].ids[None]).last_hidden_state[0]
        whole = states.float() @ own.head.weight[0]  # type: ignore[union-attr]
    torch.testing.assert_close(got, whole[ROWS[0].start :], rtol=1e-5, atol=1e-6)
    assert not torch.equal(got, got.bfloat16().float())


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("biased", [False, True])
def test_a_head_in_chunks_has_the_gradient_of_one_in_a_piece_under_autocast(scale: float, biased: bool) -> None:
    """The backward pass runs outside of autocast: it must see the logits of the forward pass. Large ones round by up to 0.25."""
    made = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 16, generator=made) for size in (12, 40))
    bias = torch.randn(40, generator=made) if biased else None
    ids, grown = torch.arange(12) % 40, torch.linspace(-1, 1, 12)

    def of(workspace: int) -> list[Tensor]:
        own = [one.clone().requires_grad_() for one in (hidden * scale, weight, bias) if one is not None]
        with autocast():
            value, entropy = linear_logprobs(
                own[0], own[1], ids, bias=own[2] if biased else None, temperature=0.7, workspace=workspace
            )
        ((value * grown).sum() + entropy.sum()).backward()  # type: ignore[union-attr]
        return [value.detach(), entropy.detach(), *(one.grad for one in own)]  # type: ignore[union-attr, list-item]

    whole, cut = of(1 << 20), of(12 * 7)
    torch.testing.assert_close(cut[0], whole[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(cut[1:], whole[1:], strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 4e-3 * other.norm()


def test_the_exact_kl_to_itself_is_0_in_bfloat16_and_its_gradient_too() -> None:
    own, reference = role(), role(name="reference")
    kl = read(own, Batch.of(ROWS), frozenset({"exact_kl"}), reference=reference)["exact_kl"]
    kl.sum().backward()
    assert float(kl.detach().abs().max()) == 0.0
    assert max(float(p.grad.abs().max()) for p in own.model.parameters() if p.grad is not None) < 1e-5


def test_sampling_and_reading_agree_within_rounding() -> None:
    own = role()
    asked = [Request(h.prompt(n, (2 + n, 3, 4)), n, 0, Sampling(12), 3) for n in range(8)]
    generator = LocalGenerator(own, (1,), str)
    samples = list(generator.generate(asked))
    gaps = []
    for request, sample in zip(asked, samples, strict=True):
        ids = torch.tensor([*request.prompt.ids, *sample.ids])
        with torch.no_grad(), autocast():
            whole = own.model(ids[None]).logits[0].float().log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        gaps.append((torch.tensor(sample.sampler_logp) - whole[-len(sample.ids) :]).abs())
    assert torch.cat(gaps).mean() < 0.02
    assert own.paths.cache


def test_without_it_numbers_keep_their_bits() -> None:
    own = role(half=False)
    assert not own.autocast
    assert torch.equal(logp(own), logp(h.policy(dtype=torch.float32)))


@pytest.mark.parametrize("dtype", [torch.float64, BF16])
def test_weights_of_another_dtype_are_computed_in_it(dtype: torch.dtype) -> None:
    own = h.policy(dtype=dtype)
    before = logp(own)
    own.compute_in(True)
    assert not own.autocast
    assert torch.equal(logp(own), before)


def test_adapters_on_a_base_in_bfloat16_compute_as_they_did() -> None:
    """peft: the base in bfloat16, the adapters in float32."""
    own = h.trunk("llama", dtype=BF16)["policy"]
    for name, parameter in own.parameters().items():
        assert parameter.dtype == torch.float32
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    before = logp(own)
    own.compute_in(True)
    assert torch.equal(logp(own), before)


def test_a_classifier_of_whole_texts_keeps_float32() -> None:
    """Its label comes from its own forward, which under autocast would round it."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=27, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, num_labels=1,
        max_position_embeddings=64,
    )  # fmt: skip
    own = Role("reward", BertForSequenceClassification(config).eval(), False)
    own.compute_in(True)
    with torch.no_grad():
        got = read(own, Batch.of(ROWS[:1]), frozenset({"score"}))["score"]
        expected_ = own.model(ROWS[0].ids[None]).logits[:, 0]
    assert torch.equal(got, expected_)


# --- the probe -------------------------------------------------------------------------------------------------------


class _Norm(nn.Module):
    """The identity, which is wrong in half precision: as kernels that overflow, or that know no such type."""

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, states: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return states
        if self.wrong == "fails":
            raise RuntimeError("expected scalar type Float but found BFloat16")
        return states * torch.inf if self.wrong == "overflows" else states.roll(1, -1)


@pytest.mark.parametrize("wrong", ["fails", "overflows", "computes something else"])
def test_a_model_that_is_wrong_in_bfloat16_alone_is_refused(wrong: str) -> None:
    own = role(half=False)
    own.model.model.norm = nn.Sequential(own.model.model.norm, _Norm(wrong))
    trial = copy.deepcopy(own)
    probe(trial, IDS, packed=True, cached=True)
    own.compute_in(True)
    with pytest.raises(ModelError, match=r"learner\.precision: in bfloat16 the policy differs .*set it to float32"):
        probe(own, IDS, packed=True, cached=True)


def test_a_model_that_is_right_passes_in_bfloat16(capsys: Any) -> None:
    own = role()
    probe(own, IDS, packed=True, cached=True)
    assert (own.paths.padding, own.paths.packing, own.paths.cache, own.paths.gradient) == (True, True, True, True)
    assert own.autocast
    assert not capsys.readouterr().err


def test_fast_paths_are_tried_in_the_precision_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leak of 0.1 nats is below what bfloat16 may differ by, and is caught."""
    own = role("llama")
    inner = own.model.model.forward

    def leaking(**given: Any) -> Any:
        out = inner(**given)
        if given.get("position_ids") is not None:
            out.last_hidden_state = out.last_hidden_state + 0.02 * out.last_hidden_state.mean(1, keepdim=True)
        return out

    monkeypatch.setattr(own.model.model, "forward", leaking)
    off = float((logp(own, packed=True) - logp(own)).abs().max())
    assert off < probing.HALF
    probe(own, IDS, packed=True)
    assert own.paths.packing is False


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_kernels_are_those_that_were_named_for_every_role(folder: Path, kernel: Any) -> None:
    given = fields.Model(path=str(folder), attn_implementation=kernel)
    tokenizer, _ = models.tokenizer_and_chat(given)
    policy = models.causal_role("policy", given, tokenizer, trained=True, seed=0)
    roles = [
        policy,
        models.reference_role(given, policy, None, tokenizer),
        models.scorer_role("reward", given, tokenizer, trained=False, seed=0, path=str(folder)),
    ]
    assert {one.model.config._attn_implementation for one in roles} == {kernel}
    plain = models.causal_role("policy", fields.Model(path=str(folder)), tokenizer, trained=False, seed=0)
    torch.testing.assert_close(logp(policy), logp(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3"])
def test_kernels_that_are_not_installed_are_refused_with_the_package(folder: Path, kernel: Any) -> None:
    given = fields.Model(path=str(folder), attn_implementation=kernel)
    tokenizer, _ = models.tokenizer_and_chat(given)
    with pytest.raises(ModelError, match=rf"model\.attn_implementation: {kernel} cannot be used .*install flash-attn"):
        models.causal_role("policy", given, tokenizer, trained=True, seed=0)


def test_kernels_of_half_precision_are_refused_in_float32() -> None:
    own = role(half=False)
    own.model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(
        ModelError, match=r"flash_attention_2 computes in half precision only.*--learner\.precision bf16"
    ):
        probe(own, IDS)


def test_kernels_without_a_gradient_are_refused_before_training(folder: Path) -> None:
    """flex_attention has none on a CPU, and for some lengths its numbers there are not those of the plain forward, or NaN."""
    given = fields.Model(path=str(folder), attn_implementation="flex_attention")
    tokenizer, _ = models.tokenizer_and_chat(given)
    own = models.causal_role("policy", given, tokenizer, trained=True, seed=0)
    assert own.model.config._attn_implementation == "flex_attention"
    with pytest.raises(
        ModelError, match=r"the policy (cannot be read(:| with a gradient .*flex_attention)|gives numbers that are NaN)"
    ):
        probe(own, [torch.arange(4, 9)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_that_adapters_train_is_float32(folder: Path, dtype: Any) -> None:
    """The scalar head too, on a base in bfloat16: there it would lose small updates."""
    given = fields.Model(path=str(folder), dtype=dtype, lora=LoRA(rank=2))
    tokenizer, _ = models.tokenizer_and_chat(given)
    own = models.scorer_role("reward", given, tokenizer, trained=True, seed=0, path=str(folder))
    assert {p.dtype for p in own.parameters().values()} == {torch.float32}
    assert any("score" in name for name in own.parameters())
    probe(own, IDS)
    assert read(own, Batch.of(ROWS), frozenset({"score"}))["score"].dtype == torch.float32
