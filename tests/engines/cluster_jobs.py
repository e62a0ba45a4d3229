"""What a cluster's workers build in the tests, and one small PPO run of the loop over it."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from loops import helpers as lh
from models import helpers as h

from engines.comparing import gap
from engines.jobs import OPTIM, kind_of
from whet.cluster import Attempt, Wanted, survive
from whet.data import Weights
from whet.distributed import Workers
from whet.generate import Generator
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.loops import online
from whet.methods.options import Sampling
from whet.rewards import Weighted

TESTS = Path(__file__).parent.parent
ENVIRONMENT = {
    # a lost node is declared dead in 1.4 s instead of 14
    "RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_timeout_ms": "1000", "RAY_health_check_initial_delay_ms": "500",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), str(TESTS.parent / "src")]),
}  # fmt: skip
ANSWERS = 2
STEPS = 4


def learner(workers: Workers, engine: str = "fsdp") -> LocalLearner:
    """A tiny PPO cast on this engine; alone it is the plain learner."""
    torch.set_num_threads(1)
    roles = lh.separate()
    kind = kind_of("local" if workers.size == 1 else engine)
    optims = {name: replace(OPTIM, lr=0.02) for name, role in roles.items() if role.trained}
    return kind(roles, optims, total=50, budget=64, workers=workers)


def generator(seed: int = 0) -> LocalGenerator:
    """A generator with a copy of its own."""
    torch.set_num_threads(1)
    return LocalGenerator(h.policy(dtype=torch.float32, name="sampler", seed=seed), lh.END, str, copy=True)


def inside(own: LocalLearner) -> Generator:
    """A learner's worker answers, by a copy: the learner's weights may be in shards."""
    from whet.generate.shared import SharedGenerator

    return SharedGenerator(generator(), own.workers, 4) if own.workers.size > 1 else generator()


def rewards() -> list[Weighted]:
    return [Weighted("table", h.TableReward(lambda ids: 0.5 * len(ids) - 0.25 * (sum(ids) % 5)))]


def limited(file: str) -> list[Weighted]:
    """Two rewards of a file of a user, the first in a process of its own; see `LIMITED`."""
    from whet.runs.rewards import made

    return [
        Weighted("slow", made(f"{file}:slow", {"timeout": 3}, "reward.0")),
        Weighted("some", made(f"{file}:some", {}, "reward.1")),
    ]


LIMITED = """
import os, sys, time

def slow(prompts, completions, completion_ids, **columns):
    if "stuck" in completions:
        time.sleep(600)
    return [None if text == "none" else [float(os.getpid())] * len(ids) for text, ids in zip(completions, completion_ids)]

def some(prompts, completions, **columns):
    if "exit" in completions:
        sys.exit(3)
    return [None if text == "x" else float(os.getpid()) for text in completions]
"""


@dataclass(frozen=True)
class PPO:
    """A run of `steps` rollouts in `folder`; `before(step, world)` is called before each of them."""

    folder: Path
    steps: int = STEPS
    save_every: int = 1
    before: Callable[[int, Attempt], None] | None = None
    engine: str = "fsdp"
    equal_start: bool = True
    seconds: float = 0.0

    def attempt(self, world: Attempt, resume: bool) -> dict[str, Any]:
        """As `whet.cluster.survive` calls it; returns what the run ends with."""
        answers = None if world.wanted.engines else inside
        own = world.learner(partial(learner, engine=self.engine), answers=answers)
        source = world.generator([generator])
        scores = world.rewards(rewards)
        return self.train(own, source, scores, resume, world)

    def train(self, own: Any, source: Any, scores: Any, resume: bool, world: Any = None) -> dict[str, Any]:
        method = lh.method_of("ppo", num_generations=ANSWERS)
        plan = online.OnlinePlan(
            steps=self.steps, prompts=3, mini_batch_size=3 * ANSWERS, canary=20, end_ids=lh.END, equal_start=self.equal_start,
            save_every=self.save_every, keep=2,
        )  # fmt: skip
        run = lh.opened(self.folder, resume)
        watched = Watched(source, lambda step: self._step(step, world))
        online.train(
            method, own, watched, scores, lh.PROMPTS, Sampling(6), plan, run, resume=resume, quiet=True
        )  # fmt: skip
        own.export("policy", self.folder / "model")
        return ended(self.folder)

    def _step(self, number: int, world: Any) -> None:
        time.sleep(self.seconds)
        if self.before is not None:
            self.before(number, world)

    def alone(self) -> dict[str, Any]:
        """The same in this process, without any cluster."""
        return self.train(learner(Workers()), generator(), rewards(), False)

    def survive(self, wanted: Wanted, **given: Any) -> dict[str, Any]:
        return survive(self.attempt, wanted, **({"quiet": True} | given))


class Watched:
    """A generator that says how often it was asked for a rollout."""

    def __init__(self, own: Any, told: Callable[[int], None]) -> None:
        self.own, self.told, self.asked = own, told, 0

    def generate(self, requests: Any) -> Any:
        self.told(self.asked)
        self.asked += 1
        return self.own.generate(requests)

    def load_weights(self, weights: Weights) -> None:
        self.own.load_weights(weights)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def ended(folder: Path) -> dict[str, Any]:
    """What a run left: its tokens, its numbers but for the seconds, and the policy's weights."""
    from safetensors.torch import load_file

    from whet.loops.record import read_metrics

    metrics = [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(folder)]
    rollouts = [[answer["completion_ids"] for answer in lh.rollout(folder, step + 1)] for step in range(len(metrics))]
    return {"ids": rollouts, "metrics": metrics, "weights": load_file(folder / "model" / "model.safetensors")}


def close(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """The same tokens; numbers and weights within the tolerance of their scale."""
    worst, where = gap(got, expected)
    assert worst <= tolerance, f"{where}: {worst:.2g}"


class Machines:
    """A Ray of two nodes on this machine: the head with 3 CPUs, where the driver is, and another with 4."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 3, "object_store_memory": 100 << 20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.other: Any = None
        # a node dies with the thread that started it: this one stays
        self._keeper = ThreadPoolExecutor(1)
        self.grow()

    def grow(self) -> None:
        self.other = self._keeper.submit(self._added).result()

    def _added(self) -> Any:
        # Ray would set a signal's handler for the new node, which only the main thread may do
        with mock.patch("ray._private.utils.set_sigterm_handler"):
            return self.cluster.add_node(num_cpus=4, object_store_memory=100 << 20)

    def lose(self) -> None:
        """The raylet is killed, and nobody tells its workers."""
        node, self.other = self.other, None
        self.cluster.remove_node(node, allow_graceful=False)


# --- the learner's contract, by its protocol alone ----------------------------------------------------------------------


def basics(own: Any, folder: Path) -> dict[str, Any]:
    """Everything a learner can do, in numbers. Only what the protocol has is used."""
    from safetensors.torch import load_file

    from engines.jobs import COLUMNS, batch, told, work
    from whet.generate.base import whole
    from whet.methods import online as method

    terms = list(method("ppo").terms)
    given = batch()

    def once() -> list[Any]:
        seen = own.measure(given, COLUMNS)
        advantage = torch.linspace(-1, 1, seen["mask"].numel()).reshape(seen["mask"].shape)
        seen = seen.with_columns(advantage=advantage, returns=seen["old_value"] + 1 + advantage)
        measured = {name: seen[name] for name in sorted(COLUMNS)}
        return [measured, told(own.evaluate(work(seen, terms))), told(own.update(work(seen, terms)))]

    out: dict[str, Any] = {"first": once()}
    out["columns"] = dict(own.columns("critic", given, frozenset({"token_score"})))
    own.blend("reference", "policy", 0.25)
    out["second"] = once()
    (folder / "saved").mkdir(parents=True)
    own.save(folder / "saved")
    third = once()
    own.load(folder / "saved")
    out["third"], out["again"] = third, once()
    out["version"] = own.version
    own.rescale("critic", 0.5, 0.25)
    out["rescaled"] = dict(own.columns("critic", given, frozenset({"token_score"})))
    for number in range(3):
        weights = own.publish()
        published = {name: value.clone() for name, value in whole(weights)}
        assert weights.version == own.version, number
    out["published"] = published
    own.export("policy", folder / "model")
    out["exported"] = load_file(folder / "model" / "model.safetensors")
    return out


def critic_role(workers: Workers) -> LocalLearner:
    """A learner that cannot be built."""
    from whet.errors import ModelError

    raise ModelError(f"no such folder, says worker {workers.rank}")


class Clumsy:
    """A learner that fails where it is told to, in one worker or in all."""

    low_precision = False

    def __init__(self, workers: Workers) -> None:
        self.workers, self.version = workers, 0

    def measure(self, batch: Any, columns: Any) -> Any:
        return batch

    def blend(self, target: str, source: str, mix: float) -> None:
        """`target` says what happens, `source` in which worker ("all", or its rank)."""
        import signal

        from whet import errors

        if source not in ("all", str(self.workers.rank)):
            if target in ("die", "stop"):
                self.workers.barrier()
            return
        if target == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if target == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if target == "drift":
            self.version += 1
        elif target == "key":
            raise KeyError("what a user's code raises")
        else:
            raise getattr(errors, target)(f"said by {self.workers.rank}")


def clumsy(workers: Workers) -> Any:
    return Clumsy(workers)


class Late(LocalLearner):
    """Its process is lost to everyone while it saves, and lives on: it writes when a file appears, which may be much later.

    (Ray's workers die with their node's raylet here; on a machine that is only cut off from the others they do not.)
    """

    def save(self, folder: Path) -> None:
        import signal

        if os.fork():
            os.kill(os.getpid(), signal.SIGKILL)
        os.setsid()
        os.closerange(3, 4096)  # nobody hears of it any more
        kept = folder.parent.parent
        (kept / "orphan").write_text(str(os.getpid()))
        while not (kept / "go").exists():
            time.sleep(0.05)
        said = [_tried(lambda: super(Late, self).save(folder)), _tried(self._push)]
        (kept / "woke").write_text("; ".join(said))
        os._exit(0)

    def _push(self) -> None:
        import gc

        from whet.cluster.folders import PushFolders

        (shelf,) = (one for one in gc.get_objects() if isinstance(one, PushFolders))
        shelf.put(2, self.roles["policy"].whole())


def _tried(work: Callable[[], None]) -> str:
    try:
        work()
    except OSError as error:
        return type(error).__name__
    return "written"


def late(workers: Workers) -> LocalLearner:
    return Late({"policy": h.policy(dtype=torch.float32)}, {"policy": OPTIM}, total=5, workers=workers)
