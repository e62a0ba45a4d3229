"""LoRA with peft: the adapter of one role on its own model, or the adapters of several roles on a shared base model."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from whet.errors import ModelError
from whet.methods.options import LoRA
from whet.models.load import check_finite, scalar_head
from whet.ops import address, addressed_uniform


def attach(model: Any, lora: LoRA, names: tuple[str, ...], *, seed: int, scorer: bool = False) -> Any:
    """Return a PeftModel with one new adapter per name; B is 0, so the output is that of the base before training.

    A is random and depends only on (seed, adapter name, module). With `scorer`, the scalar head is trained too.
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


def is_adapter(source: str) -> bool:
    """Return whether the folder holds only an adapter."""
    return (Path(source) / "adapter_config.json").is_file()


def add_fresh(wrapped: Any, name: str, lora: LoRA, *, seed: int) -> None:
    """Add a new adapter to a shared base model."""
    from peft import LoraConfig

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
    wrapped.add_adapter(name, config)
    redraw(wrapped, name, seed)


def add_from_folder(wrapped: Any, name: str, folder: str) -> nn.Linear:
    """Add a saved reward adapter to a causal LM with the same base, under this name, and return its scalar head.

    Raises ModelError if the weights in the folder do not fit the model.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import load_file

    saved = LoraConfig.from_pretrained(folder)
    targets = saved.target_modules if isinstance(saved.target_modules, str) else sorted(saved.target_modules)
    config = LoraConfig(r=saved.r, lora_alpha=saved.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        wrapped.add_adapter(name, config)
    except ValueError as error:
        raise ModelError(
            f"{folder}: its adapter does not fit the trunk ({error}); it was trained on another base"
        ) from error
    own = dict(wrapped.named_parameters())
    head, placed = None, 0
    saved_weights = load_file(str(Path(folder) / "adapter_model.safetensors"))
    check_finite(folder, saved_weights.items())
    for key, value in saved_weights.items():
        if key.endswith(("score.weight", "classifier.weight")):
            head = value
            continue
        target = key.replace(".lora_A.", f".lora_A.{name}.").replace(".lora_B.", f".lora_B.{name}.")
        if target not in own or own[target].shape != value.shape:
            raise ModelError(
                f"{folder}: its adapter does not fit the trunk, which has no {key} of this shape; it was trained on another base"
            )
        own[target].data.copy_(value)
        placed += 1
    expected = sum(f".lora_A.{name}." in key or f".lora_B.{name}." in key for key in own)
    if head is None or placed != expected:
        raise ModelError(
            f"{folder}: expected a reward adapter with a scalar head and {expected} matrices, got {placed}"
        )
    out = nn.Linear(head.shape[1], 1, bias=False, dtype=torch.float32, device=next(iter(own.values())).device)
    out.weight.data.copy_(head)
    return out


def save_adapter(wrapped: Any, name: str, folder: Path, gather: Callable[[Any], Any], *, write: bool = True) -> None:
    """Save one adapter in peft's format, directly in the folder and not in a subfolder with the adapter's name."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(wrapped, adapter_name=name)
    whole = {key: gather(value).contiguous() for key, value in weights.items()}
    if not write:
        return
    check_finite(f"{folder} is not written", whole.items())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(whole, str(folder / "adapter_model.safetensors"))
    config = wrapped.peft_config[name]
    base = Path(config.base_model_name_or_path or "")
    if base.is_dir():
        config.base_model_name_or_path = str(base.resolve())
    config.save_pretrained(str(folder))


def redraw(wrapped: nn.Module, adapter: str, seed: int) -> None:
    """Draw each A of this adapter uniformly from +-1 / sqrt(input width), as a function of the seed, and set each B to 0."""
    import torch

    for name, parameter in wrapped.named_parameters():
        if f"lora_A.{adapter}." in name:
            module = name.split(f".lora_A.{adapter}.")[0]
            rows, columns = torch.arange(parameter.shape[0])[:, None], torch.arange(parameter.shape[1])
            drawn = addressed_uniform(address(seed, "lora", adapter, module), rows, columns) * 2 - 1
            parameter.data.copy_((drawn / parameter.shape[1] ** 0.5).to(parameter))
        elif f"lora_B.{adapter}." in name:
            parameter.data.zero_()


def _head_names(model: Any) -> list[str]:
    head = scalar_head(model)
    return [name for name, module in model.named_modules() if module is head]
