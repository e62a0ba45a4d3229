"""All errors that whet raises. A message names the problem, the value, and how to fix it.

    WhetError
    ├── UserError         the input is invalid; raised before any long computation starts
    │   ├── RecipeError   a recipe or an option: unknown key, invalid number
    │   ├── DataError     a row of a data file; names the file and the line
    │   └── ModelError    a model or tokenizer folder
    ├── RewardError       a reward function or judge raised, or returned an invalid value
    ├── WorkerDied        an engine or a worker died; its work can be repeated by another one
    ├── RunStopped        a self-check of a run failed; names the check and the cause
    └── CheckpointError   a checkpoint is missing, incomplete, or from another run

    Interrupted           a signal (Ctrl-C, SIGTERM, SIGHUP) ended a run; a KeyboardInterrupt, and not a WhetError

The command line prints these as one message and exits with 2 (`UserError`), 1, or 128 plus the number of the signal;
`--debug` shows the traceback. A message shows control characters as escapes.
"""

import pickle
from typing import Any

from whet.terminal import visible


class WhetError(Exception):
    """Base class of all errors that whet raises on purpose. As text, control characters of the message are escapes: parts of
    it come from files, models, servers and users' functions, and Python prints it if nobody catches the error."""

    def __str__(self) -> str:
        return visible(super().__str__(), layout=True)


class UserError(WhetError):
    """The input is invalid. `problems` has the single errors if several were found at once (see `Problems`)."""

    problems: tuple["UserError", ...] = ()


class RecipeError(UserError):
    """A recipe or an option is invalid; the message names the field."""


class DataError(UserError):
    """A data row is invalid; the message names the file and the line."""


class ModelError(UserError):
    """A model or tokenizer folder is invalid; the message names the folder."""


class Problems:
    """The errors of checks that do not depend on each other, to be told at once. Use it as `with problems:` around each check.

    >>> problems = Problems()
    >>> with problems:
    ...     raise RecipeError("lr: expected a number")
    >>> with problems:
    ...     raise DataError("a.jsonl:3: field 'prompt' is missing")
    >>> problems.tell()
    Traceback (most recent call last):
    whet.errors.UserError: 2 problems:
    lr: expected a number
    a.jsonl:3: field 'prompt' is missing
    """

    def __init__(self) -> None:
        self.found: list[UserError] = []

    def __enter__(self) -> "Problems":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, UserError):
            return False
        for one in error.problems or (error,):
            if str(one) not in map(str, self.found):
                self.found.append(one)
        return True

    def tell(self) -> None:
        """Raise the only error as it is, or one error that lists all on lines of their own. It has the class of the errors if
        they have the same one, and is a UserError else."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            kinds = {type(one) for one in self.found}
            error = (kinds.pop() if len(kinds) == 1 else UserError)(
                "\n".join([f"{len(self.found)} problems:", *map(str, self.found)])
            )
            error.problems = tuple(self.found)
            raise error


class RewardError(WhetError):
    """A reward function or judge raised, or returned a wrong number of values, a wrong type, or NaN."""


class WorkerDied(WhetError):
    """A generation engine or a worker process died; another one can repeat its work."""


class RunStopped(WhetError):
    """A run stopped itself because one of its self-checks failed. `seen` has what the check compared, by name."""

    def __init__(self, message: str, **seen: Any) -> None:
        super().__init__(message)
        self.seen = seen


class CheckpointError(WhetError):
    """A checkpoint cannot be read, or belongs to another run."""


class AttemptFailed(WorkerDied):
    """A failure that a restart of one worker cannot repair: all workers of the attempt must be started again."""


class RestartsExhausted(AttemptFailed):
    """Workers died more often than the restart budget allows."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a run. `signum` is its number; the message says what was saved."""

    def __init__(self, reason: str, signum: int = 2) -> None:
        super().__init__(reason)
        self.signum = signum


LONGEST = 2000
"""Largest number of characters of a message on the terminal."""


def shown(error: BaseException) -> str:
    """Return the error's message as one line: line breaks as spaces, what prints nothing as escapes, and the middle of a very
    long one left out (it shows a value that was given).

    >>> shown(WhetError("out: no such file" + chr(27) + "[0m" + chr(10) + "a.yaml"))
    'out: no such file\\\\x1b[0m a.yaml'
    """
    text = visible(" ".join(str(error).split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 4 :]}"


def sendable_error(error: BaseException | None) -> BaseException | None:
    """Return the error, or a RuntimeError with the same message if it cannot be pickled and unpickled."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, or the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
