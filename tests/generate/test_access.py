"""Who can use a vLLM server: nobody without its key on any route, and nobody else on a socket. The key is shown nowhere."""

import asyncio
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from servers import serving

from whet.errors import ModelError, RecipeError, WorkerDied
from whet.generate.vllm import gate, launch
from whet.generate.vllm.gate import Gate, server_key
from whet.generate.vllm.launch import Server
from whet.http import Http

SECRET = "s3cret-" + "k" * 40
ROUTES = (
    "/v1/completions",
    "/update_weights",
    "/collective_rpc",
    "/weight_info",
    "/health",
    "/docs",
    "/",
    "//v1",
    "/metrics",
)
OPTIONS: dict[str, Any] = {"max_model_len": 32, "kv_cache_mib": 64, "start_timeout": 60}


# --- the gate -----------------------------------------------------------------------------------------------------------


def asked(app: Any, *headers: tuple[bytes, bytes], **scope: Any) -> tuple[list[dict], list[dict]]:
    """What the client gets, and the requests that reach the application behind the gate."""
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    async def receive() -> dict:
        return {}

    asyncio.run(app({"type": "http", "method": "GET", "path": "/", "headers": list(headers)} | scope, receive, send))
    return sent, app.app.reached


class Behind:
    """An application that answers everything."""

    def __init__(self) -> None:
        self.reached: list[dict] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Gate:
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    return Gate(Behind())


def bearer(key: str) -> tuple[bytes, bytes]:
    return b"authorization", f"Bearer {key}".encode()


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "DELETE"])
@pytest.mark.parametrize("path", ROUTES)
def test_no_route_answers_without_the_key(gated: Gate, path: str, method: str) -> None:
    sent, reached = asked(gated, path=path, method=method)
    assert [sent[0]["status"], reached] == [401, []]
    assert json.loads(sent[1]["body"])["error"]["message"] == "the API key is missing or wrong"
    sent, reached = asked(gated, bearer(SECRET), path=path, method=method)
    assert [sent[0]["status"], len(reached)] == [200, 1]


@pytest.mark.parametrize(
    "headers",
    [
        [bearer("")],
        [bearer(SECRET[:-1])],
        [bearer(SECRET + "x")],
        [bearer(SECRET.upper())],
        [(b"authorization", SECRET.encode())],
        [(b"authorization", f"Basic {SECRET}".encode())],
        [(b"x-api-key", SECRET.encode())],
        [bearer("x"), bearer(SECRET)],
        [bearer(SECRET), bearer("x")],
        [(b"authorization", b"Bearer \xff\xfe")],
    ],
)
def test_another_key_is_refused(gated: Gate, headers: list[tuple[bytes, bytes]]) -> None:
    sent, reached = asked(gated, *headers)
    assert [sent[0]["status"], reached] == [401, []]
    assert SECRET not in str(sent)


def test_the_scheme_has_no_case(gated: Gate) -> None:
    assert asked(gated, (b"Authorization", f"bearer {SECRET}".encode()))[0][0]["status"] == 200


def test_a_websocket_needs_the_key_and_the_start_of_the_application_does_not(gated: Gate) -> None:
    sent, reached = asked(gated, type="websocket", path="/v1/realtime")
    assert [sent, reached] == [[{"type": "websocket.close", "code": 1008}], []]
    assert len(asked(gated, bearer(SECRET), type="websocket")[1]) == 1
    assert len(asked(gated, type="lifespan")[1]) == 2


def test_without_a_key_it_refuses_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    closed = Gate(Behind())
    assert "refuses every request, because VLLM_API_KEY is not set" in capsys.readouterr().err
    for headers in ([], [bearer("")], [bearer("None")]):
        sent, reached = asked(closed, *headers)
        assert [sent[0]["status"], reached] == [401, []]
        assert "was started without VLLM_API_KEY" in sent[1]["body"].decode()


def test_its_name_for_vllm_is_its_import_path() -> None:
    assert f"{Gate.__module__}.{Gate.__qualname__}" == gate.GATE


# --- keys ---------------------------------------------------------------------------------------------------------------


def test_the_key_is_that_of_the_named_variable_or_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert server_key("", "generator.api_key_env") == ""
    monkeypatch.setenv("VLLM_API_KEY", "a")
    monkeypatch.setenv("MINE", "b")
    assert server_key("", "generator.api_key_env") == "a"
    assert server_key("MINE", "generator.api_key_env") == "b"
    with pytest.raises(RecipeError, match=r"generator.api_key_env: the environment variable NONE_SET is not set"):
        server_key("NONE_SET", "generator.api_key_env")


@pytest.mark.parametrize("key", [f"{SECRET}\n", f"{SECRET} x", f"ü{SECRET}", f"{SECRET}\r\nX: y"])
def test_a_key_that_no_header_holds_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTTP library names the header in its error, and so the key."""
    monkeypatch.setenv("VLLM_API_KEY", key)
    for work in (lambda: server_key("", "here"), lambda: Http("http://127.0.0.1:9", 1.0, key)):
        with pytest.raises(RecipeError, match="other than visible ASCII") as refused:
            work()
        assert SECRET not in str(refused.value)


def test_a_refused_key_is_not_shown_and_the_variable_is_named() -> None:
    with serving() as serve:
        asked = Http(serve(lambda body, number: (401, {"error": {"message": "no"}})).url, 5.0, SECRET)
        with pytest.raises(RecipeError, match=r"\(401\): no; set VLLM_API_KEY to the key") as refused:
            asked.ask("POST", "/update_weights", {})
    assert SECRET not in str(refused.value)


def test_a_key_in_place_of_the_variable_is_not_shown() -> None:
    with pytest.raises(RecipeError, match=r"api_key_env: expected the name of an environment variable") as refused:
        server_key(SECRET, "generator.api_key_env")
    assert SECRET not in str(refused.value)


# --- sockets --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[Path]:
    """A Unix socket that answers one kind of request."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    head = connection.recv(65536).partition(b"\r\n")[0].decode()
                    body = json.dumps(head).encode()
                    if head:
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

        threading.Thread(target=serve, daemon=True).start()
        yield path
        listening.shutdown(socket.SHUT_RDWR)


def test_requests_go_over_a_unix_socket(echo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    asked = Http(f"unix://{echo}", 5.0, SECRET)
    assert asked.local
    assert asked.ask("GET", "/weight_info?x=1") == "GET /weight_info?x=1 HTTP/1.1"


def test_a_socket_of_another_user_gets_nothing(echo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    if real == 0:
        os.chown(echo, 12345, -1)
    with pytest.raises(RecipeError, match=r"generator.urls: .* belongs to .*; whet uses Unix sockets of its own user"):
        Http(f"unix://{echo}", 5.0).ask("GET", "/health")


def test_what_is_no_socket_is_named(echo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(echo)
    for name in ("file", "link"):
        with pytest.raises(RecipeError, match=f"{name} is not a Unix socket"):
            Http(f"unix://{tmp_path}/{name}", 5.0).ask("GET", "/health")
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
    for name in ("none", "deaf"):
        with pytest.raises(WorkerDied, match=f"no server responds at unix://{tmp_path}/{name}"):
            Http(f"unix://{tmp_path}/{name}", 5.0).ask("GET", "/health")
    for url in ("unix://", "unix://relative/path", "unix:/path"):
        with pytest.raises(RecipeError, match="expected http://host:port or unix:///path"):
            Http(url, 5.0)


# --- servers that whet starts: the other side is a program with vLLM's command line ------------------------------------------


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Puts the program in the place of vLLM; the folder that plays shared memory."""
    package = tmp_path / "packages" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("other_server.py"), package / "api_server.py")
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    paths = [str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for module in ("server", "launch"):
        monkeypatch.setattr(f"whet.generate.vllm.{module}.require_vllm", lambda: None, raising=False)
    root = Path("/tmp") / f"w{os.getpid()}"  # a path of a socket must be short
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(mode=0o700)
    monkeypatch.setattr(launch, "shared_memory", lambda: root)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def started(other: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(**options: Any) -> Server:
        made.append(Server("model", **OPTIONS, **options))
        return made[-1]

    yield start
    for one in made:
        one.close()
        assert not one.folder.exists()


def told(server: Server) -> dict[str, Any]:
    return json.loads((server.folder / "told.json").read_text())


def listening(server: Server) -> list[int]:
    found = [one for pid in server.processes() for one in psutil.Process(pid).net_connections("inet")]
    return [one.laddr.port for one in found if one.status == psutil.CONN_LISTEN]


def test_by_default_a_server_has_a_socket_in_a_private_folder_and_no_port(started: Callable[..., Server]) -> None:
    before = os.umask(0)
    try:
        server = started()
    finally:
        os.umask(before)
    path = Path(server.url.removeprefix("unix://"))
    assert stat.S_ISSOCK(path.lstat().st_mode)
    assert path.parent == server.folder
    assert server.folder.lstat().st_mode & 0o7777 == 0o700
    assert listening(server) == []
    assert (server.key, server.key_file) == ("", None)
    assert told(server)["environment"]["VLLM_RPC_BASE_PATH"] == str(server.folder)
    assert "VLLM_API_KEY" not in told(server)["environment"]
    assert Http(server.url, 5.0).ask("POST", "/update_weights", {}) == ["POST", "/update_weights"]


@pytest.mark.parametrize("given", ["", SECRET])
@pytest.mark.parametrize("port", [0, None])
def test_a_port_always_has_a_key_and_a_socket_the_given_one(
    started: Callable[..., Server], port: int | None, given: str
) -> None:
    server = started(port=port, key=given)
    assert (server.key != "") == (port is not None or given != "")
    if given:
        assert (server.key, server.key_file) == (SECRET, None)
    elif port == 0:
        assert len(server.key) == 64
        assert server.key_file is not None
        assert server.key_file.read_text() == server.key
        assert server.key_file.lstat().st_mode & 0o7777 == 0o600
    if server.key:
        for route in ROUTES:
            assert Http(server.url, 5.0).raw("POST", route, {})[0] == 401
            assert Http(server.url, 5.0, "wrong").raw("POST", route, {})[0] == 401
            assert Http(server.url, 5.0, server.key).raw("POST", route, {})[0] == 200
        assert server.key not in " ".join(told(server)["argv"])
        assert server.key not in " ".join(psutil.Process(server.process.pid).cmdline())
        assert server.key not in server.log.read_text()
    assert listening(server) == ([] if port is None else [int(server.url.rpartition(":")[2])])


def test_two_servers_have_different_keys(started: Callable[..., Server]) -> None:
    assert started(port=0).key != started(port=0).key


def test_a_server_that_ignores_the_gate_is_not_used(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IGNORE_MIDDLEWARE", "1")
    with pytest.raises(ModelError, match="answers without its key"):
        Server("model", port=0, **OPTIONS)


def test_a_program_that_took_the_port_does_not_get_the_key(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as serve:
        thief = serve(lambda body, number: (200, {}))
        with pytest.raises(ModelError, match="ended while starting"):
            Server("model", port=thief.server_address[1], key=SECRET, **OPTIONS)
        assert thief.bodies == []


@pytest.mark.parametrize(
    ("options", "given", "says"),
    [
        ([], "", "only this user can open its socket"),
        (["--port", "0"], "", "only whoever has the key can use it, on every route"),
        (["--port", "0"], "VLLM_API_KEY", "only whoever has the key of VLLM_API_KEY can use it"),
        (["--port", "0", "--api-key-env", "MINE"], "MINE", "only whoever has the key of MINE can use it"),
        (["--port", "0", "--transfer", "gloo"], "", "no key guards the port over which gloo sends weights"),
    ],
)
def test_the_command_says_who_can_use_the_server_and_never_the_key(
    other: Path, tmp_path: Path, options: list[str], given: str, says: str
) -> None:
    model = tiny.folder(tmp_path / "model")
    command = [sys.executable, "-m", "whet", "serve", "--model", str(model), *options]
    environment = os.environ | ({given: SECRET} if given else {}) | {"TMPDIR": str(other)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        line = run.stdout.readline()
        warning = run.stderr.readline()
        url = line.split()[0]
        assert says in warning
        assert f"--generator.urls '[{url}]'" in line
        key = SECRET if given else ""
        if options and not given:
            file = line.partition('VLLM_API_KEY="$(cat ')[2].partition(")")[0]
            key = Path(file).read_text()
            assert len(key) == 64
        assert url.startswith("http://127.0.0.1:" if options else "unix:///")
        assert Http(url, 5.0, key).ask("GET", "/health") == ["GET", "/health"]
        assert Http(url, 5.0).raw("GET", "/health")[0] == (401 if key else 200)
        assert not key or key not in line + warning
        for one in [run.pid, *(child.pid for child in psutil.Process(run.pid).children(recursive=True))]:
            assert not key or key not in " ".join(psutil.Process(one).cmdline())
        run.terminate()
        assert run.wait(60) == 0
    assert not Path(url.removeprefix("unix://")).exists()


def test_a_variable_that_is_not_set_is_said_before_the_model_is_looked_for(other: Path) -> None:
    command = [sys.executable, "-m", "whet", "serve", "--model", "/none", "--port", "0", "--api-key-env", "NONE_SET"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "api_key_env: the environment variable NONE_SET is not set" in run.stderr
