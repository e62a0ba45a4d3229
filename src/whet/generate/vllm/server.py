"""Generation with a vLLM server over HTTP: a running one, or one that whet starts on loopback."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.data import Weights
from whet.data.files import shared_memory
from whet.distributed import free_port
from whet.errors import ModelError, RecipeError, RunStopped, WorkerDied
from whet.generate.base import GeneratorContext, require_vllm
from whet.generate.vllm import transports
from whet.generate.vllm.engine import CLOSE, Answer, EngineGenerator
from whet.generate.vllm.push import About, Inlet
from whet.generate.vllm.start import QUIET, engine_arguments
from whet.http import Http
from whet.methods.options import Seconds
from whet.processes import descendants, end, owned_folder

UNSET = "default"
"""vLLM's version of weights that were never updated."""


class ServerGenerator(EngineGenerator):
    """A vLLM server. Prompts and answers are sent as token ids over /v1/completions, weights over vLLM's weight routes.

    The server must have been started as `Server` starts it: with VLLM_SERVER_DEV_MODE=1, whet's worker extension, a weight
    transfer that whet knows, processed log-probs, no chunked prefill on a CPU, and vLLM's own generation configuration.
    Only one run may send weight updates to it.

    url              http://host:port
    timeout          seconds to wait for an answer; after that the engine counts as dead
    connections      number of requests that are sent at the same time
    host             address of this machine that the server's workers can reach, for weights over gloo or NCCL
    api_key          sent to the server; it does not protect the weight routes
    sleep            the server was started with the option `sleep`
    tokenizer        ids of the model that no token of it has are never sampled and have probability 0

    Raises RecipeError if the server was started differently, WorkerDied if nothing answers at the URL.
    """

    def __init__(
        self,
        url: str,
        end_ids: Sequence[int],
        text: Callable[[Sequence[int]], str],
        *,
        timeout: float = 600.0,
        connections: int = 64,
        host: str = "127.0.0.1",
        api_key: str = "",
        sleep: bool = False,
        tokenizer: Any = None,
    ) -> None:
        self.http = Http(url, timeout, api_key)
        if not self.http.local:
            print(
                f"whet: {url} is not on this machine, and its weight routes are not guarded by an API key: whoever "
                "reaches the port can replace the weights",
                file=sys.stderr,
            )
        served = self.http.ask("GET", "/v1/models")["data"][0]
        super().__init__(end_ids, text, served["max_model_len"])
        self._can_sleep = sleep
        self.model, self.connections = served["id"], connections
        about = About.of(self)
        _refuse(about)
        self.vocabulary = about.vocabulary
        self._close(tokenizer)
        self.inlet = Inlet(self, transports.transport(about, host), about)
        self._label = self.weight_version()
        if self._label != UNSET:
            self.inlet.incomplete = (
                f"the server has weights {self._label!r} of an earlier run; push whole weights first"
            )

    def load_weights(self, weights: Weights) -> None:
        """Load the weights of a role or of a folder, then drop the cache of the old weights.

        Raises ModelError if they do not fit the server's model, WorkerDied if the server died or could not load them,
        RunStopped if it reports a different version afterwards.
        """
        if self._unfit:
            raise WorkerDied(f"generator: {self._unfit}")
        self.wake()
        self.inlet.push(weights)
        self.version, self._label = weights.version, str(weights.version)

    def close(self) -> None:
        """Disconnect from the server, which keeps running."""
        self.inlet.transport.close()
        self._unfit = "the connection was closed"

    # The methods that a weight update calls (`push.Control`).

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Call vLLM's route of this name."""
        self.http.ask("POST", "/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Call vLLM's route of this name."""
        self.http.ask("POST", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Call vLLM's route of this name."""
        self.http.ask("POST", "/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str) -> None:
        """Call vLLM's route of this name."""
        self.http.ask("POST", "/finish_weight_update", {"weight_version": weight_version})

    def weight_version(self) -> str:
        """Return the version that vLLM's route /weight_info reports."""
        return self.http.ask("GET", "/weight_info")["weight_version"]

    def reset_prefix_cache(self) -> bool:
        """Call vLLM's route of this name."""
        return self.http.ask("POST", "/reset_prefix_cache")["success"]

    def call(self, method: str, *given: Any) -> list[Any]:
        """Call a method of the worker extension. Raises RecipeError if the server has no such route."""
        return self.http.ask("POST", "/collective_rpc", {"method": method, "args": given})["results"]

    @property
    def _incomplete(self) -> str:
        return self.inlet.incomplete

    def _pause(self, asleep: bool) -> None:
        self.http.ask("POST", "/sleep?level=1" if asleep else "/wake_up")

    def _answers(self, prompts: Sequence[Sequence[int]], options: Sequence[dict[str, Any]]) -> list[Answer]:
        out = []
        for choice in self._complete(prompts, options):
            logps = choice["logprobs"]["token_logprobs"]
            out.append((tuple(choice["token_ids"]), tuple(logps)))
        return out

    def _scores(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        asked = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "ignore_eos": True}
        choices = self._complete(ids, [asked] * len(ids))
        return [
            [
                places[str(token)]["logprob"]
                for places, token in zip(choice["prompt_logprobs"][1:], one[1:], strict=True)
            ]
            for choice, one in zip(choices, ids, strict=True)
        ]

    def _complete(self, prompts: Sequence[Sequence[int]], options: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the server's completions. Raises RunStopped if another program changed its weights meanwhile."""
        asked = [
            {"model": self.model, "prompt": list(prompt), "return_token_ids": True, "add_special_tokens": False, **one}
            for prompt, one in zip(prompts, options, strict=True)
        ]
        pool = ThreadPoolExecutor(self.connections)
        try:
            answers = list(pool.map(lambda body: self.http.ask("POST", "/v1/completions", body), asked))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        said = self.weight_version()
        if said != self._label:
            raise RunStopped(f"generator: asked for answers of weights {self._label}, the server now has {said!r}")
        return [answer["choices"][0] for answer in answers]


def _refuse(about: About) -> None:
    """Raise RecipeError for a server that would report wrong log-probs, or that would crash on requests with a seed."""
    if about.logprobs_mode != "processed_logprobs":
        raise RecipeError("generator.urls: start the server with --logprobs-mode processed_logprobs")
    if about.splits_prompts:
        raise RecipeError("generator.urls: start the server with --no-enable-chunked-prefill")


class Server:
    """Start a vLLM server on loopback. A context manager: on exit the server and all its processes are ended.

    model            folder or name of a Hugging Face model, with its tokenizer
    port             port to listen on; 0 is any free port
    start_timeout    seconds to wait for the server's first answer
    options          engine options as in `VLLMGenerator`: max_model_len, dtype, kv_cache_mib, gpu_memory, max_num_seqs,
                     tensor_parallel, seed, transfer ("shared" by default), gpus, sleep

    Raises RecipeError if vLLM is not installed, ModelError if the server ends or does not answer in time.
    """

    def __init__(self, model: str | Path, *, port: int = 0, start_timeout: float = 600.0, **options: Any) -> None:
        require_vllm()
        self.folder = owned_folder(shared_memory())
        arguments = engine_arguments(model, self.folder, **options)
        port = port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = self.folder / "server.log"
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        with self.log.open("wb") as log:
            # started in a new session, so that all processes it starts can be ended with it
            self.process = subprocess.Popen(
                [*command, *flags(arguments)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, env=QUIET | os.environ | {"VLLM_SERVER_DEV_MODE": "1"},
            )  # fmt: skip
        self._end = weakref.finalize(self, _end, self.process, self.folder)
        try:
            self._wait(start_timeout)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def processes(self) -> list[int]:
        """Return the ids of the server's processes that are alive, its main process first."""
        return [process.pid for process in descendants(self.process.pid) if process.alive]

    def close(self) -> None:
        """End the server and all its processes, and remove its folder. May be called more than once."""
        self._end()

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        asked = Http(self.url, 5.0)
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise ModelError(
                    f"generator: the vLLM server ended while starting; the end of its log: {self._last_words()}"
                )
            try:
                if asked.raw("GET", "/health")[0] == 200:
                    asked.ask("POST", "/collective_rpc", {"method": "whet_about"})  # starts its watch of this process
                    return
            except WorkerDied:
                pass
            time.sleep(0.5)
        raise ModelError(
            f"generator: the vLLM server did not answer within {seconds:g} s; the end of its log: {self._last_words()}"
        )

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["none"])[-1].strip()


def flags(arguments: dict[str, Any]) -> list[str]:
    """Return vLLM's arguments in the form of command line flags."""
    out = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            out.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            out += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return out


def _end(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Ask the server to end, then kill all processes of its session and remove its folder."""
    processes = descendants(process.pid)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(CLOSE)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # also orphans whose parent process has ended
    except ProcessLookupError:
        pass
    process.wait()
    end(processes, 0.0)
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Options:
    """Options of the clients of running vLLM servers."""

    urls: tuple[str, ...] = ()
    """addresses of the servers, such as "http://127.0.0.1:8000" """
    host: str = "127.0.0.1"
    """this machine's address as the servers reach it, if they take weights by gloo or nccl"""
    timeout: Seconds = 600.0
    """seconds that a server may take for one answer"""

    may_change = ("urls",)
    """Options that a resumed run may change."""


def check(options: Options, context: GeneratorContext) -> None:
    """Raise RecipeError without servers, for a wrong number of them, or if one does not answer."""
    context.refuse_truncation("server")
    context.refuse_quantized()
    if not options.urls:
        raise RecipeError(
            'generator.urls: where are the servers? for example --generator.urls "[http://127.0.0.1:8000]"'
        )
    if context.training is None:
        raise RecipeError(
            "generator.name: a server has the weights of its last run, which may not be those of the model; use vllm, or openai "
            "with the URL of the server"
        )
    training = context.training
    if training.engines is not None:
        if len(options.urls) != training.engines:
            raise RecipeError(
                f"cluster.engines: one for each of the {len(options.urls)} servers; got {training.engines}"
            )
        return
    if training.workers not in (1, len(options.urls)):
        raise RecipeError(
            f"generator.urls: each of the {training.workers} workers needs a server of its own; got {len(options.urls)}"
        )
    for url in options.urls:
        try:
            Http(url, 10.0).raw("GET", "/health")
        except WorkerDied as error:
            raise RecipeError(
                f"generator.urls: {str(error).removeprefix('generator: ')}; start one with whet serve --model DIR, or correct "
                "the address"
            ) from error


def engines(options: Options, context: GeneratorContext) -> list[int]:
    """Return the numbers of the servers of this process: with several learner processes one, because only one may send weights
    to a server."""
    several = context.training is not None and context.training.workers > 1
    return [context.training.rank] if several and context.training is not None else list(range(len(options.urls)))


def gpus(options: Options) -> int:
    """Return 0: servers have their own GPUs."""
    return 0


def make(options: Options, context: GeneratorContext) -> ServerGenerator:
    """Connect to server `context.number`. The API key is read from the environment variable VLLM_API_KEY, as in vLLM."""
    return ServerGenerator(
        options.urls[context.number % len(options.urls)], context.chat.end_ids, context.chat.text, host=options.host,
        timeout=options.timeout, api_key=os.environ.get("VLLM_API_KEY", ""), tokenizer=context.chat.tokenizer,
    )  # fmt: skip
