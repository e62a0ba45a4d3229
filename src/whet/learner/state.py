"""The optimizers of a role, and fingerprints of weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from whet.methods.options import Optim
from whet.models.load import decoder_layers
from whet.models.roles import Role
from whet.ops import address

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
    """Return the optimizers of a role with their base learning rates."""
    inside = (
        {id(p) for layer in decoder_layers(role.model) for p in layer.parameters()} if optim.kind == "muon" else set()
    )
    rest: dict[bool, list] = {True: [], False: []}
    matrices = []
    for parameter in role.parameters().values():
        if id(parameter) in inside and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            rest[parameter.ndim > 1].append(parameter)
    groups = [
        {"params": parameters, "weight_decay": optim.weight_decay if matrix else 0.0}
        for matrix, parameters in rest.items()
        if parameters
    ]
    out: list[tuple[torch.optim.Optimizer, float]] = []
    if groups:
        adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        out.append((adamw, optim.lr))
    if matrices:
        muon = torch.optim.Muon(matrices, lr=optim.muon_lr, weight_decay=optim.weight_decay)
        out.append((muon, optim.muon_lr))
    return out


def as_tensor(value: Any) -> Tensor:
    """Return a value of an optimizer's state as a tensor."""
    return value.detach().contiguous() if isinstance(value, Tensor) else torch.tensor(value)
