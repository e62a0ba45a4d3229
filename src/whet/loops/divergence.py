"""Signs that a run diverges, read from its metrics. Each is reported once, with its likely cause and what to try."""

from collections.abc import Iterator, Mapping
from typing import Any

from whet.errors import CheckpointError

MOVED = 4.0
"""Largest mean change of the policy's log-probs in one step, in nats per token."""
KL_ONCE, KL_TWICE = 8.0, 3.0
"""Largest KL to the reference in nats per token: in any step, and in two steps in a row."""
ENTROPY = 0.02
"""Smallest entropy as a share of that of the first step; the first step must have at least `LEAST_ENTROPY`."""
LEAST_ENTROPY = 0.1
AT_LIMIT, NOT_AT_LIMIT, ANSWERS = 0.95, 0.5, 64
"""Share of truncated answers that is reported, if the first answers of the run had at most the other share; both over at least
so many answers."""
FLAT = 5
"""Steps in a row without any difference between the scores."""
SETTLED = 10
"""Steps after which the largest loss is taken as the scale of a loss."""
AT_ONCE, IN_A_ROW = 4.0, 2.0
"""How far a loss rises above the largest one so far, as a multiple of 1 + that one: in any step, and in `ROW` steps in a row."""
CRITIC = 30.0
"""The same in a row for the loss of a critic, whose scale follows the rewards."""
ROW = 3


class Divergence:
    """Rules on the metrics of each step, from 1. The rules compare with earlier steps, whose numbers are in `state`.

    A sign that is fatal ends the run if `train.on_divergence` is "stop". Scores without differences are not fatal, since a
    task that is learned has them too.
    """

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._most: dict[str, float] = {}
        self._count: dict[str, int] = {}
        self._said: list[str] = []

    def state(self) -> dict[str, Any]:
        """Return the numbers of earlier steps, as JSON values."""
        return {"first": self._first, "most": self._most, "count": self._count, "said": self._said}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore the result of `state`. Raises CheckpointError for values of other types."""
        numbers = [*saved["first"].values(), *saved["most"].values(), *saved["count"].values()]
        if not all(isinstance(one, (int, float)) for one in numbers) or not all(
            isinstance(one, str) for one in saved["said"]
        ):
            raise CheckpointError(
                f"the state of a checkpoint has a value of a wrong type in divergence: {saved!r:.200}; restore it"
            )
        self._first, self._most = dict(saved["first"]), dict(saved["most"])
        self._count, self._said = dict(saved["count"]), list(saved["said"])

    def signs(
        self, step: int, numbers: Mapping[str, float], moved: float = 0.0, answers: int = 0
    ) -> list[tuple[str, bool]]:
        """Return the signs of divergence in the metrics of a step with `answers` answers, each with whether it is fatal.

        `moved` is the mean absolute change of the policy's log-probs on fixed tokens in this step, in nats per token.
        """
        found = []
        signs = [*self._of_losses(step, numbers), *self._of_policy(numbers, moved)]
        signs += [*self._of_lengths(numbers, answers), *self._of_scores(numbers, answers)]
        for name, text, fatal in signs:
            if self.once(name):
                found.append((text, fatal))
        if "entropy" in numbers:
            self._first.setdefault("entropy", numbers["entropy"])
        return found

    def once(self, name: str) -> bool:
        """Return True for the first call with this name in a run."""
        if name in self._said:
            return False
        self._said.append(name)
        return True

    def _in_a_row(self, name: str, holds: bool, times: int = 2) -> bool:
        """Count the steps in a row in which a condition holds, and return whether there are `times` of them now."""
        self._count[name] = self._count.get(name, 0) + 1 if holds else 0
        return self._count[name] >= times

    def _of_losses(self, step: int, numbers: Mapping[str, float]) -> Iterator[tuple[str, str, bool]]:
        """Compare the loss of an offline run, and the losses of the critic of an online one, with the largest one so far."""
        for name in numbers:
            critic = name.startswith("loss/critic/")
            if not critic and name != "loss":
                continue
            value, most = numbers[name], self._most.get(name, numbers[name])
            rise = (value - most) / (1.0 + abs(most))
            high = step > SETTLED and rise > (CRITIC if critic else IN_A_ROW)
            explodes = self._in_a_row(name, high, ROW) or (not critic and rise > AT_ONCE)
            if not high:
                self._most[name] = max(most, value)
            if explodes:
                what, field = ("the loss of the critic", "critic.optim.lr") if critic else ("the loss", "optim.lr")
                yield (
                    name,
                    f"{what} is {value:.4g}, and was at most {most:.4g} before; it explodes. Probably the learning rate is too "
                    f"high{_rate(numbers, 'critic' if critic else '')}: lower {field}, or warm up longer (optim.warmup_ratio)",
                    True,
                )

    def _of_policy(self, numbers: Mapping[str, float], moved: float) -> Iterator[tuple[str, str, bool]]:
        """Look at the change of the policy in a step, its KL to the reference, its entropy, and the lengths of its answers."""
        if not moved <= MOVED:
            yield (
                "moved",
                f"the log-probs of the policy changed by {moved:.2f} nats per token in one step; the policy is another one now. Probably "
                f"the learning rate is too high{_rate(numbers)}: lower optim.lr, or take fewer updates per rollout (rollout.ppo_epochs)",
                True,
            )
        if "kl" in numbers:
            kl = numbers["kl"] / max(numbers["length"], 1.0)
            if self._in_a_row("kl", kl > KL_TWICE) or kl > KL_ONCE:
                yield (
                    "kl",
                    f"the KL to the reference is {kl:.2f} nats per token ({numbers['kl']:.4g} per answer); the policy runs away from "
                    f"it. Lower optim.lr{_rate(numbers)}, or raise the coefficient of the KL (kl_in_reward.coef, kl_in_loss.coef)",
                    True,
                )
        if "entropy" in numbers:
            first, now = self._first.get("entropy", 0.0), numbers["entropy"]
            if self._in_a_row("entropy", first >= LEAST_ENTROPY and now < ENTROPY * first):
                yield (
                    "entropy",
                    f"the entropy of the policy is {now:.2g} nats per token, and was {first:.2g} in the first step; all answers to a "
                    "prompt become the same, and nothing more is learned. Lower optim.lr, raise entropy.ent_coef or clip_high, or check "
                    "whether one answer earns the reward for every prompt",
                    True,
                )

    def _of_lengths(self, numbers: Mapping[str, float], answers: int) -> Iterator[tuple[str, str, bool]]:
        """Compare the share of truncated answers with that of the first answers of the run."""
        if "truncated" not in numbers:
            return
        now, seen = numbers["truncated"], self._first.get("truncated.answers", 0.0)
        if seen < ANSWERS:
            self._first["truncated"] = (self._first.get("truncated", 0.0) * seen + now * answers) / max(
                seen + answers, 1
            )
            self._first["truncated.answers"] = seen + answers
            return
        first = self._first["truncated"]
        at_limit = first <= NOT_AT_LIMIT and now >= AT_LIMIT
        self._count["answers at the limit"] = self._count.get("answers at the limit", 0) + answers if at_limit else 0
        if self._in_a_row("truncated", at_limit) and self._count["answers at the limit"] >= ANSWERS:
            yield (
                "truncated",
                f"{now:.0%} of the answers reach sampling.max_new_tokens, and {first:.0%} did at the start; the policy no longer ends "
                "its answers. Check whether the reward favors length; penalize it (overlong, truncated), or raise the limit",
                True,
            )

    def _of_scores(self, numbers: Mapping[str, float], answers: int) -> Iterator[tuple[str, str, bool]]:
        """Look for steps in a row without differences between the scores that are compared."""
        if "score" not in numbers or answers < 2:
            return
        flat = numbers["zero_spread"] == 1.0 if "zero_spread" in numbers else numbers["score_std"] == 0.0
        if self._in_a_row("flat", flat, FLAT):
            yield (
                "flat",
                f"the scores of the answers that are compared were equal in the last {FLAT} steps (mean {numbers['score']:.4g} now), so "
                "nothing is learned. The task is learned, or too hard, or the reward is at a bound: check it, or give other prompts",
                False,
            )


def _rate(numbers: Mapping[str, float], role: str = "") -> str:
    """Return the learning rate of a role, or else of the trained model, in words."""
    names = [f"lr/{role}"] if role else ["lr/policy", "lr/reward"]
    return next((f" (now {numbers[name]:.3g})" for name in names if name in numbers), "")
