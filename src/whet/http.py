"""JSON requests to a server over HTTP, on a port or a Unix socket, with the library httpx2."""

import ipaddress
import json
import os
import re
import socket
import stat
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from whet.errors import RecipeError, WorkerDied, first_line
from whet.private import user

UNIX = "unix://"
"""The start of the address of a Unix socket: unix:///path."""


class Http:
    """JSON requests to one server. Each request opens a new connection, because servers may close idle ones.

    `url` is http://host:port, https://host:port or unix:///path. `timeout` is in seconds; `what` is the start of error
    messages. Raises RecipeError for another address, or an API key that no header can contain.
    """

    def __init__(self, url: str, timeout: float, api_key: str = "", *, what: str = "generator") -> None:
        self.field = "generator.urls" if what == "generator" else what
        self.socket = url.removeprefix(UNIX) if url.startswith(UNIX) else ""
        try:
            parts = urlsplit("http://localhost" if self.socket.startswith("/") else url)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # an invalid address or port
            valid = False
        if not valid:
            raise RecipeError(f"{self.field}: expected http://host:port or unix:///path, got {url!r}")
        if api_key and not _sendable(api_key):
            raise RecipeError(f"{self.field}: the API key has characters other than visible ASCII ones")
        self.url, self.parts, self.timeout, self.what = url, parts, timeout, what
        self.headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )

    @property
    def local(self) -> bool:
        """Whether the address is a Unix socket or a loopback address."""
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
            advice = "; set VLLM_API_KEY to the key of the server" if status == 401 and self.what == "generator" else ""
            raise RecipeError(
                f"{self.field}: the server at {self.url} refused {path or method} ({status}): {_message(text)}{advice}"
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
        """Return the status and body of one answer. Raises WorkerDied if no answer arrives, RecipeError if the Unix socket
        belongs to another user than this one or root."""
        import httpx2

        content = None if body is None else json.dumps(body)
        url = f"{'http://localhost' if self.socket else self.url.rstrip('/')}{path}"
        try:
            transport = None
            if self.socket:
                self._probe()
                transport = httpx2.HTTPTransport(uds=self.socket, verify=False)  # no TLS on a socket
            with httpx2.Client(transport=transport, timeout=self.timeout, trust_env=not self.local) as client:
                response = client.request(method, url, content=content, headers=self.headers)
        except httpx2.TimeoutException as error:
            raise WorkerDied(f"{self.what}: no answer from {self.url} within {self.timeout:g} s") from error
        except (httpx2.TransportError, OSError) as error:
            raise WorkerDied(f"{self.what}: no server responds at {self.url} ({first_line(error)})") from error
        return response.status_code, response.content

    def _probe(self) -> None:
        """Raise RecipeError for a Unix socket of another user, OSError if nothing listens there. (httpx2 does not close a Unix
        socket that it cannot connect.)"""
        found = os.lstat(self.socket)
        if not stat.S_ISSOCK(found.st_mode):
            raise RecipeError(f"{self.field}: {self.socket} is not a Unix socket")
        if found.st_uid not in (os.geteuid(), 0):
            raise RecipeError(
                f"{self.field}: {self.socket} belongs to {user(found.st_uid)}; whet uses Unix sockets of its own user and of root"
            )
        with socket.socket(socket.AF_UNIX) as tried:
            tried.settimeout(self.timeout)
            tried.connect(self.socket)


def api_key(variable: str, what: str) -> str:
    """Return the API key in an environment variable, or "" without a variable. Raises RecipeError if it is not set, or has
    characters that no header can contain."""
    if variable and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise RecipeError(
            f"{what}: expected the name of an environment variable; the given text, which may be a key, is not shown"
        )
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        raise RecipeError(f"{what}: the environment variable {variable} is not set")
    if key and not _sendable(key):
        raise RecipeError(
            f"{what}: the value of {variable} has characters other than visible ASCII ones, such as a space"
        )
    return key


def _sendable(key: str) -> bool:
    return re.fullmatch(r"[!-~]+", key) is not None


def _message(text: str) -> str:
    """Return the message in the body of an error answer."""
    try:
        found = json.loads(text)
        return str(found.get("error", {}).get("message") or found)[:300]
    except (ValueError, AttributeError):
        return text.strip()[:300] or "no reason given"
