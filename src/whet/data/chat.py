"""Conversion of messages to token ids, with a mask of the trained tokens.

The tokenizer's chat template renders the text, which is split at the start and end of assistant turns *before* it is
tokenized. The ids of a prompt are therefore the same with an answer after it (training) and without (sampling).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from whet.data.types import Row
from whet.errors import DataError, ModelError

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

JOINED = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""Chat template saved in the tokenizer for this format, so that a saved model is used with the format of its training."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its conversation format. Each of `end_ids` ends an answer; training data uses the first."""

    tokenizer: Any
    raw: bool
    end_ids: tuple[int, ...]

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids that a generator continues: the messages and, with a template, the start of the assistant's turn."""
        if self.raw:
            return self._ids("".join(message["content"] for message in messages), start=True)
        return self._ids(self._render(messages, opened=True))

    def answer_ids(self, text: str) -> list[int]:
        """Return the ids of an answer, including its end token."""
        return [*self._ids(text), self.end_ids[0]]

    def row(self, messages: Sequence[Mapping[str, str]], *, turns: str = "all") -> Row:
        """Convert a conversation to a row; only the assistant turns and their end tokens are trained.

        `turns="last"` trains only the last turn. Raises DataError if there is no assistant turn after a user message, or
        if the template changes earlier turns when later ones follow (then only the last turn can be trained).
        """
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers or answers[0] == 0:
            raise DataError("a conversation needs an assistant message after a user message")
        if turns == "last":
            answers = answers[-1:]
        if self.raw and len(answers) > 1:
            raise DataError('several assistant turns need a chat template; "none" joins one prompt and one answer')
        ids: list[int] = []
        trained: list[bool] = []
        done = ""
        for number in answers:
            if self.raw:
                prompt, answer = self.prompt_ids(messages[:number]), self.answer_ids(messages[number]["content"])
                ids, trained = prompt + answer, [False] * len(prompt) + [True] * len(answer)
                break
            opened = self._render(messages[:number], opened=True)
            closed = self._render(messages[: number + 1], opened=False)
            if not opened.startswith(done) or not closed.startswith(opened):
                raise DataError(
                    "the chat template writes earlier turns differently once later ones follow, so they cannot all be "
                    "trained in one row; train the last turn only with --data.turns last"
                )
            between, answer = self._ids(opened[len(done) :]), self._ids(closed[len(opened) :])
            end = next((place for place, token in enumerate(answer) if token in self.end_ids), None)
            if end is None:
                answer, end = [*answer, self.end_ids[0]], len(answer)
            ids += between + answer
            trained += [False] * len(between) + [place <= end for place in range(len(answer))]
            done = closed
        last = max(place for place, on in enumerate(trained) if on) + 1
        start = trained.index(True)
        return Row(torch.tensor(ids[:last]), start, torch.tensor(trained[start:last]))

    def ends_step(self, token: int, separator: str) -> bool:
        """Return whether a step ends with this token: its text contains the separator."""
        return separator in self.tokenizer.decode([token])

    def text(self, ids: Sequence[int]) -> str:
        """Decode an answer, without its end token and other special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _render(self, messages: Sequence[Mapping[str, str]], *, opened: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=opened
            )
        except Exception as error:  # a template may raise any error (raise_exception of Jinja)
            raise DataError(f"the chat template refuses these messages: {error}") from error

    def _ids(self, text: str, *, start: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=start)["input_ids"]


def chat_format(tokenizer: Any, template: str | None = None) -> Chat:
    """Return the conversation format of a tokenizer.

    `template`: None uses the tokenizer's template, "plain" sets `### Human / ### Assistant`, "none" joins prompt and
    completion without a template. Other values are a Jinja file or the template itself. Raises ModelError if the
    tokenizer has no template and none is given.
    """
    name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{name}: the tokenizer has no end-of-sequence token, so no answer could ever end")
    if template == RAW or (template is None and tokenizer.chat_template == JOINED):
        tokenizer.chat_template = JOINED
        return Chat(tokenizer, True, (tokenizer.eos_token_id,))
    if template is not None:
        if template == "plain":
            template = PLAIN
        elif "{" not in template:
            path = Path(template)
            if not path.is_file():
                raise ModelError(f'chat template {template!r}: expected "plain", "none" or an existing Jinja file')
            template = path.read_text(encoding="utf-8")
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise ModelError(
            f"{name}: the tokenizer has no chat template; give one with --chat-template plain (### Human / ### Assistant), "
            'a Jinja file, or "none" to join prompt and completion as they are'
        )
    mark = "answer"
    probe = Chat(tokenizer, False, (tokenizer.eos_token_id,))
    question = {"role": "user", "content": "question"}
    closed = probe._render([question, {"role": "assistant", "content": mark}], opened=False)
    if mark not in closed:
        raise ModelError(
            f"{name}: the chat template does not write the assistant's message; give another with --chat-template"
        )
    tail = probe._ids(closed[closed.rindex(mark) + len(mark) :])
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ends = [token for token in tail[:1] if token in special]
    return Chat(tokenizer, False, tuple(dict.fromkeys([*ends, tokenizer.eos_token_id])))
