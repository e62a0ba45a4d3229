"""The training session: call the stages of the training loop one by one, or all of them with `run`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from whet.data import Batch, Group
from whet.distributed import Workers, first, launched
from whet.errors import Problems, RecipeError
from whet.learner import UpdateResult
from whet.loops import offline as offline_loop
from whet.loops import online as online_loop
from whet.loops.experience import RolloutScores
from whet.loops.interrupt import graceful
from whet.loops.online import MiniBatch, OnlineLoop, StepLog
from whet.methods import catalogue
from whet.registry import forget_modules
from whet.runs import (
    adapters,
    checks,
    config,
    early,
    folder,
    generators,
    learners,
    models,
    offline,
    online,
    placed,
    report,
    sample,
)
from whet.runs import recipe as fields
from whet.runs.recipe import kind_of
from whet.runs.sources import Sources
from whet.terminal import caution

Resume = bool | Literal["auto"]
"""True continues the run in the output folder; "auto" does so if the folder contains a run."""


class Session:
    """Train a model, given as paths or as Python objects. A context manager; models are loaded on entry.

    method      name of a training method ("grpo", "dpo", "sft", ...)
    recipe      path of a YAML recipe, or name of a shipped one
    tokenizer   tokenizer of the models that are given as objects
    resume      True or "auto" continues the run in the folder `out` if it contains one; True says so if it does not
    quiet       True prints no progress
    accept_changed  names of inputs that may have changed since the run began: a field ("data.train"), a path, or a frozen role
    options     recipe fields that override the recipe; nested fields as dicts or with dotted names

    Python objects can replace paths and names: a function as `reward`, a loaded model as `model`, a list of dicts or a
    `datasets.Dataset` as `data`. The session trains a copy of a given model. It writes the same files to `out` as the
    command line. The constructor raises RecipeError, DataError or ModelError for invalid arguments and loads no weights.
    Entering the session loads the models and raises the same errors for what can be checked only then.

    An online session has the stages generate, score, measure, advantages, minibatches, forward_backward, optim_step and
    publish. An offline session has the stages batches, forward_backward and optim_step. A stage raises RuntimeError outside
    the `with` block or if the session does not have it.
    """

    def __init__(
        self,
        method: str,
        recipe: str | Path | None = None,
        *,
        tokenizer: Any = None,
        resume: Resume = False,
        quiet: bool = True,
        accept_changed: str | Sequence[str] = (),
        **options: Any,
    ) -> None:
        config.check_call(method, recipe)
        if method not in catalogue.TRAINED:
            raise config.unknown_method(method)
        forget_modules()
        given = config.recipe_tree(recipe)
        out = Path(str(options.get("out") or given.get("out") or f"runs/{method}"))
        self.sources = Sources(out / "inputs", tokenizer)
        plain = {name: self.sources.plain(name, value) for name, value in options.items()}
        self.method, self.quiet = method, quiet
        resolved = config.resolve(kind_of(method), method, recipe, list(plain.items()), given)
        self.recipe: fields.TrainingRecipe = adapters.completed(resolved)
        accepted = (accept_changed,) if isinstance(accept_changed, str) else tuple(accept_changed)
        problems = (
            Problems()
        )  # what is wrong with paths, options and packages is told at once, before files are written
        with problems:
            sample.threads(self.recipe.threads)
        with problems:
            placed.check_cluster(self.recipe)
        if self.recipe.cluster.address is None and not launched():
            with problems:
                learners.backend_of(self.recipe, 1)
            with problems:
                models.check_machine(self.recipe.model)
        with problems:
            folder.trackers(self.recipe.trackers, None)
        self.folder, self.options = folder.of(self.recipe, method), folder.Options(bool(resume), quiet, accepted)
        with problems:
            self.options = folder.restarted(self.options)
            self.options = folder.checked(self.recipe, method, self.options, config.recipe_file(recipe))
            if resume is True and not self.options.resume and first():
                caution(f"there is no run in {self.folder} yet; it starts")
            folder.check_inputs(self.recipe, method, self.options)
        if problems.found and self.sources.pending:
            problems.tell()
        self.sources.write()
        if self.options.resume and not problems.found:
            self.recipe = folder.resumed(self.recipe, method)
        if not self.options.resume:
            early.collect(method, self.recipe, problems)
        self.job: online.OnlineJob | offline.OfflineJob
        if isinstance(self.recipe, fields.OnlineRecipe):
            self.job = online.prepare(method, self.recipe, problems=problems)
        else:
            self.job = offline.prepare(method, self.recipe, problems=problems)
        folder.check_steps(self.folder, self.job.plan.steps, self.options)
        if first() and not quiet:
            critic = isinstance(self.job, online.OnlineJob) and "critic" in self.job.algorithm.roles()
            for line in (f"{method}: {self.job.length()}", *checks.optim_lines(self.recipe, critic)):
                caution(line)
        self._stack = ExitStack()
        self._exported: set[Path] = set()
        self.loop: OnlineLoop | offline_loop.OfflineLoop | None = None

    # --- the parts -------------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """True if the run that is resumed has ended, and has no checkpoint of its end (`train.save_last`)."""
        return folder.finished(self.folder, self.job.plan.steps, self.options)

    def __enter__(self) -> "Session":
        if self.recipe.cluster.address is not None:
            raise RecipeError("cluster: a session is one attempt in this process; whet.train places a run on a cluster")
        if self.finished:
            raise RecipeError(
                f"resume: the run in {self.folder} has ended, without a checkpoint of its end; load its model from "
                f"{self.folder / 'model'}"
            )
        with ExitStack() as stack:
            workers, options = stack.enter_context(folder.working(self.recipe, self.options))
            loop = self._parts(workers, stack)
            stack.enter_context(folder.locked(self.recipe, self.method, options))
            self.loop = stack.enter_context(loop(options))
            self._stack = stack.pop_all()
        return self

    def _parts(self, workers: Workers, stack: ExitStack) -> Callable[[folder.Options], Any]:
        """Load the models. Return a function that opens the run folder and builds the loop."""
        job, stop = self.job, stack.enter_context(graceful(at_once=workers.size == 1))
        learner: Any = job.make(workers)
        stack.enter_context(closing(learner))
        if isinstance(job, offline.OfflineJob):
            return lambda options: job.loop(learner, self.folder, options, stop)
        scorers = learners.shared_rewards(job.recipe, job.tokenizer, learner, workers)
        generator = stack.enter_context(closing(generators.generator_of(job.recipe, job.chat, learner, job.longest)))
        return lambda options: job.loop(learner, generator, scorers, self.folder, options, stop)

    def __exit__(self, *error: Any) -> None:
        loop, self.loop = self.loop, None
        try:
            self._stack.__exit__(*error)
        finally:
            if loop is not None:
                loop.run.close()

    def run(self) -> Path:
        """Run all remaining steps and write the trained model. Return the run folder.
        Raises RunStopped if a self-check fails, RewardError if a reward fails."""
        run_loop(self._loop)
        return self.finish()

    def finish(self) -> Path:
        """Write the trained model to `model` and the report to `report.html` in the run folder. Return the run folder. Call it after
        the last step."""
        self.job.finish(self._loop, self.folder)  # type: ignore[arg-type]
        if self._loop.learner.workers.first:
            report.at_end(self.folder)
        return self.folder

    @property
    def _loop(self) -> Any:
        if self.loop is None:
            raise RuntimeError("a session is used as a context manager: with whet.Session(...) as session")
        return self.loop

    def _online(self, stage: str) -> OnlineLoop:
        loop = self._loop
        if not isinstance(loop, OnlineLoop):
            raise RuntimeError(f"{stage}: {self.method} trains on a file; use session.batches()")
        return loop

    @property
    def model(self) -> Any:
        """The model being trained: the policy or the reward model. With LoRA, its PEFT wrapper."""
        roles = self._loop.learner.roles
        role = roles.get("policy") or roles["reward"]
        return role.model if role.wrapped is None else role.wrapped

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the trained model."""
        return self.job.tokenizer

    # --- the stages of an online run -------------------------------------------------------------------------------------

    def steps(self) -> Iterator[StepLog]:
        """Iterate over the steps after the last checkpoint. When a step ends, write its metrics and rollout,
        and its checkpoint if due. Raises RuntimeError if weights were updated but not published, or if the step made no
        update: a step cannot be skipped."""
        yield from self._online("steps").steps()

    def generate(self) -> list[Group]:
        """Generate the groups of this step: each prompt with its answers and their token ids. Call it once per step.
        Raises WorkerDied if engines died more often than they may be restarted."""
        return self._online("generate").generate()

    def score(self, groups: Sequence[Group]) -> RolloutScores:
        """Score the B answers of the groups with every reward. `named` maps reward names to scores (B,), before weights; `applies`
        maps those of rewards that do not apply to every answer to bool (B,). Raises RewardError if a reward fails, or if none
        applies to an answer."""
        return self._online("score").score(groups)

    def measure(
        self,
        groups: Sequence[Group],
        scores: RolloutScores | Mapping[str, Tensor | Sequence[float | None]],
        *,
        defer: bool = False,
    ) -> Batch:
        """Compute the columns that the method reads (old_logp, ref_logp, old_value, ...), (B, T) each, without gradient.
        T is the length of the longest answer, in tokens; B counts answers, or both answers of each pair. `scores` are those of
        `score`, or own scores: for each reward by its name a tensor (B,), or a list with None where it does not apply. With
        `defer`, as in `whet.train`, old_logp is left to the update where that is possible (`rollout.defer_old_logp`): the batch
        does not have it before."""
        loop = self._online("measure")
        return loop.measure(groups, scores, defer=defer and loop.plan.defer)

    def advantages(self, batch: Batch) -> Batch:
        """Add the columns score (B,), token_reward, advantage and returns (B, T); returns only with a critic. Methods on
        pairs have these columns already after `measure`. Raises RunStopped if a self-check fails."""
        return self._online("advantages").advantages(batch)

    def rollout(self) -> Batch:
        """Call generate, score, measure and advantages. Return the batch."""
        groups = self.generate()
        return self.advantages(self.measure(groups, self.score(groups)))

    def minibatches(self, batch: Batch) -> Iterator[MiniBatch]:
        """Iterate over the mini-batches of all epochs. Stop early if KL(old || new) of an update exceeds `target_kl`."""
        yield from self._online("minibatches").minibatches(batch)

    def publish(self) -> None:
        """Send the new weights to the generator; update the EMA copy and the reference if due.
        Raises RunStopped if the generator does not compute log-probabilities with the new weights."""
        self._online("publish").publish()

    # --- the stages of an offline run ------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """Iterate over one batch per step after the last checkpoint, with the columns that the objective reads.
        Raises RuntimeError if a batch was not trained on before the next one is requested."""
        loop = self._loop
        if isinstance(loop, OnlineLoop):
            raise RuntimeError(f"batches: {self.method} trains on its own answers; use session.steps()")
        yield from loop.batches()

    # --- both ------------------------------------------------------------------------------------------------------------

    def forward_backward(self, mini: MiniBatch | Batch, loss: Callable[..., Tensor] | None = None) -> UpdateResult:
        """Compute the gradient of the method's loss terms; all means are over the whole mini-batch. `loss` replaces the
        loss of the first term: a function whose positional parameters name columns (logp, old_logp, ref_logp, advantage,
        mask, ...) or what the method's loss computes (ratio; for pairs gap, chosen, rejected). It returns what the reduction
        of that term averages: for a policy loss (B, T), one loss per token; for pairs (E,), one per pair.
        Raises RuntimeError if called twice without optim_step, RunStopped if a loss is not finite."""
        return self._loop.forward_backward(mini, loss)

    def optim_step(self) -> UpdateResult:
        """Clip the gradient and take one optimizer step at the scheduled learning rate. Raises RuntimeError if there
        is no gradient, RunStopped if the gradient norm is not finite or a self-check fails."""
        return self._loop.optim_step()

    def update(self, mini: MiniBatch | Batch, loss: Callable[..., Tensor] | None = None) -> UpdateResult:
        """Call forward_backward and optim_step. Return the result of optim_step."""
        self.forward_backward(mini, loss)
        return self.optim_step()

    def metrics(self) -> Mapping[str, float]:
        """Return the metrics of the current step so far."""
        return self._loop.metrics()

    def export(self, path: str | Path) -> Path:
        """Write the trained model and its tokenizer to a folder in Hugging Face format. Return the folder. Raises RecipeError
        for a folder that contains anything else than a model that this run has exported."""
        where, roles = Path(path), self._loop.learner.roles
        folder.check_export(where, self.folder, self._exported)
        self._exported.add(where.resolve())
        role = "policy" if "policy" in roles else "reward"
        self._loop.learner.export(
            role, where, self.tokenizer, merge=self.recipe.model.export == "merged", end_ids=self.job.chat.end_ids
        )
        return where


def run_loop(loop: OnlineLoop | offline_loop.OfflineLoop) -> None:
    """Run all remaining steps of an online or offline loop."""
    if isinstance(loop, OnlineLoop):
        online_loop.run_steps(loop)
    else:
        offline_loop.run_steps(loop)
