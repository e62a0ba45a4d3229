"""Tokenization of many texts in one call: the ids of each text, and where each token ends.

Most of the time of a byte-level BPE tokenizer (GPT-2, Llama 3, Qwen, SmolLM) goes into copies of the text and not into merges. For
ASCII texts `_Words` does the same work with a table: it splits a text at special tokens and by the tokenizer's own pattern, and
takes the ids of each word from the tokenizer's model once. Other tokenizers and texts take the tokenizer's own path, and so does
everything if the first texts differ from it.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

Encoded = tuple[np.ndarray, np.ndarray]
"""The ids (S,) int32 of a text, and for each token the place (S,) int32 in the text where it ends, in characters."""

FEW = 64
"""Fewer texts than this do not pay for the preparation of a table of words."""
COMPARED = 32
"""Number of texts that are also read by the tokenizer itself, to compare."""
MOST_WORDS = 1 << 18
"""Largest number of words in the table."""
CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
PATTERNS = (
    rf"{CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",
    rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""Patterns of words: GPT-2's, Llama 3's, and that of Qwen 2 and 3."""
UNCHANGED = ("NFC", "NFD", "NFKC", "NFKD")
"""Normalizers that do not change ASCII texts."""


class Encoder:
    """Tokenize texts without special tokens of their own, as `tokenizer(text, add_special_tokens=False)` does. The tokenizer
    must be a fast one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._words: _Words | None = None
        self._tried = False

    def __call__(self, texts: Sequence[str]) -> list[Encoded]:
        """Return the ids and the ends of the tokens of each text."""
        if not self._tried and len(texts) >= FEW:
            self._tried, self._words = True, _words_of(self.tokenizer)
            some = [text for text in texts if text.isascii()][:COMPARED]
            if self._words is not None and some and not _equal(self._words(some), self._own(some)):
                self._words = None
        if self._words is None:
            return self._own(texts)
        out = self._words(texts)
        left = [number for number, one in enumerate(out) if one is None]
        for number, one in zip(left, self._own([texts[number] for number in left]), strict=True):
            out[number] = one
        return out  # type: ignore[return-value]

    def _own(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenize with the tokenizer itself."""
        if not texts:
            return []
        found = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        places = ([end for _, end in one] for one in found["offset_mapping"])
        return [
            (np.array(ids, dtype=np.int32), np.array(ends, dtype=np.int32))
            for ids, ends in zip(found["input_ids"], places, strict=True)
        ]


def _equal(given: Sequence[Encoded | None], expected: Sequence[Encoded]) -> bool:
    pairs = zip(given, expected, strict=True)
    return all(one is not None and all(map(np.array_equal, one, other)) for one, other in pairs)


class _Words:
    """The ids of words, and the lengths of tokens in characters."""

    def __init__(self, find: Callable[[str], list[str]], added: Mapping[str, int], model: Any, trim: bool) -> None:
        self._find, self._added, self._model = find, added, model
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + ")").split
        self._known = _Known(model, added)
        size = 1 + max(chain(model.values(), added.values()))
        self._length, self._trailing = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.int32)
        for token, number in model.vocabulary.items():
            self._length[number] = len(token)
            bare = len(token.rstrip(SPACE))
            self._trailing[number] = len(token) - bare if trim and bare else 0
        for token, number in added.items():
            self._length[number], self._trailing[number] = len(token), 0

    def __call__(self, texts: Iterable[str]) -> list[Encoded | None]:
        """Return the ids and ends of each text, None for a text that is not ASCII or begins with a space."""
        if len(self._known) > MOST_WORDS:
            self._known = _Known(self._model, self._added)
        return [self._one(text) if text.isascii() and text[:1] != " " else None for text in texts]

    def _one(self, text: str) -> Encoded | None:
        words: list[str] = []
        if self._added:
            for number, part in enumerate(self._split(text)):
                if number % 2:
                    words.append(part)
                elif part:
                    words += self._find(part)
        else:
            words = self._find(text)
        ids = np.array(list(chain.from_iterable(map(self._known.__getitem__, words))), dtype=np.int32)
        ends = self._length[ids].cumsum(dtype=np.int32)
        if (int(ends[-1]) if len(ends) else 0) != len(text):
            return None
        return ids, ends - self._trailing[ids]


class _Model:
    """The model of a byte-level tokenizer."""

    def __init__(self, model: Any, vocabulary: Mapping[str, int]) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.values = vocabulary.values

    def ids(self, word: str) -> tuple[int, ...]:
        """Return the ids of a word of ASCII characters."""
        return tuple(token.id for token in self.model.tokenize(word.translate(BYTES)))


class _Known(dict[str, tuple[int, ...]]):
    """Words with their ids; an unknown word is added when it is read."""

    def __init__(self, model: _Model, added: Mapping[str, int]) -> None:
        super().__init__((token, (number,)) for token, number in added.items())
        self._model = model

    def __missing__(self, word: str) -> tuple[int, ...]:
        found = self[word] = self._model.ids(word)
        return found


def _byte_characters() -> dict[int, str]:
    """Return the character that stands for each byte in a byte-level vocabulary (Radford et al. 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + number) for number, byte in enumerate(other)}


BYTES = _byte_characters()
SPACE = BYTES[ord(" ")]


def _words_of(tokenizer: Any) -> _Words | None:
    """Return the table of a byte-level BPE tokenizer, or None for a tokenizer that works in another way."""
    if not type(tokenizer).__call__.__module__.startswith("transformers.") or getattr(
        tokenizer, "split_special_tokens", False
    ):
        return None
    backend = tokenizer.backend_tokenizer
    about = json.loads(backend.to_str())
    model, added = about["model"], about["added_tokens"]
    find = _finder(about.get("pre_tokenizer"))
    processed = _trims(about.get("post_processor"))
    normalizer = about.get("normalizer")
    plain = (
        model.get("type") == "BPE"
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and not model.get("byte_fallback")
        and (normalizer is None or normalizer.get("type") in UNCHANGED)
        and not backend.encode_special_tokens
        and not any(one["single_word"] or one["lstrip"] or one["rstrip"] for one in added)
        and all(one["content"].strip() == one["content"] != "" for one in added)
        and len({one["normalized"] for one in added}) < 2
    )
    if not plain or find is None or processed is None:
        return None
    vocabulary = model["vocab"]
    if any(character not in vocabulary for byte, character in BYTES.items() if byte < 128):
        return None
    return _Words(find, {one["content"]: one["id"] for one in added}, _Model(backend.model, vocabulary), processed)


def _finder(before: Mapping[str, Any] | None) -> Callable[[str], list[str]] | None:
    """Return the function that splits an ASCII text into words, or None for a pre-tokenizer that is not known."""
    steps = before.get("pretokenizers", [before]) if before else []
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"] or len(steps) > 2:
        return None
    if len(steps) == 1:
        pattern = PATTERNS[0] if steps[0].get("use_regex", True) else None
    else:
        first = steps[0]
        isolated = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
        pattern = first["pattern"].get("Regex") if isolated and not steps[-1].get("use_regex", True) else None
    if pattern not in PATTERNS:
        return None
    ascii_ = pattern.replace(r"\p{L}\p{N}]", "A-Za-z0-9]").replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]")
    return re.compile(ascii_, re.ASCII).findall


def _trims(after: Mapping[str, Any] | None) -> bool | None:
    """Return whether spaces at the end of a token do not belong to it, or None for a post-processor that is not known."""
    trims = False
    for one in after.get("processors", [after]) if after else []:
        if one["type"] not in ("ByteLevel", "TemplateProcessing"):
            return None
        trims = trims or (one["type"] == "ByteLevel" and one["trim_offsets"])
    return trims
