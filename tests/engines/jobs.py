"""What the spawned processes do: cases of the learners' contract on any engine, each giving numbers to compare.

The same functions run alone in the test's own process, on the one-process learner: what comes out there is expected.
"""

import copy
import itertools
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import helpers as h
from torch import Tensor

from engines.comparing import Failed
from whet import methods
from whet.data import COLUMNS as known
from whet.data import Batch
from whet.distributed import Workers
from whet.errors import CheckpointError, ModelError, RecipeError, RunStopped
from whet.generate.local import LocalGenerator
from whet.generate.shared import SharedGenerator
from whet.learner.local import LocalLearner
from whet.loops import offline, online
from whet.loops.evaluation import EvalPlan, HeldOut
from whet.loops.interrupt import graceful
from whet.loops.record import RunFolder
from whet.methods import Term, compose, part
from whet.methods.compose import SFT
from whet.methods.options import Optim, Sampling
from whet.models import load
from whet.models.roles import Role
from whet.ops import reinforce, token_mean
from whet.rewards import Weighted
from whet.rewards.functions import FunctionReward
from whet.rewards.shared import SharedReward

TORCH = ("ddp", "fsdp")
ZERO = ("zero1", "zero2", "zero3")
FLOAT = torch.float32
OPTIM = Optim(lr=0.01, schedule="linear", weight_decay=0.1, max_grad_norm=0.5, eps=1e-4)
"""The limit is hit. AdamW divides a gradient by its own size: with a tiny eps, one that is 0 in exact arithmetic (a key's
bias) would turn rounding into whole steps."""
COLUMNS = frozenset({"old_logp", "ref_logp", "old_value", "old_entropy", "final_value"})


def kind_of(engine: str) -> Callable[..., LocalLearner]:
    if engine == "ddp":
        from whet.learner.ddp import ReplicaLearner

        return ReplicaLearner
    if engine == "fsdp":
        from whet.learner.fsdp import FSDPLearner

        return FSDPLearner
    if engine.startswith("zero"):
        from whet.learner.deepspeed import DeepSpeedLearner

        return partial(DeepSpeedLearner, stage=int(engine[-1]))
    return LocalLearner


@dataclass(frozen=True)
class Make:
    """Learners of one engine."""

    engine: str
    workers: Workers

    def __call__(
        self, roles: Mapping[str, Role], optim: Optim | Mapping[str, Optim] = OPTIM, **options: Any
    ) -> LocalLearner:
        trained = [name for name, role in roles.items() if role.trained]
        optims = dict.fromkeys(trained, optim) if isinstance(optim, Optim) else optim
        return kind_of(self.engine)(roles, optims, workers=self.workers, **({"total": 10, "budget": 24} | options))


def policy(kind: str = "qwen3", *, name: str = "policy", seed: int = 0) -> Role:
    if kind == "gemma2":
        return Role(name, h.gemma2(dtype=FLOAT, seed=seed), name == "policy")
    return h.policy(kind, dtype=FLOAT, name=name, seed=seed)


def cast(kind: str = "qwen3", *, critic: str = "qwen3", seed: int = 0) -> dict[str, Role]:
    return {
        "policy": policy(kind, seed=seed),
        "reference": policy(kind, name="reference", seed=1),
        "critic": h.scorer(critic, dtype=FLOAT, seed=2 + seed),
    }


def adapter() -> dict[str, Role]:
    """A policy as an adapter, and its base as the reference."""
    roles = h.trunk()
    del roles["critic"]
    return roles


def batch(rows: Sequence[int] | None = None) -> Batch:
    every = h.rows()
    return Batch.of(every if rows is None else [every[row] for row in rows])


def work(given: Batch, terms: Sequence[Term] = SFT.terms) -> list:
    return [(term, given, given.counts(term.mask)) for term in terms]


def rollout(own: LocalLearner, given: Batch, shift: float = 1.0) -> Batch:
    """The batch as PPO trains it: measured, with advantages and returns."""
    names = [name for name in COLUMNS if known[name].role in own.roles]
    seen = own.measure(given, frozenset(names))
    advantage = torch.linspace(-1, 1, given["mask"].numel()).reshape(given["mask"].shape)
    seen = seen.with_columns(advantage=advantage)
    return seen.with_columns(returns=seen["old_value"] + shift + advantage) if "critic" in own.roles else seen


def terms_of(own: LocalLearner) -> list[Term]:
    return [term for term in methods.online("ppo").terms if term.role in own.roles]


def whole(own: LocalLearner) -> dict[str, dict[str, Tensor]]:
    """Every role's parameters, each whole."""
    return {n: {k: own._whole(p).cpu().clone() for k, p in r.parameters().items()} for n, r in own.roles.items()}


def told(step: Any) -> dict[str, Any]:
    now = {f"{stream}/{name}": value for stream, columns in step.now.items() for name, value in columns.items()}
    return {"losses": dict(step.losses), "norm": dict(step.grad_norm), "lr": dict(step.lr), "now": now}


def go(own: LocalLearner, rollouts: int = 2, updates: int = 2, given: Batch | None = None) -> list[dict[str, Any]]:
    """PPO with two updates a rollout, and rows of SFT in each: two streams, two trained roles."""
    out: list[dict[str, Any]] = []
    plain = batch() if given is None else given
    for _ in range(rollouts):
        seen = rollout(own, plain)
        out.append({name: seen[name] for name in sorted(seen.columns) if name.startswith(("old", "ref", "final"))})
        for _ in range(updates):
            ppo, sft = work(seen, terms_of(own)), work(plain.take([0, 3, 1] if len(plain.rows) > 3 else [0]))
            out.append(told(own.update(ppo + sft)))
    return out


# --- cases: (make, a folder that all workers see) -> numbers ----------------------------------------------------------


def training(make: Make, folder: Path, *, kind: str = "qwen3", critic: str = "qwen3") -> Any:
    own = make(cast(kind, critic=critic), dropout=0.1, seed=3)
    return {"steps": go(own), "weights": whole(own), "version": own.version}


def training_shared_trunk(make: Make, folder: Path) -> Any:
    own = make(h.trunk(), dropout=0.1)
    return {"steps": go(own), "weights": whole(own)}


def training_adapter(make: Make, folder: Path) -> Any:
    own = make(adapter())
    return {"steps": go(own), "weights": whole(own)}


def training_packed(make: Make, folder: Path) -> Any:
    own = make(cast(), packed=True, dropout=0.1)
    return {"steps": go(own, 1), "weights": whole(own)}


def training_checkpointed(make: Make, folder: Path) -> Any:
    roles = cast()
    for name in ("policy", "critic"):
        load.checkpoint_activations(roles[name].model)
    own = make(roles, dropout=0.1)
    return {"steps": go(own, 1), "weights": whole(own)}


def training_offloaded(make: Make, folder: Path) -> Any:
    """With a checkpoint in the middle, loaded into a fresh learner that goes on."""
    options = {} if make.engine in ("local", "ddp") else {"offload": True}
    own, again = make(cast(), **options), make(cast(seed=4), **options)
    first = go(own, 1)
    own.save(folder / "offload")
    make.workers.barrier()
    again.load(folder / "offload")
    return {"steps": first + go(again, 1), "weights": whole(again)}


def training_half(make: Make, folder: Path) -> Any:
    """Computed in bfloat16; saved, and loaded to the bit."""
    options = {} if make.engine == "local" else {"bf16": True}
    own = make(cast(), **options)
    steps = go(own, 1)
    own.save(folder / "half")
    make.workers.barrier()
    again = make(cast(), **options)
    again.load(folder / "half")
    return {"steps": steps, "types": sorted({str(p.dtype) for one in whole(own).values() for p in one.values()}),
            "weights": whole(own), "loaded": whole(again), "on": [go(own, 1), go(again, 1)]}  # fmt: skip


def evaluating(make: Make, folder: Path) -> Any:
    own = make(cast(), dropout=0.3)
    before, seen = whole(own), rollout(own, batch())
    first, second = (own.evaluate(work(seen, terms_of(own)) + work(batch())) for _ in range(2))
    columns = own.columns("critic", batch(), frozenset({"score", "token_score"}))
    return {"told": told(first), "again": told(second), "columns": dict(columns), "version": own.version,
            "before": before, "after": whole(own)}  # fmt: skip


def rows_in_order(make: Make, folder: Path) -> Any:
    """What an update reads is what was measured, to the bit, row by row, and rows may come in any order."""
    own = make({"policy": policy()}, budget=20)
    out = {}
    for name, rows in {"given": None, "turned": [8, 0, 5, 3, 1, 7, 2, 6, 4]}.items():
        measured = own.measure(batch(rows), frozenset({"old_logp"}))["old_logp"]
        step = own.evaluate(work(batch(rows)))
        out[name] = {"measured": measured, "read": step.now["train"]["logp"]}
    update = own.update(work(batch()))
    return out | {"updated": update.now["train"]["logp"], "gradient": update.now["train"]["logp"].requires_grad}


def few_rows(make: Make, folder: Path) -> Any:
    """One row for all workers: all but one of them have nothing to do, and none of them may hang."""
    own = make(cast(), dropout=0.1)
    own.rehearse(batch([2]), {"policy": frozenset({"logp"})})
    return {"steps": go(own, 1, 2, batch([2])), "weights": whole(own)}


def unlike_rows(make: Make, folder: Path) -> Any:
    """One row much longer than the budget beside tiny ones."""
    own = make({"policy": policy()}, budget=12)
    given = Batch.of([h.row(1, 2, 60), h.row(2, 1, 1), h.row(3, 1, 2), h.row(4, 1, 1), h.row(5, 3, 2)])
    own.rehearse(given, {"policy": frozenset({"logp"})})
    return {"steps": [told(own.update(work(given))) for _ in range(2)], "weights": whole(own)}


def clipping(make: Make, folder: Path) -> Any:
    """Each role's gradient is scaled to its own limit: policy far below, critic not at all, then the other way round."""
    out = {}
    for name, limits in {"policy": (0.01, 1e9), "critic": (1e9, 0.01)}.items():
        optims = {
            role: replace(OPTIM, max_grad_norm=limit, eps=1.0, lr=1.0, weight_decay=0.0)
            for role, limit in zip(("policy", "critic"), limits, strict=True)
        }  # eps is far above the gradients, so the step is in proportion to them
        own = make(cast(), optims)
        before = whole(own)
        step = own.update(work(rollout(own, batch()), terms_of(own)))
        moved = {
            role: float(sum((value - before[role][key]).square().sum() for key, value in one.items())) ** 0.5
            for role, one in whole(own).items()
        }
        out[name] = {"told": told(step), "moved": moved, "weights": whole(own)}
    return out


def scheduling(make: Make, folder: Path) -> Any:
    own = make({"policy": policy()}, replace(OPTIM, warmup_ratio=0.5, min_lr_ratio=0.2), total=4)
    return {"lr": [own.update(work(batch())).lr["policy"] for _ in range(4)], "weights": whole(own)}


def one_role_of_two(make: Make, folder: Path) -> Any:
    """The critic is not in the work, and has weight decay: it stays as it is."""
    own = make(cast())
    before = whole(own)
    step = own.update(work(batch()))
    after = whole(own)
    other = own.update(work(rollout(own, batch()), terms_of(own)))
    return {"before": before, "after": after, "told": told(step), "then": told(other), "weights": whole(own)}


def not_a_number(make: Make, folder: Path) -> Any:
    """One row's advantage is NaN: one worker alone meets it."""
    own = make(cast(), dropout=0.1)
    go(own, 1, 1)
    before, bad = whole(own), (Term("policy", "train", part(reinforce), token_mean),)
    advantage = torch.zeros(batch()["mask"].shape)
    advantage[4] = torch.nan
    message = "went on"
    try:
        own.update(work(batch().with_columns(advantage=advantage), bad))
    except RunStopped as error:
        message = str(error)
    return {"message": message, "before": before, "after": whole(own), "version": own.version, "then": go(own, 1)}


def endless_gradient(make: Make, folder: Path) -> Any:
    """The loss is finite, the critic's gradient is not: the policy, clipped first, must not have moved either."""
    own = make(cast())
    go(own, 1, 1)
    before, seen = whole(own), rollout(own, batch())
    bad = [terms_of(own)[0], Term("critic", "rollout", part(kink), token_mean)]
    message = "went on"
    try:
        own.update(work(seen, bad))
    except RunStopped as error:
        message = str(error)
    return {"message": message, "before": before, "after": whole(own), "version": own.version, "then": go(own, 1)}


def kink(value: Tensor) -> Tensor:
    """0, with a slope that is no number."""
    return (0 * value).sqrt()


def half_beside_its_reference(make: Make, folder: Path) -> Any:
    """Policy and reference with equal weights, both computed in bfloat16: a run checks that they agree to the bit."""
    options = {} if make.engine == "local" else {"bf16": True}
    own = make({"policy": policy(), "reference": policy(name="reference")}, **options)
    seen = own.measure(batch(), frozenset({"old_logp", "ref_logp"}))
    return {"old": seen["old_logp"], "ref": seen["ref_logp"]}


def blending(make: Make, folder: Path) -> Any:
    roles = cast() | {"ema": policy(name="ema", seed=5)}
    own = make(roles)
    before = whole(own)
    own.blend("ema", "policy", 0.25)
    mixed = whole(own)
    own.blend("reference", "policy", 1.0)
    copied = whole(own)
    steps = go(own, 1)
    own.blend("ema", "policy", 0.5)
    own.save(folder / "blended")
    make.workers.barrier()
    again = make(cast(seed=3) | {"ema": policy(name="ema", seed=6)})
    again.load(folder / "blended")
    return {"before": before, "mixed": mixed, "copied": copied, "steps": steps, "weights": whole(own),
            "loaded": whole(again), "on": [go(own, 1), go(again, 1)]}  # fmt: skip


def rescaling(make: Make, folder: Path) -> Any:
    own = make(cast())
    go(own, 1, 1)
    before = own.columns("critic", batch(), frozenset({"score"}))["score"]
    own.rescale("critic", 0.5, -3.0)
    after = own.columns("critic", batch(), frozenset({"score"}))["score"]
    return {"before": before, "after": after, "then": go(own, 1), "shift": own.roles["critic"].shift}


def publishing(make: Make, folder: Path) -> Any:
    own = make(cast("llama"))
    go(own, 1, 1)
    published = own.publish()
    pushed = {name: value.cpu().clone() for name, value in published.handle.whole()}
    return {"version": published.version, "pushed": pushed, "whole": whole(own)["policy"]}


def exporting(make: Make, folder: Path) -> Any:
    """Folders for other tools: tied, untied and capped models, a scorer, a merged adapter and an adapter alone."""
    out = {}
    for kind in ("qwen3", "llama") if make.engine in ZERO else ("qwen3", "llama", "gpt2", "gemma2"):
        own = make({"policy": policy(kind), "critic": h.scorer(kind if kind != "gemma2" else "qwen3", dtype=FLOAT)})
        own.update(work(rollout(own, batch()), terms_of(own)))
        own.export("policy", folder / "export" / kind)
        own.export("critic", folder / "export" / f"{kind}-critic")
        out[kind] = whole(own)
    own = make(adapter())
    own.update(work(batch()))
    own.export("policy", folder / "export" / "merged")
    own.export("policy", folder / "export" / "adapter", merge=False)
    out["adapter"] = {"policy": whole(own)["policy"], "logp": own.columns("policy", batch(), frozenset({"logp"}))}
    out["told"] = go(own, 1, 1)  # and training goes on after it
    make.workers.barrier()
    return out


def exact_kl_column(make: Make, folder: Path) -> Any:
    """The exact KL, or a refusal in words."""
    own = make(cast())
    try:
        seen = own.measure(batch(), frozenset({"old_exact_kl"}))
        term = Term("policy", "train", part(exact_kl_loss), token_mean)
        return {"kl": seen["old_exact_kl"], "told": told(own.update(work(seen, [term]))), "weights": whole(own)}
    except (RecipeError, ModelError, ValueError) as error:
        return {"refused": str(error)}


def exact_kl_loss(exact_kl: Tensor) -> Tensor:
    return exact_kl


def attention_columns(make: Make, folder: Path) -> Any:
    own = make(cast())
    found = own.columns("critic", batch(), frozenset({"attention_mean", "attention_max"}))
    return {"columns": dict(found), "then": go(own, 1, 1)}


def muon(make: Make, folder: Path) -> Any:
    try:
        own = make({"policy": policy("llama")}, replace(OPTIM, kind="muon", muon_lr=0.02))
    except RecipeError as error:
        return {"refused": str(error)}
    return {"steps": [told(own.update(work(batch()))) for _ in range(3)], "weights": whole(own)}


def two_roles_on_a_trunk_under_zero(make: Make, folder: Path) -> Any:
    try:
        make(h.trunk())
    except RecipeError as error:
        return {"refused": str(error)}
    return {"refused": ""}


def other_weights(make: Make, folder: Path) -> Any:
    """The second worker read another folder."""
    try:
        make({"policy": policy(seed=make.workers.rank)})
    except ModelError as error:
        return {"refused": str(error)}
    return {"refused": ""}


def refused(own: LocalLearner, folder: Path) -> str:
    try:
        own.load(folder)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def refusing(make: Make, folder: Path) -> Any:
    """Checkpoints that are not this run's."""
    own = make(cast())
    go(own, 1, 1)
    own.save(folder / "own")
    make.workers.barrier()
    go(own, 1, 1)
    before = whole(own)
    swapped = cast()
    with torch.no_grad():
        weight = swapped["reference"].model.get_input_embeddings().weight
        weight[[3, 4]] = weight[[4, 3]]
    out = {
        "model": refused(make(cast() | {"policy": policy("llama")}), folder / "own"),
        "shapes": refused(make(cast() | {"policy": wider()}), folder / "own"),
        "reference": refused(make(swapped), folder / "own"),
        "muon": refused(own, muon_checkpoint(folder, make.workers)),
    }
    missing = folder / "missing"
    if make.workers.first:
        import shutil

        shutil.copytree(folder / "own", missing)
        sorted(missing.glob("policy-*.safetensors"))[-1].unlink()
    make.workers.barrier()
    out["missing"] = refused(own, missing)
    return out | {"before": before, "after": whole(own)}


def wider() -> Role:
    return h.policy(dtype=FLOAT, intermediate_size=64)


def muon_checkpoint(folder: Path, workers: Workers) -> Path:
    path = folder / "muon"
    if workers.first:
        roles = cast()
        one = LocalLearner(roles, {n: replace(OPTIM, kind="muon") for n in ("policy", "critic")}, total=10, budget=24)
        go(one, 1, 1)
        one.save(path)
    workers.barrier()
    return path


def saving(make: Make, folder: Path) -> Any:
    own = make(cast(), dropout=0.1, seed=3)
    first = go(own, 1)
    own.save(folder / "saved")
    make.workers.barrier()
    files = sorted(str(path.relative_to(folder / "saved")) for path in (folder / "saved").rglob("*") if path.is_file())
    return {"first": first, "rest": go(own, 1), "weights": whole(own), "version": own.version, "files": files}


def resuming(make: Make, source: Path) -> Any:
    """Another learner, of other weights, that becomes the saved one and goes on."""
    own = make(cast(seed=4), dropout=0.1, seed=3)
    own.load(source)
    return {"rest": go(own, 1), "weights": whole(own), "version": own.version}


COMMON: dict[str, Callable[[Make, Path], Any]] = {
    "saving": saving,
    "training_llama": partial(training, kind="llama", critic="llama"),
    "training_gpt2": partial(training, kind="gpt2", critic="gpt2"),
    "training_gemma2": partial(training, kind="gemma2"),
    "training_adapter": training_adapter,
    "training_packed": training_packed,
    "training_checkpointed": training_checkpointed,
    "training_offloaded": training_offloaded,
    "training_half": training_half,
    "evaluating": evaluating,
    "rows_in_order": rows_in_order,
    "few_rows": few_rows,
    "unlike_rows": unlike_rows,
    "clipping": clipping,
    "scheduling": scheduling,
    "one_role_of_two": one_role_of_two,
    "not_a_number": not_a_number,
    "endless_gradient": endless_gradient,
    "half_beside_its_reference": half_beside_its_reference,
    "blending": blending,
    "rescaling": rescaling,
    "publishing": publishing,
    "exporting": exporting,
    "exact_kl_column": exact_kl_column,
    "attention_columns": attention_columns,
    "muon": muon,
    "other_weights": other_weights,
    "refusing": refusing,
}
FEW = (
    "saving",
    "training_offloaded",
    "one_role_of_two",
    "not_a_number",
    "endless_gradient",
    "blending",
)
"""ZeRO 1 is ZeRO 2 but for when gradients are cut into shards."""
LIGHT = [
    "saving",
    "training_gemma2",
    "training_adapter",
    "training_checkpointed",
    "training_offloaded",
    "training_half",
    "one_role_of_two",
    "not_a_number",
    "endless_gradient",
    "half_beside_its_reference",
    "blending",
    "rescaling",
    "exporting",
    "exact_kl_column",
    "other_weights",
]
"""A learner costs a second to make under ZeRO 3: what is left out shows nothing that ZeRO 2 does not."""
LORA = {"training_shared_trunk": training_shared_trunk}
CASES: dict[str, dict[str, Callable[[Make, Path], Any]]] = {
    "local": COMMON | LORA,
    "ddp": COMMON | LORA,
    "fsdp": COMMON | LORA,
    "zero1": {name: COMMON[name] for name in FEW},
    "zero2": COMMON | {"trunk": two_roles_on_a_trunk_under_zero},
    "zero3": {name: COMMON[name] for name in LIGHT},
}


SHORT: dict[str, set[str]] = {
    "local": set(CASES["local"]),
    "ddp": {"saving", "training_gpt2", "training_adapter", "training_half", "muon", "exporting", *FEW}
    - {"training_offloaded"},
    "fsdp": set(CASES["fsdp"]) - {"training_gpt2", "training_gemma2", "training_checkpointed"},
    "zero1": {"saving"},
    "zero2": {
        "saving",
        "training_half",
        "training_adapter",
        "clipping",
        "refusing",
        "exporting",
        "trunk",
        "muon",
        *FEW,
    },
    "zero3": {"saving", "not_a_number", "endless_gradient", "training_half", "exporting"},
}
"""The cases of a short run; the others are in the long one."""


def told_or_failed(case: Callable[[], Any]) -> Any:
    try:
        return copy.deepcopy(case())
    except Exception:
        return Failed(traceback.format_exc())


def saved_by(folder: Path, engine: str) -> Path:
    return folder / engine / "saving" / "saved"


def cases(
    workers: Workers,
    engines: Sequence[str],
    folder: Path,
    sources: Mapping[str, Sequence[str]] | None = None,
    only: Mapping[str, set[str]] | None = None,
) -> dict[str, Any]:
    """{engine: {case: what it gave}} of all cases, or `only` of some of each engine; one that raises is told as Failed.

    Then, under "from", each engine goes on from the checkpoints that its `sources` saved.
    """
    out: dict[str, Any] = {}
    for engine in engines:
        out[engine] = {"seconds": {}}
        for name, case in CASES[engine].items():
            if only is None or name in only[engine]:
                own, began = folder / engine / name, time.process_time()
                own.mkdir(parents=True, exist_ok=True)
                out[engine][name] = told_or_failed(partial(case, Make(engine, workers), own))
                out[engine]["seconds"][name] = time.process_time() - began
    for engine, names in (sources or {}).items():
        own = out.setdefault(engine, {}).setdefault("from", {})
        for source in names:
            own[source] = told_or_failed(partial(resuming, Make(engine, workers), saved_by(folder, source)))
    return out


# --- whole runs through the loops -------------------------------------------------------------------------------------

OFFLINE = ("sft", "k_way", "dpo")
ONLINE = ("ppo", "grpo")
END = (1, 5, 9)
PROMPTS = [h.prompt(number, range(3 + number, 5 + 3 * number)) for number in range(5)]
RUN = Optim(lr=2e-3, schedule="linear", weight_decay=0.1, max_grad_norm=0.5)


def offline_run(make: Make, folder: Path, name: str, steps: int, batch: int) -> None:
    objective = {"sft": SFT, "k_way": compose.reward("k_way"), "dpo": compose.preference("dpo")}[name]
    elements: Sequence[Any] = {"sft": h.rows, "k_way": h.rankings, "dpo": h.pairs}[name]()
    roles = {"policy": policy(), "reference": policy(name="reference")}
    roles = {"sft": {"policy": policy("llama")}, "dpo": roles}.get(name) or {
        "reward": h.scorer(dtype=FLOAT, name="reward")
    }
    own = make(roles, RUN, total=steps, dropout=0.1, seed=7)
    run = RunFolder(folder, writes=make.workers.first)
    offline.train(
        objective,
        own,
        [elements],
        offline.OfflinePlan(steps, batch),
        run,
        evaluation=HeldOut(EvalPlan(every=5), lambda _: None, elements),
        quiet=True,
    )


def scored(ids: tuple[int, ...]) -> float:
    return 0.5 * len(ids) - 0.25 * (sum(ids) % 5)


def online_run(make: Make, folder: Path, name: str, steps: int, prompts: int, mini_batch_size: int) -> None:
    """As the command line puts it together: answers and rewards shared out over the workers."""
    workers, method = (
        make.workers,
        methods.online(name, longest=6, **({"num_generations": 3} if name == "grpo" else {})),
    )
    roles = {"policy": policy(), "reference": policy(name="reference"), "critic": h.scorer(dtype=FLOAT, seed=2)}
    own = make({role: one for role, one in roles.items() if role in method.roles()}, RUN, total=100)
    copied = make.engine in ("fsdp", "zero3")
    source: Any = LocalGenerator(policy(seed=9) if copied else own.roles["policy"], END, str, unit=2, copy=copied)
    reward: Any = FunctionReward(
        lambda prompts, completions, completion_ids, **_: [scored(tuple(i)) for i in completion_ids]
    )
    if workers.size > 1:
        source, reward = SharedGenerator(source, workers, 2), SharedReward(reward, workers)
    plan = online.OnlinePlan(
        steps=steps,
        prompts=prompts,
        mini_batch_size=mini_batch_size,
        epochs=2,
        equal_start=True,
        end_ids=END,
        canary=20,
        ema=None,
    )
    rewards, run = [Weighted("own", reward)], RunFolder(folder, writes=workers.first)
    online.train(method, own, source, rewards, PROMPTS, Sampling(6), plan, run, quiet=True)


VOCABULARIES = (50_000, 152_000)


def losses(make: Make) -> dict[str, float]:
    """The loss of SFT over the vocabularies of real models, by the size and the micro-batch."""
    out = {}
    for vocabulary in VOCABULARIES:
        for budget in (300, 8192):
            role, rows = h.large(vocabulary)
            step = make({"policy": role}, budget=budget).evaluate(work(Batch.of(rows)))
            out[f"{vocabulary}/{budget}"] = sum(step.losses.values())
    return out


def runs(workers: Workers, engines: Sequence[str], folder: Path, few: bool = False) -> dict[str, Any]:
    """Every method on every engine; {engine: {method: None or Failed}}, and their run folders under `folder`.

    With `few`, short runs whose batches have fewer rows than there are workers; else also "losses" over real vocabularies.
    """
    out: dict[str, Any] = {}
    for engine in engines:
        make, own = Make(engine, workers), folder / engine
        told = out[engine] = {}
        for name in OFFLINE:
            told[name] = told_or_failed(partial(offline_run, make, own / name, name, 3 if few else 10, 1 if few else 4))
        for name in ONLINE:
            size = (2, 1, 1) if few else (10, 4, 3 if name == "ppo" else 6)
            told[name] = told_or_failed(partial(online_run, make, own / name, name, *size))
        if not few:
            told["losses"] = told_or_failed(partial(losses, make))
    return out


def runs_and_stops(workers: Workers, engines: Sequence[str], folder: Path) -> dict[str, Any]:
    return {**runs(workers, engines, folder), "stops": {one: stopping(workers, one, folder / one) for one in engines}}


def cases_and_runs(workers: Workers, folder: Path, sources: Mapping[str, Sequence[str]], few: Path) -> dict[str, Any]:
    return {"cases": cases(workers, (), folder, sources), "runs": runs(workers, TORCH, few, True)}


def stopping(workers: Workers, engine: str, folder: Path) -> dict[str, tuple[str, float]]:
    """Runs that the second worker alone disturbs: {what: (the error that this worker got, seconds from its cause)}."""
    caused = [time.time()]

    def raises(turn: int) -> None:
        if turn == 2:
            caused[0] = time.time()
            raise ValueError("the grader is out")

    def interrupted(turn: int) -> None:
        if turn == 2:
            caused[0] = time.time()
            os.kill(os.getpid(), signal.SIGINT)

    out = {}
    for what in (raises, interrupted):
        told = disturbed(partial(disturbed_run, Make(engine, workers), folder / what.__name__, what))
        out[what.__name__] = (told, time.time() - max(workers.gather(caused[0])))
    began = time.time()
    out["odd"] = (disturbed(lambda: workers.together(partial(odd_error, workers))), time.time() - began)
    return out


def odd_error(workers: Workers) -> None:
    class Local(Exception):
        """Of a class that no other process can import."""

    if workers.rank == 1:
        raise Local("lost")


def disturbed(work: Callable[[], Any]) -> str:
    try:
        work()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def disturbed_run(make: Make, folder: Path, what: Callable[[int], None]) -> None:
    workers, turns = make.workers, itertools.count(1)

    def reward(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        if workers.rank == 1:
            what(next(turns))
        return [scored(tuple(ids)) for ids in completion_ids]

    own = make({"policy": policy(), "reference": policy(name="reference")}, RUN, total=100)
    copied = make.engine == "fsdp"
    source = LocalGenerator(policy(seed=9) if copied else own.roles["policy"], END, str, unit=2, copy=copied)
    plan = online.OnlinePlan(steps=4, prompts=4, mini_batch_size=12, end_ids=END, canary=20)
    rewards = [Weighted("own", SharedReward(FunctionReward(reward), workers))]
    method = methods.online("grpo", longest=6, num_generations=3)
    run = RunFolder(folder, writes=workers.first)
    with graceful() as stop:
        online.train(
            method, own, SharedGenerator(source, workers, 2), rewards, PROMPTS, Sampling(6), plan, run,
            stop=stop, quiet=True,
        )  # fmt: skip
