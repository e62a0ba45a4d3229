"""Rewards from a server, which gets prompts and completions in batches by HTTP POST."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from whet.data import Group
from whet.errors import RecipeError, RewardError, WorkerDied
from whet.http import Http, api_key
from whet.methods.options import Elements, Processes, Seconds
from whet.rewards.base import Scores, checked, columns_of


@dataclass(frozen=True)
class Options:
    """Options of a reward over HTTP."""

    timeout: Seconds = 60.0
    """longest duration of a request in seconds"""
    retries: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 3
    """number of times a request is sent again if the server does not respond or fails (status 5xx)"""
    batch_size: Elements = 64
    """answers per request"""
    connections: Processes = 4
    """maximum number of concurrent requests"""
    api_key_env: str = ""
    """environment variable that contains the API key, which is sent as a bearer token"""


class HttpReward:
    """A reward that a server computes.

    The request is JSON with `prompts`, `completions`, `query` (prompt and completion joined) and the columns of the prompt
    rows. The response is a list of numbers, or an object with this list under `rewards` or `scores`. A null in it means that the
    reward does not apply to the answer. Each answer is sent once, for any number of workers. Raises RewardError if the server
    fails more often than `retries` allows, refuses a request, or does not return one number or null per answer.
    """

    per_group = True
    """Groups may be split over the workers; each group is scored by one worker."""

    def __init__(self, url: str, options: Options = Options(), key: str = "") -> None:
        self.url, self.options = url, options
        self.http = Http(url, options.timeout, key, what=f"reward {url}")

    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`. The scores are in the order of the answers."""
        prompts, completions, columns = columns_of(groups)
        if "query" in columns:
            raise RewardError(
                f"reward {self.url}: the prompt rows have a column 'query', which the request has too; rename it"
            )
        size = self.options.batch_size
        bodies = []
        for start in range(0, len(completions), size):
            part = slice(start, start + size)
            texts = [
                one if isinstance(one, str) else "\n".join(str(m.get("content")) for m in one) for one in prompts[part]
            ]
            query = [prompt + completion for prompt, completion in zip(texts, completions[part], strict=True)]
            own = {name: values[part] for name, values in columns.items()}
            bodies.append({**own, "query": query, "prompts": prompts[part], "completions": completions[part]})
        with ThreadPoolExecutor(self.options.connections, "whet-reward") as pool:
            values = [number for found in pool.map(self._ask, bodies) for number in found]
        return checked(values, [sample for group in groups for sample in group.samples], self.url)

    def _ask(self, body: dict[str, Any]) -> list[Any]:
        try:
            found = self.http.ask("POST", "", body, retries=self.options.retries)
        except RecipeError as error:
            raise RewardError(str(error)) from error
        except WorkerDied as error:
            tries = self.options.retries + 1
            raise RewardError(f"{error}; tried {tries} time{'s' if tries > 1 else ''}") from error
        values = next((found[key] for key in ("rewards", "scores") if isinstance(found, dict) and key in found), found)
        if not isinstance(values, list) or len(values) != len(body["completions"]):
            count = len(body["completions"])
            raise RewardError(f"reward {self.url}: expected a list of {count} numbers, got {values!r:.80}")
        return values


def make(options: Options, context: str) -> HttpReward:
    """Build the reward of the URL `context`."""
    return HttpReward(context, options, api_key(options.api_key_env, f"reward {context}"))
