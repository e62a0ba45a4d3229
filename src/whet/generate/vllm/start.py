"""Start and end a vLLM engine: its arguments, its environment, its processes and process groups."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from whet.errors import ModelError, RecipeError
from whet.generate.vllm import transports
from whet.generate.vllm.worker import EXTENSION, FOLDER, OWNER
from whet.processes import Process, descendants

QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
"""Environment variables to set before vLLM is imported, unless the user has set them."""

LONGEST_PATH = 100
"""Bytes that the path of a Unix socket may have on every system."""


def sockets_in(folder: Path) -> dict[str, str]:
    """Return the environment variable with which vLLM creates the Unix sockets between its processes in a folder, instead of
    the folder for temporary files of all users; {} if the path would be too long."""
    name = "0" * 36  # a UUID
    return {"VLLM_RPC_BASE_PATH": str(folder)} if len(os.fsencode(folder / name)) <= LONGEST_PATH else {}


def engine_arguments(
    model: str | Path,
    folder: Path,
    *,
    max_model_len: int,
    dtype: str = "float32",
    kv_cache_mib: int = 0,
    gpu_memory: float = 0.5,
    max_num_seqs: int = 64,
    tensor_parallel: int = 1,
    seed: int = 0,
    transfer: str = "shared",
    gpus: Sequence[int] = (),
    sleep: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return vLLM's arguments for an engine that whet can use. The options are those of `VLLMGenerator`."""
    on_gpu = torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "model": str(model), "dtype": dtype, "max_model_len": max_model_len, "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(max_model_len, 2048), "enable_chunked_prefill": False, "seed": seed,
        "tensor_parallel_size": tensor_parallel, "enforce_eager": not on_gpu, "gpu_memory_utilization": gpu_memory,
        "logprobs_mode": "processed_logprobs", "worker_extension_cls": EXTENSION, "generation_config": "vllm",
        "enable_sleep_mode": sleep and on_gpu, "additional_config": {FOLDER: str(folder), OWNER: os.getpid()},
        "weight_transfer_config": {"backend": transports.BACKENDS[transfer]}, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    if gpus:
        arguments["device_ids"] = list(gpus)
    if kv_cache_mib or not on_gpu:
        arguments["kv_cache_memory_bytes"] = (kv_cache_mib or 512) << 20
    return arguments


def refuse_inside_ranks(separate: bool) -> None:
    """Raise RecipeError for an engine inside one of several ranks, whose process group it would take over."""
    group = torch.distributed
    if not separate and group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        raise RecipeError(
            "generator.separate: false inside a process group of several ranks, where vLLM would hang; set it to true"
        )


def start(given: dict[str, Any], separate: bool) -> Any:
    """Start an engine with these arguments, in processes of its own if `separate`. Return vLLM's LLM object."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, envs

    places = {} if "VLLM_RPC_BASE_PATH" in os.environ else sockets_in(Path(given["additional_config"][FOLDER]))
    changed = places | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(separate))}
    before = {name: os.environ.get(name) for name in changed}
    os.environ |= changed
    envs.disable_envs_cache()  # vLLM caches the environment when an engine starts in this process
    try:
        return LLM(**given)
    except Exception as error:
        why = " ".join(str(error).split())[:500] or type(error).__name__  # the first line may not name the cause
        raise ModelError(f"generator: vLLM cannot start with {given['model']}: {why}") from error
    finally:
        for name, old in before.items():
            os.environ.pop(name, None) if old is None else os.environ.update({name: old})


def processes_of(llm: Any) -> list[Process]:
    """Return the processes of an engine that runs in processes of its own."""
    started = llm.llm_engine.engine_core.resources.engine_manager.processes
    return [process for one in started for process in descendants(one.pid)]


def leave_groups() -> None:
    """Destroy the process groups that an engine created in this process, so that another engine can be started."""
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    destroy_model_parallel()
    destroy_distributed_environment()
