import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from whet.data import ranks_of, read_rows
from whet.errors import DataError

from .helpers import at, drawn, reader

ROWS = [{"prompt": "hello", "completion": "yes"}, {"prompt": "a b", "completion": "no"}]


def write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, list], Any]] = {
    "rows.jsonl": tiny.write_jsonl, "rows.json": tiny.write_jsonl, "rows.parquet": write_parquet, "rows.csv": write_csv
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    located = read_rows(str(tmp_path / name))
    assert [dict(one.row) for one in located] == ROWS
    first = 2 if name.endswith("csv") else 1  # a CSV's header is its line 1
    assert [one.where for one in located] == [f"{tmp_path / name}:{first}", f"{tmp_path / name}:{first + 1}"]


def test_lists_and_messages_survive_parquet(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "a"}], "responses": ["b", "c"], "scores": [1.0, 2.0]}]
    write_parquet(tmp_path / "rows.parquet", rows)
    assert [dict(one.row) for one in read_rows(str(tmp_path / "rows.parquet"))] == rows


def test_blank_lines_are_skipped_and_the_lines_behind_them_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n   \n{"text": "b"}')
    assert [one.where for one in read_rows(str(path))] == [f"{path}:1", f"{path}:4"]


def test_a_long_field_of_a_csv_is_read(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", [{"text": "a " * 100_000}])
    assert len(read_rows(str(tmp_path / "rows.csv"))[0].row["text"]) == 200_000


def test_a_csv_as_spreadsheets_save_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfprompt,completion\r\nhello,yes\r\n")
    assert [dict(one.row) for one in read_rows(str(tmp_path / "rows.csv"))] == [
        {"prompt": "hello", "completion": "yes"}
    ]


FILES = [
    ("empty.jsonl", b"", ": the file is empty"),
    ("empty.csv", b"prompt,completion\n", ": the file is empty"),
    ("bad.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ":2: not valid UTF-8 at byte 7 of the line"),
    ("bad.jsonl", b'{"a": 1}\n{"a" 2}\n', ":2: not valid JSON (Expecting ':' delimiter at column 6)"),
    ("bad.jsonl", b"[1, 2]\n", ":1: expected a JSON object, got list"),
    ("bad.jsonl", b'{"id": 7}\n{"id": 8}\n{"id": "7"}\n', ":3: id '7' was already used at"),
    ("bad.csv", b"prompt,completion\na,b\nc\n", ":3: the row has another number of fields than the header"),
    ("bad.csv", b"prompt,completion\na,b,c\n", ":2: the row has another number of fields than the header"),
    ("bad.csv", b"prompt,completion\na,\xff\n", ":2: not valid UTF-8 at byte 2 of the line, got b'\\xff'"),
    ("bad.parquet", b"PAR? no", ": not a readable Parquet file"),
    ("bad.txt", b"hello", ": expected a .jsonl, .json, .parquet, .csv or .tsv file, a folder"),
]


@pytest.mark.parametrize(("name", "content", "what"), FILES)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    name: str, content: bytes, what: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / name))
    assert str(caught.value).startswith(f"{tmp_path / name}{what}")


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match=r"^nowhere/rows\.jsonl: no such file$"):
        read_rows("nowhere/rows.jsonl")


def test_rows_without_an_id_and_one_called_none_do_not_clash(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b", "id": "None"}, {"prompt": "c"}])
    assert len(read_rows(str(tmp_path / "rows.jsonl"))) == 3


@pytest.mark.parametrize("name", ["no-such-set", "nobody/no-such-set:test"])
def test_a_dataset_that_cannot_be_loaded_gives_one_clear_message(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nand many lines more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        read_rows(name)
    plain = name.partition(":")[0]
    expected = f"{name}: neither a file nor a dataset that can be loaded (Couldn't reach {plain!r} on the Hub)"
    assert str(caught.value) == expected


def test_a_dataset_is_read_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, split: str) -> list:
        asked.append((name, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [one.where for one in read_rows("owner/set:test[:2]")] == ["owner/set:test[:2]:1", "owner/set:test[:2]:2"]
    assert [dict(one.row) for one in read_rows("owner/set")] == ROWS
    assert asked == [("owner/set", "test[:2]"), ("owner/set", "train")]


def test_texts_train_every_token_and_the_end() -> None:
    assert drawn(reader().texts(at({"text": "a b c"}))) == ["a [b] [c] [<eos>]"]


PIECES = [
    (64, ["a [b] [c] [d] [e] [f] [g] [<eos>]"]),
    (8, ["a [b] [c] [d] [e] [f] [g] [<eos>]"]),
    (7, ["a [b] [c] [d] [e] [f] [g]", "g [<eos>]"]),
    (4, ["a [b] [c] [d]", "d [e] [f] [g]", "g [<eos>]"]),
    (2, ["a [b]", "b [c]", "c [d]", "d [e]", "e [f]", "f [g]", "g [<eos>]"]),
]


@pytest.mark.parametrize(("limit", "expected"), PIECES)
def test_a_long_text_is_cut_into_pieces_that_lose_no_transition(limit: int, expected: list[str]) -> None:
    assert drawn(reader(limit).texts(at({"text": "a b c d e f g"}))) == expected


def test_a_text_that_ends_with_the_end_token_gets_no_second_one() -> None:
    assert drawn(reader().texts(at({"text": "a b <eos>"}))) == ["a [b] [<eos>]"]


def test_texts_without_a_single_transition_are_refused() -> None:
    with pytest.raises(DataError):
        reader().texts(at({"text": "<eos>"}))


DEMONSTRATIONS = [
    ({"prompt": "hello", "completion": "yes no"}, "<user> hello <assistant> [yes] [no] [<end>]"),
    (
        {"prompt": [{"role": "system", "content": "good"}, {"role": "user", "content": "a"}], "completion": "b"},
        "<system> good <user> a <assistant> [b] [<end>]",
    ),
    (
        {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
        "<user> a <assistant> [b] [<end>]",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "prompt": None},
        "<user> a <assistant> [b] [<end>]",
    ),
    ({"text": "a b"}, "a [b] [<eos>]"),
]


@pytest.mark.parametrize(("row", "expected"), DEMONSTRATIONS)
def test_demonstrations_come_in_three_forms(row: dict, expected: str) -> None:
    assert drawn(reader().demonstrations(at(row))) == [expected]


def test_only_the_last_turn_is_trained_where_that_is_asked() -> None:
    talk = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    rows = at({"messages": talk})
    both = "<user> a <assistant> [a] [<end>] <user> a <assistant> [a] [<end>]"
    assert drawn(reader().demonstrations(rows)) == [both]
    last = "<user> a <assistant> a <end> <user> a <assistant> [a] [<end>]"
    assert drawn(reader(turns="last").demonstrations(rows)) == [last]


def test_prompts_keep_their_ids_their_messages_and_their_row() -> None:
    row = {"prompt": "a b", "target": "yes", "id": 12}
    first, second = reader().prompts(at(row, {"prompt": "c"}))
    assert (first.id, first.ids, first.text) == ("12", (3, 7, 8, 4), "a b")
    assert (first.messages, first.row) == (({"role": "user", "content": "a b"},), row)
    assert (second.id, second.ids) == ("1", (3, 9, 4))


TWO_TALKS = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}] for answer in ("yes", "no please")
]
PAIRS = [
    {"prompt": "a", "chosen": "yes", "rejected": "no please"},
    {"prompt": "a", "chosen": TWO_TALKS[0][1:], "rejected": TWO_TALKS[1][1:]},
    {"chosen": TWO_TALKS[0], "rejected": TWO_TALKS[1]},
]
CHOSEN, REJECTED = "<user> a <assistant> [yes] [<end>]", "<user> a <assistant> [no] [please] [<end>]"


@pytest.mark.parametrize("row", PAIRS)
def test_pairs_come_with_a_prompt_or_share_it_in_their_messages(row: dict) -> None:
    (pair,) = reader().pairs(at(row))
    assert drawn([pair.chosen, pair.rejected]) == [CHOSEN, REJECTED]
    assert (pair.probability, pair.margin) == (1.0, 0.0)


def test_pairs_carry_probability_and_margin() -> None:
    (pair,) = reader().pairs(at(PAIRS[0] | {"probability": "0.75", "margin": 2}))
    assert (pair.probability, pair.margin) == (0.75, 2.0)


ANSWERS = {"prompt": "a", "responses": ["yes", "no", "maybe"]}
RANKED = [
    ({"ranks": [2, 1, 3]}, (2, 1, 3)),
    ({"ranks": [1, 5, 5]}, (1, 2, 2)),
    ({"scores": [0.5, 3.0, -1.0]}, (2, 1, 3)),
    ({"scores": [1, 3, 1]}, (2, 1, 2)),
    ({"scores": ["1", "1.0", "1e0"]}, (1, 1, 1)),
    ({"ranks": [3, 2, 1], "scores": [3.0, 2.0, 1.0]}, (3, 2, 1)),
]


@pytest.mark.parametrize(("given", "ranks"), RANKED)
def test_rankings_come_from_ranks_or_scores_and_ties_share_a_rank(given: dict, ranks: tuple[int, ...]) -> None:
    (ranking,) = reader().rankings(at(ANSWERS | given))
    assert ranking.ranks == ranks
    assert drawn(ranking.rows) == [f"<user> a <assistant> [{word}] [<end>]" for word in ("yes", "no", "maybe")]


def test_a_pair_is_a_ranking_of_two() -> None:
    (ranking,) = reader().rankings(at(PAIRS[0]))
    assert (drawn(ranking.rows), ranking.ranks) == ([CHOSEN, REJECTED], (1, 2))


def test_a_ranking_is_all_its_untied_pairs() -> None:
    pairs = reader().pairs(at(ANSWERS | {"ranks": [2, 1, 2]}))
    words = [[one.ids[-2].item() for one in (pair.chosen, pair.rejected)] for pair in pairs]
    assert words == [[16, 15], [16, 17]]  # no > yes, no > maybe


def test_rankings_that_are_all_ties_have_no_pair_and_the_message_says_so() -> None:
    with pytest.raises(DataError) as caught:
        reader().pairs(at(ANSWERS | {"ranks": [1, 1, 1]}))
    assert "tie" in str(caught.value)
    assert "longer" not in str(caught.value)


def test_an_answer_where_the_model_stopped_at_once_can_be_ranked() -> None:
    (ranking,) = reader().rankings(at({"prompt": "a", "responses": ["", "yes"], "ranks": [2, 1]}))
    assert drawn(ranking.rows) == ["<user> a <assistant> [<end>]", CHOSEN]


def test_absolute_scores_are_labels() -> None:
    (one,) = reader().labeled(at({"prompt": "a", "completion": "yes", "score": "-0.5"}))
    assert (drawn([one.row]), one.score) == ([CHOSEN], -0.5)


def test_ranks_of_scores_share_a_rank_where_equal() -> None:
    assert ranks_of([3.0, 1.0, 3.0, 2.0]) == [1, 4, 1, 3]


LONG = at({"prompt": "a b", "completion": "yes no maybe"}, {"prompt": "a", "completion": "b"})
SHORT = "<user> a <assistant> [b] [<end>]"
TOO_LONG = [
    ("drop", 7, [SHORT]),
    ("cut", 7, ["<user> a b <assistant> [yes] [no] [maybe]", SHORT]),
    ("cut", 5, ["<user> a b <assistant> [yes]", SHORT]),
    ("error", 8, ["<user> a b <assistant> [yes] [no] [maybe] [<end>]", SHORT]),
]


@pytest.mark.parametrize(("rule", "limit", "expected"), TOO_LONG)
def test_long_rows_are_dropped_or_cut_where_that_is_asked(rule: str, limit: int, expected: list[str]) -> None:
    assert drawn(reader(limit, too_long=rule).demonstrations(LONG)) == expected


def test_a_pair_whose_one_side_is_too_long_is_dropped_whole() -> None:
    rows = at({"prompt": "a", "chosen": "b c d", "rejected": "e"}, {"prompt": "a", "chosen": "f", "rejected": "g"})
    assert len(reader(5, too_long="drop").pairs(rows)) == 1


NO_ROOM = [
    (
        "error",
        7,
        r"^my\.jsonl:1: the conversation has 8 tokens, the limit is 7; .*--data\.max-tokens.*--data\.too-long drop$",
    ),
    ("drop", 4, r"^no row is left: all are longer than 4 tokens; raise --data\.max-tokens$"),
    ("cut", 3, r"^no row is left"),
]


@pytest.mark.parametrize(("rule", "limit", "what"), NO_ROOM)
def test_a_row_over_the_limit_says_how_long_it_is_and_what_to_do(rule: str, limit: int, what: str) -> None:
    with pytest.raises(DataError, match=what):
        reader(limit, too_long=rule).demonstrations(LONG)


def test_a_prompt_must_leave_room_for_an_answer() -> None:
    rows = at({"prompt": "a b c"}, {"prompt": "a"})
    with pytest.raises(DataError, match=r"^my\.jsonl:1: the prompt has 5 tokens, the limit is 4"):
        reader(4).prompts(rows)
    assert [prompt.text for prompt in reader(4, too_long="drop").prompts(rows)] == ["a"]


MESSAGE = {"role": "user", "content": "a"}
BAD = [
    ("texts", {"prompt": "a"}, "field 'text' is missing (the row has prompt)"),
    ("texts", {"text": 3}, "field 'text' must be a string, got int"),
    ("texts", {"text": " \n"}, "field 'text' is empty"),
    ("prompts", {}, "field 'prompt' is missing (the row has nothing)"),
    ("prompts", {"prompt": ""}, "field 'prompt' is empty"),
    ("prompts", {"prompt": 3}, "field 'prompt' must be a string or a list of messages, got 3"),
    ("prompts", {"prompt": []}, "field 'prompt' must be a string or a list of messages, got []"),
    ("prompts", {"prompt": [MESSAGE, "b"]}, "field 'prompt', message 1: expected"),
    ("prompts", {"prompt": [{"role": "bot", "content": "a"}]}, "field 'prompt', message 0: role 'bot' is none of"),
    ("prompts", {"prompt": [{"role": ["user"], "content": "a"}]}, "field 'prompt', message 0: role ['user'] is none of"),
    ("prompts", {"prompt": [{"role": "user", "content": " "}]}, "field 'prompt', message 0: the content is empty"),
    ("demonstrations", {"prompt": "a"}, "field 'completion' is missing (the row has prompt)"),
    ("demonstrations", {"prompt": "a", "completion": None}, "field 'completion' is missing (the row has prompt)"),
    ("demonstrations", {"prompt": "a", "completion": 1}, "field 'completion' must be a string, got int"),
    ("demonstrations", {"prompt": "a", "completion": [MESSAGE]}, "field 'completion' must be one assistant message"),
    ("demonstrations", {"messages": [MESSAGE]}, "a conversation needs an assistant message"),
    ("pairs", {"prompt": "a", "chosen": "b"}, "field 'rejected' is missing (the row has chosen, prompt)"),
    ("pairs", {"chosen": "b", "rejected": "c"}, "field 'prompt' is missing; without it"),
    ("pairs", {"chosen": TWO_TALKS[0], "rejected": [MESSAGE | {"content": "b"}, *TWO_TALKS[1][1:]]}, "chosen and rejected must share"),
    ("pairs", {"chosen": [MESSAGE] * 2, "rejected": [MESSAGE] * 2}, "field 'chosen' must end with an assistant message"),
    ("pairs", PAIRS[0] | {"probability": 1.5}, "field 'probability' must be in [0, 1], got 1.5"),
    ("pairs", PAIRS[0] | {"margin": "wide"}, "field 'margin' must be a finite number, got 'wide'"),
    ("rankings", ANSWERS, "field 'scores' is missing (the row has prompt, responses)"),
    ("rankings", ANSWERS | {"ranks": [1, 2]}, "field 'ranks' must have one number per answer: 3 answers, got 2"),
    ("rankings", ANSWERS | {"scores": [1, 2, float("nan")]}, "field 'scores' must be a finite number, got nan"),
    ("rankings", ANSWERS | {"ranks": "123"}, "field 'ranks' must have one number per answer: 3 answers, got '123'"),
    ("rankings", {"prompt": "a", "responses": ["b"], "ranks": [1]}, "field 'responses' must be a list of at least two"),
    ("rankings", {"prompt": "a", "responses": ["b", None], "ranks": [1, 2]}, "field 'responses', answer 1: expected a string"),
    ("labeled", {"prompt": "a", "completion": "b"}, "field 'score' is missing (the row has completion, prompt)"),
    ("labeled", {"prompt": "a", "completion": "b", "score": True}, "field 'score' must be a finite number, got True"),
]  # fmt: skip


@pytest.mark.parametrize(("reading", "row", "what"), BAD)
def test_a_bad_row_is_named_with_file_line_and_field(reading: str, row: dict, what: str) -> None:
    good = {"texts": {"text": "a b"}, "prompts": {"prompt": "a"}, "demonstrations": ROWS[0], "pairs": PAIRS[0],
        "rankings": ANSWERS | {"ranks": [1, 2, 3]}, "labeled": {"prompt": "a", "completion": "b", "score": 1}}  # fmt: skip
    with pytest.raises(DataError) as caught:
        getattr(reader(), reading)(at(good[reading], row))
    assert str(caught.value).startswith(f"my.jsonl:2: {what}")


def test_a_row_of_another_kind_is_not_mistaken_for_one() -> None:
    with pytest.raises(DataError, match=r"^my\.jsonl:1: field 'prompt' is missing \(the row has completion\)$"):
        reader().demonstrations(at({"completion": "a"}))
