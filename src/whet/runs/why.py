"""whet.why: the answers of a step token by token, and what each token adds to the logged loss."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet import ops
from whet.data import Batch
from whet.distributed import launched
from whet.errors import RecipeError
from whet.loops.replay import OfflineReplay, OnlineReplay, Portion, Update
from whet.loops.tables import cell, table
from whet.methods.algorithm import clipped, clipping
from whet.methods.parts import Part
from whet.runs.replay import beginning, compared, opened, recomputed
from whet.terminal import visible

ROUNDING = 1e-5
"""Largest difference between the sum of the shares and the logged loss, relative to the sum of their sizes."""
EXCERPT = 60
"""Characters of an answer in the table of the samples."""
OWN = ("rollout", "train")
"""The streams whose elements are the samples of a step. Others, such as ptx, are not of the rollout."""


@dataclass
class Shares:
    """The shares of the elements of a step in its logged losses, by the label of the term.

    A logged loss is the mean over the updates of the step that have the term. So a share is the sum over these updates of
    weight x coefficient of the reduction x loss, divided by the number of these updates. `tokens` (B, T) has terms with a loss
    per token, `elements` (E,) those with a loss per element, `others` what belongs to no element of the rollout: pre-training
    rows, and losses of a router.
    """

    logged: dict[str, float]
    tokens: dict[str, Tensor] = field(default_factory=dict)
    elements: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    sizes: float = 0.0

    def of_element(self, rows: Sequence[int], element: int) -> dict[str, float]:
        """Return the share of an element in each term."""
        out = {label: float(values[list(rows)].sum()) for label, values in self.tokens.items()}
        for label, values in self.elements.items():
            out[label] = out.get(label, 0.0) + float(values[element])
        return out

    @property
    def total(self) -> float:
        """The sum of all shares of all terms."""
        return self.of_samples + math.fsum(self.others.values())

    @property
    def of_samples(self) -> float:
        """The sum of the shares of the samples."""
        return math.fsum(float(one.sum()) for one in [*self.tokens.values(), *self.elements.values()])

    @property
    def loss(self) -> float:
        """The sum of the logged losses of all terms."""
        return math.fsum(self.logged.values())

    @property
    def agree(self) -> bool:
        """Whether the shares sum to the logged loss to rounding."""
        return abs(self.total - self.loss) <= ROUNDING * max(self.sizes, abs(self.loss))


@dataclass(frozen=True)
class Explained:
    """The result of `whet.why`. `samples` has one dict per sample of the step with its shares, `tokens` one per token of the
    chosen sample (empty without one), `heading` the lines before the table. `equal` is True if the shares sum to the logged loss
    and the step was computed with the same bits."""

    shares: Shares
    samples: list[dict[str, Any]]
    tokens: list[dict[str, Any]]
    heading: list[str]
    equal: bool

    def __str__(self) -> str:
        rows = self.tokens or sorted(self.samples, key=lambda row: -abs(row["share"]))
        names = list(dict.fromkeys(name for row in rows for name in row))
        shown = [table(names, [[row.get(name) for name in names] for row in rows])] if rows else []
        return visible("\n".join([*self.heading, *shown]), layout=True)


def why(
    run: str | Path,
    step: int,
    sample: int | None = None,
    *,
    accept_changed: str | Sequence[str] = (),
    quiet: bool = True,
) -> Explained:
    """Compute a step (from 1) of the run in a folder again, and return what each token of a sample adds to the logged loss. A
    sample (from 0) is an element of the step: an answer, a pair of answers, a row, a pair or a ranking of the data. Without
    one, the result has the shares of all samples. `print(result)` shows a table. docs/inspect.md explains its columns.

    Raises RecipeError as `whet.replay`, for several workers, and for a sample that the step does not have.
    """
    if launched():
        raise RecipeError("why: it computes in one process; call it without torchrun")
    past = opened(run, step, accept_changed)
    loop = recomputed(past, watch=True, quiet=quiet)
    elements = loop.batch.elements() if loop.batch.rows else []
    if sample is not None and (
        isinstance(sample, bool) or not isinstance(sample, int) or not 0 <= sample < len(elements)
    ):
        raise RecipeError(f"--sample {sample}: step {step} has {len(elements)} samples, 0 to {len(elements) - 1}")
    again = compared(past, loop)
    shares = shares_of(loop, past.logged)
    view = _View(loop, past.job.tokenizer, shares)
    samples = [view.summary(one) for one in range(len(elements))]
    heading = [f"{past.method}, step {step}: {_sums(loop, shares, len(elements))}", beginning(past), *past.notes]
    heading += [] if again.equal else [f"caution: {again.verdict()}"]
    heading += [] if sample is None else view.heading(sample, samples[sample])
    tokens = [] if sample is None else list(view.tokens(sample))
    return Explained(shares, samples, tokens, heading, again.equal and shares.agree)


def _sums(loop: OnlineReplay | OfflineReplay, shares: Shares, count: int) -> str:
    """Return in words that the shares sum to the logged loss, or do not."""
    if not loop.updates:
        return "no update was made"
    others = "".join(f"; {value:.9g} of {label} is of no sample" for label, value in shares.others.items())
    others += f"; together {shares.total:.9g}" if others else ""
    told = "which is" if shares.agree else "WHICH IS NOT"
    updates = f", the mean over {len(loop.updates)} updates" if len(loop.updates) > 1 else ""
    each = ", ".join(f"{label} {value:.6g}" for label, value in shares.logged.items())
    sums = f"the shares of {count} samples sum to {shares.of_samples:.9g}{others}"
    return f"{sums}, {told} the logged loss {shares.loss:.9g}{updates} ({each})"


def shares_of(loop: OnlineReplay | OfflineReplay, line: Mapping[str, float]) -> Shares:
    """Return the shares of the elements of the last step in its logged losses; `line` has the logged numbers."""
    prefix = "loss/" if isinstance(loop, OnlineReplay) else ""
    labels = dict.fromkeys(label for update in loop.updates for label in update.losses)
    shares = Shares({label: float(line.get(f"{prefix}{label}", math.nan)) for label in labels})
    for update in loop.updates:
        for label, loss in update.losses.items():
            times = sum(label in one.losses for one in loop.updates)
            own = [one for one in update.portions if one.term.label == label]
            for portion in own:
                _add(shares, loop.batch, update, portion, times)
            if not own:  # a loss that is no term: of a router
                shares.others[label] = shares.others.get(label, 0.0) + loss / times
                shares.sizes += abs(loss) / times
    return shares


def _add(shares: Shares, batch: Batch, update: Update, portion: Portion, times: int) -> None:
    """Add the shares of a micro-batch to those of the step, divided by `times`."""
    label, values = portion.term.label, portion.shares.cpu() / times
    shares.sizes += float(values.abs().sum())
    if portion.term.stream not in OWN:
        shares.others[label] = shares.others.get(label, 0.0) + float(values.sum())
    elif values.ndim == 2:
        whole = shares.tokens.setdefault(label, torch.zeros(batch["mask"].shape, dtype=torch.float64))
        whole[_rows(batch, update, portion), : values.shape[1]] += values
    else:
        whole = shares.elements.setdefault(label, torch.zeros(len(batch.elements()), dtype=torch.float64))
        whole[_elements(batch, update, portion)] += values


def _rows(batch: Batch, update: Update, portion: Portion) -> list[int]:
    """Return the rows of the step's batch of a micro-batch."""
    elements = batch.elements()
    mini = [row for one in update.mini.index for row in elements[one]]
    return [mini[number] for number in portion.columns["number"].tolist()]


def _elements(batch: Batch, update: Update, portion: Portion) -> list[int]:
    """Return the elements of the step's batch of a micro-batch."""
    owner = {row: number for number, rows in enumerate(batch.elements()) for row in rows}
    return list(dict.fromkeys(owner[row] for row in _rows(batch, update, portion)))


class _View:
    """The samples of a recomputed step as lines and rows of tables."""

    def __init__(self, loop: OnlineReplay | OfflineReplay, tokenizer: Any, shares: Shares) -> None:
        self.loop, self.batch, self.tokenizer, self.shares = loop, loop.batch, tokenizer, shares
        self.elements = self.batch.elements() if self.batch.rows else []
        self.seen = dict(self.batch.columns)
        self.clip: Part | None = None
        self.places: dict[tuple[int, int], list[tuple[Portion, int]]] = {}
        for number, update in enumerate(loop.updates):
            for portion in update.portions:
                rows = _rows(self.batch, update, portion) if portion.term.stream in OWN else []
                for place, row in enumerate(rows):
                    self.places.setdefault((number, row), []).append((portion, place))
        if isinstance(loop, OnlineReplay):
            self.seen |= _td_errors(loop)
            self.clip = clipping(loop.algorithm)

    def first_update(self, row: int) -> dict[str, Tensor]:
        """Return the columns of a row in the first update that contains it: the measured ones, and those computed with the weights
        before this update. Without an update, these are the measured ones."""
        number = next((one for one in range(len(self.loop.updates)) if (one, row) in self.places), 0)
        out: dict[str, Tensor] = {}
        for portion, place in self.places.get((number, row), ()):
            columns = dict(portion.columns)
            if {"logp", "old_logp"} <= columns.keys():
                columns["ratio"] = (columns["logp"] - columns["old_logp"]).exp()
            if self.clip is not None and {"logp", *self.clip.reads()} <= columns.keys():
                columns["ratio"], parts = clipped(columns, self.clip)
                held = [parts[name] for name in ("clip_fraction", "dual_clip_fraction") if name in parts]
                columns["clipped"] = torch.stack(held).any(0)
            out = {name: values[place].cpu() for name, values in columns.items()} | out
        return {name: values[row] for name, values in self.batch.columns.items()} | out

    def kl(self, row: int, now: Mapping[str, Tensor]) -> Tensor | None:
        """Return the estimate of KL(policy || reference) per token of a row, in nats: that of the penalty, else the exact one, else
        the log-ratio."""
        seen = {name: values[row] for name, values in self.seen.items() if values.ndim == 2}
        for name in ("kl", "old_exact_kl"):
            if name in seen:
                return seen[name]
        own = seen.get("old_full_logp", seen.get("old_logp", now.get("full_logp", now.get("logp"))))
        return None if own is None or "ref_logp" not in seen else own - seen["ref_logp"][: len(own)]

    def summary(self, sample: int) -> dict[str, Any]:
        """Return a sample as a row of the table of all samples."""
        rows = self.elements[sample]
        shares = self.shares.of_element(rows, sample)
        out: dict[str, Any] = {"sample": sample}
        if isinstance(self.loop, OfflineReplay):
            source, index = self.loop.order[self.loop.step][sample]
            out["element"] = index if len(self.loop.sources) == 1 else f"{index} of data {source}"
        elif len(rows) > 1:
            keys = self.loop.whole["address"].tolist()
            out["answers"] = " / ".join(str(keys.index(one)) for one in self.batch["address"][rows].tolist())
        out["share"] = math.fsum(shares.values())
        out |= {f"share {label}": value for label, value in shares.items() if len(self.shares.logged) > 1}
        nows = [self.first_update(row) for row in rows]
        facts: dict[str, list[Any]] = {
            "score": [float(now["score"]) if "score" in now else None for now in nows],
            self.gap: [self._summed(self.kl(row, now), row) for row, now in zip(rows, nows, strict=True)],
            "length": [int(self.batch["mask"][row].sum()) for row in rows],
        }
        for name, values in facts.items():
            if None not in values:
                out[name] = values[0] if len(values) == 1 else " / ".join(f"{one:.6g}" for one in values)
        return out | {"text": " / ".join(repr(self._text(row)[:EXCERPT]) for row in rows)}

    @property
    def gap(self) -> str:
        """The head of the column with the distance to the reference."""
        return "kl" if isinstance(self.loop, OnlineReplay) else "log_ratio"

    def _summed(self, values: Tensor | None, row: int) -> float | None:
        return None if values is None else float(values[self.batch["mask"][row][: len(values)]].sum())

    def _text(self, row: int) -> str:
        own = self.batch.rows[row]
        return str(self.tokenizer.decode(own.ids[own.start :].tolist()))

    def heading(self, sample: int, summary: Mapping[str, Any]) -> list[str]:
        """Return the facts of a sample as lines: its prompt, scores, and its shares in each update."""
        rows = self.elements[sample]
        start = self.batch.rows[rows[0]]
        prompt = visible(str(self.tokenizer.decode(start.ids[: start.start].tolist())))
        lines = [
            f"prompt: {prompt}",
            ", ".join(f"{name} {cell(one)}" for name, one in summary.items() if name != "text"),
        ]
        if isinstance(self.loop, OnlineReplay):
            for number, one in enumerate(self.loop.rewards):
                each = " / ".join(
                    f"{float(self.batch['rewards'][row, number]):.6g}"
                    if bool(self.batch["reward_applies"][row, number])
                    else "does not apply"
                    for row in rows
                )
                lines.append(f"reward {one.name}, weight {one.weight:.6g}: {each}")
        updates = [one for one in enumerate(self.loop.updates, 1) if sample in one[1].mini.index]
        for number, update in updates if len(self.loop.updates) > 1 else ():
            alone = shares_of_update(self.batch, update).of_element(rows, sample)
            each = ", ".join(f"{label} {value:.6g}" for label, value in alone.items())
            epoch, place = update.mini.epoch + 1, update.mini.number + 1
            lines.append(f"update {number} (epoch {epoch}, mini-batch {place}), share of its loss: {each}")
        if len(updates) > 1:
            lines.append(
                "logp, ratio, clipped and entropy are those of the first of these updates, the shares those of all"
            )
        if self.shares.elements:
            lines.append(
                f"{', '.join(self.shares.elements)}: one loss for the sample, so its share is not of single tokens"
            )
        return lines

    def tokens(self, sample: int) -> Iterator[dict[str, Any]]:
        """Yield the tokens of a sample as rows of a table."""
        for place, row in enumerate(self.elements[sample]):
            now = self.first_update(row)
            own, mask = self.batch.rows[row], self.batch["mask"][row].tolist()
            values = self._values(row, now)
            for position, token in enumerate(own.ids[own.start :].tolist()):
                out: dict[str, Any] = {"row": place} if len(self.elements[sample]) > 1 else {}
                out |= {
                    "position": position,
                    "id": token,
                    "token": repr(self.tokenizer.decode([token])),
                    "trained": mask[position],
                }
                for name, column in values.items():
                    trained = mask[position] or name.startswith(("share", "reward"))
                    out[name] = column[position].item() if trained and position < len(column) else None
                yield out

    def _values(self, row: int, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the columns of a row that are shown, by their heads, (T,) each."""
        seen = {name: values[row] for name, values in self.seen.items()}
        out = {
            "reward": seen.get("token_reward"), "logp": now.get("logp"), "ref_logp": seen.get("ref_logp"),
            self.gap: self.kl(row, now), "value": seen.get("old_value"), "td_error": seen.get("td_error"),
            "advantage": seen.get("advantage"), "ratio": now.get("ratio"), "clipped": now.get("clipped"),
            "correction": seen.get("correction"), "entropy": now.get("entropy"),
        }  # fmt: skip
        if isinstance(self.loop, OfflineReplay):
            out["token_score"] = now.get("token_score")
        shares = {f"share {label}": values[row] for label, values in self.shares.tokens.items()}
        if len(shares) > 1:
            shares = {"share": torch.stack(list(shares.values())).sum(0), **shares}
        return {name: values for name, values in out.items() if values is not None and values.ndim == 1} | shares


def shares_of_update(batch: Batch, update: Update) -> Shares:
    """Return the shares of the elements in the losses of one update alone."""
    shares = Shares(dict(update.losses))
    for portion in update.portions:
        _add(shares, batch, update, portion, 1)
    return shares


def _td_errors(loop: OnlineReplay) -> dict[str, Tensor]:
    """Return r + gamma V(next) - V of each token, (B, T), as td_error: the advantage with lambda 0. {} without a critic."""
    advantage = loop.algorithm.advantage
    for one in () if advantage is None else advantage.walk():
        if one.op in (ops.gae, ops.gae_adaptive) and "old_value" in loop.batch.columns:
            options = {"gamma": one.options["gamma"], "gae_lambda": 0.0}
            return {"td_error": Part(ops.gae, one.columns, options)(loop.batch.columns)}
    return {}
