"""Loading of models and tokenizers from Hugging Face folders or names."""

import inspect
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whet.errors import ModelError, first_line
from whet.extras import require
from whet.models import saved_adapters
from whet.models.code import refuse_code
from whet.models.finite import check_finite
from whet.models.folders import adapter_base, check_folder, has_tokenizer, settings
from whet.models.sizes import width_of
from whet.models.tokens import mend_generation_config, try_tokenizer, why
from whet.ops import address

MISSING = "ids_without_token"
"""Attribute of a causal LM: the ids that its embedding has and no token of its tokenizer."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
KERNELS = {
    "flash_attention_2": "flash-attn on a machine with a GPU (pip install flash-attn --no-build-isolation)",
    "flash_attention_3": "flash-attn-3 on a machine with a Hopper GPU (github.com/Dao-AILab/flash-attention, folder hopper)",
}
"""Packages of attention kernels that do not come with torch."""
HEADS = ("score", "classifier")
"""Names of the head of a sequence classifier."""


@dataclass(frozen=True)
class ModelSource:
    """The path of a model and how to load it. `dtype` "auto" is bfloat16 on a GPU, float32 elsewhere.

    `quantize` "4bit" loads the base in 4 bits (QLoRA); it needs a GPU and bitsandbytes. `attn_implementation` names the
    attention kernels; "auto" leaves the choice to transformers.
    """

    path: str
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    quantize: str = "none"
    attn_implementation: str = "auto"

    def torch_device(self) -> torch.device:
        """Return the device of this source. Raises ModelError if this machine does not have it."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ModelError(
                f"model.device: this machine has no device {self.device!r} ({first_line(error)})"
            ) from error
        return device

    def torch_dtype(self) -> torch.dtype:
        """Return the floating-point type of this source."""
        if self.dtype == "auto":
            return torch.bfloat16 if self.torch_device().type == "cuda" else torch.float32
        return DTYPES[self.dtype]


def load_tokenizer(source: ModelSource, *, pad_token: str | None = None) -> Any:
    """Load the tokenizer of a folder or name. Raises ModelError if there is none. Without a pad token, it is the end token."""
    from transformers import AutoTokenizer

    check_folder(source.path)
    path = source.path if has_tokenizer(source.path) else adapter_base(source.path)[0]
    if not has_tokenizer(path):  # transformers would silently make an empty tokenizer
        raise ModelError(f"{source.path}: the folder has no tokenizer; save it there (tokenizer.save_pretrained)")
    refuse_code(path, source.trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # transformers raises many error types for a folder without a tokenizer
        raise ModelError(f"{source.path}: the tokenizer cannot be loaded ({why(error)})") from error
    try_tokenizer(source.path, tokenizer)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ModelError(f"--model.pad-token {pad_token!r}: the tokenizer of {source.path} has no such token")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # other tools need one to batch inputs of the saved model
    return tokenizer


def load_causal_lm(source: ModelSource, tokenizer: Any = None) -> Any:
    """Load the causal language model of a folder or name; an adapter-only folder is merged into its base.

    The model's own dropout is turned off. Ids that no token of the tokenizer has (embeddings are often larger than the
    vocabulary) are noted on the model, see `Role.missing`. Raises ModelError if the model cannot be loaded, if a weight is
    NaN or infinite, if the adapter cannot be merged, or if the tokenizer has ids that the embedding does not have.
    """
    from transformers import AutoModelForCausalLM

    base, adapter = adapter_base(source.path)
    if adapter is not None and is_scorer(adapter):
        raise ModelError(f"{source.path}: it is the adapter of a reward model, not of a language model")
    model = _loaded(AutoModelForCausalLM.from_pretrained, source, base)
    if adapter is not None:
        model = _merged(source, _quiet(model), adapter)
    _check_vocabulary(source, model, tokenizer)
    mend_generation_config(model, source.path)
    if tokenizer is not None:
        setattr(model, MISSING, missing_ids(tokenizer, model.get_input_embeddings().weight.shape[0]))
    return _quiet(model)


def missing_ids(tokenizer: Any, size: int) -> Tensor | None:
    """Return the ids below `size` that no token of the tokenizer has, (M,); None if there are none."""
    known = torch.zeros(size, dtype=torch.bool)
    known[torch.tensor(sorted(set(tokenizer.get_vocab().values())))] = True
    missing = (~known).nonzero()[:, 0]
    return missing if len(missing) else None


def load_scorer(source: ModelSource, tokenizer: Any = None, *, seed: int = 0) -> Any:
    """Load a sequence-classification model with one label: a saved reward model, or a causal LM with a new head.

    The weights of a new head are drawn from N(0, 1 / (H + 1)) (Stiennon et al. 2020) and depend only on `seed`.
    """
    from transformers import AutoModelForSequenceClassification

    base, adapter = adapter_base(source.path)
    if adapter is not None and is_scorer(adapter):
        plain = _quiet(_scorer(source, base))
        model = _merged(source, plain, adapter)
        _check_vocabulary(source, model, tokenizer)
        return _quiet(model)
    config = _configuration(base, source.trust_remote_code)
    if is_scorer(base, source.trust_remote_code):
        if config.num_labels != 1:
            raise ModelError(f"{source.path}: a reward model has one label, this one has {config.num_labels}")
        model = _quiet(_loaded(AutoModelForSequenceClassification.from_pretrained, source, base))
        _check_vocabulary(source, model, tokenizer)
        return model
    if adapter is not None:
        raise ModelError(f"{source.path}: merge the adapter into its base before putting a scalar head on it")
    model = _quiet(_scorer(source, base))
    _check_vocabulary(source, model, tokenizer)
    head = scalar_head(model)
    if head is None:
        raise ModelError(
            f"{source.path}: a {type(model).__name__} has a head of several layers, and whet draws new heads of one layer only; "
            "start from a reward model of this kind, or from another model"
        )
    draw_head(head, seed)
    if tokenizer is not None:
        set_pad(model, tokenizer)
    return model


def _scorer(source: ModelSource, base: str) -> Any:
    """Load a model as a sequence classifier with one label; its head may be new."""
    from transformers import AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification.from_pretrained
    return _loaded(auto, source, base, new=tuple(f"{name}." for name in HEADS), num_labels=1)


def backbone(source: ModelSource) -> Any:
    """Load a model without its head; an adapter-only folder is merged into its base."""
    from transformers import AutoModel

    base, adapter = adapter_base(source.path)
    return load_causal_lm(source).base_model if adapter else _loaded(AutoModel.from_pretrained, source, base)


def _merged(source: ModelSource, model: Any, adapter: str) -> Any:
    """Merge an adapter folder into its loaded base, and name the model after the folder, since it is no longer its base."""
    if source.quantize != "none":
        raise ModelError(
            f"{adapter}: rounding to 4 bits would lose parts of an adapter that is merged; merge it into its base first "
            "(without model.quantize), and give the merged model"
        )
    model = saved_adapters.merged(model, adapter)
    model.name_or_path = model.config._name_or_path = source.path
    return model


def _check_vocabulary(source: ModelSource, model: Any, tokenizer: Any) -> None:
    if tokenizer is None:
        return
    rows, ids = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values()) + 1
    if ids > rows:
        raise ModelError(
            f"{source.path}: the tokenizer has {ids} ids but the model only {rows} embeddings; "
            "the vocabulary does not fit, use the tokenizer that belongs to the model"
        )


def set_pad(model: Any, tokenizer: Any) -> None:
    """Write the tokenizer's pad token into the configuration of a model."""
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def draw_head(head: nn.Linear, seed: int) -> None:
    """Draw the weights of the head from N(0, 1 / (H + 1)); they depend only on `seed`."""
    fresh = torch.Generator().manual_seed(address(seed, "head") >> 1)
    with torch.no_grad():
        drawn = torch.randn(head.weight.shape, generator=fresh) / (head.weight.shape[1] + 1) ** 0.5
        head.weight.copy_(drawn.to(head.weight))
        if head.bias is not None:
            head.bias.zero_()


def pad_of(path: str, trust_remote_code: bool = False) -> int | None:
    """Return the pad token in the configuration of a model; of its base for an adapter."""
    base, _ = adapter_base(path)
    return _configuration(base, trust_remote_code).get_text_config().pad_token_id


def end_ids_of(source: ModelSource) -> list[int]:
    """Return the tokens with which a model ends by its own generation configuration; empty if it has none."""
    from transformers import GenerationConfig

    base, _ = adapter_base(source.path)
    try:
        ends = GenerationConfig.from_pretrained(base).eos_token_id
    except Exception:  # none, or one that `mend_generation_config` refuses
        return []
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(one) is int and one >= 0 for one in ends):
        raise ModelError(
            f"{source.path}: eos_token_id of the generation config must be ids of tokens, got {ends!r:.80}"
        )
    return ends


def positions(source: ModelSource) -> int:
    """Return the maximum sequence length of a model, from its configuration."""
    base, _ = adapter_base(source.path)
    about = _configuration(base, source.trust_remote_code)
    most = getattr(about, "max_position_embeddings", None) or 1 << 20
    if type(most) is not int or most < 2:
        raise ModelError(
            f"{source.path}: max_position_embeddings of config.json must be a number of tokens, got {most!r:.80}"
        )
    return most


def width(source: ModelSource) -> int:
    """Return the width of the hidden states of a model, from its configuration (see `width_of`)."""
    base, _ = adapter_base(source.path)
    return width_of(_configuration(base, source.trust_remote_code))


def check_code(source: ModelSource) -> None:
    """Raise ModelError if a model, or the base of an adapter, comes with code that the source does not trust. Load nothing."""
    for path in dict.fromkeys((source.path, adapter_base(source.path)[0])):
        refuse_code(path, source.trust_remote_code)


def _configuration(path: str, trust_remote_code: bool = False) -> Any:
    from transformers import AutoConfig

    check_folder(path)
    refuse_code(path, trust_remote_code)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many error types for a folder without a model
        raise ModelError(f"{path}: the model configuration cannot be read ({why(error)})") from error


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass; the model's own dropout stays off in train mode."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.24
    if enable is not None:
        enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()


def cache_argument(model: nn.Module) -> str:
    """Return the name of the argument of a model's forward that takes the cache: "past_key_values", or "cache" in the models of
    transformers since 5.24."""
    from transformers import GenerationMixin

    own = inspect.signature(model.forward).parameters
    if "past_key_values" in own or "cache" in own:
        return "cache" if "cache" in own else "past_key_values"
    library = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in library else "past_key_values"


def quiet() -> None:
    """Turn off the progress bars and warnings of transformers, such as the warning about a new head."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # read by peft


def scalar_head(model: Any) -> nn.Linear | None:
    """Return the linear layer that computes the label of a sequence-classification model, or None if it has no such layer."""
    for name in HEADS:
        head = getattr(model, name, None)
        if head is not None and hasattr(head, "modules_to_save"):  # peft trains a copy of the head
            head = head.modules_to_save[head.active_adapters[0]]
        if isinstance(head, nn.Linear):
            return head
    return None


def heads(model: Any) -> list[str]:
    """Return the names of the modules with weights that a sequence-classification model has outside its backbone."""
    outside = (named for named in model.named_children() if named[1] is not model.base_model)
    return [name for name, module in outside if next(module.parameters(), None) is not None]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers: the longest of the outermost module lists (lists of experts are nested deeper)."""
    lists = [(name.count("."), -len(one), one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(model).__name__}: found no list of decoder layers")
    return min(lists, key=lambda found: found[:2])[2]


def _loaded(
    load: Callable[..., Any], source: ModelSource, path: str, *, new: tuple[str, ...] = (), **options: Any
) -> Any:
    """Load a model with `load`. Only weights whose names start with one of `new` may be missing in its folder."""
    check_folder(path)
    refuse_code(path, source.trust_remote_code)
    device = source.torch_device()
    if source.quantize == "4bit":
        options["quantization_config"] = _four_bit(device)
    if source.attn_implementation != "auto":
        options["attn_implementation"] = source.attn_implementation
    try:
        model, about = load(
            path,
            dtype=source.torch_dtype(),
            trust_remote_code=source.trust_remote_code,
            weights_only=True,  # a pickled file may hold tensors only
            output_loading_info=True,
            **options,
        )
    except ModelError:
        raise
    except ImportError as error:
        package = KERNELS.get(source.attn_implementation)
        if package is None:
            raise ModelError(f"{source.path}: the model cannot be loaded ({why(error)})") from error
        raise ModelError(
            f"model.attn_implementation: {source.attn_implementation} cannot be used on this machine ({first_line(error)}); "
            f"install {package}, or leave the option out"
        ) from error
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{source.path}: its weights are a pickled file that holds more than tensors, so it is not read; save them as "
            f"safetensors where you trust the file ({first_line(error)})"
        ) from error
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for an invalid model
        raise ModelError(f"{source.path}: the model cannot be loaded ({why(error)})") from error
    if getattr(model, "_hf_peft_config_loaded", False):  # a hub name is seen to be an adapter only here
        raise ModelError(f"{source.path}: it is an adapter; download it to a folder, and give the folder")
    # transformers silently initializes missing weights at random
    lost = [key for key in about["missing_keys"] if not key.startswith(new)]
    if lost or about["mismatched_keys"]:
        wrong = ", ".join([*map(str, sorted(lost)), *map(str, about["mismatched_keys"])][:3])
        raise ModelError(f"{source.path}: weights of the model are missing or have another shape ({wrong}, ...)")
    model = model if source.quantize == "4bit" else model.to(device)
    check_finite(source.path, model.state_dict().items())
    return model


def check_four_bit(device: torch.device) -> None:
    """Raise ModelError if this machine cannot load a base in 4 bits."""
    if device.type != "cuda":
        raise ModelError(
            "model.quantize: a 4-bit base needs a GPU, and this machine has none; set it to none (LoRA works on CPU)"
        )
    require("model.quantize: a base in 4 bits", "accelerate", "bitsandbytes", raises=ModelError)


def _four_bit(device: torch.device) -> Any:
    check_four_bit(device)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def is_scorer(path: str, trust_remote_code: bool = False) -> bool:
    """Return whether a folder or name is a sequence classifier, as a full model or as an adapter."""
    base, adapter = adapter_base(path)
    if adapter is not None:
        return settings(adapter).get("task_type") == "SEQ_CLS"
    names = _configuration(base, trust_remote_code).architectures or []
    return any("SequenceClassification" in name or "RewardModel" in name for name in names)


def _quiet(model: Any) -> Any:
    """Set the model's own dropout to 0 and the model to eval mode; whet has its own dropout, see `whet.models.dropout`."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)
    return model.eval()
