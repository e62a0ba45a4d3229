"""The schedule against closed forms, against hand-drawn clocks, and against a plain count of ticks that shares no code with it."""

from collections.abc import Callable
from typing import Any

import pytest

from whet.errors import RecipeError
from whet.planning import Engines, Outcome, Schedule, Window, drawn_from, lognormal, simulate
from whet.planning.schedule import Ended, Handed, chosen


def run(**changes: Any) -> Outcome:
    given: dict[str, Any] = {
        "steps": 5, "prompts": 4, "num_generations": 3, "length": lambda draw, answer: 10, "engines": 1, "slots": 12,
        "token_seconds": 0.5, "learn_seconds": 3.0, "push_seconds": 1.0, "max_staleness": 0, "ends": False,
    }  # fmt: skip
    return simulate(**(given | changes))


@pytest.mark.parametrize(("slots", "waves"), [(12, 1), (11, 2), (6, 2), (5, 3), (1, 12)])
def test_in_turns_with_equal_lengths(slots: int, waves: int) -> None:
    """Each step: ceil(12 / slots) waves of 10 tokens, then learning, then the push."""
    out = run(slots=slots)
    assert out.seconds == 5 * (waves * 5.0 + 3.0 + 1.0)
    assert out.learner_busy == 15 / out.seconds
    assert out.engines_busy == 5 * waves * 5 / out.seconds
    assert out.slots_used == pytest.approx(5 * 12 * 5.0 / (slots * out.seconds))
    assert out.staleness == {0: 20}
    assert [one.draws for one in out.steps] == [tuple(range(4 * n, 4 * n + 4)) for n in range(5)]


@pytest.mark.parametrize(("learn", "slots"), [(3.0, 12), (5.0, 12), (7.0, 12), (3.0, 4), (20.0, 4)])
@pytest.mark.parametrize("staleness", [2, 3])
def test_ahead_the_slower_of_both_sets_the_pace(learn: float, slots: int, staleness: int) -> None:
    """A step then takes max(generation, learning) + push: engines stand still during a push, and so does the learner."""
    generate = 12 / slots * 5.0
    out = run(steps=30, learn_seconds=learn, slots=slots, max_staleness=staleness)
    steady = (out.steps[29].ended - out.steps[9].ended) / 20
    assert steady == pytest.approx(max(generate, learn) + 1.0)


def test_nothing_is_quicker_than_its_parts() -> None:
    for staleness in range(4):
        out = run(steps=20, length=lognormal(20, 0.8, 80), engines=2, slots=3, max_staleness=staleness)
        tokens = sum(one.tokens for one in out.steps)
        assert out.seconds >= max(20 * 4.0, tokens * 0.5 / 6)
        assert 0 < out.slots_used <= out.engines_busy <= 1
        assert out.learner_busy == pytest.approx(60 / out.seconds)


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_each_group_once_and_none_too_old(staleness: int) -> None:
    window = Window(4, staleness)
    schedule = Schedule(Engines(3, 2, 0.25), window, num_generations=3, length=lognormal(9, 1.0, 60, seed=7))
    handed: dict[int, int] = {}
    taken: dict[int, int] = {}
    for step in range(12):
        before = window.handed
        draws = schedule.collect()
        assert window.handed == (step + 1 + [0, 1, 1, 2][staleness]) * 4
        handed |= dict.fromkeys(range(before, window.handed), step)
        assert len(draws) == 4
        assert not taken.keys() & set(draws)
        taken |= dict.fromkeys(draws, step)
        assert all(draw in taken for draw, out in handed.items() if out <= step - staleness)  # waited for
        schedule.learn(1.0)
        schedule.push(0.5)
    assert taken.keys() | window.open.keys() == set(range(window.handed))
    assert all(step - handed[draw] <= staleness for draw, step in taken.items())
    out = schedule.outcome()
    assert max(out.staleness) <= staleness
    assert sum(out.staleness.values()) == 48


def ticks(
    lengths: Callable[[int, int], int],
    *,
    steps: int,
    prompts: int,
    num_generations: int,
    engines: int,
    slots: int,
    learn: int,
    push: int,
    eta: int,
    ends: bool,
) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """(collected, learned, ended, draws) of every step, by counting ticks of one token each."""  # fmt: skip
    queues: list[list[list[int]]] = [[] for _ in range(engines)]  # [draw, answer, tokens left], the first ones decode
    complete: dict[int, int] = {}
    handed_at: dict[int, int] = {}
    left: dict[int, int] = {}
    clock, out = 0, []

    def tick() -> None:
        nonlocal clock
        clock += 1
        for queue in queues:
            for one in queue[:slots]:
                one[2] -= 1
            for one in [one for one in queue if not one[2]]:
                queue.remove(one)
                left[one[0]] -= 1
                if not left[one[0]]:
                    complete[one[0]] = clock

    for step in range(steps):
        for draw in range(len(handed_at), (min(step + 1 + eta, steps) if ends else step + 1 + eta) * prompts):
            handed_at[draw], left[draw] = step, num_generations
            shortest = min(queues, key=len)
            shortest.extend([draw, answer, lengths(draw, answer)] for answer in range(num_generations))
        while True:
            due = {draw for draw, at in handed_at.items() if at <= step - eta} - {d for one in out for d in one[3]}
            first = sorted((when, draw) for draw, when in complete.items() if draw not in due)
            if due <= complete.keys() and len(due) + len(first) >= prompts:
                break
            tick()
        draws = tuple(sorted([*due, *(draw for _, draw in first[: prompts - len(due)])]))
        for draw in draws:
            del complete[draw]
        collected = clock
        for _ in range(learn):
            tick()
        learned = clock
        clock += push
        out.append((collected, learned, clock, draws))
    return out


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize(("engines", "slots"), [(1, 1), (1, 7), (2, 3), (3, 2)])
def test_the_clock_is_that_of_counted_ticks(eta: int, engines: int, slots: int, ends: bool) -> None:
    lengths = lognormal(6, 0.9, 40, seed=engines)
    told = ticks(
        lengths,
        steps=8,
        prompts=3,
        num_generations=2,
        engines=engines,
        slots=slots,
        learn=9,
        push=2,
        eta=eta,
        ends=ends,
    )
    out = run(
        steps=8, prompts=3, num_generations=2, length=lengths, engines=engines, slots=slots, token_seconds=1.0, learn_seconds=9.0,
        push_seconds=2.0, max_staleness=eta, ends=ends,
    )  # fmt: skip
    assert [(one.collected, one.learned, one.ended, one.draws) for one in out.steps] == told


def test_no_answer_is_lost_to_rounding() -> None:
    """A learner that ends within a rounding error of an answer's end, thousands of times."""
    for seconds in (0.1, 1 / 3, 0.0123):
        out = run(
            steps=400, prompts=2, num_generations=2, length=lambda draw, answer: 1 + draw % 3, engines=2, slots=2,
            token_seconds=lambda active, seconds=seconds: seconds * active, learn_seconds=3 * seconds,
            push_seconds=seconds / 7, max_staleness=1,
        )  # fmt: skip
        assert sorted(draw for one in out.steps for draw in one.draws) == list(range(800))
        assert sum(one.tokens for one in out.steps) == 2 * sum(1 + draw % 3 for draw in range(800))


def test_a_run_begins_nothing_that_no_step_would_take() -> None:
    window = Window(2, 3, steps=5)
    assert [len(window.hand_out(step)) for step in range(5)] == [6, 2, 2, 0, 0]


def test_a_slow_group_is_passed_over_until_no_later_step_could_take_it() -> None:
    """One group a step, at most 2 steps old: group 0 ends late, group 1 early."""
    slow, quick, third = Handed(0, begun=0), Handed(1, begun=0, ended=1.0), Handed(2, begun=1, ended=2.0)
    assert chosen([slow, quick], 0, 1, 2, 1) == [quick]
    assert chosen([slow, third], 1, 1, 2, 1) == [third]
    assert chosen([slow, Handed(3, begun=2, ended=3.0)], 2, 1, 2, 1) is None  # now it is waited for
    assert chosen([slow, Handed(3, begun=2, ended=3.0)], 1, 1, 2, 1) is not None


def test_groups_that_are_due_together_are_not_all_put_off() -> None:
    """Two groups a step, due in step 1: step 0 has to take at least two of the four, though a later one was quicker."""
    due = [Handed(draw, begun=0, ended=float(9 - draw)) for draw in range(4)]
    later = Handed(9, begun=1, ended=0.5)
    assert [one.draw for one in chosen([*due, later], 0, 2, 1, 2) or []] == [2, 3]


def test_slow_groups_of_the_first_hand_out_come_later() -> None:
    """Four groups of one answer, 9, 1, 2 and 8 tokens: step 0 takes those complete first, step 1 waits for the rest."""
    lengths = [9, 1, 2, 8, 1, 1]
    out = run(
        steps=2, prompts=2, num_generations=1, length=lambda draw, answer: lengths[draw], slots=9, token_seconds=1.0,
        learn_seconds=1.0, push_seconds=0.5, max_staleness=1,
    )  # fmt: skip
    assert [one.draws for one in out.steps] == [(1, 2), (0, 3)]
    assert [one.staleness for one in out.steps] == [(0, 0), (1, 1)]
    # 2 to collect, 1 to learn, 0.5 of pause, and 6 of the 9 tokens are left
    assert [one.collected for one in out.steps] == [2.0, 9.5]


def test_more_active_slots_may_be_slower() -> None:
    """n active slots take n seconds a token: both decode one by 2, then the longer one alone by 3."""
    engines = Engines(1, 2, lambda active: float(active))
    engines.submit(0, [1, 2])
    assert engines.run(10.0) == [Ended(2.0, 0, 0, 0), Ended(3.0, 0, 1, 0)]
    assert engines.used() == (5.0, 3.0)


def test_a_push_in_the_middle_of_an_answer() -> None:
    engines = Engines(1, 1, 1.0)
    engines.submit(0, [4, 2])
    assert engines.run(3.0) == []
    engines.push(10.0)
    assert engines.run(16.0) == [Ended(14.0, 0, 0, 0), Ended(16.0, 0, 1, 0)]
    assert engines.began == {(0, 0): 0, (0, 1): 1}  # the first token's version: the second answer waited


def test_groups_go_where_the_fewest_answers_are_outstanding() -> None:
    engines = Engines(3, 2, 1.0)
    assert [engines.submit(draw, [length] * 2) for draw, length in enumerate([5, 1, 9, 9])] == [0, 1, 2, 0]
    engines.run(1.0)
    assert engines.submit(4, [1]) == 1
    assert engines.submit(5, [1, 1]) == 1
    assert engines.submit(6, [1]) == 2


def test_the_learner_may_take_longer_for_more_tokens() -> None:
    out = run(steps=2, learn_seconds=lambda tokens: tokens / 10)
    assert out.steps[0].tokens == 120
    assert out.seconds == 2 * (5 + 12 + 1)


def test_lengths_are_addressed() -> None:
    length = lognormal(100, 0.6, 1000, seed=3)
    drawn = [length(draw, answer) for draw in range(400) for answer in range(5)]
    assert drawn == [length(draw, answer) for draw in range(400) for answer in range(5)]
    assert sorted(drawn)[1000] == pytest.approx(100, rel=0.05)
    assert sum(drawn) / 2000 == pytest.approx(100 * 1.1972, rel=0.05)  # exp(0.6^2 / 2)
    assert max(lognormal(100, 3.0, 200)(draw, 0) for draw in range(50)) == 200
    from_list = drawn_from([3, 5], seed=1)
    assert {from_list(draw, 0) for draw in range(30)} == {3, 5}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"steps": 0}, "rollout.num_steps: at least 1; got 0"),
        ({"prompts": 0}, "rollout.prompts_per_step: at least 1; got 0"),
        ({"num_generations": 0}, "num_generations: at least 1; got 0"),
        ({"engines": 0}, "engines: at least 1; got 0"),
        ({"slots": 0}, "slots: at least 1; got 0"),
        ({"token_seconds": 0.0}, "token_seconds: above 0; got 0.0"),
        ({"max_staleness": -1}, "max_staleness: at least 0; got -1"),
        ({"length": lambda draw, answer: 0}, "lengths: an answer has at least 1 token; got 0"),
    ],
)
def test_what_cannot_run_is_told(changes: dict, what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        run(**changes)


def test_a_window_knows_what_is_out() -> None:
    window = Window(2)
    window.hand_out(0)
    window.complete(0, 1.0)
    for draw in (0, 2):
        with pytest.raises(ValueError, match=f"draw {draw} is not pending"):
            window.complete(draw, 2.0)
    with pytest.raises(ValueError, match="the engines are idle"):
        Engines(1, 1, 1.0).run(float("inf"))
