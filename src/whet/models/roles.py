"""Roles of a run: policy, reference, critic, reward. Each is a base model with a head; roles may share a base model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from whet.data import chat_format
from whet.data.files import read_json, write_json
from whet.errors import ModelError, first_line
from whet.models import saved_adapters
from whet.models.finite import check_finite
from whet.models.load import MISSING, scalar_head
from whet.models.lora import save_adapter
from whet.models.router import Router
from whet.models.tokens import told_ends, write_config, write_tokens

Readout = Literal["last", "mean", "sum"]
READOUT_FILE = "whet.json"


@dataclass(frozen=True)
class Paths:
    """Which fast paths of a role give the numbers of its model's plain forward; None is not tried yet.

    padding   rows of unlike length in one batch, padded on the right; without it rows are read one by one
    packing   rows one after the other in one sequence
    sharing   packed rows that have the same prompt, with the prompt computed once
    cache     decoding with a cache; without it each token takes a forward over the whole sequence
    decode    decoding on the weights of a standard decoder (`whet.models.direct`), which is faster than through its modules
    gradient  a forward without gradient, to the last bit; without it columns are measured as in an update
    window    tokens of the longest row that can be packed, for models with local attention; None without such a limit
    limit     number of positions beyond which a row changes the numbers of others in its forward; None without such a limit
    """

    padding: bool | None = None
    packing: bool | None = None
    sharing: bool | None = None
    cache: bool | None = None
    decode: bool | None = None
    gradient: bool | None = None
    window: int | None = None
    limit: int | None = None


@dataclass(eq=False)
class Role:
    """A model with its function in a run.

    `model` is a Hugging Face causal LM (policy, reference) or one-label sequence classifier (critic, reward). With LoRA,
    `wrapped` is the PeftModel around it, and `adapter` the adapter that this role activates ("" disables all adapters, so
    the role is the base model). Roles with a shared base model have the same `wrapped`. `head` is the scalar head of the
    role, None for a classifier that is read through its own forward (see `whole_text`). `readout` says how a score is
    computed (see `whet.models.readers`), and `shift` is added to the score. `paths` is what `whet.models.probe` found. With
    `autocast` the model computes in bfloat16 and keeps its float32 weights (see `compute_in`). If an engine shards the weights
    over processes, `shell` is the module it wrapped (see `whet.models.shell`), and `gather` returns a full parameter; all
    processes must call it together. `router` has the losses of a mixture of experts. `home` is the device of weights that stay in
    CPU memory between uses, as `held`; None if they do not.
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
    router: Router | None = None
    gather: Callable[[Tensor], Tensor] = field(default=Tensor.detach, repr=False)
    linear_head: bool = field(init=False, default=False)
    pads: bool = field(init=False, default=False)
    paths: Paths = field(init=False, default=Paths())
    autocast: bool = field(init=False, default=False)
    home: torch.device | None = field(init=False, default=None)
    held: list[tuple[Tensor, Tensor]] = field(init=False, default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.head is None and not self.causal:
            head = scalar_head(self.model)
            self.head = head if self._score_is_last(head) else None
            if self.whole_text and self.readout != "last":
                raise ModelError(
                    f"{self._whose()} reads a whole text with its own forward, so it has no scores of tokens for the readout "
                    f"{self.readout!r}; use last"
                )
        if self.causal and self.head is None:
            self.linear_head = self._head_is_linear()
        for parameter in self.parameters().values():
            parameter.requires_grad_(self.trained)

    @property
    def causal(self) -> bool:
        """Whether the model has a language-model head."""
        return self.model.get_output_embeddings() is not None

    @property
    def pad_id(self) -> int | None:
        """The pad token of a sequence classifier, which its own forward does not read a score from; None for a causal LM."""
        return None if self.causal else self.model.config.get_text_config().pad_token_id

    @property
    def whole_text(self) -> bool:
        """Whether the model is a classifier that is no scalar head on the hidden state of the last token: an encoder, one with a
        pooler, a head of several layers, a mean over the tokens. It has a score of a whole text, and none of tokens."""
        return self.head is None and not self.causal

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
            if self.adapter and saved_adapters.owner(name) == self.adapter
        }
        if self.head is not None and not any(parameter is self.head.weight for parameter in own.values()):
            own |= {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        return own

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the base model, without adapters, which no role trains."""
        return {name: p for name, p in self.model.named_parameters() if saved_adapters.owner(name) is None}

    def leave(self) -> None:
        """Move the weights to CPU memory, where they stay between uses (see `present`)."""
        if self.home is None:
            self.home = self.device
        modules = [self.model, *([self.head] if self.head is not None else [])]
        tensors = [one for module in modules for one in (*module.parameters(), *module.buffers())]
        self.held = [(one, one.data.to("cpu")) for one in tensors]
        self._move(torch.device("cpu"))

    @contextmanager
    def present(self) -> Iterator[None]:
        """Have the weights on the device that computes. With `leave`, they are copied there, and the copy is dropped at the end."""
        if self.home is None or self.device == self.home:
            yield
            return
        self._move(self.home)
        try:
            yield
        finally:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        for one, held in self.held:
            one.data = held.to(device)
        if self.home is not None and self.home.type == "cuda" and device.type == "cpu":
            torch.cuda.empty_cache()  # for an engine on the same GPU

    @contextmanager
    def active(self) -> Iterator[None]:
        """Activate this role's adapter on the shared base model, and its precision, within the context."""
        with ExitStack() as stack:
            if self.autocast:
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            if self.wrapped is not None and not self.adapter:
                stack.enter_context(self.wrapped.disable_adapter())
            elif self.wrapped is not None:
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

    def compute_in(self, bf16: bool) -> None:
        """Compute in bfloat16 over the float32 weights, or in the dtype of the weights.

        Weights of another dtype are computed in their own, whatever is asked, and a classifier of whole texts too: its own
        forward would round its scores.
        """
        held = self.model.get_input_embeddings().weight.dtype
        self.autocast = bf16 and held == torch.float32 and not self.whole_text

    def hidden(self, ids: Tensor, **layout: Tensor) -> Tensor:
        """Compute the last hidden states of token ids (B, S) -> (B, S, H)."""
        return self.model.base_model(input_ids=ids, use_cache=False, **layout).last_hidden_state

    def logits(self, ids: Tensor, **layout: Tensor) -> Tensor:
        """Compute the logits of token ids (B, S) -> (B, S, V) with the model's forward, for heads that are not only linear."""
        return self.model(input_ids=ids, use_cache=False, **layout).logits

    def routed(self, ids: Tensor, hidden: bool, **layout: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Compute `hidden` or `logits` with the router logits of each layer with experts, (B x S, E) each."""
        out = (self.model.base_model if hidden else self.model)(
            input_ids=ids, use_cache=False, output_router_logits=True, **layout
        )
        return out.last_hidden_state if hidden else out.logits, out.router_logits

    def text_scores(self, texts: Sequence[Tensor]) -> Tensor:
        """Compute the label of texts, token ids (S,) each -> (N,), with the forward of the model's own class.

        The texts share a padded forward if padding does not change a label; else each is read alone, since classes differ in
        what they see of padding. Raises ModelError in the second case if the weights are sharded.
        """
        if self.pads:
            mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
            pad = self.model.config.get_text_config().pad_token_id
            ids = pad_sequence(list(texts), batch_first=True, padding_value=pad)
            return self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits[:, 0]
        if self.shell is not None:  # processes with other numbers of texts would wait for each other
            raise ModelError(
                f"{self._whose()} reads padding as text, so it cannot be sharded; set --learner local, or ddp with torchrun"
            )
        alone = [text[None].to(self.device) for text in texts]
        return torch.cat([self.model(input_ids=one, attention_mask=torch.ones_like(one)).logits[:, 0] for one in alone])

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
        """Iterate over (name in a Hugging Face folder, weight) with the adapter merged. Tied weights appear once, or each
        under its own name if the adapter makes them differ.

        Raises ModelError if the base is quantized, or if the adapter is another than plain LoRA, because these are not merged.
        """
        yield from saved_adapters.merged_weights(self.model, self.adapter, self.gather)

    @property
    def unties(self) -> bool:
        """Whether embeddings and head share a weight in the base, and differ with the adapter merged."""
        return self.wrapped is not None and saved_adapters.unties(self.model, self.adapter)

    def export(
        self,
        folder: Path,
        tokenizer: Any = None,
        *,
        merge: bool = True,
        write: bool = True,
        end_ids: Sequence[int] | None = None,
    ) -> None:
        """Save a standard Hugging Face folder with merged weights, or only the adapter with `merge=False`.

        `end_ids` are the tokens that end a turn; default: those of the tokenizer's chat template.
        If the weights are sharded over processes, all processes must call it; only those with `write` write files. Raises
        ModelError for a role on a shared trunk that has a head of its own, because no folder form has both, and, before anything is
        written, if a weight is NaN or infinite.
        """
        if self.causal and self.head is not None:
            raise ModelError(
                f"the {self.name} is a scalar head on the policy's model, which is not exported on its own"
            )
        if self.shell is None and write:
            check_finite(f"{folder} is not written", self.parameters().items())
        if self.wrapped is not None and not merge:
            save_adapter(self.wrapped, self.adapter, folder, self.gather, write=write)
        elif self.shell is not None:
            whole = {name: value.cpu() for name, value in self.whole() if write}
            if write:
                check_finite(f"{folder} is not written", whole.items())
                self.model.save_pretrained(str(folder), state_dict=whole | saved_adapters.buffers(self.model))
                if self.unties:
                    write_config(folder, tie_word_embeddings=False)
        elif write and self.wrapped is not None:
            saved_adapters.merged_twin(self.wrapped, self.adapter).save_pretrained(str(folder))
        elif write:
            self.model.save_pretrained(str(folder))
        if write and tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
            ends = chat_format(tokenizer).end_ids if end_ids is None else end_ids
            if self.causal and not merge:
                told_ends(self.model, tokenizer, ends)
            write_tokens(folder, tokenizer, ends, generates=self.causal)
        if write and not self.causal:
            write_json(folder / READOUT_FILE, {"readout": self.readout, "shift": self.shift})

    def _whose(self) -> str:
        return f"{self.model.name_or_path}: the {type(self.model).__name__}"

    @torch.no_grad()
    def _score_is_last(self, head: nn.Linear | None) -> bool:
        """Return whether the model's label is head(last hidden state of the last token), on texts of several lengths.

        Raises ModelError if the model's own forward cannot read a text.
        """
        ids = saved_adapters.probe(self.model)[0]
        texts = [ids[: len(ids) - cut] for cut in (0, 1, 3)]
        with self.sampling():
            try:
                own = self.text_scores(texts)
            except Exception as error:  # each class refuses inputs with errors of its own
                raise ModelError(
                    f"{self._whose()} cannot read a text of token ids alone ({first_line(error)})"
                ) from error
            self.pads = self.model.config.get_text_config().pad_token_id is not None
            self.pads = self.pads and saved_adapters.close(self.text_scores(texts), own)
            if head is None:
                return False
            try:
                last = torch.cat([head(self.hidden(text[None])[:, -1])[:, 0] for text in texts])
            except (AttributeError, TypeError, RuntimeError):  # no hidden states, another width
                return False
        return saved_adapters.close(last, own)

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
    try:
        given = read_json(file, ModelError, 'write {"readout": "last"}') if file.is_file() else {}
        shift = float(given.get("shift", 0.0))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f'{file}: it cannot be read ({first_line(error)}); write {{"readout": "last"}}') from error
    if given.get("readout", "last") not in ("last", "mean", "sum"):
        raise ModelError(f"{file}: unknown readout {given['readout']!r}; use last, mean or sum")
    return {"readout": given.get("readout", "last"), "shift": shift}
