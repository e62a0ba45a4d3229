"""Rows with labels: single answers that are good or bad, and answers whose steps are right or wrong."""

import pytest
import torch

from whet.data import Reader, Unpaired, chat_format
from whet.errors import DataError

from .helpers import at, drawn, lines_tokenizer, picture, reader

GOOD = {"prompt": "a", "completion": "yes", "label": True}
OTHER = {"prompt": "b", "completion": "no", "label": False}


def words(one: Unpaired) -> tuple[str, str, bool]:
    row, wrong = drawn([one.row, one.mismatched])
    return row, wrong, one.good


# --- single answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "good"),
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("true", True), ("False", False)],
)
def test_a_label_is_true_or_false_in_the_forms_that_files_have(label: object, good: bool) -> None:
    first, second = reader().unpaired(at(GOOD | {"label": label}, OTHER))
    assert type(first.good) is bool
    assert (first.good, second.good) == (good, False)


@pytest.mark.parametrize("label", [2, -1, 0.5, "yes", "1", "", [True], {"good": True}])
def test_any_other_label_is_refused_with_its_line(label: object) -> None:
    with pytest.raises(DataError) as caught:
        reader().unpaired(at(GOOD, OTHER | {"label": label}))
    assert str(caught.value) == f"my.jsonl:2: field 'label' must be true or false, got {label!r}"


def test_an_answer_stands_behind_its_own_prompt_and_beside_the_answer_of_another() -> None:
    first, second = reader().unpaired(at(GOOD, OTHER))
    assert words(first) == ("<user> a <assistant> [yes] [<end>]", "<user> a <assistant> [no] [<end>]", True)
    assert words(second) == ("<user> b <assistant> [no] [<end>]", "<user> b <assistant> [yes] [<end>]", False)


MISMATCHED = [  # prompts, and whose answer stands beside each
    ("ab", [1, 0]),
    ("abc", [2, 0, 1]),
    ("abba", [2, 0, 0, 2]),  # the first takes the last rows', here the last but one's: the last has its own prompt
    ("aabb", [3, 3, 1, 1]),
    ("aaab", [3, 3, 3, 2]),
]


@pytest.mark.parametrize(("prompts", "expected"), MISMATCHED)
def test_the_mismatched_answer_is_that_of_the_nearest_earlier_row_with_another_prompt(
    prompts: str, expected: list[int]
) -> None:
    answers = ["one", "two", "three", "four"][: len(prompts)]
    rows = [{"prompt": p, "completion": a, "label": True} for p, a in zip(prompts, answers, strict=True)]
    got = reader().unpaired(at(*rows))
    assert [drawn([one.mismatched]) for one in got] == [
        [f"<user> {p} <assistant> [{answers[other]}] [<end>]"] for p, other in zip(prompts, expected, strict=True)
    ]


def test_a_prompt_as_text_and_as_one_message_is_the_same_prompt() -> None:
    rows = at(GOOD, GOOD | {"prompt": [{"role": "user", "content": "a"}]})
    with pytest.raises(DataError, match=r"^my\.jsonl:1: every row has the same prompt; answers of other prompts"):
        reader().unpaired(rows)


@pytest.mark.parametrize("rows", [[GOOD], [GOOD, GOOD, GOOD], [{"prompt": "a", "chosen": "yes", "rejected": "no"}]])
def test_rows_that_all_have_one_prompt_are_refused(rows: list[dict]) -> None:
    with pytest.raises(DataError, match=r"^my\.jsonl:1: every row has the same prompt"):
        reader().unpaired(at(*rows))


def test_a_pair_is_one_good_and_one_bad_answer_with_mismatched_ones_of_another_row() -> None:
    rows = at({"prompt": "a", "chosen": "yes", "rejected": "no"}, {"prompt": "b", "chosen": "one", "rejected": "two"})
    got = [words(one) for one in reader().unpaired(rows)]
    assert got == [
        ("<user> a <assistant> [yes] [<end>]", "<user> a <assistant> [two] [<end>]", True),
        ("<user> a <assistant> [no] [<end>]", "<user> a <assistant> [two] [<end>]", False),
        ("<user> b <assistant> [one] [<end>]", "<user> b <assistant> [no] [<end>]", True),
        ("<user> b <assistant> [two] [<end>]", "<user> b <assistant> [no] [<end>]", False),
    ]


def test_pairs_and_labeled_answers_may_stand_in_one_file() -> None:
    got = reader().unpaired(at({"prompt": "a", "chosen": "yes", "rejected": "no"}, OTHER))
    assert [one.good for one in got] == [True, False, False]


def test_an_answer_that_is_too_long_behind_either_prompt_is_dropped_with_its_element() -> None:
    rows = at(GOOD, OTHER | {"completion": "no no no"}, {"prompt": "c", "completion": "four", "label": True})
    got = reader(6, too_long="drop").unpaired(rows)
    assert [words(one)[0] for one in got] == [
        "<user> a <assistant> [yes] [<end>]"
    ]  # c's mismatched one is the long one


# --- answers in steps ------------------------------------------------------------------------------------------------

STEPS = {"prompt": "hello", "completions": ["a b", "c", "d e"], "labels": [1, 0.25, False]}


def stepper(separator: str = "\n", limit: int = 64, **options: str) -> Reader:
    return Reader(chat_format(lines_tokenizer(), "plain"), limit, separator=separator, **options)


def test_a_step_ends_with_its_separator_and_the_last_one_with_the_answer() -> None:
    (one,) = stepper().steps(at(STEPS))
    expected = "### Human: ⏎ hello ⏎ ### Assistant: ⏎ [a] [b] [⏎] [c] [⏎] [d] [e] [<eos>]"
    assert picture(one.row, lines_tokenizer()) == expected  # the prompt's own newlines end no step
    assert one.ends.int().tolist() == [0, 0, 1, 0, 1, 0, 0, 1]
    assert one.labels.tolist() == [0, 0, 1.0, 0, 0.25, 0, 0, 0.0]


@pytest.mark.parametrize(
    ("separator", "steps", "ends"),
    [
        ("\n", ["a b c"], [0, 0, 0, 1]),
        ("please", ["a ", " b c"], [0, 1, 0, 0, 1]),
        ("ple", ["a ", "ase b"], [0, 1, 0, 1]),
    ],
)
def test_any_token_with_the_separator_in_its_text_ends_a_step(separator: str, steps: list, ends: list) -> None:
    row = STEPS | {"completions": steps, "labels": [1] * len(steps)}
    (one,) = stepper(separator).steps(at(row))
    assert one.ends.int().tolist() == ends
    assert one.labels.tolist() == ends


def test_labels_are_numbers_or_true_and_false() -> None:
    (one,) = stepper().steps(at(STEPS | {"labels": [True, "0.5", 0]}))
    assert one.labels[one.ends].tolist() == [1.0, 0.5, 0.0]


BAD = [
    ({"completions": None}, "field 'completions' is missing (the row has labels, prompt)"),
    ({"completions": "a b"}, "field 'completions' must be a list of steps, got 'a b'"),
    ({"completions": []}, "field 'completions' must be a list of steps, got []"),
    ({"completions": ["a", "", "b"]}, "field 'completions' must be a list of steps, got ['a', '', 'b']"),
    ({"completions": ["a", 3, "b"]}, "field 'completions' must be a list of steps, got ['a', 3, 'b']"),
    (
        {"completions": ["a", "b\nc", "d"]},
        "field 'completions', step 1 has the separator '\\n' in it; name another with --data.separator",
    ),
    ({"labels": None}, "field 'labels' is missing (the row has completions, prompt)"),
    ({"labels": [1, 0]}, "field 'labels' must have one number per answer: 3 answers, got 2"),
    ({"labels": [1, 0, "good"]}, "field 'labels' must be a finite number, got 'good'"),
    ({"labels": [1, 0, None]}, "field 'labels' must be a finite number, got None"),
    ({"labels": [1, 0, 1.5]}, "field 'labels' must be in [0, 1], got [1.0, 0.0, 1.5]"),
    ({"labels": [-0.5, 0, 1]}, "field 'labels' must be in [0, 1], got [-0.5, 0.0, 1.0]"),
    ({"labels": True}, "field 'labels' must have one number per answer: 3 answers, got True"),
]


@pytest.mark.parametrize(("given", "what"), BAD)
def test_a_bad_row_of_steps_is_named_with_file_line_and_field(given: dict, what: str) -> None:
    row = {key: value for key, value in (STEPS | given).items() if value is not None}
    with pytest.raises(DataError) as caught:
        stepper().steps(at(STEPS, row))
    assert str(caught.value).startswith(f"my.jsonl:2: {what}")


def test_a_tokenizer_that_swallows_the_separator_is_refused() -> None:
    """tiny's tokenizer cuts at white space, so no token is left of a newline."""
    with pytest.raises(DataError) as caught:
        reader().steps(at(STEPS))
    assert str(caught.value) == (
        "my.jsonl:1: 3 steps, but 1 tokens end one; the tokenizer does not keep the separator '\\n' "
        "apart, name another with --data.separator"
    )


def test_steps_without_the_room_for_all_of_them_are_dropped_or_refused_but_not_blamed_on_the_tokenizer() -> None:
    assert (
        len(stepper(limit=13, too_long="drop").steps(at(STEPS, STEPS | {"completions": ["a", "b"], "labels": [1, 0]})))
        == 1
    )
    with pytest.raises(DataError, match=r"^my\.jsonl:1: the prompt with its answer has 16 tokens, the limit is 13"):
        stepper(limit=13).steps(at(STEPS))


@pytest.mark.parametrize("limit", [11, 12, 13, 14, 15])
def test_an_answer_that_is_cut_keeps_the_labels_of_the_steps_that_are_whole(limit: int) -> None:
    whole = stepper().steps(at(STEPS))[0]
    (one,) = stepper(limit=limit, too_long="cut").steps(at(STEPS))
    kept = limit - whole.row.start
    assert one.row.ids.tolist() == whole.row.ids[:limit].tolist()
    assert torch.equal(one.ends, whole.ends[:kept])
    assert torch.equal(one.labels, whole.labels[:kept])


@pytest.mark.parametrize("limit", [9, 10])
def test_an_answer_that_is_cut_before_its_first_step_ends_is_left_out(limit: int) -> None:
    with pytest.raises(DataError, match="no row is left"):
        stepper(limit=limit, too_long="cut").steps(at(STEPS))
