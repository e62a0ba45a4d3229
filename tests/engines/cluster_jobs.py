"""What a cluster's workers build in the tests, and one small PPO run of the loop over it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loops import helpers as lh
from models import helpers as h

from engines.jobs import OPTIM, kind_of
from whet.cluster import Wanted, World, survive
from whet.dials import Sampling
from whet.generate import Generator
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.loops import online
from whet.records import Weights
from whet.rewards import Weighted
from whet.workers import Workers

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


@dataclass(frozen=True)
class PPO:
    """A run of `steps` rollouts in `folder`; `before(step, world)` is called before each of them."""

    folder: Path
    steps: int = STEPS
    save_every: int = 1
    before: Callable[[int, World], None] | None = None
    engine: str = "fsdp"
    wrap: Callable[[Any], Any] | None = None
    seconds: float = 0.0

    def attempt(self, world: World, resume: bool) -> dict[str, Any]:
        """As `whet.cluster.survive` calls it; returns what the run ends with."""
        answers = None if world.wanted.engines else inside
        own = world.learner(partial(learner, engine=self.engine), answers=answers)
        source: Any = world.generator([generator])
        if self.wrap is not None:
            source = self.wrap(source)
        scores = world.rewards(rewards)
        return self.train(own, source, scores, resume, world)

    def train(self, own: Any, source: Any, scores: Any, resume: bool, world: Any = None) -> dict[str, Any]:
        method = lh.method_of("ppo", answers=ANSWERS)
        plan = online.Plan(
            steps=self.steps, prompts=3, minibatch=3 * ANSWERS, canary=20, end_ids=lh.END, equal_start=True,
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
        return self.train(learner(Workers()), self.wrap(generator()) if self.wrap else generator(), rewards(), False)

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

    def adopt(self, weights: Weights) -> None:
        self.own.adopt(weights)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def ended(folder: Path) -> dict[str, Any]:
    """What a run left: its tokens, its numbers but for the seconds, and the policy's weights."""
    from safetensors.torch import load_file
    from whet.loops.record import read_metrics

    metrics = [{k: v for k, v in line.items() if "seconds" not in k} for line in read_metrics(folder)]
    rollouts = [[answer["completion_ids"] for answer in lh.rollout(folder, step + 1)] for step in range(len(metrics))]
    return {"ids": rollouts, "metrics": metrics, "weights": load_file(folder / "model" / "model.safetensors")}
