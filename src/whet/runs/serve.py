"""`whet serve`: run a vLLM server on the loopback address, as the generator of a run in another process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from whet.errors import RecipeError
from whet.generate.base import require_vllm
from whet.models import load
from whet.runs import models
from whet.runs import recipe as fields
from whet.terminal import say


def run_serve(recipe: fields.ServeRecipe) -> str:
    """Start the server, print its address, and wait for SIGINT or SIGTERM. Return "ended". Raises RecipeError if vLLM is
    not installed or the server exits by itself, ModelError if the server does not start."""
    source = models.source_of(recipe.model)
    load.check_code(source)
    require_vllm()
    from whet.generate.vllm.server import Server

    longest = recipe.max_model_len or load.positions(source)
    on_cpu = source.torch_device().type == "cpu"
    options: dict[str, Any] = {
        "max_model_len": longest, "dtype": _dtype(recipe), "kv_cache_mib": recipe.kv_cache_mib if on_cpu else 0, "sleep": recipe.sleep,
        "gpu_memory": recipe.gpu_memory_utilization, "tensor_parallel": recipe.tensor_parallel, "max_num_seqs": recipe.max_num_seqs,
        "transfer": "shared" if recipe.transfer == "auto" else recipe.transfer,
        "trust_remote_code": recipe.model.trust_remote_code,
    }  # fmt: skip
    with _ended_by_signals(), Server(recipe.model.path, port=recipe.port, **options) as server:
        say(f"{server.url} (Ctrl-C ends it; --generator server --generator.urls '[{server.url}]')")
        try:
            server.process.wait()
        except KeyboardInterrupt:
            return "ended"
        raise RecipeError(f"serve: the server ended by itself (exit status {server.process.returncode})")


def _dtype(recipe: fields.ServeRecipe) -> str:
    """Return what the server computes in; "auto" is what a training run with default options computes in."""
    if recipe.dtype != "auto":
        return recipe.dtype
    if recipe.model.dtype == "auto" and models.half_by_default(recipe.model.device):
        return "bfloat16"
    return str(models.source_of(recipe.model).torch_dtype()).removeprefix("torch.")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, so that the processes of the server are ended too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
