"""Ten steps of every kind of training through the real loops: the numbers are the same whoever learns, and on how many."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from models import helpers as h

from engines.comparing import TOLERANCE, Failed, gap, metrics, rollouts
from engines.jobs import OFFLINE, ONLINE, VOCABULARIES, runs, runs_and_stops
from engines.together import together
from whet.distributed import Workers

TOKENS = 1e-4
"""For single tokens, over which nothing averages: after 36 updates a log-prob of 6 nats is right to 3e-5."""
METHODS = (*OFFLINE, *ONLINE)
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
ENGINES = [
    "ddp", "fsdp", pytest.param("zero2", marks=[needs_deepspeed, pytest.mark.long]),
    pytest.param("zero3", marks=needs_deepspeed),
]  # fmt: skip


class Ran:
    """The launches, each started when it is first asked for, and their run folders."""

    def __init__(self, folder: Path, long: bool) -> None:
        self.folder, self.zero = folder, ("zero2", "zero3") if long else ("zero3",)
        self.made: dict[str, Any] = {}

    def launched(self, name: str) -> Any:
        """What a launch told; where it failed once it fails again at once."""
        if name not in self.made:
            folder = self.folder / name
            engines = {"one": ("local",), "torch": ("ddp", "fsdp"), "zero": self.zero}[name]
            try:
                if name == "one":
                    self.made[name] = runs(Workers(), engines, folder)
                else:
                    job = runs_and_stops if name == "torch" else runs
                    self.made[name] = together(2, folder / "told", job, engines, folder)
            except Exception as error:
                self.made[name] = error
        found = self.made[name]
        if isinstance(found, Exception):
            raise AssertionError(str(found))
        return found

    def of(self, engine: str, method: str) -> Path:
        """The run folder of a method on an engine with two workers, or alone."""
        told = self.told(engine)[method]
        assert not isinstance(told, Failed), told
        return self.folder / self.launch(engine) / engine / method

    def told(self, engine: str) -> dict[str, Any]:
        """What the first worker told of an engine."""
        name = self.launch(engine)
        told = self.launched(name)
        return (told if name == "one" else told[0])[engine]

    @staticmethod
    def launch(engine: str) -> str:
        """The launch that an engine runs in."""
        return "one" if engine == "local" else "zero" if engine.startswith("zero") else "torch"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Ran:
    return Ran(tmp_path_factory.mktemp("runs"), pytestconfig.getoption("--long"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_two_workers_give_the_metrics_of_one_process(ran: Ran, engine: str, method: str) -> None:
    got, expected = metrics(ran.of(engine, method)), metrics(ran.of("local", method))
    assert [line["step"] for line in expected] == list(
        range(0 if method in OFFLINE else 1, 11)
    )  # the start is evaluated
    worst, where = gap(got, expected)
    assert worst <= TOLERANCE, f"{where}: {worst:.3g}"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ONLINE)
def test_two_workers_sample_the_tokens_of_one_process(ran: Ran, engine: str, method: str) -> None:
    got, expected = rollouts(ran.of(engine, method)), rollouts(ran.of("local", method))
    assert len(expected) == 10
    for ours, theirs in zip(got, expected, strict=True):
        for name in ("completion_ids", "draw", "answer", "version", "finish", "reward/own"):
            assert ours[name] == theirs[name]
    worst, where = gap(got, expected)
    assert worst <= TOKENS, f"{where}: {worst:.3g}"


@cache
def in_float64(vocabulary: int) -> float:
    """The loss of SFT from transformers' own forward and torch's log_softmax in float64."""
    role, rows = h.large(vocabulary, dtype=h.DOUBLE)
    total = 0.0
    for row in rows:
        logp = h.full_logits(role.model, row.ids)[row.start - 1 : -1].log_softmax(-1)
        total -= float(logp.gather(1, row.ids[row.start :, None]).sum())
    return total / sum(int(row.mask.sum()) for row in rows)


@pytest.mark.parametrize("engine", ["local", *ENGINES])
def test_every_engine_gives_the_loss_of_float64_over_real_vocabularies(ran: Ran, engine: str) -> None:
    """Of transformers' own forward, whatever the micro-batch: float32 sums over 152,000 tokens may not be biased."""
    got = ran.told(engine)["losses"]
    assert not isinstance(got, Failed), got
    assert len(got) == 2 * len(VOCABULARIES)
    for vocabulary in VOCABULARIES:
        for budget in (300, 8192):
            assert got[f"{vocabulary}/{budget}"] == pytest.approx(in_float64(vocabulary), rel=1e-6)


@pytest.mark.parametrize("method", ONLINE)
def test_the_runs_that_are_compared_did_learn(ran: Ran, method: str) -> None:
    """Else equal numbers would say nothing: weights move, answers differ from step to step, and so do lengths."""
    rows, answers = metrics(ran.of("local", method)), rollouts(ran.of("local", method))
    assert rows[0]["kl"] == 0
    assert rows[-1]["kl"] > 1e-3
    assert all(row["grad_norm/policy"] > 0 for row in rows)
    assert len({str(one["completion_ids"]) for one in answers}) == 10
    assert len({len(ids) for one in answers for ids in one["completion_ids"]}) > 3


# --- one worker alone fails, or is told to stop -----------------------------------------------------------------------


@pytest.fixture(params=["ddp", "fsdp"])
def stops(request: pytest.FixtureRequest, ran: Ran) -> tuple[Path, list[Any]]:
    told = ran.launched("torch")
    return ran.folder / "torch" / request.param, [one["stops"][request.param] for one in told]


def test_a_reward_that_raises_on_one_worker_stops_all_with_its_words_within_seconds(stops: Any) -> None:
    for told in stops[1]:
        words, seconds = told["raises"]
        assert "RewardError" in words
        assert "the grader is out" in words
        assert seconds < 10


def test_a_run_that_a_reward_stopped_kept_its_last_step(stops: Any) -> None:
    folder, _ = stops
    assert [row["step"] for row in metrics(folder / "raises")] == [1]
    assert (folder / "raises" / "checkpoints" / "step-00000001" / "manifest.json").is_file()


def test_ctrl_c_on_one_worker_saves_the_step_and_stops_all(stops: Any) -> None:
    folder, both = stops
    for told in both:
        words, seconds = told["interrupted"]
        assert words == "Interrupted: the checkpoint of step 2 is saved; continue with --resume"
        assert seconds < 10
    assert [row["step"] for row in metrics(folder / "interrupted")] == [1, 2]
    assert (folder / "interrupted" / "checkpoints" / "step-00000002" / "manifest.json").is_file()


def test_an_exception_that_cannot_travel_stops_all_within_seconds_too(stops: Any) -> None:
    for told in stops[1]:
        words, seconds = told["odd"]
        assert "lost" in words
        assert seconds < 10
