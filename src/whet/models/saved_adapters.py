"""Folders with a PEFT adapter: read, check, load and merge them; and the weights of a model with an adapter merged."""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from whet.errors import ModelError, first_line
from whet.models.finite import check_finite
from whet.models.folders import settings

_OWNED = re.compile(r"(?:^|\.)(?:lora_\w+|modules_to_save|trainable_tokens_\w+)\.(\w+)(?:\.|$)")
PREFIX = "base_model.model."
"""What peft puts before the names of a model's weights in an adapter's file."""


def config_of(path: str) -> Any:
    """Return the peft configuration of an adapter folder. Raises ModelError for a kind or an option that peft does not know,
    since peft leaves unknown options out."""
    import peft

    about = settings(path)
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(about["peft_type"])
    if kind is None:
        raise ModelError(f"{path}: peft {peft.__version__} knows no adapter of the kind {about['peft_type']}")
    if about.get("megatron_config"):  # peft would import the module that megatron_core names
        raise ModelError(f"{path}: megatron_config in its adapter_config.json is for layers of Megatron; remove it")
    known = {one.name for one in fields(kind)}
    unknown = [key for key, value in about.items() if key not in known and value]
    if unknown:
        raise ModelError(
            f"{path}: peft {peft.__version__} does not know the adapter's option {unknown[0]}; install a newer peft"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind.from_pretrained(path)
    except Exception as error:  # each configuration class checks its options with errors of its own
        raise ModelError(f"{path}: its adapter_config.json is refused by peft ({first_line(error)})") from error


def weights_of(path: str) -> dict[str, Tensor]:
    """Return the weights of an adapter folder by their saved names. Raises ModelError if there are none, or if they cannot be
    read; a pickled file may contain tensors only."""
    from peft.utils import load_peft_weights

    files = [Path(path) / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    if not any(file.is_file() for file in files):
        raise ModelError(f"{path}: the folder has no {files[0].name}; save the adapter again")
    file = next(file for file in files if file.is_file())
    try:
        weights = load_peft_weights(path, device="cpu")
        if not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError("not a mapping from names to tensors")
    except Exception as error:  # errors of safetensors, pickle and zip files
        raise ModelError(
            f"{file}: the adapter's weights cannot be read ({first_line(error)}); save them again as safetensors"
        ) from error
    check_finite(str(file), weights.items())
    return weights


def merged(model: Any, path: str) -> Any:
    """Return the model with the adapter of a folder loaded and merged as peft does it, tied weights separated if they differ.

    The merged model must give the adapter's own logits on a few tokens. Raises ModelError if the adapter does not belong to
    the model, cannot be merged, or if the logits differ by more than rounding.
    """
    from peft import PeftModel

    config, weights = config_of(path), weights_of(path)
    if str(getattr(config, "init_lora_weights", "")).startswith("pissa_niter"):
        raise ModelError(
            f"{path}: init_lora_weights {config.init_lora_weights!r} changes the base by random numbers that are not saved; "
            "convert the adapter to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ModelError(
            f"{path}: an adapter of the kind {config.peft_type.value} adds inputs and no weights, so it cannot be merged"
        )
    _fit_embeddings(model, path, weights)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = PeftModel.from_pretrained(model, path)
        place(wrapped, "default", path, weights)
        ids = probe(model)
        with torch.no_grad():
            expected = wrapped(input_ids=ids).logits
            separate(wrapped)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = wrapped.merge_and_unload()
            _mark_separate(out)
            got = out(input_ids=ids).logits
    except ModelError:
        raise
    except KeyError as error:  # peft looks up each weight of modules_to_save
        raise ModelError(f"{path}: the adapter's file lacks {error.args[0]}; save the adapter again") from error
    except Exception as error:  # peft raises ValueError, RuntimeError, AttributeError, NotImplementedError, ...
        raise ModelError(f"{path}: the adapter cannot be merged into {model.name_or_path} ({_said(error)})") from error
    if not close(got, expected):
        worst = float((got.double() - expected.double()).abs().max())
        raise ModelError(
            f"{path}: merged into its base, the adapter gives logits that are off by {worst:.2g}; merge it with the tool that "
            "trained it, and give the merged model"
        )
    return out


def place(wrapped: Any, name: str, path: str, weights: Mapping[str, Tensor]) -> None:
    """Put saved weights into the adapter `name` of a PeftModel. Raises ModelError if one has no place or another shape, or if
    the adapter has weights that are not among them."""
    from peft import set_peft_model_state_dict

    try:
        result: Any = set_peft_model_state_dict(wrapped, dict(weights), adapter_name=name)
    except RuntimeError as error:
        raise ModelError(
            f"{path}: the adapter does not fit its base ({_said(error)}); it was trained on another base"
        ) from error
    # peft saves resized embeddings a second time under modules_to_save, and a tied weight only once
    unknown = [key for key in result.unexpected_keys if key.replace(".modules_to_save", "") not in weights]
    own = {key: id(value) for key, value in wrapped.named_parameters(remove_duplicate=False) if name in key.split(".")}
    filled = {value for key, value in own.items() if key not in result.missing_keys}
    lost = [key for key, value in own.items() if value not in filled]
    if unknown or lost:
        what = f"the base has no {unknown[0]}" if unknown else f"it lacks {lost[0]}"
        raise ModelError(
            f"{path}: the adapter does not fit its base: {what}; it was trained on another base, or saved in part"
        )


def _said(error: BaseException) -> str:
    """Return the line of an error about weights that names one of them, or its first line."""
    return next((one.strip() for one in str(error).splitlines() if "size mismatch" in one), first_line(error))


def probe(model: Any) -> Tensor:
    """Return a few token ids (1, S) on which two ways to read a model are compared, without its padding token."""
    rows, pad = model.get_input_embeddings().weight.shape[0], model.config.get_text_config().pad_token_id
    ids = [one for one in range(min(rows, 8)) if one != pad]
    return torch.tensor([ids[::-1]], device=model.device)


def close(got: Tensor, expected: Tensor) -> bool:
    """Return whether numbers differ by rounding only, measured by the size of the expected ones."""
    share = 1e-3 if torch.finfo(expected.dtype).eps < 1e-5 else 0.1
    return bool((got.double() - expected.double()).abs().max() <= share * expected.double().abs().mean())


def _fit_embeddings(model: Any, path: str, weights: Mapping[str, Tensor]) -> None:
    """Resize the embeddings to those that an adapter with added tokens has saved. Raises ModelError if it lacks the output's."""
    places = {id(module): name for name, module in model.named_modules()}
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()

    def saved(module: nn.Module) -> Tensor | None:
        names = (f"{PREFIX}{places[id(module)]}.{end}" for end in ("weight", "base_layer.weight"))
        return next((weights[name] for name in names if name in weights), None)

    own = saved(inner)
    if own is None or own.shape[0] == inner.weight.shape[0]:
        return
    if outer is not None and outer.weight is not inner.weight and saved(outer) is None:
        raise ModelError(
            f"{path}: the adapter has {own.shape[0]} embeddings and its base {inner.weight.shape[0]}, but no output head for the "
            "added tokens; save it with save_embedding_layers=True"
        )
    model.resize_token_embeddings(own.shape[0], mean_resizing=False)


def owner(name: str) -> str | None:
    """Return the adapter that a parameter of a wrapped model belongs to, by the parameter's name; None for the base.

    >>> owner("model.embed_tokens.lora_embedding_A.policy"), owner("score.modules_to_save.reward.weight")
    ('policy', 'reward')
    """
    found = _OWNED.search(name)
    return None if found is None else found.group(1)


def plain_name(name: str) -> str:
    """Return the name that a weight of the base has without adapters."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def separate(wrapped: nn.Module) -> None:
    """Give a layer with an adapter a weight of its own if it shares it (tied embeddings), so that merging changes it alone."""
    uses = Counter(id(parameter) for _, parameter in wrapped.named_parameters(remove_duplicate=False))
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in wrapped.modules():
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        for name, parameter in list(base.named_parameters(recurse=False)) if base is not None else ():
            if uses[id(parameter)] > 1:
                uses[id(parameter)] -= 1
                setattr(base, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _mark_separate(model: Any) -> None:
    """Note in the configuration if the embeddings and the head have different weights."""
    outer = model.get_output_embeddings()
    if outer is not None and outer.weight is not model.get_input_embeddings().weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def merged_twin(wrapped: Any, adapter: str) -> Any:
    """Return a copy of a wrapped model with one adapter merged as peft does it."""
    twin = copy.deepcopy(wrapped)
    twin.set_adapter(adapter)  # of modules_to_save peft takes those of the active adapter
    separate(twin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = twin.merge_and_unload(adapter_names=[adapter])
    _mark_separate(out)
    return out


def unties(model: Any, adapter: str) -> bool:
    """Return whether merging this adapter makes the embeddings and the head, which share a weight, differ."""
    plain = dict(model.named_parameters(remove_duplicate=False))
    changed = {id(plain[layer_name]) for layer_name in _changes(model, adapter) if layer_name in plain}
    uses = Counter(id(parameter) for parameter in plain.values())
    return any(uses[one] > 1 for one in changed)


def merged_weights(model: nn.Module, adapter: str, gather: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Iterate over (name without adapters, weight) of a model with one adapter merged ("" merges none).

    Tied weights appear once, or each under its own name if the adapter makes them differ. If the weights are sharded, all
    processes must iterate together. Raises ModelError if the base is quantized, or for an adapter that is more than a product
    of two matrices.
    """
    changes = _changes(model, adapter)
    seen: set[int] = set()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = Counter(id(parameter) for parameter in parameters.values())
    for name, parameter in parameters.items():
        plain = plain_name(name)
        if (own := owner(name)) is not None:
            if own != adapter or ".modules_to_save." not in name:
                continue
            plain = plain.replace(f".modules_to_save.{own}.", ".")
        elif ".original_module." in name:
            replaced = name.replace(".original_module.", f".modules_to_save.{adapter}.")
            if replaced in parameters:
                continue
        if name not in changes and tied[id(parameter)] > 1:
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
        value = gather(parameter)
        if not value.is_floating_point():
            raise ModelError(f"{name}: the base is quantized, so it cannot be merged; only the adapter can be exported")
        for layer in changes.get(name, ()):
            value = value + _delta(layer, adapter, gather).to(value)
        yield plain, value


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong into a saved model, by their names without adapters."""
    return {
        plain_name(f"{prefix}.{name}".lstrip(".")): value.cpu()
        for prefix, module in model.named_modules()
        for name, value in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def _changes(model: nn.Module, adapter: str) -> dict[str, list[Any]]:
    """Return the layers of this adapter by the name of the parameter that they change."""
    from peft.tuners.lora import LoraLayer

    out: dict[str, list[Any]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.scaling:
            continue
        depth, base = 0, cast(Any, layer)
        while hasattr(base, "base_layer"):
            base, depth = base.base_layer, depth + 1
        parameter = getattr(layer, "parameter_name", None) or "weight"
        out.setdefault(f"{name}{'.base_layer' * depth}.{parameter}", []).append(layer)
    return out


class _Delta(nn.Module):
    """What a layer adds to its weight."""

    def __init__(self, layer: Any, adapter: str) -> None:
        super().__init__()
        self.layer, self.adapter = layer, adapter

    def forward(self) -> Tensor:
        return self.layer.get_delta_weight(self.adapter)


def _delta(layer: Any, adapter: str, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute what a layer adds to its weight from its gathered matrices."""
    if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
        kind = "DoRA" if layer.use_dora.get(adapter) else "an adapter with a bias or another variant of LoRA"
        raise ModelError(f"{kind} of the adapter {adapter} cannot be merged here; export the adapter instead")
    whole = {
        f"layer.{name}": gather(parameter)
        for name, parameter in layer.named_parameters()
        if owner(name) == adapter and not name.startswith("base_layer.")
    }
    with torch.no_grad():
        return torch.func.functional_call(_Delta(layer, adapter), whole, ())
