"""The live view of a run on a terminal: a bar, the numbers that matter with their direction, and an answer."""

import sys
from typing import Any

from whet.loops import history
from whet.loops.metrics import direction, find
from whet.loops.progress import Progress, Shown
from whet.terminal import console, held_notices, visible

PER_SECOND = 4
"""Largest number of updates per second. They are made in a thread of their own, whatever the number of steps."""
ARROWS, PLAIN_ARROWS = {1: "↗", 0: "→", -1: "↘"}, {1: "^", 0: "-", -1: "v"}
WIDE, WIDEST = 76, 96
"""Columns of a terminal from which the value at the start is shown, and the unit too."""


class Screen:
    """Draw a `Progress` until the context ends, which leaves the last state on the terminal if the run did not end itself.

    What is printed meanwhile to standard error (and to standard output, if it is a terminal) appears above the view. Colors follow
    NO_COLOR, and characters the encoding of the terminal. Rows that do not fit the height are left out, the last ones first.
    """

    def __init__(self, progress: Progress) -> None:
        from rich.live import Live

        self.progress = progress
        self.console = console(error=True)
        self.unicode = self.console.encoding.startswith("utf")
        self._notices: list[str] = []
        stdout = sys.stdout is not None and sys.stdout.isatty()
        self._live = Live(
            console=self.console, get_renderable=self.render, refresh_per_second=PER_SECOND, redirect_stdout=stdout,
        )  # fmt: skip

    def __enter__(self) -> "Screen":
        self._held = held_notices()
        self._notices = self._held.__enter__()
        self._live.start(refresh=True)
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.transient = self.progress.done >= self.progress.total and error[:1] == (None,)
        self._notices = []  # printed below
        try:
            self._live.stop()
        finally:
            self._held.__exit__(*error)

    def render(self) -> Any:
        """Return the view as a renderable of rich."""
        from rich.console import Group

        with self.progress.lock:
            sample, width, height = self.progress.sample, self.console.width, self.console.height
            parts = [self._head()]
            below = [] if sample is None or height < 12 else self._sample(sample, width)
            parts += [self._table(width, max(3, height - 4 - (4 if below else 0) - len(self._notices))), *below]
        return Group(*parts, *(self._text(one, "yellow") for one in list(self._notices)))

    def _text(self, text: str, style: str = "", cells: int | None = None, *, tail: bool = False) -> Any:
        """Return a text without control characters, cut to a number of cells at its end, or with `tail` at its start."""
        from rich.cells import cell_len
        from rich.text import Text

        text = visible(text)
        if not self.unicode:
            text = text.encode(self.console.encoding, "backslashreplace").decode(self.console.encoding)
        if cells is not None and cell_len(text) > cells:
            more, kept, used = "…" if self.unicode else "..", list[str](), 0
            for one in reversed(text) if tail else text:
                used += cell_len(one)
                if used > cells - len(more):
                    break
                kept.append(one)
            text = f"{more}{''.join(reversed(kept))}" if tail else f"{''.join(kept)}{more}"
        return Text(text, style=style, no_wrap=cells is not None, overflow="crop" if cells is not None else None)

    def _head(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        one = self.progress
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        for _ in range(3):
            head.add_column(no_wrap=True, justify="right")
        speed = one.history.mean("tokens_per_second")
        head.add_row(
            self._text(one.title, "bold", max(24, self.console.width // 4)),
            ProgressBar(total=max(one.total, 1), completed=one.done),
            f"{one.done}/{one.total}",
            left_text(one.left()),
            "" if speed is None else f"{count_text(speed)} tokens/s",
        )
        return head

    def _table(self, width: int, rows: int) -> Any:
        from rich.table import Table
        from rich.text import Text

        past = self.progress.history
        table = Table.grid(padding=(0, 1))
        for justify in ("left", "right", "left", "left", "left", "left"):
            table.add_column(no_wrap=True, justify=justify)  # type: ignore[arg-type]
        names = past.shown()
        for name in names[:rows] if len(names) <= rows else names[: rows - 1]:
            values = list(past.values[name])
            turn, better = history.trend(values), direction(name)
            style = "cyan" if better is None or not turn else "green" if (turn > 0) == (better == "higher") else "red"
            metric = find(name)
            table.add_row(
                self._text(name, "", min(max(32, width // 4), width // 2 - 4)),
                f"{values[-1]:.4g}",
                Text((ARROWS if self.unicode else PLAIN_ARROWS)[turn], style=style),
                Text(history.spark(values, 16 if width < WIDEST else 24) if self.unicode else "", style=style),
                Text(f"from {past.first[name]:.4g}" if width >= WIDE else "", style="dim"),
                Text(metric.unit if metric is not None and width >= WIDEST and metric.unit != "-" else "", style="dim"),
            )
        if len(names) > rows:
            table.add_row(self._text(f"and {len(names) - rows + 1} more", "dim"))
        return table

    def _sample(self, sample: Shown, width: int) -> list[Any]:
        return [
            self._text(f"sample of step {sample.step}, score {sample.score:.4g}", "bold", width - 1),
            self._text(
                f"  {sample.prompt}" if len(sample.prompt) < width else sample.prompt, "dim", width - 1, tail=True
            ),
            self._text(f"  {sample.completion}", "", 2 * (width - 2)),
        ]


def left_text(seconds: float | None) -> str:
    """Return a duration that is left as hours, minutes and seconds.

    >>> left_text(3725.2), left_text(None)
    ('1:02:05 left', '-:--:-- left')
    """
    if seconds is None:
        return "-:--:-- left"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02} left"


def count_text(number: float) -> str:
    """Return a large number in three digits.

    >>> count_text(12.3), count_text(12345.0), count_text(2.5e6)
    ('12', '12.3k', '2.50M')
    """
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}" if number / size >= 10 else f"{number / size:.2f}{letter}"
    return f"{number:.0f}"
