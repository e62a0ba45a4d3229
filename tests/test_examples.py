"""The examples run as they stand, and the loop in the caller's hands gives the weights of whet.train to the bit."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import whet

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.folder(tmp_path / "m")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, "m"])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    (run,) = (place / "runs").iterdir()
    assert (run / "metrics.jsonl").is_file()


def test_the_loop_fits_on_one_screen() -> None:
    assert len((ROOT / "examples" / "grpo_loop.py").read_text().splitlines()) <= 45


def test_the_own_loop_gives_the_weights_of_train_to_the_bit_killed_and_resumed_too(place: Path) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "grpo_loop.py"))
    example["main"]("m", "runs/own")
    given = {"model": "m", "reward": example["short"], "data": example["ROWS"], **example["OPTIONS"]}
    whet.train("grpo", out="runs/whole", **given)
    assert same(weights(place / "runs/own/model"), weights(place / "runs/whole/model"))
    rows = [(place / f"runs/{one}/metrics.jsonl").read_text().splitlines() for one in ("own", "whole")]
    assert len(rows[0]) == len(rows[1]) == 4

    command = [sys.executable, str(ROOT / "examples" / "grpo_loop.py"), "m", "runs/killed"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (place / "runs/killed/checkpoints/step-00000002").is_dir() and time.monotonic() < until:
        time.sleep(0.01)
        assert run.poll() in (None, 0)
    run.send_signal(signal.SIGKILL)
    run.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert same(weights(place / "runs/killed/model"), weights(place / "runs/own/model"))


def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(len(one.split())) for one in completions]


ONLINE = {"num_steps": 2, "prompts_per_step": 2, "num_generations": 2, "max_new_tokens": 6, "reward": reward}
ROWS = [{"prompt": "a yes"}, {"prompt": "b no"}]


def test_a_session_from_objects_writes_the_run_folder_of_paths(place: Path) -> None:
    model, tokenizer = tiny.causal_lm(), tiny.tokenizer()
    tiny.write_jsonl(place / "rows.jsonl", ROWS)
    (place / "rules.py").write_text(
        "def reward(prompts, completions, **columns):\n    return [float(len(one.split())) for one in completions]\n"
    )
    whet.train("grpo", model=model, tokenizer=tokenizer, data=ROWS, out="runs/objects", **ONLINE)
    whet.train("grpo", model="m", data="rows.jsonl", out="runs/paths", **(ONLINE | {"reward": "rules.py:reward"}))
    assert same(weights(place / "runs/objects/model"), weights(place / "runs/paths/model"))
    text = (place / "runs/objects/recipe.yaml").read_text()
    assert "python:test_examples:reward#" in text
    assert "runs/objects/inputs/data-" in text
    assert "runs/objects/inputs/model-Qwen3ForCausalLM-" in text


def test_a_resume_asks_for_the_same_objects(place: Path) -> None:
    given = {"model": "m", "data": ROWS, "out": "runs/r", **ONLINE}
    whet.train("grpo", **given)
    with pytest.raises(whet.RecipeError, match=r"differs in reward; a resumed run needs the recipe"):
        whet.train("grpo", resume=True, **(given | {"reward": lambda prompts, completions, **_: [1.0] * len(prompts)}))
    with pytest.raises(whet.RecipeError, match=r"differs in data.train"):
        whet.train("grpo", resume=True, **(given | {"data": ROWS[:1] * 2}))


def test_weights_that_were_updated_and_not_published_are_refused(place: Path) -> None:
    def run() -> None:
        with whet.Session("grpo", model="m", data=ROWS, out="runs/r", **ONLINE) as session:
            for _ in session.steps():
                for mini in session.minibatches(session.rollout()):
                    session.update(mini)

    with pytest.raises(RuntimeError, match=r"updated and not published; call publish\(\)"):
        run()


def test_an_own_loss_takes_the_place_of_the_policys(place: Path) -> None:
    def plain(logp: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        return -logp * advantage

    def run(out: str, loss: Any, **more: Any) -> dict[str, torch.Tensor]:
        with whet.Session("dr_grpo", model="m", data=ROWS, out=out, **ONLINE, **more) as session:
            for _ in session.steps():
                for mini in session.minibatches(session.rollout()):
                    session.update(mini, loss)
                session.publish()
            session.export(f"{out}/model")
        return weights(place / out / "model")

    built_in = run("runs/built_in", None, surrogate="reinforce", ratio=None)
    assert same(run("runs/own", plain), built_in)
    assert not same(run("runs/clip", lambda logp, advantage: -logp), built_in)


def test_the_stages_of_another_kind_of_run_are_named(place: Path) -> None:
    with whet.Session(
        "sft", model="m", data=[{"prompt": "a", "completion": "yes"}], out="runs/s", num_steps=1
    ) as session:
        with pytest.raises(RuntimeError, match=r"generate: sft trains on a file; use session.batches\(\)"):
            session.generate()
        for batch in session.batches():
            session.update(batch)
    with pytest.raises(RuntimeError, match="used as a context manager"):
        session.metrics()


def test_the_critic_alone_is_trained_in_its_warm_up(place: Path) -> None:
    given = {**ONLINE, "num_generations": 1, "model": "m", "data": ROWS}
    run = whet.train("ppo", out="runs/warm", **given, mini_batch_size=1, **{"critic.warmup_steps": 2})
    before, after = weights(place / "m"), weights(run / "model")
    assert same(before, after)
    whet.train("ppo", out="runs/cold", **given, mini_batch_size=1)
    assert not same(before, weights(place / "runs/cold/model"))


def test_passes_over_the_prompts_give_the_number_of_steps(place: Path) -> None:
    rows = [{"prompt": f"a {word}"} for word in tiny.WORDS[:6]]
    run = whet.train("grpo", model="m", data=rows, out="runs/e", **(ONLINE | {"num_epochs": 1.5}))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 5  # 1.5 x 6 prompts, 2 per step


BAD = {
    "a row": ({"data": [3]}, r"data\[0\]: a row is a dict, got int"),
    "a value": (
        {"data": [{"prompt": "a", "x": object()}]},
        r"data\[0\]: field 'x' is a object, .* which JSON cannot hold",
    ),
    "a part": (
        {"surrogate": lambda nonsense: nonsense},
        r"test_examples.py:\d+: the parameter 'nonsense' is not a column",
    ),
    "a star": ({"surrogate": lambda *all: all}, r"test_examples.py:\d+: \*all is not allowed"),
    "a slot": (
        {"select": "examples/own_surrogate.py:tanh_clip"},
        "algorithm.select: this slot takes the built-in parts",
    ),
    "an option": (
        {"surrogate": {"name": "examples/own_surrogate.py:tanh_clip", "width": "wide"}},
        r"algorithm.surrogate.width: expected `float`",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_object_that_cannot_work_is_named_before_anything_is_loaded(name: str, place: Path) -> None:
    changes, said = BAD[name]
    with pytest.raises(whet.UserError, match=said):
        whet.train("grpo", **({"model": "m", "data": ROWS, "out": "runs/bad", **ONLINE} | changes))
    assert not (place / "runs/bad/metrics.jsonl").exists()


def test_a_model_without_its_tokenizer_is_refused(place: Path) -> None:
    with pytest.raises(whet.ModelError, match="needs its tokenizer too"):
        whet.train("grpo", model=tiny.causal_lm(), data=ROWS, out="runs/bad", **ONLINE)
