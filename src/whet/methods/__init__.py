"""An algorithm is a value: a frozen record of named parts."""

from whet.methods.algorithm import (
    Algorithm,
    Collect,
    Penalty,
    clipping,
    credited,
    diagnostics,
    outcome,
    paired,
    shaped,
    spread,
)
from whet.methods.compose import online, preference, reward
from whet.methods.part import Objective, Part, Term, part

__all__ = [
    "Algorithm",
    "Collect",
    "Objective",
    "Part",
    "Penalty",
    "Term",
    "clipping",
    "credited",
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
