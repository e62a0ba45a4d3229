"""The attempts of a session: one in this process, or one after the other on a Ray cluster."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from whet.cluster import Attempt
from whet.distributed import first
from whet.errors import RunStopped
from whet.loops.interrupt import graceful
from whet.runs import early, folder, generators, learners, online, placed, report
from whet.runs.session import Session, run_loop
from whet.runs.summary import summary
from whet.terminal import caution, say


def trained(session: Session) -> Path:
    """Run a session to its end, if it has not ended before, and print a summary unless it is quiet. Return its run folder."""
    if session.finished:
        if first():
            caution(f"the run in {session.folder} has ended; its model is {session.folder / 'model'}")
        return session.folder
    try:
        if session.recipe.cluster.address is not None:
            _on_cluster(session)
        else:
            with session:
                session.run()
    except RunStopped:
        if first() and early.begun(session.folder):
            report.at_end(session.folder)
        raise
    if first() and not session.quiet:
        say(f"\n{session.method}: {summary(session.folder)}", error=True)
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
                report.at_end(session.folder)
        else:
            learner = place.learner(placed.carrying(recipe, job.make))  # type: ignore[arg-type]
            with graceful() as stop, job.loop(learner, session.folder, options, stop) as rows:
                run_loop(rows)
                rows.run.close()
                job.finish(rows, session.folder)
                report.at_end(session.folder)

    with folder.locked(session.recipe, session.method, session.options):
        placed.on_cluster(recipe, attempt, session.options.resume, session.options.quiet)
