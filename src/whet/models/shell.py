"""Module for FSDP and DeepSpeed that wraps a model and its scalar heads, and runs all reads of their weights in its forward."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from whet.models.roles import Role

Columns = dict[str, Tensor]


class Shell(nn.Module):
    """A model and its separate scalar heads as one module for FSDP or DeepSpeed.

    An engine gathers the weights at the start of a module's forward and frees them at the end. The readers use the weight
    of the head directly, so they run inside this forward.
    """

    def __init__(self, model: nn.Module, heads: list[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleList(heads)

    def forward(self, work: Callable[..., Columns], *given: Any) -> Columns:
        """Return `work(*given)`."""
        return work(*given)


def through(role: Role, work: Callable[..., Columns], *given: Any) -> Columns:
    """Return `work(*given)`, computed inside the forward of the role's shell if it has one."""
    return work(*given) if role.shell is None else role.shell(work, *given)


def shells(roles: list[Role]) -> dict[int, tuple[Shell, list[Role]]]:
    """Return one shell per model, by the `id` of the model, with the roles that use it."""
    out: dict[int, tuple[Shell, list[Role]]] = {}
    for role in roles:
        own = [one for one in roles if one.model is role.model]
        inside = {id(module) for module in role.model.modules()}
        heads = [one.head for one in own if one.head is not None and id(one.head) not in inside]
        if id(role.model) not in out:
            out[id(role.model)] = (Shell(role.model, list(heads)), own)
    return out
