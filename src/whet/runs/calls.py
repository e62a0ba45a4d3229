"""The functions beside training: sample, rank, evaluate, explain, plan, serve. Each resolves its recipe and runs."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from whet.errors import RecipeError
from whet.methods import catalogue
from whet.runs import config
from whet.runs.recipe import kind_of
from whet.runs.sources import Sources


def sample(recipe: str | None = None, *, tokenizer: Any = None, **fields: Any) -> Path:
    """Write `num_generations` answers for every prompt to the file `out`: `sample(model="DIR", data=prompts, out="a.jsonl")`.

    With `reward` the rows have `scores`; `keep="best"` writes the best answer alone. Returns the file. Raises RecipeError,
    DataError or ModelError for what cannot work, RewardError when a reward fails.
    """
    from whet.runs.sample import run_sample

    return _called("sample", run_sample, recipe, tokenizer, fields)


def rank(recipe: str | None = None, **fields: Any) -> Path:
    """Write rankings of the answers of a file to the file `out`, by a judge or by their scores. Returns the file."""
    from whet.runs.rank import run_rank

    return _called("rank", run_rank, recipe, None, fields)


def evaluate(recipe: str | None = None, *, tokenizer: Any = None, **fields: Any) -> dict[str, float]:
    """Win rate against another model under judges, the accuracy of a reward model, or the loss on held-out rows."""
    from whet.runs.evaluate import run_eval

    return _called("eval", run_eval, recipe, tokenizer, fields)


def serve(recipe: str | None = None, **fields: Any) -> str:
    """Run a vLLM server on loopback until it is interrupted. Returns how it ended."""
    from whet.runs.serve import run_serve

    return run_serve(config.resolve(kind_of("serve"), "serve", recipe, list(fields.items())))


def explain(method: str, recipe: str | None = None, **fields: Any) -> str:
    """What `whet.train` would do with the same arguments: the objective with its numbers, its arithmetic, where it ends."""
    from whet.runs.explain import explanation

    _trains(method, "explain")
    with tempfile.TemporaryDirectory() as folder:
        sources = Sources(Path(folder))
        plain = [(name, sources.plain(name, value)) for name, value in fields.items()]
        return explanation(method, config.resolve(kind_of(method), method, recipe, plain))


def plan(method: str, recipe: str | None = None, **fields: Any) -> str:
    """What `whet.train` would need on many GPUs: memory of each role, traffic, time. `plan("ppo", model="DIR", gpus=64)`."""
    from whet.runs.plan import plan as planned
    from whet.runs.plan import taken

    _trains(method, "plan")
    options, rest = taken(fields)
    return planned(method, config.resolve(kind_of(method), method, recipe, list(rest.items())), options)


def _called(verb: str, run: Callable[[Any], Any], recipe: str | None, tokenizer: Any, fields: dict[str, Any]) -> Any:
    """The result of a call whose Python objects lie in a temporary folder meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Sources(Path(folder), tokenizer)
        plain = [(name, sources.plain(name, value)) for name, value in fields.items()]
        resolved = config.resolve(kind_of(verb), verb, recipe, plain)
        sources.write()
        return run(resolved)


def _trains(method: str, about: str) -> None:
    known = {**catalogue.ONLINE, **catalogue.ONLINE_PREFERENCE, **catalogue.PREFERENCE}
    if method in ("sample", "rank", "eval", "serve", "demo", "explain", "plan"):
        raise RecipeError(f"{about}: {method} trains nothing; name a training method, such as ppo or dpo")
    if method not in ("pretrain", "sft", "reward") and method not in known:
        raise config.unknown_method(method)
