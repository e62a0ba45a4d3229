"""The probe catches models whose fast paths are wrong, whatever their class, and what is left is transformers' own forward."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, Qwen3ForCausalLM, Qwen3Model

from whet.data import Batch
from whet.errors import ModelError
from whet.generate import Request
from whet.generate.local import LocalGenerator
from whet.methods.options import LoRA, Sampling
from whet.models import lora
from whet.models.load import cache_argument
from whet.models.packing import pieces_of_forward
from whet.models.probe import BOUND, HALF, probe
from whet.models.readers import read
from whet.models.roles import Role

from . import helpers as h

LOGP = frozenset({"logp"})
ROWS = h.rows()
IDS = [row.ids for row in ROWS]


CACHE = cache_argument(Qwen3Model(tiny.config()))


class _Model(Qwen3Model):
    """A body whose forward does one thing wrong, as `wrong` says."""

    wrong = ""

    def forward(self, *args: Any, **given: Any) -> Any:
        if self.wrong == "ignores the packing mask" and given.pop("position_ids", None) is not None:
            with pieces_of_forward(None):
                return super().forward(*args, **given)
        if self.wrong == "ignores positions":
            given.pop("position_ids", None)
        if self.wrong == "drops its cache":
            given[CACHE] = None
        if self.wrong == "fails with a cache" and given.get(CACHE) is not None:
            raise AttributeError("no cache here")
        out = super().forward(*args, **given)
        if self.wrong == "is disturbed by padding":
            out.last_hidden_state = out.last_hidden_state * (1 + 0.05 * (out.last_hidden_state.shape[0] > 1))
        if self.wrong == "looks both ways":
            out.last_hidden_state = out.last_hidden_state + 0.1 * out.last_hidden_state.mean(1, keepdim=True)
        if self.wrong == "sees how long the row is":
            out.last_hidden_state = out.last_hidden_state * (1 + 0.01 * out.last_hidden_state.shape[1])
        if self.wrong == "differs in train mode" and self.training:
            out.last_hidden_state = out.last_hidden_state * 1.1
        if self.wrong == "changes its weights":
            with torch.no_grad():
                self.norm.weight.div_(2)
        return out


def model(wrong: str = "", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    made = Qwen3ForCausalLM(tiny.config())
    kept = made.model.state_dict()
    made.model = _Model(made.config)
    made.model.load_state_dict(kept)
    made.model.wrong = wrong
    made.tie_weights()
    return made.to(dtype).eval()


def role(wrong: str = "", *, name: str = "policy", dtype: torch.dtype = torch.float32) -> Role:
    return Role(name, model(wrong, dtype), name in ("policy", "critic"))


def alone(own: Any, row: Any) -> Tensor:
    """transformers' own log-probs of the response tokens of one row."""
    logp = h.full_logits(own, row.ids).log_softmax(-1)[row.start - 1 : -1]
    return logp.gather(1, row.ids[row.start :, None])[:, 0] * row.mask


def greedy(own: Role, wanted: int = 6) -> None:
    """Each token of greedy answers is the most probable one of a full forward of the row alone."""
    prompts = [h.prompt(number, ids) for number, ids in enumerate([(2,), (3, 4, 6, 7, 8, 9, 4), (10, 11, 5)])]
    asked = [Request(prompt, draw, 0, Sampling(wanted, 0.0), 3) for draw, prompt in enumerate(prompts)]
    for sample in LocalGenerator(own, (1,), str).generate(asked):
        ids = list(prompts[sample.draw].ids)
        for token in sample.ids:
            assert token == int(h.full_logits(own.model, torch.tensor(ids))[-1].argmax())
            ids.append(token)


def test_a_model_that_is_right_keeps_every_fast_path(capsys: Any) -> None:
    own = role()
    probe(own, IDS, packed=True, cached=True)
    assert (own.paths.padding, own.paths.packing, own.paths.cache, own.paths.gradient) == (True, True, True, True)
    assert own.paths.sharing
    assert own.linear_head
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["policy", "reference"])
def test_packing_that_leaks_is_left_off_with_a_line(name: str, capsys: Any) -> None:
    own = role("ignores the packing mask", name=name)
    probe(own, IDS, packed=True)
    assert f"{name}: packed rows differ" in capsys.readouterr().err
    assert own.model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        got = read(own, Batch.of(ROWS), LOGP, packed=True)["logp"]
    for row, logp in zip(ROWS, got, strict=True):
        torch.testing.assert_close(logp[: row.response], alone(own.model, row), rtol=1e-4, atol=1e-4)


def test_prompts_are_not_shared_by_a_model_that_counts_positions_itself(capsys: Any) -> None:
    """A row behind others only moves all its positions, which a rotary embedding does not see; a shared prompt parts them."""
    own = role("ignores positions")
    probe(own, IDS, packed=True)
    assert (own.paths.packing, own.paths.sharing) == (True, False)
    assert "policy: rows that share their prompt differ" in capsys.readouterr().err
    with torch.no_grad():
        got = read(own, Batch.of(ROWS), LOGP, packed=True, shared=True)["logp"]
    for row, logp in zip(ROWS, got, strict=True):
        torch.testing.assert_close(logp[: row.response], alone(own.model, row), rtol=1e-4, atol=1e-4)


def test_the_exact_kl_to_a_reference_in_another_layout_is_right() -> None:
    """The policy is packed, the reference is not: KL by enumeration of the vocabulary."""
    own, reference = role(), role("ignores the packing mask", name="reference")
    with torch.no_grad():
        reference.model.get_output_embeddings().weight.mul_(1.3)
    probe(own, IDS, packed=True)
    probe(reference, IDS, packed=True)
    with torch.no_grad():
        got = read(own, Batch.of(ROWS), frozenset({"exact_kl"}), packed=True, reference=reference)["exact_kl"]
    for row, kl in zip(ROWS, got, strict=True):
        logp, other = (
            h.full_logits(one.model, row.ids).log_softmax(-1)[row.start - 1 : -1] for one in (own, reference)
        )
        expected = (logp.exp() * (logp - other)).sum(-1) * row.mask
        torch.testing.assert_close(kl[: row.response], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", ["drops its cache", "fails with a cache"])
def test_a_wrong_cache_is_left_off_and_the_answers_are_the_models_own(wrong: str, capsys: Any) -> None:
    own = role(wrong)
    greedy(own)
    said = capsys.readouterr().err
    assert own.paths.cache is False
    assert said.count("decoding with a cache differs") == 1
    assert "answers are generated without one, which is slow" in said
    greedy(own)
    assert not capsys.readouterr().err  # tried once
    (got,) = LocalGenerator(own, (1,), str).logprobs([IDS[-1]])
    expected = h.full_logits(own.model, IDS[-1]).log_softmax(-1)[:-1].gather(1, IDS[-1][1:, None])[:, 0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_without_a_cache_sampling_reports_the_log_probs_of_the_full_forward() -> None:
    own = role("drops its cache")
    prompts = [h.prompt(number, ids) for number, ids in enumerate([(2,), (3, 4, 6, 7, 8, 9, 4)])]
    asked = [
        Request(prompt, draw, answer, Sampling(6), 3) for draw, prompt in enumerate(prompts) for answer in range(4)
    ]
    for sample in LocalGenerator(own, (1, 5, 9), str).generate(asked):
        ids = torch.tensor(prompts[sample.draw].ids + sample.ids)
        logp = h.full_logits(own.model, ids).log_softmax(-1)[len(ids) - len(sample.ids) - 1 : -1]
        expected = logp.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.sampler_logp), expected, rtol=1e-5, atol=1e-5)


def test_rows_that_padding_disturbs_are_read_one_by_one(capsys: Any) -> None:
    own = role("is disturbed by padding")
    probe(own, IDS)
    assert "read one by one" in capsys.readouterr().err
    with torch.no_grad():
        got = read(own, Batch.of(ROWS), LOGP)["logp"]
    for row, logp in zip(ROWS, got, strict=True):
        torch.testing.assert_close(logp[: row.response], alone(own.model, row), rtol=1e-4, atol=1e-4)
    greedy(own)
    assert own.paths.cache is False  # it decodes in batches


def test_scores_that_padding_disturbs_are_read_one_by_one() -> None:
    own = h.scorer(dtype=torch.float32)
    own.model.model.__class__ = type("Disturbed", (_Model,), {"wrong": "is disturbed by padding"})
    probe(own, IDS)
    assert own.paths.padding is False
    with torch.no_grad():
        got = read(own, Batch.of(ROWS), frozenset({"score"}))["score"]
        each = torch.cat([read(own, Batch.of([row]), frozenset({"score"}))["score"] for row in ROWS])
        plain = [own.model(input_ids=row.ids[None]).logits[0, 0] for row in ROWS]
    torch.testing.assert_close(got, each)
    torch.testing.assert_close(got, torch.stack(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", ["looks both ways"])
@pytest.mark.parametrize("cached", [False, True])
def test_what_looks_both_ways_is_refused(wrong: str, cached: bool) -> None:
    with pytest.raises(ModelError, match="no causal language model"):
        probe(role(wrong), IDS, cached=cached)


def test_bert_is_refused_unless_it_is_a_decoder() -> None:
    small = {
        "vocab_size": 27,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    both, one_way = (BertLMHeadModel(BertConfig(**small, is_decoder=decoder)).eval() for decoder in (False, True))
    for dropout in [
        module for own in (both, one_way) for module in own.modules() if isinstance(module, torch.nn.Dropout)
    ]:
        dropout.p = 0.0
    with pytest.raises(ModelError, match="no causal language model"):
        probe(Role("policy", both, True), IDS)
    probe(Role("policy", one_way, True), IDS)


def test_a_row_that_changes_with_its_length_is_refused() -> None:
    """Its log-probs would be others in training, which reads whole rows, than in sampling."""
    with pytest.raises(ModelError, match="no causal language model"):
        probe(role("sees how long the row is"), IDS)


def test_a_forward_that_changes_weights_is_refused() -> None:
    with pytest.raises(ModelError, match=r"changes its weights \(model\.norm\.weight\)"):
        probe(role("changes its weights"), IDS)


def test_a_train_mode_that_differs_is_refused_with_gradient_checkpointing() -> None:
    own = role("differs in train mode")
    probe(own, IDS)  # whet trains in eval mode
    own = role("differs in train mode")
    own.model.train()
    with pytest.raises(ModelError, match=r"model\.gradient_checkpointing: in train mode the policy differs"):
        probe(own, IDS)


def test_adapters_that_share_a_weight_or_are_never_called_are_said(capsys: Any) -> None:
    own = model()
    own.model.layers[1].mlp.up_proj.weight = own.model.layers[0].mlp.up_proj.weight
    wrapped = lora.attach(own, LoRA(rank=2, alpha=4.0, targets=("up_proj",)), ("policy",), seed=1)
    with pytest.raises(ModelError, match="share one weight"):
        probe(Role("policy", own, True, wrapped=wrapped, adapter="policy"), IDS)
    own = model()
    own.idle = torch.nn.Linear(32, 32)
    wrapped = lora.attach(own, LoRA(rank=2, alpha=4.0, targets=("up_proj", "idle")), ("policy",), seed=1)
    probe(Role("policy", own, True, wrapped=wrapped, adapter="policy"), IDS)
    assert "does not call idle" in capsys.readouterr().err


def test_weights_that_overflow_are_said() -> None:
    own = role()
    with torch.no_grad():
        own.model.model.norm.weight.mul_(3e38)
    with pytest.raises(ModelError, match="NaN or infinite, although its weights are finite"):
        probe(own, IDS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_bound_has_room_on_both_sides(dtype: torch.dtype, capsys: Any) -> None:
    """What is right stays below a quarter of the bound, what is wrong is above four times of it."""
    own, wrong = role(dtype=dtype), role("ignores the packing mask", name="reference", dtype=dtype)
    bound = BOUND.get(dtype, HALF)
    with torch.no_grad():
        apart, packed = (read(own, Batch.of(ROWS), LOGP, packed=packed)["logp"] for packed in (False, True))
        leaked = read(wrong, Batch.of(ROWS), LOGP, packed=True)["logp"]
    assert float((apart - packed).abs().max()) < bound / 4
    assert float((apart - leaked).abs().max()) > bound * 4
    probe(own, IDS, packed=True, cached=True)
    probe(wrong, IDS, packed=True, cached=True)
    assert own.paths.packing is own.paths.cache is True
    assert wrong.paths.packing is False


def test_short_rows_and_few_rows_are_enough() -> None:
    own = role()
    probe(own, [torch.tensor([3])], packed=True, cached=True)
    assert own.paths.packing is own.paths.cache is own.paths.padding is True
    wrong = role("ignores the packing mask")
    probe(wrong, [torch.tensor([3, 4])], packed=True)
    assert wrong.paths.packing is False


@pytest.mark.parametrize("wrong", ["ignores the packing mask", "drops its cache", "looks both ways"])
def test_what_is_wrong_is_caught_in_models_whose_logits_are_small(wrong: str) -> None:
    """Fresh models differ by far less than a nat, whatever is wrong with them."""
    own = role(wrong, name="reference")
    with torch.no_grad():
        for parameter in own.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.1)
    if wrong == "looks both ways":
        with pytest.raises(ModelError, match="no causal"):
            probe(own, IDS)
        return
    probe(own, IDS, packed=True, cached=True)
    assert {"ignores the packing mask": own.paths.packing, "drops its cache": own.paths.cache}[wrong] is False
