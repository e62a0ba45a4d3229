"""Rows as people have them, with every verb: other forms and names give the same run, and a resume sees what has changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

import whet
from whet.data import read_rows
from whet.errors import DataError, RecipeError

from .helpers import one_message
from .helpers import whet as command

ROWS = [{"prompt": f"{a} {b}", "completion": f"{b} yes"} for a, b in zip(tiny.WORDS, tiny.WORDS[1:], strict=False)]
QA = [{"question": one["prompt"], "answer": one["completion"]} for one in ROWS]
SHARED = [
    {"conversations": [{"from": "human", "value": one["prompt"]}, {"from": "gpt", "value": one["completion"]}]}
    for one in ROWS
]
ALPACA = [{"instruction": one["prompt"], "input": "", "output": one["completion"]} for one in ROWS]
PAIRS = [{"prompt": f"{a} b", "chosen": f"{a} yes", "rejected": f"no {a}"} for a in tiny.WORDS]
HH = [
    {side: f"\n\nHuman: {one['prompt']}\n\nAssistant: {one[side]}" for side in ("chosen", "rejected")} for one in PAIRS
]
LISTS = [
    {
        side: [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one[side]}]
        for side in ("chosen", "rejected")
    }
    for one in PAIRS
]
QAS = {"prompt": "question", "completion": "answer"}
RULES = """
def reward(prompts, completions, **columns):
    return [float(len(text.split()) + len(prompt)) for prompt, text in zip(prompts, completions)]

def exact(prompts, completions, level, **columns):
    return [float(one) for one in level]
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.folder(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    Path("rules.py").write_text(RULES)
    return tmp_path


def trained(verb: str, rows: Any, out: str, **more: Any) -> bytes:
    """The weights after two updates."""
    common: dict[str, Any] = {"batch_size": 4} if verb in ("sft", "dpo", "reward", "kto") else {
        "reward": "rules.py:reward", "prompts_per_step": 2, "num_generations": 2, "max_new_tokens": 4,
    }  # fmt: skip
    whet.train(verb, model="m", data=rows, out=out, num_steps=2, lr=1e-3, **{**common, **more})
    return (Path(out) / "model" / "model.safetensors").read_bytes()


SAME = [
    ("sft", ROWS, [SHARED, ALPACA]),
    ("dpo", PAIRS, [HH, LISTS]),
    ("reward", PAIRS, [HH, LISTS]),
    ("kto", PAIRS, [HH]),
]


@pytest.mark.parametrize(("verb", "rows", "others"), SAME)
def test_other_forms_give_the_same_run(verb: str, rows: list, others: list) -> None:
    weights = trained(verb, rows, "plain")
    for number, other in enumerate(others):
        assert trained(verb, other, f"other-{number}") == weights


def test_renamed_columns_give_the_same_run_from_python_a_recipe_and_the_command_line(capsys: Any) -> None:
    weights = trained("sft", ROWS, "plain", eval=ROWS[:3])
    assert trained("sft", {"train": QA, "columns": QAS}, "python", eval=QA[:3]) == weights
    tiny.write_jsonl(Path("qa.jsonl"), QA)
    tiny.write_jsonl(Path("held.jsonl"), QA[:3])
    recipe = "model: m\noptim: {lr: 1e-3}\ntrain: {num_steps: 2, batch_size: 4}\nout: recipe\n"
    recipe += "data: {train: qa.jsonl, columns: {prompt: question, completion: answer}}\neval: held.jsonl\n"
    Path("r.yaml").write_text(recipe)
    words = ["--data", "qa.jsonl", "--eval", "held.jsonl", "--data.columns.prompt", "question"]
    words += ["--data.columns.completion", "answer", "--model", "m", "--lr", "1e-3", "--num-steps", "2"]
    assert command(capsys, "sft", "r.yaml", "--quiet").status == 0
    assert command(capsys, "sft", *words, "--batch-size", "4", "--out", "words", "--quiet").status == 0
    for out in ("recipe", "words"):
        assert (Path(out) / "model" / "model.safetensors").read_bytes() == weights


def test_each_source_of_a_mix_may_have_its_own_names() -> None:
    for name, rows in (("a", ROWS), ("b", QA)):
        tiny.write_jsonl(Path(f"{name}.jsonl"), rows)
    tiny.write_jsonl(Path("c.jsonl"), ROWS)
    mixed = [{"path": "a.jsonl"}, {"path": "b.jsonl", "columns": QAS}]
    weights = trained("sft", [{"path": "a.jsonl"}, {"path": "c.jsonl"}], "plain")
    assert trained("sft", mixed, "mixed") == weights


def test_an_online_run_reads_prompts_in_other_forms_and_other_names() -> None:
    weights = trained("grpo", [{"prompt": one["prompt"]} for one in ROWS], "plain")
    for number, data in enumerate([SHARED, ALPACA, {"train": QA, "columns": {"prompt": "question"}}]):
        assert trained("grpo", data, f"other-{number}") == weights
    texts = [{"text": one["prompt"]} for one in ROWS]
    small: dict[str, Any] = {"mini_batch_size": 4, "num_generations": 1, "prompts_per_step": 4}
    ptx = trained("instructgpt", ROWS, "ptx", ptx=texts, **small)
    renamed = {"data": [{"body": one["text"]} for one in texts], "columns": {"text": "body"}}
    assert trained("instructgpt", ROWS, "renamed", ptx=renamed, **small) == ptx
    with pytest.raises(DataError, match=r"data.columns.text: no row has a column 'bdy'; did you mean 'body'\?"):
        trained("instructgpt", ROWS, "no", ptx=renamed | {"columns": {"text": "bdy"}}, **small)


def test_sample_rank_and_eval_read_them_too() -> None:
    given = {"train": [one | {"level": 1} for one in QA[:3]], "columns": {"prompt": "question"}}
    common: dict[str, Any] = {"model": "m", "max_new_tokens": 4, "num_generations": 2}
    whet.sample(data=given, out="a.jsonl", **common)
    whet.sample(data=[one | {"level": 1} for one in ROWS[:3]], out="b.jsonl", **common)
    a, b = (read_rows(f"{name}.jsonl") for name in "ab")
    assert [one.row["responses"] for one in a] == [one.row["responses"] for one in b]
    assert [one.row["prompt"] for one in a] == [one["prompt"] for one in ROWS[:3]]
    whet.sample(data=SHARED[:3], out="c.jsonl", **common)
    assert [one.row["responses"] for one in read_rows("c.jsonl")] == [one.row["responses"] for one in a]
    assert all("completion" not in one.row and "messages" not in one.row for one in read_rows("c.jsonl"))
    asked = [{"q": one.row["prompt"], "answers": one.row["responses"], "points": [1, 2]} for one in a]
    names = {"prompt": "q", "responses": "answers", "scores": "points"}
    whet.rank(data={"train": asked, "columns": names}, out="ranked.jsonl")
    assert [one.row["ranks"] for one in read_rows("ranked.jsonl")] == [[2, 1]] * 3
    loss = whet.evaluate(model="m", data=ROWS)
    for data in (SHARED, ALPACA, {"train": QA, "columns": QAS}):
        assert whet.evaluate(model="m", data=data) == loss
    wins = whet.evaluate(model="m", against="m", judge="rules.py:reward", data=ROWS[:3], max_new_tokens=4)
    named = {"train": QA[:3], "columns": {"prompt": "question"}}
    assert whet.evaluate(model="m", against="m", judge="rules.py:reward", data=named, max_new_tokens=4) == wins


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"data.columns.prompts": "question"}, ["data.columns: whet reads no column 'prompts'; did you mean 'prompt'?"]),
    ({"data.columns.prompt": "qestion"}, ["qa.jsonl: data.columns.prompt: no row has a column 'qestion'; did you mean 'question'?"]),
    ({"data.columns": "question"}, ["data.columns: expected `object`, got `str`"]),
    ({"data.streaming": "true"}, ["qa.jsonl: data.streaming is for datasets by name"]),
    ({"data": "some/set", "data.streaming": "true"}, ["some/set: data.streaming reads the first rows", "--data.num-rows"]),
    ({"data.num-rows": "0"}, ["data.num_rows: expected `int` >= 1"]),
    ({"data": "{path: qa.jsonl, splt: test}"}, ["unknown field 'data.splt'"]),
    ({"data.train": "{path: qa.jsonl, splt: test}"}, ["unknown field 'data.train.splt'; did you mean 'data.train.split'?"]),
    ({"data": "a:b:c:d"}, ["a:b:c:d: expected the name of a dataset, name:split or name:configuration:split"]),
]  # fmt: skip


@pytest.mark.parametrize(("given", "what"), WRONG)
def test_what_is_wrong_with_names_and_sources_is_told(given: dict, what: list[str], capsys: Any) -> None:
    tiny.write_jsonl(Path("qa.jsonl"), QA)
    options = {"model": "m", "data": "qa.jsonl", "out": "out"} | given
    said = command(capsys, "sft", *[word for name, value in options.items() for word in (f"--{name}", value)])
    one_message(said.error, what)
    assert said.status == 2
    assert not Path("out").exists()


def test_prompts_come_from_one_source() -> None:
    tiny.write_jsonl(Path("a.jsonl"), ROWS)
    tiny.write_jsonl(Path("b.jsonl"), ROWS)
    one = trained("grpo", "a.jsonl", "a")
    assert trained("grpo", {"train": {"path": "a.jsonl"}}, "b") == one
    with pytest.raises(RecipeError, match=r"data.train: one source is read here, got 2; join them"):
        trained("grpo", ["a.jsonl", "b.jsonl"], "no")


# --- datasets ------------------------------------------------------------------------------------------------------------


def test_a_dataset_is_loaded_by_name_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None = None, *, split: str, streaming: bool = False) -> Any:
        asked.append((name, config, split, streaming))
        return iter(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("o/s:test", "o/s:main:test", "o/s:main:", "o/s:main:train[:10]+test[5:]"):
        assert [one.row for one in read_rows(source)] == ROWS
    named = {"path": "o/s", "name": "main", "split": "test"}
    trained("sft", named, "a")
    trained("sft", {"train": named, "columns": {"prompt": "prompt"}}, "b")
    trained("sft", {"train": named | {"split": ""}, "streaming": True, "num_rows": 3}, "c")
    recipe = whet.runs.yaml_text.read_yaml(Path("c/recipe.yaml"))
    assert recipe["data"]["train"][0] | {"weight": 1.0} == named | {"split": "", "weight": 1.0, "columns": {}}
    assert asked == [
        ("o/s", None, "test", False), ("o/s", "main", "test", False), ("o/s", "main", "train", False),
        ("o/s", "main", "train[:10]+test[5:]", False), ("o/s", "main", "test", False), ("o/s", "main", "test", False),
        ("o/s", "main", "train", True),
    ]  # fmt: skip


def test_of_a_streamed_dataset_only_the_first_rows_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    fetched = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> Any:
        def rows() -> Any:
            for number, row in enumerate(ROWS):
                fetched.append(number)
                yield row

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_rows("o/s", streaming=True, num_rows=3)
    assert [(one.row, one.where) for one in found] == [(ROWS[n], f"o/s:{n + 1}") for n in range(3)]
    assert fetched == [0, 1, 2]


def test_a_configuration_that_must_be_named_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(name: str, *, split: str) -> Any:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\n")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        read_rows("gsm8k")
    assert str(caught.value).endswith(
        "(Config name is missing.); name one of ['main', 'socratic'] as gsm8k:CONFIGURATION:train"
    )


def test_saved_datasets_are_read_and_a_split_is_named_if_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk("one")
    datasets.DatasetDict({"train": one, "test": one.select(range(2))}).save_to_disk("both")
    datasets.DatasetDict({"only": one}).save_to_disk("only")
    for source in ("one", "both:train", "only", "only:only"):
        assert [found.row for found in read_rows(source)] == ROWS
    assert [found.where for found in read_rows("both:test")] == ["both:test:1", "both:test:2"]
    for source, what in (
        ("both", "both: the folder has the splits train, test; name one, as both:train"),
        ("both:dev", "both:dev: the folder has the splits train, test"),
        ("one:train", "one:train: the folder has one dataset and no splits; give one"),
        ("both:x:train", "both:x:train: a saved dataset has no configurations; give both:train"),
    ):
        with pytest.raises(DataError) as caught:
            read_rows(source)
        assert str(caught.value).startswith(what)
    assert trained("sft", "both:train", "a") == trained("sft", ROWS, "b")


def test_a_folder_with_configurations_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("set").mkdir()
    tiny.write_jsonl(Path("set/one.jsonl"), ROWS)
    tiny.write_jsonl(Path("set/two.jsonl"), ROWS[:2])
    config = "- config_name: {0}\n  data_files:\n  - split: {1}\n    path: {2}.jsonl\n"
    Path("set/README.md").write_text(
        f"---\nconfigs:\n{config.format('a', 'train', 'one')}{config.format('b', 'test', 'two')}---\n"
    )
    assert [one.row for one in read_rows("set:a:train")] == ROWS
    assert [(one.row, one.where) for one in read_rows("set:b:test")] == [
        (ROWS[n], f"set:b:test:{n + 1}") for n in (0, 1)
    ]
    with pytest.raises(DataError, match=r"^set:b:dev: neither a file nor a dataset that can be loaded"):
        read_rows("set:b:dev")
    with pytest.raises(DataError, match=r"name one of \['a', 'b'\] as set:CONFIGURATION:train"):
        read_rows("set:train")


# --- resume --------------------------------------------------------------------------------------------------------------


def test_a_resume_sees_a_change_of_a_folder_a_pattern_and_a_saved_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    Path("rows").mkdir()
    tiny.write_jsonl(Path("rows/one.jsonl"), ROWS)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk("saved")

    def change() -> None:
        tiny.write_jsonl(Path("rows/two.jsonl"), ROWS[:1])

    def save() -> None:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[::-1])}).save_to_disk("other")
        Path("saved").rename("old")
        Path("other").rename("saved")

    for number, (data, act) in enumerate([("rows", change), ("rows/*.jsonl", change), ("saved:train", save)]):
        Path("rows/two.jsonl").unlink(missing_ok=True)
        trained("sft", data, f"run-{number}")
        assert any(
            name.startswith("data.train: ") for name in json.loads(Path(f"run-{number}/inputs.json").read_text())
        )
        trained("sft", data, f"run-{number}", resume=True)
        act()
        with pytest.raises(RecipeError, match=r"--resume: data.train: .*: the file has changed"):
            trained("sft", data, f"run-{number}", resume=True)


def test_rows_in_the_run_folder_are_refused_in_each_form() -> None:
    Path("out/rows").mkdir(parents=True)
    tiny.write_jsonl(Path("out/rows/a.jsonl"), ROWS)
    for data in ("out/rows", "out/rows/*.jsonl", "out/rows:a:train"):
        with pytest.raises(RecipeError, match=r"is in the run folder out, where the run could overwrite it"):
            trained("sft", data, "out")
