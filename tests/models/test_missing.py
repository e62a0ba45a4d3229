"""Embeddings with more rows than the tokenizer has tokens: those ids have probability 0, the others share it as softmax says."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from whet.data import Batch
from whet.generate import Request
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.loops import evaluate
from whet.methods import compose
from whet.methods.options import Sampling
from whet.models import load, readers
from whet.models.load import MISSING, ModelSource, load_causal_lm, missing_ids
from whet.models.readers import read
from whet.models.roles import Role

from . import helpers as h

SIZE, KNOWN = 64, 27
ROWS = h.rows()
NAMES = frozenset({"logp", "full_logp", "entropy", "full_entropy", "collision", "exact_kl"})
HEADS: dict[str, Any] = {
    "tied": lambda seed: tiny.causal_lm("qwen3", seed=seed, dtype=h.DOUBLE, vocabulary=SIZE),
    "with bias": lambda seed: biased(seed),
    "capped": lambda seed: h.capped(seed=seed, vocab_size=SIZE),
}


def biased(seed: int) -> Any:
    own = tiny.causal_lm("llama", seed=seed, dtype=h.DOUBLE, vocabulary=SIZE)
    own.lm_head.bias = torch.nn.Parameter(
        torch.randn(SIZE, dtype=h.DOUBLE, generator=torch.Generator().manual_seed(seed))
    )
    return own


class Holes:
    """A tokenizer without the ids 3 and 11, and none from 27 on."""

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(KNOWN) if number not in (3, 11)}


def role(model: Any, name: str = "policy", tokenizer: Any = None) -> Role:
    setattr(model, MISSING, missing_ids(tokenizer or tiny.tokenizer(), SIZE))
    return Role(name, model, name == "policy")


def closed(model: Any, ids: Tensor) -> Tensor:
    """Log-probs over the ids that have a token, by transformers' own forward: (S, 27)."""
    return h.full_logits(model, ids)[:, :KNOWN].log_softmax(-1)


@pytest.mark.parametrize("workspace", [1 << 24, 16], ids=["at once", "in chunks"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_every_column_is_of_the_distribution_over_tokens(
    head: str, packed: bool, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("linear_tokens", "linear_collision", "linear_kl"):
        monkeypatch.setattr(readers, name, partial(getattr(readers, name), workspace=workspace))
    own, reference = role(HEADS[head](0)), role(HEADS[head](1), "reference")
    with torch.no_grad():
        got = read(own, Batch.of(ROWS), NAMES, packed=packed, reference=reference)
    for number, row in enumerate(ROWS):
        logp, other = (closed(one.model, row.ids)[row.start - 1 : -1] for one in (own, reference))
        expected = {
            "logp": logp.gather(1, row.ids[row.start :, None])[:, 0],
            "entropy": -(logp.exp() * logp).sum(-1),
            "collision": (2 * logp).exp().sum(-1),
            "exact_kl": (logp.exp() * (logp - other)).sum(-1),
        }
        for name in NAMES:
            value = expected[name.removeprefix("full_")] * row.mask
            torch.testing.assert_close(got[name][number, : row.response], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_the_distribution_over_tokens(head: str) -> None:
    own, batch = role(HEADS[head](0)), Batch.of(ROWS)
    weight = torch.linspace(-1, 1, batch["mask"].numel(), dtype=h.DOUBLE).reshape(batch["mask"].shape)
    found = read(own, batch, frozenset({"logp", "entropy"}))
    ((found["logp"] + 0.3 * found["entropy"]) * weight).sum().backward()
    got = {name: p.grad.clone() for name, p in own.parameters().items() if p.grad is not None}
    own.model.zero_grad()
    total = torch.zeros((), dtype=h.DOUBLE)
    for number, row in enumerate(ROWS):
        logp = own.model(input_ids=row.ids[None]).logits[0, row.start - 1 : -1, :KNOWN].log_softmax(-1)
        value = logp.gather(1, row.ids[row.start :, None])[:, 0] - 0.3 * (logp.exp() * logp).sum(-1)
        total = total + (value * row.mask * weight[number, : row.response]).sum()
    total.backward()
    for name, parameter in own.parameters().items():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-7, atol=1e-7)


def test_the_loss_of_sft_is_that_of_the_distribution_over_tokens() -> None:
    own = role(HEADS["tied"](0))
    got = evaluate.held_out(LocalLearner({"policy": own}, {"policy": h.FREE}, total=1), compose.SFT, ROWS)
    each = [closed(own.model, row.ids)[row.start - 1 : -1].gather(1, row.ids[row.start :, None])[:, 0] for row in ROWS]
    picked = torch.cat([logp[row.mask] for logp, row in zip(each, ROWS, strict=True)])
    assert next(iter(got.values())) == pytest.approx(float(-picked.mean()), abs=1e-9)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    "sampling", [Sampling(6), Sampling(6, 0.0), Sampling(6, 2.0, top_k=60), Sampling(6, top_p=0.99)], ids=repr
)
@pytest.mark.parametrize("head", HEADS)
def test_ids_without_a_token_are_never_sampled(head: str, sampling: Sampling, cache: bool) -> None:
    from dataclasses import replace

    model = HEADS[head](0)
    with torch.no_grad():
        model.get_output_embeddings().weight[KNOWN:].mul_(3)  # they would be sampled most of the time
    own = role(model)
    own.paths = replace(own.paths, cache=cache)
    prompts = [h.prompt(number, ids) for number, ids in enumerate([(2,), (3, 4, 6, 7, 8), (10, 11)])]
    asked = [Request(prompt, draw, answer, sampling, 3) for draw, prompt in enumerate(prompts) for answer in range(8)]
    free = 0
    for sample in LocalGenerator(own, (1,), str).generate(asked):
        assert max(sample.ids) < KNOWN
        ids = torch.tensor(prompts[sample.draw].ids + sample.ids)
        free += int((h.full_logits(model, ids).argmax(-1) >= KNOWN).sum())
        logp = closed(model, ids)[len(ids) - len(sample.ids) - 1 : -1]
        if sampling.temperature == 0:
            assert list(sample.ids) == logp.argmax(-1).tolist()
        elif not sampling.truncates:
            expected = logp.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(sample.sampler_logp).double(), expected, rtol=1e-5, atol=1e-5)
        assert sample.support is None or max(max(one) for one in sample.support) < KNOWN
    assert free > 20
    (scored,) = LocalGenerator(own, (1,), str).logprobs([ROWS[-1].ids])
    expected = closed(model, ROWS[-1].ids)[:-1].gather(1, ROWS[-1].ids[1:, None])[:, 0]
    torch.testing.assert_close(scored, expected, rtol=1e-9, atol=1e-9)


def test_holes_between_tokens_are_closed_too() -> None:
    own = role(HEADS["tied"](0), tokenizer=Holes())
    assert own.missing is not None
    assert own.missing.tolist() == [3, 11, *range(KNOWN, SIZE)]
    row = h.row(1, 3, 6)
    row.ids[3:] = torch.tensor([4, 5, 12, 2, 10, 1])
    with torch.no_grad():
        got = read(own, Batch.of([row]), frozenset({"logp"}))["logp"][0]
    known = [number for number in range(KNOWN) if number not in (3, 11)]
    logits = h.full_logits(own.model, row.ids)
    expected = logits.gather(1, row.ids.roll(-1)[:, None])[:, 0] - logits[:, known].logsumexp(-1)
    torch.testing.assert_close(got, expected[row.start - 1 : -1], rtol=1e-9, atol=1e-9)


def test_loading_notes_the_ids_and_copies_keep_them(tmp_path: Path) -> None:
    import copy

    folder = tiny.folder(tmp_path / "m", vocabulary=SIZE)
    model = load_causal_lm(ModelSource(str(folder)), load.load_tokenizer(ModelSource(str(folder))))
    for own in (model, copy.deepcopy(model)):
        assert Role("policy", own, True).missing.tolist() == list(range(KNOWN, SIZE))  # type: ignore[union-attr]
    exact = tiny.folder(tmp_path / "exact")
    model = load_causal_lm(ModelSource(str(exact)), load.load_tokenizer(ModelSource(str(exact))))
    assert Role("policy", model, True).missing is None
    Role("policy", model, True).export(tmp_path / "out")
