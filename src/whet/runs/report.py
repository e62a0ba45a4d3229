"""whet.report: one HTML page about one run or several, also written at the end of every run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whet.data.files import write_text
from whet.errors import RecipeError, first_line
from whet.runs import config
from whet.runs.folder import differing, in_use
from whet.runs.recipe import kind_of
from whet.runs.yaml_text import read_yaml, yaml_tree
from whet.terminal import caution
from whet.view.record import Changed, Run, read_run
from whet.view.report import GENERATOR, cut
from whet.view.story import report_page

FILE = "report.html"
"""The name of the report in a run folder."""
LONGEST_VALUE = 200
"""Largest number of characters of a value of a recipe in a table."""


def report(*runs: str | Path, out: str | Path | None = None) -> Path:
    """Write one HTML page about run folders, of finished, running or killed runs. Return its path.

    The page needs no other file and no network. `out` is the file; its default is `report.html` in the run folder, and for several
    runs `report.html` in the current folder. Several runs with one recipe, apart from the seed and the folder, are shown as means
    with bands; others as one line per run, with a table of the recipe fields in which they differ.

    Raises RecipeError if a folder contains no run, or if `out` is a file that is no report; DataError with file and line if
    metrics.jsonl is damaged.
    """
    if not runs:
        raise RecipeError("report: which run? whet report RUN [RUN ...] [--out FILE]")
    folders = [Path(one) for one in runs]
    for number, one in enumerate(folders):
        if not (one / "recipe.yaml").is_file():
            raise RecipeError(f"{one}: no run is there; give a run folder, with its recipe.yaml and metrics.jsonl")
        if one.resolve() in [other.resolve() for other in folders[:number]]:
            raise RecipeError(f"{one}: this run is given twice; give each run once")
    where = Path(out) if out is not None else folders[0] / FILE if len(folders) == 1 else Path(FILE)
    _check_out(where)
    found = [record(one) for one in folders]
    text = report_page(found, _differing([one.recipe for one in found]))
    try:
        write_text(where, text)
    except OSError as error:
        raise RecipeError(f"out: {where} cannot be written ({error.strerror or first_line(error)})") from error
    return where


def at_end(folder: Path) -> None:
    """Write the report of a run that ends now into its folder. A failure is a caution: the run is not lost for it."""
    try:
        write_text(folder / FILE, report_page([record(folder, ended=True)]))
    except Exception as error:
        caution(f"{folder / FILE}: the report could not be written ({first_line(error)}); try whet report {folder}")


def _check_out(where: Path) -> None:
    """Raise RecipeError if the file is there and is no report, or cannot be a file."""
    if where.is_symlink() or (where.exists() and not where.is_file()):
        raise RecipeError(f"out: {where} is a folder, a link or a device; name a file with --out")
    if where.is_file():
        with where.open("rb") as file:
            if GENERATOR not in file.read(4096):
                raise RecipeError(f"out: {where} exists and is not a report of whet; name another file with --out")


def record(folder: Path, *, ended: bool = False) -> Run:
    """Return the record of a run. With `ended`, the session that holds the lock of its folder has made its last step."""
    recipe = read_yaml(folder / "recipe.yaml")
    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    return read_run(folder, recipe, text, _changed(recipe), running=not ended and in_use(folder))


def _changed(recipe: Mapping[str, Any]) -> list[Changed] | None:
    """Return the fields of a recipe that differ from the defaults of its method, None if it does not fit this version."""
    try:
        method = str(recipe["method"])
        kind = kind_of(method)
        defaults = yaml_tree(config.to_yaml(config.resolve(kind, method, None, []), method))
        config.converted({key: value for key, value in recipe.items() if key != "method"}, kind, "")
    except (KeyError, RecipeError):
        return None
    named = [name for name in differing(defaults, recipe) if name != "out"]
    return [Changed(name, _value(recipe, name), _value(defaults, name)) for name in named]


def _differing(recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the dotted names of the fields in which recipes differ, with the value of each as text."""
    names = dict.fromkeys(name for other in recipes[1:] for name in differing(recipes[0], other))
    return [(name, [_value(one, name) for one in recipes]) for name in names]


def _value(tree: Any, name: str) -> str:
    """Return the value of a field as text; "" if it is not there."""
    for key in name.split("."):
        if not isinstance(tree, Mapping) or key not in tree:
            return ""
        tree = tree[key]
    return cut("none" if tree is None else _set(tree), LONGEST_VALUE)


def _set(value: Any) -> Any:
    """Return a value without the fields inside it that say nothing: null, false, and empty ones."""
    if isinstance(value, Mapping):
        return {key: _set(one) for key, one in value.items() if not (one is None or one is False or one in ({}, []))}
    return [_set(one) for one in value] if isinstance(value, list) else value
