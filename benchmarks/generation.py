"""How many tokens the generators of this process answer with per CPU second, in turns with transformers' `generate`.

    python -m benchmarks.generation [nano micro] [--repetitions N] [--model FOLDER] [--short]

nano and micro are Qwen2 models with random weights (hidden width 128 and 512, 4 and 8 layers, vocabulary 2,048 and 8,192) on 8
(4) prompts with 8 answers of at most 128 tokens; `--model FOLDER` takes another model. Each round runs all of them in turn; medians
and ratios to `generate` are printed. The last line of a size has the CPU time per token for answers of 64 to 512 tokens of
the same requests: it should stay flat but for attention. One thread. `--short` shows in seconds that all of it runs.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "nano": {"vocab": 2048, "hidden": 128, "layers": 4, "heads": 4, "groups": 2, "inner": 512, "prompts": 8},
    "micro": {"vocab": 8192, "hidden": 512, "layers": 8, "heads": 8, "groups": 4, "inner": 1536, "prompts": 4},
    "short": {"vocab": 128, "hidden": 32, "layers": 1, "heads": 2, "groups": 1, "inner": 64, "prompts": 2},
}
ANSWERS, END = 8, 1
SCALE = 0.02
"""Size of the random weights: the next token is then nearly uniform, so answers end at their limit."""


def model_of(size: str) -> Any:
    """A Qwen2 model of this size with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = SIZES[size]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape["vocab"], hidden_size=shape["hidden"], num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"], intermediate_size=shape["inner"], max_position_embeddings=1024,
        tie_word_embeddings=True, initializer_range=SCALE, bos_token_id=None, eos_token_id=END, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def prompts_of(count: int, vocabulary: int, longest: int = 96) -> list[tuple[int, ...]]:
    """Prompts of log-normal lengths."""
    stream = random.Random(0)
    lengths = [int(min(longest, max(8, stream.lognormvariate(3.4, 0.6)))) for _ in range(count)]
    return [tuple(stream.randrange(2, vocabulary) for _ in range(length)) for length in lengths]


def own(role: Any, prompts: Sequence[tuple[int, ...]], length: int, decoder: str) -> Callable[[int], int]:
    """Return a run of whet's generator; it gives the number of tokens."""
    from whet.data import Prompt
    from whet.generate import Request
    from whet.generate.local import LocalGenerator
    from whet.methods.options import Sampling

    generator = LocalGenerator(role, (END,), str, decoder=decoder)
    rows = [Prompt(str(number), ids, ()) for number, ids in enumerate(prompts)]

    def run(turn: int) -> int:
        asked = [
            Request(one, number, answer, Sampling(length), turn)
            for number, one in enumerate(rows)
            for answer in range(ANSWERS)
        ]
        return sum(len(sample.ids) for sample in generator.generate(asked))

    return run


def peer(model: Any, prompts: Sequence[tuple[int, ...]], length: int) -> Callable[[int], int]:
    """Return the same with `generate` of transformers, each prompt repeated for its answers."""
    import torch

    rows = [one for one in prompts for _ in range(ANSWERS)]
    longest = max(map(len, rows))
    ids = torch.tensor([(0,) * (longest - len(one)) + one for one in rows])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in rows])

    @torch.inference_mode()
    def run(turn: int) -> int:
        torch.manual_seed(turn)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=length, do_sample=True, top_k=0, temperature=1.0
        )[:, longest:].tolist()
        return sum(one.index(END) + 1 if END in one else len(one) for one in out)

    return run


def seconds_per_token(run: Callable[[int], int], turn: int) -> float:
    """CPU seconds per token of one run."""
    start = time.process_time()
    count = run(turn)
    return (time.process_time() - start) / count


def measured(size: str, model: Any, repetitions: int, lengths: Sequence[int]) -> dict[str, Any]:
    """Tokens per CPU second of each generator (medians of alternating runs), and CPU microseconds per token by length."""
    from whet.models.roles import Role

    role = Role("policy", model, False)
    prompts = prompts_of(SIZES[size]["prompts"], model.config.vocab_size)
    runs = {
        "whet": own(role, prompts, lengths[1], "auto"), "whet, cached": own(role, prompts, lengths[1], "cached"),
        "generate": peer(model, prompts, lengths[1]),
    }  # fmt: skip
    for run in runs.values():
        run(0)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repetitions):
        for name, run in runs.items():
            found[name].append(seconds_per_token(run, turn + 1))
    median = {name: statistics.median(times) for name, times in found.items()}
    growth = {length: own(role, prompts, length, "auto") for length in lengths}
    cost: dict[int, list[float]] = {length: [] for length in lengths}
    for turn in range(repetitions):
        for length, run in growth.items():
            cost[length].append(seconds_per_token(run, turn + 1))
    return {
        "size": size, "tokens per CPU s": {name: round(1 / one, 1) for name, one in median.items()},
        "ratio to generate": {name: round(median["generate"] / one, 2) for name, one in median.items()},
        "CPU us per token by length": {length: round(1e6 * statistics.median(times), 1) for length, times in cost.items()},
    }  # fmt: skip


def main() -> None:
    """Prints one JSON line per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["nano", "micro"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--model")
    parser.add_argument("--short", action="store_true")
    chosen = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    if chosen.short:
        print(json.dumps(measured("short", model_of("short"), 1, (4, 8, 16))), flush=True)
        return
    for size in chosen.sizes:
        model = AutoModelForCausalLM.from_pretrained(chosen.model).eval() if chosen.model else model_of(size)
        print(json.dumps(measured(size, model, chosen.repetitions, (64, 128, 256, 512))), flush=True)


if __name__ == "__main__":
    main()
