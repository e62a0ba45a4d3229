"""Build the rewards of a recipe (functions, reward models, HTTP services), and check them before models are loaded."""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from whet.calling.state import restored
from whet.data import Chat, Group, Prompt, chat_format, extras_of
from whet.errors import ModelError, Problems, RecipeError
from whet.models import load, lora
from whet.models.folders import is_adapter
from whet.models.roles import Role, readout_of
from whet.registry import load_object
from whet.rewards import REWARDS, Reward, Scores, Weighted, functions
from whet.rewards.functions import FunctionReward, ObjectReward
from whet.rewards.model import ModelReward
from whet.runs import adapters, config, models
from whet.runs import recipe as fields
from whet.runs.early import refuse_options

Kind = Literal["model", "http", "registered", "object"]
"""The kinds of reward sources. An "object" is a user's function, class, or instance of a class."""


def kind_of(source: str) -> Kind:
    """Return the kind of a reward source: a model folder or hub name, a URL, a name of the registry, or a user's object."""
    if source.startswith(("http://", "https://")):
        return "http"
    if ":" in Path(source).name:
        return "object"
    return "registered" if source in REWARDS.names() and not Path(source).is_dir() else "model"


def is_model(source: str) -> bool:
    """Return True if a reward source is a model folder or hub name."""
    return kind_of(source) == "model"


def _check_name(source: str, where: str) -> None:
    """Raise RecipeError if a source is no folder, and almost the name of a reward."""
    near = difflib.get_close_matches(source, [] if Path(source).exists() else REWARDS.names(), n=1, cutoff=0.75)
    if near:
        raise RecipeError(f"{where}: unknown reward {source!r}; did you mean {near[0]!r}?")


def made(source: str, options: Mapping[str, Any], where: str) -> Reward:
    """Build the reward of a source that is not a model. Raises RecipeError for options that it does not have.

    A function, and a class without an option `timeout` of its own, have the limit `timeout` (see `functions.Options`).
    """
    kind = kind_of(source)
    name = "http" if kind == "http" else source
    if kind == "object" and not has_score(source):
        found = _loaded(source)
        if not callable(found):
            raise RecipeError(f"{source}: it is a {type(found).__name__}, not a function")
        if not inspect.isclass(found):
            for option in options.keys() - {"timeout"}:
                raise RecipeError(f"{where}.{option}: a function has no option but timeout; leave it out")
            own = config.converted(dict(options), functions.Options, where)
            return FunctionReward(found, name_of(source), timeout=own.timeout, source=source, where=where)
    limit = None
    if options.get("timeout") is not None and not is_model(source):
        adapter = REWARDS.find(name, where)
        if "timeout" not in config.fields_of(adapter.options):
            limit = config.converted({"timeout": options["timeout"]}, functions.Options, where).timeout
            options = {key: value for key, value in options.items() if key != "timeout"}
    chosen = adapters.chosen(REWARDS, adapters.named(name, options, where), where)
    chosen.check(where)
    if limit is not None:
        given = {one.name: getattr(chosen.options, one.name) for one in dataclasses.fields(chosen.options)}
        home = chosen.make(source) if source in REWARDS.built_in else chosen.adapter.home
        found = _loaded(source) if kind == "object" else home
        return functions.limited(source, found, given, name_of(source), limit, where)
    if kind == "http":
        return chosen.make(source)
    with restored():
        return ObjectReward(chosen.make(source), name_of(source))


def has_score(source: str) -> bool:
    """Return True if a source names a user's class or instance with a method `score`, and not a function."""
    return kind_of(source) == "object" and hasattr(_loaded(source), "score")


def _loaded(source: str) -> Any:
    """Load a user's object. The global state that its file changes is restored."""
    with restored():
        return load_object(source)


def reward_roles(recipe: fields.OnlineRecipe, trunk: Role | None = None) -> dict[str, Role]:
    """Load the reward models of a recipe as frozen roles. `reward{i}` is the role of reward i; functions have none.

    With a shared `trunk`, reward models that are saved as adapters are added to it.
    """
    out: dict[str, Role] = {}
    for number, one in enumerate(recipe.reward):
        name = f"reward{number}"
        if not is_model(one.source):
            continue
        if trunk is not None and is_adapter(one.source):
            head = lora.add_from_folder(trunk.wrapped, name, one.source)
            if load.has_tokenizer(one.source):
                own = load.load_tokenizer(models.source_of(recipe.model, one.source))
                rows = trunk.model.get_input_embeddings().weight.shape[0]
                if len(own) > rows:
                    raise ModelError(
                        f"{one.source}: its tokenizer has {len(own)} ids and the trunk {rows} embeddings; set --trunk separate"
                    )
            out[name] = Role(
                name, trunk.model, False, wrapped=trunk.wrapped, adapter=name, head=head, **readout_of(one.source)
            )
        else:
            out[name] = reward_role(one.source, recipe.model, name)
        if one.dense and out[name].whole_text:
            raise ModelError(
                f"reward.{number}.dense: {one.source} has one score per text and none of tokens; leave it out"
            )
    return out


def judge_roles(recipe: fields.OnlineRecipe) -> dict[str, Role]:
    """Load the judges that are reward models, as frozen roles: `judge{i}` is the role of judge i."""
    judges = [(f"judge{number}", one.source) for number, one in enumerate(recipe.eval.judge)]
    return {name: reward_role(source, recipe.model, name) for name, source in judges if is_model(source)}


def rewards_of(recipe: fields.OnlineRecipe, tokenizer: Any, read: Callable[..., Any]) -> list[Weighted]:
    """Build the rewards of a recipe. `read(role, batch, names)` returns columns that a reward model computes.
    Raises RecipeError for options that a reward does not have."""
    out: list[Weighted] = []
    for number, one in enumerate(recipe.reward):
        if one.dense and not is_model(one.source):
            raise RecipeError(f"reward.{number}.dense: a function decides itself; it returns one list per answer")
        own: Reward
        if is_model(one.source):
            _check_name(one.source, f"reward.{number}")
            refuse_options(one.options, f"reward.{number}")
            on_trunk = recipe.trunk == "shared" and is_adapter(one.source)
            chat, same = chat_format(tokenizer, arguments=recipe.model.chat_template_kwargs), True
            if load.has_tokenizer(one.source) or not on_trunk:  # an adapter without a tokenizer has the trunk's
                chat, same = own_chat(one.source, recipe.model, tokenizer)
            ends = step_ends(tokenizer, one.step)
            own = ModelReward(partial(read, f"reward{number}"), chat, same=same, dense=one.dense, ends=ends)
        else:
            own = made(one.source, one.options, f"reward.{number}")
        out.append(Weighted(one.name or name_of(one.source), own, one.weight))
    return distinct(out)


def check_rewards(recipe: fields.OnlineRecipe, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    """Raise RecipeError or ModelError if a reward cannot be found, read, or called with the columns of the prompts, or one error
    for several rewards. Without prompts, which could not be read, what depends on them is left out. Load no models."""
    problems = Problems()
    with problems:
        found = rewards_of(recipe, tokenizer, lambda *_: {})
        if prompts:
            check_columns(found, prompts)
    for number, one in enumerate(recipe.reward):
        with problems:
            if not math.isfinite(one.weight):
                raise RecipeError(f"reward.{number}.weight: expected a finite number, got {one.weight}")
            if is_model(one.source):
                check_scorer(f"reward.{number}", one.source, recipe, tokenizer, prompts)
    problems.tell()


def check_scorer(where: str, path: str, recipe: fields.OnlineRecipe, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    """Raise ModelError if a folder contains no reward model, RecipeError if the longest prompt with an answer has more tokens than
    it has positions. Without prompts, which could not be read, the second is left out."""
    _check_name(path, where)
    _check_scorer(path, recipe.model)
    if not prompts:
        return
    limit = load.positions(models.source_of(recipe.model, path))
    chat, same = own_chat(path, recipe.model, tokenizer) if load.has_tokenizer(path) else (chat_format(tokenizer), True)
    lengths = (len(one.ids if same else chat.prompt_ids(one.messages, extras_of(one.row))) for one in prompts)
    longest = max(lengths) + recipe.sampling.max_new_tokens + len(chat.closing_ids)
    if longest > limit:
        raise RecipeError(
            f"{where}: {path} has {limit} positions, and a prompt with its answer has up to {longest} tokens; lower "
            "--max-new-tokens, or leave long prompts out with --data.max-tokens and --data.too-long drop"
        )


def check_columns(rewards: Sequence[Weighted], prompts: Sequence[Prompt], where: str = "reward") -> None:
    """Raise RecipeError if a reward function cannot be called with the columns of these prompt rows, or a ready-made reward lacks
    one, or an error if the process of a reward with a limit cannot load it."""
    problems = Problems()
    for number, one in enumerate(rewards):
        with problems:
            if isinstance(one.reward, FunctionReward):
                one.reward.check(prompts, f"{where}.{number}")
            if isinstance(one.reward, ObjectReward) and hasattr(one.reward.own, "check_rows"):
                one.reward.own.check_rows(prompts, f"{where}.{number}", len(rewards) == 1)
            if isinstance(one.reward, (FunctionReward, ObjectReward)):
                one.reward.call.start()
    problems.tell()


def _check_scorer(path: str, model: fields.Frozen) -> None:
    """Raise ModelError if the folder contains no reward model."""
    if not load.is_scorer(path, model.trust_remote_code):
        raise ModelError(f"{path}: no reward model and no judge, it has no scalar head; train one with whet reward")


def own_chat(path: str, model: fields.Frozen, tokenizer: Any) -> tuple[Chat, bool]:
    """Return the chat format of a reward model, and whether its tokenizer and template are those of the policy."""
    own = load.load_tokenizer(models.source_of(model, path))
    same = models.is_same(own, tokenizer)
    if same:
        return chat_format(tokenizer, arguments=model.chat_template_kwargs), True
    if not own.chat_template:
        raise ModelError(
            f"{path}: its tokenizer differs from the policy's and has no chat template; set tokenizer.chat_template and save it in "
            "this folder"
        )
    return chat_format(own), False


def judge_of(
    judge: fields.JudgeSpec, model: fields.Frozen, tokenizer: Any, read: Callable[..., Any], where: str
) -> Weighted:
    """Build a judge of an evaluation while training. `read(batch, names)` returns columns that a reward model computes."""
    name = judge.name or name_of(judge.source)
    if not is_model(judge.source):
        return Weighted(name, made(judge.source, judge.options, where))
    _check_name(judge.source, where)
    refuse_options(judge.options, where)
    chat, same = own_chat(judge.source, model, tokenizer)
    return Weighted(name, ModelReward(read, chat, same=same))


def judges(recipe: fields.EvalRecipe, tokenizer: Any, prompts: Sequence[Prompt]) -> list[Weighted]:
    """Build the judges of an evaluation, and check that the functions take the columns of the prompts."""
    found = all_of(recipe.judge, recipe.model, tokenizer, recipe.max_tokens_per_micro_batch, "judge")
    check_columns(found, prompts, "judge")
    return distinct(found)


def distinct(rewards: Sequence[Weighted]) -> list[Weighted]:
    """Return the rewards with unique names: append a number to each name that is already taken."""
    out: list[Weighted] = []
    for number, one in enumerate(rewards):
        taken = any(one.name == other.name for other in out)
        out.append(replace(one, name=f"{one.name}_{number}") if taken else one)
    return out


class _Unbuilt:
    """A reward whose scores are in the record of a run."""

    def score(self, groups: Sequence[Group]) -> Scores:
        raise RuntimeError("the scores of a replay are those of its record")


def unbuilt(recipe: fields.OnlineRecipe) -> list[Weighted]:
    """Return the names and weights of the rewards of a recipe, without loading or calling them."""
    return distinct([Weighted(one.name or name_of(one.source), _Unbuilt(), one.weight) for one in recipe.reward])


def step_ends(tokenizer: Any, separator: str | None) -> Callable[[int], bool] | None:
    """Return a function that tells whether the text of a token id contains the separator, so that a step ends there.
    None without a separator."""
    if separator is None:
        return None
    return cache(lambda token: separator in tokenizer.decode([token]))


def reward(
    source: str,
    model: fields.Frozen,
    tokenizer: Any,
    budget: int | None,
    options: Mapping[str, Any] = {},
    where: str = "reward",
    name: str | None = None,
) -> Weighted:
    """Build a reward in this process from a source, named by `name` or else `name_of`. `budget` is tokens per micro-batch."""
    name = name or name_of(source)
    if not is_model(source):
        return Weighted(name, made(source, options, where))
    _check_name(source, where)
    refuse_options(options, where)
    chat, same = own_chat(source, model, tokenizer)
    return Weighted(name, ModelReward(reward_role(source, model, name), chat, same=same, budget=budget))


def all_of(
    given: Sequence[fields.RewardSpec | fields.JudgeSpec],
    model: fields.Frozen,
    tokenizer: Any,
    budget: int | None,
    where: str,
) -> list[Weighted]:
    """Build rewards in this process, in the order in which they are given. The reward models are loaded after all others are
    built, so that a wrong option or a missing package is told early. See `reward` for the arguments."""
    found: dict[int, Weighted] = {}
    for number in sorted(range(len(given)), key=lambda number: is_model(given[number].source)):
        one = given[number]
        found[number] = reward(
            one.source, model, tokenizer, budget, one.options, f"{where}.{number}", getattr(one, "name", None)
        )
    return [found[number] for number in range(len(given))]


def name_of(source: str) -> str:
    """Return the name of a reward in logs: the function, host, or folder (for a folder called "model", its parent)."""
    kind = kind_of(source)
    if kind == "http":
        return urlsplit(source).netloc.replace(":", "_")
    if kind == "registered":
        return source
    if kind == "object":
        return source.partition("#")[0].rpartition(":")[2]
    path = Path(source)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def reward_role(path: str, model: fields.Frozen, name: str) -> Role:
    """Load a frozen reward model as a role. Raises ModelError if the folder contains no reward model."""
    _check_scorer(path, model)
    own = load.load_tokenizer(models.source_of(model, path))
    return models.scorer_role(name, replace(model, quantize="none"), own, trained=False, seed=0, path=path)
