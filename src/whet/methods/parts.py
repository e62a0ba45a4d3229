"""Parts and terms: the pieces that methods are made of.

A part is an op with its options set and its columns named. The op's positional parameters are the columns it reads, its
keyword-only parameters are options; nothing else is written down, so a part cannot read what it does not say.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from whet.ops import Controller, FixedKL, implicit_reward


@dataclass(frozen=True)
class Part:
    """An op, where each of its columns comes from (a column's name, or another part), and its options."""

    op: Callable[..., Tensor]
    columns: Mapping[str, "str | Part"]
    options: Mapping[str, Any] = field(default_factory=dict)

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
        return self.op(**given, **self.options)

    def walk(self) -> Iterator["Part"]:
        """This part and every part it is made of."""
        yield self
        for source in self.columns.values():
            if isinstance(source, Part):
                yield from source.walk()


def part(op: Callable[..., Tensor], **given: Any) -> Part:
    """A part from an op: `given` names options (keyword-only parameters) and, for columns not called like the op's
    parameter, which column or part to read. An optional column is read only where it is named; a positional parameter
    may be given a plain value too.

    >>> from whet.ops import clip, token_ratio
    >>> sorted(part(clip, ratio=part(token_ratio), clip_low=0.1).reads())
    ['advantage', 'logp', 'old_logp']
    """
    columns: dict[str, str | Part] = {}
    options: dict[str, Any] = {}
    for name, parameter in inspect.signature(op).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            if name in given or parameter.default is not inspect.Parameter.empty:
                options[name] = given.pop(name, parameter.default)
        elif isinstance(given.get(name), (str, Part)):
            columns[name] = given.pop(name)
        elif name in given:
            options[name] = given.pop(name)
        elif parameter.default is inspect.Parameter.empty:
            columns[name] = name
    if given:
        raise TypeError(f"{op.__name__} has no parameter {', '.join(map(repr, given))}")
    return Part(op, columns, options)


@dataclass(frozen=True)
class Term:
    """One summand of the objective: a loss on a stream of batches, for one role, with weight and reduction.

    `loss` gives (B, T) or, for elements, (E,); `reduction` is an op of `whet.ops.reduce`; `mask` names the column that
    says which positions count. A `Controller` as weight or option becomes a number through `settled`, and so does the name of
    another number of the state as weight. `name` is what the
    logs call it; the loss's op where it is empty.
    """

    role: str
    stream: str
    loss: Part
    reduction: Callable[..., Tensor]
    weight: float | Controller | str = 1.0
    mask: str = "mask"
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def label(self) -> str:
        """What the logs call this term: role, stream and name."""
        return f"{self.role}/{self.stream}/{self.name or self.loss.op.__name__}"

    def reads(self) -> frozenset[str]:
        """Columns of the loss, and the mask."""
        return self.loss.reads() | {self.mask}

    def share(self, columns: Mapping[str, Tensor], counts: Any) -> Tensor:
        """weight x reduction(loss): this batch's share of the mini-batch whose counts are given. A scalar."""
        assert isinstance(self.weight, (int, float)), "controllers are resolved before a term is used"
        mask = columns[self.mask]
        kept = {name: _where(mask, column) for name, column in columns.items()}
        return self.weight * self.reduction(self.loss(kept), mask, counts, **self.options)


def _where(mask: Tensor, column: Tensor) -> Tensor:
    """A per-token column with 0 outside the mask: what stands there must reach neither a loss nor a gradient, NaN neither."""
    per_token = column.shape == mask.shape and column.is_floating_point()
    return torch.where(mask, column, torch.zeros_like(column)) if per_token else column


State = Mapping[str, float]
"""What changes between updates: small, JSON, one number a controller."""


def steered(terms: Sequence[Term]) -> dict[str, Controller]:
    """Every controller among the weights and options of these terms, by the name its number has in the state."""
    found: dict[str, Controller] = {}
    for place, term in enumerate(terms):
        if not isinstance(term.weight, (int, float, str)):
            found[f"term{place}.weight"] = term.weight
        for one in term.loss.walk():
            found |= {f"term{place}.{name}": option for name, option in one.options.items() if hasattr(option, "next")}
    return found


def settled(terms: Sequence[Term], state: State) -> tuple[Term, ...]:
    """The terms with plain numbers from the state in place of their controllers."""
    out = []
    for place, term in enumerate(terms):
        values = {key.split(".")[1]: value for key, value in state.items() if key.startswith(f"term{place}.")}
        weight = state[term.weight] if isinstance(term.weight, str) else values.get("weight", term.weight)
        out.append(replace(term, weight=weight, loss=_with_numbers(term.loss, values)))
    return tuple(out)


def _with_numbers(one: Part, values: Mapping[str, float]) -> Part:
    columns = {
        name: _with_numbers(source, values) if isinstance(source, Part) else source
        for name, source in one.columns.items()
    }
    options = {
        name: values.get(name, option) if hasattr(option, "next") else option for name, option in one.options.items()
    }
    return Part(one.op, columns, options)


@dataclass(frozen=True)
class Objective:
    """What one update minimizes: its terms, and what is looked up across the whole mini-batch before it.

    `select` are (column, part) pairs, computed once per mini-batch at the weights of then, without gradient.
    """

    terms: tuple[Term, ...]
    select: tuple[tuple[str, Part], ...] = ()

    def reads(self) -> frozenset[str]:
        """Every column that the terms and the look across the mini-batch need."""
        return frozenset().union(*(term.reads() for term in self.terms), *(one.reads() for _, one in self.select))

    def init(self) -> State:
        """The small state at the start."""
        return {name: controller.coef for name, controller in steered(self.terms).items()}

    def at(self, state: State) -> "Objective":
        """The objective with plain numbers in place of its controllers."""
        return replace(self, terms=settled(self.terms, state))

    def next(self, state: State, measured: Mapping[str, float]) -> State:
        """The state after an update at which `measured` was seen: "reward", the mean implicit reward."""
        return {
            name: controller.next(state[name], measured[controller.by], 0)
            for name, controller in steered(self.terms).items()
        }


def mean_reward(terms: Sequence[Term], columns: Mapping[str, Any]) -> float:
    """The mean implicit reward of a mini-batch's answers as its update saw them: what running means follow; 0 without any."""
    for term in terms:
        for one in term.loss.walk():
            if one.op is implicit_reward:
                rewards = one(columns)
                return float((rewards[columns["index"] == 0] if "good" in columns else rewards).mean())
    return 0.0


def fixed(value: float | Controller) -> Controller:
    """A number as a controller that never changes it."""
    return FixedKL(float(value)) if isinstance(value, (int, float)) else value
