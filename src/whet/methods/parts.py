"""Parts and terms, the components of methods.

A part is an op with the names of its columns and the values of its options. Positional parameters of the op are columns,
keyword-only parameters are options. The signature is the only declaration, so a part reads only the columns it declares.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from whet.errors import RecipeError, WhetError
from whet.ops import Controller, Counts, FixedKL, element_mean, implicit_reward, log_odds, policy_score
from whet.registry import place_of, told


@dataclass(frozen=True)
class Part:
    """An op, the source of each of its columns (a column name or another part), and its options."""

    op: Callable[..., Tensor]
    columns: Mapping[str, "str | Part"]
    options: Mapping[str, Any] = field(default_factory=dict)

    def reads(self) -> frozenset[str]:
        """Return all columns that this part and its inner parts need."""
        names: set[str] = set()
        for source in self.columns.values():
            names |= source.reads() if isinstance(source, Part) else {source}
        return frozenset(names)

    def __call__(self, columns: Mapping[str, Any]) -> Tensor:
        """Apply the op to the columns. Options that are controllers must first be resolved with `at`.

        Raises RecipeError with file and line if a user's function fails or returns a single number.
        """
        given = {
            name: source(columns) if isinstance(source, Part) else columns[source]
            for name, source in self.columns.items()
        }
        if self.own:  # it may change its columns in place
            given = {name: one.clone() if isinstance(one, Tensor) else one for name, one in given.items()}
        try:
            out = self.op(**given, **self.options)
        except (Exception, SystemExit) as error:
            own = next((one for one in self.walk() if one.own), None)
            if own is None or isinstance(error, (WhetError, torch.OutOfMemoryError)):
                raise
            after = "" if own is self else f" when {self} used its result"
            raise RecipeError(f"{own} failed with {told(error)}{after}") from error
        if self.own and isinstance(out, Tensor) and out.ndim == 0:
            raise RecipeError(f"{self}: expected a tensor with one value per token or answer, got a single number")
        return out

    def filled(self, columns: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
        """Apply the op. Raises RecipeError if the result of a user's function has another shape."""
        out = self(columns)
        if self.own and (not isinstance(out, Tensor) or tuple(out.shape) != shape):
            got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise RecipeError(f"{self}: expected a tensor of shape {shape}, got {got}")
        return out

    @property
    def own(self) -> bool:
        """Whether the op is a user's function and not one of whet's."""
        return not self.op.__module__.startswith("whet.")

    def __str__(self) -> str:
        return f"{name_of(self.op)} ({place_of(self.op)})" if self.own else name_of(self.op)

    def walk(self) -> Iterator["Part"]:
        """Iterate over this part and all its inner parts."""
        yield self
        for source in self.columns.values():
            if isinstance(source, Part):
                yield from source.walk()


def name_of(op: Callable[..., Any]) -> str:
    """Return the name of a function; for an object without a name, that of its class."""
    return str(getattr(op, "__name__", type(op).__name__))


def part(op: Callable[..., Tensor], **given: Any) -> Part:
    """Make a part from an op.

    `given` sets options (keyword-only parameters) and, for columns with another name than the parameter, the column or
    part to read. A column with a default is read only if it is given. A positional parameter may also be a plain value.

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
        raise TypeError(f"{name_of(op)} has no parameter {', '.join(map(repr, given))}")
    return Part(op, columns, options)


@dataclass(frozen=True)
class Term:
    """One term of the objective: a loss for one role on a stream of batches, with weight and reduction.

    `loss` returns (B, T) or, per element, (E,); `reduction` is an op of `whet.ops.reduce`; `mask` is the name of the mask
    column. `settled` replaces a `Controller` (as weight or option), or a weight that names a value of the state, by a
    number. `name` is the name in the logs; if empty, the name of the loss op.
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
        """The name of this term in the logs: role, stream and name."""
        return f"{self.role}/{self.stream}/{self.name or name_of(self.loss.op)}"

    def reads(self) -> frozenset[str]:
        """Return the columns of the loss, and the mask."""
        return self.loss.reads() | {self.mask}

    def share(
        self, columns: Mapping[str, Tensor], counts: Counts, masked: dict[str, dict[str, Tensor]] | None = None
    ) -> Tensor:
        """Compute weight x reduction(loss), a scalar: the part of this batch in the mini-batch with these counts. `masked` and
        errors: see `losses`."""
        return self.reduced(self.losses(columns, masked), columns[self.mask], counts)

    def reduced(self, loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
        """Compute weight x reduction of losses (B, T) or (E,), a scalar; linear in the losses."""
        assert isinstance(self.weight, (int, float)), "controllers are resolved before a term is used"
        return self.weight * self.reduction(loss, mask, counts, **self.options)

    def losses(self, columns: Mapping[str, Tensor], masked: dict[str, dict[str, Tensor]] | None = None) -> Tensor:
        """Compute the loss before the reduction, (B, T) or (E,).

        `masked` keeps the masked columns for further terms on the same columns, by the name of their mask. Raises RecipeError
        if a user's loss has another shape than the mask or no gradient.
        """
        mask, masked = columns[self.mask], {} if masked is None else masked
        if self.mask not in masked:
            masked[self.mask] = {name: _where(mask, column) for name, column in columns.items()}
        loss = self.loss(masked[self.mask])
        if any(one.own for one in self.loss.walk()):
            self._check_own(loss, masked[self.mask])
        return loss

    def _check_own(self, loss: object, columns: Mapping[str, Tensor]) -> None:
        """Raise RecipeError for a user's loss that the reduction would broadcast, or that trains nothing."""
        shape = columns[self.mask].shape
        if not isinstance(loss, Tensor):
            raise RecipeError(f"loss {self.label}: expected a tensor, got {type(loss).__name__}")
        if self.reduction is not element_mean and loss.shape != shape:
            raise RecipeError(
                f"loss {self.label}: expected one loss per token, shape {tuple(shape)} as the mask; got {tuple(loss.shape)}"
            )
        differentiable = any(isinstance(one, Tensor) and one.requires_grad for one in columns.values())
        if torch.is_grad_enabled() and differentiable and not loss.requires_grad:
            raise RecipeError(f"loss {self.label}: it has no gradient; compute it from logp, and do not detach it")


def _where(mask: Tensor, column: Tensor) -> Tensor:
    """Set a per-token column to 0 outside the mask, so that no value there (even NaN) affects the loss or the gradient."""
    per_token = column.shape == mask.shape and column.is_floating_point()
    return torch.where(mask, column, torch.zeros_like(column)) if per_token else column


State = Mapping[str, float]
"""Values that change between updates, such as one number per controller; serializable as JSON."""


def steered(terms: Sequence[Term]) -> dict[str, Controller]:
    """Return the controllers among the weights and options of the terms, by the name of their value in the state."""
    found: dict[str, Controller] = {}
    for place, term in enumerate(terms):
        if not isinstance(term.weight, (int, float, str)):
            found[f"term{place}.weight"] = term.weight
        for one in term.loss.walk():
            found |= {f"term{place}.{name}": option for name, option in one.options.items() if hasattr(option, "next")}
    return found


def settled(terms: Sequence[Term], state: State) -> tuple[Term, ...]:
    """Return the terms with controllers replaced by their values from the state."""
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
    """The objective of one update: its terms, and the statistics of the whole mini-batch that they need.

    `select` are (column, part) pairs, computed once per mini-batch with the weights before the update, without gradient.
    """

    terms: tuple[Term, ...]
    select: tuple[tuple[str, Part], ...] = ()

    def reads(self) -> frozenset[str]:
        """Return all columns that the terms and `select` need."""
        return frozenset().union(*(term.reads() for term in self.terms), *(one.reads() for _, one in self.select))

    def init(self) -> State:
        """Return the initial state."""
        return {name: controller.coef for name, controller in steered(self.terms).items()}

    def at(self, state: State) -> "Objective":
        """Return the objective with controllers replaced by their values from the state."""
        return replace(self, terms=settled(self.terms, state))

    def next(self, state: State, measured: Mapping[str, float]) -> State:
        """Return the state after an update; `measured` has "reward", the mean implicit reward."""
        return {
            name: controller.next(state[name], measured[controller.by], 0)
            for name, controller in steered(self.terms).items()
        }


def mean_reward(terms: Sequence[Term], columns: Mapping[str, Any]) -> float:
    """Compute the mean implicit reward of a mini-batch, the input of running means; 0 if no term uses it."""
    for term in terms:
        for one in term.loss.walk():
            if one.op is implicit_reward:
                rewards = one(columns)
                return float((rewards[columns["index"] == 0] if "good" in columns else rewards).mean())
    return 0.0


def answer_scores(terms: Sequence[Term], columns: Mapping[str, Any]) -> Tensor | None:
    """Compute the score that a preference loss gives to each answer (B,): its implicit reward, its log-prob or its log-odds. None
    for losses that score no answers."""
    for term in terms:
        for one in term.loss.walk():
            if one.op in (implicit_reward, policy_score, log_odds):
                return one(columns)
    return None


def fixed(value: float | Controller) -> Controller:
    """Wrap a number as a controller that keeps it constant."""
    return FixedKL(float(value)) if isinstance(value, (int, float)) else value
