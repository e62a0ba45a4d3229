"""Forms of rows that other tools write: other column names, ShareGPT, Alpaca, and transcripts without a prompt.

`Forms` gives each row the columns of whet. A pair without a prompt is split when it is read (`split_pair`), and so is
a conversation of which only the prompt is wanted (`prompted`).
"""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from whet.data.values import Located
from whet.errors import DataError, RecipeError

FIELDS = (
    "prompt", "completion", "messages", "text", "chosen", "rejected", "responses", "ranks", "scores", "score", "label", "labels",
    "completions", "finish", "probability", "margin", "prompt_ids", "response_ids", "completion_ids", "chosen_ids",
    "rejected_ids", "tools", "documents", "chat_template_kwargs", "id", "conversations", "instruction", "input", "output",
    "system", "history",
)  # fmt: skip
"""The columns that whet reads: names that `columns` can give to a column of a file."""
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
"""Who speaks in a ShareGPT message, and the role of the chat template. A "call" is an assistant's call of a tool."""
ANSWERS = ("chosen", "responses", "completion", "completions")
"""Columns with answers: beside one of them a conversation is the prompt."""
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
"""The start of a turn in a transcript of the Anthropic HH data (Bai et al. 2022)."""


class Forms:
    """The conversion of the rows of one source to the columns of whet: `renamed` for each row, `check`, then `converted` for each.

    `columns` renames: whet's name -> the column of the source. ShareGPT rows (`conversations`) get `messages`, or `prompt`
    beside answers. Alpaca rows (`instruction`, `input`, `output`, `system`, `history`) get `prompt` and `completion`. Other
    rows are unchanged. Raises RecipeError for an unknown name in `columns`.

    >>> Forms({}, "a.jsonl").converted(Located({"instruction": "Add.", "input": "1 + 2", "output": "3"}, "a.jsonl:1")).row
    {'prompt': 'Add.\\n1 + 2', 'completion': '3'}
    """

    def __init__(self, columns: Mapping[str, str], source: str) -> None:
        check_names(columns)
        self.columns, self.source = columns, source
        self._gone = {*columns, *columns.values()}
        self._have: dict[str, None] = {}

    def renamed(self, located: Located) -> Located:
        """Return a row with the renamed columns."""
        if not self.columns:
            return located
        row = located.row
        self._have.update(dict.fromkeys(row))
        taken = {name: row[column] for name, column in self.columns.items() if column in row}
        return Located({k: v for k, v in row.items() if k not in self._gone} | taken, located.where)

    def converted(self, located: Located) -> Located:
        """Return a renamed row with whet's columns. Raises DataError for a row in two forms and for a message that cannot be read."""
        return _canonical(located, self.columns)

    def check(self) -> None:
        """Raise DataError for a column that no renamed row had. Call it after the last row."""
        for name, column in self.columns.items():
            if column not in self._have:
                near = difflib.get_close_matches(column, list(self._have), n=1)
                advice = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(self._have))}"
                raise DataError(f"{self.source}: data.columns.{name}: no row has a column {column!r}; {advice}")


def check_names(columns: Mapping[str, str]) -> None:
    """Raise RecipeError for a name in `columns` that is none of whet's, with the nearest one."""
    for name, column in columns.items():
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            turned = f"; for {column!r} from the column {name!r} give {{{column}: {name}}}" if column in FIELDS else ""
            advice = (
                f"; did you mean {near[0]!r}?" if near and not turned else turned or f"; it has {', '.join(FIELDS)}"
            )
            raise RecipeError(f"data.columns: whet reads no column {name!r}{advice}")


def _canonical(located: Located, columns: Mapping[str, str]) -> Located:
    """Return a row with whet's columns. A form whose column is named in `columns` is meant if there are several."""
    row = located.row
    shared, alpaca = "conversations" in row, "instruction" in row
    if not (shared or alpaca):
        return located
    forms = [name for name in ("messages", "prompt", "conversations") if name in row]
    if alpaca and (not forms or "output" in row):
        forms.append("instruction")
    meant = [name for name in forms if name in columns] or forms
    if len(meant) > 1:
        raise DataError(
            f"{located.where}: the row has {meant[0]!r} and {meant[1]!r}, which are two forms of one thing; say which is meant "
            f"with --data.columns.{meant[1]} {meant[1]}, or remove one"
        )
    made = {"conversations": _shared, "instruction": _alpaca}.get(meant[0])
    return Located(made(located), located.where) if made else located


def _alpaca(located: Located) -> dict[str, Any]:
    """Return an Alpaca row as prompt and completion. Instruction and input are joined by a line break, and the prompt is a list of
    messages if there is a system message or a history."""
    row = dict(located.row)
    parts = [_string(located, name, row.pop(name, None)) for name in ("instruction", "input")]
    text = "\n".join(one for one in parts if one.strip())
    system = _string(located, "system", row.pop("system", None))
    before = [{"role": "system", "content": system}] if system.strip() else []
    history = row.pop("history", None) or []
    if not isinstance(history, list):
        raise DataError(
            f"{located.where}: field 'history' must be a list of pairs [question, answer], got {history!r:.80}"
        )
    for number, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(one, str) for one in turn):
            raise DataError(
                f"{located.where}: field 'history', entry {number}: expected [question, answer], got {turn!r:.80}"
            )
        before += [{"role": role, "content": one} for role, one in zip(("user", "assistant"), turn, strict=True)]
    output = row.pop("output", None)
    if not text:
        raise DataError(f"{located.where}: field 'instruction' is empty")
    row.pop("messages", None)
    row["prompt"] = [*before, {"role": "user", "content": text}] if before else text
    return row if output is None else row | {"completion": _string(located, "output", output)}


def _shared(located: Located) -> dict[str, Any]:
    """Return a ShareGPT row with its conversation as `messages`, or as `prompt` beside answers."""
    row = dict(located.row)
    given = row.pop("conversations")
    if not isinstance(given, list) or not given:
        raise DataError(f"{located.where}: field 'conversations' must be a list of messages, got {given!r:.80}")
    messages = [_said(located, "conversations", number, one) for number, one in enumerate(given)]
    system = row.pop("system", None)
    if _string(located, "system", system).strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if isinstance(row.get("tools"), str):
        row["tools"] = _json(located, "tools", row["tools"])
    for name in ("chosen", "rejected"):
        one = row.get(name)
        if isinstance(one, Mapping):
            row[name] = [_said(located, name, 0, one)]
        elif isinstance(one, list):
            row[name] = [_said(located, name, number, message) for number, message in enumerate(one)]
    answered = any(name in row for name in ANSWERS)
    row.pop("prompt" if not answered else "messages", None)
    return row | {"prompt" if answered else "messages": messages}


def _said(located: Located, field: str, number: int, message: Any) -> dict[str, Any]:
    """Return a ShareGPT message ({from, value}, or {role, content}) as a message of a chat template."""
    where = f"{located.where}: field {field!r}, message {number}"
    if not isinstance(message, Mapping) or not ({"from", "role"} & message.keys()):
        raise DataError(f'{where}: expected {{"from": ..., "value": "..."}}, got {message!r:.80}')
    if "from" in message and "role" in message:
        raise DataError(f"{where}: it has 'from' and 'role'; leave one of them out")
    speaker, key = (message["from"], "value") if "from" in message else (message["role"], "content")
    role = ROLES.get(str(speaker).lower().replace("-", "_"))
    if role is None:
        known = ", ".join(ROLES)
        raise DataError(f"{where}: {'from' if key == 'value' else 'role'} {speaker!r} is none of {known}")
    if key == "content" and role != "call":
        return {**message, "role": role}
    value = message.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be a string, got {value!r:.80}")
    if role in ("user", "system") and not value.strip():
        raise DataError(f"{where}: {key!r} is empty")
    kept = {"weight": message["weight"]} if "weight" in message else {}
    if role != "call":
        return {"role": role, "content": value} | kept
    calls = _json(located, f"{field}, message {number}", value)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in calls):
        raise DataError(
            f'{where}: a call must be JSON such as {{"name": ..., "arguments": {{...}}}}, got {value!r:.80}'
        )
    made = [{"type": "function", "function": one} for one in calls]
    return {"role": "assistant", "content": None, "tool_calls": made} | kept


def _json(located: Located, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{located.where}: field {name!r} is not valid JSON, got {text!r:.80}") from error


def _string(located: Located, name: str, value: Any) -> str:
    """Return a string field, "" for None. Raises DataError for anything else."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{located.where}: field {name!r} must be a string, got {type(value).__name__}")
    return value or ""


def is_transcript(value: Any) -> bool:
    """Return whether a text is a transcript of the HH form, which begins with "Human:" and has an answer.

    >>> is_transcript("\\n\\nHuman: hi\\n\\nAssistant: hello"), is_transcript("Human: hi")
    (True, False)
    """
    found = TURN.match(value) if isinstance(value, str) else None
    return found is not None and found[1] == "Human" and "\n\nAssistant:" in value


def turns_of(located: Located, name: str) -> list[dict[str, Any]]:
    """Return the transcript in a field as messages, without the white space around each turn. Raises DataError if it is no
    transcript, or if a turn of the human is empty."""
    text = located.row.get(name)
    if not isinstance(text, str) or not is_transcript(text):
        raise DataError(
            f"{located.where}: field {name!r} must be a transcript that begins with 'Human:' and has '\\n\\nAssistant:', as the "
            f"other answer is, got {text!r:.80}"
        )
    parts = TURN.split(text)[1:]
    said = [
        {"role": "user" if who == "Human" else "assistant", "content": content.strip()}
        for who, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    for number, one in enumerate(said):
        if one["role"] == "user" and not one["content"]:
            raise DataError(f"{located.where}: field {name!r}, turn {number}: the human says nothing")
    return said


def split_pair(located: Located) -> Located:
    """Return a pair of whole conversations as `prompt` (messages), `chosen` and `rejected` (one answer each).

    The prompt is what both begin with, as in TRL's `extract_prompt`, and it must reach to their last messages. The
    conversations are lists of messages, or transcripts of the HH form. A row with a `prompt` beside message lists keeps it
    if they begin with it. Other rows are returned as they are.

    Raises DataError if earlier messages differ, if an answer is not the assistant's, and for plain texts without a prompt:
    where such texts part says nothing about where the prompt ends, since two answers may begin with the same words.
    """
    row = located.row
    sides: list[Any] = [row.get("chosen"), row.get("rejected")]
    prompt = row.get("prompt")
    if any(one is None for one in sides) or not any(isinstance(one, (str, list)) for one in sides):
        return located
    if prompt is not None:
        if not all(isinstance(one, list) and len(one) > 1 for one in sides):
            return located
    elif any(is_transcript(one) for one in sides):
        sides = [turns_of(located, name) for name in ("chosen", "rejected")]
    elif any(isinstance(one, str) for one in sides):
        raise DataError(
            f"{located.where}: field 'prompt' is missing; without it chosen and rejected must be lists of messages, or "
            "transcripts as '\\n\\nHuman: ...\\n\\nAssistant: ...'; write prompt and answers apart"
        )
    if not all(isinstance(one, list) for one in sides):
        return located
    chosen, rejected = sides
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side or not isinstance(side[-1], Mapping) or side[-1].get("role") != "assistant":
            raise DataError(f"{located.where}: field {name!r} must end with an assistant message")
    shared = min(len(chosen), len(rejected)) - 1
    part = next((n for n in range(shared) if chosen[n] != rejected[n]), shared)
    if len(chosen) != len(rejected) or part < shared or not shared:
        raise DataError(
            f"{located.where}: chosen and rejected must share every message but the last; they have {len(chosen)} and "
            f"{len(rejected)} messages, and part at message {part}"
        )
    before = chosen[:-1]
    if isinstance(before[-1], Mapping) and before[-1].get("role") not in ("user", "tool"):
        raise DataError(
            f"{located.where}: the last message that chosen and rejected share must be the user's, got role "
            f"{before[-1].get('role')!r}"
        )
    if prompt is not None:
        own = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if own != before[-len(own) :]:
            raise DataError(
                f"{located.where}: chosen and rejected are whole conversations and do not begin with the field 'prompt'; remove it, "
                "or give the answers alone"
            )
    return Located({**row, "prompt": before, "chosen": [chosen[-1]], "rejected": [rejected[-1]]}, located.where)


def prompted(located: Located) -> Located:
    """Return a row that has a prompt: of a pair of whole conversations what they share, of `messages` what is before the last
    answer, which becomes `completion`. Other rows are returned as they are."""
    row = located.row
    if row.get("prompt") is not None:
        return located
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return split_pair(located)
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return located
    rest = {name: value for name, value in row.items() if name != "messages"}
    last = messages[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return Located({"prompt": messages, **rest}, located.where)
    if len(messages) == 1:
        raise DataError(f"{located.where}: field 'messages' has an answer and no prompt before it")
    answer = {"completion": last["content"]} if isinstance(last.get("content"), str) else {}
    return Located({"prompt": messages[:-1], **rest, **answer}, located.where)
