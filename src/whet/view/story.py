"""The report of one run or several: headline, main picture, curves, samples, self-checks, recipe and environment."""

from collections.abc import Sequence
from typing import Any

from whet.view import samples
from whet.view.curves import MOST_OTHERS, curves, main_plots, told
from whet.view.plots import number
from whet.view.record import Run, resumes, skipped
from whet.view.report import Block, Figures, Folded, Prose, Section, Source, Table, cut, page

MOST_CAUTIONS = 50
"""Largest number of cautions that are shown."""
MOST_LISTED = 20
"""Largest number of steps in a list of steps."""


def report_page(runs: Sequence[Run], differing: Sequence[tuple[str, Sequence[str]]] = ()) -> str:
    """Return the report of runs as HTML. `differing` has the recipe fields in which they differ, with the value in each run."""
    if len(runs) == 1:
        return page(f"{runs[0].method}: {runs[0].folder.name}", what_was_run(runs[0]), sections(runs[0]))
    names = labels(runs)
    seeds = same_recipe(runs, differing)
    methods = ", ".join(dict.fromkeys(run.method for run in runs))
    lead = f"{len(runs)} runs of {'one recipe with different seeds' if seeds else 'different recipes'}: {', '.join(names)}."
    return page(f"{methods}: {len(runs)} runs", lead, comparison(runs, names, differing, seeds=seeds))


def same_recipe(runs: Sequence[Run], differing: Sequence[tuple[str, Sequence[str]]]) -> bool:
    """Return whether the recipes are the same apart from the seed and the folder."""
    return len({run.method for run in runs}) == 1 and all(name in ("seed", "out") for name, _ in differing)


def labels(runs: Sequence[Run]) -> list[str]:
    """Return a name of each run: of its folder, with as many folders above it as are needed to tell them apart."""
    for depth in range(1, max(len(run.folder.parts) for run in runs) + 1):
        found = ["/".join(run.folder.parts[-depth:]) for run in runs]
        if len(set(found)) == len(found):
            return found
    return [f"{run.folder} ({number_})" for number_, run in enumerate(runs, 1)]


def sections(run: Run) -> list[Section]:
    """Return the sections of the report of one run."""
    if not run.rows:
        empty = Prose(
            f"The run in {run.folder} has no finished step yet, so there is nothing to plot. Call whet report again later."
        )
        return [Section("Nothing to show yet", [empty]), *_checks(run), *_recipe(run)]
    plots, words = main_plots([run], [run.folder.name], seeds=False)
    own, others = curves([run], [run.folder.name], seeds=False)
    return [
        Section("Result", [_state(run), Figures(plots), Prose(words), headline(run), Prose(_averaged(run))]),
        Section("Curves", _curve_blocks(own, others, run)),
        Section("Samples", samples.blocks(run)),
        *_checks(run),
        *_recipe(run),
    ]


def comparison(
    runs: Sequence[Run], names: Sequence[str], differing: Sequence[tuple[str, Sequence[str]]], *, seeds: bool
) -> list[Section]:
    """Return the sections of the report of several runs."""
    begun = [(run, name) for run, name in zip(runs, names, strict=True) if run.rows]
    states = Table(("run", "method", "state", "best step", "time"), [
        [name, run.method, run.state, "" if run.best is None else str(run.best), duration(run.seconds)]
        for run, name in zip(runs, names, strict=True)
    ], text=True)  # fmt: skip
    fields = [[name, *values] for name, values in differing if name != "out"]
    told_fields: list[Block] = (
        [Table(("field", *names), fields, text=True)] if fields else [Prose("The recipes do not differ.")]
    )
    out = [Section("Runs", [states])]
    if begun:
        alive, short = [run for run, _ in begun], [name for _, name in begun]
        plots, words = main_plots(alive, short, seeds=seeds)
        own, others = curves(alive, short, seeds=seeds)
        out = [
            Section("Result", [Figures(plots), Prose(words), states, *_ends(alive, short)]),
            Section("Recipe fields that differ", told_fields),
            Section("Curves", _curve_blocks(own, others, alive[0])),
        ]
    else:
        out.append(Section("Recipe fields that differ", told_fields))
    for run, name in zip(runs, names, strict=True):
        inner: list[Block] = [_state(run), headline(run), *samples.blocks(run, 2)] if run.rows else [_state(run)]
        for section in [*_checks(run), *_recipe(run)]:
            inner += [Prose(f"{section.title}:"), *section.blocks]
        out.append(
            Section(f"Run {name}", [Prose(what_was_run(run)), Folded("numbers, samples, self-checks, recipe", inner)])
        )
    return out


def _ends(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    """Return a table with the numbers at the best step and at the end of each run."""
    rows = []
    for name in dict.fromkeys(one for run in runs for one in _headlines(run)):
        values = [
            (run.at(name, run.best if run.best is not None else run.steps), run.at(name, run.steps)) for run in runs
        ]
        rows.append([told(name), *(f"{_number(best)} / {_number(end)}" for best, end in values)])
    return [Prose("Each cell: at the best step / at the end."), Table(("", *names), rows)]


def what_was_run(run: Run) -> str:
    """Return what was run in one line: method, model, data, size, time and machine."""
    recipe, environment = run.recipe, run.environment
    model, data = _at(recipe, "model", "path"), _at(recipe, "data", "train")
    parts = [f"{run.method} on {cut(model or 'a model', 200)}"]
    parts += [f"rows of {cut(data, 200)}"] if isinstance(data, str) and data else []
    size, answers = _size(run), _at(recipe, "algorithm", "num_generations")
    if size is not None:
        each = f" with {_count(answers, 'answer')} each" if run.online and isinstance(answers, int) else ""
        parts.append(f"{_count(run.steps, 'step')} of {_count(size, 'prompt' if run.online else 'row')}{each}")
    else:
        parts.append(_count(run.steps, "step"))
    parts.append(duration(run.seconds))
    machine = [f"{environment[name]}" for name in ("machine",) if name in environment]
    machine += [_count(environment[f"{name}s"], name) for name in ("thread", "worker") if f"{name}s" in environment]
    machine += [f"{name} {environment[name]}" for name in ("torch", "transformers", "python") if name in environment]
    parts += [cut(", ".join(machine), 300)] if machine else []
    return "; ".join(parts) + "."


def _count(number_: Any, what: str) -> str:
    return f"{number_} {what}{'' if number_ == 1 else 's'}"


def _size(run: Run) -> int | None:
    found = _at(run.recipe, "rollout", "prompts_per_step") if run.online else _at(run.recipe, "train", "batch_size")
    return found if isinstance(found, int) else None


def _at(tree: Any, *path: str) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def duration(seconds: float) -> str:
    """Return a time in words.

    >>> duration(4.2), duration(125), duration(7384)
    ('4.2 s', '2 min 5 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def _state(run: Run) -> Prose:
    best = f" Best step: {run.best}, by {told(run.judged_by)}." if run.best is not None else ""
    ended = run.state.startswith("finished") or run.ended_early
    return Prose(f"{run.state[:1].upper()}{run.state[1:]}.{best}", "" if ended else "caution")


def _headlines(run: Run) -> list[str]:
    wins = [name for name in run.series if name.startswith("eval/win_rate/")]
    passes = [name for name in run.series if name.startswith("eval/pass@")]
    if run.online:
        names = ["score", *run.held_out[:6], *wins[:3], *passes[:3], "kl", "eval/kl", "entropy", "length", "truncated"]
    else:
        names = [
            "loss",
            *run.held_out[:3],
            "accuracy",
            "eval/accuracy",
            "margin",
            "eval/margin",
            "eval/calibration_error",
        ]
    return [name for name in dict.fromkeys(names) if name in run.series]


def headline(run: Run) -> Table:
    """Return the table of the numbers that say most, at the start, the best step and the end."""
    moments = [("start", run.start), *([("best", run.best)] if run.best is not None else []), ("end", run.steps)]
    rows = []
    for name in _headlines(run):
        values = [run.at(name, step) for _, step in moments]
        rows.append(
            [
                told(name),
                *(
                    _number(value) + _interval(run, name, step)
                    for value, (_, step) in zip(values, moments, strict=True)
                ),
            ]
        )
    return Table(("", *(f"{head} ({step})" for head, step in moments)), rows)


def _interval(run: Run, name: str, step: int) -> str:
    """Return the interval of a win rate in words, "" for another number."""
    if not name.startswith("eval/win_rate/"):
        return ""
    ends = [run.at(name.replace("win_rate/", f"win_rate_{end}/", 1), step) for end in ("low", "high")]
    return "" if None in ends else f" ({_number(ends[0])} to {_number(ends[1])})"


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def _averaged(run: Run) -> str:
    means = (
        f" Numbers of training are means over the last {run.window} steps, at the start those of the step."
        if run.window > 1
        else ""
    )
    return f"In brackets: the step.{means} Numbers of an evaluation are named held-out; other numbers are of training batches."


def _curve_blocks(own: Sequence[Any], others: Sequence[Any], run: Run) -> list[Block]:
    out: list[Block] = [Figures(own)] if own else [Prose("No further numbers were logged.")]
    if others:
        more = len(run.series) > MOST_OTHERS and len(others) >= MOST_OTHERS
        note = [Prose(f"The first {MOST_OTHERS} are shown; all are in metrics.jsonl.")] if more else []
        out.append(Folded(f"all other numbers ({len(others)})", [*note, Figures(others)]))
    return out


def _checks(run: Run) -> list[Section]:
    """Return the section about what the self-checks said."""
    out: list[Block] = []
    for stop in run.stops[:MOST_CAUTIONS]:
        step, message = stop.get("step"), cut(stop.get("message", ""), 1200)
        over = isinstance(step, int) and step <= run.steps
        later = " A later session passed this step." if over else ""
        out.append(Prose(f"A self-check stopped the run. {message}{later}", "" if over else "caution"))
    for one in run.cautions[:MOST_CAUTIONS]:
        text = cut(one["text"], 1200)
        out.append(Prose(text if text.startswith("step ") else f"step {one['step']}: {text}", "caution"))
    if len(run.cautions) > MOST_CAUTIONS:
        out.append(Prose(f"{len(run.cautions) - MOST_CAUTIONS} further cautions are in cautions.jsonl."))
    lost, again = skipped(run), resumes(run)
    if lost:
        out.append(Prose(f"Skipped rollouts, in which no weight changed: steps {_listed(lost)}.", "caution"))
    if again:
        out.append(Prose(f"The run was resumed {len(again)} times, after steps {_listed(again)}."))
    out += [Prose(f"Not readable: {cut(note, 600)}", "caution") for note in run.notes]
    return [Section("Self-checks", out or [Prose("The self-checks found nothing to report.")])]


def _listed(steps: Sequence[int]) -> str:
    more = f" and {len(steps) - MOST_LISTED} more" if len(steps) > MOST_LISTED else ""
    return ", ".join(map(str, steps[:MOST_LISTED])) + more


def _recipe(run: Run) -> list[Section]:
    """Return the section with the recipe and the environment."""
    out: list[Block] = []
    if run.changed is None:
        out.append(
            Prose("The recipe does not fit this version of whet, so its differences from the defaults are not known.")
        )
    elif run.changed:
        rows = [[one.name, one.value, one.default] for one in run.changed]
        out += [
            Prose("Fields that differ from the defaults of the method:"),
            Table(("field", "value", "default"), rows, text=True),
        ]
    else:
        out.append(Prose("Every field has the default of the method."))
    out.append(Folded("the whole recipe (recipe.yaml)", [Source(run.recipe_text)]))
    if run.environment:
        rows = [[name, cut(value, 200)] for name, value in run.environment.items() if name != "resumed_at"]
        out.append(Folded("environment", [Table(("", ""), rows, text=True)]))
    return [Section("Recipe and environment", out)]
