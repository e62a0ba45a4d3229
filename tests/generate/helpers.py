"""Answers of a role to a few prompts, as requests, groups and a batch."""

import torch
from models import helpers as h

from whet.data import Batch, Group, pad, pad_support
from whet.generate import Request
from whet.generate.local import LocalGenerator
from whet.methods.options import Sampling
from whet.models.roles import Role

PROMPTS = [h.prompt(i, ids) for i, ids in enumerate([(2,), (3, 4, 6, 7, 8, 9, 4, 4, 3), (10, 11)])]


def asked(sampling: Sampling, count: int = 4) -> list[Request]:
    return [Request(one, draw, answer, sampling, 3) for draw, one in enumerate(PROMPTS) for answer in range(count)]


def drawn(role: Role, sampling: Sampling, count: int = 4) -> list[Group]:
    samples = list(LocalGenerator(role, (1, 5), str).generate(asked(sampling, count)))
    return [Group(one, tuple(samples[i * count : (i + 1) * count])) for i, one in enumerate(PROMPTS)]


def batch_of(groups: list[Group], sampling: Sampling) -> Batch:
    """As the online loop gathers it."""
    samples = [sample for group in groups for sample in group.samples]
    supports = [sample.support for sample in samples if sample.support is not None]
    return Batch.of([row for group in groups for row in group.rows()]).with_columns(
        temperature=torch.full((len(samples),), sampling.temperature),
        sampler_logp=pad([torch.tensor(sample.sampler_logp, dtype=torch.float64) for sample in samples]),
        **({"support": pad_support(supports)} if supports else {}),
    )
