"""Input files that are damaged, or hold what JSON cannot: read rightly, or refused with file, line (row), value and fix."""

import contextlib
import datetime
import decimal
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from whet.data import read_rows
from whet.data.files import json_line, write_jsonl
from whet.data.rows import Reader
from whet.errors import DataError
from whet.feedback.base import Question
from whet.feedback.scores import ScoreRanker
from whet.runs.sources import Sources

from .helpers import at, reader

GOOD = b'{"prompt": "a", "completion": "b"}\n'


def refused(path: Path, fragments: list[str]) -> None:
    """Reading raises one line with these words, the first at its start after the path."""
    with pytest.raises(DataError) as caught:
        read_rows(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}{fragments[0]}"), message
    assert all(one in message for one in fragments), message
    assert len(message.removeprefix(str(path))) < 400
    assert "\n" not in message


TEXTS = [
    ("jsonl", GOOD + b'{"prompt": "x \\ud800 y"}\n', [":2: field 'prompt' ", "surrogate", "'\\ud800'", "character 2", "replace"]),
    ("jsonl", b'{"messages": [{"role": "user", "content": "\\udfff"}]}', [":1: field 'messages' (at 0.content) ", "surrogate"]),
    ("jsonl", b'{"a\\ud800": 1}', [":1: the name ", "surrogate"]),
    ("jsonl", GOOD + b'{"score": 1e400}', [":2: field 'score' is inf", "finite", "1.8e308"]),
    ("jsonl", b'{"score": -1e400}', [":1: field 'score' is -inf"]),
    ("jsonl", b'{"scores": [1, NaN]}', [":1: field 'scores' (at 1) is nan", "null"]),
    ("jsonl", b'{"x": {"y": -Infinity}}', [":1: field 'x' (at y) is -inf"]),
    ("jsonl", b'{"x": 1' + b"0" * 400 + b"}", [":1: field 'x' is an integer of 1329 bits", "as text"]),
    ("jsonl", b'{"x": ' + b"9" * 5000 + b"}", [":1: a number of 5000 digits", "as text"]),
    ("jsonl", GOOD + b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}", [":2: field 'x' has more than 100 lists", "as text"]),
    ("jsonl", GOOD + b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", [":2: ", "nested too deeply", "as text"]),
    ("jsonl", b'{"prompt": "a", "completion": "b", "prompt": "c"}', [":1: the name 'prompt' stands twice", "remove one"]),
    ("jsonl", b'{"m": [{"role": "user", "role": "system"}]}', [":1: the name 'role' stands twice"]),
    ("jsonl", b'{"": 1}', [":1: a field has an empty name", "name it"]),
    ("jsonl", GOOD + b'{"prompt": "a\0b"}', [":2: a NUL byte", "UTF-8"]),
    ("jsonl", GOOD + b"\0" * 512, [":2: a NUL byte", "damaged"]),
    ("jsonl", '{"prompt": "a"}'.encode("utf-16"), [":1: not valid UTF-8 at byte 0 of the line, got b'\\xff'", "save"]),
    ("jsonl", '{"prompt": "a"}'.encode("utf-16-le"), [":1: a NUL byte"]),
    ("jsonl", b"\xef\xbb\xbf" + GOOD, [":1: ", "BOM", "without one"]),
    ("json", b"\xef\xbb\xbf[]", [":1: ", "BOM"]),
    ("jsonl", GOOD + b'{"prompt": "a", "compl', [":2: not valid JSON (Unterminated string", "got '\"compl'", "one object a line"]),
    ("jsonl", b"[" + GOOD.strip() + b"]", [":1: expected a JSON object, got list", ".json"]),
    ("json", b"[" + GOOD + b"," + GOOD + b", 3]", [":3: expected a JSON object, got int"]),
    ("json", b"[\n" + GOOD + b',{"a" 1}]', [":3: not valid JSON (Expecting ':' delimiter at column 7)", "got '1}]'"]),
    ("json", b"[\n" + GOOD + GOOD + b"]", [":3: expected the end of the array or a comma, got '{\"prompt\"", "one array"]),
    ("json", b"[\n" + GOOD + b",\n]", [":4: not valid JSON (Expecting value", "got ']'"]),
    ("json", b"[\n" + GOOD, [":3: expected the end of the array or a comma, got ''"]),
    ("json", b"[" + GOOD + b"] 3", [":2: expected the end of the array"]),
    ("json", b"[" + GOOD + b',{"a": 1, "a": 2}]', [":2: the name 'a' stands twice"]),
    ("json", b"[\n" + GOOD + b',\n{"a": "\\ud800"}]', [":4: field 'a' ", "surrogate"]),
    ("json", b"[ \n ]", [": the file is empty"]),
    ("csv", b'prompt,completion\na,b\nc,"d\ne,f\ng,h\n', [":3: not valid CSV (unexpected end of data)", "close each quote"]),
    ("csv", b'prompt,completion\na,"b" c\n', [":2: not valid CSV", '""']),
    ("csv", b"prompt,completion,prompt\na,b,c\n", [":1: two columns have the name 'prompt'", "rename"]),
    ("csv", b",prompt,completion\n0,a,b\n", [":1: column 1 has no name", "index=False"]),
    ("csv", b"prompt,completion, \na,b,c\n", [":1: column 3 has no name"]),
    ("csv", b'prompt,completion\n"a\nb",c\nd\n', [":4: the row has another number of fields than the header: 1, not 2"]),
    ("csv", b"prompt,completion\n" + b"a,b\n" * 9000 + b"a,\xff\n", [":9002: not valid UTF-8 at byte 2 of the line"]),
    ("csv", "prompt,completion\na,b\n".encode("utf-16-le"), [":1: a NUL byte"]),
    ("jsonl.bz2", b"BZh", [": expected a .jsonl", "unpack"]),
    ("jsonl.gz", b"\x1f\x8b", [": the file cannot be read (Compressed file ended"]),
    ("jsonl.gz", GOOD, [": the file cannot be read (Not a gzipped file"]),
    ("json.gz", gzip.compress(b"[\n" + GOOD + b",{", mtime=0), [":3: not valid JSON"]),
    ("jsonl.gz", gzip.compress(GOOD * 500, mtime=0)[:-20], [": the file cannot be read ("]),
    ("tsv", b"prompt\tcompletion\na\tb\nc\n", [":3: the row has another number of fields", "fields with tabs"]),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "content", "what"), TEXTS)
def test_damaged_text_files_are_refused_with_line_value_and_fix(
    suffix: str, content: bytes, what: list[str], tmp_path: Path
) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(content)
    refused(path, what)


def test_line_separators_of_unicode_and_carriage_returns_do_not_end_a_row(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\u2029d", "e\x85f", "g\x0bh"]
    raw = "\r\n".join(json.dumps({"text": one}, ensure_ascii=False) for one in texts[:3]) + "\r\n"
    (tmp_path / "rows.jsonl").write_bytes(raw.encode())
    assert [one.row["text"] for one in read_rows(str(tmp_path / "rows.jsonl"))] == texts[:3]
    write_jsonl(tmp_path / "own.jsonl", [{"text": one} for one in texts])
    assert [one.row["text"] for one in read_rows(str(tmp_path / "own.jsonl"))] == texts
    assert len((tmp_path / "own.jsonl").read_text().splitlines()) == len(texts)


def test_text_that_is_unusual_but_valid_is_kept_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(
        b'{"text": "\\ud83d\\ude00 \\u0000 \xf0\x9f\x98\x80", "n": 18446744073709551617}'
    )
    (one,) = read_rows(str(tmp_path / "rows.jsonl"))
    assert one.row == {"text": "😀 \0 😀", "n": 2**64 + 1}


ARRAYS = [
    (b'[{"a": 1},{"a": 2}]', (1, 1)),
    (b'\n [\n{"a":\n1}\n , {"a": 2}\n]\n\n', (3, 5)),
    (b'\r\n[\r\n{"a": 1},\r\n{"a": 2}]', (3, 4)),
]


@pytest.mark.parametrize(("content", "lines"), ARRAYS)
def test_a_json_file_with_one_array_is_read_with_the_lines_of_its_rows(
    content: bytes, lines: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    assert [(one.row, one.where) for one in read_rows(str(path))] == [
        ({"a": number}, f"{path}:{line}") for number, line in enumerate(lines, 1)
    ]


def test_a_csv_row_is_located_at_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'text,n\n"a\nb",1\n\n"c ""d""",2\r\n')
    assert [(one.row, one.where) for one in read_rows(str(path))] == [
        ({"text": "a\nb", "n": "1"}, f"{path}:2"), ({"text": 'c "d"', "n": "2"}, f"{path}:5")
    ]  # fmt: skip


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def broken_text() -> Any:
    """A column of text whose second value is not UTF-8."""
    offsets = pyarrow.array(["ok", "zz"]).buffers()[1]
    return pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"ok\xff\xfe"))


VALUES: dict[str, tuple[Any, list[str]]] = {
    "text that is not UTF-8": (
        broken_text(),
        [":2: field 'x' cannot be read (not valid UTF-8 at byte 0", "\\xff\\xfe"],
    ),
    "bytes": (pyarrow.array([b"a", b"\x89PNG"]), [":1: field 'x' is a bytes, b'a', which JSON cannot hold", "text"]),
    "bytes in a list": (pyarrow.array([[], [b"b"]]), [":2: field 'x' (at 0) is a bytes"]),
    "a date after 9999": (
        pyarrow.array([0, 10**15], pyarrow.timestamp("ms")),
        [":2: field 'x' cannot be read (timestamp[ms]"],
    ),
    "a duration": (pyarrow.array([5], pyarrow.duration("s")), [":1: field 'x' is a timedelta"]),
    "NaN": (pyarrow.array([1.0, float("nan")]), [":2: field 'x' is nan"]),
    "infinity": (pyarrow.array([[1.0], [float("inf")]]), [":2: field 'x' (at 0) is inf"]),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_of_parquet_that_json_cannot_hold_are_refused_with_their_row(case: str, tmp_path: Path) -> None:
    column, what = VALUES[case]
    refused(parquet(tmp_path / "rows.parquet", prompt=["a"] * len(column), x=column), what)


def test_rows_after_the_first_batch_have_their_numbers(tmp_path: Path) -> None:
    values = [1.0] * 70_000
    values[69_000] = float("inf")
    refused(parquet(tmp_path / "rows.parquet", x=values), [":69001: field 'x' is inf"])


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "cut in the footer": lambda raw: raw[:-3],
    "a page of other bytes": lambda raw: raw[:50] + b"\xff" * 60 + raw[110:],
    "one bit of one value": lambda raw: raw.replace(b"hello 7 ", b"hullo 7 ", 1),
    "empty": lambda raw: b"",
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_parquet_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": [f"hello {number} " for number in range(500)]})
    options = {"write_page_checksum": True, "use_dictionary": False, "compression": "none"}
    pyarrow.parquet.write_table(table, path, **options)
    assert len(read_rows(str(path))) == 500
    raw = path.read_bytes()
    assert DAMAGE[case](raw) != raw
    path.write_bytes(DAMAGE[case](raw))
    refused(path, [": not a readable Parquet file", "damaged or incomplete"])


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["x", "x"]), path)
    refused(path, [": two columns have the name 'x'"])


TIME = datetime.datetime(2026, 11, 2, 13, 5, 6, 70, tzinfo=datetime.UTC)
FORMS: list[tuple[Any, Any]] = [
    (TIME, "2026-11-02T13:05:06.000070+00:00"),
    (TIME.replace(tzinfo=None), "2026-11-02T13:05:06.000070"),
    (TIME.date(), "2026-11-02"),
    (datetime.time(1, 2), "01:02:00"),
    (decimal.Decimal("12345678901234567890.10"), "12345678901234567890.10"),
    ([TIME.date(), None], ["2026-11-02", None]),
    ({"day": TIME.date()}, {"day": "2026-11-02"}),
    (True, True),
    (0.1, 0.1),
]


@pytest.mark.parametrize(("value", "form"), FORMS)
def test_dates_and_decimals_have_one_form_in_every_source(value: Any, form: Any, tmp_path: Path) -> None:
    (one,) = read_rows(str(parquet(tmp_path / "rows.parquet", x=[value])))
    assert one.row == {"x": form}
    assert read_back(Sources(tmp_path), [{"x": value}]) == [{"x": form}]


def read_back(sources: Sources, rows: Any) -> list[Any]:
    """The rows of a call as the run reads them."""
    path = sources.plain("data", rows)
    sources.write()
    return [one.row for one in read_rows(path)]


def test_rows_of_a_dataset_and_of_python_have_the_same_values(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": [{"role": "user", "content": "a", "name": None}], "day": TIME, "cost": decimal.Decimal("1.50")}]
    expected = [
        {"prompt": [{"role": "user", "content": "a"}], "day": "2026-11-02T13:05:06.000070+00:00", "cost": "1.50"}
    ]
    assert read_back(Sources(tmp_path), rows) == expected
    assert read_back(Sources(tmp_path), datasets.Dataset.from_list(rows)) == expected
    assert read_back(Sources(tmp_path), ({"a": (1, 2)},)) == [{"a": [1, 2]}]


OBJECTS: list[tuple[Any, str]] = [
    ([{"x": 1}, {"x": "\ud800"}], "data[1]: field 'x' is not valid Unicode: half of a surrogate pair"),
    ([{"x": float("nan")}], "data[0]: field 'x' is nan"),
    ([{"x": 10**5000}], "data[0]: field 'x' is an integer of 16610 bits"),
    ([{"x": b"a"}], "data[0]: field 'x' is a bytes, b'a', which JSON cannot hold"),
    ([{"x": {1, 2}}], "data[0]: field 'x' is a set, {1, 2}, which JSON cannot hold"),
    ([{"x": {1: 2}}], "data[0]: field 'x': the name 1 is a int; names must be text"),
    ([{1: 2}], "data[0]: the name 1 is a int; names must be text"),
]


@pytest.mark.parametrize(("rows", "what"), OBJECTS)
def test_rows_of_python_that_json_cannot_hold_are_refused_before_anything_is_written(
    rows: list, what: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        Sources(tmp_path).plain("data", rows)
    assert str(caught.value).startswith(what)
    assert not list(tmp_path.iterdir())


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


def test_python_rows_may_nest_as_deep_as_files(tmp_path: Path) -> None:
    assert read_back(Sources(tmp_path), [{"x": nested(100)}]) == [{"x": nested(100)}]
    for rows in ([{"x": nested(101)}], [{"x": nested(900)}]):
        with pytest.raises(DataError, match="more than 100 lists"):
            Sources(tmp_path).plain("data", rows)


def test_a_table_is_refused_with_words_and_a_dataset_that_is_streamed_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises(DataError, match="data: a Table is not read; give a list of its rows"):
        Sources(tmp_path).plain("data", pyarrow.table({"text": ["a"]}))
    streamed = datasets.Dataset.from_list([{"text": "a"}]).to_iterable_dataset()
    assert read_back(Sources(tmp_path), streamed) == [{"text": "a"}]


def test_a_row_of_a_dataset_that_cannot_be_read_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    table = pyarrow.table({"x": broken_text()})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: datasets.Dataset(datasets.table.InMemoryTable(table))
    )
    with pytest.raises(DataError, match=r"^some/set:2: the row cannot be read \('utf-8' codec"):
        read_rows("some/set")


# --- nulls ---------------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo", "day": None}}}
TALK = [
    {"role": "user", "content": "a", "tool_calls": None, "name": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL | {"id": None}]},
    {"role": "tool", "content": "b", "parts": [{"type": "text", "text": "b", "image": None}]},
]


def talk(call: Any) -> list[Any]:
    """The conversation without its nulls."""
    return [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call, call]},
        {"role": "tool", "content": "b", "parts": [{"type": "text", "text": "b"}]},
    ]


def test_nulls_inside_conversations_of_parquet_are_as_if_absent_at_any_depth(tmp_path: Path) -> None:
    rows = [{"messages": TALK, "chosen": TALK[:1], "meta": {"a": None, "b": 1}, "target": None, "scores": [1.0, None]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (one,) = read_rows(str(tmp_path / "rows.parquet"))
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
    assert one.row == {
        "messages": talk(call), "chosen": [{"role": "user", "content": "a"}], "meta": {"a": None, "b": 1}, "scores": [1.0, None]
    }  # fmt: skip


def test_nulls_inside_conversations_of_json_are_as_if_absent_but_the_arguments_of_calls_keep_theirs(
    tmp_path: Path,
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "strict": None, "parameters": {"default": None}}}]
    kept = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": TALK, "tools": tools}))
    (one,) = read_rows(str(tmp_path / "rows.jsonl"))
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo", "day": None}}}
    assert one.row == {"messages": talk(call), "tools": kept}


# --- numbers, and what is written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [1e39, -1e39, "1e400", 10**300, 10**400, float("nan")])
def test_numbers_that_a_loss_cannot_hold_are_refused(score: Any) -> None:
    with pytest.raises(DataError, match=r"^my\.jsonl:1: field 'score' must be a finite number, got "):
        reader().labeled(at({"prompt": "a", "completion": "b", "score": score}))


def test_scores_given_as_text_are_ranked_as_numbers(tmp_path: Path) -> None:
    scores = {"scores": ["9", "10", "1e1"]}
    assert ScoreRanker().rank([Question("a", ("b", "c", "d"), scores)]) == [[3, 1, 1]]
    rows = [{"prompt": "a", "responses": ["b", "c"], "scores": [decimal.Decimal("9.5"), decimal.Decimal("10.5")]}]
    (one,) = Reader(reader().chat, 64).rankings(at(*read_back(Sources(tmp_path), rows)))
    assert one.ranks == (2, 1)


@pytest.mark.parametrize("value", ["\ud800 b", {1, 2}, float("nan"), b"\xff", TIME, "\u2028"])
def test_no_value_stops_a_file_from_being_written(value: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"x": "first"}, {"x": value}, {"x": "last"}])
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(one)["x"] for one in (lines[0], lines[2])] == ["first", "last"]
    kept = json.loads(lines[1])["x"]
    assert kept == value or kept == str(value) or kept != kept
    assert json_line({"x": "é"}) == '{"x": "é"}\n'


def test_every_error_of_reading_is_one_of_ours(tmp_path: Path) -> None:
    """Each prefix of valid files, and each file with one byte changed, is read or refused, and never raises otherwise."""
    parquet(tmp_path / "rows.parquet", prompt=["a", "b"], n=[1, 2])
    (tmp_path / "rows.csv").write_bytes(b'prompt,n\n"a ""b""\n",1\nc,2\n')
    (tmp_path / "rows.json").write_bytes(b'[{"prompt": "a", "n": [1.5e3, null]},\n {"prompt": "\\u00e9"}]')
    for name in ("rows.parquet", "rows.csv", "rows.json"):
        raw = (tmp_path / name).read_bytes()
        stride = max(1, len(raw) // 150)
        changed = [raw[:end] for end in range(0, len(raw), stride)]
        changed += [raw[:at] + bytes([raw[at] ^ 0x80]) + raw[at + 1 :] for at in range(0, len(raw), stride)]
        for one in changed:
            (tmp_path / name).write_bytes(one)
            with contextlib.suppress(DataError):
                read_rows(str(tmp_path / name))


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(DataError, match="data: the path is empty"):
        read_rows("")
