"""The verbs: each reads its recipe, checks everything that can be known before, runs, and leaves a folder or a file."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from whet.cluster import Attempt
from whet.data import Chat, Group, Prompt, numbers, read_rows
from whet.data.files import write_json, write_jsonl
from whet.distributed import Workers, first, free_port, join, launched, leave, note, noted
from whet.errors import RecipeError, UserError
from whet.feedback import Question, ScoreRanker
from whet.feedback.judge import RankJudge, ScoreJudge
from whet.generate import Generator
from whet.generate.local import LocalGenerator
from whet.learner import Learner
from whet.learner.local import LocalLearner
from whet.loops import evaluate, offline, online
from whet.loops.interrupt import graceful
from whet.loops.record import RunFolder
from whet.methods import Objective, Term, compose, part
from whet.methods.options import Sampling
from whet.models import load
from whet.models.roles import Role
from whet.ops import address, nll, token_mean
from whet.rewards import Weighted
from whet.rewards.functions import called, load_function
from whet.runs import adapters, build, config, crew
from whet.runs import recipe as fields
from whet.runs.slots import checked
from whet.trackers import TRACKERS, RunInfo, Tracker

SFT = Objective((Term("policy", "train", part(nll), token_mean, name="nll"),))
"""The objective of SFT and pre-training: the mean over all trained tokens of -log pi."""


@dataclass(frozen=True)
class Options:
    """What a call says beside the recipe: continue a run; show no progress."""

    resume: bool = False
    quiet: bool = False


def run_offline(verb: str, recipe: fields.OfflineRecipe, options: Options) -> Path:
    """pretrain, sft, reward, dpo, ipo: rows of a file through an objective. Returns the run folder."""
    _threads(recipe.threads)
    crew.check_cluster(recipe)
    options = _restarted(options)
    _trackers(recipe.trackers, None)
    folder = _folder(recipe, verb, options)
    build.check_optim(recipe.optim, "optim")
    if recipe.train.eval_every and not recipe.data.eval:
        raise RecipeError("train.eval_every: there are no held-out rows; give --data.eval, or leave it out")
    name, objective = verb, SFT
    if isinstance(recipe, fields.RewardModelRecipe | fields.PreferenceRecipe):
        slots = checked(verb, recipe.algorithm, config.leaves(type(recipe)))
        name = recipe.algorithm["name"] if isinstance(recipe, fields.RewardModelRecipe) else verb
        objective = (
            compose.reward_of(slots) if isinstance(recipe, fields.RewardModelRecipe) else compose.preference_of(slots)
        )
    if isinstance(recipe, fields.PreferenceRecipe):
        build.check_reference(recipe, objective)
    tokenizer, chat = build.tokenizer_and_chat(recipe.model)
    if isinstance(recipe, fields.RewardModelRecipe) and tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise RecipeError(
            "model.pad_token: the pad token is the end token, and other tools would then read the saved reward model one token "
            "early; name another token with --model.pad-token"
        )
    reader = build.reader_of(recipe.model, recipe.data, chat)
    reading = {"pretrain": "texts", "sft": "demonstrations"}.get(verb) or build.reading(name, objective)
    build.check_data(recipe.data, reading)
    read: Callable[[Sequence[Any]], list] = getattr(reader, reading)
    read = build.guarded(read, objective, name) if objective is not SFT else read
    sources, weights = build.sources_of(recipe.data, read)
    evaluation = build.evaluation_of(recipe.data, read)
    steps = build.steps_of(recipe.train, sum(map(len, sources)))

    plan = offline.OfflinePlan(
        steps, recipe.train.batch_size, recipe.seed, recipe.data.shuffle, recipe.train.save_every,
        recipe.train.eval_every or (steps if evaluation else 0), recipe.train.keep,
    )  # fmt: skip
    if isinstance(recipe, fields.PreferenceRecipe):
        every, mix = recipe.sync_reference.every, recipe.sync_reference.mix
        plan = replace(plan, refresh=every, refresh_mix=mix, precompute=recipe.precompute)

    def train(learner: Learner, own: Options) -> None:
        run = _open(folder, recipe, own, verb, learner.workers)
        with graceful() as stop:
            offline.train(
                objective, learner, sources, plan, run, weights=weights, evaluation=evaluation, resume=own.resume,
                stop=stop, title=verb, quiet=own.quiet,
            )  # fmt: skip
        run.close()
        if isinstance(recipe, fields.RewardModelRecipe) and recipe.head.standardize:
            elements = [element for source in sources for element in source]
            _standardize(learner, evaluate.scores(learner, objective, elements))
        role = "reward" if isinstance(recipe, fields.RewardModelRecipe) else "policy"
        learner.export(role, folder / "model", tokenizer, merge=recipe.model.export == "merged")

    make = partial(crew.offline_learner, verb, recipe, objective, steps)
    if recipe.cluster.address is not None:
        crew.on_cluster(
            recipe,
            lambda world, resume: train(world.learner(make), replace(options, resume=resume)),
            options.resume,
            options.quiet,
        )
        return folder
    with _working(recipe, options) as (workers, own):
        train(make(workers), own)
    return folder


def run_online(verb: str, recipe: fields.OnlineRecipe, options: Options) -> Path:
    """ppo, grpo and the other online methods. Returns the run folder."""
    _threads(recipe.threads)
    crew.check_cluster(recipe)
    options = _restarted(options)
    _trackers(recipe.trackers, None)
    folder = _folder(recipe, verb, options)
    build.check_optim(recipe.optim, "optim")
    if recipe.critic.optim is not None:
        build.check_optim(recipe.critic.optim, "critic.optim")
    slots = checked(verb, recipe.algorithm, config.leaves(fields.OnlineRecipe))
    longest, weights = recipe.sampling.max_new_tokens, [one.weight for one in recipe.reward] or [1.0]
    algorithm = compose.online_of(slots, longest=longest, weights=weights)
    if not recipe.reward:
        raise RecipeError(
            'reward: what scores the answers? give --reward with a reward-model folder or "file.py:function"'
        )
    mini_batch_size = build.check_arithmetic(recipe, algorithm, verb)
    build.check_ptx(recipe, algorithm, verb)
    tokenizer, chat = build.tokenizer_and_chat(recipe.model)
    reader = build.reader_of(recipe.model, recipe.data, chat, room=recipe.sampling.max_new_tokens)
    prompts = build.rows_of(recipe.data, reader.prompts)
    build.check_columns(prompts)
    crew.check_generator(recipe, int(os.environ["WORLD_SIZE"]) if launched() else 1)
    build.check_rewards(recipe, tokenizer)
    ptx = (
        build.reader_of(recipe.model, fields.Rows(), chat).demonstrations(read_rows(recipe.ptx.data))
        if recipe.ptx.data
        else []
    )
    for caution in build.cautions(recipe, algorithm) if first() else ():
        print(f"whet: {caution}", file=sys.stderr)
    rows = recipe.rollout.prompts_per_step * (1 if algorithm.pairs else algorithm.collect.num_generations)
    total = recipe.rollout.num_steps * recipe.rollout.ppo_epochs * -(-rows // mini_batch_size)
    plan, longest = _plan_of(recipe, mini_batch_size, chat, prompts)

    def train(learner: Learner, generator: Generator, rewards: list[Weighted], own: Options) -> None:
        run = _open(folder, recipe, own, verb, learner.workers)
        with graceful() as stop:
            online.train(
                algorithm, learner, generator, rewards, prompts, recipe.sampling, plan, run, ptx=ptx, resume=own.resume,
                stop=stop, title=verb, quiet=own.quiet,
            )  # fmt: skip
        run.close()
        learner.export("policy", folder / "model", tokenizer, merge=recipe.model.export == "merged")
        if recipe.rollout.ema is not None:
            learner.export("ema", folder / "ema", tokenizer)

    make = partial(crew.online_learner, recipe, algorithm, total, scores=not recipe.cluster.rewards)
    if recipe.cluster.address is not None:

        def attempt(world: Attempt, resume: bool) -> None:
            inside = None if recipe.cluster.engines else partial(crew.answers_inside, recipe, longest)
            learner = world.learner(make, push=recipe.generator.push, answers=inside)
            alone = [partial(crew.engine_alone, recipe, longest, number) for number in range(recipe.cluster.engines)]
            generator = world.generator(alone)
            scorers = partial(crew.rewards_alone, recipe)
            rewards = world.rewards(scorers) if recipe.cluster.rewards else crew.rewards_of(recipe, tokenizer, learner)
            train(learner, generator, rewards, replace(options, resume=resume))

        crew.on_cluster(recipe, attempt, options.resume, options.quiet)
        return folder
    with _working(recipe, options) as (workers, own), closing(make(workers)) as learner:
        rewards = crew.rewards_of(recipe, tokenizer, learner, workers)
        with closing(crew.generator_of(recipe, chat, learner, longest)) as generator:
            train(learner, generator, rewards, own)
    return folder


def _plan_of(
    recipe: fields.OnlineRecipe, mini_batch_size: int, chat: Chat, prompts: Sequence[Prompt]
) -> tuple[online.OnlinePlan, int]:
    """The loop's options, and the longest sequence that a generator meets, in tokens: an answer, or the canary."""
    rollout, generator = recipe.rollout, recipe.generator
    positions = load.positions(build.source_of(recipe.model))
    canary = min(160, positions - 1)
    longest = min(positions, max(canary + 1, max(len(one.ids) for one in prompts) + recipe.sampling.max_new_tokens))
    plan = online.OnlinePlan(
        steps=rollout.num_steps, prompts=rollout.prompts_per_step, mini_batch_size=mini_batch_size, epochs=rollout.ppo_epochs, seed=recipe.seed,
        ptx_batch=recipe.ptx.batch_size, target_kl=rollout.target_kl, ema=rollout.ema,
        equal_start=recipe.reference in (None, recipe.model.path), end_ids=chat.end_ids, canary=canary,
        low_precision=generator.dtype in ("bfloat16", "float16"),
        save_every=recipe.train.save_every, keep=recipe.train.keep, refresh=rollout.sync_reference.every,
        refresh_mix=rollout.sync_reference.mix, max_staleness=generator.max_staleness, segment=generator.segment_tokens,
        slots=rollout.max_num_seqs,
    )  # fmt: skip
    return plan, longest


def run_sample(recipe: fields.SampleRecipe, options: Options) -> Path:
    """K answers for every prompt of a file: the rows with `responses`, and `scores` where rewards are given; or the best
    alone as `prompt` and `completion`. Returns the file."""
    _threads(recipe.threads)
    out = _out_file(recipe.out, "sample")
    if recipe.keep == "best" and not recipe.reward:
        raise RecipeError("keep: which answer is the best? give --reward with a reward-model folder or a function")
    tokenizer, chat = build.tokenizer_and_chat(recipe.model)
    rewards = [
        (one.weight, build.reward(one.source, recipe.model, tokenizer, recipe.max_tokens_per_micro_batch))
        for one in recipe.reward
    ]
    prompts = _prompts(recipe.model, recipe.data, chat, recipe.sampling)
    role = build.causal_role("policy", recipe.model, tokenizer, trained=False, seed=0)
    groups = _answers(recipe, role, chat, prompts, recipe.num_generations, recipe.seed)
    rows: list[dict[str, Any]] = [
        {
            **group.prompt.row,
            "responses": [sample.text for sample in group.samples],
            "finish": [sample.finish for sample in group.samples],
        }
        for group in groups
    ]
    if rewards:
        each = [weight * one.reward.score(groups).answer.double() for weight, one in rewards]
        for row, scores in zip(rows, torch.stack(each).sum(0).reshape(len(rows), -1).tolist(), strict=True):
            row["scores"] = scores
    write_jsonl(out, [_best(row) for row in rows] if recipe.keep == "best" else rows)
    return out


def _best(row: Mapping[str, Any]) -> dict[str, Any]:
    """A demonstration made of a row's best answer: one that ended before one that was cut off, then by score."""
    order = sorted(range(len(row["scores"])), key=lambda n: (row["finish"][n] == "length", -row["scores"][n]))
    kept = {key: value for key, value in row.items() if key not in ("responses", "finish", "scores")}
    return kept | {"completion": row["responses"][order[0]], "score": row["scores"][order[0]]}


def run_rank(recipe: fields.RankRecipe, options: Options) -> Path:
    """Answers become rankings: by a judge function, or by the `scores` the rows carry. Returns the file."""
    out = _out_file(recipe.out, "rank")
    if recipe.judge is None and recipe.judge_form != fields.RankRecipe().judge_form:
        raise RecipeError("judge_form: there is no judge; give --judge FILE.py:FUNCTION, or leave it out")
    ranker: Any = ScoreRanker()
    if recipe.judge is not None:
        function = load_function(recipe.judge)

        def guarded(*given: Any, **named: Any) -> Any:
            return called(function, recipe.judge or "", *given, **named)

        ranker = ScoreJudge(guarded) if recipe.judge_form == "score" else RankJudge(guarded)
    if not recipe.data.train:
        raise RecipeError("data.train: which answers? give --data with one file of `responses` rows")
    rows = read_rows(recipe.data.train)
    for located in rows:
        answers = located.row.get("responses")
        if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(answer, str) for answer in answers):
            raise UserError(
                f"{located.where}: field 'responses' must be a list of at least two answers, got {answers!r:.80}"
            )
        if recipe.judge is None:
            numbers(located, "scores", len(answers))
    questions = [
        Question(
            one.row.get("prompt"),
            tuple(one.row["responses"]),
            {k: v for k, v in one.row.items() if k not in ("prompt", "responses")},
        )
        for one in rows
    ]
    ranks = ranker.rank(questions)
    write_jsonl(out, [{**one.row, "ranks": own} for one, own in zip(rows, ranks, strict=True)])
    return out


def run_eval(recipe: fields.EvalRecipe, options: Options) -> dict[str, float]:
    """Win rate against another model under judges; or a reward model's accuracy; or the loss on held-out rows."""
    _threads(recipe.threads)
    if (recipe.against is None) != (not recipe.judge):
        raise RecipeError(
            "eval: a win rate needs both --against (the other model) and --judge; a loss or an accuracy needs neither"
        )
    numbers = _win_rates(recipe) if recipe.judge else _held_out(recipe)
    if recipe.out:
        write_json(Path(recipe.out), numbers)
    return numbers


def _win_rates(recipe: fields.EvalRecipe) -> dict[str, float]:
    """Both models answer every prompt once, independently; each judge scores; KL of the model to the other, in nats."""
    assert recipe.against is not None
    tokenizer, chat = build.tokenizer_and_chat(recipe.model)
    judges = build.distinct(
        [build.reward(one, recipe.model, tokenizer, recipe.max_tokens_per_micro_batch) for one in recipe.judge]
    )
    prompts = _prompts(recipe.model, recipe.data, chat, recipe.sampling)
    role = build.causal_role("policy", recipe.model, tokenizer, trained=False, seed=0)
    other_tokenizer, other_chat = build.tokenizer_and_chat(replace(recipe.model, path=recipe.against))
    if other_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise RecipeError(
            f"against: {recipe.against} has another tokenizer than {recipe.model.path}; compare models of one family"
        )
    other = build.causal_role("reference", recipe.model, tokenizer, trained=False, seed=0, path=recipe.against)
    ours = _answers(recipe, role, chat, prompts, 1, recipe.seed)
    theirs = _answers(recipe, other, other_chat, prompts, 1, address(recipe.seed, "against"))
    learner = LocalLearner({"policy": role, "reference": other}, {}, total=1, budget=recipe.max_tokens_per_micro_batch)
    exact = (
        recipe.sampling.temperature > 0 and not recipe.sampling.truncates
    )  # else the samples are not the policy's own
    divergence = evaluate.kl(learner, ours, recipe.sampling.temperature).tolist() if exact else [None] * len(ours)
    numbers: dict[str, float] = {"prompts": len(prompts)}
    numbers |= {"kl": sum(divergence) / len(divergence)} if exact else {}
    rows = [
        {
            "prompt": group.prompt.row.get("prompt"),
            "answer": group.samples[0].text,
            "against": rival.samples[0].text,
            "kl": kl,
        }
        for group, rival, kl in zip(ours, theirs, divergence, strict=True)
    ]
    for judge in judges:
        mine, rivals = judge.reward.score(ours).answer.tolist(), judge.reward.score(theirs).answer.tolist()
        win, mean, rival = evaluate.win_rate(mine, rivals), evaluate.interval(mine), evaluate.interval(rivals)
        for name, three in (("win_rate", win), ("score", mean), ("against", rival)):
            numbers |= {
                f"{judge.name}/{name}{end}": value for end, value in zip(("", "_low", "_high"), three, strict=True)
            }
        for row, score, score_against in zip(rows, mine, rivals, strict=True):
            row |= {judge.name: score, f"{judge.name}/against": score_against}
    if recipe.answers:
        write_jsonl(_out_file(recipe.answers, "eval"), rows)
    return numbers


def _held_out(recipe: fields.EvalRecipe) -> dict[str, float]:
    tokenizer, chat = build.tokenizer_and_chat(recipe.model)
    reader = build.reader_of(recipe.model, recipe.data, chat)
    if load.is_scorer(recipe.model.path):
        role = build.scorer_role("reward", recipe.model, tokenizer, trained=False, seed=0, path=recipe.model.path)
        objective, reading = compose.reward("k_way"), "rankings"
    else:
        role = build.causal_role("policy", recipe.model, tokenizer, trained=False, seed=0)
        objective, reading = SFT, "demonstrations"
    elements = build.rows_of(recipe.data, getattr(reader, reading))
    learner = LocalLearner({role.name: role}, {}, total=1, budget=recipe.max_tokens_per_micro_batch)
    return {key.rpartition("/")[2]: value for key, value in evaluate.held_out(learner, objective, elements).items()}


def _prompts(model: fields.Frozen, data: fields.Rows, chat: Chat, sampling: Sampling) -> list[Prompt]:
    """The prompts of a file, each with room for an answer."""
    reader = build.reader_of(model, data, chat, room=sampling.max_new_tokens)
    return build.rows_of(data, reader.prompts)


def _answers(
    recipe: fields.SampleRecipe | fields.EvalRecipe,
    role: Role,
    chat: Chat,
    prompts: Sequence[Prompt],
    count: int,
    seed: int,
) -> list[Group]:
    generator = LocalGenerator(role, chat.end_ids, chat.text, unit=recipe.max_num_seqs)
    return evaluate.answers(generator, prompts, recipe.sampling, count=count, seed=seed)


@torch.no_grad()
def _standardize(learner: Learner, scores: torch.Tensor) -> None:
    """Scale the head and shift the reward model so that these scores of its own (n,) get mean 0 and deviation 1.

    The scale is in the head's weights, so other tools read the same scores but for the shift, which ranks nothing.
    """
    scale = 1.0 / max(float(scores.double().std(correction=0)), 1e-6)
    learner.rescale("reward", scale, -float(scores.double().mean()))


@contextmanager
def _working(recipe: Any, options: Options) -> Iterator[tuple[Workers, Options]]:
    """This process alone, or as one of torchrun's workers, of which the first one talks.

    An engine for several workers needs a group of processes, if only of one.
    """
    engine = crew.backend_of(recipe, int(os.environ["WORLD_SIZE"]) if launched() else 1)
    if not launched() and engine == "local":
        yield Workers(), options
        return
    workers = join() if launched() else join(0, 1, "127.0.0.1", free_port())
    resume = workers.broadcast(options.resume)
    try:
        yield workers, replace(options, resume=resume, quiet=options.quiet or not workers.first)
    except BaseException:
        if workers.size == 1:  # else the launcher ends the others
            leave()
        raise
    leave()


def _restarted(options: Options) -> Options:
    """What torchrun started again goes on where it was, if an earlier attempt had begun; the first worker asks."""
    return replace(options, resume=options.resume or (first() and noted("begun")))


def _folder(recipe: Any, verb: str, options: Options) -> Path:
    """The run folder, checked but not made: free, or with --resume one whose recipe is the same."""
    folder = Path(recipe.out or f"runs/{verb}")
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"out: {folder} is a file; name a folder with --out")
    if not first():  # the first worker looks, and tells whether to resume
        return folder
    saved = folder / "recipe.yaml"
    began = (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir()
    if saved.is_file() and began and not options.resume:
        raise RecipeError(
            f"out: {folder} already holds a run; continue it with --resume or name another folder with --out"
        )
    if options.resume:
        if not saved.is_file():
            raise RecipeError(f"--resume: there is no run in {folder}")
        text = config.to_yaml(recipe, verb)
        changed = _changed(_kept(config.read_yaml(saved)), _kept(config.yaml_tree(text)))
        if changed:
            raise RecipeError(
                f"--resume: the recipe of {folder} differs in {', '.join(changed)}; a resumed run goes on unchanged"
            )
    return folder


def _open(folder: Path, recipe: Any, options: Options, verb: str, workers: Workers) -> RunFolder:
    """The run's record, made once everything that can be refused has been. One worker writes it."""
    workers.barrier()
    found = offline.checkpoint.latest(folder / "checkpoints") if options.resume and workers.first else None
    if options.resume and found is None and workers.first:
        print(f"whet: no checkpoint was saved in {folder} yet; the run starts over", file=sys.stderr)
    step = json.loads((found / "loop.json").read_text(encoding="utf-8"))["step"] if found else 0
    text = config.to_yaml(recipe, verb)
    info = RunInfo(folder.name, folder, config.yaml_tree(text))
    trackers = _trackers(recipe.trackers, info) if workers.first else []
    run = RunFolder(folder, resume_at=step if options.resume else None, trackers=trackers, writes=workers.first)
    run.environment(text)
    if workers.first:
        note("begun")
    return run


def _kept(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe a resumed run goes on with unchanged: all but where the work is done."""
    elsewhere = {
        "learner": ("backend", "offload"),
        "generator": ("count", "urls", "transfer", "gpu_memory_utilization", "kv_cache_mib"),
    }
    out = {name: value for name, value in recipe.items() if name != "cluster"}
    for section, names in elsewhere.items():
        if isinstance(out.get(section), Mapping):
            out[section] = {name: value for name, value in out[section].items() if name not in names}
    return out


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    out = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += _changed(a, b, f"{where}{key}.")
        elif a != b:
            out.append(f"{where}{key}")
    return out


def _trackers(specs: Sequence[Any], info: RunInfo | None) -> list[Tracker]:
    """The trackers of a recipe; with a run's `info` they are started."""
    found = [
        (adapters.chosen(TRACKERS, one, "trackers"), one if isinstance(one, str) else one["name"]) for one in specs
    ]
    for one, name in found:
        one.check(name)
    out: list[Tracker] = [one.make(name) for one, name in found] if info else []
    for tracker in out:
        assert info is not None
        tracker.start(info)
    return out


def _threads(count: int) -> None:
    if count:
        torch.set_num_threads(count)


def _out_file(out: str, verb: str) -> Path:
    if not out:
        raise RecipeError(f"out: which file shall {verb} write? give --out FILE.jsonl")
    if Path(out).exists():
        raise RecipeError(f"out: {out} already exists; name another file with --out, or remove it")
    return Path(out)
