"""The verbs from Python: what each returns and leaves."""

import json
import math
from pathlib import Path

import pytest
import tiny
import yaml

import whet
from whet.errors import RecipeError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny.folder(home / "m")
    tiny.write_jsonl(
        home / "sft.jsonl", [{"prompt": "hello", "completion": "yes"}, {"prompt": "a b", "completion": "no"}]
    )
    tiny.write_jsonl(home / "prompts.jsonl", [{"prompt": "hello", "level": 1}, {"prompt": "a b", "level": 2}])
    (home / "judge.py").write_text(
        "def count(prompts, completions, **columns):\n"
        "    return [float(len(text.split())) for text in completions]\n"
        "def last_first(prompt, responses, **columns):\n"
        "    return list(range(len(responses), 0, -1))\n"
    )
    return home


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_returns_its_folder_with_recipe_metrics_and_a_model(home: Path, tmp_path: Path) -> None:
    out = whet.train(
        "sft", model=f"{home}/m", data=f"{home}/sft.jsonl", out=f"{tmp_path}/out", train={"num_steps": 3}, lr="1e-3"
    )
    assert out == tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "recipe.yaml",
        "environment.json",
        "inputs.json",
        ".lock",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "report.html",
    }
    assert [line["step"] for line in rows(out / "metrics.jsonl")] == [1, 2, 3]
    numbers = whet.evaluate(model=f"{out}/model", data=f"{home}/sft.jsonl")
    assert set(numbers) == {"nll"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "whet: policy: adamw, learning rate 1e-05: cosine to 10% of it"),
        ({"lora": {"rank": 2}}, "whet: policy (LoRA): adamw, learning rate 0.0001: cosine to 10% of it"),
        ({"lora": {"rank": 2}, "lr": 2e-5, "warmup_ratio": 0.25},
         "whet: policy (LoRA): adamw, learning rate 2e-05: warm-up over 25% of the updates, then cosine to 10% of it"),
    ],
)  # fmt: skip
def test_a_run_says_its_learning_rate_at_the_start_and_uses_it(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict, told: str
) -> None:
    given = {"model": f"{home}/m", "data": f"{home}/sft.jsonl", "out": f"{tmp_path}/out", "train": {"num_steps": 1}}
    out = whet.train("sft", quiet=False, **given, **fields)
    length = "whet: sft: 2 elements, 1 updates of 32 (1 in an epoch, the last of 2): 1 epochs"
    assert capsys.readouterr().err.splitlines()[:2] == [length, told]
    rate = float(told.split("learning rate ")[1].split(":")[0])
    assert yaml.safe_load((out / "recipe.yaml").read_text())["optim"]["lr"] == rate
    warm = 0.25 if "warmup_ratio" in fields else 0.0
    assert rows(out / "metrics.jsonl")[0]["lr/policy"] == pytest.approx(rate / (1 + warm))
    whet.train("sft", **(given | {"out": f"{tmp_path}/quiet"}), **fields)
    assert "learning rate" not in capsys.readouterr().err


def test_a_reward_model_of_a_single_answer_has_no_deviation_to_scale_by(home: Path, tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "one.jsonl", [{"prompt": "a", "completion": "yes", "score": 1}])
    given = {"model": f"{home}/m", "data": f"{tmp_path}/one.jsonl", "algorithm": {"name": "absolute"}}
    out = whet.train("reward", out=f"{tmp_path}/out", train={"num_steps": 1}, **given)
    about = json.loads((out / "model" / "whet.json").read_text())
    assert math.isfinite(about["shift"])


def test_sampling_and_ranking_write_rows_that_keep_what_they_had(home: Path, tmp_path: Path) -> None:
    given = {"model": f"{home}/m", "data": f"{home}/prompts.jsonl", "max_new_tokens": 6}
    answers = whet.sample(out=f"{tmp_path}/answers.jsonl", num_generations=3, **given)
    assert [(row["prompt"], row["level"], len(row["responses"])) for row in rows(answers)] == [
        ("hello", 1, 3),
        ("a b", 2, 3),
    ]
    again = whet.sample(out=f"{tmp_path}/again.jsonl", num_generations=3, **given)
    assert again.read_bytes() == answers.read_bytes()
    form = {"data": str(answers), "judge_form": "rank", "judge": f"{home}/judge.py:last_first"}
    ranked = whet.rank(out=f"{tmp_path}/ranks.jsonl", **form)
    assert [row["ranks"] for row in rows(ranked)] == [[3, 2, 1], [3, 2, 1]]
    assert [{key: row[key] for key in row if key != "ranks"} for row in rows(ranked)] == rows(answers)


def test_scores_of_the_rows_become_ranks(tmp_path: Path) -> None:
    row = {"prompt": "a", "responses": ["b", "c", "d"], "scores": [0.5, 2, 0.5], "id": "x"}
    tiny.write_jsonl(tmp_path / "answers.jsonl", [row])
    out = whet.rank(data=f"{tmp_path}/answers.jsonl", out=f"{tmp_path}/new/ranks.jsonl")
    assert rows(out) == [row | {"ranks": [2, 1, 2]}]


def test_a_model_is_no_better_than_itself_and_no_nat_away(home: Path) -> None:
    """Greedy, both answer alike; those are no samples of the policy, so no KL is told of them."""
    greedy = {"max_new_tokens": 6, "temperature": 0}
    given = {"model": f"{home}/m", "against": f"{home}/m", "judge": f"{home}/judge.py:count", "sampling": greedy}
    numbers = whet.evaluate(data=f"{home}/prompts.jsonl", **given)
    assert [numbers[f"count/win_rate{end}"] for end in ("", "_low", "_high")] == [0.5, 0.5, 0.5]
    assert (numbers["prompts"], numbers["count/score"] - numbers["count/against"]) == (2, 0.0)
    assert "kl" not in numbers
    assert whet.evaluate(data=f"{home}/prompts.jsonl", **(given | {"sampling": {"max_new_tokens": 6}}))["kl"] == 0.0


def test_an_unknown_verb_or_field_is_an_error_of_the_recipe(home: Path) -> None:
    with pytest.raises(RecipeError, match="unknown verb 'grop'; did you mean 'grpo'"):
        whet.train("grop")
    with pytest.raises(RecipeError, match=r"unknown field 'train\.bach'; did you mean 'train\.batch_size'"):
        whet.train("sft", model=f"{home}/m", data=f"{home}/sft.jsonl", **{"train.bach": 3})
