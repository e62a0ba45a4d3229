"""The trackers of the library accelerate: TensorBoard, W&B, MLflow, trackio and others."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.errors import RecipeError
from whet.trackers.base import RunInfo


@dataclass(frozen=True)
class Options:
    """Options of accelerate's trackers. Other settings are environment variables of the tracker itself."""

    project: str | None = None
    """name of the project; default: the name of the run folder"""


class AccelerateTracker:
    """A tracker of accelerate; `name` is its name in accelerate."""

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self._accelerator: Any = None

    def start(self, run: RunInfo) -> None:
        """See `Tracker.start`. Raises RecipeError if accelerate or the package of the tracker is not installed."""
        from accelerate import Accelerator

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # if the tracker is not installed, an error is raised below
            try:
                self._accelerator = Accelerator(log_with=[self.name], project_dir=str(run.folder), cpu=True)
            except ValueError as error:
                raise RecipeError(f"trackers: {error}") from error
        self._accelerator.init_trackers(self.options.project or run.name)
        if not self._accelerator.trackers:
            raise RecipeError(
                f"trackers: {self.name} is not installed; install it with pip, or remove it from the recipe"
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._accelerator.log(dict(metrics), step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See `Tracker.samples`. Samples are not logged, because accelerate has no common method for text."""

    def end(self) -> None:
        """See `Tracker.end`."""
        self._accelerator.end_training()


def check(options: Options, context: Any) -> None:
    """Raise RecipeError if accelerate is not installed."""
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        raise RecipeError("trackers: accelerate is not installed; install whet[trackers]")


def make(options: Options, context: Any) -> AccelerateTracker:
    """Build the tracker whose name is `context`."""
    return AccelerateTracker(str(context), options)
