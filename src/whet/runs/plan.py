"""`whet plan`: pass the roles, batch sizes and model shapes of a recipe to `whet.planning`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whet.data.files import read_json
from whet.errors import ModelError, RecipeError, first_line
from whet.methods import compose
from whet.models import saved_adapters
from whet.models.sizes import GPU
from whet.planning import Hardware, Network, PlannedRun, Shape, parse_backend, report
from whet.runs import checks, config, generators, rewards
from whet.runs import recipe as fields
from whet.runs.slots import checked


def plan(verb: str, recipe: Any, options: fields.PlanOptions) -> str:
    """Return the report for a resolved recipe. Raises RecipeError if no placement fits or the recipe does not train."""
    if isinstance(recipe, fields.OnlineRecipe):
        run = _online(verb, recipe, options)
    elif isinstance(recipe, fields.OfflineRecipe):
        run = _offline(verb, recipe, options)
    else:
        raise RecipeError(f"plan: {verb} trains nothing; plan a training verb, such as ppo or dpo")
    hardware = Hardware(options.gpus, options.gpu_memory, Network(options.inside, options.between, options.per_node))
    backend = None if recipe.learner.backend == "auto" else parse_backend(recipe.learner.backend)
    return report(run, hardware, title=verb, backend=backend, learners=options.learners)


def shape_of(path: str) -> Shape:
    """Read the shape of a model from config.json; of an adapter, its base. Raises ModelError if there is no config.json."""
    folder = Path(path)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        return shape_of(saved_adapters.settings(path)["base_model_name_or_path"])
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{path}: a plan reads the model's config.json, and there is none here; give a folder")
    config = read_json(file, ModelError, unique=False)
    try:
        return Shape.of(config)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"{file}: a value is missing or of a wrong type ({first_line(error)}); mend it") from error


def _common(recipe: fields.OfflineRecipe | fields.OnlineRecipe, options: fields.PlanOptions) -> dict[str, Any]:
    lora, dtype = recipe.model.lora, recipe.model.dtype
    held = {"bfloat16": 2, "float16": 2, "float64": 8}.get(dtype, 2 if lora and dtype == "auto" else 4)
    return {
        "policy": shape_of(recipe.model.path), "prompt_tokens": options.prompt_tokens, "mean_answer": options.mean_answer,
        "max_tokens_per_micro_batch": recipe.train.max_tokens_per_micro_batch or GPU, "checkpointing": recipe.model.gradient_checkpointing,
        "low_precision": held == 4 and recipe.learner.options.get("precision", "auto") != "float32",  # on a GPU
        "offload": bool(recipe.learner.options.get("offload")), "held_bytes": held,
        "lora_rank": lora.rank if lora else 0, "lora_targets": lora.targets if lora else "all-linear",
        "optim": recipe.optim.kind,
    }  # fmt: skip


def _online(verb: str, recipe: fields.OnlineRecipe, options: fields.PlanOptions) -> PlannedRun:
    slots = checked(verb, recipe.algorithm)
    weights = [one.weight for one in recipe.reward] or [1.0]
    algorithm = compose.online_of(slots, longest=recipe.sampling.max_new_tokens, weights=weights)
    mini_batch_size = checks.check_arithmetic(recipe, algorithm, verb)
    roles, common = algorithm.roles(), _common(recipe, options)
    models = [one.source for one in recipe.reward if rewards.is_model(one.source)]
    own = "reference" in roles and recipe.reference in (None, recipe.model.path)
    on_base = own and recipe.model.lora is not None
    start = recipe.critic.path or (models[0] if models else recipe.model.path)
    elements = recipe.rollout.prompts_per_step * (1 if algorithm.pairs else algorithm.collect.num_generations)
    engines = generators.chosen_of(recipe).options
    dtype, parallel = getattr(engines, "dtype", "auto"), getattr(engines, "tensor_parallel", 1)
    learner = 2 if common["low_precision"] else common["held_bytes"]
    engine = learner if dtype == "auto" else 4 if dtype == "float32" else 2
    return PlannedRun(
        **common,
        critic=shape_of(start) if "critic" in roles else None,
        reference=shape_of(recipe.reference or recipe.model.path) if "reference" in roles and not on_base else None,
        base_read=on_base,
        rewards=tuple((rewards.name_of(one), shape_of(one)) for one in models),
        average=recipe.rollout.ema is not None,
        prompts=recipe.rollout.prompts_per_step,
        num_generations=algorithm.collect.num_generations + algorithm.collect.greedy,
        answer_tokens=recipe.sampling.max_new_tokens,
        updates=-(-elements // mini_batch_size),
        epochs=recipe.rollout.ppo_epochs,
        one_trunk=recipe.trunk == "shared",
        engine_bytes=engine,
        engine_memory=getattr(engines, "gpu_memory_utilization", 0.5),
        push_adapter=generators.push_of(recipe) == "adapter",
        beside=recipe.generator.max_staleness > 0,
        tensor_parallel=parallel if parallel > 1 else 0,
        route={"nccl": "broadcast", "ipc": "handles"}.get(getattr(engines, "transfer", "auto"), "files"),  # type: ignore[arg-type]
    )


def _offline(verb: str, recipe: fields.OfflineRecipe, options: fields.PlanOptions) -> PlannedRun:
    """Describe one update of an offline run. Assumes rows of data.max_tokens tokens (1024 if not set)."""
    longest = recipe.data.max_tokens or 1024
    prompt = min(options.prompt_tokens, longest - 1)
    rows, reads, reference = 1, False, None
    if isinstance(recipe, fields.PreferenceRecipe):
        objective = compose.preference_of(checked(verb, recipe.algorithm))
        rows = 1 if "good" in objective.reads() else 2
        reads = "ref_logp" in objective.reads()
        if reads and not (recipe.model.lora and recipe.reference in (None, recipe.model.path)):
            reference = shape_of(recipe.reference or recipe.model.path)
    elif isinstance(recipe, fields.RewardModelRecipe):
        rows = 2
    return PlannedRun(
        **{**_common(recipe, options), "prompt_tokens": prompt}, online=False, reference=reference,
        base_read=reads and reference is None, prompts=recipe.train.batch_size, num_generations=rows, answer_tokens=longest - prompt,
    )  # fmt: skip


def taken(given: Mapping[str, Any]) -> tuple[fields.PlanOptions, dict[str, Any]]:
    """Split arguments into plan options and recipe fields. Raises RecipeError without `gpus` or for a wrong plan option."""
    names = config.fields_of(fields.PlanOptions)
    own = {name: value for name, value in given.items() if name in names}
    if "gpus" not in own:
        raise RecipeError("--gpus: how many GPUs? for example --gpus 8 --gpu-memory 80")
    rest = {name: value for name, value in given.items() if name not in names}
    return config.converted(own, fields.PlanOptions, "plan"), rest
