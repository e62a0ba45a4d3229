"""Whatever is wrong with what was given is told in one message, before anything is written."""

import datetime
import decimal
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny

from whet.cli.main import main
from whet.errors import RewardError, WhetError

from .helpers import on_disk, one_message, whet

SFT = [{"prompt": "hello a", "completion": "yes b c"}, {"prompt": "b", "completion": "no"}] * 4
PAIRS = [{"prompt": "hello a", "chosen": "yes b c", "rejected": "no"}, {"prompt": "b", "chosen": "no", "rejected": "a"}]
JUDGES = {
    "good": "return [float(len(text.split())) for text in completions]",
    "raises": "if calls > 2: raise KeyError('target')\n    return [float(n) for n in range(len(completions))]",
    "short": "return [float(n) for n in range(len(completions) if calls < 3 else 2)]",
    "nan": "return [1.0] * (len(completions) - 1) + [float('nan') if calls > 2 else 2.0]",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, some that are none, data and reward functions. Nothing in it changes."""
    home = tmp_path_factory.mktemp("home")
    tiny.folder(home / "m")
    tiny.folder(home / "bare", template=None)
    tiny.folder(home / "small", vocabulary=20)
    (home / "empty").mkdir()
    shutil.copytree(home / "m", home / "wordless")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (home / "wordless" / name).unlink()
    shutil.copytree(home / "m", home / "torn")
    (home / "torn" / "model.safetensors").write_bytes((home / "m" / "model.safetensors").read_bytes()[:1000])
    shutil.copytree(home / "m", home / "garbled")
    (home / "garbled" / "config.json").write_text("{")
    tiny.write_jsonl(home / "sft.jsonl", SFT)
    tiny.write_jsonl(home / "pairs.jsonl", PAIRS)
    tiny.write_jsonl(home / "margins.jsonl", [PAIRS[0] | {"margin": 1}])
    tiny.write_jsonl(home / "prompts.jsonl", [{"prompt": "hello a", "target": "yes"}, {"prompt": "b c"}])
    tiny.write_jsonl(home / "answers.jsonl", [{"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}])
    for name, body in JUDGES.items():
        text = f"calls = 0\ndef judge(prompts, completions, **columns):\n    global calls\n    calls += 1\n    {body}\n"
        (home / f"{name}.py").write_text(text)
    return home


def said_no(home: Path, folder: Path, capsys: Any, verb: str, words: list[str], what: list[str]) -> None:
    """Status 2, one message with these words, nothing written; with --debug the exception itself."""
    known = {"HOME": str(home), "OUT": str(folder / "out")}
    words = [word.replace("HOME", known["HOME"]).replace("OUT", known["OUT"]) for word in words]
    before = on_disk(folder)
    said = whet(capsys, verb, *words)
    one_message(said.error, [fragment.replace("HOME", known["HOME"]) for fragment in what])
    assert (said.status, said.out) == (2, "")
    assert on_disk(folder) == before
    with pytest.raises(WhetError):
        main([verb, *words, "--debug"])
    assert on_disk(folder) == before


def sft(*words: str, model: str = "m", data: str = "HOME/sft.jsonl") -> list[str]:
    return ["--model", f"HOME/{model}", "--data", data, "--out", "OUT", "--quiet", *words]


def online(*words: str, reward: str = "good") -> list[str]:
    given = [
        "--reward",
        f"HOME/{reward}.py:judge",
        "--max-new-tokens",
        "8",
        "--rollout.prompts-per-step",
        "2",
        "--rollout.num-steps",
        "1",
    ]
    return ["--model", "HOME/m", "--data", "HOME/prompts.jsonl", "--out", "OUT", "--quiet", *given, *words]


CONTENTS: dict[str, tuple[str, bytes, list[str]]] = {
    "an empty file": ("sft", b"", ["rows.jsonl: ", "empty"]),
    "a file of blank lines": ("sft", b"\n\n", ["rows.jsonl: ", "empty"]),
    "a missing field": (
        "sft",
        b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n',
        ["rows.jsonl:2: ", "'completion'", "missing"],
    ),
    "an empty field": ("sft", b'{"prompt": "", "completion": "a"}\n', ["rows.jsonl:1: ", "'prompt'", "empty"]),
    "a null field": ("sft", b'{"prompt": null, "completion": "b"}\n', ["rows.jsonl:1: ", "'prompt'", "missing"]),
    "a number for a text": (
        "sft",
        b'{"prompt": "a", "completion": 3}\n',
        ["rows.jsonl:1: ", "'completion'", "string", "int"],
    ),
    "a number for a prompt": (
        "sft",
        b'{"prompt": 3, "completion": "a"}\n',
        ["rows.jsonl:1: ", "'prompt'", "string", "3"],
    ),
    "a list for a row": ("sft", b"[1]\n", ["rows.jsonl:1: ", "object", "list"]),
    "invalid UTF-8": (
        "sft",
        b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}',
        ["rows.jsonl:2: ", "UTF-8", "byte 12"],
    ),
    "invalid JSON": (
        "sft",
        b'{"prompt": "a", "completion": "b"}\n{"prompt": "a",}\n',
        ["rows.jsonl:2: ", "JSON", "column"],
    ),
    "a byte-order mark": ("sft", b'\xef\xbb\xbf{"prompt": "a"}\n', ["rows.jsonl:1: ", "BOM"]),
    "half of a surrogate pair": (
        "sft",
        b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "\\ud800"}\n',
        ["rows.jsonl:2: ", "'completion'", "surrogate"],
    ),
    "a number beyond every float": (
        "reward",
        b'{"prompt": "a", "responses": ["b", "c"], "scores": [1, 1e400]}\n',
        ["rows.jsonl:1: ", "'scores'", "inf", "finite"],
    ),
    "lists without end": ("sft", b'{"prompt": ' + b"[" * 50_000, ["rows.jsonl:1: ", "nested too deeply"]),
    "a name that stands twice": (
        "sft",
        b'{"prompt": "a", "completion": "b", "prompt": "c"}\n',
        ["rows.jsonl:1: ", "'prompt'", "twice"],
    ),
    "pairs of equal answers": (
        "dpo",
        b'{"prompt": "a", "chosen": "b", "rejected": "b"}\n{"prompt": "b", "chosen": "c", "rejected": "c"}\n',
        ["rows.jsonl: ", "2 of 2 pairs have chosen equal to rejected"],
    ),
    "rankings of ties": (
        "reward",
        b'{"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]}\n',
        ["rows.jsonl: ", "1 of 1 rankings have ties alone"],
    ),
    "duplicate ids": (
        "sft",
        b'{"id": 1, "prompt": "a", "completion": "b"}\n{"id": 1, "prompt": "c", "completion": "b"}\n',
        ["rows.jsonl:2: ", "id 1", "rows.jsonl:1", "unique"],
    ),
    "a conversation longer than the model": (
        "sft",
        b'{"prompt": "a", "completion": "' + b"b " * 200 + b'"}\n',
        ["rows.jsonl:1: ", "204 tokens", "128", "no more positions", "--data.too-long drop"],
    ),
    "a text row without text": ("pretrain", b'{"text": ""}\n', ["rows.jsonl:1: ", "'text'", "empty"]),
    "a pair without its other side": (
        "dpo",
        b'{"prompt": "a", "chosen": "b"}\n',
        ["rows.jsonl:1: ", "'rejected'", "missing"],
    ),
    "a ranking with too few ranks": (
        "reward",
        b'{"prompt": "a", "responses": ["b", "c"], "ranks": [1]}\n',
        ["rows.jsonl:1: ", "'ranks'", "2 answers", "got 1"],
    ),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_a_bad_data_file_is_told_with_file_line_and_field(case: str, home: Path, tmp_path: Path, capsys: Any) -> None:
    verb, content, what = CONTENTS[case]
    (tmp_path / "rows.jsonl").write_bytes(content)
    said_no(home, tmp_path, capsys, verb, sft(data=str(tmp_path / "rows.jsonl")), what)


GIVEN: dict[str, tuple[str, list[str], list[str]]] = {
    "no model": ("sft", ["--data", "HOME/sft.jsonl", "--out", "OUT"], ["model.path", "--model"]),
    "no data": ("sft", ["--model", "HOME/m", "--out", "OUT"], ["data.train", "--data"]),
    "no such data file": ("sft", sft(data="HOME/nothing.jsonl"), ["HOME/nothing.jsonl", "no such file"]),
    "no such evaluation file": (
        "sft",
        sft("--eval", "HOME/nothing.jsonl"),
        ["HOME/nothing.jsonl", "no such file"],
    ),
    "no such model folder": ("sft", sft(model="nothing"), ["HOME/nothing", "no such model folder"]),
    "a folder that is no model": ("sft", sft(model="empty"), ["HOME/empty", "not a model folder", "config.json"]),
    "a file for a model": ("sft", sft(model="sft.jsonl"), ["HOME/sft.jsonl", "folder"]),
    "no tokenizer": ("sft", sft(model="wordless"), ["HOME/wordless", "tokenizer"]),
    "torn weights": ("sft", sft(model="torn"), ["HOME/torn", "load"]),
    "no chat template": ("sft", sft(model="bare"), ["HOME/bare", "chat template", "--chat-template plain"]),
    "no such chat template": ("sft", sft("--chat-template", "palin", model="bare"), ["'palin'", '"plain"']),
    "a pad token that is none": (
        "sft",
        sft("--model.pad-token", "<pda>"),
        ["--model.pad-token", "<pda>", "no such token"],
    ),
    "a vocabulary that does not fit": (
        "sft",
        sft(model="small"),
        ["HOME/small", "27", "20", "vocabulary does not fit"],
    ),
    "four bits on a CPU": (
        "sft",
        sft("--model.quantize", "4bit", "--model.device", "cpu", "--model.lora.rank", "2"),
        ["model.quantize", "GPU"],
    ),
    "adapters on modules that are not there": (
        "sft",
        sft("--model.lora.targets", "[nothing]"),
        ["model.lora", "nothing"],
    ),
    "a device that is none": ("sft", sft("--model.device", "gpu"), ["model.device", "gpu"]),
    "more tokens than positions": ("sft", sft("--data.max-tokens", "500"), ["data.max_tokens", "128", "500"]),
    "an answer over the limit": (
        "sft",
        sft("--data.max-tokens", "5"),
        ["sft.jsonl:1", "8 tokens", "limit is 5", "--data.max-tokens"],
    ),
    "every row over the limit": (
        "sft",
        sft("--data.max-tokens", "3", "--data.too-long", "drop"),
        ["no row is left", "--data.max-tokens"],
    ),
    "an unknown field": ("sft", sft("--train.bach", "3"), ["'train.bach'", "did you mean 'train.batch_size'?"]),
    "an unknown section": ("sft", sft("--trian.batch", "3"), ["'trian'", "did you mean 'train'?"]),
    "an unknown section online": ("ppo", online("--rolout.steps", "3"), ["rolout", "did you mean 'rollout'?"]),
    "an unknown option": (
        "grpo",
        online("--surrogate.lwo", "3"),
        ["algorithm.surrogate.lwo", "did you mean 'algorithm.surrogate.clip_low'?"],
    ),
    "a part for a slot": ("grpo", online("--clip", "0.1"), ["unknown field 'clip'", "--surrogate clip"]),
    "an unknown part": (
        "grpo",
        online("--advantage", "group_zcore"),
        ["algorithm.advantage", "did you mean 'group_zscore'?"],
    ),
    "a option of another part": (
        "ppo",
        online("--advantage.eps", "3"),
        ["algorithm.advantage.eps", "did you mean 'algorithm.advantage.gamma'?"],
    ),
    "a critic that nothing reads": (
        "grpo",
        online("--value.clip-range-vf", "0.2"),
        ["algorithm.value", "group_zscore has no critic"],
    ),
    "a credit without its critic": ("grpo", online("--advantage", "gae"), ["algorithm.value", "gae needs a critic"]),
    "an unknown option of dpo": (
        "dpo",
        sft("--bta", "3", data="HOME/pairs.jsonl"),
        ["bta", "did you mean 'algorithm.beta'?"],
    ),
    "an unknown reward method": (
        "reward",
        sft("--algorithm.name", "pairwsie"),
        ["pairwsie", "did you mean 'pairwise'?"],
    ),
    "an unknown recipe": ("sft", ["mine.yaml", *sft()], ["mine.yaml", "no such recipe"]),
    "a batch of nothing": ("sft", sft("--train.batch-size", "0"), ["train.batch_size", ">= 1", "got 0"]),
    "a learning rate of nothing": ("sft", sft("--lr", "0"), ["optim.lr", "> 0", "got 0"]),
    "a number that is none": ("sft", sft("--lr", "fast"), ["optim.lr", "'fast'"]),
    "a group of one": ("grpo", online("--num-generations", "1"), ["algorithm.num_generations", "at least 2", "got 1"]),
    "no clip": ("grpo", online("--surrogate.clip-low", "0"), ["algorithm.surrogate.clip_low", "> 0", "got 0"]),
    "a negative clip": (
        "ppo",
        online("--surrogate.clip-high", "-0.2"),
        ["algorithm.surrogate.clip_high", "> 0", "got -0.2"],
    ),
    "a mini_batch_size over the batch": (
        "grpo",
        online("--rollout.mini-batch-size", "64"),
        ["rollout.mini_batch_size", "2 prompts", "8 answers", "16", "64"],
    ),
    "several updates without a ratio": (
        "reinforce",
        online("--rollout.ppo-epochs", "2"),
        ["rollout", "one update", "2 epochs"],
    ),
    "greedy answers": ("grpo", online("--sampling.temperature", "0"), ["sampling.temperature", "greedy"]),
    "no room for an answer": ("grpo", online("--max-new-tokens", "127"), ["max_new_tokens", "128", "127"]),
    "a language model for a reward": ("grpo", [*online(), "--reward", "HOME/m"], ["HOME/m", "reward"]),
    "a language model for a judge": (
        "eval",
        [
            "--model",
            "HOME/m",
            "--against",
            "HOME/m",
            "--judge",
            "HOME/m",
            "--data",
            "HOME/prompts.jsonl",
            "--max-new-tokens",
            "8",
        ],
        ["HOME/m", "judge"],
    ),
    "a torn configuration": ("sft", sft(model="garbled"), ["HOME/garbled", "config.json", "JSON"]),
    "a template that leaves answers out": (
        "sft",
        sft("--chat-template", "{{ messages[0]['content'] }}"),
        ["template", "assistant"],
    ),
    "a template that is no Jinja": ("sft", sft("--chat-template", "{% for m in messages %}"), ["template"]),
    "a file for a run folder": ("sft", [*sft(), "--out", "HOME/sft.jsonl"], ["HOME/sft.jsonl"]),
    "no reward": (
        "grpo",
        [word for word in online() if "judge" not in word and word != "--reward"],
        ["reward", "--reward"],
    ),
    "no such reward file": ("grpo", online(reward="nothing"), ["HOME/nothing.py", "no such file"]),
    "no such reward function": ("grpo", [*online(), "--reward", "HOME/good.py:juge"], ["HOME/good.py", "'juge'"]),
    "ptx without rows": ("instructgpt", online("--rollout.mini-batch-size", "2"), ["ptx", "--ptx"]),
    "a shared trunk without adapters": (
        "ppo",
        online("--rollout.mini-batch-size", "2", "--trunk", "shared"),
        ["trunk", "model.lora"],
    ),
    "an average with adapters": (
        "ppo",
        online("--rollout.mini-batch-size", "2", "--rollout.ema", "0.5", "--model.lora.rank", "2"),
        ["rollout.ema", "lora"],
    ),
    "two prompt files": (
        "grpo",
        [*online(), "--data", "[{path: HOME/prompts.jsonl}, {path: HOME/sft.jsonl}]"],
        ["data.train: one source is read here, got 2; join them to one file or one folder"],
    ),
    "rank without a file to write": ("rank", ["--data", "HOME/answers.jsonl"], ["out", "--out"]),
    "rank without judge and scores": (
        "rank",
        ["--data", "HOME/sft.jsonl", "--out", "OUT"],
        ["sft.jsonl:1", "'responses'"],
    ),
    "a judge that is not there": (
        "rank",
        ["--data", "HOME/answers.jsonl", "--judge", "HOME/nothing.py:f", "--out", "OUT/a"],
        ["HOME/nothing.py"],
    ),
    "sample without room": (
        "sample",
        ["--model", "HOME/m", "--data", "HOME/prompts.jsonl", "--out", "OUT/a", "--max-new-tokens", "500"],
        ["max_new_tokens", "128"],
    ),
    "the best of answers that nothing scores": (
        "sample",
        [
            "--model",
            "HOME/m",
            "--data",
            "HOME/prompts.jsonl",
            "--out",
            "OUT/a",
            "--max-new-tokens",
            "8",
            "--keep",
            "best",
        ],
        ["keep", "--reward"],
    ),
    "a dense reward in sample": (
        "sample",
        [
            "--model",
            "HOME/m",
            "--data",
            "HOME/prompts.jsonl",
            "--max-new-tokens",
            "8",
            "--out",
            "OUT/a",
            "--reward",
            "{source: HOME/m, dense: true}",
        ],
        ["reward.0.dense: a reward model has no options"],
    ),
    "a win rate against nobody": (
        "eval",
        ["--model", "HOME/m", "--data", "HOME/prompts.jsonl", "--judge", "HOME/good.py:judge", "--max-new-tokens", "8"],
        ["--against", "--judge"],
    ),
}


BESIDE: dict[str, tuple[str, list[str], list[str]]] = {
    "a mix without refreshes": (
        "grpo",
        ["--rollout.sync-reference.mix", "0.5"],
        ["rollout.sync_reference.mix", "rollout.sync_reference.every"],
    ),
    "refreshes without a reference": (
        "dr_grpo",
        ["--rollout.sync-reference.every", "2"],
        ["rollout.sync_reference", "reference"],
    ),
    "refreshes under adapters": (
        "grpo",
        ["--rollout.sync-reference.every", "2", "--model.lora.rank", "2"],
        ["rollout.sync_reference", "no adapters"],
    ),
    "a reference without a KL": ("dr_grpo", ["--reference", "HOME/m"], ["reference"]),
    "a critic without its method": ("grpo", ["--critic", "HOME/m"], ["critic"]),
    "a critic's rate without its method": ("grpo", ["--critic.optim.lr", "0.1"], ["critic"]),
    "a limit for one update": ("grpo", ["--rollout.target-kl", "0.1"], ["rollout.target_kl"]),
    "ptx rows without their term": (
        "ppo",
        ["--ptx", "HOME/sft.jsonl", "--rollout.mini-batch-size", "2"],
        ["ptx.data", "no ptx term"],
    ),
    "a step of a reward that is not dense": (
        "reinforce",
        ["--reward", "{source: HOME/m, step: x}"],
        ["reward.1.step", "set dense: true too"],
    ),
    "a dense function": (
        "reinforce",
        ["--reward", "{source: 'HOME/good.py:judge', dense: true}"],
        ["reward.1.dense", "function"],
    ),
    "a dense reward for whole answers": (
        "grpo",
        ["--reward", "{source: HOME/m, dense: true}"],
        ["reward.dense", "the whole answer"],
    ),
    "the least of one reward": ("grpo", ["--combine", "minimum"], ["algorithm.combine", "several rewards"]),
    "the spread of one reward": (
        "grpo",
        ["--combine.name", "lower_bound", "--combine.k", "2"],
        ["algorithm.combine", "several rewards"],
    ),
    "a refill of single answers": (
        "ppo",
        ["--dynamic-sampling", "1", "--rollout.mini-batch-size", "2"],
        ["algorithm.num_generations", "dynamic_sampling", "got 1"],
    ),
    "an overlong buffer over the limit": (
        "dapo",
        ["--overlong.buffer", "9"],
        ["algorithm.overlong.buffer", "limit of 8 tokens", "got 9"],
    ),
    "more pairs than prompts": (
        "online_dpo",
        ["--rollout.mini-batch-size", "3"],
        ["rollout.mini_batch_size", "2 prompts", "pair", "got 3"],
    ),
    "a loss on single answers for pairs": ("online_dpo", ["--loss", "kto"], ["algorithm.loss", "pairs"]),
    "several updates of ReMax": ("remax", ["--rollout.ppo-epochs", "2"], ["rollout", "one update", "2 epochs"]),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_means_something_only_beside_another_field_is_refused_by_name_without_it(
    case: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    verb, words, what = BESIDE[case]
    said_no(home, tmp_path, capsys, verb, online(*words), what)


OFFLINE: dict[str, tuple[str, list[str], list[str]]] = {
    "a mix without refreshes": ("dpo", ["--sync-reference.mix", "0.5"], ["sync_reference.mix", "sync_reference.every"]),
    "refreshes of what was measured before": (
        "dpo",
        ["--sync-reference.every", "2", "--precompute"],
        ["sync_reference", "precompute"],
    ),
    "refreshes under adapters": (
        "dpo",
        ["--sync-reference.every", "2", "--model.lora.rank", "2"],
        ["sync_reference", "model.lora"],
    ),
    "a reference that nothing reads": ("simpo", ["--reference", "HOME/m"], ["reference", "leave reference"]),
    "a measure of no reference": ("cpo", ["--precompute"], ["reference", "leave", "precompute"]),
    "refreshes of no reference": ("orpo", ["--sync-reference.every", "2"], ["reference", "leave", "sync_reference"]),
    "a separator of no steps": ("reward", ["--data.separator", "c"], ["data.separator"]),
    "a single answer's loss beside a pair's": ("dpo", ["--loss", "[kto, sigmoid]"], ["algorithm.loss", "use one kind"]),
    "rewards of a score without reference": (
        "cpo",
        ["--loss", "bco_pair"],
        ["algorithm.implicit_reward", "bco_pair", "implicit_reward"],
    ),
    "a beta of log-odds": ("orpo", ["--beta", "0.1"], ["unknown field 'beta'"]),
    "an alpha of another divergence": (
        "dpo",
        ["--implicit-reward.alpha", "0.3"],
        ["algorithm.implicit_reward.alpha", "alpha divergence", "0.3"],
    ),
    "a margin of rows that nothing reads": (
        "dpo",
        ["--data", "HOME/margins.jsonl"],
        ["margins.jsonl:1", "'margin'", "dpo"],
    ),
    "rows of pairs for steps": (
        "reward",
        ["--algorithm.name", "process"],
        ["pairs.jsonl:1", "'completions'", "missing"],
    ),
    "another reward loss than its rows": (
        "reward",
        ["--loss", "pairwise"],
        ["algorithm.loss.name", "--algorithm.name", "'pairwise'"],
    ),
}


@pytest.mark.parametrize("case", OFFLINE)
def test_what_a_preference_or_reward_method_cannot_use_is_refused_by_name(
    case: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    verb, words, what = OFFLINE[case]
    said_no(home, tmp_path, capsys, verb, sft(*words, data="HOME/pairs.jsonl"), what)


@pytest.mark.parametrize("case", GIVEN)
def test_what_cannot_work_is_told_before_anything_is_written(
    case: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    verb, words, what = GIVEN[case]
    said_no(home, tmp_path, capsys, verb, words, what)


SCORES: dict[str, tuple[Any, str]] = {
    "too few": ([1], "'scores'"),
    "no list": (5, "'scores'"),
    "null": ([1, None], "'scores'"),
    "words": (["good", "bad"], "'scores'"),
    "not a number": ([float("nan"), 1], "'scores'"),
}


@pytest.mark.parametrize("case", SCORES)
def test_scores_that_cannot_be_ranked_are_told_with_their_line(
    case: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    good = {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}
    tiny.write_jsonl(tmp_path / "rows.jsonl", [good, good | {"scores": SCORES[case][0]}])
    words = ["--data", str(tmp_path / "rows.jsonl"), "--out", "OUT"]
    said_no(home, tmp_path, capsys, "rank", words, ["rows.jsonl:2: ", SCORES[case][1]])


def run_words(home: Path, folder: Path, *words: str) -> list[str]:
    return [word.replace("HOME", str(home)).replace("OUT", str(folder / "out")) for word in words]


def test_a_folder_with_a_run_is_not_written_over(home: Path, tmp_path: Path, capsys: Any) -> None:
    words = run_words(home, tmp_path, *sft("--train.num-steps", "2"))
    assert whet(capsys, "sft", *words).status == 0
    said_no(home, tmp_path, capsys, "sft", words, ["out", "already holds a run", "--resume", "--out"])


def test_resuming_with_another_recipe_names_what_differs(home: Path, tmp_path: Path, capsys: Any) -> None:
    words = run_words(home, tmp_path, *sft("--train.num-steps", "2"))
    assert whet(capsys, "sft", *words).status == 0
    other = [*words, "--lr", "0.5", "--seed", "3", "--resume"]
    said_no(home, tmp_path, capsys, "sft", other, ["--resume", "optim.lr", "seed", "the recipe with which it began"])


def sampled(home: Path, data: Path, out: Path, *words: str) -> list[str]:
    return ["--model", f"{home}/m", "--data", str(data), "--out", str(out), "--max-new-tokens", "4", *words]


def test_dates_and_decimals_of_parquet_are_written_beside_the_answers(home: Path, tmp_path: Path, capsys: Any) -> None:
    day, cost = datetime.datetime(2026, 11, 2, 13, 5), decimal.Decimal("12.50")
    table = pyarrow.table({"prompt": ["a"], "day": [day], "cost": [cost]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert whet(capsys, "sample", *sampled(home, tmp_path / "rows.parquet", tmp_path / "out.jsonl")).status == 0
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert (row["day"], row["cost"], len(row["responses"])) == ("2026-11-02T13:05:00", "12.50", 4)


@pytest.mark.parametrize("kind", ["short", "nan"])
def test_answers_are_kept_if_their_reward_fails(kind: str, home: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "reward.py").write_text(
        "def judge(completions, **columns):\n    return "
        + {"short": "[1.0]", "nan": "[float('nan')] * len(completions)"}[kind]
    )
    out = tmp_path / "out.jsonl"
    words = sampled(home, home / "prompts.jsonl", out, "--num-generations", "3")
    said = whet(capsys, "sample", *words, "--reward", f"{tmp_path}/reward.py:judge")
    assert said.status == 1
    assert f"kept without scores in {tmp_path}/out.unscored.jsonl" in said.error
    assert not out.exists()
    assert whet(capsys, "sample", *words).status == 0
    assert (tmp_path / "out.unscored.jsonl").read_text() == out.read_text()
    given = ["--model", f"{home}/m", "--data", f"{home}/prompts.jsonl", "--max-new-tokens", "4"]
    given += ["--against", f"{home}/m", "--judge", f"{tmp_path}/reward.py:judge", "--answers", f"{tmp_path}/eval.jsonl"]
    assert whet(capsys, "eval", *given).status == 1
    kept = [json.loads(line) for line in (tmp_path / "eval.unscored.jsonl").read_text().splitlines()]
    assert [sorted(one) for one in kept] == [
        ["against", "against_ids", "answer", "answer_ids", "kl", "prompt", "prompt_ids"]
    ] * 2


def test_degenerate_data_is_said_and_trained_on(home: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [{"prompt": prompt, "completion": "yes", "label": True} for prompt in "abc"]
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    words = run_words(home, tmp_path, *sft("--train.num-steps", "1", data=str(tmp_path / "rows.jsonl")))
    said = whet(capsys, "kto", *words, "--eval", f"{tmp_path}/rows.jsonl")
    assert said.status == 0
    line = f"whet: {tmp_path}/rows.jsonl: 3 of 3 answers have the label true, so nothing tells good from bad\n"
    assert said.error == line * 2  # the rows of the training, and those of the evaluation


def test_equal_scores_are_said_by_every_verb_that_scores(home: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "flat.py").write_text("def judge(completions, **columns):\n    return [1.0] * len(completions)\n")
    flat = f"{tmp_path}/flat.py:judge"
    out = tmp_path / "answers.jsonl"
    said = whet(capsys, "sample", *sampled(home, home / "prompts.jsonl", out, "--reward", flat))
    assert said.error == "whet: reward: all 8 scores are equal (1)\n"
    said = whet(capsys, "rank", "--data", out, "--out", tmp_path / "ranks.jsonl")
    assert said.error == "whet: 2 of 2 rankings have ties alone\n"
    given = [
        "--model",
        f"{home}/m",
        "--against",
        f"{home}/m",
        "--data",
        f"{home}/prompts.jsonl",
        "--max-new-tokens",
        "4",
    ]
    said = whet(capsys, "eval", *given, "--judge", flat)
    assert "whet: judge judge: all 4 scores are equal (1)\n" in said.error
    words = run_words(home, tmp_path, *online())
    words[words.index("--reward") + 1] = flat
    assert "whet: reward judge: in the first 1 steps the scores of the" in whet(capsys, "grpo", *words).error


FAILING = {
    "raises": ["KeyError", "'target'", "raises.py:5"],
    "short": ["16 answers", "2 scores"],
    "nan": ["answer 15", "nan", "finite"],
}


@pytest.mark.parametrize("kind", FAILING)
def test_a_reward_function_that_fails_leaves_the_rollouts_and_checkpoints_before(
    kind: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    words = run_words(home, tmp_path, *online("--rollout.num-steps", "4", "--train.save-every", "1", reward=kind))
    said = whet(capsys, "grpo", *words)
    one_message(said.error, ["reward judge", *FAILING[kind]])
    assert (said.status, said.out) == (1, "")
    out = tmp_path / "out"
    assert sorted(path.name for path in (out / "rollouts").iterdir()) == [
        "step-00000001.parquet",
        "step-00000002.parquet",
    ]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (out / "model").exists()
    with pytest.raises(RewardError):
        main(
            ["grpo", *run_words(home, tmp_path / "again", *online("--rollout.num-steps", "4", reward=kind)), "--debug"]
        )
    assert whet(capsys, "grpo", *words, "--resume").status == 0  # the third call is the first one of the new process
    assert (out / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("raise KeyError('a')", ["KeyError", "broken.py:2"]),
        ("return [1.0]", ["2 answers", "1 scores"]),
        ("return [1.0, float('nan')]", ["nan"]),
        ("return None", ["None"]),
    ],
)
def test_a_judge_that_fails_leaves_no_half_file(body: str, what: list, home: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "broken.py").write_text(f"def judge(prompts, completions, **columns):\n    {body}\n")
    before = on_disk(tmp_path)
    words = [
        "--data",
        f"{home}/answers.jsonl",
        "--judge",
        f"{tmp_path}/broken.py:judge",
        "--out",
        f"{tmp_path}/ranks.jsonl",
    ]
    said = whet(capsys, "rank", *words)
    one_message(said.error, what)
    assert (said.status, said.out) == (1, "")
    assert on_disk(tmp_path) == before
