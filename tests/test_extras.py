"""A package that is not installed is told before any model is loaded, in one line with a command that installs it."""

import ast
import os
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import whet
from proof.wheel import supported
from whet.errors import UserError
from whet.extras import REQUIREMENTS, VARIANTS, command, installed, require

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "src" / "whet"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WITH = {"huggingface_hub": "transformers", "markupsafe": "jinja2", "referencing": "jsonschema"}
"""Modules that come with a required package."""


def named(requirements: list[str]) -> dict[str, str]:
    """Requirements by the name of the package, each with its range."""
    return {canonicalize_name(one.name): str(one.specifier) for one in map(Requirement, requirements)}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForSequenceClassification

    home = tmp_path_factory.mktemp("home")
    tiny.folder(home / "m")
    scorer = AutoModelForSequenceClassification.from_config(tiny.config(num_labels=1))
    scorer.save_pretrained(home / "rm")
    tiny.tokenizer().save_pretrained(home / "rm")
    (home / "rules.py").write_text("def good(prompts, completions, **_):\n    return [1.0 for _ in completions]\n")
    tiny.write_jsonl(home / "p.jsonl", [{"prompt": "a b", "answer": "c"}, {"prompt": "c", "answer": "d"}])
    tiny.write_jsonl(home / "t.jsonl", [{"text": "a b"}])
    (home / "saved").mkdir()
    (home / "saved" / "dataset_info.json").write_text("{}")
    (home / "saved" / "state.json").write_text('{"_data_files": []}')
    before = Path.cwd()
    os.chdir(home)
    yield home
    os.chdir(before)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any optional package, on which no model may be loaded."""
    monkeypatch.setattr("whet.extras.find_spec", lambda name: None)
    monkeypatch.setattr(
        "whet.models.load._loaded", lambda *_, **__: pytest.fail("a model was loaded before the refusal")
    )


SFT: dict[str, Any] = {"model": "m", "data": "t.jsonl", "out": "out"}
GRPO: dict[str, Any] = {"model": "m", "data": "p.jsonl", "out": "out", "reward": "rules.py:good", "max_new_tokens": 4}
SAMPLE: dict[str, Any] = {"model": "m", "data": "p.jsonl", "out": "answers.jsonl", "max_new_tokens": 4}
EVAL: dict[str, Any] = {"model": "m", "against": "m", "data": "p.jsonl", "max_new_tokens": 4}
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
READY: dict[str, tuple[str, dict[str, Any]]] = {
    "math_match": ("math_verify", {}), "json_schema": ("jsonschema", {"schema": {}}), "language": ("py3langid", {"language": "en"}),
    "sentiment": ("vaderSentiment", {}),
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any], str, tuple[str, ...]]] = [
    ("grpo", GRPO | {"generator": "vllm"}, "generator.name: vllm", ("vllm",)),
    ("sample", SAMPLE | {"generator": "vllm"}, "generator.name: vllm", ("vllm",)),
    ("eval", EVAL | {"judge": "rules.py:good", "generator": "vllm"}, "generator.name: vllm", ("vllm",)),
    ("serve", {"model": "m"}, "generator.name: vllm", ("vllm",)),
    *(("sft", SFT | {"learner": one}, f"learner.backend: {one}", ("deepspeed",)) for one in ("zero1", "zero2", "zero3")),
    ("sft", SFT | {"cluster": "auto"}, "cluster.address: a cluster", ("ray",)),
    ("grpo", GRPO | {"cluster": "auto"}, "cluster.address: a cluster", ("ray",)),
    ("sft", SFT | {"data": "some/set"}, "some/set: a dataset by name (there is no such file)", ("datasets",)),
    ("sft", SFT | {"data": "saved"}, "saved: a saved dataset", ("datasets",)),
    ("sft", SFT | {"eval": "some/set"}, "some/set: a dataset by name (there is no such file)", ("datasets",)),
    ("grpo", GRPO | {"ptx": "some/set"}, "some/set: a dataset by name (there is no such file)", ("datasets",)),
    *(("sft", SFT | {"trackers": [one]}, f"trackers: {one}", ("accelerate", one)) for one in TRACKERS),
    ("sample", SAMPLE | {"reward": [{"source": "./rm"}, {"source": "sentiment"}]}, "reward.1: sentiment", ("vaderSentiment",)),
    ("eval", EVAL | {"judge": [{"source": "./rm"}, {"source": "sentiment"}]}, "judge.1: sentiment", ("vaderSentiment",)),
    *((verb, given | {field: [{"source": name, "options": options}]}, f"{field}.0: {name}", (module,))
        for name, (module, options) in READY.items()
        for verb, given, field in (
            ("grpo", GRPO, "reward"), ("sample", SAMPLE, "reward"), ("eval", EVAL, "judge"),
            ("grpo", GRPO | {"eval": {"data": "p.jsonl"}}, "eval.judge"))),
]  # fmt: skip


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("verb", "given", "what", "modules"), CASES, ids=lambda one: one if isinstance(one, str) else ""
)
def test_it_is_told_early_in_one_line(verb: str, given: dict[str, Any], what: str, modules: tuple[str, ...]) -> None:
    call: Any = {"sample": whet.sample, "eval": whet.evaluate, "serve": whet.serve}.get(verb)
    with pytest.raises(UserError) as raised:
        call(**given) if call else whet.train(verb, **given)
    check(str(raised.value), what, modules)
    assert not Path("out").exists()


def check(said: str, what: str, modules: tuple[str, ...]) -> None:
    """The message names what needs which packages, and its command installs all of them, with the ranges of the extras."""
    found = re.fullmatch(
        r"(.+) needs the packages? (.+), which (?:is|are) not installed; pip install (.+?)( \(.+\))?", said
    )
    assert found, said
    assert found[1] == what
    wanted = [one for module in modules for one in REQUIREMENTS[module]]
    assert [one.strip('"') for one in found[3].split()] == wanted
    assert found[2].split(" and ") == [Requirement(REQUIREMENTS[one][0]).name for one in modules]
    assert (found[4] is not None) == (modules == ("vllm",))


@pytest.mark.usefixtures("bare")
def test_a_base_in_four_bits_names_both_packages() -> None:
    from whet.models.load import check_four_bit

    with pytest.raises(UserError) as raised:
        check_four_bit(torch.device("cuda"))
    check(str(raised.value), "model.quantize: a base in 4 bits", ("accelerate", "bitsandbytes"))


def test_every_optional_package_is_tried_here() -> None:
    assert {one for *_, modules in CASES for one in modules} | {"bitsandbytes"} == REQUIREMENTS.keys()


def test_the_requirements_are_those_of_the_extras() -> None:
    extras = named([one for name, given in PROJECT["optional-dependencies"].items() if name != "dev" for one in given])
    told = named([one for given in REQUIREMENTS.values() for one in given] + [one for _, one in VARIANTS.values()])
    assert {name: told[name] for name in told if name in extras} == {
        name: extras[name] for name in extras if name in told
    }
    assert told.keys() - extras.keys() == {
        "aim",
        "clearml",
        "comet-ml",
        "dvclive",
        "swanlab",
    }  # in no extra: not tested here
    assert extras.keys() - told.keys() == {"gguf"}  # of proof/real.py
    for name, given in named(PROJECT["optional-dependencies"]["dev"]).items():
        assert given == extras.get(name, given), name


def test_what_the_package_imports_is_required_or_checked() -> None:
    required = named(PROJECT["dependencies"])
    known = packages_distributions()
    seen = set()
    for path in sorted(HOUSE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            seen |= {one.partition(".")[0] for one in modules}
    for module in sorted(seen - set(sys.stdlib_module_names) - {"whet"}):
        if module in WITH:
            parents = named([one for one in requires(WITH[module]) or [] if "extra ==" not in one])
            assert canonicalize_name(known[module][0]) in parents, module
        else:
            assert module in REQUIREMENTS or required.keys() & set(map(canonicalize_name, known[module])), module


def test_no_message_names_the_package_on_an_index() -> None:
    for path in [*sorted(HOUSE.rglob("*.py")), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        assert "whet[" not in path.read_text(), (
            f"{path}: whet is on no package index; see whet.extras and docs/install.md"
        )


def test_a_folder_of_the_same_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "swanlab").mkdir()
    (tmp_path / "dvclive").mkdir()
    (tmp_path / "dvclive" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert not installed("swanlab")
    assert installed("dvclive")
    assert installed("torch")


def test_nothing_is_told_of_what_is_installed() -> None:
    require("here: this", "datasets", "jsonschema")
    assert command("a>=1,<2", "b", upgrade=True) == 'pip install --upgrade "a>=1,<2" b'


def test_the_page_lists_every_extra_with_its_packages() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    rows = re.findall(r"^\| (`.+?`) \| (.+?) \|", page, re.MULTILINE)
    listed = {name for names, _ in rows for name in re.findall(r"`(.+?)`", names)}
    assert listed == PROJECT["optional-dependencies"].keys()
    for names, packages in rows:
        for name in set(re.findall(r"`(.+?)`", names)) - {"dev"}:
            for one in named(PROJECT["optional-dependencies"][name]):
                assert one in map(canonicalize_name, re.findall(r"[\w-]+", packages)), (name, one)
    assert " or ".join(", ".join(supported()).rsplit(", ", 1)) in page
