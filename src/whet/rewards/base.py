"""The Reward protocol, the table of rewards, and functions that run several rewards and check their results."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from whet.data import Group, Sample, pad
from whet.errors import RewardError
from whet.registry import Registry


@dataclass(frozen=True)
class Scores:
    """The scores of one reward for all answers, in the order of the groups' samples.

    `answer` (B,) has one score per answer. A dense reward also has `token`, one tensor (|ids|,) per answer, whose sum is
    the score of the answer, and `ends`, one bool tensor (|ids|,) per answer that is True where a step ends. If `ends` is
    None, a step ends at every token. `applies` (B,) bool is False where the reward does not apply to an answer; its scores
    there are not read. If it is None, the reward applies to every answer. `reasons` may say in a few words why an answer has its
    score; they change nothing.
    """

    answer: Tensor
    token: tuple[Tensor, ...] | None = None
    ends: tuple[Tensor, ...] | None = None
    applies: Tensor | None = None
    reasons: tuple[str, ...] | None = None

    def known(self) -> Tensor:
        """Return to which answers the reward applies, (B,) bool."""
        return torch.ones(len(self.answer), dtype=torch.bool) if self.applies is None else self.applies

    def listed(self) -> list[float | None]:
        """Return the score of each answer, None where the reward does not apply."""
        pairs = zip(self.answer.tolist(), self.known().tolist(), strict=True)
        return [score if applies else None for score, applies in pairs]


class Reward(Protocol):
    """A reward, which scores the answers of groups."""

    def score(self, groups: Sequence[Group]) -> Scores:
        """Return a score for every answer, or that it does not apply. Raises RewardError for a wrong number of scores, a wrong
        type, or NaN."""


REWARDS = Registry(
    "rewards",
    {
        "http": "whet.rewards.http",
        "openai": "whet.rewards.openai",
        "exact_match": "whet.rewards.verifiers.exact_match",
        "numeric_match": "whet.rewards.verifiers.numeric_match",
        "math_match": "whet.rewards.verifiers.math_match",
        "regex": "whet.rewards.verifiers.regex",
        "json_schema": "whet.rewards.verifiers.json_schema",
        "length": "whet.rewards.verifiers.length",
        "repetition": "whet.rewards.verifiers.repetition",
        "language": "whet.rewards.verifiers.language",
        "sentiment": "whet.rewards.verifiers.sentiment",
        "unit_tests": "whet.rewards.verifiers.unit_tests",
    },
    Reward,
)
"""The rewards that are made from options alone. Functions and reward models are recognized by their source. `make` gets the source,
`check` the field of the recipe."""


@dataclass(frozen=True)
class Weighted:
    """A reward with its name in the logs and its weight in the sum."""

    name: str
    reward: Reward
    weight: float = 1.0


def score_all(
    rewards: Sequence[Weighted], groups: Sequence[Group]
) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
    """Return (name -> (B,) unweighted scores, (B, T) weighted sum of the dense scores, (B, T) True where a step ends,
    name -> (B,) True where the reward applies, for the rewards that do not apply to every answer).

    T is the length of the longest answer. The second tensor is 0 if no reward is dense. A reward that scores whole answers
    has one step per answer, which ends at the last trained token. A reward that does not apply to an answer has the score 0
    and no step there. Raises RewardError for an answer to which no reward applies.
    """
    answers = [sample for group in groups for sample in group.samples]
    named: dict[str, Tensor] = {}
    applies: dict[str, Tensor] = {}
    longest = max(len(sample.ids) for sample in answers)
    total, step = torch.zeros(len(answers), longest), torch.zeros(len(answers), longest, dtype=torch.bool)
    for one in rewards:
        scores = one.reward.score(groups)
        own = scores.known()[:, None]
        named[one.name] = scores.answer
        if scores.applies is not None:
            applies[one.name] = scores.applies
        if scores.token is not None:
            total = total + one.weight * pad(scores.token, longest)
            ends = scores.ends or [torch.ones(len(token), dtype=torch.bool) for token in scores.token]
            step |= pad(ends, longest) & own
        else:
            step |= ends_of(answers) & own
    check_scored([one.name for one in rewards], groups, applies)
    return named, total, step, applies


def check_scored(names: Sequence[str], groups: Sequence[Group], applies: Mapping[str, Tensor]) -> None:
    """Raise RewardError for the first answer to which none of the rewards `names` applies. `applies` is that of `score_all`."""
    if not names or any(name not in applies for name in names):
        return
    scored = torch.stack([applies[name] for name in names]).any(0).tolist()
    places = ((group.prompt, number) for group in groups for number in range(len(group.samples)))
    for (prompt, number), known in zip(places, scored, strict=True):
        if not known:
            text = prompt.text if prompt.messages else ""
            raise RewardError(
                f"no reward applies to answer {number} of the prompt row {prompt.id} ({text!r:.60}): {', '.join(names)} returned "
                "None; give a score for it, or leave the row out of the data"
            )


def ends_of(answers: Sequence[Sample]) -> Tensor:
    """Return (B, T) bool, True on the last token of each answer that the policy wrote."""
    out = torch.zeros(len(answers), max(len(sample.ids) for sample in answers), dtype=torch.bool)
    out[torch.arange(len(answers)), torch.tensor([_last_trained(sample) for sample in answers])] = True
    return out


def _last_trained(sample: Sample) -> int:
    """Return the position of the last token that the policy wrote."""
    trained = sample.trained()
    return max((place for place, own in enumerate(trained) if own), default=len(trained) - 1)


def shares(groups: Sequence[Group], count: int) -> list[Sequence[Group]]:
    """Split the groups into `count` runs of similar size, in order; some are empty if there are fewer groups."""
    return [groups[len(groups) * one // count : len(groups) * (one + 1) // count] for one in range(count)]


def joined(parts: Sequence[Scores | None]) -> Scores:
    """Concatenate the scores of several runs of groups. Raises RewardError if some are dense and others not. A run in which the
    reward applies to no answer is as the others are."""
    found = [part for part in parts if part is not None]
    telling = [part for part in found if bool(part.known().any())] or found
    if len({part.token is None for part in telling}) > 1:
        raise RewardError("a reward scored some answers per token and others as a whole; score all per token or none")
    answer = torch.cat([part.answer for part in found])
    partial = any(part.applies is not None for part in found)
    applies = torch.cat([part.known() for part in found]) if partial else None
    if telling[0].token is None:
        said = [part.reasons for part in found]
        reasons = None if None in said else tuple(reason for own in said for reason in own or ())
        return Scores(answer, applies=applies, reasons=reasons)
    token = tuple(one for part in found for one in part.token or ())
    if all(part.ends is None for part in telling):
        return Scores(answer, token, applies=applies)
    every = [part.ends or [torch.ones(len(one), dtype=torch.bool) for one in part.token or ()] for part in found]
    return Scores(answer, token, tuple(one for part in every for one in part), applies)


def checked(values: object, answers: Sequence[Sample], name: str) -> Scores:
    """Convert the value that a user's function returned to Scores.

    Accepted values are one number per answer, or for each answer a list with one number per token, or for each answer a
    list of (last token of the segment, number). None in place of the number or the list of an answer says that the reward does
    not apply to it. Raises RewardError with the value for anything else.
    """
    try:
        return _converted(values, answers, name)
    except RewardError:
        raise
    except Exception as error:  # a meta or sparse tensor, a list whose length fails, numbers that no text can show
        raise RewardError(
            f"reward {name}: what it returned, of the type {type(values).__name__}, cannot be read ({type(error).__name__}); return a "
            "list with one number per answer"
        ) from error


def _converted(values: object, answers: Sequence[Sample], name: str) -> Scores:
    if isinstance(values, (Tensor,)) or hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise RewardError(f"reward {name}: expected a list with one score per answer, got {type(values).__name__}")
    if len(values) != len(answers):
        raise RewardError(f"reward {name}: {len(answers)} answers were given, {len(values)} scores came back")
    values = [value.tolist() if getattr(value, "ndim", 0) and value.shape != (1,) else value for value in values]
    known = torch.tensor([value is not None for value in values], dtype=torch.bool)
    applies = None if bool(known.all()) else known
    listed = [isinstance(value, Sequence) and not isinstance(value, str) for value in values]
    if not any(listed):
        numbers = [0.0 if value is None else _number(value, name, place) for place, value in enumerate(values)]
        return _silenced(Scores(torch.tensor(numbers), applies=applies), answers)
    segments = any(isinstance(one, Sequence) for value in values if isinstance(value, Sequence) for one in value)
    token = tuple(
        torch.zeros(len(sample.ids)) if value is None else _dense(value, sample, name, place, segments)
        for place, (value, sample) in enumerate(zip(values, answers, strict=True))
    )
    ends = None
    if segments:
        ends = tuple(torch.zeros(len(sample.ids), dtype=torch.bool) for sample in answers)
        for own, value in zip(ends, values, strict=True):
            own[[one[0] for one in value or ()]] = True
    return Scores(torch.stack([one.sum() for one in token]), token, ends, applies)


def _silenced(scores: Scores, answers: Sequence[Sample]) -> Scores:
    """Return the scores with 0 where the reward does not apply. If it applies to no answer, also with scores per token: other
    workers may have such scores, and a sum of zeros changes no others."""
    if scores.applies is None:
        return scores
    kept = scores.applies
    answer = torch.where(kept, scores.answer, torch.zeros_like(scores.answer))
    token, ends = scores.token, scores.ends
    if not bool(kept.any()):
        token = token or tuple(torch.zeros(len(sample.ids)) for sample in answers)
        ends = tuple(torch.zeros(len(sample.ids), dtype=torch.bool) for sample in answers)
    if token is not None:
        token = tuple(one if own else torch.zeros_like(one) for one, own in zip(token, kept.tolist(), strict=True))
    return Scores(answer, token, ends, kept, scores.reasons)


def checked_scores(scores: Scores, answers: Sequence[Sample], name: str) -> Scores:
    """Return the scores of a user's reward class. Raises RewardError for a wrong shape or a number that is not finite."""
    if not isinstance(scores.answer, Tensor) or tuple(scores.answer.shape) != (len(answers),):
        got = tuple(scores.answer.shape) if isinstance(scores.answer, Tensor) else type(scores.answer).__name__
        raise RewardError(f"reward {name}: Scores.answer must be a tensor of shape ({len(answers)},), got {got}")
    if scores.applies is not None and (
        not isinstance(scores.applies, Tensor)
        or scores.applies.dtype != torch.bool
        or scores.applies.shape != scores.answer.shape
    ):
        raise RewardError(
            f"reward {name}: Scores.applies must be a bool tensor of shape ({len(answers)},), got {scores.applies!r:.80}"
        )
    applies = None if bool(scores.known().all()) else scores.applies
    if scores.token is None:
        answer = checked(scores.listed(), answers, name).answer
        return _silenced(Scores(answer, applies=applies, reasons=scores.reasons), answers)
    for tensors, what in ((scores.token, "token"), (scores.ends, "ends")):
        lengths = None if tensors is None else [tuple(one.shape) for one in tensors]
        if lengths is not None and lengths != [(len(sample.ids),) for sample in answers]:
            raise RewardError(f"reward {name}: Scores.{what} must have one tensor (tokens,) per answer, got {lengths}")
    dense = [one.tolist() if own else None for one, own in zip(scores.token, scores.known().tolist(), strict=True)]
    return _silenced(Scores(checked(dense, answers, name).answer, scores.token, scores.ends, applies), answers)


def _dense(value: object, sample: Sample, name: str, place: int, segments: bool) -> Tensor:
    out = torch.zeros(len(sample.ids))
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RewardError(
            f"reward {name}: answer {place} got {value!r}, other answers a list; score all per token or none"
        )
    if segments:
        for one in value:
            if not isinstance(one, Sequence) or isinstance(one, str) or len(one) != 2 or type(one[0]) is not int:
                raise RewardError(
                    f"reward {name}: answer {place}: a segment is (its last token, its score), got {one!r}"
                )
            last, number = one
            if not 0 <= last < len(out):
                raise RewardError(f"reward {name}: answer {place} has {len(out)} tokens, a segment ends at {last}")
            out[last] += _number(number, name, place)
        return out
    if len(value) != len(out):
        raise RewardError(f"reward {name}: answer {place} has {len(out)} tokens, {len(value)} scores came back")
    return torch.tensor([_number(number, name, place) for number in value])


def _number(value: object, name: str, place: int) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        if hasattr(value, "item"):
            return _number(value.item(), name, place)
        raise RewardError(f"reward {name}: answer {place} got {value!r}, expected a number")
    if not abs(value) <= torch.finfo(torch.float32).max:  # also NaN
        raise RewardError(f"reward {name}: answer {place} got {value!r:.40}, expected a finite number")
    return float(value)


def columns_of(groups: Sequence[Group]) -> tuple[list, list[str], Mapping[str, list]]:
    """Return (prompts, completions, other columns) in the form that reward functions take, one entry per answer.

    A single-turn prompt is given as its text, other prompts as lists of messages. The other columns are the remaining
    fields of the prompt row, and `completion_ids`. All values are copies: a function may change them.
    """
    prompts, completions, ids = [], [], []
    rows = []
    for group in groups:
        single = len(group.prompt.messages) == 1
        for sample in group.samples:
            prompts.append(group.prompt.text if single else deepcopy(list(group.prompt.messages)))
            completions.append(sample.text)
            ids.append(list(sample.ids))
            rows.append(group.prompt.row)
    names = set().union(*(row.keys() for row in rows)) - {"prompt"} if rows else set()
    for name in sorted(names & {"prompts", "completions", "completion_ids"}):
        raise RewardError(
            f"the prompt rows have a column {name!r}, but reward functions get that column from whet; rename it"
        )
    return (
        prompts,
        completions,
        {"completion_ids": ids} | {name: [deepcopy(row.get(name)) for row in rows] for name in sorted(names)},
    )


def copied(groups: Sequence[Group]) -> list[Group]:
    """Return the groups with copies of everything that a user's reward class can change: the messages and rows of the prompts."""
    return [
        replace(one, prompt=replace(one.prompt, messages=deepcopy(one.prompt.messages), row=deepcopy(one.prompt.row)))
        for one in groups
    ]
