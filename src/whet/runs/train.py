"""whet.train: run a training method in this process, under torchrun, or on a Ray cluster."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from whet.cluster import Attempt
from whet.distributed import first
from whet.loops.interrupt import graceful
from whet.runs import folder, generators, learners, online, placed
from whet.runs.session import Resume, Session, run_loop
from whet.runs.summary import summary
from whet.terminal import caution, say


def train(
    method: str,
    recipe: str | Path | None = None,
    *,
    tokenizer: Any = None,
    resume: Resume = False,
    quiet: bool = True,
    accept_changed: str | Sequence[str] = (),
    **fields: Any,
) -> Path:
    """Train with a method from start to end. Return the run folder. Takes the arguments of `whet.Session`.

    On a cluster (`cluster=...`), workers that die are restarted and training continues from the last checkpoint.

    Raises RecipeError, DataError or ModelError for invalid arguments, RewardError if a reward function fails, RunStopped if
    a self-check fails, CheckpointError if a checkpoint cannot be loaded, RestartsExhausted if workers die too often.
    """
    session = Session(
        method, recipe, tokenizer=tokenizer, resume=resume, quiet=quiet, accept_changed=accept_changed, **fields
    )
    if session.finished:
        if first():
            caution(f"the run in {session.folder} has ended; its model is {session.folder / 'model'}")
        return session.folder
    if session.recipe.cluster.address is not None:
        _on_cluster(session)
    else:
        with session:
            session.run()
    if first() and not quiet:
        say(f"\n{method}: {summary(session.folder)}", error=True)
    return session.folder


def _on_cluster(session: Session) -> None:
    job, recipe = session.job, session.recipe

    def attempt(place: Attempt, resume: bool) -> None:
        options = replace(session.options, resume=resume)
        if isinstance(job, online.OnlineJob):
            own, send = job.recipe, partial(placed.carrying, job.recipe)
            inside = None if own.cluster.engines else send(partial(placed.answers_inside, own, job.longest))
            learner = place.learner(send(job.make), push=generators.push_of(own), answers=inside)  # type: ignore[arg-type]
            engines = [
                send(partial(placed.engine_alone, own, job.longest, number)) for number in range(own.cluster.engines)
            ]
            generator = place.generator(engines)
            scorers = (
                place.rewards(send(partial(placed.rewards_alone, own)))
                if own.cluster.rewards
                else learners.shared_rewards(own, job.tokenizer, learner)
            )
            with graceful() as stop, job.loop(learner, generator, scorers, session.folder, options, stop) as loop:
                run_loop(loop)
                loop.run.close()
                job.finish(loop, session.folder)
        else:
            learner = place.learner(placed.carrying(recipe, job.make))  # type: ignore[arg-type]
            with graceful() as stop, job.loop(learner, session.folder, options, stop) as rows:
                run_loop(rows)
                rows.run.close()
                job.finish(rows, session.folder)

    with folder.locked(session.recipe, session.method, session.options):
        placed.on_cluster(recipe, attempt, session.options.resume, session.options.quiet)
