import resource
import subprocess
import sys

import pytest

from whet.cli.main import OFFLINE, ONLINE, OTHERS

WHET = [sys.executable, "-m", "whet"]
VERBS = [verb.replace("_", "-") for verb in {**OFFLINE, **ONLINE, **OTHERS}]


def spent(*words: str) -> tuple[subprocess.CompletedProcess, float]:
    """One command in a process of its own, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*WHET, *words], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("words", [("--help",), (), *((verb, "--help") for verb in VERBS)], ids=" ".join)
def test_help_answers_within_half_a_second(words: tuple[str, ...]) -> None:
    best = 9.0
    for _ in range(3):
        done, seconds = spent(*words)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: whet")
        best = min(best, seconds)
        if best < 0.5:
            break
    assert best < 0.5


def test_importing_whet_and_every_help_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, whet\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys(), 'import whet'\n"
        "from whet.cli.main import main\n"
        f"for words in ([], ['--help'], *([verb, '--help'] for verb in {VERBS})):\n"
        "    assert main(words) == 0\n"
        "    assert not {'torch', 'transformers'} & sys.modules.keys(), words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_told() -> None:
    done, _ = spent("--version")
    assert (done.returncode, done.stdout) == (0, "whet 0.1.0\n")


def test_the_overview_names_every_verb() -> None:
    done, _ = spent("--help")
    assert [verb for verb in VERBS if f"  {verb} " not in done.stdout] == []


@pytest.mark.parametrize(("verb", "lines"), [
    ("sft", ["--model.path", "--model.lora.rank", "--data.too-long", "--train.save-every", "--optim.lr"]),
    ("grpo", ["--rollout.prompts", "--sampling.max-new-tokens", "--method.answers", "--method.clip"]),
    ("dpo", ["--reference", "--method.beta"]),
    ("reward", ["--head.readout", "k_way", "--method.ties"]),
    ("sample", ["--count"]), ("rank", ["--judge-form"]), ("eval", ["--against"]), ("demo", ["--out"]),
])  # fmt: skip
def test_a_verbs_help_names_its_fields(verb: str, lines: list[str]) -> None:
    done, _ = spent(verb, "--help")
    assert [line for line in lines if line not in done.stdout] == []


def test_an_unknown_verb_is_named_with_the_nearest_one_without_a_traceback_unless_debugging() -> None:
    done, _ = spent("gpro")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "whet: unknown verb 'gpro'; did you mean 'grpo'?\n"
    done, _ = spent("gpro", "--debug")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("RecipeError: unknown verb 'gpro'; did you mean 'grpo'?\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m whet ppo --help | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "usage: whet ppo [RECIPE.yaml] [--field value ...]\n"
