"""Auxiliary losses of a mixture of experts: the balance of its router, and the size of its logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whet.errors import ModelError
from whet.ops.head import precise


@dataclass(frozen=True)
class Routed:
    """Sums over the router decisions of some tokens, one decision per token and layer with experts.

    picks (E,) counts how often each of E experts was chosen, probs (E,) sums its probability, z () the squares of the
    log-sum-exp of the logits; `count` is the number of decisions.
    """

    picks: Tensor
    probs: Tensor
    z: Tensor
    count: int


@dataclass(frozen=True)
class Router:
    """The router of a role and the coefficients of its losses; `top_k` of `experts` work on each token."""

    experts: int
    top_k: int
    aux_loss_coef: float
    z_loss_coef: float

    def sums(self, logits: Sequence[Tensor], real: Tensor) -> Routed:
        """Sum over the router logits of the layers, (N, E) each; `real` (N,) is False for padding."""
        kept = [one.reshape(-1, self.experts)[real.to(one.device)] for one in logits]
        flat = torch.cat([one.to(kept[0].device) for one in kept])
        flat = precise(flat)
        probs = flat.softmax(-1)
        picks = torch.bincount(probs.topk(self.top_k, -1).indices.flatten(), minlength=self.experts)
        return Routed(picks.to(probs), probs.sum(0), flat.logsumexp(-1).square().sum(), len(flat))

    def losses(self, part: Routed, picks: Tensor, count: int) -> dict[str, Tensor]:
        """Return the losses of a part of a mini-batch, times their coefficients; summed over the parts they are those of the
        whole mini-batch, whose choices are `picks` (E,) in `count` decisions.

        router_aux is E sum_e (picks_e / count) (probs_e / count) (Fedus et al. 2021, eq. 4). It has no gradient through the
        choices, so it is linear in the part once these are known. router_z is the mean of z (Zoph et al. 2022, eq. 5).
        """
        out = {}
        if self.aux_loss_coef:
            share = (picks.to(part.probs) / count * part.probs).sum() / count
            out["router_aux"] = self.aux_loss_coef * self.experts * share
        if self.z_loss_coef:
            out["router_z"] = self.z_loss_coef * part.z / count
        return out


def router_of(model: Any, aux_loss_coef: float | None, z_loss_coef: float | None) -> Router | None:
    """Return the router of a causal LM with the coefficients of its losses, or None if both are 0.

    A coefficient of None is that of the model's configuration; the balance counts only if `output_router_logits` is set there,
    as in transformers. Raises ModelError if a coefficient is given for a model without a router, or if the balance differs
    from the model's own auxiliary loss.
    """
    config = model.config.get_text_config()
    experts, top_k = getattr(model, "num_experts", None), getattr(model, "num_experts_per_tok", None)
    if aux_loss_coef is None:
        on = getattr(config, "output_router_logits", False)
        aux_loss_coef = float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0) if on else 0.0
    if z_loss_coef is None:
        z_loss_coef = float(getattr(config, "router_z_loss_coef", 0.0) or 0.0)
    if not aux_loss_coef and not z_loss_coef:
        return None
    if not experts or not top_k or not hasattr(model, "router_aux_loss_coef"):
        raise ModelError(
            f"model.{'router_aux_loss_coef' if aux_loss_coef else 'router_z_loss_coef'}: {type(model).__name__} has no router with an "
            "auxiliary loss in transformers; set it to 0"
        )
    router = Router(int(experts), int(top_k), aux_loss_coef, z_loss_coef)
    ids = torch.arange(min(12, config.vocab_size), device=model.get_input_embeddings().weight.device)[None]
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=False, output_router_logits=True)
        part = router.sums(out.router_logits, torch.ones(ids.shape[1], dtype=torch.bool))
        own = (part.picks * part.probs).sum() * router.experts / part.count**2
    if not torch.allclose(own.cpu().float(), torch.as_tensor(out.aux_loss).cpu().float(), rtol=1e-2):
        raise ModelError(
            f"model.router_aux_loss_coef: the auxiliary loss of {type(model).__name__} is {float(out.aux_loss):.4g}, and the known "
            f"formula gives {float(own):.4g}; set it to 0"
        )
    return router
