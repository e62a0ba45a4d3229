"""Columns as read by whet equal transformers' own full forward of each row alone, however the rows are laid out."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from whet import ops
from whet.data import Batch, Row
from whet.models import readers
from whet.models.readers import read
from whet.models.roles import Role

from . import helpers as h

KINDS = ["qwen3", "llama", "gpt2"]
LAYOUTS = ["padded", "packed", "one at a time"]
LANGUAGE = frozenset({"logp", "entropy"})
SCALAR = frozenset({"value", "final_value", "score", "token_score"})


def laid_out(role: Role, batch: Batch, names: frozenset[str], layout: str) -> dict[str, Tensor]:
    """The columns in one of the layouts, without gradient."""
    with torch.no_grad():
        if layout != "one at a time":
            return read(role, batch, names, packed=layout == "packed")
        single = [read(role, batch.take([number]), names) for number in range(len(batch.rows))]
    width = batch["mask"].shape[1]

    def joined(name: str) -> Tensor:
        parts = [one[name] for one in single]
        if parts[0].ndim == 2:
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
        return torch.cat(parts)

    return {name: joined(name) for name in names}


def by_hand(model: Any, row: Row, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(logp, entropy) of the response tokens of one row, zero where the mask is False."""
    logp = (h.full_logits(model, row.ids).double() / temperature).log_softmax(-1)[row.start - 1 : -1]
    chosen = logp.gather(1, row.ids[row.start :, None])[:, 0]
    return chosen * row.mask, -(logp.exp() * logp).sum(-1) * row.mask


def scores_by_hand(model: Any, row: Row) -> Tensor:
    """The scalar head on every position, by transformers' own classifier fed with each prefix as a whole: (S,)."""
    with torch.no_grad():
        return torch.stack(
            [model(input_ids=row.ids[None, : end + 1]).logits[0, 0] for end in range(row.length)]
        ).double()


def close(actual: Tensor, expected: Tensor, within: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=within, atol=within)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_entropy_are_those_of_the_full_forward(
    kind: str, dtype: torch.dtype, within: float, layout: str
) -> None:
    batch = Batch.of(h.rows())
    role = h.policy(kind, dtype=dtype)
    got = laid_out(role, batch, LANGUAGE, layout)
    for number, row in enumerate(batch.rows):
        for name, expected in zip(("logp", "entropy"), by_hand(role.model, row), strict=True):
            close(got[name][number, : row.response], expected, within)
            assert not got[name][number, row.response :].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_are_of_the_temperature_each_row_was_sampled_at(layout: str) -> None:
    rows = h.rows()[:4]
    temperatures = [0.5, 1.0, 1.5, 0.25]
    batch = Batch.of(rows).with_columns(temperature=torch.tensor(temperatures))
    role = h.policy()
    got = laid_out(role, batch, LANGUAGE, layout)
    for number, (row, temperature) in enumerate(zip(rows, temperatures, strict=True)):
        close(got["logp"][number, : row.response], by_hand(role.model, row, temperature)[0], 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_scores_are_the_classifier_on_each_prefix(kind: str, layout: str) -> None:
    batch = Batch.of(h.rows())
    role = h.scorer(kind, seed=2)
    got = laid_out(role, batch, SCALAR, layout)
    for number, row in enumerate(batch.rows):
        each = scores_by_hand(role.model, row)
        trained = row.start + row.mask.nonzero()[:, 0]
        close(got["value"][number][: row.response][row.mask], each[trained - 1], 1e-10)
        close(got["token_score"][number][: row.response][row.mask], each[trained], 1e-10)
        close(got["score"][number], role.model(row.ids[None]).logits[0, 0], 1e-10)
        close(got["final_value"][number], each[trained[-1]], 1e-10)
        for name in ("value", "token_score"):
            assert not got[name][number][: row.response][~row.mask].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("readout", "shift"), [("mean", 0.25), ("sum", -0.5), ("last", 3.0)])
def test_a_score_is_read_out_and_shifted(readout: Any, shift: float, layout: str) -> None:
    batch = Batch.of(h.rows())
    role = h.scorer(seed=2, readout=readout, shift=shift)
    got = laid_out(role, batch, frozenset({"score"}), layout)["score"]
    for number, row in enumerate(batch.rows):
        own = scores_by_hand(role.model, row)[row.start :][row.mask]
        raw = {"mean": own.mean(), "sum": own.sum(), "last": role.model(row.ids[None]).logits[0, 0]}[readout]
        close(got[number], raw + shift, 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_score_is_read_where_the_classifiers_own_forward_reads_it(layout: str) -> None:
    """At the last token, whether it is trained or not; a pad token at the end is passed over."""
    role = h.scorer(seed=2)
    role.model.config.pad_token_id = 7
    rows = [[3, 8, 4, 9, 6], [3, 8, 4, 9, 7], [3, 8, 4, 7, 7]]
    batch = Batch.of([Row(torch.tensor(ids), 2, torch.tensor([True, True, False])) for ids in rows])
    got = laid_out(role, batch, frozenset({"score"}), layout)["score"]
    want = torch.stack([role.model(torch.tensor([ids])).logits[0, 0] for ids in rows])
    close(got, want, 1e-10)
    padded = torch.tensor([[3, 8, 4, 9, 6, 7, 7]])  # transformers ignores the mask
    close(role.model(padded).logits[0, 0], want[0], 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read_on_one_position_carries_the_shift(layout: str) -> None:
    """A critic that starts from a standardized reward model speaks its unit everywhere, after the last token too."""
    batch, names = Batch.of(h.rows()), frozenset({"value", "final_value", "score", "token_score"})
    plain, moved = (laid_out(h.scorer(seed=2, shift=shift), batch, names, layout) for shift in (0.0, 5.0))
    for number, row in enumerate(batch.rows):
        own = slice(0, row.response), row.mask
        for name in ("value", "token_score"):
            close(moved[name][number][own[0]][own[1]], plain[name][number][own[0]][own[1]] + 5.0, 1e-10)
    for name in ("score", "final_value"):
        close(moved[name], plain[name] + 5.0, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_behind_a_row_does_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, role = Batch.of(h.rows()), h.policy(kind)
    before = laid_out(role, batch, LANGUAGE, "padded")
    own = readers.pad_ids

    def junk(rows: Any) -> Tensor:
        ids = torch.nn.functional.pad(own(rows), (0, 6))
        for number, row in enumerate(rows):
            ids[number, row.length :] = 3 + torch.arange(ids.shape[1] - row.length) % 20
        return ids

    monkeypatch.setattr(readers, "pad_ids", junk)
    after = laid_out(role, batch, LANGUAGE, "padded")
    for name in LANGUAGE:
        close(after[name], before[name], 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_without_trained_tokens_has_no_log_probs_and_hurts_no_other(layout: str) -> None:
    rows = [Row(h.row(1, 2, 3).ids, 2, torch.zeros(3, dtype=torch.bool)), h.row(2, 3, 4)]
    got = laid_out(h.policy(), Batch.of(rows), LANGUAGE, layout)
    assert not got["logp"][0].any()
    close(got["logp"][1], by_hand(h.policy().model, rows[1])[0], 1e-10)


# --- heads that are more than one linear layer, and layers that look back a few tokens only ---------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spread", [0.2, 0.02], ids=["large logits", "small logits"])
def test_capped_logits_are_read_as_the_model_gives_them(spread: float, layout: str) -> None:
    role = Role("policy", h.capped(initializer_range=spread, final_logit_softcapping=3.0, sliding_window=64), True)
    batch = Batch.of(h.rows())
    got = laid_out(role, batch, LANGUAGE, layout)
    for number, row in enumerate(batch.rows):
        close(got["logp"][number, : row.response], by_hand(role.model, row)[0], 1e-10)


def test_a_capped_model_is_still_read_right_after_training_has_made_its_logits_large() -> None:
    """A fresh model's logits are so small that the cap hardly acts; it does once they grow."""
    model = h.capped(initializer_range=0.02, final_logit_softcapping=30.0, sliding_window=64)
    role = Role("policy", model, True)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(500)
    row = h.row(3, 3, 6)
    close(read(role, Batch.of([row]), LANGUAGE)["logp"][0].detach(), by_hand(model, row)[0], 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_with_a_sliding_window_are_read_as_the_model_gives_them(layout: str) -> None:
    role = Role("policy", h.capped(sliding_window=4), True)
    batch = Batch.of([h.row(i, 2 + i, 9 - i) for i in range(4)])
    got = laid_out(role, batch, LANGUAGE, layout)
    for number, row in enumerate(batch.rows):
        close(got["logp"][number, : row.response], by_hand(role.model, row)[0], 1e-10)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packing_does_not_depend_on_how_attention_is_computed(implementation: str) -> None:
    model = tiny.causal_lm(dtype=torch.float64, attn_implementation=implementation)
    role, batch = Role("policy", model, True), Batch.of(h.rows())
    assert model.config._attn_implementation == implementation
    within = 1e-10 if implementation == "sdpa" else 1e-5  # eager attention takes its softmax in float32
    close(
        laid_out(role, batch, LANGUAGE, "packed")["logp"],
        laid_out(role, batch, LANGUAGE, "one at a time")["logp"],
        within,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_column_is_that_of_the_full_forward(kind: str) -> None:
    role, batch = h.policy(kind), Batch.of(h.rows())
    weight = torch.linspace(-1, 1, batch["mask"].numel(), dtype=torch.float64).reshape(batch["mask"].shape)
    (read(role, batch, LANGUAGE, packed=True)["logp"] * weight).sum().backward()
    got = {name: p.grad.clone() for name, p in role.parameters().items() if p.grad is not None}
    role.model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for number, row in enumerate(batch.rows):
        logp = role.model(input_ids=row.ids[None]).logits[0, row.start - 1 : -1].log_softmax(-1)
        total = (
            total + (logp.gather(1, row.ids[row.start :, None])[:, 0] * row.mask * weight[number, : row.response]).sum()
        )
    total.backward()
    for name, parameter in role.parameters().items():
        close(got[name], parameter.grad, 1e-7)
    assert got.keys() == role.parameters().keys()


def test_a_role_without_scalar_head_says_so() -> None:
    with pytest.raises(ValueError, match="no scalar head"):
        read(h.policy(), Batch.of([h.row(1, 2, 3)]), frozenset({"value"}))


@pytest.mark.parametrize("given", [None, [1.0], [1.0, 0.7]])
def test_a_temperature_of_one_is_not_divided_by(given: list[float] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = h.policy(), []

    def noted(*args: Any, **options: Any) -> Any:
        seen.append(options["temperature"])
        return ops.linear_tokens(*args, **options)

    monkeypatch.setattr(readers, "linear_tokens", noted)
    batch = Batch.of(h.rows())
    if given is not None:
        values = torch.tensor((given * len(batch.rows))[: len(batch.rows)])
        batch = batch.with_columns(temperature=values)
    with torch.no_grad():
        read(own, batch, frozenset({"logp"}))
    assert [one is None for one in seen] == [given != [1.0, 0.7]]
