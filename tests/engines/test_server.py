"""A vLLM server as a generator: the contract over a Unix socket, pushes, foreign pushes, its death, and who can reach it.

These start a real server; they are skipped where vLLM is not installed.
"""

import http.server
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from generate.contract import Contract
from models import helpers as h

from engines import helpers as e
from whet.data import Weights
from whet.errors import ModelError, RecipeError, RunStopped, WorkerDied
from whet.generate.vllm import push as vllm_push
from whet.generate.vllm.launch import Server, flags
from whet.generate.vllm.server import ServerGenerator
from whet.http import Http
from whet.methods.options import Sampling
from whet.processes import descendants

pytest.importorskip("vllm")
BOUND = 1e-4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on a model with tied embeddings."""
    folder = tiny.folder(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", seed=0, **e.SHAPE)
    with Server(folder, **e.options(sleep=True)) as running:
        yield running


@pytest.fixture(scope="module")
def connected(server: Server) -> ServerGenerator:
    out = ServerGenerator(server.url, e.END, e.text, timeout=60, connections=8, sleep=True)
    out.role = e.role("qwen3", 0)  # type: ignore[attr-defined]  (what the contract adopts)
    return out


@pytest.fixture
def generator(connected: ServerGenerator) -> ServerGenerator:
    """The same server, back at its first weights."""
    connected.inlet.transport.chunk = vllm_push.CHUNK
    if connected.version or connected.inlet.incomplete:
        connected.load_weights(Weights(0, connected.role))
    return connected


class TestContract(Contract):
    """It keeps the generators' contract."""


def test_it_agrees_with_transformers(generator: Any) -> None:
    asked = e.asked(Sampling(6, 0.7, top_k=9))
    gaps = (
        e.score_gap(generator, generator.role.model),
        e.sampling_gap(list(generator.generate(asked)), asked, generator.role.model),
    )
    print(f"\ngaps to transformers {gaps[0]:.1e} {gaps[1]:.1e}")
    assert max(gaps) < BOUND
    assert {s.sampler_logp for s in generator.generate(e.asked(Sampling(1, 0.0)))} == {(0.0,)}


def test_what_cannot_be_asked_is_refused(generator: Any) -> None:
    request = e.asked()[0]
    with pytest.raises(RecipeError, match="max_model_len"):
        list(generator.generate([replace(request, prompt=h.prompt(0, (7,) * e.LENGTH))]))
    with pytest.raises(RecipeError, match="outside the model's 27"):
        list(generator.generate([replace(request, prompt=h.prompt(0, (300,)))]))
    with pytest.raises(RecipeError, match="refused /v1/completions"):
        generator._complete([(2, 3)], [{"max_tokens": 1, "temperature": -1.0}])


@pytest.mark.parametrize("chunk", [vllm_push.CHUNK, 1 << 14])
def test_new_weights_agree_with_transformers(generator: Any, chunk: int) -> None:
    before = e.plain(list(generator.generate(e.asked())))
    generator.inlet.transport.chunk = chunk
    role = e.role("qwen3", 1)
    generator.load_weights(Weights(1, role))
    after = list(generator.generate(e.asked()))
    gaps = e.score_gap(generator, role.model), e.sampling_gap(after, e.asked(), role.model)
    print(f"\ngaps after a push {gaps[0]:.1e} {gaps[1]:.1e}")
    assert max(gaps) < BOUND
    assert {sample.version for sample in after} == {1}
    generator.load_weights(Weights(2, generator.role))
    assert e.plain(list(generator.generate(e.asked()))) == before


@pytest.mark.parametrize("change", [e.missing, e.reshaped, e.stops(9)])
def test_after_a_half_failed_push_nothing_is_generated_until_a_whole_one(generator: Any, change: Any) -> None:
    before = e.plain(list(generator.generate(e.asked())))
    generator.inlet.transport.chunk = 1 << 12
    with pytest.raises((ModelError, WorkerDied)):
        generator.load_weights(Weights(4, e.Handle(e.role("qwen3", 2), change)))
    with pytest.raises(WorkerDied, match="weights 4 failed half-way"):
        list(generator.generate(e.asked()))
    generator.load_weights(Weights(5, generator.role))
    assert e.plain(list(generator.generate(e.asked()))) == before


def test_files_outside_the_servers_folder_are_refused(generator: Any, server: Server, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(e.role("qwen3", 1).whole()), str(tmp_path / "evil.safetensors"))
    generator.start_weight_update()
    with pytest.raises(WorkerDied, match="/update_weights"):
        generator.update_weights({"file": str(tmp_path / "evil.safetensors")})
    generator.load_weights(Weights(0, generator.role))
    assert e.score_gap(generator, generator.role.model) < BOUND


def test_a_push_by_somebody_else_is_noticed(generator: Any, server: Server) -> None:
    late = ServerGenerator(server.url, e.END, e.text, timeout=60)
    with pytest.raises(WorkerDied, match="of an earlier run; push whole weights first"):
        list(late.generate(e.asked()))
    late.load_weights(Weights(8, e.role("qwen3", 1)))
    with pytest.raises(RunStopped, match="the server now has '8'"):
        list(generator.generate(e.asked()))
    generator.load_weights(Weights(9, generator.role))
    late.close()
    with pytest.raises(WorkerDied, match="closed"):
        late.logprobs([torch.tensor([2, 3])])


def test_it_sleeps_and_wakes(generator: Any) -> None:
    before = e.plain(list(generator.generate(e.asked())))
    generator.sleep()
    assert e.plain(list(generator.generate(e.asked()))) == before


def listening(server: Server) -> list[tuple[str, int]]:
    import psutil

    found = [one for pid in server.processes() for one in psutil.Process(pid).net_connections("inet")]
    return [(one.laddr.ip, one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN]


def test_the_routes_are_on_a_socket_in_a_private_folder_and_on_no_port(server: Server) -> None:
    path = Path(server.url.removeprefix("unix://"))
    assert stat.S_ISSOCK(path.lstat().st_mode)
    assert path.parent == server.folder
    assert server.folder.lstat().st_mode & 0o7777 == 0o700
    ports = listening(server)
    print(f"\nlistening on {ports}")
    assert all(ip.startswith("127.") or ip == "::1" for ip, _ in ports)
    for _, port in ports:
        with pytest.raises(WorkerDied):
            Http(f"http://127.0.0.1:{port}", 2.0).raw("GET", "/health")


def test_the_sockets_between_its_processes_are_in_the_same_folder(server: Server) -> None:
    import psutil

    found = [one for pid in server.processes() for one in psutil.Process(pid).net_connections("unix")]
    paths = {Path(one.laddr) for one in found if one.laddr and str(one.laddr).startswith("/")}
    print(f"\nsockets {sorted(map(str, paths))}")
    assert len(paths) > 1
    assert {path.parent for path in paths} == {server.folder}


def test_a_killed_engine_is_noticed_and_the_server_ends(generator: Any, server: Server) -> None:
    """The last one on this server."""
    running = descendants(server.process.pid)
    assert len(server.processes()) > 1
    start = time.monotonic()
    running[-1].kill()
    with pytest.raises(WorkerDied):
        list(generator.generate(e.asked()))
    with pytest.raises(WorkerDied):
        generator.load_weights(Weights(10, generator.role))
    print(f"\ndeath noticed in {time.monotonic() - start:.1f} s")
    assert time.monotonic() - start < 20
    server.close()
    server.close()
    assert not any(one.alive for one in running)
    assert not server.folder.exists()
    with pytest.raises(WorkerDied, match=r"no server responds|push whole weights first"):
        generator.logprobs([torch.tensor([2, 3])])


def test_on_a_port_every_route_needs_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    folder = tiny.folder(tmp_path / "qwen3", "qwen3", seed=0, **e.SHAPE)
    with Server(folder, port=0, **e.options()) as guarded:
        assert ("127.0.0.1", int(guarded.url.rpartition(":")[2])) in listening(guarded)
        generator = ServerGenerator(guarded.url, e.END, e.text, timeout=60, api_key=guarded.key)
        generator.load_weights(Weights(1, e.role("qwen3", 1)))
        assert e.score_gap(generator, e.role("qwen3", 1).model) < BOUND
        assert "need no key" not in capsys.readouterr().err
        paths = Http(guarded.url, 5.0, guarded.key).ask("GET", "/openapi.json")["paths"]
        routes = [(method.upper(), path) for path, methods in paths.items() for method in methods]
        routes += [("GET", path) for path in ("/metrics", "/docs", "/openapi.json", "/nothing")]
        print(f"\n{len(routes)} routes")
        assert {("POST", path) for path in ("/update_weights", "/collective_rpc", "/v1/completions")} <= set(routes)
        for method, path in [*routes, *(("OPTIONS", path) for path in paths)]:
            for key in ("", "wrong"):
                assert Http(guarded.url, 5.0, key).raw(method, path)[0] == 401, (method, path)
        for pid in guarded.processes():
            assert guarded.key not in " ".join(psutil.Process(pid).cmdline())
        assert guarded.key not in guarded.log.read_text()
        with pytest.raises(RecipeError, match=r"refused /v1/models \(401\).*set VLLM_API_KEY"):
            ServerGenerator(guarded.url, e.END, e.text, timeout=60)
        generator.close()


@pytest.mark.long
def test_the_verb_starts_one_and_ends_it_with_itself(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model", **e.SHAPE)
    command = [sys.executable, "-m", "whet", "serve", "--model", str(tmp_path / "model"), "--kv-cache-mib", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        url = run.stdout.readline().split()[0]
        generator = ServerGenerator(url, e.END, e.text)
        assert generator.max_model_len == 512
        assert len(list(generator.generate(e.asked()))) == 8
        started = descendants(run.pid)
        assert len(started) > 2
        run.terminate()
        assert run.wait(60) == 0
    assert not any(one.alive for one in started)


@pytest.mark.long
def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="ended while starting"):
        Server(tmp_path, **e.options())


def test_a_silent_server_is_a_dead_one() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(WorkerDied, match=r"no answer .* within 0.5 s"):
            ServerGenerator(f"http://127.0.0.1:{silent.getsockname()[1]}", e.END, e.text, timeout=0.5)
        assert time.monotonic() - start < 5


def test_a_server_without_the_weight_routes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    class Plain(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "model", "max_model_len": 64}]}')

        def do_POST(self) -> None:
            self.send_error(404)

        def log_message(self, *_given: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Plain) as plain:
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        with pytest.raises(RecipeError, match="VLLM_SERVER_DEV_MODE=1"):
            ServerGenerator(f"http://127.0.0.1:{plain.server_port}", e.END, e.text, timeout=5)
        plain.shutdown()
    assert "need no key: whoever reaches the port can replace the weights" in capsys.readouterr().err


def test_open_weight_routes_and_a_url_off_this_machine_are_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerDied):
        ServerGenerator("http://192.0.2.1:9", e.END, e.text, timeout=0.2)
    assert "http://192.0.2.1:9 is not on this machine: key, prompts and answers travel" in capsys.readouterr().err
    assert [Http(url, 1).local for url in ("http://localhost:1", "http://127.0.0.5:1", "http://[::1]:1")] == [True] * 3
    with pytest.raises(RecipeError, match="http://host:port"):
        Http("127.0.0.1:8000", 1)


def test_flags() -> None:
    given = {"max_model_len": 5, "enforce_eager": True, "enable_chunked_prefill": False, "x": {"a": 1}}
    assert flags(given) == [
        "--max-model-len", "5", "--enforce-eager", "--no-enable-chunked-prefill", "--x", '{"a": 1}',
    ]  # fmt: skip
