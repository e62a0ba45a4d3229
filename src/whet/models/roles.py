"""Roles of a run: policy, reference, critic, reward. Each is a base model with a head; roles may share a base model."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from whet.data.files import write_json
from whet.errors import ModelError
from whet.models.load import MISSING, check_finite, scalar_head
from whet.models.lora import save_adapter

Readout = Literal["last", "mean", "sum"]
READOUT_FILE = "whet.json"


@dataclass(frozen=True)
class Paths:
    """Which fast paths of a role give the numbers of its model's plain forward; None is not tried yet.

    padding   rows of unlike length in one batch, padded on the right; without it rows are read one by one
    packing   rows one after the other in one sequence
    cache     decoding with a cache; without it each token takes a forward over the whole sequence
    gradient  a forward without gradient, to the last bit; without it columns are measured as in an update
    """

    padding: bool | None = None
    packing: bool | None = None
    cache: bool | None = None
    gradient: bool | None = None


@dataclass(eq=False)
class Role:
    """A model with its function in a run.

    `model` is a Hugging Face causal LM (policy, reference) or one-label sequence classifier (critic, reward). With LoRA,
    `wrapped` is the PeftModel around it, and `adapter` the adapter that this role activates ("" disables all adapters, so
    the role is the base model). Roles with a shared base model have the same `wrapped`. `head` is the scalar head of the
    role. `readout` says how a score is computed (see `whet.models.readers`), and `shift` is added to the score. `paths` is
    what `whet.models.probe` found. If an
    engine shards the weights over processes, `shell` is the module it wrapped (see `whet.models.shell`), and `gather`
    returns a full parameter; all processes must call it together.
    """

    name: str
    model: Any
    trained: bool
    wrapped: Any = None
    adapter: str = ""
    head: nn.Linear | None = None
    readout: Readout = "last"
    shift: float = 0.0
    shell: Any = None
    gather: Callable[[Tensor], Tensor] = field(default=Tensor.detach, repr=False)
    linear_head: bool = field(init=False, default=False)
    paths: Paths = field(init=False, default=Paths())

    def __post_init__(self) -> None:
        if self.head is None and hasattr(self.model, "num_labels") and not self.causal:
            self.head = scalar_head(self.model)
        if self.causal and self.head is None:
            self.linear_head = self._head_is_linear()
        for parameter in self.parameters().values():
            parameter.requires_grad_(self.trained)

    @property
    def causal(self) -> bool:
        """Whether the model has a language-model head."""
        return self.model.get_output_embeddings() is not None

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self.model.get_input_embeddings().weight.device

    @property
    def missing(self) -> Tensor | None:
        """The ids that no token of the tokenizer has, (M,), which `load_causal_lm` notes; None if there are none."""
        found: Tensor | None = getattr(self.model, MISSING, None)
        return found

    def close(self, logits: Tensor) -> Tensor:
        """Return logits (..., V) with -inf for the ids that no token has, so that they have probability 0."""
        return logits if self.missing is None else logits.index_fill(-1, self.missing.to(logits.device), -torch.inf)

    def output_bias(self, bias: Tensor | None, like: Tensor, size: int) -> Tensor | None:
        """Return the bias (V,) of the head with -inf for the ids that no token has, in the dtype and device of `like`."""
        if self.missing is None:
            return bias
        closed = self.close(like.new_zeros(size))
        return closed if bias is None else bias + closed

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of this role by name: its adapter and head, or the whole model. Tied ones appear once."""
        if self.wrapped is None:
            return dict(self.model.named_parameters())
        own = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if self.adapter and f".{self.adapter}." in name and ("lora_" in name or "modules_to_save" in name)
        }
        if self.head is not None and not any(parameter is self.head.weight for parameter in own.values()):
            own |= {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        return own

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the base model, without adapters, which no role trains."""
        named = self.model.named_parameters()
        return {name: p for name, p in named if "lora_" not in name and "modules_to_save" not in name}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Activate this role's adapter on the shared base model within the context."""
        if self.wrapped is None:
            yield
        elif not self.adapter:
            with self.wrapped.disable_adapter():
                yield
        else:
            self.wrapped.set_adapter(self.adapter)
            for parameter in self.parameters().values():
                parameter.requires_grad_(self.trained)  # set_adapter freezes the others and unfreezes this one
            yield

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Set eval mode within the context: with gradient checkpointing, transformers has no KV cache in train mode."""
        trains = self.model.training
        self.model.eval()
        try:
            with self.active():
                yield
        finally:
            self.model.train(trains)

    def hidden(self, ids: Tensor, **layout: Tensor) -> Tensor:
        """Compute the last hidden states of token ids (B, S) -> (B, S, H)."""
        return self.model.base_model(input_ids=ids, use_cache=False, **layout).last_hidden_state

    def logits(self, ids: Tensor, **layout: Tensor) -> Tensor:
        """Compute the logits of token ids (B, S) -> (B, S, V) with the model's forward, for heads that are not only linear."""
        return self.model(input_ids=ids, use_cache=False, **layout).logits

    def attention(self, ids: Tensor) -> Tensor:
        """Compute the attention weights of the last layer for token ids (B, S) -> (B, heads, S, S).

        Fast attention kernels do not store these weights, so this pass uses the "eager" implementation.
        """
        config = self.model.config
        before = config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            found = self.model.base_model(input_ids=ids, use_cache=False, output_attentions=True).attentions
        finally:
            self.model.set_attn_implementation(before)
        if not found:
            raise ModelError(f"the model of the {self.name} returns no attention weights, so they cannot place rewards")
        return found[-1]

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over (name in a Hugging Face folder, weight) with the adapter merged; tied weights appear once.

        Raises ModelError if the base is quantized or the adapter is on an embedding, because these are not merged.
        """
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            if "lora_embedding" in name:
                raise ModelError(
                    f"model.lora.targets: {name} adapts an embedding, which is not merged here; leave it out"
                )
            if "lora_" in name or ".original_module." in name:
                continue
            if ".modules_to_save." in name:
                head, _, rest = name.partition(".modules_to_save.")
                if rest.startswith(f"{self.adapter}."):
                    yield f"{head}.{rest.removeprefix(f'{self.adapter}.')}", self.gather(parameter)
                continue
            value = self.gather(parameter)
            if not value.is_floating_point():
                raise ModelError(
                    f"{name}: the base is quantized, so it cannot be merged; only the adapter can be exported"
                )
            module = self.model.get_submodule(name.rpartition(".")[0].removesuffix(".base_layer"))
            if self.adapter and name.endswith(".base_layer.weight") and self.adapter in module.lora_A:
                a, b = (self.gather(getattr(module, half)[self.adapter].weight) for half in ("lora_A", "lora_B"))
                delta = (b @ a) * module.scaling[self.adapter]
                value = value + (delta.T if module.fan_in_fan_out else delta).to(value)
            yield name.replace(".base_layer.", "."), value

    def export(self, folder: Path, tokenizer: Any = None, *, merge: bool = True, write: bool = True) -> None:
        """Save a standard Hugging Face folder with merged weights, or only the adapter with `merge=False`.

        If the weights are sharded over processes, all processes must call it; only those with `write` write files. Raises
        ModelError, before anything is written, if a weight is NaN or infinite.
        """
        if self.shell is None and write:
            check_finite(f"{folder} is not written", self.parameters().items())
        if self.wrapped is not None and not merge:
            save_adapter(self.wrapped, self.adapter, folder, self.gather, write=write)
        elif self.shell is not None:
            whole = {name: value.cpu() for name, value in self.whole() if write}
            if write:
                check_finite(f"{folder} is not written", whole.items())
                self.model.save_pretrained(str(folder), state_dict=whole)
        elif write and self.wrapped is not None:
            copy.deepcopy(self.wrapped).merge_and_unload(adapter_names=[self.adapter]).save_pretrained(str(folder))
        elif write:
            self.model.save_pretrained(str(folder))
        if write and tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
            self._tell_pad_token(folder, tokenizer.pad_token_id)
        if write and not self.causal:
            write_json(folder / READOUT_FILE, {"readout": self.readout, "shift": self.shift})

    @staticmethod
    def _tell_pad_token(folder: Path, pad_token_id: int) -> None:
        """Write the pad token to the saved configuration, so that other tools can batch inputs."""
        file = folder / "config.json"
        if file.is_file():
            write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"pad_token_id": pad_token_id})

    def _head_is_linear(self) -> bool:
        """Return whether the logits are exactly head(last hidden state).

        Some models scale or cap the logits. To detect this, the input of the head is compared with the hidden state, and
        the output of the head is replaced by large numbers that must be equal to the logits.
        """
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or self.model.base_model is self.model:
            return False
        probe, seen = torch.arange(3, device=self.device)[None], {}

        def watch(_module: nn.Module, given: tuple, output: Tensor) -> Tensor:
            seen["input"] = given[0]
            seen["output"] = torch.linspace(-300, 300, output.numel()).reshape(output.shape).to(output)
            return seen["output"]

        handle = head.register_forward_hook(watch)
        try:
            with torch.no_grad(), self.active():
                logits, hidden = self.logits(probe), self.hidden(probe)
        except Exception:  # the probe tells what is wrong
            return False
        finally:
            handle.remove()
        same_input = seen["input"].shape == hidden.shape and torch.allclose(seen["input"], hidden, rtol=1e-3, atol=1e-4)
        return same_input and bool((logits == seen["output"].to(logits)).all())


def readout_of(folder: str) -> Mapping[str, Any]:
    """Return the readout settings {"readout", "shift"} of the reward model in a folder; the defaults are "last" and 0."""
    file = Path(folder) / READOUT_FILE
    given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if given.get("readout", "last") not in ("last", "mean", "sum"):
        raise ModelError(f"{file}: unknown readout {given['readout']!r}; use last, mean or sum")
    return {"readout": given.get("readout", "last"), "shift": float(given.get("shift", 0.0))}
