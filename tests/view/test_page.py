"""A page needs nothing: no request, one style and one script of its own, and texts of models are shown as they are."""

import base64
import hashlib
import re
from pathlib import Path

import pytest

import whet
from tests.view.helpers import HOSTILE, Parsed, evaluated, online_rows, saved, write_metrics, write_rollout
from whet.view.report import LONGEST_TEXT, Answer, Folded, Prose, Section, Source, Table, Talk, page

LOADING = (
    "src",
    "href",
    "srcset",
    "action",
    "formaction",
    "data",
    "poster",
    "background",
    "xlink:href",
    "ping",
    "manifest",
)
"""Attributes by which a page can load or send something."""
SHOWN = (
    "<script>alert(1)</script><img src=http://evil.example/x.png onerror=alert(2)>"
    "\\x1b[31mred\\x07\\x00 \\u202egnp.exe\\u202c </pre></div>&amp;"
)


def needs_nothing(text: str) -> Parsed:
    """Check the page and return it parsed."""
    found = Parsed(text)
    loads = [(tag, name, value) for tag, own in found.tags for name, value in own.items() if name in LOADING]
    assert loads == [("link", "href", "data:,")]
    tags = [tag for tag, _ in found.tags]
    assert not {"iframe", "object", "embed", "img", "base", "form", "video", "audio", "image", "use", "a"} & set(tags)
    assert tags.count("script") == tags.count("style") == 1
    assert not re.search(r"url\(|@import|https?:|//", found.own["style"])
    assert not re.search(r"https?:|fetch|XMLHttp|WebSocket|import|eval|innerHTML|document\.write", found.own["script"])
    handlers = [name for _, own in found.tags for name in own if name.startswith("on") or name == "style"]
    assert not handlers
    policy = next(own["content"] for _, own in found.tags if own.get("http-equiv") == "Content-Security-Policy")
    rules = dict(one.strip().split(" ", 1) for one in (policy or "").split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(found.own[kind].encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    assert rules.keys() == {"default-src", "style-src", "script-src", "img-src", "base-uri", "form-action"}
    return found


def test_hostile_text_is_shown_literally_everywhere() -> None:
    blocks = [
        Prose(HOSTILE), Table((HOSTILE, HOSTILE), [(HOSTILE, HOSTILE)]), Talk([Answer(HOSTILE, HOSTILE, HOSTILE)], HOSTILE),
        Talk([Answer("a", "b")], prompts=[HOSTILE]), Source(HOSTILE), Folded(HOSTILE, [Prose(HOSTILE)]),
    ]  # fmt: skip
    text = page(HOSTILE, HOSTILE, [Section(HOSTILE, blocks)])
    found = needs_nothing(text)
    assert found.text.count(SHOWN) == 17
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)


def test_halves_of_surrogate_pairs_can_be_written(tmp_path: Path) -> None:
    text = page("a", "b", [Section("c", [Prose("\ud800 \udfff")])])
    (tmp_path / "a.html").write_text(text, encoding="utf-8")
    assert "\\ud800 \\udfff" in text


def test_a_long_text_is_cut_with_a_note() -> None:
    long = "x" * 1_000_000
    text = page("a", "b", [Section("c", [Talk([Answer("end", long)], long)])])
    assert len(text) < 40_000
    assert text.count(f"{'x' * LONGEST_TEXT} [cut: 998,400 of 1,000,000 characters are not shown]") == 2


@pytest.mark.parametrize("text", [HOSTILE, "\x1b" * 1_000_000], ids=["markup", "a megabyte of escapes"])
def test_a_report_of_a_hostile_model_needs_nothing(tmp_path: Path, text: str) -> None:
    folder = evaluated(tmp_path / "run", steps=8, every=4, text=text)
    page_text = whet.report(folder).read_text(encoding="utf-8")
    found = needs_nothing(page_text)
    assert (SHOWN if text == HOSTILE else "\\x1b" * LONGEST_TEXT) in found.text
    assert len(page_text) < 2_000_000


def test_hostile_names_recipes_and_records_are_text(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", steps=3, data="<b>prompts</b>.jsonl")
    write_metrics(folder, [{**row, HOSTILE: 1.0, "<i>": 2.0} for row in online_rows(3)])
    (folder / "cautions.jsonl").write_text('{"step": 2, "text": "<script>alert(3)</script>\\u202e"}\n')
    (folder / "stopped").mkdir()
    (folder / "stopped" / "step-00000004.json").write_text('{"step": 4, "message": "<img src=x>"}')
    (folder / "environment.json").write_text('{"machine": "<b>x</b>", "threads": "<b>2</b>"}')
    write_rollout(folder, 3, text=HOSTILE)
    found = needs_nothing(whet.report(folder).read_text(encoding="utf-8"))
    for one in (
        SHOWN,
        "<b>prompts</b>.jsonl",
        "<script>alert(3)</script>\\u202e",
        "<img src=x>",
        "<b>x</b>",
        "<b>2</b>",
    ):
        assert one in found.text


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "run")
    first = whet.report(folder).read_bytes()
    assert whet.report(folder).read_bytes() == first
