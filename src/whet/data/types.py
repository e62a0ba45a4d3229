"""Frozen dataclasses passed between components, with their shapes and examples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from whet.data.columns import COLUMNS
from whet.ops import Counts


@dataclass(frozen=True)
class Prompt:
    """A prompt: the token ids that a generator continues, and the data row that they come from.

    >>> Prompt("7", (5, 9, 2), ({"role": "user", "content": "hi"},), {"prompt": "hi"}).text
    'hi'
    """

    id: str
    ids: tuple[int, ...]
    messages: tuple[Mapping[str, str], ...]
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The content of the last message, passed to reward functions for a single-turn prompt."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of an answer with one author: "policy", or whoever else wrote them (a tool, an environment).

    >>> Segment("tool", 3).trained
    False
    """

    author: str
    length: int

    @property
    def trained(self) -> bool:
        """Whether the policy wrote these tokens."""
        return self.author == "policy"


@dataclass(frozen=True)
class Sample:
    """One sampled answer: its token ids (including the end token), their sampling log-probs, and its origin.

    `draw` is the running number of the prompt in the run, and `answer` the number of the answer for that prompt. `version`
    is the version of the weights that produced the last token; `versions` has that of each token if they differ.
    `sampler_logp` is in nats, one per id. `finish` is "stop", "length" or, for an answer to be continued, "paused". With
    top-p, top-k or min-p, `support` has the tokens that could be sampled at each position; where all but a few could be
    (min_new_tokens), it has -2 - id for each of the few, and nothing where all could be.

    `segments` say who wrote which tokens, in order; without any, the policy wrote all. A token of another author is not
    trained, its sampler_logp is never read, and its support is empty. It counts for the context limit, not for the length.

    >>> Sample(0, 1, (8, 2), (-0.1, -0.7), version=3, finish="stop", text="yes").truncated
    False
    """

    draw: int
    answer: int
    ids: tuple[int, ...]
    sampler_logp: tuple[float, ...]
    version: int
    finish: str
    text: str
    support: tuple[tuple[int, ...], ...] | None = None
    versions: tuple[int, ...] | None = None
    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        if self.segments and sum(one.length for one in self.segments) != len(self.ids):
            raise ValueError(
                f"the segments have {sum(one.length for one in self.segments)} tokens, the answer {len(self.ids)}"
            )

    def trained(self) -> tuple[bool, ...]:
        """Return whether the policy wrote each token."""
        if not self.segments:
            return (True,) * len(self.ids)
        return tuple(one.trained for one in self.segments for _ in range(one.length))

    def token_versions(self) -> tuple[int, ...]:
        """Return the version of the weights that produced each token."""
        return self.versions if self.versions is not None else (self.version,) * len(self.ids)

    def continued(self, later: "Sample") -> "Sample":
        """Return this paused answer with the tokens of a later call appended."""
        support = None if self.support is None or later.support is None else self.support + later.support
        versions = self.token_versions() + later.token_versions()
        return Sample(
            self.draw, self.answer, self.ids + later.ids, self.sampler_logp + later.sampler_logp, later.version,
            later.finish, later.text, support, versions if len(set(versions)) > 1 else None,
            _joined(self, later),
        )  # fmt: skip

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut off at the length limit."""
        return self.finish == "length"


def _joined(one: Sample, later: Sample) -> tuple[Segment, ...]:
    """Return the segments of an answer and its continuation; return () if the policy wrote both."""
    if not (one.segments or later.segments):
        return ()
    return tuple(part for sample in (one, later) for part in sample.segments or (Segment("policy", len(sample.ids)),))


@dataclass(frozen=True)
class Group:
    """A prompt and its answers; G = len(samples)."""

    prompt: Prompt
    samples: tuple[Sample, ...]

    def rows(self) -> list["Row"]:
        """Return one row of prompt and answer for each answer; the tokens that the policy wrote are trained."""
        return [
            Row(
                torch.tensor(self.prompt.ids + one.ids),
                len(self.prompt.ids),
                torch.tensor(one.trained(), dtype=torch.bool),
            )
            for one in self.samples
        ]


class HasWeights(Protocol):
    """An object with all weights of a model, such as the policy role."""

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight with its Hugging Face name."""


@dataclass(frozen=True)
class Weights:
    """Weights passed from a learner to a generator.

    `handle` is an object with the weights (within one process the policy role, which changes with the next update), a
    folder of safetensors files or of an adapter, or None if the generator has access to the learner.
    """

    version: int
    handle: HasWeights | Path | None


@dataclass(frozen=True, eq=False)
class Row:
    """One token sequence: ids (S,) int64, `start` the first response position (>= 1), mask (S - start,) bool.

    The mask is True on the response tokens that are trained. It is False on response tokens that the model did not
    write, such as the output of a tool or a later user turn.

    >>> row = Row(torch.tensor([5, 9, 8, 2]), 2, torch.tensor([True, True]))
    >>> row.length, row.response
    (4, 2)
    """

    ids: Tensor
    start: int
    mask: Tensor

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.ids.shape[0]

    @property
    def response(self) -> int:
        """Number of tokens from the first response position on."""
        return self.mask.shape[0]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two answers to one prompt. `probability` is that of the chosen answer being better, `margin` is by how much."""

    chosen: Row
    rejected: Row
    probability: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True, eq=False)
class Ranking:
    """K answers to one prompt and their ranks: 1 is best, equal ranks are ties."""

    rows: tuple[Row, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Labeled:
    """One answer with an absolute score."""

    row: Row
    score: float


@dataclass(frozen=True, eq=False)
class Unpaired:
    """One answer that is good or bad, and a mismatched answer, which belongs to another prompt."""

    row: Row
    mismatched: Row
    good: bool


@dataclass(frozen=True, eq=False)
class Stepped:
    """One answer with a label in [0, 1] for each step: `labels` (response,), `ends` (response,) True on each step's last token."""

    row: Row
    labels: Tensor
    ends: Tensor


Element = Row | Pair | Ranking | Labeled | Unpaired | Stepped
"""Unit of training, which is never split between micro-batches."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows with their columns, the input of parts and learners.

    `rows` has B entries; the rows of an element are adjacent. `columns` maps a name in `whet.data.columns` to a tensor
    whose first axis is B. The second axis of per-token columns is T = the length of the longest response.

    >>> batch = Batch.of([Row(torch.tensor([5, 9, 8, 2]), 2, torch.tensor([True, True]))])
    >>> batch.counts()
    Counts(tokens=2, sequences=1, elements=1)
    """

    rows: tuple[Row, ...]
    columns: Mapping[str, Tensor]

    @staticmethod
    def of(elements: Sequence[Element]) -> "Batch":
        """Make a batch of elements, with the columns of their type (such as rank, target, margin, probability)."""
        rows: list[Row] = []
        index: list[int] = []
        place: list[int] = []
        extra: dict[str, list[float]] = {}
        for number, element in enumerate(elements):
            own: tuple[Row, ...]
            numbers: dict[str, list[float]]
            match element:
                case Row():
                    own, numbers = (element,), {}
                case Pair():
                    own = (element.chosen, element.rejected)
                    numbers = {"probability": [element.probability] * 2, "margin": [element.margin] * 2}
                case Ranking():
                    own, numbers = element.rows, {"rank": list(element.ranks)}
                case Labeled():
                    own, numbers = (element.row,), {"target": [element.score]}
                case Unpaired():
                    own, numbers = (element.row, element.mismatched), {"good": [element.good] * 2}
                case Stepped():
                    own, numbers = (element.row,), {}
            rows.extend(own)
            index.extend([number] * len(own))
            place.extend(range(len(own)))
            for name, values in numbers.items():
                extra.setdefault(name, []).extend(values)
        mask, places = pad([row.mask for row in rows]), torch.tensor(place)
        columns = {"element": torch.tensor(index), "index": places, "mask": mask}
        if elements and isinstance(elements[0], Pair):
            columns["chosen_mask"] = mask & (places == 0)[:, None]
        if elements and isinstance(elements[0], Unpaired):
            good = torch.tensor([element.good for element in elements if isinstance(element, Unpaired)])
            columns["chosen_mask"] = mask & ((places == 0) & good.repeat_interleave(2))[:, None]
        stepped = [element for element in elements if isinstance(element, Stepped)]
        if stepped:
            columns |= {
                "segment_end": pad([one.ends for one in stepped]),
                "segment_label": pad([one.labels for one in stepped]),
            }
        return Batch(tuple(rows), columns | {name: torch.tensor(values) for name, values in extra.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def with_columns(self, **columns: Tensor) -> "Batch":
        """Return the same rows with columns added or replaced."""
        return replace(self, columns={**self.columns, **columns})

    def scatter(self, into: dict[str, Tensor], name: str, rows: Sequence[int], values: Tensor) -> None:
        """Write the values of these rows to the column `into[name]`, created with zeros in the size of this batch.

        values: (len(rows),), or (len(rows), T') with T' at most T of this batch.
        """
        if name not in into:
            shape = self["mask"].shape if values.ndim == 2 else self["mask"].shape[:1]
            into[name] = torch.zeros(shape, dtype=values.dtype)
        if not len(rows):
            return
        index = torch.tensor(rows)
        if values.ndim == 2:
            into[name][index, : values.shape[1]] = values
        else:
            into[name][index] = values

    def elements(self) -> list[list[int]]:
        """Return the row indices of each element, in order."""
        out: list[list[int]] = []
        before = None
        for row, element in enumerate(self["element"].tolist()):
            if element != before:
                out.append([])
            out[-1].append(row)
            before = element
        return out

    def take(self, rows: Sequence[int]) -> "Batch":
        """Return these rows as a new batch; T is the longest response among them, and elements are renumbered."""
        kept = tuple(self.rows[row] for row in rows)
        longest, index = max((row.response for row in kept), default=0), torch.tensor(rows, dtype=torch.long)
        columns = {}
        for name, column in self.columns.items():
            column = column.index_select(0, index)
            columns[name] = column[:, :longest] if COLUMNS[name].per_token else column
        columns["element"] = torch.unique_consecutive(columns["element"], return_inverse=True)[1]
        return Batch(kept, columns)

    @staticmethod
    def joined(batches: Sequence["Batch"]) -> "Batch":
        """Concatenate batches with the same columns; per-token columns are padded, elements and groups renumbered."""
        longest = max(row.response for batch in batches for row in batch.rows)
        columns: dict[str, Tensor] = {}
        for name in batches[0].columns:
            parts, first = [], 0
            widest = max(batch[name].shape[-1] for batch in batches)
            for batch in batches:
                part = batch[name]
                if part.ndim == 3:
                    part = functional.pad(part, (0, widest - part.shape[2], 0, longest - part.shape[1]), value=-1)
                elif COLUMNS[name].per_token:
                    part = functional.pad(part, (0, longest - part.shape[1]))
                if name in ("element", "group"):
                    part = torch.unique_consecutive(part, return_inverse=True)[1] + first
                    first = int(part.max()) + 1
                parts.append(part)
            columns[name] = torch.cat(parts)
        return Batch(tuple(row for batch in batches for row in batch.rows), columns)

    def counts(self, mask: str = "mask") -> Counts:
        """Count the tokens where this mask is True, the sequences with such tokens, and the elements."""
        tokens = self[mask].sum(1)
        elements = torch.unique_consecutive(self["element"]).numel()
        return Counts(int(tokens.sum()), int((tokens > 0).sum()), elements)


def pad(values: Sequence[Tensor], length: int | None = None) -> Tensor:
    """Stack 1-D tensors as (B, T), right-padded with 0 or False."""
    longest = max((value.shape[0] for value in values), default=0) if length is None else length
    out = torch.zeros(len(values), longest, dtype=values[0].dtype if values else torch.float32)
    for number, value in enumerate(values):
        out[number, : value.shape[0]] = value
    return out


def pad_support(supports: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Return the tokens that could be sampled, per answer and position, as (B, T, S) int64, padded with -1 (see `Sample`)."""
    longest = max(map(len, supports), default=0)
    widths = torch.zeros(len(supports), longest, dtype=torch.int64)
    for number, answer in enumerate(supports):
        widths[number, : len(answer)] = torch.tensor([len(one) for one in answer], dtype=torch.int64)
    widest = int(widths.max()) if widths.numel() else 0
    out = torch.full((len(supports), longest, widest), -1)
    flat = chain.from_iterable(one for answer in supports for one in answer)
    out[torch.arange(widest) < widths[..., None]] = torch.tensor(list(flat), dtype=torch.int64)
    return out
