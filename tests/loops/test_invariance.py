"""Loss and gradient of one update do not depend on how the mini-batch is split, ordered, laid out or padded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from models import helpers as h
from torch import Tensor

from loops.helpers import ONLINE, PROMPTS, Rough, method_of, unpaired
from whet.data import COLUMNS, Batch, Row, Stepped, pad_ids, take_elements
from whet.generate.local import LocalGenerator
from whet.learner import UpdateResult, Work
from whet.learner.local import LocalLearner
from whet.loops import offline, online
from whet.loops.record import RunFolder
from whet.methods import Algorithm, Objective, Term, catalogue, preference, reward
from whet.methods.choices import PAIR_LOSSES, SINGLE_LOSSES
from whet.methods.compose import SFT
from whet.methods.options import KL, Sampling
from whet.models import readers
from whet.models.roles import Role
from whet.ops import Counts
from whet.rewards import Weighted

DTYPES = {"float64": (torch.float64, 1e-6), "float32": (torch.float32, 1e-5)}


@dataclass(frozen=True)
class Scenario:
    """What is trained, on what; online methods also say how their answers are drawn."""

    objective: Algorithm | Objective
    elements: Callable[[], list] = h.rows
    sampling: Sampling = Sampling(6, 0.9)
    generator: Any = LocalGenerator

    @property
    def roles(self) -> frozenset[str]:
        if isinstance(self.objective, Algorithm):
            return self.objective.roles()
        beside = {"reference"} if "ref_logp" in self.objective.reads() else set()
        return frozenset({term.role for term in self.objective.terms} | beside)


def rows() -> list[Row]:
    return h.rows()


def stepped() -> list[Stepped]:
    """Answers of one to three steps, some with holes; a step ends on a trained token."""
    out = []
    for one in rows():
        ends = one.mask & (torch.arange(one.response) % 2 == 0)
        out.append(Stepped(one, torch.where(ends, torch.arange(one.response) % 3 / 2, 0.0), ends))
    return out


def of(name: str, **changes: Any) -> Scenario:
    """An online method of the catalogue with three answers a prompt."""
    about = {key: changes.pop(key) for key in ("sampling", "generator") if key in changes}
    return Scenario(method_of(name, **({"num_generations": 3} | changes)), **about)


def on_pairs(name: str = "dpo", **changes: Any) -> Scenario:
    return Scenario(preference(name, **changes), h.pairs)


WIDE = {"clip_low": 0.2, "clip_high": 0.2}
CHANGED: Mapping[str, dict[str, Any]] = {
    "dapo": {"overlong": {"name": "soft_overlong", "buffer": 2}},
    "gspo": {"surrogate": WIDE},  # else every answer that moved is beyond the clip
    "clip_cov": {"select": {"share": 0.3, "cov_low": -0.5, "cov_high": 9.0}},
    "kl_cov": {"select": {"share": 0.3}},
    "gdpo": {"weights": (1.0, 0.7)},
}
"""What a method of the catalogue needs so that its update is not trivial on a few short answers."""
TRL = [name for name in PAIR_LOSSES if name != "sigmoid"]
SCENARIOS: dict[str, Scenario] = {
    "sft": Scenario(SFT),
    **{name: of(name, **CHANGED.get(name, {})) for name in ONLINE},
    **{name: on_pairs(name) for name in catalogue.PREFERENCE if name not in ("kto", "dpo")},
    "dpo": on_pairs(beta=0.5, sft_weight=0.3),
    **{f"dpo {loss}": on_pairs(loss=loss, **({} if loss == "sft" else {"beta": 0.5})) for loss in TRL},
    **{
        f"dpo {one}": on_pairs(implicit_reward={"name": "implicit_reward", "divergence": one}, beta=0.5)
        for one in ("forward_kl", "js", "alpha")
    },
    "dpo mixture": on_pairs(loss=[{"name": "sigmoid", "weight": 0.6}, {"name": "bco_pair"}, {"name": "sft"}]),
    "ipo mean": on_pairs("ipo", beta=0.5, implicit_reward={"mean": True}),
    "kto": Scenario(preference("kto", beta=0.5), unpaired),
    **{
        f"kto {loss}": Scenario(preference("kto", loss=loss, beta=0.5), unpaired)
        for loss in SINGLE_LOSSES
        if loss != "kto"
    },
    "k_way": Scenario(reward("k_way"), h.rankings),
    "pairwise": Scenario(reward("pairwise", centering=0.05), h.pairs),
    "log_exp": Scenario(reward("log_exp", centering=0.05), h.pairs),
    "absolute": Scenario(reward("absolute"), h.labeled),
    "process": Scenario(reward("process"), stepped),
    "ppo top_p": of("ppo", sampling=Sampling(6, 0.9, top_p=0.8)),
    "grpo top_p": of("grpo", sampling=Sampling(6, 0.9, top_p=0.8)),
    "grpo top_k k3_weighted": of("grpo", kl_in_loss="k3_weighted", sampling=Sampling(6, 0.9, top_k=6)),
    "online_dpo min_p": of("online_dpo", sampling=Sampling(6, 0.9, min_p=0.1)),
    "online_dpo aot": of("online_dpo", loss="aot"),
    "grpo exact": of("grpo", kl_in_loss={"name": "exact", "coef": 0.5}),
    "grpo k2_sequence": of("grpo", kl_in_loss={"name": "k2_sequence", "coef": 0.5}, reduction="sequence_sum"),
    "ppo exact": of("ppo", kl_in_reward=KL(coef=0.5, estimator="exact"), normalize_advantage=None),
    "ppo attention": of("ppo", reward_placement="attention"),
    "ppo attention max": of("ppo", reward_placement={"name": "attention", "heads": "max"}),
    "ppo token_mask": of("ppo", importance_correction={"name": "token_mask", "low": 0.7, "high": 1.5}, generator=Rough),
    "grpo sequence_weight": of("grpo", importance_correction="sequence_weight", generator=Rough),
    "grpo entropy": of("grpo", entropy={"ent_coef": 0.3}),
    "grpo dual_clip": of("grpo", surrogate={"name": "dual_clip", "bound": 1.3}),
    "gspo token": of("gspo", ratio="sequence_token", surrogate=WIDE),
    "dppo kl": of("dppo", surrogate={"name": "dppo", "divergence": "kl", "bound": 0.3}),
    "instructgpt bootstrap": of("instructgpt", truncated={"rule": "bootstrap"}),
    "grpo mask": of("grpo", truncated={"rule": "mask"}),
    "ppo running": of("ppo", reward_normalization="running", reward_clip={"name": "clip_score", "bound": 1.5}, reward_placement="uniform"),
}  # fmt: skip
assert SCENARIOS.keys() >= {*catalogue.ONLINE, *catalogue.ONLINE_PREFERENCE, *catalogue.PREFERENCE, *catalogue.REWARD}


def roles(scenario: Scenario, dtype: torch.dtype, kind: str = "qwen3") -> dict[str, Role]:
    """Fresh roles; the reference's weights are not the policy's, so that every number moves."""
    make = {
        "policy": lambda: h.policy(kind, dtype=dtype),
        "reference": lambda: h.policy(kind, dtype=dtype, name="reference", seed=1),
        "critic": lambda: h.scorer(kind, dtype=dtype, seed=2),
        "reward": lambda: h.scorer(kind, dtype=dtype, name="reward", seed=2, readout="mean", shift=0.25),
    }
    return {name: make[name]() for name in make if name in scenario.roles}


def learner(
    scenario: Scenario, dtype: torch.dtype, *, kind: str = "qwen3", budget: int = 40, packed: bool = False
) -> h.Recorder:
    cast = roles(scenario, dtype, kind)
    optims = {name: h.FREE for name, role in cast.items() if role.trained}
    return h.Recorder(cast, optims, total=8, budget=budget, packed=packed)


def rewards(name: str) -> list[Weighted]:
    """Scores of both signs, per token where a KL or steps are; two of them for gdpo, none below 0 for maxrl."""
    method = SCENARIOS[name].objective
    assert isinstance(method, Algorithm)
    dense = method.reward_normalization is None and (method.penalty is not None or name == "grpo_process")
    first = h.TableReward(lambda ids: 0.5 * len(ids) - 0.25 * (sum(ids) % 5) + 2.0 * (name == "maxrl"), dense=dense)
    second = [Weighted("second", h.TableReward(lambda ids: float(sum(ids) % 3)))] if name == "gdpo" else []
    return [Weighted("table", first), *second]


def trained(name: str, dtype: torch.dtype, *, updates: int = 2, **options: Any) -> h.Recorder:
    """The learner after `updates` updates of the real loop: in the last one policy and rollout differ."""
    scenario = SCENARIOS[name]
    own = learner(scenario, dtype, **options)
    with TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        if isinstance(scenario.objective, Objective):
            elements = scenario.elements()
            offline.train(
                scenario.objective, own, [elements], offline.OfflinePlan(updates, len(elements)), run, quiet=True
            )
            return own
        method = scenario.objective
        epochs = updates if method.has_ratio() else 1
        total = len(PROMPTS) * (1 if method.pairs else method.collect.num_generations)
        plan = online.OnlinePlan(1, len(PROMPTS), total, epochs, ptx_batch=5, canary=20)
        generator = scenario.generator(own.roles["policy"], (1, 5, 9), str)
        ptx = rows() if any(term.stream == "ptx" for term in method.terms) else []
        online.train(
            method, own, generator, rewards(name), PROMPTS, scenario.sampling, plan, run, ptx=ptx, quiet=True
        )  # fmt: skip
    return own


@dataclass(frozen=True)
class Recorded:
    """One update: its work, the weights before it, its losses and gradients, and the sum of absolute shares."""

    work: Work
    before: dict[str, dict[str, Tensor]]
    step: UpdateResult
    grads: dict[str, Tensor]
    size: float = 0.0


def recorded_of(own: h.Recorder) -> Recorded:
    return Recorded(own.work, own.before, own.step, own.grads)


@cache
def recorded(name: str, precision: str) -> Recorded:
    base = recorded_of(trained(name, DTYPES[precision][0]))
    again, size = stage(SCENARIOS[name].roles, precision), 0.0
    h.with_weights(again.roles, base.before)
    for term, batch, counts in base.work:
        for place in range(len(batch.elements())):  # each element's share alone, with the counts of all
            one = take_elements(batch, [place])
            size += sum(map(abs, again.evaluate([(term, one, counts)]).losses.values()))
    return replace(base, size=size)


@cache
def stage(names: frozenset[str], precision: str) -> LocalLearner:
    """One learner for all updates of these roles: its weights are set before each."""
    like = next(one for one in SCENARIOS.values() if one.roles == names)
    cast = roles(like, DTYPES[precision][0])
    return LocalLearner(cast, {name: h.FREE for name, role in cast.items() if role.trained}, total=8, budget=10**6)


def replayed(
    name: str,
    precision: str,
    *,
    change: Callable[[Batch], Batch] = lambda batch: batch,
    budget: int = 40,
    packed: bool = False,
) -> Recorded:
    """The recorded update once more from the same weights, handed over otherwise."""
    base = recorded(name, precision)
    again = stage(SCENARIOS[name].roles, precision)
    again.budget, again.packed = budget, packed
    h.with_weights(again.roles, base.before)
    changed: dict[int, Batch] = {}
    work = [(term, changed.setdefault(id(batch), change(batch)), counts) for term, batch, counts in base.work]
    step = again.update(work)
    return Recorded(work, base.before, step, h.gradients(again))


def same(base: Recorded, other: Recorded, within: float) -> None:
    """Loss against the sum of absolute shares, gradient against its norm."""
    ours, theirs = base.step.losses, other.step.losses
    assert ours.keys() == theirs.keys()
    assert base.size > 0
    difference = sum(abs(ours[name] - theirs[name]) for name in ours)
    assert difference <= within * base.size
    for name, gradient in base.grads.items():
        assert gradient.norm() > 1e-3
        assert (gradient - other.grads[name]).norm() <= within * gradient.norm(), name


def spoiled(batch: Batch) -> Batch:
    """NaN in every float column wherever the mask is False, junk in the other ones, and three columns of it more."""
    count, columns = len(batch.rows), {}
    mask = torch.cat([batch["mask"], batch["mask"].new_zeros(count, 3)], 1)
    for name, column in batch.columns.items():
        if COLUMNS[name].per_token and name not in ("mask", "chosen_mask", "segment_end"):
            column = torch.cat([column, column.new_zeros(count, 3, *column.shape[2:])], 1)
            away = ~mask.reshape(*mask.shape, *[1] * (column.ndim - 2))
            junk = torch.nan if column.is_floating_point() else 1
            column = column.masked_fill(away, junk)
        elif COLUMNS[name].per_token:
            column = torch.cat([column, column.new_zeros(count, 3)], 1)
        columns[name] = column
    return replace(batch, columns=columns)


def junk_behind(rows: Any) -> Tensor:
    """Five more columns, and other ids than the row's last one in all padding."""
    ids = torch.nn.functional.pad(pad_ids(rows), (0, 5))
    for number, one in enumerate(rows):
        ids[number, one.length :] = torch.arange(ids.shape[1] - one.length) * 5 % 26
    return ids


CHANGES: Mapping[str, dict[str, Any]] = {
    "one row each": {"budget": 1},
    "all rows at once": {"budget": 10**6},
    "another order, small micro-batches": {"change": h.permuted, "budget": 17},
    "packed in another order": {"packed": True, "change": h.permuted},
    "packed, all at once": {"packed": True, "budget": 10**6},
    "NaN in the padding of columns": {"change": spoiled},
    "NaN in the padding of columns, one row each": {"change": spoiled, "budget": 1},
}
FLOAT32 = ("another order, small micro-batches", "packed, all at once")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_update_is_the_same(name: str, change: str) -> None:
    same(recorded(name, "float64"), replayed(name, "float64", **CHANGES[change]), 1e-6)


@pytest.mark.parametrize("change", FLOAT32)
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_update_is_the_same_in_single_precision(name: str, change: str) -> None:
    same(recorded(name, "float32"), replayed(name, "float32", **CHANGES[change]), 1e-5)


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_stands_in_the_padding_of_ids_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = recorded(name, "float64")
    monkeypatch.setattr(readers, "pad_ids", junk_behind)
    same(base, replayed(name, "float64"), 1e-6)


LOOPS = [
    "sft", "dpo", "dpo aot", "dpo aot_unpaired", "kto", "ppo", "grpo", "instructgpt", "optimal_baseline",
    "ppo attention", "ppo exact", "ppo top_p", "clip_cov", "kl_cov", "online_dpo", "remax",
]  # fmt: skip
"""Those whose measured, selected and credited columns differ."""


@pytest.mark.parametrize("options", [{"budget": 1}, {"packed": True, "budget": 10**6}], ids=str)
@pytest.mark.parametrize("name", LOOPS)
def test_a_whole_loop_is_the_same(name: str, options: dict[str, Any]) -> None:
    """Measuring, selecting and crediting included: the last gradient of two updates through the loop."""
    same(recorded(name, "float64"), recorded_of(trained(name, torch.float64, **options)), 1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_whole_loop_is_the_same_on_other_models(name: str, kind: str) -> None:
    base = replace(recorded_of(trained(name, torch.float64, kind=kind)), size=recorded(name, "float64").size)
    for options in ({"budget": 1}, {"packed": True, "budget": 10**6}):
        same(base, recorded_of(trained(name, torch.float64, kind=kind, **options)), 1e-6)


# --- real vocabularies: float32 within 1e-6 of float64, whatever the micro-batch --------------------------------------

VOCABULARIES = (50_000, 152_000)


@cache
def in_float64(vocabulary: int) -> tuple[float, Tensor]:
    """The loss of SFT on these rows and its gradient, from transformers' own forward and torch's log_softmax in float64."""
    role, given = h.large(vocabulary, dtype=torch.float64)
    total = sum(int(one.mask.sum()) for one in given)
    loss = 0.0
    for one in given:
        logits = role.model(input_ids=one.ids[None], use_cache=False).logits[0, one.start - 1 : -1]
        share = -logits.log_softmax(-1).gather(1, one.ids[one.start :, None]).sum() / total
        share.backward()
        loss += float(share.detach())
    return loss, torch.cat([parameter.grad.flatten() for parameter in role.parameters().values()])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("budget", [300, 1024, 8192])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_loss_over_a_real_vocabulary_is_that_of_float64(vocabulary: int, budget: int, packed: bool) -> None:
    role, given = h.large(vocabulary)
    own = LocalLearner({"policy": role}, {"policy": h.FREE}, total=8, budget=budget, packed=packed)
    batch = Batch.of(given)
    step = own.update([(SFT.terms[0], batch, batch.counts("mask"))])
    loss, gradient = in_float64(vocabulary)
    assert sum(step.losses.values()) == pytest.approx(loss, rel=1e-6)
    assert (h.gradients(own)["policy"].double() - gradient).norm() <= 3e-6 * gradient.norm()


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_recorded_update_is_not_trivial(name: str) -> None:
    """Rows differ in length, every term has a loss, and where a method has a ratio the policy has moved away."""
    base, method = recorded(name, "float64"), SCENARIOS[name].objective
    _, batch, counts = base.work[0]
    assert len({one.length for one in batch.rows}) > 2
    assert all(value != 0 for value in base.step.losses.values())
    mask = base.work[0][0].mask
    assert counts == Counts(int(batch[mask].sum()), int(batch[mask].any(1).sum()), len(batch.elements()))
    if isinstance(method, Algorithm) and method.has_ratio():
        ratio = (base.step.now["rollout"]["logp"] - batch["old_logp"]).exp()[batch["mask"]]
        assert float((ratio - 1).abs().max()) > 0.2
    if "selected" in batch.columns:
        assert 0 < int(batch["selected"][batch["mask"]].sum()) < int(batch["mask"].sum())
    if "correction" in batch.columns:
        assert len(batch["correction"][batch["mask"]].unique()) > 2
    if "support" in batch.columns:
        assert int((batch["support"] >= 0).sum(2)[batch["mask"]].min()) < 20


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_the_selected_tokens_matter(name: str) -> None:
    """With another selection the gradient is another one, so the table above would see a selection that moved."""

    def other(batch: Batch) -> Batch:
        return batch.with_columns(selected=~batch["selected"])

    base = recorded(name, "float64")
    again = replayed(name, "float64", change=other)
    assert (base.grads["policy"] - again.grads["policy"]).norm() > 1e-2 * base.grads["policy"].norm()


def test_the_gradient_of_ppo_ptx_is_the_sum_of_both() -> None:
    base, parts = recorded("instructgpt", "float64"), []
    again = stage(SCENARIOS["instructgpt"].roles, "float64")
    for streams in ({"rollout"}, {"ptx"}):
        h.with_weights(again.roles, base.before)
        again.update([item for item in base.work if item[0].stream in streams])
        parts.append(h.gradients(again)["policy"])
    assert min(float(part.norm()) for part in parts) > 1e-3
    torch.testing.assert_close(base.grads["policy"], parts[0] + parts[1], rtol=1e-9, atol=1e-12)


def test_the_weight_of_a_term_scales_its_gradient() -> None:
    base, again = recorded("sft", "float64"), stage(frozenset({"policy"}), "float64")
    again.budget, again.packed = 40, False
    h.with_weights(again.roles, base.before)
    term, batch, counts = base.work[0]
    again.update([(Term(term.role, term.stream, term.loss, term.reduction, 4.0), batch, counts)])
    torch.testing.assert_close(h.gradients(again)["policy"], 4 * base.grads["policy"], rtol=0, atol=0)
