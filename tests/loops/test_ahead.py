"""Answers ahead of the learner: at staleness 0 the synchronous run; beyond it nothing is too old, lost, doubled or mislabeled."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import helpers as h

from loops.clock import VirtualClock
from loops.helpers import END, PROMPTS, TINY, Light, cast, learner_of, method_of, opened, rollout, share
from whet import planning as planned
from whet.data import Sample
from whet.errors import RunStopped, WorkerDied
from whet.generate import Request
from whet.generate.fleet import Fleet
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.loops import online
from whet.loops.ahead import Threads
from whet.loops.record import read_metrics
from whet.methods import Algorithm
from whet.methods.options import Optim, Sampling
from whet.rewards import Weighted


class Lanes(Fleet):
    """Several local generators with copies of their own."""

    def __init__(self, count: int, end_ids: Sequence[int] = END) -> None:
        self.lanes: list = [
            LocalGenerator(h.policy(dtype=torch.float32, name="sampler"), end_ids, str, copy=True) for _ in range(count)
        ]


def run(
    folder: Path,
    method: Algorithm,
    *,
    driver: Any = None,
    lanes: Any = None,
    learner: Any = None,
    resume: bool = False,
    length: int = 6,
    **options: Any,
) -> Any:
    own = learner or learner_of(cast(method), lr=0.02)
    whole = 4 * method.collect.num_generations
    given = {
        "steps": 4,
        "prompts": 4,
        "mini_batch_size": whole,
        "canary": 20,
        "end_ids": END,
        "slots": 64,
        "segment": 1,
    }
    table = h.TableReward(lambda ids: 0.5 * len(ids) - 0.25 * (sum(ids) % 5))
    online.train(
        method, own, lanes or Lanes(1), [Weighted("table", table)], PROMPTS, Sampling(length),
        online.OnlinePlan(**(given | options)), opened(folder, resume), driver=driver, resume=resume, quiet=True,
    )  # fmt: skip
    return own


def clock(**given: float) -> VirtualClock:
    return VirtualClock(**({"token_seconds": 1.0, "learn_seconds": 3.0, "push_seconds": 0.5} | given))


def rows(folder: Path, steps: int) -> list[list[dict[str, Any]]]:
    return [rollout(folder, step) for step in range(1, steps + 1)]


@pytest.mark.parametrize("name", ["ppo", "grpo", "dapo", "online_dpo"])
def test_staleness_0_is_the_synchronous_run(name: str, tmp_path: Path) -> None:
    method = method_of(name)
    now = run(tmp_path / "now", method, lanes=LocalGenerator(h.policy(dtype=torch.float32), END, str, copy=True))
    ahead = run(tmp_path / "ahead", method, driver=clock(), lanes=Lanes(2))
    for one, other in zip(rows(tmp_path / "now", 4), rows(tmp_path / "ahead", 4), strict=True):
        assert [(r["draw"], r["completion_ids"]) for r in one] == [(r["draw"], r["completion_ids"]) for r in other]
        assert [r["token_version"] for r in one] == [r["token_version"] for r in other]
    for key, value in h.weights(now)["policy"].items():
        torch.testing.assert_close(h.weights(ahead)["policy"][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_each_group_is_trained_once_and_none_is_too_old(staleness: int, tmp_path: Path) -> None:
    run(tmp_path, method_of("ppo"), driver=clock(), lanes=Lanes(2), steps=9, max_staleness=staleness, slots=3)
    numbers, seen = read_metrics(tmp_path), []
    for step, answers in enumerate(rows(tmp_path, 9)):
        draws = [answer["draw"] for answer in answers]
        assert draws == sorted(set(draws))
        seen += draws
        # one update a rollout: the version of a token is the step whose weights made it
        ages = [step - version for answer in answers for version in answer["token_version"]]
        assert min(ages) >= 0
        assert max(ages) <= staleness
        assert numbers[step]["staleness_max"] == max(ages)
        assert numbers[step]["staleness"] == pytest.approx(sum(ages) / len(ages))
    assert sorted(seen) == list(range(36))
    assert max(row["staleness_max"] for row in numbers) >= 1


def test_each_token_says_which_weights_made_it_and_with_which_log_prob(tmp_path: Path) -> None:
    """The log-probs of tokens of version v are those of the learner's weights after v updates."""
    own = learner_of(cast(method_of("ppo")), lr=0.05)
    start = h.weights(own)["policy"]
    run(tmp_path, method_of("ppo"), driver=clock(learn_seconds=2.0), learner=own, steps=6, max_staleness=2, length=10)
    weights = [start, *(one["policy"] for one in own.trail)]
    mixed = 0
    role = h.policy(dtype=torch.float32)
    for answers in rows(tmp_path, 6):
        for answer in answers:
            versions = answer["token_version"]
            assert versions == sorted(versions)
            mixed += len(set(versions)) > 1
            ids = torch.tensor(answer["prompt_ids"] + answer["completion_ids"])
            for version in set(versions):
                h.with_weights({"policy": role}, {"policy": weights[version]})
                logp = h.full_logits(role.model, ids).log_softmax(-1)
                for place, (one, said) in enumerate(zip(versions, answer["sampler_logp"], strict=True)):
                    if one == version:
                        at = len(answer["prompt_ids"]) + place
                        assert float(logp[at - 1, ids[at]]) == pytest.approx(said, abs=2e-5)
    assert mixed > 3  # answers that went on under new weights


def test_a_straggler_does_not_hold_a_step(tmp_path: Path) -> None:
    """The first prompt's answer takes 40 tokens, the others' 2: with staleness 2 step 0 goes on without it."""

    class Slow(LocalGenerator):
        def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
            for request, sample in zip(requests, super().generate(requests), strict=True):
                long = 40 if request.draw == 0 else 2
                done = len(request.begun) + 1 >= long
                ids = (END[0],) if done else (12,)
                yield replace(sample, ids=ids, finish="stop" if done else "paused")

    def lane() -> Any:
        out = Lanes(1)
        out.lanes = [Slow(h.policy(dtype=torch.float32, name="sampler"), END, str, copy=True)]
        return out

    given = {"lanes": lane(), "length": 50, "steps": 3, "low_precision": True}
    waits, goes = clock(), clock()
    method = method_of("reinforce", importance_correction="token_weight")
    run(tmp_path / "waits", method, driver=waits, **given)
    run(tmp_path / "goes", method, driver=goes, **(given | {"lanes": lane()}), max_staleness=2)
    assert waits.collected[0] == 40.0
    # step 1 has three groups left, and gets its fourth 2 tokens after the lane is free for it at 6.5
    assert goes.collected[:2] == [2.0, 8.5]
    assert [0 in [a["draw"] for a in answers] for answers in rows(tmp_path / "goes", 3)] == [False, False, True]


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_resumed_run_loses_no_group_and_doubles_none(staleness: int, tmp_path: Path) -> None:
    method, options = method_of("ppo"), {"max_staleness": staleness, "steps": 8, "save_every": 1, "slots": 3}
    run(tmp_path / "whole", method, driver=clock(), lanes=Lanes(2), **options)

    class Broken(h.TableReward):
        def score(self, groups: Any) -> Any:
            if groups[0].samples[0].draw >= 12:
                raise KeyboardInterrupt
            return super().score(groups)

    table = Broken(lambda ids: 0.5 * len(ids) - 0.25 * (sum(ids) % 5))
    with pytest.raises(KeyboardInterrupt):
        online.train(
            method, learner_of(cast(method), lr=0.02), Lanes(2), [Weighted("table", table)], PROMPTS, Sampling(6),
            online.OnlinePlan(prompts=4, mini_batch_size=4, canary=20, end_ids=END, segment=1, **options), opened(tmp_path / "cut", False),
            driver=clock(), quiet=True,
        )  # fmt: skip
    saved = sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))[-1]
    state = json.loads((saved / "loop.json").read_text())
    assert state["buffer"]  # answers in flight are part of the checkpoint
    assert state["drawn"] > 4 * state["step"]
    run(tmp_path / "cut", method, driver=clock(), lanes=Lanes(2), resume=True, **options)
    seen = [answer["draw"] for answers in rows(tmp_path / "cut", 8) for answer in answers]
    assert sorted(seen) == list(range(32))
    for step, answers in enumerate(rows(tmp_path / "cut", 8)):
        assert all(0 <= step - version <= staleness for answer in answers for version in answer["token_version"])


def test_answers_of_weights_that_are_too_old_stop_the_run(tmp_path: Path) -> None:
    class Old(LocalGenerator):
        def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
            for sample in super().generate(requests):
                yield replace(sample, version=max(0, sample.version - 2))

    lanes = Lanes(1)
    lanes.lanes = [Old(h.policy(dtype=torch.float32, name="sampler"), END, str, copy=True)]
    with pytest.raises(RunStopped, match=r"step 3: an answer has tokens of weights that are \d steps old \(bound 1\)"):
        run(tmp_path, method_of("ppo"), driver=clock(), lanes=lanes, max_staleness=1)


# --- threads ---------------------------------------------------------------------------------------------------------


def test_threads_keep_the_bound_and_lose_nothing(tmp_path: Path) -> None:
    run(tmp_path, method_of("ppo"), driver=Threads(), lanes=Lanes(2), steps=6, max_staleness=2, segment=2)
    seen = []
    for step, answers in enumerate(rows(tmp_path, 6)):
        seen += [answer["draw"] for answer in answers]
        assert all(0 <= step - version <= 2 for answer in answers for version in answer["token_version"])
    assert sorted(seen) == list(range(24))


def test_what_a_lane_raises_ends_the_run(tmp_path: Path) -> None:
    class Dying(LocalGenerator):
        def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
            if self.version:
                raise WorkerDied("the engine is gone")
            yield from super().generate(requests)

    lanes = Lanes(1)
    lanes.lanes = [Dying(h.policy(dtype=torch.float32, name="sampler"), END, str, copy=True)]
    with pytest.raises(WorkerDied, match="the engine is gone"):
        run(tmp_path, method_of("ppo"), lanes=lanes, max_staleness=1)


# --- time and learning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize(("lanes", "slots", "learn"), [(1, 8, 9.0), (2, 3, 9.0), (2, 2, 60.0)])
def test_time_on_the_clock_is_what_the_simulator_says(
    staleness: int, lanes: int, slots: int, learn: float, tmp_path: Path
) -> None:
    driver, steps = clock(learn_seconds=learn), 8
    run(
        tmp_path, method_of("ppo"), driver=driver, lanes=Lanes(lanes, (1,)), steps=steps, slots=slots, end_ids=(1,),
        max_staleness=staleness, length=60,
    )  # fmt: skip
    lengths = {a["draw"]: len(a["completion_ids"]) for answers in rows(tmp_path, steps) for a in answers}
    said = planned.simulate(
        steps=steps, prompts=4, num_generations=1, length=lambda draw, answer: lengths[draw], engines=lanes, slots=slots,
        token_seconds=1.0, learn_seconds=learn, push_seconds=0.5, max_staleness=staleness,
    )  # fmt: skip
    assert driver.time == pytest.approx(said.seconds, rel=0.05)
    assert driver.collected == pytest.approx([one.collected for one in said.steps], rel=0.05)


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], list[float]]:
    """The reward of 24 rollouts, by (staleness, seed)."""
    out = {}
    for staleness in (0, 1, 2):
        for seed in (0, 1, 2):
            out[staleness, seed] = curve(tmp_path_factory.mktemp(f"curve-{staleness}-{seed}"), staleness, seed)
    return out


def curve(folder: Path, staleness: int, seed: int) -> list[float]:
    method = method_of("rloo", longest=4, num_generations=4, importance_correction="token_weight")
    roles = {"policy": h.policy(seed=seed, **TINY), "reference": h.policy(seed=seed, name="reference", **TINY)}
    learner = LocalLearner(
        {name: role for name, role in roles.items() if name in method.roles()},
        {"policy": Optim(lr=0.02, schedule="constant")}, total=100, budget=512,
    )  # fmt: skip
    lanes = Lanes(0)
    lanes.lanes = [LocalGenerator(h.policy(seed=seed, name="sampler", **TINY), (1,), str, copy=True)]
    prompts = [h.prompt(i, (2 + i, 4 + i)) for i in range(4)]
    plan = online.OnlinePlan(
        steps=24,
        prompts=8,
        mini_batch_size=32,
        seed=seed,
        end_ids=(1,),
        canary=20,
        max_staleness=staleness,
        segment=1,
        slots=16,
    )
    online.train(
        method, learner, lanes, [Weighted("share", h.TableReward(share))], prompts, Sampling(4), plan, Light(folder),
        driver=clock(), quiet=True,
    )  # fmt: skip
    shutil.rmtree(folder / "checkpoints")
    return [row["score"] for row in read_metrics(folder)]


def test_learning_curves_overlap_up_to_staleness_2(curves: dict[tuple[int, int], list[float]]) -> None:
    """The mean over seeds of the last third lies within the seeds' spread of the synchronous run, and all learn."""

    def ends(staleness: int) -> list[float]:
        return [sum(curves[staleness, seed][-8:]) / 8 for seed in (0, 1, 2)]

    first = [sum(curves[0, seed][:3]) / 3 for seed in (0, 1, 2)]
    base = ends(0)
    assert sum(base) / 3 > sum(first) / 3 + 0.2
    spread = max(max(base) - min(base), 0.05)
    for staleness in (1, 2):
        assert abs(sum(ends(staleness)) / 3 - sum(base) / 3) < spread, (staleness, ends(staleness), base)
