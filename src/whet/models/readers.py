"""Readers: from the rows of a batch, through one role's model, to columns.

Token t of a response is predicted from the hidden state one position before it: log-prob, entropy and value are read
there; scores are read on the tokens themselves. Only response positions are read, so the head never runs over prompts.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from whet.models.dropout import Dropout
from whet.models.roles import Role
from whet.ops import entropy, linear_logprobs, token_logprobs
from whet.records import Batch, Row, pad_ids

BARE = ("logp", "entropy", "value", "final_value", "score", "token_score")
"""The columns that can be read: the first two from a causal LM, the others from a scalar head."""


def read(
    role: Role, batch: Batch, names: frozenset[str], *, packed: bool = False, dropout: Dropout | None = None
) -> dict[str, Tensor]:
    """These bare columns of the batch as this role's model gives them, with gradient where it is enabled.

    (B, T) per token, 0 outside each row's mask; (B,) for score and final_value. `packed` lays the rows out behind
    one another with a block-causal mask instead of padding them.
    """
    ids, layout, where = (_packed if packed else _padded)(batch.rows)
    ids = ids.to(role.device)
    layout = {name: tensor.to(role.device) for name, tensor in layout.items()}
    numbers = batch.columns["number"] if "number" in batch.columns else torch.arange(len(batch.rows))
    row_of, position_of = where.addresses(numbers)
    with ExitStack() as stack:
        stack.enter_context(role.active())
        if dropout is not None:
            dropout.put_on(role.model, row_of.to(role.device), position_of.to(role.device), stack)
        if names & {"logp", "entropy"} and not role.linear_head:
            flat = role.logits(ids, **layout).flatten(0, 1)
        else:
            flat = role.hidden(ids, **layout).flatten(0, 1)
        return _columns(role, batch, names, where, flat)


def _columns(role: Role, batch: Batch, names: frozenset[str], where: "_Where", flat: Tensor) -> dict[str, Tensor]:
    mask = _record_mask(batch.rows)
    row, step = mask.nonzero(as_tuple=True)
    starts = torch.tensor([r.start for r in batch.rows])
    tokens = torch.cat([r.ids[r.start :][r.mask] for r in batch.rows])
    at = where.offsets[row] + starts[row] + step  # flat index of each trained token
    out: dict[str, Tensor] = {}

    def spread(values: Tensor) -> Tensor:
        target = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
        return target.index_put((row.to(values.device), step.to(values.device)), values)

    if names & {"logp", "entropy"}:
        temperature = batch["temperature"][row] if "temperature" in batch.columns else torch.ones(len(row))
        out |= _language(role, flat[at - 1], tokens, temperature, names, spread)
    if names & {"value", "final_value", "score", "token_score"}:
        if role.head is None:
            raise ValueError(f"the {role.name} has no scalar head, so it has no {', '.join(sorted(names))}")
        # a sum over tokens is shifted once; what is read on one position carries the shift itself
        each, once = (0.0, role.shift) if role.readout == "sum" else (role.shift, 0.0)
        if "value" in names:
            out["value"] = spread(_scalar(role, flat[at - 1]) + each)
        if "final_value" in names or ("score" in names and role.readout == "last"):
            last = where.offsets + torch.tensor([_last(one) for one in batch.rows])
            out |= dict.fromkeys(names & {"final_value", "score"}, _scalar(role, flat[last]) + each)
        if "token_score" in names or ("score" in names and role.readout != "last"):
            dense = spread(_scalar(role, flat[at]) + each)
            out |= {"token_score": dense} if "token_score" in names else {}
            if "score" in names and role.readout != "last":
                total = dense.sum(1)
                mean = role.readout == "mean"
                out["score"] = total / mask.sum(1).clamp(min=1).to(total) if mean else total + once
    return out


def _language(
    role: Role, states: Tensor, tokens: Tensor, temperature: Tensor, names: frozenset[str], spread
) -> dict[str, Tensor]:
    tokens, temperature = tokens.to(states.device), temperature.to(states)
    if role.linear_head:
        head = role.model.get_output_embeddings()
        logp, uncertainty = linear_logprobs(
            states, head.weight, tokens, bias=head.bias, temperature=temperature, with_entropy="entropy" in names
        )
    else:
        logits = (states if states.dtype == torch.float64 else states.float()) / temperature[:, None]
        logp, uncertainty = token_logprobs(logits, tokens), entropy(logits) if "entropy" in names else None
    out = {"logp": spread(logp)} if "logp" in names else {}
    return out | ({"entropy": spread(uncertainty)} if uncertainty is not None and "entropy" in names else {})


def _scalar(role: Role, states: Tensor) -> Tensor:
    """The scalar head on hidden states (N, H) -> (N,), in float32 at least."""
    head = role.head
    assert head is not None
    out = functional.linear(states.to(head.weight.dtype), head.weight, head.bias)[:, 0]
    return out if out.dtype == torch.float64 else out.float()


def _last(row: Row) -> int:
    """The position of a row's last trained token, or of its last token where none is."""
    return row.start + int(row.mask.nonzero()[-1]) if bool(row.mask.any()) else row.length - 1


@dataclass(frozen=True)
class _Where:
    """Where each row begins in the flattened (B x S) positions, (B,), and the layout's shape."""

    offsets: Tensor
    shape: tuple[int, int]

    def addresses(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(row number, position in the row) of every flat position, each in the layout's shape."""
        flat = torch.arange(self.shape[0] * self.shape[1])
        index = torch.searchsorted(self.offsets, flat, right=True) - 1
        return numbers[index].reshape(self.shape), (flat - self.offsets[index]).reshape(self.shape)


def _padded(rows: Sequence[Row]) -> tuple[Tensor, dict[str, Tensor], _Where]:
    ids = pad_ids(rows)
    return (
        ids,
        {},
        _Where(torch.arange(len(rows)) * ids.shape[1], (ids.shape[0], ids.shape[1])),
    )


def _packed(rows: Sequence[Row]) -> tuple[Tensor, dict[str, Tensor], _Where]:
    """One row of all ids with positions that start anew; transformers then lets no row look at another.

    A mask made here would miss what each layer adds to it (a sliding window) and what each attention expects of it.
    """
    lengths = torch.tensor([row.length for row in rows])
    ids = torch.cat([row.ids for row in rows])[None]
    offsets = lengths.cumsum(0) - lengths
    positions = torch.arange(ids.shape[1]) - torch.repeat_interleave(offsets, lengths)
    return ids, {"position_ids": positions[None]}, _Where(offsets, (1, ids.shape[1]))


def _record_mask(rows: Sequence[Row]) -> Tensor:
    """The rows' own masks (B, T). Not the batch's column: that may have lost rows, and then the head would run over
    other positions than when the old log-probs were measured, and the ratio would not be exactly 1."""
    from whet.records import pad

    return pad([row.mask for row in rows])
