"""How the rewards of a recipe are made: functions, reward models, and what is refused before anything is loaded."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from whet.data import Chat, chat_format
from whet.errors import ModelError, RecipeError
from whet.models import load, lora
from whet.models.roles import Role, readout_of
from whet.registry import load_object
from whet.rewards import REWARDS, Reward, Weighted
from whet.rewards.functions import FunctionReward, load_function
from whet.rewards.model import ModelReward
from whet.runs import adapters, models
from whet.runs import recipe as fields


def kind_of(source: str) -> Literal["model", "function", "http", "class"]:
    """What a reward source is: a model folder or hub name, a function, a URL, or a class with the method score."""
    if source.startswith(("http://", "https://")):
        return "http"
    if ":" not in Path(source).name:
        return "model"
    return "class" if inspect.isclass(load_object(source)) else "function"


def is_model(source: str) -> bool:
    """A reward source is a model folder or hub name."""
    return kind_of(source) == "model"


def _made(source: str, options: Mapping[str, Any], where: str) -> Reward:
    """The reward of a source that is no model."""
    kind = kind_of(source)
    if kind == "function":
        if options:
            raise RecipeError(f"{where}.options: a function has none; leave it out")
        return FunctionReward(load_function(source), name_of(source))
    name = "http" if kind == "http" else source
    return adapters.chosen(REWARDS, {**options, "name": name}, f"{where}.options").make(source)


def reward_roles(recipe: fields.OnlineRecipe, tokenizer: Any, trunk: Role | None = None) -> dict[str, Role]:
    """The reward models of a recipe as frozen roles reward0, reward1, ... by their places among the rewards.

    Adapter-only reward models of the same base lie on the shared trunk.
    """
    out: dict[str, Role] = {}
    for number, one in enumerate(recipe.reward):
        name = f"reward{number}"
        if not is_model(one.source):
            continue
        if trunk is not None and lora.is_adapter(one.source):
            head = lora.add_from_folder(trunk.wrapped, name, one.source)
            out[name] = Role(
                name, trunk.model, False, wrapped=trunk.wrapped, adapter=name, head=head, **readout_of(one.source)
            )
        else:
            out[name] = reward_role(one.source, recipe.model, tokenizer, name)[0]
    return out


def rewards_of(recipe: fields.OnlineRecipe, tokenizer: Any, read: Callable[..., Any]) -> list[Weighted]:
    """The rewards of a recipe; `read(role, batch, names)` gives the columns of the reward models, where they lie."""
    out: list[Weighted] = []
    for number, one in enumerate(recipe.reward):
        if one.dense and not is_model(one.source):
            raise RecipeError(f"reward.{number}.dense: a function decides itself; it returns one list per answer")
        if one.options and is_model(one.source):
            raise RecipeError(f"reward.{number}.options: a reward model has none; leave it out")
        own: Reward
        if is_model(one.source):
            on_trunk = recipe.trunk == "shared" and lora.is_adapter(one.source)
            chat = None if on_trunk else own_chat(one.source, recipe.model, tokenizer)
            ends = step_ends(tokenizer, one.step)
            own = ModelReward(partial(read, f"reward{number}"), chat=chat, dense=one.dense, ends=ends)
        else:
            own = _made(one.source, one.options, f"reward.{number}")
        out.append(Weighted(one.name or name_of(one.source), own, one.weight))
    return distinct(out)


def check_rewards(recipe: fields.OnlineRecipe, tokenizer: Any) -> None:
    """Refuses rewards that cannot be found or read, before any model is loaded."""
    rewards_of(recipe, tokenizer, lambda *_: {})
    for one in recipe.reward:
        if is_model(one.source) and not load.is_scorer(one.source):
            raise ModelError(
                f"{one.source}: no reward model and no judge, it has no scalar head; train one with whet reward"
            )


def own_chat(path: str, model: fields.Frozen, tokenizer: Any) -> Chat | None:
    """The format of a reward model's own tokenizer where that is another than the policy's."""
    source = models.source_of(model, path)
    if models.same_tokenizer(source, tokenizer):
        return None
    return chat_format(load.load_tokenizer(source))


def distinct(rewards: Sequence[Weighted]) -> list[Weighted]:
    """The rewards with a number behind each name that was there before."""
    out: list[Weighted] = []
    for number, one in enumerate(rewards):
        taken = any(one.name == other.name for other in out)
        out.append(replace(one, name=f"{one.name}_{number}") if taken else one)
    return out


def step_ends(tokenizer: Any, separator: str | None) -> Callable[[int], bool] | None:
    """Whether a step ends with a token: it has the separator in its text. None where no separator was given."""
    if separator is None:
        return None
    return cache(lambda token: separator in tokenizer.decode([token]))


def reward(source: str, model: fields.Frozen, tokenizer: Any, budget: int) -> Weighted:
    """A function or a reward-model folder as a reward in this process, under its own name."""
    name = name_of(source)
    if not is_model(source):
        return Weighted(name, _made(source, {}, "reward"))
    role, chat = reward_role(source, model, tokenizer, name)
    return Weighted(name, ModelReward(role, chat=chat, budget=budget))


def name_of(source: str) -> str:
    """What the logs call a reward: the function's name, or the folder's (that of its run where the folder is "model")."""
    kind = kind_of(source)
    if kind == "http":
        return urlsplit(source).netloc.replace(":", "_")
    if kind != "model":
        return source.partition("#")[0].rpartition(":")[2]
    path = Path(source)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def reward_role(path: str, model: fields.Frozen, tokenizer: Any, name: str) -> tuple[Role, Chat | None]:
    """A frozen reward model, and the format of its own tokenizer where that is another than the policy's."""
    source = models.source_of(model, path)
    if not load.is_scorer(path):
        raise ModelError(f"{path}: no reward model and no judge, it has no scalar head; train one with whet reward")
    own = load.load_tokenizer(source)
    role = models.scorer_role(name, replace(model, quantize="none"), own, trained=False, seed=0, path=path)
    return role, None if models.same_tokenizer(source, tokenizer) else chat_format(own)
