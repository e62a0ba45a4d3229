"""Mutations of inputs, drawn with hypothesis: of trees (JSON, YAML), of words, of texts and bytes, and whole chat templates."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    1000,
    65_536,
    10**6,
    99_999_999,
    10**9,
    2**31 - 1,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    10**400,
    -(2**31),
    -(10**30),
    0.0,
    -0.0,
    0.5,
    0.999,
    1.0,
    1.5,
    -0.1,
    1e-9,
    1e-45,
    5e-324,
    1e9,
    1e30,
    1e31,
    1e38,
    1e39,
    1e308,
    -1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
]
TEXTS = [
    "",
    " ",
    "\n",
    "a",
    "none",
    "null",
    "yes",
    "auto",
    "true",
    "0",
    "010",
    "12:30:45",
    "1e9999",
    "inf",
    "nan",
    "-1",
    "1_000",
    "\u200b",
    "\ufeff",
    "\u202egpj",
    "é" * 50,
    "\U0001f600",
    "\ud800",
    "\x00",
    "\x1b[2J",
    "\u2028",
    "a\r\nb",
    "%s%s%n",
    "{{ 7*7 }}",
    "{% for",
    "../..",
    "/",
    "/dev/null",
    "~",
    ".",
    "*",
    "&a",
    "!!python/object:os.system",
    "a" * 5000,
    "[" * 3000,
    "<eos>",
    "<user>",
    "</s>",
    "w1 w2",
    "model",
    "sft.jsonl",
    "rules.py:count",
]
ODD: list[Any] = [
    *NUMBERS,
    *TEXTS,
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": 1},
    {"a": {"a": {}}},
    ["a", 1],
    [{}],
    {"name": "x"},
]


def deep(depth: int) -> Any:
    """Return a list inside lists."""
    out: Any = []
    for _ in range(depth):
        out = [out]
    return out


def paths(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values of a tree, except its root."""
    entries = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [one for key, value in entries for one in ((*at, key), *paths(value, (*at, key)))]


def _at(tree: Any, path: Sequence[Any]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def odd_like(draw: Callable[[Any], Any], value: Any) -> Any:
    """Return an odd value, often of the type of the given one."""
    if draw(st.integers(0, 3)) == 0:
        return copy.deepcopy(draw(st.sampled_from(ODD)))
    if isinstance(value, bool):
        return draw(st.sampled_from([not value, int(value), str(value)]))
    if isinstance(value, (int, float)):
        as_float = [float(value)] if abs(value) < 1e300 else []  # a second mutation of a huge number
        return draw(st.sampled_from([*NUMBERS, value + 1, -value, str(value)[:400], *as_float]))
    if isinstance(value, str):
        return draw(
            st.sampled_from([*TEXTS, value[: len(value) // 2], value + value, value.upper(), f" {value} ", [value]])
        )
    return draw(st.sampled_from([str(value), [value], None, {"a": value}]))


def mutated_tree(draw: Callable[[Any], Any], tree: Any, keys: Sequence[str] = (), most: int = 3) -> Any:
    """Return a copy of a tree with some mutations: odd values, deleted, moved, renamed and swapped fields, values in wrong
    places, deep nests, and fields named in `keys`. A share has none."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(0, most))):
        every = paths(tree)
        kind = draw(
            st.sampled_from(["value", "value", "value", "delete", "rename", "swap", "wrap", "add", "move", "deep"])
        )
        if kind == "add" or not every:
            home = tree if isinstance(tree, dict) else None
            inside = [one for one in every if isinstance(_at(tree, one), dict)]
            if inside and draw(st.booleans()):
                home = _at(tree, draw(st.sampled_from(inside)))
            if home is not None:
                name = draw(st.sampled_from([*keys, "x", "", "a.b", "__class__", "name", "options", "weight"]))
                home[name] = copy.deepcopy(draw(st.sampled_from(ODD)))
            continue
        path = draw(st.sampled_from(every))
        home, key = _at(tree, path[:-1]), path[-1]
        if kind == "value":
            home[key] = odd_like(draw, home[key])
        elif kind == "delete":
            del home[key]
        elif kind == "rename" and isinstance(home, dict):
            value = home.pop(key)
            home[
                draw(
                    st.sampled_from(
                        [str(key)[:-1], f"{key}s", str(key).upper(), str(key).replace("_", "-"), "\ufeff" + str(key)]
                    )
                )
            ] = value
        elif kind == "wrap":
            home[key] = draw(st.sampled_from([[home[key]], {"name": home[key]}, [home[key]] * 3]))
        elif kind == "deep":
            home[key] = deep(draw(st.sampled_from([3, 60, 150, 250])))
        elif kind in ("swap", "move"):
            other = draw(st.sampled_from(every))
            value = copy.deepcopy(home[key])
            if kind == "swap":
                home[key] = copy.deepcopy(_at(tree, other))
            try:
                _at(tree, other[:-1])[other[-1]] = value
            except (KeyError, IndexError, TypeError):
                pass
    return tree


def as_json(draw: Callable[[Any], Any], tree: Any) -> bytes:
    """Write a tree as JSON, sometimes with a name twice, and with halves of surrogate pairs as escapes."""
    text = json.dumps(tree, ensure_ascii=draw(st.booleans()))
    if draw(st.integers(0, 19)) == 0 and text.startswith('{"'):
        text = "{" + text[1:].split(",")[0].rstrip("}") + ", " + text[1:]
    return text.encode("utf-8", "surrogatepass")


def mutated_bytes(draw: Callable[[Any], Any], data: bytes, most: int = 2) -> bytes:
    """Return the bytes with some mutations: flipped bits, cuts, copies, line ends, a byte-order mark, odd texts."""
    for _ in range(draw(st.integers(0, most))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(
            st.sampled_from(["flip", "cut", "head", "insert", "double", "drop", "crlf", "bom", "huge", "zeros"])
        )
        if kind == "flip" and data:
            data = data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
        elif kind == "cut":
            data = data[:place]
        elif kind == "head":
            data = data[place:]
        elif kind == "insert":
            text = draw(
                st.sampled_from(
                    [*TEXTS, "{", "}", "[", "]", ":", ",", '"', "- ", "# ", "\t", "*a", "&a ", "NaN", "Infinity"]
                )
            )
            data = data[:place] + text.encode("utf-8", "surrogatepass") + data[place:]
        elif kind == "double":
            lines = data.split(b"\n")
            number = draw(st.integers(0, len(lines) - 1))
            data = b"\n".join([*lines[: number + 1], *lines[number:]])
        elif kind == "drop":
            lines = data.split(b"\n")
            number = draw(st.integers(0, len(lines) - 1))
            data = b"\n".join([*lines[:number], *lines[number + 1 :]])
        elif kind == "crlf":
            data = data.replace(b"\n", b"\r\n")
        elif kind == "bom":
            data = b"\xef\xbb\xbf" + data
        elif kind == "huge":
            data = data[:place] + b"\xff" * 8 + data[place + 8 :]
        elif kind == "zeros":
            data = data[:place] + bytes(min(64, len(data) - place)) + data[place + 64 :]
    return data


def mutated_words(draw: Callable[[Any], Any], words: Sequence[str], options: Sequence[str], most: int = 3) -> list[str]:
    """Return the words of a command line with some mutations: odd values, words left out, doubled or swapped, and other options."""
    words = list(words)
    for _ in range(draw(st.integers(0, most))):
        place = draw(st.integers(1, max(1, len(words) - 1)))
        kind = draw(st.sampled_from(["value", "value", "option", "option", "option", "drop", "double", "swap", "typo"]))
        odd = draw(st.sampled_from(ODD))
        text = odd if isinstance(odd, str) else json.dumps(odd)
        text = text.replace("\0", "").encode("utf-8", "replace").decode()  # what a shell can pass
        if kind == "value" and place < len(words):
            words[place] = text
        elif kind == "option":
            words += [f"--{draw(st.sampled_from(options)).replace('_', '-')}", text]
        elif kind == "drop" and place < len(words):
            del words[place]
        elif kind == "double":
            words.insert(place, words[min(place, len(words) - 1)])
        elif kind == "swap" and place < len(words):
            words[place], words[-1] = words[-1], words[place]
        elif kind == "typo" and place < len(words):
            words[place] = words[place][:-1]
    return words


EXPRESSIONS = [
    "m.content",
    "m['content']",
    "messages",
    "messages|length",
    "messages[0]",
    "ns.x",
    "loop.index",
    "loop",
    "tools",
    "x",
    "1",
    "'a'",
    "10**9",
    "-1",
    "range(9)",
    "range(99999)",
    "[1, 2]",
    "{'a': 1}",
    "none",
    "undefined_name",
    "m.role",
    "eos_token",
    "namespace",
    "self",
    "messages[-1:]",
    "'%s'",
    "m",
]
WRAPS = [
    "{0} ~ {1}",
    "{0} + {1}",
    "{0} * {1}",
    "{0} ** {1}",
    "{0} % {1}",
    "{0} == {1}",
    "{0} in {1}",
    "{0} is defined",
    "{0}|string",
    "{0}|tojson",
    "{0}|list",
    "{0}|join({1})",
    "{0}|replace('a', {1})",
    "{0}|center({1})",
    "{0}|indent({1})",
    "({0})|map('string')|join",
    "[{0}, {1}]",
    "({0}).format({1})",
    "{0}|batch({1})|list",
    "({0})[{1}:]",
    "({0}).split({1})",
    "{0} if {1} else {0}",
    "not {0}",
    "{0}|sort",
    "{0}|sum",
    "{0}|tojson(indent={1})",
    "f({0})",
    "dict(a={0}, b={1})",
    "{0}|truncate({1})",
    "{0}|wordwrap({1})",
    "({0}).zfill({1})",
    "{0}|slice({1})|list",
    "{0}|default({1})",
    "({0})({1})",
    "{0}|trim",
]


@st.composite
def expressions(draw: Callable[[Any], Any], depth: int = 2) -> str:
    """Draw a Jinja expression."""
    if depth == 0 or draw(st.integers(0, 2)) == 0:
        return str(draw(st.sampled_from(EXPRESSIONS)))
    parts = [draw(expressions(depth - 1)) for _ in range(2)]
    return str(draw(st.sampled_from(WRAPS))).format(*parts)


@st.composite
def statements(draw: Callable[[Any], Any], depth: int = 2) -> str:
    """Draw Jinja statements around each other."""
    kind = draw(
        st.sampled_from(["text", "write", "set", "for", "if", "macro", "double", "block", "generation", "raise"])
    )
    if depth == 0 or kind in ("text", "write"):
        return " w1 " if kind == "text" else "{{ " + draw(expressions()) + " }}"
    body = "".join(draw(st.lists(statements(depth - 1), max_size=2)))
    value = draw(expressions())
    return {
        "set": "{% set x = " + value + " %}" + body,
        "for": "{% for m in " + value + " %}" + body + "{% endfor %}",
        "if": "{% if " + value + " %}" + body + "{% else %}w2{% endif %}",
        "macro": "{% macro f(x) %}" + body + "{{ f(" + value + ") }}{% endmacro %}{{ f(3) }}",
        "double": "{% set ns = namespace(x="
        + value
        + ") %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
        + body,
        "block": "{% set x %}" + body + "{% endset %}{{ x }}{{ x }}",
        "generation": "{% generation %}" + body + "{% endgeneration %}",
        "raise": "{% if " + value + " %}{{ raise_exception('no') }}{% endif %}" + body,
    }[kind]


@st.composite
def templates(draw: Callable[[Any], Any], good: str) -> str:
    """Draw a chat template: a good one with statements put into it, one of statements alone, or a damaged one."""
    kind = draw(st.sampled_from(["good", "good", "inside", "inside", "before", "alone", "damaged"]))
    if kind == "good":
        return good
    if kind == "damaged":
        return mutated_bytes(draw, good.encode()).decode("utf-8", "replace")
    more = draw(statements(3))
    if kind == "inside":
        places = [place for place in range(len(good)) if good.startswith("{%", place)]
        place = draw(st.sampled_from(places))
        return good[:place] + more + good[place:]
    return more if kind == "alone" else more + good


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trees merged into one, deeply."""
    out: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            out[key] = (
                merged(out[key], value)
                if isinstance(out.get(key), dict) and isinstance(value, Mapping)
                else copy.deepcopy(value)
            )
    return out
