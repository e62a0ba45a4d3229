"""Loss and gradient of one update do not depend on how the mini-batch is split, ordered, laid out or padded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from models import helpers as h

from whet.cli.verbs import SFT
from whet.dials import Sampling
from whet.generate.local import LocalGenerator
from whet.learner.base import Work
from whet.loops import offline, online
from whet.loops.record import Run
from whet.methods import Algorithm, preference, reward
from whet.methods import online as methods
from whet.methods.part import Term
from whet.models import readers
from whet.models.roles import Role
from whet.ops import Counts
from whet.records import Batch, pad_ids, take_elements
from whet.rewards import Weighted

DTYPES = {"float64": (torch.float64, 1e-6), "float32": (torch.float32, 1e-5)}
PROMPTS = [h.prompt(i, range(3 + i, 5 + 3 * i)) for i in range(3)]


@dataclass(frozen=True)
class Scenario:
    """What is trained, on what, by which roles."""

    objective: Any
    elements: Callable[[], list] = h.rows
    roles: tuple[str, ...] = ("policy",)


SCENARIOS = {
    "sft": Scenario(SFT),
    "pairwise": Scenario(reward.pairwise(centring=0.05), h.pairs, ("reward",)),
    "k_way": Scenario(reward.k_way(), h.rankings, ("reward",)),
    "absolute": Scenario(reward.absolute(), h.labelled, ("reward",)),
    "dpo": Scenario(preference.dpo(beta=0.5, sft_weight=0.3), h.pairs, ("policy", "reference")),
    "ipo": Scenario(preference.ipo(beta=0.5, mean=True), h.pairs, ("policy", "reference")),
    "ppo": Scenario(methods.ppo(answers=3), roles=("policy", "reference", "critic")),
    "ppo_kl": Scenario(methods.ppo_kl(answers=3), roles=("policy", "reference", "critic")),
    "grpo": Scenario(methods.grpo(answers=4), roles=("policy", "reference")),
    "instructgpt": Scenario(methods.instructgpt(answers=3), roles=("policy", "reference", "critic")),
    "reinforce": Scenario(methods.reinforce(answers=3), roles=("policy", "reference")),
}


def roles(scenario: Scenario, dtype: torch.dtype, kind: str = "qwen3") -> dict[str, Role]:
    """Fresh roles; the reference's weights are not the policy's, so that every number moves."""
    make = {
        "policy": lambda: h.policy(kind, dtype=dtype),
        "reference": lambda: h.policy(kind, dtype=dtype, name="reference", seed=1),
        "critic": lambda: h.scorer(kind, dtype=dtype, seed=2),
        "reward": lambda: h.scorer(kind, dtype=dtype, name="reward", seed=2, readout="mean", shift=0.25),
    }
    return {name: make[name]() for name in scenario.roles}


def learner(scenario: Scenario, dtype: torch.dtype, *, kind: str = "qwen3", **dials: Any) -> h.Recorder:
    cast = roles(scenario, dtype, kind)
    optims = {name: h.FREE for name, role in cast.items() if role.trained}
    return h.Recorder(cast, optims, total=8, **({"budget": 40} | dials))


def trained(
    scenario: Scenario, dtype: torch.dtype, *, updates: int = 2, kind: str = "qwen3", **dials: Any
) -> h.Recorder:
    """The learner after `updates` updates of the real loop: in the last one policy and rollout differ."""
    own = learner(scenario, dtype, kind=kind, **dials)
    with TemporaryDirectory() as folder:
        run = Run(Path(folder))
        if not isinstance(scenario.objective, Algorithm):
            elements = scenario.elements()
            offline.train(scenario.objective, own, [elements], offline.Plan(updates, len(elements)), run, quiet=True)
            return own
        method = scenario.objective
        epochs = updates if method.has_ratio() else 1
        total = len(PROMPTS) * method.answers
        plan = online.Plan(1, len(PROMPTS), total, epochs, ptx_batch=5, canary=20)
        table = Weighted(
            "table", h.TableReward(lambda ids: 0.5 * len(ids) - 0.25 * (sum(ids) % 5), dense=method.penalty is not None)
        )
        generator = LocalGenerator(own.roles["policy"], (1, 5, 9), str)
        ptx = h.rows() if any(term.stream == "ptx" for term in method.terms) else []
        online.train(method, own, generator, [table], PROMPTS, Sampling(6, 0.9), plan, run, ptx=ptx, quiet=True)
    return own


@cache
def recorded(name: str, precision: str) -> h.Recorder:
    return trained(SCENARIOS[name], DTYPES[precision][0])


def replayed(
    name: str, precision: str, change: Callable[[Batch], Batch] = lambda batch: batch, **dials: Any
) -> h.Recorder:
    """The recorded update once more from the same weights, handed over otherwise."""
    base = recorded(name, precision)
    again = learner(SCENARIOS[name], DTYPES[precision][0], **dials)
    h.with_weights(again.roles, base.before)
    changed: dict[int, Batch] = {}
    work = [(term, changed.setdefault(id(batch), change(batch)), counts) for term, batch, counts in base.work]
    again.update(work)
    return again


def size(base: h.Recorder, work: Work) -> float:
    """The sum of the absolute shares: each element's alone, with the counts of all."""
    fresh = type(base)(base.roles, base.optims, total=8)
    now = h.weights(base)
    h.with_weights(base.roles, base.before)
    out = 0.0
    for term, batch, counts in work:
        for place in range(len(batch.elements())):
            one = take_elements(batch, [place])
            out += sum(map(abs, fresh.evaluate([(term, one, counts)]).losses.values()))
    h.with_weights(base.roles, now)
    return out


def same(base: h.Recorder, other: h.Recorder, within: float) -> None:
    """Loss against the sum of absolute shares, gradient against its norm."""
    ours, theirs = base.step.losses, other.step.losses
    assert ours.keys() == theirs.keys()
    difference = sum(abs(ours[name] - theirs[name]) for name in ours)
    assert difference <= within * size(base, base.work)
    for name, gradient in base.grads.items():
        assert gradient.norm() > 1e-3
        assert (gradient - other.grads[name]).norm() <= within * gradient.norm(), name


def junk_behind(rows: Any) -> torch.Tensor:
    """Five more columns, and other ids than the row's last one in all padding."""
    ids = torch.nn.functional.pad(pad_ids(rows), (0, 5))
    for number, one in enumerate(rows):
        ids[number, one.length :] = torch.arange(ids.shape[1] - one.length) * 5 % 26
    return ids


CHANGES: Mapping[str, dict[str, Any]] = {
    "one row each": {"budget": 1},
    "all rows at once": {"budget": 10**6},
    "another order": {"change": h.permuted},
    "another order, small micro-batches": {"change": h.permuted, "budget": 17},
    "packed": {"packed": True},
    "packed, all at once": {"packed": True, "budget": 10**6},
    "NaN in the padding of columns": {"change": h.spoiled},
    "NaN in the padding of columns, one row each": {"change": h.spoiled, "budget": 1},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_update_is_the_same(name: str, precision: str, change: str) -> None:
    same(recorded(name, precision), replayed(name, precision, **CHANGES[change]), DTYPES[precision][1])


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_stands_in_the_padding_of_ids_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = recorded(name, "float64")
    monkeypatch.setattr(readers, "pad_ids", junk_behind)
    same(base, replayed(name, "float64"), 1e-6)


@pytest.mark.parametrize("dials", [{"budget": 1}, {"budget": 10**6}, {"packed": True}], ids=str)
@pytest.mark.parametrize("name", ["sft", "dpo", "ppo", "grpo", "instructgpt"])
def test_a_whole_loop_is_the_same(name: str, dials: dict[str, Any]) -> None:
    """Measuring and crediting included: the last gradient of two updates through the loop."""
    same(recorded(name, "float64"), trained(SCENARIOS[name], torch.float64, **dials), 1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_whole_loop_is_the_same_on_other_models(name: str, kind: str) -> None:
    base = trained(SCENARIOS[name], torch.float64, kind=kind)
    for dials in ({"budget": 1}, {"packed": True, "budget": 10**6}):
        same(base, trained(SCENARIOS[name], torch.float64, kind=kind, **dials), 1e-6)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "reinforce"])
def test_the_recorded_update_is_not_trivial(name: str) -> None:
    """Rows differ in length, and in online methods the policy has moved away from the rollout."""
    base = recorded(name, "float64")
    _, batch, counts = base.work[0]
    assert len({one.length for one in batch.rows}) > 2
    elements = len(batch.rows) if "old_logp" in batch.columns else len(SCENARIOS[name].elements())
    assert counts == Counts(sum(int(one.mask.sum()) for one in batch.rows), len(batch.rows), elements)
    if "old_logp" in batch.columns:
        ratio = (base.step.now["rollout"]["logp"] - batch["old_logp"]).exp()[batch["mask"]]
        assert float((ratio - 1).abs().max()) > 0.2


def test_the_gradient_of_ppo_ptx_is_the_sum_of_both() -> None:
    base = recorded("instructgpt", "float64")
    parts = []
    for streams in ({"rollout"}, {"ptx"}):
        again = learner(SCENARIOS["instructgpt"], torch.float64)
        h.with_weights(again.roles, base.before)
        again.update([item for item in base.work if item[0].stream in streams])
        parts.append(again.grads["policy"])
    assert min(float(part.norm()) for part in parts) > 1e-3
    torch.testing.assert_close(base.grads["policy"], parts[0] + parts[1], rtol=1e-9, atol=1e-12)


def test_the_weight_of_a_term_scales_its_gradient() -> None:
    base = recorded("sft", "float64")
    again = learner(SCENARIOS["sft"], torch.float64)
    h.with_weights(again.roles, base.before)
    term, batch, counts = base.work[0]
    again.update([(Term(term.role, term.stream, term.loss, term.reduce, 4.0), batch, counts)])
    torch.testing.assert_close(again.grads["policy"], 4 * base.grads["policy"], rtol=0, atol=0)
