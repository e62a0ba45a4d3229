"""whet.train: run a training method in this process, under torchrun, or on a Ray cluster. What is wrong with paths and fields is
told before torch is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.methods import catalogue
from whet.runs import config, early

if TYPE_CHECKING:
    from whet.runs.session import Resume


def train(
    method: str,
    recipe: str | Path | None = None,
    *,
    tokenizer: Any = None,
    resume: "Resume" = False,
    quiet: bool = True,
    accept_changed: str | Sequence[str] = (),
    **fields: Any,
) -> Path:
    """Train with a method from start to end. Return the run folder. Takes the arguments of `whet.Session`.

    On a cluster (`cluster=...`), workers that die are restarted and training continues from the last checkpoint.

    Raises RecipeError, DataError or ModelError for invalid arguments, RewardError if a reward function fails, RunStopped if
    a self-check fails, CheckpointError if a checkpoint cannot be loaded, RestartsExhausted if workers die too often.
    """
    config.check_call(method, recipe)
    if method not in catalogue.TRAINED:
        raise config.unknown_method(method)
    early.refuse(method, recipe, fields, resume=resume)
    from whet.runs import attempts
    from whet.runs.session import Session

    session = Session(
        method, recipe, tokenizer=tokenizer, resume=resume, quiet=quiet, accept_changed=accept_changed, **fields
    )
    return attempts.trained(session)
