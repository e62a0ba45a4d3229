"""Checks of a recipe's paths, rows and lengths that need neither torch nor transformers, so that a mistake is told at once.

`Session` makes the same checks again, and those that need a tokenizer. An error here has the words of the later one.
"""

import ast
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whet.calling.state import restored
from whet.data.fields import check_fields
from whet.data.files import read_json
from whet.data.forms import check_names
from whet.data.hub import require_datasets
from whet.data.places import files_of, kind_of
from whet.data.read import read_rows
from whet.errors import ModelError, Problems, RecipeError
from whet.loops.metrics import METRICS, direction, find, timed
from whet.methods import catalogue
from whet.methods.choices import OPTIONS, PAIR_LOSSES, PLAIN_SLOTS, SINGLE_LOSSES
from whet.models.code import refuse_code
from whet.models.folders import adapter_base, check_folder, has_tokenizer
from whet.registry import load_object
from whet.runs import config
from whet.runs import recipe as fields

PEEK = 64
"""Number of rows of a file that are looked at here."""
MOST = 64 << 20
"""Largest number of bytes of a file that has to be read whole to see its first row."""
NO_MODEL = "model.path: which model? give --model with a Hugging Face folder or a hub name"
NO_REWARD = 'reward: what scores the answers? give --reward with a reward-model folder or "file.py:function"'
NO_DATA = "data.train: which rows? give --data with a file or a dataset's name"
NO_ANSWERS = "data.train: which answers? give --data with one file of `responses` rows"


def refuse(verb: str, recipe: str | Path | None, given: Mapping[str, Any], *, resume: Any = False) -> None:
    """Check the arguments of a public function before its modules are loaded. Do nothing for a resume, under a launcher, and for
    Python objects. Raises RecipeError, DataError, ModelError, or one UserError with several of them."""
    if resume or {"RANK", "WORLD_SIZE"} <= os.environ.keys() or not all(map(_is_plain, given.values())):
        return
    plain = [(name, _without_paths(value)) for name, value in given.items()]
    resolved = config.resolve(fields.kind_of(verb), verb, recipe, plain)
    problems = Problems()
    with problems:
        if isinstance(resolved, fields.TrainingRecipe):
            check_out(Path(resolved.out or f"runs/{verb}"))
        elif isinstance(resolved, fields.EvalRecipe):
            check_against(resolved)
            eval_files(resolved)
        else:
            out_file(resolved.out, verb)
    if isinstance(resolved, fields.SampleRecipe):
        with problems:
            check_keep(resolved)
    collect(verb, resolved, problems)
    problems.tell()


def _is_plain(value: Any) -> bool:
    """Return whether a value can stand on a command line. Rows are lists of mappings, and may be many."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(isinstance(one, str) for one in value)
    return value is None or isinstance(value, (str, int, float, Path))


def _without_paths(value: Any) -> Any:
    """Return a value with each Path in it as text."""
    if isinstance(value, Mapping):
        return {key: _without_paths(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def check_out(folder: Path, *, resume: bool = False) -> None:
    """Raise RecipeError if a run folder is a file, or holds a run that is not resumed."""
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"out: {folder} is a file; name a folder with --out")
    if begun(folder) and not resume:
        raise RecipeError(
            f"out: {folder} already holds a run; continue it with --resume or name another folder with --out"
        )


def check_keep(recipe: fields.SampleRecipe) -> None:
    """Raise RecipeError if the best answers are kept and nothing scores them."""
    if recipe.keep == "best" and not recipe.reward:
        raise RecipeError("keep: which answer is the best? give --reward with a reward-model folder or a function")


def check_against(recipe: fields.EvalRecipe) -> None:
    """Raise RecipeError if only one of the two is given that a win rate needs."""
    if (recipe.against is None) != (not recipe.judge):
        raise RecipeError(
            "eval: a win rate needs both --against (the other model) and --judge; a loss or an accuracy needs neither"
        )


def eval_files(recipe: fields.EvalRecipe) -> Path | None:
    """Return the file for the numbers, if any. Raises RecipeError if it or the file for the answers cannot be written."""
    if recipe.answers:
        out_file(recipe.answers, "eval")
    if recipe.out and Path(recipe.out).is_dir():
        raise RecipeError(f"out: {recipe.out} is a folder; name a file, such as {recipe.out}/eval.json")
    return out_file(recipe.out, "eval") if recipe.out else None


def out_file(out: str, verb: str) -> Path:
    """Return the path of the output file. Raises RecipeError if no path is given, the file exists or cannot be written."""
    if not out:
        raise RecipeError(f"out: which file shall {verb} write? give --out FILE.jsonl")
    path = Path(out)
    if path.exists():
        raise RecipeError(f"out: {out} already exists; name another file with --out, or remove it")
    parent = next(one for one in path.absolute().parents if one.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RecipeError(f"out: {out} cannot be written; {parent} is no folder or not writable, name another file")
    return path


def begun(folder: Path) -> bool:
    """Return True if a folder contains a run: a recipe, and rollouts, metrics or checkpoints."""
    return (folder / "recipe.yaml").is_file() and any(
        contains(folder / one) for one in ("rollouts", "metrics.jsonl", "checkpoints")
    )


def contains(path: Path) -> bool:
    """Return True for a file, and for a folder that is not empty."""
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def collect(verb: str, recipe: Any, problems: Problems) -> None:
    """Check the models, the data and the rewards that a resolved recipe names."""
    with problems:
        _check_method(verb, recipe)
    model = getattr(recipe, "model", None)
    if model is not None:
        with problems:
            _check_model(model)
        for name in ("reference", "against"):
            with problems:
                _check_other(getattr(recipe, name, None))
        with problems:
            _check_other(getattr(getattr(recipe, "critic", None), "path", None))
    if isinstance(recipe, fields.OnlineRecipe) and not recipe.reward:
        with problems:
            raise RecipeError(NO_REWARD)
    held_out = getattr(getattr(recipe, "eval", None), "judge", None)
    for name, given in (
        ("reward", getattr(recipe, "reward", None)),
        ("judge", getattr(recipe, "judge", None)),
        ("eval.judge", held_out),
    ):
        for number, one in enumerate([fields.JudgeSpec(given)] if isinstance(given, str) else given or []):
            with problems:
                _check_scorer(one, f"{name}.{number}")
    data = getattr(recipe, "data", None)
    if isinstance(data, fields.Data | fields.Rows):
        _check_data(verb, recipe, data, problems)
    if isinstance(recipe, fields.OnlineRecipe) and recipe.ptx.data:
        with problems:
            _peek(recipe.ptx.data, recipe.ptx.columns, None, "demonstrations")


def check_evaluation(evaluation: fields.Evaluation) -> None:
    """Raise RecipeError for options of an evaluation that contradict each other, or that no held-out rows can serve."""
    own, plain, stop = evaluation, type(evaluation)(), evaluation.early_stop
    if not own.data:
        for name in vars(plain):
            if getattr(own, name) != getattr(plain, name):
                raise RecipeError(f"eval.{name}: there are no held-out rows; give --eval with a file, or leave it out")
        return
    if stop.patience is None and stop != fields.EarlyStop():
        raise RecipeError("eval.early_stop.patience: after how many evaluations without improvement? give it")
    if stop.patience is not None and stop.metric is None and own.keep_best is None:
        raise RecipeError(
            "eval.early_stop.metric: which number should improve? name a logged one, such as eval/loss or eval/score"
        )
    if stop.patience is not None and not own.every:
        raise RecipeError("eval.every: a run that may end early is evaluated between its steps; set it")
    for name, metric in (("keep_best", own.keep_best), ("early_stop.metric", stop.metric)):
        if metric is not None and timed(metric):
            raise RecipeError(
                f"eval.{name}: {metric} depends on the clock, so no two runs have it equal; name another number"
            )
        if metric is not None and own.greater_is_better is None and find(metric) is None:
            near = difflib.get_close_matches(
                metric, [one.name for one in METRICS if "{" not in one.name], n=1, cutoff=0.7
            )
            hint = f"did you mean {near[0]!r}?" if near else "docs/metrics.md lists them."
            raise RecipeError(
                f"eval.{name}: {metric} is no number of whet; {hint} For a number of your own (step.log), set "
                "eval.greater_is_better too"
            )
        if metric is not None and own.greater_is_better is None and direction(metric) is None:
            raise RecipeError(
                f"eval.greater_is_better: it is not known whether {metric} should be high or low; set it to true or false"
            )
    if isinstance(own, fields.PromptEvaluation) and own.temperature == 0 and own.num_generations > 1:
        raise RecipeError("eval.num_generations: greedy answers to one prompt are all equal; leave it at 1")


def _check_model(model: fields.Frozen) -> None:
    """Raise an error for a model folder that cannot be read, or lacks a tokenizer or a chat template."""
    if not model.path:
        raise RecipeError(NO_MODEL)
    check_folder(model.path)
    refuse_local_code(model.path, model.trust_remote_code)
    base = model.path if has_tokenizer(model.path) else adapter_base(model.path)[0]
    if not has_tokenizer(base):
        raise ModelError(f"{model.path}: the folder has no tokenizer; save it there (tokenizer.save_pretrained)")
    from whet.data.templates import no_template, template_file

    _check_pad_token(model, Path(base))
    template_file(model.chat_template)
    if model.chat_template is None and _lacks_template(Path(base)):
        raise no_template(base)


def _check_pad_token(model: fields.Frozen, folder: Path) -> None:
    """Raise ModelError for a pad token that no file of the tokenizer has. A tokenizer in other files is looked at later."""
    file, more = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if model.pad_token is None or not file.is_file():
        return
    about = read_json(file, ModelError, "download or save the model again", unique=False)
    vocabulary = (about.get("model") or {}).get("vocab")
    names = {one[0] if isinstance(one, list) else one for one in vocabulary or ()}
    names |= {one.get("content") for one in about.get("added_tokens") or () if isinstance(one, dict)}
    if more.is_file():
        added = read_json(more, ModelError, unique=False).get("added_tokens_decoder") or {}
        names |= {one.get("content") for one in added.values() if isinstance(one, dict)}
    if vocabulary and model.pad_token not in names:
        raise ModelError(f"--model.pad-token {model.pad_token!r}: the tokenizer of {model.path} has no such token")


def refuse_local_code(path: str, trusted: bool) -> None:
    """Raise ModelError if a folder names code that is not trusted. A name of the hub is looked at later."""
    if Path(path).is_dir():
        refuse_code(path, trusted)


def _lacks_template(folder: Path) -> bool:
    """Return True if a folder has a tokenizer of transformers whose files contain no chat template."""
    file = folder / "tokenizer_config.json"
    if not file.is_file() or (folder / "tekken.json").exists():
        return False
    about = read_json(file, ModelError, "download or save the model again", unique=False)
    known = str(about.get("tokenizer_class", "")).startswith(
        ("PreTrainedTokenizer", "TokenizersBackend", "GPT2", "Qwen2", "Llama")
    )
    files = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    return known and not about.get("chat_template") and not any((folder / one).exists() for one in files)


def _check_other(path: str | None) -> None:
    """Raise ModelError if the folder of a further model is not there or cannot be read."""
    if path:
        check_folder(path)


def _check_scorer(one: fields.RewardSpec | fields.JudgeSpec, where: str) -> None:
    """Raise an error for the file of a function that is not there or lacks it, a reward-model folder that is not there, and
    options of one."""
    source = one.source
    if source.startswith(("http://", "https://", "python:")):
        return
    if ":" not in Path(source).name:
        if "/" in source:
            check_folder(source)
            refuse_options(one.options, where)
        return
    place, _, name = source.partition("#")[0].rpartition(":")
    if place.endswith(".py") and not _defines(Path(place), name):
        with restored():
            load_object(source)  # raises the error, unless the name is made while the file runs


def refuse_options(options: Mapping[str, Any], where: str) -> None:
    """Raise RecipeError for options of a reward model, which has none."""
    for option in options:
        raise RecipeError(f"{where}.{option}: a reward model has no options; leave it out")


def _check_method(verb: str, recipe: Any) -> None:
    """Raise RecipeError for a slot, or an option of one, that no method has. The check that knows all of them loads torch, and
    is called only if there is one."""
    given = getattr(recipe, "algorithm", None)
    if not given:
        return
    known = catalogue.slots_of(verb, given.get("name"))
    options = {"name", "weight", *OPTIONS}
    strange = any(
        (slot not in known and slot != "name")
        or (slot not in PLAIN_SLOTS and isinstance(value, Mapping) and set(value) - options)
        for slot, value in given.items()
    )
    if strange:
        from whet.runs.slots import checked

        checked(verb, given, config.leaves(type(recipe)))


def _defines(path: Path, name: str) -> bool:
    """Return whether a Python file can be parsed and has a top-level statement that binds the name. It is not executed."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError):
        return False
    bound = {one.name for one in body if isinstance(one, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))}
    for one in body:
        if isinstance(one, (ast.Import, ast.ImportFrom)):
            bound |= {alias.asname or alias.name for alias in one.names}
        targets = one.targets if isinstance(one, ast.Assign) else [one.target] if isinstance(one, ast.AnnAssign) else []
        bound |= {target.id for target in targets if isinstance(target, ast.Name)}
    return name in bound


# --- data ----------------------------------------------------------------------------------------------------------------


def sources(data: fields.Data | fields.Rows) -> list[fields.DataSource]:
    """Return the training sources of a section. Raises RecipeError without one."""
    if not data.train:
        raise RecipeError(NO_DATA)
    return [fields.DataSource(data.train)] if isinstance(data.train, str) else list(data.train)


def _check_data(verb: str, recipe: Any, data: fields.Data | fields.Rows, problems: Problems) -> None:
    """Check the lengths of a section with rows, its files, and their first rows."""
    reading = _reading(verb, recipe)
    if getattr(recipe, "model", None) is not None:
        room = recipe.sampling.max_new_tokens if reading == "prompts" else 0
        with problems:
            limit = _positions(recipe.model)
            if limit is not None:
                longest_of(data, limit, room)
    for named in (data, *(data.train if isinstance(data.train, list) else [])):
        with problems:
            check_names(named.columns)
    given: Sequence[fields.DataSource] = []
    with problems:
        if verb == "rank" and not data.train:
            raise RecipeError(NO_ANSWERS)
        given = sources(data)
    for one in given:
        with problems:
            _peek(one.source, one.columns or data.columns, data.num_rows, reading, streaming=data.streaming)
    held_out = getattr(recipe, "eval", None)
    if held_out is not None:
        with problems:
            check_evaluation(held_out)
        with problems:
            if held_out.data:
                _peek(held_out.data, data.columns, held_out.num_rows, reading)


def _reading(verb: str, recipe: Any) -> str:
    """Return the method of `whet.data.Reader` that reads the rows, or "" if it is not known here."""
    if isinstance(recipe, fields.OnlineRecipe | fields.SampleRecipe):
        return "prompts"
    if isinstance(recipe, fields.EvalRecipe):
        return "prompts" if recipe.judge else ""
    if isinstance(recipe, fields.RewardModelRecipe):
        return catalogue.READS.get(recipe.algorithm["name"], "pairs")
    if isinstance(recipe, fields.PreferenceRecipe):
        loss = recipe.algorithm.get("loss")
        name = loss.get("name") if isinstance(loss, Mapping) else loss
        known = {**dict.fromkeys(PAIR_LOSSES, "pairs"), **dict.fromkeys(SINGLE_LOSSES, "unpaired")}
        return known.get(name, "") if isinstance(name, str) else ""
    return catalogue.READS.get(verb, "")


def longest_of(data: fields.Data | fields.Rows, limit: int, room: int) -> int:
    """Return the longest sequence that is read, in tokens, for a model with `limit` positions of which `room` stay free. Raises
    RecipeError if lengths do not fit."""
    longest = min(data.max_tokens or limit, limit - room)
    if data.max_tokens and data.max_tokens > limit:
        raise RecipeError(f"data.max_tokens: the model has {limit} positions; got {data.max_tokens}")
    if longest < 2:
        raise RecipeError(
            f"sampling.max_new_tokens: the model has {limit} positions for prompt and answer; got {room}, lower it with "
            "--max-new-tokens"
        )
    return longest


def _positions(model: fields.Frozen) -> int | None:
    """Return the positions in the configuration of a model folder; None if they do not stand there under their usual name."""
    try:
        file = Path(adapter_base(model.path)[0]) / "config.json"
        about = read_json(file, ModelError) if model.path and file.is_file() else {}
    except (ModelError, OSError):  # it is told of the model
        return None
    most = about.get("max_position_embeddings")
    return most if type(most) is int and most >= 2 else None


def _peek(
    source: str, columns: Mapping[str, str], num_rows: int | None, reading: str, *, streaming: bool = False
) -> None:
    """Raise an error for a source that is not there, and for one of its first rows that cannot be read. A dataset that another
    library loads is read later."""
    files = files_of(source)
    if files is None and not source.startswith((".", "/", "~")) and not Path(source.partition(":")[0]).suffix:
        require_datasets(source)
        return
    whole = [one for one in files or [] if kind_of(one) not in (".jsonl", ".parquet") and one.is_file()]
    if any(one.stat().st_size > MOST for one in whole):
        return
    most = min(PEEK, num_rows or PEEK)
    rows = read_rows(source, columns=columns, num_rows=num_rows if streaming else most, streaming=streaming)
    for one in rows[:most] if reading else ():
        check_fields(reading, one)
