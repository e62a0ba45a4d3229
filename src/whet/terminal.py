"""Text for a terminal: characters that could control it are shown as escapes, wherever whet prints."""

import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

UNSAFE = re.compile(
    "[\0-\x1f\x7f-\x9f"  # C0, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction of text
    "\u2028\u2029"  # line and paragraph separators
    "\xad\u180e\u200b\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb"  # characters that print nothing
    "\ud800-\udfff]"  # halves of surrogate pairs, which no encoding can print
)
"""The characters that are shown as escapes. ZWJ, ZWNJ, variation selectors and combining marks are not among them."""


def visible(text: str, *, layout: bool = False) -> str:
    """Return a text with control characters, and others that print nothing, as escapes. With `layout` line feeds and tabs stay.

    >>> visible("a\\tb\\x1b[0m"), visible("a\\tb\\u202e", layout=True)
    ('a\\\\tb\\\\x1b[0m', 'a\\tb\\\\u202e')
    """

    def escaped(found: re.Match[str]) -> str:
        one = found[0]
        return one if layout and one in "\n\t" else repr(one)[1:-1]

    return UNSAFE.sub(escaped, text)


def say(text: object = "", *, error: bool = False) -> None:
    """Print a text of one or more lines to standard output, or with `error` to standard error."""
    _write(sys.stderr if error else sys.stdout, f"{visible(str(text), layout=True)}\n")


def caution(text: object) -> None:
    """Print `whet: TEXT` to standard error, as one line: line feeds of the text are shown as escapes too."""
    say(f"whet: {visible(str(text))}", error=True)


_held: list[str] | None = None
"""Texts of `caution_at_once` that a live view shows, None if there is no live view."""


def caution_at_once(text: object) -> None:
    """Print as `caution` does, from a signal handler: past the streams, which the interrupted code may be writing to. A live view
    shows the text instead (see `held_notices`)."""
    line = f"whet: {visible(str(text))}"
    if _held is not None:
        _held.append(line)
    else:
        os.write(2, f"{line}\n".encode())


@contextmanager
def held_notices() -> Iterator[list[str]]:
    """Yield a list that gets the texts of `caution_at_once` within the context, for a live view, which alone may write to the
    terminal meanwhile. They are printed when the context ends."""
    global _held
    held: list[str] = []
    _held = held
    try:
        yield held
    finally:
        _held = None
        for line in held:
            say(line, error=True)


@contextmanager
def to_standard_error() -> Iterator[None]:
    """Send what other libraries print to standard output to standard error: standard output has the result of a command alone."""
    with redirect_stdout(sys.stderr):
        yield


def console(*, error: bool = False, **options: Any) -> Any:
    """Return a console of rich for standard output, or with `error` for standard error. It shows text as `say` does and reads no
    markup in it; `options` are those of rich.console.Console."""
    from rich.console import Console

    class Shown(Console):
        def render_str(self, text: str, **named: Any) -> Any:  # before rich measures it, and removes some characters
            return super().render_str(visible(text, layout=True), **named)

        def render(self, *given: Any, **named: Any) -> Any:
            for one in super().render(*given, **named):  # segments with `control` are rich's own
                yield one if one.control else one._replace(text=visible(one.text, layout=True))

    return Shown(stderr=error, markup=False, emoji=False, **options)


def guard() -> None:
    """Show tracebacks, warnings and log messages of this process, of whet and of other libraries, as `say` shows text.

    Their handlers and formatters stay as they are. The command line calls this; a Python program that uses whet keeps its hooks.
    """
    if logging.getLogRecordFactory() is not _Record:
        logging.setLogRecordFactory(_Record)
        sys.excepthook = _excepthook
        threading.excepthook = _thread_hook
        sys.unraisablehook = _unraisable_hook
        plain = warnings.formatwarning
        warnings.formatwarning = lambda *given, **named: visible(plain(*given, **named), layout=True)


class _Record(logging.LogRecord):
    """A log record with its message and traceback as `say` shows text."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        if self.exc_info and self.exc_info[1] is not None:
            self.exc_text = visible(logging.Formatter().formatException(self.exc_info), layout=True)

    def getMessage(self) -> str:
        return visible(super().getMessage(), layout=True)


def _excepthook(kind: Any, error: Any, trace: Any) -> None:
    _write(sys.stderr, visible("".join(traceback.format_exception(kind, error, trace)), layout=True))


def _thread_hook(given: threading.ExceptHookArgs) -> None:
    if given.exc_type is not SystemExit:
        say(f"Exception in thread {given.thread.name if given.thread else '?'}:", error=True)
        _excepthook(given.exc_type, given.exc_value, given.exc_traceback)


def _unraisable_hook(given: Any) -> None:
    say(f"{given.err_msg or 'Exception ignored in'}: {given.object!r}", error=True)
    _excepthook(given.exc_type, given.exc_value, given.exc_traceback)


def _write(stream: TextIO | None, text: str) -> None:
    """Write a text that is visible already. Characters that the stream's encoding does not have become escapes."""
    if stream is None:  # a process without standard streams
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()
