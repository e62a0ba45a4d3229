"""The cache of tokenized rows: the same records, bits and messages with it and without it; its key; damage; memory; two at once."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from data.helpers import bits, lines_tokenizer

import whet
from whet.data import Reader, Store, chat_format
from whet.errors import DataError
from whet.runs import cache, data

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a cache of its own, where all sources count as large."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHET_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(cache, "SMALL", 1)
    monkeypatch.setattr(data, "FEW", 100)
    return tmp_path


def words(rng: random.Random, most: int = 12) -> str:
    return " ".join(rng.choices(tiny.WORDS, k=rng.randint(1, most)))


def rows_of(reading: str, count: int = 600) -> list[dict]:
    """Rows in all forms that a reading takes, more than a block of them, some of them long or cut off."""
    rng = random.Random(reading)
    out: list[dict] = []
    for _ in range(count):
        prompt: Any = words(rng)
        if rng.random() < 0.3:
            prompt = [{"role": "system", "content": words(rng)}, {"role": "user", "content": prompt}]
        row: dict[str, Any] = {"prompt": prompt, "finish": rng.choice(["stop", "stop", "length"])}
        answers = [words(rng) for _ in range(rng.randint(2, 4))]
        ranked = {
            "responses": answers,
            "scores": [rng.randint(0, 3) for _ in answers],
            "finish": ["stop"] * len(answers),
        }
        pair = {"chosen": answers[0], "rejected": answers[1], "finish": ["stop", "length"]}
        if reading == "demonstrations":
            turns = [{"role": role, "content": words(rng)} for role in ("user", "assistant", "user", "assistant")]
            row |= {"completion": answers[0]}
            row = rng.choice([row, {"messages": turns}, {"text": words(rng, 60)}])
        elif reading == "texts":
            row = {"text": words(rng, 90)}
        elif reading in ("pairs", "rankings"):
            given = {"probability": rng.random(), "margin": rng.uniform(-2, 2)} if reading == "pairs" else {}
            row |= rng.choice([pair | given, ranked])
        elif reading == "labeled":
            row |= {"completion": answers[0], "score": rng.uniform(-3, 3)}
        elif reading == "unpaired":
            row |= {"completion": answers[0], "label": rng.random() < 0.5}
        else:
            steps = [words(rng) for _ in answers]
            row |= {"completions": steps, "labels": [rng.choice([0, 0.5, 1]) for _ in steps]}
        out.append(row)
    return out


def reading_of(name: str, cached: str = "auto", **options: Any) -> data.Reading:
    chat = chat_format(lines_tokenizer(), "plain") if name == "steps" else chat_format(tiny.tokenizer())
    return data.Reading(Reader(chat, **({"max_tokens": 24, "too_long": "drop"} | options)), name, cached=cached)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every tokenization fail."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a row is tokenized")

    monkeypatch.setattr(Reader, "block", refuse)
    monkeypatch.setattr(Reader, "unpaired", refuse)


def entries(folder: Path = Path("home/data")) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


READINGS = ("texts", "demonstrations", "pairs", "rankings", "labeled", "unpaired", "steps")


@pytest.mark.parametrize("name", READINGS)
def test_all_kinds_of_rows_are_the_same_from_memory_from_a_new_cache_and_from_an_old_one(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tiny.write_jsonl(Path("rows.jsonl"), rows_of(name))
    seen = []
    for cached in ("none", "auto", "auto"):
        if seen[1:]:
            forbid(monkeypatch)
        own = reading_of(name, cached)
        found = own.read("rows.jsonl", {})
        assert isinstance(found, Store) == (cached == "auto")
        data.tell_left_out(own.reader)
        seen.append((bits(list(found)), len(own.reader.left_out), own.reader.left_out[:3], capsys.readouterr()))
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0][0][1]) > 50
    if name not in ("texts", "rankings"):
        assert seen[0][1] > 3


def test_what_is_printed_about_rows_names_the_files_where_they_are_now(capsys: Any) -> None:
    Path("rows").mkdir()
    rows = [{"prompt": "a", "completion": "yes " * (1 + 50 * (number == 7)), "score": 1} for number in range(20)]
    tiny.write_jsonl(Path("rows/a.jsonl"), rows)
    tiny.write_jsonl(Path("rows/b.jsonl"), rows)
    for folder in ("rows", "moved"):
        own = reading_of("labeled")
        own.read(folder, {})
        data.tell_left_out(own.reader)
        said = capsys.readouterr().err
        assert f"{folder} (2 files): 38 of 38 answers have the score 1" in said
        assert f"2 rows or answers longer than 24 tokens are left out ({folder}/a.jsonl:8, {folder}/b.jsonl:8)" in said
        shutil.move("rows", "moved") if folder == "rows" else None
    assert len(entries()) == 1


# --- runs ------------------------------------------------------------------------------------------------------------


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("demonstrations", {}),
    "dpo": ("pairs", {"num_epochs": 2.0, "batch_size": 128}),
    "reward": ("rankings", {"head": {"standardize": True}}),
    "kto": ("unpaired", {"eval": {"data": "rows.jsonl"}}),
}


@pytest.mark.parametrize("method", RUNS)
def test_a_run_has_the_same_weights_with_the_cache_and_without_it(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, more = RUNS[method]
    rows = [
        {key: value for key, value in row.items() if key not in ("margin", "probability")} for row in rows_of(name, 120)
    ]
    tiny.write_jsonl(Path("rows.jsonl"), rows)
    tiny.folder(Path("m"))
    short = {} if "num_epochs" in more else {"num_steps": 2}
    weights = []
    for number, cached in enumerate(("none", "auto", "auto")):
        if number == 2:
            forbid(monkeypatch)
        whet.train(
            method, model="m", data={"train": "rows.jsonl", "cache": cached, "max_tokens": 48, "too_long": "drop"},
            out=f"run{number}", quiet=True, **{"batch_size": 32} | short | more,
        )  # fmt: skip
        lines = Path(f"run{number}/metrics.jsonl").read_text().splitlines()
        numbers = [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]
        files = sorted(Path(f"run{number}/model").glob("*.safetensors"))
        weights.append((numbers, [one.read_bytes() for one in files]))
    assert weights[0] == weights[1] == weights[2]
    assert weights[0][1]


def test_a_method_that_does_not_read_a_column_refuses_it_also_if_another_method_cached_the_rows() -> None:
    tiny.write_jsonl(Path("rows.jsonl"), rows_of("pairs"))
    reading_of("pairs").read("rows.jsonl", {})
    for _ in range(2):
        with pytest.raises(DataError, match="dpo does not read the field 'margin'"):
            replace(reading_of("pairs"), method="dpo", refused=("margin", "probability")).read("rows.jsonl", {})


# --- what is cached --------------------------------------------------------------------------------------------------


def test_small_sources_the_first_rows_and_a_cache_that_is_off_are_kept_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tiny.write_jsonl(Path("rows.jsonl"), rows_of("pairs"))
    assert isinstance(reading_of("pairs", "none").read("rows.jsonl", {}), list)
    assert isinstance(reading_of("pairs").read("rows.jsonl", {}, num_rows=100), list)
    monkeypatch.setattr(cache, "SMALL", file.stat().st_size + 1)
    assert isinstance(reading_of("pairs").read("rows.jsonl", {}), list)
    assert not Path("home").exists()
    monkeypatch.setattr(cache, "SMALL", file.stat().st_size)
    assert isinstance(reading_of("pairs").read("rows.jsonl", {}), Store)


def test_the_folder_is_named_by_the_option_or_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.folder_of("auto") == tmp_path / "home" / "data"
    assert cache.folder_of("mine") == Path("mine")
    monkeypatch.setenv("HOME", "/home/a")
    assert cache.folder_of("~/x") == Path("/home/a/x")
    monkeypatch.delenv("WHET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.folder_of("auto") == Path("/xdg/whet/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder_of("auto") == Path("/home/a/.cache/whet/data")


def test_the_folder_is_this_users_alone() -> None:
    tiny.write_jsonl(Path("rows.jsonl"), rows_of("pairs"))
    reading_of("pairs").read("rows.jsonl", {})
    assert Path("home/data").stat().st_mode & 0o777 == 0o700


def test_the_name_of_a_file_depends_on_everything_that_changes_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny.write_jsonl(Path("rows.jsonl"), rows_of("pairs"))
    shutil.copy(file, "copy.jsonl")

    def key(source: str = "rows.jsonl", tokenizer: Any = None, **options: Any) -> Any:
        arguments = options.pop("arguments", {})
        chat = chat_format(tokenizer or tiny.tokenizer(), options.pop("template", None), arguments=arguments)
        return cache.place_of("auto", source, chat, options)

    first = key()
    assert first is not None
    assert key() == key("copy.jsonl") == first
    tiny.write_jsonl(Path("copy.jsonl"), [*rows_of("pairs")[:-1], {"prompt": "a", "chosen": "yes", "rejected": "no"}])
    more, special = tiny.tokenizer(), tiny.tokenizer()
    more.add_tokens(["five"])
    special.eos_token = "<end>"
    dated = tiny.TEMPLATE + "{{ strftime_now('%Y')[:0] }}"
    shown = tiny.TEMPLATE + "{{ '' if shout is defined else '' }}"
    others = [
        key("copy.jsonl"), key(tokenizer=more), key(tokenizer=special), key(template="plain"), key(template="none"),
        key(template=dated), key(template=shown), key(template=shown, arguments={"shout": True}),
        *(key(**{name: 1}) for name in ("max_tokens", "too_long", "turns", "separator", "closing", "columns", "num_rows")),
        key(reading="pairs"), key(reading="rankings"),
    ]  # fmt: skip
    assert len({first, *others}) == len(others) + 1

    class Tomorrow(cache.date):
        @classmethod
        def today(cls) -> "Tomorrow":
            return cls(2100, 1, 1)

    before = key(template=dated)
    monkeypatch.setattr(cache, "date", Tomorrow)
    assert key() == first
    assert key(template=dated) != before


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("pairs", {"max_tokens": 23}), ("pairs", {"too_long": "cut"}), ("pairs", {"closing": True}),
        ("demonstrations", {"turns": "last"}), ("rankings", {}),
    ],
)  # fmt: skip
def test_each_option_of_the_reader_has_an_entry_of_its_own(name: str, changes: dict[str, Any]) -> None:
    """The rows are read with other options first."""
    tiny.write_jsonl(Path("rows.jsonl"), rows_of("demonstrations" if name == "demonstrations" else "pairs"))
    reading_of("demonstrations" if name == "demonstrations" else "pairs").read("rows.jsonl", {})
    cached, plain = (reading_of(name, one, **changes).read("rows.jsonl", {}) for one in ("auto", "none"))
    assert bits(list(cached)) == bits(plain)
    assert len(entries()) == 2


def test_columns_and_the_number_of_rows_have_entries_of_their_own() -> None:
    tiny.write_jsonl(
        Path("rows.jsonl"), [row | {"best": "a", "worst": "b"} for row in rows_of("pairs") if "chosen" in row] * 3
    )
    for columns, count in (({}, None), ({"chosen": "best", "rejected": "worst"}, None), ({}, 101)):
        cached, plain = (reading_of("pairs", one).read("rows.jsonl", columns, count) for one in ("auto", "none"))
        assert bits(list(cached)) == bits(plain)
    assert len(entries()) == 3


def test_splits_of_a_saved_dataset_have_entries_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [row | {"prompt": "a b c"} for row in rows_of("labeled", 300)]
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[::-1])}
    datasets.DatasetDict(splits).save_to_disk("saved")
    expected = {one: bits(reading_of("labeled", "none").read(f"saved:{one}", {})) for one in splits}
    assert expected["train"] != expected["test"]
    for _ in range(2):
        assert {one: bits(list(reading_of("labeled").read(f"saved:{one}", {}))) for one in splits} == expected
        forbid(monkeypatch)
    assert len(entries()) == 2


# --- faults ----------------------------------------------------------------------------------------------------------


def damage(kind: str) -> None:
    (path,) = entries()
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "without its hash":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text("{")


@pytest.mark.parametrize("kind", ["truncated", "flipped", "empty", "without its hash", "with half a hash"])
def test_a_damaged_file_is_written_again(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    tiny.write_jsonl(Path("rows.jsonl"), rows_of("pairs"))
    expected = bits(list(reading_of("pairs").read("rows.jsonl", {})))
    damage(kind)
    capsys.readouterr()
    assert bits(list(reading_of("pairs").read("rows.jsonl", {}))) == expected
    assert (
        f"data.cache: {entries()[0].absolute()} is damaged or incomplete; it is written again"
        in capsys.readouterr().err
    )
    forbid(monkeypatch)
    assert bits(list(reading_of("pairs").read("rows.jsonl", {}))) == expected


def test_data_that_change_while_they_are_read_are_refused_and_leave_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the file is of the rows before, so the rows after must not stand in it."""
    tiny.write_jsonl(Path("rows.jsonl"), rows_of("pairs"))
    real = data.write

    def changing(*given: Any) -> None:
        tiny.write_jsonl(Path("rows.jsonl"), rows_of("pairs")[::-1])
        real(*given)

    monkeypatch.setattr(data, "write", changing)
    with pytest.raises(DataError, match=r"rows\.jsonl: the data changed while they were read"):
        reading_of("pairs").read("rows.jsonl", {})
    assert entries() == []


def test_a_file_system_without_locks_is_said_and_the_rows_are_kept_in_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tiny.write_jsonl(Path("rows.jsonl"), rows_of("pairs"))

    def lock(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no locks")

    monkeypatch.setattr(cache.FileLock, "acquire", lock)
    assert isinstance(reading_of("pairs").read("rows.jsonl", {}), list)
    assert "cannot be written (no locks)" in capsys.readouterr().err


def test_a_write_that_was_killed_leaves_nothing_that_is_read() -> None:
    tiny.write_jsonl(Path("rows.jsonl"), rows_of("pairs"))
    expected = bits(list(reading_of("pairs").read("rows.jsonl", {})))
    (path,) = entries()
    path.rename(path.with_name(f".{path.name}.writing"))
    assert bits(list(reading_of("pairs").read("rows.jsonl", {}))) == expected
    assert sorted(one.suffix for one in path.parent.iterdir()) == [".arrow", ".json", ".lock"]


def test_a_folder_that_cannot_be_written_is_said_and_the_rows_are_kept_in_memory(capsys: Any) -> None:
    tiny.write_jsonl(Path("rows.jsonl"), rows_of("pairs"))
    Path("file").write_text("")
    found = reading_of("pairs", "file/cache").read("rows.jsonl", {})
    assert isinstance(found, list)
    said = capsys.readouterr().err
    assert said.startswith("whet: data.cache: file/cache cannot be written (")
    assert "the rows are kept in memory" in said.splitlines()[0]


BAD: dict[str, tuple[Any, str]] = {
    "json": ("{", "rows.jsonl:601: not valid JSON"),
    "type": ('{"prompt": 7, "chosen": "a", "rejected": "b"}', "rows.jsonl:601: field 'prompt' must be a string or a list"),
    "missing": ('{"prompt": "a", "chosen": "a"}', "rows.jsonl:601: field 'rejected' is missing"),
    "refused": ('{"prompt": "a", "chosen": "a", "rejected": "b", "extra": 1}', "rows.jsonl:601: dpo does not read the field 'extra'"),
    "twice": ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "a"}', "rows.jsonl:601: field 'chosen' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_at_the_end_is_told_with_its_line_before_any_row_is_tokenized(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, message = BAD[kind]
    file = tiny.write_jsonl(Path("rows.jsonl"), rows_of("pairs"))
    file.write_text(file.read_text() + line + "\n")
    forbid(monkeypatch)
    with pytest.raises(DataError) as caught:
        replace(reading_of("pairs"), method="dpo", refused=("extra",)).read("rows.jsonl", {})
    assert str(caught.value).startswith(message)
    assert not entries()


def test_a_row_that_is_too_long_is_told_as_without_the_cache_and_leaves_no_file() -> None:
    tiny.write_jsonl(Path("rows.jsonl"), [*rows_of("pairs"), {"prompt": "a", "chosen": "yes " * 500, "rejected": "no"}])
    told = []
    for cached in ("none", "auto"):
        with pytest.raises(DataError) as caught:
            reading_of("pairs", cached, max_tokens=200, too_long="error").read("rows.jsonl", {})
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert told[0].startswith("rows.jsonl:601: the prompt with its answer has 50")
    assert [one.suffix for one in Path("home/data").iterdir()] == [".lock"]


# --- processes -------------------------------------------------------------------------------------------------------


READ = """
import resource, sys
import tiny
from whet.data import Reader, chat_format, store
from whet.runs import cache, data
cache.SMALL = 1
store.BATCH_TOKENS = 1 << 16
reading = data.Reading(Reader(chat_format(tiny.tokenizer()), 4096), "pairs", cached="auto")
for before in sys.argv[2:]:
    reading.read(before, {})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = reading.read(sys.argv[1], {})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(found))
"""


def started(*words: str) -> subprocess.Popen:
    path = [str(ROOT / "src"), str(ROOT), str(ROOT / "tests")]
    code = f"import sys; sys.path[:0] = {path}\n{READ}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen) -> tuple[str, str]:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out, error


def test_processes_that_read_the_same_rows_at_once_write_them_once() -> None:
    tiny.write_jsonl(Path("rows.jsonl"), rows_of("pairs", 1200))
    both = [started("rows.jsonl") for _ in range(2)]
    assert len({out.split()[1] for out, _ in map(ended, both)}) == 1
    (path,) = entries()
    assert json.loads(path.with_suffix(".json").read_text())["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert bits(list(Store(path))) == bits(reading_of("pairs", "none", max_tokens=4096).read("rows.jsonl", {}))


def test_a_process_waits_for_another_one_that_writes_the_same_rows(capsys: Any) -> None:
    tiny.write_jsonl(Path("rows.jsonl"), rows_of("pairs"))
    options = {"columns": {}, "num_rows": None, "reading": "pairs", "refused": ()}
    path = reading_of("pairs", max_tokens=4096, too_long="error")._place("rows.jsonl", options)
    assert path is not None
    path.parent.mkdir(parents=True)
    with cache.FileLock(path.with_suffix(".lock")):
        other = started("rows.jsonl")
        assert other.stderr is not None
        assert "data.cache: another process tokenizes these rows; this one waits for it" in other.stderr.readline()
        assert other.poll() is None
        assert not entries()
    assert ended(other)[0].split()[1] != "0"


def test_the_memory_does_not_grow_with_the_file() -> None:
    """A file of 13 MB, whose tokens and masks take twice as much in memory, is tokenized and cached in the memory of one of 2 MB."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(tiny.WORDS, k=100)) for _ in range(40)]
    for file, count in (("small.jsonl", 2000), ("large.jsonl", 16_000)):
        pairs = (texts[number % 40] + f'", "rejected": "{texts[number % 39]}' for number in range(count))
        Path(file).write_text("".join(f'{{"prompt": "a", "chosen": "{pair}"}}\n' for pair in pairs))
    size = Path("large.jsonl").stat().st_size
    grown, count = map(int, ended(started("large.jsonl", "small.jsonl"))[0].split())
    assert count == 16_000
    assert grown << 10 < size // 4
