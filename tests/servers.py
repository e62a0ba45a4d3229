"""A JSON server on loopback for tests."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Answers each request with `answer(body, number)`; keeps the bodies."""

    daemon_threads = True

    def __init__(self, answer: Callable[[dict, int], tuple[int, Any]]) -> None:
        self.bodies: list[dict] = []
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.bodies.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
                    number = len(server.bodies)
                status, found = answer(body, number)
                text = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving() -> Iterator[Callable[..., Server]]:
    """Starts servers, and ends them with the context."""
    made: list[Server] = []

    def start(answer: Callable[[dict, int], tuple[int, Any]]) -> Server:
        made.append(Server(answer))
        return made[-1]

    yield start
    for one in made:
        one.shutdown()
        one.server_close()
