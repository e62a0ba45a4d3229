"""The generators' contract on the generators of one process; another adapter is one more entry of ADAPTERS."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from models import helpers as h

from generate.contract import END, Contract, plain, requests
from whet.data import Weights
from whet.generate import ScriptedGenerator
from whet.generate.local import LocalGenerator
from whet.models.roles import Role


def local(kind: str, **given: Any) -> Callable[[], LocalGenerator]:
    return lambda: LocalGenerator(
        h.policy(kind, dtype=torch.float32), END, lambda ids: " ".join(map(str, ids)), **given
    )


def scripted() -> ScriptedGenerator:
    def script(prompt: Any, answer: int) -> Sequence[int]:
        return [*range(10, 10 + (3 * int(prompt.id) + 2 * answer) % 7), END[0]]

    return ScriptedGenerator(script, lambda ids: " ".join(map(str, ids)))


ADAPTERS: dict[str, Callable[[], Any]] = {
    "local qwen3": local("qwen3"), "local llama": local("llama"), "local gpt2": local("gpt2"),
    "local gpt2, small units": local("gpt2", unit=3), "scripted": scripted,
}  # fmt: skip


@pytest.fixture(params=ADAPTERS)
def generator(request: pytest.FixtureRequest) -> Any:
    return ADAPTERS[request.param]()


class TestContract(Contract):
    """Each adapter keeps it."""


def test_adopted_weights_answer_from_then_on() -> None:
    first, second = h.policy(dtype=torch.float32), h.policy(dtype=torch.float32, seed=1)
    generator, fresh = (LocalGenerator(role, END, str) for role in (first, second))
    before = plain(list(generator.generate(requests())))
    generator.load_weights(Weights(1, second))
    assert plain(list(generator.generate(requests()))) == plain(list(fresh.generate(requests()))) != before


def test_weights_that_change_in_place_are_used_at_once() -> None:
    role: Role = h.policy(dtype=torch.float32)
    generator = LocalGenerator(role, END, str)
    before = list(generator.generate(requests()))
    with torch.no_grad():
        for parameter in role.parameters().values():
            parameter.mul_(0.5)
    assert list(generator.generate(requests())) != before
    assert list(generator.generate(requests())) == list(LocalGenerator(role, END, str).generate(requests()))
