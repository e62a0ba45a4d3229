"""Try a role's fast paths on a few rows before they are used: each must give the numbers of the model's plain forward.

Whatever the architecture, numbers are compared: each row alone against padded, packed and decoded with a cache, and a
row against the same row with other tokens at its end. A fast path that is wrong is left off with one line on stderr.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whet.data import Batch, Row
from whet.distributed import first
from whet.errors import ModelError, first_line
from whet.models.decode import Cached, Decoder
from whet.models.direct import Direct
from whet.models.packing import install, local_attention, uninstall
from whet.models.readers import read
from whet.models.roles import Role
from whet.models.structure import structure
from whet.ops import token_logprobs
from whet.ops.head import precise
from whet.terminal import caution

BOUND = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference that is rounding, by the dtype of the weights, as a share of the size of the numbers: for log-probs the
standard deviation of the logits over the vocabulary, at most 1 (then it is in nats); for scores the largest one.

Over 150 architectures in float32, layouts that are right differ by up to 2e-5 and wrong ones by 1.5e-3 or more; in bfloat16 the
right ones of a model of 50 million weights differ by up to 0.05.
"""
HALF = 0.12
"""The same bound for weights in half precision."""
SOME = 16
"""Number of rows that are worth giving to `probe`."""
SLOWER = {
    "cache": "decoding with a cache differs {}; answers are generated without one, which is slow",
    "decode": "decoding on its weights differs {}; answers are generated with its own modules, which is slower",
}
"""What is said of a way to decode that is wrong, by its name in `Paths`."""
LONGEST, SHORTEST, STEPS = 128, 9, 4
"""Lengths of the rows that are tried, in tokens, and the tokens that are decoded of each."""


def probe(role: Role, rows: Sequence[Tensor], *, packed: bool = False, cached: bool = False) -> None:
    """Try padding, and packing and decoding with a cache if they are wanted, and note in `role.paths` what is right.

    With packing, a model that has transformers' "sdpa" attention gets the one of `whet.models.packing`, if it is right.

    `rows` are token ids (S,) of the run, of which a few are taken. What was tried before is not tried again. Call it while
    the weights are whole, before a backend shards them. Raises ModelError if
    - the model is no causal language model: later tokens change the log-probs of earlier ones,
    - its forward fails, gives numbers that are not finite, changes weights, or differs with gradient checkpointing,
    - it computes in bfloat16 over float32 weights and then fails or gives other numbers, on average by more than rounding.
    The paths are tried in the precision of the weights, where rounding hides less.
    """
    if role.whole_text:  # read through its own forward, see `Role.text_scores`
        return
    role.paths = replace(role.paths, limit=_rope_limit(role.model.config.get_text_config()))
    new = role.paths.padding is None
    packed, cached = packed and role.paths.packing is None, cached and role.paths.cache is None
    if not (new or packed or cached):
        return
    half, flash = role.autocast, str(role.model.config._attn_implementation).startswith("flash")
    if flash and not half and role.model.dtype == torch.float32:
        raise ModelError(
            f"model.attn_implementation: {role.model.config._attn_implementation} computes in half precision only, and the "
            f"{role.name} in float32; set --learner.precision bf16, or --model.dtype bfloat16 outside training"
        )
    with torch.no_grad():
        role.autocast = half and flash
        try:
            trial = _Trial(role, _chosen(rows, role))
            trial.run(new, packed, cached)
        finally:
            role.autocast = half
        if half:
            trial.half(cached)
        if new and role.trained:
            trial.gradient()


def _rope_limit(config: Any) -> int | None:
    """Return the number of positions after which the rotary embedding of a model depends on the longest row of a forward. This is
    far beyond the rows that are tried, so it is read from the configuration."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)}
    if kinds.isdisjoint({"longrope", "dynamic"}):
        return None
    given = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(given or config.max_position_embeddings)


class _Trial:
    """One role on a few rows. `truth` has the numbers of each row alone: log-probs of its tokens, or scores at them; `limit`
    is the largest difference from it that is rounding."""

    def __init__(self, role: Role, rows: Sequence[Row]) -> None:
        self.role, self.rows = role, rows
        self.names = frozenset({"logp"}) if role.head is None else frozenset({"value"})
        kinds = {one.dtype for one in role.model.parameters() if one.is_floating_point()}
        low = (
            role.autocast or kinds - BOUND.keys() or (torch.float32 in kinds and role.device.type == "cuda" and _tf32())
        )
        self.bound = HALF if low else max(BOUND[one] for one in kinds)
        self.limit = 0.0

    def run(self, new: bool, packed: bool, cached: bool) -> None:
        """See `probe`."""
        role = self.role
        with role.sampling():
            self.truth = self._truth()
        if new:
            self._causal()
            if role.model.training:  # gradient checkpointing
                gap, why = self._gap(self._alone)
                if not gap <= self.limit:
                    raise ModelError(
                        f"model.gradient_checkpointing: in train mode the {role.name} differs {why}; leave it out"
                    )
            with role.sampling():
                self._adapters()
                self._head()
                self._padding()
        with role.sampling() if not role.model.training else nullcontext():
            if packed:
                self._packing()
        if cached:
            with role.sampling():
                self._cache()

    def _truth(self) -> Tensor:
        """Return the numbers of all rows by the model's plain forward of each alone, one after the other."""
        before = self._marks()
        try:
            out = torch.cat([self._plain(row.ids) for row in self.rows])
        except Exception as error:
            adapters = "; do its adapters fit (model.lora.targets)?" if self.role.adapter else ""
            raise ModelError(
                f"the {self.role.name} cannot be run on token ids alone ({first_line(error)}){adapters}"
            ) from error
        changed = [name for name, mark in self._marks().items() if before.get(name) != mark]
        if changed:
            raise ModelError(
                f"the forward of the {self.role.name} changes its weights ({changed[0]}), so a saved model would differ; see "
                "its configuration (RWKV: rescale_every 0)"
            )
        if not bool(torch.isfinite(out).all()):
            raise ModelError(
                f"the {self.role.name} gives numbers that are NaN or infinite, although its weights are finite: its activations "
                "overflow; load it in another dtype (--model.dtype float32 or bfloat16)"
            )
        return out

    def _marks(self) -> dict[str, float]:
        """Return the sum of each weight by its name. (peft wraps and unwraps the weights of experts in each forward, so neither
        the version nor the identity of a tensor says whether it changed.)"""
        named = self.role.model.named_parameters()
        return {name: float(one.detach().sum(dtype=torch.float64)) for name, one in named if one.is_floating_point()}

    def _plain(self, ids: Tensor) -> Tensor:
        """Return log-probs (S - 1,) of the ids after the first, or scores (S - 1,) at the ids before the last."""
        role, given = self.role, ids[None].to(self.role.device)
        if role.head is None:
            logits = role.logits(given)[0, :-1]
            logits = precise(logits)
            size = min(1.0, float(logits.std(-1).mean()))
            out = token_logprobs(role.close(logits), given[0, 1:])
        else:
            scores = role.head(role.hidden(given)[0, :-1].to(role.head.weight.dtype))[:, 0]
            out = precise(scores) + (0.0 if role.readout == "sum" else role.shift)
            size = float(out.abs().max())
        self.limit = max(self.limit, self.bound * size)
        return out.cpu()

    def _alone(self) -> Tensor:
        return torch.cat([self._read([row]) for row in self.rows])

    def _read(self, rows: Sequence[Row], *, packed: bool = False, shared: bool = False) -> Tensor:
        batch = Batch.of(rows)
        (column,) = read(self.role, batch, self.names, packed=packed, shared=shared).values()
        return column.cpu()[batch["mask"]]

    def _fastest(self) -> Tensor:
        """Read the rows in the layout that the learner will use."""
        return self._read(self.rows, packed=bool(self.role.paths.packing))

    def _gap(self, other: Callable[[], Tensor], truth: Tensor | None = None, mean: bool = False) -> tuple[float, str]:
        """Return the largest (or the mean) difference to the truth and words for it; infinity if `other` fails."""
        truth = self.truth if truth is None else truth
        try:
            found = other()
        except Exception as error:
            return float("inf"), f"from its plain forward (it fails: {first_line(error)})"
        gaps = (found - truth).abs()
        gap = float(gaps.mean() if mean else gaps.max())
        unit = " nats" if self.role.head is None else ""
        return gap, f"from its plain forward by {gap:.2g}{unit}"

    def _causal(self) -> None:
        """Refuse a language model that looks both ways, and such a critic. A reward model may."""
        if self.role.head is not None and self.role.name != "critic":
            return
        row = max(self.rows, key=lambda one: one.length)
        kept = row.length // 2
        ids = torch.unique(torch.cat([one.ids for one in self.rows]))
        other = torch.where(
            torch.arange(row.length) < kept, row.ids, ids[(torch.searchsorted(ids, row.ids) + 1) % len(ids)]
        )
        with self.role.sampling():
            before = self._earlier(row.ids, kept)
            gaps = [self._gap(partial(self._earlier, one, kept), before)[0] for one in (other, row.ids[:kept])]
        gap = max(gaps)
        if not gap <= self.limit:
            raise ModelError(
                f"the {self.role.name} is no causal language model: later tokens change its numbers at earlier ones by {gap:.2g}; "
                "give a causal model (for encoders like BERT set is_decoder in its configuration)"
            )

    def _earlier(self, ids: Tensor, kept: int) -> Tensor:
        return self._plain(ids)[: kept - 1]

    def _adapters(self) -> None:
        """Refuse adapters whose merged weights would be shared with each other, and name those that the forward does not use."""
        if not self.role.trained or not self.role.adapter:
            return
        own = {
            name: module
            for name, module in self.role.model.named_modules()
            if self.role.adapter in getattr(module, "lora_A", {})
        }
        weights: dict[int, str] = {}
        used: set[str] = set()
        handles = []
        for name, module in own.items():
            adapted = getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"))
            other = weights.setdefault(id(adapted), name)
            if other != name:
                raise ModelError(
                    f"model.lora.targets: {other} and {name} share one weight, so their adapters cannot be merged into it; leave "
                    "them out"
                )
            handles.append(module.register_forward_hook(lambda *_, name=name: used.add(name)))
        try:
            self._plain(self.rows[0].ids)
        finally:
            for handle in handles:
                handle.remove()
        idle = sorted({name.rpartition(".")[2] for name in own.keys() - used})
        if len(used) == 0 and own:
            raise ModelError(
                f"model.lora.targets: the forward does not call {', '.join(idle)}, so nothing would be trained"
            )
        if idle:
            self._say(f"its forward does not call {', '.join(idle)}, whose adapters are not trained")

    def _head(self) -> None:
        """Read through the model's own forward if hidden states times the weight of the head are not its logits."""
        gap, why = self._gap(self._alone)
        if not gap <= self.limit and self.role.linear_head:
            self._say(f"its head alone differs {why}; all its logits are computed")
            self.role.linear_head = False
            gap, why = self._gap(self._alone)
        if not gap <= self.limit:
            raise ModelError(f"the {self.role.name} cannot be read: one row differs {why}")

    def _padding(self) -> None:
        gap, why = self._gap(lambda: self._read(self.rows))
        self.role.paths = replace(self.role.paths, padding=gap <= self.limit)
        if not self.role.paths.padding:
            self._say(f"rows that are padded on the right differ {why}; they are read one by one, which is slow")

    def half(self, cached: bool) -> None:
        """Compare the role in bfloat16 with what its weights compute on their own; on average, since single numbers round far."""
        limit = self.limit * HALF / self.bound
        with self.role.sampling():
            gap, why = self._gap(self._fastest, mean=True)
            if not gap <= limit:
                raise ModelError(
                    f"learner.precision: in bfloat16 the {self.role.name} differs {why}; set it to float32"
                )
            for name in ("cache", "decode") if cached else ():
                if not getattr(self.role.paths, name):
                    continue
                gap, why = self._gap(partial(self._decoded, name), self._ends(), mean=True)
                self.role.paths = replace(self.role.paths, **{name: gap <= limit})
                if not gap <= limit:
                    self._say(f"in bfloat16 {SLOWER[name].format(why)}")

    def gradient(self) -> None:
        """Compare the bits: the ratio is exactly 1 only if measuring and updating compute the same."""
        with torch.enable_grad():
            try:
                found = self._fastest().detach()
            except Exception as error:
                kernel = self.role.model.config._attn_implementation
                raise ModelError(
                    f"the {self.role.name} cannot be read with a gradient ({first_line(error)}); its attention kernels are {kernel} "
                    "(model.attn_implementation)"
                ) from error
        self.role.paths = replace(self.role.paths, gradient=torch.equal(found, self._fastest()))

    def _packing(self) -> None:
        role = self.role
        kernel = role.model.config._attn_implementation
        own = install(role.model)
        if not own and not str(kernel).startswith("flash"):
            role.paths = replace(role.paths, packing=False)
            self._say(f"its attention ({kernel}) has no packed rows; they are padded")
            return
        with local_attention() as windows:
            gap, why = self._gap(lambda: self._read(self.rows, packed=True))
        right = gap <= self.limit
        if not right:
            uninstall(role.model)
            self._say(f"packed rows differ {why}; they are padded")
        role.paths = replace(role.paths, packing=right, window=min(windows, default=None), sharing=False)
        if right and own:
            self._sharing()

    def _sharing(self) -> None:
        """Try rows with the same prompt, which is computed once: each row, and the row with other tokens after its middle."""
        rows = list[Row]()
        for row in self.rows:
            start = row.length // 2
            for ids in (row.ids, torch.cat([row.ids[:start], row.ids[start:].flip(0)])):
                rows.append(Row(ids, start, torch.ones(row.length - start, dtype=torch.bool)))
        truth = torch.cat([self._plain(row.ids)[row.start - 1 :] for row in rows])
        self.role.paths = replace(self.role.paths, sharing=None)
        gap, why = self._gap(lambda: self._read(rows, packed=True, shared=True), truth)
        self.role.paths = replace(self.role.paths, sharing=gap <= self.limit)
        if not self.role.paths.sharing:
            self._say(f"rows that share their prompt differ {why}; each is computed whole")

    def _cache(self) -> None:
        """Try transformers' cache, and the decoder that reads the weights itself if the model has the structure for it."""
        found = {}
        for name in ("cache", "decode"):
            if name == "decode" and structure(self.role) is None:
                found[name] = False
                continue
            gap, why = self._gap(partial(self._decoded, name), self._ends())
            found[name] = gap <= self.limit
            if not found[name]:
                self._say(SLOWER[name].format(why))
        self.role.paths = replace(self.role.paths, **found)

    def _ends(self) -> Tensor:
        """Return the true numbers of the last tokens of all rows."""
        return torch.cat([one[-STEPS:] for one in self._each(self.truth)])

    def _each(self, numbers: Tensor) -> tuple[Tensor, ...]:
        return numbers.split([row.length - 1 for row in self.rows])

    def _decoded(self, name: str) -> Tensor:
        """Return the log-probs of the last tokens of each row, decoded with the cache of this name in `Paths`.

        As in sampling, one prompt has two answers, and one of them is dropped on the way.
        """
        role, parts = self.role, structure(self.role) if name == "decode" else None
        steps: Decoder = Cached(role) if parts is None else Direct(role, parts)
        owner, out = torch.tensor([0, *range(len(self.rows))]), []
        logits = steps.enter([row.ids[:-STEPS].tolist() for row in self.rows], owner)
        for step in range(STEPS):
            tokens = torch.stack([self.rows[number].ids[step - STEPS] for number in owner.tolist()])
            out.append(token_logprobs(logits, tokens.to(logits.device)).cpu()[-len(self.rows) :])
            if step == STEPS // 2:
                rows = torch.arange(1, len(owner))
                owner, tokens = owner[rows], tokens[rows]
                steps.keep(rows)
            if step < STEPS - 1:
                logits = steps.next(tokens.to(role.device))
        return torch.stack(out, 1).flatten()

    def _say(self, fact: str) -> None:
        if first():
            caution(f"{self.role.name}: {fact}")


def _chosen(rows: Sequence[Tensor], role: Role) -> list[Row]:
    """Return three rows of unlike length whose tokens are all trained: the longest, a middle and a short one.

    They are cut at `LONGEST`, and short ones are repeated. The first has an odd length and the second an even one, so that
    packed rows begin on no boundary of chunks that a model may have. Ids that the model does not have (its tokenizer is
    another one) are wrapped.
    """
    size = role.model.get_input_embeddings().weight.shape[0]
    ordered = sorted((one for one in rows if len(one)), key=len)
    out: list[Row] = []
    for number, one in enumerate((ordered[-1], ordered[len(ordered) // 2], ordered[0])):
        length = max(SHORTEST, min(len(one), LONGEST)) - number
        length -= (length + (number == 0)) % 2
        ids = one.repeat(-(-length // len(one)))[:length] % size
        out.append(Row(ids, 1, torch.ones(length - 1, dtype=torch.bool)))
    return out


def _tf32() -> bool:
    """Return whether float32 matrices are multiplied in lower precision on a GPU."""
    return torch.get_float32_matmul_precision() != "highest"
