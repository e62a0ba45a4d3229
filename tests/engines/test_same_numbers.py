"""Ten steps of every kind of training through the real loops: the numbers are the same whoever learns, and on how many."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from engines.jobs import OFFLINE, ONLINE, Failed, leaves, runs
from engines.together import together
from whet.workers import Workers

TOLERANCE = 1e-5
SCALE = 0.1
"""Below it a number's difference counts absolutely: a KL, an advantage's mean or a policy's loss is a sum over terms of
size 1 (log-probs are about 3 nats, each right to 3e-7) that nearly cancel."""
ILL = 10.0
"""The scale of 1 - var(returns - values) / var(returns), which nothing trains on: a small difference of two large variances,
divided by a small one."""
METHODS = (*OFFLINE, *ONLINE)
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
ENGINES = ["ddp", "fsdp", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)]


class Ran:
    """The folders of the launches, each started when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Any] = {}

    def of(self, engine: str, size: int, method: str) -> Path:
        """The run folder of a method on an engine; on three workers those whose batches are smaller than that."""
        engines = ("local",) if size == 1 else ("ddp", "fsdp") if engine in ("ddp", "fsdp") else ("zero2", "zero3")
        for few in (False, True):
            name = f"{size}-{engines[0]}-{few}"
            wanted = size == 1 or few == (size == 3)
            if wanted and name not in self.made:
                self.made[name] = self._launch(engines, size, few, self.folder / name)
        found = self.made[f"{size}-{engines[0]}-{size == 3}"]
        if isinstance(found, Exception):
            raise AssertionError(str(found))
        assert not isinstance(found[engine][method], Failed), found[engine][method]
        return self.folder / f"{size}-{engines[0]}-{size == 3}" / engine / method

    def alone(self, few: bool, method: str) -> Path:
        self.of("local", 1, method)
        return self.folder / f"1-local-{few}" / "local" / method

    @staticmethod
    def _launch(engines: tuple[str, ...], size: int, few: bool, folder: Path) -> Any:
        try:
            return (
                runs(Workers(), engines, folder, few)
                if size == 1
                else together(size, folder / "told", runs, engines, folder, few)[0]
            )
        except Exception as error:
            return error


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("runs"))


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def rollouts(folder: Path) -> list[dict[str, list]]:
    return [pyarrow.parquet.read_table(file).to_pydict() for file in sorted((folder / "rollouts").glob("*.parquet"))]


def gap(got: Any, expected: Any) -> tuple[float, str]:
    """(the largest relative difference of nested numbers, where); words, whole numbers and lengths must be equal."""
    ours, theirs = dict(leaves(got)), dict(leaves(expected))
    assert ours.keys() == theirs.keys()
    worst = (0.0, "")
    for where, other in theirs.items():
        if isinstance(other, float):
            scale = ILL if where.endswith("explained_variance") else max(abs(other), SCALE)
            worst = max(worst, (abs(ours[where] - other) / scale, where))
        else:
            assert ours[where] == other, where
    return worst


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_two_workers_give_the_metrics_of_one_process(ran: Ran, engine: str, method: str) -> None:
    got, expected = metrics(ran.of(engine, 2, method)), metrics(ran.alone(False, method))
    assert len(expected) == 10
    worst, where = gap(got, expected)
    assert worst <= TOLERANCE, f"{where}: {worst:.3g}"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ONLINE)
def test_two_workers_sample_the_tokens_of_one_process(ran: Ran, engine: str, method: str) -> None:
    got, expected = rollouts(ran.of(engine, 2, method)), rollouts(ran.alone(False, method))
    assert len(expected) == 10
    for ours, theirs in zip(got, expected, strict=True):
        for name in ("completion_ids", "draw", "answer", "version", "finish", "reward/own"):
            assert ours[name] == theirs[name]
    worst, where = gap(got, expected)
    assert worst <= TOLERANCE, f"{where}: {worst:.3g}"


@pytest.mark.parametrize("method", ONLINE)
def test_the_runs_that_are_compared_did_learn(ran: Ran, method: str) -> None:
    """Else equal numbers would say nothing: weights move, answers differ from step to step, and so do lengths."""
    rows, answers = metrics(ran.alone(False, method)), rollouts(ran.alone(False, method))
    assert rows[0]["kl"] == 0
    assert rows[-1]["kl"] > 1e-3
    assert all(row["grad_norm/policy"] > 0 for row in rows)
    assert len({str(one["completion_ids"]) for one in answers}) == 10
    assert len({len(ids) for one in answers for ids in one["completion_ids"]}) > 3


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", METHODS)
def test_three_workers_with_fewer_rows_than_workers_give_the_same(ran: Ran, engine: str, method: str) -> None:
    got, expected = ran.of(engine, 3, method), ran.alone(True, method)
    worst, where = gap(metrics(got), metrics(expected))
    assert worst <= TOLERANCE, f"{where}: {worst:.3g}"
    assert [one["completion_ids"] for one in rollouts(got)] == [one["completion_ids"] for one in rollouts(expected)]
