"""whet sharpens language models on feedback: SFT, reward models, PPO and its successors, DPO and its relatives."""

from typing import Any

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

__all__ = [
    "CheckpointError", "DataError", "ModelError", "RecipeError", "RewardError", "RunStopped", "UserError", "WhetError",
    "explain", "plan", "run",
]  # fmt: skip


def run(verb: str, recipe: str | None = None, *, resume: bool = False, quiet: bool = True, **fields: Any) -> Any:
    """Any verb of the command line from Python: `whet.run("sft", model="DIR", data="my.jsonl", out="runs/mine")`.

    Fields are the recipe's; nested ones are dicts or dotted names (`**{"kl.coef": 0.1}`). Returns the run folder, the
    written file, or the numbers of eval.
    """
    from whet.cli.main import run as verb_of_the_door

    return verb_of_the_door(verb, recipe, resume=resume, quiet=quiet, **fields)


def explain(verb: str, recipe: str | None = None, **fields: Any) -> str:
    """What `run` would do with the same arguments: the objective with its numbers, its arithmetic, and where it ends."""
    from whet.cli.main import explain as verb_of_the_door

    return verb_of_the_door(verb, recipe, **fields)


def plan(verb: str, recipe: str | None = None, **fields: Any) -> str:
    """What `run` would need on many GPUs: memory of each role, traffic, time. `plan("ppo", model="DIR", gpus=64)`."""
    from whet.cli.main import plan as verb_of_the_door

    return verb_of_the_door(verb, recipe, **fields)
