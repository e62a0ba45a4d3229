"""The reward json_schema: 1 if the answer is JSON that a schema allows, else 0."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from whet.errors import RecipeError, RewardError
from whet.extras import require
from whet.rewards.verifiers.base import RIGHT, Verdict, Verifier, blocks, check, make

DEEPEST = 100
"""Largest depth of nested lists and objects."""
SECONDS = 1.0
"""Longest time of one regular expression of a schema (`pattern`, `patternProperties`) on one text."""


@dataclass(frozen=True)
class JsonSchema(Verifier):
    """Parse the answer as JSON and validate it against a schema, with the package jsonschema: 1 if it is valid, else 0.

    JSON is read strictly (RFC 8259): a name that an object has twice, NaN, Infinity, numbers beyond the range of float64 and more than
    100 levels of nesting are refused. References of a schema are resolved in the schema itself; nothing is loaded from elsewhere.

    >>> JsonSchema({"type": "object", "required": ["name"]})(["a", "a"], ['{"name": 1}', '[]'])
    [1.0, 0.0]
    """

    schema: dict[str, Any] | str | None = None
    """the schema, as a mapping or the path of a JSON file"""
    column: str | None = None
    """column of the prompt rows with the schema, as a mapping or JSON text, in place of `schema`"""
    find: Literal["auto", "whole", "block"] = "auto"
    """what must be JSON: the last fenced block with the language json, or the whole answer; auto takes the whole where there is no
    such block"""

    def columns(self) -> dict[str, str]:
        """See `Verifier.columns`."""
        return {} if self.column is None else {"column": self.column}

    def check(self, where: str) -> None:
        """See `Verifier.check`."""
        require(f"{where}: json_schema", "jsonschema")
        if (self.schema is None) == (self.column is None):
            raise RecipeError(f"{where}: which schema? give one of schema and column")
        if self.schema is not None:
            _checked(lambda: _validator(_of_file(self.schema)), f"{where}.schema")

    def check_value(self, value: Any, where: str) -> None:
        """See `Verifier.check_value`."""
        _checked(lambda: _validator(_of_column(value)), where)

    def verdict(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """See `Verifier.verdict`."""
        schema = _of_file(self.schema) if self.column is None else _of_column(row[self.column])
        if schema is None:
            return Verdict(None, "the row has no schema")
        text: str | None = completion
        if self.find != "whole":
            fenced = [content for language, content in blocks(completion) if language == "json"]
            text = fenced[-1] if fenced else completion if self.find == "auto" else None
        if text is None:
            return Verdict(0.0, "no closed block ```json")
        try:
            value = strict_json(text)
        except ValueError as error:
            return Verdict(0.0, f"no JSON: {error}")
        return _valid(_validator(schema), value)


def strict_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError, with a reason in a few words, for what RFC 8259 advises against (names
    twice, huge numbers) or forbids, and for more than 100 levels."""
    _check_depth(text)
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except json.JSONDecodeError as error:
        raise ValueError("invalid syntax" if text.strip() else "nothing") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        raise ValueError("an integer with too many digits" if "digits" in str(error) else str(error)) from error


def _check_depth(text: str) -> None:
    depth, inside, place = 0, False, 0
    while place < len(text):
        one = text[place]
        if inside:
            place += one == "\\"
            inside = one != '"'
        elif one == '"':
            inside = True
        elif one in "[{":
            depth += 1
            if depth > DEEPEST:
                raise ValueError("nested too deeply")
        elif one in "]}":
            depth -= 1
        place += 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a name twice in an object")
    return out


def _constant(name: str) -> Any:
    raise ValueError("NaN or Infinity")


def _float(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise ValueError("a number beyond float64")
    return value


def _of_file(schema: Any) -> Any:
    return _read(schema) if isinstance(schema, str) else schema


@lru_cache(16)
def _read(path: str) -> Any:
    return strict_json(Path(path).read_text(encoding="utf-8"))


def _of_column(value: Any) -> Any:
    return strict_json(value) if isinstance(value, str) else value


def _checked(make_: Callable[[], Any], where: str) -> None:
    """Call a function that reads a schema. Raises RecipeError with its error."""
    from jsonschema.exceptions import SchemaError

    try:
        make_()
    except SchemaError as error:
        place = "/".join(str(one) for one in error.absolute_path)
        raise RecipeError(
            f"{where}: it is no JSON schema: {error.message:.200}{f' (at {place})' if place else ''}"
        ) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{where}: the schema cannot be read: {error}") from error


def _validator(schema: Any) -> Any:
    """Return the validator of a schema. Raises jsonschema's SchemaError for an invalid one, ValueError for a foreign reference."""
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"a schema is an object, got {schema!r:.80}")
    return _made(json.dumps(schema, sort_keys=True))


@lru_cache(1024)
def _made(text: str) -> Any:
    import jsonschema
    import referencing.exceptions
    import referencing.jsonschema
    import regex

    schema = json.loads(text)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    own = {one.get("$id") for one in _objects(schema)}
    for one in _objects(schema):
        target = one.get("$ref", one.get("$dynamicRef", "#"))
        if isinstance(target, str) and not target.startswith("#") and target.partition("#")[0] not in own:
            raise ValueError(f"the reference {target!r} leads out of the schema; put its target into $defs")

    if not any("$id" in one for one in _objects(schema) if one is not schema):  # else a reference may start elsewhere
        draft = referencing.jsonschema.specification_with(kind.META_SCHEMA["$schema"])
        resolver = referencing.Registry().with_resource("", draft.create_resource(schema)).resolver()
        for one in _objects(schema):
            try:
                if isinstance(one.get("$ref"), str) and one["$ref"].startswith("#"):
                    resolver.lookup(one["$ref"])
            except referencing.exceptions.Unresolvable as error:
                raise ValueError(f"the reference {one['$ref']!r} leads nowhere") from error

    if any("unevaluatedProperties" in one for one in _objects(schema)) and any(
        "patternProperties" in one for one in _objects(schema)
    ):
        raise ValueError("unevaluatedProperties with patternProperties is not supported; use additionalProperties")

    # the package matches with re, which has no limit of time
    def matches(expression: str, text: str) -> bool:
        return bool(regex.search(expression, text, timeout=SECONDS))

    def pattern(validator: Any, expression: str, instance: Any, _: Any) -> Any:
        if isinstance(instance, str) and not matches(expression, instance):
            yield jsonschema.ValidationError("a text does not match its pattern")

    def pattern_properties(validator: Any, patterns: Any, instance: Any, _: Any) -> Any:
        names = instance if isinstance(instance, dict) else ()
        for expression, inner in patterns.items():
            for name in names:
                if matches(expression, name):
                    yield from validator.descend(instance[name], inner, path=name, schema_path=expression)

    def additional_properties(validator: Any, allowed: Any, instance: Any, own_schema: Any) -> Any:
        names, patterns = own_schema.get("properties", {}), own_schema.get("patternProperties", {})
        for name in instance if isinstance(instance, dict) else ():
            if name in names or any(matches(one, name) for one in patterns):
                continue
            if allowed is False:
                yield jsonschema.ValidationError("a name that no property allows")
            else:
                yield from validator.descend(instance[name], allowed, path=name)

    # without a registry the package would load foreign references from the network
    timed = {
        "pattern": pattern,
        "patternProperties": pattern_properties,
        "additionalProperties": additional_properties,
    }
    return jsonschema.validators.extend(kind, timed)(schema, registry=referencing.Registry())


def _objects(value: Any) -> list[dict[str, Any]]:
    """Return all objects in a JSON value."""
    out, rest = [], [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            out.append(one)
        rest += one.values() if isinstance(one, dict) else one if isinstance(one, list) else []
    return out


def _valid(validator: Any, value: Any) -> Verdict:
    import jsonschema
    import referencing.exceptions

    try:
        error = next(iter(validator.iter_errors(value)), None)
    except TimeoutError:
        return Verdict(0.0, f"a pattern took more than {SECONDS:g} s")
    except (referencing.exceptions.Unresolvable, jsonschema.exceptions._WrappedReferencingError) as missing:
        raise RewardError(f"reward json_schema: the schema has a reference that leads nowhere: {missing}") from missing
    except (RecursionError, ArithmeticError) as failed:  # a schema that refers to itself; multipleOf of huge numbers
        return Verdict(0.0, f"the validation failed with {type(failed).__name__}")
    return RIGHT if error is None else Verdict(0.0, f"against the schema: {error.validator}")


Options = JsonSchema
__all__ = ["JsonSchema", "Options", "check", "make", "strict_json"]
