"""A program that takes vLLM's command line, to test how whet starts servers where vLLM is not installed.

It applies the middleware as vLLM does, tells `/weight_info` and the other routes nothing but their method and path, and writes
its arguments and environment beside its log.
"""

import asyncio
import importlib
import json
import os
import socketserver
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path


def given(flag):
    return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else None


async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps([scope["method"], scope["path"]]).encode()})


guarded = application
if given("--middleware") and not os.environ.get("IGNORE_MIDDLEWARE"):
    module, _, name = given("--middleware").rpartition(".")
    guarded = getattr(importlib.import_module(module), name)(application)


class Handler(BaseHTTPRequestHandler):
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        sent = []

        async def send(message):
            sent.append(message)

        asyncio.run(
            guarded({"type": "http", "method": self.command, "path": self.path, "headers": headers}, None, send)
        )
        self.send_response(sent[0]["status"])
        for name, value in sent[0]["headers"]:
            self.send_header(name.decode(), value.decode())
        self.end_headers()
        self.wfile.write(sent[1]["body"])

    do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = answer

    def address_string(self):
        return "client"

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    options = json.loads(given("--additional-config"))
    Path(options["whet_folder"], "told.json").write_text(
        json.dumps({"argv": sys.argv, "environment": dict(os.environ)})
    )
    if given("--uds"):
        server = socketserver.ThreadingUnixStreamServer(given("--uds"), Handler)
    else:
        server = socketserver.ThreadingTCPServer((given("--host"), int(given("--port"))), Handler)
    server.serve_forever()
