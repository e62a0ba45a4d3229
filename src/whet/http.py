"""JSON requests to a server over HTTP, with the library httpx2."""

import ipaddress
import json
import os
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from whet.errors import RecipeError, WorkerDied, first_line


class Http:
    """JSON requests to one server. Each request opens a new connection, because servers may close idle ones.

    `timeout` is in seconds; `what` is the start of error messages.
    """

    def __init__(self, url: str, timeout: float, api_key: str = "", *, what: str = "generator") -> None:
        self.field = "generator.urls" if what == "generator" else what
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # an invalid address or port
            valid = False
        if not valid:
            raise RecipeError(f"{self.field}: expected http://host:port, got {url!r}")
        self.url, self.parts, self.timeout, self.what = url, parts, timeout, what
        self.headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )

    @property
    def local(self) -> bool:
        """Whether the address is a loopback address."""
        host = self.parts.hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None, *, retries: int = 0) -> Any:
        """Send a request and return the JSON of the answer, or None if the answer is empty.

        If the server fails, send the request again up to `retries` times, after 0.1 s, 0.2 s, ... 5 s. Raises RecipeError
        if the server refuses the request, WorkerDied if it still fails or does not answer in time.
        """
        for number in range(retries):
            try:
                return self._ask(method, path, body)
            except WorkerDied:
                time.sleep(min(0.1 * 2**number, 5.0))
        return self._ask(method, path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """Send a request once."""
        status, answer = self.raw(method, path, body)
        text = answer.decode("utf-8", "replace")
        if status >= 500 or status == 429:
            raise WorkerDied(
                f"{self.what}: the server at {self.url} failed on {path or method} ({status}): {_message(text)}"
            )
        if status == 404:
            advice = "; start it as whet does, with VLLM_SERVER_DEV_MODE=1 and whet's worker extension"
            raise RecipeError(
                f"{self.field}: the server at {self.url} has no {path or 'such page'}{advice if self.what == 'generator' else ''}"
            )
        if status >= 400:
            raise RecipeError(
                f"{self.field}: the server at {self.url} refused {path or method} ({status}): {_message(text)}"
            )
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise RecipeError(f"{self.field}: the answer of {self.url} is not JSON ({error}): {text:.80}") from error

    def chat(self, body: dict[str, Any], *, retries: int = 0) -> Mapping[str, Any]:
        """Send a request to the chat API of OpenAI-compatible servers. Return the first choice: `message`, `finish_reason`, ...

        Raises RecipeError if the server refuses the request, WorkerDied if it fails or sends something else.
        """
        found = self.ask("POST", "/v1/chat/completions", body, retries=retries)
        try:
            choice = found["choices"][0]
            choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise WorkerDied(f"{self.what}: {self.url} sent no chat completion, got {found!r:.200}") from error
        return choice

    def raw(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """Return the status and body of one answer. Raises WorkerDied if no answer arrives."""
        import httpx2

        content = None if body is None else json.dumps(body)
        url = f"{self.url.rstrip('/')}{path}"
        try:
            response = httpx2.request(
                method, url, content=content, headers=self.headers, timeout=self.timeout, trust_env=not self.local
            )
        except httpx2.TimeoutException as error:
            raise WorkerDied(f"{self.what}: no answer from {self.url} within {self.timeout:g} s") from error
        except (httpx2.TransportError, OSError) as error:
            raise WorkerDied(f"{self.what}: no server responds at {self.url} ({first_line(error)})") from error
        return response.status_code, response.content


def api_key(variable: str, what: str) -> str:
    """Return the API key in an environment variable, or "" without a variable. Raises RecipeError if it is not set."""
    if variable and not os.environ.get(variable):
        raise RecipeError(f"{what}: the environment variable {variable} is not set")
    return os.environ.get(variable, "") if variable else ""


def _message(text: str) -> str:
    """Return the message in the body of an error answer."""
    try:
        found = json.loads(text)
        return str(found.get("error", {}).get("message") or found)[:300]
    except (ValueError, AttributeError):
        return text.strip()[:300] or "no reason given"
