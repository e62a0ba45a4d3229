"""Find the adapter for a recipe value `{name: ..., option: ...}`, and check its options."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from whet.errors import RecipeError
from whet.generate import GENERATORS
from whet.learner.base import LEARNERS
from whet.registry import Adapter, Registry
from whet.runs import config
from whet.runs.recipe import OnlineRecipe, TrainingRecipe

COMMON = ("max_staleness", "segment_tokens")
"""Fields of the section `generator` that are not options of the generator."""


AUTO = "fsdp"
"""The learner whose options the backend "auto" takes."""


@dataclass(frozen=True)
class Chosen:
    """An adapter with its options."""

    adapter: Adapter
    options: Any

    def check(self, context: Any) -> None:
        """Call the adapter's check of these options, which raises an error for invalid ones."""
        self.adapter.check(self.options, context)

    def make(self, context: Any) -> Any:
        """Build the object of the adapter."""
        return self.adapter.make(self.options, context)


def chosen(registry: Registry, spec: Any, where: str, called: str = "name", others: Sequence[str] = ()) -> Chosen:
    """Return the adapter for `spec`, a name or a mapping with name and options. Raises RecipeError for a wrong option.

    `where` is the section of the recipe, `called` its field with the name, and `others` are further fields of the section.
    """
    given = {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise RecipeError(f"{where}: expected a name or a mapping with a name, got {spec!r}")
    adapter = registry.find(name, where if isinstance(spec, str) else f"{where}.{called}")
    known = list(config.fields_of(adapter.options))
    for option in given:
        if option not in known:
            those = [one for one in registry.built_in if option in config.fields_of(registry.find(one).options)]
            if those:
                raise RecipeError(f"{where}.{option}: {name} does not have it, only {', '.join(those)}; leave it out")
            if not known and not others:
                raise RecipeError(f"{where}.{option}: {name} has no options; leave it out")
            raise config.unknown(f"{where}.{option}", [f"{where}.{one}" for one in (*known, *others)])
    return Chosen(adapter, config.converted(given, adapter.options, where))


def named(name: str, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the specification of an adapter. Raises RecipeError if an option has the name of the field `name`."""
    if "name" in options:
        raise RecipeError(f"unknown field '{where}.name'; the adapter is {name!r} already, and no option has this name")
    return {**options, "name": name}


def completed(recipe: TrainingRecipe) -> TrainingRecipe:
    """Return a training recipe with every option of its generator and learner filled in. Raises RecipeError for a wrong name
    or option. The learner "auto" keeps the options that are given."""
    learner = recipe.learner
    if learner.backend != "auto" or learner.options:
        name = AUTO if learner.backend == "auto" else learner.backend
        own = chosen(LEARNERS, named(name, learner.options, "learner"), "learner", "backend")
        recipe = replace(recipe, learner=replace(learner, options=asdict(own.options)))
    if isinstance(recipe, OnlineRecipe):
        generator = recipe.generator
        own = chosen(GENERATORS, named(generator.name, generator.options, "generator"), "generator", others=COMMON)
        recipe = replace(recipe, generator=replace(generator, options=asdict(own.options)))
    return recipe


def fixed_options(registry: Registry, section: Mapping[str, Any], called: str) -> dict[str, Any]:
    """Return the options of an adapter in a saved recipe that a resumed run may not change, without those that have their
    default value. `called` is the field of the section with the adapter's name."""
    name = str(section.get(called, "local"))
    kind = registry.find(AUTO if name == "auto" else name, called).options
    free = getattr(kind, "may_change", ())
    defaults = {
        one.name: one.default_factory() if callable(one.default_factory) else one.default for one in fields(kind)
    }
    options = section.get("options") or {}
    return {
        name: value
        for name, value in options.items()
        if name not in free and (name not in defaults or value != defaults[name])
    }
