"""Records the numbers of short training runs, and compares them with a record of another commit.

    python -m proof.recorder record.json                    run everything, write the record
    python -m proof.recorder record.json --demo             the same, with the summary of the demo (seed 0) in it
    python -m proof.recorder record.json --only sft dpo     some of the runs
    python -m proof.recorder --compare old.json new.json    exit 1 where a number differs

A refactoring must not move a number. Metrics, final weights and rollouts are compared exactly, under the names that they
have today: `RENAMED` maps the names of older records to these. Digits depend on the processor, so both records must come
from one machine: check the older commit out beside this one and run its own recorder.
"""

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WORDS = [f"w{number}" for number in range(40)]
SEED = ["--seed", "3", "--threads", "1", "--quiet"]
ROLLOUT = ["--rollout.num-steps", "10", "--rollout.prompts-per-step", "8", "--max-new-tokens", "10", "--lr", "3e-3"]
RULE = ["--data", "prompts.jsonl", "--reward", "rules.py:count"]
LORA = ["--model.lora.rank", "4"]
SLOW = "1e-3"

MODEL = ["--model", "model"]
GROUPS = ["--num-generations", "4", "--rollout.mini-batch-size", "16"]
SCORED = ["--data", "prompts.jsonl", "--reward", "out/reward/model"]


def on_rows(method: str, data: str, batch: int, *more: str) -> list[str]:
    """The words of ten updates on the rows of a file."""
    size = ["--train.num-steps", "10", "--train.batch-size", str(batch)]
    return [method, *MODEL, "--data", f"{data}.jsonl", *size, "--lr", SLOW, *more]


RUNS: dict[str, list[str]] = {
    "pretrain": on_rows("pretrain", "text", 8),
    "sft": on_rows("sft", "sft", 8),
    "sft_packed": on_rows("sft", "sft", 8, "--train.packing", "--train.dropout", "0.1"),
    "sft_lora": on_rows("sft", "sft", 8, *LORA),
    "sft_muon": on_rows("sft", "sft", 8, "--optim.kind", "muon"),
    "reward": on_rows("reward", "ranked", 6, "--head.standardize"),
    "dpo": on_rows("dpo", "ranked", 6),
    "ipo": on_rows("ipo", "ranked", 6),
    "kto": on_rows("kto", "kto", 8),
    "ppo": ["ppo", *MODEL, *SCORED, *ROLLOUT, "--rollout.mini-batch-size", "4", "--rollout.ppo-epochs", "2"],
    "ppo_shared": ["ppo", *MODEL, *RULE, *ROLLOUT, "--rollout.mini-batch-size", "4", "--trunk", "shared", *LORA],
    "instructgpt": ["instructgpt", *MODEL, *SCORED, *ROLLOUT, "--rollout.mini-batch-size", "4", "--ptx", "text.jsonl",
                    "--ptx.batch-size", "4"],
    "grpo": ["grpo", *MODEL, *RULE, *ROLLOUT, *GROUPS],
    "gspo": ["gspo", *MODEL, *RULE, *ROLLOUT, *GROUPS],
    "rloo_top_p": ["rloo", *MODEL, *RULE, *ROLLOUT, "--num-generations", "4", "--sampling.top-p", "0.9"],
    "remax": ["remax", *MODEL, *RULE, *ROLLOUT],
    "dapo": ["dapo", *MODEL, *RULE, *ROLLOUT, *GROUPS, "--overlong.buffer", "4"],
    "clip_cov": ["clip_cov", *MODEL, *RULE, *ROLLOUT, *GROUPS],
    "online_dpo": ["online_dpo", *MODEL, *RULE, *ROLLOUT],
    "grpo_stopped": ["grpo", *MODEL, *RULE, *ROLLOUT, *GROUPS, "--rollout.target-kl", "0.001"],
}  # fmt: skip
"""Name -> the words of the command line. The reward model that `reward` leaves is read by runs behind it."""

RENAMED: list[tuple[str, str]] = [(r"(.*/rollout)/step", r"\1/segment_end")]
"""(pattern of an older record's name, what it is called today); the first that matches the whole name counts."""

IGNORED = re.compile(r".*(seconds|/authors|/segment_lengths).*")
"""Names that no two runs have equal, and columns that older records lack."""


def make_inputs(folder: Path) -> None:
    """A tiny model and rows of every kind, made without any code of whet."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    special = ["<pad>", "<eos>", "<unk>", "<user>", "<bot>"]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(special + WORDS)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}<bot> "
        "{% generation %}{{ m['content'] }} <eos>{% endgeneration %} {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
    )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(special + WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.2,
        eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    stream = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(stream.choices(WORDS, k=stream.randint(low, high)))

    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": text(4, 20)} for _ in range(40)],
        "sft": [{"prompt": text(2, 8), "completion": text(1, 12)} for _ in range(40)],
        "ranked": [
            {"prompt": text(2, 6), "responses": [text(1, 9) for _ in range(4)], "ranks": stream.sample(range(1, 5), 4)}
            for _ in range(24)
        ],
        "kto": [{"prompt": text(2, 6), "completion": text(1, 9), "label": stream.random() < 0.5} for _ in range(40)],
        "prompts": [{"prompt": text(2, 8)} for _ in range(32)],
    }
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (folder / "rules.py").write_text(
        "def count(prompts, completions, **columns):\n"
        "    words = [[w for w in c.split() if w[1:].isdigit()] for c in completions]\n"
        "    return [sum(int(w[1:]) % 3 == 0 for w in own) / 4 - 0.02 * len(own) for own in words]\n"
    )


def record(runs: dict[str, list[str]]) -> dict[str, Any]:
    """Run name -> the numbers it left."""
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        for run, words in runs.items():
            own = ["--out", f"out/{run}"]
            command(folder, [*words, *SEED, *own])
            out[run] = numbers_of(folder / "out" / run)
            print(f"{run}: {out[run]['weights'][:12]}", file=sys.stderr, flush=True)
    return out


def demo() -> dict[str, Any]:
    """The summary of the demo, seed 0."""
    with tempfile.TemporaryDirectory() as name:
        command(Path(name), ["demo", "--seed", "0", "--out", "demo"])
        return json.loads((Path(name) / "demo" / "summary.json").read_text())


def command(folder: Path, words: list[str]) -> None:
    """One command line in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "whet", *words], cwd=folder, env=environment, check=True, stdout=sys.stderr)


def numbers_of(folder: Path) -> dict[str, Any]:
    """A run folder's metrics, the hash of its model's weights, and a hash of each column of its last rollout."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    out = {"metrics": rows, "weights": weights_of(folder / "model")}
    rollouts = sorted((folder / "rollouts").glob("*.parquet"))
    if rollouts:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(rollouts[-1]).to_pydict()
        out["rollout"] = {name: digest(json.dumps(values).encode()) for name, values in table.items()}
    return out


def weights_of(folder: Path) -> str:
    """A hash of all tensors of a model folder, by name."""
    from safetensors import safe_open

    parts = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            parts += [name.encode() + file.get_tensor(name).numpy().tobytes() for name in sorted(file.keys())]
    return digest(b"".join(sorted(parts)))


def digest(data: bytes) -> str:
    """The hash of these bytes."""
    return hashlib.sha256(data).hexdigest()


def renamed(name: str) -> str:
    """Today's form of an older record's name."""
    for pattern, now in RENAMED:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, now, name)
    return name


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested numbers by dotted name."""
    if isinstance(value, dict):
        return {k: v for key, one in value.items() for k, v in flat(one, f"{name}/{key}".strip("/")).items()}
    if isinstance(value, list):
        return {k: v for place, one in enumerate(value) for k, v in flat(one, f"{name}/{place}").items()}
    return {name: value}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for every number that is not the same, or that only one of the records has."""
    before = {renamed(name): value for name, value in flat(old).items() if not IGNORED.fullmatch(name)}
    after = {name: value for name, value in flat(new).items() if not IGNORED.fullmatch(name)}
    out = [f"{name}: only in the older record" for name in before.keys() - after.keys()]
    out += [f"{name}: only in the newer record" for name in after.keys() - before.keys()]
    out += [
        f"{name}: {before[name]} -> {after[name]}"
        for name in before.keys() & after.keys()
        if before[name] != after[name]
    ]
    return sorted(out)


def main() -> int:
    """Writes a record, or compares two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    given = parser.parse_args()
    if not given.compare:
        found: dict[str, Any] = {"runs": record({name: RUNS[name] for name in given.only})} | (
            {"demo": demo()} if given.demo else {}
        )
        given.files[0].write_text(json.dumps(found, indent=1))
        return 0
    old, new = (json.loads(path.read_text()) for path in given.files)
    shared = old.keys() & new.keys()
    lines = differences({key: old[key] for key in shared}, {key: new[key] for key in shared})
    print("\n".join(lines) or f"{len(flat({key: new[key] for key in shared}))} numbers, all equal")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
