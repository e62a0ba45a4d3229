"""Runs that compute in bfloat16: their own checks pass, their weights are float32, and the default follows the device."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import whet
from whet.distributed import Workers
from whet.errors import CheckpointError
from whet.learner.base import LearnerOptions
from whet.methods.options import LoRA
from whet.models.roles import Role
from whet.runs import generators, learners, models, serve
from whet.runs import recipe as fields

HALF = {"learner.precision": "bf16"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny.folder(folder / "m")
    tiny.write_jsonl(folder / "rows.jsonl", [{"prompt": word, "completion": "yes please"} for word in tiny.WORDS])
    return folder


def yes(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(one.count("yes")) for one in completions]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def grpo(home: Path, out: Path, steps: int = 2, **changes: Any) -> list[dict[str, float]]:
    given = {"rollout.num_steps": steps, "prompts_per_step": 8, "num_generations": 4, "max_new_tokens": 8, "lr": 1e-2}
    data = [{"prompt": word} for word in tiny.WORDS]
    whet.train("grpo", model=str(home / "m"), data=data, reward=yes, out=str(out), **given, **changes)
    return metrics(out)


def sft(home: Path, out: Path, **changes: Any) -> dict[str, torch.Tensor]:
    given = {"batch_size": 4, "num_steps": 4, "train.save_every": 2, "lr": 1e-3}
    data = str(home / "rows.jsonl")
    whet.train("sft", model=str(home / "m"), data=data, out=str(out), **(given | changes))
    return load_file(out / "model" / "model.safetensors")


def test_a_run_passes_its_own_checks(home: Path, tmp_path: Path) -> None:
    got, plain = grpo(home, tmp_path / "half", **HALF), grpo(home, tmp_path / "plain")
    for row in got:
        assert row["sampler_gap"] < 5e-3  # rounding of bfloat16; a sampler in float32 would be 0.01 off
        assert row["ratio_mean"] == 1.0
    assert got[0]["entropy"] != plain[0]["entropy"]
    assert {one.dtype for one in load_file(tmp_path / "half" / "model" / "model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.parametrize("form", ["padded", "checkpointing", "lora", "ddp"])
def test_forms_of_a_run_in_half_precision(home: Path, tmp_path: Path, form: str) -> None:
    changes: dict[str, Any] = {
        "padded": {"train.padding_free": False},
        "checkpointing": {"model.gradient_checkpointing": True},
        "lora": {"model.lora.rank": 4},
        "ddp": {"learner": "ddp"},
    }[form]
    for row in grpo(home, tmp_path / "half", **HALF, **changes):
        assert row["sampler_gap"] < 0.1
        assert row["ratio_mean"] == 1.0


def test_on_a_cpu_the_default_has_the_bits_of_float32(home: Path, tmp_path: Path) -> None:
    plain, named = sft(home, tmp_path / "auto"), sft(home, tmp_path / "named", **{"learner.precision": "float32"})
    half = sft(home, tmp_path / "half", **HALF)
    assert all(torch.equal(plain[name], named[name]) for name in plain)
    assert any(not torch.equal(plain[name], half[name]) for name in plain)
    assert all(one.dtype == torch.float32 for one in half.values())


def stopped(home: Path, out: Path, **changes: Any) -> None:
    """Train for two of four updates and leave."""
    given = {"batch_size": 4, "num_steps": 4, "train.save_every": 1, "lr": 1e-3} | changes
    with whet.Session("sft", model=str(home / "m"), data=str(home / "rows.jsonl"), out=str(out), **given) as session:
        for _, batch in zip(range(2), session.batches(), strict=False):
            session.forward_backward(batch)
            session.optim_step()


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(home: Path, tmp_path: Path) -> None:
    whole = sft(home, tmp_path / "whole", **HALF)
    stopped(home, tmp_path / "cut", **HALF)
    resumed = sft(home, tmp_path / "cut", resume=True, **HALF, **{"train.save_every": 1})
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default of a machine with a GPU that computes in bfloat16; models stay where they are."""
    monkeypatch.setattr(models, "half_by_default", lambda device: True)


def test_a_run_goes_on_in_the_precision_in_which_it_began(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With "auto" on another device: refused with the option that continues it, which gives the same bits."""
    with monkeypatch.context() as patch:
        patch.setattr(models, "half_by_default", lambda device: True)
        stopped(home, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"computed in bf16 so far.*--learner\.precision bf16"):
        sft(home, tmp_path / "run", resume=True, **{"train.save_every": 1})
    resumed = sft(home, tmp_path / "run", resume=True, **HALF, **{"train.save_every": 1})
    whole = sft(home, tmp_path / "whole", **HALF)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def online(**model: Any) -> fields.OnlineRecipe:
    return fields.OnlineRecipe(model=fields.Model(path="m", **model))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ({}, {}, True),
        ({"dtype": "float32"}, {}, True),
        ({}, {"precision": "float32"}, False),
        ({"lora": LoRA()}, {}, False),  # the base is bfloat16, and adapters compute in float32
        ({"lora": LoRA(), "dtype": "float32"}, {}, True),
        ({"dtype": "bfloat16"}, {}, False),
        ({"dtype": "float64"}, {}, False),
    ],
)
@pytest.mark.parametrize(("backend", "workers"), [("auto", 1), ("auto", 2), ("local", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_gpu_computes_in_bfloat16_over_float32_weights(
    model: dict[str, Any], options: dict[str, Any], expected: bool, backend: str, workers: int
) -> None:
    recipe = replace(online(**model), learner=fields.Learning(backend, options))
    assert learners.in_bf16(recipe, workers) is expected


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cpu_computes_in_float32_unless_asked(workers: int) -> None:
    for options, expected in (({}, False), ({"precision": "bf16"}, True)):
        recipe = replace(online(), learner=fields.Learning(options=options))
        assert learners.in_bf16(recipe, workers) is expected
    assert not models.half_by_default("auto")
    assert not models.half_by_default("cuda")


def test_the_backend_does_not_depend_on_the_precision() -> None:
    for options in ({}, {"precision": "bf16"}, {"precision": "float32", "tf32": True}):
        recipe = replace(online(), learner=fields.Learning(options=options))
        assert learners.backend_of(recipe, 1) == "local"
        assert learners.backend_of(recipe, 2) == "fsdp"
    offloaded = replace(online(), learner=fields.Learning(options={"offload": True}))
    assert learners.backend_of(offloaded, 1) == "fsdp"


@pytest.mark.parametrize(
    ("options", "model", "expected"),
    [({"precision": "bf16"}, {}, "bfloat16"), ({}, {}, "float32"), ({}, {"dtype": "bfloat16"}, "bfloat16")],
)
def test_engines_compute_as_the_learner_does(
    home: Path, options: dict[str, Any], model: dict[str, Any], expected: str
) -> None:
    recipe = replace(online(**model), learner=fields.Learning(options=options))
    recipe = replace(recipe, model=replace(recipe.model, path=str(home / "m")))
    _, chat = models.tokenizer_and_chat(recipe.model)
    context = generators.context_of(recipe, chat)
    assert context.dtype == expected
    assert context.role is not None
    copy: Role = context.role()
    assert copy.autocast is (expected == "bfloat16" and not model)


def test_sampling_outside_of_training_is_in_the_dtype_of_the_weights(home: Path) -> None:
    recipe = fields.SampleRecipe(model=fields.Frozen(path=str(home / "m")))
    _, chat = models.tokenizer_and_chat(recipe.model)
    assert generators.context_of(recipe, chat).dtype == "float32"


def test_a_server_computes_as_a_run_with_default_options(gpu: None) -> None:
    def told(dtype: Any = "auto", **model: Any) -> str:
        return serve._dtype(fields.ServeRecipe(model=fields.Frozen(path="m", **model), dtype=dtype))

    assert told() == "bfloat16"
    assert told("float32") == "float32"
    assert told(dtype="float32") == told(**{"dtype": "float32"}) == "float32"


def test_tf32_is_set_as_torch_does_and_bounds_follow(home: Path) -> None:
    recipe = online()
    tokenizer, _ = models.tokenizer_and_chat(replace(recipe.model, path=str(home / "m")))
    model = fields.Model(path=str(home / "m"))
    role = models.causal_role("policy", model, tokenizer, trained=True, seed=0)
    own = learners.learner_of(
        fields.OfflineRecipe(model=model),
        {"policy": role},
        {"policy": recipe.optim},
        1,
        Workers(),
        [torch.arange(4, 9)],
    )
    assert torch.get_float32_matmul_precision() == "highest"
    assert not own.low_precision
    on_gpu = SimpleNamespace(device=torch.device("cuda"), trained=False, compute_in=lambda bf16: None)
    try:
        learners._prepare_precision(LearnerOptions(tf32=True), {"policy": on_gpu}, False)  # type: ignore[dict-item]
        assert torch.get_float32_matmul_precision() == "high"
        assert own.low_precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_weights_that_are_trained_in_bfloat16_are_told(home: Path, tmp_path: Path, capfd: Any) -> None:
    sft(home, tmp_path / "pure", num_steps=1, **{"model.dtype": "bfloat16"})
    assert "whet: model.dtype: the trained weights are bfloat16" in capfd.readouterr().err
    sft(home, tmp_path / "half", num_steps=1, **HALF)
    assert "model.dtype" not in capfd.readouterr().err


def test_rewards_and_references_compute_as_the_policy(home: Path) -> None:
    recipe = fields.OnlineRecipe(
        model=fields.Model(path=str(home / "m")), learner=fields.Learning(options={"precision": "bf16"})
    )
    tokenizer, _ = models.tokenizer_and_chat(recipe.model)
    from whet.methods import online as method_of

    own = learners.online_learner(recipe, method_of("ppo"), 1, tokenizer, [torch.arange(4, 12)])
    assert {name: role.autocast for name, role in own.roles.items()} == dict.fromkeys(
        ("policy", "critic", "reference"), True
    )
