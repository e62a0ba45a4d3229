"""The command line: verbs, overrides, and errors as one message."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from whet.errors import RecipeError, UserError, WhetError
from whet.methods import catalogue

OFFLINE = {
    "pretrain": "next-token training on `text` rows",
    "sft": "instruction tuning on prompt + completion, messages or text rows; the answers are trained",
    "reward": "a reward model from rankings, pairs, absolute scores or step labels",
    **{name: one.about for name, one in catalogue.PREFERENCE.items()},
}
ONLINE = {name: one.about for name, one in {**catalogue.ONLINE, **catalogue.ONLINE_PREFERENCE}.items()}
OTHERS = {
    "sample": "K answers for every prompt of a file",
    "rank": "answers become rankings, by a judge function or by their scores",
    "eval": "win rate under a judge, a reward model's accuracy, or a held-out loss",
    "serve": "a vLLM server on this machine, from which runs take answers (generator.name server)",
    "explain": "a recipe's objective with its numbers, its arithmetic, and where it ends",
    "plan": "what a training recipe needs on so many GPUs: memory, traffic, time",
    "demo": "the whole recipe on a little world, with a report",
}
FLAGS = ("resume", "debug", "quiet", "help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status is 0, 1 (a run failed), 2 (what was given cannot work) or 130 (Ctrl-C)."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        return _command(words)
    except WhetError as error:
        if debug:
            raise
        print(f"whet: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt as error:
        if debug:
            raise
        print(f"whet: interrupted; {error or 'nothing was saved since the last checkpoint'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away (`whet --help | head`); nothing is left to say
        return 0
    except OSError as error:
        if debug:
            raise
        print(f"whet: {error}; what was written before is kept", file=sys.stderr)
        return 1


def run(verb: str, recipe: str | None = None, *, resume: bool = False, quiet: bool = True, **fields: Any) -> Any:
    """A verb from Python: `run("sft", model="DIR", data="my.jsonl", out="runs/mine")`.

    `fields` are the recipe's fields, nested ones as dicts, or with dots: `run("ppo", **{"kl.coef": 0.1})`.
    Returns what the verb leaves: the run folder, the file, or the numbers of eval.
    """
    if verb == "demo":
        from whet.demo.run import demo

        return demo(fields)
    if verb not in {**OFFLINE, **ONLINE, **OTHERS}:
        raise _unknown_verb(verb)
    if verb in ("explain", "plan"):
        raise RecipeError(f"{verb}: from Python it is whet.{verb}(verb, recipe, **fields)")
    from whet.runs import config, verbs
    from whet.runs.recipe import kind_of

    resolved = config.resolve(kind_of(verb), verb, recipe, list(fields.items()))
    options = verbs.Options(resume, quiet)
    if verb in OFFLINE:
        return verbs.run_offline(verb, resolved, options)
    if verb in ONLINE:
        return verbs.run_online(verb, resolved, options)
    if verb == "serve":
        from whet.runs.serve import run_serve

        return run_serve(resolved)
    others: dict[str, Callable[..., Any]] = {"sample": verbs.run_sample, "rank": verbs.run_rank, "eval": verbs.run_eval}
    return others[verb](resolved, options)


def explain(verb: str, recipe: str | None = None, **fields: Any) -> str:
    """What `run` would do with the same arguments, in words and formulas."""
    if verb not in {**OFFLINE, **ONLINE}:
        raise _unknown_verb(verb) if verb not in OTHERS else RecipeError(f"explain: {verb} trains nothing")
    from whet.runs import config
    from whet.runs.explain import explanation
    from whet.runs.recipe import kind_of

    return explanation(verb, config.resolve(kind_of(verb), verb, recipe, list(fields.items())))


def plan(verb: str, recipe: str | None = None, **fields: Any) -> str:
    """What `run` would need on a number of GPUs: `plan("ppo", model="DIR", gpus=64, gpu_memory=80)`, as text."""
    if verb not in {**OFFLINE, **ONLINE}:
        raise _unknown_verb(verb) if verb not in OTHERS else RecipeError(f"plan: {verb} trains nothing")
    from whet.runs import config
    from whet.runs.plan import plan, taken
    from whet.runs.recipe import kind_of

    options, rest = taken(fields)
    return plan(verb, config.resolve(kind_of(verb), verb, recipe, list(rest.items())), options)


def _told(about: str, words: list[str]) -> str:
    """`whet explain VERB [RECIPE.yaml]`, or `whet explain RECIPE.yaml` where the recipe names its verb; so with plan."""
    if not words or words[0].startswith("-"):
        raise RecipeError(
            f"{about}: which method? whet {about} ppo [RECIPE.yaml], or a recipe with a line `method: ppo`"
        )
    verb, rest = words[0].replace("-", "_"), words[1:]
    if verb not in {**OFFLINE, **ONLINE, **OTHERS}:
        from pathlib import Path

        from whet.runs.config import read_yaml

        if not Path(words[0]).is_file():
            raise _unknown_verb(words[0])
        verb, rest = str(read_yaml(Path(words[0])).get("method", "")), words
        if not verb:
            raise RecipeError(
                f"{words[0]}: it names no verb; add a line such as `method: ppo`, or whet {about} ppo {words[0]}"
            )
    recipe, overrides, _ = parsed(rest)
    return (explain if about == "explain" else plan)(verb, recipe, **_grouped(overrides))


def _command(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"whet {version('whet')}")
        return 0
    verb = words[0].replace("-", "_")
    if verb not in {**OFFLINE, **ONLINE, **OTHERS}:
        raise _unknown_verb(words[0])
    if verb in ("explain", "plan") and not {"-h", "--help"} & set(words):
        print(_told(verb, words[1:]))
        return 0
    recipe, overrides, flags = parsed(words[1:])
    if "help" in flags:
        print(_verb_help(verb))
        return 0
    if verb in OTHERS and "resume" in flags:
        raise RecipeError(f"--resume: {verb} has nothing to resume; call it again")
    if verb == "demo":
        if recipe is not None:
            raise RecipeError(f"{recipe}: demo takes no recipe; its own are in the package")
        return run(verb, **_grouped(overrides))
    from whet.distributed import first

    result = run(verb, recipe, resume="resume" in flags, quiet="quiet" in flags, **_grouped(overrides))
    if isinstance(result, dict):
        width = max(map(len, result))
        print("\n".join(f"{name:<{width}}  {value:.6g}" for name, value in result.items()))
    elif first():
        print(result)
    return 0


def parsed(words: Sequence[str]) -> tuple[str | None, list[tuple[str, Any]], set[str]]:
    """(recipe file, overrides in order, flags) of the words behind a verb. Values are read as YAML scalars."""
    import yaml

    recipe, overrides, flags = None, [], set()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-h", *(f"--{flag}" for flag in FLAGS)):
            flags.add(word.lstrip("-").replace("h", "help", 1) if word == "-h" else word[2:])
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if not equals:
                if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                    value = "true"
                else:
                    value = rest.pop(0)
            overrides.append((name.replace("-", "_"), _scalar(value, yaml)))
        elif recipe is None:
            recipe = word
        else:
            raise RecipeError(f"unexpected word {word!r}; options are written --name value")
    return recipe, overrides, flags


def _scalar(value: str, yaml: Any) -> Any:
    """A value of the command line: a YAML scalar or flow list; text that is no YAML stays text."""
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    quoted = isinstance(found, str) and value[:1] == '"'  # "\n" in quotes is a line break
    return found if quoted or isinstance(found, (bool, int, float, list, dict)) or found is None else value


def _grouped(overrides: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Overrides by name, the last one counts; `--reward A --reward B` and `--judge A --judge B` become lists."""
    out: dict[str, Any] = {}
    for name, value in overrides:
        if name in ("reward", "judge") and name in out:
            out[name] = [*(out[name] if isinstance(out[name], list) else [out[name]]), value]
        else:
            out[name] = value
    return out


def _unknown_verb(verb: str) -> RecipeError:
    import difflib

    known = [*OFFLINE, *ONLINE, *OTHERS]
    near = difflib.get_close_matches(verb, known, n=1)
    return RecipeError(
        f"unknown verb {verb!r}; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}")
    )


def _overview() -> str:
    lines = ["usage: whet VERB [RECIPE.yaml] [--field value ...] [--resume] [--quiet] [--debug]", ""]
    for title, verbs in (("train on a file", OFFLINE), ("train on own answers", ONLINE), ("the rest", OTHERS)):
        lines.append(f"{title}:")
        lines += [f"  {verb.replace('_', '-'):<22} {about}" for verb, about in verbs.items()]
        lines.append("")
    return "\n".join(
        [*lines, "whet VERB --help lists the fields of a verb; every field can be set as --section.field value"]
    )


def _verb_help(verb: str) -> str:
    from whet.cli import help
    from whet.runs import config
    from whet.runs.recipe import PlanOptions, kind_of

    about = {**OFFLINE, **ONLINE, **OTHERS}[verb]
    lines = [
        f"usage: whet {verb.replace('_', '-')} [RECIPE.yaml] [--field value ...]",
        "",
        about,
        "",
        "fields [default]:",
    ]
    if verb == "demo":
        lines.append("  --seed     which world and which random choices [0]")
        lines.append("  --out      folder; an earlier demo there is set aside [runs/demo]")
        return "\n".join([*lines, "  --quick    a short form, which only shows that everything runs [False]"])
    if verb in ("explain", "plan"):
        lines[0] = (
            f"usage: whet {verb} VERB [RECIPE.yaml] [--field value ...], or whet {verb} RECIPE.yaml with a line `method: VERB`"
        )
        own = []
        if verb == "plan":
            own = ["options [default]:", *help.recipe_lines(PlanOptions, PlanOptions(0)), ""]
        return "\n".join([*lines[:3], "", *own, "takes every field of the verb it is about"])
    kind = kind_of(verb)
    defaults = config.resolve(kind, verb, None, [])
    lines += help.recipe_lines(kind, defaults)
    if getattr(defaults, "algorithm", None):
        lines += ["", "the method's slots [default]:", *help.method_lines(verb, defaults.algorithm)]
    return "\n".join([*lines, "", "flags: --resume (continue a run), --quiet, --debug (show tracebacks)"])
