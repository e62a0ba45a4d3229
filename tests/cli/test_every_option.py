"""No option is accepted and ignored: every slot, choice and option of a method counts, or is refused."""

import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec
import pytest

from whet.errors import RecipeError
from whet.methods import catalogue, compose
from whet.methods.choices import (
    NARROWER,
    ONLINE_SLOTS,
    OPTIONAL,
    OPTIONS,
    PLAIN_SLOTS,
    PREFERENCE_SLOTS,
    REWARD_SLOTS,
    Choice,
    changed,
)
from whet.methods.compose import choice_options
from whet.runs import config
from whet.runs.slots import checked

ONLINE = {**catalogue.ONLINE, **catalogue.ONLINE_PREFERENCE}
METHODS = [*ONLINE, *catalogue.PREFERENCE, *(f"reward {name}" for name in catalogue.REWARD)]
TRIED = (0.123, 48, 3, 1.7, True, False, "tv", "kl", *"mean max drop half".split(), None)  # noqa: SIM905
"""Values, the first legal one of which is another than an option's own."""

NEEDS: dict[str, dict[str, Any]] = {
    "kl_in_reward.target": {"kl_in_reward": {"controller": "adaptive", "target": 6.0}},
    "kl_in_reward.horizon": {"kl_in_reward": {"controller": "adaptive", "target": 6.0}},
    "entropy.increment": {"entropy": {"target": 1.0}},
    "entropy.max_coef": {"entropy": {"target": 1.0}},
    "truncated.amount": {"truncated": {"rule": "penalize"}},
    "implicit_reward.alpha": {"implicit_reward": {"divergence": "alpha"}},
    "dynamic_sampling": {"num_generations": 2},
}
"""Options that mean something only beside another: alone they are refused, beside it they count."""


def slots_of(method: str) -> dict[str, Any]:
    verb, _, name = method.partition(" ")
    slots = dict(catalogue.slots_of(verb, name or None))
    return {"name": name, **slots} if name else slots


def table_of(method: str) -> dict[str, dict[str, Choice]]:
    return REWARD_SLOTS if method.startswith("reward") else {**ONLINE_SLOTS, **PREFERENCE_SLOTS}


def made(method: str, changes: dict[str, Any]) -> Any:
    """What the command line makes of these changes: the Algorithm or the Objective. Two rewards score."""
    verb = method.partition(" ")[0]
    slots = checked(verb, changed(slots_of(method), changes))
    if verb in ONLINE:
        return compose.online_of(slots, longest=64, weights=(1.0, 0.5))
    return compose.reward_of(slots) if verb == "reward" else compose.preference_of(slots)


def legal(kind: Any, value: Any) -> bool:
    try:
        got = config.converted({"x": value}, msgspec.defstruct("one", [("x", kind)]), "").x
    except RecipeError:
        return False
    return type(got) is type(value) or (isinstance(got, float) and type(value) is int)


def others(kind: Any, now: Any) -> list[Any]:
    """Legal values other than this one: every one of a list, the first one of a range."""
    literals = [one for one in (kind, *typing.get_args(kind)) if typing.get_origin(one) is typing.Literal]
    if literals:
        return [value for value in typing.get_args(literals[0]) if value != now]
    return [value for value in TRIED if value != now and legal(kind, value)][:1]


def dial_changes(slot: str, choice: Choice, spec: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for option, default in choice_options(choice).items():
        kind = NARROWER.get(choice.op, {}).get(option) or OPTIONS[option][0]
        found = others(kind, spec.get(option, default))
        assert found, f"{slot}.{option}: no other legal value of {kind} is known here"
        for value in found:
            yield option, value


def field_changes(slot: str, now: Any) -> Iterator[tuple[str, Any]]:
    record = config.section(PLAIN_SLOTS[slot][0])
    assert record is not None
    defaults = record(**now)
    for name, kind in config.fields_of(record).items():
        found = others(kind, getattr(defaults, name))
        assert found, f"{slot}.{name}: no other legal value of {kind} is known here"
        for value in found:
            yield name, value


def names_it(error: RecipeError, slot: str, *names: str) -> None:
    """A refusal says which slot or part it is about."""
    assert str(error).startswith(("algorithm.", "unknown field 'algorithm."))
    assert any(name in str(error) for name in (slot, *names)), f"{slot} {names}: {error}"


def refusal(method: str, base: Any, changes: dict[str, Any], slot: str, *names: str) -> str:
    """Empty where the changes compose to something else; they may be refused too, and say by name what is."""
    try:
        got = made(method, changes)
    except RecipeError as error:
        names_it(error, slot, *names)
        return str(error)
    assert got != base, f"{method}: {changes} is accepted and changes nothing"
    return ""


def differs(method: str, base: Any, changes: dict[str, Any], slot: str, *names: str) -> bool:
    return not refusal(method, base, changes, slot, *names)


def each_dial(method: str, slot: str, own: dict[str, Any], found: Iterator[tuple[str, Any]]) -> None:
    """Every option counts beside `own`, what stands there; or what it needs is named, and then it counts."""
    base = made(method, {slot: own})
    for option, value in found:
        refused = refusal(method, base, {slot: {**own, option: value}}, slot, option)
        literal = isinstance(value, str)  # a way to go on, which may need a number of its own
        if f"{slot}.{option}" in NEEDS:
            assert refused, f"{method}: {slot}.{option} needs nothing"
            beside = {**own, **NEEDS[f"{slot}.{option}"][slot]}
            if differs(method, base, {slot: beside}, slot):
                assert differs(method, made(method, {slot: beside}), {slot: {**beside, option: value}}, slot), (
                    slot,
                    option,
                )
        elif not literal:
            assert not refused or "changes nothing" in refused, f"{method}: {slot}.{option} {value} is refused"


@pytest.mark.parametrize("method", METHODS)
def test_every_dial_of_what_stands_in_a_slot_counts_or_says_what_it_needs(method: str) -> None:
    slots, table = slots_of(method), table_of(method)
    for slot, value in slots.items():
        if slot == "name":
            continue
        if slot in PLAIN_SLOTS and config.section(PLAIN_SLOTS[slot][0]) is None:
            (other,) = others(PLAIN_SLOTS[slot][0], value)
            if not differs(method, made(method, {}), {slot: other}, slot):
                assert differs(method, made(method, NEEDS[slot]), {**NEEDS[slot], slot: other}, slot)
        elif slot in PLAIN_SLOTS:
            if value is None and not differs(method, made(method, {}), {slot: {}}, slot):
                continue  # the whole record is refused by name: no critic here
            each_dial(method, slot, dict(value or {}), field_changes(slot, value or {}))
        elif isinstance(value, list):
            for number, spec in enumerate(value):
                for option, other in [*dial_changes(slot, table[slot][spec["name"]], spec), ("weight", 0.37)]:
                    again = [*value[:number], {**spec, option: other}, *value[number + 1 :]]
                    assert differs(method, made(method, {}), {slot: again}, slot)
        elif value is not None:
            each_dial(method, slot, value, dial_changes(slot, table[slot][value["name"]], value))


@pytest.mark.parametrize("method", METHODS)
def test_every_choice_of_a_slot_is_another_method_or_refused_by_name_and_so_are_its_dials(method: str) -> None:
    slots, base = slots_of(method), made(method, {})
    for slot, known in table_of(method).items():
        if slot not in slots:
            continue
        standing = slots[slot] if not isinstance(slots[slot], list) else None
        for name, choice in known.items():
            if standing and standing["name"] == name:
                continue
            spec = {"name": name} | filled(choice)
            if differs(method, base, {slot: spec}, slot, name):
                each_dial(method, slot, spec, dial_changes(slot, choice, spec))


def filled(choice: Choice) -> dict[str, Any]:
    """The options that have no default."""
    return (
        {"buffer": 8, "limit": 60}
        if choice.op == "soft_overlong"
        else {"bound": 5.0}
        if choice.op == "clip_score"
        else {}
    )


@cache
def composed(slot: str, name: str) -> list[str]:
    """The methods in which this choice composes as it is."""
    out = []
    for method in METHODS:
        if slot in slots_of(method) and name in table_of(method).get(slot, {}):
            try:
                made(method, {slot: {"name": name} | filled(table_of(method)[slot][name])})
            except RecipeError:
                continue
            out.append(method)
    return out


@pytest.mark.parametrize(
    ("slot", "name"),
    [(slot, name) for one in (ONLINE_SLOTS, PREFERENCE_SLOTS, REWARD_SLOTS) for slot in one for name in one[slot]],
)
def test_every_choice_stands_in_some_method(slot: str, name: str) -> None:
    assert composed(slot, name)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_optional_can_be_left_out_and_nothing_else_can(method: str) -> None:
    base = made(method, {})
    for slot, value in slots_of(method).items():
        if slot == "name" or value is None:
            continue
        optional = slot in OPTIONAL or (slot in PLAIN_SLOTS and type(None) in typing.get_args(PLAIN_SLOTS[slot][0]))
        if optional:  # but the surrogate decides whether there is a ratio, the advantage whether there is a critic
            assert differs(method, base, {slot: None}, slot) == (slot not in ("ratio", "value"))
        else:
            with pytest.raises(RecipeError) as caught:
                made(method, {slot: None})
            assert str(caught.value).startswith(f"algorithm.{slot}")
