"""Saved models in other hands: transformers ends turns, pads and scores as whet did."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tiny
import torch

import whet
from whet.cli.main import main
from whet.errors import ModelError
from whet.models import load

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|stop|>\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "inst": INST}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>"]
TALKS = [("hi", "yes"), ("2+2=", "it is 4"), ("a b", ""), ("long one here", "no no no no")]


def tokenizer_of(template: str, pad: str | None = "<pad>", more: str = "<pad>") -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [more, "<eos>", "<bos>", *SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token=pad,
        additional_special_tokens=[*SPECIAL, more],
    )
    out.chat_template = template
    return out


def folder(path: Path, template: str, *, pad: str | None = "<pad>", **config: Any) -> Path:
    tokenizer = tokenizer_of(template, pad)
    tiny.causal_lm("llama", vocabulary=len(tokenizer), **config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def train(verb: str, *words: object) -> int:
    return main([verb, *map(str, words), "--quiet"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_reward_model_has_the_same_scores_in_whet_and_in_transformers(tmp_path: Path, kind: str, side: str) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = folder(tmp_path / "base", TEMPLATES[kind], pad="<eos>" if kind == "chatml" else "<pad>")
    pairs = [{"prompt": q, "chosen": a, "rejected": "maybe"} for q, a in TALKS]
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    run = tmp_path / "run"
    assert train("reward", "--model", base, "--data", data, "--out", run, "--num-steps", 2, "--batch-size", 4) == 0

    rows = [{"prompt": q, "responses": [a, "maybe"]} for q, a in TALKS]
    scored = whet_scores(tmp_path, run / "model", rows)
    tokenizer = AutoTokenizer.from_pretrained(run / "model", padding_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    talks = [turns(row["prompt"], text) for row in rows for text in row["responses"]]
    given = tokenizer.apply_chat_template(talks, tokenize=True, return_dict=True, padding=True, return_tensors="pt")
    theirs = model(**given).logits[:, 0].tolist()
    assert scored == pytest.approx(theirs, rel=5e-6, abs=5e-6)
    assert max(theirs) - min(theirs) > 1e-3


def whet_scores(tmp_path: Path, model: Path, rows: list[dict]) -> list[float]:
    """The scores of whet for the answers of these rows: as text, and as sampled ids, which must agree."""
    from whet.data import Located, Reader, chat_format
    from whet.data.types import Batch, Group, Prompt, Sample
    from whet.models.readers import read
    from whet.models.roles import Role
    from whet.rewards.model import ModelReward

    source = load.ModelSource(str(model), dtype="float32", device="cpu")
    tokenizer = load.load_tokenizer(source)
    chat, role = chat_format(tokenizer), Role("reward", load.load_scorer(source, tokenizer), False)
    located = [Located({**row, "ranks": [1, 2]}, "x") for row in rows]
    elements = Reader(chat, 200, closing=True).rankings(located)
    with torch.no_grad():
        text = read(role, Batch.of(elements), frozenset({"score"}))["score"].tolist()
    groups = []
    for number, row in enumerate(rows):
        messages = turns(row["prompt"], "")[:1]
        made = [chat.answer_ids(messages, answer) for answer in row["responses"]]
        samples = [
            Sample(number, k, tuple(ids), (0.0,) * len(ids), 0, "stop", chat.text(ids)) for k, ids in enumerate(made)
        ]
        groups.append(Group(Prompt(str(number), tuple(chat.prompt_ids(messages)), tuple(messages)), tuple(samples)))
    assert ModelReward(role, chat).score(groups).answer.tolist() == pytest.approx(text, abs=1e-6)
    assert ModelReward(role, chat, same=False).score(groups).answer.tolist() == pytest.approx(text, abs=1e-6)
    return text


def test_a_reward_model_gets_a_pad_token_that_no_text_ends_with(tmp_path: Path, capsys: Any) -> None:
    """Where the text ends with the end token and the base pads with it, transformers would read one token early."""
    base = folder(tmp_path / "base", INST, pad="<eos>")
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": q, "chosen": a, "rejected": "b"} for q, a in TALKS])
    words = ("--model", base, "--data", data, "--num-steps", 1, "--batch-size", 4)
    assert train("reward", *words, "--out", tmp_path / "run") == 0
    assert "gets the pad token '<pad>'" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/model/config.json").read_text())["pad_token_id"] == 0
    tokenizer_of(INST, "<eos>", "<none>").save_pretrained(base)
    assert train("reward", *words, "--out", tmp_path / "none") == 2
    error = capsys.readouterr().err
    assert "--model.pad-token" in error
    assert "'<none>'" in error
    assert train("reward", *words, "--out", tmp_path / "named", "--model.pad-token", "<|stop|>") == 0


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_ends_a_turn_is_saved_beside_the_models_own_end(tmp_path: Path, kind: str) -> None:
    """transformers' generate stops where whet's training ended turns. The pad token may be the end token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = folder(tmp_path / "base", TEMPLATES[kind], pad=None)
    data = tiny.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "hi", "completion": "yes"}] * 4)
    run = tmp_path / "run"
    words = ("--num-steps", 40, "--batch-size", 4, "--lr", "0.01")
    assert train("sft", "--model", base, "--data", data, "--out", run, *words) == 0
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    end = tokenizer.convert_tokens_to_ids("<eos>" if kind == "inst" else "<|im_end|>")
    ends = model.generation_config.eos_token_id
    assert set(ends if isinstance(ends, list) else [ends]) == {end, 1}
    assert model.config.eos_token_id == ends
    given = tokenizer.apply_chat_template(
        turns("hi", "")[:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    new = model.generate(**given, max_new_tokens=30, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True).strip() == "yes"
    assert int(new[-1]) == end
    assert (tokenizer.pad_token, model.generation_config.pad_token_id) == ("<eos>", 1)


def test_a_generation_configuration_that_cannot_be_saved_is_mended_or_refused_before_training(
    tmp_path: Path, capsys: Any
) -> None:
    base = folder(tmp_path / "base", CHATML)
    data = tiny.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "hi", "completion": "yes"}] * 4)
    file = base / "generation_config.json"
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}))
    words = ("--model", base, "--data", data, "--num-steps", 1)
    assert train("sft", *words, "--out", tmp_path / "run") == 0
    assert "do_sample true" in capsys.readouterr().err
    saved = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.9, 0.6)
    file.write_text(json.dumps({"num_beams": 1, "length_penalty": 3.0, "early_stopping": True, "eos_token_id": 1}))
    assert train("sft", *words, "--out", tmp_path / "second") == 2
    assert "generation_config.json" in capsys.readouterr().err
    assert not list((tmp_path / "second").rglob("metrics.jsonl"))
    with pytest.raises(ModelError, match="could not be saved"):
        load.load_causal_lm(load.ModelSource(str(base), device="cpu"))


def test_an_answer_travels_with_its_ids_through_sample_rank_reward_dpo_and_sft(tmp_path: Path) -> None:
    """The generation prompt opens a thought, so the texts alone would not be read back."""
    thinking = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<|start|>\n")
    base = folder(tmp_path / "base", thinking)
    data = tiny.write_jsonl(tmp_path / "q.jsonl", [{"prompt": "hi"}, {"prompt": "2+2"}])
    (tmp_path / "own.py").write_text(
        "def length(prompts, completions, **_):\n    return [len(c) + 0.1 * i for i, c in enumerate(completions)]\n"
    )
    answers, ranks, best = (tmp_path / f"{name}.jsonl" for name in ("answers", "ranks", "best"))
    given = ("--model", base, "--data", data, "--max-new-tokens", 6, "--num-generations", 3)
    assert train("sample", *given, "--out", answers) == 0
    assert train("rank", "--data", answers, "--judge", f"{tmp_path}/own.py:length", "--out", ranks) == 0
    reward = f"{tmp_path}/own.py:length"
    assert train("sample", *given, "--keep", "best", "--reward", reward, "--out", best) == 0
    for verb, rows in (("reward", ranks), ("dpo", ranks), ("sft", best)):
        assert train(verb, "--model", base, "--data", rows, "--out", tmp_path / verb, "--num-steps", 1) == 0, verb
    row = json.loads(ranks.read_text().splitlines()[0])
    tokenizer = tokenizer_of(thinking)
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n<|start|>\n")
    from whet.data import Located, Reader, chat_format

    made = Reader(chat_format(tokenizer), 99).rankings([Located(row, "x")])[0]
    assert [one.ids.tolist() for one in made.rows] == [row["prompt_ids"] + ids for ids in row["response_ids"]]


def test_reward_functions_get_the_text_that_was_sampled(tmp_path: Path) -> None:
    """Spaces before punctuation stay, special tokens are shown, only the closing end token is left out."""
    base = folder(tmp_path / "base", CHATML)
    about = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(about | {"clean_up_tokenization_spaces": True}))
    seen: list[tuple[str, list[int]]] = []

    def keep(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(zip(completions, completion_ids, strict=True))
        return [float(n) for n in range(len(prompts))]

    common: dict[str, Any] = {
        "model": str(base), "reward": keep, "data": [{"prompt": "hi"}] * 4, "num_steps": 1, "prompts_per_step": 4,
        "max_new_tokens": 12, "num_generations": 8, "quiet": True,
    }  # fmt: skip
    whet.train("grpo", out=str(tmp_path / "run"), **common)
    tokenizer = tokenizer_of(CHATML)
    ends = {1, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    for text, ids in seen:
        own = ids[:-1] if ids[-1] in ends else ids
        assert text == tokenizer.decode(own, clean_up_tokenization_spaces=False)
    assert any(word in text for text, _ in seen for word in ("<pad>", "<bos>", *SPECIAL))
    files = sorted((tmp_path / "run" / "rollouts").glob("*.parquet"))
    assert {one["completion"] for one in pyarrow.parquet.read_table(files[0]).to_pylist()} == {text for text, _ in seen}
    seen.clear()
    whet.train("grpo", out=str(tmp_path / "second"), skip_special_tokens=True, **common)
    assert not any(word in text for text, _ in seen for word in ("<pad>", "<bos>", *SPECIAL))


def test_a_reward_model_whose_base_pads_with_the_end_is_trained_and_saved_on_one_token(
    tmp_path: Path, capsys: Any
) -> None:
    """The base's configuration pads with what texts end with: merged, whet and transformers read the end; an adapter is refused."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = folder(tmp_path / "base", LLAMA3, pad="<pad>")
    end = tokenizer_of(LLAMA3).convert_tokens_to_ids("<|im_end|>")
    about = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(about | {"pad_token_id": end}))
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": q, "chosen": a, "rejected": "b"} for q, a in TALKS])
    words = ("--model", base, "--data", data, "--num-steps", 1, "--batch-size", 4, "--lora.rank", 2)
    assert train("reward", *words, "--model.export", "adapter", "--out", tmp_path / "adapter") == 2
    assert "would be read one token early" in capsys.readouterr().err
    assert train("reward", *words, "--out", tmp_path / "run") == 0
    rows = [{"prompt": q, "responses": [a, "maybe"]} for q, a in TALKS]
    scored = whet_scores(tmp_path, tmp_path / "run/model", rows)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model").eval()
    assert model.config.pad_token_id == 0
    talks = [turns(row["prompt"], text) for row in rows for text in row["responses"]]
    alone = [
        tokenizer.apply_chat_template([one], tokenize=True, return_dict=True, return_tensors="pt") for one in talks
    ]
    assert scored == pytest.approx([model(**one).logits.item() for one in alone], rel=5e-6, abs=5e-6)
    assert all(int(one["input_ids"][0, -1]) == end for one in alone)
    # going on from it: what is trained is what is saved
    (tmp_path / "again").mkdir()
    words = ("--model", tmp_path / "run/model", "--data", data, "--num-steps", 1, "--batch-size", 4, "--lr", "1e-12")
    assert train("reward", *words, "--model.pad-token", "<|stop|>", "--out", tmp_path / "again") == 0
    assert whet_scores(tmp_path, tmp_path / "again/model", rows) == pytest.approx(scored, rel=1e-5, abs=1e-5)


def test_a_template_that_needs_an_argument_is_exported_with_its_own_end(tmp_path: Path) -> None:
    wanting = (
        "{% if style is not defined %}{{ raise_exception('style?') }}{% endif %}"
        "{% set end = '<|stop|>' if style == 'stop' else '<|im_end|>' %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + end + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    base = folder(tmp_path / "base", wanting)
    data = tiny.write_jsonl(tmp_path / "d.jsonl", [{"prompt": "hi", "completion": "yes"}] * 4)
    words = ("--model", base, "--data", data, "--num-steps", 1, "--batch-size", 4, "--out", tmp_path / "run")
    assert train("sft", *words, "--model.chat-template-kwargs", "{style: stop}") == 0
    stop = tokenizer_of(CHATML).convert_tokens_to_ids("<|stop|>")
    assert stop in json.loads((tmp_path / "run/model/generation_config.json").read_text())["eos_token_id"]


def test_new_answers_have_no_columns_of_old_ones(tmp_path: Path) -> None:
    """Ranks, scores and answers of another file would be taken for those of the new answers."""
    base = folder(tmp_path / "base", CHATML)
    old = {
        "prompt": "hi",
        "gold": 7,
        "ranks": [2, 1],
        "scores": [1, 2],
        "chosen": "a",
        "rejected": "b",
        "probability": 0.9,
    }
    data = tiny.write_jsonl(tmp_path / "q.jsonl", [old])
    given = ("--model", base, "--max-new-tokens", 4, "--num-generations", 2)
    assert train("sample", *given, "--data", data, "--out", tmp_path / "a.jsonl") == 0
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert row.keys() == {"prompt", "gold", "responses", "finish", "prompt_ids", "response_ids"}
    tiny.write_jsonl(tmp_path / "t.jsonl", [{**row, "probability": [[0.5, 0.9], [0.1, 0.5]], "scores": [1.0, 2.0]}])
    assert train("rank", "--data", tmp_path / "t.jsonl", "--out", tmp_path / "r.jsonl") == 0
    assert "probability" not in json.loads((tmp_path / "r.jsonl").read_text())
