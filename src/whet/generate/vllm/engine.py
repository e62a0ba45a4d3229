"""Generation with a vLLM engine that this process starts, inside itself or in child processes."""

import shutil
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.data import Sample, Weights
from whet.data.files import shared_memory
from whet.errors import RecipeError, RunStopped, WorkerDied, first_line
from whet.generate.base import Request, require_vllm
from whet.generate.vllm import transports
from whet.generate.vllm.lora import RANKS, Adapters
from whet.generate.vllm.push import About, Inlet, Transfer
from whet.generate.vllm.start import engine_arguments, leave_groups, processes_of, refuse_inside_ranks, start
from whet.generate.vllm.worker import OWNER
from whet.models.load import missing_ids
from whet.ops import address
from whet.processes import end, engine_folder

CLOSE = 15.0
"""Seconds for an engine to end by itself before it is killed."""

WATCH = 0.2
"""Seconds between two checks of whether the engine's processes are alive."""


Answer = tuple[tuple[int, ...], tuple[float, ...]]
"""The new token ids and the log-prob with which each was drawn."""


class EngineGenerator(ABC):
    """Base class of generators that use vLLM. It turns requests into token ids and vLLM options, and answers into samples.

    Only `end_ids` end an answer, and only `text` makes its text; vLLM sees nothing but token ids. Each request has its own
    seed, computed from its address. A prompt and its answer together may have at most `max_model_len` tokens.
    """

    reports = frozenset({"sampler_logp"})
    vocabulary: int
    """Number of token ids of the model."""

    def __init__(self, end_ids: Sequence[int], text: Callable[[Sequence[int]], str], max_model_len: int) -> None:
        self.end_ids, self.text, self.max_model_len = tuple(end_ids), text, max_model_len
        self.version = 0
        self._can_sleep = self._asleep = False
        self._unfit = ""
        """Why the engine may no longer be used; "" if it may."""

    @abstractmethod
    def call(self, method: str, *given: Any) -> list[Any]:
        """Call a method of the worker extension. Returns one result per worker."""

    def _close(self, tokenizer: Any) -> None:
        """Give the ids of the model that no token of the tokenizer has probability 0; none without a tokenizer."""
        missing = None if tokenizer is None else missing_ids(tokenizer, self.vocabulary)
        self.call("whet_close", [] if missing is None else missing.tolist())

    @property
    @abstractmethod
    def _incomplete(self) -> str:
        """Why the weights may not be used before the next weight update; "" if they may."""

    @abstractmethod
    def _answers(self, prompts: Sequence[Sequence[int]], options: Sequence[dict[str, Any]]) -> list[Answer]:
        """Return one answer per prompt, in order. Raises WorkerDied."""

    @abstractmethod
    def _scores(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probs of each sequence's tokens after the first. Raises WorkerDied."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """See `Generator.generate`. All requests of one call are answered together.

        Raises RecipeError for a request that is too long for the engine, WorkerDied if the engine died or a weight update
        was not completed.
        """
        if not requests:
            return
        self._usable()
        prompts = [request.given() for request in requests]
        for prompt, request in zip(prompts, requests, strict=True):
            self._fits(prompt, request.room)
        found = self._answers(prompts, [self._options(request) for request in requests])
        for request, (ids, logps) in zip(requests, found, strict=True):
            yield self._sample(request, ids, logps)

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """See `Generator.logprobs`. Raises what `generate` raises. Does not read the prefix cache."""
        self._usable()
        given = [one.tolist() for one in ids]
        for one in given:
            self._fits(one, 1)  # vLLM generates one more token after the sequence
        return [torch.tensor(values) for values in self._scores(given)]

    def sleep(self) -> None:
        """Release the GPU memory if the engine was started with `sleep`, else do nothing. The next call wakes the engine."""
        if self._can_sleep and not self._asleep:
            self._pause(True)
            self._asleep = True

    def wake(self) -> None:
        """Allocate the GPU memory again. Do nothing if the engine is awake."""
        if self._asleep:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # the engine needs the memory that this process has cached on the same GPU
            self._pause(False)
            self._asleep = False

    @abstractmethod
    def _pause(self, asleep: bool) -> None:
        """Put the engine to sleep if `asleep`, else wake it."""

    def _usable(self) -> None:
        if self._unfit or self._incomplete:
            raise WorkerDied(f"generator: {self._unfit or self._incomplete}")
        self.wake()

    def _fits(self, given: Sequence[int], room: int) -> None:
        """Raise RecipeError for a request that is too long or has invalid ids. vLLM would silently generate fewer tokens for
        the first, and crash on the second."""
        if len(given) + room > self.max_model_len:
            raise RecipeError(
                f"generator.max_model_len: {len(given)} tokens and {room} new ones do not fit into {self.max_model_len}"
            )
        if not given or min(given) < 0 or max(given) >= self.vocabulary:
            raise RecipeError(f"generator: a prompt is empty or has ids outside the model's {self.vocabulary}")

    def _options(self, request: Request) -> dict[str, Any]:
        """Return the options of a request under vLLM's names."""
        sampling = request.sampling
        seed = address("vllm", request.seed, request.draw, request.answer, len(request.begun))
        return {
            "max_tokens": request.room, "min_tokens": max(0, min(request.room, sampling.min_new_tokens - len(request.begun))),
            "temperature": sampling.temperature, "top_p": sampling.top_p,
            "top_k": sampling.top_k, "min_p": sampling.min_p, "seed": seed & (1 << 63) - 1, "logprobs": 0,
            "stop_token_ids": list(self.end_ids), "ignore_eos": True,
        }  # fmt: skip

    def _sample(self, request: Request, ids: tuple[int, ...], logps: tuple[float, ...]) -> Sample:
        if request.sampling.temperature == 0:
            logps = (0.0,) * len(ids)  # greedy choice has probability 1; vLLM reports the model's log-prob
        finish = request.finish(ids, self.end_ids)
        if finish != "stop" and len(ids) < request.room:
            raise RunStopped(
                f"generator: vLLM ended an answer after {len(ids)} of {request.room} tokens at no end token"
            )
        text = self.text((*request.begun, *ids))
        return Sample(request.draw, request.answer, ids, logps, self.version, finish, text)


class VLLMGenerator(EngineGenerator):
    """A vLLM engine that this process starts.

    Weight updates contain all weights, through vLLM's weight transfer, or with `lora` only an adapter of the base model in
    `model`. Before the first `load_weights` the engine uses the weights in `model`.

    model            folder or name of a Hugging Face model
    max_model_len    longest prompt and answer together, in tokens
    dtype            dtype of the computation ("auto" would turn float32 weights into bfloat16)
    kv_cache_mib     size of the KV cache in MiB; 0: on a CPU 512, on a GPU the rest of `gpu_memory`
    gpu_memory       fraction of the GPU memory for weights and cache
    max_num_seqs     number of answers that are generated at the same time
    tensor_parallel  number of GPUs that the model is split over
    seed             seed of the engine; each answer has its own seed
    separate         True: the engine runs in child processes, and WorkerDied is raised if it dies. False: it runs in this
                     process and starts faster; vLLM then changes settings of torch here (on a CPU
                     `torch.set_num_threads` has no effect any more), and a crash of the engine ends this process
    transfer         how whole weights are sent; "auto" is "shared". "ipc" needs an engine on the GPU of the weights
    gpus             numbers of the GPUs to use, among those that this process sees; default: the first ones
    lora             load adapters instead of whole weights
    lora_rank        largest rank of these adapters
    sleep            the engine can release GPU memory between rollouts
    tokenizer        ids of the model that no token of it has are never sampled and have probability 0
    trust_remote_code  run code that comes with the model

    With `separate` the script that creates the engine needs the `if __name__ == "__main__"` guard. On a CPU a sample does
    not depend on the other requests of its batch; on a GPU this needs vLLM's VLLM_BATCH_INVARIANT=1.

    Raises RecipeError if vLLM is not installed or options cannot work together, ModelError if vLLM cannot start.
    """

    def __init__(
        self,
        model: str | Path,
        end_ids: Sequence[int],
        text: Callable[[Sequence[int]], str],
        *,
        max_model_len: int,
        dtype: str = "float32",
        kv_cache_mib: int = 0,
        gpu_memory: float = 0.5,
        max_num_seqs: int = 64,
        tensor_parallel: int = 1,
        seed: int = 0,
        separate: bool = True,
        transfer: Transfer = "auto",
        gpus: Sequence[int] = (),
        lora: bool = False,
        lora_rank: int = 16,
        sleep: bool = False,
        tokenizer: Any = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(end_ids, text, max_model_len)
        require_vllm()
        refuse_inside_ranks(separate)
        if transfer == "ipc" and not separate:
            raise RecipeError("generator.transfer: a process cannot open its own CUDA handles; take shared")
        self._folder = engine_folder(shared_memory())
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._can_sleep = sleep
        self._owns_group = not separate and not torch.distributed.is_initialized()
        arguments = engine_arguments(
            model, self._folder, max_model_len=max_model_len, dtype=dtype, kv_cache_mib=kv_cache_mib,
            gpu_memory=gpu_memory, max_num_seqs=max_num_seqs, tensor_parallel=tensor_parallel, seed=seed,
            transfer="shared" if transfer == "auto" else transfer, gpus=gpus, sleep=sleep,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        if lora:
            # one adapter slot: with an adapter loaded, requests without one would be computed with it too
            rank = next((size for size in RANKS if size >= lora_rank), lora_rank)
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
            del arguments["weight_transfer_config"]
        if not separate:
            del arguments["additional_config"][OWNER]
        self._llm: Any = start(arguments | {"skip_tokenizer_init": True}, separate)
        self._processes = processes_of(self._llm) if separate else []
        self.inlet: Inlet | Adapters = Adapters(self._do, self._folder)
        try:
            self._llm.update_weight_version("0")
            about = About.of(self)
            self.vocabulary = about.vocabulary
            self._close(tokenizer)
            if not lora:
                self.inlet = Inlet(
                    self, transports.transport(about, gpu=gpus[0] if gpus and transfer == "ipc" else 0), about
                )
        except BaseException:
            self.close()
            raise

    def load_weights(self, weights: Weights) -> None:
        """Load the weights of a role (or with `lora` its adapter) or of a folder, then drop the cache of the old weights.

        Raises ModelError if they do not fit the engine's model, WorkerDied if the engine died or could not load them,
        RunStopped if it reports a different version afterwards.
        """
        if self._unfit:
            raise WorkerDied(f"generator: {self._unfit}")
        self.wake()
        self.inlet.push(weights)
        self.version = weights.version

    def processes(self) -> list[int]:
        """Return the ids of the engine's child processes that are alive; none with `separate=False`."""
        return [process.pid for process in self._processes if process.alive]

    def close(self) -> None:
        """End the engine and all its processes, and remove its folder. May be called more than once."""
        if self._llm is None:
            return
        llm, self._llm, self._unfit = self._llm, None, "the engine was closed"
        if isinstance(self.inlet, Inlet):
            self.inlet.transport.close()
        try:
            if self._processes:
                wait([_in_thread(llm.llm_engine.engine_core.shutdown)], CLOSE)
            else:
                llm.llm_engine.engine_core.shutdown()
        finally:
            end(self._processes, 1.0)
            if self._owns_group:
                leave_groups()
            self._remove()

    # The methods that a weight update calls (`push.Control`).

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Call vLLM's method of this name."""
        self._do(lambda llm: llm.init_weight_transfer_engine({"init_info": init_info}))

    def start_weight_update(self) -> None:
        """Call vLLM's method of this name."""
        self._do(lambda llm: llm.start_weight_update())

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Call vLLM's method of this name."""
        self._do(lambda llm: llm.update_weights({"update_info": update_info}))

    def finish_weight_update(self, weight_version: str) -> None:
        """Call vLLM's method of this name."""
        self._do(lambda llm: llm.finish_weight_update(weight_version))

    def weight_version(self) -> str:
        """Call vLLM's method of this name."""
        return self._do(lambda llm: llm.get_weight_version())

    def reset_prefix_cache(self) -> bool:
        """Call vLLM's method of this name."""
        return bool(self._do(lambda llm: llm.reset_prefix_cache()))

    def call(self, method: str, *given: Any) -> list[Any]:
        """Call a method of the worker extension. Returns one result per worker."""
        return self._do(lambda llm: llm.collective_rpc(method, args=given))

    @property
    def _incomplete(self) -> str:
        return self.inlet.incomplete

    def _pause(self, asleep: bool) -> None:
        self._do(lambda llm: llm.sleep(level=1) if asleep else llm.wake_up())

    def _answers(self, prompts: Sequence[Sequence[int]], options: Sequence[dict[str, Any]]) -> list[Answer]:
        out = []
        for output in self._run(prompts, options):
            made = output.outputs[0]
            ids = tuple(made.token_ids)
            versions = {span.version for span in made.weight_versions or ()}
            if versions != {str(self.version)}:
                raise RunStopped(f"generator: asked for an answer of weights {self.version}, got one of {versions}")
            logps = (places[token].logprob for places, token in zip(made.logprobs, ids, strict=True))
            out.append((ids, tuple(logps)))
        return out

    def _scores(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        if isinstance(self.inlet, Adapters):
            return [self._stepwise(one) for one in ids]
        asked = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "ignore_eos": True}
        return [
            [places[token].logprob for places, token in zip(output.prompt_logprobs[1:], one[1:], strict=True)]
            for output, one in zip(self._run(ids, [asked] * len(ids)), ids, strict=True)
        ]

    def _stepwise(self, ids: Sequence[int]) -> list[float]:
        """Score a sequence with one request per token, because with adapters vLLM cannot return log-probs of a prompt."""
        asked = {
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": 1,
            "ignore_eos": True,
            "skip_reading_prefix_cache": True,
        }
        given = [ids[:place] for place in range(1, len(ids))]
        outputs = self._run(given, [asked | {"logprob_token_ids": [token]} for token in ids[1:]]) if given else []
        return [output.outputs[0].logprobs[0][token].logprob for output, token in zip(outputs, ids[1:], strict=True)]

    def _run(self, prompts: Sequence[Sequence[int]], options: Sequence[dict[str, Any]]) -> list[Any]:
        """Return vLLM's outputs. After any failure the engine may hold part of a batch, so it is not used again."""
        from vllm import SamplingParams

        adapter = self.inlet.current if isinstance(self.inlet, Adapters) else None
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        params = [SamplingParams(detokenize=False, **one) for one in options]
        try:
            return self._do(lambda llm: llm.generate(given, params, use_tqdm=False, lora_request=adapter))
        except WorkerDied:
            raise
        except BaseException as error:
            self._unfit = f"the vLLM engine was stopped in the middle of a batch ({first_line(error)})"
            if isinstance(error, Exception):
                raise WorkerDied(f"generator: the vLLM engine failed: {first_line(error)}") from error
            raise

    def _do(self, work: Callable[[Any], Any]) -> Any:
        """Make a call to vLLM. Raises WorkerDied if the engine died.

        vLLM waits forever for an engine process that was killed. So the call runs in its own thread, and this thread checks
        meanwhile that the processes are alive.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            if not self._processes:
                return work(self._llm)
            future = _in_thread(lambda: work(self._llm))
            while not wait([future], WATCH).done:
                if not all(one.alive for one in self._processes) and not wait([future], 5 * WATCH).done:
                    raise EngineDeadError()
            return future.result()
        except Exception as error:
            # if a worker process died, the call may raise any error
            if not isinstance(error, EngineDeadError) and all(one.alive for one in self._processes):
                raise
            self._unfit = "the vLLM engine died"
            raise WorkerDied("generator: the vLLM engine died") from error


def _in_thread(work: Callable[[], Any]) -> "Future[Any]":
    """Run `work` in a daemon thread, which does not keep this process alive."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="whet-vllm").start()
    return future
