"""The methods and variants whose end is known, each with its own expected update written out by hand, and the runs that reach it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proof.enumeration import END, ExpectedZscore, Problem, TableReward, Weight, fixed_point
from whet.data import Pair
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.loops import offline, online
from whet.loops.record import RunFolder
from whet.methods import compose
from whet.methods.options import Optim, Sampling
from whet.models.roles import Role
from whet.rewards import Weighted

GROUP = 4
"""Answers per prompt of the methods whose fixed point depends on it."""


@dataclass(frozen=True)
class Case:
    """One method with its changed slots; `field` is its expected update (see `enumeration.Weight`), None where it is that of
    the KL-regularized reward, whose end is pi*. `group` answers per prompt, so that a rollout has 512 in all; `bound` nats may be
    left where the end is pi*, 0.005 elsewhere. `longer` multiplies the rollouts: the noise of a z-score does not vanish."""

    method: str
    changes: Mapping[str, Any]
    field: str = "regularized"
    group: int = 64
    critic: bool = False
    bound: float = 0.003
    longer: float = 1.0


def cases(problem: Problem) -> dict[str, Case]:
    """Every case by the name it has in the table."""
    cost = {"coef": problem.beta}
    loss = {name: {"name": name, "coef": problem.beta} for name in ("k2", "k3", "k3_weighted", "exact", "k2_sequence")}
    centered = {"advantage": "group_center", "reduction": "sequence_sum"}
    return {
        "ppo": Case(
            "ppo",
            {"kl_in_reward": cost, "advantage": {"gae_lambda": 0.95}, "value": {"clip_range_vf": None}},
            critic=True,
        ),
        "ppo_kl": Case(
            "ppo_kl",
            {"kl_in_reward": cost, "advantage": {"gae_lambda": 0.95}, "value": {"clip_range_vf": None}},
            critic=True,
        ),
        "policy_gradient": Case(
            "policy_gradient", {"kl_in_reward": cost, "value": {"clip_range_vf": None}}, critic=True
        ),
        # its lambda is 1 - 1 / (2 |y|): for answers this short the critic's error enters, so its bound is wider
        "vapo, KL in the reward": Case(
            "vapo", {"kl_in_reward": cost, "advantage": {"alpha": 2.0}}, critic=True, bound=0.01
        ),
        "reinforce": Case("reinforce", {"kl_in_reward": cost}),
        "reinforce, exact KL": Case("reinforce", {"kl_in_reward": cost | {"estimator": "exact"}}),
        "reinforce_pp": Case("reinforce_pp", {"kl_in_reward": cost}),
        "remax": Case("remax", {"kl_in_reward": cost}),
        "rloo": Case("rloo", {"kl_in_reward": cost}),
        "rloo, exact KL": Case("rloo", {"kl_in_reward": cost | {"estimator": "exact"}}),
        "rloo, clipped ratio of the answer": Case(
            "rloo", {"kl_in_reward": cost, "ratio": "product", "surrogate": "clip", "reduction": "sequence_mean"}
        ),
        "dr_grpo, KL in the reward": Case("dr_grpo", {"kl_in_reward": cost}),
        "optimal_baseline, KL in the reward": Case("optimal_baseline", {"kl_in_reward": cost}),
        "cispo, centered, KL in the reward": Case("cispo", {"kl_in_reward": cost, "advantage": "leave_one_out"}),
        "dr_grpo, sequence k2 in the loss": Case(
            "dr_grpo",
            {"kl_in_loss": loss["k2_sequence"], "advantage": "leave_one_out"} | {"reduction": "sequence_sum"},
            group=GROUP,
        ),
        "dr_grpo, k2 in the loss": Case("dr_grpo", {"kl_in_loss": loss["k2"]} | centered, "centered k2", GROUP),
        "dr_grpo, exact KL in the loss": Case(
            "dr_grpo", {"kl_in_loss": loss["exact"]} | centered, "centered k2", GROUP
        ),
        "dr_grpo, weighted k3 in the loss": Case(
            "dr_grpo", {"kl_in_loss": loss["k3_weighted"]} | centered, "centered k2", GROUP
        ),
        "dr_grpo, k3 in the loss": Case("dr_grpo", {"kl_in_loss": loss["k3"]} | centered, "centered k3", GROUP),
        "leave one out, k2 in the loss": Case(
            "dr_grpo",
            {"kl_in_loss": loss["k2"], "advantage": "leave_one_out", "reduction": "sequence_sum"},
            "k2",
            GROUP,
        ),
        "grpo": Case("grpo", {"kl_in_loss": loss["k3"]}, "zscore k3 per answer", GROUP, longer=2.5),
        "grpo, only centered": Case(
            "grpo", {"kl_in_loss": loss["k3"], "advantage": "group_center"}, "centered k3 per answer", GROUP
        ),
        "online_dpo, labels of the judge's probability": Case(
            "online_dpo", {"beta": problem.beta, "pairs": "bradley_terry"}, group=2
        ),
        "gspo, k3 in the loss": Case(
            "gspo",
            {"kl_in_loss": loss["k3"], "surrogate": {"clip_low": 0.2, "clip_high": 0.2}},
            "zscore k3 per answer",
            GROUP,
            longer=2.5,
        ),
    }


def weight_of(name: str, problem: Problem, group: int) -> Weight:
    """The expected update of a case, by hand: what multiplies grad log pi of each token, in expectation over the group."""
    beta, score = problem.beta, problem.score
    zscore = ExpectedZscore(score, group, 1e-6) if "zscore" in name else None

    def weight(now: Tensor, reference: Tensor, on: Tensor) -> Tensor:
        chance, ratio = now.sum(-1).exp(), now - reference
        length = on.sum(-1, keepdim=True)
        if name == "regularized":
            total = score - beta * ratio.sum(-1)
            return (total - (chance * total).sum(-1, keepdim=True))[..., None].expand(now.shape)
        advantage = score - (chance * score).sum(-1, keepdim=True)
        if "centered" in name:  # the mean has the answer itself in it
            advantage = advantage * (1 - 1 / group)
        if zscore is not None:
            advantage = torch.stack([zscore(one) for one in chance])
        cost = 1 - (-ratio).exp() if "k3" in name else ratio
        out = advantage[..., None] - beta * cost
        return out / length if "per answer" in name else out

    return weight


def ends(case: Case, problem: Problem, reference: Tensor) -> tuple[Tensor, Tensor]:
    """(log pi of the case's own fixed point, log pi*), each (prompts, answers); reference (P, Y, T) token log-probs."""
    optimum = problem.optimum(reference.sum(-1))
    if case.field == "regularized":
        return optimum, optimum
    return fixed_point(problem, reference, weight_of(case.field, problem, case.group)), optimum


@dataclass(frozen=True)
class Budget:
    """How long a run is: rollouts, answers per rollout, learning rates (decayed to 0), updates per rollout."""

    rollouts: int = 240
    answers: int = 512
    lr: float = 0.01
    critic_lr: float = 0.01


def learned(case: Case, problem: Problem, folder: Path, budget: Budget, *, seed: int = 0) -> Tensor:
    """log pi (P, Y) after the real loop with the real generator has run; the policy begins at the reference."""
    policy, reference = problem.model(seed), problem.model(seed)
    roles = {"policy": Role("policy", policy, True), "reference": Role("reference", reference, False)}
    rollouts = round(budget.rollouts * case.longer)
    optim = Optim(lr=budget.lr, schedule="cosine", min_lr_ratio=0.0, betas=(0.9, 0.99))
    optims = {"policy": optim}
    if case.critic:
        roles["critic"] = Role("critic", problem.scorer(seed + 2), True)
        optims["critic"] = Optim(lr=budget.critic_lr, schedule="cosine", min_lr_ratio=0.0, betas=(0.9, 0.99))
    method = compose.online(case.method, longest=problem.longest, **{**case.changes, "num_generations": case.group})
    prompts = problem.records()
    repeated = budget.answers // (len(prompts) * case.group)
    learner = LocalLearner(roles, optims, total=rollouts, budget=1 << 14, seed=seed)
    generator = LocalGenerator(roles["policy"], (END,), str, unit=budget.answers)
    plan = online.OnlinePlan(
        rollouts, repeated * len(prompts), budget.answers, 1, seed, canary=20, equal_start=True, end_ids=(END,)
    )
    reward = Weighted("table", TableReward(problem))
    sampling = Sampling(problem.longest)
    online.train(method, learner, generator, [reward], prompts, sampling, plan, RunFolder(folder), quiet=True)
    return problem.distribution(policy)


def pairs(problem: Problem, *, labels: int = 0, seed: int = 0) -> list[Pair]:
    """Every pair of answers with its exact Bradley-Terry probability; or `labels` pairs with one drawn label each."""
    out = []
    generator = torch.Generator().manual_seed(seed)
    for prompt in problem.prompts:
        rows = [problem.row(prompt, answer) for answer in problem.answers]
        for i in range(len(rows)):
            for j in range(i):
                chance = float(torch.sigmoid(problem.score[i] - problem.score[j]))
                if not labels:
                    out.append(Pair(rows[i], rows[j], chance))
                    continue
                count = labels // (len(problem.prompts) * len(rows) * (len(rows) - 1) // 2)
                won = torch.rand(count, generator=generator) < chance
                out += [Pair(rows[i], rows[j]) if one else Pair(rows[j], rows[i]) for one in won.tolist()]
    return out


def preferred(
    problem: Problem,
    elements: list[Pair],
    folder: Path,
    *,
    steps: int,
    batch: int,
    lr: float,
    final: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """log pi (P, Y) after DPO on these pairs."""
    policy, reference = problem.model(seed), problem.model(seed)
    roles = {"policy": Role("policy", policy, True), "reference": Role("reference", reference, False)}
    schedule = "constant" if final == 1.0 else "cosine"
    optim = Optim(lr=lr, schedule=schedule, min_lr_ratio=final, betas=(0.9, 0.99))
    learner = LocalLearner(roles, {"policy": optim}, total=steps, budget=1 << 14, seed=seed)
    objective = compose.preference("dpo", beta=problem.beta)
    offline.train(
        objective, learner, [elements], offline.OfflinePlan(steps, batch, seed), RunFolder(folder), quiet=True
    )
    return problem.distribution(policy)


def enumerated(problem: Problem, budget: Budget, *, seed: int = 0) -> Tensor:
    """log pi (P, Y) of the same network trained on the exact KL(policy || pi*) by enumeration, for as many updates."""
    model = problem.model(seed)
    target = problem.optimum(problem.distribution(model)).float()
    rows = [[*prompt, *answer] for prompt in problem.prompts for answer in problem.answers]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    start = torch.tensor([len(prompt) for prompt in problem.prompts for _ in problem.answers])
    length = torch.tensor([len(answer) for _ in problem.prompts for answer in problem.answers])
    step = torch.arange(longest - 1)
    on = (step >= start[:, None] - 1) & (step < (start + length)[:, None] - 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=budget.lr, betas=(0.9, 0.99), weight_decay=0.0)
    optim = Optim(lr=budget.lr, schedule="cosine", min_lr_ratio=0.0)
    for update in range(budget.rollouts):
        optimizer.param_groups[0]["lr"] = budget.lr * optim.factor(update, budget.rollouts)
        logp = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        own = torch.where(on, logp, torch.zeros_like(logp)).sum(1).reshape(len(problem.prompts), -1)
        loss = (own.exp() * (own - target)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return problem.distribution(model)
