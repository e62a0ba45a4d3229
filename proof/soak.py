"""Survival at length: a small PPO run over a cluster under random kills ends as the unkilled one does.

`python -m proof.soak --kills 20 --seed 0` starts a Ray of two nodes on this machine, and needs the extra `ray` and the tests'
helpers. Victims are drawn at random (a learner, an engine, a reward worker, a node), and so are the moments.
"""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from engines.cluster_jobs import ENVIRONMENT, PPO, Machines, close
from engines.jobs import gap

from whet.cluster import Attempt, Wanted, connected

VICTIMS = ("learner", "engine", "reward", "node")
WANTED = Wanted(2, 2, 1, placement_timeout=30)
SMALLER = 1e-5
"""How far the end may be off where the run went on smaller for a while; else it is the same to the bit."""


class Hunter:
    """Kills random victims at random moments, from a thread of its own, `kills` of them, and writes down whom."""

    def __init__(self, machines: Machines, kills: int, seed: int, longest: float) -> None:
        self.machines, self.kills, self.longest = machines, kills, longest
        self.random = random.Random(seed)
        self.told: list[str] = []
        self.sizes: list[int] = []
        self.world: Attempt | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._hunt, daemon=True)

    def before(self, _step: int, world: Attempt) -> None:
        """Called by the run before each rollout: which world it has."""
        self.world = world
        self.sizes.append(world.learners)
        if self._thread.ident is None and not self._over.is_set():
            self._thread.start()

    def stop(self) -> None:
        """No more kills."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _hunt(self) -> None:
        while len(self.told) < self.kills and not self._over.wait(self.random.uniform(0.0, self.longest)):
            kind = self.random.choice(VICTIMS)
            if kind == "node":
                self.told.append("node")
                self.machines.lose()
                self._over.wait(self.random.uniform(0.0, 5.0))
                self.machines.grow()
            else:
                self._kill(kind)

    def _kill(self, kind: str) -> None:
        world = self.world
        assert world is not None
        remotes = [one for one in world.remotes() if one.name.startswith(kind) and not one.dead]
        if remotes:
            victim = self.random.choice(remotes)
            with suppress(ProcessLookupError):
                os.kill(victim.where.process.pid, signal.SIGKILL)
                self.told.append(victim.name)


def soak(kills: int, seed: int, *, steps: int = 6, at_once: int = 3, longest: float = 12.0) -> list[dict[str, Any]]:
    """One line per run: who was killed, the sizes of its worlds, how far its end is off the unkilled run's."""
    os.environ |= ENVIRONMENT
    machines = Machines()
    lines: list[dict[str, Any]] = []
    with connected(machines.cluster.address), TemporaryDirectory() as folder:
        expected = PPO(Path(folder) / "whole", steps).survive(WANTED)
        while sum(len(line["killed"]) for line in lines) < kills:
            began, number = time.monotonic(), len(lines)
            left = kills - sum(len(line["killed"]) for line in lines)
            hunter = Hunter(machines, min(at_once, left), seed * 1000 + number, longest)
            run = PPO(Path(folder) / str(number), steps, before=hunter.before, seconds=1.0)
            got = run.survive(WANTED, restarts=20)
            hunter.stop()
            smaller = min(hunter.sizes) < WANTED.learners
            close(got, expected, SMALLER if smaller else 0.0)
            line = {"killed": hunter.told, "smallest": min(hunter.sizes), "off": gap(got, expected)[0]}
            lines.append(line | {"seconds": round(time.monotonic() - began, 1)})
            print(json.dumps(lines[-1]), flush=True)
    machines.cluster.shutdown()
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = soak(given.kills, given.seed)
    print(f"{sum(len(line['killed']) for line in found)} kills in {len(found)} runs, all ended as the unkilled one")
