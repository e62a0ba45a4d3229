"""A killed run goes on to the same bits: weights, metrics, rollouts; a torn checkpoint costs no good one."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from cli.helpers import on_disk
from models import helpers as h

from loops.helpers import opened
from whet.errors import CheckpointError
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.loops import checkpoint, offline, online
from whet.loops.evaluation import EvalPlan, HeldOut
from whet.loops.interrupt import Stop
from whet.loops.record import RunFolder, read_metrics
from whet.methods import online as method_of
from whet.methods import preference
from whet.methods.compose import SFT
from whet.methods.options import KL, Sampling
from whet.rewards import Weighted


class Killed(BaseException):
    """The power went out."""


class Fragile(LocalLearner):
    """Dies in its update number `dies`."""

    dies = 0

    def forward_backward(self, work: Any) -> Any:
        if self.version + 1 == self.dies:
            raise Killed
        return super().forward_backward(work)


OPTIM = replace(h.FREE, lr=0.02, schedule="cosine", warmup_ratio=0.2)


def sft(
    folder: Path,
    *,
    dies: int = 0,
    resume: bool = False,
    stop: Stop | None = None,
    kind: str = "adamw",
    dropout: float = 0.1,
    every: int = 1,
) -> LocalLearner:
    """Six updates, saved after each; fresh objects every time, as a new process has them."""
    optim = replace(OPTIM, kind=kind)
    own = Fragile(
        {"policy": h.policy(dtype=torch.float32)}, {"policy": optim}, total=6, budget=30, dropout=dropout, seed=4
    )
    own.dies = dies
    plan = offline.OfflinePlan(6, 4, seed=4, save_every=every)
    run = opened(folder, resume)
    held_out = HeldOut(EvalPlan(every=3), lambda _: None, h.rows()[:3])
    offline.train(SFT, own, [h.rows()], plan, run, evaluation=held_out, resume=resume, stop=stop, quiet=True)
    return own


def dpo(folder: Path, *, dies: int = 0, resume: bool = False, **plan: Any) -> LocalLearner:
    """Six updates on pairs with a running mean of rewards, and a reference that follows or is measured before."""
    roles = {
        "policy": h.policy(dtype=torch.float32),
        "reference": h.policy(dtype=torch.float32, name="reference", seed=1),
    }
    own = Fragile(roles, {"policy": OPTIM}, total=6, budget=30)
    own.dies = dies
    given, run = offline.OfflinePlan(6, 3, seed=4, save_every=1, **plan), opened(folder, resume)
    offline.train(preference("dpo", loss="bco_pair"), own, [h.pairs()], given, run, resume=resume, quiet=True)
    return own


ADAPTIVE = KL(controller="adaptive", target=0.5, horizon=20)
METHODS: dict[str, dict[str, Any]] = {
    "instructgpt": {"kl_in_reward": ADAPTIVE},
    "ppo_kl": {"kl_in_reward": ADAPTIVE},
    "dapo": {"kl_in_reward": ADAPTIVE, "dynamic_sampling": 2, "overlong": {"name": "soft_overlong", "buffer": 2}},
    "reinforce": {"kl_in_reward": ADAPTIVE, "reward_normalization": "running", "entropy": {"target": 9.0}},
    "remax": {"kl_in_reward": ADAPTIVE},
    "clip_cov": {"kl_in_reward": ADAPTIVE, "select": {"name": "clip_cov", "share": 0.2, "cov_low": 0.0}},
    "online_dpo": {"loss": "bco_pair", "num_generations": 3},
}
"""What has a state of its own: controllers, running numbers, the count of prompts handed out."""


def rl(folder: Path, *, dies: int = 0, resume: bool = False, name: str = "instructgpt") -> LocalLearner:
    """Three rollouts of four updates each (one without ratio), with an average, a reference that moves, and ptx."""
    method = method_of(name, **({"num_generations": 2, "longest": 5} | METHODS[name]))
    roles = {
        "policy": h.policy(dtype=torch.float32), "reference": h.policy(dtype=torch.float32, name="reference"),
        "critic": h.scorer(dtype=torch.float32, seed=2), "ema": h.policy(dtype=torch.float32, name="ema"),
    }  # fmt: skip
    roles = {name: role for name, role in roles.items() if name in method.roles() | {"ema"}}
    optims = {name: OPTIM for name, role in roles.items() if role.trained}
    own = Fragile(roles, optims, total=12, budget=40)

    class Dying(h.TableReward):
        def score(self, groups: Any) -> Any:
            if self.calls + 1 == dies * (2 if name == "remax" else 1):
                raise Killed
            return super().score(groups)

    table = Dying(lambda ids: float(ids[0] % 3 == 0) if name == "dapo" else 0.5 * len(ids) - 0.25 * (sum(ids) % 5))
    prompts = [h.prompt(i, range(3 + i, 5 + 3 * i)) for i in range(5)]
    several = {"mini_batch_size": 3, "epochs": 2} if method.has_ratio() else {"mini_batch_size": 6}
    plan = online.OnlinePlan(
        3, 3, seed=4, ptx_batch=2 * (name == "instructgpt"), ema=0.8, save_every=1, canary=20, equal_start=True,
        sync_every=2, sync_mix=0.4, **several,
    )  # fmt: skip
    generator = LocalGenerator(own.roles["policy"], (1, 5, 9), str)
    rewards, run = [Weighted("table", table)], opened(folder, resume)
    online.train(
        method, own, generator, rewards, prompts, Sampling(5), plan, run, ptx=h.rows(), resume=resume, quiet=True
    )
    return own


def metrics(folder: Path) -> list[dict[str, float]]:
    if not (folder / "metrics.jsonl").is_file():
        return []
    return [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(folder)]


def rollouts(folder: Path) -> dict[str, list]:
    return {
        path.name: pyarrow.parquet.read_table(path).to_pylist()
        for path in sorted((folder / "rollouts").glob("*.parquet"))
    }


def same(one: Path, other: Path, ours: LocalLearner, theirs: LocalLearner) -> None:
    h.equal_weights(h.weights(ours), h.weights(theirs))
    assert metrics(one) == metrics(other)
    assert rollouts(one) == rollouts(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable], tuple[Path, LocalLearner]]:
    """An uninterrupted run of each kind, made once."""
    made: dict[Any, tuple[Path, LocalLearner]] = {}

    def get(function: Callable, **given: Any) -> tuple[Path, LocalLearner]:
        key = (function, *sorted(given.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[key] = folder, function(folder, **given)
        return made[key]

    return get


@pytest.mark.parametrize(
    "given", [{}, {"dropout": 0.0}, {"kind": "muon"}, {"every": 2}], ids=["dropout", "plain", "muon", "rare"]
)
@pytest.mark.parametrize("dies", [1, 4, 6])
def test_a_killed_sft_run_resumes_to_the_bit(tmp_path: Path, whole: Any, dies: int, given: dict[str, Any]) -> None:
    folder, expected = whole(sft, **given)
    with pytest.raises(Killed):
        sft(tmp_path, dies=dies, **given)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(dies))
    same(tmp_path, folder, sft(tmp_path, resume=True, **given), expected)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dies", [1, 2, 3])
def test_a_killed_online_run_resumes_to_the_bit(tmp_path: Path, whole: Any, dies: int, name: str) -> None:
    folder, expected = whole(rl, name=name)
    with pytest.raises(Killed):
        rl(tmp_path, dies=dies, name=name)
    same(tmp_path, folder, rl(tmp_path, resume=True, name=name), expected)
    states = [{key: value for key, value in line.items() if key.startswith("state/")} for line in metrics(folder)]
    moved = {key for key in states[-1] if len({state.get(key) for state in states}) == 3}
    assert moved  # it was part of it


@pytest.mark.parametrize("plan", [{}, {"sync_every": 2, "sync_mix": 0.5}, {"precompute": True}], ids=str)
@pytest.mark.parametrize("dies", [1, 3, 6])
def test_a_killed_run_on_pairs_resumes_to_the_bit(tmp_path: Path, whole: Any, dies: int, plan: dict[str, Any]) -> None:
    folder, expected = whole(dpo, **plan)
    with pytest.raises(Killed):
        dpo(tmp_path, dies=dies, **plan)
    same(tmp_path, folder, dpo(tmp_path, resume=True, **plan), expected)
    states = [
        json.loads((checkpoint.latest(one / "checkpoints") / "loop.json").read_text())["state"]
        for one in (tmp_path, folder)
    ]
    assert states[0] == states[1]
    assert states[0]["term0.delta"] != 0.0


def test_a_run_killed_twice_resumes_to_the_bit(tmp_path: Path, whole: Any) -> None:
    folder, expected = whole(sft)
    for dies in (3, 5):
        with pytest.raises(Killed):
            sft(tmp_path, dies=dies, resume=dies > 3)
    same(tmp_path, folder, sft(tmp_path, resume=True), expected)


@pytest.mark.parametrize("tear", ["cut", "missing", "flipped", "no manifest"])
def test_a_torn_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path, whole: Any, tear: str) -> None:
    folder, expected = whole(sft)
    with pytest.raises(Killed):
        sft(tmp_path, dies=5)
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000004"
    weights = newest / "learner" / "policy.safetensors"
    content = weights.read_bytes()
    match tear:
        case "cut":
            weights.write_bytes(content[:-100])
        case "missing":
            weights.unlink()
        case "flipped":
            weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case _:
            (newest / "manifest.json").unlink()
    good = checkpoint.latest(tmp_path / "checkpoints")
    assert good is not None
    assert good.name == "step-00000003"
    same(tmp_path, folder, sft(tmp_path, resume=True), expected)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LocalLearner.save

    def full(self: LocalLearner, folder: Path) -> None:
        original(self, folder)
        if self.version == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalLearner, "save", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*step-00000002"):
        sft(tmp_path)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000001", "step-00000002"]
    good = checkpoint.latest(tmp_path / "checkpoints")
    assert good is not None
    assert good.name == "step-00000002"


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    sft(tmp_path)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000005", "step-00000006"]


def test_a_stop_that_was_asked_for_saves_and_resumes_to_the_bit(tmp_path: Path, whole: Any) -> None:
    folder, expected = whole(sft)
    stop = Stop()
    stop.receive(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        sft(tmp_path, stop=stop)
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1]
    same(tmp_path, folder, sft(tmp_path, resume=True), expected)


def test_nothing_but_safetensors_and_json_is_written(tmp_path: Path) -> None:
    sft(tmp_path)
    names = {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert names == {".safetensors", ".json"}


def test_a_resumed_run_trains_no_step_twice(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        sft(tmp_path, dies=4)
    own = sft(tmp_path, resume=True)
    assert own.version == 6
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]


def test_dropout_acts_on_updates_and_not_on_evaluation(whole: Any) -> None:
    (with_it, _), (without, _) = whole(sft), whole(sft, dropout=0.0)
    assert metrics(with_it)[1]["loss"] != metrics(without)[1]["loss"]
    assert metrics(with_it)[0]["eval/loss"] == metrics(without)[0]["eval/loss"]


def test_a_line_of_metrics_torn_by_the_kill_does_not_stop_the_resume(tmp_path: Path, whole: Any) -> None:
    folder, expected = whole(sft)
    with pytest.raises(Killed):
        sft(tmp_path, dies=4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 2.3')
    same(tmp_path, folder, sft(tmp_path, resume=True), expected)


def killed(*_: object) -> None:
    raise Killed


def test_a_run_that_was_killed_while_it_began_has_no_recipe_without_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: killed() if Path(to).exists() else real(path, to))
    (tmp_path / "environment.json").touch()
    with pytest.raises(Killed):
        RunFolder(tmp_path).environment("seed: 4\n")
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_kill_while_a_resume_rewrites_its_files_loses_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    run.environment("seed: 4\n")
    for step in (1, 2, 3):
        run.metrics(step, loss=1.0 / step)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            RunFolder(tmp_path, resume_at=2)
        with pytest.raises(Killed):
            RunFolder(tmp_path).environment("seed: 5\n")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "recipe.yaml").read_text() == "seed: 4\n"
    RunFolder(tmp_path, resume_at=2).environment("seed: 5\n")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "recipe.yaml").read_text() == "seed: 5\n"
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "recipe.yaml", "environment.json"}


@pytest.mark.parametrize("earlier", [False, True])
def test_a_kill_inside_an_export_leaves_an_earlier_model_whole_and_the_next_export_leaves_nothing_of_it(
    earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LocalLearner({"policy": h.policy(dtype=torch.float32)}, {"policy": OPTIM}, total=1, budget=30)
    where = tmp_path / "model"
    if earlier:
        own.export("policy", where)
    before = on_disk(tmp_path)
    model = own.roles["policy"].model
    real = type(model).save_pretrained

    def half(model: Any, folder: str, **named: Any) -> None:
        real(model, folder, **named)
        (Path(folder) / ".tmpXYZ").write_bytes(b"half")
        (Path(folder) / "config.json").write_text("{")
        raise Killed

    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", half)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing up
        with pytest.raises(Killed):
            own.export("policy", where)
    after = on_disk(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert (where / "config.json").exists() == earlier
    own.export("policy", where)
    names = {"config.json", "model.safetensors", "generation_config.json"}
    assert on_disk(tmp_path).keys() == {f"model/{name}" for name in names}
    assert on_disk(tmp_path)["model/model.safetensors"] != before.get("model/model.safetensors")


def test_what_a_killed_export_left_and_cannot_be_removed_is_an_error_and_not_a_part_of_the_next_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LocalLearner({"policy": h.policy(dtype=torch.float32)}, {"policy": OPTIM}, total=1, budget=30)
    own.export("policy", tmp_path / "model")
    before = on_disk(tmp_path / "model")
    aside = tmp_path / ".model.writing"
    aside.mkdir()
    (aside / "model-00002-of-00002.safetensors").write_bytes(b"half")
    real = os.unlink

    def refusing(path: Any, **named: Any) -> None:
        if Path(path).name.startswith("model-00002"):
            raise PermissionError(13, "Permission denied", str(path))
        real(path, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refusing)
        with pytest.raises(PermissionError, match="model-00002-of-00002"):
            own.export("policy", tmp_path / "model")
    assert on_disk(tmp_path / "model") == before
    own.export("policy", tmp_path / "model")
    assert on_disk(tmp_path) == {f"model/{name}": content for name, content in before.items()}
