"""Answers of a fixed length in whet: `sampling.min_new_tokens` where it exists, or else a generator without end tokens.

Without the option a fixed answer can have end tokens inside, which a reward model refuses, so `ppo` needs the option.
The only place of the benchmarks that reaches inside whet.
"""

from dataclasses import fields
from typing import Any

from whet.methods.options import Sampling

HAS_OPTION = "min_new_tokens" in {one.name for one in fields(Sampling)}


def end_option(length: int) -> dict[str, int]:
    """Return the sampling option that forbids end tokens before this length, {} if there is none."""
    return {"min_new_tokens": length} if HAS_OPTION else {}


def endless(generator: Any) -> None:
    """Let no token end an answer, if the option does not exist."""
    if not HAS_OPTION:
        generator.end_ids = ()
