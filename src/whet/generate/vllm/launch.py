"""Start and end a vLLM server that only this user can use: on a Unix socket in a private folder, or on a port with a key."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from whet.data.files import shared_memory
from whet.distributed import free_port
from whet.errors import ModelError, WorkerDied
from whet.generate.base import require_vllm
from whet.generate.vllm.engine import CLOSE
from whet.generate.vllm.gate import GATE, KEY
from whet.generate.vllm.start import QUIET, engine_arguments, sockets_in
from whet.http import UNIX, Http
from whet.processes import descendants, end, engine_folder

JSON_ROUTES = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "0"}
"""Environment of a server: it has the weight routes, and never unpickles what is sent to them."""


class Server:
    """Start a vLLM server. A context manager: on exit the server and all its processes are ended.

    model            folder or name of a Hugging Face model, with its tokenizer
    port             port of loopback to listen on, 0 for any free one; None for a Unix socket in a private folder
    key              key that guards every route; "" for a random one on a port, and for none on a socket
    start_timeout    seconds to wait for the server's first answer
    options          engine options as in `VLLMGenerator`: max_model_len, dtype, kv_cache_mib, gpu_memory, max_num_seqs,
                     tensor_parallel, seed, transfer ("shared" by default), gpus, sleep, trust_remote_code

    `url` is its address, and `key` is its key or "". `key_file` has a random key; it is in the private folder. The key is
    passed to the server by the environment, which only this user and root can read.

    Raises RecipeError if vLLM is not installed, ModelError if the server ends or does not answer in time.
    """

    def __init__(
        self, model: str | Path, *, port: int | None = None, key: str = "", start_timeout: float = 600.0, **options: Any
    ) -> None:
        require_vllm()
        self.folder = engine_folder(shared_memory())
        arguments = engine_arguments(model, self.folder, **options)
        self.key_file: Path | None = None
        if port is not None and not key:
            key = secrets.token_hex(32)
            self.key_file = self.folder / "key"
            self.key_file.write_text(key, encoding="ascii")
            self.key_file.chmod(0o600)
        self.port, self.key = port if port is None else port or free_port(), key
        socket = self.folder / "socket"
        self.url = f"{UNIX}{socket}" if port is None else f"http://127.0.0.1:{self.port}"
        place = ["--uds", str(socket)] if port is None else ["--host", "127.0.0.1", "--port", str(self.port)]
        self.log = self.folder / "server.log"
        guard = ["--middleware", GATE] if key else []
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *place, *guard]
        with self.log.open("wb") as log:
            # started in a new session, so that all processes it starts can be ended with it
            self.process = subprocess.Popen(
                [*command, *flags(arguments)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, env=self._environment(),
            )  # fmt: skip
        self._end = weakref.finalize(self, _end, self.process, self.folder)
        try:
            self._wait(start_timeout)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def processes(self) -> list[int]:
        """Return the ids of the server's processes that are alive, its main process first."""
        return [process.pid for process in descendants(self.process.pid) if process.alive]

    def close(self) -> None:
        """End the server and all its processes, and remove its folder. May be called more than once."""
        self._end()

    def _environment(self) -> dict[str, str]:
        found = QUIET | sockets_in(self.folder) | os.environ | JSON_ROUTES
        return {name: value for name, value in found.items() if name != KEY} | ({KEY: self.key} if self.key else {})

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        asked = Http(self.url, 5.0, self.key)
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise ModelError(
                    f"generator: the vLLM server ended while starting; the end of its log: {self._last_words()}"
                )
            with suppress(WorkerDied):
                # another program could listen on the port, and must not get the key
                if self._listens() and asked.raw("GET", "/health")[0] == 200:
                    asked.ask("POST", "/collective_rpc", {"method": "whet_about"})  # starts its watch of this process
                    self._check_guard()
                    return
            time.sleep(0.5)
        raise ModelError(
            f"generator: the vLLM server did not answer within {seconds:g} s; the end of its log: {self._last_words()}"
        )

    def _listens(self) -> bool:
        """Return True if it is a process of the server that listens on the port. On a socket this is certain."""
        if self.port is None:
            return True
        for pid in self.processes():
            with suppress(psutil.Error):
                for one in psutil.Process(pid).net_connections("tcp"):
                    if one.status == psutil.CONN_LISTEN and one.laddr.port == self.port:
                        return True
        return False

    def _check_guard(self) -> None:
        """Raise ModelError if the server has a key and answers without it."""
        if self.key and Http(self.url, 5.0).raw("GET", "/weight_info")[0] != 401:
            raise ModelError(
                "generator: the vLLM server answers without its key; this version of vLLM does not use --middleware"
            )

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["none"])[-1].strip()


def flags(arguments: dict[str, Any]) -> list[str]:
    """Return vLLM's arguments in the form of command line flags."""
    out = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            out.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            out += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return out


def _end(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Ask the server to end, then kill all processes of its session and remove its folder."""
    processes = descendants(process.pid)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(CLOSE)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # also orphans whose parent process has ended
    except ProcessLookupError:
        pass
    process.wait()
    end(processes, 0.0)
    shutil.rmtree(folder, ignore_errors=True)
