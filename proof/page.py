"""docs/methods.md, made of the catalogue, the choices and the proof's table, and docs/metrics.md, made of the table of metrics.

python -m proof.page
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whet.loops.metrics import ALL, FAMILIES, METRICS, OFFLINE, ROLLOUT
from whet.methods import catalogue
from whet.methods.choices import (
    LABELS,
    ONLINE_SLOTS,
    OPTIONS,
    PAIR_LOSSES,
    PLAIN_SLOTS,
    REWARD_SLOTS,
    SCORES,
    SINGLE_LOSSES,
    Choice,
)
from whet.methods.compose import choice_options
from whet.methods.explain import in_words

DOCS = Path(__file__).parent.parent / "docs"

HEAD = """# Methods

Made by `python -m proof.page` from the catalogue (`src/whet/methods/catalogue.py`), the choices of every slot
(`src/whet/methods/choices.py`) and the table of `make proof`; a test keeps it fresh. A method is a row of names and numbers:
what stands in which slot. Every slot of every method can be changed in the recipe (`algorithm: {surrogate: {name: clip,
clip_high: 0.28}}`) or on the command line (`--surrogate.clip-high 0.28`, `--advantage leave_one_out`), and `whet explain METHOD
[RECIPE.yaml]` prints the whole objective with the numbers filled in.

pi now, pi_old when the rollout was taken, pi_ref the reference, pi_sampler what the generator reported; rho the ratio
pi / pi_old; A the advantage; s the score of an answer y of |y| trained tokens; r_t the reward of token t, R their
sum; V the critic; sg[.] has no gradient; w and l the rewards of the chosen and the rejected answer.
"""

REDUCTIONS = """## Reductions, and where they coincide

All counts are global: over all micro-batches, so no split changes a number (`tests/loops/test_invariance.py`).

- `token_mean` = `sequence_mean` where all answers are equally long; = `sequence_sum` / |y| then
  (`tests/ops/test_reduce.py`).
- `sequence_sum` = `fixed_length` x length; = `sequence_mean` where every answer has one token.
- `clip` = `unclipped` in the first update of a rollout (rho = 1); its gradient is `reinforce`'s there, and so are
  those of `cispo`, `sapo` and `dppo`.
- ratio `sequence` = `token` for answers of one token; `sequence_token` has the value of `sequence` and, where A is
  one number an answer, its gradient.
- `group_center` = (G - 1) / G x `leave_one_out`; `group_zscore` = `group_center` / deviation.
- `gae` with gae_lambda 1 = `monte_carlo` - V; with V = 0 it is `monte_carlo`; `gae_adaptive` = `gae` with gae_lambda = 1 - 1 /
  (alpha |y|).
- `log_exp` = `pairwise` without margin; `k_way` of two answers = `pairwise`; `dpo` with `policy_score` = `cpo`, with
  its mean and a margin `simpo`.
- `token_weight` with a cap that is not reached = `token_mask` inside its bounds = pi_old / pi_sampler; all
  corrections are 1 where both agree.

Attention weights (`reward_placement: attention`): the policy's own last layer, at the sample's tokens, when the rollout was
taken; the query is the answer's last trained token, the keys are its trained tokens; heads are joined by their mean
(or the largest head at each token), then the weights are divided by their sum, so they sum to 1. They carry no
gradient (`tests/learner/test_columns.py`).
"""

TRAP = """## Where methods end: a KL in the loss is a trap

With r the score and beta the coefficient, the optimum of the KL-regularized problem is pi*(y|x) = pi_ref(y|x) exp(r /
beta) / Z. A KL **in the reward** (k1, or exact, which puts each token's own part in the loss) leads there. A KL **in
the loss** is differentiated through the sampled tokens alone: it ignores that a token changes the KL of later tokens,
the group's mean makes beta G / (G - 1), the group's deviation divides the reward but not the KL, and k3's gradient is
that of KL(reference || policy). So each method's own end is computed by enumeration (its expected update, written out
by hand in `proof/cases.py`, followed until it vanishes), and the real loop with the real generator must reach it. To
end at pi* with a KL in the loss use `k2_sequence` with `leave_one_out` and `sequence_sum`. (For answers of one token
k2, k3_weighted and exact are right too, and k3 still is not.)
"""


def cell(text: Any) -> str:
    """Text for a table's cell."""
    return str(text).replace("|", "\\|")


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(cell(one) for one in row)} |" for row in rows), ""]


def slot(slots: Mapping[str, Any], name: str) -> str:
    """What stands in a slot, "-" for nothing."""
    value = slots.get(name)
    return "-" if value in (None, 0, 0.0) else in_words(value)


def online_rows() -> list[list[str]]:
    """One row per online method."""
    columns = (
        "kl_in_reward", "advantage", "normalize_advantage", "ratio", "surrogate", "kl_in_loss", "reduction",
    )  # fmt: skip
    shown = {*columns, "num_generations", "reward_placement", "combine", "value", "truncated"}
    rows = []
    for name, one in catalogue.ONLINE.items():
        s = one.slots
        other = [
            f"{key}: {in_words(value)}" for key, value in s.items() if key not in shown and value not in (None, 0, 0.0)
        ]
        if s["value"] and s["value"] != catalogue.ONLINE["ppo"].slots["value"]:
            other.append(f"value: {in_words(s['value'])}")
        filled = [slot(s, key) for key in columns]
        rows.append([f"`{name}`", one.source, s["num_generations"], *filled, "; ".join(other) or "-"])
    return rows


def choice_rows(choices: Mapping[str, Choice]) -> list[list[str]]:
    """One row per choice of a slot."""
    rows = []
    for name, one in choices.items():
        options = ", ".join(
            f"{option} {in_words(value)}"
            for option, value in choice_options(one).items()
            if isinstance(value, (int, float, str))
        )
        rows.append([f"`{name}`", one.formula, options or "-", one.source or "-"])
    return rows


def peers() -> list[list[str]]:
    """Every choice whose definition peers have otherwise."""
    tables = {
        **ONLINE_SLOTS,
        "score": SCORES,
        "pairs": LABELS,
        "loss": PAIR_LOSSES | SINGLE_LOSSES,
        "reward loss": REWARD_SLOTS["loss"],
    }
    return [
        [where, f"`{name}`", one.peers] for where, known in tables.items() for name, one in known.items() if one.peers
    ]


def proof() -> dict[str, Any]:
    """The table of the last `make proof`; empty where none was run."""
    file = DOCS / "proof.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"about": {}, "cases": {}}


TABLES = {
    "by hand": "tests/methods",
    "invariance": "tests/loops/test_invariance.py",
    "learning": "tests/loops/test_learning.py",
}


def collected(paths: str) -> set[str]:
    """Every word in the parameters of the tests that pytest finds below a path."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:warnings", paths],
        cwd=DOCS.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = re.findall(r"\[(.*)\]$", done.stdout, re.MULTILINE)
    return {word for one in found for word in re.split(r"[-\s,]", one)}


def evidence() -> list[list[str]]:
    """Every method and what shows that it is right: the tests are asked whether they have it."""
    cases = proof()["cases"]
    rows = []
    words = {name: collected(paths) for name, paths in TABLES.items()}
    known = {**catalogue.ONLINE, **catalogue.ONLINE_PREFERENCE, **catalogue.PREFERENCE, **catalogue.REWARD}
    for name in known:
        own = {case: row for case, row in cases.items() if row["method"] == name}
        ends = "; ".join(f"{case}: {max(row['left']):.4f} (below {row['bound']:g})" for case, row in own.items())
        rows.append([f"`{name}`", ends or "-", *("yes" if name in words[one] else "-" for one in TABLES)])
    return rows


def trap_rows() -> list[list[str]]:
    """Every case of the proof: how far its end is from pi*, and how near the loop came."""
    return [
        [
            name,
            f"{row['start']:.3f}",
            f"{row['elsewhere']:.4f}",
            " ".join(f"{one:.5f}" for one in row["left"]),
            f"{row['bound']:g}",
        ]
        for name, row in proof()["cases"].items()
    ]


def text() -> str:
    """The page."""
    about = proof()["about"]
    said = ", ".join(f"{key} {value}" for key, value in about.items()) or "not run yet"
    head = [
        "method",
        "source",
        "num_generations",
        "KL in the reward",
        "advantage",
        "normalize_advantage",
        "ratio",
        "surrogate",
        "KL in the loss",
        "reduction",
        "else",
    ]
    out = [HEAD, "## Online methods", ""]
    out += table(head, online_rows())
    out += ["Where a method's defaults differ from its source:", ""]
    for group in (catalogue.ONLINE, catalogue.ONLINE_PREFERENCE, catalogue.PREFERENCE):
        out += [f"- `{name}`: {'; '.join(one.differs)}" for name, one in group.items() if one.differs]
    out += [
        "",
        "## Preference methods",
        "",
        "`online_dpo` makes its pairs from its own answers, in the same loop as RL.",
        "",
    ]
    both = {**catalogue.PREFERENCE, **catalogue.ONLINE_PREFERENCE}
    out += table(
        ["method", "source", "about", "beta", "score", "loss", "SFT weight"],
        [
            [
                f"`{name}`",
                one.source,
                one.about,
                *(slot(one.slots, key) for key in ("beta", "score", "loss", "sft_weight")),
            ]
            for name, one in both.items()
        ],
    )
    out += ["## Reward models", "", "`whet reward --algorithm.name NAME`.", ""]
    out += table(
        ["method", "source", "about"], [[f"`{name}`", one.source, one.about] for name, one in catalogue.REWARD.items()]
    )
    out += ["## The parts of every slot", ""]
    for name, known in {**ONLINE_SLOTS, "implicit_reward (preference)": SCORES,
                        "pairs (online preference)": LABELS, "loss (pairs)": PAIR_LOSSES, "loss (single answers)": SINGLE_LOSSES,
                        "loss (reward models)": REWARD_SLOTS["loss"]}.items():  # fmt: skip
        out += [f"### {name}", "", *table(["part", "formula", "options", "source"], choice_rows(known))]
    out += ["### slots with a number or a record", ""]
    out += [f"- `{name}`: {meaning}" for name, (_, meaning) in PLAIN_SLOTS.items()]
    out += ["", "### options", "", *(f"- `{name}`: {meaning}" for name, (_, meaning) in OPTIONS.items()), ""]
    out += [
        REDUCTIONS,
        TRAP,
        f"`make proof`: {said} (2.5 times as many where z-scores keep the noise up). KL in nats, a mean over prompts; one "
        "number a seed.",
        "",
    ]
    out += table(["case", "start to its end", "its end to pi*", "left to its end", "bound"], trap_rows())
    out += ["## What peers do otherwise", "", *table(["slot", "part", "peers"], peers())]
    out += ["## Methods and evidence", ""]
    out += [
        "Own end: `make proof`, nats left, the worst seed. By hand: `tests/methods`. Invariance to micro-batches, order, "
        "padding, NaN and packing: "
        "`tests/loops/test_invariance.py`. Learning over three seeds: `tests/loops/test_learning.py`. The tests are asked "
        "which methods they have when this page is made. Mutants: `make mutants`. The formulas as vectors for other "
        "implementations: `docs/conformance`.",
        "",
    ]
    out += table(["method", "own end", "by hand", "invariance", "learning"], evidence())
    return "\n".join(out).rstrip() + "\n"


METRICS_HEAD = """# Metrics

Made by `python -m proof.page` from the table that the loops log from (`src/whet/loops/metrics.py`); a test keeps it fresh. A number
that is not in the table cannot be logged, except numbers of your own (`step.log({...})` in a session).

`metrics.jsonl` in the run folder has one line per step, from 1. All numbers are global: over the whole batch of an update, all of
its micro-batches and all workers, so no split changes them. "Mean over the updates" means that the number is computed for each update
of the step, and averaged. The numbers of a rollout are from before its updates.

pi is the policy now, pi_old the policy when the rollout was taken, pi_ref the reference, pi_sampler what the generator reported; rho
the ratio pi / pi_old; A the advantage; s the score of an answer y; r_t the reward of token t; V the critic; R the return. Trained
tokens are those that the policy wrote (offline: those of the answers). Logs are natural. "Better" says which direction is an
improvement; without an entry, neither is by itself. Numbers in bold are in the live view and in the summary of a run.
"""
KINDS = {
    ALL: "all",
    ROLLOUT: "online methods",
    OFFLINE: "all methods on rows",
    (*ROLLOUT, "reward"): "online methods, reward models",
}


def metrics_text() -> str:
    """The page of metrics."""
    training = [one for one in METRICS if not one.evaluation]
    groups = {
        "Online methods": [one for one in training if one.of != ALL and one.of[0] in ROLLOUT],
        "Methods on rows": [one for one in training if one.of != ALL and one.of[0] in OFFLINE],
        "All methods": [one for one in training if one.of == ALL],
        "Evaluation": [one for one in METRICS if one.evaluation],
    }
    out = [METRICS_HEAD]
    for title, found in groups.items():
        rows = []
        for one in found:
            name = f"**`{one.name}`**" if one.shown else f"`{one.name}`"
            methods = KINDS.get(one.of) or ", ".join(FAMILIES[family] for family in one.of)
            rows.append([name, one.formula, one.unit, one.better or "", methods, one.when, one.source])
        out += [f"## {title}", "", *table(["name", "formula", "unit", "better", "methods", "if", "known as"], rows)]
    return "\n".join(out).rstrip() + "\n"


if __name__ == "__main__":
    (DOCS / "methods.md").write_text(text(), encoding="utf-8")
    (DOCS / "metrics.md").write_text(metrics_text(), encoding="utf-8")
    sys.exit(0)
