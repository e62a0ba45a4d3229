"""A part from a user's function: its positional parameters name columns, its keyword-only parameters are options."""

import inspect
import re
import typing
from collections.abc import Callable, Collection
from typing import Any

from whet import ops
from whet.errors import RecipeError
from whet.methods.choices import Choice
from whet.methods.parts import Part, part
from whet.registry import load_object, place_of


def op_of(choice: Choice) -> Callable[..., Any]:
    """Return the function of a choice: one of `whet.ops`, or a user's own."""
    return getattr(ops, choice.op) if isinstance(choice.op, str) else choice.op


def own_choice(slot: str, name: str, columns: frozenset[str] | None) -> Choice:
    """Return the choice for a user's function, named as "file.py:function" or given as an object.

    Raises RecipeError if the slot takes no function, or if a positional parameter is not one of `columns`.
    """
    if columns is None:
        raise RecipeError(f"algorithm.{slot}: this slot takes the built-in parts only; got {name}")
    function = load_object(name)
    check_function(function, f"algorithm.{slot}", columns)
    return Choice(function, _formula(function), place_of(function))


def check_function(function: Any, where: str, columns: Collection[str]) -> None:
    """Raise RecipeError if a function cannot be a part: if a positional parameter is not one of `columns`, or a keyword-only
    parameter has no default. `where` names the slot or argument in the error."""
    if not callable(function):
        raise RecipeError(f"{where}: expected a function, got {type(function).__name__}")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:  # some functions written in C have none
        raise RecipeError(f"{where}: {function!r} does not say its parameters; wrap it in a Python function") from error
    for one in parameters:
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            raise RecipeError(f"{where}: {place_of(function)}: *{one.name} is not allowed; name each parameter")
        if one.kind is not one.KEYWORD_ONLY and one.name not in columns:
            raise RecipeError(
                f"{where}: {place_of(function)}: the parameter {one.name!r} is not a column here; "
                f"options are keyword-only (after *); columns are {', '.join(sorted(columns))}"
            )
        if one.kind is one.KEYWORD_ONLY and one.default is one.empty:
            raise RecipeError(f"{where}: {place_of(function)}: the option {one.name!r} has no default; give it one")


COMPUTED = ("ratio", "gap", "policy_gap", "chosen", "rejected", "score")
"""What a loss may take besides columns, if the loss that it replaces computes it."""


def own_loss(function: Any, columns: Collection[str], replaced: Part) -> Part:
    """Return the part for a loss function that is given to `forward_backward`. Besides columns, its parameters may name what
    the `replaced` loss computes from them: ratio, gap, chosen, rejected. Raises RecipeError if it cannot be used."""
    inner = {
        name: source
        for one in replaced.walk()
        for name, source in one.columns.items()
        if name in COMPUTED and isinstance(source, Part)
    }
    check_function(function, "loss", {*columns, *inner})
    taken = inspect.signature(function).parameters
    return part(function, **{name: source for name, source in inner.items() if name in taken})


def option_type(function: Callable[..., Any], option: str) -> Any:
    """Return the annotated type of a keyword-only parameter; Any without one."""
    try:
        return typing.get_type_hints(function, include_extras=True).get(option, Any)
    except NameError:
        return Any


def _formula(function: Callable[..., Any]) -> str:
    """Return the first line of the docstring, in which {option} is filled in later; other braces are shown as they are."""
    text = str(inspect.getdoc(function) or getattr(function, "__name__", "a function")).splitlines()[0]
    options = [one.name for one in inspect.signature(function).parameters.values() if one.kind is one.KEYWORD_ONLY]
    escaped = text.replace("{", "{{").replace("}", "}}")
    return re.sub(r"\{\{(" + "|".join(map(re.escape, options)) + r")\}\}", r"{\1}", escaped) if options else escaped
