"""From a recipe to the objects that the loops take. Configuration stops here; everything that can be refused is refused here."""

import copy
import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from whet import ops
from whet.cli import config
from whet.dials import Optim
from whet.errors import ModelError, RecipeError
from whet.methods import Algorithm, part
from whet.models import load, lora
from whet.models.roles import Role, readout_of
from whet.records import Chat, Element, Reader, chat_format, read_rows
from whet.rewards import Weighted
from whet.rewards.functions import FunctionReward, load_function
from whet.rewards.model import ModelReward


def chosen_method(
    registry: Mapping[str, Callable[..., Any]], name: str, dials: Mapping[str, Any], others: Sequence[str] = ()
) -> Any:
    """The method of this name with these dials, each checked against the function's own signature.

    `others` are the recipe's other fields: what is neither is named with the nearest of both.
    """
    if name not in registry:
        raise config.unknown(name, list(registry))
    function = registry[name]
    parameters = inspect.signature(function, eval_str=True).parameters
    for dial in dials:
        if dial not in parameters:
            near = difflib.get_close_matches(dial, [*parameters, *others], n=1)
            if near and near[0] in others:
                raise config.unknown(dial, others)
            raise config.unknown(f"method.{dial}", [f"method.{known}" for known in parameters])
    for dial, value in dials.items():
        annotation = parameters[dial].annotation
        if isinstance(value, Mapping):
            inner = config.section(annotation)
            known = config.fields_of(inner) if inner else {}
            for key in value:
                if key not in known:
                    raise config.unknown(f"method.{dial}.{key}", [f"method.{dial}.{other}" for other in known])
    form = msgspec.defstruct(name, [(p.name, p.annotation, p.default) for p in parameters.values()], frozen=True)
    given = config.converted(dials, form, "method")
    return function(**{key: getattr(given, key) for key in dials})


def source_of(model: config.Model, path: str | None = None) -> load.Source:
    """How a model of this recipe is loaded; frozen roles come from other paths with the same options."""
    name = path or model.path
    if not name:
        raise RecipeError("model.path: which model? give --model with a Hugging Face folder or a hub name")
    dtype = model.dtype
    if dtype == "auto" and model.lora is None and model.quantise == "none":
        dtype = "float32"  # weights that are trained themselves lose small updates in half precision
    return load.Source(name, dtype, model.device, model.trust_remote_code, model.quantise)


def tokenizer_and_chat(model: config.Model) -> tuple[Any, Chat]:
    """The model's tokenizer and the format of its conversations."""
    load.quiet()
    tokenizer = load.load_tokenizer(source_of(model), pad_token=model.pad_token)
    return tokenizer, chat_format(tokenizer, model.chat_template)


def reader_of(model: config.Model, data: config.Data | config.Rows, chat: Chat, *, room: int = 0) -> Reader:
    """The reader of this recipe's rows; `room` positions are kept free for an answer."""
    limit = load.positions(source_of(model))
    longest = min(data.max_tokens or limit, limit) - room
    if data.max_tokens and data.max_tokens > limit:
        raise RecipeError(f"data.max_tokens: the model has {limit} positions; got {data.max_tokens}")
    if longest < 2:
        raise RecipeError(
            f"sampling.max_new_tokens: the model has {limit} positions, {room} for the answer leave none for a prompt"
        )
    return Reader(chat, longest, data.too_long, data.turns if isinstance(data, config.Data) else "all")


def rows_of(data: config.Rows, read: Callable[[Sequence[Any]], list]) -> list:
    """The records of the one file of a recipe."""
    if not data.train:
        raise RecipeError("data.train: which rows? give --data with a file or a dataset's name")
    return read(read_rows(data.train))


def sources_of(data: config.Data, read: Callable[[Sequence[Any]], list]) -> tuple[list[list], list[float] | None]:
    """(the elements of every training source, their weights or None for a single file)."""
    if isinstance(data.train, str):
        return [rows_of(config.Rows(data.train), read)], None
    return [read(read_rows(one.path)) for one in data.train], [one.weight for one in data.train]


def evaluation_of(data: config.Data, read: Callable[[Sequence[Any]], list]) -> list[Element]:
    """The held-out elements; none without data.eval."""
    return read(read_rows(data.eval)) if data.eval else []


def causal_role(
    name: str, recipe: config.Model, tokenizer: Any, *, trained: bool, seed: int, path: str | None = None
) -> Role:
    """A policy or reference of its own, with a fresh adapter where it is trained and the recipe has LoRA."""
    model = load.load_causal_lm(source_of(recipe, path), tokenizer)
    if trained and recipe.gradient_checkpointing:
        load.checkpoint_activations(model)
    if not trained:
        return Role(name, model, False)
    _can_train(recipe)
    if recipe.lora is None:
        return Role(name, model, True)
    return Role(name, model, True, wrapped=lora.attach(model, recipe.lora, (name,), seed=seed), adapter=name)


def scorer_role(
    name: str, recipe: config.Model, tokenizer: Any, *, trained: bool, seed: int, path: str, readout: str | None = None
) -> Role:
    """A reward model or critic of its own. A saved reward model is read as its folder says, a fresh one by `readout`."""
    source = source_of(recipe, path)
    model = load.load_scorer(source, tokenizer, seed=seed)
    about = dict(readout_of(path))
    if readout is not None:
        about = {"readout": readout}
    if name == "critic":  # a value is no sum over tokens; only what a last-token score is in its own unit carries over
        about = {key: about[key] for key in ("scale", "shift")} if about["readout"] == "last" else {}
    if not trained or recipe.lora is None:
        return Role(name, model, trained, **about)
    wrapped = lora.attach(model, recipe.lora, (name,), seed=seed, scorer=True)
    return Role(name, model, True, wrapped=wrapped, adapter=name, **about)


def reference_role(recipe: config.Model, policy: Role, path: str | None, tokenizer: Any) -> Role:
    """The reference: the policy's own base where adapters are trained on it, else a frozen copy."""
    if policy.wrapped is not None and path in (None, recipe.path):
        return Role("reference", policy.model, False, wrapped=policy.wrapped)
    if path in (None, recipe.path):
        return Role("reference", copy.deepcopy(policy.model), False)
    return causal_role("reference", recipe, tokenizer, trained=False, seed=0, path=path)


@dataclass(frozen=True)
class Cast:
    """The roles of an online run, and the optimisers of those that are trained."""

    roles: dict[str, Role]
    optims: dict[str, Optim]


def cast(recipe: config.Online, algorithm: Algorithm, tokenizer: Any) -> Cast:
    """All roles that the method needs, as separate copies or on one trunk."""
    if recipe.trunk == "shared":
        return _shared(recipe, algorithm, tokenizer)
    policy = causal_role("policy", recipe.model, tokenizer, trained=True, seed=recipe.seed)
    roles = {"policy": policy}
    if "reference" in algorithm.roles():
        roles["reference"] = reference_role(recipe.model, policy, recipe.reference, tokenizer)
    if "critic" in algorithm.roles():
        start = recipe.critic.path or next(
            (one.source for one in recipe.reward if is_model(one.source)), recipe.model.path
        )
        roles["critic"] = scorer_role("critic", recipe.model, tokenizer, trained=True, seed=recipe.seed, path=start)
    return _with_average(recipe, roles)


def _with_average(recipe: config.Online, roles: dict[str, Role]) -> Cast:
    if recipe.rollout.ema is not None:
        policy = roles["policy"]
        if policy.wrapped is not None:
            raise RecipeError("rollout.ema: an average of the policy needs all weights trained; leave model.lora out")
        roles["ema"] = Role("ema", copy.deepcopy(policy.model), False)
    optims = {name: recipe.optim for name, role in roles.items() if role.trained}
    if "critic" in roles:
        optims["critic"] = recipe.critic.optim or recipe.optim
    return Cast(roles, optims)


def _shared(recipe: config.Online, algorithm: Algorithm, tokenizer: Any) -> Cast:
    """One base model in memory; the policy and the critic are adapters, the reference is the base itself.

    A reward model that was saved as an adapter of the same base lies on the trunk too, and the critic starts from it.
    """
    if recipe.model.lora is None:
        raise RecipeError(
            "trunk: a shared trunk is trained through adapters; set model.lora, for example --model.lora.rank 16"
        )
    if recipe.reference not in (None, recipe.model.path):
        raise RecipeError("reference: on a shared trunk the reference is the base model itself; leave it out")
    model = load.load_causal_lm(source_of(recipe.model), tokenizer)
    if recipe.model.gradient_checkpointing:
        load.checkpoint_activations(model)
    wrapped = lora.attach(model, recipe.model.lora, ("policy",), seed=recipe.seed)
    roles = {"policy": Role("policy", model, True, wrapped=wrapped, adapter="policy")}
    if "reference" in algorithm.roles():
        roles["reference"] = Role("reference", model, False, wrapped=wrapped)
    if "critic" in algorithm.roles():
        folder = recipe.critic.path or next((one.source for one in recipe.reward if lora.is_adapter(one.source)), None)
        if folder is not None:
            head = lora.add_from_folder(wrapped, "critic", folder)
        else:
            lora.add_fresh(wrapped, "critic", recipe.model.lora, seed=recipe.seed)
            head = fresh_head(model, recipe.seed)
        roles["critic"] = Role("critic", model, True, wrapped=wrapped, adapter="critic", head=head)
    return _with_average(recipe, roles)


def fresh_head(model: Any, seed: int) -> nn.Linear:
    """A scalar head for a trunk, drawn as `load_scorer` draws it."""
    embedding = model.get_input_embeddings().weight
    head = nn.Linear(embedding.shape[1], 1, bias=False, device=embedding.device, dtype=torch.float32)
    load.draw_head(head, seed)
    return head


def is_model(source: str) -> bool:
    """A reward source is a model folder or hub name rather than a function."""
    return ":" not in Path(source).name


def rewards_of(recipe: config.Online, tokenizer: Any, trunk: Role | None = None) -> list[Weighted]:
    """The rewards of a recipe. Adapter-only reward models of the same base lie on the shared trunk."""
    if not recipe.reward:
        raise RecipeError(
            'reward: what scores the answers? give --reward with a reward-model folder or "file.py:function"'
        )
    out: list[Weighted] = []
    for number, one in enumerate(recipe.reward):
        if one.dense and not is_model(one.source):
            raise RecipeError(f"reward.{number}.dense: a function decides itself; it returns one list per answer")
        if trunk is not None and lora.is_adapter(one.source):
            head = lora.add_from_folder(trunk.wrapped, f"reward{number}", one.source)
            role = Role(
                f"reward{number}", trunk.model, False, wrapped=trunk.wrapped, adapter=f"reward{number}", head=head,
                **readout_of(one.source),
            )  # fmt: skip
            found = Weighted(name_of(one.source), ModelReward(role, budget=recipe.train.micro_tokens, dense=one.dense))
        else:
            found = reward(one.source, recipe.model, tokenizer, recipe.train.micro_tokens, dense=one.dense)
        name = one.name or found.name
        if any(name == other.name for other in out):
            name = f"{name}_{number}"
        out.append(replace(found, name=name, weight=one.weight))
    return out


def reward(source: str, model: config.Model, tokenizer: Any, budget: int, *, dense: bool = False) -> Weighted:
    """A function or a reward-model folder as a reward, under its own name."""
    name = name_of(source)
    if not is_model(source):
        return Weighted(name, FunctionReward(load_function(source), name))
    role, chat = reward_role(source, model, tokenizer, name)
    return Weighted(name, ModelReward(role, chat=chat, budget=budget, dense=dense))


def name_of(source: str) -> str:
    """What the logs call a reward: the function's name, or the folder's (that of its run where the folder is "model")."""
    if not is_model(source):
        return source.rpartition(":")[2]
    path = Path(source)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def reward_role(path: str, model: config.Model, tokenizer: Any, name: str) -> tuple[Role, Chat | None]:
    """A frozen reward model, and the format of its own tokenizer where that is another than the policy's."""
    source = source_of(model, path)
    if not load.is_scorer(path):
        raise ModelError(f"{path}: no reward model and no judge, it has no scalar head; train one with whet reward")
    own = load.load_tokenizer(source)
    same = own.get_vocab() == tokenizer.get_vocab() and own.chat_template == tokenizer.chat_template
    role = scorer_role(name, replace(model, lora=None, quantise="none"), own, trained=False, seed=0, path=path)
    return role, None if same else chat_format(own)


def weighted(algorithm: Algorithm, rewards: Sequence[Weighted]) -> Algorithm:
    """The method with the rewards' weights in its `combine` slot."""
    return replace(algorithm, combine=part(ops.weighted_sum, weights=tuple(one.weight for one in rewards)))


def check_arithmetic(recipe: config.Online, algorithm: Algorithm, verb: str) -> int:
    """Refuses impossible numbers; the answers per update."""
    total = recipe.rollout.prompts * algorithm.answers
    minibatch = recipe.rollout.minibatch or total
    if minibatch > total:
        raise RecipeError(
            f"rollout.minibatch: a rollout has {recipe.rollout.prompts} prompts x {algorithm.answers} answers = {total}; "
            f"got {minibatch}"
        )
    if not algorithm.has_ratio() and (minibatch < total or recipe.rollout.epochs > 1):
        raise RecipeError(
            f"rollout: {verb} has no ratio to correct for a moved policy, so it takes one update per rollout; "
            f"leave rollout.minibatch out and rollout.epochs at 1 (got {minibatch} of {total}, {recipe.rollout.epochs} epochs)"
        )
    if recipe.sampling.temperature == 0:
        raise RecipeError(
            "sampling.temperature: greedy answers have no other side to learn from; use a temperature above 0"
        )
    if recipe.sampling.truncates:
        raise RecipeError(
            "sampling: under top_p, top_k or min_p the policy's own log-probs are not those of the distribution sampled from; "
            "train at top_p 1, top_k 0, min_p 0"
        )
    needs_ptx = any(term.stream == "ptx" for term in algorithm.terms)
    if needs_ptx and not recipe.ptx.data:
        raise RecipeError(f"ptx.data: {verb} mixes pre-training rows into every update; give --ptx with `text` rows")
    if recipe.ptx.data and not needs_ptx:
        raise RecipeError(f"ptx.data: {verb} has no ptx term; use the instructgpt method for it")
    return minibatch


def steps_of(train: config.Train, elements: int) -> int:
    """Updates of an offline run."""
    return train.steps or max(1, math.ceil(train.epochs * elements / train.batch))


def _can_train(recipe: config.Model) -> None:
    if recipe.quantise != "none" and recipe.lora is None:
        raise ModelError("model.quantise: a 4-bit base is frozen; train adapters on it with --model.lora.rank 16")
