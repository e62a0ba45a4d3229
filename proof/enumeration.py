"""A problem small enough to enumerate: every answer, the optimum of the KL-regularized problem, and each method's own fixed point.

Nothing here uses whet's formulas: distributions come from transformers' own forward pass, the fixed points from the
expected gradient of each method written out over all answers in plain float64 tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement, product
from math import factorial
from typing import Any

import torch
from torch import Tensor

from whet.data import Group, Prompt, Row
from whet.rewards import Scores

END = 1


@dataclass(frozen=True)
class Problem:
    """Prompts, every answer over `vocabulary` tokens of at most `longest` (the end token stops one), and a score for each."""

    vocabulary: int = 5
    longest: int = 2
    beta: float = 0.5
    prompts: tuple[tuple[int, ...], ...] = ((2, 3), (4, 4, 2))

    @cached_property
    def answers(self) -> list[tuple[int, ...]]:
        """Every answer there is."""
        out: list[tuple[int, ...]] = []
        for length in range(1, self.longest + 1):
            for ids in product(range(self.vocabulary), repeat=length):
                stopped = END in ids
                if (stopped and ids.index(END) == length - 1) or (not stopped and length == self.longest):
                    out.append(ids)
        return out

    @cached_property
    def score(self) -> Tensor:
        """The score of each answer, (answers,): of spread 0.6 about -0.3, without structure a model could have by itself."""
        return 0.6 * torch.sin(7.0 * torch.arange(len(self.answers), dtype=torch.float64) + 1.0) - 0.3

    def records(self) -> list[Prompt]:
        """The prompts as whet's records."""
        return [
            Prompt(str(number), ids, ({"role": "user", "content": str(number)},), {"prompt": str(number)})
            for number, ids in enumerate(self.prompts)
        ]

    def row(self, prompt: Sequence[int], answer: Sequence[int]) -> Row:
        """A prompt with an answer, every token of which is trained."""
        ids = torch.tensor([*prompt, *answer])
        return Row(ids, len(prompt), torch.ones(len(answer), dtype=torch.bool))

    def model(self, seed: int = 0, hidden: int = 32) -> Any:
        """A tiny real transformer with random weights, float32."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(self.config(hidden)).eval()

    def scorer(self, seed: int = 2, hidden: int = 32) -> Any:
        """A tiny one-label classifier of the same kind."""
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(seed)
        config = self.config(hidden)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config).eval()
        model.config.pad_token_id = None  # token 0 may end an answer, so it is no padding
        return model

    def config(self, hidden: int = 32) -> Any:
        """Two Qwen3 layers."""
        from transformers import Qwen3Config

        return Qwen3Config(
            vocab_size=self.vocabulary, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None,
            eos_token_id=END, pad_token_id=0, tie_word_embeddings=True,
        )  # fmt: skip

    @torch.no_grad()
    def token_logp(self, model: Any) -> Tensor:
        """log pi of every token of every answer, 0 behind an answer's end: (prompts, answers, longest), float64."""
        out = torch.zeros(len(self.prompts), len(self.answers), self.longest, dtype=torch.float64)
        for i, prompt in enumerate(self.prompts):
            for j, answer in enumerate(self.answers):
                logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].double()
                logp = logits.log_softmax(-1)
                for t, token in enumerate(answer):
                    out[i, j, t] = logp[len(prompt) - 1 + t, token]
        return out

    def distribution(self, model: Any) -> Tensor:
        """log pi(y | x) of every answer, (prompts, answers)."""
        return self.token_logp(model).sum(-1)

    def optimum(self, reference: Tensor) -> Tensor:
        """log pi*(y | x) = log pi_ref + score / beta - log Z, from the reference's (prompts, answers)."""
        return (reference + self.score / self.beta).log_softmax(-1)


def kl(own: Tensor, target: Tensor) -> float:
    """KL(own || target) of two distributions over answers, in nats: the mean over prompts."""
    return float((own.exp() * (own - target)).sum(-1).mean())


class Tables:
    """A policy as one free table of logits for every state (prompt and answer so far): what a large enough network can be."""

    def __init__(self, problem: Problem, start: Tensor) -> None:
        """`start` (prompts, answers, longest) are the token log-probs it begins with."""
        self.problem = problem
        self.states: dict[tuple[int, tuple[int, ...]], int] = {}
        self.index = torch.zeros(start.shape, dtype=torch.long)
        self.token = torch.zeros(start.shape, dtype=torch.long)
        self.on = torch.zeros(start.shape, dtype=torch.bool)
        filled: dict[tuple[int, int], float] = {}
        for i in range(start.shape[0]):
            for j, answer in enumerate(problem.answers):
                for t, token in enumerate(answer):
                    state = self.states.setdefault((i, answer[:t]), len(self.states))
                    self.index[i, j, t], self.token[i, j, t], self.on[i, j, t] = state, token, True
                    filled[state, token] = float(start[i, j, t])
        self.logits = torch.full((len(self.states), problem.vocabulary), -torch.inf, dtype=torch.float64)
        for (state, token), value in filled.items():
            self.logits[state, token] = value

    def token_logp(self, logits: Tensor) -> Tensor:
        """(prompts, answers, longest) under these logits (states, V); 0 behind an answer's end."""
        return torch.where(self.on, logits.log_softmax(-1)[self.index, self.token], torch.zeros(()).double())


Weight = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(token log-probs now, those of the reference, the mask), each (P, Y, T) -> what multiplies grad log pi of each token."""


def fixed_point(
    problem: Problem, reference: Tensor, weight: Weight, *, steps: int = 20000, rate: float = 0.2
) -> Tensor:
    """log pi (P, Y) at which the expected update E_y[sum_t weight_t grad log pi_t] is zero in every state, by following it.

    reference (P, Y, T) token log-probs. The step in each state is divided by how often it is visited (the natural scale of
    a table), and the largest expected update left must be below 1e-6.
    """
    tables = Tables(problem, reference)
    logits = tables.logits.clone().requires_grad_()
    for _ in range(steps):
        token = tables.token_logp(logits)
        now = token.detach()
        chance = now.sum(-1).exp()[..., None]
        surrogate = (chance * torch.where(tables.on, weight(now, reference, tables.on), 0.0) * token).sum()
        (gradient,) = torch.autograd.grad(surrogate, logits)
        visits = torch.zeros(len(logits), dtype=torch.float64)
        visits.index_put_((tables.index[tables.on],), chance.expand(now.shape)[tables.on], accumulate=True)
        move = gradient / visits[:, None].clamp(min=1e-12)
        if float(move.abs().max()) < 1e-10:
            break
        with torch.no_grad():
            logits += rate * move
            logits -= logits.logsumexp(-1, keepdim=True)
    assert float(move.abs().max()) < 1e-6, f"no fixed point after {steps} steps: {float(move.abs().max()):.2e} is left"
    return tables.token_logp(logits.detach()).sum(-1)


class ExpectedZscore:
    """E[(r_i - mean) / (std + eps)] of an answer with each score, the others of its group drawn from the policy.

    Enumerates every multiset of the `answers` - 1 others once; n - 1 in the deviation, 0 where the group has no spread.
    """

    def __init__(self, score: Tensor, answers: int, eps: float) -> None:
        others = torch.tensor(list(combinations_with_replacement(range(len(score)), answers - 1)))
        times = torch.full((len(others),), float(factorial(answers - 1)), dtype=torch.float64)
        for one in range(len(score)):
            times /= torch.tensor([float(factorial(count)) for count in (others == one).sum(1).tolist()]).double()
        rest = score[others]
        group = torch.cat([score[:, None, None].expand(-1, len(others), 1), rest.expand(len(score), -1, -1)], 2)
        deviation = group.std(2)
        value = (score[:, None] - group.mean(2)) / (deviation + eps)
        self.others, self.times = others, times
        self.value = torch.where(deviation > 1e-12, value, torch.zeros_like(value))

    def __call__(self, chance: Tensor) -> Tensor:
        """The expected z-score (Y,) under a policy that gives each answer this `chance` (Y,)."""
        return self.value @ (self.times * chance[self.others].prod(1))


class TableReward:
    """The problem's scores as whet's Reward."""

    def __init__(self, problem: Problem) -> None:
        self.table = dict(zip(problem.answers, problem.score.tolist(), strict=True))

    def score(self, groups: Sequence[Group]) -> Scores:
        """See `Reward.score`."""
        return Scores(torch.tensor([self.table[sample.ids] for group in groups for sample in group.samples]))
