"""Rewards from a trained reward model: whet's own, or any published sequence classifier with one label."""

from collections.abc import Callable, Mapping, Sequence

import torch

from whet.data import Batch, Chat, Group, Row, extras_of, micro_batches
from whet.errors import RecipeError, RewardError
from whet.models.probe import probe
from whet.models.readers import packs, read, shares
from whet.models.roles import Role
from whet.models.sizes import tokens_of
from whet.rewards.base import Scores

Reading = Callable[[Batch, frozenset[str]], Mapping[str, torch.Tensor]]
"""Function that returns bare columns of a batch, such as `learner.columns` for a reward model that the learner holds."""


def reading(role: Role, budget: int | None, *, packed: bool = True, shared: bool = True) -> Reading:
    """Return a function that runs a role in this process, in micro-batches of at most `budget` tokens (None: see
    `whet.models.sizes`), `packed` and `shared` as in `whet.models.readers.read`. Its first rows are those that the role is tried
    on (see `whet.models.probe`)."""

    @torch.no_grad()
    def read_all(batch: Batch, names: frozenset[str]) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        if role.paths.padding is None:
            probe(role, [row.ids for row in batch.rows], packed=packed)
        flat = packs(role, batch.rows, packed)
        once = flat and shares(role, shared)
        for places in micro_batches(batch, budget or tokens_of(role.model), packed=flat, shared=once):
            for name, values in read(role, batch.take(places), names, packed=packed, shared=shared).items():
                batch.scatter(out, name, places, values.cpu())
        return out

    return read_all


class ModelReward:
    """A reward model as a Reward: a role in this process, or a function that runs the model elsewhere.

    `chat` is the conversation format of the reward model. If it has the policy's tokenizer and template (`same`), the model
    gets the sampled token ids, with what the template writes after its end token. Otherwise the texts
    are rendered and tokenized again. A whole answer is scored at the last token of this text, where the model's own forward
    reads it. `dense=True` returns the score at every token. With `ends`, it returns scores
    only where a step ends and at the end of the answer; `ends(id)` is True if a step ends with this token id.
    """

    def __init__(
        self,
        model: Role | Reading,
        chat: Chat,
        *,
        same: bool = True,
        budget: int | None = None,
        dense: bool = False,
        ends: Callable[[int], bool] | None = None,
    ) -> None:
        self.read = reading(model, budget) if isinstance(model, Role) else model
        self.chat, self.same, self.dense, self.ends = chat, same, dense, ends
        if dense and not same:
            raise RecipeError(
                "reward.dense: a reward model with another tokenizer cannot score the policy's tokens one by one"
            )

    @torch.no_grad()
    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`."""
        rows = [row for group in groups for row in self._rows(group)]
        name = "token_score" if self.dense else "score"
        values = self.read(Batch.of(rows), frozenset({name}))[name].float()
        answer, token = values, [value[: row.response] for value, row in zip(values, rows, strict=True) if self.dense]
        steps: list[torch.Tensor] = []
        if self.dense and self.ends is not None:
            for row in rows:
                ids = row.ids[row.start :].tolist()
                steps.append(torch.tensor([self.ends(one) or place == len(ids) - 1 for place, one in enumerate(ids)]))
            token = [torch.where(own, one, torch.zeros_like(one)) for own, one in zip(steps, token, strict=True)]
        if self.dense:
            answer = torch.stack([one.sum() for one in token])
        if not bool(torch.isfinite(answer).all()):
            raise RewardError("a reward model gave a score that is not a finite number")
        return Scores(answer, tuple(token) if self.dense else None, tuple(steps) or None)

    def _rows(self, group: Group) -> list[Row]:
        prompt, out = group.prompt, []
        for sample in group.samples:
            if self.dense:
                row = self.chat.sampled_row(prompt.ids, sample.ids, trained=sample.trained())
            elif self.same:
                row = self.chat.sampled_row(prompt.ids, sample.ids, closing=True, trained=sample.trained())
            else:
                messages = [*prompt.messages, {"role": "assistant", "content": sample.text}]
                row = self.chat.row(messages, ended=not sample.truncated, closing=True, extras=extras_of(prompt.row))
            out.append(row)
        return out
