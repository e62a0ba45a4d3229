"""Readers: compute the columns of a batch with the model of one role, rows padded or packed.

Token t of a response is predicted from the hidden state one position before it. Log-prob, entropy and value are computed
from that state; scores are computed at the token itself. The head runs only on response positions, not on prompts.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from whet.data import Batch, Row, pad_ids
from whet.errors import ModelError
from whet.models.dropout import Dropout
from whet.models.packing import Packed, Pieces, Places, pieces_of_forward, uses
from whet.models.roles import Role
from whet.models.router import Routed
from whet.models.shell import through
from whet.ops import entropy, exact_kl, linear_collision, linear_kl, linear_tokens, token_logprobs
from whet.ops.head import precise

LANGUAGE = frozenset({"logp", "full_logp", "entropy", "full_entropy", "collision", "exact_kl", "correct"})
ATTENTION: dict[str, Callable[[Tensor], Tensor]] = {
    "attention_mean": lambda weights: weights.mean(1),
    "attention_max": lambda weights: weights.amax(1),
}
SCALAR = frozenset({"value", "final_value", "score", "token_score"})
BY_ROLE = {"policy": LANGUAGE | ATTENTION.keys(), "reward": SCALAR, "critic": SCALAR}
"""Columns that the model of a trained role can compute."""
BARE = LANGUAGE | ATTENTION.keys() | SCALAR
"""Columns that can be computed: from the head of a causal LM, from its attention, or from a scalar head."""


def read(
    role: Role,
    batch: Batch,
    names: frozenset[str],
    *,
    packed: bool = False,
    shared: bool = False,
    dropout: Dropout | None = None,
    reference: Role | None = None,
    routed: list[Routed] | None = None,
) -> dict[str, Tensor]:
    """Compute these columns of the batch (names in `BARE`) with the role's model, with gradient if it is enabled.

    Columns are (B, T) per token, 0 outside the mask of each row, and (B,) for score and final_value. `packed` concatenates
    the rows instead of padding them (see `packs`), and `shared` then computes a prompt once for all rows that have it, except
    with `dropout` or `routed`, which look at each token of each row. A role that the probe found to be disturbed by this is read
    without, and one that padding disturbs is read row by row. exact_kl is the KL to `reference`. If the batch has a support,
    logp and entropy are of the truncated distribution, full_logp and full_entropy of the distribution over the whole
    vocabulary. Ids that no token has (`Role.missing`) have probability 0. The sums of the role's router over the tokens of
    the batch are appended to `routed`.
    """
    other = None
    if "exact_kl" in names:
        if reference is None:
            raise ValueError("the exact KL needs a reference model, but there is none")
        other = _other(reference, batch, packed, shared)
    shared = shared and dropout is None and routed is None
    return through(role, _read_off, role, batch, names, packed, shared, dropout, other, routed)


def _read_off(
    role: Role,
    batch: Batch,
    names: frozenset[str],
    packed: bool,
    shared: bool,
    dropout: Dropout | None,
    other: "_Other | None",
    routed: list[Routed] | None,
) -> dict[str, Tensor]:
    """Implement `read`, inside the forward of the role's shell, where the weights are available."""
    if role.whole_text:
        return _text_scores(role, batch, names, dropout)
    if names & ATTENTION.keys():
        rest = names - ATTENTION.keys()
        out = _read_off(role, batch, rest, packed, shared, dropout, other, routed) if rest else {}
        return out | _attention(role, batch, names & ATTENTION.keys())
    layouts, places = _laid_out(role, batch.rows, packed, shared)
    numbers = batch.columns["number"] if "number" in batch.columns else torch.arange(len(batch.rows))
    with ExitStack() as stack:
        stack.enter_context(role.active())
        if dropout is not None and len(layouts) > 1:
            raise ModelError(f"train.dropout: rows of the {role.name} are read one by one; leave it out")
        if dropout is not None:
            row_of, position_of = layouts[0].addresses(places.own, numbers)
            dropout.put_on(role.model, row_of.to(role.device), position_of.to(role.device), stack)
        flat = _forward(role, layouts, role.linear_head or not names & LANGUAGE, batch.rows, routed)
    with role.active():
        return _columns(role, batch, names, places, flat, other)


@dataclass(frozen=True)
class _Other:
    """Input of the exact KL from the reference: hidden states of the trained tokens and the head, or their logits."""

    states: Tensor
    weight: Tensor | None
    bias: Tensor | None


@torch.no_grad()
def _other(reference: Role, batch: Batch, packed: bool, shared: bool) -> _Other:
    states = through(reference, _states, reference, batch, packed, shared)["states"]
    if not reference.linear_head:
        return _Other(reference.close(states), None, None)
    head = reference.model.get_output_embeddings()
    weight = reference.gather(head.weight)
    bias = None if head.bias is None else reference.gather(head.bias)
    return _Other(states, weight, reference.output_bias(bias, weight, len(weight)))


def _states(reference: Role, batch: Batch, packed: bool, shared: bool) -> dict[str, Tensor]:
    layouts, places = _laid_out(reference, batch.rows, packed, shared)
    with reference.active():
        flat = _forward(reference, layouts, reference.linear_head)
    return {"states": _taken(flat, _Trained.of(batch).at(places, -1))}


def packs(role: Role, rows: Sequence[Row], packed: bool = True) -> bool:
    """Return whether these rows are read in one sequence if `packed` asks for it: the probe found it right, and no row is longer
    than the model's local attention (a sliding window, chunks), which packed rows do not have."""
    wide = role.paths.window is None or max(row.length for row in rows) <= role.paths.window
    return packed and wide and not role.whole_text and role.paths.packing is not False


def shares(role: Role, shared: bool = True) -> bool:
    """Return whether a prompt of packed rows is computed once if `shared` asks for it: the probe did not find it wrong."""
    return shared and role.paths.sharing is not False


def _laid_out(role: Role, rows: Sequence[Row], packed: bool, shared: bool) -> tuple[list["_Layout"], Places]:
    """Return the inputs of one or more forwards of the role, and where the tokens of each row are in their flat positions."""
    lengths = torch.tensor([row.length for row in rows])
    joined = Places.plain(lengths.cumsum(0) - lengths)
    if role.paths.limit is not None and int(lengths.max()) > role.paths.limit:
        if role.shell is not None:  # processes with other numbers of forwards would wait for each other
            raise ModelError(
                f"the numbers of the {role.name} depend on the longest row of a batch beyond {role.paths.limit} tokens, so such rows "
                "are read one by one, which sharded weights do not allow; lower --data.max-tokens, or set --learner ddp"
            )
        return [_Layout(row.ids[None]) for row in rows], joined
    if packs(role, rows, packed) and uses(role.model):
        found = Packed.of(rows, shares(role, shared))
        return [_Layout(found.ids, found.pieces.positions(), found.pieces)], found.places
    if packs(role, rows, packed):
        return [_packed(rows)], joined
    if role.paths.padding is False:
        return [_Layout(row.ids[None]) for row in rows], joined
    ids = pad_ids(rows)
    return [_Layout(ids)], Places.plain(torch.arange(len(rows)) * ids.shape[1])


def _forward(
    role: Role,
    layouts: Sequence["_Layout"],
    hidden: bool,
    rows: Sequence[Row] = (),
    routed: list[Routed] | None = None,
) -> Tensor:
    """Return the hidden states (N, H) or the logits (N, V) of all positions of the layouts, flat."""
    parts = []
    for layout in layouts:
        more, ids = layout.more(role.device), layout.ids.to(role.device)
        if routed is None or role.router is None:
            with pieces_of_forward(layout.pieces):
                states = (role.hidden if hidden else role.logits)(ids, **more)
        else:
            with pieces_of_forward(layout.pieces):
                states, logits = role.routed(ids, hidden, **more)
            real = torch.ones(layout.ids.shape, dtype=torch.bool)
            if len(layouts) == 1 and len(layout.ids) == len(rows):  # padded
                real = torch.arange(real.shape[1]) < torch.tensor([row.length for row in rows])[:, None]
            routed.append(role.router.sums(logits, real.flatten()))
        parts.append(states.flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _text_scores(role: Role, batch: Batch, names: frozenset[str], dropout: Dropout | None) -> dict[str, Tensor]:
    """Compute the score of each row with the forward of the model's own class, (B,)."""
    if names != {"score"} or dropout is not None:
        what = (
            "trained with dropout" if dropout is not None else f"asked for its {', '.join(sorted(names - {'score'}))}"
        )
        raise ModelError(
            f"{role.model.name_or_path}: the {type(role.model).__name__} of the {role.name} is not a linear head on its last "
            f"token, so it has one score per text and cannot be {what}; use a reward model whose class reads the last token"
        )
    with role.active():
        scores = role.text_scores([row.ids for row in batch.rows])
    return {"score": precise(scores) + role.shift}


@torch.no_grad()
def _attention(role: Role, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
    """Compute the attention of each answer's last trained token to its trained tokens, (B, T).

    It is that of the last layer, combined over the heads and normalized to sum 1.
    """
    ids, mask = pad_ids(batch.rows).to(role.device), _record_mask(batch.rows)
    last = torch.tensor([_last(one) for one in batch.rows])
    with role.active():
        if role.paths.padding is False:
            each = [
                role.attention(row.ids[None].to(role.device))[0, :, at]
                for row, at in zip(batch.rows, last, strict=True)
            ]
            weights = torch.stack([functional.pad(one, (0, ids.shape[1] - one.shape[1])) for one in each])
        else:
            weights = role.attention(ids)[torch.arange(len(last)), :, last]  # (B, heads, S)
    starts = torch.tensor([one.start for one in batch.rows])
    places = (starts[:, None] + torch.arange(mask.shape[1])).clamp(max=ids.shape[1] - 1)
    out = {}
    for name in names:
        joined = ATTENTION[name](weights.double()).cpu().gather(1, places)
        kept = torch.where(mask, joined, torch.zeros_like(joined))
        out[name] = (kept / kept.sum(1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)).to(weights.dtype)
    return out


def _columns(
    role: Role,
    batch: Batch,
    names: frozenset[str],
    places: Places,
    flat: Tensor,
    other: _Other | None,
) -> dict[str, Tensor]:
    trained = _Trained.of(batch)
    mask, row, step = trained.mask, trained.row, trained.step
    tokens = torch.cat([r.ids[r.start :][r.mask] for r in batch.rows])
    out: dict[str, Tensor] = {}

    def states(shift: int = 0) -> Tensor:
        return _taken(flat, trained.at(places, shift))

    def of_rows(positions: list[int]) -> Tensor:
        return _taken(flat, places.at(torch.arange(len(positions)), torch.tensor(positions)))

    def spread(values: Tensor) -> Tensor:
        target = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
        return target.index_put((row.to(values.device), step.to(values.device)), values)

    if names & LANGUAGE:
        temperature = _temperature(batch, row)
        support = batch["support"][row, step] if "support" in batch.columns else None
        before = states(-1)
        some = batch["entropy_at"][row, step] if "entropy_at" in batch.columns and "full_entropy" not in names else None
        read_off = _language(role, before, tokens, temperature, support, names, some)
        if other is not None:
            read_off["exact_kl"] = _exact_kl(role, before, other, temperature)
        out |= {name: spread(values) for name, values in read_off.items() if name in names}
    if names & SCALAR:
        if role.head is None:
            raise ValueError(f"the {role.name} has no scalar head, so it has no {', '.join(sorted(names))}")
        # add the shift once to a sum over tokens, else to the score of each position
        each, once = (0.0, role.shift) if role.readout == "sum" else (role.shift, 0.0)
        if "value" in names:
            out["value"] = spread(_scalar(role, states(-1)) + each)
        if "final_value" in names:
            out["final_value"] = _scalar(role, of_rows([_last(one) for one in batch.rows])) + each
        if "score" in names and role.readout == "last":
            out["score"] = _scalar(role, of_rows([_scored(one, role.pad_id) for one in batch.rows])) + each
        if "token_score" in names or ("score" in names and role.readout != "last"):
            dense = spread(_scalar(role, states()) + each)
            out |= {"token_score": dense} if "token_score" in names else {}
            if "score" in names and role.readout != "last":
                total = dense.sum(1)
                mean = role.readout == "mean"
                out["score"] = total / mask.sum(1).clamp(min=1).to(total) if mean else total + once
    return out


def _temperature(batch: Batch, row: Tensor) -> Tensor | None:
    """Return the temperature of each trained token, (N,), or None if all are 1."""
    if "temperature" not in batch.columns or bool((batch["temperature"] == 1).all()):
        return None
    return batch["temperature"][row]


def _language(
    role: Role,
    states: Tensor,
    tokens: Tensor,
    temperature: Tensor | None,
    support: Tensor | None,
    names: frozenset[str],
    some: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute logp, entropy, correct, full_logp, full_entropy and collision of the trained tokens, (N,) each, if in `names`. With
    `some` (N,) bool, the entropy is computed for these tokens alone, without gradient, and 0 for the others."""
    tokens = tokens.to(states.device)
    temperature = None if temperature is None else temperature.to(states.device, _precise(states))
    support = None if support is None else support.to(states.device)
    out: dict[str, Tensor] = {}
    if role.linear_head:
        head = role.model.get_output_embeddings()
        weight, bias = head.weight, role.output_bias(head.bias, head.weight, len(head.weight))
    else:  # the states are logits
        states, weight, bias = states.to(_precise(states)), None, None

    def logprobs(within: Tensor | None, with_entropy: bool | Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        if weight is not None:
            return linear_tokens(
                states, weight, tokens, bias=bias, temperature=temperature, support=within, with_entropy=with_entropy
            )
        logits = _divided(role.close(states), temperature)
        uncertainty = None if with_entropy is False else _entropies(logits, within, with_entropy)
        logp = token_logprobs(logits, tokens, support=within)
        return logp, uncertainty, logits.gather(1, tokens[:, None])[:, 0] == logits.amax(1)

    if names & {"logp", "entropy", "correct"} or (support is None and names & {"full_logp", "full_entropy"}):
        uncertain = "entropy" in names or (support is None and "full_entropy" in names)
        out |= _named(names, "", *logprobs(support, some if uncertain and some is not None else uncertain))
    if support is None:
        out |= {name: out[name.removeprefix("full_")] for name in names & {"full_logp", "full_entropy"}}
    elif names & {"full_logp", "full_entropy"}:
        out |= _named(names, "full_", *logprobs(None, "full_entropy" in names))
    if "collision" in names:
        if weight is None:
            weight = torch.eye(states.shape[1], dtype=states.dtype, device=states.device)
            bias = role.output_bias(None, states, states.shape[1])
        out["collision"] = linear_collision(states, weight, bias=bias, temperature=temperature, support=support)
    return out


def _named(
    names: frozenset[str], prefix: str, logp: Tensor, uncertainty: Tensor | None, correct: Tensor
) -> dict[str, Tensor]:
    """Return the log-prob, the entropy and whether the token is the most likely one, by column name; the prefix is "full_" for the
    whole vocabulary."""
    out = {f"{prefix}logp": logp} | ({"correct": correct.to(logp.dtype)} if not prefix else {})
    return out | ({f"{prefix}entropy": uncertainty} if uncertainty is not None else {})


def _entropies(logits: Tensor, support: Tensor | None, some: bool | Tensor) -> Tensor:
    """Compute the entropy of logits (N, V), (N,); with `some` (N,) bool of these tokens alone, without gradient."""
    if isinstance(some, bool):
        return entropy(logits, support=support)
    out, index = logits.new_zeros(len(logits)), some.nonzero()[:, 0].to(logits.device)
    own = None if support is None else support[index]
    return out.index_copy(0, index, entropy(logits.detach()[index], support=own))


def _divided(logits: Tensor, temperature: Tensor | None) -> Tensor:
    """Divide logits (N, V) by the temperature of each token, if there is one."""
    return logits if temperature is None else logits / temperature[:, None]


def _exact_kl(role: Role, states: Tensor, other: _Other, temperature: Tensor | None) -> Tensor:
    """Compute KL(policy || reference) over the whole vocabulary at each trained token, (N,).

    Embeddings of other sizes agree on the ids that both have; the other ids have no token, so their probability is 0.
    """
    kind, theirs = _precise(states), other.states.to(states.device)
    scale = None if temperature is None else temperature.to(states.device, kind)
    head = role.model.get_output_embeddings() if role.linear_head else None
    if head is None or other.weight is None:
        own = role.close(states if head is None else head(states))
        full = theirs if other.weight is None else functional.linear(theirs, other.weight, other.bias)
        size = min(own.shape[1], full.shape[1])
        return exact_kl(*(_divided(one[:, :size].to(kind), scale) for one in (own, full)))
    bias = role.output_bias(head.bias, head.weight, len(head.weight))
    size = min(len(head.weight), len(other.weight))
    bias, ref_bias = (None if one is None else one[:size] for one in (bias, other.bias))
    return linear_kl(
        states, head.weight[:size], theirs, other.weight[:size], bias=bias, ref_bias=ref_bias, temperature=scale
    )


def _precise(x: Tensor) -> torch.dtype:
    """Return the dtype for log-probs: float64 for float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scalar(role: Role, states: Tensor) -> Tensor:
    """Apply the scalar head to hidden states (N, H) -> (N,), in float32 or float64, under autocast too: half precision would
    round the scores, and so tie them."""
    head = role.head
    assert head is not None
    with torch.autocast(states.device.type, enabled=False):
        out = functional.linear(states.to(head.weight.dtype), head.weight, head.bias)[:, 0]
    return precise(out)


def _last(row: Row) -> int:
    """Return the position of the last trained token of a row, or of its last token if none is trained."""
    return row.start + int(row.mask.nonzero()[-1]) if bool(row.mask.any()) else row.length - 1


def _scored(row: Row, pad_id: int | None) -> int:
    """Return the position where the sequence classifiers of transformers read a row: its last token that is no pad token."""
    kept = (row.ids != (-1 if pad_id is None else pad_id)).nonzero()
    return int(kept[-1]) if len(kept) else row.length - 1


@dataclass(frozen=True)
class _Layout:
    """Input of one forward: ids (B, S), their positions if they do not simply count up in each row, and the pieces of packed rows."""

    ids: Tensor
    positions: Tensor | None = None
    pieces: Pieces | None = None

    def more(self, device: torch.device) -> dict[str, Tensor]:
        """Return the arguments of the forward besides the ids."""
        return {} if self.positions is None else {"position_ids": self.positions.to(device)}

    def addresses(self, offsets: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return (row number, position in the row) of each flat position, each in the shape of the layout."""
        flat = torch.arange(self.ids.numel())
        index = torch.searchsorted(offsets, flat, right=True) - 1
        return numbers[index].reshape(self.ids.shape), (flat - offsets[index]).reshape(self.ids.shape)


def _packed(rows: Sequence[Row]) -> _Layout:
    """Concatenate all ids, with positions that restart at 0 in each row; transformers then masks attention between rows.

    A mask made here would miss the changes of each layer (a sliding window) and the format of each attention kernel.
    """
    return _Layout(
        torch.cat([row.ids for row in rows])[None], torch.cat([torch.arange(row.length) for row in rows])[None]
    )


@dataclass(frozen=True)
class _Trained:
    """The trained tokens of a batch: their mask (B, T), and the row, step and position in the row of each, (N,)."""

    mask: Tensor
    row: Tensor
    step: Tensor
    position: Tensor

    @classmethod
    def of(cls, batch: Batch) -> "_Trained":
        """Return the trained tokens of the rows."""
        mask = _record_mask(batch.rows)
        row, step = mask.nonzero(as_tuple=True)
        return cls(mask, row, step, torch.tensor([one.start for one in batch.rows])[row] + step)

    def at(self, places: Places, shift: int = 0) -> Tensor:
        """Return the flat position of each token, or of the one `shift` positions after it, (N,)."""
        return places.at(self.row, self.position + shift)


def _taken(flat: Tensor, index: Tensor) -> Tensor:
    """Return these rows of `flat`. An index may occur twice; the sum of its gradients has one order, whatever the threads."""
    index = index.to(flat.device)
    return flat.index_select(0, index) if flat.device.type == "cpu" else flat[index]


def _record_mask(rows: Sequence[Row]) -> Tensor:
    """Return the masks stored in the rows, (B, T), not the column "mask" of the batch.

    The column may exclude some rows. The head would then run on other positions than for the old log-probs, and the
    ratio would not be exactly 1.
    """
    from whet.data import pad

    return pad([row.mask for row in rows])
