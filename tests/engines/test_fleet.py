"""Several engines as one generator: the contract, the deal, and engines that die."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from generate.contract import END, Contract, plain, requests
from models import helpers as h
from torch import Tensor

from whet.data import Sample, Weights
from whet.distributed import RestartBudget
from whet.errors import AttemptFailed, ModelError, RestartsExhausted, RunStopped, WorkerDied
from whet.generate import Request
from whet.generate.fleet import Fleet, deal
from whet.generate.local import LocalGenerator
from whet.methods.options import Sampling

ONE = threading.Lock()
"""Random weights are drawn one model after the other: engines are made at the same time, and torch's seed is everyone's."""


def local() -> LocalGenerator:
    with ONE:
        role = h.policy("gpt2", dtype=torch.float32, name="sampler")
    return LocalGenerator(role, END, lambda ids: " ".join(map(str, ids)), copy=True)


class Mortal:
    """An engine that dies where it is told to: `deaths` has the calls ("generate", "adopt", "score", "rest") that kill it."""

    reports = frozenset({"sampler_logp"})
    made: list["Mortal"] = []  # noqa: RUF012

    def __init__(self, deaths: list[str]) -> None:
        self.deaths, self.own, self.adopted, self.closed, self.asked = deaths, local(), [], False, []
        self.made.append(self)

    @property
    def version(self) -> int:
        return self.own.version

    def _maybe(self, call: str) -> None:
        if call in self.deaths:
            self.deaths.remove(call)
            raise WorkerDied(f"killed in {call}")

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        self.asked += requests
        samples = list(self.own.generate(requests))
        self._maybe("generate")
        yield from samples

    def load_weights(self, weights: Weights) -> None:
        self._maybe("adopt")
        self.adopted.append(weights.version)
        self.own.load_weights(weights)

    def logprobs(self, ids: Sequence[Tensor]) -> list[Tensor]:
        self._maybe("score")
        return self.own.logprobs(ids)

    def sleep(self) -> None:
        self._maybe("rest")

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _nobody() -> None:
    Mortal.made.clear()


@pytest.fixture(params=[1, 2, 3])
def generator(request: pytest.FixtureRequest) -> Iterator[Any]:
    fleet = Fleet([local] * request.param, RestartBudget(0))
    fleet.role = h.policy("gpt2", dtype=torch.float32)  # type: ignore[attr-defined]  (what the contract adopts)
    yield fleet
    fleet.close()


class TestContract(Contract):
    """It keeps the generators' contract."""


def policy(seed: int) -> Any:
    return h.policy("gpt2", dtype=torch.float32, seed=seed)


def expected(seed: int | None = None) -> list[tuple]:
    one = local()
    if seed is not None:
        one.load_weights(Weights(1, policy(seed)))
    return plain(list(one.generate(requests())))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_samples_do_not_depend_on_the_number_of_engines(count: int) -> None:
    assert plain(list(Fleet([local] * count, RestartBudget(0)).generate(requests()))) == expected()


def test_all_requests_of_one_draw_go_to_one_engine_and_the_load_is_even() -> None:
    asked = [
        Request(h.prompt(draw, range(2, 3 + length)), draw, answer, Sampling(5), 0)
        for draw, length in enumerate((9, 2, 8, 3, 7, 4))
        for answer in range(4)
    ]
    shares = deal(asked, 2)
    assert sorted(place for share in shares for place in share) == list(range(len(asked)))
    draws = [{asked[place].draw for place in share} for share in shares]
    assert not draws[0] & draws[1]
    # 20 tokens to come for each draw, and the prompt once
    load = [sum(len(asked[4 * draw].prompt.ids) + 20 for draw in own) for own in draws]
    assert max(load) - min(load) <= 1


def test_an_answer_that_was_begun_costs_what_it_may_still_become() -> None:
    one = Request(h.prompt(0, range(2, 6)), 0, 0, Sampling(10), 0)
    begun = [replace(one, draw=draw, begun=(3,) * 8) for draw in (1, 2)]
    # 4 to read and 10 to make, twice 12 to read and 2 to make: the three cost the same
    assert deal([one, *begun], 3) == [[0], [1], [2]]
    paused = replace(one, draw=3, most=1)  # 4 to read and 1 to make: it goes where the least is, and last
    assert deal([paused, one, *begun], 3) == [[0, 1], [2], [3]]


def test_engines_work_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=10)

    class Meeting(LocalGenerator):
        def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
            both.wait()
            return super().generate(requests)

    def make() -> Any:
        own = local()
        return Meeting(own.role, own.end_ids, own.text)

    assert plain(list(Fleet([make] * 2, RestartBudget(0)).generate(requests()))) == expected()


@pytest.mark.parametrize("call", ["generate", "score", "rest", "adopt"])
@pytest.mark.parametrize("who", [0, 1])
def test_an_engine_that_dies_is_made_again_with_the_weights_of_now(call: str, who: int) -> None:
    deaths: list[list[str]] = [[], []]
    fleet = Fleet([lambda: Mortal(deaths[0]), lambda: Mortal(deaths[1])], RestartBudget(1))
    fleet.load_weights(Weights(1, policy(5)))
    deaths[who].append(call)
    if call == "adopt":
        fleet.load_weights(Weights(2, policy(6)))
    elif call == "score":
        assert torch.equal(fleet.logprobs([torch.tensor([2, 3, 4])])[0], reference_score(5))
    elif call == "rest":
        fleet.sleep()
    version, seed = (2, 6) if call == "adopt" else (1, 5)
    got = list(fleet.generate(requests()))
    assert plain(got) == expected(seed)
    assert {sample.version for sample in got} == {version} == {lane.version for lane in fleet.lanes}
    assert fleet.version == version
    assert len(Mortal.made) == 3
    assert [one.closed for one in Mortal.made].count(True) == 1
    assert Mortal.made[-1].adopted == [version]  # what it is about to adopt is not adopted twice


def reference_score(seed: int) -> Tensor:
    one = local()
    one.load_weights(Weights(1, policy(seed)))
    return one.logprobs([torch.tensor([2, 3, 4])])[0]


def test_its_requests_are_asked_again_and_the_others_are_not() -> None:
    deaths: list[list[str]] = [["generate"], []]
    fleet = Fleet([lambda: Mortal(deaths[0]), lambda: Mortal(deaths[1])], RestartBudget(1))
    first, second = Mortal.made if Mortal.made[0].deaths is deaths[0] else Mortal.made[::-1]
    list(fleet.generate(requests()))
    assert Mortal.made[2].asked == first.asked
    assert len(first.asked) + len(second.asked) == len(requests())


def test_a_live_role_is_read_at_its_weights_of_now_by_an_engine_made_again() -> None:
    deaths: list[str] = []
    role = policy(5)
    fleet = Fleet([lambda: Mortal(deaths)], RestartBudget(1))
    fleet.load_weights(Weights(1, role))
    deaths.append("generate")
    assert plain(list(fleet.generate(requests()))) == expected(5)


def test_one_death_too_many_ends_the_fleet_and_says_so() -> None:
    fleet = Fleet([lambda: Mortal(["generate"])] * 2, RestartBudget(1))
    with pytest.raises(WorkerDied, match=r"died [23] times and may be started again 1 times; the last one: killed"):
        list(fleet.generate(requests()))


def test_an_engine_that_cannot_start_ends_the_fleet_and_the_others_are_closed() -> None:
    def never() -> Any:
        raise WorkerDied("no memory")

    with pytest.raises(WorkerDied, match="no memory"):
        Fleet([lambda: Mortal([]), never], RestartBudget(2))
    assert [one.closed for one in Mortal.made] == [True]


def test_a_later_engine_that_cannot_start_is_tried_again_after_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("whet.generate.fleet.time.sleep", pauses.append)
    starts = iter(["starts", "GPU is full", "GPU is full", "starts"])
    deaths: list[str] = []

    def make() -> Any:
        if (said := next(starts)) != "starts":
            raise ModelError(said)
        return Mortal(deaths)

    fleet = Fleet([make], RestartBudget(3))
    fleet.load_weights(Weights(1, policy(5)))
    deaths.append("generate")
    assert plain(list(fleet.generate(requests()))) == expected(5)
    assert (fleet.budget.deaths, pauses) == (3, [0.0, 0.0, 0.5, 1.0])

    with pytest.raises(ModelError, match="GPU is full"):
        Fleet([lambda: (_ for _ in ()).throw(ModelError("GPU is full"))], RestartBudget(3))


def test_where_another_engine_would_not_help_none_is_made() -> None:
    class Alone(Mortal):
        def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
            raise AttemptFailed("its machine is gone")

    fleet = Fleet([lambda: Alone([])], RestartBudget(3))
    with pytest.raises(AttemptFailed):
        list(fleet.generate(requests()))
    assert (len(Mortal.made), fleet.budget.deaths) == (1, 0)


def test_what_is_no_death_is_raised_as_itself_and_costs_no_restart() -> None:
    class Wrong(Mortal):
        def load_weights(self, weights: Weights) -> None:
            raise RunStopped("another model")

    fleet = Fleet([lambda: Mortal([]), lambda: Wrong([])], RestartBudget(0))
    with pytest.raises(RunStopped, match="another model"):
        fleet.load_weights(Weights(1, policy(1)))
    assert len(Mortal.made) == 2


class Deaf(Mortal):
    """Takes no push."""

    def load_weights(self, weights: Weights) -> None:
        pass


class Stale(Mortal):
    """Says the new version and keeps the old weights."""

    def load_weights(self, weights: Weights) -> None:
        self.own.version = weights.version


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_engine_without_the_push_is_what_the_fleet_tells(place: int) -> None:
    def makes(kind: type) -> list[Any]:
        return [(lambda: kind([])) if one == place else (lambda: Mortal([])) for one in range(3)]

    fleet = Fleet(makes(Deaf), RestartBudget(0))
    fleet.load_weights(Weights(1, policy(5)))
    assert fleet.version == 0
    fleet = Fleet(makes(Stale), RestartBudget(0))
    fleet.load_weights(Weights(1, policy(5)))
    fresh = reference_score(5)
    told = [torch.equal(one[0], fresh) for one in fleet.all_logprobs([torch.tensor([2, 3, 4])])]
    assert told == [number != place for number in range(3)]


def test_lanes_are_generators_that_restart_themselves() -> None:
    deaths: list[list[str]] = [[], []]
    fleet = Fleet([lambda: Mortal(deaths[0]), lambda: Mortal(deaths[1])], RestartBudget(2))
    for lane in fleet.lanes:
        lane.load_weights(Weights(1, policy(5)))
    deaths[0].append("generate")
    deaths[1].append("adopt")
    assert plain(list(fleet.lanes[0].generate(requests()))) == expected(5)
    fleet.lanes[1].load_weights(Weights(2, policy(6)))
    assert plain(list(fleet.lanes[1].generate(requests()))) == expected(6)
    assert [lane.version for lane in fleet.lanes] == [1, 2]
    assert fleet.budget.deaths == 2


def test_closing_ends_every_engine_and_may_be_repeated() -> None:
    fleet = Fleet([lambda: Mortal([])] * 3, RestartBudget(0))
    fleet.close()
    fleet.close()
    assert [one.closed for one in Mortal.made] == [True] * 3


def test_an_engine_that_never_answers_is_given_up_before_the_budget_is_spent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unfit(Mortal):
        def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
            raise WorkerDied("unsupported attention")

    monkeypatch.setattr("whet.generate.fleet.time.sleep", lambda seconds: None)
    fleet = Fleet([lambda: Unfit([])], RestartBudget(100))
    with pytest.raises(
        RestartsExhausted, match="died 5 times and never answered; the last time: unsupported attention"
    ):
        list(fleet.generate(requests()))
    assert "whet: unsupported attention; starting again, 1 of 100" in capsys.readouterr().err
