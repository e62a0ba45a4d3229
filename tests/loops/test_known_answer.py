"""Tasks whose answer is known: pi*(y) = pi_ref(y) exp(r(y) / beta) / Z over every answer there is, enumerated."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from models import helpers as h
from torch import Tensor

from whet.dials import KL, Optim, Sampling
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.loops import offline, online
from whet.loops.record import Run
from whet.methods import online as methods
from whet.methods import preference
from whet.models.roles import Role
from whet.records import Pair, Row
from whet.rewards import Weighted

END, VOCABULARY, BETA = 1, 5, 0.5
PROMPTS = [h.prompt(0, (2, 3)), h.prompt(1, (4, 4, 2))]
ANSWERS = [(END,)] + [pair for pair in product(range(VOCABULARY), repeat=2) if pair[0] != END]
"""Every answer of one or two tokens: the end token stops it, two tokens are the limit."""

STEPS = {"reinforce": 240, "ppo": 100}


def reward(ids: tuple[int, ...]) -> float:
    """A score for each answer, of spread 0.6 about -0.3, without any structure a model could have by itself."""
    return 0.6 * float(torch.sin(torch.tensor(7.0 * ANSWERS.index(tuple(ids)) + 1.0))) - 0.3


def distribution(model: torch.nn.Module) -> Tensor:
    """log pi(y | x) of every answer (prompts, answers), by transformers' own forward."""
    out = []
    for prompt in PROMPTS:
        row = []
        for answer in ANSWERS:
            logp = h.full_logits(model, torch.tensor(prompt.ids + answer)).double().log_softmax(-1)
            start = len(prompt.ids)
            row.append(sum(logp[start - 1 + t, token] for t, token in enumerate(answer)))
        out.append(torch.stack(row))
    return torch.stack(out)


def optimum(reference: torch.nn.Module) -> Tensor:
    """log pi* by enumeration."""
    scores = torch.tensor([reward(answer) for answer in ANSWERS], dtype=torch.float64)
    return (distribution(reference) + scores / BETA).log_softmax(-1)


def gap(policy: torch.nn.Module, target: Tensor) -> float:
    """KL(policy || pi*) in nats, the worse of the prompts."""
    own = distribution(policy)
    return float((own.exp() * (own - target)).sum(-1).max())


def models() -> tuple[Role, Role]:
    changes = {"vocabulary": VOCABULARY, "dtype": torch.float32}
    return h.policy(**changes), h.policy(name="reference", **changes)


def test_the_enumeration_is_complete() -> None:
    policy, reference = models()
    assert torch.allclose(distribution(policy.model).exp().sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-6)
    assert gap(policy.model, optimum(reference.model)) > 0.2


@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_kl_in_the_reward_leads_to_the_optimal_policy(tmp_path: Path, name: str) -> None:
    policy, reference = models()
    target = optimum(reference.model)
    roles, method = {"policy": policy, "reference": reference}, methods.METHODS[name](kl=KL(coef=BETA), answers=64)
    optim = Optim(lr=0.01, final=0.02)
    optims, epochs, steps = {"policy": optim}, 1, STEPS[name]
    if name == "ppo":
        roles["critic"] = h.scorer(dtype=torch.float32, seed=2, vocabulary=VOCABULARY)
        optims["critic"] = replace(optim, lr=0.01)
        method = methods.ppo(kl=KL(coef=BETA), answers=64, lam=1.0, value_clip=None)
        epochs = 2
    learner = LocalLearner(roles, optims, total=steps * epochs, budget=1 << 14)
    generator = LocalGenerator(policy, (END,), str)
    plan = online.Plan(steps, 2, 128, epochs, canary=20, equal_start=True, end_ids=(END,))
    table = Weighted("table", h.TableReward(reward))
    online.train(method, learner, generator, [table], PROMPTS, Sampling(2), plan, Run(tmp_path), quiet=True)
    assert gap(policy.model, target) < 0.01


def test_dpo_on_exact_soft_labels_finds_the_optimal_policy(tmp_path: Path) -> None:
    policy, reference = models()
    target = optimum(reference.model)
    pairs = []
    for prompt in PROMPTS:
        rows = [
            Row(torch.tensor(prompt.ids + a), len(prompt.ids), torch.ones(len(a), dtype=torch.bool)) for a in ANSWERS
        ]
        for i in range(len(ANSWERS)):
            for j in range(i):
                chance = torch.sigmoid(torch.tensor(reward(ANSWERS[i]) - reward(ANSWERS[j])))
                pairs.append(Pair(rows[i], rows[j], float(chance)))
    optim = Optim(lr=0.005, schedule="cosine", final=0.02)
    learner = LocalLearner({"policy": policy, "reference": reference}, {"policy": optim}, total=60, budget=1 << 14)
    offline.train(preference.dpo(beta=BETA), learner, [pairs], offline.Plan(60, len(pairs)), Run(tmp_path), quiet=True)
    assert gap(policy.model, target) < 0.004
