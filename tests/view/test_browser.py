"""Reports in Chromium, where it is installed. tests/view/test_page.py holds the same properties without a browser."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import whet
from tests.view.helpers import HOSTILE, evaluated

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
PROBE = """<script>
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const smallest = Math.min(...[...document.querySelectorAll("svg.plot")].filter((one) => one.getClientRects().length)
  .map((one) => one.getBoundingClientRect().width / one.viewBox.baseVal.width));
const svg = [...document.querySelectorAll("svg.plot")].find((one) => one.getClientRects().length && !one.querySelector(".path"));
const box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 }));
const told = svg.closest("figure").querySelector("output").textContent;
const tags = document.querySelectorAll("img, iframe").length;
document.body.setAttribute("data-probe", JSON.stringify({ wide, smallest, told, tags, width: innerWidth }));
</script>"""


def dumped(page: Path, *words: str) -> tuple[str, str]:
    """What Chromium makes of a page, and what it logged."""
    assert CHROMIUM
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=3000",
    ]
    home = page.parent / "profile"
    command = [CHROMIUM, *options, f"--user-data-dir={home}", *words, "--dump-dom", page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def in_chromium(tmp_path: Path, width: int) -> dict:
    """Open a report at a width, with a script that measures it; the rules against scripts are taken out of this copy."""
    page = whet.report(evaluated(tmp_path / "run", text=HOSTILE))
    text = page.read_text(encoding="utf-8")
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", f"{PROBE}</body>")
    (tmp_path / "probe.html").write_text(free, encoding="utf-8")
    dom, _ = dumped(tmp_path / "probe.html", f"--window-size={width},900")
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found
    return json.loads(unescape(found[1]))


if CHROMIUM:  # where it is not there, no test is collected

    def test_a_page_makes_no_request_and_logs_nothing(tmp_path: Path) -> None:
        page = whet.report(evaluated(tmp_path / "run", text=HOSTILE))
        log = tmp_path / "net.json"
        _, logged = dumped(page, f"--log-net-log={log}")
        assert "CONSOLE" not in logged
        urls = set(re.findall(r'"url":"([^"]+)"', log.read_text()))
        assert not [one for one in urls if "evil.example" in one]

    def test_the_log_shows_what_a_page_says_and_asks_for(tmp_path: Path) -> None:
        """The test above would see it."""
        page = tmp_path / "bad.html"
        page.write_text("<script>console.error('bad')</script><img src=http://evil.example/x.png>")
        log = tmp_path / "net.json"
        _, logged = dumped(page, f"--log-net-log={log}")
        assert "CONSOLE" in logged
        assert "evil.example" in log.read_text()

    def test_a_page_has_the_width_of_a_phone(tmp_path: Path) -> None:
        found = in_chromium(tmp_path, 375)
        assert found["width"] <= 500  # the narrowest window of some versions
        assert found["wide"] == 0
        assert found["smallest"] > 0.9  # text of 11 px stays readable
        assert found["tags"] == 0

    def test_values_are_shown_under_the_pointer(tmp_path: Path) -> None:
        found = in_chromium(tmp_path, 1200)
        assert found["wide"] == 0
        assert re.fullmatch(r"[0-9.]+: score [0-9.]+", found["told"])
