"""whet on one line of the benchmark, with its defaults: python -m benchmarks.whet_run ALGORITHM SIZE --world DIR

A flag NAME=VALUE sets an option of the recipe (`--flag train.max_tokens_per_micro_batch=1536`). The stages are those of
`whet.Session`, which gives the weights of `whet.train` to the bit, and are timed from outside.
"""

# ruff: noqa: E402 (threads and environment are set before torch is imported)

from benchmarks.job import Job, job_of

JOB = job_of(__doc__ or "")

import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

import whet
from benchmarks import world
from benchmarks.fixed import end_option, endless
from whet.loops import evaluate
from whet.ops import address, permutation
from whet.runs import config, models, sample
from whet.runs.recipe import SampleRecipe

torch.set_num_threads(1)
METER = JOB.meter()


def common(job: Job, out: Path, model: str = "model") -> dict[str, Any]:
    """Return the options that the workload fixes for every method; all others stay at their defaults."""
    return {
        "model": {"path": str(job.world / model), "chat_template": "none", "device": job.device, "dtype": "float32"},
        "seed": 0, "threads": 1, "out": str(out / "run"),
        "optim": {"lr": job.work.lr, "schedule": "constant", "warmup_ratio": 0.0, "betas": [0.9, 0.999], "weight_decay": 0.0,
                  "max_grad_norm": 1.0},
    } | dict(flag_of(one) for one in job.flags)  # fmt: skip


def flag_of(text: str) -> tuple[str, Any]:
    """Return (name, value) of NAME=VALUE. The value is JSON, or else a word."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def offline(job: Job, out: Path) -> None:
    """Run sft, reward or dpo."""
    work, kind = job.work, job.algorithm
    rows = job.rows("sft" if kind == "sft" else "pref", work.rows)
    options: dict[str, Any] = {
        "sft": {}, "reward": {"algorithm": {"name": "pairwise"}}, "dpo": {"beta": work.beta},
    }[kind]  # fmt: skip
    options |= {"data": {"train": rows, "shuffle": False, "max_tokens": work.max_len, "too_long": "cut"}}
    options |= {"train.batch_size": work.batch, "train.num_epochs": 1}
    options |= common(job, out, "rm" if kind == "reward" else "model")
    with whet.Session(kind, **options) as session:
        METER.begin()
        batches = session.batches()
        while True:
            with METER.phase("batch and measure"):
                batch = next(batches, None)
            if batch is None:
                break
            with METER.phase("forward_backward"):
                session.forward_backward(batch)
            with METER.phase("optim_step"):
                session.optim_step()
            METER.updates += 1
            METER.losses.append(session.metrics()["loss"])
            METER.step(len(batch.elements()), sum(row.length for row in batch.rows))


def online(job: Job, out: Path) -> None:
    """Run grpo, rloo or ppo."""
    work = job.work
    options = online_options(job) | common(job, out)
    with whet.Session(job.algorithm, **options) as session:
        if job.fixed:
            endless(session.loop.generator)  # type: ignore[union-attr]
        METER.begin()
        steps = session.steps()
        running = next(steps, None)
        while running is not None:
            with METER.phase("generate"):
                groups = session.generate()
            with METER.phase("score"):
                scores = session.score(groups)
            with METER.phase("measure"):
                batch = session.measure(groups, scores, defer=True)
            with METER.phase("advantages and checks"):
                batch = session.advantages(batch)
            with METER.phase("update"):
                for mini in session.minibatches(batch):
                    session.forward_backward(mini)
                    session.optim_step()
                    METER.updates += 1
            with METER.phase("publish"):
                session.publish()
            answers = [(len(group.prompt.ids), len(one.ids)) for group in groups for one in group.samples]
            assert len(answers) == work.prompts * work.answers
            with METER.phase("end of step"):  # metrics and rollout are written
                running = next(steps, None)
            METER.step(len(answers), prompt_tokens=sum(p for p, _ in answers), answer_tokens=sum(a for _, a in answers))


def online_options(job: Job) -> dict[str, Any]:
    """Return the options of an online method: the peer's loss, and the work."""
    work, kind = job.work, job.algorithm
    options: dict[str, Any] = {
        "data": handed_out(job.rows("prompts")),
        "rollout": {
            "num_steps": work.steps,
            "prompts_per_step": work.prompts,
            "ppo_epochs": work.epochs,
            "mini_batch_size": work.prompts * work.answers,
        },
        "sampling": sampling(job),
    }
    if kind == "ppo":  # TRL: gamma 1, lambda 0.95, both clips 0.2, vf_coef 0.1, advantages whitened, as whet's defaults
        value = {"clip_range_vf": 0.2, "vf_coef": 0.1}
        return options | {"reward": str(job.world / "rm"), "kl_in_reward": {"coef": work.kl}, "value": value}
    options |= {"reward": world.topic_reward(job.world), "num_generations": work.answers}
    if kind == "grpo":  # TRL: no KL, mean over all tokens (dapo)
        return options | {"kl_in_loss": None, "reduction": "token_mean"}
    # TRL: the KL in the reward, and the clipped ratio of the whole answer
    return options | {
        "kl_in_reward": {"coef": work.kl},
        "surrogate": "clip",
        "ratio": "product",
        "reduction": "sequence_mean",
    }


def sampling(job: Job) -> dict[str, Any]:
    """Return the sampling options; with fixed lengths no end token comes before the last one, where whet can do that."""
    options = {"max_new_tokens": job.work.max_new}
    return options | (end_option(job.work.max_new) if job.fixed else {})


def handed_out(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows in an order from which the first epoch of seed 0 takes them as they stand here."""
    out = [dict[str, Any]()] * len(rows)
    for place, number in enumerate(permutation(address(0, "order", 0), len(rows)).tolist()):
        out[number] = rows[place]
    return out


def generation(job: Job, out: Path) -> None:
    """Sample answers with the generator that `whet.sample` builds; its parts are called so that loading is not timed."""
    work = job.work
    data = file_of(job.rows("prompts"), out)
    options = {
        "model": common(job, out)["model"],
        "data": data,
        "sampling": sampling(job),
        "out": str(out / "answers.jsonl"),
    }
    recipe = config.resolve(SampleRecipe, "sample", None, list(options.items()))
    tokenizer, chat = models.tokenizer_and_chat(recipe.model, recipe.sampling)
    prompts = sample.prompts_of(recipe.model, recipe.data, chat, recipe.sampling)
    with closing(sample.generator_of(recipe, tokenizer, chat, prompts)) as generator:
        if job.fixed:
            endless(generator)
        METER.begin()
        for step in range(work.steps):
            asked = prompts[step * work.prompts : (step + 1) * work.prompts]
            groups = evaluate.answers(generator, asked, recipe.sampling, count=work.answers, seed=step)
            counts = [len(one.ids) for group in groups for one in group.samples]
            METER.step(len(counts), sum(counts), answer_tokens=sum(counts))


def file_of(rows: list[dict[str, Any]], out: Path) -> str:
    """Write the rows to a file, and return its path."""
    path = out / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def main(job: Job) -> None:
    """Run the job and print its result."""
    with tempfile.TemporaryDirectory() as out:
        run = {"generation": generation, "sft": offline, "reward": offline, "dpo": offline}.get(job.algorithm, online)
        run(job, Path(out))
    job.done("whet", METER)


if __name__ == "__main__":
    main(JOB)
