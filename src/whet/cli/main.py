"""The command line: the table of commands, parsing of options, and errors as one message."""

import itertools
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from whet.errors import RecipeError, UserError, WhetError, shown
from whet.methods import catalogue
from whet.terminal import caution, guard, say

OFFLINE = {
    **{name: one.about for name, one in catalogue.SUPERVISED.items()},
    "reward": "train a reward model on rankings, pairs, absolute scores or step labels",
    **{name: one.about for name, one in catalogue.PREFERENCE.items()},
}
ONLINE = {name: one.about for name, one in {**catalogue.ONLINE, **catalogue.ONLINE_PREFERENCE}.items()}
OTHERS = {
    "train": "train with the method that a recipe names",
    "sample": "generate K answers to each prompt of a file",
    "rank": "rank answers with a judge, by their scores, or with an own ranker",
    "eval": "win rate under a judge, accuracy of a reward model, or held-out loss",
    "serve": "run a vLLM server on this machine, for runs with generator.name server",
    "explain": "describe a recipe: its objective with numbers, its batch sizes, its optimum",
    "plan": "estimate memory, traffic and time of a training recipe on several GPUs",
    "verify_resume": "train a recipe twice, once with kills and resumes, and compare the runs to the bit",
    "replay": "compute a step of a run again from its record, and compare the numbers",
    "diff": "the first step and column or tensor in which two runs differ",
    "why": "the answers of a step token by token: what each adds to the loss",
    "report": "one HTML page about one run or several: curves, samples, what the self-checks said",
    "demo": "run all training stages on a small synthetic task, and write a report",
}
RESERVED = {
    "recipe": "write the recipe file without an option: whet VERB RECIPE.yaml",
    "method": "the method is the verb: whet ppo, or whet train RECIPE.yaml with a line `method: ppo`",
    "tokenizer": "the tokenizer is read from the model's folder; leave it out",
    "resume": "it is a flag and takes no value; write --resume",
    "quiet": "it is a flag and takes no value; write --quiet",
}
"""Names that are arguments of the Python functions and not fields of a recipe."""
FLAGS = ("resume", "debug", "quiet", "help", "help-all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 (a run failed), 2 (invalid input), or 128 plus the number of the signal
    that ended it (130 for Ctrl-C)."""
    if argv is None:  # the process is a command, and not a Python program that calls this
        guard()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        return _command(words)
    except WhetError as error:
        if debug:
            raise
        for one in getattr(error, "problems", ()) or (error,):
            caution(shown(one))
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt as error:
        if debug:
            raise
        caution(f"interrupted; {str(error) or 'what was written before is kept'}")
        return 128 + getattr(error, "signum", 2)
    except BrokenPipeError:
        works = {**OFFLINE, **ONLINE, "train": "", "sample": "", "rank": "", "eval": "", "demo": ""}
        if words[0].replace("-", "_") not in works or not {"-h", "--help", "--help-all"}.isdisjoint(words):
            sys.stderr.close()  # the reader closed the pipe (`whet --help | head`)
            return 0
        with suppress(OSError):  # nothing to write to, or the connection of a run was closed
            caution("a pipe or connection was closed at its other end; what was written before is kept")
        return 128 + 13
    except OSError as error:
        if debug:
            raise
        caution(f"{shown(error)}; what was written before is kept")
        return 1


def run(verb: str, recipe: str | None, flags: set[str], fields: dict[str, Any]) -> Any:
    """Run a verb with the public functions of whet and return its result: the run folder, a file, or metrics (eval)."""
    import whet

    if verb == "demo":
        from whet.demo.run import demo

        return demo(fields)
    if verb in {**OFFLINE, **ONLINE}:
        folder = whet.train(verb, recipe, resume="resume" in flags, quiet="quiet" in flags, **fields)
        from whet.distributed import first  # torch, which a refusal does not need
        from whet.runs.summary import following

        if "quiet" not in flags and first():
            lines = [*following(folder), shlex.join(["whet", "report", str(folder)])]
            say("\n".join(["", "next:", *(f"  {line}" for line in lines)]), error=True)
        return folder
    calls: dict[str, Any] = {"sample": whet.sample, "rank": whet.rank, "eval": whet.evaluate, "serve": whet.serve}
    return calls[verb](recipe, **fields)


def _named_method(about: str, recipe: str | None) -> str:
    """Return the `method` of a recipe. Raise RecipeError if the file does not exist or names no method."""
    from pathlib import Path

    from whet.runs.yaml_text import read_yaml

    if recipe is None:
        raise RecipeError(f"{about}: which recipe? whet {about} RECIPE.yaml")
    if not Path(recipe).is_file():
        raise _unknown_verb(recipe) if about != "train" else RecipeError(f"{recipe}: no such recipe")
    method = str(read_yaml(Path(recipe)).get("method", "")).replace("-", "_")
    if not method:
        raise RecipeError(
            f"{recipe}: it names no method; add a line such as `method: ppo`, or whet "
            + (f"{about} ppo {recipe}" if about != "train" else f"ppo {recipe}")
        )
    if method not in {**OFFLINE, **ONLINE} and (method not in ("sample", "rank", "eval", "serve") or about != "train"):
        raise RecipeError(f"{recipe}: method: {_unknown_verb(method)}")
    return method


def _about(about: str, words: list[str]) -> int:
    """Run `whet explain VERB [RECIPE.yaml]`, or `whet explain RECIPE.yaml` if the recipe names its method, and print the
    result. `whet plan` and `whet verify-resume` have the same forms. Return the exit status."""
    name = about.replace("_", "-")
    if not words or words[0].startswith("-"):
        raise RecipeError(f"{name}: which method? whet {name} ppo [RECIPE.yaml], or a recipe with a line `method: ppo`")
    if words[0] == "train":
        words = words[1:] or [""]
    verb, rest = words[0].replace("-", "_"), words[1:]
    if verb not in {**OFFLINE, **ONLINE, **OTHERS}:
        verb, rest = _named_method(name, words[0]), words
    recipe, overrides, flags = parsed(rest)
    import whet

    fields = _grouped(overrides)
    if about == "verify_resume":
        differs = whet.verify_resume(verb, recipe, quiet="quiet" in flags, **fields)
        say(
            f"the runs part (without kills against with kills) {differs}"
            if differs
            else "equal: metrics, rollouts, the last checkpoint, the model"
        )
        return 1 if differs else 0
    say((whet.explain if about == "explain" else whet.plan)(verb, recipe, **fields))
    return 0


INSPECT: dict[str, tuple[int, dict[str, str]]] = {
    "replay": (1, {"step": "number of the step, from 1", "accept_changed": "name of an input that may have changed"}),
    "diff": (2, {}),
    "why": (
        1,
        {
            "step": "number of the step, from 1",
            "sample": "number of the answer, pair or row of the step, from 0; without it, a table of all",
            "accept_changed": "name of an input that may have changed",
        },
    ),
}
"""The commands that read run folders: the number of folders, and the options with their meanings."""


def _inspected(verb: str, words: list[str]) -> int:
    """Run `replay`, `diff` or `why`, print the result, and return 0 if it is as expected, 1 if there is a difference."""
    import whet
    from whet.distributed import first

    count, known = INSPECT[verb]
    runs = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    if len(runs) != count:
        wanted = " ".join(["RUN"] if count == 1 else ["RUN_A", "RUN_B"])
        raise RecipeError(f"{verb}: expected whet {verb} {wanted} with --options after it, got {' '.join(words)!r}")
    recipe, overrides, flags = parsed(words[count:])
    options = _grouped(overrides)
    for name in [*options, *(flags - {"quiet", "debug"}), *([recipe] if recipe else [])]:
        if name not in known:
            raise RecipeError(
                f"{verb}: unknown option {name!r}; it has {', '.join(f'--{one}' for one in known).replace('_', '-') or 'none'}"
            )
    if "step" in known and "step" not in options:
        raise RecipeError(f"{verb}: which step? whet {verb} {runs[0]} --step 1")
    quiet = {} if verb == "diff" else {"quiet": "quiet" in flags}
    result = getattr(whet, verb)(*runs, **options, **quiet)
    if first():
        say(result)
    return 0 if result.equal else 1


def _reported(words: list[str]) -> int:
    """Run `whet report RUN [RUN ...] [--out FILE]`, and print the path of the page."""
    import whet

    runs = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    extra, overrides, flags = parsed(words[len(runs) :])
    options = _grouped(overrides)
    unknown = [*(name for name in options if name != "out"), *sorted(flags - {"quiet", "debug"})]
    if not runs or extra is not None:
        raise RecipeError(
            f"report: expected whet report RUN [RUN ...] with --out FILE after it, got {' '.join(words)!r}"
        )
    if unknown:
        raise RecipeError(f"report: unknown option {unknown[0]!r}; it has --out")
    say(whet.report(*runs, **{name: str(value) for name, value in options.items()}))
    return 0


def _command(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        say(_overview())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        say(f"whet {version('whet')}")
        return 0
    verb = words[0].replace("-", "_")
    if verb not in {**OFFLINE, **ONLINE, **OTHERS}:
        raise _unknown_verb(words[0])
    if verb in ("explain", "plan", "verify_resume") and not {"-h", "--help"} & set(words):
        return _about(verb, words[1:])
    if verb in INSPECT and not {"-h", "--help", "--help-all"} & set(words):
        return _inspected(verb, words[1:])
    if verb == "report" and not {"-h", "--help", "--help-all"} & set(words):
        return _reported(words[1:])
    recipe, overrides, flags = parsed(words[1:])
    if flags & {"help", "help-all"}:
        say(_verb_help(verb, _grouped(overrides), everything="help-all" in flags))
        return 0
    if verb == "train":
        verb = _named_method("train", recipe)
    if verb in OTHERS and "resume" in flags:
        raise RecipeError(f"--resume: {verb} has nothing to resume; call it again")
    if verb == "demo":
        if recipe is not None:
            raise RecipeError(f"{recipe}: demo takes no recipe; its own are in the package")
        return run(verb, None, flags, _grouped(overrides))
    result = run(verb, recipe, flags, _grouped(overrides))
    from whet.distributed import first  # torch, which a refusal does not need

    if isinstance(result, dict):
        width = max(map(len, result))
        say("\n".join(f"{name:<{width}}  {value:.6g}" for name, value in result.items()))
    elif first():
        say(result)
    return 0


def parsed(words: Sequence[str]) -> tuple[str | None, list[tuple[str, Any]], set[str]]:
    """Parse the words after a verb and return (recipe file, overrides in order, flags). Values are parsed as YAML.

    Raise RecipeError for an unexpected word.
    """
    from whet.runs.yaml_text import given_value

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
            if name.replace("-", "_") in RESERVED:
                raise RecipeError(f"--{name}: {RESERVED[name.replace('-', '_')]}")
            overrides.append((name.replace("-", "_"), given_value(name, value)))
        elif recipe is None:
            recipe = word
        else:
            raise RecipeError(f"unexpected word {word!r}; options are written --name value")
    return recipe, overrides, flags


def _grouped(overrides: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the overrides by name; the last value of a name is used. Repeated `--reward` or `--judge` values form a list."""
    out: dict[str, Any] = {}
    for name, value in overrides:
        if name in ("reward", "judge", "accept_changed") and name in out:
            out[name] = [*(out[name] if isinstance(out[name], list) else [out[name]]), value]
        else:
            out[name] = value
    return out


def _unknown_verb(verb: str) -> RecipeError:
    from whet.runs.config import unknown_method

    return unknown_method(verb, [*OFFLINE, *ONLINE, *OTHERS])


def _overview() -> str:
    lines = ["usage: whet VERB [RECIPE.yaml] [--field value ...] [--resume] [--quiet] [--debug]", ""]
    for title, verbs in (
        ("train on data", OFFLINE),
        ("train on generated answers", ONLINE),
        ("other commands", OTHERS),
    ):
        lines.append(f"{title}:")
        lines += [f"  {verb.replace('_', '-'):<22} {about}" for verb, about in verbs.items()]
        lines.append("")
    return "\n".join(
        [
            *lines,
            "whet VERB --help lists the main options of a verb, --help-all every field; every field can be set as --section.field value",
        ]
    )


def _adapter_help(verb: str, given: Mapping[str, Any]) -> list[str]:
    """Return the options of the generator and the learner that are named beside --help, or how to list them."""
    from whet.cli import help

    lines = []
    sections = ["generator"] if verb in {**ONLINE, "sample": "", "eval": ""} else []
    for section in [*sections, *(["learner"] if verb in {**ONLINE, **OFFLINE} else [])]:
        name = given.get(section, given.get(f"{section}.{'backend' if section == 'learner' else 'name'}"))
        known = help.adapters(section)
        if name in known:
            lines += ["", f"options of {section} {name} [default]:", *help.adapter_lines(section, name)]
        else:
            lines += ["", f"options of a {section}: whet {verb} --{section} {' | '.join(known)} --help-all"]
    return lines + _reward_help(verb, given)


def _reward_help(verb: str, given: Mapping[str, Any]) -> list[str]:
    """Return the options of the ready-made reward that is named beside --help, or how to list them."""
    from whet.cli import help

    field = "judge" if verb in ("eval", "rank") else "reward" if verb in {**ONLINE, "sample": ""} else ""
    if not field:
        return []
    known = {name: file for name, file in help.adapters("reward").items() if name != "http"}
    name = given.get(field, given.get(f"{field}.source"))
    if isinstance(name, str) and name in known:
        own = help.adapter_lines("reward", name, "judge-options" if verb == "rank" else field)
        return ["", f"options of {field} {name} [default]:", *own]
    return ["", f"options of a {field}: whet {verb} --{field} {' | '.join(known)} --help-all"]


def _verb_help(verb: str, given: Mapping[str, Any] = {}, *, everything: bool = False) -> str:
    from whet.cli import help
    from whet.runs import config
    from whet.runs.recipe import PlanOptions, VerifyOptions, kind_of

    about = {**OFFLINE, **ONLINE, **OTHERS}[verb]
    lines = [
        f"usage: whet {verb.replace('_', '-')} [RECIPE.yaml] [--field value ...]",
        "",
        about,
        "",
        "fields [default]:",
    ]
    if verb == "demo":
        lines.append("  --seed     seed of the synthetic data and of all random numbers [0]")
        lines.append("  --out      folder; an earlier demo in it is renamed [runs/demo]")
        return "\n".join([*lines, "  --quick    a short run, which only shows that everything works [False]"])
    if verb in INSPECT:
        count, options = INSPECT[verb]
        lines[0] = f"usage: whet {verb} {'RUN' if count == 1 else 'RUN_A RUN_B'} [--option value ...]"
        named = [f"  --{name.replace('_', '-'):<16} {meaning}" for name, meaning in options.items()]
        return "\n".join(
            [*lines[:3], *(["", "options:", *named] if named else []), "", "exit status: 0 equal, 1 different"]
        )
    if verb == "report":
        lines[0] = "usage: whet report RUN [RUN ...] [--out FILE]"
        default = "report.html in the run folder; of several runs, report.html in the current folder"
        return "\n".join(
            [
                *lines[:3],
                "",
                "options [default]:",
                f"  --out      the HTML file; an earlier report is replaced [{default}]",
            ]
        )
    if verb == "train":
        return "\n".join([*lines[:3], "", "takes every field of the recipe's method"])
    if verb in ("explain", "plan", "verify_resume"):
        name = verb.replace("_", "-")
        lines[0] = (
            f"usage: whet {name} VERB [RECIPE.yaml] [--field value ...], or whet {name} RECIPE.yaml with a line `method: VERB`"
        )
        own_options = {"plan": PlanOptions(0), "verify_resume": VerifyOptions()}.get(verb)
        own = ["options [default]:", *help.recipe_lines(type(own_options), own_options), ""] if own_options else []
        return "\n".join([*lines[:3], "", *own, "takes every field of the verb it is about"])
    kind = kind_of(verb)
    try:  # with the parts and adapters that are named beside --help
        defaults = config.resolve(kind, verb, None, list(given.items()))
    except RecipeError:
        defaults = config.resolve(kind, verb, None, [])
    lines += help.recipe_lines(kind, defaults)
    slots = getattr(defaults, "algorithm", None)
    if slots:
        lines += ["", "the method's slots [default]:", *help.method_lines(verb, slots)]
    flags = "flags: --resume (continue a run), --accept-changed NAME (with an input that has changed), --quiet, --debug (show tracebacks)"
    if everything or verb not in {**OFFLINE, **ONLINE}:
        lines += _adapter_help(verb, given)
    else:
        lines = [*lines[:4], *help.main_lines(lines)]
        flags += ", --help-all (every option)"
    return "\n".join([*lines, "", flags])
