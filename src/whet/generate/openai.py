"""Generation on a server with the OpenAI chat API, for sampling and evaluation. It cannot load weights."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from torch import Tensor

from whet.data import Chat, Sample, Weights, extras_of
from whet.data.values import valid_text
from whet.errors import RecipeError
from whet.generate.base import GeneratorContext, Request
from whet.http import Http, api_key
from whet.methods.options import Processes, Seconds
from whet.ops import address


@dataclass(frozen=True)
class Options:
    """Options of a generator that uses an OpenAI-compatible server."""

    url: str = ""
    """base URL of the server, without /v1"""
    model: str = ""
    """name of the model on the server"""
    api_key_env: str = ""
    """environment variable that contains the API key, which is sent as a bearer token"""
    timeout: Seconds = 600.0
    """longest duration of a request in seconds"""
    retries: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 3
    """number of times a request is sent again if the server does not respond or fails (status 5xx)"""
    connections: Processes = 16
    """maximum number of concurrent requests"""
    token_ids: bool = False
    """request token ids from the server (return_token_ids of vLLM); otherwise the text is tokenized locally"""


class OpenAIGenerator:
    """A server with the route /v1/chat/completions as a Generator.

    With `token_ids`, samples have the server's token ids. Otherwise the text is tokenized locally, and the ids may differ
    from the sampled ones. Log-probs are not reported. So it cannot be used in training, and `load_weights` raises.
    """

    reports: frozenset[str] = frozenset()
    version = 0

    def __init__(self, options: Options, chat: Chat) -> None:
        key = api_key(options.api_key_env, "generator.api_key_env")
        self.options, self.chat = options, chat
        self.http = Http(options.url.rstrip("/").removesuffix("/v1"), options.timeout, key, what="generator.url")

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """See `Generator.generate`. Raises RecipeError for options that the API does not have, WorkerDied if the server
        fails more often than `retries` allows."""
        with ThreadPoolExecutor(self.options.connections, "whet-openai") as pool:
            yield from pool.map(self._answer, requests)

    def _answer(self, request: Request) -> Sample:
        seed = address("openai", request.seed, request.draw, request.answer) & (1 << 31) - 1
        body: dict[str, Any] = {
            "model": self.options.model, "messages": list(request.prompt.messages), "max_tokens": request.room,
            "temperature": request.sampling.temperature, "top_p": request.sampling.top_p, "n": 1, "seed": seed,
        }  # fmt: skip
        extras = extras_of(request.prompt.row)
        body |= extras
        if arguments := {**self.chat.arguments, **extras.get("chat_template_kwargs", {})}:
            body["chat_template_kwargs"] = arguments
        if self.options.token_ids:
            body["return_token_ids"] = True
        choice = self.http.chat(body, retries=self.options.retries)
        text, ended = valid_text(choice["message"]["content"] or ""), choice.get("finish_reason") != "length"
        ids = choice.get("token_ids")
        if ids is None:
            ids = self.chat.answer_ids(request.prompt.messages, text, extras, ended=ended)
        return Sample(
            request.draw, request.answer, tuple(ids), (0.0,) * len(ids), 0, "stop" if ended else "length", text
        )

    def load_weights(self, weights: Weights) -> None:
        """Raise RecipeError: the API has no route for weights."""
        raise RecipeError("generator: an OpenAI-compatible server takes no weights, so it cannot answer in training")

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Raise RecipeError: the API does not score given tokens."""
        raise RecipeError("generator: an OpenAI-compatible server gives no log-probs of given tokens")

    def sleep(self) -> None:
        """Do nothing: the server manages its own memory."""

    def close(self) -> None:
        """Do nothing: no connection is kept open."""


def check(options: Options, context: GeneratorContext) -> None:
    """Raise RecipeError for training, and for options of sampling that the API lacks."""
    if context.training is not None:
        raise RecipeError(
            "generator.name: a server with the OpenAI API takes no weights and reports no log-probs, so it cannot answer in "
            "training; use it with whet sample and whet eval, or take local, vllm or server"
        )
    for name, example in (("url", "https://api.example.com"), ("model", "gpt-4o-mini")):
        if not getattr(options, name):
            raise RecipeError(
                f"generator.{name}: which {'server' if name == 'url' else 'model'}? for example {example}"
            )
    if context.sampling.top_k or context.sampling.min_p or context.sampling.min_new_tokens:
        raise RecipeError("sampling: the OpenAI API has no top_k, min_p and min_new_tokens; leave them out")


def make(options: Options, context: GeneratorContext) -> OpenAIGenerator:
    """Build the generator."""
    return OpenAIGenerator(options, context.chat)
