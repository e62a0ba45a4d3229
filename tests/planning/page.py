"""The worked examples of docs/scale.md: `python -m tests.planning.page` writes them anew."""

import re
from dataclasses import replace
from pathlib import Path

from whet.planning import Hardware, Layout, PlannedRun, Shape, frozen, report, trained
from whet.planning.memory import GIB
from whet.planning.report import table

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
SEVEN = Shape.of(
    {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000,
    }
)  # fmt: skip
PPO = PlannedRun(
    SEVEN, critic=SEVEN, reference=SEVEN, rewards=(("reward", SEVEN),), prompts=512, prompt_tokens=512, answer_tokens=1024,
    updates=4, max_tokens_per_micro_batch=16384, low_precision=True,
)  # fmt: skip


def engines() -> str:
    """The states of one trained role, and of one frozen one, under every engine."""
    rows = []
    for engine in ("ddp", "zero1", "zero2", "zero3", "fsdp"):
        layout = Layout(engine, 32, low_precision=True)  # type: ignore[arg-type]
        one, still = trained(SEVEN, layout), frozen(SEVEN, layout)
        numbers = (one.weights, one.gradients, one.optimizer, one.states, one.working, still.states)
        rows.append([engine, *(f"{number / GIB:.1f}" for number in numbers)])
    head = ["32 workers, GiB", "weights", "gradients", "optimizer", "resident", "gathered", "a frozen role"]
    return "\n".join(table(head, rows))


def adapters() -> str:
    """The same run by adapters, on one node."""
    light = replace(
        PPO,
        critic=None,
        reference=None,
        base_read=True,
        lora_rank=16,
        push_adapter=True,
        held_bytes=2,
        prompts=64,
        num_generations=8,
    )
    return report(light, Hardware(8, 80.0), title="grpo, adapters")


def blocks() -> dict[str, str]:
    """Name -> text of every example on the page."""
    return {"ppo": report(PPO, Hardware(64, 80.0), title="ppo"), "engines": engines(), "adapters": adapters()}


def text() -> str:
    """The page with its examples as they are now."""
    page = PAGE.read_text()
    for name, block in blocks().items():
        found = re.compile(rf"(<!-- {name} -->\n```text\n).*?(```\n)", re.DOTALL)
        assert found.search(page), name
        page = found.sub(lambda match, block=block: match[1] + block + "\n" + match[2], page)  # type: ignore[misc]
    return page


if __name__ == "__main__":
    PAGE.write_text(text())
