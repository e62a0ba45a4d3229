"""What is read beside the log-prob: the exact KL, the collision, the attention; by transformers' own forward."""

from typing import Any

import pytest
import tiny
import torch
from models import helpers as h
from torch import Tensor

from whet.data import Batch, Row
from whet.learner.local import LocalLearner
from whet.models.readers import read
from whet.models.roles import Role

KINDS = ["qwen3", "llama", "gpt2", "capped"]
LAYOUTS = [{}, {"budget": 1}, {"budget": 25}, {"packed": True}]
TEMPERATURES = [0.5, 1.0, 1.5, 0.25, 1.0, 0.7, 2.0, 1.0, 1.0]


def model(kind: str, seed: int = 0, **changes: Any) -> Any:
    return h.capped(seed=seed) if kind == "capped" else tiny.causal_lm(kind, seed=seed, dtype=torch.float64, **changes)


def roles(kind: str) -> dict[str, Role]:
    return {"policy": Role("policy", model(kind), True), "reference": Role("reference", model(kind, seed=1), False)}


def learner(own: dict[str, Role], **options: Any) -> LocalLearner:
    return LocalLearner(own, {name: h.FREE for name, role in own.items() if role.trained}, total=1, **options)


def batch() -> Batch:
    return Batch.of(h.rows()).with_columns(temperature=torch.tensor(TEMPERATURES, dtype=torch.float64))


def logprobs(of: Any, row: Row, temperature: float) -> Tensor:
    """log softmax over the vocabulary before each response token, from the row's own full forward: (response, V)."""
    return (h.full_logits(of, row.ids) / temperature).log_softmax(-1)[row.start - 1 : -1]


def check(got: Tensor, expected: Any, within: float) -> None:
    """Each row's column is what `expected` says of it, 0 where nothing is trained or no row is."""
    for number, (row, temperature) in enumerate(zip(h.rows(), TEMPERATURES, strict=True)):
        torch.testing.assert_close(
            got[number, : row.response], expected(row, temperature) * row.mask, rtol=within, atol=within
        )
        assert not got[number, row.response :].any()


# --- the exact KL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_kl_is_the_sum_over_the_whole_vocabulary(kind: str, options: dict[str, Any]) -> None:
    own = roles(kind)

    def expected(row: Row, temperature: float) -> Tensor:
        p, q = (logprobs(own[name].model, row, temperature) for name in ("policy", "reference"))
        return (p.exp() * (p - q)).sum(-1)

    got = learner(own, **options).measure(batch(), frozenset({"old_exact_kl"}))["old_exact_kl"]
    assert float(got.max()) > 0.01
    check(got, expected, 1e-9)


def test_the_exact_kl_to_a_model_with_another_kind_of_head_is_that_of_the_logits() -> None:
    own = {"policy": Role("policy", model("qwen3"), True), "reference": Role("reference", model("capped"), False)}

    def expected(row: Row, temperature: float) -> Tensor:
        p, q = (logprobs(own[name].model, row, temperature) for name in ("policy", "reference"))
        return (p.exp() * (p - q)).sum(-1)

    check(learner(own).measure(batch(), frozenset({"old_exact_kl"}))["old_exact_kl"], expected, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_kl_of_equal_models_is_zero_and_its_gradient_too(kind: str) -> None:
    own = roles(kind)["policy"]
    got = read(own, batch(), frozenset({"exact_kl"}), reference=Role("reference", model(kind), False))["exact_kl"]
    assert float(got.detach().abs().max()) < 1e-12
    got.sum().backward()
    assert all(float(p.grad.abs().max()) < 1e-9 for p in own.parameters().values() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_kls_gradient_is_that_of_the_full_forward_and_reaches_the_policy_alone(kind: str) -> None:
    own, other = roles(kind), roles(kind)
    columns = read(own["policy"], batch(), frozenset({"exact_kl", "logp"}), reference=own["reference"])
    columns["exact_kl"].sum().backward()
    total = torch.zeros((), dtype=torch.float64)
    for row, temperature in zip(h.rows(), TEMPERATURES, strict=True):
        logits = other["policy"].model(input_ids=row.ids[None]).logits[0, row.start - 1 : -1]
        p, q = (logits / temperature).log_softmax(-1), logprobs(other["reference"].model, row, temperature)
        total = total + ((p.exp() * (p - q)).sum(-1) * row.mask).sum()
    total.backward()
    theirs = other["policy"].parameters()
    for name, parameter in own["policy"].parameters().items():
        within = 1e-6 if kind == "capped" else 1e-8  # its attention takes its softmax in float32
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=within, atol=within)
    assert all(parameter.grad is None for parameter in own["reference"].parameters().values())


def test_on_a_trunk_the_exact_kl_is_to_the_base_without_adapters() -> None:
    own = h.trunk()
    rows = Batch.of(h.rows())
    measure = learner(own).measure
    assert not measure(rows, frozenset({"old_exact_kl"}))["old_exact_kl"].any()
    with torch.no_grad():
        for name, parameter in own["policy"].parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    got = measure(rows, frozenset({"old_exact_kl", "old_logp"}))["old_exact_kl"]
    base = tiny.causal_lm("qwen3", dtype=torch.float32)
    for number, row in enumerate(rows.rows):
        with own["policy"].active():
            p = logprobs(own["policy"].model, row, 1.0)
        q = logprobs(base, row, 1.0)
        expected = (p.exp() * (p - q)).sum(-1) * row.mask
        torch.testing.assert_close(got[number, : row.response], expected, rtol=1e-4, atol=1e-5)
    assert float(got.max()) > 0.01


def test_without_a_reference_there_is_no_exact_kl() -> None:
    with pytest.raises(ValueError, match="needs a reference model"):
        learner({"policy": h.policy()}).measure(Batch.of(h.rows()), frozenset({"old_exact_kl"}))


# --- the collision probability ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_collision_is_the_sum_of_the_squared_probabilities(kind: str, options: dict[str, Any]) -> None:
    own = roles(kind)
    got = learner(own, **options).measure(batch(), frozenset({"old_collision"}))["old_collision"]
    check(got, lambda row, t: logprobs(own["policy"].model, row, t).exp().square().sum(-1), 1e-9)
    assert bool((got[batch()["mask"]] >= 1 / 27).all())


# --- attention -------------------------------------------------------------------------------------------------------

JOINED = {"attention_mean": lambda weights: weights.mean(0), "attention_max": lambda weights: weights.amax(0)}


def attention_by_hand(kind: str, row: Row, name: str) -> Tensor:
    """The last layer's weights of the last trained token on trained tokens, from transformers for the row alone."""
    plain = model(kind, attn_implementation="eager")
    with torch.no_grad():
        weights = plain(input_ids=row.ids[None], output_attentions=True, use_cache=False).attentions[-1][0]
    last = row.start + int(row.mask.nonzero()[-1])
    own = JOINED[name](weights[:, last].double())[row.start :] * row.mask
    return own / own.sum()


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", JOINED)
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_attention_is_the_last_tokens_in_the_last_layer_as_shares_of_the_trained_tokens(
    kind: str, name: str, options: dict[str, Any]
) -> None:
    got = learner(roles(kind), **options).measure(Batch.of(h.rows()), frozenset({name}))[name]
    for number, row in enumerate(h.rows()):
        torch.testing.assert_close(
            got[number, : row.response].double(), attention_by_hand(kind, row, name), rtol=1e-5, atol=1e-6
        )
        assert not got[number][: row.response][~row.mask].any()
        assert not got[number, row.response :].any()
    torch.testing.assert_close(got.double().sum(1), torch.ones(len(got), dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_two_ways_to_join_heads_differ() -> None:
    names = frozenset(JOINED)
    got = learner(roles("qwen3")).measure(Batch.of(h.rows()), names)
    assert not torch.allclose(got["attention_mean"], got["attention_max"], atol=1e-3)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_attention_of_a_row_does_not_depend_on_the_rows_beside_it(kind: str) -> None:
    own, rows = roles(kind)["policy"], Batch.of(h.rows())
    together = read(own, rows, frozenset({"attention_mean"}))["attention_mean"]
    for number, row in enumerate(rows.rows):
        alone = read(own, rows.take([number]), frozenset({"attention_mean"}))["attention_mean"][0]
        torch.testing.assert_close(together[number, : row.response], alone, rtol=1e-5, atol=1e-7)


def test_reading_the_attention_leaves_the_model_and_its_other_columns_as_they_were() -> None:
    own, rows = roles("qwen3")["policy"], Batch.of(h.rows())
    before = own.model.config._attn_implementation
    plain = read(own, rows, frozenset({"logp"}))["logp"].detach()
    both = read(own, rows, frozenset({"logp", "attention_max"}))
    assert own.model.config._attn_implementation == before
    assert torch.equal(both["logp"].detach(), plain)
    assert both["logp"].requires_grad
    assert not both["attention_max"].requires_grad
    assert torch.equal(read(own, rows, frozenset({"logp"}))["logp"].detach(), plain)


def test_on_a_trunk_the_attention_is_that_of_the_policys_adapter() -> None:
    own, rows = h.trunk(), Batch.of(h.rows())
    base = read(own["policy"], rows, frozenset({"attention_mean"}))["attention_mean"]
    with torch.no_grad():
        for name, parameter in own["policy"].parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(
        read(own["policy"], rows, frozenset({"attention_mean"}))["attention_mean"], base, atol=1e-3
    )
    assert torch.equal(read(own["reference"], rows, frozenset({"attention_mean"}))["attention_mean"], base)
