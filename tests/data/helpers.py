"""Rows as pictures: the tokens in order, the trained ones in brackets, "⏎" for a newline token."""

from typing import Any

import tiny
import torch

from whet.data import Chat, Located, Reader, Row, chat_format

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PLAIN_WORDS = ["user", "assistant", "system", "###", "Human:", "Assistant:", "\n"]


def picture(row: Row, tokenizer: Any) -> str:
    """ "<user> hello <assistant> [yes] [<end>]" """
    words = [word.replace("\n", "⏎") for word in tokenizer.convert_ids_to_tokens(row.ids.tolist())]
    trained = [False] * row.start + row.mask.tolist()
    return " ".join(f"[{word}]" if on else word for word, on in zip(words, trained, strict=True))


def lines_tokenizer(template: str | None = None) -> Any:
    """tiny's words, header tokens of several formats, and a token of its own for every newline; spaces are nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *SPECIAL, *PLAIN_WORDS, *tiny.WORDS]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    cut = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    inner.pre_tokenizer = pre_tokenizers.Sequence(cut)
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL,
    )
    out.chat_template = template
    return out


def row(length: int, *, start: int = 1, trained: str = "") -> Row:
    """A row of ids 10, 11, ...; `trained` draws its mask, "" is all of it."""
    mask = [bit == "1" for bit in trained] or [True] * (length - start)
    return Row(torch.arange(10, 10 + length), start, torch.tensor(mask))


def chat() -> Chat:
    return chat_format(tiny.tokenizer())


def reader(max_tokens: int = 64, **options: str) -> Reader:
    return Reader(chat(), max_tokens, **options)


def at(*rows: dict) -> list[Located]:
    return [Located(row, f"my.jsonl:{number}") for number, row in enumerate(rows, 1)]


def drawn(rows: Any) -> list[str]:
    tokenizer = tiny.tokenizer()
    return [picture(row, tokenizer) for row in rows]


def bits(value: Any) -> Any:
    """Everything in an element, with its types."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(bits, value))
    if hasattr(value, "__dataclass_fields__"):
        return type(value), tuple(bits(getattr(value, name)) for name in value.__dataclass_fields__)
    return type(value), repr(value)
