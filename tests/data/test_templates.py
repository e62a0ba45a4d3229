"""Templates that open thoughts, call tools, or leave things out; answers with ids, cut answers, and tables of labels."""

from typing import Any

import pytest
import torch

from whet.data import Chat, Located, Reader, chat_format
from whet.errors import DataError, ModelError

from .helpers import lines_tokenizer, picture

SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool>", "</tool>"]
R1 = (  # like DeepSeek-R1: thoughts of answers are dropped, and the generation prompt opens one
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}"
    "{% set content = m.content %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "<|im_end|>{{ content }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)
QWEN3 = (  # thoughts of earlier turns are dropped, the last turn has at least an empty one
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content if m.reasoning_content is defined else "
    "(m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '') %}"
    "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ content }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ tools[0]['function']['name'] }} {% endif %}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool>{{ call.function.name }}</tool>{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def chat_of(template: str) -> Chat:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {one: number for number, one in enumerate(["<pad>", "<eos>", *SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", additional_special_tokens=SPECIAL
    )
    tokenizer.chat_template = template
    return chat_format(tokenizer)


def parts(chat: Chat, row: Any) -> tuple[str, str]:
    """The text that is not trained and the text that is."""
    decode = chat.tokenizer.decode
    return decode(row.ids[: row.start]), decode(row.ids[row.start :][row.mask])


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def at(row: dict) -> list[Located]:
    return [Located(row, "my.jsonl:1")]


@pytest.mark.parametrize("answer", ["<think>\nwell\n</think>\n\n4", "well\n</think>\n\n4"])
def test_an_answer_goes_on_from_the_thought_that_the_generation_prompt_opens(answer: str) -> None:
    chat = chat_of(R1)
    row = chat.row([user("2+2"), assistant(answer)])
    assert parts(chat, row) == ("<|im_start|>2+2<|im_end|><think>\n", "well\n</think>\n\n4<eos>")
    assert row.ids[: row.start].tolist() == chat.prompt_ids([user("2+2")])
    assert chat.text(row.ids[row.start :].tolist()) == "well\n</think>\n\n4"


def test_an_answer_without_the_opened_thought_is_refused_with_advice_that_works() -> None:
    chat = chat_of(R1)
    with pytest.raises(DataError, match=r"opens each answer with '<think>\\n'.*ends it with '</think>'"):
        chat.row([user("2+2"), assistant("4")])
    row = chat.row([user("2+2"), assistant("<think>\n</think>4")])  # what the message says
    assert parts(chat, row)[1] == "</think>4<eos>"


def test_where_thoughts_of_earlier_turns_are_dropped_each_turn_has_the_context_of_its_time() -> None:
    chat = chat_of(R1)
    talk = [user("a"), assistant("x</think>b"), user("c"), assistant("y</think>d")]
    assert [parts(chat, row) for row in chat.rows(talk)] == [
        ("<|im_start|>a<|im_end|><think>\n", "x</think>b<eos>"),
        ("<|im_start|>a<|im_end|>b<eos><|im_start|>c<|im_end|><think>\n", "y</think>d<eos>"),
    ]
    chat = chat_of(QWEN3)
    talk = [user("a"), assistant("<think>\nx\n</think>\n\nb"), user("c"), assistant("d")]
    first, second = (parts(chat, row) for row in chat.rows(talk))
    assert first[1] == "<think>\nx\n</think>\n\nb<|im_end|>"
    assert "x" not in second[0]
    assert second[1] == "<think>\n\n</think>\n\nd<|im_end|>"


def test_a_thought_may_have_a_field_of_its_own() -> None:
    chat = chat_of(QWEN3)
    row = Reader(chat, 200).demonstrations(at({"prompt": "a", "completion": [assistant("b", reasoning_content="x")]}))[
        0
    ]
    assert parts(chat, row)[1] == "<think>\nx\n</think>\n\nb<|im_end|>"
    with pytest.raises(DataError, match=r"my.jsonl:1: .*does not write the field 'reasoning_content'"):
        Reader(chat_of(R1), 200).demonstrations(
            at({"messages": [user("a"), assistant("b</think>c", reasoning_content="x")]})
        )
    with pytest.raises(DataError, match=r"does not write the field 'reasoning_content'"):
        Reader(chat_of(TOOLS), 200).demonstrations(
            at({"prompt": "a", "completion": [assistant("b", reasoning_content="x")]})
        )


def test_arguments_and_tools_reach_the_template_or_are_refused() -> None:
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    chat = chat_of(QWEN3)
    reader = Reader(chat, 200)
    (prompt,) = reader.prompts(at({"prompt": "a", **kwargs}))
    assert chat.tokenizer.decode(prompt.ids).endswith("assistant\n<think>\n\n</think>\n\n")
    row = reader.demonstrations(at({"prompt": "a", "completion": "b", **kwargs}))[0]
    assert parts(chat, row) == (chat.tokenizer.decode(prompt.ids), "b<|im_end|>")
    tools = {"tools": [{"type": "function", "function": {"name": "look"}}]}
    with pytest.raises(DataError, match=r"my.jsonl:1: the chat template does not use 'tools'"):
        reader.prompts(at({"prompt": "a", **tools}))
    with pytest.raises(DataError, match="does not use 'effort'"):
        reader.prompts(at({"prompt": "a", "chat_template_kwargs": {"effort": "high"}}))
    chat = chat_of(TOOLS)
    call = assistant("", tool_calls=[{"type": "function", "function": {"name": "look", "arguments": {}}}])
    del call["content"]
    talk = [user("a"), call, {"role": "tool", "content": "seen"}, assistant([{"type": "text", "text": "b"}])]
    row = Reader(chat, 200).demonstrations(at({"messages": talk, **tools}))[0]
    assert chat.tokenizer.decode(row.ids) == (
        "look <|im_start|>user a<|im_end|><|im_start|>assistant <tool>look</tool><|im_end|>"
        "<|im_start|>tool seen<|im_end|><|im_start|>assistant b<|im_end|>"
    )
    assert chat.tokenizer.decode(row.ids[row.start :][row.mask]) == "<tool>look</tool><|im_end|>b<|im_end|>"
    (pair,) = Reader(chat, 200).pairs(at({"prompt": "a", "chosen": "b", "rejected": "c", **tools}))
    (label,) = Reader(chat, 200).labeled(at({"prompt": "a", "completion": "b", "score": 1, **tools}))
    for row in (pair.chosen, pair.rejected, label.row):
        assert chat.tokenizer.decode(row.ids).startswith("look ")


def test_arguments_for_all_rows_reach_the_template_and_those_of_a_row_come_on_top() -> None:
    tokenizer = chat_of(QWEN3).tokenizer
    chat = chat_format(tokenizer, arguments={"enable_thinking": False})
    assert tokenizer.decode(chat.prompt_ids([user("a")])).endswith("assistant\n<think>\n\n</think>\n\n")
    extras = {"chat_template_kwargs": {"enable_thinking": True}}
    assert tokenizer.decode(chat.prompt_ids([user("a")], extras)).endswith("assistant\n")
    with pytest.raises(ModelError, match=r"chat_template_kwargs: the chat template .* does not use 'effort'"):
        chat_format(tokenizer, arguments={"effort": 1})


@pytest.mark.parametrize(
    ("template", "talk", "what"),
    [
        (NO_SYSTEM, [{"role": "system", "content": "be good"}, user("a")], "'content' of message 0 \\(system\\)"),
        (NO_SYSTEM, [user("a"), assistant("", tool_calls=[{"function": {"name": "f"}}]), user("b")], "'tool_calls'"),
        (TOOLS, [user("a"), {"role": "user", "content": [{"type": "image", "url": "x"}]}], "must be of type text"),
    ],
)
def test_what_a_template_would_drop_is_refused(template: str, talk: list, what: str) -> None:
    with pytest.raises(DataError, match=rf"my.jsonl:1: .*{what}"):
        Reader(chat_of(template), 200).prompts(at({"prompt": talk}))


def sampled(chat: Chat, text: str, *, ended: bool = True) -> list[int]:
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, chat.end_ids[0]] if ended else ids


def test_sampled_ids_are_taken_as_they_are_in_every_form_of_row() -> None:
    """Ids that no text would give: "ab" as two tokens where the tokenizer knows one."""
    chat = chat_format(lines_tokenizer(QWEN3.replace("\n", " ")))
    odd = [chat.tokenizer.convert_tokens_to_ids(one) for one in ("a", "<|im_start|>", "b", "<|im_end|>")]
    text = chat.text(odd)
    prompt = chat.prompt_ids([user("hello")])
    given = {"prompt": "hello", "prompt_ids": prompt}
    reader = Reader(chat, 99)
    ranking = reader.rankings(at({**given, "responses": [text, ""], "response_ids": [odd, odd[-1:]], "ranks": [1, 2]}))[
        0
    ]
    pair = reader.pairs(at({**given, "chosen": text, "rejected": "", "chosen_ids": odd, "rejected_ids": odd[-1:]}))[0]
    shown = reader.demonstrations(at({**given, "completion": text, "completion_ids": odd}))[0]
    label = reader.labeled(at({**given, "completion": text, "completion_ids": odd, "score": 1}))[0].row
    for row in (ranking.rows[0], pair.chosen, shown, label):
        assert row.ids.tolist() == prompt + odd
        assert row.start == len(prompt)
        assert bool(row.mask.all())
    assert ranking.rows[1].ids.tolist() == prompt + odd[-1:]
    edited = {**given, "responses": [text, "yes"], "response_ids": [odd, None], "ranks": [1, 2]}
    mixed = reader.rankings(at(edited))[0]  # an edited answer has no ids
    assert [one.ids.tolist() for one in mixed.rows] == [
        prompt + odd,
        chat.row([user("hello"), assistant("yes")]).ids.tolist(),
    ]


def test_ids_that_do_not_belong_to_the_text_are_refused_and_those_of_another_tokenizer_are_left_out() -> None:
    chat = chat_of(QWEN3)
    reader, ids, prompt = Reader(chat, 99), sampled(chat, "yes"), chat.prompt_ids([user("a")])
    with pytest.raises(
        DataError, match=r"my.jsonl:1: field 'completion_ids' has the ids of 'yes', but the text is 'no'"
    ):
        reader.demonstrations(at({"prompt": "a", "completion": "no", "completion_ids": ids}))
    with pytest.raises(DataError, match=r"response_ids\[1\].* token ids below"):
        reader.rankings(at({"prompt": "a", "responses": ["yes", "x"], "response_ids": [ids, [10**6]], "ranks": [1, 2]}))
    row = reader.demonstrations(
        at({"prompt": "a", "completion": "no", "completion_ids": [5, 6], "prompt_ids": [1, *prompt]})
    )[0]
    assert row.ids.tolist() == chat.row([user("a"), assistant("no")]).ids.tolist()


CUT = [
    ("demonstrations", {"completion": "yes no", "finish": "length"}),
    ("demonstrations", {"messages": [user("a"), assistant("yes no")], "finish": "length"}),
    ("labeled", {"completion": "yes no", "finish": "length", "score": 1}),
    ("pairs", {"chosen": "yes no", "rejected": "no", "finish": ["length", "stop"]}),
    ("pairs", {"responses": ["yes no", "no"], "ranks": [1, 2], "finish": ["length", "stop"]}),
    ("rankings", {"responses": ["yes no", "no"], "ranks": [1, 2], "finish": ["length", "stop"]}),
]


@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize(("reading", "row"), CUT)
def test_an_answer_that_was_cut_gets_no_end_token_in_any_form_of_row(reading: str, row: dict, closing: bool) -> None:
    chat = chat_of(QWEN3)
    made = getattr(Reader(chat, 99, closing=closing), reading)(at({"prompt": "a"} | row))[0]
    rows = {"pairs": lambda: [made.chosen, made.rejected], "rankings": lambda: made.rows}.get(
        reading, lambda: [made.row if reading == "labeled" else made]
    )()
    assert parts(chat, rows[0])[1].endswith("yes no")
    assert chat.tokenizer.decode(rows[0].ids).endswith("yes no")
    for other in rows[1:]:
        assert chat.tokenizer.decode(other.ids).endswith("no<|im_end|>\n" if closing else "no<|im_end|>")


@pytest.mark.parametrize("finish", ["long", ["stop"], ["stop", "cut"], 3])
def test_an_unknown_finish_is_refused(finish: object) -> None:
    with pytest.raises(
        DataError, match=r"my.jsonl:1: field 'finish' must have \"stop\" or \"length\" for each answer \(2\)"
    ):
        Reader(chat_of(QWEN3), 99).pairs(at({"prompt": "a", "chosen": "b", "rejected": "c", "finish": finish}))


@pytest.mark.parametrize(
    ("reading", "row"),
    [("demonstrations", {"completion": ""}), ("labeled", {"completion": "", "score": 1}),
     ("pairs", {"chosen": "", "rejected": "b"}), ("rankings", {"responses": ["", "b"], "ranks": [1, 2]})],
)  # fmt: skip
def test_an_empty_answer_is_its_end_token_alone_in_every_form_of_row(reading: str, row: dict) -> None:
    chat = chat_of(TOOLS)
    made = getattr(Reader(chat, 99), reading)(at({"prompt": "a"} | row))[0]
    first = {"pairs": "chosen", "labeled": "row"}.get(reading)
    found = getattr(made, first) if first else made.rows[0] if reading == "rankings" else made
    assert parts(chat, found)[1] == "<|im_end|>"


def test_a_table_of_probabilities_labels_every_pair_and_a_wrong_one_is_refused() -> None:
    chat = chat_of(TOOLS)
    table = [[0.5, 0.9, 0.3], [0.1, 0.5, 0.5], [0.7, 0.5, 0.5]]
    margin = [[0, 2, -1], [-2, 0, 0], [1, 0, 0]]
    row = {"prompt": "a", "responses": ["x", "y", "z"], "probability": table, "margin": margin}
    pairs = Reader(chat, 99).pairs(at(row))
    names = [(parts(chat, one.chosen)[1][0], parts(chat, one.rejected)[1][0]) for one in pairs]
    assert names == [("x", "y"), ("z", "x"), ("y", "z")]  # the more probable one is the chosen one
    assert [one.probability for one in pairs] == [0.9, 0.7, 0.5]
    assert [one.margin for one in pairs] == [2.0, 1.0, 0.0]
    (swapped,) = Reader(chat, 99).pairs(
        at({"prompt": "a", "chosen": "x", "rejected": "y", "probability": 0.2, "margin": -1})
    )
    assert parts(chat, swapped.chosen)[1][0] == "y"
    assert (swapped.probability, swapped.margin) == (0.8, 1.0)
    ranked = Reader(chat, 99).pairs(at({**row, "probability": None, "ranks": [2, 1, 3]}))
    assert [one.margin for one in ranked] == [-2.0, 0.0, -1.0]
    for wrong, what in (
        (0.9, "table of 3 x 3"),
        ([[0.5, 0.9]], "3 x 3"),
        ([[0.5] * 3, [0.4] * 3, [0.5] * 3], "must sum to 1"),
    ):
        with pytest.raises(DataError, match=rf"my.jsonl:1: field 'probability' .*{what}"):
            Reader(chat, 99).pairs(at({**row, "probability": wrong}))


def test_the_closing_of_a_reward_models_row_is_the_templates_own_text() -> None:
    """Where transformers' apply_chat_template ends, the score is read."""
    chat = chat_of(QWEN3)
    talk = [user("a"), assistant("yes")]
    whole = chat.tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
    row = Reader(chat, 99, closing=True).labeled(at({"prompt": "a", "completion": "yes", "score": 1}))[0].row
    assert row.ids.tolist() == whole
    assert row.mask.tolist()[-2:] == [True, False]  # the end token, the line break
    own = chat.row(talk)
    scored = chat.sampled_row(own.ids[: own.start].tolist(), own.ids[own.start :].tolist(), closing=True)
    assert scored.ids.tolist() == whole
    assert torch.equal(scored.mask, row.mask)
    assert picture(own, chat.tokenizer).endswith("[<|im_end|>]")


DEEPSEEK = (  # like DeepSeek-V3: a message is told to be a call by its content, which is none
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% elif m.role == 'tool' %}<tool>{{ m.content }}"
    "{% elif m.content is none %}<|im_end|>{% for call in m.tool_calls %}<tool>{{ call.function.name }}</tool>{% endfor %}<eos>"
    "{% else %}<|im_end|>{{ m.content }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_end|>{% endif %}"
)
PHI = (  # like Phi-3: an end token of each turn, and the tokenizer's own at the end of the text
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def call(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look"}}], **more}


def test_a_call_without_content_reaches_the_template_as_such() -> None:
    chat = chat_of(DEEPSEEK)
    for message in (call(), call(content=None)):
        row = Reader(chat, 99).demonstrations(at({"messages": [user("a"), message]}))[0]
        assert parts(chat, row) == ("<|im_start|>a<|im_end|>", "<tool>look</tool><eos>")
    with pytest.raises(DataError, match="does not write the field 'tool_calls' of message 1"):
        Reader(chat, 99).demonstrations(at({"messages": [user("a"), call(content="yes")]}))


@pytest.mark.parametrize("name", ["function_call", "reasoning", "thinking"])
def test_content_in_other_fields_is_written_or_refused(name: str) -> None:
    with pytest.raises(DataError, match=rf"does not write the field '{name}' of message 1"):
        Reader(chat_of("{# thinking #}" + TOOLS), 99).demonstrations(
            at({"messages": [user("a"), assistant("b", **{name: "look"})]})
        )


def test_a_dropped_system_message_is_refused_though_its_words_stand_elsewhere() -> None:
    with pytest.raises(DataError, match=r"'content' of message 0 \(system\)"):
        Reader(chat_of(NO_SYSTEM), 99).prompts(
            at({"prompt": [{"role": "system", "content": "it is"}, user("What it is ?")]})
        )


def test_a_message_with_weight_0_is_not_trained() -> None:
    chat = chat_of(TOOLS)
    talk = [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)]
    (row,) = Reader(chat, 99).demonstrations(at({"messages": talk}))
    assert parts(chat, row)[1] == "d<|im_end|>"
    with pytest.raises(DataError, match="weight 0"):
        Reader(chat, 99).demonstrations(at({"messages": talk[:2]}))


@pytest.mark.parametrize("closing", [False, True])
def test_a_cut_answer_has_nothing_that_the_template_writes_behind_it(closing: bool) -> None:
    chat = chat_of(PHI)
    row = chat.row([user("a"), assistant("yes it is")], ended=False, closing=closing)
    assert parts(chat, row) == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "yes it is")
    whole = chat.row([user("a"), assistant("yes it is")], closing=closing)
    assert chat.tokenizer.decode(whole.ids[row.length :]) == ("<|im_end|>\n<eos>" if closing else "<|im_end|>")
    with pytest.raises(DataError, match="cut off cannot be empty"):
        chat.row([user("a"), assistant("")], ended=False)
    thought = chat_of(QWEN3).row([user("a"), assistant("<think>\nis it")], ended=False)
    assert parts(chat_of(QWEN3), thought)[1] == "<think>\nis it"
    assert parts(chat_of(R1), chat_of(R1).row([user("a"), assistant("is it")], ended=False))[1] == "is it"


def test_ids_that_ended_without_an_end_token_get_one() -> None:
    chat = chat_of(TOOLS)
    ids = sampled(chat, "yes", ended=False)
    (row,) = Reader(chat, 99).demonstrations(at({"prompt": "a", "completion": "yes", "completion_ids": ids}))
    assert parts(chat, row)[1] == "yes<|im_end|>"


def test_a_row_with_answers_in_two_forms_is_refused() -> None:
    both = {"prompt": "a", "responses": ["x", "y"], "ranks": [1, 2], "chosen": "b", "rejected": "c"}
    for reading in ("pairs", "rankings", "unpaired"):
        with pytest.raises(DataError, match=r"has 'chosen' and 'responses'|has 'responses' and 'chosen'"):
            getattr(Reader(chat_of(TOOLS), 99), reading)(at(both))
