"""A guard of every route of a vLLM server by an API key: an ASGI middleware. vLLM's own option guards some routes only."""

import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from whet.http import api_key
from whet.terminal import caution

KEY = "VLLM_API_KEY"
"""The environment variable from which vLLM and the gate read the key of a server."""

GATE = f"{__name__}.Gate"
"""The value of vLLM's option --middleware."""

App = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]
]


def server_key(variable: str, what: str) -> str:
    """Return the key of a vLLM server: the value of the environment variable `variable`, or without one of VLLM_API_KEY; "" if
    that is not set. Raises RecipeError if `variable` is not set, or if the key cannot be sent in a header."""
    return api_key(variable or (KEY if os.environ.get(KEY) else ""), what)


class Gate:
    """Pass a request on only if its header is `Authorization: Bearer KEY`, on every route and with every method.

    KEY is the environment variable VLLM_API_KEY when the server starts. Without it every request is refused. Start a vLLM
    server of your own with `--middleware whet.generate.vllm.gate.Gate`; do not use its option `--api-key`, which other users
    can read in the list of processes.
    """

    def __init__(self, app: App) -> None:
        key = os.environ.get(KEY, "")
        self.app = app
        self.expected = _digest(key.encode()) if key else None
        if not key:
            caution(f"this server refuses every request, because {KEY} is not set")

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        """Answer status 401 (a websocket is closed with code 1008) or call the application. See the ASGI specification."""
        if scope["type"] == "lifespan" or self._admits(scope.get("headers", ())):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            why = "the API key is missing or wrong" if self.expected else f"the server was started without {KEY}"
            body = json.dumps({"error": {"message": why, "type": "Unauthorized", "code": 401}}).encode()
            headers = [
                (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
                (b"www-authenticate", b"Bearer"),
            ]  # fmt: skip
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _admits(self, headers: Any) -> bool:
        given = [value for name, value in headers if name.lower() == b"authorization"]
        if self.expected is None or len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        # digests have one length, so the time of the comparison does not depend on the key's
        return hmac.compare_digest(_digest(key), self.expected) and scheme.lower() == b"bearer"


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()
