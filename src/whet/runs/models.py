"""Load the models of a recipe: tokenizers, roles, adapters and heads."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from whet.data import Chat, chat_format
from whet.errors import ModelError, RecipeError
from whet.methods import Algorithm
from whet.methods.options import Optim, Sampling
from whet.models import load, lora
from whet.models.folders import is_adapter
from whet.models.roles import Role, readout_of
from whet.models.router import router_of
from whet.runs import recipe as fields
from whet.runs import rewards
from whet.runs.early import NO_MODEL


def source_of(model: fields.Frozen, path: str | None = None) -> load.ModelSource:
    """Return the load options of a model. `path` names another model to load with the same options.
    Raises RecipeError without a path."""
    name = path or model.path
    if not name:
        raise RecipeError(NO_MODEL)
    return load.ModelSource(
        name, dtype_of(model), model.device, model.trust_remote_code, model.quantize, model.attn_implementation
    )


def check_machine(model: fields.Frozen) -> None:
    """Raise ModelError if this machine does not have the device of a model, or what a base in 4 bits needs. Load nothing."""
    device = source_of(model).torch_device()
    if model.quantize == "4bit":
        load.check_four_bit(device)


def check_code(model: fields.Frozen, *paths: str | None) -> None:
    """Raise ModelError if one of the models of a recipe comes with code that the recipe does not trust. Load nothing."""
    for path in paths:
        if path:
            load.check_code(source_of(model, path))


def dtype_of(model: fields.Frozen) -> str:
    """Return the dtype in which the weights are loaded; "auto" is bfloat16 on a GPU, for bases of adapters."""
    adapters = isinstance(model, fields.Model) and model.lora is not None
    if model.dtype == "auto" and not adapters and model.quantize == "none":
        return "float32"  # full training in half precision loses small updates to rounding
    return model.dtype


def half_by_default(device: str) -> bool:
    """Return whether `model.device` names a GPU that computes in bfloat16."""
    on_gpu = torch.cuda.is_available() and (device == "auto" or device.startswith("cuda"))
    return on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)


def tokenizer_and_chat(model: fields.Frozen, sampling: Sampling | None = None) -> tuple[Any, Chat]:
    """Load the tokenizer of a model. Return it with its chat format, which decodes answers as `sampling` says."""
    load.quiet()
    tokenizer = load.load_tokenizer(source_of(model), pad_token=model.pad_token)
    skip = sampling is not None and sampling.skip_special_tokens
    chat = chat_format(tokenizer, model.chat_template, skip_special_tokens=skip, arguments=model.chat_template_kwargs)
    own = (one for one in load.end_ids_of(source_of(model)) if one < len(tokenizer))
    return tokenizer, replace(chat, end_ids=tuple(dict.fromkeys([*chat.end_ids, *own])))


def causal_role(
    name: str, recipe: fields.Frozen, tokenizer: Any, *, trained: bool, seed: int, path: str | None = None
) -> Role:
    """Load a causal LM as a separate role. Add a new LoRA adapter if it is trained and the recipe has LoRA."""
    model = load.load_causal_lm(source_of(recipe, path), tokenizer)
    if not trained:
        return Role(name, model, False)
    assert isinstance(recipe, fields.Model)
    _can_train(recipe)
    if recipe.gradient_checkpointing:
        load.checkpoint_activations(model)
    router = router_of(model, recipe.router_aux_loss_coef, recipe.router_z_loss_coef)
    if recipe.lora is None:
        return Role(name, model, True, router=router)
    wrapped = lora.attach(model, recipe.lora, (name,), seed=seed)
    return Role(name, model, True, wrapped=wrapped, adapter=name, router=router)


def scorer_role(
    name: str, recipe: fields.Frozen, tokenizer: Any, *, trained: bool, seed: int, path: str, readout: str | None = None
) -> Role:
    """Load a reward model or critic as a separate role. `readout` overrides the readout that is saved in its folder."""
    model = load.load_scorer(source_of(recipe, path), tokenizer, seed=seed)
    about = value_of(path) if name == "critic" else dict(readout_of(path))
    if readout not in (None, about.get("readout")):
        about = {"readout": readout}
    if not trained:
        return Role(name, model, False, **about)
    load.set_pad(model, tokenizer)  # the exported model has it, and is read with it
    assert isinstance(recipe, fields.Model)
    _can_train(recipe)
    if recipe.gradient_checkpointing:
        load.checkpoint_activations(model)
    if recipe.lora is None:
        return Role(name, model, True, **about)
    wrapped = lora.attach(model, recipe.lora, (name,), seed=seed, scorer=True)
    role = Role(name, model, True, wrapped=wrapped, adapter=name, **about)
    if role.head is not None and role.head.weight.dtype == torch.bfloat16:
        role.head.float()  # peft keeps adapters in float32, and heads in the dtype of the base, which loses small updates
    return role


def value_of(path: str) -> dict[str, Any]:
    """Return the readout options of a critic that starts from this folder: the saved shift if the readout is "last",
    else none, because a sum of scores has another unit than a value."""
    about = readout_of(path)
    return {"shift": about["shift"]} if about["readout"] == "last" else {}


def reference_role(recipe: fields.Model, policy: Role, path: str | None, tokenizer: Any) -> Role:
    """Return the reference: another model at `path`, the base of the policy's adapters, or a frozen copy of the policy.
    Raises ModelError if it has a tokenizer with another vocabulary."""
    if policy.wrapped is not None and path in (None, recipe.path):
        return Role("reference", policy.model, False, wrapped=policy.wrapped)
    if path in (None, recipe.path):
        return Role("reference", copy.deepcopy(policy.model), False)
    if (
        load.has_tokenizer(str(path))
        and load.load_tokenizer(source_of(recipe, path)).get_vocab() != tokenizer.get_vocab()
    ):
        raise ModelError(f"reference: {path} has another tokenizer than {recipe.path}, so it cannot read its tokens")
    return causal_role("reference", recipe, tokenizer, trained=False, seed=0, path=path)


@dataclass(frozen=True)
class Cast:
    """The roles of an online run and the optimizer options of the trained ones."""

    roles: dict[str, Role]
    optims: dict[str, Optim]


def cast(recipe: fields.OnlineRecipe, algorithm: Algorithm, tokenizer: Any) -> Cast:
    """Load all roles that the method needs, as separate models or on a shared trunk. Rewards are not included.
    Raises ModelError if the critic has another tokenizer than the policy."""
    if recipe.trunk == "shared":
        return _shared(recipe, algorithm, tokenizer)
    policy = causal_role("policy", recipe.model, tokenizer, trained=True, seed=recipe.seed)
    _check_published(recipe, policy)
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
        if roles["critic"].whole_text:
            raise ModelError(
                f"critic: it would start from {start}, which has one score per text and no values of tokens; give --critic.path "
                f"with another model, for example {recipe.model.path}"
            )
    return _with_average(recipe, roles)


def _first_reward_model(recipe: fields.OnlineRecipe, tokenizer: Any) -> str | None:
    """Return the first reward model with the policy's tokenizer, or None."""
    folders = [one.source for one in recipe.reward if rewards.is_model(one.source)]
    return next((one for one in folders if same_tokenizer(source_of(recipe.model, one), tokenizer)), None)


def same_tokenizer(source: load.ModelSource, tokenizer: Any) -> bool:
    """Return True if the tokenizer in the folder has the same vocabulary and chat template."""
    return is_same(load.load_tokenizer(source), tokenizer)


def is_same(own: Any, tokenizer: Any) -> bool:
    """Return True if two tokenizers have the same vocabulary and chat template."""
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
    """Load one base model. The policy and the critic are adapters on it, and the reference is the base without adapters.

    The critic starts from `critic.path`, else from the first reward model saved as an adapter, else from a new adapter. A reward
    model whose adapter was merged has another backbone than the trunk: on the trunk's hidden states its head computes other
    scores, so it does not start the critic (`runs.checks.cautions` says so).
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
    router = router_of(model, recipe.model.router_aux_loss_coef, recipe.model.router_z_loss_coef)
    wrapped = lora.attach(model, recipe.model.lora, ("policy",), seed=recipe.seed)
    roles = {"policy": Role("policy", model, True, wrapped=wrapped, adapter="policy", router=router)}
    _check_published(recipe, roles["policy"])
    if "reference" in algorithm.roles():
        roles["reference"] = Role("reference", model, False, wrapped=wrapped)
    if "critic" in algorithm.roles():
        folder = recipe.critic.path or first_adapter(recipe)
        about: dict[str, Any] = {}
        if folder is not None:
            head, about = lora.add_from_folder(wrapped, "critic", folder), value_of(folder)
        else:
            lora.add_fresh(wrapped, "critic", recipe.model.lora, seed=recipe.seed)
            head = fresh_head(model, recipe.seed)
        roles["critic"] = Role("critic", model, True, wrapped=wrapped, adapter="critic", head=head, **about)
    return _with_average(recipe, roles)


def first_adapter(recipe: fields.OnlineRecipe) -> str | None:
    """Return the first reward model that is saved as an adapter, or None."""
    return next((one.source for one in recipe.reward if is_adapter(one.source)), None)


def _check_published(recipe: fields.OnlineRecipe, policy: Role) -> None:
    """Raise RecipeError if the generator would load weights into a model whose embeddings and head share one."""
    if recipe.generator.name != "local" and policy.unties:
        raise RecipeError(
            f"model.lora.targets: {recipe.model.path} uses one weight for embeddings and head, so adapters on one of them cannot be "
            f"given to generator {recipe.generator.name}; leave them out of the targets, or set --generator local"
        )


def fresh_head(model: Any, seed: int) -> nn.Linear:
    """Return a new scalar head (H -> 1) for a trunk, initialized as in `load_scorer`."""
    embedding = model.get_input_embeddings().weight
    head = nn.Linear(embedding.shape[1], 1, bias=False, device=embedding.device, dtype=torch.float32)
    load.draw_head(head, seed)
    return head


def _can_train(recipe: fields.Model) -> None:
    if recipe.export == "adapter" and recipe.path and is_adapter(recipe.path):
        raise RecipeError(
            f"model.export: {recipe.path} is an adapter, which is merged before training, so the new adapter alone would be of a "
            "base that is saved nowhere; leave it at merged"
        )
    if recipe.export == "adapter" and recipe.lora is None:
        raise RecipeError("model.export: there is no adapter to export without model.lora; leave it at merged")
    if recipe.quantize != "none" and recipe.lora is None:
        raise ModelError("model.quantize: a 4-bit base is frozen; train adapters on it with --model.lora.rank 16")
