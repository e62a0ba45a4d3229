"""Conversations through tokenizers of every kind: the ids are those of the rendered text, whatever the tokenizer adds."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from whet.data import Chat, Located, Reader, chat_format

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (  # like Llama 2: the end token is the tokenizer's, and the answer follows a space
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
HEADER = (  # no special tokens but the end
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LINES = [
    "Hello friend , how are you ?", "<|user|>\nWhat is it\n<|assistant|>\nHello friend", "2+2=4, isn't it?", "naïve café ✓",
    "### Human:\nhi\n### Assistant:\nYes it is .", "[INST] What is it [/INST] Yes it is",
] * 20  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]


def trained(inner: Tokenizer, kind: Any, **options: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    inner.train_from_iterator(LINES, kind(vocab_size=400, special_tokens=SPECIAL, show_progress=False, **options))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


def byte_bpe(pattern: str | None = None) -> Any:
    inner = Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(__import__("tokenizers").Regex(pattern), "isolated")] if pattern else []
    inner.pre_tokenizer = pre_tokenizers.Sequence([*split, byte])
    inner.decoder = decoders.ByteLevel()
    return trained(inner, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def metaspace(scheme: str) -> Any:
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    return trained(inner, trainers.BpeTrainer)


def legacy_llama() -> Any:
    """The form of Llama 2: a normalizer puts the mark before each text."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return trained(inner, trainers.BpeTrainer)


def unigram() -> Any:
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    return trained(inner, trainers.UnigramTrainer, unk_token="<unk>")


def wordpiece() -> Any:
    inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=False)
    return trained(inner, trainers.WordPieceTrainer)


def wordlevel() -> Any:
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return trained(inner, trainers.WordLevelTrainer)


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS: dict[str, Callable[[], Any]] = {
    "wordlevel": wordlevel, "gpt2": byte_bpe, "llama3": lambda: byte_bpe(LLAMA3), "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"), "llama2": legacy_llama, "unigram": unigram, "wordpiece": wordpiece,
}  # fmt: skip
EXACT = [name for name in KINDS if name not in ("wordlevel", "wordpiece")]
"""Tokenizers that decode to the text that was tokenized."""
ADDED = {"nothing": ([], []), "bos": (["<s>"], []), "bos and eos": (["<s>"], ["</s>"]), "eos": ([], ["</s>"])}
TEMPLATES = {"chatml": CHATML, "inst": INST, "header": HEADER, "plain": "plain"}
TALK = [
    {"role": "user", "content": "What is it"}, {"role": "assistant", "content": "Hello friend"},
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Yes it is ."},
]  # fmt: skip


def made(kind: str, adds: str) -> Any:
    tokenizer = KINDS[kind]()
    before, after = ADDED[adds]
    if before or after:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*before, "$A", *after]),
            special_tokens=[(one, tokenizer.convert_tokens_to_ids(one)) for one in [*before, *after]],
        )
    return tokenizer


@pytest.fixture(scope="module", params=[(kind, adds) for kind in KINDS for adds in ADDED], ids=" adds ".join)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return made(*request.param)


def rendered(chat: Chat, messages: list, **options: Any) -> list[int]:
    """The ids that transformers' own apply_chat_template gives."""
    return chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_ids_of_a_row_are_those_of_the_rendered_text(tokenizer: Any, template: str) -> None:
    chat = chat_format(tokenizer, TEMPLATES[template])
    (row,) = chat.rows(TALK)
    whole = rendered(chat, TALK)
    assert row.ids.tolist() == whole[: row.length]
    assert all(one not in chat.end_ids for one in whole[row.length :])  # only white space is left
    assert row.ids[-1] == chat.end_ids[0]
    bos = tokenizer.bos_token_id
    assert whole.count(bos) == (
        2 if template == "inst" else int(template == "plain" and tokenizer("a")["input_ids"][0] == bos)
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_turn_has_the_same_ids_when_it_is_written_and_in_the_history(tokenizer: Any, template: str) -> None:
    chat = chat_format(tokenizer, TEMPLATES[template])
    first, both = chat.row(TALK[:2]), chat.rows(TALK)[0]
    assert both.ids[: first.length].tolist() == first.ids.tolist()
    ends = [place for place, one in enumerate(both.ids.tolist()) if one == chat.end_ids[0]]
    assert both.mask.tolist().count(True) == sum(int(row.mask.sum()) for row in (first, chat.row(TALK)))
    assert set(ends) >= {first.length - 1, both.length - 1}


@pytest.mark.parametrize("template", [*TEMPLATES, "none"])
def test_a_sampled_answer_is_read_back_as_it_was_written(tokenizer: Any, template: str) -> None:
    """The text of the ids, put into the conversation again, has these ids, if no token is across the border."""
    chat = chat_format(tokenizer, TEMPLATES.get(template, template))
    row = chat.row(TALK[:2])
    prompt, answer = row.ids[: row.start].tolist(), row.ids[row.start :].tolist()
    if prompt == chat.prompt_ids(TALK[:1]):
        again = chat.row([TALK[0], {"role": "assistant", "content": chat.text(answer)}])
        assert again.ids.tolist() == row.ids.tolist()
    else:
        assert not chat.text(answer).lstrip(" ").startswith("Hello")  # it has characters of the prompt too
    assert chat.sampled_row(prompt, answer).ids.tolist() == row.ids.tolist()


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("text", ["Hello friend", " Hello friend", "isn't it? .", "a  b\n\nc ", "café ✓", ""])
def test_the_text_of_an_answer_is_the_text_that_was_tokenized(kind: str, text: str) -> None:
    """Spaces before punctuation too, which clean_up_tokenization_spaces removes."""
    tokenizer = made(kind, "nothing")
    tokenizer.clean_up_tokenization_spaces = True
    chat = chat_format(tokenizer, CHATML)
    row = chat.row([TALK[0], {"role": "assistant", "content": text}])
    if "<unk>" not in tokenizer.convert_ids_to_tokens(row.ids.tolist()):
        assert chat.text(row.ids[row.start :].tolist()) == text


def test_without_a_template_there_is_one_bos_and_one_eos(tokenizer: Any) -> None:
    chat = chat_format(tokenizer, "none")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds = tokenizer("a")["input_ids"][0] == bos
    hello, answer = {"role": "user", "content": "What is"}, {"role": "assistant", "content": " it"}
    for question in (hello, {"role": "user", "content": "<s>What is"}):
        prompt, row = chat.prompt_ids([question]), chat.row([question, answer])
        has = adds or question["content"].startswith("<s>")
        assert (prompt.count(bos), prompt.count(eos), prompt[0] == bos) == (int(has), 0, has)
        assert row.ids[: row.start].tolist() == prompt or not has or row.ids[0] == bos
        assert row.ids.tolist().count(bos) == int(has)
        assert (row.ids.tolist().count(eos), int(row.ids[-1])) == (1, eos)
    closed = chat.row([hello, {"role": "assistant", "content": " it</s>"}])
    assert closed.ids.tolist() == chat.row([hello, answer]).ids.tolist()
    for text in ("What is it", "<s>What is it", "What is it</s>", "<s>What is it</s>"):
        ids = Reader(chat, 99).texts([Located({"text": text}, "x")])[0].ids.tolist()
        assert (ids.count(bos), ids.count(eos), ids[-1]) == (int(adds or text.startswith("<s>")), 1, eos)


@pytest.mark.parametrize("template", ["chatml", "header", "plain", "none"])
def test_an_answer_that_has_its_end_token_already_gets_no_second_one(tokenizer: Any, template: str) -> None:
    chat = chat_format(tokenizer, TEMPLATES.get(template, template))
    end = tokenizer.convert_ids_to_tokens(chat.end_ids[0])
    closed = chat.row([TALK[0], {"role": "assistant", "content": f"Hello friend{end}"}])
    assert closed.ids.tolist() == chat.row(TALK[:2]).ids.tolist()
