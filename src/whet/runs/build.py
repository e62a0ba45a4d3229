"""From a recipe to the objects that the loops take. Configuration stops here; everything that can be refused is refused here."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whet import ops
from whet.data import Chat, Element, Prompt, Reader, chat_format, read_rows
from whet.errors import DataError, ModelError, RecipeError
from whet.methods import Algorithm, Objective, catalogue
from whet.methods.options import Optim
from whet.models import load, lora
from whet.models.roles import Role, readout_of
from whet.rewards import Reward, Weighted
from whet.rewards.functions import FunctionReward, load_function
from whet.rewards.model import ModelReward
from whet.runs import recipe as fields


def source_of(model: fields.Frozen, path: str | None = None) -> load.ModelSource:
    """How a model of this recipe is loaded; frozen roles come from other paths with the same options."""
    name = path or model.path
    if not name:
        raise RecipeError("model.path: which model? give --model with a Hugging Face folder or a hub name")
    dtype = model.dtype
    adapters = isinstance(model, fields.Model) and model.lora is not None
    if dtype == "auto" and not adapters and model.quantize == "none":
        dtype = "float32"  # weights that are trained themselves lose small updates in half precision
    return load.ModelSource(name, dtype, model.device, model.trust_remote_code, model.quantize)


def tokenizer_and_chat(model: fields.Frozen) -> tuple[Any, Chat]:
    """The model's tokenizer and the format of its conversations."""
    load.quiet()
    tokenizer = load.load_tokenizer(source_of(model), pad_token=model.pad_token)
    return tokenizer, chat_format(tokenizer, model.chat_template)


def reader_of(model: fields.Frozen, data: fields.Data | fields.Rows, chat: Chat, *, room: int = 0) -> Reader:
    """The reader of this recipe's rows; `room` positions are kept free for an answer."""
    limit = load.positions(source_of(model))
    longest = min(data.max_tokens or limit, limit - room)
    if data.max_tokens and data.max_tokens > limit:
        raise RecipeError(f"data.max_tokens: the model has {limit} positions; got {data.max_tokens}")
    if longest < 2:
        raise RecipeError(
            f"sampling.max_new_tokens: the model has {limit} positions for prompt and answer; got {room}, lower it with "
            "--max-new-tokens"
        )
    mend = "raise --data.max-tokens" if longest < limit - room else "the model has no more positions"
    if room:
        mend = "lower --max-new-tokens" if mend.startswith("the") else mend
    return Reader(
        chat, longest, mend, data.too_long, *((data.turns, data.separator) if isinstance(data, fields.Data) else ())
    )


def rows_of(data: fields.Rows, read: Callable[[Sequence[Any]], list]) -> list:
    """The records of the one file of a recipe."""
    if not data.train:
        raise RecipeError("data.train: which rows? give --data with a file or a dataset's name")
    return read(read_rows(data.train))


def sources_of(data: fields.Data, read: Callable[[Sequence[Any]], list]) -> tuple[list[list], list[float] | None]:
    """(the elements of every training source, their weights or None for a single file)."""
    if isinstance(data.train, str):
        return [rows_of(fields.Rows(data.train), read)], None
    return [read(read_rows(one.path)) for one in data.train], [one.weight for one in data.train]


def guarded(read: Callable[[Sequence[Any]], list], objective: Objective, name: str) -> Callable[[Sequence[Any]], list]:
    """The reading, with rows refused whose `margin` or `probability` no term of the method reads."""
    compared = [term.reads() for term in objective.terms if term.name not in ("sft", "centering")]

    def checked(rows: Sequence[Any]) -> list:
        for column in ("margin", "probability"):
            first = next((one for one in rows if column in one.row), None)
            if first is not None and not all(column in reads for reads in compared):
                raise DataError(
                    f"{first.where}: {name} does not read the field {column!r}; leave it out or take another method"
                )
        return read(rows)

    return checked


def evaluation_of(data: fields.Data, read: Callable[[Sequence[Any]], list]) -> list[Element]:
    """The held-out elements; none without data.eval."""
    return read(read_rows(data.eval)) if data.eval else []


def causal_role(
    name: str, recipe: fields.Frozen, tokenizer: Any, *, trained: bool, seed: int, path: str | None = None
) -> Role:
    """A policy or reference of its own, with a fresh adapter where it is trained and the recipe has LoRA."""
    model = load.load_causal_lm(source_of(recipe, path), tokenizer)
    if not trained:
        return Role(name, model, False)
    assert isinstance(recipe, fields.Model)
    _can_train(recipe)
    if recipe.gradient_checkpointing:
        load.checkpoint_activations(model)
    if recipe.lora is None:
        return Role(name, model, True)
    return Role(name, model, True, wrapped=lora.attach(model, recipe.lora, (name,), seed=seed), adapter=name)


def scorer_role(
    name: str, recipe: fields.Frozen, tokenizer: Any, *, trained: bool, seed: int, path: str, readout: str | None = None
) -> Role:
    """A reward model or critic of its own. A saved one is read as its folder says, unless `readout` names another way."""
    model = load.load_scorer(source_of(recipe, path), tokenizer, seed=seed)
    about = value_of(path) if name == "critic" else dict(readout_of(path))
    if readout not in (None, about.get("readout")):
        about = {"readout": readout}
    if not trained:
        return Role(name, model, False, **about)
    assert isinstance(recipe, fields.Model)
    _can_train(recipe)
    if recipe.gradient_checkpointing:
        load.checkpoint_activations(model)
    if recipe.lora is None:
        return Role(name, model, True, **about)
    wrapped = lora.attach(model, recipe.lora, (name,), seed=seed, scorer=True)
    return Role(name, model, True, wrapped=wrapped, adapter=name, **about)


def value_of(path: str) -> dict[str, Any]:
    """How a critic that starts from this folder is read: a last-token score is in a value's unit, a sum is not."""
    about = readout_of(path)
    return {"shift": about["shift"]} if about["readout"] == "last" else {}


def reference_role(recipe: fields.Model, policy: Role, path: str | None, tokenizer: Any) -> Role:
    """The reference: the policy's own base where adapters are trained on it, else a frozen copy."""
    if policy.wrapped is not None and path in (None, recipe.path):
        return Role("reference", policy.model, False, wrapped=policy.wrapped)
    if path in (None, recipe.path):
        return Role("reference", copy.deepcopy(policy.model), False)
    return causal_role("reference", recipe, tokenizer, trained=False, seed=0, path=path)


@dataclass(frozen=True)
class Cast:
    """The roles of an online run, and the optimizers of those that are trained."""

    roles: dict[str, Role]
    optims: dict[str, Optim]


def cast(recipe: fields.OnlineRecipe, algorithm: Algorithm, tokenizer: Any) -> Cast:
    """All roles that the method needs, as separate copies or on one trunk."""
    if recipe.trunk == "shared":
        return _shared(recipe, algorithm, tokenizer)
    policy = causal_role("policy", recipe.model, tokenizer, trained=True, seed=recipe.seed)
    roles = {"policy": policy}
    if "reference" in algorithm.roles():
        roles["reference"] = reference_role(recipe.model, policy, recipe.reference, tokenizer)
    if "critic" in algorithm.roles():
        start = recipe.critic.path or _first_reward_model(recipe, tokenizer) or recipe.model.path
        if recipe.critic.path and not same_tokenizer(source_of(recipe.model, start), tokenizer):
            raise ModelError(
                f"critic.path: {start} has another tokenizer than the policy, so it cannot read its tokens"
            )
        roles["critic"] = scorer_role("critic", recipe.model, tokenizer, trained=True, seed=recipe.seed, path=start)
    return _with_average(recipe, roles)


def _first_reward_model(recipe: fields.OnlineRecipe, tokenizer: Any) -> str | None:
    """The first reward model that reads the policy's own tokens."""
    folders = [one.source for one in recipe.reward if is_model(one.source)]
    return next((one for one in folders if same_tokenizer(source_of(recipe.model, one), tokenizer)), None)


def same_tokenizer(source: load.ModelSource, tokenizer: Any) -> bool:
    """The folder's tokenizer gives the same ids for the same conversations."""
    own = load.load_tokenizer(source)
    return own.get_vocab() == tokenizer.get_vocab() and own.chat_template == tokenizer.chat_template


def _with_average(recipe: fields.OnlineRecipe, roles: dict[str, Role]) -> Cast:
    if recipe.rollout.ema is not None:
        policy = roles["policy"]
        roles["ema"] = Role("ema", copy.deepcopy(policy.model), False)
    optims = {name: recipe.optim for name, role in roles.items() if role.trained}
    if "critic" in roles:
        optims["critic"] = recipe.critic.optim or recipe.optim
    return Cast(roles, optims)


def _shared(recipe: fields.OnlineRecipe, algorithm: Algorithm, tokenizer: Any) -> Cast:
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
        about: dict[str, Any] = {}
        if folder is not None:
            head, about = lora.add_from_folder(wrapped, "critic", folder), value_of(folder)
        else:
            lora.add_fresh(wrapped, "critic", recipe.model.lora, seed=recipe.seed)
            head = fresh_head(model, recipe.seed)
        roles["critic"] = Role("critic", model, True, wrapped=wrapped, adapter="critic", head=head, **about)
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
        own: Reward
        if is_model(one.source):
            on_trunk = recipe.trunk == "shared" and lora.is_adapter(one.source)
            chat = None if on_trunk else own_chat(one.source, recipe.model, tokenizer)
            ends = step_ends(tokenizer, one.step)
            own = ModelReward(partial(read, f"reward{number}"), chat=chat, dense=one.dense, ends=ends)
        else:
            own = FunctionReward(load_function(one.source), name_of(one.source))
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
    source = source_of(model, path)
    if same_tokenizer(source, tokenizer):
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
        return Weighted(name, FunctionReward(load_function(source), name))
    role, chat = reward_role(source, model, tokenizer, name)
    return Weighted(name, ModelReward(role, chat=chat, budget=budget))


def name_of(source: str) -> str:
    """What the logs call a reward: the function's name, or the folder's (that of its run where the folder is "model")."""
    if not is_model(source):
        return source.rpartition(":")[2]
    path = Path(source)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def reward_role(path: str, model: fields.Frozen, tokenizer: Any, name: str) -> tuple[Role, Chat | None]:
    """A frozen reward model, and the format of its own tokenizer where that is another than the policy's."""
    source = source_of(model, path)
    if not load.is_scorer(path):
        raise ModelError(f"{path}: no reward model and no judge, it has no scalar head; train one with whet reward")
    own = load.load_tokenizer(source)
    role = scorer_role(name, replace(model, quantize="none"), own, trained=False, seed=0, path=path)
    return role, None if same_tokenizer(source, tokenizer) else chat_format(own)


def check_columns(prompts: Sequence[Prompt]) -> None:
    """Refuses prompt rows whose columns would hide what reward functions get from whet."""
    for prompt in prompts:
        for name in ("prompts", "completions", "completion_ids"):
            if name in prompt.row:
                raise RecipeError(
                    f"data.train: the prompt rows have a column {name!r}, which reward functions get from whet; rename it"
                )


def check_arithmetic(recipe: fields.OnlineRecipe, algorithm: Algorithm, verb: str) -> int:
    """Refuses impossible numbers; the answers per update."""
    answers = algorithm.collect.num_generations
    total = recipe.rollout.prompts_per_step * (1 if algorithm.pairs else answers)
    mini_batch_size = recipe.rollout.mini_batch_size or total
    if mini_batch_size > total:
        made = "pair each" if algorithm.pairs else f"x {answers} answers"
        raise RecipeError(
            f"rollout.mini_batch_size: a rollout has {recipe.rollout.prompts_per_step} prompts {made} = {total}; "
            f"got {mini_batch_size}; set --rollout.mini-batch-size too"
        )
    if not algorithm.has_ratio() and (mini_batch_size < total or recipe.rollout.ppo_epochs > 1):
        raise RecipeError(
            f"rollout: {verb} has no ratio to correct for a moved policy, so it takes one update per "
            "rollout; "
            f"leave rollout.mini_batch_size out and rollout.ppo_epochs at 1 (got {mini_batch_size} of {total}, {recipe.rollout.ppo_epochs} epochs)"
        )
    whole = algorithm.advantage is None or algorithm.advantage.op is ops.broadcast
    if any(one.dense for one in recipe.reward) and whole:
        raise RecipeError(
            f"reward.dense: {verb} credits whole answers, so scores per token would be added up; leave it out"
        )
    resized = algorithm.normalize or algorithm.reward_normalization or algorithm.combine.op is not ops.weighted_sum
    if any(one.dense for one in recipe.reward) and resized:
        raise RecipeError(
            "reward.dense: scores per token keep their size; leave normalize, reward_normalization and combine as they are"
        )
    for number, one in enumerate(recipe.reward):
        if one.step is not None and not one.dense:
            raise RecipeError(f"reward.{number}.step: it says where a dense reward has its scores; set dense too")
    if len(recipe.reward) == 1 and algorithm.combine.op is not ops.weighted_sum:
        raise RecipeError(
            "algorithm.combine: a single reward has no spread to be careful about; give several, or weighted_sum"
        )
    if recipe.rollout.ema is not None and recipe.model.lora is not None:
        raise RecipeError("rollout.ema: an average of the policy needs all weights trained; leave model.lora out")
    if recipe.sampling.temperature == 0:
        raise RecipeError(
            "sampling.temperature: greedy answers have no other side to learn from; use a temperature above 0"
        )
    roles, updates = algorithm.roles(), recipe.rollout.ppo_epochs * -(-total // mini_batch_size)
    for name, given, needed in (
        ("reference", recipe.reference is not None, "reference"),
        ("critic", recipe.critic != fields.Critic(), "critic"),
    ):
        if given and needed not in roles:
            raise RecipeError(f"{name}: {verb} as it is set has no {needed}; leave it out")
    if updates == 1 and any(one.op is ops.kl_on for term in algorithm.terms for one in term.loss.walk()):
        raise RecipeError(
            "algorithm.select: kl_cov holds the updates of a rollout together, and there is one alone; take several "
            "(rollout.mini_batch_size, rollout.ppo_epochs)"
        )
    if recipe.rollout.target_kl is not None and updates == 1:
        raise RecipeError(
            "rollout.target_kl: it ends a rollout's updates early, and there is one alone; take several "
            "(rollout.mini_batch_size, rollout.ppo_epochs) or leave it out"
        )
    if recipe.rollout.sync_reference.mix != 1.0 and not recipe.rollout.sync_reference.every:
        raise RecipeError(
            "rollout.sync_reference.mix: the reference is never refreshed; set rollout.sync_reference.every"
        )
    if recipe.rollout.sync_reference.every and (recipe.model.lora is not None or "reference" not in algorithm.roles()):
        raise RecipeError(
            "rollout.sync_reference: it needs a reference that is a model of its own: a method with a KL, and no adapters"
        )
    return mini_batch_size


def check_ptx(recipe: fields.OnlineRecipe, algorithm: Algorithm, verb: str) -> None:
    """Refuses a ptx term without data, and data without a term."""
    needs_ptx = any(term.stream == "ptx" for term in algorithm.terms)
    if needs_ptx and not recipe.ptx.data:
        raise RecipeError(f"ptx.data: {verb} mixes pre-training rows into every update; give --ptx with `text` rows")
    if recipe.ptx.batch_size != fields.Ptx().batch_size and not needs_ptx:
        raise RecipeError(f"ptx.batch_size: {verb} has no ptx term; leave it out, or set --ptx-coef")
    if recipe.ptx.data and not needs_ptx:
        raise RecipeError(f"ptx.data: {verb} has no ptx term; use the instructgpt method, or set --ptx-coef")


def reading(name: str, objective: Objective) -> str:
    """Which records a method is trained on: the name of a reading of `whet.data.Reader`."""
    return "unpaired" if "good" in objective.reads() else catalogue.READS.get(name, "pairs")


def check_data(data: fields.Data, records: str) -> None:
    """Refuses options of the data that these records do not have."""
    if data.separator != fields.Data().separator and records != "steps":
        raise RecipeError(
            "data.separator: only rows with steps (reward --algorithm.name process) have one; leave it out"
        )
    if data.turns != "all" and records != "demonstrations":
        raise RecipeError("data.turns: only demonstrations have several turns to train; leave it out")


def check_reference(recipe: fields.PreferenceRecipe, objective: Objective) -> None:
    """Refuses options of the reference where there is none, or none of its own."""
    has = "ref_logp" in objective.reads()
    refresh = recipe.sync_reference
    if not has and (recipe.reference is not None or recipe.precompute or refresh.every):
        raise RecipeError("reference: this method has none; leave reference, precompute and sync_reference out")
    if refresh.every and (recipe.precompute or recipe.model.lora is not None):
        raise RecipeError(
            "sync_reference: the reference must be a model of its own; leave precompute and model.lora out"
        )
    if refresh.mix != 1.0 and not refresh.every:
        raise RecipeError("sync_reference.mix: the reference is never updated; set sync_reference.every")


def check_optim(optim: Optim, where: str) -> None:
    """Refuses options of an optimizer that do nothing beside the others."""
    if optim.kind != "muon" and optim.muon_lr != Optim().muon_lr:
        raise RecipeError(f"{where}.muon_lr: the optimizer is {optim.kind}; set {where}.kind to muon, or leave it out")
    if optim.schedule == "constant" and optim.min_lr_ratio != Optim().min_lr_ratio:
        raise RecipeError(
            f"{where}.min_lr_ratio: a constant schedule ends where it began; leave it out, or take another schedule"
        )


def cautions(recipe: fields.OnlineRecipe, algorithm: Algorithm) -> list[str]:
    """What a run should be warned of before it starts."""
    in_reward = algorithm.penalty is not None and algorithm.penalty.estimator.op is not ops.dense
    in_loss = any(
        one.op in (ops.k2, ops.k3, ops.k3_weighted, ops.k2_sequence)
        for term in algorithm.terms
        for one in term.loss.walk()
    )
    fixes = {"kl_in_reward": "--kl-in-reward.estimator exact", "kl_in_loss": "--kl-in-loss exact"}
    return [
        f"algorithm.{slot}: under top_p, top_k or min_p a KL estimated on the sampled tokens is biased, since some tokens are never "
        f"sampled; {fixes[slot]} sums over the whole vocabulary"
        for slot, sampled in (("kl_in_reward", in_reward), ("kl_in_loss", in_loss))
        if sampled and recipe.sampling.truncates
    ] + _about_correction(recipe, algorithm)


def _about_correction(recipe: fields.OnlineRecipe, algorithm: Algorithm) -> list[str]:
    own = recipe.generator.name == "local" and not recipe.generator.max_staleness
    if algorithm.importance_correction is not None and own and recipe.learner.backend in ("auto", "local"):
        return [
            "algorithm.importance_correction: answers are sampled by the learner's own weights here, so every correction is 1"
        ]
    if algorithm.importance_correction is None and recipe.generator.max_staleness:
        return [
            "generator.max_staleness: answers of older weights are learned from as if the present ones had made them; "
            "--importance-correction token_weight weighs them"
        ]
    return []


def steps_of(train: fields.Train, elements: int) -> int:
    """Updates of an offline run."""
    return train.num_steps or max(1, math.ceil(train.num_epochs * elements / train.batch_size))


def _can_train(recipe: fields.Model) -> None:
    if recipe.export == "adapter" and recipe.lora is None:
        raise RecipeError("model.export: there is no adapter to export without model.lora; leave it at merged")
    if recipe.quantize != "none" and recipe.lora is None:
        raise ModelError("model.quantize: a 4-bit base is frozen; train adapters on it with --model.lora.rank 16")
