"""Generation with a running vLLM server over HTTP, on a Unix socket or a port."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from whet.data import Weights
from whet.errors import RecipeError, RunStopped, WorkerDied
from whet.generate.base import GeneratorContext
from whet.generate.vllm import transports
from whet.generate.vllm.engine import Answer, EngineGenerator
from whet.generate.vllm.gate import GATE, KEY, server_key
from whet.generate.vllm.push import About, Inlet
from whet.http import Http
from whet.methods.options import Seconds
from whet.terminal import caution

UNSET = "default"
"""vLLM's version of weights that were never updated."""


class ServerGenerator(EngineGenerator):
    """A vLLM server. Prompts and answers are sent as token ids over /v1/completions, weights over vLLM's weight routes.

    The server must have been started as `launch.Server` starts it: with VLLM_SERVER_DEV_MODE=1, whet's worker extension, a
    weight transfer that whet knows, processed log-probs, no chunked prefill on a CPU, and vLLM's own generation
    configuration. Only one run may send weight updates to it.

    url              unix:///path or http://host:port
    timeout          seconds to wait for an answer; after that the engine counts as dead
    connections      number of requests that are sent at the same time
    host             address of this machine that the server's workers can reach, for weights over gloo or NCCL
    api_key          sent with every request. vLLM alone asks for it on some routes only; `gate.Gate` asks on all
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
        _warn(self.http, timeout)
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


def _warn(http: Http, timeout: float) -> None:
    """Warn about a server on a port whose weight routes need no key, and about a key that other machines could read."""
    if not http.local and http.parts.scheme == "http":
        caution(f"{http.url} is not on this machine: key, prompts and answers travel unencrypted")
    if not http.socket and Http(http.url, timeout).raw("GET", "/weight_info")[0] < 400:
        caution(
            f"the weight routes of {http.url} need no key: whoever reaches the port can replace the weights; use whet serve, "
            f"or start the server with {KEY} and --middleware {GATE}"
        )


def _refuse(about: About) -> None:
    """Raise RecipeError for a server that would report wrong log-probs, or that would crash on requests with a seed."""
    if about.logprobs_mode != "processed_logprobs":
        raise RecipeError("generator.urls: start the server with --logprobs-mode processed_logprobs")
    if about.splits_prompts:
        raise RecipeError("generator.urls: start the server with --no-enable-chunked-prefill")


@dataclass(frozen=True)
class Options:
    """Options of the clients of running vLLM servers."""

    urls: tuple[str, ...] = ()
    """addresses of the servers, such as "unix:///run/user/1000/socket" or "http://127.0.0.1:8000" """
    api_key_env: str = ""
    """environment variable that contains the key of the servers; default: VLLM_API_KEY, if it is set"""
    host: str = "127.0.0.1"
    """this machine's address as the servers reach it, if they take weights by gloo or nccl"""
    timeout: Seconds = 600.0
    """seconds that a server may take for one answer"""

    may_change = ("urls", "api_key_env")
    """Options that a resumed run may change."""


def check(options: Options, context: GeneratorContext) -> None:
    """Raise RecipeError without servers, for a wrong number of them, or if one does not answer."""
    context.refuse_truncation("server")
    context.refuse_quantized()
    if not options.urls:
        raise RecipeError(
            'generator.urls: where are the servers? for example --generator.urls "[http://127.0.0.1:8000]"; whet serve prints its address'
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
    key = server_key(options.api_key_env, "generator.api_key_env")
    for url in options.urls:
        try:
            Http(url, 10.0, key).ask("GET", "/health")
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
    """Connect to server `context.number`."""
    return ServerGenerator(
        options.urls[context.number % len(options.urls)], context.chat.end_ids, context.chat.text, host=options.host,
        timeout=options.timeout, api_key=server_key(options.api_key_env, "generator.api_key_env"),
        tokenizer=context.chat.tokenizer,
    )  # fmt: skip
