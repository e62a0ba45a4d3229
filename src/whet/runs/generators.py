"""Build the generator of a recipe: local, vLLM engines, or vLLM servers."""

import os
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from whet.cluster.folders import WeightWriter
from whet.data import Chat
from whet.distributed import RestartBudget, launched
from whet.errors import RecipeError, WorkerDied
from whet.generate import Generator
from whet.generate.base import require_vllm
from whet.generate.fleet import Fleet
from whet.generate.local import LocalGenerator
from whet.generate.shared import SharedGenerator
from whet.http import Http
from whet.learner.local import LocalLearner
from whet.models.roles import Role
from whet.runs import learners, models
from whet.runs import recipe as fields


def check_generator(recipe: fields.OnlineRecipe, workers: int) -> None:
    """Raise RecipeError if the generator of the recipe does not support the recipe's options or a server does not answer.
    `workers` is the number of learner processes."""
    wanted, plain = recipe.generator, fields.Generation()
    if wanted.name == "openai":
        raise RecipeError(
            "generator.name: a server with the OpenAI API takes no weights and reports no log-probs, so it cannot answer in "
            "training; use it with whet sample and whet eval, or take local, vllm or server"
        )
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
    """Raise RecipeError if a server does not answer now. During a run, the generator would wait for it."""
    for url in urls:
        try:
            Http(url, 10.0).raw("GET", "/health")
        except WorkerDied as error:
            raise RecipeError(
                f"generator.urls: {str(error).removeprefix('generator: ')}; start one with whet serve --model DIR, or mend the address"
            ) from error


def generator_of(recipe: fields.OnlineRecipe, chat: Chat, learner: LocalLearner, longest: int) -> Generator:
    """Build the generator of a learner process. Several workers share the requests. `longest` is the longest sequence, in
    tokens."""
    workers, unit = learner.workers, recipe.rollout.max_num_seqs
    own: Generator
    if recipe.generator.name == "local":
        own = local_generator(recipe, chat, learner)
    else:
        makes = engines_of(recipe, chat, longest, gpus_of(recipe))
        if recipe.generator.name == "server" and workers.size > 1:
            makes = makes[workers.rank : workers.rank + 1]  # only one worker may send weights to a server
        own = Fleet(makes, RestartBudget(recipe.cluster.restarts))
        if writes_files(recipe, workers.size):
            attempt = workers.broadcast(secrets.token_hex(8))
            learner.writer = WeightWriter(workers, attempt, adapter=recipe.generator.push == "adapter", everywhere=True)
    return SharedGenerator(own, workers, unit) if workers.size > 1 else own


def writes_files(recipe: fields.OnlineRecipe, workers: int) -> bool:
    """Return True if published weights are written to files before engines load them.

    A single learner process that waits for the answers needs no files: each engine reads the weights from its memory. With
    shared memory and several engines, files written once are cheaper.
    """
    wanted = recipe.generator
    several = wanted.count > 1 and wanted.transfer in ("auto", "shared")
    return workers > 1 or wanted.max_staleness > 0 or wanted.push == "adapter" or several


def gpus_of(recipe: fields.OnlineRecipe) -> list[tuple[int, ...]]:
    """Return the GPU indices of each vLLM engine that this process starts. Empty tuples for a CPU or other generators."""
    wanted, device = recipe.generator, models.source_of(recipe.model).torch_device()
    if wanted.name != "vllm" or device.type != "cuda":
        return [()] * wanted.count
    beside, place = (int(os.environ.get(name, one)) for name, one in (("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    learners = list(range(beside)) if launched() else [device.index or 0]
    return dealt_gpus(torch.cuda.device_count(), learners, place % len(learners), wanted)


def dealt_gpus(gpus: int, learners: Sequence[int], place: int, wanted: fields.Generation) -> list[tuple[int, ...]]:
    """Return the GPU indices of each engine of learner `place`. `gpus` counts GPUs; `learners` are the learners' GPUs.

    Engines use free GPUs if there are enough for the engines of all learners. If not, or if engines sleep while the learner
    works, an engine shares the GPU of its learner. Raises RecipeError if engines that need several GPUs have too few.

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
    """Return one function per engine that starts it: a vLLM engine on its `gpus`, or a client of a running server.

    The API key of the servers is read from the environment variable VLLM_API_KEY, as in vLLM.
    """
    wanted = recipe.generator
    if wanted.name == "server":
        from whet.generate.vllm.server import ServerGenerator

        options: dict[str, Any] = {"host": wanted.host, "timeout": wanted.timeout}
        options["api_key"] = os.environ.get("VLLM_API_KEY", "")
        return [partial(ServerGenerator, url, chat.end_ids, chat.text, **options) for url in wanted.urls]
    from whet.generate.vllm.engine import VLLMGenerator

    source = models.source_of(recipe.model)
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
    """Build a generator on the learner's policy, or on a copy if its weights are sharded or it generates during updates."""
    policy = learner.roles["policy"]
    ahead = recipe.generator.max_staleness > 0
    role = sampler_role(recipe) if ahead or _sharded(recipe, learner.workers.size) else policy
    return LocalGenerator(role, chat.end_ids, chat.text, unit=recipe.rollout.max_num_seqs, copy=role is not policy)


def _sharded(recipe: fields.OnlineRecipe, workers: int) -> bool:
    """Return True if the learner shards the policy over its workers."""
    return learners.backend_of(recipe, workers) in ("fsdp", "zero3")


def sampler_role(recipe: fields.OnlineRecipe) -> Role:
    """Load a frozen copy of the policy for a generator with its own weights."""
    tokenizer, _ = models.tokenizer_and_chat(recipe.model)
    return models.causal_role("sampler", recipe.model, tokenizer, trained=False, seed=0)
