"""Rows as other tools write them: the exact tokens and messages that come out, and refusals with file and line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny

from whet.data import Located, read_rows
from whet.data.fields import check_fields
from whet.data.forms import Forms, prompted, split_pair
from whet.errors import DataError, RecipeError

from . import test_data
from .helpers import at, drawn, reader

U, A, S = "user", "assistant", "system"


def said(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def shared(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"from": who, "value": value} for who, value in turns]


def rows(*given: dict, **columns: str) -> list[Located]:
    forms = Forms(columns, "my.jsonl")
    found = [forms.renamed(one) for one in at(*given)]
    forms.check()
    return [forms.converted(one) for one in found]


# --- ShareGPT ------------------------------------------------------------------------------------------------------------

NAMES = [
    ("human", U), ("user", U), ("prompter", U), ("gpt", A), ("assistant", A), ("chatgpt", A), ("bard", A), ("bing", A), ("model", A),
    ("system", S), ("tool", "tool"), ("function", "tool"), ("observation", "tool"), ("function_response", "tool"),
    ("tool-response", "tool"), ("Human", U), ("GPT", A),
]  # fmt: skip


@pytest.mark.parametrize(("name", "role"), NAMES)
def test_each_speaker_of_sharegpt_has_its_role(name: str, role: str) -> None:
    talk = [*shared(("human", "a")), {"from": name, "value": "b"}]
    (one,) = rows({"conversations": talk})
    assert one.row == {"messages": said((U, "a"), (role, "b"))}
    (one,) = rows({"conversations": [{"role": name, "content": "b", "weight": 0}]})
    assert one.row == {"messages": [{"role": role, "content": "b", "weight": 0}]}


TALK = shared(("system", "a"), ("human", "hello"), ("gpt", "yes b"), ("human", "c"), ("gpt", "no"))


def test_a_sharegpt_conversation_trains_each_answer() -> None:
    (row,) = reader().demonstrations(rows({"conversations": TALK}))
    expected = "<system> a <user> hello <assistant> [yes] [b] [<end>] <user> c <assistant> [no] [<end>]"
    assert drawn([row]) == [expected]
    assert row.ids.tolist() == tiny.tokenizer()(expected.replace("[", "").replace("]", ""))["input_ids"]


def test_a_message_of_weight_0_is_not_trained() -> None:
    talk = [TALK[1], TALK[2] | {"weight": 0}, *TALK[3:]]
    assert drawn(reader().demonstrations(rows({"conversations": talk}))) == [
        "<user> hello <assistant> yes b <end> <user> c <assistant> [no] [<end>]"
    ]


def test_the_prompt_of_a_sharegpt_conversation_is_what_is_before_the_last_answer() -> None:
    (prompt,) = reader().prompts(rows({"conversations": TALK, "id": "x"}))
    assert prompt.messages == tuple(said((S, "a"), (U, "hello"), (A, "yes b"), (U, "c")))
    assert prompt.row == {"id": "x", "prompt": list(prompt.messages), "completion": "no"}
    assert tiny.tokenizer().decode(prompt.ids) == "<system> a <user> hello <assistant> yes b <end> <user> c <assistant>"
    (open_,) = reader().prompts(rows({"conversations": TALK[:-1]}))
    assert open_.ids == prompt.ids


def test_a_sharegpt_conversation_beside_two_answers_is_their_prompt() -> None:
    given = {
        "conversations": TALK[1:4],
        "chosen": shared(("gpt", "b"))[0],
        "rejected": [{"from": "gpt", "value": "no"}],
    }
    (pair,) = reader().pairs(rows(given))
    before = "<user> hello <assistant> yes b <end> <user> c <assistant>"
    assert drawn([pair.chosen, pair.rejected]) == [f"{before} [b] [<end>]", f"{before} [no] [<end>]"]
    (ranking,) = reader().rankings(rows(given))
    assert drawn(ranking.rows) == [f"{before} [b] [<end>]", f"{before} [no] [<end>]"]
    (ranking,) = reader().rankings(rows({"conversations": TALK[1:4], "responses": ["b", "no"], "ranks": [2, 1]}))
    assert (drawn(ranking.rows), ranking.ranks) == ([f"{before} [b] [<end>]", f"{before} [no] [<end>]"], (2, 1))


def test_a_system_column_tools_as_text_and_calls_are_messages() -> None:
    talk = shared(("human", "a"), ("function_call", '{"name": "f", "arguments": {"x": null}}'), ("observation", "b"))
    (one,) = rows({"conversations": talk, "system": "be good", "tools": '[{"name": "f"}]'})
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
    assert one.row == {
        "tools": [{"name": "f"}],
        "messages": [
            *said((S, "be good"), (U, "a")),
            {"role": A, "content": None, "tool_calls": [call]},
            *said(("tool", "b")),
        ],
    }


# --- Alpaca --------------------------------------------------------------------------------------------------------------

ALPACA = {"instruction": "hello a", "input": "b", "output": "yes c"}


def test_an_alpaca_row_is_a_prompt_and_its_answer() -> None:
    (one,) = rows(ALPACA | {"text": "Below is an instruction"})
    assert one.row == {"prompt": "hello a\nb", "completion": "yes c", "text": "Below is an instruction"}
    expected = "<user> hello a b <assistant> [yes] [c] [<end>]"
    assert drawn(reader().demonstrations([one])) == [expected]
    assert rows(ALPACA | {"input": ""})[0].row == {"prompt": "hello a", "completion": "yes c"}
    (prompt,) = reader().prompts([one])
    assert (prompt.text, prompt.row["completion"]) == ("hello a\nb", "yes c")
    assert tiny.tokenizer().decode(prompt.ids) == "<user> hello a b <assistant>"


def test_system_and_history_of_an_alpaca_row_are_messages_before_it() -> None:
    (one,) = rows(ALPACA | {"system": "d", "history": [["e", "f"], ["g", ""]]})
    assert drawn(reader().demonstrations([one])) == [
        "<system> d <user> e <assistant> f <end> <user> g <assistant> <end> <user> hello a b <assistant> [yes] [c] [<end>]"
    ]


def test_an_alpaca_row_with_two_answers_is_a_pair() -> None:
    given = {"instruction": "hello a", "chosen": "yes", "rejected": "no"}
    (pair,) = reader().pairs(rows(given))
    assert drawn([pair.chosen, pair.rejected]) == [
        "<user> hello a <assistant> [yes] [<end>]", "<user> hello a <assistant> [no] [<end>]",
    ]  # fmt: skip
    good, bad = reader().unpaired(
        rows({"instruction": "a", "output": "yes", "label": True}, {"instruction": "b", "output": "no", "label": False})
    )
    assert (drawn([good.row, bad.row]), good.good, bad.good) == (
        ["<user> a <assistant> [yes] [<end>]", "<user> b <assistant> [no] [<end>]"], True, False,
    )  # fmt: skip


# --- implicit prompts ----------------------------------------------------------------------------------------------------

HH = {
    "chosen": "\n\nHuman: hello\n\nAssistant: yes b\n\nHuman: c\n\nAssistant: good",
    "rejected": "\n\nHuman: hello\n\nAssistant: yes b\n\nHuman: c\n\nAssistant:  bad ",
}
BEFORE = "<user> hello <assistant> yes b <end> <user> c <assistant>"


def test_transcripts_are_messages_and_share_their_prompt() -> None:
    (pair,) = reader().pairs(at(HH))
    assert drawn([pair.chosen, pair.rejected]) == [f"{BEFORE} [good] [<end>]", f"{BEFORE} [bad] [<end>]"]
    (ranking,) = reader(closing=True).rankings(at(HH))
    assert (drawn(ranking.rows), ranking.ranks) == ([f"{BEFORE} [good] [<end>]", f"{BEFORE} [bad] [<end>]"], (1, 2))
    (prompt,) = reader().prompts(at(HH))
    assert prompt.messages == tuple(said((U, "hello"), (A, "yes b"), (U, "c")))
    assert tiny.tokenizer().decode(prompt.ids) == BEFORE
    assert prompt.row["chosen"] == said((A, "good"))


def test_answers_that_begin_with_the_same_words_are_kept_whole() -> None:
    given = {"chosen": "\n\nHuman: a\n\nAssistant: yes b c", "rejected": "\n\nHuman: a\n\nAssistant: yes b d"}
    (pair,) = reader().pairs(at(given))
    assert drawn([pair.chosen, pair.rejected]) == [
        "<user> a <assistant> [yes] [b] [c] [<end>]", "<user> a <assistant> [yes] [b] [d] [<end>]",
    ]  # fmt: skip


def test_an_answer_of_a_transcript_may_be_empty_and_a_turn_may_have_paragraphs() -> None:
    given = {
        "chosen": "\n\nHuman: a\n\nb: Human: c\n\nAssistant:",
        "rejected": "\n\nHuman: a\n\nb: Human: c\n\nAssistant: no",
    }
    assert split_pair(at(given)[0]).row == {
        "prompt": said((U, "a\n\nb: Human: c")), "chosen": said((A, "")), "rejected": said((A, "no")),
    }  # fmt: skip


SIDES = {"chosen": said((U, "a"), (A, "yes")), "rejected": said((U, "a"), (A, "no"))}


def test_message_lists_share_their_prompt() -> None:
    expected = ["<user> a <assistant> [yes] [<end>]", "<user> a <assistant> [no] [<end>]"]
    for given in (SIDES, SIDES | {"prompt": "a"}, SIDES | {"prompt": said((U, "a"))}):
        (pair,) = reader().pairs(at(given))
        assert drawn([pair.chosen, pair.rejected]) == expected
    parts = [{"role": U, "content": [{"type": "text", "text": "a"}]}, SIDES["rejected"][1]]
    (pair,) = reader().pairs(at(SIDES | {"rejected": parts}))
    assert drawn([pair.chosen, pair.rejected]) == expected
    (prompt,) = reader().prompts(at(SIDES))
    assert prompt.messages == tuple(said((U, "a")))


def test_after_the_result_of_a_tool_comes_an_answer() -> None:
    before = [*said((U, "a")), {"role": A, "tool_calls": [{"function": {"name": "f"}}]}, *said(("tool", "b"))]
    one = split_pair(at({"chosen": [*before, *said((A, "c"))], "rejected": [*before, *said((A, "d"))]})[0])
    assert one.row == {"prompt": before, "chosen": said((A, "c")), "rejected": said((A, "d"))}


def test_the_prompt_of_messages_is_what_is_before_the_last_answer() -> None:
    one = prompted(at({"messages": said((U, "a"), (A, "b")), "target": 3})[0])
    assert one.row == {"prompt": said((U, "a")), "target": 3, "completion": "b"}
    kept = at({"prompt": "c", "messages": said((U, "a"), (A, "b"))})[0]
    assert prompted(kept) is kept


# --- columns -------------------------------------------------------------------------------------------------------------


def test_columns_are_renamed_and_others_kept() -> None:
    given = {"question": "hello", "answer": "yes", "prompt": "old", "level": 3}
    (one,) = rows(given, prompt="question", completion="answer")
    assert one.row == {"prompt": "hello", "completion": "yes", "level": 3}
    (one,) = rows({"chosen": "a", "rejected": "b", "prompt": "c"}, chosen="rejected", rejected="chosen")
    assert one.row == {"chosen": "b", "rejected": "a", "prompt": "c"}
    (one,) = rows({"dialog": TALK[1:3]}, conversations="dialog")
    assert one.row == {"messages": said((U, "hello"), (A, "yes b"))}


def test_a_row_without_the_renamed_column_lacks_the_field() -> None:
    with pytest.raises(DataError, match=r"^my\.jsonl:2: field 'prompt' is missing \(the row has completion\)$"):
        reader().demonstrations(rows({"q": "a", "completion": "b"}, {"completion": "b"}, prompt="q"))


def test_of_two_forms_the_one_that_is_named_is_meant() -> None:
    both = {"messages": said((U, "c"), (A, "d")), "conversations": TALK[1:3]}
    assert rows(both, messages="messages")[0].row["messages"] == both["messages"]
    assert rows(both, conversations="conversations")[0].row == {"messages": said((U, "hello"), (A, "yes b"))}
    assert rows(ALPACA | {"prompt": "x"}, instruction="instruction")[0].row == {
        "prompt": "hello a\nb",
        "completion": "yes c",
    }
    assert rows({"prompt": "x", "instruction": "y"})[0].row == {
        "prompt": "x",
        "instruction": "y",
    }  # a column of the user's


# --- refusals ------------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("demonstrations", {"conversations": "a"}, "field 'conversations' must be a list of messages, got 'a'"),
    ("demonstrations", {"conversations": []}, "field 'conversations' must be a list of messages, got []"),
    ("demonstrations", {"conversations": ["a"]}, "field 'conversations', message 0: expected {\"from\": ..., \"value\""),
    ("demonstrations", {"conversations": shared(("bot", "a"))}, "field 'conversations', message 0: from 'bot' is none of user, human"),
    ("demonstrations", {"conversations": [{"from": "gpt", "role": "user", "value": "a"}]},
     "field 'conversations', message 0: it has 'from' and 'role'"),
    ("demonstrations", {"conversations": [{"from": "human"}]}, "field 'conversations', message 0: 'value' must be a string, got None"),
    ("demonstrations", {"conversations": [{"from": "human", "value": 3}]},
     "field 'conversations', message 0: 'value' must be a string, got 3"),
    ("demonstrations", {"conversations": shared(("human", "a"), ("human", " "))}, "field 'conversations', message 1: 'value' is empty"),
    ("demonstrations", {"conversations": shared(("human", "a"), ("function_call", "f(x)"))},
     "field 'conversations, message 1' is not valid JSON, got 'f(x)'"),
    ("demonstrations", {"conversations": shared(("human", "a"), ("function_call", "3"))},
     "field 'conversations', message 1: a call must be JSON"),
    ("demonstrations", {"conversations": shared(("gpt", "a"))}, "a conversation needs an assistant message after a user message"),
    ("demonstrations", {"conversations": TALK, "tools": "["}, "field 'tools' is not valid JSON, got '['"),
    ("demonstrations", {"conversations": TALK, "system": 3}, "field 'system' must be a string, got int"),
    ("demonstrations", {"conversations": TALK, "messages": []}, "the row has 'messages' and 'conversations', which are two forms"),
    ("demonstrations", {"conversations": TALK, "prompt": "a"}, "the row has 'prompt' and 'conversations'"),
    ("demonstrations", ALPACA | {"conversations": TALK}, "the row has 'conversations' and 'instruction'"),
    ("demonstrations", ALPACA | {"prompt": "a"}, "the row has 'prompt' and 'instruction'"),
    ("demonstrations", ALPACA | {"instruction": " ", "input": ""}, "field 'instruction' is empty"),
    ("demonstrations", ALPACA | {"instruction": 3}, "field 'instruction' must be a string, got int"),
    ("demonstrations", ALPACA | {"output": ["a"]}, "field 'output' must be a string, got list"),
    ("demonstrations", {"instruction": "a"}, "field 'completion' is missing (the row has prompt)"),
    ("demonstrations", ALPACA | {"history": "a"}, "field 'history' must be a list of pairs"),
    ("demonstrations", ALPACA | {"history": [["a", "b"], ["a"]]}, "field 'history', entry 1: expected [question, answer], got ['a']"),
    ("pairs", {"chosen": "the answer is 3", "rejected": "the answer is 4"},
     "field 'prompt' is missing; without it chosen and rejected must be"),
    ("pairs", HH | {"rejected": "no"}, "field 'rejected' must be a transcript that begins with 'Human:'"),
    ("pairs", HH | {"chosen": said((U, "a"), (A, "b"))}, "field 'chosen' must be a transcript"),
    ("pairs", HH | {"rejected": HH["rejected"].replace("hello", "hallo")},
     "chosen and rejected must share every message but the last; they have 4 and 4 messages, and part at message 0"),
    ("pairs", HH | {"rejected": "\n\nHuman: hello\n\nAssistant: no"},
     "chosen and rejected must share every message but the last; they have 4 and 2 messages"),
    ("pairs", {"chosen": HH["chosen"] + "\n\nHuman: d", "rejected": HH["rejected"] + "\n\nHuman: d"},
     "field 'chosen' must end with an assistant message"),
    ("pairs", {"chosen": "\n\nHuman:\n\nAssistant: a", "rejected": "\n\nHuman:\n\nAssistant: b"},
     "field 'chosen', turn 0: the human says nothing"),
    ("pairs", {"chosen": said((U, "a"), (A, "b"), (A, "c")), "rejected": said((U, "a"), (A, "b"), (A, "d"))},
     "the last message that chosen and rejected share must be the user's, got role 'assistant'"),
    ("pairs", SIDES | {"prompt": "b"}, "chosen and rejected are whole conversations and do not begin with the field 'prompt'"),
    ("prompts", HH | {"rejected": HH["rejected"].replace("hello", "hallo")}, "chosen and rejected must share every message"),
    ("prompts", {"messages": said((A, "a"))}, "field 'messages' has an answer and no prompt before it"),
    ("prompts", {"conversations": shared(("bot", "a"))}, "field 'conversations', message 0: from 'bot'"),
]  # fmt: skip


@pytest.mark.parametrize(("reading", "row", "what"), REFUSED)
def test_a_row_that_is_not_of_its_form_is_refused_with_file_and_line(reading: str, row: dict, what: str) -> None:
    good = SIDES if reading == "pairs" else {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError) as caught:
        getattr(reader(), reading)(rows(good, row))
    assert str(caught.value).startswith(f"my.jsonl:2: {what}")


ROWS = [*test_data.BAD, *REFUSED]


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_the_early_check_of_a_row_says_what_the_reader_says(number: int) -> None:
    reading, row, _ = ROWS[number]
    said = []
    for read in (lambda given: check_fields(reading, given[0]), getattr(reader(), reading)):
        try:
            read(rows(row))
            said.append("")
        except DataError as error:
            said.append(str(error))
    assert said[0] in ("", said[1])
    assert said[1]


def test_the_early_check_of_a_row_refuses_no_row_that_is_read() -> None:
    good: list[tuple[str, dict[str, Any]]] = [
        ("texts", {"text": "a"}), ("demonstrations", {"text": "a"}), ("demonstrations", test_data.ROWS[0]), ("prompts", {"prompt": "a"}),
        ("prompts", HH), ("prompts", SIDES), ("pairs", HH), ("pairs", test_data.PAIRS[0]),
        ("rankings", test_data.PAIRS[0]), ("rankings", test_data.ANSWERS | {"scores": [1, 2, 3]}),
        ("pairs", test_data.ANSWERS | {"ranks": [1, 2, 3]}), ("labeled", {"prompt": "a", "completion": "", "score": "1"}),
        ("steps", {"prompt": "a", "completions": ["b"], "labels": [1]}), ("demonstrations", {"messages": SIDES["chosen"]}),
    ]  # fmt: skip
    for reading, row in good:
        check_fields(reading, at(row)[0])
        getattr(reader(), reading)(at(row))


COLUMNS: list[tuple[dict[str, str], type, str]] = [
    ({"prompts": "question"}, RecipeError, "data.columns: whet reads no column 'prompts'; did you mean 'prompt'?"),
    ({"question": "prompt"}, RecipeError, "data.columns: whet reads no column 'question'; for 'prompt' from the column"),
    ({"zzz": "q"}, RecipeError, "data.columns: whet reads no column 'zzz'; it has prompt, completion, messages"),
    ({"prompt": "qestion"}, DataError, "my.jsonl: data.columns.prompt: no row has a column 'qestion'; did you mean 'question'?"),
    ({"prompt": "zzz"}, DataError, "my.jsonl: data.columns.prompt: no row has a column 'zzz'; there are answer, question"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "kind", "what"), COLUMNS)
def test_unknown_names_and_missing_columns_are_refused_with_the_nearest(columns: dict, kind: type, what: str) -> None:
    with pytest.raises(kind) as caught:
        rows({"question": "a", "answer": "b"}, **columns)
    assert str(caught.value).startswith(what)


# --- files ---------------------------------------------------------------------------------------------------------------

TWO = [{"prompt": "hello", "completion": "yes"}, {"prompt": "a", "completion": "no"}]


def written(path: Path, given: list[dict]) -> Path:
    """The rows in a file of the form that its name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), path)
        return path
    if ".json" in path.suffixes:
        text = json.dumps(given, indent=1)
    elif ".jsonl" in path.suffixes:
        text = "".join(json.dumps(one) + "\n" for one in given)
    else:
        between = "\t" if ".tsv" in path.suffixes else ","
        text = "".join(between.join(one) + "\n" for one in [list(given[0]), *(list(row.values()) for row in given)])
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    return path


FILES = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.tsv.gz"]


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_file_has_the_same_rows(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, TWO)
    assert [one.row for one in read_rows(str(path))] == TWO
    assert [one.row for one in read_rows(str(path), num_rows=1)] == TWO[:1]
    assert drawn(reader().demonstrations(read_rows(str(path)))) == [
        "<user> hello <assistant> [yes] [<end>]", "<user> a <assistant> [no] [<end>]",
    ]  # fmt: skip


def test_a_json_file_may_have_one_object_a_line(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.json", TWO)
    assert [(one.row, one.where) for one in read_rows(str(path))] == [(TWO[0], f"{path}:1"), (TWO[1], f"{path}:2")]


def test_nested_lists_and_structs_of_parquet_are_read(tmp_path: Path) -> None:
    given = [{"conversations": TALK, "system": None}, {"conversations": TALK[1:3], "system": "d"}]
    read = read_rows(str(written(tmp_path / "a.parquet", given)))
    assert [len(one.row["messages"]) for one in read] == [5, 3]
    assert read[1].row["messages"] == said((S, "d"), (U, "hello"), (A, "yes b"))


def test_only_the_first_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{broken\n')
    assert [one.row["prompt"] for one in read_rows(str(path), num_rows=2)] == ["a", "b"]


def test_a_folder_and_a_pattern_are_their_files_in_order(tmp_path: Path) -> None:
    written(tmp_path / "part-2.jsonl", TWO[1:])
    written(tmp_path / "part-1.parquet", TWO[:1])
    (tmp_path / "README.md").write_text("about")
    for source in (str(tmp_path), f"{tmp_path}/part*", f"{tmp_path}/part-?.*"):
        assert [(one.row, Path(one.where.rpartition(":")[0]).name) for one in read_rows(source)] == [
            (TWO[0], "part-1.parquet"), (TWO[1], "part-2.jsonl"),
        ]  # fmt: skip
    with pytest.raises(DataError, match=r"part-3\*: no data file has such a name"):
        read_rows(f"{tmp_path}/part-3*")
    (tmp_path / "part-3.jsonl").write_text('{"prompt": \n')
    with pytest.raises(DataError, match=r"part-3\.jsonl:1: not valid JSON"):
        read_rows(str(tmp_path))


def test_a_folder_with_several_splits_or_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the folder has no data file; expected a \.jsonl"):
        read_rows(str(tmp_path))
    written(tmp_path / "train-0.jsonl", TWO)
    assert len(read_rows(str(tmp_path))) == 2
    written(tmp_path / "held_out.jsonl", TWO)
    with pytest.raises(DataError, match=r"files of several splits \(held_out.jsonl, train-0.jsonl\); name a file"):
        read_rows(str(tmp_path))


def test_a_file_with_a_name_that_is_nearly_there_is_named(tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", TWO)
    with pytest.raises(DataError, match=r"row\.jsonl: no such file; did you mean .*/rows\.jsonl\?$"):
        read_rows(str(tmp_path / "row.jsonl"))
