"""whet.evaluate: compute win rates under judges, the accuracy of a reward model, or a held-out loss."""

from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from whet.data import Batch
from whet.data.degenerate import constant
from whet.data.files import write_json, write_jsonl
from whet.errors import RecipeError, RewardError
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.loops import evaluate
from whet.methods import compose
from whet.models import load
from whet.models.probe import SOME, probe
from whet.ops import address
from whet.rewards.base import check_scored
from whet.runs import data, early, models, rewards, sample
from whet.runs import recipe as fields
from whet.terminal import caution


def run_eval(recipe: fields.EvalRecipe) -> dict[str, float]:
    """Return the win rate under judges, the loss and accuracy of a reward model, or the loss in nats per token, by name.
    Raises RecipeError if only one of `against` and `judge` is given."""
    sample.threads(recipe.threads)
    early.check_against(recipe)
    out = early.eval_files(recipe)
    numbers = _win_rates(recipe) if recipe.judge else _held_out(recipe)
    if out is not None:
        write_json(out, numbers)
    return numbers


def _win_rates(recipe: fields.EvalRecipe) -> dict[str, float]:
    """Generate one answer per prompt with both models and score them with each judge. Return the win rates, the mean scores
    with 95% intervals, and the KL of the model to the other one in nats per answer, if it can be computed."""
    assert recipe.against is not None
    judged = (one.source for one in recipe.judge if rewards.is_model(one.source))
    models.check_code(recipe.model, recipe.model.path, recipe.against, *judged)
    tokenizer, chat = models.tokenizer_and_chat(recipe.model, recipe.sampling)
    sample.check_generator(recipe, chat)
    prompts = sample.prompts_of(recipe.model, recipe.data, chat, recipe.sampling)
    judges = rewards.judges(recipe, tokenizer, prompts)
    other_tokenizer, other_chat = models.tokenizer_and_chat(replace(recipe.model, path=recipe.against), recipe.sampling)
    if other_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise RecipeError(
            f"against: {recipe.against} has another tokenizer than {recipe.model.path}; compare models of one family"
        )
    other = models.causal_role("reference", recipe.model, tokenizer, trained=False, seed=0, path=recipe.against)
    with closing(sample.generator_of(recipe, tokenizer, chat, prompts)) as generator:
        ours = evaluate.answers(generator, prompts, recipe.sampling, seed=recipe.seed)
    rival_generator = LocalGenerator(other, other_chat.end_ids, other_chat.text, unit=recipe.max_num_seqs)
    theirs = evaluate.answers(rival_generator, prompts, recipe.sampling, seed=address(recipe.seed, "against"))
    divergence: list[Any] = [None] * len(ours)
    exact = False  # the KL needs untruncated samples and a policy in this process
    if isinstance(generator, LocalGenerator) and recipe.sampling.temperature > 0 and not recipe.sampling.truncates:
        exact = True
        roles = {"policy": generator.role, "reference": other}
        for role in roles.values():
            probe(role, [torch.tensor(prompt.ids) for prompt in prompts[:SOME]], packed=True)
        learner = LocalLearner(roles, {}, total=1, budget=recipe.max_tokens_per_micro_batch, packed=True, shared=True)
        divergence = evaluate.kl(learner, ours, recipe.sampling.temperature).tolist()
    numbers: dict[str, float] = {"prompts": len(prompts)}
    numbers |= {"kl": sum(divergence) / len(divergence)} if exact else {}
    rows = [
        {
            "prompt": group.prompt.row.get("prompt"),
            "answer": group.samples[0].text,
            "against": rival.samples[0].text,
            "prompt_ids": list(group.prompt.ids),
            "answer_ids": list(group.samples[0].ids),
            "against_ids": list(rival.samples[0].ids),
            "kl": kl,
        }
        for group, rival, kl in zip(ours, theirs, divergence, strict=True)
    ]
    scores = []
    with sample.kept(Path(recipe.answers), rows) if recipe.answers else nullcontext():
        for judge in judges:
            scores.append((judge.reward.score(ours), judge.reward.score(theirs)))
        for side, groups in enumerate((ours, theirs)):
            applies = {one.name: both[side].known() for one, both in zip(judges, scores, strict=True)}
            check_scored(list(applies), groups, applies)
    for judge, both in zip(judges, scores, strict=True):
        applied = [place for place, one in enumerate((both[0].known() & both[1].known()).tolist()) if one]
        if not applied:
            raise RewardError(
                f"judge {judge.name}: it applies to both answers of no prompt, so there is nothing to compare"
            )
        mine, rivals = (one.answer[applied].tolist() for one in both)
        if constant(mine + rivals):
            caution(f"judge {judge.name}: all {len(mine + rivals)} scores are equal ({mine[0]:g})")
        win, mean, rival = evaluate.win_rate(mine, rivals), evaluate.interval(mine), evaluate.interval(rivals)
        for name, three in (("win_rate", win), ("score", mean), ("against", rival)):
            numbers |= {
                f"{judge.name}/{name}{end}": value for end, value in zip(("", "_low", "_high"), three, strict=True)
            }
        if len(applied) < len(rows):
            numbers[f"{judge.name}/prompts"] = len(applied)
        for row, score, score_against in zip(rows, *(one.listed() for one in both), strict=True):
            row |= {judge.name: score, f"{judge.name}/against": score_against}
    if recipe.answers:
        write_jsonl(Path(recipe.answers), rows)
    return numbers


def _held_out(recipe: fields.EvalRecipe) -> dict[str, float]:
    tokenizer, chat = models.tokenizer_and_chat(recipe.model, recipe.sampling)
    scorer = load.is_scorer(recipe.model.path, recipe.model.trust_remote_code)
    reader = data.reader_of(recipe.model, recipe.data, chat, closing=scorer)
    if scorer:
        role = models.scorer_role("reward", recipe.model, tokenizer, trained=False, seed=0, path=recipe.model.path)
        objective, reading = compose.reward("k_way"), "rankings"
    else:
        role = models.causal_role("policy", recipe.model, tokenizer, trained=False, seed=0)
        objective, reading = compose.SFT, "demonstrations"
    refused = data.refused_by(objective) if scorer else ()
    elements = data.rows_of(recipe.data, data.Reading(reader, reading, "eval", refused))
    probe(role, [row.ids for row in Batch.of(elements[:SOME]).rows], packed=True)
    learner = LocalLearner(
        {role.name: role}, {}, total=1, budget=recipe.max_tokens_per_micro_batch, packed=True, shared=True
    )
    return {key.rpartition("/")[2]: value for key, value in evaluate.held_out(learner, objective, elements).items()}
