"""What engines cannot do is refused by name before any model is loaded."""

from pathlib import Path
from typing import Any

import pytest
import tiny

import whet
from whet.data import PLAIN
from whet.distributed import Workers
from whet.errors import RecipeError


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("engines")
    (folder / "reward.py").write_text("def score(prompts, completions, **_):\n    return [0.0 for _ in completions]\n")
    tiny.folder(folder / "model")
    tiny.write_jsonl(folder / "prompts.jsonl", [{"prompt": word} for word in "abcdefgh"])
    return {
        "model": str(folder / "model"), "data": str(folder / "prompts.jsonl"), "reward": f"{folder}/reward.py:score",
        "rollout": {"prompts_per_step": 4, "num_steps": 1}, "sampling": {"max_new_tokens": 4}, "out": str(folder / "out"),
    }  # fmt: skip


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "truncation": ({"generator": "vllm", "sampling.top_p": 0.9}, "sampling: a vllm engine does not say which tokens"),
    "no server": ({"generator": "server"}, "generator.urls: where are the servers"),
    "a server that is not there": (
        {"generator": "server", "generator.urls": ["http://127.0.0.1:1"]},
        r"generator.urls: .*no server responds at http://127.0.0.1:1 .*start one with whet serve",
    ),
    "servers without": (
        {"generator.urls": ["http://127.0.0.1:1"]},
        "generator.urls: local does not have it, only server",
    ),
    "count": ({"generator.count": 2}, "generator.count: local does not have it, only vllm"),
    "adapter": ({"generator": "vllm", "generator.push": "adapter"}, "there is no adapter without model.lora"),
    "segment": ({"generator.segment_tokens": 8}, "generator.segment_tokens: answers are waited for"),
    "one machine's model": (
        {"generator.tensor_parallel": 2},
        "generator.tensor_parallel: local does not have it, only vllm",
    ),
    "a server's time": (
        {"generator": "vllm", "generator.timeout": 5},
        "generator.timeout: vllm does not have it, only server, openai",
    ),
    "a copy of 4 bits": (
        {"model.quantize": "4bit", "model.lora.rank": 2, "generator.max_staleness": 1},
        "model.quantize: a 4-bit base cannot be copied to another generator",
    ),
    "bf16 beside an updated reference": (
        {"learner": "zero2", "learner.precision": "bf16", "rollout.sync_reference.every": 2},
        "learner.precision: DeepSpeed would keep the averaged reference in half precision",
    ),
    "float16": (
        {"model.dtype": "float16"},
        "model.dtype: whet does not train in float16, .* no loss scaling.*--learner.precision bf16",
    ),
    "half of double": (
        {"model.dtype": "float64", "learner.precision": "bf16"},
        "learner.precision: bf16 computes over float32 weights, and model.dtype is float64",
    ),
    "tf32 without a GPU": (
        {"learner.tf32": True},
        "learner.tf32: the models are on a cpu, and TF32 is of GPUs; leave it out",
    ),
    "offload on replicas": (
        {"learner": "ddp", "learner.offload": True},
        "learner.offload: ddp does not have it, only fsdp, zero1",
    ),
    "trunk": (
        {"learner": "zero2", "trunk": "shared", "model.lora.rank": 2},
        "trunk: DeepSpeed trains one role per model",
    ),
    "an engine that is none": ({"learner": "zero4"}, "learner.backend"),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_an_engine_cannot_do_is_refused(
    given: dict[str, Any], changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whet.models.load.check_four_bit", lambda device: None)  # as on a machine with a GPU
    with pytest.raises(RecipeError, match=said):
        whet.train("reinforce", **{**given, **changes})
    assert not Path(given["out"]).exists()


def test_one_process_cannot_be_two(given: dict[str, Any]) -> None:
    from whet.runs import config, generators, learners
    from whet.runs.recipe import OnlineRecipe

    recipe = config.resolve(OnlineRecipe, "ppo", None, [("learner", "local")])
    with pytest.raises(RecipeError, match="local runs in one process, but there are 2"):
        learners.backend_of(recipe, 2)
    assert learners.backend_of(config.resolve(OnlineRecipe, "ppo", None, []), 2) == "fsdp"
    with pytest.raises(RecipeError, match=r"--cluster auto --cluster\.engines 1"):
        generators.check_generator(
            config.resolve(OnlineRecipe, "ppo", None, [("generator.max_staleness", 1)]), PLAIN, 2
        )


def test_the_correction_that_is_advised_exists(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from whet.methods import compose
    from whet.runs import checks, config
    from whet.runs.recipe import OnlineRecipe

    recipe = config.resolve(OnlineRecipe, "ppo", None, [("generator.max_staleness", 1)])
    (told,) = checks.cautions(recipe, compose.online("ppo"))
    advised = told.partition("--importance-correction ")[2].split()[0]
    assert compose.online("ppo", importance_correction=advised).importance_correction is not None


def test_engines_take_the_gpus_that_learners_leave() -> None:
    from whet.generate.vllm.adapter import Options, dealt_gpus

    both = [dealt_gpus(6, [0, 1], place, Options(count=2)) for place in (0, 1)]
    assert both == [[(2,), (3,)], [(4,), (5,)]]
    assert dealt_gpus(4, [2], 0, Options(tensor_parallel=3)) == [(0, 1, 3)]
    assert dealt_gpus(5, [0, 1], 1, Options(count=2)) == [(1,), (1,)]
    assert dealt_gpus(6, [0, 1], 1, Options(sleep=True)) == [(1,)]
    with pytest.raises(
        RecipeError, match="1 engines of 2 GPUs for each of 2 learners do not fit beside them on 5 GPUs"
    ):
        dealt_gpus(5, [0, 1], 0, Options(tensor_parallel=2))


def test_one_worker_alone_does_nothing_together() -> None:
    alone = Workers()
    assert alone.first
    assert alone.gather(3) == [3]
    assert alone.broadcast("x") == "x"
    assert alone.together(lambda: 5) == [5]
    with pytest.raises(ZeroDivisionError):
        alone.together(lambda: 1 // 0)
    assert list(alone.shard([1, 2, 3])) == [1, 2, 3]


def test_the_plan_of_a_recipe_is_told(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from whet.cli.main import main

    words = ["plan", "ppo", "--model", given["model"], "--reward", given["reward"], "--gpus", "8", "--gpu-memory", "80"]
    assert main(words) == 0
    told = capsys.readouterr().out
    for word in ("policy", "critic", "reference", "push"):
        assert word in told
    assert main(["plan", "ppo", "--model", given["model"]]) == 2
    assert "--gpus" in capsys.readouterr().err
    assert main(["plan", "sample"]) == 2
    assert main(["plan", "--help"]) == 0
