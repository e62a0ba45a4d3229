"""Rewards from a trained reward model: whet's own, or any published sequence classifier with one label."""

from collections.abc import Callable, Sequence

import torch

from whet.errors import RewardError
from whet.models.readers import read
from whet.models.roles import Role
from whet.records import Batch, Chat, Group, Row, micro_batches
from whet.rewards.base import Scores


class ModelReward:
    """A reward role as a Reward.

    With `chat=None` it has the policy's tokenizer and reads the very ids that were sampled. With a chat format of its
    own, the texts are rendered and tokenised for it. `dense=True` gives its score at every token instead; with `ends`, which
    says of a token id whether a step ends with it, only there and at the end of the answer.
    """

    def __init__(
        self,
        role: Role,
        *,
        chat: Chat | None = None,
        budget: int = 16384,
        dense: bool = False,
        ends: Callable[[int], bool] | None = None,
    ) -> None:
        self.role, self.chat, self.budget, self.dense, self.ends = role, chat, budget, dense, ends
        if dense and chat is not None:
            raise RewardError("a reward model with another tokenizer cannot score the policy's tokens one by one")

    @torch.no_grad()
    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`."""
        rows = [row for group in groups for row in self._rows(group)]
        batch = Batch.of(rows)
        answer, token = torch.zeros(len(rows)), [torch.zeros(0)] * len(rows)
        for places in micro_batches(batch, self.budget):
            name = "token_score" if self.dense else "score"
            values = read(self.role, batch.take(places), frozenset({name}))[name].float().cpu()
            for place, value in zip(places, values, strict=True):
                if self.dense:
                    token[place] = value[: rows[place].response]
                else:
                    answer[place] = value
        steps: list[torch.Tensor] = []
        if self.dense and self.ends is not None:
            for row in rows:
                ids = row.ids[row.start :].tolist()
                steps.append(torch.tensor([self.ends(one) or place == len(ids) - 1 for place, one in enumerate(ids)]))
            token = [torch.where(own, one, torch.zeros_like(one)) for own, one in zip(steps, token, strict=True)]
        if self.dense:
            answer = torch.stack([one.sum() for one in token])
        if not bool(torch.isfinite(answer).all()):
            raise RewardError(f"the reward model {self.role.name} gave a score that is not a finite number")
        return Scores(answer, tuple(token) if self.dense else None, tuple(steps) or None)

    def _rows(self, group: Group) -> list[Row]:
        if self.chat is None:
            return group.rows()
        out = []
        for sample in group.samples:
            row = self.chat.row([*group.prompt.messages, {"role": "assistant", "content": sample.text}], turns="last")
            out.append(row.without_end() if sample.truncated else row)
        return out
