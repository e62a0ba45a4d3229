"""Help texts. The fields and their meanings are parsed from the source files, so --help imports no heavy packages."""

import ast
import dataclasses
import inspect
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from whet.methods.catalogue import REWARD
from whet.methods.choices import HIDDEN, ONLINE_SLOTS, OPTIONS, PLAIN_SLOTS, PREFERENCE_SLOTS, REWARD_SLOTS, Choice
from whet.runs.config import choices, fields_of, section
from whet.runs.recipe import MAIN_FIELD

ROOT = Path(__file__).parent.parent


@cache
def field_docs(module: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Return class name -> field -> (default, meaning) for a module. The meaning is the string below each field. Fields of
    base classes in the same module come first."""
    out: dict[str, dict[str, tuple[str, str]]] = {}
    for node in ast.parse(_source(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        own = out.setdefault(node.name, {})
        for base in node.bases:
            own |= out.get(ast.unparse(base), {})
        for place, item in enumerate(node.body):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not _of_class(item):
                after = node.body[place + 1] if place + 1 < len(node.body) else None
                meaning = ""
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    meaning = " ".join(str(after.value.value).split())
                default = "" if item.value is None else ast.unparse(item.value)
                own[item.target.id] = (default, meaning)
    return out


def _of_class(item: ast.AnnAssign) -> bool:
    return ast.unparse(item.annotation).startswith("ClassVar")


@cache
def op_options() -> dict[str, dict[str, str]]:
    """Return op name -> keyword-only parameter -> default as written in the sources of `ops`."""
    out = {}
    for path in sorted((ROOT / "ops").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                defaults = [_plain(value) for value in node.args.kw_defaults]
                names = [argument.arg for argument in node.args.kwonlyargs]
                out[node.name] = dict(zip(names, defaults, strict=True))
    return out


def _plain(value: ast.expr | None) -> str:
    """Return a default as a user writes it: strings without quotes, and null for None."""
    if not isinstance(value, ast.Constant):
        return "" if value is None else ast.unparse(value)
    return "null" if value.value is None else str(value.value)


def recipe_lines(kind: type, defaults: Any, prefix: str = "", off: str = "") -> list[str]:
    """Return one line per field of a recipe: its name (nested with dots), meaning, choices, and default for the verb. `off` is
    the name of the section if it is off by default; its defaults then apply if it is set."""
    docs = field_docs("runs/recipe.py") | field_docs("methods/options.py")
    own = {name: told for one in reversed(kind.__mro__) for name, told in docs.get(one.__name__, {}).items()}
    lines = []
    for name, annotation in fields_of(kind).items():
        inner, value = section(annotation), getattr(defaults, name, None)
        if inner is not None and dataclasses.is_dataclass(inner):
            unset = off or (f"{prefix}{name}" if value is None else "")
            lines += recipe_lines(inner, inner() if value is None else value, f"{prefix}{name}.", unset)
        elif name != "algorithm":
            shown = (
                ""
                if value in ("", None, [], (), {})
                else f" [{f'off; {_written(value)} if {off} is set' if off else _written(value)}]"
            )
            lines.append(_line(prefix + name, own.get(name, ("", ""))[1], annotation, shown))
    return lines


TABLES = {"generator": "generate/base.py", "learner": "learner/base.py", "reward": "rewards/base.py"}
"""The files with the tables of adapters that have a section in a recipe. They are parsed, not imported."""


@cache
def adapters(section_: str) -> dict[str, str]:
    """Return the built-in adapters of a section: name -> file."""
    calls = [node for node in ast.walk(ast.parse(_source(TABLES[section_]))) if isinstance(node, ast.Call)]
    table = next(node for node in calls if ast.unparse(node.func) == "Registry").args[1]
    found = ast.literal_eval(table)
    return {name: module.removeprefix("whet.").replace(".", "/") + ".py" for name, module in found.items()}


def adapter_lines(section_: str, name: str, shown_as: str = "") -> list[str]:
    """Return one line per option of an adapter. `shown_as` is the section in the lines, if it is another one."""
    file = adapters(section_)[name]
    docs = field_docs(TABLES[section_]) | field_docs(file)
    aliases = {
        ast.unparse(node.targets[0]): ast.unparse(node.value)
        for node in ast.parse(_source(file)).body
        if isinstance(node, ast.Assign)
    }
    lines = []
    for option, (default, meaning) in docs[aliases.get("Options", "Options")].items():
        shown = default.strip("'") if default not in ("''", "()") else ""
        lines.append(_line(f"{shown_as or section_}.{option}", meaning, None, f" [{shown}]" if shown else ""))
    return lines or ["  none"]


def _source(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def _written(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, (list, tuple)):  # a section of a list, such as one reward, is shown as a bare value
        return json.dumps([getattr(one, MAIN_FIELD[type(one)]) if type(one) in MAIN_FIELD else one for one in value])
    return json.dumps(value) if isinstance(value, str) and not value.isprintable() else str(value)


def _line(name: str, meaning: str, annotation: Any, shown: str) -> str:
    told = choices(annotation)
    one_of = f" ({' | '.join(told)})" if told else ""
    return f"  --{name.replace('_', '-'):<36}  {meaning}{one_of}{shown}"


def method_lines(verb: str, slots: Mapping[str, Any]) -> list[str]:
    """Return one line per slot, with its choices and default, and one line per option of the default parts."""
    table = REWARD_SLOTS if verb == "reward" else {**PREFERENCE_SLOTS, **ONLINE_SLOTS}
    lines = []
    if verb == "reward":
        lines.append(f"  --{'algorithm.name':<36}  which rows and loss ({' | '.join(REWARD)}) [{slots['name']}]")
    for slot, value in slots.items():
        if slot in PLAIN_SLOTS:
            kind, meaning = PLAIN_SLOTS[slot]
            inner = section(kind)
            if inner is None:
                lines.append(_line(f"algorithm.{slot}", meaning, kind, f" [{value}]"))
            else:
                lines.append(_line(f"algorithm.{slot}", meaning, kind, " [null]" if value is None else ""))
                defaults = inner() if value is None else inner(**value)
                lines += recipe_lines(inner, defaults, f"algorithm.{slot}.", slot if value is None else "")
        elif slot in table:
            shown = [one["name"] for one in value] if isinstance(value, list) else value and value["name"]
            lines.append(
                f"  --{('algorithm.' + slot).replace('_', '-'):<36}  {' | '.join(table[slot])} [{'null' if shown is None else shown}]"
            )
            for spec in value if isinstance(value, list) else [value] if value else []:
                if ":" in spec["name"]:
                    lines += _own_lines(slot, spec)
                else:
                    lines += _option_lines(slot, spec, table[slot][spec["name"]])
    return lines


def _option_lines(slot: str, spec: Mapping[str, Any], choice: Choice) -> list[str]:
    own = {name: told for name, told in op_options()[str(choice.op)].items() if name not in HIDDEN + choice.hidden}
    own |= {name: str(value) for name, value in choice.extra.items()}
    weight = (
        [_line(f"algorithm.{slot}.weight", "its weight in the sum", None, f" [{spec['weight']}]")]
        if "weight" in spec
        else []
    )
    return weight + [
        _line(f"algorithm.{slot}.{name}", OPTIONS[name][1], OPTIONS[name][0], f" [{spec.get(name, told)}]")
        for name, told in own.items()
    ]


def _own_lines(slot: str, spec: Mapping[str, Any]) -> list[str]:
    """Return one line per option of a user's function, with its type and default. The file is imported."""
    from whet.registry import load_object

    function = load_object(spec["name"])
    options = [one for one in inspect.signature(function).parameters.values() if one.kind is one.KEYWORD_ONLY]
    return [
        _line(
            f"algorithm.{slot}.{one.name}",
            _type_name(one.annotation),
            None,
            f" [{spec.get(one.name, one.default)}]",
        )
        for one in options
    ]


def _type_name(annotation: Any) -> str:
    """Return an annotation as text, with its range: "float > 0"; "" without an annotation."""
    if annotation is inspect.Parameter.empty:
        return ""
    meta = [one for one in getattr(annotation, "__metadata__", ()) if hasattr(one, "gt")]
    ranges = [
        f"{sign} {getattr(one, name)}"
        for one in meta
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if getattr(one, name) is not None
    ]
    return " ".join([inspect.formatannotation(annotation.__origin__ if meta else annotation), *ranges])


MAIN = (
    ("model.path", "model"), ("data.train", "data"), ("reward", "reward"), ("out", "out"), ("seed", "seed"),
    ("optim.lr", "lr"), ("rollout.num-steps", "num-steps"), ("train.num-steps", "num-steps"),
    ("train.num-epochs", "num-epochs"), ("train.batch-size", "batch-size"), ("rollout.prompts-per-step", "prompts-per-step"),
    ("algorithm.num-generations", "num-generations"), ("rollout.mini-batch-size", "mini-batch-size"),
    ("rollout.ppo-epochs", "ppo-epochs"), ("sampling.max-new-tokens", "max-new-tokens"),
    ("sampling.temperature", "temperature"), ("algorithm.kl-in-reward.coef", "kl-in-reward.coef"),
    ("algorithm.kl-in-loss.coef", "kl-in-loss.coef"), ("algorithm.beta", "beta"), ("algorithm.surrogate.clip-low", "clip-low"),
    ("algorithm.surrogate.clip-high", "clip-high"), ("algorithm.advantage.gae-lambda", "gae-lambda"),
    ("model.lora.rank", "lora.rank"), ("model.chat-template", "chat-template"), ("train.save-every", "save-every"),
    ("eval.data", "eval"), ("eval.every", "eval.every"), ("eval.judge", "eval.judge"), ("eval.keep-best", "keep-best"),
    ("eval.early-stop.patience", "early-stop"), ("learner.backend", "learner"), ("generator.name", "generator"), ("trackers", "trackers"),
)  # fmt: skip
"""Options in the short help, as (full name, short name)."""


def main_lines(lines: list[str]) -> list[str]:
    """Return the lines of the short help: only the main options, with their short names."""
    found: dict[str, str] = {}
    for line in lines:
        name, _, rest = line.strip().removeprefix("--").partition(" ")
        found.setdefault(name, rest.strip())
    shown = [f"  --{short:<22}  {found[full]}" for full, short in MAIN if full in found]
    more = sum(line.startswith("  --") for line in lines) - len(shown)
    return ["the main options [default]:", *shown, "", f"and {more} more: --help-all"]
