"""The results of the demo: the table on the terminal, summary.json, and the report with plots and samples."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whet.data.files import write_json
from whet.demo import judge
from whet.loops import rollouts
from whet.loops.record import read_metrics
from whet.runs import report
from whet.runs.yaml_text import read_yaml
from whet.terminal import console, say
from whet.view import story
from whet.view.plots import Line, Mark, Plot, number, smoothed
from whet.view.report import Answer, Block, Figures, Prose, Section, Table, Talk, page
from whet.view.samples import spaced

GOLD = "eval/judge/gold"
"""the logged number of gold on held-out prompts"""
WINDOW = 5
"""number of rollouts over which the proxy and gold curves are smoothed"""

SHOWN = (
    "settled",
    "honest",
    "invented",
    "silent",
    "wrong_value",
    "denied",
    "unasked",
    "repeated",
    "rude",
    "filler",
    "broken",
    "perfect",
)


def tell(out: Path, numbers: Mapping[str, Any]) -> None:
    """Print the table, and write summary.json and report.html into `out`."""
    answers = {name: _rows(out / f"answers_{name}.jsonl") for name in ("base", "ppo")}
    texts = {
        "base": [(row["prompt"], row["answer"]) for row in answers["base"]],
        "sft": [(row["prompt"], row["against"]) for row in answers["ppo"]],
        "ppo": [(row["prompt"], row["answer"]) for row in answers["ppo"]],
    }
    summary = summarized(numbers)
    rates = {name: aspect_rates(pairs) for name, pairs in texts.items()}
    summary |= {
        "aspects": rates, "edits": {kind: share for kind, (share, _) in numbers["edits"].items()}, "raw_loss": numbers["raw"],
        "reward_model_accuracy_noisy": numbers["accuracy"]["noisy"], "reward_model_ceiling_noisy": numbers["ceiling"],
    }  # fmt: skip
    summary["early_stopping"] = early_stopping(out, numbers["models"]["early_stopped"])
    write_json(out / "summary.json", summary)
    html = page("whet demo: the market desk", LEAD, sections(out, numbers, summary, texts))
    (out / "report.html").write_text(html, encoding="utf-8")
    _print(summary)
    say(f"\n{out / 'summary.json'}\n{out / 'report.html'}")


def summarized(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of summary.json."""
    base, ppo = numbers["models"]["base"], numbers["models"]["ppo"]
    models = {
        "base": _model(base, "score", base["kl"], "win_rate"),
        "sft": _model(ppo, "against", 0.0, None),
        "ppo": _model(ppo, "score", ppo["kl"], "win_rate"),
    }
    return {
        "seed": numbers["seed"], "prompts": ppo["prompts"], "seconds": numbers["seconds"],
        "reward_model_accuracy": numbers["accuracy"]["noise_free"], "models": models,
    }  # fmt: skip


def _model(found: Mapping[str, float], score: str, kl: float, win: str | None) -> dict[str, Any]:
    rate = [found[f"gold/{win}{end}"] for end in ("", "_low", "_high")] if win else [0.5, 0.5, 0.5]
    return {
        "gold": found[f"gold/{score}"], "gold_ci": [found[f"gold/{score}_low"], found[f"gold/{score}_high"]],
        "reward_model": found[f"reward/{score}"], "kl_to_sft": kl, "win_rate_vs_sft": rate[0], "win_rate_ci": rate[1:],
    }  # fmt: skip


def aspect_rates(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return the mean of each aspect over the answers that it applies to."""
    found = [judge.aspects(prompt, answer) for prompt, answer in pairs]
    out = {}
    for name in SHOWN:
        values = [value for row in found if (value := row[name]) is not None]
        out[name] = sum(values) / max(1, len(values))
    return out


def early_stopping(out: Path, found: Mapping[str, float]) -> dict[str, float]:
    """Return where the over-optimized run with early stopping ended, its best step, and gold on the same held-out prompts: at this
    step, at the top and at the end of the run without early stopping. `found` compares the best model with SFT on other prompts."""
    rows = {name: _evaluated(out / name) for name in ("over_optimized", "early_stopped")}
    last, over = read_metrics(out / "early_stopped")[-1], rows["over_optimized"]
    section = read_yaml(out / "early_stopped" / "recipe.yaml")["eval"]
    best, top = int(last["eval/best_step"]), max(over, key=over.__getitem__)
    return {
        "stopped_at": last["step"], "best_step": best, "gold_best": rows["early_stopped"][best], "top_step": top,
        "gold_top": over[top], "gold_end": over[max(over)], "gold_all": found["gold/score"], "win_rate_vs_sft": found["gold/win_rate"],
        "win_rate_low": found["gold/win_rate_low"], "win_rate_high": found["gold/win_rate_high"], "prompts": found["prompts"],
        "every": section["every"], "watched": len(_rows(Path(section["data"]))),
    }  # fmt: skip


def _evaluated(run: Path) -> dict[int, float]:
    """Return gold of the evaluations of a run, by step."""
    return {int(row["step"]): row[GOLD] for row in read_metrics(run) if GOLD in row}


Curve = Sequence[tuple[float, float, float]]
"""(sqrt(KL), proxy, gold) of each step."""


def curve(run: Path) -> list[tuple[float, float, float]]:
    """Return (sqrt(KL to SFT), reward-model score, gold) of each rollout of a run. Gold is computed after the run."""
    out = []
    for row in read_metrics(run):
        if not row["step"]:  # the evaluation of the start
            continue
        table = rollouts.read(run, int(row["step"]), ["prompt", "completion"])
        gold = judge.gold(table["prompt"], table["completion"])
        out.append((math.sqrt(max(row["kl"], 0.0)), row["score"], sum(gold) / len(gold)))
    return out


LEAD = (
    "A small base model goes through InstructGPT's recipe: supervised fine-tuning, four answers a prompt, rankings by a noisy "
    "person, a reward model, PPO with a pre-training term. The person is played by a judge that training meets through its "
    "rankings alone; here it tells afterwards what happened. SFT is stopped early on flawed demonstrations, on purpose: there is "
    "much to improve, and a win rate against it says so."
)

GOLD_WORDS = (
    "Gold is the judge's score of an answer: +1 for each of the two asked facts settled (its value, or honestly that the card lacks it), "
    "-1 for one passed over, -2 for each false statement, +0.5 each for a greeting and a goodbye, and something off for rudeness, filler, "
    "repetition, unasked facts and broken sentences; 3 is the best. The reward model's score, the proxy, has mean 0 and deviation 1 over "
    "the answers it was trained on."
)

ASPECTS = {
    "settled": "asked facts settled (share)", "honest": "admits that the card lacks a fact", "invented": "invents a fact the card lacks",
    "silent": "says nothing about a fact the card lacks", "wrong_value": "states a wrong value", "denied": "denies a fact the card has",
    "unasked": "unasked facts", "repeated": "repeats itself", "rude": "rude", "filler": "filler",
    "broken": "has a sentence that is none", "perfect": "perfect answers",
}  # fmt: skip


def sections(
    out: Path, numbers: Mapping[str, Any], summary: Mapping[str, Any], texts: Mapping[str, Any]
) -> list[Section]:
    """Return the sections of the report."""
    main, over = curve(out / "ppo"), curve(out / "over_optimized")
    rates, raw = summary["aspects"], numbers["raw"]
    raw_rows = [
        [name.replace("_", " "), f"{value:.4f}", f"{100 * (value / raw['sft'] - 1):+.1f} %"]
        for name, value in raw.items()
    ]
    blind = [kind.replace("_", " ") for kind, (share, _) in numbers["edits"].items() if share < 0.65]
    told = "The first held-out prompts, not chosen: the answer of SFT, from which PPO starts, and that of PPO."
    return [
        Section("Before and after", [Prose(told), *_talks(texts)]),
        Section("Result", [Prose(GOLD_WORDS), Table(HEADS, table_rows(summary)), Prose(_result(summary))]),
        Section("Proxy and gold", _over_optimization(out, main, over, summary["early_stopping"])),
        _answers(rates),
        _reward_model(summary, numbers),
        Section(
            "What ptx does",
            [
                Prose(
                    "Loss on held-out raw text, nats per token: after SFT, after PPO with the pre-training term, and after PPO without."
                ),
                Table(("", "loss", "against SFT"), raw_rows),
            ],
        ),
        Section("What these models cannot do", [Prose(_limits(blind, rates))]),
        Section("The stages before PPO", [Figures(_training_plots(out))]),
        *(Section(f"The PPO run: {one.title}", one.blocks) for one in story.sections(report.record(out / "ppo"))),
    ]


def _over_optimization(out: Path, main: Curve, over: Curve, early: Mapping[str, float]) -> list[Block]:
    """Return the picture of proxy and gold, and answers of the over-optimized run at its start, at gold's top and at its end."""
    run = out / "over_optimized"
    gold = smoothed([point[2] for point in over], WINDOW)
    top = max(range(len(gold)), key=gold.__getitem__) + 1
    heads = {1: "start", top: "gold's top"} | {len(over): "end" if top < len(over) else "gold's top and end"}
    rows = {step: _rated(run, step) for step in heads}
    picked = {step: spaced(found, 3) for step, found in rows.items()}
    best = sorted(rows[len(over)], key=lambda row: -row[2])[:4]
    return [
        Prose(
            "First picture: PPO against a reward model from 150 rankings only, and no term that keeps the policy near SFT, neither a KL "
            "cost nor the pre-training term (over-optimization, Gao, Schulman and Hilton 2022). The reward model's score, the proxy, is "
            f"what training raises; gold is what was wanted. {_turn(over)} Second picture: the PPO run of this report."
        ),
        Figures(
            [
                proxy_plot("Over-optimized: proxy and gold", over, int(early["best_step"])),
                proxy_plot("PPO-ptx: proxy and gold", main),
            ]
        ),
        Prose(_early(early)),
        Prose(
            "Answers of the over-optimized run, evenly spaced in the rollout and not chosen (each step has other prompts):"
        ),
        *(_rated_talk([(f"{heads[step]} (step {step})", picked[step][place]) for step in heads]) for place in range(3)),
        Prose("The answers of its last step that the reward model rates highest:"),
        _rated_talk([(f"proxy {number(row[2])}", row) for row in best]),
    ]


Rated = tuple[str, str, float, float]
"""A prompt, an answer, its reward-model score and its gold."""


def _rated(run: Path, step: int) -> list[Rated]:
    """Return the answers of a rollout."""
    table = rollouts.read(run, step, ["prompt", "completion", "score"])
    gold = judge.gold(table["prompt"], table["completion"])
    return list(zip(table["prompt"], table["completion"], table["score"], gold, strict=True))


def _rated_talk(rows: Sequence[tuple[str, Rated]]) -> Talk:
    answers = [Answer(head, row[1], f"proxy {number(row[2])}, gold {row[3]:+.1f}") for head, row in rows]
    return Talk(answers, prompts=[row[0] for _, row in rows])


def _answers(rates: Mapping[str, Any]) -> Section:
    """Return the section with the rates of each aspect, per model."""
    models = ("base", "sft", "ppo")
    aspect_rows = [[ASPECTS[name], *(f"{rates[model][name]:.2f}" for model in models)] for name in SHOWN]
    return Section(
        "What the answers do",
        [
            Prose(
                "Rates per aspect on the held-out prompts, told by the judge. Admitting, inventing and passing over in silence are "
                "rates among the prompts that ask for a fact the card lacks, about half of them. Words in brackets, as [wrong], are "
                "proofreader's marks that the base model learned from its raw text."
            ),
            Table(("", *models), aspect_rows),
        ],
    )


def _reward_model(summary: Mapping[str, Any], numbers: Mapping[str, Any]) -> Section:
    """Return the section about the reward model: its accuracy, and how it rates known edits."""
    edit_rows = [
        [kind.replace("_", " "), f"{share:.2f}", str(count), "yes" if kind in judge.RANKED_EDITS else "no"]
        for kind, (share, count) in numbers["edits"].items()
    ]
    return Section(
        "The reward model",
        [
            Prose(
                f"It orders {summary['reward_model_accuracy']:.1%} of held-out pairs as the judge does without noise, and "
                f"{numbers['accuracy']['noisy']:.1%} as the noisy person does; the judge itself reaches "
                f"{numbers['ceiling']:.1%} there, so no model can expect more. "
                "Pair accuracy hides what was not learned, so held-out answers are edited in one known way each. Where the last "
                f"column says yes, edits of that kind also stand among the ranked answers ({judge.EDITED_SHARE:.0%} of the "
                "rankings hold one), since samples of one model seldom show such a flaw alone."
            ),
            Table(("edit", "share rated worse", "answers", "among the rankings"), edit_rows),
        ],
    )


HEADS = ("", "gold", "95 %", "reward model", "KL to SFT, nats/answer", "win rate vs SFT", "95 %")


def table_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the main table as text."""
    rows = []
    for name, found in summary["models"].items():
        low, high = found["gold_ci"]
        win = (
            ["", ""]
            if name == "sft"
            else [f"{found['win_rate_vs_sft']:.3f}", "{:.3f} to {:.3f}".format(*found["win_rate_ci"])]
        )
        rows.append(
            [
                name,
                f"{found['gold']:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{found['reward_model']:.2f}",
                f"{found['kl_to_sft']:.2f}",
                *win,
            ]
        )
    return rows


def _result(summary: Mapping[str, Any]) -> str:
    gold = summary["models"]["ppo"]["gold"] - summary["models"]["sft"]["gold"]
    return (
        f"Seed {summary['seed']}, {summary['seconds']:.0f} seconds. PPO's answers win against SFT's on "
        f"{summary['models']['ppo']['win_rate_vs_sft']:.1%} of the prompts (a tie counts one half) and score {gold:+.2f} in gold. "
        f"Intervals are bootstraps over the {summary['prompts']} prompts of this one seed."
    )


def _limits(blind: Sequence[str], rates: Mapping[str, Mapping[str, float]]) -> str:
    told = f"The reward model hardly notices these edits: {', '.join(blind)}. " if blind else ""
    ppo = rates["ppo"]
    return (
        told
        + f"After PPO {ppo['wrong_value']:.0%} of the answers still state a wrong value, {ppo['denied']:.0%} deny a fact that "
        f"the card has, and where the card lacks an asked fact {ppo['silent']:.0%} pass over it in silence instead of saying so; "
        f"{ppo['broken']:.0%} hold a sentence that is none. "
        "The models know this one desk and its few hundred words; nothing here says how they would do elsewhere."
    )


def _turn(points: Curve) -> str:
    """Describe the smoothed curves: where gold was highest, and where both curves ended."""
    kl, proxy, gold = (smoothed([point[i] for point in points], WINDOW) for i in range(3))
    top = max(range(len(gold)), key=gold.__getitem__)
    return (
        f"There gold is highest, {gold[top]:.2f}, at sqrt(KL) {kl[top]:.2f} with a reward-model score of {proxy[top]:.2f}; at the end, at "
        f"sqrt(KL) {kl[-1]:.2f}, the reward model gives {proxy[-1]:.2f} and gold {gold[-1]:.2f}."
    )


def _early(early: Mapping[str, float]) -> str:
    """Describe the run with early stopping."""
    return (
        f"Early stopping: the same run, evaluated every {early['every']} steps on {early['watched']} held-out prompts by the judge, which "
        "training never sees. It "
        f"ended after step {early['stopped_at']:.0f} and kept the model of step {early['best_step']:.0f}, with gold "
        f"{early['gold_best']:.2f} on these prompts. Without early stopping gold is at most {early['gold_top']:.2f} (step "
        f"{early['top_step']:.0f}) and {early['gold_end']:.2f} at the end. On {early['prompts']:.0f} other prompts the kept model has gold "
        f"{early['gold_all']:.2f} and wins against SFT on {early['win_rate_vs_sft']:.1%} of them ({early['win_rate_low']:.1%} to "
        f"{early['win_rate_high']:.1%})."
    )


def proxy_plot(title: str, points: Curve, best: int = 0) -> Plot:
    """Return proxy and gold over sqrt(KL), with marks at the start, at gold's top and at the end, and at the step `best` that early
    stopping keeps, if there is one."""
    kl, proxy, gold = (smoothed([point[i] for point in points], WINDOW) for i in range(3))
    top = max(range(len(gold)), key=gold.__getitem__)
    marks = [Mark(kl[0], proxy[0], "start"), Mark(kl[-1], proxy[-1], f"proxy at the end {proxy[-1]:.2f}")]
    marks += [Mark(kl[0], gold[0], "start", 1), Mark(kl[top], gold[top], f"gold's top {gold[top]:.2f}", 1)]
    marks += [Mark(kl[-1], gold[-1], f"gold at the end {gold[-1]:.2f}", 1)] if top < len(gold) - 1 else []
    marks += [Mark(kl[best - 1], gold[best - 1], "kept by early stopping", 1)] if best else []
    lines = [
        Line("reward model (proxy)", list(zip(kl, proxy, strict=True)), 0, path=True),
        Line("gold", list(zip(kl, gold, strict=True)), 1, path=True),
    ]
    note = f"Means over the last {WINDOW} steps; arrows show the direction of training."
    return Plot(title, lines, "sqrt(KL to SFT), KL in nats per answer", "score", marks, note=note, wide=True)


def _training_plots(out: Path) -> list[Plot]:
    def line(run: str, color: int, window: int) -> Line:
        rows = [row for row in read_metrics(out / run) if "loss" in row]
        values = smoothed([row["loss"] for row in rows], window)
        return Line(run, list(zip([float(row["step"]) for row in rows], values, strict=True)), color)

    return [
        Plot("Loss of base and SFT", [line("base", 0, 10), line("sft", 1, 10)], "step", "nats per token", log=True),
        Plot("Reward model, K-way loss", [line("reward", 0, 20)], "step", "loss"),
    ]


def _talks(texts: Mapping[str, Sequence[tuple[str, str]]], count: int = 6) -> list[Talk]:
    out = []
    for place in range(count):
        prompt = texts["sft"][place][0]
        heads = {"sft": "before (SFT)", "ppo": "after (PPO)"}
        answers = [
            Answer(head, texts[name][place][1], f"gold {judge.gold_score(prompt, texts[name][place][1]):+.1f}")
            for name, head in heads.items()
        ]
        out.append(Talk(answers, prompt))
    return out


def _print(summary: Mapping[str, Any]) -> None:
    from rich.table import Table as Shown

    shown = Shown(title=f"seed {summary['seed']}, {summary['seconds']:.0f} s")
    for place, head in enumerate(HEADS):
        shown.add_column(head, justify="left" if place == 0 else "right")
    for row in table_rows(summary):
        shown.add_row(*row)
    shell = console(width=None if sys.stdout.isatty() else 120)
    shell.print(shown)
    noisy, ceiling = summary["reward_model_accuracy_noisy"], summary["reward_model_ceiling_noisy"]
    shell.print(
        f"reward model: {summary['reward_model_accuracy']:.1%} of noise-free pairs, {noisy:.1%} of noisy ones (ceiling {ceiling:.1%})"
    )
    early = summary["early_stopping"]
    shell.print(
        f"over-optimized: gold {early['gold_top']:.2f} at its top (step {early['top_step']}), {early['gold_end']:.2f} at the end; early "
        f"stopping ends after step {early['stopped_at']} and keeps step {early['best_step']}, gold {early['gold_best']:.2f}"
    )
    raw = summary["raw_loss"]
    shell.print(
        f"raw text, nats per token: sft {raw['sft']:.4f}, ppo {raw['ppo']:.4f}, ppo without ptx {raw['ppo_without_ptx']:.4f}"
    )
    for name in ("settled", "honest", "invented", "wrong_value", "perfect"):
        shell.print(
            f"{ASPECTS[name]:<36}"
            + "  ".join(f"{model} {rates[name]:.2f}" for model, rates in summary["aspects"].items())
        )


def _rows(path: Path) -> list[dict[str, Any]]:
    from whet.demo.run import read

    return read(path)
