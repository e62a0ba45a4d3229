"""The help texts: fields and their meaning read off the sources themselves, so that --help loads nothing heavy."""

import ast
import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from whet.cli.config import choices, fields_of, section
from whet.dials import KL, Truncated

ROOT = Path(__file__).parent.parent


@cache
def field_docs(module: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Class name -> field -> (default, meaning) of a module's records: the string under each field is its meaning."""
    out: dict[str, dict[str, tuple[str, str]]] = {}
    for node in ast.parse((ROOT / module).read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        own = out.setdefault(node.name, {})
        for place, item in enumerate(node.body):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                after = node.body[place + 1] if place + 1 < len(node.body) else None
                meaning = ""
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    meaning = " ".join(str(after.value.value).split())
                default = "" if item.value is None else ast.unparse(item.value)
                own[item.target.id] = (default, meaning)
    return out


@cache
def method_docs(module: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Function name -> (first line of its docstring, keyword -> default) of a methods module, without importing it."""
    out = {}
    for node in ast.parse((ROOT / module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            defaults = [ast.unparse(value) if value else "" for value in node.args.kw_defaults]
            dials = {argument.arg: default for argument, default in zip(node.args.kwonlyargs, defaults, strict=True)}
            out[node.name] = ((ast.get_docstring(node) or "").split("\n")[0], dials)
    return out


def recipe_lines(kind: type, defaults: Any, prefix: str = "") -> list[str]:
    """One line per field of a recipe, nested ones with dots: its meaning, its choices, and the verb's own default."""
    docs = field_docs("cli/recipe.py") | field_docs("dials.py")
    own = {name: told for one in reversed(kind.__mro__) for name, told in docs.get(one.__name__, {}).items()}
    lines = []
    for name, annotation in fields_of(kind).items():
        inner, value = section(annotation), getattr(defaults, name, None)
        if inner is not None and dataclasses.is_dataclass(inner):
            lines += recipe_lines(inner, inner() if value is None else value, f"{prefix}{name}.")
        elif name != "method":
            shown = "" if value in ("", None, [], ()) else f" [{value}]"
            lines.append(_line(prefix + name, own.get(name, ("", ""))[1], annotation, shown))
    return lines


def _line(name: str, meaning: str, annotation: Any, shown: str) -> str:
    told = choices(annotation)
    one_of = f" ({' | '.join(told)})" if told else ""
    return f"  --{name.replace('_', '-'):<30}{meaning}{one_of}{shown}"


def method_lines(module: str, names: list[str], given: Mapping[str, Any]) -> list[str]:
    """The dials of the named methods of a module; records among them (`kl`, `truncated`) field by field."""
    lines = []
    for name in names:
        about, dials = method_docs(module)[name]
        lines.append(f"  {name}: {about}")
        for dial, default in dials.items():
            record = {"KL": KL, "Truncated": Truncated}.get(default.partition("(")[0])
            if record is None:
                lines.append(f"  --method.{dial.replace('_', '-'):<23}[{given.get(dial, default)}]")
            else:
                value = eval(default, {"KL": KL, "Truncated": Truncated})
                lines += recipe_lines(record, value, f"method.{dial}.")
    return lines
