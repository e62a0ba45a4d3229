"""Healthy runs: no check stops them, and nothing is printed that suggests a fault. Twenty runs over five methods."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import helpers as h

from loops.helpers import END, PROMPTS, WithTool, cast, go, learner_of, method_of
from whet import methods
from whet.data import Pair, Ranking, Row
from whet.errors import RunStopped
from whet.generate.local import LocalGenerator
from whet.loops import offline, online, selfcheck
from whet.loops.record import RunFolder, read_metrics
from whet.methods.compose import SFT
from whet.methods.options import Sampling, Truncated
from whet.rewards import Weighted

STEPS, RATE = 8, 0.003


def good(seed: int, number: int) -> Row:
    """An answer that counts up from its prompt; the other answers are random."""
    start = 2 + (seed + number) % 9
    ids = torch.tensor([start, start + 1, *range(start + 2, start + 6), END[0]])
    return Row(ids, 2, torch.ones(5, dtype=torch.bool))


def elements(kind: str, seed: int) -> list[Any]:
    bad = []
    for number in range(8):
        other, prompt = h.row(100 * seed + number, 2, 5), good(seed, number).ids[:2]
        bad.append(replace(other, ids=torch.cat([prompt, other.ids[2:]])))
    if kind == "sft":
        return [good(seed, number) for number in range(8)]
    if kind == "dpo":
        return [Pair(good(seed, number), one) for number, one in enumerate(bad)]
    return [Ranking((good(seed, number), one, bad[number - 1]), (1, 2, 3)) for number, one in enumerate(bad)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_healthy_run_on_data_raises_no_alarm(tmp_path: Path, capsys: Any, kind: str, seed: int) -> None:
    objective: Any = {"sft": SFT, "dpo": methods.preference("dpo"), "reward": methods.reward("k_way")}[kind]
    name = "reward" if kind == "reward" else "policy"
    make = h.scorer if kind == "reward" else h.policy
    roles = {name: make(name=name, seed=seed, dtype=torch.float32)}
    if kind == "dpo":
        roles["reference"] = h.policy(seed=seed, dtype=torch.float32, name="reference")
    plan = offline.OfflinePlan(STEPS, 4, seed, end_ids=END[:1], on_divergence="stop")
    offline.train(
        objective, learner_of(roles, lr=RATE), [elements(kind, seed)], plan, RunFolder(tmp_path), quiet=True
    )  # fmt: skip
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert len(losses) == STEPS
    assert min(losses[-2:]) < losses[0]  # it learns
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "stopped").exists()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_healthy_online_run_raises_no_alarm(tmp_path: Path, capsys: Any, name: str, seed: int) -> None:
    method = method_of(name, longest=12)
    roles = cast(method)
    roles["policy"] = h.policy(seed=seed, dtype=torch.float32)
    if "reference" in roles:
        roles["reference"] = h.policy(seed=seed, dtype=torch.float32, name="reference")
    own = learner_of(roles, lr=RATE)
    size = 3 * method.collect.num_generations
    plan = online.OnlinePlan(
        STEPS, 3, max(1, size // 2), epochs=2, seed=seed, canary=20, end_ids=END, equal_start=True, on_divergence="stop"
    )  # fmt: skip
    reward = h.TableReward(lambda ids: sum(token % 2 for token in ids) / len(ids))
    source = LocalGenerator(own.roles["policy"], END, str)
    online.train(
        method, own, source, [Weighted("odd", reward)], PROMPTS, Sampling(12), plan, RunFolder(tmp_path), quiet=True
    )  # fmt: skip
    assert len(read_metrics(tmp_path)) == STEPS
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "stopped").exists()


# --- answers of several turns ------------------------------------------------------------------------------------------


class Turns(WithTool):
    """Turns of the policy end with an end token, as those of the tool do, which has the last word."""

    result, last, turns = (12, END[0]), (8, END[0]), True


@pytest.mark.parametrize("rule", ["keep", "mask", "penalize"])
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_answers_with_tokens_of_a_tool_raise_no_alarm(tmp_path: Path, capsys: Any, name: str, rule: str) -> None:
    """Also if a tool writes an end token, and if truncated answers of several turns are left out."""
    method = method_of(name, truncated=Truncated(rule, **({"amount": 0.5} if rule == "penalize" else {})))  # type: ignore[arg-type]
    go(
        tmp_path,
        method,
        generator=Turns,
        sampling=Sampling(6),
        steps=3,
        learner=learner_of(cast(method), lr=RATE),
        on_divergence="stop",
    )
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert not (tmp_path / "stopped").exists()


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e-2])
def test_new_weights_whose_difference_is_less_than_the_rounding_are_not_refused(scale: float) -> None:
    """A half-precision engine is off by 0.02 nats at random, and the update changed less, or as much: 200 pushes of each."""
    draw = torch.Generator().manual_seed(4)

    class Engine:
        version = 1
        reports: frozenset[str] = frozenset()

        def logprobs(self, ids: Any) -> Any:
            return [expected + 0.02 * torch.randn(159, generator=draw)]

    for _ in range(200):
        before = -3 * torch.rand(159, generator=draw)
        expected = before + 0.02 * torch.randn(159, generator=draw) + scale * torch.randn(159, generator=draw)
        selfcheck.published(0, Engine(), 1, torch.arange(160), before, expected, low_precision=True)  # type: ignore[arg-type]
    expected = before + 0.2 * torch.randn(159, generator=draw)

    class Stale(Engine):
        def logprobs(self, ids: Any) -> Any:
            return [before + 0.02 * torch.randn(159, generator=draw)]

    with pytest.raises(RunStopped, match="the new weights did not arrive"):
        selfcheck.published(0, Stale(), 1, torch.arange(160), before, expected, low_precision=True)  # type: ignore[arg-type]
