"""A training run as one object: the stages of the loop as calls, or all of them with `run`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from whet.data import Batch, Group
from whet.distributed import Workers
from whet.errors import RecipeError
from whet.learner import UpdateResult
from whet.loops import offline as offline_loop
from whet.loops import online as online_loop
from whet.loops.experience import RolloutScores
from whet.loops.interrupt import graceful
from whet.loops.online import MiniBatch, OnlineLoop, StepLog
from whet.methods import catalogue
from whet.runs import config, folder, generators, learners, offline, online, placed, sample
from whet.runs import recipe as fields
from whet.runs.recipe import kind_of
from whet.runs.sources import Sources

Resume = bool | Literal["auto"]
"""Continue the run in the folder; "auto": where there is one."""


class Session:
    """One attempt at a training run, from paths or from Python objects. A context manager.

    method      a method of the catalogue ("grpo", "dpo", "sft", ...)
    recipe      a YAML file with fields of the recipe; `fields` come on top, nested ones as dicts or with dots
    tokenizer   belongs to the models that are given as objects
    resume      True continues the run of the folder `out`; "auto" does so where there is one
    quiet       no progress

    Where a recipe has a path or name, an object may stand: a function as `reward`, a loaded model as `model`, a list of dicts
    or a `datasets.Dataset` as `data`. The run trains a copy of a given model. The folder `out` is written as by the command
    line. Raises RecipeError, DataError or ModelError for what cannot work, before any weights are loaded.

    An online session has the stages generate, score, measure, advantages, minibatches, forward_backward, optim_step and
    publish; an offline one has batches, forward_backward and optim_step.
    """

    def __init__(
        self,
        method: str,
        recipe: str | None = None,
        *,
        tokenizer: Any = None,
        resume: Resume = False,
        quiet: bool = True,
        **options: Any,
    ) -> None:
        if method not in ("pretrain", "sft", "reward") and method not in {
            **catalogue.ONLINE, **catalogue.ONLINE_PREFERENCE, **catalogue.PREFERENCE,
        }:  # fmt: skip
            raise config.unknown_method(method)
        out = Path(str(options.get("out") or f"runs/{method}"))
        self.sources = Sources(out / "inputs", tokenizer)
        plain = {name: self.sources.plain(name, value) for name, value in options.items()}
        self.method, self.quiet = method, quiet
        self.recipe: Any = config.resolve(kind_of(method), method, recipe, list(plain.items()))
        sample.threads(self.recipe.threads)
        placed.check_cluster(self.recipe)
        folder.trackers(self.recipe.trackers, None)
        going = folder.begun(self.recipe, method) if resume == "auto" else bool(resume)
        self.options = folder.restarted(folder.Options(going, quiet))
        self.folder = folder.checked(self.recipe, method, self.options)
        self.sources.write()
        self.job: online.OnlineJob | offline.OfflineJob
        if isinstance(self.recipe, fields.OnlineRecipe):
            self.job = online.prepare(method, self.recipe)
        else:
            self.job = offline.prepare(method, self.recipe)
        self._stack = ExitStack()
        self.loop: OnlineLoop | offline_loop.OfflineLoop | None = None

    # --- the parts -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Session":
        if self.recipe.cluster.address is not None:
            raise RecipeError("cluster: a session is one attempt in this process; whet.train places a run on a cluster")
        with ExitStack() as stack:
            workers, options = stack.enter_context(folder.working(self.recipe, self.options))
            learner = self._learner(workers, stack)
            stop = stack.enter_context(graceful())
            if isinstance(self.job, online.OnlineJob):
                job = self.job
                scorers = learners.shared_rewards(job.recipe, job.tokenizer, learner, workers)
                generator = generators.generator_of(job.recipe, job.chat, learner, job.longest)
                generator = stack.enter_context(closing(generator))
                self.loop = stack.enter_context(job.loop(learner, generator, scorers, self.folder, options, stop))
            else:
                self.loop = stack.enter_context(self.job.loop(learner, self.folder, options, stop))
            self._stack = stack.pop_all()
        return self

    def _learner(self, workers: Workers, stack: ExitStack) -> Any:
        learner: Any = self.job.make(workers)
        return stack.enter_context(closing(learner))

    def __exit__(self, *error: Any) -> None:
        loop, self.loop = self.loop, None
        try:
            self._stack.__exit__(*error)
        finally:
            if loop is not None and error[0] is None:
                loop.run.close()

    def run(self) -> Path:
        """Run every step that is left, and write the result. Returns the run folder."""
        run_loop(self._loop)
        return self.finish()

    def finish(self) -> Path:
        """Write the result of a run that reached its end to `model` in the run folder, which is returned."""
        self.job.finish(self._loop, self.folder)  # type: ignore[arg-type]
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
        """The model that is trained: the policy, or the reward model. With LoRA its PEFT wrapper."""
        roles = self._loop.learner.roles
        role = roles.get("policy") or roles["reward"]
        return role.model if role.wrapped is None else role.wrapped

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.job.tokenizer

    # --- the stages of an online run -------------------------------------------------------------------------------------

    def steps(self) -> Iterator[StepLog]:
        """The steps after the last checkpoint; each writes its metrics, its rollout and its checkpoint when the next one is
        asked for. Raises RuntimeError when weights were updated and not published."""
        yield from self._online("steps").steps()

    def generate(self) -> list[Group]:
        """The groups of this step: each prompt with its answers and their token ids."""
        return self._online("generate").generate()

    def score(self, groups: Sequence[Group]) -> RolloutScores:
        """The scores of every reward, by name."""
        return self._online("score").score(groups)

    def measure(self, groups: Sequence[Group], scores: RolloutScores) -> Batch:
        """The batch with the columns that the method reads (old_logp, ref_logp, old_value ...), without gradient."""
        return self._online("measure").measure(groups, scores)

    def advantages(self, batch: Batch) -> Batch:
        """The batch with score, token_reward, advantage and returns."""
        return self._online("advantages").advantages(batch)

    def rollout(self) -> Batch:
        """generate, score, measure and advantages."""
        groups = self.generate()
        return self.advantages(self.measure(groups, self.score(groups)))

    def minibatches(self, batch: Batch) -> Iterator[MiniBatch]:
        """The mini-batches of all epochs, cut as they were measured."""
        yield from self._online("minibatches").minibatches(batch)

    def publish(self) -> None:
        """Hand the new weights to the generator, and check that they arrived."""
        self._online("publish").publish()

    # --- the stages of an offline run ------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """One batch per step after the last checkpoint, with the columns that the objective reads."""
        loop = self._loop
        if isinstance(loop, OnlineLoop):
            raise RuntimeError(f"batches: {self.method} trains on its own answers; use session.steps()")
        yield from loop.batches()

    # --- both ------------------------------------------------------------------------------------------------------------

    def forward_backward(self, mini: Any, loss: Callable[..., Tensor] | None = None) -> UpdateResult:
        """Compute the gradient of the method's terms, or with `loss` in place of the first term's loss; every count is
        global. `loss` is a function whose positional parameters name columns; it returns one loss per token (B, T)."""
        return self._loop.forward_backward(mini, loss)

    def optim_step(self) -> UpdateResult:
        """Clip the gradient, take one optimizer step, follow the schedule."""
        return self._loop.optim_step()

    def update(self, mini: Any, loss: Callable[..., Tensor] | None = None) -> UpdateResult:
        """forward_backward and optim_step."""
        self.forward_backward(mini, loss)
        return self.optim_step()

    def metrics(self) -> Mapping[str, float]:
        """The metrics of this step so far."""
        return self._loop.metrics()

    def export(self, path: str | Path) -> Path:
        """Write the trained model with its tokenizer as a Hugging Face folder. Returns the folder."""
        where, roles = Path(path), self._loop.learner.roles
        role = "policy" if "policy" in roles else "reward"
        self._loop.learner.export(role, where, self.tokenizer, merge=self.recipe.model.export == "merged")
        return where


def run_loop(loop: Any) -> None:
    """Every step that a loop has left."""
    if isinstance(loop, OnlineLoop):
        online_loop.run_steps(loop)
    else:
        offline_loop.run_steps(loop)
