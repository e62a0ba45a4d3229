"""Thousands of mutated inputs: each command succeeds, or ends with one clear error, within seconds and a bounded memory.

`python -m proof.fuzz --count 10000 --seed 0` mutates data rows, recipes, checkpoints, records of runs, model folders, chat
templates and command lines (`proof.mutations`), drawn with hypothesis from the seed. Each input is given to whet in a fork of
this process with limits (`proof.limits`). A failure is anything else than success or one message of whet: a traceback, a
signal, no end, more memory, or a message with the name of a Python error. Failures are printed, and kept under --keep with the
command that repeats them. Inputs without any mutation must succeed, and so must a share of all others.
"""

import argparse
import gc
import importlib
import json
import os
import re
import shlex
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis
import yaml
from hypothesis import strategies as st

from proof.limits import RAISED, Ended, limited
from proof.mutations import as_json, merged, mutated_bytes, mutated_tree, mutated_words, templates
from proof.small_runs import every, on_answers, on_rows, write_inputs

SECONDS, MEBIBYTES = 20, 2048
"""Limits of one input: CPU seconds, and memory beyond that of this process."""
INTERNAL = re.compile(
    r"\b(?!TProtocol)[A-Z]\w*(Error|Exception)\b|NoneType|object has no attribute|not subscriptable|unsupported operand|not iterable"
)
"""What an error of Python says, and a message of whet does not."""
QUOTED = re.compile(
    r"the chat template (refuses|cannot be used|does too much)[^\n]*|got [^\n]*|is missing or of a wrong type[^\n]*"
)
"""Parts of messages that say what the input says."""
LEAST = 0.1
"""Smallest share of the inputs of each kind that must succeed."""
ENOUGH = 20
"""Smallest number of inputs of a kind of which the share is required."""
USED = ("transformers.models.qwen3.modeling_qwen3", "transformers.models.auto.modeling_auto", "peft", "pyarrow.parquet",
        "whet.cli.main", "whet.cli.help", "whet.runs.train", "whet.runs.session", "whet.runs.config", "whet.runs.explain",
        "whet.runs.why", "whet.runs.replay", "whet.runs.diff", "whet.runs.plan", "yaml", "msgspec", "rich.progress")  # fmt: skip
"""What the children import; this process imports it once."""
ONE_STEP = ["--train.save-last", "false", "--train.save-every", "0"]


SAVED = ("--train.save-every", "1", "--optim.schedule", "constant")
"""Options of runs that can be resumed with more steps."""


@dataclass(frozen=True)
class Input:
    """The words of a command, and the files that are put into its folder, with their contents."""

    kind: str
    words: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    """folders of the world that the input changes, so that it has its own copy"""


@dataclass
class Report:
    """Outcomes by kind, and the inputs that failed with the reason."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[tuple[Input, Ended, str]] = field(default_factory=list)

    def add(self, given: Input, ended: Ended) -> str:
        """Count an input, and return why it failed, or ""."""
        reason = fault(ended)
        outcome = "failed" if reason else "success" if ended.status == 0 else f"status {ended.status}"
        self.outcomes.setdefault(given.kind, Counter())[outcome] += 1
        if reason:
            self.failures.append((given, ended, reason))
        return reason

    def refusing(self) -> list[str]:
        """Return the kinds of which too few inputs succeed."""
        return [
            kind
            for kind, found in self.outcomes.items()
            if found.total() >= ENOUGH and found["success"] < LEAST * found.total()
        ]

    def lines(self) -> list[str]:
        """Return a table of the outcomes."""
        names = sorted({name for found in self.outcomes.values() for name in found})
        rows = [["kind", "inputs", *names]]
        rows += [
            [kind, str(found.total()), *(str(found[name]) for name in names)] for kind, found in self.outcomes.items()
        ]
        return ["  ".join(f"{cell:>9}" for cell in row) for row in rows]


def fault(ended: Ended) -> str:
    """Return why the end of a command is neither success nor one clear error, or "" if it is."""
    lines = [line for line in ended.error.split("\n") if line.strip()]
    if ended.status < 0:
        return f"signal {-ended.status} after {ended.seconds:.0f} CPU seconds"
    if ended.status == RAISED or "Traceback" in ended.error:
        return f"a traceback: {lines[-1] if lines else ''}"
    if ended.status == 0:
        return ""
    if ended.status not in (1, 2):
        return f"exit status {ended.status}"
    if not lines:
        return "" if ended.status == 1 and ended.out.strip() else "an error without a message"
    if not all(line.startswith("whet: ") for line in lines):
        return (
            f"lines that are not messages of whet: {next(line for line in lines if not line.startswith('whet: ')):.200}"
        )
    if len(lines[-1]) > 3000:
        return f"a message of {len(lines[-1])} characters"
    found = INTERNAL.search(QUOTED.sub("", lines[-1]))
    return f"the text of an internal error: {lines[-1]:.300}" if found else ""


def run(words: Sequence[str]) -> int:
    """Run a command. A run whose steps would be long ends with success when its first step begins: it passed all checks."""
    from whet.cli import main
    from whet.loops import offline, online
    from whet.runs import session, train

    whole = session.run_loop

    def shortened(loop: Any) -> None:
        plan = loop.plan
        work = plan.steps * plan.batch if isinstance(loop, offline.OfflineLoop) else _answers(loop)
        if work > (80 if isinstance(loop, offline.OfflineLoop) else 400):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        whole(loop)

    def _answers(loop: online.OnlineLoop) -> int:
        plan = loop.plan
        return (
            plan.steps
            * plan.prompts
            * loop.algorithm.collect.num_generations
            * plan.epochs
            * min(128, loop.sampling.max_new_tokens)
        )

    session.run_loop = train.run_loop = shortened
    return main.main(list(words))


def options_of_all() -> list[str]:
    """Return the names of all fields of all recipes, and of all slots and options of methods."""
    from whet.methods import catalogue
    from whet.methods.choices import OPTIONS
    from whet.runs.config import SHORT, leaves
    from whet.runs.recipe import PlanOptions, ServeRecipe, kind_of

    names = [*SHORT, *(f"loss.{name}" for name in OPTIONS), *(f"advantage.{name}" for name in OPTIONS)]
    for verb in ("sft", "reward", "dpo", "grpo", "sample", "rank", "eval"):
        names += leaves(kind_of(verb))
    for verb in [one for one in catalogue.TRAINED if one not in catalogue.SUPERVISED]:
        names += list(catalogue.slots_of(verb, "k_way" if verb == "reward" else None))
    dropped = {*leaves(ServeRecipe), *leaves(PlanOptions)} - {"model", "model.path"}
    return sorted({one for one in names if one.partition(".")[0] not in ("cluster", "serve")} - (dropped - set(names)))


class World:
    """A folder with a tiny model, rows, reward functions, and two finished runs; the inputs are mutations of its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_inputs(folder)
        self.runs = {
            "sft-run": on_rows(
                "sft",
                "sft",
                "--train.num-steps",
                "2",
                *SAVED,
                "--out",
                "sft-run",
            ),
            "grpo-run": on_answers(
                "grpo",
                "--num-generations",
                "2",
                *SAVED,
                "--out",
                "grpo-run",
                steps=2,
            ),
        }
        before = Path.cwd()
        os.chdir(folder)
        try:
            for words in self.runs.values():
                if limited(lambda words=words: run(words), folder, seconds=120).status:  # type: ignore[misc]
                    raise RuntimeError(f"the run of the world failed: {shlex.join(words)}")
        finally:
            os.chdir(before)
        self.options = options_of_all()
        self.template = (
            json.loads((folder / "model" / "tokenizer_config.json").read_text()).get("chat_template")
            or (folder / "model" / "chat_template.jinja").read_text()
        )
        self.lines = list(every().values())
        self.rows = {
            "sft": "sft.jsonl", "pretrain": "text.jsonl", "dpo": "ranked.jsonl", "reward": "ranked.jsonl", "kto": "kto.jsonl",
        }  # fmt: skip

    def input(self, draw: Callable[[Any], Any]) -> Input:
        """Draw one input."""
        costly = [self.template_file, self.model_folder, self.checkpoint, self.record]
        kinds = [*costly, *[self.row_file] * 3, *[self.recipe] * 4, *[self.words] * 4]
        return draw(st.sampled_from(kinds))(draw)

    def row_file(self, draw: Callable[[Any], Any]) -> Input:
        """Rows of a data file: JSONL, JSON, CSV or Parquet."""
        verb = draw(st.sampled_from([*self.rows, "grpo"]))
        lines = (self.folder / self.rows.get(verb, "prompts.jsonl")).read_text().splitlines()
        rows = [json.loads(line) for line in lines[: draw(st.integers(1, 5))]]
        if draw(st.integers(0, 3)) == 0 and verb == "sft":
            rows = [
                {
                    "messages": [
                        {"role": "user", "content": one["prompt"]},
                        {"role": "assistant", "content": one["completion"]},
                    ]
                }
                for one in rows
            ]
        keys = [
            "messages",
            "prompt",
            "chosen",
            "rejected",
            "responses",
            "ranks",
            "scores",
            "label",
            "text",
            "id",
            "tools",
            "finish",
            "response_ids",
        ]
        rows[0] = mutated_tree(draw, rows[0], keys)
        form = draw(st.sampled_from(["jsonl", "jsonl", "jsonl", "json", "parquet", "csv"]))
        data = mutated_bytes(draw, _rows_as(draw, rows, form), most=1 if form != "parquet" else draw(st.integers(0, 1)))
        words = [verb, *_short(verb), "--data", f"rows.{form}", "--quiet", *ONE_STEP]
        return Input("rows", words, {f"rows.{form}": data})

    def recipe(self, draw: Callable[[Any], Any]) -> Input:
        """A recipe, as a YAML file."""
        verb = draw(st.sampled_from(["sft", "dpo", "reward", "grpo", "ppo", "kto", "rloo"]))
        tree = merged(
            {"method": verb}, _tree_of(_short(verb)), {"data": {"train": self.rows.get(verb, "prompts.jsonl")}}
        )
        for name in draw(st.lists(st.sampled_from(self.options), max_size=2)):
            *sections, last = name.split(".")
            odd: Any = draw(st.sampled_from([1, 2, 0.5, True, None, "auto", 0, 10**9, 1e300, -1, [], {}, "x"]))
            for section in [last, *reversed(sections)]:
                odd = {section: odd}
            tree = merged(tree, odd)
        text = yaml.safe_dump(mutated_tree(draw, tree, self.options), sort_keys=False, allow_unicode=True).encode(
            "utf-8", "surrogatepass"
        )
        first = draw(st.sampled_from(["train", "explain", "explain", "plan"]))
        words = [
            first,
            "recipe.yaml",
            *(["--gpus", "8"] if first == "plan" else []),
            *(["--quiet"] if first == "train" else []),
        ]
        return Input("recipes", words, {"recipe.yaml": mutated_bytes(draw, text, most=draw(st.integers(0, 1)))})

    def words(self, draw: Callable[[Any], Any]) -> Input:
        """The words of a command line."""
        words = list(draw(st.sampled_from(self.lines)))
        words = mutated_words(draw, words, self.options)
        if draw(st.integers(0, 3)):
            words = [draw(st.sampled_from(["explain", "explain", "plan"])), *words]
        return Input("words", words)

    def template_file(self, draw: Callable[[Any], Any]) -> Input:
        """A chat template."""
        text = draw(templates(self.template))
        words = ["sft", *_short("sft"), "--data", "sft.jsonl", "--quiet", *ONE_STEP, "--chat-template", "own.jinja"]
        return Input("templates", words, {"own.jinja": text.encode("utf-8", "replace")})

    def model_folder(self, draw: Callable[[Any], Any]) -> Input:
        """A file of a model folder."""
        names = [
            "config.json",
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "model.safetensors",
        ]
        name = draw(st.sampled_from([one for one in names if (self.folder / "model" / one).is_file()]))
        data = (self.folder / "model" / name).read_bytes()
        verb = draw(st.sampled_from(["sft", "plan", "eval"]))
        words = {
            "sft": ["sft", *_short("sft"), "--data", "sft.jsonl", "--quiet", *ONE_STEP],
            "plan": ["plan", "sft", *_short("sft"), "--gpus", "8"],
            "eval": ["eval", "--model", "model", "--data", "sft.jsonl", "--threads", "1"],
        }[verb]
        return Input("models", words, {f"model/{name}": self._file(draw, name, data)}, ("model",))

    def checkpoint(self, draw: Callable[[Any], Any]) -> Input:
        """A file of a checkpoint from which a run continues."""
        run_ = draw(st.sampled_from(["sft-run", "grpo-run"]))
        files = [one for one in sorted((self.folder / run_ / "checkpoints").rglob("*")) if one.is_file()]
        path = draw(st.sampled_from(files))
        data = self._file(draw, path.name, path.read_bytes())
        given = {str(path.relative_to(self.folder)): data}
        manifest = path.parents[0 if path.parent.name.startswith("step-") else 1] / "manifest.json"
        if path.name != "manifest.json" and draw(st.booleans()):  # with the right checksum
            from hashlib import sha256

            sums = json.loads(manifest.read_text()) | {str(path.relative_to(manifest.parent)): sha256(data).hexdigest()}
            given[str(manifest.relative_to(self.folder))] = json.dumps(sums).encode()
        more = [f"--{'train' if run_ == 'sft-run' else 'rollout'}.num-steps", "3"] if draw(st.booleans()) else []
        words = [*self.runs[run_], "--resume", *more]
        return Input("checkpoints", words, given, (run_,))

    def record(self, draw: Callable[[Any], Any]) -> Input:
        """A file of the record of a run: rollouts, metrics, recipe, environment, hashes of inputs."""
        names = ["rollouts/step-00000001.parquet", "metrics.jsonl", "recipe.yaml", "environment.json", "inputs.json"]
        name = draw(
            st.sampled_from([*names[:1], *[one for one in names if (self.folder / "grpo-run" / one).is_file()]])
        )
        data = self._file(draw, name, (self.folder / "grpo-run" / name).read_bytes())
        words = draw(
            st.sampled_from(
                [
                    ["replay", "grpo-run", "--step", "1", "--quiet"],
                    ["why", "grpo-run", "--step", "1", "--quiet"],
                    ["diff", "grpo-run", "other"],
                    ["report", "grpo-run"],
                ]
            )
        )
        return Input("records", words, {f"grpo-run/{name}": data}, ("grpo-run",))

    def _file(self, draw: Callable[[Any], Any], name: str, data: bytes) -> bytes:
        """Mutate a file by its kind."""
        if name.endswith(".json") and draw(st.integers(0, 3)):
            return as_json(draw, mutated_tree(draw, json.loads(data)))
        if name.endswith(".parquet") and draw(st.integers(0, 2)):
            return _mutated_parquet(draw, data)
        if name.endswith(".jsonl") and draw(st.booleans()):
            lines = data.decode().splitlines()
            lines[0] = as_json(draw, mutated_tree(draw, json.loads(lines[0]))).decode("utf-8", "surrogatepass")
            return "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")
        if name.endswith(".yaml") and draw(st.booleans()):
            return yaml.safe_dump(mutated_tree(draw, yaml.safe_load(data)), sort_keys=False).encode(
                "utf-8", "surrogatepass"
            )
        return mutated_bytes(draw, data)

    @contextmanager
    def at(self, given: Input) -> Iterator[Path]:
        """Yield a folder with the files of the world and of an input."""
        with TemporaryDirectory(prefix="whet-fuzz-") as name:
            home = Path(name)
            for path in self.folder.iterdir():
                if path.name in given.folders:
                    shutil.copytree(path, home / path.name)
                elif path.name in self.runs:
                    continue
                else:
                    (home / path.name).symlink_to(path)
            if "diff" in given.words:
                (home / "other").symlink_to(self.folder / "grpo-run")
            for file, data in given.files.items():
                (home / file).parent.mkdir(parents=True, exist_ok=True)
                (home / file).write_bytes(data)
            yield home

    def outcome(self, given: Input) -> Ended:
        """Give an input to whet."""
        with self.at(given) as home:
            return limited(lambda: run(given.words), home, seconds=SECONDS, mebibytes=MEBIBYTES)


def _short(verb: str) -> list[str]:
    """The options of a run of one step."""
    common = ["--model", "model", "--seed", "3", "--threads", "1"]
    if verb in ("grpo", "ppo", "rloo"):
        more = [] if verb == "ppo" else ["--num-generations", "2"]
        size = ["--rollout.prompts-per-step", "2", "--rollout.num-steps", "1", "--rollout.mini-batch-size", "null"]
        return [*common, "--reward", "rules.py:count", *size, "--max-new-tokens", "4", *more]
    return [*common, "--train.num-steps", "1", "--train.batch-size", "4"]


def _tree_of(words: Sequence[str]) -> dict[str, Any]:
    """Return the options of a command line as the tree of a recipe."""
    out: dict[str, Any] = {}
    sections = {"max_new_tokens": "sampling", "num_generations": "algorithm"}
    for name, text in zip(words[::2], words[1::2], strict=True):
        key = name[2:].replace("-", "_")
        tree: Any = yaml.safe_load(text)
        for part in reversed((f"{sections[key]}.{key}" if key in sections else key).split(".")):
            tree = {part: tree}
        out = merged(out, tree)
    return out


def _rows_as(draw: Callable[[Any], Any], rows: Sequence[Any], form: str) -> bytes:
    if form == "json":
        return json.dumps(list(rows)).encode()
    if form == "parquet" and all(isinstance(row, dict) for row in rows):
        import io

        import pyarrow
        import pyarrow.parquet

        file = io.BytesIO()
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
            return file.getvalue()
        except (pyarrow.ArrowException, UnicodeError, OverflowError, ValueError, TypeError):  # what Parquet cannot hold
            return b"PAR1"
    if form == "csv" and all(isinstance(row, dict) for row in rows):
        import csv
        import io

        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(rows[0])
        writer.writerows([list(row.values()) for row in rows])
        return text.getvalue().encode("utf-8", "surrogatepass")
    return b"\n".join(as_json(draw, row) for row in rows) + b"\n"


def _mutated_parquet(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """Change, remove or rename a column of a Parquet file, or change its metadata."""
    import io

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(data))
    name = draw(st.sampled_from(table.schema.names))
    place = table.schema.names.index(name)
    kind = draw(
        st.sampled_from(["drop", "null", "text", "number", "lists", "rows", "rename", "metadata", "schema", "same"])
    )
    odd: dict[str, Any] = {
        "null": None,
        "text": "x",
        "number": draw(st.sampled_from([0, -1, 10**12, 1e300, float("nan")])),
        "lists": [[1.0]],
    }
    if kind == "drop":
        table = table.drop_columns([name])
    elif kind in odd:
        table = table.set_column(place, name, pyarrow.array([odd[kind]] * table.num_rows))
    elif kind == "rows":
        table = table.slice(0, draw(st.integers(0, table.num_rows)))
    elif kind == "rename":
        table = table.rename_columns([f"{one}x" if one == name else one for one in table.schema.names])
    elif kind in ("metadata", "schema"):
        own = {
            "metadata": {
                "whet.dtypes": draw(st.sampled_from(["{", "[]", '{"logp": 3}', '{"logp": "nothing"}', "null"]))
            },
            "schema": {"whet.schema": draw(st.sampled_from(["2", "x", "-1", "9" * 50]))},
        }
        table = table.replace_schema_metadata(own[kind])
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def fuzz(world: World, count: int, seed: int, each: Callable[[Input, Ended, str], None] = lambda *_: None) -> Report:
    """Give `count` inputs to whet, drawn from the seed, and return the outcomes."""
    report = Report()
    gc.collect()
    gc.freeze()  # the forks write to fewer pages

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck), print_blob=False,
    )  # fmt: skip
    @hypothesis.given(st.data())
    def one(data: Any) -> None:
        given = world.input(data.draw)
        ended = world.outcome(given)
        each(given, ended, report.add(given, ended))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one()
    return report


def keep(folder: Path, number: int, given: Input, ended: Ended, reason: str) -> Path:
    """Write a failed input, its command and its output to a folder."""
    home = folder / f"{given.kind}-{number:04d}"
    for file, data in given.files.items():
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_bytes(data)
    home.mkdir(parents=True, exist_ok=True)
    (home / "command.txt").write_text(
        f"{reason}\nwhet {shlex.join(given.words)}\n\n{ended.error}", encoding="utf-8", errors="replace"
    )
    (home / "input.json").write_text(
        json.dumps({"kind": given.kind, "words": given.words, "folders": given.folders, "files": list(given.files)})
    )
    return home


def read(home: Path) -> Input:
    """Read an input that `keep` wrote."""
    about = json.loads((home / "input.json").read_text())
    return Input(
        about["kind"],
        about["words"],
        {file: (home / file).read_bytes() for file in about["files"]},
        tuple(about["folders"]),
    )


def main() -> int:
    """Run the command line and return 1 if an input failed, or if too few inputs of a kind succeeded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--again", type=Path, nargs="*", help="folders of --keep whose inputs are given again")
    given_ = parser.parse_args()
    for name in USED:
        importlib.import_module(name)
    failed = 0
    with TemporaryDirectory(prefix="whet-fuzz-world-") as folder:
        world = World(Path(folder))
        if given_.again is not None:
            for home in given_.again:
                ended = world.outcome(read(home))
                print(f"{home}: {fault(ended) or f'status {ended.status}'}\n{ended.error[-3000:]}")
            return 0

        def told(given: Input, ended: Ended, reason: str) -> None:
            nonlocal failed
            if reason:
                failed += 1
                print(f"{keep(given_.keep, failed, given, ended, reason)}: {reason}", flush=True)

        report = fuzz(world, given_.count, given_.seed, told)
    print("\n".join(report.lines()))
    for kind in report.refusing():
        print(f"{kind}: fewer than {LEAST:.0%} of the inputs succeed")
    return 1 if report.failures or report.refusing() else 0


if __name__ == "__main__":
    sys.exit(main())
