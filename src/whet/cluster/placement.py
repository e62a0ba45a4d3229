"""Placement of learners, engines and reward workers on machines, with fewer workers after machines were lost."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from whet.errors import RecipeError
from whet.terminal import caution

SOON = 5.0
"""Seconds to wait for the placement of each smaller set of workers, after the wait for the complete set."""
GLANCE = 1.0
"""Seconds to wait when checking whether more workers can be placed."""


@dataclass(frozen=True)
class Wanted:
    """The number of workers, and the resources of each.

    learners, engines, rewards  number of workers of each kind
    colocate    engine i is placed with learner i (modulo the learners) and shares its GPU
    cpus        CPUs of each worker
    gpus, engine_gpus, reward_gpus  GPUs of each learner, engine and reward worker; a worker with 0 sees no GPU
    min_learners    smallest number of learners to continue with if the others cannot be placed
    placement_timeout    seconds to wait for the placement of all workers
    strategy    "PACK" keeps workers on few machines, "SPREAD" on many
    """

    learners: int = 1
    engines: int = 0
    rewards: int = 0
    colocate: bool = False
    cpus: float = 1.0
    gpus: float = 0.0
    engine_gpus: float = 0.0
    reward_gpus: float = 0.0
    min_learners: int = 1
    placement_timeout: float = 60.0
    strategy: Literal["PACK", "SPREAD"] = "PACK"

    def bundles(self, learners: int) -> list[dict[str, float]]:
        """Resource bundles, each for one machine: first learners, then engines that are not colocated, then reward workers."""
        extra = self.guests(learners)
        first = _needs(self.cpus * (1 + extra), self.gpus)
        engines = [] if self.colocate else [_needs(self.cpus, self.engine_gpus)] * self.engines
        return [first] * learners + engines + [_needs(self.cpus, self.reward_gpus)] * self.rewards

    def guests(self, learners: int) -> int:
        """The largest number of engines that are placed with one learner."""
        return math.ceil(self.engines / learners) if self.colocate else 0

    def smaller(self) -> Iterator["Wanted"]:
        """Yield sets of workers to continue with after machines were lost, the largest first.

        The number of learners goes down to `min_learners`. For each, engines and reward workers are first all, then reduced
        in the same proportion as the learners, then one of each kind.
        """
        seen = {self}
        for learners in range(self.learners, min(self.min_learners, self.learners) - 1, -1):
            for part in (1.0, learners / self.learners, 0.0):
                engines, rewards = (max(min(1, n), math.ceil(n * part)) for n in (self.engines, self.rewards))
                one = replace(self, learners=learners, engines=engines, rewards=rewards)
                if one not in seen:
                    seen.add(one)
                    yield one

    def missing(self, whole: "Wanted") -> list[dict[str, float]]:
        """Bundles to add for a larger set: one more learner, or if no learner is missing all other workers of `whole`."""
        if self.learners < whole.learners:
            return self.bundles(self.learners + 1)[:1]
        engines = 0 if self.colocate else whole.engines - self.engines
        own = [_needs(self.cpus, self.engine_gpus)] * engines
        return own + [_needs(self.cpus, self.reward_gpus)] * (whole.rewards - self.rewards)

    @property
    def total_cpus(self) -> float:
        """CPUs of all workers together."""
        return sum(one.get("CPU", 0.0) for one in self.bundles(self.learners))


def _needs(cpus: float, gpus: float) -> dict[str, float]:
    return {name: value for name, value in (("CPU", cpus), ("GPU", gpus)) if value}


class Placement:
    """The reserved places of all workers in `wanted`, which may be fewer than in `whole`, and actor options for each place."""

    def __init__(self, wanted: Wanted, whole: Wanted, group: Any) -> None:
        self.wanted, self.whole, self.learners, self.group = wanted, whole, wanted.learners, group

    def learner(self, number: int) -> dict[str, Any]:
        """Actor options of learner `number`."""
        return self._options(number, self._share)

    def engine(self, number: int) -> dict[str, Any]:
        """Actor options of engine `number`."""
        if self.wanted.colocate:
            return self._options(number % self.learners, self._share)
        return self._options(self.learners + number, self.wanted.engine_gpus)

    def reward(self, number: int) -> dict[str, Any]:
        """Actor options of reward worker `number`."""
        before = 0 if self.wanted.colocate else self.wanted.engines
        return self._options(self.learners + before + number, self.wanted.reward_gpus)

    @property
    def _share(self) -> float:
        """The share of its GPU that a learner gets; colocated engines get an equal share each."""
        return self.wanted.gpus / (1 + self.wanted.guests(self.learners))

    def grows(self) -> bool:
        """Return True if there are fewer workers than in `whole` and more can be placed now."""
        missing = self.wanted.missing(self.whole)
        if not missing:
            return False
        group = _group(missing, self.wanted.strategy)
        found = bool(group.wait(GLANCE))
        _remove(group)
        return found

    def remove(self) -> None:
        """Release the places. Ray kills workers that still run there."""
        _remove(self.group)

    def _options(self, bundle: int, gpus: float) -> dict[str, Any]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {
            "num_cpus": self.wanted.cpus,
            "num_gpus": gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle),
        }


def place(wanted: Wanted, *, shrinks: bool = True) -> Placement:
    """Reserve places for all workers within `placement_timeout` seconds, or with `shrinks` for the largest set that fits.

    Raises RecipeError if no allowed set can be placed: Ray would wait forever for an impossible placement.
    """
    for one in (wanted, *(wanted.smaller() if shrinks else ())):
        group = _group(one.bundles(one.learners), one.strategy)
        if group.wait(wanted.placement_timeout if one is wanted else min(SOON, wanted.placement_timeout)):
            if one is not wanted:
                caution(f"cannot place {_asked(wanted)}; continuing with {_asked(one)}")
            return Placement(one, wanted, group)
        _remove(group)
    raise RecipeError(
        f"cluster: cannot place {_asked(wanted, shrinks)} within {wanted.placement_timeout:g} s; {_there()}"
    )


def _asked(wanted: Wanted, shrinks: bool = False) -> str:
    fewest = f" (at least {wanted.min_learners})" if shrinks and wanted.min_learners < wanted.learners else ""
    where = " with the learners" if wanted.colocate else ""
    each = f"{wanted.cpus:g} CPU" + (f" and {wanted.gpus:g} GPU" if wanted.gpus else "")
    return (
        f"{wanted.learners} learners{fewest}, {wanted.engines} engines{where} and {wanted.rewards} reward workers "
        f"with {each} each"
    )


def _there() -> str:
    """Describe the machines and free resources of the cluster, for an error message."""
    import ray

    free = ray.available_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    every = ", ".join(f"{one.get('CPU', 0):g} CPU and {one.get('GPU', 0):g} GPU" for one in nodes)
    return f"the cluster has {len(nodes)} machines ({every}), {free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU free"


def _group(bundles: Sequence[dict[str, float]], strategy: str) -> Any:
    from ray.util import placement_group

    return placement_group(list(bundles), strategy=strategy)


def _remove(group: Any) -> None:
    from ray.util import remove_placement_group

    remove_placement_group(group)
