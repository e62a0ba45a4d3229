"""Learning in this process: micro-batches under a token budget, one optimiser per trained role."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.dials import Optim
from whet.errors import CheckpointError, RunStopped
from whet.learner.base import Step, Work
from whet.models.dropout import Dropout
from whet.models.load import decoder_layers
from whet.models.readers import BARE, read
from whet.models.roles import Role
from whet.ops import address
from whet.records import Batch, Weights, measured, micro_batches
from whet.records.files import write_json


class LocalLearner:
    """All roles in one process.

    `budget` is the most tokens (padding counted) of one forward; `packed` lays rows behind one another instead of
    padding them; `total` is the number of updates of the whole run, which the schedules need. Residual `dropout` acts
    in updates only, with masks addressed by (seed, version).
    """

    def __init__(
        self,
        roles: Mapping[str, Role],
        optims: Mapping[str, Optim],
        *,
        total: int,
        budget: int = 8192,
        packed: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.roles, self.optims, self.total = dict(roles), dict(optims), total
        self.budget, self.packed, self.dropout, self.seed = budget, packed, dropout, seed
        self.version = 0
        self._blended: set[str] = set()
        self._optimisers = {
            name: _optimisers(role, self.optims[name]) for name, role in self.roles.items() if role.trained
        }

    @torch.no_grad()
    def measure(self, batch: Batch, columns: frozenset[str]) -> Batch:
        """See `Learner.measure`. The micro-batches are those of `update`, so unchanged weights give unchanged bits."""
        out: dict[str, Tensor] = {}
        for name, wanted in measured(columns).items():
            bare = frozenset(column.reads or "" for column in wanted)
            now: dict[str, Tensor] = {}
            for rows in micro_batches(batch, self.budget):
                _collect(now, self._read(name, batch.take(rows), bare), rows, batch)
            out |= {column.name: now[column.reads or ""] for column in wanted}
        return batch.with_columns(**out)

    def update(self, work: Work) -> Step:
        """See `Learner.update`. Raises RunStopped, before any weight moves, when a loss or a gradient is not finite."""
        for role in self._trained():
            for parameter in role.parameters().values():
                parameter.grad = None
        losses, now = self._forward(work, train=True)
        norms, rates = {}, {}
        for role in self._trained():
            parameters = [p for p in role.parameters().values() if p.grad is not None]
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.optims[role.name].max_grad_norm, foreach=True)
            norms[role.name] = float(norm)
        for kind, values in (("loss", losses), ("gradient norm", norms)):
            for name, value in values.items():
                if not torch.isfinite(torch.tensor(value)):
                    raise RunStopped(
                        f"update {self.version}: the {kind} of {name} is {value}; no weight was changed by it"
                    )
        for role in self._trained():
            optim = self.optims[role.name]
            factor = optim.factor(self.version, self.total)
            rates[role.name] = optim.lr * factor
            for optimiser, base in self._optimisers[role.name]:
                for group in optimiser.param_groups:
                    group["lr"] = base * factor
                optimiser.step()
        self.version += 1
        return Step(self.version, losses, norms, rates, now)

    @torch.no_grad()
    def evaluate(self, work: Work) -> Step:
        """See `Learner.evaluate`."""
        losses, now = self._forward(work, train=False)
        return Step(self.version, losses, {}, {}, now)

    def publish(self) -> Weights:
        """The policy role itself: generator and learner share one copy."""
        return Weights(self.version, self.roles["policy"])

    @torch.no_grad()
    def blend(self, target: str, source: str, mix: float) -> None:
        """See `Learner.blend`."""
        ours, theirs = self.roles[target].parameters(), self.roles[source].parameters()
        for (_, mine), (_, other) in zip(ours.items(), theirs.items(), strict=True):
            mine.lerp_(other.to(mine), mix)
        self._blended.add(target)

    def save(self, folder: Path) -> None:
        """`role.safetensors` and `role.optimiser.safetensors` per role that changes, and `learner.json`."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        for name in self._changing():
            weights = {key: p.detach().contiguous() for key, p in self.roles[name].parameters().items()}
            save_file(weights, str(folder / f"{name}.safetensors"))
        for name, pairs in self._optimisers.items():
            own = {id(p): key for key, p in self.roles[name].parameters().items()}
            state: dict[str, Tensor] = {}
            for optimiser, _ in pairs:
                for parameter, values in optimiser.state.items():
                    state |= {f"{own[id(parameter)]}|{key}": _tensor(value) for key, value in values.items()}
            save_file(state, str(folder / f"{name}.optimiser.safetensors"))
        about = {"version": self.version, "total": self.total, "blended": sorted(self._blended)}
        write_json(folder / "learner.json", about | {"frozen": self._frozen(), "optimisers": self._kinds()})

    def load(self, folder: Path) -> None:
        """See `Learner.load`."""
        import json

        from safetensors.torch import load_file

        about = json.loads((folder / "learner.json").read_text(encoding="utf-8"))
        for name, mark in self._frozen().items():
            if about["frozen"].get(name, mark) != mark:
                raise CheckpointError(f"{folder}: the frozen weights of the {name} are not those this run began with")
        if about["optimisers"] != self._kinds():
            raise CheckpointError(f"{folder}: its optimisers are {about['optimisers']}, this run's {self._kinds()}")
        self.version, self._blended = about["version"], set(about["blended"])
        for name in self._changing():
            own, saved = self.roles[name].parameters(), load_file(str(folder / f"{name}.safetensors"))
            if own.keys() != saved.keys() or any(own[key].shape != saved[key].shape for key in own):
                raise CheckpointError(
                    f"{folder}: the {name}'s parameters are others than this run's; is the model the same?"
                )
            with torch.no_grad():
                for key, parameter in own.items():
                    parameter.copy_(saved[key])
        for name, pairs in self._optimisers.items():
            own, saved = self.roles[name].parameters(), load_file(str(folder / f"{name}.optimiser.safetensors"))
            mine = {
                id(p): optimiser for optimiser, _ in pairs for group in optimiser.param_groups for p in group["params"]
            }
            for key, value in saved.items():
                parameter = own[key.split("|")[0]]
                mine[id(parameter)].state[parameter][key.split("|")[1]] = value.to(parameter.device)

    def export(self, role: str, folder: Path, tokenizer: Any = None, *, merge: bool = True) -> None:
        """See `Learner.export`."""
        self.roles[role].export(folder, tokenizer, merge=merge)

    def _read(
        self, name: str, batch: Batch, columns: frozenset[str], dropout: Dropout | None = None
    ) -> dict[str, Tensor]:
        reference = self.roles.get("reference")
        return read(self.roles[name], batch, columns, packed=self.packed, dropout=dropout, reference=reference)

    def _frozen(self) -> dict[str, str]:
        """A mark for the weights of each role that no update changes: a frozen model, or the base under an adapter."""
        marks: dict[int, str] = {}
        out = {}
        for name, role in self.roles.items():
            if role.wrapped is not None:
                if id(role.model) not in marks:
                    marks[id(role.model)] = _fingerprint(role.base_parameters())
                out[name] = marks[id(role.model)]
            elif name not in self._changing():
                out[name] = _fingerprint(role.parameters())
        return out

    def _kinds(self) -> dict[str, list[str]]:
        return {name: [type(one).__name__ for one, _ in pairs] for name, pairs in self._optimisers.items()}

    def _trained(self) -> list[Role]:
        return [role for role in self.roles.values() if role.trained]

    def _changing(self) -> list[str]:
        return [name for name, role in self.roles.items() if role.trained or name in self._blended]

    def _forward(self, work: Work, *, train: bool) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
        """Every term's loss over its whole mini-batch; one forward per role, batch and micro-batch."""
        losses: dict[str, float] = {}
        streams: dict[str, dict[str, Tensor]] = {}
        together: dict[tuple[str, int], list] = {}
        for term, batch, counts in work:
            together.setdefault((term.role, id(batch)), []).append((term, batch, counts))
        dropout = Dropout(self.dropout, address(self.seed, "dropout", self.version)) if train and self.dropout else None
        for (name, _), items in together.items():
            batch = items[0][1].with_columns(number=torch.arange(len(items[0][1].rows)))
            now = streams.setdefault(items[0][0].stream, {})
            wanted = frozenset().union(*(term.reads() for term, _, _ in items)) & BARE - batch.columns.keys()
            if name == "policy" and "old_logp" in batch.columns:
                wanted |= {"logp"}  # how far the policy moved is always watched
            for rows in micro_batches(batch, self.budget):
                micro = batch.take(rows)
                with dropout or nullcontext():
                    fresh = self._read(name, micro, wanted, dropout)
                    columns = {key: value.to(self.roles[name].device) for key, value in micro.columns.items()} | fresh
                    shares = [(term.label, term.share(columns, counts)) for term, _, counts in items]
                    if train:
                        torch.stack([share for _, share in shares]).sum().backward()
                for label, share in shares:
                    losses[label] = losses.get(label, 0.0) + float(share.detach())
                _collect(now, {key: value.detach() for key, value in fresh.items()}, rows, batch)
        return losses, streams


def _collect(whole: dict[str, Tensor], fresh: Mapping[str, Tensor], rows: list[int], batch: Batch) -> None:
    """Put a micro-batch's columns into those of the whole batch, on the CPU."""
    for name, values in fresh.items():
        values = values.cpu()
        if name not in whole:
            shape = batch["mask"].shape if values.ndim == 2 else batch["mask"].shape[:1]
            whole[name] = torch.zeros(shape, dtype=values.dtype)
        if values.ndim == 2:
            whole[name][torch.tensor(rows), : values.shape[1]] = values
        else:
            whole[name][torch.tensor(rows)] = values


def _optimisers(role: Role, optim: Optim) -> list[tuple[torch.optim.Optimizer, float]]:
    """The optimisers of a role with their base learning rates."""
    inside = (
        {id(p) for layer in decoder_layers(role.model) for p in layer.parameters()} if optim.kind == "muon" else set()
    )
    rest: dict[bool, list] = {True: [], False: []}
    matrices = []
    for parameter in role.parameters().values():
        if id(parameter) in inside and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            rest[parameter.ndim > 1].append(parameter)
    groups = [
        {"params": parameters, "weight_decay": optim.weight_decay if matrix else 0.0}
        for matrix, parameters in rest.items()
        if parameters
    ]
    out: list[tuple[torch.optim.Optimizer, float]] = []
    if groups:
        adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        out.append((adamw, optim.lr))
    if matrices:
        muon = torch.optim.Muon(matrices, lr=optim.muon_lr, weight_decay=optim.weight_decay)
        out.append((muon, optim.muon_lr))
    return out


def _tensor(value: Any) -> Tensor:
    return value.detach().contiguous() if isinstance(value, Tensor) else torch.tensor(value)


def _fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """A mark that changes when any of these does: their names, shapes, sums and weighted sums."""
    parts: list[str] = []
    for name, parameter in parameters.items():
        flat = parameter.detach().double().flatten()
        ramp = torch.linspace(1, 2, flat.numel(), dtype=torch.float64, device=flat.device)
        parts.append(f"{name}{tuple(parameter.shape)}{float(flat.sum())!r}{float((flat * ramp).sum())!r}")
    return f"{address(*parts):016x}"
