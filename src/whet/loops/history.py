"""The numbers of a run over its steps: latest value, direction over the last steps, and a sparkline."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise

from whet.loops.metrics import find, order

WINDOW = 20
"""Number of values that a direction is computed from."""
KEPT = 512
"""Number of values that are kept of each number."""
BLOCKS = "▁▂▃▄▅▆▇█"


class History:
    """The values of each number, in the order of the steps. A number need not be there in every step."""

    def __init__(self) -> None:
        self.values: dict[str, deque[float]] = {}
        self.first: dict[str, float] = {}

    def add(self, numbers: Mapping[str, float]) -> None:
        """Append the numbers of a step."""
        for name, value in numbers.items():
            self.values.setdefault(name, deque(maxlen=KEPT)).append(float(value))
            self.first.setdefault(name, float(value))

    def shown(self) -> list[str]:
        """Return the names that matter: those of the table of metrics with `shown`, then those that a user logs."""
        return [*order(self.values), *(name for name in self.values if find(name) is None)]

    def mean(self, name: str, count: int = 10) -> float | None:
        """Return the mean of the last values of a number, None if there are none."""
        values = [one for one in list(self.values.get(name, ()))[-count:] if math.isfinite(one)]
        return sum(values) / len(values) if values else None


def trend(values: Sequence[float], window: int = WINDOW) -> int:
    """Return 1 if the last values rise, -1 if they fall, 0 if neither can be told from their noise.

    The means of the older and of the newer half of the last `window` values are compared; they differ if their difference is more
    than twice its standard error. Fewer than four values have no direction.

    >>> trend([1, 2, 3, 4, 5, 6]), trend([1, 5, 1, 5, 1, 5]), trend([3, 2])
    (1, 0, 0)
    """
    last = [one for one in list(values)[-window:] if math.isfinite(one)]
    if len(last) < 4:
        return 0
    halves = last[: len(last) // 2], last[len(last) // 2 :]
    means = [sum(one) / len(one) for one in halves]
    errors = [sum((x - m) ** 2 for x in one) / (len(one) - 1) / len(one) for one, m in zip(halves, means, strict=True)]
    change, scale = means[1] - means[0], max(map(abs, last))
    if abs(change) <= max(2 * math.sqrt(sum(errors)), 1e-9 * scale):
        return 0
    return 1 if change > 0 else -1


def spark(values: Sequence[float], cells: int = 16) -> str:
    """Return a line of at most `cells` blocks: each is the mean of as many values, from the smallest to the largest one.

    >>> spark([0, 1, 2, 3]), spark([1, 1]), spark([0, 0, 8, 8], 2)
    ('▁▃▆█', '▄▄', '▁█')
    """
    known = [one for one in values if math.isfinite(one)]
    count = min(cells, len(known))
    edges = [round(place * len(known) / count) for place in range(count + 1)] if count else [0]
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return BLOCKS[3] * count
    return "".join(BLOCKS[round((one - low) / (high - low) * (len(BLOCKS) - 1))] for one in means)
