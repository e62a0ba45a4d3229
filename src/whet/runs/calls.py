"""The public functions other than training: sample, rank, evaluate, serve, explain, plan and verify_resume."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from whet.errors import RecipeError
from whet.methods import catalogue
from whet.registry import forget_modules
from whet.runs import config, early
from whet.runs.recipe import kind_of
from whet.runs.sources import Sources


def sample(recipe: str | Path | None = None, *, tokenizer: Any = None, **fields: Any) -> Path:
    """Generate answers to prompts and write them to the file `out`: `sample(model="DIR", data=prompts, out="a.jsonl")`.

    Write one row per prompt, with `num_generations` answers in `responses`. With `reward`, also write their `scores`.
    `keep="best"` writes only the best answer. Return the path of the file. Raises RecipeError, DataError or ModelError for
    invalid arguments, RewardError if a reward function fails.
    """

    def run(resolved: Any) -> Any:
        from whet.runs.sample import run_sample

        return run_sample(resolved)

    return _called("sample", run, recipe, tokenizer, fields)


def rank(recipe: str | Path | None = None, **fields: Any) -> Path:
    """Rank the answers in a file by a judge function or by their `scores`, and write them with `ranks` to the file `out`.
    Return its path. Raises UserError for invalid arguments or rows, RewardError if the judge fails."""

    def run(resolved: Any) -> Any:
        from whet.runs.rank import run_rank

        return run_rank(resolved)

    return _called("rank", run, recipe, None, fields)


def evaluate(recipe: str | Path | None = None, *, tokenizer: Any = None, **fields: Any) -> dict[str, float]:
    """Evaluate a model. Return the metrics by name: the win rate (0 to 1) against another model under judges, the loss and
    accuracy of a reward model, or the loss of a language model in nats per token. Raises RecipeError, DataError or
    ModelError for invalid arguments, RewardError if a judge fails."""

    def run(resolved: Any) -> Any:
        from whet.runs.evaluate import run_eval

        return run_eval(resolved)

    return _called("eval", run, recipe, tokenizer, fields)


def serve(recipe: str | Path | None = None, **fields: Any) -> str:
    """Run a vLLM server on the loopback address until SIGINT or SIGTERM. Return "ended". Raises RecipeError for invalid
    arguments, if vLLM is not installed or if the server exits by itself, ModelError if the server does not start."""
    from whet.runs.serve import run_serve

    return run_serve(config.resolve(kind_of("serve"), "serve", recipe, list(fields.items())))


def explain(method: str, recipe: str | Path | None = None, *, tokenizer: Any = None, **fields: Any) -> str:
    """Describe what `whet.train` would do with these arguments: the objective with its numbers, the optimum, the
    numbers of answers and updates, the trained roles. Load no weights. Raises RecipeError for invalid arguments."""
    from whet.runs.explain import explanation

    _trains(method, "explain")
    with tempfile.TemporaryDirectory() as folder:
        return explanation(method, _resolved(method, recipe, Sources(Path(folder), tokenizer), fields))


def plan(method: str, recipe: str | Path | None = None, *, tokenizer: Any = None, **fields: Any) -> str:
    """Estimate memory, network traffic and time of `whet.train` on several GPUs: `plan("ppo", model="DIR", gpus=64)`.
    Raises RecipeError for invalid arguments or if the run does not fit, ModelError if a model folder has no config.json."""
    from whet.runs.plan import plan as planned
    from whet.runs.plan import taken

    _trains(method, "plan")
    options, rest = taken(fields)
    with tempfile.TemporaryDirectory() as folder:
        return planned(method, _resolved(method, recipe, Sources(Path(folder), tokenizer), rest), options)


def verify_resume(
    method: str, recipe: str | Path | None = None, *, tokenizer: Any = None, quiet: bool = True, **fields: Any
) -> str | None:
    """Check that a killed run of `whet.train` ends as an uninterrupted one: train twice in processes of their own, with `kills`
    kills in the second run, and compare the runs to the bit. `steps` shortens both. Write to the new folder `out`.

    Return what differs first (a metric, a column of a rollout, a tensor) with both values, or None if nothing differs. Raises
    RecipeError for invalid arguments, WhetError if a run fails.
    """
    from whet.runs.verify import taken, verified

    _trains(method, "verify-resume")
    options, out, rest = taken(fields)
    resolved = _resolved(method, recipe, Sources(out / "inputs", tokenizer), rest)
    return verified(method, resolved, options, out, quiet)


def _called(
    verb: str, run: Callable[[Any], Any], recipe: str | Path | None, tokenizer: Any, fields: dict[str, Any]
) -> Any:
    """Resolve the recipe and call `run` with it, which loads torch. Python objects are written to a temporary folder for the
    call."""
    config.check_call(verb, recipe)
    early.refuse(verb, recipe, fields)
    with tempfile.TemporaryDirectory() as folder:
        return run(_resolved(verb, recipe, Sources(Path(folder), tokenizer), fields))


def _resolved(verb: str, recipe: str | Path | None, sources: Sources, fields: Mapping[str, Any]) -> Any:
    """Resolve the recipe of a verb, and write the files that stand for Python objects."""
    config.check_call(verb, recipe)
    forget_modules()
    plain = [(name, sources.plain(name, value)) for name, value in fields.items()]
    resolved = config.resolve(kind_of(verb), verb, recipe, plain)
    sources.write()
    if hasattr(resolved, "learner"):
        from whet.runs.adapters import completed

        resolved = completed(resolved)
    return resolved


def _trains(method: str, about: str) -> None:
    config.check_call(method, None)
    if method in ("sample", "rank", "eval", "serve", "demo", "explain", "plan", "verify_resume"):
        raise RecipeError(f"{about}: {method} trains nothing; name a training method, such as ppo or dpo")
    if method not in catalogue.TRAINED:
        raise config.unknown_method(method)
