"""Parts and terms: the pieces that methods are made of.

A part is an op with its dials set and its columns named. The op's positional parameters are the columns it reads, its
keyword-only parameters are dials; nothing else is written down, so a part cannot read what it does not say.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from whet.ops import Controller, FixedKL


@dataclass(frozen=True)
class Part:
    """An op, where each of its columns comes from (a column's name, or another part), and its dials."""

    op: Callable[..., Tensor]
    columns: Mapping[str, "str | Part"]
    dials: Mapping[str, Any] = field(default_factory=dict)

    def reads(self) -> frozenset[str]:
        """Every column this part needs, through the parts it is made of."""
        names: set[str] = set()
        for source in self.columns.values():
            names |= source.reads() if isinstance(source, Part) else {source}
        return frozenset(names)

    def __call__(self, columns: Mapping[str, Any]) -> Tensor:
        """The op on these columns. Dials that are controllers must have been resolved with `at` before."""
        given = {
            name: source(columns) if isinstance(source, Part) else columns[source]
            for name, source in self.columns.items()
        }
        return self.op(**given, **self.dials)

    def walk(self) -> Iterator["Part"]:
        """This part and every part it is made of."""
        yield self
        for source in self.columns.values():
            if isinstance(source, Part):
                yield from source.walk()


def part(op: Callable[..., Tensor], **given: Any) -> Part:
    """A part from an op: `given` names dials (keyword-only parameters) and, for columns not called like the op's
    parameter, which column or part to read. An optional column is read only where it is named; a positional parameter
    may be given a plain value too.

    >>> from whet.ops import clip, token_ratio
    >>> sorted(part(clip, ratio=part(token_ratio), low=0.1).reads())
    ['advantage', 'logp', 'old_logp']
    """
    columns: dict[str, str | Part] = {}
    dials: dict[str, Any] = {}
    for name, parameter in inspect.signature(op).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            if name in given:
                dials[name] = given.pop(name)
        elif isinstance(given.get(name), (str, Part)):
            columns[name] = given.pop(name)
        elif name in given:
            dials[name] = given.pop(name)
        elif parameter.default is inspect.Parameter.empty:
            columns[name] = name
    if given:
        raise TypeError(f"{op.__name__} has no parameter {', '.join(map(repr, given))}")
    return Part(op, columns, dials)


@dataclass(frozen=True)
class Term:
    """One summand of the objective: a loss on a stream of batches, for one role, with weight and reduction.

    `loss` gives (B, T) or, for elements, (E,); `reduce` is an op of `whet.ops.reduce`; `mask` names the column that
    says which positions count. A `Controller` as weight or dial becomes a number through `Algorithm.at`.
    """

    role: str
    stream: str
    loss: Part
    reduce: Callable[..., Tensor]
    weight: float | Controller = 1.0
    mask: str = "mask"
    dials: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What the logs call this term: role, stream and op."""
        return f"{self.role}/{self.stream}/{self.loss.op.__name__}"

    def reads(self) -> frozenset[str]:
        """Columns of the loss, and the mask."""
        return self.loss.reads() | {self.mask}

    def share(self, columns: Mapping[str, Tensor], counts: Any) -> Tensor:
        """weight x reduce(loss): this batch's share of the mini-batch whose counts are given. A scalar."""
        assert isinstance(self.weight, (int, float)), "controllers are resolved before a term is used"
        return self.weight * self.reduce(self.loss(columns), columns[self.mask], counts, **self.dials)


def controllers(term: Term) -> dict[str, Controller]:
    """The controllers among the weight and the dials of a term, by name."""
    found = {"weight": term.weight} if not isinstance(term.weight, (int, float)) else {}
    return found | {name: dial for name, dial in term.loss.dials.items() if hasattr(dial, "next")}


def resolved(term: Term, values: Mapping[str, float]) -> Term:
    """The term with its controllers replaced by these numbers."""
    weight = values.get("weight", term.weight)
    dials = {name: values.get(name, dial) if hasattr(dial, "next") else dial for name, dial in term.loss.dials.items()}
    return replace(term, weight=weight, loss=replace(term.loss, dials=dials))


def fixed(value: float | Controller) -> Controller:
    """A number as a controller that never changes it."""
    return FixedKL(float(value)) if isinstance(value, (int, float)) else value
