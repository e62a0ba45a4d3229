"""The rows of `make real`: sums are right, and held-out prompts are in no training file."""

import json
import re
from pathlib import Path

from proof import real


def test_the_answers_of_the_word_problems_are_sums() -> None:
    for row in real.problems():
        asked = [int(number) for number in re.findall(r"\d+", row["prompt"])]
        assert [int(number) for number in re.findall(r"\d+", row["completion"])] == [*asked, sum(asked), sum(asked)]


def test_held_out_prompts_are_in_no_training_file(tmp_path: Path) -> None:
    real.write(tmp_path, real.LONG)
    held_out, prompts, pairs = (
        {json.loads(line)["prompt"] for line in (tmp_path / name).read_text().splitlines()}
        for name in ("held-out.jsonl", "prompts.jsonl", "pairs.jsonl")
    )
    assert len(held_out) == real.LONG.held_out
    assert not held_out & (prompts | pairs)
    assert pairs <= prompts
