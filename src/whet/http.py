"""JSON requests to a server, and which of its failures are its death."""

import http.client
import ipaddress
import json
from typing import Any
from urllib.parse import urlsplit

from whet.errors import RecipeError, WorkerDied, first_line


class Http:
    """JSON requests to one server. Each has a connection of its own, because servers close idle ones at any time."""

    def __init__(self, url: str, timeout: float, api_key: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError(f"generator.urls: expected http://host:port, got {url!r}")
        self.url, self.parts, self.timeout = url, parts, timeout
        self.headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )

    @property
    def local(self) -> bool:
        """The address is on loopback."""
        host = self.parts.hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer's JSON, None where it has none.

        Raises RecipeError when the server refuses the request, WorkerDied when it fails or nothing comes in time.
        """
        status, answer = self.raw(method, path, body)
        text = answer.decode("utf-8", "replace")
        if status >= 500:
            raise WorkerDied(f"generator: the server at {self.url} failed on {path} ({status}): {_message(text)}")
        if status == 404:
            raise RecipeError(
                f"generator.urls: the server at {self.url} has no {path}; start it as whet does, "
                "with VLLM_SERVER_DEV_MODE=1 and whet's worker extension"
            )
        if status >= 400:
            raise RecipeError(f"generator.urls: the server at {self.url} refused {path} ({status}): {_message(text)}")
        return json.loads(text) if text else None

    def raw(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """Status and body of one answer; raises WorkerDied when there is none."""
        kind = http.client.HTTPSConnection if self.parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.parts.hostname or "", self.parts.port, timeout=self.timeout)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self.headers)
            response = connection.getresponse()
            return response.status, response.read()
        except TimeoutError as error:
            raise WorkerDied(f"generator: no answer from {self.url} within {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise WorkerDied(f"generator: nothing answers at {self.url} ({first_line(error)})") from error
        finally:
            connection.close()


def _message(text: str) -> str:
    """The part of an error answer that says what was wrong."""
    try:
        found = json.loads(text)
        return str(found.get("error", {}).get("message") or found)[:300]
    except (ValueError, AttributeError):
        return text.strip()[:300] or "no reason given"
