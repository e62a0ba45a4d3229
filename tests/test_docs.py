"""The pages are made of the code, and say what is there."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from proof import page, vectors
from proof.mutants import MUTANTS, check
from whet import conformance, ops
from whet.methods import catalogue, choices
from whet.methods.compose import choice_options
from whet.methods.explain import formula

ROOT = Path(__file__).parent.parent
KNOWN = {
    **choices.ONLINE_SLOTS,
    **choices.PREFERENCE_SLOTS,
    **{f"reward {key}": value for key, value in choices.REWARD_SLOTS.items()},
}
EVERY = [(slot, name, one) for slot, known in KNOWN.items() for name, one in known.items()]


def test_the_page_of_methods_is_fresh() -> None:
    assert (ROOT / "docs" / "methods.md").read_text() == page.text(), "run python -m proof.page"


def test_the_page_of_metrics_is_the_table() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == page.metrics_text(), "run python -m proof.page"


def test_the_vectors_are_fresh() -> None:
    assert (ROOT / "docs" / "conformance" / "vectors.json").read_text() == vectors.text(), "run python -m proof.vectors"


@pytest.mark.parametrize(("slot", "name", "choice"), EVERY, ids=[f"{slot}-{name}" for slot, name, _ in EVERY])
def test_a_formula_names_the_parts_own_dials_and_no_others(slot: str, name: str, choice: choices.Choice) -> None:
    named = set(re.findall(r"{(\w+)}", choice.formula))
    own = {*choice_options(choice)}
    told_elsewhere = {"weights", "shift_mean", "ddof", "eps", "alpha"}
    assert named <= own | {"weights"}
    assert own <= named | told_elsewhere
    assert "{" not in formula(choice, {"name": name})


def test_every_method_names_its_source() -> None:
    for group in (catalogue.ONLINE, catalogue.ONLINE_PREFERENCE, catalogue.PREFERENCE, catalogue.REWARD):
        for name, one in group.items():
            assert one.about, name
            assert one.source, name


def test_whets_own_ops_conform(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main(["whet.ops"]) == 0
    told = capsys.readouterr().out
    count = len(json.loads((ROOT / "docs/conformance/vectors.json").read_text())["vectors"])
    assert told == f"{count} of {count} vectors agree to 1e-09\n"


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        ("k1", lambda logp, ref: ref - logp, "off by up to"),
        ("k3", lambda logp, ref: ops.k3(logp, ref).float(), "off by up to"),
        ("group_center", lambda score, group: score.sum(), "shape (), expected (6,)"),
        ("gae", lambda *given, **options: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_wrong_implementation_is_told(name: str, wrong: object, told: str) -> None:
    file = json.loads((ROOT / "docs/conformance/vectors.json").read_text())
    found, missing, right = conformance.check(SimpleNamespace(**{name: wrong}), file["vectors"], file["tolerance"])
    assert found
    assert all(line.startswith(name) and told in line for line in found)
    assert (name not in missing, right) == (True, 0)


def test_a_module_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main(["no_such_module"]) == 2
    assert "no_such_module" in capsys.readouterr().out
    assert conformance.main(["whet.ops", "--vectors", "nowhere.json"]) == 2
    assert "nowhere.json: no such file" in capsys.readouterr().out


def test_the_vectors_know_nothing_of_whet() -> None:
    source = (ROOT / "proof" / "vectors.py").read_text()
    assert not re.search(r"^(import|from) (torch|whet)", source, re.MULTILINE)


def test_the_errata_name_tests_that_are_there() -> None:
    text = (ROOT / "docs" / "errata.md").read_text()
    for place in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        file = ROOT / place[0]
        assert file.is_file(), place
        assert f"def {place[1]}(" in file.read_text() if place[1] else True, place


def test_links_between_the_pages_lead_somewhere() -> None:
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_every_mutant_stands_once_in_its_file_and_there_are_enough() -> None:
    check(MUTANTS)
    assert len(MUTANTS) >= 60
    assert len({(one.file, one.old, one.new) for one in MUTANTS}) == len(MUTANTS)
