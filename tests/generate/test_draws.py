"""Drawing: the tokens of the float64 inverse of the cumulative distribution, never one of probability 0; least lengths."""

import pytest
import torch
from models import helpers as h
from torch import Tensor

from generate.helpers import asked, batch_of, drawn
from whet.generate.draws import Draws
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.methods.options import Sampling
from whet.ops import address, addressed_uniform, inverse


def in_double(p: Tensor, chance: Tensor) -> Tensor:
    """The first token whose cumulative probability, in float64 over the whole vocabulary, exceeds the number."""
    cumulative = p.double().cumsum(-1)
    return torch.searchsorted(cumulative, (chance * cumulative[:, -1])[:, None], right=True)[:, 0]


@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 2048, 50_257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_are_those_of_the_float64_sums(size: int, dtype: torch.dtype) -> None:
    """In float32 the sum of a block of 256 is off by 1e-7 of it at most (and 3e-8 on average), so a boundary moves by less than
    that: of V boundaries each moves by some 3e-8 times the probability of its block, and a draw differs with a chance of 1e-5."""
    count = 20_000_000 // max(size, 1000)
    stream = torch.Generator().manual_seed(size)
    p = (2 * torch.randn(count, size, dtype=dtype, generator=stream)).exp()
    chance = torch.rand(count, dtype=torch.float64, generator=stream)
    got, total = inverse(p, chance)
    differ = int((got != in_double(p, chance)).sum())
    assert differ <= (3 if dtype == torch.float32 else 0)
    torch.testing.assert_close(total, p.double().sum(-1), rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)


@pytest.mark.parametrize("size", [5, 300, 1024])
def test_a_token_of_probability_0_is_never_drawn(size: int) -> None:
    stream = torch.Generator().manual_seed(0)
    p = torch.rand(4000, size, generator=stream) * (torch.rand(4000, size, generator=stream) < 3 / size)
    p[:, 1] += 1e-30
    for chance in (0.0, 0.5, 1 - 2.0**-53):
        got, _ = inverse(p, torch.full((4000,), chance, dtype=torch.float64))
        assert bool((p.gather(1, got[:, None]) > 0).all())


def test_numbers_are_addressed_by_seed_draw_answer_and_position() -> None:
    """Two answers begun elsewhere, over more positions than are computed at once."""
    sampling, size = Sampling(200), 50
    requests = asked(sampling, 2)[:3]
    draws = Draws(requests, (), torch.device("cpu"), "policy")
    draws.enter([2, 0, 1])
    p = torch.rand(200, 3, size, generator=torch.Generator().manual_seed(0))
    for step in range(150):
        if step == 70:
            draws.keep(torch.tensor([0, 2]))
        draws.step(p[step, : len(draws.live)].log())
    got = {(s.draw, s.answer): s.ids for s in draws.samples(str, 0)}
    for step in (0, 63, 64, 69, 70, 149):
        for row, number in enumerate((2, 0, 1) if step < 70 else (2, 1)):
            one = requests[number]
            places = (torch.tensor([place]) for place in (one.seed, one.draw, one.answer, step))
            chance = addressed_uniform(address("sample"), *places)
            assert got[one.draw, one.answer][step] == int(in_double(p[step, row : row + 1], chance))


@pytest.mark.parametrize(
    "sampling", [Sampling(9, min_new_tokens=4), Sampling(9, 0.75, top_k=9, min_new_tokens=4)], ids=repr
)
def test_no_answer_ends_before_its_least_length_and_log_probs_are_of_that_distribution(sampling: Sampling) -> None:
    role = h.policy()
    groups = drawn(role, sampling, 8)
    samples = [sample for group in groups for sample in group.samples]
    assert min(len(sample.ids) for sample in samples) >= 5
    assert len({sample.ids[4] for sample in samples} & {1, 5}) > 0
    batch = batch_of(groups, sampling)
    learner = LocalLearner({"policy": role}, {"policy": h.FREE}, total=1)
    got = learner.measure(batch, frozenset({"old_logp", "old_full_logp", "old_entropy"}))
    torch.testing.assert_close(got["old_logp"], batch["sampler_logp"], rtol=0, atol=1e-9)
    if sampling.filters:
        return
    pairs = [(group, sample) for group in groups for sample in group.samples]
    for number, (group, sample) in enumerate(pairs):
        ids = torch.tensor(group.prompt.ids + sample.ids)
        logits = h.full_logits(role.model, ids)[len(group.prompt.ids) - 1 : -1]
        logits[:4, [1, 5]] = -torch.inf
        p = logits.softmax(-1)
        own = slice(0, len(sample.ids))
        torch.testing.assert_close(got["old_entropy"][number, own], torch.special.entr(p).sum(-1), rtol=0, atol=1e-9)
        logp = p.gather(1, torch.tensor(sample.ids)[:, None])[:, 0].log()
        torch.testing.assert_close(got["old_logp"][number, own], logp, rtol=0, atol=1e-9)


def test_greedy_answers_keep_their_least_length() -> None:
    role, ends = h.policy(), tuple(range(20))
    plain, long = (
        [
            len(one.ids)
            for one in LocalGenerator(role, ends, str).generate(asked(Sampling(9, 0.0, min_new_tokens=least), 1))
        ]
        for least in (0, 5)
    )
    assert min(plain) < 5
    assert min(long) > 5


def test_a_least_length_counts_what_an_answer_has_begun_with() -> None:
    from dataclasses import replace

    role, sampling = h.policy(), Sampling(12, min_new_tokens=6)
    whole = list(LocalGenerator(role, (1, 5), str).generate(asked(sampling)))
    resumed = [replace(request, begun=sample.ids[:3]) for request, sample in zip(asked(sampling), whole, strict=True)]
    got = list(LocalGenerator(role, (1, 5), str).generate(resumed))
    assert [one.ids for one in got] == [one.ids[3:] for one in whole]
    assert [one.support for one in got] == [one.support[3:] for one in whole if one.support is not None]


def test_more_than_the_most_is_refused() -> None:
    with pytest.raises(ValueError, match="min_new_tokens 6 is above max_new_tokens 5"):
        Sampling(5, min_new_tokens=6)


@pytest.mark.parametrize("decoder", ["auto", "cached", "recomputed"])
def test_waiting_requests_take_the_rows_of_finished_ones(decoder: str) -> None:
    role = h.policy(dtype=torch.float32)
    plain = list(LocalGenerator(role, (1, 5), str).generate(asked(Sampling(30), 6)))
    few = list(LocalGenerator(role, (1, 5), str, unit=7, decoder=decoder).generate(asked(Sampling(30), 6)))
    assert [one.ids for one in few] == [one.ids for one in plain]
    for one, other in zip(few, plain, strict=True):
        assert one.sampler_logp == pytest.approx(other.sampler_logp, abs=2e-5)
