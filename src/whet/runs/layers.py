"""Merge the layers of a recipe: the one of the method, the user's file, and the options of the command line."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from whet.errors import RecipeError

LISTED = ("reward", "judge")
"""Sections that are a list. An option of one without a source, as `--reward.timeout 60`, is of the only one that is given."""


def merged_layers(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the layers merged into one; later ones take precedence."""
    out: dict[str, Any] = {}
    for layer in layers:
        merge(out, layer)
    return out


def merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Merge `other` into `tree`; it takes precedence. No mapping of `other` becomes part of `tree`. Raises RecipeError for an option
    of a reward or judge if there are several."""
    for key, value in other.items():
        if isinstance(value, Mapping):
            if not isinstance(tree.get(key), dict):
                tree[key] = {}
            merge(tree[key], value)
        elif key in LISTED and tree.get(key) and (_unnamed(value) or _unnamed(tree[key])):
            tree[key] = [_joined(key, tree[key], value)]
        else:
            tree[key] = value


def _unnamed(value: Any) -> bool:
    """Whether a section is only options, without a source."""
    return (
        isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping) and value[0].get("source") is None
    )


def _joined(key: str, before: Any, value: Any) -> dict[str, Any]:
    """Return the only entry of a section with the options of both values."""
    for one, options in ((before, value), (value, before)):
        if _unnamed(options) and isinstance(one, list) and len(one) != 1:
            given = options[0].get("options") or options[0]
            raise RecipeError(
                f"{key}.{next(iter(given), 'options')}: {len(one)} are given, and it does not say of which; give it beside the source, as "
                f"--{key} '{{source: ..., {next(iter(given), 'options')}: ...}}'"
            )
    out = deepcopy(dict(before[0]))
    merge(out, value[0])
    return out
