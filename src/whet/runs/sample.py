"""whet.sample: generate K answers to each prompt of a file."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from whet.data import Chat, Group, Prompt
from whet.data.degenerate import constant
from whet.data.files import write_jsonl
from whet.errors import RecipeError
from whet.generate import Generator
from whet.loops import evaluate
from whet.methods.options import Sampling
from whet.rewards.base import check_scored
from whet.runs import data, early, generators, models, rewards
from whet.runs import recipe as fields
from whet.terminal import caution

ABOUT_ANSWERS = (
    "responses", "response_ids", "prompt_ids", "ranks", "scores", "finish", "probability", "margin", "score", "chosen",
    "rejected", "chosen_ids", "rejected_ids", "completion", "completion_ids", "completions", "labels",
)  # fmt: skip
"""Columns about the answers that a row had before, which are not written beside new answers."""


def run_sample(recipe: fields.SampleRecipe) -> Path:
    """Generate K answers to each prompt of a file. Return the path of the written file.

    The rows have `responses`, their `finish`, the token ids (`prompt_ids`, `response_ids`) and, with rewards, `scores`; with
    keep="best" only the best answer (`completion`, `completion_ids`) with its `finish` and `score`."""
    threads(recipe.threads)
    out = early.out_file(recipe.out, "sample")
    early.check_keep(recipe)
    tokenizer, chat = models.tokenizer_and_chat(recipe.model, recipe.sampling)
    check_generator(recipe, chat)
    found = rewards.all_of(recipe.reward, recipe.model, tokenizer, recipe.max_tokens_per_micro_batch, "reward")
    scorers = rewards.distinct(
        [replace(one, weight=spec.weight) for one, spec in zip(found, recipe.reward, strict=True)]
    )
    questions = prompts_of(recipe.model, recipe.data, chat, recipe.sampling)
    rewards.check_columns(scorers, questions)
    generator = generator_of(recipe, tokenizer, chat, questions)
    with closing(generator):
        groups = evaluate.answers(generator, questions, recipe.sampling, count=recipe.num_generations, seed=recipe.seed)
    rows = [_row(group, chat) for group in groups]
    if scorers:
        with kept(out, rows):
            each = {one.name: one.reward.score(groups) for one in scorers}
            check_scored(
                list(each), groups, {name: own.applies for name, own in each.items() if own.applies is not None}
            )
        total = torch.stack([one.weight * each[one.name].answer.double() for one in scorers]).sum(0)
        if constant(total.tolist()):
            caution(f"reward: all {len(total)} scores are equal ({float(total[0]):g})")
        for row, scores in zip(rows, total.reshape(len(rows), -1).tolist(), strict=True):
            row["scores"] = scores
    if recipe.keep == "best":
        rows = [_best(row) for row in rows]
    write_jsonl(out, rows)
    return out


def _row(group: Group, chat: Chat) -> dict[str, Any]:
    """Return the row of a prompt and its answers. Token ids of another text than the answer's are left out."""
    kept = {name: value for name, value in group.prompt.row.items() if name not in ABOUT_ANSWERS}
    row: dict[str, Any] = {
        **kept,
        "responses": [sample.text for sample in group.samples],
        "finish": [sample.finish for sample in group.samples],
    }
    if all(chat.is_text_of(sample.ids, sample.text) for sample in group.samples):
        row |= {"prompt_ids": list(group.prompt.ids), "response_ids": [list(sample.ids) for sample in group.samples]}
    return row


@contextmanager
def kept(out: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Keep generated answers if what follows fails: write the rows to NAME.unscored.jsonl beside the output file, and say so."""
    try:
        yield
    except BaseException:  # Ctrl-C too: the answers may be the work of hours
        names = (out.with_suffix(f"{number}.unscored.jsonl") for number in ("", *(f".{n}" for n in range(1, 1000))))
        aside = next(one for one in names if not one.exists())
        write_jsonl(aside, rows)
        caution(f"the answers were generated and are kept without scores in {aside}")
        raise


def _best(row: Mapping[str, Any]) -> dict[str, Any]:
    """Make a demonstration of the best answer of a row: prefer complete answers to truncated ones, then higher scores."""
    best = min(range(len(row["responses"])), key=lambda n: (row["finish"][n] == "length", -row["scores"][n]))
    kept = {key: value for key, value in row.items() if key not in ("responses", "finish", "scores", "response_ids")}
    kept |= {"completion": row["responses"][best], "finish": row["finish"][best], "score": row["scores"][best]}
    return kept | ({"completion_ids": row["response_ids"][best]} if "response_ids" in row else {})


def prompts_of(model: fields.Frozen, rows: fields.Rows, chat: Chat, sampling: Sampling) -> list[Prompt]:
    """Read the prompts of a file. Keep `max_new_tokens` positions free for an answer."""
    reader = data.reader_of(model, rows, chat, room=sampling.max_new_tokens)
    return list(data.rows_of(rows, data.Reading(reader, "prompts")))


def check_generator(recipe: fields.SampleRecipe | fields.EvalRecipe, chat: Chat) -> None:
    """Raise an error if this machine lacks what the model or the generator of a recipe needs. Call it before models are loaded."""
    models.check_machine(recipe.model)
    generators.chosen_of(recipe).check(generators.context_of(recipe, chat))


def generator_of(
    recipe: fields.SampleRecipe | fields.EvalRecipe, tokenizer: Any, chat: Chat, prompts: Sequence[Prompt]
) -> Generator:
    """Build the generator of a recipe for these prompts."""
    role = partial(models.causal_role, "policy", recipe.model, tokenizer, trained=False, seed=0)
    longest = max(len(one.ids) for one in prompts) + recipe.sampling.max_new_tokens
    return generators.built(recipe, generators.context_of(recipe, chat, role=role, longest=longest))


def threads(count: int) -> None:
    """Set the number of CPU threads of torch; 0 keeps the default. Raises RecipeError for far more than this machine has CPUs."""
    cpus = os.cpu_count() or 1
    if count > max(64, 4 * cpus):
        raise RecipeError(f"threads: this machine has {cpus} CPUs, and so many threads would only wait; got {count}")
    if count:
        torch.set_num_threads(count)
