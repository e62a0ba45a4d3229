"""Find the choice for a slot of a method, and build its part from the options of a recipe."""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import msgspec

from whet.data.columns import COLUMNS
from whet.errors import RecipeError
from whet.methods.choices import (
    HIDDEN,
    ONLINE_SLOTS,
    OPTIONS,
    PREFERENCE_SLOTS,
    REWARD_SLOTS,
    Choice,
)
from whet.methods.own import op_of, own_choice
from whet.methods.parts import Part, part

Slots = Mapping[str, Any]
"""The slots of a method, or the options of a part with its name."""


def chosen(slot: str, spec: Slots, **given: Any) -> Part:
    """Build the part of a slot from its choice, the options of `spec`, and the columns and options that the method sets."""
    return part_of(slot, {**PREFERENCE_SLOTS, **ONLINE_SLOTS}[slot], spec, given)


def part_of(slot: str, known: Mapping[str, Choice], spec: Slots, given: Mapping[str, Any]) -> Part:
    """Build a part of a slot with these choices. `given` are columns and options that the method sets."""
    choice = found(slot, known, spec["name"])
    options = {key: value for key, value in given_options(slot, choice, spec).items() if key not in choice.extra}
    op = op_of(choice)
    if callable(choice.op):  # a user's function takes what it names
        given = {name: one for name, one in given.items() if name in inspect.signature(op).parameters}
    return part(op, **{**choice.reads, **given, **options})


def given_options(slot: str, choice: Choice, spec: Slots) -> dict[str, Any]:
    """Return the options of a spec. Raises RecipeError for an option that the part does not have."""
    own = choice_options(choice)
    for key in spec:
        if key != "name" and key not in own:
            raise RecipeError(
                f"algorithm.{slot}.{key}: {spec['name']} has no such option; known are {', '.join(own) or 'none'}"
            )
    return {key: value for key, value in spec.items() if key != "name"}


def found(slot: str, known: Mapping[str, Choice], name: str) -> Choice:
    """Return the choice with this name. Raises RecipeError, with the closest name, if there is none."""
    if ":" in name:
        return own_choice(slot, name, REPLACEABLE.get(slot))
    return known_in(f"algorithm.{slot}", known, name)


REPLACEABLE: Mapping[str, frozenset[str]] = {
    slot: frozenset(COLUMNS) | {"dim"} | more
    for slot, more in {
        "normalize": {"rewards"},
        "combine": {"rewards"},
        "reward_normalization": {"score"},
        "reward_clip": {"score"},
        "overlong": {"score"},
        "reward_placement": {"score"},
        "advantage": {"score", "final_value"},
        "normalize_advantage": {"advantage"},
        "importance_correction": set[str](),
        "ratio": set[str](),
        "surrogate": {"ratio"},
        "kl_in_loss": set[str](),
        "pairs": {"gap"},
        "loss": {"gap", "chosen", "rejected", "score", "probability", "good", "policy_gap", "beta"},
    }.items()
}
"""Slots that take a user's function, with the allowed names of its positional parameters."""


def known_in(where: str, known: Mapping[str, Any], name: str) -> Any:
    """Return the entry with this name. Raises RecipeError, with the closest name, if there is none."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise RecipeError(f"{where}: unknown {name!r}; {hint}")
    return known[name]


def choice_options(choice: Choice) -> dict[str, Any]:
    """Return the options of a choice that recipes can set, with their defaults (`inspect.Parameter.empty` if none)."""
    own = {
        name: one.default
        for name, one in inspect.signature(op_of(choice)).parameters.items()
        if one.kind is inspect.Parameter.KEYWORD_ONLY and name not in HIDDEN + choice.hidden
    }
    return own | dict(choice.extra)


def record(kind: type, value: Any) -> Any:
    """Return a record of this kind; `value` may be a mapping of its fields. Raises RecipeError for an invalid field or value."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise RecipeError(f"algorithm: expected the fields of {kind.__name__}, got {value!r}")
    for name in value:
        known_in(f"algorithm, {kind.__name__}", {one.name: one for one in dataclasses.fields(kind)}, name)
    try:
        return msgspec.convert(dict(value), kind)
    except msgspec.ValidationError as error:
        raise RecipeError(f"algorithm, {kind.__name__}: {error}") from error


def with_length(slot: str, spec: Slots, option: str, longest: int | None) -> dict[str, Any]:
    """Return the spec with its length set to the limit of answers if it is null."""
    value = spec.get(option) or longest
    if value is None:
        raise RecipeError(f"algorithm.{slot}.{option}: it needs the answers' limit in tokens")
    return {**spec, option: value}


def short_name(name: str) -> str:
    """Return the name of a part in the metrics: the built-in name, or the name of the user's function."""
    return name.split("#")[0].rpartition(":")[2]


assert set(OPTIONS) >= {
    name
    for table in (ONLINE_SLOTS, PREFERENCE_SLOTS, REWARD_SLOTS)
    for known in table.values()
    for one in known.values()
    for name in choice_options(one)
}, "every option has one meaning in whet.methods.choices.OPTIONS"
