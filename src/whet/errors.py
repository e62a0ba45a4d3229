"""Every error whet raises: the fact, the value got, the fix.

    WhetError
    ├── UserError         what was given cannot work; known before any long work starts
    │   ├── RecipeError   a recipe or an option: unknown key, impossible number
    │   ├── DataError     a row of a data file: names the file and the line
    │   └── ModelError    a model or tokenizer folder
    ├── RewardError       a reward function or judge raised, or returned what it may not
    ├── WorkerDied        a generator's engine or a worker died; what it was asked for is not lost
    ├── RunStopped        a self-check failed while running; says which and why
    └── CheckpointError   a checkpoint is missing, torn or from another run

The command line prints these as one message and exits with 2 (`UserError`) or 1; `--debug` shows the traceback.
"""


class WhetError(Exception):
    """Base of everything whet raises on purpose."""


class UserError(WhetError):
    """What was given cannot work."""


class RecipeError(UserError):
    """A recipe or an option is wrong; the message names the field."""


class DataError(UserError):
    """A data row is wrong; the message names file and line."""


class ModelError(UserError):
    """A model or tokenizer folder is wrong; the message names the folder."""


class RewardError(WhetError):
    """A reward function or judge raised, or returned a wrong count, type or NaN."""


class WorkerDied(WhetError):
    """An engine that generates, or a worker process, died; its work can be asked of another one."""


class RunStopped(WhetError):
    """A run stopped itself because one of its self-checks failed."""


class CheckpointError(WhetError):
    """A checkpoint cannot be read, or belongs to another run."""


class AttemptFailed(WorkerDied):
    """A failure that restarting one worker cannot repair: all workers of the attempt must be started again."""


class RestartsExhausted(AttemptFailed):
    """Workers died more often than they may be started again."""


def first_line(error: BaseException) -> str:
    """An error's message without what follows its first line; its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
