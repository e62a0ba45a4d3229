"""The generator `vllm`: its options, what it refuses, and the engines that it starts on free GPUs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import torch

from whet.distributed import launched
from whet.errors import RecipeError
from whet.generate.base import Generator, GeneratorContext, require_vllm
from whet.generate.vllm.push import Transfer
from whet.methods.options import Count, Processes


@dataclass(frozen=True)
class Options:
    """Options of the vLLM engines that whet starts."""

    count: Processes = 1
    """engines of each learner process, which share its load (on a cluster: cluster.engines)"""
    tensor_parallel: Processes = 1
    """GPUs of one engine"""
    push: Literal["weights", "adapter"] = "weights"
    """what is sent after an update: all weights, or with model.lora only the adapter"""
    transfer: Transfer = "auto"
    """how it is sent; "auto" is shared memory; ipc is for an engine on the learner's own GPU"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the engine; "auto" is that of the learner; outside training that of model.dtype"""
    gpu_memory_utilization: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    """share of a GPU's memory that an engine takes"""
    kv_cache_mib: Count = 512
    """size of the KV cache of an engine on a CPU, in MiB"""
    sleep: bool = False
    """engines free their GPU memory while the learner trains"""

    may_change = ("count", "transfer", "gpu_memory_utilization", "kv_cache_mib")
    """Options that a resumed run may change."""


def check(options: Options, context: GeneratorContext) -> None:
    """Raise RecipeError for options that contradict each other or the run, too few GPUs, or if vLLM is not installed."""
    context.refuse_truncation("vllm")
    if options.push != "adapter":
        context.refuse_quantized()
    if options.push == "adapter" and context.lora_rank is None:
        raise RecipeError("generator.push: there is no adapter without model.lora; leave it at weights")
    training = context.training
    for name in ("push", "sleep"):
        if training is None and getattr(options, name) != getattr(Options(), name):
            raise RecipeError(f"generator.{name}: it is for training; leave it out")
    if training is not None:
        cluster = training.engines is not None
        if options.transfer in ("ipc", "nccl") and (training.workers > 1 or cluster):
            raise RecipeError(
                f"generator.transfer: {options.transfer} is for one learner without a cluster; leave it at auto"
            )
        if options.sleep and training.max_staleness:
            raise RecipeError(
                "generator.sleep: engines that generate ahead never rest; leave it out, or max_staleness at 0"
            )
        if cluster and options.count > 1:
            raise RecipeError("generator.count: on a cluster it is cluster.engines")
        if training.colocate and options.tensor_parallel > 1:
            raise RecipeError("cluster.colocate: an engine over several GPUs needs them for itself; leave it out")
    require_vllm()
    if training is None or training.engines is None:
        placed(options, context.device)


def engines(options: Options, context: GeneratorContext) -> list[int]:
    """Return the numbers of the engines that this process starts."""
    return list(range(options.count))


def gpus(options: Options) -> int:
    """Return the number of GPUs of one engine."""
    return options.tensor_parallel


def make(options: Options, context: GeneratorContext) -> Generator:
    """Start engine `context.number`."""
    from whet.generate.vllm.engine import VLLMGenerator

    own = context.gpus if context.gpus is not None else placed(options, context.device)[context.number]
    return VLLMGenerator(
        context.model, context.chat.end_ids, context.chat.text, max_model_len=context.longest,
        dtype=context.dtype if options.dtype == "auto" else options.dtype,
        kv_cache_mib=options.kv_cache_mib if context.device.type == "cpu" else 0,
        gpu_memory=options.gpu_memory_utilization, max_num_seqs=min(256, context.max_num_seqs), transfer=options.transfer,
        lora=options.push == "adapter", lora_rank=context.lora_rank or 16, sleep=options.sleep,
        tensor_parallel=options.tensor_parallel, gpus=own, tokenizer=context.chat.tokenizer, trust_remote_code=context.trust_remote_code,
    )  # fmt: skip


def placed(options: Options, device: torch.device) -> list[tuple[int, ...]]:
    """Return the GPU indices of each engine that this process starts; empty tuples on a CPU. Raises RecipeError if there are
    too few GPUs."""
    if device.type != "cuda":
        return [()] * options.count
    beside, place = (int(os.environ.get(name, one)) for name, one in (("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    learners = list(range(beside)) if launched() else [device.index or 0]
    return dealt_gpus(torch.cuda.device_count(), learners, place % len(learners), options)


def dealt_gpus(gpus: int, learners: Sequence[int], place: int, wanted: Options) -> list[tuple[int, ...]]:
    """Return the GPU indices of each engine of learner `place`. `gpus` counts GPUs; `learners` are the learners' GPUs.

    Engines use free GPUs if there are enough for the engines of all learners. If not, or if engines sleep while the learner
    works, an engine shares the GPU of its learner. Raises RecipeError if engines that need several GPUs have too few.

    >>> dealt_gpus(8, [0, 1], 1, Options(tensor_parallel=2))
    [(4, 5)]
    >>> dealt_gpus(3, [0, 1], 1, Options())
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
