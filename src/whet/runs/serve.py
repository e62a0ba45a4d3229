"""`whet serve`: run a vLLM server on a Unix socket or on loopback, as the generator of a run in another process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whet.errors import RecipeError
from whet.generate.base import require_vllm
from whet.generate.vllm.gate import KEY, server_key
from whet.models import load
from whet.runs import models
from whet.runs import recipe as fields
from whet.terminal import say


def run_serve(recipe: fields.ServeRecipe) -> str:
    """Start the server, print its address, and wait for SIGINT or SIGTERM. Return "ended". Raises RecipeError if vLLM is
    not installed, `api_key_env` is not set or the server exits by itself, ModelError if the server does not start."""
    source = models.source_of(recipe.model)
    load.check_code(source)
    require_vllm()
    from whet.generate.vllm.launch import Server

    key = server_key(recipe.api_key_env, "api_key_env")
    longest = recipe.max_model_len or load.positions(source)
    on_cpu = source.torch_device().type == "cpu"
    options: dict[str, Any] = {
        "max_model_len": longest, "dtype": _dtype(recipe), "kv_cache_mib": recipe.kv_cache_mib if on_cpu else 0, "sleep": recipe.sleep,
        "gpu_memory": recipe.gpu_memory_utilization, "tensor_parallel": recipe.tensor_parallel, "max_num_seqs": recipe.max_num_seqs,
        "transfer": "shared" if recipe.transfer == "auto" else recipe.transfer,
        "trust_remote_code": recipe.model.trust_remote_code,
    }  # fmt: skip
    with _ended_by_signals(), Server(recipe.model.path, port=recipe.port, key=key, **options) as server:
        say(f"{server.url} (Ctrl-C ends it; {_use(server.url, server.key_file)})")
        say(_guarded(recipe, bool(key)), error=True)
        try:
            server.process.wait()
        except KeyboardInterrupt:
            return "ended"
        raise RecipeError(f"serve: the server ended by itself (exit status {server.process.returncode})")


def _use(url: str, key_file: Path | None) -> str:
    """Return how a run uses the server. A random key is named by its file."""
    key = f'VLLM_API_KEY="$(cat {key_file})" ' if key_file else ""
    return f"{key}whet ... --generator server --generator.urls '[{url}]'"


def _guarded(recipe: fields.ServeRecipe, given: bool) -> str:
    """Return who can use the server. `given` tells whether the user has set a key."""
    key = f"whoever has the key{f' of {recipe.api_key_env or KEY}' if given else ''}"
    if recipe.port is None:
        out = "whet: only this user can open its socket" + (f", and only {key} can use it" if given else "")
    else:
        out = f"whet: only {key} can use it, on every route"
    if recipe.transfer in ("gloo", "nccl"):
        out += f"; no key guards the port over which {recipe.transfer} sends weights: other users of the machine can connect to it"
    return out


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
