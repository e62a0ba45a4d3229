"""Rows in one sequence without padding: numbers and gradients are those of each row alone, with prompts computed once or not."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from whet.data import Batch, Row, micro_batches
from whet.data.batching import dealt
from whet.learner.local import LocalLearner
from whet.methods.compose import SFT
from whet.methods.options import Optim
from whet.models import load
from whet.models.packing import NAME, Packed
from whet.models.probe import probe
from whet.models.readers import read
from whet.models.roles import Role

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
KINDS = {
    "qwen2": Qwen2Config(**SHAPE),
    "llama": LlamaConfig(**SHAPE),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256),
}
NAMES = frozenset({"logp", "entropy"})


def row(seed: int, prompt: int, answer: int, prompt_seed: int | None = None) -> Row:
    first, second = (torch.Generator().manual_seed(one) for one in (prompt_seed or seed, 1000 + seed))
    ids = [torch.randint(3, 97, (n,), generator=own) for n, own in ((prompt, first), (answer, second))]
    return Row(torch.cat(ids), prompt, torch.ones(answer, dtype=torch.bool))


ROWS = [
    row(1, 7, 9, prompt_seed=50), row(2, 7, 4, prompt_seed=50), row(3, 11, 13), row(4, 5, 6, prompt_seed=51),
    row(5, 7, 20, prompt_seed=50), row(6, 5, 1, prompt_seed=51),
]  # fmt: skip


def policy(kind: str = "qwen2", dtype: torch.dtype = torch.float64, **more: Any) -> Role:
    torch.manual_seed(0)
    role = Role("policy", AutoModelForCausalLM.from_config(KINDS[kind]).to(dtype).eval(), True, **more)
    probe(role, [one.ids for one in ROWS], packed=True)
    return role


def gradients(role: Role, rows: list[Row], **layout: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The columns, and the gradient of a sum that weighs each token otherwise."""
    role.model.zero_grad()
    got = read(role, Batch.of(rows), NAMES, **layout)
    weight = torch.arange(1.0, got["logp"].numel() + 1).reshape(got["logp"].shape).to(got["logp"])
    ((got["logp"] + 0.3 * got["entropy"]) * weight.sin()).sum().backward()
    grads = {name: one.grad.clone() for name, one in role.model.named_parameters() if one.grad is not None}
    return {name: one.detach() for name, one in got.items()}, grads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_columns_and_gradients_are_those_of_padded_rows(kind: str, shared: bool) -> None:
    role = policy(kind)
    assert role.model.config._attn_implementation == NAME
    assert role.paths.packing
    assert role.paths.sharing
    (padded, plain), (packed, other) = (
        gradients(role, ROWS, **one) for one in ({}, {"packed": True, "shared": shared})
    )
    for name, values in padded.items():
        torch.testing.assert_close(packed[name], values, rtol=1e-10, atol=1e-12)
    assert plain.keys() == other.keys()
    # transformers' RMSNorm rounds its gradients to float32, here once for a prompt, there once for each of its rows
    rtol, atol = (1e-9, 1e-11) if kind == "gpt2" or not shared else (1e-5, 1e-6)
    for name, values in plain.items():
        torch.testing.assert_close(other[name], values, rtol=rtol, atol=atol)


def test_in_float32_they_agree_to_rounding() -> None:
    role = policy(dtype=torch.float32)
    (padded, plain), (packed, other) = (gradients(role, ROWS, **one) for one in ({}, {"packed": True, "shared": True}))
    torch.testing.assert_close(packed["logp"], padded["logp"], rtol=1e-5, atol=1e-5)
    for name, values in plain.items():
        gap = float((other[name] - values).norm())
        assert gap <= 1e-5 * float(values.norm()) + 1e-9, name


def test_scores_and_final_values_are_read_at_the_end_of_each_row() -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(Qwen2Config(**SHAPE, num_labels=1)).to(torch.float64)
    role = Role("reward", model, False)
    probe(role, [one.ids for one in ROWS], packed=True)
    names = frozenset({"score", "value", "final_value", "token_score"})
    with torch.no_grad():
        plain, packed = (read(role, Batch.of(ROWS), names, **one) for one in ({}, {"packed": True, "shared": True}))
        own = [model(input_ids=one.ids[None]).logits[0, 0] for one in ROWS]
    for name in names:
        torch.testing.assert_close(packed[name], plain[name], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(packed["score"], torch.stack(own), rtol=1e-10, atol=1e-12)


def test_a_prompt_is_packed_once() -> None:
    made = Packed.of(ROWS, share=True)
    distinct = 7 + 11 + 5 + sum(one.response for one in ROWS)
    assert made.ids.shape == (1, distinct)
    assert Packed.of(ROWS, share=False).ids.shape == (1, sum(one.length for one in ROWS))
    for number, one in enumerate(ROWS):
        at = made.places.at(torch.full((one.length,), number), torch.arange(one.length))
        assert torch.equal(made.ids[0, at], one.ids)
        assert torch.equal(made.pieces.positions()[0, at], torch.arange(one.length))


def test_rows_longer_than_a_sliding_window_are_padded() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=16)).to(torch.float64).eval()
    role, short = Role("policy", model, True), [row(1, 7, 9), row(2, 5, 4)]
    probe(role, [one.ids for one in short], packed=True)
    assert (role.paths.packing, role.paths.window) == (True, 16)
    for rows in (short, [*short, row(3, 20, 9)]):
        with torch.no_grad():
            got = read(role, Batch.of(rows), NAMES, packed=True, shared=True)["logp"]
        for one, logp in zip(rows, got, strict=True):
            own = model(input_ids=one.ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, one.ids[1:, None])[:, 0]
            torch.testing.assert_close(logp[: one.response], own[one.start - 1 :], rtol=1e-10, atol=1e-12)


def test_with_gradient_checkpointing_the_gradient_is_the_same() -> None:
    role = policy()
    plain = gradients(role, ROWS, packed=True, shared=True)[1]
    load.checkpoint_activations(role.model)
    again = gradients(role, ROWS, packed=True, shared=True)[1]
    for name, values in plain.items():
        assert torch.equal(again[name], values)


def test_a_saved_model_knows_nothing_of_it(tmp_path: Any) -> None:
    role = policy(dtype=torch.float32)
    role.model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


# --- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 24, 40, 64, 10**6])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_packed_micro_batches_hold_each_row_once_and_keep_the_budget(budget: int, workers: int, shared: bool) -> None:
    batch = Batch.of(ROWS)
    parts = dealt(batch, budget, workers, packed=True, shared=shared)
    assert len({len(one) for one in parts}) == 1
    micro = [rows for one in parts for rows in one if rows]
    assert sorted(number for rows in micro for number in rows) == list(range(len(ROWS)))
    for rows in micro:
        tokens = Packed.of([ROWS[number] for number in rows], shared).ids.shape[1]
        assert tokens <= budget or len(rows) == 1


def test_rows_with_the_same_prompt_are_together() -> None:
    assert micro_batches(Batch.of(ROWS), 10**6, packed=True, shared=True) == [[0, 1, 4, 2, 3, 5]]
    assert micro_batches(Batch.of(ROWS), 41, packed=True, shared=True) == [[0, 1, 4], [2, 3, 5]]


@pytest.mark.parametrize("options", [{}, {"packed": True}, {"packed": True, "shared": True}], ids=str)
@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_an_update_is_the_same_in_every_layout(options: dict[str, Any], budget: int) -> None:
    def trained(**layout: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        role = policy("gpt2")
        own = LocalLearner({"policy": role}, {"policy": Optim(lr=0.01, schedule="constant")}, total=4, **layout)
        batch = Batch.of(ROWS)
        losses = own.update([(term, batch, batch.counts(term.mask)) for term in SFT.terms]).losses
        return losses, {name: one.detach() for name, one in role.model.named_parameters()}

    losses, weights = trained(budget=40)
    again, others = trained(budget=budget, **options)
    assert again == pytest.approx(losses, rel=1e-12)
    for name, values in weights.items():
        torch.testing.assert_close(others[name], values, rtol=1e-7, atol=1e-9)
