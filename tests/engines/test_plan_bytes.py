"""The plan's memory formulas against what two workers of each engine really hold: weights, gradients, moments."""

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import tiny
import torch
from models import helpers as h

from engines.together import together
from whet.data import Batch
from whet.distributed import Workers
from whet.learner.ddp import ReplicaLearner
from whet.learner.fsdp import FSDPLearner
from whet.methods.compose import SFT
from whet.planning import memory
from whet.planning.shape import Shape

ENGINES = ["ddp", "fsdp", "zero1", "zero2", "zero3"]


def held(tensors: Any) -> int:
    """Bytes of the storages behind these, each once."""
    local = [getattr(one, "_local_tensor", one) for one in tensors if isinstance(one, torch.Tensor)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in local}.values())


def job(workers: Workers, engines: Sequence[str]) -> dict[str, dict[str, int]]:
    return {engine: of(workers, engine) for engine in engines}


def of(workers: Workers, engine: str) -> dict[str, int]:
    if engine.startswith("zero"):
        from whet.learner.deepspeed import DeepSpeedLearner

        kind: Any = partial(DeepSpeedLearner, stage=int(engine[-1]))
    else:
        kind = {"ddp": ReplicaLearner, "fsdp": FSDPLearner}[engine]
    own = kind({"policy": h.policy(dtype=torch.float32)}, {"policy": h.FREE}, total=4, budget=64, workers=workers)
    batch = Batch.of(h.rows())
    own.update([(term, batch, batch.counts()) for term in SFT.terms])
    states = [
        value
        for optimizer, _ in own._optimizers["policy"]
        for one in optimizer.state.values()
        for value in one.values()
    ]
    parameters = list(own.roles["policy"].parameters().values())
    out = {"moments": held(states)}
    if engine in ("ddp", "fsdp"):
        out |= {"weights": held(parameters), "gradients": held([one.grad for one in parameters])}
    elif engine == "zero3":
        zero = own._engines["policy"].optimizer
        out |= {
            "weights": held([one.ds_tensor for one in parameters]),
            "masters": held(zero.fp32_partitioned_groups_flat),
        }
    else:
        zero = own._engines["policy"].optimizer
        out |= {"weights": held(parameters), "masters": held(zero.single_partition_of_fp32_groups)}
    return out


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, int]]]:
    """What each of two workers holds under every engine."""
    here = ENGINES if find_spec("deepspeed") else ENGINES[:2]
    return together(2, tmp_path_factory.mktemp("bytes"), job, here)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_workers_hold_what_the_plan_says(engine: str, found: list[dict[str, dict[str, int]]]) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    shape = Shape.of(tiny.config("qwen3").to_dict())
    said = memory.trained(shape, memory.Layout(backend=engine, workers=2))  # type: ignore[arg-type]
    for one in (every[engine] for every in found):
        assert one["weights"] == pytest.approx(said.weights, rel=0.02)  # a few odd sizes are padded
        masters = one.get("masters", 0)
        assert one["moments"] + masters == pytest.approx(said.optimizer, rel=0.02)
        if "gradients" in one:
            assert one["gradients"] == pytest.approx(said.gradients, rel=0.02)
