"""What an engine wraps: a model with the heads beside it, whose forward runs whatever touches their weights."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from whet.models.roles import Role

Columns = dict[str, Tensor]


class Shell(nn.Module):
    """A model and the scalar heads that lie beside it, as one module for FSDP or DeepSpeed.

    An engine gathers weights when a module's forward begins and lets them go when it ends. Columns read the head's
    weight directly, so all of their reading happens inside this forward.
    """

    def __init__(self, model: nn.Module, heads: list[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleList(heads)

    def forward(self, work: Callable[..., Columns], *given: Any) -> Columns:
        """What `work` gives of these."""
        return work(*given)


def through(role: Role, work: Callable[..., Columns], *given: Any) -> Columns:
    """What `work` gives of these, inside the role's shell where it has one."""
    return work(*given) if role.shell is None else role.shell(work, *given)


def shells(roles: list[Role]) -> dict[int, tuple[Shell, list[Role]]]:
    """One shell per model, by the model's id, with the roles that live in it."""
    out: dict[int, tuple[Shell, list[Role]]] = {}
    for role in roles:
        own = [one for one in roles if one.model is role.model]
        inside = {id(module) for module in role.model.modules()}
        heads = [one.head for one in own if one.head is not None and id(one.head) not in inside]
        if id(role.model) not in out:
            out[id(role.model)] = (Shell(role.model, list(heads)), own)
    return out
