"""Samples of a run: the same prompts at the start, the middle, the best and the end, and the extreme answers of the last step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.errors import DataError
from whet.loops import rollouts
from whet.view.plots import number
from whet.view.record import Run, answer_files, finite
from whet.view.report import Answer, Block, Prose, Talk, cut

PROMPTS = 5
"""Number of prompts that are shown side by side."""
MOST_NOTES = 6
"""Largest number of scores below an answer."""


@dataclass(frozen=True)
class Shown:
    """An answer with its prompt: `key` is the same for answers to one prompt. `kl` is in nats per answer, `length` in tokens."""

    key: str
    prompt: str
    text: str
    scores: Mapping[str, float]
    score: float | None
    kl: float | None
    length: int | None
    truncated: bool

    def note(self) -> str:
        """Return the scores, the KL and the length in words."""
        told = [] if self.score is None else [f"score {number(self.score)}"]
        told += [f"{name} {number(value)}" for name, value in list(self.scores.items())[:MOST_NOTES]]
        told += [] if self.kl is None else [f"KL {number(self.kl)}"]
        told += [] if self.length is None else [f"{self.length} tokens"]
        return cut(", ".join([*told, *(["cut off"] if self.truncated else [])]), 300)


def moments(run: Run, steps: Sequence[int]) -> dict[int, str]:
    """Return the steps among these that are shown, in order, each with its heading: start, middle, best, end."""
    if not steps:
        return {}
    first, last = steps[0], steps[-1]
    middle = min(steps, key=lambda one: abs(one - (first + last) / 2))
    named: dict[int, list[str]] = {}
    for name, step in (("start", first), ("middle", middle), ("best", _nearest(steps, run.best)), ("end", last)):
        if step is not None and not (name == "middle" and step in (first, last)):
            named.setdefault(step, []).append(name)
    return {step: f"{', '.join(named[step])} (step {step})" for step in sorted(named)}


def _nearest(steps: Sequence[int], step: int | None) -> int | None:
    return None if step is None else min(steps, key=lambda one: abs(one - step))


def blocks(run: Run, count: int = PROMPTS) -> list[Block]:
    """Return the samples of a run: side by side, and the extreme ones of the last file."""
    kind, files = answer_files(run.folder)
    if not files:
        return [Prose("This run has no answers: it was trained on the rows of a file, and no evaluation wrote any.")]
    out: list[Block] = []
    known: dict[int, list[Shown]] = {}
    for step in [*moments(run, sorted(files)), max(files)]:
        if step not in known:
            try:
                known[step] = read(files[step])
            except (DataError, OSError, OverflowError) as error:
                known[step] = []
                out.append(Prose(f"The answers of step {step} cannot be shown. {error}", "caution"))
    heads = {step: head for step, head in moments(run, sorted(files)).items() if known[step]}
    out += _side_by_side(kind, heads, known, count)
    last = known[max(files)]
    return [*out, *(_extremes(last, f"the {kind} of step {max(files)}") if last else [])]


def read(path: Path) -> list[Shown]:
    """Return the answers of a file of an evaluation or a rollout. Only the columns that are shown are read. Raises DataError if the
    file is damaged, or lacks the texts."""
    names = rollouts.names_in(path)
    whole = (
        "index",
        "prompt",
        "completion",
        "score",
        "kl",
        "length",
        "truncated",
        "ref_logp",
        "old_logp",
        "old_full_logp",
        "mask",
    )
    scored = [one for one in names if one.startswith(("reward/", "judge/"))]
    table = rollouts.read_file(path, [*(one for one in whole if one in names), *scored])
    if "prompt" not in table or "completion" not in table:
        raise DataError(
            f"{path}: it has no columns prompt and completion, which are needed to show answers; restore the file"
        )
    rewards = [name for name in scored if name.startswith("reward/")]
    only = [name for name in scored if name not in rewards or len(rewards) > 1]  # one reward is the score
    out = []
    for row in range(len(table["prompt"])):
        at = {name: values[row] for name, values in table.items()}
        scores = {name: value for name in only if (value := finite(at.get(name))) is not None}
        length = finite(at.get("length"))
        if length is None and isinstance(at.get("mask"), list):
            length = float(sum(map(bool, at["mask"])))
        key, kl, text = str(at.get("index", at["prompt"])), _kl(at), str(at["completion"])
        out.append(
            Shown(key, str(at["prompt"]), text, scores, finite(at.get("score")), kl, None if length is None else int(length),
                  bool(at.get("truncated")))
        )  # fmt: skip
    return out


def _kl(at: Mapping[str, Any]) -> float | None:
    """Return the KL of an answer: of an evaluation its column, of a rollout the sum of the log-ratios of trained tokens."""
    if not isinstance(at.get("kl"), list) and finite(at.get("kl")) is not None:
        return finite(at["kl"])
    own, reference, mask = at.get("old_full_logp") or at.get("old_logp"), at.get("ref_logp"), at.get("mask")
    if not (isinstance(own, list) and isinstance(reference, list) and isinstance(mask, list)):
        return None
    pairs = zip(own, reference, mask, strict=False)
    return finite(sum((finite(a) or 0.0) - (finite(b) or 0.0) for a, b, trained in pairs if trained))


def _side_by_side(kind: str, heads: Mapping[int, str], known: Mapping[int, list[Shown]], count: int) -> list[Block]:
    """Return the first answers to the same prompts at each of the steps, or of different prompts if none is common."""
    if not heads:
        return []
    by_key: dict[int, dict[str, Shown]] = {step: {} for step in heads}
    for step, own in by_key.items():
        for one in known[step]:
            own.setdefault(one.key, one)
    first, *others = heads
    common = [key for key in dict.fromkeys(one.key for one in known[first]) if all(key in by_key[s] for s in others)]
    chosen = spaced(common, count)
    if chosen and (others or kind == "evaluation"):
        words = "held-out prompts of the evaluations" if kind == "evaluation" else "training prompts of the rollouts"
        told = Prose(f"The first answer to the same {words}, which are evenly spaced in the file and not chosen.")
        talks = [
            Talk([Answer(head, by_key[step][key].text, by_key[step][key].note()) for step, head in heads.items()],
                 by_key[first][key].prompt)
            for key in chosen
        ]  # fmt: skip
        return [told, *talks]
    lines: list[Block] = [
        Prose(
            "No evaluation was made, so these are answers of the rollouts. No prompt stands in all of these rollouts: the prompts "
            "side by side are different ones, evenly spaced in their files and not chosen. Set eval.data to see the same prompts."
        )
    ]
    picked = {step: spaced(list(by_key[step].values()), min(count, 3)) for step in heads}
    for row in range(min(map(len, picked.values()))):
        shown = [picked[step][row] for step in heads]
        answers = [Answer(heads[step], one.text, one.note()) for step, one in zip(heads, shown, strict=True)]
        lines.append(Talk(answers, prompts=[one.prompt for one in shown]))
    return lines


def spaced(values: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` values, evenly spaced.

    >>> spaced([0, 1, 2, 3, 4, 5, 6, 7, 8], 3), spaced([0, 1], 3)
    ([0, 3, 6], [0, 1])
    """
    return [values[i * len(values) // count] for i in range(count)] if len(values) > count else list(values)


def _extremes(answers: Sequence[Shown], where: str) -> list[Block]:
    """Return the best, the worst, the longest and the highest-KL answer."""
    kinds: list[tuple[str, Callable[[Shown], float | None], int]] = [
        ("best score", lambda one: one.score, 1), ("worst score", lambda one: one.score, -1),
        ("longest", lambda one: one.length, 1), ("highest KL", lambda one: one.kl, 1),
    ]  # fmt: skip
    found: list[tuple[str, Shown]] = []
    for name, value, sign in kinds:
        rated = [(known, one) for one in answers if (known := value(one)) is not None]
        if rated:
            found.append((name, max(rated, key=lambda both: sign * both[0])[1]))
    if not found:
        return []
    return [
        Prose(f"Extreme answers among the {len(answers)} of {where}:"),
        Talk([Answer(name, one.text, one.note()) for name, one in found], prompts=[one.prompt for _, one in found]),
    ]
