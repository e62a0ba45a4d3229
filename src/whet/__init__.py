"""whet post-trains language models on human feedback: SFT, reward models, PPO and its successors, DPO and its relatives.

`train` runs a whole method; `Session` gives its loop into the caller's hands, one call per stage. The other commands are
functions too. Names are imported when they are first used: importing whet loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from whet.errors import (
    CheckpointError,
    DataError,
    ModelError,
    RecipeError,
    RewardError,
    RunStopped,
    UserError,
    WhetError,
)

if TYPE_CHECKING:
    from whet.data import Batch, Group, Prompt, Sample
    from whet.loops.experience import RolloutScores
    from whet.loops.online import MiniBatch, StepLog
    from whet.rewards import Scores
    from whet.runs.calls import evaluate, explain, plan, rank, sample, serve, verify_resume
    from whet.runs.diff import diff
    from whet.runs.replay import replay
    from whet.runs.report import report
    from whet.runs.session import Session
    from whet.runs.train import train
    from whet.runs.why import why

_HOMES = {
    "whet.runs.train": ("train",),
    "whet.runs.session": ("Session",),
    "whet.runs.calls": ("evaluate", "explain", "plan", "rank", "sample", "serve", "verify_resume"),
    "whet.runs.diff": ("diff",),
    "whet.runs.replay": ("replay",),
    "whet.runs.report": ("report",),
    "whet.runs.why": ("why",),
    "whet.data": ("Batch", "Group", "Prompt", "Sample"),
    "whet.loops.experience": ("RolloutScores",),
    "whet.loops.online": ("MiniBatch", "StepLog"),
    "whet.rewards": ("Scores",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Batch", "CheckpointError", "DataError", "Group", "MiniBatch", "ModelError", "Prompt", "RecipeError", "RewardError",
    "RolloutScores", "RunStopped", "Sample", "Scores", "Session", "StepLog", "UserError", "WhetError", "diff", "evaluate", "explain",
    "plan", "rank", "replay", "report", "sample", "serve", "train", "verify_resume", "why",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The version, and the public names that load torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("whet")
    if name not in _HOME:
        raise AttributeError(f"module 'whet' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
