"""Rewards from a judge model behind any server with the OpenAI chat API: it is asked for a number for each answer."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from whet.data import Group
from whet.errors import RecipeError, RewardError, WorkerDied
from whet.http import Http, api_key
from whet.methods.options import Count, Processes, Seconds
from whet.rewards.base import Scores, checked, columns_of

PROMPT = (
    "Rate how good the answer to the question is, from 0 (useless) to 10 (perfect). Reply with the number alone.\n\n"
    "Question:\n{prompt}\n\nAnswer:\n{completion}"
)
"""The default prompt."""
PLACE = re.compile(r"\{prompt\}|\{completion\}")
"""The places in the prompt where the texts are put."""
NUMBER = re.compile(r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*(?:/\s*10)?\.?\s*")
"""A reply: a number, perhaps with "/10" behind it."""


@dataclass(frozen=True)
class Options:
    """Options of a judge model on an OpenAI-compatible server."""

    url: str
    """base URL of the server, without /v1"""
    model: str
    """name of the model on the server"""
    prompt: str = PROMPT
    """what the model is asked; {prompt} and {completion} are replaced"""
    api_key_env: str = ""
    """environment variable with the key, which is sent as a bearer token"""
    timeout: Seconds = 600.0
    """seconds that one request may take"""
    retries: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 3
    """times that a request is sent again when nothing answers or the server fails (status 5xx)"""
    connections: Processes = 16
    """requests at the same time"""
    no_score: str = ""
    """reply that means that the judge cannot say, such as N/A: it then does not apply to the answer. Without it, every reply must be
    a number"""
    max_tokens: Count = 16
    """longest reply, in tokens"""


class OpenAIJudge:
    """A chat model as a Reward: the score of an answer is the number that the model replies with, at temperature 0.

    A reply that is `no_score` means that the judge does not apply to the answer. Raises RewardError if a reply is anything else
    than this or a number, or the server fails more often than `retries` allow.
    """

    per_group = True
    """Groups may be dealt over the workers; every group is scored by one of them."""

    def __init__(self, options: Options) -> None:
        if "{completion}" not in options.prompt:
            raise RecipeError("reward openai: the prompt must contain {completion}, which the answer replaces")
        self.options = options
        url = options.url.rstrip("/").removesuffix("/v1")
        key = api_key(options.api_key_env, "reward openai: api_key_env")
        self.http = Http(url, options.timeout, key, what="reward openai: url")

    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`. The scores are in the order of the answers."""
        prompts, completions, _ = columns_of(groups)
        with ThreadPoolExecutor(self.options.connections, "whet-judge") as pool:
            values = list(pool.map(self._ask, prompts, completions))
        return checked(values, [sample for group in groups for sample in group.samples], "openai")

    def _ask(self, prompt: Any, completion: str) -> float | None:
        text = prompt if isinstance(prompt, str) else "\n".join(f"{one['role']}: {one['content']}" for one in prompt)
        given = {"{prompt}": text, "{completion}": completion}
        asked = PLACE.sub(lambda match: given[match.group()], self.options.prompt)
        body = {
            "model": self.options.model, "messages": [{"role": "user", "content": asked}], "temperature": 0.0,
            "max_tokens": self.options.max_tokens,
        }  # fmt: skip
        try:
            reply = self.http.chat(body, retries=self.options.retries)["message"]["content"] or ""
        except (RecipeError, WorkerDied) as error:
            raise RewardError(str(error)) from error
        if self.options.no_score and reply.strip() == self.options.no_score.strip():
            return None
        found = NUMBER.fullmatch(reply)
        if found is None:
            raise RewardError(f"reward openai: {self.options.model} was asked for a number and replied {reply!r:.80}")
        return float(found.group(1))


def make(options: Options, context: Any) -> OpenAIJudge:
    """Build the judge."""
    return OpenAIJudge(options)
