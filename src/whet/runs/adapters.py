"""Find the adapter for a recipe value `{name: ..., option: ...}`, and check its options."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from whet.errors import RecipeError
from whet.registry import Adapter, Registry
from whet.runs import config


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


def chosen(registry: Registry, spec: Any, where: str) -> Chosen:
    """Return the adapter for `spec`, a name or a mapping with name and options. Raises RecipeError for a wrong option."""
    given = {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise RecipeError(f"{where}: expected a name or a mapping with a name, got {spec!r}")
    adapter = registry.find(name, where)
    known = list(config.fields_of(adapter.options))
    for option in given:
        if option not in known:
            if not known:
                raise RecipeError(f"{where}.{option}: {name} has no options; leave it out")
            raise config.unknown(f"{where}.{option}", [f"{where}.{one}" for one in known])
    return Chosen(adapter, config.converted(given, adapter.options, where))
