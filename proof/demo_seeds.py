"""The demo over several seeds: its table, its pictures, and where they were made. Writes docs/demo.md and docs/images.

`python -m proof.demo_seeds` runs the demo with the seeds 0, 1 and 2 into runs/seeds (about six minutes each), or takes the runs that
are there already. The page says with which commit, on which machine and when its runs were made.
"""

import argparse
import datetime
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from whet.data.files import write_json
from whet.demo import tell
from whet.loops.progress import Progress, Shown
from whet.loops.record import read_metrics
from whet.loops.screen import Screen
from whet.view import plots
from whet.view.samples import read as read_answers

ROOT = Path(__file__).parent.parent
MADE = "made.json"
"""The file of a demo with the commit, the machine and the day."""
Row = tuple[str, Callable[[Mapping[str, Any]], Sequence[float]], str]
"""A row of the table: its name, its one or two numbers in summary.json, and their format."""


def of(*path: str) -> Callable[[Mapping[str, Any]], Any]:
    """A function that returns what stands at a path of keys."""

    def found(tree: Any) -> Any:
        for key in path:
            tree = tree[key]
        return tree

    return found


def pair(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[[Mapping[str, Any]], Sequence[float]]:
    """A function that returns the numbers of two functions."""
    return lambda summary: (first(summary), second(summary))


def aspect(name: str) -> Callable[[Mapping[str, Any]], Sequence[float]]:
    """The rate of an aspect before and after PPO."""
    return pair(of("aspects", "sft", name), of("aspects", "ppo", name))


def single(found: Callable[..., Any]) -> Callable[[Mapping[str, Any]], Sequence[float]]:
    """A function that returns one number as a sequence."""
    return lambda summary: (found(summary),)


ROWS: Sequence[Row] = (
    ("reward model, accuracy on noise-free pairs", single(of("reward_model_accuracy")), ".3f"),
    ("reward model, accuracy on noisy pairs (ceiling)", pair(of("reward_model_accuracy_noisy"), of("reward_model_ceiling_noisy")), ".3f"),
    ("gold, SFT -> PPO (at most 3)", pair(of("models", "sft", "gold"), of("models", "ppo", "gold")), ".2f"),
    ("win rate of PPO against SFT", single(of("models", "ppo", "win_rate_vs_sft")), ".3f"),
    ("KL to SFT, nats per answer", single(of("models", "ppo", "kl_to_sft")), ".1f"),
    ("asked facts settled, SFT -> PPO", aspect("settled"), ".2f"),
    ("invents a fact that the card lacks, SFT -> PPO", aspect("invented"), ".3f"),
    ("says that the card lacks it, SFT -> PPO", aspect("honest"), ".2f"),
    ("states a wrong value, SFT -> PPO", aspect("wrong_value"), ".3f"),
    ("loss on raw text, PPO-ptx and PPO without ptx", pair(of("raw_loss", "ppo"), of("raw_loss", "ppo_without_ptx")), ".2f"),
    ("over-optimized: gold at its top, at the end", pair(of("early_stopping", "gold_top"), of("early_stopping", "gold_end")), ".2f"),
    ("over-optimized: step of the top", single(of("early_stopping", "top_step")), ".0f"),
    ("with early stopping: step kept, last step", pair(of("early_stopping", "best_step"), of("early_stopping", "stopped_at")), ".0f"),
    ("with early stopping: gold of the model kept", single(of("early_stopping", "gold_best")), ".2f"),
    ("with early stopping: win rate against SFT, other prompts", single(of("early_stopping", "win_rate_vs_sft")), ".3f"),
)  # fmt: skip


def demo(seed: int, out: Path) -> None:
    """Run the demo of a seed in a process of its own, and note how it was made. Do nothing if it is there."""
    if (out / MADE).is_file():
        return
    how = made()
    subprocess.run([sys.executable, "-m", "whet", "demo", "--seed", str(seed), "--out", str(out)], check=True)
    write_json(out / MADE, how)


def made() -> dict[str, str]:
    """Return the commit (with "-dirty" if files differ from it), the machine and the day."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    import torch

    return {
        "commit": done.stdout.strip() or "unknown", "machine": f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores",
        "software": f"Python {platform.python_version()}, torch {torch.__version__}", "day": datetime.date.today().isoformat(),
    }  # fmt: skip


def cell(values: Sequence[float], form: str) -> str:
    """Return one or two numbers as text."""
    return " -> ".join(f"{value:{form}}" for value in values)


def spread(rows: Sequence[Sequence[float]], form: str) -> str:
    """Return the mean over the seeds, and in brackets the smallest and the largest value."""
    columns = zip(*rows, strict=True)
    return " -> ".join(f"{sum(one) / len(one):{form}} ({min(one):{form}} to {max(one):{form}})" for one in columns)


def table(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table in Markdown: a row per number, a column per seed, and mean and range."""
    seeds = [f"seed {one['seed']}" for one in summaries]
    lines = [f"| | {' | '.join(seeds)} | mean (range) |", f"|{'---|' * (len(seeds) + 2)}"]
    for name, read, form in ROWS:
        found = [tuple(read(one)) for one in summaries]
        cells = [cell(one, form) for one in found]
        lines.append(f"| {name} | {' | '.join(cells)} | {spread(found, form)} |")
    return lines


def page(folders: Sequence[Path]) -> str:
    """Return the text of docs/demo.md."""
    summaries = [json.loads((one / "summary.json").read_text()) for one in folders]
    known = [json.loads((one / MADE).read_text()) for one in folders]
    runs = [f"commit {one['commit']}, {one['machine']}, {one['software']}, {one['day']}" for one in known]
    seconds = ", ".join(f"{one['seconds']:.0f}" for one in summaries)
    text = f"""# The demo over several seeds

`make demo-seeds` wrote this page. Each seed has its own data and models. 400 held-out prompts, temperature 1; a tie counts one half.
The numbers depend on the machine. Made with: {"; ".join(dict.fromkeys(runs))}. Seconds per seed: {seconds}.

TABLE

Gold is the score of a judge that training never sees; 3 is the best. The over-optimized run is PPO against a reward model from 150
rankings, without a KL term. It is evaluated every 3 steps by gold on a quarter of the held-out prompts. The run with early stopping is the
same run with `--early-stop 3`.

![proxy and gold of the over-optimized run](images/proxy_gold.svg)

The first held-out prompts of seed {summaries[0]["seed"]}, not chosen, with the answer of SFT and that of PPO:

SAMPLES
"""
    return text.replace("TABLE", "\n".join(table(summaries))).replace("SAMPLES", samples(folders[0]))


def samples(folder: Path, count: int = 3) -> str:
    """Return the first held-out prompts of a demo with the answers before and after PPO, as blocks of code in Markdown."""
    lines = (folder / "answers_ppo.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    texts = [f"{row['prompt']}\n\nSFT: {row['against']}\nPPO: {row['answer']}" for row in rows]
    return "\n\n".join(f"```text\n{text.replace('```', '')}\n```" for text in texts)


def alone(plot: plots.Plot) -> str:
    """Return a plot as an SVG file of its own, with its style."""
    style = (ROOT / "src/whet/view/report.css").read_text()
    text = str(plots.svg(plot, 760, 340))
    head = text.index(">") + 1
    names = "".join(
        f'<text x="{64 + 200 * place}" y="14" class="{kind}"><tspan class="n">■ {name}</tspan></text>'
        for place, (kind, name) in enumerate(plots.legend(plot))
    )
    background = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    opened = text[:head].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{opened}<style>{style}</style>{background}{names}{text[head:]}\n"


def terminal(run: Path, step: int) -> str:
    """Return the live view of a run after some of its steps, as an SVG file."""
    from rich.console import Console

    rows, clock = [row for row in read_metrics(run) if row["step"] <= step], 0.0
    progress = Progress("instructgpt", int(read_metrics(run)[-1]["step"]), quiet=True)
    for row in rows:
        progress.history.add({name: value for name, value in row.items() if name != "step"})
        clock, progress.done = clock + row.get("seconds", 0.0), int(row["step"])
        progress._times.append((clock, progress.done))
    shown = read_answers(run / f"eval/step-{step:08d}.parquet")[0]
    progress.sample = Shown(shown.prompt, shown.text, shown.score or 0.0, step)
    screen = Screen(progress)
    screen.console = Console(
        record=True, width=100, height=34, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    screen.unicode = True
    screen.console.print(screen.render())
    text = screen.console.export_svg(title="whet instructgpt")
    begin, end = text.index("@font-face"), text.rindex("@font-face")
    return text[:begin] + text[text.index("}", end) + 1 :]  # the fonts would be loaded from the net


def main(words: Sequence[str] | None = None) -> int:
    """Run the demos and write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/seeds", help="folder of the demos, one per seed")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of demo.md and images")
    given = parser.parse_args(words)
    folders = [given.out / str(seed) for seed in given.seeds]
    for seed, folder in zip(given.seeds, folders, strict=True):
        demo(seed, folder)
    images = given.docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    (given.docs / "demo.md").write_text(page(folders), encoding="utf-8")
    summary = json.loads((folders[0] / "summary.json").read_text())
    over = tell.curve(folders[0] / "over_optimized")
    plot = tell.proxy_plot("Over-optimized: proxy and gold", over, int(summary["early_stopping"]["best_step"]))
    (images / "proxy_gold.svg").write_text(alone(plot), encoding="utf-8")
    ppo = folders[0] / "ppo"
    steps = [int(path.stem.removeprefix("step-")) for path in sorted((ppo / "eval").glob("step-*.parquet"))]
    (images / "terminal.svg").write_text(terminal(ppo, steps[-2]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
