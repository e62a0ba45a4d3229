"""Sampling from a real model: its distribution by enumeration, its log-probs by transformers' full forward."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import tiny
import torch
from models import helpers as h
from scipy.stats import chi2

from whet.generate import Request
from whet.generate.draws import truncated_logprobs
from whet.generate.local import LocalGenerator
from whet.methods.options import Sampling
from whet.models.roles import Role

PROMPTS = [h.prompt(i, ids) for i, ids in enumerate([(2,), (3, 4, 6, 7, 8, 9, 4, 4, 3), (10, 11), (12, 13, 14, 2, 2)])]


def generator(role: Role, end: tuple[int, ...] = (1,), **given: Any) -> LocalGenerator:
    return LocalGenerator(role, end, str, **given)


def asked(sampling: Sampling, count: int = 4) -> list[Request]:
    return [
        Request(prompt, draw, answer, sampling, 3) for draw, prompt in enumerate(PROMPTS) for answer in range(count)
    ]


def kept(logp: list[float], sampling: Sampling) -> list[float]:
    """The distribution sampled from, in plain Python: temperature, top-k, top-p, min-p, renormalized."""
    import math

    scaled = [value / sampling.temperature for value in logp]
    total = math.log(sum(map(math.exp, scaled)))
    p = sorted(((math.exp(value - total), token) for token, value in enumerate(scaled)), reverse=True)
    if sampling.top_k:
        p = p[: sampling.top_k]
    if sampling.top_p < 1:
        whole, running, nucleus = sum(share for share, _ in p), 0.0, []
        for share, token in p:
            if running >= sampling.top_p:
                break
            nucleus.append((share, token))
            running += share / whole
        p = nucleus
    p = [(share, token) for share, token in p if share >= sampling.min_p * p[0][0]]
    whole = sum(share for share, _ in p)
    out = [0.0] * len(logp)
    for share, token in p:
        out[token] = share / whole
    return out


# --- the distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [Sampling(2), Sampling(2, 0.6), Sampling(2, top_k=3), Sampling(2, top_p=0.97)], ids=repr
)
def test_answers_are_drawn_as_often_as_the_enumeration_says(sampling: Sampling) -> None:
    """Every answer of one or two tokens of a vocabulary of 8, 4000 samples, chi-square at 1 in 10 000."""
    role = h.policy(vocabulary=8)
    prompt, end, count = h.prompt(0, (2, 3, 5)), 1, 4000
    first = kept(h.full_logits(role.model, torch.tensor(prompt.ids)).log_softmax(-1)[-1].tolist(), sampling)
    expected = {(end,): first[end]}
    for token, after in product(range(8), repeat=2):
        if token != end:
            ids = torch.tensor([*prompt.ids, token])
            second = kept(h.full_logits(role.model, ids).log_softmax(-1)[-1].tolist(), sampling)
            expected[token, after] = first[token] * second[after]
    assert sum(expected.values()) == pytest.approx(1)
    seen: dict[tuple[int, ...], int] = {}
    for sample in generator(role, unit=4000).generate(
        [Request(prompt, 0, answer, sampling, 5) for answer in range(count)]
    ):
        seen[sample.ids] = seen.get(sample.ids, 0) + 1
    assert all(expected[ids] > 0 for ids in seen)
    large = {ids: p * count for ids, p in expected.items() if p * count >= 5}
    rest = count - sum(large.values())
    statistic = sum((seen.get(ids, 0) - mean) ** 2 / mean for ids, mean in large.items())
    statistic += (count - sum(seen.get(ids, 0) for ids in large) - rest) ** 2 / rest if rest > 5 else 0
    assert len(large) >= 4
    assert statistic < chi2.ppf(0.9999, len(large) - (rest <= 5))


def test_draws_of_one_prompt_do_not_repeat_each_other() -> None:
    """The draw is part of the address: handed out again, a prompt gets other answers."""
    role = h.policy(dtype=torch.float32)
    prompt = PROMPTS[1]
    got = [
        sample.ids
        for sample in generator(role).generate([Request(prompt, draw, 0, Sampling(8), 3) for draw in range(20)])
    ]
    assert len(set(got)) > 15


# --- the reported log-probs ------------------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "qwen3": lambda dtype: tiny.causal_lm("qwen3", dtype=dtype), "llama": lambda dtype: tiny.causal_lm("llama", dtype=dtype),
    "gpt2": lambda dtype: tiny.causal_lm("gpt2", dtype=dtype), "capped, sliding window": lambda dtype: h.capped(dtype=dtype),
}  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_reported_log_probs_are_those_of_the_full_forward(kind: str, temperature: float) -> None:
    """Left padding, the cache, and rows that drop out along the way change nothing."""
    role = Role("policy", KINDS[kind](torch.float32), True)
    samples = list(generator(role, (1, 5, 9)).generate(asked(Sampling(12, temperature), 6)))
    assert len({len(sample.ids) for sample in samples}) > 3
    for sample in samples:
        ids = torch.tensor(PROMPTS[sample.draw].ids + sample.ids)
        logp = (h.full_logits(role.model, ids) / temperature).log_softmax(-1)[len(ids) - len(sample.ids) - 1 : -1]
        expected = logp.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.sampler_logp), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_unlike_length_in_one_batch_are_as_one_at_a_time(kind: str) -> None:
    role = Role("policy", KINDS[kind](torch.float64), True)
    whole = list(generator(role, (1, 5)).generate(asked(Sampling(8))))
    for request, sample in zip(asked(Sampling(8)), whole, strict=True):
        alone = next(generator(role, (1, 5)).generate([request]))
        assert alone.ids == sample.ids
        assert alone.sampler_logp == pytest.approx(sample.sampler_logp, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_canary_is_scored_as_the_full_forward_does(kind: str) -> None:
    role = Role("policy", KINDS[kind](torch.float64), True)
    ids = [h.row(i, 1, length).ids for i, length in enumerate((1, 7, 40))]
    for one, got in zip(ids, generator(role).logprobs(ids), strict=True):
        expected = h.full_logits(role.model, one).log_softmax(-1)[:-1].gather(1, one[1:, None])[:, 0]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_on_a_trunk_the_policys_adapter_answers() -> None:
    roles = h.trunk()
    with torch.no_grad():
        for name, parameter in roles["policy"].parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    own, base = (list(generator(roles[name]).generate(asked(Sampling(8)))) for name in ("policy", "reference"))
    assert own != base
    assert base == list(generator(h.policy(dtype=torch.float32)).generate(asked(Sampling(8))))
    with roles["policy"].active():
        for sample in own[:4]:
            ids = torch.tensor(PROMPTS[sample.draw].ids + sample.ids)
            logp = h.full_logits(roles["policy"].model, ids).log_softmax(-1)[len(ids) - len(sample.ids) - 1 : -1]
            expected = logp.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(sample.sampler_logp), expected, rtol=1e-5, atol=1e-5)


# --- truncation ------------------------------------------------------------------------------------------------------

DIALS = [
    Sampling(), Sampling(temperature=0.5), Sampling(temperature=3.0), Sampling(top_k=1), Sampling(top_k=4), Sampling(top_k=100),
    Sampling(top_p=0.01), Sampling(top_p=0.5), Sampling(top_p=0.95), Sampling(min_p=0.2), Sampling(min_p=0.9),
    Sampling(temperature=0.7, top_k=5, top_p=0.8, min_p=0.1), Sampling(temperature=2.0, top_k=6, top_p=0.6),
]  # fmt: skip


@pytest.mark.parametrize("sampling", DIALS, ids=repr)
def test_support_and_log_probs_are_those_of_plain_python(sampling: Sampling) -> None:
    logits = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2
    got = truncated_logprobs(logits, sampling).exp()
    for row, logp in zip(got.tolist(), logits.log_softmax(-1).tolist(), strict=True):
        expected = kept(logp, sampling)
        assert [p > 0 for p in row] == [p > 0 for p in expected]
        assert row == pytest.approx(expected, abs=1e-12)


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    for top_p, count in ((0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.96, 4)):
        assert int((truncated_logprobs(logits, Sampling(top_p=top_p)).exp() > 0).sum()) == count


@pytest.mark.parametrize(
    "sampling", [Sampling(6, top_k=3), Sampling(6, 0.8, top_p=0.6), Sampling(6, min_p=0.3)], ids=repr
)
def test_truncated_answers_stay_in_the_support_with_its_log_probs(sampling: Sampling) -> None:
    role = h.policy()
    for sample in generator(role).generate(asked(sampling)):
        ids = torch.tensor(PROMPTS[sample.draw].ids + sample.ids)
        logp = h.full_logits(role.model, ids).log_softmax(-1)[len(ids) - len(sample.ids) - 1 : -1]
        for token, own, reported in zip(sample.ids, logp.tolist(), sample.sampler_logp, strict=True):
            p = kept(own, sampling)[token]
            assert p > 0
            assert reported == pytest.approx(float(torch.tensor(p).log()), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_argmax(kind: str) -> None:
    role = Role("policy", KINDS[kind](torch.float64), True)
    for sample in generator(role).generate(asked(Sampling(8, 0.0), 1)):
        ids = list(PROMPTS[sample.draw].ids)
        for token in sample.ids:
            assert token == int(h.full_logits(role.model, torch.tensor(ids))[-1].argmax())
            ids.append(token)


# --- models whose numbers go wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
def test_logits_that_are_no_numbers_stop_the_run_and_give_no_answers(cache: bool) -> None:
    from whet.errors import RunStopped

    role = h.policy(dtype=torch.float32)
    own = generator(role)
    list(own.generate(asked(Sampling(2))))
    role.paths = replace(role.paths, cache=cache)
    with torch.no_grad():
        role.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunStopped, match="no token can be drawn"):
        list(own.generate(asked(Sampling(2))))
