"""An algorithm is a value: a frozen record of named parts. Names are imported when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whet.methods.algorithm import (
        Algorithm,
        Collect,
        Penalty,
        advantages,
        clipping,
        diagnostics,
        outcome,
        paired,
        shaped,
        spread,
    )
    from whet.methods.compose import online, preference, reward
    from whet.methods.parts import Objective, Part, Term, part

_HOMES = {
    "algorithm": (
        "Algorithm", "Collect", "Penalty", "clipping", "advantages", "diagnostics", "outcome", "paired", "shaped", "spread",
    ),
    "compose": ("online", "preference", "reward"),
    "parts": ("Objective", "Part", "Term", "part"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Algorithm",
    "Collect",
    "Objective",
    "Part",
    "Penalty",
    "Term",
    "advantages",
    "clipping",
    "diagnostics",
    "online",
    "outcome",
    "paired",
    "part",
    "preference",
    "reward",
    "shaped",
    "spread",
]


def __getattr__(name: str) -> Any:
    """The options and the catalogue beside these names load no torch, so the package must not either."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
