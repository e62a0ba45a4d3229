"""The roles of a run: policy, reference, critic, reward. Each is a backbone with a head; together they may share one trunk."""

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
from whet.models.load import scalar_head
from whet.models.lora import save_adapter

Readout = Literal["last", "mean", "sum"]
READOUT_FILE = "whet.json"


@dataclass(eq=False)
class Role:
    """A model in one part of a run.

    `model` is a Hugging Face causal LM (policy, reference) or one-label sequence classifier (critic, reward). With
    LoRA, `wrapped` is the PeftModel around it and `adapter` the adapter that this role switches on ("" switches all
    off, which is the base itself). On one trunk several roles hold the same `wrapped`. `head` is the scalar head where
    the trunk's own head is not this role's. `readout` says how a score is read (see `whet.models.readers`), and `shift` is
    added to it. Where an engine spreads the weights over processes, `shell` is what it wrapped (see `whet.models.shell`)
    and `gather` gives a parameter whole; every process must call it in step.
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

    def __post_init__(self) -> None:
        if self.head is None and hasattr(self.model, "num_labels") and not self.causal:
            self.head = scalar_head(self.model)
        if self.causal and self.head is None:
            self.linear_head = self._head_is_linear()
        for parameter in self.parameters().values():
            parameter.requires_grad_(self.trained)

    @property
    def causal(self) -> bool:
        """The model has a language-model head."""
        return self.model.get_output_embeddings() is not None

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.model.get_input_embeddings().weight.device

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters this role owns, by name: its adapter and head, or the whole model. Tied ones once."""
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
        """The parameters under all adapters, which no role trains."""
        named = self.model.named_parameters()
        return {name: p for name, p in named if "lora_" not in name and "modules_to_save" not in name}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context the shared trunk computes this role."""
        if self.wrapped is None:
            yield
        elif not self.adapter:
            with self.wrapped.disable_adapter():
                yield
        else:
            self.wrapped.set_adapter(self.adapter)
            for parameter in self.parameters().values():
                parameter.requires_grad_(self.trained)  # set_adapter freezes the others and wakes this one
            yield

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within the context the model keeps its cache: under gradient checkpointing transformers drops it in train mode."""
        trains = self.model.training
        self.model.eval()
        try:
            with self.active():
                yield
        finally:
            self.model.train(trains)

    def hidden(self, ids: Tensor, **layout: Tensor) -> Tensor:
        """Last hidden states of token ids (B, S) -> (B, S, H)."""
        return self.model.base_model(input_ids=ids, use_cache=False, **layout).last_hidden_state

    def logits(self, ids: Tensor, **layout: Tensor) -> Tensor:
        """Logits of token ids (B, S) -> (B, S, V): the model's own way, where its head is more than a linear layer."""
        return self.model(input_ids=ids, use_cache=False, **layout).logits

    def attention(self, ids: Tensor) -> Tensor:
        """The last layer's attention weights of token ids (B, S) -> (B, heads, S, S).

        Fast kernels never hold these weights, so the plain one computes this pass.
        """
        config = self.model.config
        before = config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            found = self.model.base_model(input_ids=ids, use_cache=False, output_attentions=True).attentions
        finally:
            self.model.set_attn_implementation(before)
        if not found:
            raise ModelError(
                f"the model of the {self.name} gives no attention weights, so no reward can be placed by them"
            )
        return found[-1]

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of this role by its name in a Hugging Face folder, the adapter merged in, tied ones once.

        Raises ModelError where the base is quantized: its weights have no plain form.
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
                raise ModelError(f"{name}: the base is quantized; only its adapter can be handed on")
            module = self.model.get_submodule(name.rpartition(".")[0].removesuffix(".base_layer"))
            if self.adapter and name.endswith(".base_layer.weight") and self.adapter in module.lora_A:
                a, b = (self.gather(getattr(module, half)[self.adapter].weight) for half in ("lora_A", "lora_B"))
                delta = (b @ a) * module.scaling[self.adapter]
                value = value + (delta.T if module.fan_in_fan_out else delta).to(value)
            yield name.replace(".base_layer.", "."), value

    def export(self, folder: Path, tokenizer: Any = None, *, merge: bool = True, write: bool = True) -> None:
        """A standard Hugging Face folder: merged weights, or with `merge=False` the adapter alone.

        Where the weights are spread over processes all of them take part, and those that `write` leave the folder.
        """
        if self.wrapped is not None and not merge:
            save_adapter(self.wrapped, self.adapter, folder, self.gather, write=write)
        elif self.shell is not None:
            whole = {name: value.cpu() for name, value in self.whole() if write}
            if write:
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
        """The saved configuration names the pad token, so that other tools can batch the model."""
        file = folder / "config.json"
        if file.is_file():
            write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"pad_token_id": pad_token_id})

    def _head_is_linear(self) -> bool:
        """The logits are head(last hidden state) and nothing more.

        Some models scale or cap them, which must not be missed: so the head's input is compared with the hidden state,
        and its output is replaced by large numbers that must come out as the logits unchanged.
        """
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
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
        finally:
            handle.remove()
        same_input = seen["input"].shape == hidden.shape and torch.allclose(seen["input"], hidden, rtol=1e-3, atol=1e-4)
        return same_input and bool((logits == seen["output"].to(logits)).all())


def readout_of(folder: str) -> Mapping[str, Any]:
    """How the reward model in a folder is read: {"readout", "shift"}; last token and 0 for published ones."""
    file = Path(folder) / READOUT_FILE
    given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if given.get("readout", "last") not in ("last", "mean", "sum"):
        raise ModelError(f"{file}: readout {given['readout']!r} is none of last, mean, sum")
    return {"readout": given.get("readout", "last"), "shift": float(given.get("shift", 0.0))}
