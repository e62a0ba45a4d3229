"""Addressed residual dropout: the same masks whatever the layout, at the right rate and scale."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from whet.data import Batch
from whet.models.dropout import residual_dropout
from whet.models.load import ModelSource, checkpoint_activations, decoder_layers, load_causal_lm
from whet.models.readers import Dropout, read
from whet.models.roles import Role

from . import helpers as h

NAMES = frozenset({"logp"})


def logp(role: Any, batch: Batch, *, rate: float = 0.3, key: int = 11, **given: Any) -> torch.Tensor:
    return read(role, batch, NAMES, dropout=Dropout(rate, key), **given)["logp"].detach()


def numbered(batch: Batch) -> Batch:
    return batch.with_columns(number=torch.arange(len(batch.rows)))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_masks_do_not_change_with_micro_batches_padding_packing_or_order(kind: str) -> None:
    role, batch = h.policy(kind), numbered(Batch.of(h.rows()))
    whole = logp(role, batch)
    assert (whole - logp(role, batch, rate=0.0)).abs().max() > 0.1
    torch.testing.assert_close(logp(role, batch, packed=True), whole, rtol=1e-10, atol=1e-10)
    for places in ([0], [5, 2], [8, 7, 6, 1]):
        for packed in (False, True):
            part = logp(role, batch.take(places), packed=packed)
            torch.testing.assert_close(part, whole[places][:, : part.shape[1]], rtol=1e-10, atol=1e-10)


def test_another_key_another_row_number_another_draw() -> None:
    role, batch = h.policy(), numbered(Batch.of([h.row(1, 2, 5), h.row(1, 2, 5)]))
    first = logp(role, batch)
    assert torch.equal(first, logp(role, batch))
    assert not torch.isclose(first, logp(role, batch, key=12)).any()
    assert not torch.isclose(first[0], first[1]).any()


@pytest.mark.parametrize("packed", [False, True])
def test_at_rate_zero_there_is_none(packed: bool) -> None:
    role, batch = h.policy(), Batch.of(h.rows())
    assert torch.equal(
        logp(role, batch, rate=0.0, packed=packed), read(role, batch, NAMES, packed=packed)["logp"].detach()
    )


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_what_a_layer_adds_is_dropped_at_the_rate_and_scaled_up(kind: str, rate: float) -> None:
    """Layer by layer: the addition is either 0 or 1 / (1 - rate) times what the layer would have added."""
    model = h.policy(kind).model
    ids = torch.randint(0, 27, (16, 40), generator=torch.Generator().manual_seed(1))
    rows, positions = torch.meshgrid(torch.arange(16), torch.arange(40), indexing="ij")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad(), residual_dropout(model, rate, 3, rows, positions):
        handles = [
            layer.register_forward_hook(
                lambda _m, given, out: seen.append((given[0], out[0] if isinstance(out, tuple) else out))
            )
            for layer in decoder_layers(model)
        ]
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    kept = []
    for number, (before, after) in enumerate(seen):
        plain: list[torch.Tensor] = []
        handle = decoder_layers(model)[number].register_forward_hook(
            lambda _m, _g, out, plain=plain: plain.append(out[0] if isinstance(out, tuple) else out)
        )
        swap = decoder_layers(model)[number].register_forward_pre_hook(
            lambda _m, given, before=before: (before, *given[1:])
        )
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        handle.remove()
        swap.remove()
        added, would = after - before, plain[0] - before
        on = added.abs() > 1e-12
        torch.testing.assert_close(added[on], (would / (1 - rate))[on], rtol=1e-6, atol=1e-9)
        kept.append(on)
        deviation = (rate * (1 - rate) / on.numel()) ** 0.5
        assert abs(float((~on).double().mean()) - rate) < 5 * deviation
    assert not torch.equal(kept[0], kept[1])


def test_a_forward_that_is_recomputed_draws_the_same_masks() -> None:
    """Gradient checkpointing with dropout gives the gradient that it gives without checkpointing."""
    batch, gradients = numbered(Batch.of(h.rows())), []
    for recompute in (False, True):
        role = h.policy()
        if recompute:
            checkpoint_activations(role.model)
        with Dropout(0.3, 11) as dropout:
            read(role, batch, NAMES, dropout=dropout)["logp"].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in role.parameters().values()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2", "opt"])
def test_recomputing_activations_changes_no_gradient(kind: str, tmp_path: Path) -> None:
    """Nor does the train mode that it needs wake any dropout of the model's own."""
    batch, gradients = Batch.of(h.rows()), []
    h.opt().save_pretrained(tmp_path) if kind == "opt" else tiny.folder(tmp_path, kind)
    for recompute in (False, True):
        role = Role("policy", load_causal_lm(ModelSource(str(tmp_path), dtype="float64", device="cpu")), True)
        if recompute:
            checkpoint_activations(role.model)
        read(role, batch, NAMES)["logp"].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in role.parameters().values()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-8)


def test_no_hook_stays_behind() -> None:
    role, batch = h.policy(), Batch.of(h.rows())
    before = logp(role, batch, rate=0.0)
    logp(role, batch)
    with pytest.raises(ZeroDivisionError), residual_dropout(role.model, 0.5, 1, torch.zeros(1, 1), torch.zeros(1, 1)):
        raise ZeroDivisionError
    assert torch.equal(before, read(role, batch, NAMES)["logp"].detach())
