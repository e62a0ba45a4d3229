"""LoRA with peft: the adapter of one role on its own model, or the adapters of several roles on a shared base model."""

import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whet.errors import ModelError, first_line
from whet.methods.options import LoRA
from whet.models import load, saved_adapters
from whet.models.finite import check_finite
from whet.models.folders import is_adapter, settings
from whet.models.saved_adapters import owner
from whet.ops import address, addressed_uniform

KEPT = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "use_rslora"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora"),
    *("lora_bias", "target_parameters"),
}
"""Options of a saved LoRA adapter that change nothing outside the adapter, so a shared base model can carry it."""


def attach(model: Any, lora: LoRA, names: tuple[str, ...], *, seed: int, scorer: bool = False) -> Any:
    """Return a PeftModel with one new adapter per name; its product of matrices is 0, so the output is that of the base before
    training.

    The other matrix is random and depends only on (seed, adapter name, module). With `scorer`, the scalar head is trained too.
    Raises ModelError if no module has one of the targets' names, or if a target has no module.
    """
    from peft import get_peft_model

    _check_rank(model, lora.rank)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, _config(lora, load.heads(model) if scorer else None), adapter_name=names[0])
            for name in names[1:]:
                wrapped.add_adapter(name, _config(lora, load.heads(model) if scorer else None))
    except (ValueError, TypeError) as error:
        raise ModelError(f"model.lora.targets: {first_line(error)}") from error
    if not (scorer and names == ("critic",)):  # the targets are the policy's, and a critic has no lm_head
        _check_targets(wrapped, names[0])
    for name in names:
        redraw(wrapped, name, seed)
    return wrapped


def add_fresh(wrapped: Any, name: str, lora: LoRA, *, seed: int) -> None:
    """Add a new adapter to a shared base model."""
    _check_rank(wrapped, lora.rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.add_adapter(name, _config(lora, None))
    redraw(wrapped, name, seed)


def _check_rank(model: nn.Module, rank: int) -> None:
    """Raise ModelError for a rank that no matrix of the model has, before the adapters are allocated."""
    sizes = [
        min(module.in_features, module.out_features) if isinstance(module, nn.Linear) else min(own.shape[-2:])
        for module in model.modules()
        for own in module.parameters(recurse=False)
        if own.ndim >= 2
    ]
    largest = max(sizes, default=1)
    if rank > largest:
        raise ModelError(f"model.lora.rank: no matrix of the model has a rank above {largest}, got {rank}; lower it")


def _config(lora: LoRA, heads: list[str] | None) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        task_type="CAUSAL_LM" if heads is None else "SEQ_CLS",
        modules_to_save=heads,
    )


def _check_targets(wrapped: Any, name: str) -> None:
    """Raise ModelError for a target that no adapted module is named after; peft refuses only if none matches."""
    adapted = [_module_of(key) for key, _ in wrapped.named_parameters() if owner(key) == name]
    targets = wrapped.peft_config[name].target_modules  # those of experts are in target_parameters
    for one in [] if isinstance(targets, str) else sorted(targets):
        if not any(f".{module}".endswith(f".{one}") for module in adapted):
            raise ModelError(f"model.lora.targets: the model has no module {one!r} that an adapter can be put on")


def _module_of(parameter: str) -> str:
    return parameter.partition(".lora_")[0]


def add_from_folder(wrapped: Any, name: str, folder: str) -> nn.Linear:
    """Add a saved reward adapter, with its own configuration, to a causal LM with the same base, and return its scalar head.

    Raises ModelError if the adapter was trained on a base with other weights, changes more than itself, or does not fit. If the
    names of the bases differ, the adapter's base is loaded on the CPU and compared.
    """
    from peft import PeftType

    if not is_adapter(folder):
        raise ModelError(
            f"{folder}: roles on a shared trunk are adapters, and this is a whole model; give an adapter, or set --trunk separate"
        )
    config, weights = saved_adapters.config_of(folder), saved_adapters.weights_of(folder)
    if config.task_type != "SEQ_CLS":
        raise ModelError(f"{folder}: not the adapter of a reward model, its task_type is {config.task_type}")
    refused = f"LoRA, it is {config.peft_type.value}" if config.peft_type != PeftType.LORA else _not_kept(config)
    if refused:
        raise ModelError(
            f"{folder}: a shared trunk cannot carry this adapter: it is not plain {refused}; set --trunk separate"
        )
    head, rest = _split_head(folder, weights)
    _check_base(wrapped.get_base_model(), folder)
    rest = _without_base(wrapped, folder, rest)
    config.task_type, config.lora_dropout = "CAUSAL_LM", 0.0
    config.modules_to_save = [one for one in config.modules_to_save or [] if one not in load.HEADS] or None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped.add_adapter(name, config)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{folder}: its adapter does not fit the trunk ({first_line(error)}); it was trained on another base"
        ) from error
    saved_adapters.place(wrapped, name, folder, rest)
    return head.to(next(wrapped.parameters()).device)


def _not_kept(config: Any) -> str:
    """Return the option of a LoRA adapter that a shared base model cannot carry, "" if there is none."""
    plain = type(config)()
    changed = {one.name: getattr(config, one.name) for one in fields(config)}
    changed = {key: value for key, value in changed.items() if key not in KEPT and value != getattr(plain, key)}
    if changed.get("init_lora_weights") in (False, "gaussian", "orthogonal", "eva"):  # the others change the base
        changed = {key: value for key, value in changed.items() if key not in ("init_lora_weights", "eva_config")}
    return next((f"LoRA ({key} is {value!r})" for key, value in changed.items()), "")


def _split_head(folder: str, weights: dict[str, Tensor]) -> tuple[nn.Linear, dict[str, Tensor]]:
    """Return the scalar head that is saved with a reward adapter, and the other weights."""
    starts = tuple(f"{saved_adapters.PREFIX}{one}." for one in load.HEADS)
    own = {key.split(".")[-1]: value.float() for key, value in weights.items() if key.startswith(starts)}
    count = sum(key.startswith(starts) for key in weights)
    if not count:
        raise ModelError(
            f"{folder}: the adapter has no scalar head (score or classifier); train it with modules_to_save: [score], or save it "
            "again with its head"
        )
    if count != len(own) or not set(own) <= {"weight", "bias"} or "weight" not in own or own["weight"].ndim != 2:
        raise ModelError(f"{folder}: the adapter's head has several layers; set --trunk separate")
    labels, width = own["weight"].shape
    if labels != 1:
        raise ModelError(f"{folder}: a reward model has one label, this one has {labels}")
    head = nn.Linear(width, 1, bias="bias" in own)
    head.load_state_dict(own)
    return head, {key: value for key, value in weights.items() if not key.startswith(starts)}


def _check_base(model: Any, folder: str) -> None:
    """Raise ModelError if the base of an adapter has other weights than the trunk, as far as the scalar head reads them."""
    base, trunk = settings(folder)["base_model_name_or_path"], str(model.name_or_path)
    if base == trunk or (trunk and Path(base).resolve() == Path(trunk).resolve()):
        return
    inner = {
        saved_adapters.plain_name(key): value
        for key, value in model.base_model.named_parameters()
        if owner(key) is None and ".modules_to_save." not in key
    }
    whose = f"{folder}: the adapter was trained on {base}, and the trunk is {trunk or 'a model without a folder'}"
    kind = next(name for name, dtype in load.DTYPES.items() if dtype == model.dtype)
    remote = type(model).__module__.startswith("transformers_modules")
    try:
        theirs = dict(load.backbone(load.ModelSource(base, kind, "cpu", remote)).named_parameters())
    except ModelError as error:
        raise ModelError(
            f"{whose}; whether they have the same weights cannot be seen ({error}). If they do, set base_model_name_or_path in "
            f"its adapter_config.json to {trunk}"
        ) from error
    other = next(
        (
            key
            for key, value in inner.items()
            if key not in theirs or not torch.equal(value.detach().cpu(), theirs[key])
        ),
        next((key for key in theirs if key not in inner), None),
    )
    if other is not None:
        raise ModelError(
            f"{whose}, which has other weights ({other}); give a reward model of the trunk, or set --trunk separate"
        )


def _without_base(wrapped: Any, folder: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out embeddings of the base that are saved with the adapter. Raises ModelError if they are not the trunk's."""
    base = {
        f"{saved_adapters.PREFIX}{saved_adapters.plain_name(key)}": value
        for key, value in wrapped.get_base_model().named_parameters(remove_duplicate=False)
        if owner(key) is None
    }
    embeddings = [
        f"{saved_adapters.PREFIX}{saved_adapters.plain_name(name)}.weight"
        for name, module in wrapped.get_base_model().named_modules()
        if module in (wrapped.get_base_model().get_input_embeddings(), wrapped.get_base_model().get_output_embeddings())
    ]
    own = saved_adapters.config_of(folder).modules_to_save or []
    out = {}
    for key, value in weights.items():
        plain = saved_adapters.plain_name(key)
        if plain not in embeddings or any(plain.endswith(f".{one}.weight") for one in own):
            out[key] = value
        elif value.shape != base[plain].shape or not torch.equal(value.to(base[plain]), base[plain].detach()):
            raise ModelError(
                f"{folder}: the adapter has embeddings of its own ({key}, {value.shape[0]} tokens), perhaps of added tokens; "
                "they are not the trunk's, so set --trunk separate"
            )
    return out


def save_adapter(wrapped: Any, name: str, folder: Path, gather: Callable[[Any], Any], *, write: bool = True) -> None:
    """Save one adapter in peft's format, directly in the folder and not in a subfolder with the adapter's name."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # the base keeps its own embeddings; by default peft looks its name up on the hub to see whether they changed
    weights = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
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
    """Draw one matrix of each pair of this adapter as a function of the seed, and set the other to 0.

    A linear layer's A is uniform in +-1 / sqrt(input width) and its B is 0. An embedding's B is standard normal and its A, with
    a column per token, is 0 (as peft does).
    """
    for name, parameter in wrapped.named_parameters():
        if owner(name) != adapter or ".lora_" not in name:
            continue
        if ".lora_A." in name or ".lora_embedding_B." in name:
            rows, columns = torch.arange(parameter.shape[0])[:, None], torch.arange(parameter.shape[1])
            uniform = addressed_uniform(address(seed, "lora", adapter, _module_of(name)), rows, columns)
            linear = (uniform * 2 - 1) / parameter.shape[1] ** 0.5
            drawn = linear if ".lora_A." in name else torch.special.ndtri(uniform.clamp(min=2.0**-54))
            parameter.data.copy_(drawn.to(parameter))
        else:
            parameter.data.zero_()
