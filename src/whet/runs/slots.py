"""Check the slots of a recipe's method: names, types and ranges. Errors suggest the closest known name."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from whet.errors import RecipeError
from whet.methods import catalogue
from whet.methods.choices import (
    NARROWER,
    ONLINE_SLOTS,
    OPTIONAL,
    OPTIONS,
    PLAIN_SLOTS,
    PREFERENCE_SLOTS,
    REWARD_SLOTS,
    Choice,
    named,
)
from whet.methods.compose import choice_options, found, record
from whet.methods.options import NotNegative, Truncated
from whet.methods.own import option_type
from whet.runs import config


def checked(verb: str, method: Mapping[str, Any], others: Sequence[str] = ()) -> dict[str, Any]:
    """Return the slots of a recipe's method after checking names, types and ranges. Parts stay mappings with a `name`.

    `others` are the other fields of the recipe, which the error for an unknown slot can suggest. Raises RecipeError.
    """
    known = catalogue.slots_of(verb, method.get("name"))
    table = REWARD_SLOTS if verb == "reward" else {**ONLINE_SLOTS, **PREFERENCE_SLOTS}
    out: dict[str, Any] = {}
    for slot, value in method.items():
        if slot == "name" and verb == "reward":
            continue
        if slot not in known:
            raise _unknown_slot(slot, known, table, others)
        if slot in PLAIN_SLOTS:
            out[slot] = _checked_plain(slot, value)
        elif isinstance(value, list):
            if slot != "loss" or verb == "reward" or not value:
                raise RecipeError(f"algorithm.{slot}: it holds one part; got a list of {len(value)}")
            out[slot] = [_checked_part(slot, one, table[slot], {"weight": 1.0}) for one in map(named, value)]
        elif value is None and slot not in OPTIONAL:
            raise RecipeError(f"algorithm.{slot}: it cannot be left out; known are {', '.join(table[slot])}")
        else:
            more = {"weight": 1.0} if slot == "loss" and verb != "reward" else {}
            out[slot] = value if value is None else _checked_part(slot, value, table[slot], more)
    if verb == "reward" and out["loss"]["name"] != method["name"]:
        raise RecipeError(
            f"algorithm.loss.name: --algorithm.name picks loss and rows together; got {out['loss']['name']!r} with {method['name']!r}"
        )
    return out


def rule_of(slots: Mapping[str, Any]) -> str:
    """Return the rule for truncated answers."""
    return record(Truncated, slots["truncated"]).rule


def _unknown_slot(
    slot: str, known: Mapping[str, Any], table: Mapping[str, Mapping[str, Choice]], others: Sequence[str]
) -> RecipeError:
    """Return the error for an unknown slot. Suggest a part, an option of a part, or a field of the recipe."""
    for other, value in known.items():
        if slot in table.get(other, {}):
            return RecipeError(f"unknown field {slot!r}; it is a part: --{other.replace('_', '-')} {slot}")
        specs = [named(one) for one in (value if isinstance(value, list) else [value]) if other in table and one]
        if any(slot in choice_options(table[other][spec["name"]]) for spec in specs):
            return RecipeError(f"unknown field {slot!r}; did you mean 'algorithm.{other}.{slot}'?")
    return config.unknown(slot, [*(f"algorithm.{one}" for one in known), *others], every=False)


def _checked_plain(slot: str, value: Any) -> Any:
    kind = PLAIN_SLOTS[slot][0]
    inner = config.section(kind)
    if inner is not None and isinstance(value, Mapping):
        for key in value:
            if key not in config.fields_of(inner):
                raise config.unknown(
                    f"algorithm.{slot}.{key}", [f"algorithm.{slot}.{other}" for other in config.fields_of(inner)]
                )
    form = msgspec.defstruct("algorithm", [(slot, kind)], frozen=True)
    return getattr(config.converted({slot: value}, form, "algorithm"), slot)


def _kind_of(choice: Choice, option: str, more: Mapping[str, Any]) -> Any:
    """Return the type of an option: by its name for built-in parts, by its annotation for user functions."""
    if option in more:
        return NotNegative
    if callable(choice.op):
        return option_type(choice.op, option)
    return NARROWER.get(choice.op, {}).get(option) or OPTIONS[option][0]


def _checked_part(slot: str, spec: Any, known: Mapping[str, Choice], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spec of a part after checking the types and ranges of its options. `more` are options of the slot."""
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise RecipeError(f"algorithm.{slot}: expected the name of a part, or {{name: ..., option: ...}}; got {spec!r}")
    choice = found(slot, known, spec["name"])
    own = choice_options(choice)
    fields_ = []
    for option in spec:
        if option == "name":
            continue
        if option not in own and option not in more:
            names = [f"algorithm.{slot}.{one}" for one in (*own, *more)]
            if not names:
                raise RecipeError(f"algorithm.{slot}.{option}: {spec['name']} has no options; leave it out")
            raise config.unknown(f"algorithm.{slot}.{option}", names)
        kind = _kind_of(choice, option, more)
        fields_.append((option, kind))
    form = msgspec.defstruct("part", fields_, frozen=True)
    given = config.converted({key: value for key, value in spec.items() if key != "name"}, form, f"algorithm.{slot}")
    return {"name": spec["name"]} | {option: getattr(given, option) for option, _ in fields_}
