"""The auxiliary losses of a mixture of experts: those of transformers, whatever the micro-batches."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from whet.data import Batch
from whet.errors import ModelError
from whet.learner.local import LocalLearner
from whet.methods import compose
from whet.methods.options import LoRA, Optim
from whet.models.roles import Role
from whet.models.router import router_of

from . import helpers as h

COMMON: dict[str, Any] = {
    "vocab_size": 27, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "MixtralConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeConfig": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "Qwen2MoeConfig": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16},
    "OlmoeConfig": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOssConfig": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "GraniteMoeConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "PhimoeConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "JambaConfig": {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},
}  # fmt: skip


def model(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**(COMMON | MODELS[name] | more))
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()


def own_loss(causal: Any, rows: list[Tensor], coef: float) -> Tensor:
    """transformers: the loss with labels on a padded batch, plus its auxiliary loss, by backward."""
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([row, row.new_zeros(longest - len(row))]) for row in rows])
    mask = torch.stack([(torch.arange(longest) < len(row)).long() for row in rows])
    out = causal(input_ids=ids, attention_mask=mask, output_router_logits=True)
    return coef * out.aux_loss


def learner(causal: Any, budget: int, aux: float | None = 0.5, z: float | None = 0.0) -> LocalLearner:
    role = Role("policy", causal, True, router=router_of(causal, aux, z))
    return LocalLearner({"policy": role}, {"policy": Optim(lr=1e-3)}, total=1, budget=budget)


def forward(own: LocalLearner, batch: Batch) -> Any:
    return own.forward_backward([(term, batch, batch.counts(term.mask)) for term in compose.SFT.terms])


@pytest.mark.parametrize("name", MODELS)
def test_the_balance_is_the_auxiliary_loss_of_the_model(name: str) -> None:
    causal = model(name)
    batch = Batch.of(h.rows()[:5])
    found = forward(learner(causal, 10**6), batch).losses["policy/train/router_aux"]
    assert found == pytest.approx(own_loss(causal, [row.ids for row in batch.rows], 0.5).item(), rel=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_and_the_loss_are_those_of_the_whole_mini_batch_whatever_the_micro_batches(packed: bool) -> None:
    grads, losses = [], []
    batch = Batch.of(h.rows())
    for budget in (10**6, 30, 1):
        own = learner(model("MixtralConfig"), budget, 0.5, 0.1)
        own.packed = packed
        losses.append(forward(own, batch).losses)
        grads.append(
            {name: p.grad.clone() for name, p in own.roles["policy"].parameters().items() if p.grad is not None}
        )
    for one, grad in zip(losses[1:], grads[1:], strict=True):
        assert one == pytest.approx(losses[0], rel=1e-10)
        for name, value in grad.items():
            torch.testing.assert_close(value, grads[0][name], rtol=1e-8, atol=1e-12)
    # the gradient of the balance is that of transformers
    causal = model("MixtralConfig")
    own_loss(causal, [row.ids for row in batch.rows], 0.5).backward()
    plain = learner(model("MixtralConfig"), 30, 0.0, 0.1)
    forward(plain, batch)
    for name, parameter in causal.named_parameters():
        if parameter.grad is not None and "gate" in name:
            got = grads[1][name] - plain.roles["policy"].parameters()[name].grad
            torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-7)  # transformers sums in float32
            assert parameter.grad.abs().max() > 1e-4


def test_the_z_loss_is_the_mean_square_of_the_log_sum_exp() -> None:
    causal = model("MixtralConfig")
    row = h.rows()[0]
    out = causal(input_ids=row.ids[None], output_router_logits=True)
    expected = torch.cat(out.router_logits).logsumexp(-1).square().mean().item()
    found = forward(learner(causal, 100, 0.0, 0.2), Batch.of([row])).losses
    assert found["policy/train/router_z"] == pytest.approx(0.2 * expected, rel=1e-6)
    assert "policy/train/router_aux" not in found


def test_checkpointed_activations_give_the_same_balance() -> None:
    from whet.models.load import checkpoint_activations

    batch = Batch.of(h.rows())
    plain, causal = forward(learner(model("MixtralConfig"), 50), batch), model("MixtralConfig")
    own = learner(causal, 50)
    checkpoint_activations(causal)
    assert forward(own, batch).losses == pytest.approx(plain.losses, rel=1e-10)


def test_coefficients_come_from_the_configuration_or_the_recipe() -> None:
    on = model("MixtralConfig", output_router_logits=True, router_aux_loss_coef=0.03)
    assert router_of(on, None, None).aux_loss_coef == 0.03
    assert router_of(on, 0.2, None).aux_loss_coef == 0.2
    assert router_of(on, 0.0, None) is None
    assert (
        router_of(model("MixtralConfig"), None, None) is None
    )  # as in transformers: off unless the configuration says so
    on.config.router_z_loss_coef = 0.001
    assert router_of(on, 0.0, None).z_loss_coef == 0.001
    with pytest.raises(ModelError, match=r"router_aux_loss_coef.* no router"):
        router_of(h.policy().model, 0.1, None)


def test_a_model_whose_auxiliary_loss_is_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    causal = model("MixtralConfig")
    causal.num_experts_per_tok = 1
    plain = type(causal).forward

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        out = plain(self, *given, **named)
        out.aux_loss = out.aux_loss * 2
        return out

    monkeypatch.setattr(type(causal), "forward", forward)
    with pytest.raises(ModelError, match="known formula"):
        router_of(causal, 0.1, None)


def test_adapters_on_experts_are_tried_and_trained_with_the_balance() -> None:
    """peft wraps and unwraps the weights of experts in each forward, which changes no weight."""
    from whet.models import lora
    from whet.models.probe import probe

    causal = model("MixtralConfig").float()
    router = router_of(causal, 0.5, 0.0)
    wrapped = lora.attach(causal, LoRA(rank=2, alpha=4.0), ("policy",), seed=1)
    role = Role("policy", causal, True, wrapped=wrapped, adapter="policy", router=router)
    probe(role, [row.ids for row in h.rows()])
    own = LocalLearner({"policy": role}, {"policy": Optim(lr=1e-3)}, total=1, budget=50)
    assert forward(own, Batch.of(h.rows())).losses["policy/train/router_aux"] > 0
    moved = [name for name, one in role.parameters().items() if one.grad is not None and bool(one.grad.any())]
    assert any("gate." in name for name in moved)
    assert any("experts." in name for name in moved)
