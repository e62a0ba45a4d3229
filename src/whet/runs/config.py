"""Merge defaults, YAML recipes and dotted overrides into one checked recipe. Imports no torch."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from whet.errors import Problems, RecipeError
from whet.methods import catalogue
from whet.methods.choices import changed
from whet.methods.options import Optim
from whet.runs.foreign import FOREIGN
from whet.runs.layers import merge, merged_layers
from whet.runs.recipe import MAIN_FIELD, OPEN, REWARDS
from whet.runs.yaml_text import read_yaml, yaml_tree

LARGEST = 1e30
"""Largest number of a field: computed in float32, it stays finite."""
SHIPPED = Path(__file__).parent / "recipes"

LORA_RATE = 10.0
"""Learning rate of LoRA adapters over that of full training, for the defaults: the best rates of SFT and of RL differ by this
factor whatever the model and the rank ("LoRA Without Regret", Schulman et al. 2025)."""


SHORT: Mapping[str, tuple[str, ...]] = {
    **{name: (f"optim.{name}",) for name in ("lr", "weight_decay", "max_grad_norm", "warmup_ratio", "min_lr_ratio")},
    **{name: (f"rollout.{name}",) for name in ("prompts_per_step", "mini_batch_size", "ppo_epochs", "target_kl")},
    **{name: (f"rollout.{name}", f"train.{name}") for name in ("num_steps", "num_epochs")},
    **{
        name: (f"train.{name}",)
        for name in (
            "batch_size",
            "save_every",
            "save_minutes",
            "save_last",
            "on_divergence",
            "padding_free",
            "shared_prefix",
            "drop_last",
        )
    },
    "eval_every": ("eval.every",),
    **{name: (f"eval.{name}",) for name in ("keep_best", "early_stop")},
    "max_tokens_per_micro_batch": ("train.max_tokens_per_micro_batch",),
    **{
        name: (f"sampling.{name}",)
        for name in (
            "max_new_tokens",
            "min_new_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "skip_special_tokens",
        )
    },
    **{
        name: (f"model.{name}",)
        for name in ("chat_template", "gradient_checkpointing", "lora", "pad_token", "dtype", "attn_implementation")
    },
    "precision": ("learner.precision",),
    "gae_lambda": ("algorithm.advantage.gae_lambda",),
    **{name: (f"algorithm.surrogate.{name}",) for name in ("clip_low", "clip_high")},
    **{name: (f"algorithm.value.{name}",) for name in ("vf_coef", "clip_range_vf")},
    "ent_coef": ("algorithm.entropy.ent_coef",),
}
"""Options that can be given without their section: name -> full names. The first one that the recipe has is used."""


def check_call(method: Any, recipe: Any) -> None:
    """Raise RecipeError if the first two arguments of a public function are not a name and the name or path of a recipe."""
    if not isinstance(method, str):
        raise RecipeError(f"method: expected the name of a method, such as 'grpo', got {method!r:.80}")
    if recipe is not None and not isinstance(recipe, (str, Path)):
        raise RecipeError(
            f"recipe: expected the path of a YAML file or the name of a shipped recipe, got {type(recipe).__name__}; "
            f"give fields by name: whet.train({method!r}, model=..., data=...)"
        )


def recipe_tree(recipe: str | Path | None) -> dict[str, Any]:
    """Read a recipe file, given as a path or as the name of a shipped one. Return {} for None. Raises RecipeError."""
    path = recipe_file(recipe)
    return {} if path is None else read_yaml(path)


def recipe_file(recipe: str | Path | None) -> Path | None:
    """Return the file of a recipe, given as a path or as the name of a shipped one. Return None for None. Raises RecipeError
    if there is no such file."""
    if recipe is None:
        return None
    path = Path(recipe)
    if not path.is_file() and (SHIPPED / f"{recipe}.yaml").is_file():
        path = SHIPPED / f"{recipe}.yaml"
    if not path.is_file():
        raise RecipeError(
            f"{recipe}: no such recipe; the shipped ones are {', '.join(sorted(p.stem for p in SHIPPED.glob('*.yaml')))}"
        )
    return path


def resolve(
    kind: type,
    verb: str,
    recipe: str | Path | None,
    overrides: Sequence[tuple[str, Any]],
    tree: Mapping[str, Any] | None = None,
) -> Any:
    """Return the checked recipe. Merge the defaults of `kind`, the shipped recipe of `verb`, `recipe` and `overrides`.

    `tree` is the content of `recipe` if it was read before. Raises RecipeError with the field, the wrong value and how to
    fix it.
    """
    shipped = SHIPPED / f"{verb}.yaml"
    if not shipped.is_file():
        shipped = SHIPPED / f"{catalogue.shipped_recipe(verb)}.yaml"
    layers = [_expand(kind, read_yaml(shipped), "")] if shipped.is_file() else []
    if recipe is not None:
        given = dict(recipe_tree(recipe) if tree is None else tree)
        named_verb = str(given.pop("method", verb)).replace("-", "_")
        if named_verb != verb:
            raise RecipeError(f"method: {recipe} is a recipe of {named_verb}; got {verb}")
        layers.append(_expand(kind, given, ""))
    problems = Problems()  # all wrong options are told at once
    for name, value in overrides:
        with problems:
            layers.append(_expand(kind, _nested(kind, name.replace("-", "_"), value), ""))
    problems.tell()
    users = layers[1:] if shipped.is_file() else layers
    merged: dict[str, Any] = {}
    methods = [_method_of(layer) for layer in layers]
    plain = [{key: value for key, value in layer.items() if key != "algorithm"} for layer in layers]
    recipes = len(plain) - len(overrides)
    for layer in [*plain[:recipes], merged_layers(plain[recipes:])]:
        _drop_options(merged, layer)
        merge(merged, layer)
    if "algorithm" in fields_of(kind):
        merged["algorithm"] = _composed(verb, methods)
    if "optim" in fields_of(kind):
        _adapt_rates(merged, users)
    return converted(merged, kind, "")


def _adapt_rates(merged: dict[str, Any], given: Sequence[Mapping[str, Any]]) -> None:
    """Adapt the default learning rates and schedules of `merged` to what the layers `given` by the user set.

    With `model.lora` a default learning rate is `LORA_RATE` times that of full training. A constant schedule has no final rate.
    """
    adapters = (merged.get("model") or {}).get("lora") is not None
    merged.setdefault("optim", {})
    for path in (("optim",), ("critic", "optim")):
        own = _at(merged, path)
        if not isinstance(own, dict):
            continue
        chosen = {key for layer in given for key in (_at(layer, path) or {})}
        if adapters and "lr" not in chosen:
            own["lr"] = float(f"{LORA_RATE * own.get('lr', Optim().lr):.12g}")
        if own.get("schedule") == "constant" and "min_lr_ratio" not in chosen:
            own.pop("min_lr_ratio", None)


def _at(tree: Any, path: Sequence[str]) -> Any:
    """Return what stands at a path of keys in nested mappings, None if there is nothing."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


ADAPTED = {"generator": "name", "learner": "backend"}
"""Sections of adapters, and the field with the adapter's name."""


def _drop_options(merged: Mapping[str, Any], layer: Mapping[str, Any]) -> None:
    """Remove the options of an adapter from the merged layers if the next layer names another adapter."""
    for name, named_by in ADAPTED.items():
        old, new = merged.get(name), layer.get(name)
        if (
            isinstance(old, dict)
            and isinstance(new, Mapping)
            and new.get(named_by, old.get(named_by)) != old.get(named_by)
        ):
            old.pop("options", None)


def _method_of(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    method = layer.get("algorithm") or {}
    if not isinstance(method, Mapping):
        raise RecipeError(
            f"algorithm: expected a mapping of slots, such as {{kl_in_reward: {{coef: 0.1}}}}; got {method!r}"
        )
    return method


def _composed(verb: str, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the slots of the method, changed by each layer in order. `name` selects the method of a reward model."""
    out: dict[str, Any] = {}
    if verb == "reward":
        names = [layer["name"] for layer in layers if "name" in layer]
        out["name"] = names[-1] if names else "k_way"
        if out["name"] not in catalogue.REWARD:
            raise unknown(str(out["name"]), list(catalogue.REWARD))
    slots = dict(catalogue.slots_of(verb, out.get("name")))
    for layer in layers:
        slots = changed(slots, {key: value for key, value in layer.items() if key != "name" or verb != "reward"})
    return out | slots


def to_yaml(record: Any, verb: str | None = None) -> str:
    """Return a resolved recipe as YAML, with all defaults, and `verb` as its `method` if given."""
    import yaml

    # asdict, because msgspec leaves out fields that were not set when the record was converted
    tree = ({} if verb is None else {"method": verb}) | msgspec.to_builtins(dataclasses.asdict(record))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def completed(tree: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return a saved recipe with the defaults of the fields that it does not have, as nested dicts. A recipe that does not fit
    this version of whet is returned as it is."""
    method = tree.get("method")
    try:
        record = converted({key: value for key, value in tree.items() if key != "method"}, kind, "")
    except RecipeError:
        return dict(tree)
    return yaml_tree(to_yaml(record, method))


def converted(tree: Mapping[str, Any], kind: Any, where: str) -> Any:
    """Convert nested dicts to a record of type `kind`. Raises RecipeError with the field name and the wrong value."""
    try:
        found = msgspec.convert(tree, kind, strict=False)
        _check_numbers(msgspec.to_builtins(found, enc_hook=repr), where)
        return found
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        if found_ := re.match(r"Object missing required field `(\w+)`", what):
            inside = re.sub(r"\[(\d+)\]", r".\1", path.rstrip("`").replace("[...]", "")).strip(".")
            raise RecipeError(
                f"{'.'.join(filter(None, (where, inside, found_[1])))}: this field is required; give it"
            ) from error
        name = (where + path.rstrip("`").replace("[...]", "")).strip(".")
        got: Any = tree
        for key, place in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path.rstrip("`")):
            got = (
                got.get(key)
                if isinstance(got, Mapping)
                else got[int(place)]
                if place and isinstance(got, list)
                else got
            )
        told = _choices_at(kind, path.rstrip("`").strip("."))
        known = f"; known are {', '.join(told)}" if told else ""
        raise RecipeError(f"{name or 'recipe'}: {what[:1].lower()}{what[1:]}{known}; got {got!r}") from error


def _check_numbers(value: Any, name: str) -> None:
    """Raise RecipeError for a number that is not finite or beyond `LARGEST` in nested dicts and lists. An infinite `max_grad_norm`
    is no clipping."""
    if isinstance(value, float) and math.isinf(value) and value > 0 and name.endswith("max_grad_norm"):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{name}: expected a finite number, got {value}")
    if isinstance(value, (int, float)) and abs(value) > LARGEST:
        raise RecipeError(f"{name}: expected a number of at most {LARGEST:g}, got {value!r:.40}")
    if isinstance(value, (dict, list, tuple)):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(one, f"{name}.{key}".strip("."))


def _choices_at(kind: Any, path: str) -> tuple[str, ...]:
    """Return the allowed values of the field at a dotted path of a record type."""
    for key in path.split("."):
        if not (isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, msgspec.Struct))):
            return ()
        hints = typing.get_type_hints(kind, include_extras=True)
        if key not in hints:
            return ()
        annotation, kind = hints[key], section(hints[key])
    return choices(annotation)


def unknown(name: str, known: Sequence[str], *, every: bool = True) -> RecipeError:
    """Return the error for an unknown field, with the name here of an option of another framework, or the closest known field.
    Without either, list the known fields if `every` is True."""
    last = name.rpartition(".")[2]
    foreign = FOREIGN.get(last)
    if foreign is not None:
        return RecipeError(f"unknown field {name!r}; here it is {foreign}")
    near = [other for other in known if other.rpartition(".")[2] == last and other != name]
    if not near:
        likely = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        lasts = {other.rpartition(".")[2]: other for other in known}
        near = likely or [lasts[one] for one in difflib.get_close_matches(last, list(lasts), n=1, cutoff=0.75)]
    if near:
        return RecipeError(f"unknown field {name!r}; did you mean {near[0]!r}?")
    rest = f"known are {', '.join(sorted(known))}" if every else "whet METHOD --help-all lists every field"
    return RecipeError(f"unknown field {name!r}; {rest}")


def unknown_method(name: str, known: Sequence[str] = ()) -> RecipeError:
    """Return the error for an unknown method or command, with the closest known one."""
    every = list(known) or list(catalogue.TRAINED)
    near = difflib.get_close_matches(name.lower().replace("-", "_"), every, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(every)}"
    return RecipeError(f"unknown verb {name!r}; {hint}")


def fields_of(kind: type) -> dict[str, Any]:
    """Return the types of the fields of a recipe record, by name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind)}


def section(annotation: Any) -> type | None:
    """Return the dataclass in an annotation: LoRA for `LoRA | None`, None for `list[Source]`."""
    options = (
        typing.get_args(annotation)
        if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
        else (annotation,)
    )
    return next((option for option in options if dataclasses.is_dataclass(option)), None)  # type: ignore[return-value]


def choices(annotation: Any) -> tuple[str, ...]:
    """Return the values of the Literal in an annotation as strings; empty without a Literal."""
    parts = (annotation, *typing.get_args(annotation))
    return next((tuple(map(str, typing.get_args(one))) for one in parts if typing.get_origin(one) is Literal), ())


def leaves(kind: type, prefix: str = "") -> list[str]:
    """Return the dotted names of all fields and sections of a recipe."""
    out = []
    for name, annotation in fields_of(kind).items():
        inner = section(annotation)
        out += [f"{prefix}{name}", *(leaves(inner, f"{prefix}{name}.") if inner else ())]
    return out


VERL_SECTIONS = ("actor_rollout_ref", "trainer", "custom_reward_function")
"""Sections of verl's configuration, whose options are known by their last name."""


def _nested(kind: type, name: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for the name "a.b". A first key that is not a field belongs to the section `algorithm`."""
    known = fields_of(kind)
    head, dot, rest = name.partition(".")
    if head not in known:
        every = leaves(kind)
        found = (
            one
            for one in SHORT.get(head, ())
            if one in every
            or (one.partition(".")[0] in known and (one.startswith("algorithm.") or _is_open(known, one)))
        )
        head = next(found, head)
    if head in VERL_SECTIONS and head not in known:
        raise unknown(name, leaves(kind), every=False)
    keys = f"{head}{dot}{rest}".split(".")
    if keys[0] not in known and "algorithm" in known:
        keys = ["algorithm", *keys]
    tree: Any = value
    for key in reversed(keys):
        tree = {key: tree}
    return tree


def _is_open(known: Mapping[str, Any], name: str) -> bool:
    """Return True if a dotted name is in a section of an adapter, whose options are not fields of the recipe."""
    return section(known[name.partition(".")[0]]) in OPEN


def _expand(kind: type, tree: Any, where: str) -> Any:
    """Return the tree with a bare value of a section moved to its main field. Raises RecipeError for an unknown key."""
    if not isinstance(tree, Mapping):
        if kind not in MAIN_FIELD or tree is None:
            return tree
        tree = {MAIN_FIELD[kind]: tree}
    if MAIN_FIELD.get(kind) == "train" and "path" in tree:  # {path, name, split} in the place of the section
        source = {key: tree[key] for key in ("path", "name", "split") if key in tree}
        tree = {"train": [source]} | {key: value for key, value in tree.items() if key not in source}
    known = fields_of(kind)
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{where}.{key}".strip(".")
        if kind in REWARDS and key not in known:
            near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.7)
            if near and near[0] not in tree:  # rather a mistake than an option
                raise unknown(name, [f"{where}.{near[0]}".strip(".")])
        if kind in OPEN and (key not in known or key == "options"):
            if key == "options" and not isinstance(value, Mapping):
                raise RecipeError(f"{name}: expected a mapping of options, got {value!r}")
            out.setdefault("options", {}).update(value if key == "options" else {key: value})
            continue
        if key not in known:
            raise unknown(name, [f"{where}.{other}".strip(".") for other in known])
        inner = section(known[key])
        listed = typing.get_args(known[key])
        element = next(
            (
                section(option)
                for option in (*listed, *(a for o in listed for a in typing.get_args(o)))
                if section(option)
            ),
            None,
        )
        if inner is not None:
            value = _expand(inner, value, name)
        elif typing.get_origin(known[key]) is list and not isinstance(value, list):
            value = [_expand(element, value, name) if element else value]
        elif element is not None and isinstance(value, Mapping):
            value = [_expand(element, value, name)]  # one {path, name, split}
        elif element is not None and isinstance(value, list):
            value = [_expand(element, one, name) for one in value]
        out[key] = value
    return out
