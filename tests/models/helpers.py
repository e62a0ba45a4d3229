"""Roles, batches and recording learners on tiny real models, for all tests above the ops."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import tiny
import torch
from torch import Tensor

from whet.data import COLUMNS, Batch, Group, Labeled, Pair, Prompt, Ranking, Row, take_elements
from whet.learner.base import UpdateResult, Work
from whet.learner.local import LocalLearner
from whet.methods.options import LoRA, Optim
from whet.models import load, lora
from whet.models.roles import Role
from whet.rewards import Scores

DOUBLE = torch.float64
FREE = Optim(lr=0.05, max_grad_norm=1e30, schedule="constant")
"""An optimizer that leaves gradients as they are: the clip never acts."""


def scorer_model(kind: str = "qwen3", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A one-label sequence classifier with random weights."""
    from transformers import AutoModelForSequenceClassification

    config = tiny.config(kind, **changes)
    config.num_labels = 1
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config).to(dtype).eval()


def capped(*, seed: int = 0, dtype: torch.dtype = DOUBLE, **changes: Any) -> Any:
    """A model whose logits are capped, and half of whose layers look back a few tokens only."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    given = _GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(Gemma3TextConfig(**(given | changes))).to(dtype).eval()


def gemma2(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The same as a Gemma 2, whose attention is never computed more precisely than in float32 since transformers 5.24."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(Gemma2Config(**_GEMMA)).to(dtype).eval()


_GEMMA = {
    "vocab_size": 27, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": 1, "pad_token_id": 0, "final_logit_softcapping": 3.0, "sliding_window": 4,
}  # fmt: skip


def opt() -> Any:
    """A model with dropout of its own that is a number rather than a module."""
    from transformers import AutoModelForCausalLM, OPTConfig

    torch.manual_seed(0)
    given = {
        "vocab_size": 27,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    return AutoModelForCausalLM.from_config(
        OPTConfig(
            **given,
            max_position_embeddings=128,
            init_std=0.2,
            dropout=0.1,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def policy(
    kind: str = "qwen3", *, seed: int = 0, dtype: torch.dtype = DOUBLE, name: str = "policy", **changes: Any
) -> Role:
    """A policy of its own (or, by `name`, a frozen reference)."""
    return Role(name, tiny.causal_lm(kind, seed=seed, dtype=dtype, **changes), name == "policy")


def scorer(
    kind: str = "qwen3",
    *,
    seed: int = 0,
    dtype: torch.dtype = DOUBLE,
    name: str = "critic",
    vocabulary: int = 27,
    **about: Any,
) -> Role:
    """A trained critic or reward model of its own."""
    return Role(name, scorer_model(kind, seed=seed, dtype=dtype, vocabulary=vocabulary), True, **about)


def trunk(kind: str = "qwen3", *, dtype: torch.dtype = torch.float32, seed: int = 0, rank: int = 4) -> dict[str, Role]:
    """policy, reference and critic on one model: two fresh adapters, and the base itself."""
    model = tiny.causal_lm(kind, seed=seed, dtype=dtype)
    wrapped = lora.attach(model, LoRA(rank=rank, alpha=8.0), ("policy", "critic"), seed=5)
    head = torch.nn.Linear(32, 1, bias=False, dtype=dtype)
    load.draw_head(head, 3)
    return {
        "policy": Role("policy", model, True, wrapped=wrapped, adapter="policy"),
        "reference": Role("reference", model, False, wrapped=wrapped),
        "critic": Role("critic", model, True, wrapped=wrapped, adapter="critic", head=head),
    }


def row(seed: int, prompt: int, answer: int, *, holes: bool = False, vocabulary: int = 27) -> Row:
    """A row of random ids; with `holes` somebody else wrote every third response token."""
    ids = torch.randint(1, vocabulary, (prompt + answer,), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(answer, dtype=torch.bool)
    if holes:
        mask[1::3] = False
    return Row(ids, prompt, mask)


def rows() -> list[Row]:
    """Rows of unlike prompt and answer lengths, half of them with holes."""
    return [row(i, 1 + i % 4, 1 + (3 * i) % 7, holes=bool(i % 2)) for i in range(9)]


def pairs() -> list[Pair]:
    """Pairs of unlike lengths with soft labels and margins."""
    return [Pair(row(i, 2 + i % 3, 1 + i), row(50 + i, 2 + i % 3, 5 - i), 0.5 + 0.1 * i, 0.25 * i) for i in range(5)]


def rankings() -> list[Ranking]:
    """Rankings of two to four answers, one with a tie."""
    ranks = ((2, 1), (1, 3, 2), (1, 1, 3), (4, 2, 3, 1))
    return [
        Ranking(tuple(row(10 * i + j, 2 + i, 1 + (i + 2 * j) % 6) for j in range(len(own))), own)
        for i, own in enumerate(ranks)
    ]


def labeled() -> list[Labeled]:
    """Answers with absolute scores."""
    return [Labeled(row(70 + i, 2, 1 + i), 0.5 * i - 1) for i in range(4)]


def prompt(number: int, ids: Sequence[int]) -> Prompt:
    """A prompt of these ids."""
    return Prompt(
        str(number), tuple(ids), ({"role": "user", "content": f"question {number}"},), {"prompt": f"question {number}"}
    )


def full_logits(model: Any, ids: Tensor, **given: Any) -> Tensor:
    """transformers' own forward over one row without padding: (S, V)."""
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False, **given).logits[0]


class TableReward:
    """A reward from a function of the answer's ids."""

    def __init__(self, function: Callable[[tuple[int, ...]], float], *, dense: bool = False) -> None:
        self.function, self.dense, self.calls = function, dense, 0

    def score(self, groups: Sequence[Group]) -> Scores:
        self.calls += 1
        samples = [sample for group in groups for sample in group.samples]
        answer = torch.tensor([self.function(sample.ids) for sample in samples])
        if not self.dense:
            return Scores(answer)
        token = tuple(torch.full((len(s.ids),), float(a) / len(s.ids)) for s, a in zip(samples, answer, strict=True))
        return Scores(torch.stack([one.sum() for one in token]), token)


class Recorder(LocalLearner):
    """A learner that keeps, of its last update, the work, the weights before it and the gradients."""

    def forward_backward(self, work: Work) -> UpdateResult:
        self.work, self.before = work, weights(self)
        return super().forward_backward(work)

    def optim_step(self) -> UpdateResult:
        self.step = super().optim_step()
        self.grads = gradients(self)
        self.trail = [*getattr(self, "trail", []), weights(self)]
        return self.step


def weights(learner: LocalLearner) -> dict[str, dict[str, Tensor]]:
    """A copy of every role's parameters."""
    return {n: {k: p.detach().clone() for k, p in role.parameters().items()} for n, role in learner.roles.items()}


def gradients(learner: LocalLearner) -> dict[str, Tensor]:
    """Each trained role's gradient as one vector."""
    return {
        name: torch.cat(
            [
                torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone()
                for p in role.parameters().values()
            ]
        )
        for name, role in learner.roles.items()
        if role.trained
    }


def with_weights(roles: dict[str, Role], values: dict[str, dict[str, Tensor]]) -> dict[str, Role]:
    """The roles with these weights."""
    with torch.no_grad():
        for name, role in roles.items():
            for key, parameter in role.parameters().items():
                parameter.copy_(values[name][key])
    return roles


def permuted(batch: Batch, order: Sequence[int] | None = None) -> Batch:
    """The elements in another order."""
    count = len(batch.elements())
    return take_elements(batch, order or [(7 * i + 3) % count if count % 7 else count - 1 - i for i in range(count)])


def spoiled(batch: Batch) -> Batch:
    """NaN in every float column wherever the mask is False, and three columns of it more at the end."""
    columns = {}
    extra = batch["mask"].new_zeros(len(batch.rows), 3)
    mask = torch.cat([batch["mask"], extra], 1)
    for name, column in batch.columns.items():
        if COLUMNS[name].per_token:
            column = torch.cat([column, extra.to(column)], 1)
            if column.is_floating_point():
                column = column.masked_fill(~mask, torch.nan)
        columns[name] = column
    return replace(batch, columns=columns)


def equal_weights(one: dict, other: dict) -> None:
    """To the bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].keys() == other[name].keys()
        for key in one[name]:
            assert torch.equal(one[name][key], other[name][key]), f"{name}/{key}"


def clone(roles: dict[str, Role]) -> dict[str, Role]:
    """Roles of their own with equal weights."""
    return copy.deepcopy(roles)


def large(vocabulary: int, *, dtype: torch.dtype = torch.float32) -> tuple[Role, list[Row]]:
    """A policy with the vocabulary of a real model and peaked logits as after training, and rows that it finds likely.

    Its embeddings are long and tied to its head, so each token predicts itself; nine tokens of ten repeat the one before.
    """
    model = tiny.causal_lm(vocabulary=vocabulary, dtype=dtype, initializer_range=0.02)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(35)
    noise, out = torch.Generator().manual_seed(0), []
    for number in range(8):
        ids = torch.randint(1, vocabulary, (100 + 17 * number % 90,), generator=noise)
        for place in range(1, len(ids)):
            ids[place] = ids[place - 1] if torch.rand((), generator=noise) < 0.9 else ids[place]
        answer = 12 + 11 * number % 30
        out.append(Row(ids, len(ids) - answer, torch.ones(answer, dtype=torch.bool)))
    return Role("policy", model, True), out
