"""One run of the online loop over tiny models, and what it left in its folder."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from models import helpers as h

from whet import methods
from whet.data import Sample, Segment, Unpaired
from whet.generate import Request
from whet.generate.local import LocalGenerator
from whet.learner import UpdateResult, Work
from whet.learner.local import LocalLearner
from whet.loops import checkpoint, online
from whet.loops.record import RunFolder
from whet.methods import Algorithm, catalogue
from whet.methods.options import Sampling
from whet.models.roles import Role
from whet.rewards import Weighted

END = (1, 5, 9)
PROMPTS = [h.prompt(i, range(3 + i, 5 + 3 * i)) for i in range(3)]
ONLINE = {**catalogue.ONLINE, **catalogue.ONLINE_PREFERENCE}


def method_of(name: str, **changes: Any) -> Algorithm:
    """A method of the catalogue in small: three answers where it compares them, answers of at most 6 tokens."""
    few = {"num_generations": 3} if ONLINE[name].slots["num_generations"] > 1 else {}
    short = {"overlong": {"name": "soft_overlong", "buffer": 2}} if name == "dapo" else {}
    return methods.online(name, **({"longest": 6} | few | short | changes))


def separate(dtype: torch.dtype = torch.float32) -> dict[str, Role]:
    """Policy, reference and critic, each a model of its own; policy and reference are equal."""
    return {
        "policy": h.policy(dtype=dtype),
        "reference": h.policy(dtype=dtype, name="reference"),
        "critic": h.scorer(dtype=dtype, seed=2),
    }


def cast(method: Algorithm, dtype: torch.dtype = torch.float32) -> dict[str, Role]:
    """The roles that this method has."""
    return {name: role for name, role in separate(dtype).items() if name in method.roles()}


class Rough(LocalGenerator):
    """Reports log-probs that are off by up to 0.6, another amount at every place."""

    def generate(self, requests: Sequence[Request]) -> Any:
        for sample in super().generate(requests):
            off = [0.6 * math.sin(3.0 * sample.draw + 5.0 * sample.answer + t) for t in range(len(sample.ids))]
            yield replace(sample, sampler_logp=tuple(v + o for v, o in zip(sample.sampler_logp, off, strict=True)))


TOOL = (12, 13)


class WithTool(LocalGenerator):
    """Writes two tokens, gets a tool's result of two, and goes on. The tool's log-probs are `spoiled`: nobody may read them. An
    end token among the first two ends only the turn if `turns` is set; `last` is what the tool writes at the end."""

    spoiled, result, turns = 99.0, TOOL, False
    last: tuple[int, ...] = ()

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        begun = list(super().generate([replace(one, most=2) for one in requests]))
        for request, sample in zip(requests, begun, strict=True):
            if sample.finish != "paused" and not (self.turns and sample.finish == "stop"):
                yield sample
                continue
            told = self.told(sample, self.result)
            (rest,) = super().generate([replace(request, begun=(*request.begun, *sample.ids, *self.result), most=0)])
            whole = replace(sample, finish="paused").continued(told).continued(rest)
            yield whole if not self.last else replace(whole.continued(self.told(sample, self.last)), finish=rest.finish)

    def told(self, sample: Sample, ids: tuple[int, ...]) -> Sample:
        """What the tool writes after a part of an answer."""
        return Sample(
            sample.draw, sample.answer, ids, (self.spoiled,) * len(ids), sample.version, "paused", "",
            None if sample.support is None else ((),) * len(ids), segments=(Segment("tool", len(ids)),),
        )  # fmt: skip


class Recorder(h.Recorder):
    """Keeps the work of every update and the weights before it."""

    def forward_backward(self, work: Work) -> UpdateResult:
        self.works = [*getattr(self, "works", []), work]
        self.befores = [*getattr(self, "befores", []), h.weights(self)]
        self.nows = [*getattr(self, "nows", []), {}]
        return super().forward_backward(work)

    def optim_step(self) -> UpdateResult:
        step = super().optim_step()
        self.nows[-1] = step.now
        return step


def learner_of(roles: dict[str, Role], *, lr: float = 0.02, **options: Any) -> Recorder:
    optims = {name: replace(h.FREE, lr=lr) for name, role in roles.items() if role.trained}
    return Recorder(roles, optims, total=50, **({"budget": 64} | options))


def go(
    folder: Path,
    method: Algorithm,
    roles: dict[str, Role] | None = None,
    *,
    generator: Any = LocalGenerator,
    learner: LocalLearner | None = None,
    reward: Any = None,
    sampling: Sampling = Sampling(6),
    end_ids: Sequence[int] = END,
    resume: bool = False,
    ptx: Sequence[Any] = (),
    **plan: Any,
) -> Recorder:
    """One run of the loop; returns its learner. `reward` is one reward or several."""
    own: Any = learner or learner_of(roles or cast(method))
    whole = plan.get("prompts", 3) * (1 if method.pairs else method.collect.num_generations)
    given = {"steps": 1, "prompts": 3, "mini_batch_size": whole, "canary": 20, "end_ids": tuple(end_ids)} | plan
    table = reward or h.TableReward(lambda ids: 0.5 * len(ids) - 0.25 * (sum(ids) % 5))
    rewards = [Weighted(f"table{n}" if n else "table", one) for n, one in enumerate(listed(table))]
    source = generator(own.roles["policy"], end_ids, str)
    run, planned = opened(folder, resume), online.OnlinePlan(**given)
    online.train(
        method, own, source, rewards, PROMPTS, sampling, planned, run, ptx=ptx, resume=resume, quiet=True
    )  # fmt: skip
    return own


def listed(one: Any) -> list[Any]:
    return list(one) if isinstance(one, (list, tuple)) else [one]


def opened(folder: Path, resume: bool = False) -> RunFolder:
    """The run folder as the command line opens it."""
    found = checkpoint.latest(folder / "checkpoints") if resume else None
    step = json.loads((found / "loop.json").read_text())["step"] if found else -1
    return RunFolder(folder, resume_at=step if resume else None)


def loop_state(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint says of the loop."""
    found = checkpoint.latest(folder / "checkpoints")
    assert found is not None
    return json.loads((found / "loop.json").read_text())


def rollout(folder: Path, step: int = 1) -> list[dict[str, Any]]:
    """The answers of a rollout as they were written."""
    return pyarrow.parquet.read_table(folder / "rollouts" / f"step-{step:08d}.parquet").to_pylist()


def by_prompt(answers: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The answers of each group, in order."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for answer in answers:
        groups.setdefault(answer["draw"], []).append(answer)
    return list(groups.values())


VOCABULARY, GOOD = 8, 3
TINY = {
    "vocabulary": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "dtype": torch.float32,
}  # fmt: skip


class Light(RunFolder):
    """Writes no rollouts."""

    def rollout(self, *given: Any, **options: Any) -> None:
        pass


def share(ids: tuple[int, ...]) -> float:
    return sum(token == GOOD for token in ids) / 4


def unpaired() -> list[Unpaired]:
    """Good and bad answers of unlike lengths, each beside one of another prompt."""
    return [
        Unpaired(h.row(i, 2 + i % 3, 1 + i, holes=i == 4), h.row(60 + i, 2 + i % 3, 5 - i % 4), i % 3 > 0)
        for i in range(6)
    ]  # fmt: skip
