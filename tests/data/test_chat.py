from typing import Any

import pytest
import tiny

from whet.data import Batch, chat_format, pad_ids
from whet.errors import DataError, ModelError

from .helpers import lines_tokenizer, picture

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ 'Human:' if m['role'] == 'user' else 'Assistant:' }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
FORGETFUL = (  # like templates that drop the reasoning of earlier turns: only the last answer is written whole
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split()[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORMATS = {
    "tiny": (tiny.tokenizer, None),
    "chatml": (lambda: lines_tokenizer(CHATML), None),
    "llama3": (lambda: lines_tokenizer(LLAMA3), None),
    "plain": (lines_tokenizer, "plain"),
    "no end": (lambda: lines_tokenizer(NO_END), None),
    "none": (lines_tokenizer, "none"),
}
END = {"tiny": "<end>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    out = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *out] if system else out


def chat_of(name: str) -> Any:
    make, template = FORMATS[name]
    return chat_format(make(), template)


ONE, TWO = talk("hello", "yes please"), talk("hello", "yes", "a b", "no")

PICTURES = [
    ("tiny", ONE, "all", "<user> hello <assistant> [yes] [please] [<end>]"),
    ("tiny", TWO, "all", "<user> hello <assistant> [yes] [<end>] <user> a b <assistant> [no] [<end>]"),
    ("tiny", TWO, "last", "<user> hello <assistant> yes <end> <user> a b <assistant> [no] [<end>]"),
    ("tiny", talk("a", "b", "c"), "all", "<user> a <assistant> [b] [<end>]"),
    ("tiny", talk("a", "b", system="good"), "all", "<system> good <user> a <assistant> [b] [<end>]"),
    (
        "chatml", ONE, "all",
        "<|im_start|> user ⏎ hello <|im_end|> ⏎ <|im_start|> assistant ⏎ [yes] [please] [<|im_end|>]",
    ),
    (
        "chatml", TWO, "all",
        "<|im_start|> user ⏎ hello <|im_end|> ⏎ <|im_start|> assistant ⏎ [yes] [<|im_end|>] ⏎ "
        "<|im_start|> user ⏎ a b <|im_end|> ⏎ <|im_start|> assistant ⏎ [no] [<|im_end|>]",
    ),
    (
        "llama3", TWO, "all",
        "<|begin_of_text|> <|start_header_id|> user <|end_header_id|> ⏎ ⏎ hello <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ⏎ ⏎ [yes] [<|eot_id|>] "
        "<|start_header_id|> user <|end_header_id|> ⏎ ⏎ a b <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ⏎ ⏎ [no] [<|eot_id|>]",
    ),
    ("plain", ONE, "all", "### Human: ⏎ hello ⏎ ### Assistant: ⏎ [yes] [please] [<eos>]"),
    (
        "plain", TWO, "all",
        "### Human: ⏎ hello ⏎ ### Assistant: ⏎ [yes] [<eos>] ⏎ ### Human: ⏎ a b ⏎ ### Assistant: ⏎ [no] [<eos>]",
    ),
    ("plain", talk("a", "b", system="good"), "all", "good ⏎ ### Human: ⏎ a ⏎ ### Assistant: ⏎ [b] [<eos>]"),
    ("no end", ONE, "all", "Human: hello Assistant: [yes] [please] [<eos>]"),
    ("none", ONE, "all", "hello [yes] [please] [<eos>]"),
    ("none", talk("hello", ""), "all", "hello [<eos>]"),
    ("tiny", talk("hello", ""), "all", "<user> hello <assistant> [<end>]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "messages", "turns", "expected"), PICTURES)
def test_the_answers_and_their_end_tokens_are_trained_and_nothing_else(
    name: str, messages: list, turns: str, expected: str
) -> None:
    chat = chat_of(name)
    (row,) = chat.rows(messages, turns=turns)
    assert picture(row, chat.tokenizer) == expected


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        (name, one)
        for name in FORMATS
        for one in (ONE, TWO, talk("a", "b", system="good"))
        if (name, one) != ("none", TWO)
    ],
)
def test_the_prompts_ids_are_those_the_row_begins_with(name: str, messages: list) -> None:
    chat = chat_of(name)
    prompt, row = chat.prompt_ids(messages[:-1]), chat.row(messages)
    assert row.ids[: row.start].tolist() == prompt
    answer = row.ids[row.start :].tolist()
    assert answer == chat.answer_ids(messages[:-1], messages[-1]["content"])
    assert chat.text(answer) == messages[-1]["content"]


def test_a_token_across_the_border_of_prompt_and_answer_belongs_to_the_answer() -> None:
    """The ids are those of the rendered text; two texts tokenized apart would give others."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({"a": 0, "\n": 1, "y": 2, "\ny": 3, "<eos>": 4}, [("\n", "y")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    assert tokenizer("a\ny")["input_ids"] == [0, 3]
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}\n{{ messages[1]['content'] if messages[1] }}{{ '<eos>' if messages[1] }}"
    )
    row = chat_format(tokenizer).row(talk("a", "y"))
    assert (row.ids.tolist(), row.start) == ([0, 3, 4], 1)


@pytest.mark.parametrize(("name", "ends"), [("tiny", ["<end>", "<eos>"]), ("chatml", ["<|im_end|>", "<eos>"]),
    ("llama3", ["<|eot_id|>", "<eos>"]), ("plain", ["<eos>"]), ("no end", ["<eos>"]), ("none", ["<eos>"])])  # fmt: skip
def test_an_answer_ends_with_the_templates_own_end_token_or_eos(name: str, ends: list[str]) -> None:
    chat = chat_of(name)
    assert chat.tokenizer.convert_ids_to_tokens(list(chat.end_ids)) == ends
    assert chat.tokenizer.convert_ids_to_tokens(chat.answer_ids(ONE[:1], "yes no")) == ["yes", "no", ends[0]]


def test_where_a_template_rewrites_earlier_turns_each_turn_is_a_row_of_its_own() -> None:
    """The context of a turn is what the model saw when it wrote this turn."""
    chat = chat_format(lines_tokenizer(FORGETFUL))
    messages = talk("hello", "maybe yes", "a", "two no")
    last = (
        "<|im_start|> user ⏎ hello <|im_end|> <|im_start|> assistant ⏎ yes <|im_end|> "
        "<|im_start|> user ⏎ a <|im_end|> <|im_start|> assistant ⏎ [two] [no] [<|im_end|>]"
    )
    first = "<|im_start|> user ⏎ hello <|im_end|> <|im_start|> assistant ⏎ [maybe] [yes] [<|im_end|>]"
    assert [picture(row, chat.tokenizer) for row in chat.rows(messages)] == [first, last]
    assert [picture(row, chat.tokenizer) for row in chat.rows(messages, turns="last")] == [last]


@pytest.mark.parametrize("template", ["none", "plain"])
def test_where_pad_is_eos_the_end_of_the_answer_is_trained_and_the_padding_is_not(template: str) -> None:
    tokenizer = lines_tokenizer()
    tokenizer.pad_token = "<eos>"
    chat = chat_format(tokenizer, template)
    short, long = chat.row(talk("a", "yes")), chat.row(talk("a", "yes no maybe"))
    assert picture(short, tokenizer).endswith("[yes] [<eos>]")
    batch = Batch.of([short, long])
    assert batch["mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert pad_ids(batch.rows)[0, short.length - 1 :].tolist() == [1, 1, 1]


def test_a_template_may_come_from_a_file_or_be_given_as_text(tmp_path: Any) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML)
    from_file = chat_format(lines_tokenizer(), str(tmp_path / "chat.jinja"))
    assert from_file.row(ONE).ids.tolist() == chat_format(lines_tokenizer(), CHATML).row(ONE).ids.tolist()


REFUSALS = [
    ("tiny", talk("hello"), "needs an assistant message"),
    ("tiny", [{"role": "assistant", "content": "yes"}], "needs an assistant message after a user message"),
    ("none", TWO, "several assistant turns need a chat template"),
]


@pytest.mark.parametrize(("name", "messages", "what"), REFUSALS)
def test_a_conversation_that_cannot_be_trained_on_is_refused(name: str, messages: list, what: str) -> None:
    with pytest.raises(DataError, match=what):
        chat_of(name).rows(messages)


def test_what_a_template_refuses_is_told_in_its_own_words() -> None:
    picky = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match="refuses these messages: no system role here"):
        chat_format(lines_tokenizer(picky)).row(talk("a", "b", system="good"))


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", "{% for m in messages %}"])
def test_a_template_that_cannot_write_an_answer_is_refused(template: str) -> None:
    with pytest.raises((ModelError, DataError), match="template"):
        chat_format(lines_tokenizer(), template)


def test_a_tokenizer_without_a_template_is_refused_and_the_message_names_plain() -> None:
    with pytest.raises(ModelError, match=r"no chat template.*--chat-template plain.*none"):
        chat_format(lines_tokenizer(None))


def test_a_template_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match=r"chat template 'planar'.*plain"):
        chat_format(lines_tokenizer(), "planar")


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        chat_format(tokenizer)


@pytest.mark.parametrize("answer", ["yes <end> no", "yes <eos> no"])
def test_an_end_token_inside_an_answer_is_refused(answer: str) -> None:
    """What follows it could never be sampled, and would be lost without a word."""
    for method in ("row", "rows"):
        with pytest.raises(DataError, match=r"has the end token '<e..>' before its end"):
            getattr(chat_of("tiny"), method)(talk("a", answer))
