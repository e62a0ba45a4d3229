"""The seams as Ray actors: the same contract and numbers, and runs that outlive their workers and machines."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from generate.contract import END, Contract, requests
from models import helpers as h

from engines import cluster_jobs as jobs
from engines.cluster_jobs import ENVIRONMENT, PPO, Machines, basics, close
from engines.comparing import gap
from whet.cluster import Attempt, Wanted, connected, folders, survive
from whet.cluster import ray as door
from whet.cluster.generator import ActorGenerator
from whet.cluster.learner import ClusterLearner, MoreLearners
from whet.cluster.placement import place
from whet.cluster.survive import death
from whet.data import Group, Prompt, Sample, Weights
from whet.data.files import shared_memory
from whet.distributed import Workers
from whet.errors import CheckpointError, ModelError, RecipeError, RestartsExhausted, RewardError, RunStopped, WorkerDied
from whet.generate.local import LocalGenerator
from whet.loops import checkpoint
from whet.processes import Process
from whet.rewards import score_all

HERE = Wanted(learners=1)
TOLERANCE = 1e-5

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


# --- without Ray ------------------------------------------------------------------------------------------------------


def test_without_ray_there_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whet.extras.installed", lambda name: False)
    with (
        pytest.raises(
            RecipeError, match=r'^cluster.address: a cluster needs the package ray, .*; pip install "ray>=[\d.]+"$'
        ),
        connected("auto"),
    ):
        pass


def test_the_room_is_imported_without_ray() -> None:
    code = "import sys, whet.cluster; print('ray' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_a_running_cluster_is_found_and_a_dead_one_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import socket

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert door.running() == ""
    (tmp_path / "ray").mkdir()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        assert door.running() == address
    assert door.running() == ""
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert door.running() == "head:6379"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert door.running() == ""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert door.running() == ""


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Ray's file with the address of a socket that listens, and a session's folder; the file and the address."""
    import socket

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray" / "session_1").mkdir(parents=True)
    (tmp_path / "ray" / "session_latest").symlink_to("session_1")
    file = tmp_path / "ray" / "ray_current_cluster"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        file.write_text(address)
        yield file, address


def test_auto_does_not_join_the_cluster_of_another_user(
    planted: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, address = planted
    assert door.running() == address
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    with pytest.raises(RecipeError) as refused:
        door.running()
    for part in ("cluster.address: auto", str(file), f"({real})", "--cluster HOST:PORT", "RAY_TMPDIR"):
        assert part in str(refused.value)
    file.write_text("127.0.0.1:1")  # nobody listens there: the file is left over, and nothing is joined
    assert door.running() == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
@pytest.mark.parametrize("name", ["ray_current_cluster", "session_latest", "session_1"])
def test_each_part_of_a_foreign_cluster_is_seen(planted: tuple[Path, str], name: str) -> None:
    file, address = planted
    assert door.running() == address
    os.chown(file.with_name(name), 12345, -1, follow_symlinks=False)
    with pytest.raises(RecipeError, match=rf"{name} belongs to user 12345"):
        door.running()


@pytest.mark.skipif(not Path("/proc/net/tcp").is_file(), reason="needs /proc")
def test_a_stranger_who_listens_at_the_address_of_an_ended_cluster_is_not_joined(
    planted: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, address = planted
    assert door._listeners(int(address.rpartition(":")[2])) == {os.geteuid()}
    monkeypatch.setattr(door, "_listeners", lambda port: {12345})
    with pytest.raises(RecipeError, match=rf"the process at {address} belongs to user 12345"):
        door.running()


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_ray_s_file_is_neither_followed_nor_waited_for(planted: tuple[Path, str], kind: str, tmp_path: Path) -> None:
    file, address = planted
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
        assert door.running() == ""
        return
    (tmp_path / "elsewhere").write_text(address)
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match=r"does not follow the link .*ray_current_cluster of .*--cluster HOST:PORT"):
        door.running()


STARTS_RAY = """
import os, stat, sys
from pathlib import Path
from whet.cluster import connected
try:
    with connected("auto"):
        import ray
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        private = session.parent.parent
        print(private, oct(private.lstat().st_mode & 0o7777), ray.get(ray.remote(lambda: os.getuid()).remote()), flush=True)
        if sys.argv[1] == "fails":
            raise ValueError
except ValueError:
    pass
print(private.exists())
"""


@needs_ray
@pytest.mark.parametrize("end", ["ends", "fails"])
def test_a_ray_that_is_started_here_keeps_its_files_to_itself(end: str) -> None:
    root = Path(tempfile.mkdtemp(prefix="w", dir="/tmp"))  # a path of a socket must be short
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "RAY_TMPDIR": str(root)
    }
    command = [sys.executable, "-c", f"import os; os.umask(0)\n{STARTS_RAY}", end]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    folder, mode, uid, left = run.stdout.split()
    assert Path(folder).parent == root
    assert (mode, uid) == ("0o700", str(os.getuid()))
    assert left == str(end == "fails")
    assert (f"the logs of Ray are in {folder}" in run.stderr) == (end == "fails")
    assert not (root / "ray").exists()  # no other run finds it
    shutil.rmtree(root)


def test_what_one_machine_must_hold() -> None:
    apart = Wanted(2, 3, 1, cpus=2, gpus=1, engine_gpus=4)
    assert apart.bundles(2) == [{"CPU": 2, "GPU": 1}] * 2 + [{"CPU": 2, "GPU": 4}] * 3 + [{"CPU": 2}]
    assert replace(apart, reward_gpus=1).bundles(1)[-1] == {"CPU": 2, "GPU": 1}
    assert apart.total_cpus == 12
    both = replace(apart, colocate=True)
    assert both.bundles(2) == [{"CPU": 6, "GPU": 1}] * 2 + [{"CPU": 2}]  # two engines sit with the first learner
    assert both.bundles(1) == [{"CPU": 8, "GPU": 1}, {"CPU": 2}]


def test_smaller_worlds_keep_at_least_one_of_each() -> None:
    wanted = Wanted(2, 4, 1, cpus=2)
    assert [(one.learners, one.engines, one.rewards) for one in wanted.smaller()] == [
        (2, 1, 1), (1, 4, 1), (1, 2, 1), (1, 1, 1)
    ]  # fmt: skip
    assert [(one.learners, one.engines) for one in replace(wanted, rewards=0, min_learners=2).smaller()] == [(2, 1)]
    assert [one.learners for one in Wanted(3, min_learners=2).smaller()] == [2]
    one = replace(wanted, learners=1, engines=2)
    assert one.missing(wanted) == [{"CPU": 2}]
    assert replace(one, learners=2).missing(wanted) == [{"CPU": 2}] * 2
    assert wanted.missing(wanted) == []


def test_a_death_is_found_behind_what_it_caused() -> None:
    died = WorkerDied("learner 1 died")
    torn = CheckpointError("could not be written")
    torn.__cause__ = died
    assert death(torn) is died
    assert death(CheckpointError("disk full")) is None
    assert death(None) is None


def test_a_process_is_not_taken_for_another_with_its_id() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        one = Process.of(child.pid)
        assert one.alive
        replace(one, began=1.0).kill()
        replace(one, host="elsewhere").kill()
        assert child.poll() is None
        one.kill()
    assert not one.alive


def test_a_shelf_keeps_two_pushes_and_is_swept_only_when_its_owner_is_gone(tmp_path: Path) -> None:
    shelf = folders.PushFolders("aaaa", "learner")
    paths = [shelf.put(number, iter([("w", torch.full((3,), float(number)))])) for number in range(4)]
    assert [path.is_dir() for path in paths] == [False, False, True, True]
    folders.sweep()
    assert shelf.folder.is_dir()
    second = folders.PushFolders("aaaa", "learner")
    assert second.folder != shelf.folder
    second.close()
    left = shelf.folder
    shelf._lock.close()  # as when its process dies
    folders.sweep()
    assert not left.exists()
    with pytest.raises(FileNotFoundError):
        shelf.put(4, iter([("w", torch.zeros(1))]))  # who lives on writes nowhere
    assert not left.exists()


# --- one Ray with two nodes ----------------------------------------------------------------------------------------------


def processes() -> set[int]:
    """Every process that descends from this one."""
    import psutil

    found = psutil.Process().children(recursive=True)
    return {
        one.pid for one in found if one.status() != psutil.STATUS_ZOMBIE and "multiprocessing" not in str(one.cmdline())
    }


def shelves() -> list[str]:
    return [path.name for path in shared_memory().glob(f"{folders.PREFIX}*")]


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    pytest.importorskip("ray")
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ |= ENVIRONMENT
    here = processes()
    made = Machines()
    with connected(made.cluster.address):
        yield made
    made.cluster.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    until = time.monotonic() + 10
    while (left := processes() - here) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left, "processes were left behind"
    assert shelves() == []


@pytest.fixture(autouse=True)
def _nothing_is_left_in_shared_memory() -> Iterator[None]:
    yield
    assert shelves() == []


def local() -> LocalGenerator:
    torch.set_num_threads(1)
    role = h.policy("qwen3", dtype=torch.float32, name="sampler")
    return LocalGenerator(role, END, lambda ids: " ".join(map(str, ids)), copy=True)


@pytest.fixture(scope="module")
def engine(machines: Machines) -> Iterator[ActorGenerator]:
    one = ActorGenerator(local, {"num_cpus": 0}, limit=60)
    one.role = h.policy("qwen3", dtype=torch.float32)  # type: ignore[attr-defined]  (what the contract adopts)
    yield one
    one.close()


@pytest.fixture
def generator(engine: ActorGenerator) -> ActorGenerator:
    """The same engine, back at its first weights."""
    if engine.version:
        engine.load_weights(Weights(0, engine.role))  # type: ignore[attr-defined]
    return engine


class TestContract(Contract):
    """It keeps the generators' contract."""


def test_an_engine_elsewhere_gives_what_one_here_gives(generator: ActorGenerator) -> None:
    assert list(generator.generate(requests())) == list(local().generate(requests()))
    ids = torch.tensor([2, 3, 4, 5])
    assert torch.equal(generator.logprobs([ids])[0], local().logprobs([ids])[0])


def test_a_push_that_cannot_be_read_is_refused_by_name(generator: ActorGenerator, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(RunStopped, match=r"the weight update of version 7 cannot be read .*SafetensorError"):
        generator.load_weights(Weights(7, tmp_path))
    with pytest.raises(ModelError, match=r"gone: no \*.safetensors files in it"):
        generator.load_weights(Weights(7, tmp_path / "gone"))
    assert generator.version == 0


def test_listeners_are_on_loopback_only(machines: Machines, engine: ActorGenerator) -> None:
    assert listening(processes() | {os.getpid()}) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def listening(pids: set[int]) -> set[str]:
    import psutil

    return {one.laddr.ip for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.pid in pids}


def test_an_impossible_placement_fails_in_time_and_says_what_there_is(machines: Machines) -> None:
    began = time.monotonic()
    with pytest.raises(RecipeError) as told:
        place(Wanted(3, 2, 1, cpus=2, min_learners=2, placement_timeout=1))
    assert time.monotonic() - began < 5
    words = str(told.value)
    assert "cannot place 3 learners (at least 2), 2 engines and 1 reward workers with 2 CPU each within 1 s" in words
    assert "the cluster has 2 machines" in words
    assert "4 CPU and 0 GPU" in words
    with pytest.raises(RecipeError, match="with 1 CPU and 1 GPU each"):
        place(Wanted(1, gpus=1, placement_timeout=0.5))


# --- the learner ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_learner_of_actors_has_the_numbers_of_one_process(machines: Machines, size: int, tmp_path: Path) -> None:
    expected = basics(jobs.learner(Workers()), tmp_path / "here")
    with Attempt(Wanted(size)) as world:
        own = world.learner(jobs.learner)
        got = basics(own, tmp_path / "there")
        folder = own.publish().handle.folder
        assert folder.is_dir()
        assert len([one for one in folder.parent.iterdir() if one.is_dir()]) == 2
        for file in (tmp_path / "there" / "saved").glob("policy*.safetensors"):
            file.unlink()
        with pytest.raises(CheckpointError, match="are not all there"):
            own.load(tmp_path / "there" / "saved")
        assert own.measure(jobs_batch(), frozenset({"old_logp"}))["old_logp"].shape  # it goes on
    worst = gap(got, expected)
    print(f"\n{size} workers: {worst}")
    assert worst[0] < (TOLERANCE if size == 2 else 1e-12)
    assert gap(got["third"], got["again"])[0] == 0.0


def jobs_batch() -> Any:
    from engines.jobs import batch

    return batch()


@pytest.fixture(scope="module")
def falling(machines: Machines) -> Iterator[Callable[[], ClusterLearner]]:
    """Learners of two workers that fail where they are told to; a new one only where the last one died."""
    world: Attempt | None = None
    own: ClusterLearner | None = None

    def alive() -> ClusterLearner:
        nonlocal world, own
        if own is None or own.remotes[0].dead:
            if world is not None:
                world.close()
            world = Attempt(Wanted(2, cpus=0.01), limit=30)
            own = world.learner(jobs.clumsy, push="weights")
        return own

    yield alive
    if world is not None:
        world.close()


@pytest.mark.parametrize("who", ["all", "0", "1"])
@pytest.mark.parametrize("kind", [RunStopped, CheckpointError, RewardError, RecipeError])
def test_what_workers_raise_comes_out_as_itself(falling: Any, kind: type[Exception], who: str) -> None:
    with pytest.raises(kind, match=r"^said by [01]$") as told:
        falling().blend(kind.__name__, who, 0.0)
    assert type(told.value) is kind
    falling().blend("nothing", "nobody", 0.0)  # the workers answered all, and go on


def test_what_a_users_code_raises_comes_out_as_itself(falling: Any) -> None:
    with pytest.raises(KeyError, match="what a user's code raises"):
        falling().blend("key", "1", 0.0)


def test_workers_that_drift_apart_are_told(falling: Any) -> None:
    with pytest.raises(RunStopped, match=r"different versions, \[0, 1\]"):
        falling().blend("drift", "1", 0.0)
    with pytest.raises(RunStopped, match=r"different versions, \[0, 2\]"):
        falling().blend("drift", "1", 0.0)
    falling().remotes[0].kill("is to be made anew")


@pytest.mark.parametrize("who", ["0", "1"])
def test_a_worker_that_dies_is_named_and_the_others_are_killed(falling: Any, who: str) -> None:
    own = falling()
    pids = [one.where.process for one in own.remotes]
    with pytest.raises(WorkerDied, match=f"learner {who} of 2 died"):
        own.blend("die", who, 0.0)
    with pytest.raises(WorkerDied, match="learner 0 of 2"):
        own.publish()
    until = time.monotonic() + 5
    while any(one.alive for one in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(one.alive for one in pids)


def test_a_worker_that_hangs_is_given_up(machines: Machines) -> None:
    with Attempt(Wanted(2), limit=3) as world:
        own = world.learner(jobs.clumsy)
        pids = [one.where.process for one in own.remotes]
        with pytest.raises(WorkerDied, match="learner 0 of 2, learner 1 of 2 did not answer within 3 s"):
            own.blend("stop", "1", 0.0)
    assert not any(one.alive for one in pids)  # the stopped one hears no request to end


def test_a_learner_that_cannot_be_built_says_why(machines: Machines) -> None:
    with Attempt(HERE) as world, pytest.raises(ModelError, match=r"^no such folder, says worker 0$"):
        world.learner(jobs.critic_role)


# --- rewards -----------------------------------------------------------------------------------------------------------


def of_texts(*texts: str) -> list[Group]:
    """One group of one answer of two tokens for each text."""
    user, groups = {"role": "user", "content": "q"}, []
    for number, text in enumerate(texts):
        sample = Sample(number, 0, (4, 5), (-1.0,) * 2, 0, "stop", text)
        groups.append(Group(Prompt(str(number), (3,), (user,), {"prompt": "q"}), (sample,)))
    return groups


def test_rewards_of_workers_do_not_apply_run_in_their_processes_and_end_with_them(
    machines: Machines, tmp_path: Path
) -> None:
    """The first worker has no score at all, the second has dense ones; a call that is late or exits is an error of the function."""
    (tmp_path / "mine.py").write_text(jobs.LIMITED)
    with Attempt(Wanted(learners=1, engines=0, rewards=2)) as world:
        rewards = world.rewards(partial(jobs.limited, f"{tmp_path}/mine.py"))
        named, token, step, applies = score_all(rewards, of_texts("none", "none", "x", "a"))
        assert {name: one.tolist() for name, one in applies.items()} == {
            "slow": [False, False, True, True], "some": [True, True, False, True]}  # fmt: skip
        assert named["slow"][:2].tolist() == token[:2].sum(1).tolist() == [0.0, 0.0]
        assert step.tolist() == [[False, True], [False, True], [True, True], [True, True]]
        processes = {int(one) for name in named for one in (named[name] / (2 if name == "slow" else 1)).tolist() if one}
        workers = {one.where.process.pid for one in world.remotes()}
        own = processes - workers
        assert len(own) == 1  # that of the second worker; the functions without a limit are in the workers
        for text, message in (
            ("stuck", "reward slow took more than 3 s for 1 answer"),
            ("exit", "reward some raised SystemExit: 3"),
        ):
            with pytest.raises(RewardError, match=message):
                score_all(rewards, of_texts("a", text))
        with pytest.raises(RewardError, match="no reward applies to answer 0 of the prompt row 1"):
            score_all([rewards[0]], of_texts("a", "none"))
        named = score_all(rewards, of_texts("a", "a"))[0]
        own = {Process.of(int(one / 2)) for one in named["slow"].tolist()}
        assert all(one.alive for one in own)
        for one in world.remotes():  # without a chance to end anything
            os.kill(one.where.process.pid, signal.SIGKILL)
        until = time.monotonic() + 10
        while any(one.alive for one in own) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(one.alive for one in own)


# --- whole runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run in one process."""
    return PPO(tmp_path_factory.mktemp("alone")).alone()


def killer(kills: dict[int, list[str]], told: list[str]) -> Callable[[int, Attempt], None]:
    """Kills workers of these kinds, at once or a moment later, before these rollouts; each kill happens once."""

    def before(step: int, world: Attempt) -> None:
        for kind in kills.pop(step, []):
            groups = {
                "learner": world._learner.remotes if world._learner else [],
                "engine": [one.remote for one in world._engines[-world.wanted.engines :]],
                "reward": world._pool.remotes if world._pool else [],
            }
            victim: Any = groups[kind][-1]
            told.append(victim.name)
            threading.Timer(0.02, os.kill, (victim.where.process.pid, signal.SIGKILL)).start()

    return before


def test_a_run_over_the_cluster_outlives_its_workers_to_the_bit(
    machines: Machines, alone: dict[str, Any], tmp_path: Path
) -> None:
    """Two learners, two engines on two nodes, a reward worker: the unkilled run first, which is the one-process run."""
    wanted, told = Wanted(2, 2, 1), list[str]()
    whole = PPO(tmp_path / "whole").survive(wanted)
    close(whole, alone, TOLERANCE)
    kills = {1: ["engine", "reward"], 2: ["learner"]}
    killed = PPO(tmp_path / "killed", before=killer(kills, told)).survive(wanted, restarts=3)
    assert [name.split()[0] for name in told] == ["engine", "reward", "learner"]
    assert gap(killed, whole)[0] == 0.0


def test_a_run_that_keeps_dying_ends_with_the_last_cause(machines: Machines, tmp_path: Path) -> None:
    tried = []

    def attempt(world: Attempt, resume: bool) -> None:
        tried.append(resume)
        raise WorkerDied(f"death number {len(tried)}")

    with pytest.raises(
        RestartsExhausted, match=r"workers died 3 times and may be started again 2 times; .*death number 3"
    ):
        survive(attempt, HERE, restarts=2, quiet=True)
    assert tried == [False, True, True]

    def failing(world: Attempt, resume: bool) -> None:
        raise RunStopped("a NaN")

    with pytest.raises(RunStopped, match="a NaN"):
        survive(failing, HERE, restarts=2, quiet=True)


@pytest.mark.long
def test_a_lost_machine_makes_the_world_smaller_and_a_new_one_larger(
    machines: Machines, alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sat there is asked for in vain first: an engine or a reward worker without a place is no reason to wait on."""
    monkeypatch.setattr("whet.cluster.worker.START", 15.0)
    sizes: list[int] = []

    def before(step: int, world: Attempt) -> None:
        sizes.append(world.learners)
        if step == 1 and machines.other is not None and sizes == [2, 2]:
            machines.lose()
        if world.learners == 1 and machines.other is None:
            machines.grow()

    wanted = Wanted(
        2, 2, 1, cpus=0.9, min_learners=1, placement_timeout=4, strategy="SPREAD"
    )  # the head has places for three
    got = PPO(tmp_path, before=before).survive(wanted, restarts=8)
    assert sizes[:2] == [2, 2]
    assert 1 in sizes
    assert sizes[-1] == 2
    close(got, alone, TOLERANCE)


class Pushing:
    """A generator between which and the learner a push goes wrong, the second one of the run."""

    def __init__(self, own: Any, wrong: str) -> None:
        self.own, self.wrong, self.pushes = own, wrong, list[Weights]()

    def load_weights(self, weights: Weights) -> None:
        self.pushes.append(weights)
        if len(self.pushes) == 2:
            before = self.pushes[0]
            if self.wrong == "dropped":
                return
            if self.wrong == "delayed":
                weights = before
            if self.wrong == "reordered":
                weights = Weights(weights.version, before.handle)
            if self.wrong in ("torn", "changed"):
                (file,) = weights.handle.folder.glob("*.safetensors")
                content = bytearray(file.read_bytes())
                content[len(content) // 2 :] = b"" if self.wrong == "torn" else bytes(len(content) - len(content) // 2)
                file.unlink()  # what is mapped already stays as it is
                file.write_bytes(content)
        self.own.load_weights(weights)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def test_a_push_that_goes_wrong_stops_the_run_by_name(machines: Machines, tmp_path: Path) -> None:
    words = {
        "dropped": "the generator has weights of version", "delayed": "the generator has weights of version",
        "reordered": "the generator scores the canary", "torn": "cannot be read",
        "changed": "the generator scores the canary",
    }  # fmt: skip
    with Attempt(Wanted(1, 1)) as world:
        own = world.learner(partial(jobs.learner, engine="local"))
        source = world.generator([jobs.generator])
        for wrong, word in words.items():
            before = own.version
            with pytest.raises(RunStopped, match=word):
                PPO(tmp_path / wrong, equal_start=False).train(own, Pushing(source, wrong), jobs.rewards(), False)
            assert own.version == before + 1  # not a single update more


def test_an_orphan_that_lives_on_touches_nothing(machines: Machines, tmp_path: Path) -> None:
    """It is lost while it saves, and writes when the next attempt has long committed: aside, and to its own old shelf."""
    kept = tmp_path / "checkpoints"
    kept.mkdir()
    with Attempt(HERE) as world:
        own = world.learner(jobs.late)
        old = own.publish().handle.folder.parent
        with pytest.raises((CheckpointError, WorkerDied), match="learner 0 of 1 died"):
            checkpoint.save(kept, 1, own, {"step": 1})
    orphan = Process.of(int((kept / "orphan").read_text()))
    assert orphan.alive
    assert not old.exists()

    with Attempt(HERE) as world:
        own = world.learner(partial(jobs.learner, engine="local"))
        final = checkpoint.save(kept, 1, own, {"step": 1})
        fresh = own.publish().handle.folder.parent
        before = contents_of(final) | contents_of(fresh)
        (kept / "go").touch()
        wait_for(kept / "woke")
        assert (kept / "woke").read_text() == "FileNotFoundError; FileNotFoundError"  # what it knew of is gone
        assert contents_of(final) | contents_of(fresh) == before
        assert checkpoint.latest(kept) == final
        assert not old.exists()
        assert not list(kept.glob(f"{checkpoint.ASIDE}*"))
    orphan.kill()


def wait_for(path: Path, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_growing_back_is_no_death() -> None:
    assert issubclass(MoreLearners, WorkerDied)  # so that it passes through whatever lets a death pass
