"""LoRA by peft: one role's adapter on a model of its own, or several roles' adapters on one trunk."""

import warnings
from typing import Any

from torch import nn

from whet.dials import LoRA
from whet.errors import ModelError
from whet.models.load import scalar_head
from whet.ops import address, addressed_uniform


def attach(model: Any, lora: LoRA, names: tuple[str, ...], *, seed: int, scorer: bool = False) -> Any:
    """The PeftModel with one fresh adapter per name; B is 0, so each is exactly the base until it is trained.

    A is drawn at an address of (seed, adapter name, module). With `scorer` the scalar head is trained too.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        task_type="SEQ_CLS" if scorer else "CAUSAL_LM",
        modules_to_save=_head_names(model) if scorer else None,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, config, adapter_name=names[0])
            for name in names[1:]:
                wrapped.add_adapter(name, config)
    except ValueError as error:
        raise ModelError(f"model.lora: {error}") from error
    for name in names:
        redraw(wrapped, name, seed)
    return wrapped


def redraw(wrapped: nn.Module, adapter: str, seed: int) -> None:
    """A of every LoRA pair of this adapter drawn anew, uniform in +-1 / sqrt(width) at an address; B set to 0."""
    import torch

    for name, parameter in wrapped.named_parameters():
        if f"lora_A.{adapter}." in name:
            module = name.split(f".lora_A.{adapter}.")[0]
            rows, columns = torch.arange(parameter.shape[0])[:, None], torch.arange(parameter.shape[1])
            drawn = addressed_uniform(address(seed, "lora", adapter, module), rows, columns) * 2 - 1
            parameter.data.copy_((drawn / parameter.shape[1] ** 0.5).to(parameter))
        elif f"lora_B.{adapter}." in name:
            parameter.data.zero_()


def copy_adapter(wrapped: nn.Module, source: str, target: str) -> None:
    """The weights of one adapter copied into another of the same shape."""
    own = dict(wrapped.named_parameters())
    for name, parameter in own.items():
        if f".{source}." in name and "lora_" in name:
            own[name.replace(f".{source}.", f".{target}.")].data.copy_(parameter.data)


def _head_names(model: Any) -> list[str]:
    head = scalar_head(model)
    return [name for name, module in model.named_modules() if module is head]
