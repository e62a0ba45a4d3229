"""Who works in a run: the learner, the generator and the rewards of a recipe, in this process or in every worker."""

import os
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from whet.cluster import Attempt, Wanted, connected, survive
from whet.cluster.folders import WeightWriter
from whet.cluster.ray import require, there
from whet.data import Chat
from whet.distributed import RestartBudget, Workers, launched
from whet.errors import RecipeError, WorkerDied
from whet.generate import Generator
from whet.generate.base import require_vllm
from whet.generate.fleet import Fleet
from whet.generate.local import LocalGenerator
from whet.generate.shared import SharedGenerator
from whet.http import Http
from whet.learner.local import LocalLearner
from whet.methods import Algorithm, Objective
from whet.methods.options import Optim
from whet.models.roles import Role
from whet.rewards import Weighted
from whet.rewards.functions import FunctionReward
from whet.rewards.model import reading
from whet.rewards.shared import SharedReward
from whet.runs import build
from whet.runs import recipe as fields


def backend_of(recipe: fields.OfflineRecipe | fields.OnlineRecipe, workers: int) -> str:
    """The learner's engine by name. Raises RecipeError where it cannot work with so many workers."""
    learning = recipe.learner
    muon = "muon" in (recipe.optim.kind, critic_optim(recipe).kind)
    alone = workers == 1 and not ((learning.precision == "bf16") or learning.offload)
    engine = ("local" if alone else "ddp" if muon else "fsdp") if learning.backend == "auto" else learning.backend
    if muon and engine not in ("local", "ddp"):
        raise RecipeError(f"optim.kind: muon needs whole matrices, and {engine} shards them; take adamw, or ddp")
    averaged = isinstance(recipe, fields.OnlineRecipe) and recipe.rollout.ema is not None and engine == "zero3"
    refreshed = getattr(getattr(recipe, "rollout", recipe), "refresh", fields.SyncReference()).every
    if (learning.precision == "bf16") and engine.startswith("zero") and (refreshed or averaged):
        raise RecipeError("learner.precision: DeepSpeed would keep the averaged reference in half precision; take fsdp")
    if engine == "local" and workers > 1:
        raise RecipeError(f"learner.backend: local is one process, and there are {workers}; take ddp, fsdp or zero2")
    if engine in ("local", "ddp") and ((learning.precision == "bf16") or learning.offload):
        what = "precision" if (learning.precision == "bf16") else "offload"
        raise RecipeError(f"learner.{what}: {engine} has no such thing; take fsdp or zero2, or model.dtype")
    if engine.startswith("zero") and isinstance(recipe, fields.OnlineRecipe) and recipe.trunk == "shared":
        raise RecipeError("trunk: DeepSpeed trains one role per model; take separate models, or learner.backend fsdp")
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        raise RecipeError('learner.backend: deepspeed is not installed; pip install "whet[deepspeed]"')
    return engine


def check_generator(recipe: fields.OnlineRecipe, workers: int) -> None:
    """Refuses engines that cannot do what the recipe asks of them."""
    wanted, plain = recipe.generator, fields.Generation()
    if wanted.name != "local" and recipe.sampling.truncates:
        raise RecipeError(
            f"sampling: a {wanted.name} engine does not say which tokens could be drawn, so ratios would be wrong; leave "
            "top_p, top_k and min_p out, or take generator.name local"
        )
    if wanted.name == "server" and not wanted.urls:
        raise RecipeError(
            'generator.urls: where are the servers? for example --generator.urls "[http://127.0.0.1:8000]"'
        )
    for name, engines in (
        ("urls", "server"),
        ("count", "vllm"),
        ("push", "vllm"),
        ("transfer", "vllm"),
        ("sleep", "vllm"),
        ("tensor_parallel", "vllm"),
        ("host", "server"),
        ("timeout", "server"),
    ):
        if getattr(wanted, name) != getattr(plain, name) and wanted.name != engines:
            raise RecipeError(
                f"generator.{name}: it is for engine {engines}, and this one is {wanted.name}; leave it out"
            )
    if recipe.model.quantize != "none" and wanted.push != "adapter":
        own = wanted.name == "local" and not (wanted.max_staleness or recipe.cluster.engines)
        if not own or _sharded(recipe, max(workers, recipe.cluster.learners)):
            raise RecipeError(
                "model.quantize: a 4-bit base cannot be handed to a generator of its own; let the adapter travel alone "
                "(--generator vllm --generator.push adapter), or leave quantize at none"
            )
    if wanted.name == "server" and recipe.cluster.address is None:
        _reached(wanted.urls)
    if wanted.push == "adapter" and recipe.model.lora is None:
        raise RecipeError("generator.push: there is no adapter without model.lora; leave it at weights")
    if wanted.transfer in ("ipc", "nccl") and (workers > 1 or recipe.cluster.address):
        raise RecipeError(
            f"generator.transfer: {wanted.transfer} is for one learner without a cluster; leave it at auto"
        )
    if wanted.name == "vllm":
        require_vllm()
        if recipe.cluster.address is None:
            gpus_of(recipe)
    if wanted.sleep and wanted.max_staleness:
        raise RecipeError("generator.sleep: engines that answer ahead never rest; leave it out, or max_staleness at 0")
    if wanted.name == "server" and workers not in (1, len(wanted.urls)):
        raise RecipeError(
            f"generator.urls: each of the {workers} workers needs a server of its own; got {len(wanted.urls)}"
        )
    if wanted.segment_tokens != plain.segment_tokens and not wanted.max_staleness:
        raise RecipeError("generator.segment_tokens: answers are waited for; it is for generator.max_staleness above 0")
    if wanted.max_staleness and workers > 1:
        raise RecipeError(
            "generator.max_staleness: torchrun's workers answer and learn in turns; give the engines places of their own "
            "with --cluster auto --cluster.engines 1"
        )


def _reached(urls: Sequence[str]) -> None:
    """Refuses servers that do not answer now: once a run goes on, they would be waited for."""
    for url in urls:
        try:
            Http(url, 10.0).raw("GET", "/health")
        except WorkerDied as error:
            raise RecipeError(
                f"generator.urls: {str(error).removeprefix('generator: ')}; start one with whet serve --model DIR, or mend the address"
            ) from error


def critic_optim(recipe: fields.OfflineRecipe | fields.OnlineRecipe) -> Optim:
    """The critic's optimizer, which is the policy's where it has none of its own."""
    return (recipe.critic.optim if isinstance(recipe, fields.OnlineRecipe) else None) or recipe.optim


def learner_of(
    recipe: fields.OfflineRecipe | fields.OnlineRecipe,
    roles: dict[str, Role],
    optims: dict[str, Optim],
    total: int,
    workers: Workers,
) -> LocalLearner:
    """A learner of these roles on the recipe's engine; `total` is the number of updates of the whole run."""
    engine, learning = backend_of(recipe, workers.size), recipe.learner
    options: dict[str, Any] = {"bf16": (learning.precision == "bf16"), "offload": learning.offload}
    kind: Callable[..., LocalLearner] = LocalLearner
    if engine == "ddp":
        from whet.learner.ddp import ReplicaLearner as kind
    elif engine == "fsdp":
        from whet.learner.fsdp import FSDPLearner

        kind = partial(FSDPLearner, **options)
    elif engine.startswith("zero"):
        from whet.learner.deepspeed import DeepSpeedLearner

        kind = partial(DeepSpeedLearner, stage=int(engine[-1]), **options)
    dropout = recipe.train.dropout if isinstance(recipe.train, fields.Train) else 0.0
    return kind(
        roles, optims, total=total, budget=recipe.train.max_tokens_per_micro_batch, packed=recipe.train.packing, dropout=dropout,
        seed=recipe.seed, workers=workers,
    )  # fmt: skip


def offline_learner(
    verb: str, recipe: fields.OfflineRecipe, objective: Objective, total: int, workers: Workers = Workers()
) -> LocalLearner:
    """The learner of a run on rows of a file, its models loaded."""
    tokenizer, _ = build.tokenizer_and_chat(recipe.model)
    if isinstance(recipe, fields.RewardModelRecipe):
        role = build.scorer_role(
            "reward", recipe.model, tokenizer, trained=True, seed=recipe.seed, path=recipe.model.path,
            readout=recipe.head.readout,
        )  # fmt: skip
    else:
        role = build.causal_role("policy", recipe.model, tokenizer, trained=True, seed=recipe.seed)
    roles = {role.name: role}
    if isinstance(recipe, fields.PreferenceRecipe) and "ref_logp" in objective.reads():
        roles["reference"] = build.reference_role(recipe.model, role, recipe.reference, tokenizer)
    return learner_of(recipe, roles, {role.name: recipe.optim}, total, workers)


def online_learner(
    recipe: fields.OnlineRecipe, algorithm: Algorithm, total: int, workers: Workers = Workers(), *, scores: bool = True
) -> LocalLearner:
    """The learner of a run on own answers, its models loaded; with `scores` the reward models are among its roles."""
    tokenizer, _ = build.tokenizer_and_chat(recipe.model)
    cast = build.cast(recipe, algorithm, tokenizer)
    roles = dict(cast.roles)
    if scores:
        roles |= build.reward_roles(recipe, tokenizer, roles["policy"] if recipe.trunk == "shared" else None)
    return learner_of(recipe, roles, cast.optims, total, workers)


def rewards_of(
    recipe: fields.OnlineRecipe, tokenizer: Any, learner: Any, workers: Workers = Workers()
) -> list[Weighted]:
    """The rewards; reward models are read by the learner, functions are shared out over the workers."""
    out = build.rewards_of(recipe, tokenizer, learner.columns)
    if workers.size == 1:
        return out
    return [
        Weighted(one.name, SharedReward(one.reward, workers), one.weight)
        if isinstance(one.reward, FunctionReward)
        else one
        for one in out
    ]


def generator_of(recipe: fields.OnlineRecipe, chat: Chat, learner: LocalLearner, longest: int) -> Generator:
    """The generator of a learner's process; several workers answer together. `longest` is the longest sequence, in tokens."""
    workers, unit = learner.workers, recipe.rollout.max_num_seqs
    own: Generator
    if recipe.generator.name == "local":
        own = local_generator(recipe, chat, learner)
    else:
        makes = engines_of(recipe, chat, longest, gpus_of(recipe))
        if recipe.generator.name == "server" and workers.size > 1:
            makes = makes[workers.rank : workers.rank + 1]  # only one may push to a server
        own = Fleet(makes, RestartBudget(recipe.cluster.restarts))
        attempt = workers.broadcast(secrets.token_hex(8))
        learner.post = WeightWriter(workers, attempt, adapter=recipe.generator.push == "adapter", everywhere=True)
    return SharedGenerator(own, workers, unit) if workers.size > 1 else own


def gpus_of(recipe: fields.OnlineRecipe) -> list[tuple[int, ...]]:
    """The GPUs of each engine that this process starts, out of those it sees; without GPUs they are nobody's choice."""
    wanted, device = recipe.generator, build.source_of(recipe.model).torch_device()
    if wanted.name != "vllm" or device.type != "cuda":
        return [()] * wanted.count
    beside, place = (int(os.environ.get(name, one)) for name, one in (("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    learners = list(range(beside)) if launched() else [device.index or 0]
    return dealt_gpus(torch.cuda.device_count(), learners, place % len(learners), wanted)


def dealt_gpus(gpus: int, learners: Sequence[int], place: int, wanted: fields.Generation) -> list[tuple[int, ...]]:
    """Which of a machine's `gpus` the engines of learner `place` take, where `learners` have these for themselves.

    Those that are left, where there are enough for the engines of all learners; else, or where engines sleep while the
    learner works, an engine shares its learner's. Raises RecipeError where engines over several GPUs find too few.

    >>> dealt_gpus(8, [0, 1], 1, fields.Generation(tensor_parallel=2))
    [(4, 5)]
    >>> dealt_gpus(3, [0, 1], 1, fields.Generation())
    [(1,)]
    """
    size, count = wanted.tensor_parallel, wanted.count
    free = [gpu for gpu in range(gpus) if gpu not in learners]
    if len(free) >= len(learners) * count * size and not wanted.sleep:
        first = place * count * size
        return [tuple(free[first + number * size :][:size]) for number in range(count)]
    if size > 1:
        raise RecipeError(
            f"generator.tensor_parallel: {count} engines of {size} GPUs for each of {len(learners)} learners do not fit beside "
            f"them on {gpus} GPUs; take fewer, leave generator.sleep out, or give engines places of their own with --cluster"
        )
    return [(learners[place],)] * count


def engines_of(
    recipe: fields.OnlineRecipe, chat: Chat, longest: int, gpus: Sequence[tuple[int, ...]]
) -> list[Callable[[], Generator]]:
    """How each engine of the recipe is started: vLLM's own on these GPUs each, or the servers that run already.

    The servers' API key is VLLM_API_KEY of the environment, as vLLM itself has it.
    """
    wanted = recipe.generator
    if wanted.name == "server":
        from whet.generate.vllm.server import ServerGenerator

        options: dict[str, Any] = {"host": wanted.host, "timeout": wanted.timeout}
        options["api_key"] = os.environ.get("VLLM_API_KEY", "")
        return [partial(ServerGenerator, url, chat.end_ids, chat.text, **options) for url in wanted.urls]
    from whet.generate.vllm.engine import VLLMGenerator

    source = build.source_of(recipe.model)
    lora = recipe.model.lora
    on_cpu = source.torch_device().type == "cpu"
    make = partial(
        VLLMGenerator, recipe.model.path, chat.end_ids, chat.text, max_model_len=longest,
        dtype=str(source.torch_dtype()).removeprefix("torch.") if wanted.dtype == "auto" else wanted.dtype,
        kv_cache_mib=wanted.kv_cache_mib if on_cpu else 0, gpu_memory=wanted.gpu_memory_utilization,
        max_num_seqs=min(256, recipe.rollout.max_num_seqs), transfer=wanted.transfer, lora=wanted.push == "adapter",
        lora_rank=lora.rank if lora else 16, sleep=wanted.sleep, tensor_parallel=wanted.tensor_parallel,
    )  # fmt: skip
    return [partial(make, gpus=own) for own in gpus]


def local_generator(recipe: fields.OnlineRecipe, chat: Chat, learner: LocalLearner) -> LocalGenerator:
    """Answers from the learner's own policy, or from a copy where its weights are in shards or move meanwhile."""
    policy = learner.roles["policy"]
    ahead = recipe.generator.max_staleness > 0
    role = sampler_role(recipe) if ahead or _sharded(recipe, learner.workers.size) else policy
    return LocalGenerator(role, chat.end_ids, chat.text, unit=recipe.rollout.max_num_seqs, copy=role is not policy)


def _sharded(recipe: fields.OnlineRecipe, workers: int) -> bool:
    """No worker of the learner holds the policy whole."""
    return backend_of(recipe, workers) in ("fsdp", "zero3")


def sampler_role(recipe: fields.OnlineRecipe) -> Role:
    """A plain model of the policy's kind for a generator that has its own copy of the weights."""
    tokenizer, _ = build.tokenizer_and_chat(recipe.model)
    return build.causal_role("sampler", recipe.model, tokenizer, trained=False, seed=0)


# --- on a cluster ------------------------------------------------------------------------------------------------------


def check_cluster(recipe: fields.OfflineRecipe | fields.OnlineRecipe) -> None:
    """Refuses places that nobody asked for, and a cluster without Ray."""
    wanted, plain = recipe.cluster, fields.Cluster()
    if wanted.address is None:
        for name in ("learners", "engines", "rewards", "colocate", "min_learners"):
            if getattr(wanted, name) != getattr(plain, name):
                raise RecipeError(f"cluster.{name}: there is no cluster; set --cluster auto, or leave it out")
        return
    require()
    for count in {wanted.learners, wanted.min_learners}:
        backend_of(recipe, count)
    if launched():
        raise RecipeError("cluster: torchrun starts the workers, or the cluster does; leave one of them out")
    if wanted.min_learners > wanted.learners:
        raise RecipeError(
            f"cluster.min_learners: at most the {wanted.learners} of cluster.learners; got {wanted.min_learners}"
        )
    if isinstance(recipe, fields.OfflineRecipe) and (wanted.engines or wanted.rewards):
        raise RecipeError("cluster: training on a file has neither engines nor rewards; leave them out")
    if isinstance(recipe, fields.OnlineRecipe):
        if recipe.generator.max_staleness and not wanted.engines:
            raise RecipeError(
                "generator.max_staleness: the learner's workers answer and learn in turns; set cluster.engines"
            )
        if recipe.generator.name == "server" and len(recipe.generator.urls) != wanted.engines:
            raise RecipeError(
                f"cluster.engines: one for each of the {len(recipe.generator.urls)} servers; got {wanted.engines}"
            )
        if wanted.colocate and recipe.generator.tensor_parallel > 1:
            raise RecipeError("cluster.colocate: an engine over several GPUs needs them for itself; leave it out")
        if recipe.generator.count > 1:
            raise RecipeError("generator.count: on a cluster it is cluster.engines")
        if wanted.colocate and not wanted.engines:
            raise RecipeError(
                "cluster.colocate: there are no engines of their own; set cluster.engines, or leave it out"
            )


def on_cluster(
    recipe: fields.OfflineRecipe | fields.OnlineRecipe,
    attempt: Callable[[Attempt, bool], None],
    resume: bool,
    quiet: bool,
) -> None:
    """Runs the attempt on the recipe's cluster, again and from the last checkpoint where workers die."""
    own = recipe.cluster
    wanted = Wanted(
        own.learners, own.engines, own.rewards, colocate=own.colocate, cpus=own.cpus, min_learners=own.min_learners,
        placement_timeout=own.placement_timeout,
    )  # fmt: skip
    assert own.address is not None
    if not recipe.train.save_every and not quiet:
        print(
            "whet: train.save_every: a killed worker costs the whole run without checkpoints; set it", file=sys.stderr
        )
    with connected(own.address, cpus=wanted.total_cpus):
        if there("GPU") and recipe.model.device != "cpu":
            wanted = replace(wanted, gpus=1.0)
            if isinstance(recipe, fields.OnlineRecipe):
                models = any(build.is_model(one.source) for one in recipe.reward)
                size = 0 if recipe.generator.name == "server" else recipe.generator.tensor_parallel
                wanted = replace(wanted, engine_gpus=float(size), reward_gpus=float(models))
        survive(attempt, wanted, restarts=own.restarts, resume=resume, limit=own.timeout, quiet=quiet)


def answers_inside(recipe: fields.OnlineRecipe, longest: int, learner: LocalLearner) -> Generator:
    """The generator of a learner's worker."""
    _, chat = build.tokenizer_and_chat(recipe.model)
    return generator_of(recipe, chat, learner, longest)


def engine_alone(recipe: fields.OnlineRecipe, longest: int, number: int) -> Generator:
    """Engine `number` in a process of its own."""
    _, chat = build.tokenizer_and_chat(recipe.model)
    if recipe.generator.name != "local":
        makes = engines_of(recipe, chat, longest, [()])  # Ray has chosen its GPUs
        return makes[number % len(makes)]()
    role = sampler_role(recipe)
    return LocalGenerator(role, chat.end_ids, chat.text, unit=recipe.rollout.max_num_seqs, copy=True)


def rewards_alone(recipe: fields.OnlineRecipe) -> list[Weighted]:
    """All rewards of the recipe in one process of their own, reward models included."""
    tokenizer, _ = build.tokenizer_and_chat(recipe.model)
    roles = build.reward_roles(recipe, tokenizer)
    readers = {name: reading(role, recipe.train.max_tokens_per_micro_batch) for name, role in roles.items()}
    return build.rewards_of(recipe, tokenizer, lambda name, *given: readers[name](*given))
