"""Models of other tools in a run: their own end tokens, rotary embeddings, positions, tokenizers and sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

from whet.cli.main import main

from .helpers import whet


@pytest.fixture
def home(tmp_path: Path) -> Path:
    tiny.folder(tmp_path / "m")
    tiny.write_jsonl(tmp_path / "q.jsonl", [{"prompt": word} for word in tiny.WORDS[:6]])
    tiny.write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "yes", "rejected": "no"}] * 4)
    (tmp_path / "own.py").write_text(
        "def f(prompts, completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    return tmp_path


def test_an_answer_ends_with_the_models_own_end_tokens_too(home: Path) -> None:
    """Llama 3.1 lists three in its generation configuration."""
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "m")
    ids = transformers.AutoTokenizer.from_pretrained(home / "m").apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    first = int(model(**ids).logits[0, -1].argmax())
    file = home / "m/generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [1, first]}))
    tiny.write_jsonl(home / "one.jsonl", [{"prompt": "a"}])
    given = [
        "--model",
        home / "m",
        "--data",
        home / "one.jsonl",
        "--temperature",
        0,
        "--num-generations",
        1,
        "--max-new-tokens",
        8,
    ]
    assert main(["sample", *map(str, given), "--out", f"{home}/s.jsonl"]) == 0
    row = json.loads((home / "s.jsonl").read_text())
    assert (row["response_ids"], row["finish"]) == ([[first]], ["stop"])


@pytest.mark.parametrize("packed", ["false", "true"])
def test_rotary_embeddings_that_depend_on_the_longest_row_give_the_models_own_loss(home: Path, packed: str) -> None:
    """Phi-3's longrope: beyond the original positions the factors change for all rows of a forward."""
    half = 4
    config = transformers.Phi3Config(
        vocab_size=27, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, original_max_position_embeddings=40, initializer_range=0.3, bos_token_id=None,
        eos_token_id=1, pad_token_id=0,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40,
                         "short_factor": [1.0] * half, "long_factor": [6.0, 9.0, 3.0, 4.0], "partial_rotary_factor": 1.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(home / "phi")
    tiny.tokenizer().save_pretrained(home / "phi")
    texts = [" ".join((tiny.WORDS * 20)[: 5 + 30 * k]) for k in range(4)]
    data = tiny.write_jsonl(home / "t.jsonl", [{"text": text} for text in texts])
    given = ["--model", home / "phi", "--data", data, "--num-steps", 1, "--batch-size", 4, "--padding-free", packed]
    assert main(["pretrain", *map(str, given), "--out", f"{home}/run", "--quiet"]) == 0
    tokenizer = tiny.tokenizer()
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], 1]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    loss = json.loads((home / "run/metrics.jsonl").read_text())["loss"]
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_a_reference_with_another_tokenizer_is_refused(home: Path, capsys: Any) -> None:
    tiny.folder(home / "other")
    file = home / "other/tokenizer.json"
    about = json.loads(file.read_text())
    vocabulary = about["model"]["vocab"]
    vocabulary["yes"], vocabulary["no"] = vocabulary["no"], vocabulary["yes"]
    file.write_text(json.dumps(about))
    given = ["--model", home / "m", "--reference", home / "other", "--num-steps", 1]
    for verb, more in (
        ("dpo", ["--data", home / "pairs.jsonl"]),
        ("grpo", ["--data", home / "q.jsonl", "--reward", f"{home}/own.py:f", "--max-new-tokens", 4]),
    ):
        said = whet(capsys, verb, *given, *more, "--out", home / verb)
        assert said.status == 2
        assert "has another tokenizer" in said.error


def test_the_exact_kl_to_a_reference_with_more_embeddings_counts_the_tokens(home: Path) -> None:
    """Sizes of one family differ in their padding. The KL of two equal models is 0."""
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "m")
    model.resize_token_embeddings(40, mean_resizing=False)
    model.save_pretrained(home / "wide")
    tiny.tokenizer().save_pretrained(home / "wide")
    given = [
        "--model",
        home / "m",
        "--reference",
        home / "wide",
        "--data",
        home / "q.jsonl",
        "--reward",
        f"{home}/own.py:f",
    ]
    given += [
        "--num-steps",
        1,
        "--prompts-per-step",
        4,
        "--num-generations",
        4,
        "--max-new-tokens",
        6,
        "--kl-in-loss",
        "exact",
    ]
    assert main(["grpo", *map(str, given), "--out", f"{home}/run", "--quiet"]) == 0
    line = json.loads((home / "run/metrics.jsonl").read_text())
    assert line["loss/policy/rollout/exact"] == pytest.approx(0.0, abs=1e-6)


def test_a_reward_model_with_too_few_positions_is_refused_before_the_run(home: Path, capsys: Any) -> None:
    config = transformers.BertConfig(
        vocab_size=27, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=12,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(home / "bert")
    tiny.tokenizer().save_pretrained(home / "bert")
    given = [
        "--model",
        home / "m",
        "--data",
        home / "q.jsonl",
        "--reward",
        home / "bert",
        "--num-steps",
        1,
        "--out",
        home / "run",
    ]
    said = whet(capsys, "grpo", *given, "--max-new-tokens", 16)
    assert said.status == 2
    assert "has 12 positions, and a prompt with its answer has up to 20 tokens" in said.error


def test_rows_that_are_left_out_are_counted(home: Path, capsys: Any) -> None:
    rows = [{"prompt": "a", "completion": "yes " * n} for n in (2, 30, 3, 40)]
    data = tiny.write_jsonl(home / "d.jsonl", rows)
    said = whet(
        capsys, "sft", "--model", home / "m", "--data", data, "--data.max-tokens", 12, "--data.too-long", "drop",
        "--num-steps", 1, "--out", home / "run",
    )  # fmt: skip
    assert f"2 rows or answers longer than 12 tokens are left out ({data}:2, {data}:4)" in said.error


def test_an_adapter_that_ends_otherwise_than_its_base_is_exported_with_a_line(home: Path, capsys: Any) -> None:
    data = tiny.write_jsonl(home / "d.jsonl", [{"prompt": "a", "completion": "yes"}] * 2)
    given = ["--model", home / "m", "--data", data, "--num-steps", 1, "--lora.rank", 2, "--model.export", "adapter"]
    said = whet(capsys, "sft", *given, "--out", home / "run")
    assert "ends turns with '<end>', which its base does not; give eos_token_id=[6, 1] to generate()" in said.error
