"""Conversion of messages to token ids, with a mask of the trained tokens.

The tokenizer's chat template renders a conversation whole, and the text is tokenized once. The offsets of the tokens say
who wrote them. A token with characters of a prompt and of its answer belongs to the answer. Only where there is no template,
such a token is split, because the prompt is a text of its own.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from whet.data import marks
from whet.data.encode import Encoded, Encoder
from whet.data.payments import TemplateLimit
from whet.data.templates import is_traceable, no_template, rendered, template_file, variables
from whet.data.types import Row
from whet.errors import DataError, ModelError, first_line

PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}### Assistant:\n"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% elif message['role'] == 'user' %}### Human:\n{{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
"""Chat template for base models that have none."""

RAW = "none"
"""Name of the format without a template: prompt and completion are joined unchanged."""

JOINED = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Chat template saved in the tokenizer for this format, so that a saved model is used with the format of its training."""

BOS = "{{ bos_token }}"
"""Start of the two templates above for a tokenizer that adds a bos token to plain text."""

EXTRAS = ("tools", "documents", "chat_template_kwargs")
"""Fields of a row that are passed to the chat template. The last one is an object of further arguments."""

CONTENT = ("content", "tool_calls", "reasoning_content", "thinking", "reasoning", "function_call")
"""Fields of a message that are content: a template that does not write them is refused."""

MARK = "answer"
"""Text of the answer with which a template is examined."""

OTHER = "<<another text>>"
"""Text that replaces a content, to see whether the template writes it."""

SKELETONS = 1024
"""Largest number of sequences of roles whose skeletons are kept."""

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its conversation format.

    Each of `end_ids` ends an answer; training data uses the first. `closing_ids` is what the template writes after an
    answer: its end token, if it has one, and what follows it (often a line break). `leading` is what it writes between the
    generation prompt and the text of an answer (often nothing, or a space). `spaced` is True if "▁" at the start of
    an answer's first token stands for a space in the text. With `skip_special_tokens`, `text` leaves special tokens out.
    `arguments` are passed to the template of every conversation; those of a row come on top.
    """

    tokenizer: Any
    raw: bool
    end_ids: tuple[int, ...]
    closing_ids: tuple[int, ...] = ()
    leading: str = ""
    spaced: bool = False
    skip_special_tokens: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    encoded: dict[str, Encoded] = field(default_factory=dict, compare=False, repr=False)
    """texts that were tokenized at once, see `prepare`"""
    skeletons: dict[tuple[Any, ...], marks.Skeleton | None] = field(default_factory=dict, compare=False, repr=False)
    """what the template writes around the contents of messages, by their roles"""

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer for many texts at once."""
        return Encoder(self.tokenizer)

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The tokens of `end_ids`."""
        return tuple(_token(self.tokenizer, end) for end in self.end_ids)

    def prepare(self, texts: Iterable[str]) -> None:
        """Tokenize these texts at once, for the calls that follow, and forget the earlier ones. It changes no result."""
        self.encoded.clear()
        if self.tokenizer.is_fast:
            texts = list(dict.fromkeys(texts))
            found = zip(texts, self.encoder(texts), strict=True)
            self.encoded.update({text: one for text, one in found if not (one[1][1:] < one[1][:-1]).any()})

    def expected(
        self, messages: Messages, extras: Mapping[str, Any] | None = None, *, opened: bool = False
    ) -> list[str]:
        """Return the texts that are usually tokenized to convert these messages: none for a conversation whose template reads its
        contents, since rendering it twice costs more than tokenizing it alone."""
        text = self._quick([dict(self._bare(one)) for one in messages], extras, opened)
        if text is None or not self.raw or opened:
            return [] if text is None else [text]
        border = len(self._render(messages[:-1], extras, opened=True))
        return [text, text[:border], self.ends[0] + text[border:]]

    def prompt_ids(self, messages: Messages, extras: Mapping[str, Any] | None = None) -> list[int]:
        """Return the ids that a generator continues: the messages and, with a template, the start of the assistant's turn.

        `extras` has the fields `tools`, `documents` and `chat_template_kwargs` of the row, if it has any.
        """
        return self._encode(self._render(messages, extras, opened=True))[0]

    def answer_ids(
        self, messages: Messages, text: str, extras: Mapping[str, Any] | None = None, *, ended: bool = True
    ) -> list[int]:
        """Return the ids of an answer to these messages, including its end token if it ended."""
        row = self.row([*messages, {"role": "assistant", "content": text}], ended=ended, extras=extras)
        return row.ids[row.start :].tolist()

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of plain texts, each with an end token, and with a bos token if the tokenizer adds one."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        start = [bos] if _adds_bos(self.tokenizer) else []
        out = []
        if self.tokenizer.is_fast:
            found = [ids.tolist() for ids, _ in self.encoder(texts)]
        else:
            found = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        for ids in found:
            ids = [*start, *(ids[1:] if start == ids[:1] else ids)]
            out.append(ids if ids[-1:] == [eos] else [*ids, eos])
        return out

    def rows(
        self, messages: Messages, *, turns: str = "all", ended: bool = True, extras: Mapping[str, Any] | None = None
    ) -> list[Row]:
        """Convert a conversation to rows; only the assistant turns and their end tokens are trained.

        `turns="last"` trains only the last turn. All turns are one row, except if the template writes a turn differently
        once other turns follow, or without an end token: then each turn is a row of its own, with the context that it had
        when it was generated. An assistant message with `weight` 0 is not trained. With `ended` False the last answer was cut
        off. Raises DataError if there is no assistant turn after a user message.
        """
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers or answers[0] == 0:
            raise DataError("a conversation needs an assistant message after a user message")
        if turns == "last":
            answers = answers[-1:]
        elif any(message.get("weight", 1) == 0 for message in messages):
            answers = [number for number in answers if messages[number].get("weight", 1) != 0]
            if not answers:
                raise DataError("every assistant message has the weight 0, so nothing would be trained")
        if self.raw and len(answers) > 1:
            raise DataError('several assistant turns need a chat template; "none" joins one prompt and one answer')
        for number in answers:
            self._check_end(messages[number])
        if len(answers) > 1 and ended:
            whole, spans = self._render(messages[: answers[-1] + 1], extras), []
            for number in answers:
                opened = self._render(messages[:number], extras, opened=True)
                closed = self._render(messages[: number + 1], extras)
                if not whole.startswith(closed) or not closed.startswith(opened):
                    break
                spans.append((len(opened), len(closed)))
            if len(spans) == len(answers):
                row = self._row(whole, spans)
                if row is not None:
                    return [row]
        return [
            self.row(messages[: number + 1], ended=ended or number < answers[-1], extras=extras) for number in answers
        ]

    def row(
        self,
        messages: Messages,
        *,
        ended: bool = True,
        closing: bool = False,
        extras: Mapping[str, Any] | None = None,
    ) -> Row:
        """Convert a prompt and its answer, the last message, to a row in which only the answer is trained.

        With `ended` False the answer was cut off, and gets no end token. `closing` keeps what the template writes after the
        end token, and adds no end token of its own: the ids are those of the template's text, as a reward model reads it.
        Raises DataError if the generation prompt opens the answer (with "<think>") and the text does not continue it.
        """
        *prompt, answer = messages
        self._check_end(answer)
        opened, text = self._render(prompt, extras, opened=True), self._render([*prompt, answer], extras)
        if not ended:
            content = str(self._bare(answer).get("content") or "")
            if not content:
                raise DataError("an answer that was cut off cannot be empty")
            place = text.find(content, len(opened)) if text.startswith(opened) else -1
            tag = self.leading.strip().split("\n")[0]
            if place < 0 or (
                tag and content.startswith(tag)
            ):  # the template changes the text, or has another beginning for it
                text = opened + content.removeprefix(self._opening(prompt, opened, extras).lstrip())
            else:
                text = text[: place + len(content)]
        elif not text.startswith(opened):
            text = opened + self._continued(prompt, answer, opened, extras)
        row = self._row(text, [(len(opened), len(text))], ended=ended, closing=closing)
        assert row is not None
        return row

    def sampled_row(
        self, prompt_ids: Sequence[int], ids: Sequence[int], *, closing: bool = False, trained: Sequence[bool] = ()
    ) -> Row:
        """Return a row of these prompt ids and sampled ids. `trained` has one bool per sampled id, all True without it.

        With `closing`, the end token of the template is replaced by all that the template writes after an answer.
        """
        mask = list(trained) or [True] * len(ids)
        ids = list(ids)
        if closing and ids and ids[-1] == self.end_ids[0] and (len(ids) > 1 or self.closing_ids):
            own = max((place + 1 for place, one in enumerate(self.closing_ids) if one in self.end_ids), default=0)
            mask = mask[:-1] + [place < own for place in range(len(self.closing_ids))]
            ids = [*ids[:-1], *self.closing_ids]
        return Row(torch.tensor([*prompt_ids, *ids]), len(prompt_ids), torch.tensor(mask, dtype=torch.bool))

    def ends_step(self, token: int, separator: str) -> bool:
        """Return whether a step ends with this token: its text contains the separator."""
        return separator in self.tokenizer.decode([token])

    def text(self, ids: Sequence[int]) -> str:
        """Decode an answer, without its closing end token. No clean-up; other special tokens are kept by default."""
        ids = list(ids[:-1]) if ids and ids[-1] in self.end_ids else list(ids)
        out = self.tokenizer.decode(
            ids, skip_special_tokens=self.skip_special_tokens, clean_up_tokenization_spaces=False
        )
        if self.spaced and ids and not out.startswith(" ") and _token(self.tokenizer, ids[0]).startswith("▁"):
            return f" {out}"
        return out

    def is_text_of(self, ids: Sequence[int], text: str) -> bool:
        """Return whether this is the text of these ids, with or without special tokens."""
        kept = self.text(ids)
        return text == kept or text == self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def check(self, messages: Messages, extras: Mapping[str, Any] | None = None) -> None:
        """Raise DataError for content that the chat template does not write: tools, documents, arguments, tool calls,
        thoughts, and messages of a role that it leaves out."""
        given = dict(extras or {})
        for name in [one for one in EXTRAS[:2] if one in given] + list(given.get(EXTRAS[2], {})):
            if name not in _variables(self.tokenizer):
                raise DataError(
                    f"the chat template does not use {name!r}, so it would be dropped; remove it from the row"
                )
        text = self._render(messages, extras)
        for number, one in enumerate(messages):
            fields = [name for name in CONTENT if one.get(name)]
            content = str(one.get("content") or "").strip()
            if fields == ["content"] and (one["role"] == "assistant" or (one["role"] == "user" and content in text)):
                continue
            for name in fields:
                other = {**one, name: OTHER} if name == "content" else {k: v for k, v in one.items() if k != name}
                try:
                    written = self._render([*messages[:number], other, *messages[number + 1 :]], extras) != text
                except DataError:  # the template needs the field
                    written = True
                if not written:
                    raise DataError(
                        f"the chat template does not write the field {name!r} of message {number} ({one['role']}), so it would be "
                        "dropped; remove it, or give a template that writes it with --chat-template"
                    )

    def _check_end(self, message: Mapping[str, Any]) -> None:
        """Raise DataError for an end token before the end of an answer: what follows it could never be sampled."""
        content = self._bare(message).get("content")
        for token in self.ends if isinstance(content, str) else ():
            if token in str(content):
                raise DataError(
                    f"the answer has the end token {token!r} before its end; remove it, or write what follows as another message"
                )

    def _bare(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return an assistant message without what the template adds to its content: an end token, and the text before it."""
        content = message.get("content") if message["role"] == "assistant" else None
        if self.leading and isinstance(content, str):
            content = content.removeprefix(self.leading)
            message = {**message, "content": content}
        for token in self.ends if isinstance(content, str) else ():
            if str(content).rstrip().endswith(token):
                return {**message, "content": str(content).rstrip().removesuffix(token)}
        return message

    def _opening(self, prompt: Messages, opened: str, extras: Mapping[str, Any] | None) -> str:
        """Return the part of the generation prompt that belongs to the answer, such as "<think>"; often empty."""
        before = self._render([*prompt, {"role": "assistant", "content": MARK}], extras).rpartition(MARK)[0]
        if before.startswith(opened):
            return ""
        if not opened.startswith(before):
            raise DataError(
                "the chat template writes an answer differently than it begins one, so it cannot be trained; do two assistant "
                "messages follow each other?"
            )
        return opened[len(before) :]

    def _continued(
        self, prompt: Messages, answer: Mapping[str, Any], opened: str, extras: Mapping[str, Any] | None
    ) -> str:
        """Return the text after a generation prompt that opens the answer: its content without the opening, and the end."""
        probe = self._render([*prompt, {"role": "assistant", "content": MARK}], extras)
        before, _, ending = probe.rpartition(MARK)
        if not opened.startswith(before):
            raise DataError(
                "the chat template writes an answer differently than it begins one, so it cannot be trained"
            )
        opening, content = opened[len(before) :], str(answer.get("content") or "")
        tag = re.search(r"[<\[](\|?)([\w ]+)(\|?)[>\]]\s*$", opening)
        if content.lstrip().startswith(opening.strip()):
            rest = content.lstrip().removeprefix(opening.strip())
            return (rest.removeprefix("\n") if opening.endswith("\n") else rest) + ending
        close = opening[tag.start()] + tag[1] + "/" + tag[2] + tag[3] + opening[tag.end(3)] if tag else None
        if close is not None and close in content:
            return content + ending
        wanted = f" and ends it with {close!r}" if close else ""
        raise DataError(
            f"the generation prompt of the chat template opens each answer with {opening!r}, but this answer does not go on "
            f"from there; write an answer that begins with it{wanted}, or give the sampled token ids"
        )

    def _row(
        self, text: str, spans: Sequence[tuple[int, int]], *, ended: bool = True, closing: bool = False
    ) -> Row | None:
        """Tokenize a text in which the characters of these spans are answers with their end. Return None if an answer
        other than the last has no end token."""
        known = self.encoded.get(text)
        if known is not None and not self.raw and len(spans) == 1:
            row = self._simple_row(*known, spans[0], closing)
            if row is not None:
                return row
        ids, places = self._encode(text, [place for span in spans for place in span])
        if self.raw:
            ids, places = self._joined(text, spans[0][0], ids, places)
        trained = [False] * len(ids)
        stop = 0
        for number, (first, last) in enumerate(zip(places[::2], places[1::2], strict=True)):
            found = [place for place in range(first, last) if ids[place] in self.end_ids]
            if found:
                stop = found[-1 if closing else 0] + 1
            elif number < len(spans) - 1:
                return None
            elif not ended:
                stop = last
            else:  # the template has no end token
                stop = last - _blank(self.tokenizer, ids[first:last])
                if stop == first or not closing:
                    ids, trained, stop = [*ids[:stop], self.end_ids[0]], [*trained[:stop], True], stop + 1
            trained[first:stop] = [True] * (stop - first)
        length = len(ids) if closing else stop
        start = trained.index(True)
        return Row(torch.tensor(ids[:length]), start, torch.tensor(trained[start:length]))

    def _simple_row(self, ids: np.ndarray, ends: np.ndarray, span: tuple[int, int], closing: bool) -> Row | None:
        """Return the row of one answer with an end token, as `_row` does, or None if it has none."""
        first, last = np.searchsorted(ends, span, side="right").tolist()
        answer = ids[first:last]
        found = answer == self.end_ids[0]
        for end in self.end_ids[1:]:
            found |= answer == end
        places = found.nonzero()[0]
        if not len(places) or (self.tokenizer.bos_token_id is not None and ids[0] == self.tokenizer.bos_token_id):
            return None
        trained = int(places[-1 if closing else 0]) + 1
        length = len(ids) if closing else first + trained
        mask = torch.zeros(length - first, dtype=torch.bool)
        mask[:trained] = True
        return Row(torch.from_numpy(ids[:length].astype(np.int64)), first, mask)

    def _joined(self, text: str, border: int, ids: list[int], places: list[int]) -> tuple[list[int], list[int]]:
        """Return the ids without a token across the border of prompt and completion, so that the prompt has the ids with which
        it is continued. The completion is tokenized behind a special token, where it is not taken for the start of a text."""
        head = self._encode(text[:border])[0]
        if ids[: places[0]] == head:
            return ids, places
        tail = self._encode(_token(self.tokenizer, self.end_ids[0]) + text[border:])[0][1:]
        if tail and _token(self.tokenizer, tail[0]).startswith("▁") and not text[border].isspace():
            return ids, places
        return head + tail, [len(head), len(head) + len(tail)]

    def _render(self, messages: Messages, extras: Mapping[str, Any] | None = None, *, opened: bool = False) -> str:
        given = dict(extras or {})
        given |= dict(self.arguments) | dict(given.pop(EXTRAS[2], {}))
        plain = [dict(self._bare(message)) for message in messages]
        quick = self._quick(plain, extras, opened)
        if quick is not None:
            return quick

        def text_with(empty: str | None) -> str:
            """Render with this content for messages that have a call alone."""
            filled = [{**one, "content": empty} if one.get("content") is None else one for one in plain]
            return _applied(self.tokenizer, filled, opened, given)

        try:
            if all(one.get("content") is not None for one in plain):
                return text_with("")
            try:
                text = text_with(None)  # some templates tell such messages by it, others write the word None
                return text_with("") if text == text_with("None") else text
            except TemplateLimit:
                raise
            except Exception:
                return text_with("")
        except TemplateLimit as error:
            raise DataError(
                f"the chat template does too much work on these messages: {error}; give another with --chat-template"
            ) from error
        except Exception as error:  # a template may raise any error (raise_exception of Jinja)
            raise DataError(f"the chat template refuses these messages: {error}") from error

    def _quick(self, messages: Messages, extras: Mapping[str, Any] | None, opened: bool) -> str | None:
        """Return the text of messages with a role and a content each, by the skeleton of their roles; None for other messages, and if
        the template reads the contents."""
        if extras or not all(len(one) == 2 and type(one.get("content")) is str for one in messages):
            return None
        contents = [one["content"] for one in messages]
        key = (self.tokenizer.chat_template, opened, *(one["role"] for one in messages))
        if key not in self.skeletons:
            if len(self.skeletons) >= SKELETONS:
                self.skeletons.clear()
            self.skeletons[key] = None  # also while the next line renders the messages themselves
            self.skeletons[key] = self._skeleton(messages, opened)
        skeleton = self.skeletons[key]
        return None if skeleton is None else skeleton.text(contents)

    def _skeleton(self, messages: Messages, opened: bool) -> marks.Skeleton | None:
        source, given = self.tokenizer.chat_template, dict(self.arguments)
        if not isinstance(source, str) or marks.FIRST in source or not _is_plain(self.tokenizer):
            return None
        try:
            plain = _applied(self.tokenizer, [dict(one) for one in messages], opened, given)
            traceable = is_traceable(source)
        except Exception:  # it is told when the messages are rendered
            return None
        held = [{**one, "content": mark} for one, mark in zip(messages, marks.marks(len(messages)), strict=True)]
        found = marks.skeleton(lambda: _applied(self.tokenizer, held, opened, given)) if traceable else None
        text = None if found is None else found.text([one["content"] for one in messages])
        return found if text is None or text == plain else None

    def _encode(self, text: str, places: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """Return the ids of a text, and for each place in it (characters) the index of the first token that ends after it.

        A second bos token at the start is removed.
        """
        known = self.encoded.get(text)
        if known is not None:
            ids = known[0].tolist()
            at = np.searchsorted(known[1], places, side="right").tolist() if places else []
        elif self.tokenizer.is_fast:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, ends = list(found["input_ids"]), [end for _, end in found["offset_mapping"]]
            at = [next((index for index, end in enumerate(ends) if end > place), len(ids)) for place in places]
        else:  # no offsets: the tokens that the text up to the place shares with the whole text
            ids, at = self.tokenizer(text, add_special_tokens=False)["input_ids"], []
            for place in places:
                own = self.tokenizer(text[:place], add_special_tokens=False)["input_ids"]
                at.append(next((n for n, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b), len(own)))
        if self.tokenizer.bos_token_id is not None and ids[:2] == [self.tokenizer.bos_token_id] * 2:
            return ids[1:], [max(0, index - 1) for index in at]
        return ids, at


def extras_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a row that are passed to the chat template."""
    return {name: row[name] for name in EXTRAS if row.get(name)}


def _applied(tokenizer: Any, messages: Messages, opened: bool, given: Mapping[str, Any]) -> str:
    """Return the text of `tokenizer.apply_chat_template`, rendered by `data.templates` with its bounds if the tokenizer has a
    Jinja template and no renderer of its own."""
    if not _is_plain(tokenizer):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened, **given)
    more = {"tools": None, "documents": None} | dict(given)
    for name in EXTRAS[:2]:
        if not all(isinstance(one, Mapping) for one in more[name] or ()):
            raise DataError(f"{name!r} must be a list of objects, got {more[name]!r:.80}")
    variables_ = {**tokenizer.special_tokens_map, **more, "messages": messages, "add_generation_prompt": opened}
    return rendered(tokenizer.get_chat_template(tools=more["tools"]), **variables_)


def _is_plain(tokenizer: Any) -> bool:
    """Return whether the tokenizer renders conversations with its Jinja template alone."""
    return type(tokenizer).apply_chat_template.__module__.startswith("transformers.tokenization_utils")


def _blank(tokenizer: Any, ids: Sequence[int]) -> int:
    """Return the number of tokens at the end that are only white space."""
    return next((n for n, one in enumerate(reversed(ids)) if tokenizer.decode([one]).strip()), len(ids))


def _token(tokenizer: Any, token_id: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token_id))


def _source(tokenizer: Any) -> str:
    """Return the source of the chat template, or of all of them if there are several."""
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, Mapping) else str(template)


def _variables(tokenizer: Any) -> frozenset[str]:
    """Return the names that the chat template takes from outside. Raises ModelError if it is not valid Jinja."""
    source = _source(tokenizer)
    try:
        return variables(source)
    except Exception as error:  # Jinja raises many error types for an invalid template
        raise ModelError(
            f"the chat template cannot be used ({first_line(error)}); give another with --chat-template"
        ) from error


def _adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts a bos token before plain text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer(MARK)["input_ids"][:1] == [bos]


def chat_format(
    tokenizer: Any,
    template: str | None = None,
    *,
    skip_special_tokens: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Chat:
    """Return the conversation format of a tokenizer.

    `template`: None uses the tokenizer's template, "plain" sets `### Human / ### Assistant`, "none" joins prompt and
    completion without a template. Other values are a Jinja file or the template itself. `arguments` are passed to the
    template. Raises ModelError if the tokenizer has no template and none is given, if the template does not write the
    assistant's message, or if it does not use an argument.
    """
    name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{name}: the tokenizer has no end-of-sequence token, so no answer could ever end")
    raw = template == RAW or (template is None and tokenizer.chat_template in (JOINED, BOS + JOINED))
    if raw or template == "plain":
        template = (BOS if _adds_bos(tokenizer) else "") + (JOINED if raw else PLAIN)
    elif (path := template_file(template)) is not None:
        template = path.read_text(encoding="utf-8")
    if template is not None:
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise no_template(name)
    arguments = dict(arguments or {})
    for argument in arguments:
        if argument in ("messages", "add_generation_prompt"):
            raise ModelError(f"model.chat_template_kwargs: whet sets {argument!r} for each row itself; leave it out")
        if argument not in _variables(tokenizer):
            raise ModelError(
                f"model.chat_template_kwargs: the chat template of {name} does not use {argument!r}; leave it out"
            )
    probe = Chat(tokenizer, raw, (tokenizer.eos_token_id,), arguments=arguments)
    closed = probe._render([{"role": "user", "content": "question"}, {"role": "assistant", "content": MARK}])
    if MARK not in closed:
        raise ModelError(
            f"{name}: the chat template does not write the assistant's message; give another with --chat-template"
        )
    place = closed.rindex(MARK)
    opened = probe._render([{"role": "user", "content": "question"}], opened=True)
    leading = closed[len(opened) : place] if closed.startswith(opened) else ""
    ids, (first, after) = probe._encode(closed, [place, place + len(MARK)])
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    behind = ids[after:]
    white = next((n for n, one in enumerate(behind) if tokenizer.decode([one]).strip()), len(behind))
    ends = [one for one in behind[white : white + 1] if one in special]
    return Chat(
        tokenizer, raw, tuple(dict.fromkeys([*ends, tokenizer.eos_token_id])), tuple(behind), leading,
        not _token(tokenizer, ids[first]).startswith("▁"), skip_special_tokens,
        arguments,
    )  # fmt: skip
