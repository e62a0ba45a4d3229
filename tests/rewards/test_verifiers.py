"""The ready-made rewards against answers judged by hand."""

import math
import time
from fractions import Fraction
from typing import Any

import pytest

from whet.errors import RecipeError, RewardError
from whet.rewards import REWARDS
from whet.rewards.verifiers import (
    ExactMatch,
    JsonSchema,
    Language,
    Length,
    MathMatch,
    NumericMatch,
    Regex,
    Repetition,
    Sentiment,
    Verifier,
)  # fmt: skip
from whet.rewards.verifiers.base import blocks, boxed
from whet.rewards.verifiers.numeric_match import last_number

F = Fraction


def score(verifier: Verifier, completion: str, **row: Any) -> float | None:
    return verifier(["?"], [completion], **{name: [value] for name, value in row.items()})[0]


def reason(verifier: Verifier, completion: str, **row: Any) -> str:
    return verifier.verdicts([completion], {name: [value] for name, value in row.items()})[0].reason


EXACT: list[tuple[dict[str, Any], str, Any, float | None]] = [
    ({}, "Paris", "Paris", 1.0),
    ({}, "Paris\n", " Paris", 1.0),
    ({"strip": False}, "Paris\n", "Paris", 0.0),
    ({}, "paris", "Paris", 0.0),
    ({"ignore_case": True}, "PARIS", "paris", 1.0),
    ({"ignore_case": True}, "STRASSE", "straße", 1.0),
    ({"ignore_case": True}, "ΣΊΣΥΦΟΣ", "σίσυφος", 1.0),
    ({}, "New  York", "New York", 0.0),
    ({"collapse_space": True}, "New \n\t York", "New York", 1.0),
    ({}, "ｆｉｎｅ", "fine", 0.0),
    ({"nfkc": True}, "ﬁne", "fine", 1.0),
    ({"nfkc": True}, "e\u0301", "é", 1.0),
    ({"nfkc": True, "ignore_case": True}, "ＰＡＲＩＳ", "paris", 1.0),
    ({}, "42", 42, 1.0),
    ({}, "B", ["A", "B"], 1.0),
    ({}, "C", ["A", "B"], 0.0),
    ({}, "The answer is Paris", "Paris", 0.0),
    ({"find": "last_line"}, "The capital:\nParis\n\n", "Paris", 1.0),
    ({"find": "last_line"}, "", "Paris", 0.0),
    ({"find": "hashes"}, "It is big.\n#### Paris\nIndeed.", "Paris", 1.0),
    ({"find": "hashes"}, "Paris", "Paris", 0.0),
    ({"find": "boxed"}, r"so \boxed{\text{A}} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}", 1.0),
    ({"find": "boxed"}, r"\boxed{\frac{1}{2", r"\frac{1}{2", 0.0),
    ({}, "", "", 1.0),
    ({}, "Paris", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("options", "completion", "answer", "expected"), EXACT)
def test_exact_match(options: dict[str, Any], completion: str, answer: Any, expected: float | None) -> None:
    assert score(ExactMatch(**options), completion, answer=answer) == expected


NUMBERS: list[tuple[str, Fraction | None]] = [
    ("42", F(42)),
    ("The answer is 42.", F(42)),
    ("It costs $1,234.50 in total", F(123450, 100)),
    ("-$5", F(-5)),
    ("$-5", F(-5)),
    ("3/4", F(3, 4)),
    ("-3/4 of a cup", F(-3, 4)),
    ("1 3/4 cups", F(7, 4)),
    ("¾", F(3, 4)),
    ("2½ hours", F(5, 2)),
    ("−7", F(-7)),
    ("x = -3", F(-3)),
    ("10-3", F(3)),
    ("10 - 3 = 7", F(7)),
    ("pages 5–9", F(9)),
    ("option-2", F(2)),
    ("0.1", F(1, 10)),
    (".5", F(1, 2)),
    ("1.", F(1)),
    ("1e3", F(1000)),
    ("6.02e23", F(602 * 10**21)),
    ("6.02 × 10^23", F(602 * 10**21)),
    (r"3 \times 10^{-2}", F(3, 100)),
    ("3×10⁵ m", F(300000)),
    ("1,2,3", F(3)),
    ("1,234,567 people", F(1234567)),
    ("1,00,000 rupees", F(100000)),
    (r"1{,}234", F(1234)),
    (r"12\,345", F(12345)),
    ("12\u202f345\u202f678", F(12345678)),
    (r"\frac{1}{2}", F(1, 2)),
    (r"-\dfrac{3}{8}", F(-3, 8)),
    (r"2\frac{1}{3}", F(7, 3)),
    (r"\frac{-1}{4}", F(-1, 4)),
    ("50%", F(50)),
    (r"50\%", F(50)),
    ("12 cm^2", F(12)),
    ("12 cm2", F(12)),
    ("5 m²", F(5)),
    ("H2O", None),
    ("１２３", F(123)),
    ("+8", F(8)),
    ("007", F(7)),
    ("3/0", None),
    ("9" * 500, None),
    ("1e999999999", None),
    ("no number", None),
    ("", None),
    ("٣", None),
    ("1.5.2", F(3, 2)),
    ("£3,000", F(3000)),
    ("€ 20 each", F(20)),
    ("18 eggs, so $18 every day", F(18)),
    (r"$\$36$", F(36)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_the_last_number_of_a_text(text: str, number: Fraction | None) -> None:
    assert last_number(text) == number


GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn total 48+24 = <<48+24=72>>72 clips.\n#### 72"
NUMERIC: list[tuple[dict[str, Any], str, Any, float | None]] = [
    ({}, "She sold 72 clips.", GSM8K, 1.0),
    ({}, "48 + 24 = 72\n#### 72", GSM8K, 1.0),
    ({}, "#### 72\nI checked it 3 times.", GSM8K, 1.0),
    ({}, "#### 71", GSM8K, 0.0),
    ({}, "The answer is 72.0", GSM8K, 1.0),
    ({}, r"\boxed{72} is larger than 5", "72", 1.0),
    ({}, r"\boxed{x} and 72", "72", 0.0),
    ({"find": "last"}, r"\boxed{5} and 72", "72", 1.0),
    ({"find": "boxed"}, "72", "72", 0.0),
    ({}, "so 1,000,000", 1000000, 1.0),
    ({}, "2.50", 2.5, 1.0),
    ({}, "0.3", 0.1 + 0.2, 0.0),
    ({"absolute": 1e-9}, "0.3", 0.1 + 0.2, 1.0),
    ({}, "0.33", "1/3", 0.0),
    ({"absolute": 0.01}, "0.33", "1/3", 1.0),
    ({"relative": 0.01}, "99", "100", 1.0),
    ({"relative": 0.01}, "98.9", "100", 0.0),
    ({"relative": 0.01}, "-100", "100", 0.0),
    ({}, "50%", "0.5", 0.0),
    ({"percent": "divide"}, "50%", "0.5", 1.0),
    ({"percent": "divide"}, "50 percent", r"50\%", 1.0),
    ({}, r"$\boxed{\dfrac{3}{4}}$", r"\frac34", 1.0),
    ({}, r"$\boxed{\dfrac{3}{4}}$", "0.75", 1.0),
    ({}, "7", ["6", "7"], 1.0),
    ({}, "seven", "7", 0.0),
    ({}, "7", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("options", "completion", "answer", "expected"), NUMERIC)
def test_numeric_match(options: dict[str, Any], completion: str, answer: Any, expected: float | None) -> None:
    assert score(NumericMatch(**options), completion, answer=answer) == expected


@pytest.mark.parametrize(
    "text", ["1,22" * 50_000, "9" * 200_000, "1/" * 100_000, "-" * 200_000, r"\frac{1" * 30_000, "1 " * 100_000]
)
def test_a_long_answer_takes_no_long_time(text: str) -> None:
    began = time.process_time()
    score(NumericMatch(), text, answer="1")
    assert time.process_time() - began < 2.0


def test_a_right_answer_without_a_number_is_refused_before_a_run() -> None:
    with pytest.raises(RecipeError, match=r"reward\.0\.answer: row 3: there is no number in 'seven'"):
        NumericMatch().check_value("seven", "reward.0.answer: row 3")


MATH = [
    (r"so $\boxed{\frac{1}{2}}$", "0.5", 1.0),
    (r"\boxed{(x-1)(x+1)}", "x^2-1", 1.0),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1.0),
    (r"\boxed{\{1,2\}}", r"\{2,1\}", 1.0),
    (r"\boxed{(1,2)}", "(2,1)", 0.0),
    (r"\boxed{x^2+1}", "x^2-1", 0.0),
    (r"\boxed{\frac{3\pi}{4}}", r"the area is $\boxed{0.75\pi}$", 1.0),
    ("0.5", "0.5", 0.0),
    (r"\boxed{5", "5", 0.0),
    (r"\boxed{__import__('os').system('touch /tmp/whet-owned')}", "5", 0.0),
    (r"\boxed{7}", ["6", "7"], 1.0),
]  # fmt: skip


def test_math_match_with_a_limit_of_time() -> None:
    for completion, answer, expected in MATH:
        assert score(MathMatch(), completion, answer=answer) == expected, completion
    began = time.monotonic()
    assert "more than 1 s" in reason(MathMatch(seconds=1.0), r"\boxed{9^{9^{9^{9}}}}", answer="x^2-1")
    assert time.monotonic() - began < 20
    assert score(MathMatch(seconds=1.0), r"\boxed{1/2}", answer="0.5") == 1.0  # the next one works


REGEX: list[tuple[dict[str, Any], str, float]] = [
    ({"pattern": r"\d+"}, "a 12 b", 1.0),
    ({"pattern": r"\d+", "how": "match"}, "a 12 b", 0.0),
    ({"pattern": r"\d+", "how": "match"}, "12 b", 1.0),
    ({"pattern": r"\d+", "how": "fullmatch"}, "12 b", 0.0),
    ({"pattern": r"\d+", "how": "fullmatch"}, "12", 1.0),
    ({"pattern": "yes"}, "YES", 0.0),
    ({"pattern": "yes", "flags": "i"}, "YES", 1.0),
    ({"pattern": "^b$"}, "a\nb", 0.0),
    ({"pattern": "^b$", "flags": "m"}, "a\nb", 1.0),
    ({"pattern": "a.b", "flags": "s"}, "a\nb", 1.0),
    ({"pattern": "a b", "flags": "xi"}, "AB", 1.0),
    ({"pattern": "sorry", "negate": True}, "I am sorry", 0.0),
    ({"pattern": "sorry", "negate": True}, "Sure", 1.0),
    ({"pattern": r"<think>.*?</think>\s*\S", "how": "match", "flags": "s"}, "<think>hm\n</think>\nyes", 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("options", "completion", "expected"), REGEX)
def test_regex(options: dict[str, Any], completion: str, expected: float) -> None:
    assert score(Regex(**options), completion) == expected


def test_backtracking_ends_at_the_limit_and_counts_as_a_failure() -> None:
    evil = Regex(r"(a|aa)+(?<=x)$", seconds=0.2, negate=True)
    began = time.monotonic()
    assert evil.verdicts(["a" * 5000 + "b", "x"], {})[0].reason == "the match took more than 0.2 s"
    assert time.monotonic() - began < 5
    assert evil(["?"], ["x"]) == [1.0]


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}
JSON: list[tuple[dict[str, Any], str, float, str]] = [
    ({}, '{"name": "Ann", "age": 3}', 1.0, ""),
    ({}, ' \n{"name": "Ann"}\n', 1.0, ""),
    ({}, '{"age": 3}', 0.0, "against the schema: required"),
    ({}, '{"name": 3}', 0.0, "against the schema: type"),
    ({}, 'Here:\n```json\n{"name": "Ann"}\n```\nDone.', 1.0, ""),
    ({}, '```json\n{"name": 1}\n```\n```json\n{"name": "Ann"}\n```', 1.0, ""),
    ({}, '```JSON\n{"name": "Ann"}\n```', 1.0, ""),
    ({"find": "whole"}, '```json\n{"name": "Ann"}\n```', 0.0, "no JSON: invalid syntax"),
    ({"find": "block"}, '{"name": "Ann"}', 0.0, "no closed block ```json"),
    ({"find": "block"}, '```json\n{"name": "Ann"}', 0.0, "no closed block ```json"),
    ({}, '{"name": "Ann", "name": "Bob"}', 0.0, "no JSON: a name twice in an object"),
    ({}, '{"name": "Ann", "x": NaN}', 0.0, "no JSON: NaN or Infinity"),
    ({}, '{"name": "Ann", "x": -Infinity}', 0.0, "no JSON: NaN or Infinity"),
    ({}, '{"name": "Ann", "x": 1e999}', 0.0, "no JSON: a number beyond float64"),
    ({}, "[" * 100_000, 0.0, "no JSON: nested too deeply"),
    ({}, '{"name": "' + "[" * 500 + '\\""}', 1.0, ""),
    ({}, '{"name": "Ann", "x": ' + "1" * 5000 + "}", 0.0, "no JSON: an integer with too many digits"),
    ({}, "", 0.0, "no JSON: nothing"),
    ({}, "{'name': 'Ann'}", 0.0, "no JSON: invalid syntax"),
    ({}, '{"name": "Ann"} thanks', 0.0, "no JSON: invalid syntax"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "completion", "expected", "said"), JSON)
def test_json_schema(options: dict[str, Any], completion: str, expected: float, said: str) -> None:
    found = JsonSchema(PERSON, **options).verdicts([completion], {})[0]
    assert (found.score, found.reason) == (expected, said)


def test_a_schema_of_a_column_or_a_file_and_patterns_with_a_limit(tmp_path: Any) -> None:
    own = JsonSchema(column="schema")
    assert score(own, "3", schema={"type": "integer"}) == 1.0
    assert score(own, "3", schema='{"type": "string"}') == 0.0
    assert score(own, "3", schema=None) is None
    (tmp_path / "s.json").write_text('{"type": "array"}')
    assert score(JsonSchema(str(tmp_path / "s.json")), "[]") == 1.0
    evil = JsonSchema({"type": "string", "pattern": "^(a|aa)+$(?<=x)"})
    assert reason(evil, '"' + "a" * 5000 + 'b"') == "a pattern took more than 1 s"
    name = '{"' + "a" * 5000 + 'b": 1}'
    for more in ({}, {"additionalProperties": False}):
        assert (
            reason(JsonSchema({"patternProperties": {"^(a|aa)+$(?<=x)": {}}} | more), name)
            == "a pattern took more than 1 s"
        )
    named = JsonSchema(
        {"properties": {"a": {}}, "patternProperties": {"^x": {"type": "string"}}, "additionalProperties": False}
    )
    texts = ('{"a": 1, "x1": ""}', '{"x": 1}', '{"b": 1}', "[1]")
    assert [reason(named, text) for text in texts] == [
        "",
        "against the schema: type",
        "against the schema: additionalProperties",
        "",
    ]
    with pytest.raises(RecipeError, match="unevaluatedProperties with patternProperties"):
        JsonSchema({"unevaluatedProperties": False, "allOf": [{"patternProperties": {}}]}).check("reward.0")
    tree = {"$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}}, "$ref": "#/$defs/node"}
    assert [score(JsonSchema(tree), text) for text in ("[[], [[]]]", "[1]")] == [1.0, 0.0]


LENGTH: list[tuple[dict[str, Any], str, float]] = [
    ({"unit": "words", "max": 3}, "one two three", 1.0),
    ({"unit": "words", "max": 3}, "one two three four", 0.0),
    ({"unit": "words", "min": 2}, "one", 0.0),
    ({"unit": "words", "min": 2, "max": 3, "margin": 4}, "a b c d", 0.75),
    ({"unit": "words", "min": 4, "margin": 4}, "a", 0.25),
    ({"unit": "words", "min": 4, "margin": 2}, "a", 0.0),
    ({"unit": "characters", "max": 4}, "äöü\n", 1.0),
    ({"unit": "characters", "max": 4}, "äöü\n.", 0.0),
    ({"unit": "words", "max": 0}, "", 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("options", "completion", "expected"), LENGTH)
def test_length(options: dict[str, Any], completion: str, expected: float) -> None:
    assert score(Length(**options), completion) == expected


def test_length_in_tokens_counts_ids_and_asks_for_them() -> None:
    assert score(Length(max=3), "x", completion_ids=[4, 5, 6]) == 1.0
    assert score(Length(max=2, margin=2), "x", completion_ids=[4, 5, 6]) == 0.5
    with pytest.raises(RewardError, match="texts without token ids here; set unit"):
        score(Length(max=3), "x", completion_ids=[])


def test_repetition() -> None:
    assert score(Repetition(n=2), "a b a b") == -1 / 3  # ab ba ab
    assert score(Repetition(n=1), "a a a a") == -3 / 4
    assert score(Repetition(n=1), "A a") == -1 / 2
    assert score(Repetition(n=1, ignore_case=False), "A a") == 0.0
    assert score(Repetition(n=2, unit="characters"), "ababa") == -1 / 2
    assert score(Repetition(), "a b c") == 0.0
    assert score(Repetition(), "") == 0.0


TEXTS = {
    "en": "The committee will meet again next week to discuss the budget of the new school.",
    "de": "Der Ausschuss trifft sich nächste Woche wieder, um über den Haushalt der neuen Schule zu beraten.",
    "fr": "Le comité se réunira de nouveau la semaine prochaine pour discuter du budget de la nouvelle école.",
    "es": "El comité se reunirá de nuevo la próxima semana para discutir el presupuesto de la nueva escuela.",
    "ru": "Комитет снова соберётся на следующей неделе, чтобы обсудить бюджет новой школы.",
    "zh": "委员会将于下周再次开会，讨论新学校的预算，并决定明年在哪里建设新的图书馆。",
}


def test_language() -> None:
    for code in TEXTS:
        assert [score(Language(code), text) for text in TEXTS.values()] == [float(code == one) for one in TEXTS], code
    assert reason(Language("en"), TEXTS["de"]) == "language de"
    assert [score(Language("en"), text) for text in ("", "Yes.", "12345 67890 12345 67890 12345")] == [0.0, 0.0, 0.0]
    assert score(Language("en", short_score=None), "Yes.") is None
    assert (
        score(Language("de"), f"{TEXTS['de']}\n```python\nprint('the quick brown fox jumps over the lazy dog')\n```")
        == 1.0
    )
    mixed = score(Language("en", how="share"), f"{TEXTS['en']} {TEXTS['de']}")
    letters = {code: sum(one.isalpha() for one in text) for code, text in TEXTS.items()}
    assert mixed == letters["en"] / (letters["en"] + letters["de"])
    assert score(Language("en", how="share"), TEXTS["en"]) == 1.0


def test_sentiment() -> None:
    good, neutral, bad = (
        score(Sentiment(), one) for one in ("I love this, it is great!", "The table is in the room.", "This is awful.")
    )
    assert good is not None
    assert bad is not None
    assert good > 0.6 > 0.0 == neutral > -0.4 > bad
    assert math.isclose(
        score(Sentiment(), "good") or 0, 1.9 / math.sqrt(1.9**2 + 15), abs_tol=1e-4
    )  # its valence is 1.9
    assert score(Sentiment(scale="unit"), "good") == ((score(Sentiment(), "good") or 0) + 1) / 2


def test_the_limit_of_sentiment_counts_the_words_of_emojis() -> None:
    """VADER writes an emoji as words first, "grinning face", and its time grows with the square of the text."""
    short = Sentiment(max_characters=60)
    assert score(short, "\U0001f600" * 2 + " awful") != score(short, "\U0001f600" * 2)
    assert score(short, "\U0001f600" * 5 + " awful") == score(short, "\U0001f600" * 4)


def test_boxes_and_blocks() -> None:
    assert boxed(r"\boxed{\{1\}} \fbox{ a}") == "a"
    assert boxed(r"\boxed{a\}b}") == r"a\}b"
    assert boxed("none") is None
    text = "```py\na\n```\n~~~\nb\n```\n~~~\n````md\n```\nc\n```\n````\n```\nopen"
    assert list(blocks(text)) == [("py", "a\n"), ("", "b\n```\n"), ("md", "```\nc\n```\n")]


REFUSED: list[tuple[Verifier, str]] = [
    (Regex("(a"), r"reward\.0\.pattern: '\(a' is no regular expression: missing \)"),
    (Regex("a", flags="q"), r"reward\.0\.flags: unknown flag 'q'; known are i, m, s, x"),
    (Length(), r"reward\.0: every length would score 1; set max, min or both"),
    (Length(min=5, max=3), r"reward\.0\.max: it is below min; got min 5 and max 3"),
    (JsonSchema(), r"reward\.0: which schema\? give one of schema and column"),
    (JsonSchema({}, column="c"), r"reward\.0: which schema\?"),
    (JsonSchema({"type": "strin"}), r"reward\.0\.schema: it is no JSON schema: 'strin' is not valid.* \(at type\)"),
    (JsonSchema("nowhere.json"), r"reward\.0\.schema: the schema cannot be read: .*nowhere\.json"),
    (JsonSchema({"$ref": "https://example.org/s.json"}), r"reward\.0\.schema: .*leads out of the schema"),
    (JsonSchema({"$ref": "#/$defs/x"}), r"reward\.0\.schema: .*the reference '#/\$defs/x' leads nowhere"),
    (Language("english"), r"reward\.0\.language: unknown language 'english'; did you mean 'en'\?"),
]  # fmt: skip


@pytest.mark.parametrize(("verifier", "message"), REFUSED)
def test_an_option_that_cannot_be_used_is_refused(verifier: Verifier, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        verifier.check("reward.0")


def test_a_function_call_without_the_column_names_those_there_are() -> None:
    with pytest.raises(
        RewardError, match=r"exact_match\.answer: the rows have no column 'answer'; they have level, solution"
    ):
        score(ExactMatch(), "a", solution="a", level=1)


NEEDED: dict[str, dict[str, Any]] = {
    "regex": {"pattern": "a"}, "language": {"language": "en"}, "length": {"unit": "words", "max": 1}, "json_schema": {"schema": {}},
}  # fmt: skip
"""Options that have no default."""
ANY = ("answer", "tests", "self", "prompt", "options", "where", "verifier", "name", "columns", "completion_ids")


@pytest.mark.parametrize("name", [one for one in REWARDS.names() if one not in ("http", "openai")])
def test_a_column_may_have_any_name(name: str) -> None:
    options = REWARDS.find(name).options
    verifier = options(**NEEDED.get(name, {}))
    columns: dict[str, Any] = {one: ["x"] for one in ANY} | {"tests": ["assert True"]}
    assert len(verifier(["p"], ["x"], **columns)) == 1
    assert verifier.name() == name
