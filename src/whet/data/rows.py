"""Rows of data files: read them, check each one, and convert them to records.

Field names follow common datasets: `text`, `prompt`, `completion`, `messages`, `chosen`, `rejected`, `responses` + `ranks`
or `scores`, `score`. An invalid row raises DataError with its file and line, the expected value and a fix, before any
model is loaded.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch

from whet.data.chat import Chat, extras_of
from whet.data.fields import (
    answer_of,
    field_of,
    finish_of,
    messages_of,
    number_of,
    numbers,
    one_form,
    table_of,
    text_of,
    with_messages,
)
from whet.data.forms import prompted, split_pair
from whet.data.types import Labeled, Pair, Prompt, Ranking, Row, Stepped, Unpaired
from whet.data.values import Located
from whet.errors import DataError

BLOCK = 512
"""Number of rows whose texts are tokenized at once."""


@dataclass(frozen=True)
class _Answer:
    """An answer of a row: its message, whether it ended, and the token ids that were sampled, if the row has them."""

    message: Mapping[str, Any]
    ended: bool = True
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Reader:
    """Convert located rows to records for one tokenizer.

    `max_tokens` is the maximum length of a sequence, and `advice` the advice in the error about longer ones. `too_long` is
    the treatment of longer sequences: "error", "drop" (skip the row) or "cut" (remove the end). `turns` is "all" or
    "last"; `separator` is the text between steps. With `closing`, answers keep what the chat template writes after their
    end token, as a reward model reads them.

    An answer is text. If its row also has the token ids that were sampled (`response_ids`, `completion_ids`, `chosen_ids`,
    `rejected_ids`) and its `prompt_ids`, if any, are those of this tokenizer and template, these ids are taken. An answer
    that was cut off (`finish`: "length") gets no end token.
    """

    chat: Chat
    max_tokens: int
    advice: str = "raise --data.max-tokens"
    too_long: str = "error"
    turns: str = "all"
    separator: str = "\n"
    closing: bool = False
    left_out: list[str] = field(default_factory=list, compare=False)
    """where the rows stand that were left out because they are too long"""
    tied: list[str] = field(default_factory=list, compare=False)
    """where the rankings stand that have ties alone and were read as pairs"""

    def block(self, reading: str, rows: Sequence[Located], first: int = 0) -> list[Any]:
        """Return the records of these rows, the result of the method `reading` for a part of a file, which may be empty. Their texts
        are tokenized at once. `first` is the number of the first of these rows."""
        self.chat.prepare(text for one in rows for text in self._expected(reading, one))
        try:
            if reading == "prompts":
                return self._prompts(rows, first)
            make: Callable[[Sequence[Located]], list] = getattr(self, f"_{reading}")
            return make(rows)
        finally:
            self.chat.encoded.clear()

    def stream(self, reading: str, rows: Iterable[Located]) -> Iterator[tuple[Sequence[Located], list[Any]]]:
        """Yield the rows of a source block by block, each with its records: the result of the method `reading` in parts. Only a block
        is kept in memory; for "unpaired", which combines distant rows, it is the source. Raises DataError if no record comes from
        the source."""
        if reading == "unpaired":
            whole = list(rows)
            yield whole, self.unpaired(whole)
            return
        self.tied.clear()
        number, empty, texts = 0, True, reading in ("texts", "demonstrations")
        rows = iter(rows)
        while block := list(islice(rows, BLOCK)):
            records = self.block(reading, block, number)
            number, empty = number + len(block), empty and not records
            texts = texts and (reading == "texts" or all(map(_is_text, block)))
            yield block, records
        if empty:
            raise DataError("no row is left: no text has two tokens") if texts else self.nothing()

    def nothing(self) -> DataError:
        """Return the error for a source from which no record comes."""
        why = f"all are longer than {self.max_tokens} tokens; {self.advice}"
        if self.tied:
            why = "every ranking has ties alone, and no pair comes from those"
        return DataError(f"no row is left: {why}")

    def _all(self, reading: str, rows: Sequence[Located]) -> list[Any]:
        """Return the records of all rows, block by block."""
        return [record for _, records in self.stream(reading, rows) for record in records]

    def _expected(self, reading: str, located: Located) -> Iterator[str]:
        """Yield the texts that are tokenized for a row, as far as they can be told without checking it."""
        row = located.row
        try:
            if reading == "texts" or _is_text(located):
                return
            if reading == "demonstrations" and row.get("messages") is not None:
                yield from self.chat.expected(messages_of(located, "messages"), extras_of(row))
                return
            located = (prompted if reading == "prompts" else split_pair)(with_messages(located))
            row, messages = located.row, messages_of(located, "prompt")
            if reading == "prompts":
                yield from self.chat.expected(messages, extras_of(row), opened=True)
                return
            steps = row.get("completions")
            answers = [row.get(name) for name in ("completion", "chosen", "rejected")] + list(
                row.get("responses") or ()
            )
            answers += [self.separator.join(steps)] if isinstance(steps, list) else []
            for one in answers:
                answer = one[0] if isinstance(one, list) and len(one) == 1 else {"role": "assistant", "content": one}
                if isinstance(answer, Mapping) and isinstance(answer.get("content"), str):
                    yield from self.chat.expected([*messages, answer], extras_of(row))
        except Exception:  # it is told when the row is read
            return

    def texts(self, rows: Sequence[Located]) -> list[Row]:
        """Read `text` rows: all tokens are trained, including the end token, and longer texts are cut into pieces.

        Each piece starts with the last token of the previous piece, so each token is predicted once.
        """
        return self._all("texts", rows)

    def _texts(self, rows: Sequence[Located]) -> list[Row]:
        out = []
        for ids in self.chat.text_ids([text_of(located, "text") for located in rows]):
            for start in range(0, len(ids) - 1, self.max_tokens - 1):
                piece = ids[start : start + self.max_tokens]
                out.append(Row(torch.tensor(piece), 1, torch.ones(len(piece) - 1, dtype=torch.bool)))
        return out

    def prompts(self, rows: Sequence[Located]) -> list[Prompt]:
        """Read `prompt` rows (a string or messages), or the prompts of conversations (see `whet.data.forms.prompted`). The other
        fields are passed to reward functions as columns; `tools`, `documents` and `chat_template_kwargs` also reach the chat
        template."""
        return self._all("prompts", rows)

    def _prompts(self, rows: Sequence[Located], first: int) -> list[Prompt]:
        out = []
        for number, given in enumerate(rows, first):
            located = prompted(with_messages(given))
            messages = self._checked(located, messages_of(located, "prompt"))
            ids = self._located(located, self.chat.prompt_ids, messages, extras_of(located.row))
            if len(ids) > self.max_tokens:
                if self.too_long == "drop":
                    self.left_out.append(located.where)
                    continue
                raise self._long(located, "the prompt", len(ids))
            out.append(Prompt(str(located.row.get("id", number)), tuple(ids), tuple(messages), located.row))
        return out

    def demonstrations(self, rows: Sequence[Located]) -> list[Row]:
        """Read `prompt` + `completion`, `messages`, or `text` rows, in any mixture, for SFT."""
        return self._all("demonstrations", rows)

    def _demonstrations(self, rows: Sequence[Located]) -> list[Row]:
        if all(map(_is_text, rows)):
            return self._texts(rows)
        out = []
        for located in rows:
            if _is_text(located):
                out.extend(self._texts([located]))
                continue
            if located.row.get("messages") is not None:
                messages, (ended,) = self._checked(located, messages_of(located, "messages")), finish_of(located, 1)
                extras = extras_of(located.row)
                made = self._located(
                    located, partial(self.chat.rows, messages, turns=self.turns, ended=ended, extras=extras)
                )
            else:
                prompt = self._checked(located, messages_of(located, "prompt"))
                made = [self._made(located, prompt, self._one(located))]
            out.extend(kept for row in made for kept in self._fit(located, row, "the conversation"))
        return out

    def pairs(self, rows: Sequence[Located]) -> list[Pair]:
        """Read `prompt`, `chosen`, `rejected` rows, or all untied pairs of rankings.

        `probability` (of the first answer being better) and `margin` are optional. `responses` rows have them as K x K
        tables, in which row i, column j is about answer i against answer j; with a table of probabilities each pair counts,
        and no `ranks` are needed. Without `prompt`, chosen and rejected are whole conversations that differ only in
        their last message (see `whet.data.forms.split_pair`).
        """
        return self._all("pairs", rows)

    def _pairs(self, rows: Sequence[Located]) -> list[Pair]:
        out: list[Pair] = []
        for located in rows:
            if "responses" in located.row:
                out.extend(self._pairs_of(located))
                continue
            messages, answers = self._two(located)
            sides = [self._answer_row(located, messages, answer) for answer in answers]
            if sides[0] is None or sides[1] is None:
                continue
            probability = number_of(located, "probability", located.row.get("probability", 1.0))
            if not 0 <= probability <= 1:
                raise DataError(f"{located.where}: field 'probability' must be in [0, 1], got {probability}")
            margin = number_of(located, "margin", located.row.get("margin", 0.0))
            out.append(_ordered(sides[0], sides[1], probability, margin))
        return out

    def _pairs_of(self, located: Located) -> list[Pair]:
        """Return the pairs of a `responses` row."""
        messages, answers = self._answers(located)
        count = len(answers)
        probability, margin = table_of(located, "probability", count), table_of(located, "margin", count)
        if probability is None:
            ranks = self._ranks(located, count)
        else:
            for i in range(count):
                for j in range(i):
                    there, back = probability[i][j], probability[j][i]
                    if not (0 <= there <= 1 and abs(there + back - 1) <= 1e-6):
                        raise DataError(
                            f"{located.where}: field 'probability' must have numbers in [0, 1], and [{i}][{j}] and [{j}][{i}] "
                            f"must sum to 1, got {there} and {back}"
                        )
            ranks = list(range(count))  # each pair counts, the first answer as the chosen one
        order = sorted(range(count), key=lambda index: ranks[index])
        picked = [(i, j) for at, i in enumerate(order) for j in order[at + 1 :] if ranks[i] < ranks[j]]
        rows = [self._answer_row(located, messages, answer) for answer in answers]
        pairs = []
        for i, j in picked:
            chosen, rejected = rows[i], rows[j]
            if chosen is not None and rejected is not None:
                likely = 1.0 if probability is None else probability[i][j]
                pairs.append(_ordered(chosen, rejected, likely, 0.0 if margin is None else margin[i][j]))
        if not picked and not self.tied:
            self.tied.append(located.where)
        return pairs

    def rankings(self, rows: Sequence[Located]) -> list[Ranking]:
        """Read `prompt`, `responses` and `ranks` (1 is best) or `scores` (higher is better) rows, or chosen / rejected pairs."""
        return self._all("rankings", rows)

    def _rankings(self, rows: Sequence[Located]) -> list[Ranking]:
        out = []
        for located in rows:
            if "chosen" in located.row:
                messages, answers = self._two(located)
                ranks = [1, 2]
            else:
                messages, answers = self._answers(located)
                ranks = self._ranks(located, len(answers))
            sides = [self._answer_row(located, messages, one) for one in answers]
            whole = tuple(side for side in sides if side is not None)
            if len(whole) == len(sides):
                out.append(Ranking(whole, tuple(ranks)))
        return out

    def labeled(self, rows: Sequence[Located]) -> list[Labeled]:
        """Read `prompt`, `completion`, `score` rows."""
        return self._all("labeled", rows)

    def _labeled(self, rows: Sequence[Located]) -> list[Labeled]:
        out = []
        for located in rows:
            score = number_of(located, "score", field_of(located, "score"))
            messages = self._checked(located, messages_of(located, "prompt"))
            row = self._answer_row(located, messages, self._one(located))
            if row is not None:
                out.append(Labeled(row, score))
        return out

    def unpaired(self, rows: Sequence[Located]) -> list[Unpaired]:
        """Read `prompt`, `completion`, `label` (true is good) rows; a `chosen` / `rejected` row is a good and a bad answer.

        Each answer is combined with a mismatched answer, that of the nearest earlier row with another prompt (at the start
        of the file: of the last rows). KTO estimates its KL from the mismatched answers.
        """
        told: list[tuple[Located, list, _Answer, bool]] = []
        for located in rows:
            if "chosen" in located.row:
                messages, answers = self._two(located)
                told += [(located, messages, answers[0], True), (located, messages, answers[1], False)]
                continue
            good = field_of(located, "label")
            if isinstance(good, str) and good.lower() in ("true", "false"):
                good = good.lower() == "true"
            if not isinstance(good, bool) and good not in (0, 1):
                raise DataError(f"{located.where}: field 'label' must be true or false, got {good!r}")
            messages = self._checked(located, messages_of(located, "prompt"))
            told.append((located, messages, self._one(located), bool(good)))
        out = []
        for number, (located, messages, answer, good) in enumerate(told):
            if number % BLOCK == 0:
                self.chat.prepare(self._expected_unpaired(told, number))
            others = (told[(number - back) % len(told)] for back in range(1, len(told)))
            other = next((one for one in others if one[1] != messages), None)
            if other is None:
                raise DataError(
                    f"{located.where}: every row has the same prompt; answers of other prompts are needed too"
                )
            row, wrong = (self._answer_row(located, messages, one) for one in (answer, other[2]))
            if row is not None and wrong is not None:
                out.append(Unpaired(row, wrong, good))
        self.chat.encoded.clear()
        if not out:
            raise self.nothing()
        return out

    def _expected_unpaired(self, told: Sequence[tuple[Located, list, _Answer, bool]], first: int) -> Iterator[str]:
        """Yield the texts that are tokenized for the answers from `first` on, as far as they can be told."""
        for number in range(first, min(first + BLOCK, len(told))):
            located, messages, answer, _ = told[number]
            with suppress(Exception):  # it is told when the row is read
                for one in (answer, told[number - 1][2]):
                    yield from self.chat.expected([*messages, one.message], extras_of(located.row))

    def steps(self, rows: Sequence[Located]) -> list[Stepped]:
        """Read `prompt`, `completions` (the steps, in order) and `labels` (one in [0, 1] per step) rows.

        The steps are joined by the separator. A step ends with the token that contains the separator; the last step ends
        with the answer.
        """
        return self._all("steps", rows)

    def _steps(self, rows: Sequence[Located]) -> list[Stepped]:
        out = []
        for located in rows:
            steps = field_of(located, "completions")
            if not isinstance(steps, list) or not steps or not all(isinstance(one, str) and one for one in steps):
                raise DataError(f"{located.where}: field 'completions' must be a list of steps, got {steps!r:.80}")
            for number, one in enumerate(steps):
                if self.separator in one:
                    raise DataError(
                        f"{located.where}: field 'completions', step {number} has the separator {self.separator!r} in it; "
                        "name another with --data.separator"
                    )
            given = field_of(located, "labels")
            labels = (
                [float(one) if isinstance(one, bool) else one for one in given] if isinstance(given, list) else given
            )
            labels = numbers(Located({**located.row, "labels": labels}, located.where), "labels", len(steps))
            if not all(0 <= label <= 1 for label in labels):
                raise DataError(f"{located.where}: field 'labels' must be in [0, 1], got {labels}")
            prompt = self._checked(located, messages_of(located, "prompt"))
            (ended,) = finish_of(located, 1)
            answer = _Answer({"role": "assistant", "content": self.separator.join(steps)}, ended)
            row = self._made(located, prompt, answer, closing=False)
            ends = torch.tensor([self.chat.ends_step(token, self.separator) for token in row.ids[row.start :].tolist()])
            ends[-1] = True
            if int(ends.sum()) != len(steps):
                raise DataError(
                    f"{located.where}: {len(steps)} steps, but {int(ends.sum())} tokens end one; the tokenizer does not keep "
                    f"the separator {self.separator!r} apart, name another with --data.separator"
                )
            values = torch.zeros(row.response)
            values[ends] = torch.tensor(labels)
            for kept in self._fit(located, row, "the prompt with its answer"):
                if bool(ends[: kept.response].any()):  # a cut row keeps its complete steps
                    out.append(Stepped(kept, values[: kept.response], ends[: kept.response]))
        return out

    def _two(self, located: Located) -> tuple[list[dict[str, Any]], list[_Answer]]:
        """Return the prompt and the two answers of a pair."""
        one_form(located, "chosen", "responses")
        located = split_pair(with_messages(located))
        messages = messages_of(located, "prompt")
        answers = [answer_of(located, "chosen"), answer_of(located, "rejected")]
        self._checked(located, messages)
        ids = [located.row.get(f"{name}_ids") for name in ("chosen", "rejected")]
        return messages, self._with_ids(located, messages, answers, ids, ("chosen_ids", "rejected_ids"))

    def _answers(self, located: Located) -> tuple[list[dict[str, Any]], list[_Answer]]:
        """Return the prompt and the K answers of a `responses` row."""
        one_form(located, "responses", "chosen")
        messages = self._checked(located, messages_of(located, "prompt"))
        responses = field_of(located, "responses")
        if not isinstance(responses, list) or len(responses) < 2:
            raise DataError(
                f"{located.where}: field 'responses' must be a list of at least two answers, got {responses!r:.80}"
            )
        for number, answer in enumerate(responses):
            if not isinstance(answer, str):  # an empty answer is valid: the model stopped at once
                raise DataError(
                    f"{located.where}: field 'responses', answer {number}: expected a string, got {answer!r:.80}"
                )
        ids = located.row.get("response_ids") or [None] * len(responses)
        if not isinstance(ids, list) or len(ids) != len(responses):
            raise DataError(
                f"{located.where}: field 'response_ids' must have a list of token ids for each of {len(responses)} answers"
            )
        answers = [{"role": "assistant", "content": text} for text in responses]
        names = [f"response_ids[{number}]" for number in range(len(ids))]
        return messages, self._with_ids(located, messages, answers, ids, names)

    def _one(self, located: Located) -> _Answer:
        """Return the answer of a `completion` row."""
        one_form(located, "completion", "responses")
        ids = [located.row.get("completion_ids")]
        messages = messages_of(located, "prompt")
        return self._with_ids(located, messages, [answer_of(located, "completion")], ids, ["completion_ids"])[0]

    def _with_ids(
        self,
        located: Located,
        messages: Sequence[Mapping[str, Any]],
        answers: Sequence[Mapping[str, Any]],
        ids: Sequence[Any],
        names: Sequence[str],
    ) -> list[_Answer]:
        """Return the answers with their ends and sampled ids. Ids of another tokenizer or template are left out."""
        ended = finish_of(located, len(answers))
        known, own = located.row.get("prompt_ids"), True
        if known is not None and any(one is not None for one in ids):
            own = list(known) == self._located(located, self.chat.prompt_ids, messages, extras_of(located.row))
        out = []
        for answer, end, given, name in zip(answers, ended, ids, names, strict=True):
            if given is None or not own:
                out.append(_Answer(answer, end))
                continue
            size = len(self.chat.tokenizer)
            if not isinstance(given, list) or not given or not all(type(i) is int and 0 <= i < size for i in given):
                raise DataError(
                    f"{located.where}: field {name!r} must be a list of token ids below {size}, got {given!r:.80}"
                )
            if not self.chat.is_text_of(given, answer["content"]):
                raise DataError(
                    f"{located.where}: field {name!r} has the ids of {self.chat.text(given)!r:.80}, but the text is "
                    f"{answer['content']!r:.80}; remove the ids if the text was edited"
                )
            out.append(_Answer(answer, end, tuple(given)))
        return out

    def _ranks(self, located: Located, count: int) -> list[int]:
        name = "ranks" if located.row.get("ranks") is not None else "scores"
        values = numbers(located, name, count)
        return ranks_of(values if name == "scores" else [-value for value in values])

    def _checked(self, located: Located, messages: list[Any]) -> list[Any]:
        self._located(located, self.chat.check, messages, extras_of(located.row))
        return messages

    def _made(
        self, located: Located, messages: Sequence[Mapping[str, Any]], answer: _Answer, *, closing: bool | None = None
    ) -> Row:
        """Return the row of a prompt and its answer."""
        extras, closing = extras_of(located.row), self.closing if closing is None else closing
        if answer.ids is not None:
            prompt = self._located(located, self.chat.prompt_ids, messages, extras)
            whole = not answer.ended or answer.ids[-1] in self.chat.end_ids
            ids = answer.ids if whole else (*answer.ids, self.chat.end_ids[0])
            return self.chat.sampled_row(prompt, ids, closing=closing)
        full = [*messages, answer.message]
        if answer.message.keys() - {"role", "content"}:
            self._checked(located, full)
        return self._located(located, partial(self.chat.row, full, ended=answer.ended, closing=closing, extras=extras))

    def _answer_row(self, located: Located, messages: Sequence[Mapping[str, Any]], answer: _Answer) -> Row | None:
        fitted = self._fit(located, self._made(located, messages, answer), "the prompt with its answer")
        return fitted[0] if fitted else None

    def _fit(self, located: Located, row: Row, what: str) -> list[Row]:
        if row.length <= self.max_tokens:
            return [row]
        if self.too_long == "error":
            raise self._long(located, what, row.length)
        if self.too_long == "drop" or row.start >= self.max_tokens:
            self.left_out.append(located.where)
            return []
        mask = row.mask[: self.max_tokens - row.start]
        return [Row(row.ids[: self.max_tokens], row.start, mask)] if bool(mask.any()) else []

    def _long(self, located: Located, what: str, length: int) -> DataError:
        return DataError(
            f"{located.where}: {what} has {length} tokens, the limit is {self.max_tokens}; {self.advice}, "
            "or leave such rows out with --data.too-long drop"
        )

    def _located(self, located: Located, make: Callable[..., Any], *given: Any) -> Any:
        try:
            return make(*given)
        except DataError as error:
            raise DataError(f"{located.where}: {error}") from error


def _is_text(located: Located) -> bool:
    """Return whether a row has a plain text and no conversation."""
    return "text" in located.row and "messages" not in located.row and "prompt" not in located.row


def _ordered(chosen: Row, rejected: Row, probability: float, margin: float) -> Pair:
    """Return the pair with the more probable answer as the chosen one."""
    if probability < 0.5:
        return Pair(rejected, chosen, 1 - probability, -margin)
    return Pair(chosen, rejected, probability, margin)


def ranks_of(scores: Sequence[float]) -> list[int]:
    """Return the ranks of scores, 1 for the highest; equal scores share a rank.

    >>> ranks_of([0.5, 2.0, 0.5])
    [2, 1, 2]
    """
    return [1 + sum(other > score for other in scores) for score in scores]
