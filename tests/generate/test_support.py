"""Under top-p, top-k and min-p: what could be drawn is recorded, and the learner reads that distribution."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from models import helpers as h

from generate.helpers import PROMPTS, batch_of, drawn
from whet.data import Batch, Group, Sample
from whet.generate import Request
from whet.generate.draws import truncated_logprobs
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.methods.options import Sampling
from whet.models.roles import Role

KINDS: dict[str, Any] = {
    "qwen3": lambda: tiny.causal_lm("qwen3", dtype=torch.float64),
    "llama": lambda: tiny.causal_lm("llama", dtype=torch.float64),
    "gpt2": lambda: tiny.causal_lm("gpt2", dtype=torch.float64),
    "capped": h.capped,
}
DIALS = [
    Sampling(8, top_p=0.9), Sampling(8, top_p=0.3), Sampling(8, top_k=4), Sampling(8, top_k=1), Sampling(8, min_p=0.2),
    Sampling(8, 0.75, top_k=9, top_p=0.8, min_p=0.05),
]  # fmt: skip


def distributions(model: Any, group: Group, sample: Sample, sampling: Sampling) -> torch.Tensor:
    """The log-probs that each token was drawn from, by transformers' full forward: (tokens, V)."""
    ids = torch.tensor(group.prompt.ids + sample.ids)
    return truncated_logprobs(h.full_logits(model, ids)[len(group.prompt.ids) - 1 : -1], sampling)


@pytest.mark.parametrize("sampling", DIALS, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_the_support_is_what_had_a_probability_and_its_log_prob_is_told(kind: str, sampling: Sampling) -> None:
    role = Role("policy", KINDS[kind](), True)
    sizes = set()
    for group in drawn(role, sampling):
        for sample in group.samples:
            assert sample.support is not None
            expected = distributions(role.model, group, sample, sampling)
            assert [list(one) for one in sample.support] == [row.nonzero()[:, 0].tolist() for row in expected.exp()]
            chosen = expected.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
            assert sample.sampler_logp == pytest.approx(chosen.tolist(), abs=1e-9)
            sizes |= {len(one) for one in sample.support}
    assert len(sizes) > 1 or sampling.top_k in sizes


@pytest.mark.parametrize("sampling", [Sampling(4), Sampling(4, 0.5), Sampling(4, 0.0, top_k=3)], ids=repr)
def test_where_every_token_could_be_drawn_or_one_alone_there_is_no_support(sampling: Sampling) -> None:
    assert {sample.support for group in drawn(h.policy(), sampling) for sample in group.samples} == {None}


def test_a_request_that_truncates_leaves_its_neighbors_whole() -> None:
    role, plain = h.policy(), Sampling(4)
    asked = [Request(PROMPTS[0], 0, n, replace(plain, top_k=3) if n % 2 else plain, 3) for n in range(4)]
    got = list(LocalGenerator(role, (1, 5), str).generate(asked))
    assert [one.support is None for one in got] == [True, False, True, False]
    assert all(len(one) == 3 for sample in got[1::2] for one in sample.support or ())


@pytest.mark.parametrize("options", [{}, {"budget": 12}, {"packed": True}], ids=repr)
@pytest.mark.parametrize("sampling", DIALS, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_the_learner_reads_what_the_sampler_reported_and_the_whole_vocabularys_beside_it(
    kind: str, sampling: Sampling, options: dict[str, Any]
) -> None:
    role = Role("policy", KINDS[kind](), True)
    batch = batch_of(drawn(role, sampling), sampling)
    learner = LocalLearner({"policy": role}, {"policy": h.FREE}, total=1, **options)
    names = frozenset({"old_logp", "old_full_logp", "old_entropy", "old_collision"})
    got = learner.measure(batch, names)
    torch.testing.assert_close(got["old_logp"], batch["sampler_logp"], rtol=0, atol=1e-5 if kind == "capped" else 1e-9)
    whole = Batch(batch.rows, {name: values for name, values in batch.columns.items() if name != "support"})
    plain = learner.measure(whole, names)
    torch.testing.assert_close(got["old_full_logp"], plain["old_logp"], rtol=0, atol=1e-10)
    assert torch.equal(plain["old_full_logp"], plain["old_logp"])
    mask = batch["mask"]
    assert bool((got["old_logp"] >= got["old_full_logp"] - 1e-9)[mask].all())
    size = (batch["support"] >= 0).sum(-1)[mask].double()
    assert bool((got["old_entropy"][mask] <= size.log() + 1e-9).all())
    assert bool((got["old_collision"][mask] >= 1 / size - 1e-9).all())


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_and_collision_are_of_the_distribution_that_was_drawn_from(kind: str) -> None:
    role, sampling = Role("policy", KINDS[kind](), True), Sampling(8, 0.75, top_k=9, top_p=0.8)
    groups = drawn(role, sampling, 2)
    learner = LocalLearner({"policy": role}, {"policy": h.FREE}, total=1)
    got = learner.measure(batch_of(groups, sampling), frozenset({"old_entropy", "old_collision"}))
    samples = [(group, sample) for group in groups for sample in group.samples]
    for number, (group, sample) in enumerate(samples):
        p = distributions(role.model, group, sample, sampling).exp()
        own = slice(0, len(sample.ids))
        torch.testing.assert_close(got["old_entropy"][number, own], torch.special.entr(p).sum(-1), rtol=0, atol=1e-9)
        torch.testing.assert_close(got["old_collision"][number, own], (p * p).sum(-1), rtol=0, atol=1e-9)


def test_a_token_that_alone_could_be_drawn_is_certain_and_teaches_nothing() -> None:
    """Read over the whole vocabulary instead, its log-prob would be below 0 and its gradient would push it up."""
    from whet.models.readers import read

    role, sampling = h.policy(), Sampling(8, top_k=1)
    batch = batch_of(drawn(role, sampling, 1), sampling)
    columns = read(role, batch, frozenset({"logp", "full_logp"}))
    assert not columns["logp"].any()
    assert bool((columns["full_logp"][batch["mask"]] < -0.01).any())
    columns["logp"].sum().backward()
    assert all(p.grad is None or not p.grad.abs().max() > 1e-12 for p in role.parameters().values())
