import inspect
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from whet.cli.main import OFFLINE, ONLINE, OTHERS, main

WHET = [sys.executable, "-m", "whet"]
VERBS = [verb.replace("_", "-") for verb in {**OFFLINE, **ONLINE, **OTHERS}]


def spent(*words: str) -> tuple[subprocess.CompletedProcess, float]:
    """One command in a process of its own, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*WHET, *words], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


SOME = ["sft", "reward", "kto", "ppo", "online-dpo", "sample", "demo"]
"""The others' help is made by the same code; that it is made at all is asked of every verb below, in one process."""


@pytest.mark.parametrize("words", [("--help",), (), *((verb, "--help") for verb in SOME)], ids=" ".join)
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
        "import contextlib, io, sys, whet\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys(), 'import whet'\n"
        "from whet.cli.main import main\n"
        f"for words in ([], ['--help'], *([verb, '--help'] for verb in {VERBS})):\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stdout(said):\n"
        "        assert main(words) == 0\n"
        "    verb = f'usage: whet {words[0]} ' if len(words) > 1 else 'usage: whet VERB ['\n"
        "    assert said.getvalue().startswith(verb), words\n"
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


@pytest.mark.parametrize(
    ("verb", "lines"),
    [
        ("sft", ["--model.path", "--model.lora.rank", "--data.too-long", "--train.save-every", "--optim.lr"]),
        (
            "grpo",
            [
                "--rollout.prompts-per-step",
                "--rollout.sync-reference.every",
                "--sampling.max-new-tokens",
                "--algorithm.num-generations",
                "--algorithm.surrogate",
                "--algorithm.surrogate.clip-low",
                "--algorithm.kl-in-reward.coef",
                "--algorithm.kl-in-loss.coef",
                "--algorithm.entropy.target",
                "dual_clip",
            ],
        ),
        (
            "ppo",
            [
                "--algorithm.advantage.gae-lambda",
                "--algorithm.value.clip-range-vf",
                "--algorithm.normalize-advantage.ddof",
                "leave_one_out",
                "--critic.path",
            ],
        ),
        (
            "dpo",
            [
                "--reference",
                "--algorithm.beta",
                "--algorithm.loss.label-smoothing",
                "bco_pair",
                "--precompute",
                "--sync-reference.mix",
            ],
        ),
        ("kto", ["--algorithm.loss.desirable", "--algorithm.loss.undesirable"]),
        ("orpo", ["--algorithm.loss", "--algorithm.sft-weight", "--algorithm.loss.margin"]),
        (
            "reward",
            ["--head.readout", "k_way", "--algorithm.loss.ties", "--algorithm.name", "process", "--data.separator"],
        ),
        ("sample", ["--num-generations", "--reward", "--keep"]),
        ("rank", ["--judge-form"]),
        ("eval", ["--against"]),
        ("serve", ["--port", "--max-model-len", "--tensor-parallel"]),
        ("demo", ["--out"]),
    ],
)
def test_a_verbs_help_names_its_fields(verb: str, lines: list[str]) -> None:
    done, _ = spent(verb, "--help-all")
    assert [line for line in lines if line not in done.stdout] == []


def shown(lines: list[str]) -> dict[str, str]:
    """Option -> what stands in its last brackets."""
    out = {}
    for line in lines:
        if line.startswith("  --"):
            name, _, told = line.strip().partition(" ")
            off = re.search(r"\[off; (.*) if [\w.]+ is set\]$", told)
            out[name] = off[1] if off else told.rpartition(" [")[2][:-1] if told.endswith("]") else ""
    return out


@pytest.mark.parametrize("verb", [verb for verb in (*OFFLINE, *ONLINE) if verb not in ("pretrain", "sft")])
def test_a_verbs_help_tells_every_slot_and_dial_with_its_own_default(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As compose takes them: by the ops' own signatures, which the help may not import."""
    from whet.methods import catalogue
    from whet.methods.choices import ONLINE_SLOTS, PLAIN_SLOTS, PREFERENCE_SLOTS, REWARD_SLOTS
    from whet.methods.compose import choice_options
    from whet.runs import config

    assert main([verb, "--help-all"]) == 0
    told = shown(capsys.readouterr().out.splitlines())
    table = REWARD_SLOTS if verb == "reward" else {**ONLINE_SLOTS, **PREFERENCE_SLOTS}
    for slot, value in catalogue.slots_of(verb).items():
        name = f"--algorithm.{slot.replace('_', '-')}"
        assert name in told
        if slot in PLAIN_SLOTS:
            record = config.section(PLAIN_SLOTS[slot][0])
            for field in config.fields_of(record) if record else ():
                default = getattr(record(**(value or {})), field)
                assert told[f"{name}.{field.replace('_', '-')}"] in (
                    "" if default is None else str(default),
                    str(default),
                )
            assert record or told[name] == str(value)
            continue
        for spec in value if isinstance(value, list) else [value] if value else []:
            for option, default in choice_options(table[slot][spec["name"]]).items():
                own, got = spec.get(option, default), told[f"{name}.{option.replace('_', '-')}"]
                number = isinstance(own, float)
                assert own is inspect.Parameter.empty or (
                    float(got) == own if number else got == ("null" if own is None else str(own))
                )


@pytest.mark.parametrize("verb", [*OFFLINE, *ONLINE, "sample", "rank", "eval"])
def test_what_a_verbs_help_shows_can_be_given_as_it_stands(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    from whet.cli.main import parsed
    from whet.runs import config
    from whet.runs import slots as method
    from whet.runs.recipe import kind_of

    assert main([verb, "--help-all"]) == 0
    told = {name: value for name, value in shown(capsys.readouterr().out.splitlines()).items() if value}
    assert len(told) > 0 or verb == "rank"
    kind = kind_of(verb)
    plain = config.resolve(kind, verb, None, [])
    for name, value in told.items():
        recipe = config.resolve(kind, verb, None, parsed([f"{name}={value}"])[1])
        switched_on = name.startswith(
            ("--model.lora.", "--critic.optim.", "--algorithm.")
        )  # sections that are empty by default
        assert recipe == plain or switched_on, name
        if hasattr(recipe, "method"):
            method.checked(verb, recipe.algorithm, config.leaves(kind))


@pytest.mark.parametrize("verb", [*OFFLINE, *ONLINE])
def test_every_training_verb_is_explained_with_its_numbers_filled_in(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--ptx", "rows.jsonl"] if verb == "instructgpt" else []
    assert main(["explain", verb, *given]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"{verb}")
    assert not {"{", "}"} & set(said.out)


def test_an_unknown_verb_is_named_with_the_nearest_one_without_a_traceback_unless_debugging() -> None:
    done, _ = spent("grop")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "whet: unknown verb 'grop'; did you mean 'grpo'?\n"
    done, _ = spent("grop", "--debug")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("RecipeError: unknown verb 'grop'; did you mean 'grpo'?\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m whet ppo --help | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "usage: whet ppo [RECIPE.yaml] [--field value ...]\n"


@pytest.mark.parametrize("verb", ["ppo", "grpo", "dpo", "sft", "reward"])
def test_the_short_help_shows_few_options_whose_short_names_are_taken(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from whet.runs import config
    from whet.runs.recipe import kind_of

    assert main([verb, "--help"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    assert 8 <= len(lines) <= 28
    for line in lines:
        name = line.split()[0].removeprefix("--").replace("-", "_")
        value = {"data": "x", "model": "x", "out": "x", "reward": "f.py:f", "learner": "fsdp", "generator": "vllm",
                 "chat_template": "plain", "trackers": ["console"],
                 "eval": "x", "keep_best": "eval/loss", "eval.judge": "f.py:f"}.get(name, 1)  # fmt: skip
        config.resolve(kind_of(verb), verb, None, [(name, value)])  # an unknown name would be refused


def test_the_options_of_an_own_part_are_in_the_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(
        "from typing import Annotated\nimport msgspec\n"
        "def f(ratio, advantage, *, width: Annotated[float, msgspec.Meta(gt=0, le=2)] = 0.2, on: bool = True):\n    pass\n"
    )
    assert main(["grpo", "--surrogate", f"{tmp_path}/own.py:f", "--help-all"]) == 0
    told = capsys.readouterr().out
    assert "--algorithm.surrogate.width             float > 0 <= 2 [0.2]" in told
    assert "--algorithm.surrogate.on                bool [True]" in told
    assert main(["grpo", "--generator", "vllm", "--help-all"]) == 0
    assert "--generator.tensor-parallel             GPUs of one engine [1]" in capsys.readouterr().out
