"""The trackers of the library accelerate: TensorBoard, W&B, MLflow, trackio and others."""

import html
import importlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.errors import RecipeError
from whet.extras import REQUIREMENTS, command, installed, require
from whet.registry import told
from whet.terminal import to_standard_error, visible
from whet.trackers.base import RunInfo
from whet.trackers.system import System

SETTINGS: Mapping[str, Mapping[str, str]] = {"wandb": {"WANDB_CONSOLE": "off"}}
"""Environment variables of trackers that are set if they are not: W&B would record every frame of the live view."""


@dataclass(frozen=True)
class Options:
    """Options of accelerate's trackers. Other settings are environment variables of the tracker itself."""

    project: str | None = None
    """name of the project; default: the name of the run folder"""


class AccelerateTracker:
    """A tracker of accelerate; `name` is its name in accelerate.

    It gets the metrics of each step, numbers of the system (`system/...`), the resolved recipe as run configuration, and samples as a
    table (TensorBoard: a text; aim, clearml, comet_ml, dvclive and swanlab: none).
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self._accelerator: Any = None
        self._system = System()

    def start(self, run: RunInfo) -> None:
        """See `Tracker.start`. Raises RecipeError if the tracker cannot start, for instance without a login."""
        from accelerate import Accelerator

        for variable, value in SETTINGS.get(self.name, {}).items():
            os.environ.setdefault(variable, value)
        own: dict[str, dict[str, Any]] = {
            "wandb": {"name": run.name},
            "mlflow": {"run_name": run.name},
            "trackio": {"name": run.name},
        }
        if self.name == "wandb" and "WANDB_DIR" not in os.environ:
            own["wandb"]["dir"] = str(run.folder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a tracker that is not there, for which an error is raised below
                self._accelerator = Accelerator(log_with=[self.name], project_dir=str(run.folder), cpu=True)
            with to_standard_error():  # standard output has the run folder alone
                self._accelerator.init_trackers(
                    self.options.project or run.name,
                    config=flat(run.recipe),
                    init_kwargs={self.name: own.get(self.name, {})},
                )
        except (Exception, SystemExit) as error:
            raise RecipeError(
                f"trackers: {self.name} could not start: {told(error)}; set it up (docs/runs.md), or remove it from the recipe"
            ) from error
        if not self._accelerator.trackers:
            raise RecipeError(
                f"trackers: accelerate does not find {self.name}; install it with pip, or remove it from the recipe"
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        numbers = {**metrics, **self._system.numbers()}
        self._accelerator.log(for_mlflow(numbers) if self.name == "mlflow" else numbers, step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See `Tracker.samples`."""
        show = {"tensorboard": self._text, "wandb": self._wandb, "mlflow": self._mlflow, "trackio": self._trackio}.get(
            self.name
        )
        if show is None or not rows:
            return
        kind = "eval/samples" if rows[0].get("evaluation") else "samples"
        show(kind, step, [{name: value for name, value in row.items() if name != "evaluation"} for row in rows])

    def end(self) -> None:
        """See `Tracker.end`."""
        with to_standard_error():
            if (
                self.name == "trackio"
            ):  # accelerate would leave it open, and it would end once more, and print so, at exit
                import trackio

                trackio.finish()
            else:
                self._accelerator.end_training()

    def _text(self, kind: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log rows to TensorBoard as a table in Markdown, which shows their text literally."""
        lines = [list(rows[0]), ["---"] * len(rows[0]), *([literal(value) for value in row.values()] for row in rows)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        self._accelerator.get_tracker("tensorboard", unwrap=True).add_text(kind, text, global_step=step)

    def _wandb(self, kind: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        tracker = self._accelerator.get_tracker("wandb")
        tracker.log_table(kind, columns=list(rows[0]), data=[list(row.values()) for row in rows], step=step)

    def _mlflow(self, kind: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log rows to MLflow: as its own table if pandas is installed, which it needs for it, else as JSON of the same form."""
        import mlflow

        file = f"{kind}/step-{step:08d}.json"
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        if installed("pandas"):
            mlflow.log_table(columns, file)
        else:
            mlflow.log_dict({"columns": list(columns), "data": [list(row.values()) for row in rows]}, file)

    def _trackio(self, kind: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        import trackio

        table = trackio.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._accelerator.get_tracker("trackio", unwrap=True).log({kind: table}, step=step)


def flat(tree: Mapping[str, Any], where: str = "") -> dict[str, str | int | float | bool]:
    """Return a recipe as one level of dotted names. Lists become JSON, None the text "null".

    >>> flat({"seed": 1, "optim": {"lr": 0.5, "schedule_steps": None}, "reward": [{"source": "a"}]})
    {'seed': 1, 'optim.lr': 0.5, 'optim.schedule_steps': 'null', 'reward': '[{"source": "a"}]'}
    """
    out: dict[str, str | int | float | bool] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{where}{name}.")
        else:
            out[f"{where}{name}"] = (
                value if isinstance(value, (str, int, float, bool)) else json.dumps(value, default=str)
            )
    return out


def for_mlflow(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return numbers under names that MLflow takes: letters, digits and `_-. :/`, and none that is a folder of another one.

    >>> for_mlflow({"seconds": 1.0, "eval/pass@4/exact": 0.5})
    {'seconds/step': 1.0, 'eval/pass_4/exact': 0.5}
    """
    named = {"seconds": "seconds/step"}
    return {
        re.sub(r"/+", "/", re.sub(r"[^\w\-. :/]", "_", named.get(name, name))).strip("/"): value
        for name, value in numbers.items()
    }


def literal(value: Any) -> str:
    """Return a value as the text of a cell of a Markdown table: nothing in it is read as Markdown or HTML.

    >>> literal("a|b\\n<b>*c*")
    'a&#124;b\\\\n&lt;b&gt;&#42;c&#42;'
    """
    text = f"{value:.4g}" if isinstance(value, float) else visible(str(value))
    return re.sub(r"[|*_`\[\]!~#]", lambda found: f"&#{ord(found[0])};", html.escape(text))


def check(options: Options, context: Any) -> None:
    """Raise RecipeError if accelerate or the package of the tracker named `context` is not installed or cannot be imported."""
    module = str(context)
    require(f"trackers: {module}", "accelerate", module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"trackers: {module}: importing it failed with {told(error)}; {command(*REQUIREMENTS[module], upgrade=True)}"
        ) from error


def make(options: Options, context: Any) -> AccelerateTracker:
    """Build the tracker whose name is `context`."""
    return AccelerateTracker(str(context), options)
