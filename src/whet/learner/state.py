"""The optimizers of a role, and fingerprints of weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whet.methods.options import Optim
from whet.models.load import decoder_layers
from whet.models.roles import Role
from whet.ops import address

LIBRARY = {"adamw_8bit": "AdamW8bit", "paged_adamw_32bit": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
"""The class of bitsandbytes for each kind of optimizer."""
CONSTANTS = ("qmap1", "qmap2")
"""States that the library makes anew: what each of the 256 values of a moment in 8 bits stands for, one tensor for all weights."""
CHUNK = 1 << 24
"""Number of weights that `fingerprint` sums at a time."""


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """Return a hash that changes if any of these parameters changes.

    The bits are summed as integers, so the hash does not depend on the order of the sums.
    """
    parts: list[str] = []
    for name, parameter in parameters.items():
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
        total = 0
        for start, piece in enumerate(parameter.detach().contiguous().flatten().view(whole).split(CHUNK)):
            place = torch.arange(piece.numel(), device=piece.device) + start * CHUNK
            total += int(
                (piece.to(torch.int64) * (2 * place + 1)).sum()
            )  # an overflow wraps around in the same way on every device
        parts.append(f"{name}{tuple(parameter.shape)}{total}")
    return f"{address(*parts):016x}"


def optimizers_of(role: Role, optim: Optim) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return the optimizers of a role with their base learning rates: that of `optim.kind` and, for the weights which it does not
    take, AdamW. Muon takes the matrices inside the layers; moments in 8 bits are for all weights but embeddings (Dettmers et al.
    2022, section 2.3)."""
    embeddings = {id(one.weight) for one in role.model.modules() if isinstance(one, torch.nn.Embedding)}
    inside = set[int]()
    if optim.kind == "muon":
        inside = {id(p) for layer in decoder_layers(role.model) for p in layer.parameters() if p.ndim == 2}
    own: list[Tensor] = []
    rest: list[Tensor] = []
    for parameter in role.parameters().values():
        if optim.kind == "muon":
            taken = id(parameter) in inside
        else:
            taken = not optim.kind.endswith("8bit") or id(parameter) not in embeddings
        (own if taken else rest).append(parameter)
    if optim.kind == "muon":
        muon = (
            [(torch.optim.Muon(own, lr=optim.muon_lr, weight_decay=optim.weight_decay), optim.muon_lr)] if own else []
        )
        return _adamw(rest, optim, "adamw") + muon
    return _adamw(own, optim, optim.kind) + _adamw(
        rest, optim, optim.kind.replace("_8bit", "_32bit" if "paged" in optim.kind else "")
    )


def _adamw(parameters: Sequence[Tensor], optim: Optim, kind: str) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return AdamW of these weights, of a kind of `Optim`, and its learning rate; [] without weights. Only matrices decay."""
    by_shape = {True: [p for p in parameters if p.ndim > 1], False: [p for p in parameters if p.ndim <= 1]}
    groups = [
        {"params": own, "weight_decay": optim.weight_decay if matrix else 0.0}
        for matrix, own in by_shape.items()
        if own
    ]
    if not groups:
        return []
    options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if kind == "adamw":
        return [(torch.optim.AdamW(groups, fused=True, **options), optim.lr)]
    import bitsandbytes

    return [(getattr(bitsandbytes.optim, LIBRARY[kind])(groups, **options), optim.lr)]


def restored(optimizer: torch.optim.Optimizer, parameter: Tensor, states: Mapping[str, Tensor]) -> None:
    """Put saved states of a weight into its optimizer, torch's own or that of the library, which has memory that can be paged."""
    if not hasattr(optimizer, "init_state"):
        optimizer.state[parameter] = dict(states)
        return
    group, place = next(
        (number, place)
        for number, group in enumerate(optimizer.param_groups)
        for place, one in enumerate(group["params"])
        if one is parameter
    )
    optimizer.init_state(optimizer.param_groups[group], parameter, group, place)
    own = optimizer.state[parameter]
    for name, value in states.items():
        if isinstance(own[name], Tensor):
            own[name].copy_(value)
        else:
            own[name] = value.item()


def as_tensor(value: Any) -> Tensor:
    """Return a value of an optimizer's state as a tensor."""
    return value.detach().contiguous() if isinstance(value, Tensor) else torch.tensor(value)
