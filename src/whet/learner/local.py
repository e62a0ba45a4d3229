"""A learner in one process: micro-batches within a token budget, and one or two optimizers per trained role."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.data import Batch, Weights, dealt, measured
from whet.data.files import read_json, remove, replace_folder, write_json
from whet.distributed import Workers
from whet.errors import CheckpointError, RecipeError, RunStopped
from whet.learner.base import LearnerContext, UpdateResult, WeightsWriter, WholeOptions, Work
from whet.learner.state import CONSTANTS, as_tensor, fingerprint, optimizers_of, restored
from whet.learner.store import Stored, write
from whet.methods.options import Optim
from whet.models.dropout import Dropout
from whet.models.readers import BARE, packs, read, shares
from whet.models.roles import Role
from whet.models.router import Routed
from whet.models.sizes import tokens_of
from whet.ops import address


class LocalLearner:
    """A learner with all weights in this process, and the base class of learners that distribute them over `workers`.

    Subclasses override how weights are stored (`_place`), how gradients are summed (`_backward`, `_clipped`, `_step`), and
    how whole tensors are read and written (`_whole`, `_fill`, and the same for optimizer states). Everything that results
    depend on is here: the micro-batches, the columns and the losses.

    `budget` is the largest number of tokens in one forward, including padding (None: see `models.sizes`). `packed` concatenates rows
    instead of padding them, and `shared` then computes a prompt once for all rows of a micro-batch that have it (see `models.readers`).
    `total` is the number of updates of the whole run, for the learning-rate schedules. Residual `dropout` is
    active only in updates; its masks depend on (seed, version). With `bf16` all roles with float32 weights compute in
    bfloat16, while weights, gradients and moments stay float32.
    """

    autocasts = True
    """Roles compute in bfloat16 under autocast; False if the backend casts the weights."""

    def __init__(
        self,
        roles: Mapping[str, Role],
        optims: Mapping[str, Optim],
        *,
        total: int,
        budget: int | None = None,
        packed: bool = False,
        shared: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
        workers: Workers = Workers(),
        bf16: bool = False,
        offload_frozen: bool = False,
    ) -> None:
        self.bf16 = bf16
        for role in roles.values():
            role.compute_in(bf16 and self.autocasts)
        self.roles, self.optims, self.total = dict(roles), dict(optims), total
        self.budget = budget or tokens_of(next(iter(roles.values())).model)
        self.packed, self.shared, self.dropout, self.seed = packed, shared, dropout, seed
        self.version = 0
        self.workers = workers
        self.writer: WeightsWriter | None = None
        """Writes the weights that are published to a folder; None if generators read them from the policy role."""
        self._marks: dict[str, str] | None = None
        self._pending: UpdateResult | None = None
        self._blended: set[str] = set()
        self._scale = 1.0  # factor of each loss, for backends that average gradients over the workers
        self._optimizers: dict[str, list[tuple[torch.optim.Optimizer, float]]] = {}
        self._place()
        if offload_frozen:
            self._leave()

    @torch.no_grad()
    def measure(self, batch: Batch, columns: frozenset[str]) -> Batch:
        """See `Learner.measure`. The micro-batches are those of `update`, so unchanged weights give unchanged bits."""
        out: dict[str, Tensor] = {}
        for name, wanted in measured(columns).items():
            bare = frozenset(column.reads or "" for column in wanted)
            now = self.columns(name, batch, bare)
            out |= {column.name: now[column.reads or ""] for column in wanted}
        return batch.with_columns(**out)

    @torch.no_grad()
    def columns(self, name: str, batch: Batch, bare: frozenset[str]) -> dict[str, Tensor]:
        """See `Learner.columns`."""
        now: dict[str, Tensor] = {}
        with self.roles[name].present(), self._reference("exact_kl" in bare):
            for rows, real in self._dealt(name, batch):
                self._measured(name, batch, bare, rows, real, now)
        return self._joined(now)

    def _measured(
        self, name: str, batch: Batch, bare: frozenset[str], rows: list[int], real: bool, now: dict[str, Tensor]
    ) -> None:
        """Read a micro-batch without gradient, and copy its columns into those of the whole batch."""
        with torch.set_grad_enabled(self.roles[name].paths.gradient is False):
            fresh = {one: value.detach() for one, value in self._read(name, batch.take(rows), bare).items()}
        _collect(now, fresh, rows if real else [], batch)

    def update(self, work: Work) -> UpdateResult:
        """See `Learner.update`. Raises RunStopped, before any weight changes, if a loss or a gradient is not finite."""
        self.forward_backward(work)
        return self.optim_step()

    def forward_backward(self, work: Work) -> UpdateResult:
        """See `Learner.forward_backward`. Raises RunStopped if a loss is not finite, RuntimeError if called twice."""
        if self._pending is not None:
            raise RuntimeError("forward_backward was called twice; call optim_step after each call")
        self._clear()
        with self._reference(any("exact_kl" in term.reads() for term, _, _ in work)):
            losses, now = self._forward(work, train=True)
        self._check("loss", losses)
        self._pending = UpdateResult(self.version, losses, {}, {}, now)
        return self._pending

    def optim_step(self) -> UpdateResult:
        """See `Learner.optim_step`. Raises RunStopped if a gradient is not finite, RuntimeError if there is no gradient."""
        pending, self._pending = self._pending, None
        if pending is None:
            raise RuntimeError("optim_step was called without forward_backward before it")
        rates = {}
        for role in self._trained():
            optim = self.optims[role.name]
            factor = optim.factor(self.version, self.total)
            rates[role.name] = optim.lr * factor
            for optimizer, base in self._optimizers[role.name]:
                for group in optimizer.param_groups:
                    group["lr"] = base * factor
        norms = {role.name: self._clipped(role) for role in self._trained()}
        self._check("gradient norm", norms)
        for role in self._trained():
            self._step(role)
        self.version += 1
        return UpdateResult(self.version, pending.losses, norms, rates, pending.now)

    def rehearse(self, batch: Batch, columns: Mapping[str, frozenset[str]]) -> None:
        """See `Learner.rehearse`."""
        for name, bare in columns.items():
            turns = self._dealt(name, batch)
            micro = batch.take(
                max(
                    (rows for rows, _ in turns),
                    key=lambda rows: len(rows) * max(batch.rows[row].length for row in rows),
                )
            )
            with self._memory(micro):
                made = self._read(name, micro, bare)
                self._backward(name, torch.stack([value.sum().float() for value in made.values()]).sum() * 0.0, True)
        self._clear()

    @contextmanager
    def _memory(self, micro: Batch) -> Iterator[None]:
        """Raise RunStopped with what to lower if this micro-batch does not fit into memory."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            told = str(error).lower()
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in told:
                raise
            longest = max(row.length for row in micro.rows)
            raise RunStopped(
                f"update {self.version}: out of memory in a micro-batch of {len(micro.rows)} rows of up to {longest} tokens; lower "
                f"--train.max-tokens-per-micro-batch (now {self.budget}; an element is never split) or the length of the rows "
                "(--data.max-tokens, --max-new-tokens), or use --model.gradient-checkpointing true"
            ) from error

    @property
    def low_precision(self) -> bool:
        """See `Learner.low_precision`."""
        kinds = {parameter.dtype for role in self.roles.values() for parameter in role.model.parameters()}
        tf32 = torch.float32 in kinds and torch.get_float32_matmul_precision() != "highest"
        return self.bf16 or tf32 or not kinds.isdisjoint({torch.bfloat16, torch.float16})

    @property
    def _precision(self) -> str:
        return "bf16" if self.bf16 else "float32"

    def _check(self, kind: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise RunStopped(
                    f"update {self.version}: the {kind} of {name} is {value}; this update changed no weight"
                )

    @torch.no_grad()
    def evaluate(self, work: Work) -> UpdateResult:
        """See `Learner.evaluate`."""
        with self._reference(any("exact_kl" in term.reads() for term, _, _ in work)):
            losses, now = self._forward(work, train=False)
        return UpdateResult(self.version, losses, {}, {}, now)

    def publish(self) -> Weights:
        """Return the policy role itself, which generator and learner then share, or the folder that `writer` wrote."""
        role = self.roles["policy"]
        return Weights(self.version, role if self.writer is None else self.writer(role))

    @torch.no_grad()
    def blend(self, target: str, source: str, mix: float) -> None:
        """See `Learner.blend`."""
        ours, theirs = self.roles[target].parameters(), self.roles[source].parameters()
        for (_, mine), (_, other) in zip(ours.items(), theirs.items(), strict=True):
            self._mix(mine, other, mix)
        self._blended.add(target)

    def save(self, folder: Path) -> None:
        """Write `ROLE.safetensors` and `ROLE.optimizer.safetensors` of each role that changes (see `learner.store`), and
        `learner.json`."""
        folder.mkdir(exist_ok=True)  # not its parents: if they are missing, this machine has another file system
        failed = []
        for name in self._changing():
            named = self.roles[name].parameters().items()
            failed += write(folder, name, ((key, self._whole(p)) for key, p in named), self.workers)
        for name in self._optimizers:
            failed += write(folder, f"{name}.optimizer", self._states(name), self.workers)
        if failed:  # only now: the other workers would have waited for this one to gather
            raise failed[0]
        about = {"version": self.version, "total": self.total, "blended": sorted(self._blended)}
        about |= {"frozen": self._frozen(), "optimizers": self._kinds(), "precision": self._precision}
        if self.workers.first:
            write_json(folder / "learner.json", about)

    def load(self, folder: Path, accepted: Collection[str] = ()) -> None:
        """See `Learner.load`."""
        about = read_json(folder / "learner.json", CheckpointError)
        for name, mark in self._frozen().items():
            if about["frozen"].get(name, mark) != mark and name not in accepted:
                raise CheckpointError(
                    f"{folder}: the frozen weights of the {name} differ from those at the start of the run; restore them, or "
                    f"continue with --accept-changed {name}"
                )
        computed = about.get("precision", self._precision)  # checkpoints of older versions do not have it
        if computed != self._precision:
            raise CheckpointError(
                f"{folder}: this run computed in {computed} so far, and would now compute in {self._precision}; resume it with "
                f"--learner.precision {computed}"
            )
        if about["optimizers"] != self._kinds():
            raise CheckpointError(f"{folder}: its optimizers are {about['optimizers']}, this run's {self._kinds()}")
        self._blended = set(about["blended"])
        weights = {name: Stored(folder, name) for name in self._changing()}
        states = {name: Stored(folder, f"{name}.optimizer") for name in self._optimizers}
        for name, saved in weights.items():
            own = self.roles[name].parameters()
            if own.keys() != saved.keys() or any(self._shape(own[key]) != saved.shape(key) for key in own):
                raise CheckpointError(
                    f"{folder}: the parameters of the {name} differ from those of this run; is the model the same?"
                )
        self.version = about["version"]
        for name, saved in weights.items():
            with torch.no_grad():
                for key, parameter in self.roles[name].parameters().items():
                    self._fill(parameter, saved[key])
        for name, saved in states.items():
            self._put_states(name, saved)

    @torch.no_grad()
    def rescale(self, role: str, scale: float, shift: float) -> None:
        """See `Learner.rescale`."""
        head = self.roles[role].head
        assert head is not None
        for parameter in head.parameters():
            self._fill(parameter, self._whole(parameter) * scale)
        self.roles[role].shift = (self.roles[role].shift + shift) * scale

    @torch.no_grad()
    def export(
        self,
        role: str,
        folder: Path,
        tokenizer: Any = None,
        *,
        merge: bool = True,
        end_ids: Sequence[int] | None = None,
    ) -> None:
        """See `Learner.export`. All workers must call it; the first one writes: to a folder beside, which it renames."""
        aside = folder.with_name(f".{folder.name}.writing")
        if self.workers.first:
            remove(aside)
        self.roles[role].export(aside, tokenizer, merge=merge, write=self.workers.first, end_ids=end_ids)
        if self.workers.first:
            replace_folder(aside, folder)

    def close(self) -> None:
        """Remove the weights that were written for engines."""
        if self.writer is not None:
            self.writer.close()

    # --- methods that subclasses override -------------------------------------------------------------------------

    def _place(self) -> None:
        """Distribute the weights, then build the optimizers on the distributed weights."""
        self._optimizers = {role.name: optimizers_of(role, self.optims[role.name]) for role in self._trained()}

    def _leave(self) -> None:
        """Let each frozen role that has a model of its own stay in CPU memory between uses."""
        held = {id(role.model) for role in self.roles.values() if role.trained}
        for role in self.roles.values():
            if id(role.model) not in held:
                role.leave()

    def _reference(self, needed: bool) -> AbstractContextManager[None]:
        """Have the reference on the device that computes for a block that needs it beside another role."""
        return self.roles["reference"].present() if needed and "reference" in self.roles else nullcontext()

    def _clear(self) -> None:
        """Clear the gradients of the last update."""
        for role in self._trained():
            for parameter in role.parameters().values():
                parameter.grad = None

    def _backward(self, name: str, loss: Tensor, last: bool) -> None:
        """Compute the gradient of one micro-batch. `last` is True for the last one of the role in this update."""
        loss.backward()

    def _clipped(self, role: Role) -> float:
        """Clip the role's gradient to its limit, and return the norm that it had before."""
        parameters = [p for p in role.parameters().values() if p.grad is not None]
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.optims[role.name].max_grad_norm, foreach=True))

    def _step(self, role: Role) -> None:
        for optimizer, _ in self._optimizers[role.name]:
            optimizer.step()

    def _shape(self, parameter: Tensor) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def _whole(self, parameter: Tensor) -> Tensor:
        return parameter.detach()

    def _fill(self, parameter: Tensor, value: Tensor) -> None:
        parameter.copy_(value)

    def _mix(self, mine: Tensor, other: Tensor, mix: float) -> None:
        mine.lerp_(other.to(mine), mix)

    def _states(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the optimizer states of a role as ("parameter|state", whole tensor)."""
        own = {id(p): key for key, p in self.roles[name].parameters().items()}
        for optimizer, _ in self._optimizers[name]:
            for parameter, values in optimizer.state.items():
                for key, value in values.items():
                    if key in CONSTANTS:
                        continue
                    yield f"{own[id(parameter)]}|{key}", self._whole(as_tensor(value))

    def _put_states(self, name: str, saved: Mapping[str, Tensor]) -> None:
        """Restore the optimizer states that `_states` yielded."""
        own = self.roles[name].parameters()
        mine = {
            id(p): optimizer
            for optimizer, _ in self._optimizers[name]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        keys: dict[str, list[str]] = {}
        for key in saved:
            keys.setdefault(key.rpartition("|")[0], []).append(key)
        for weight, each in keys.items():  # one at a time: all of them could be too large for the device
            parameter = own[weight]
            values = {key.rpartition("|")[2]: self._like(parameter, saved[key]) for key in each}
            restored(mine[id(parameter)], parameter, values)

    def _like(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Return a whole tensor on the device of the parameter, and sharded like it."""
        return value.to(parameter.device)

    # --- helpers --------------------------------------------------------------------------------------------------

    def _shares(self, role: Role) -> bool:
        """Return whether a prompt is computed once for the rows that have it. Dropout and a trained router look at each token of
        each row, in updates; measuring must compute the same bits."""
        alone = role.trained and (bool(self.dropout) or role.router is not None)
        return not alone and shares(role, self.shared)

    def _dealt(self, name: str, batch: Batch) -> list[tuple[list[int], bool]]:
        """Return the micro-batches of this worker for a role as (rows, real). Each worker has the same number of micro-batches.

        If the worker has too few, it repeats an element with real False; these micro-batches get weight 0.
        """
        role = self.roles[name]
        packed = packs(role, batch.rows, self.packed) if batch.rows else False
        shared = packed and self._shares(role)
        own = dealt(batch, self.budget, self.workers.size, packed=packed, shared=shared)[self.workers.rank]
        if all(own):
            return [(rows, True) for rows in own]
        spare = min(batch.elements(), key=lambda rows: max(batch.rows[row].length for row in rows))
        return [(rows or spare, bool(rows)) for rows in own]

    def _joined(self, now: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum the columns over the workers. Each worker has 0 outside its own rows, so the sum has the rows of all."""
        return {name: self.workers.sum(now[name]) for name in sorted(now)}

    def _read(
        self,
        name: str,
        batch: Batch,
        columns: frozenset[str],
        dropout: Dropout | None = None,
        routed: list[Routed] | None = None,
    ) -> dict[str, Tensor]:
        reference = self.roles.get("reference")
        role = self.roles[name]
        return read(
            role, batch, columns, packed=self.packed, shared=self._shares(role), dropout=dropout, reference=reference, routed=routed
        )  # fmt: skip

    @torch.no_grad()
    def _chosen(
        self,
        name: str,
        batch: Batch,
        turns: list[tuple[list[int], bool]],
        dropout: Dropout | None,
    ) -> tuple[Tensor, int]:
        """Return how often the router of a role chooses each expert over the whole mini-batch, (E,), and the number of its
        decisions. This takes a forward of its own, before the one with gradient."""
        router = self.roles[name].router
        assert router is not None
        routed: list[Routed] = []
        for rows, real in turns:
            found: list[Routed] = []
            micro = batch.take(rows)
            with self._memory(micro), dropout or nullcontext():
                self._read(name, micro, frozenset(), dropout, found)
            routed += found if real else []
        picks = sum((one.picks.cpu().double() for one in routed), torch.zeros(router.experts, dtype=torch.float64))
        total = self.workers.sum(torch.cat([picks, torch.tensor([float(sum(one.count for one in routed))]).double()]))
        return total[:-1], int(total[-1])

    def _frozen(self) -> dict[str, str]:
        """Return a fingerprint of the unchanging weights of each role: a frozen model, or the base model of an adapter."""
        if self._marks is None:
            self._marks = self._marked()
        wrapped = {name for name, role in self.roles.items() if role.wrapped is not None}
        return {name: mark for name, mark in self._marks.items() if name in wrapped or name not in self._changing()}

    def _marked(self) -> dict[str, str]:
        """Compute the fingerprints of the loaded weights. Backends call it before they shard or round the weights."""
        marks: dict[int, str] = {}
        out = {}
        for name, role in self.roles.items():
            if role.wrapped is not None:
                if id(role.model) not in marks:
                    marks[id(role.model)] = fingerprint(role.base_parameters())
                out[name] = marks[id(role.model)]
                if role.adapter and not role.trained:  # a reward model on a shared trunk
                    out[name] += fingerprint(role.parameters())
            elif not role.trained:
                out[name] = fingerprint(role.parameters())
        return out

    def _kinds(self) -> dict[str, list[str]]:
        return {name: [type(one).__name__ for one, _ in pairs] for name, pairs in self._optimizers.items()}

    def _trained(self) -> list[Role]:
        return [role for role in self.roles.values() if role.trained]

    def _changing(self) -> list[str]:
        return [name for name, role in self.roles.items() if role.trained or name in self._blended]

    def _forward(self, work: Work, *, train: bool) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
        """Return the loss of each term over its whole mini-batch, and the columns of each stream.

        There is one forward per role, batch and micro-batch.
        """
        losses: dict[str, float] = {}
        streams: dict[str, dict[str, Tensor]] = {}
        together: dict[tuple[str, int], list] = {}
        for term, batch, counts in work:
            together.setdefault((term.role, id(batch)), []).append((term, batch, counts))
        dropout = Dropout(self.dropout, address(self.seed, "dropout", self.version)) if train and self.dropout else None
        last = {key[0]: key for key in together}  # the last batch of each role
        first = {key[0]: key for key in reversed(together)}  # the batch whose tokens its router is balanced on
        for key, items in together.items():
            name = key[0]
            batch = items[0][1].with_columns(number=torch.arange(len(items[0][1].rows)))
            now = streams.setdefault(items[0][0].stream, {})
            read_by = frozenset[str]().union(*(term.reads() for term, _, _ in items))
            wanted = read_by & BARE - batch.columns.keys()
            deferred = name == "policy" and "entropy_at" in batch.columns and "old_logp" not in batch.columns
            if name == "policy" and "old_logp" in batch.columns:
                wanted |= {"logp"}  # for the metrics of how far the policy moved
            wanted |= {"logp", "entropy"} if deferred else set()
            if name == "policy" and all(term.reads() == {"logp", term.mask} for term, _, _ in items):
                wanted |= {"correct"}  # for the accuracy of next-token prediction
            turns = self._dealt(name, batch)
            router = self.roles[name].router if train and first[name] == key else None
            chosen = self._chosen(name, batch, turns, dropout) if router is not None else None
            for number, (rows, real) in enumerate(turns):
                micro, routed = batch.take(rows), list[Routed]()
                with self._memory(micro), dropout or nullcontext():
                    fresh = self._read(name, micro, wanted, dropout, routed if router is not None else None)
                    device = next(iter(fresh.values())).device if fresh else self.roles[name].device
                    columns = {one: value.to(device) for one, value in micro.columns.items()} | fresh
                    columns |= {"old_logp": fresh["logp"].detach()} if deferred else {}
                    masked: dict[str, dict[str, Tensor]] = {}  # once for all terms
                    shares = [(term.label, term.share(columns, counts, masked)) for term, _, counts in items]
                    if router is not None and chosen is not None:
                        prefix = f"{name}/{items[0][0].stream}"
                        for part in routed:
                            shares += [(f"{prefix}/{key}", one) for key, one in router.losses(part, *chosen).items()]
                    if train:
                        whole = torch.stack([share for _, share in shares]).sum()
                        whole = whole if real and self._scale == 1 else whole * (self._scale if real else 0.0)
                        self._backward(name, whole, last[name] == key and number + 1 == len(turns))
                for label, share in shares:
                    losses[label] = losses.get(label, 0.0) + (float(share.detach()) if real else 0.0)
                _collect(now, {one: value.detach() for one, value in fresh.items()}, rows if real else [], batch)
        totals = self.workers.sum(torch.tensor(list(losses.values()), dtype=torch.float64)).tolist()
        return dict(zip(losses, totals, strict=True)), {name: self._joined(now) for name, now in streams.items()}


def _collect(whole: dict[str, Tensor], fresh: Mapping[str, Tensor], rows: list[int], batch: Batch) -> None:
    """Copy the columns of a micro-batch into those of the whole batch, on the CPU."""
    for name, values in fresh.items():
        batch.scatter(whole, name, rows, values.cpu())


Options = WholeOptions


def check(options: WholeOptions, context: LearnerContext) -> None:
    """Raise RecipeError for several processes."""
    if context.workers > 1:
        raise RecipeError(
            f"learner.backend: local runs in one process, but there are {context.workers} workers; use ddp, fsdp or zero2"
        )


def make(options: WholeOptions, context: LearnerContext) -> Any:
    """Return the class of the learner with its options."""
    return partial(LocalLearner, bf16=options.in_bf16(context), offload_frozen=options.offload_frozen)
