"""Training algorithms as frozen dataclasses of named parts. Names are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whet.methods.algorithm import (
        Algorithm,
        Collect,
        Penalty,
        advantages,
        clipping,
        critic_loss,
        diagnostics,
        outcome,
        paired,
        shaped,
        spread,
    )
    from whet.methods.compose import online, preference, reward
    from whet.methods.parts import Objective, Part, Term, answer_scores, part

_HOMES = {
    "algorithm": (
        "Algorithm", "Collect", "Penalty", "clipping", "critic_loss", "advantages", "diagnostics", "outcome", "paired", "shaped", "spread",
    ),
    "compose": ("online", "preference", "reward"),
    "parts": ("Objective", "Part", "Term", "answer_scores", "part"),
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
    "answer_scores",
    "clipping",
    "critic_loss",
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
    """Import a public name on first use: `options` and `catalogue` load no torch, so the package must not load it either."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
