"""The Tracker protocol, and the table of trackers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from whet.registry import Registry


@dataclass(frozen=True)
class RunInfo:
    """The run that a tracker logs: its name, its folder and its resolved recipe."""

    name: str
    folder: Path
    recipe: Mapping[str, Any] = field(default_factory=dict)


class Tracker(Protocol):
    """Log the metrics and samples of a run. Only the first worker calls a tracker."""

    def start(self, run: RunInfo) -> None:
        """Start logging, at the start of a run or when it continues from a checkpoint."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step. A resumed run may log a step again."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log some answers of a rollout: dicts with prompt, completion and score. Those of an evaluation come in a call of their own,
        and have `evaluation` True too."""

    def end(self) -> None:
        """End logging, and write buffered data."""


_ACCELERATE = "whet.trackers.accelerate"
TRACKERS = Registry(
    "trackers",
    {
        "console": "whet.trackers.console",
        **dict.fromkeys(
            ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"),
            _ACCELERATE,
        ),
    },
    Tracker,
)
"""All trackers by name."""
