"""Rows of data files: read them, check each one, and convert them to records.

Field names follow common datasets: `text`, `prompt`, `completion`, `messages`, `chosen`, `rejected`, `responses` + `ranks`
or `scores`, `score`. An invalid row raises DataError with its file and line, the expected value and a fix, before any
model is loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from whet.data.chat import Chat
from whet.data.read import Located
from whet.data.types import Labeled, Pair, Prompt, Ranking, Row, Stepped, Unpaired
from whet.errors import DataError

LARGEST = torch.finfo(torch.float32).max
"""Largest number of a field: losses are computed in float32."""


def _text(located: Located, name: str) -> str:
    value = _field(located, name)
    if not isinstance(value, str):
        raise DataError(f"{located.where}: field {name!r} must be a string, got {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{located.where}: field {name!r} is empty")
    return value


def _field(located: Located, name: str) -> Any:
    if located.row.get(name) is None:
        have = ", ".join(sorted(key for key, value in located.row.items() if value is not None)) or "nothing"
        raise DataError(f"{located.where}: field {name!r} is missing (the row has {have})")
    return located.row[name]


def _number(located: Located, name: str, value: Any) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:  # also NaN
        large = f"; the largest is {LARGEST:.2g}" if isinstance(value, (int, float)) else ""
        raise DataError(f"{located.where}: field {name!r} must be a finite number, got {value!r:.40}{large}")
    return float(value)


def numbers(located: Located, name: str, count: int) -> list[float]:
    """Return the field as a list of `count` finite numbers, one per answer. Raises DataError for anything else."""
    values = _field(located, name)
    if not isinstance(values, list) or len(values) != count:
        got = len(values) if isinstance(values, list) else repr(values)
        raise DataError(f"{located.where}: field {name!r} must have one number per answer: {count} answers, got {got}")
    return [_number(located, name, value) for value in values]


def _messages(located: Located, name: str) -> list[dict[str, str]]:
    """Return the field as a list of messages; a string is one user message."""
    value = _field(located, name)
    if isinstance(value, str):
        return [{"role": "user", "content": _text(located, name)}]
    if not isinstance(value, list) or not value:
        raise DataError(f"{located.where}: field {name!r} must be a string or a list of messages, got {value!r:.80}")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise DataError(
                f"{located.where}: field {name!r}, message {number}: expected "
                f'{{"role": ..., "content": "..."}}, got {message!r:.80}'
            )
        if message["role"] not in ("system", "user", "assistant", "tool"):
            raise DataError(
                f"{located.where}: field {name!r}, message {number}: role {message['role']!r} is none of "
                "system, user, assistant, tool"
            )
        if not message["content"].strip():
            raise DataError(f"{located.where}: field {name!r}, message {number}: the content is empty")
    return value


def _ended(located: Located, count: int) -> list[bool]:
    """Return which answers are complete: the field `finish` of sampled rows is "length" for answers that were cut off."""
    finish = located.row.get("finish")
    if finish is None:
        return [True] * count
    if not isinstance(finish, list) or len(finish) != count:
        raise DataError(f"{located.where}: field 'finish' must have one entry per answer ({count}), got {finish!r:.80}")
    return [one != "length" for one in finish]


def _answer(located: Located, name: str) -> str:
    """Return the field as one answer: a string, or a list with one assistant message."""
    value = _field(located, name)
    if isinstance(value, list):
        messages = _messages(located, name)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise DataError(
                f"{located.where}: field {name!r} must be one assistant message, got {len(messages)} messages"
            )
        return messages[0]["content"]
    return _text(located, name)


@dataclass(frozen=True)
class Reader:
    """Convert located rows to records for one tokenizer.

    `max_tokens` is the maximum length of a sequence, and `advice` the advice in the error about longer ones. `too_long` is
    the treatment of longer sequences: "error", "drop" (skip the row) or "cut" (remove the end). `turns` is "all" or
    "last"; `separator` is the text between steps.
    """

    chat: Chat
    max_tokens: int
    advice: str = "raise --data.max-tokens"
    too_long: str = "error"
    turns: str = "all"
    separator: str = "\n"

    def texts(self, rows: Sequence[Located]) -> list[Row]:
        """Read `text` rows: all tokens are trained, including the end token, and longer texts are cut into pieces.

        Each piece starts with the last token of the previous piece, so each token is predicted once.
        """
        tokenizer, out = self.chat.tokenizer, []
        for ids in tokenizer([_text(located, "text") for located in rows])["input_ids"]:
            ids = ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
            for start in range(0, len(ids) - 1, self.max_tokens - 1):
                piece = ids[start : start + self.max_tokens]
                out.append(Row(torch.tensor(piece), 1, torch.ones(len(piece) - 1, dtype=torch.bool)))
        return self._some(out, "no text has two tokens")

    def prompts(self, rows: Sequence[Located]) -> list[Prompt]:
        """Read `prompt` rows (a string or messages). The other fields are passed to reward functions as columns."""
        out = []
        for number, located in enumerate(rows):
            messages = _messages(located, "prompt")
            ids = self._located(located, lambda messages=messages: self.chat.prompt_ids(messages))
            if len(ids) > self.max_tokens:
                if self.too_long == "drop":
                    continue
                raise self._long(located, "the prompt", len(ids))
            out.append(Prompt(str(located.row.get("id", number)), tuple(ids), tuple(messages), located.row))
        return self._some(out)

    def demonstrations(self, rows: Sequence[Located]) -> list[Row]:
        """Read `prompt` + `completion`, `messages`, or `text` rows, in any mixture, for SFT."""
        if all("text" in located.row and located.row.keys().isdisjoint(("messages", "prompt")) for located in rows):
            return self.texts(rows)
        out = []
        for located in rows:
            if "text" in located.row and "messages" not in located.row and "prompt" not in located.row:
                out.extend(self.texts([located]))
                continue
            if located.row.get("messages") is not None:
                messages = _messages(located, "messages")
            else:
                messages = [
                    *_messages(located, "prompt"),
                    {"role": "assistant", "content": _answer(located, "completion")},
                ]
            row = self._located(located, lambda messages=messages: self.chat.row(messages, turns=self.turns))
            out.extend(self._fit(located, row, "the conversation"))
        return self._some(out)

    def pairs(self, rows: Sequence[Located]) -> list[Pair]:
        """Read `prompt`, `chosen`, `rejected` rows, or all untied pairs of rankings. `probability` and `margin` are optional.

        Without `prompt`, chosen and rejected are whole conversations that differ only in their last message.
        """
        out: list[Pair] = []
        tied = False
        for located in rows:
            if "responses" in located.row:
                for ranking in self._rankings([located]):
                    tied = tied or len(set(ranking.ranks)) == 1
                    order = sorted(range(len(ranking.rows)), key=lambda index: ranking.ranks[index])
                    for i, better in enumerate(order):
                        for worse in order[i + 1 :]:
                            if ranking.ranks[better] < ranking.ranks[worse]:
                                out.append(Pair(ranking.rows[better], ranking.rows[worse]))
                continue
            messages, answers = self._two(located)
            sides = [self._answer_row(located, messages, answer) for answer in answers]
            if sides[0] is None or sides[1] is None:
                continue
            probability = _number(located, "probability", located.row.get("probability", 1.0))
            if not 0 <= probability <= 1:
                raise DataError(f"{located.where}: field 'probability' must be in [0, 1], got {probability}")
            out.append(
                Pair(sides[0], sides[1], probability, _number(located, "margin", located.row.get("margin", 0.0)))
            )
        return self._some(out, "every ranking has ties alone, and no pair comes from those" if tied else "")

    def rankings(self, rows: Sequence[Located]) -> list[Ranking]:
        """Read `prompt`, `responses` and `ranks` (1 is best) or `scores` (higher is better) rows, or chosen / rejected pairs."""
        return self._some(self._rankings(rows))

    def _rankings(self, rows: Sequence[Located]) -> list[Ranking]:
        out = []
        for located in rows:
            if "chosen" in located.row:
                messages, responses = self._two(located)
                ranks = [1, 2]
            else:
                messages = _messages(located, "prompt")
                responses, ranks = self._ranked(located)
            ended = _ended(located, len(responses))
            sides = [self._answer_row(located, messages, *one) for one in zip(responses, ended, strict=True)]
            whole = tuple(side for side in sides if side is not None)
            if len(whole) == len(sides):
                out.append(Ranking(whole, tuple(ranks)))
        return out

    def labeled(self, rows: Sequence[Located]) -> list[Labeled]:
        """Read `prompt`, `completion`, `score` rows."""
        out = []
        for located in rows:
            score = _number(located, "score", _field(located, "score"))
            row = self._answer_row(located, _messages(located, "prompt"), _answer(located, "completion"))
            if row is not None:
                out.append(Labeled(row, score))
        return self._some(out)

    def unpaired(self, rows: Sequence[Located]) -> list[Unpaired]:
        """Read `prompt`, `completion`, `label` (true is good) rows; a `chosen` / `rejected` row is a good and a bad answer.

        Each answer is combined with a mismatched answer, that of the nearest earlier row with another prompt (at the start
        of the file: of the last rows). KTO estimates its KL from the mismatched answers.
        """
        told: list[tuple[Located, list, str, bool]] = []
        for located in rows:
            if "chosen" in located.row:
                messages, answers = self._two(located)
                told += [(located, messages, answers[0], True), (located, messages, answers[1], False)]
                continue
            good = _field(located, "label")
            if isinstance(good, str) and good.lower() in ("true", "false"):
                good = good.lower() == "true"
            if not isinstance(good, bool) and good not in (0, 1):
                raise DataError(f"{located.where}: field 'label' must be true or false, got {good!r}")
            told.append((located, _messages(located, "prompt"), _answer(located, "completion"), bool(good)))
        out = []
        for number, (located, messages, answer, good) in enumerate(told):
            others = (told[(number - back) % len(told)] for back in range(1, len(told)))
            other = next((one for one in others if one[1] != messages), None)
            if other is None:
                raise DataError(
                    f"{located.where}: every row has the same prompt; answers of other prompts are needed too"
                )
            row, wrong = (self._answer_row(located, messages, text) for text in (answer, other[2]))
            if row is not None and wrong is not None:
                out.append(Unpaired(row, wrong, good))
        return self._some(out)

    def steps(self, rows: Sequence[Located]) -> list[Stepped]:
        """Read `prompt`, `completions` (the steps, in order) and `labels` (one in [0, 1] per step) rows.

        The steps are joined by the separator. A step ends with the token that contains the separator; the last step ends
        with the answer.
        """
        out = []
        for located in rows:
            steps = _field(located, "completions")
            if not isinstance(steps, list) or not steps or not all(isinstance(one, str) and one for one in steps):
                raise DataError(f"{located.where}: field 'completions' must be a list of steps, got {steps!r:.80}")
            for number, one in enumerate(steps):
                if self.separator in one:
                    raise DataError(
                        f"{located.where}: field 'completions', step {number} has the separator {self.separator!r} in it; "
                        "name another with --data.separator"
                    )
            given = _field(located, "labels")
            labels = (
                [float(one) if isinstance(one, bool) else one for one in given] if isinstance(given, list) else given
            )
            labels = numbers(Located({**located.row, "labels": labels}, located.where), "labels", len(steps))
            if not all(0 <= label <= 1 for label in labels):
                raise DataError(f"{located.where}: field 'labels' must be in [0, 1], got {labels}")
            full = [*_messages(located, "prompt"), {"role": "assistant", "content": self.separator.join(steps)}]
            row = self._located(located, lambda full=full: self.chat.row(full, turns="last"))
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
        return self._some(out)

    def _two(self, located: Located) -> tuple[list[dict[str, str]], list[str]]:
        if located.row.get("prompt") is not None:
            return _messages(located, "prompt"), [_answer(located, "chosen"), _answer(located, "rejected")]
        if isinstance(_field(located, "chosen"), str):
            raise DataError(
                f"{located.where}: field 'prompt' is missing; without it chosen and rejected must be lists of messages"
            )
        chosen, rejected = _messages(located, "chosen"), _messages(located, "rejected")
        if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
            raise DataError(f"{located.where}: chosen and rejected must share every message but the last")
        for name, messages in (("chosen", chosen), ("rejected", rejected)):
            if messages[-1]["role"] != "assistant":
                raise DataError(f"{located.where}: field {name!r} must end with an assistant message")
        return chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]]

    def _ranked(self, located: Located) -> tuple[list[str], list[int]]:
        responses = _field(located, "responses")
        if not isinstance(responses, list) or len(responses) < 2:
            raise DataError(
                f"{located.where}: field 'responses' must be a list of at least two answers, got {responses!r:.80}"
            )
        for number, answer in enumerate(responses):
            if not isinstance(answer, str):  # an empty answer is valid: the model stopped at once
                raise DataError(
                    f"{located.where}: field 'responses', answer {number}: expected a string, got {answer!r:.80}"
                )
        name = "ranks" if located.row.get("ranks") is not None else "scores"
        values = numbers(located, name, len(responses))
        return responses, ranks_of(values if name == "scores" else [-value for value in values])

    def _answer_row(
        self, located: Located, messages: Sequence[Mapping[str, str]], answer: str, ended: bool = True
    ) -> Row | None:
        full = [*messages, {"role": "assistant", "content": answer}]
        row = self._located(located, lambda: self.chat.row(full, turns="last"))
        row = row if ended or row.response == 1 else row.without_end()
        fitted = self._fit(located, row, "the prompt with its answer")
        return fitted[0] if fitted else None

    def _fit(self, located: Located, row: Row, what: str) -> list[Row]:
        if row.length <= self.max_tokens:
            return [row]
        if self.too_long == "error":
            raise self._long(located, what, row.length)
        if self.too_long == "drop" or row.start >= self.max_tokens:
            return []
        mask = row.mask[: self.max_tokens - row.start]
        return [Row(row.ids[: self.max_tokens], row.start, mask)] if bool(mask.any()) else []

    def _long(self, located: Located, what: str, length: int) -> DataError:
        return DataError(
            f"{located.where}: {what} has {length} tokens, the limit is {self.max_tokens}; {self.advice}, "
            "or leave such rows out with --data.too-long drop"
        )

    def _some(self, records: list, why: str = "") -> list:
        if not records:
            why = why or f"all are longer than {self.max_tokens} tokens; {self.advice}"
            raise DataError(f"no row is left: {why}")
        return records

    def _located(self, located: Located, make: Any) -> Any:
        try:
            return make()
        except DataError as error:
            raise DataError(f"{located.where}: {error}") from error


def ranks_of(scores: Sequence[float]) -> list[int]:
    """Return the ranks of scores, 1 for the highest; equal scores share a rank.

    >>> ranks_of([0.5, 2.0, 0.5])
    [2, 1, 2]
    """
    return [1 + sum(other > score for other in scores) for score in scores]
