"""Run folders as whet writes them, made without training: metrics, rollouts, evaluations and their answers."""

import json
import math
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from whet.runs import config
from whet.runs.recipe import kind_of

HOSTILE = (
    "<script>alert(1)</script><img src=http://evil.example/x.png onerror=alert(2)>"
    "\x1b[31mred\x07\x00 \u202egnp.exe\u202c </pre></div>&amp;"
)
"""Text that a model could write to change a page: markup, control characters, and an override of the direction of text."""


class Parsed(HTMLParser):
    """A page as its tags with their attributes, its text, and what is between style and script tags."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.chunks: list[str] = []
        self.own, self._in = {"style": "", "script": ""}, ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag if tag in self.own else ""

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in:
            self.own[self._in] += data
        else:
            self.chunks.append(data)

    @property
    def text(self) -> str:
        """The text of the page; a space is between the texts of two tags."""
        return " ".join(self.chunks)


def saved(folder: Path, method: str = "ppo", steps: int = 40, **fields: Any) -> Path:
    """Write recipe, environment and an empty model folder of a run of a method."""
    folder.mkdir(parents=True, exist_ok=True)
    length = {"rollout.num_steps" if method in ("ppo", "grpo") else "train.num_steps": steps}
    given = {"model": "base", "data": "prompts.jsonl", "out": str(folder)} | length | fields
    recipe = config.resolve(kind_of(method), method, None, list(given.items()))
    (folder / "recipe.yaml").write_text(config.to_yaml(recipe, method), encoding="utf-8")
    (folder / "environment.json").write_text('{"python": "3.11.7", "machine": "x86_64", "threads": 1, "workers": 1}')
    (folder / "model").mkdir(exist_ok=True)
    return folder


def write_metrics(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def online_rows(steps: int, seed: int = 0, every: int = 0) -> list[dict[str, float]]:
    """Metrics of an over-optimized run: the proxy rises, the judge rises and falls. With `every`, with evaluations."""
    rows: list[dict[str, float]] = []
    for step in range(steps + 1):
        share, noise = step / steps, 0.05 * math.sin(7.3 * step + seed)
        kl = max(0.0, 30 * share**2 + noise)
        row: dict[str, float] = {"step": step}
        if step:
            row |= {
                "score": 2 * math.sqrt(share) + noise, "reward/helpful": 2 * math.sqrt(share) + noise, "score_std": 0.5,
                "kl": kl, "entropy": 2 - share, "length": 40 + 60 * share + 10 * noise, "truncated": 0.1 * share,
                "clip_fraction": 0.1 * (1 - share), "explained_variance": share, "grad_norm/policy": 1 / (share + 0.01),
                "grad_norm/critic": 2 + noise, "lr/policy": 1e-5 * (1 - share), "lr/critic": 1e-5 * (1 - share), "kl_old": 0.01,
                "loss/policy/rollout/clip": noise, "seconds": 0.5, "seconds/generate": 0.2,
            }  # fmt: skip
        if every and (step % every == 0 or step == steps):
            win = 0.5 + 0.8 * share * (1 - share)
            row |= {
                "eval/score": 1.8 * math.sqrt(share), "eval/judge/gold": 1 + 4 * share * (0.8 - share), "eval/kl": kl,
                "eval/length": 40 + 60 * share, "eval/truncated": 0.1 * share, "eval/win_rate/gold": win, "seconds/eval": 0.4,
                "eval/win_rate_low/gold": win - 0.1, "eval/win_rate_high/gold": win + 0.1, "eval/pass@4/exact": 0.2 + share / 2,
                "eval/best_step": min(step, 2 * (steps // 5)),
            }  # fmt: skip
        if len(row) > 1:
            rows.append(row)
    return rows


def write_evaluation(folder: Path, step: int, text: str = "", prompts: int = 6, answers: int = 2) -> Path:
    """Write the answers of an evaluation at a step. Their texts name step, prompt and answer, or are `text`."""
    places = [(index, answer) for index in range(prompts) for answer in range(answers)]
    table = {
        "index": [index for index, _ in places], "answer": [answer for _, answer in places],
        "prompt": [f"prompt {index}" for index, _ in places],
        "completion": [text or f"step {step}, prompt {index}, answer {answer}" for index, answer in places],
        "length": [5 + index + step for index, _ in places], "truncated": [index == 1 for index, _ in places],
        "kl": [None if index == 5 else 0.5 * index for index, _ in places],
        "score": [float(index - answer) for index, answer in places],
        "reward/helpful": [float(index - answer) for index, answer in places],
        "judge/gold": [None if index == 4 else 1.0 for index, _ in places],
    }  # fmt: skip
    path = folder / "eval" / f"step-{step:08d}.parquet"
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return path


def write_rollout(folder: Path, step: int, rows: int = 8, text: str = "", tokens: int = 6) -> Path:
    """Write a rollout with token columns. Each step has prompts of its own."""
    path = folder / "rollouts" / f"step-{step:08d}.parquet"
    path.parent.mkdir(exist_ok=True)
    each = list(range(rows))
    table: dict[str, Any] = {
        "prompt_id": [f"{step}-{row}" for row in each], "prompt": [f"prompt {row} of step {step}" for row in each],
        "completion": [text or f"answer {row} of step {step}" for row in each], "truncated": [False] * rows,
        "prompt_ids": [list(range(tokens))] * rows, "completion_ids": [list(range(tokens))] * rows,
        "mask": [[True] * tokens for _ in each], "old_logp": [[-0.5 - 0.001 * row * i for i in range(tokens)] for row in each],
        "ref_logp": [[-0.7 - 0.01 * i for i in range(tokens)] for _ in each], "score": [float(row) for row in each],
        "reward/helpful": [float(row) for row in each],
    }  # fmt: skip
    for name in ("sampler_logp", "old_value", "advantage", "returns", "ratio", "token_reward", "old_entropy", "kl"):
        table[name] = [[math.sin(row + i * 1.7) for i in range(tokens)] for row in each]
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return path


def evaluated(folder: Path, steps: int = 40, every: int = 8, seed: int = 0, text: str = "") -> Path:
    """A whole online run with evaluations and their answers."""
    saved(folder, steps=steps, seed=seed)
    write_metrics(folder, online_rows(steps, seed, every))
    for step in (*range(0, steps, every), steps):
        write_evaluation(folder, step, text)
    return folder
