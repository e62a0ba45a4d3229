"""Everything learns: each online method raises its reward, each offline method its accuracy, on three seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import helpers as h

from loops.helpers import GOOD, ONLINE, TINY, VOCABULARY, Light, method_of, share
from whet.data import Group, Labeled, Pair, Ranking, Row, Stepped, Unpaired
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.loops import evaluate, offline, online
from whet.loops.record import read_metrics
from whet.methods import catalogue, preference, reward
from whet.methods.choices import PAIR_LOSSES, SINGLE_LOSSES
from whet.methods.compose import SFT
from whet.methods.options import Optim, Sampling
from whet.models.roles import Role
from whet.rewards import Scores, Weighted

END = 1
PROMPTS = [h.prompt(i, (2 + i, 4 + i)) for i in range(4)]


class Steps:
    """Every token is a step; it earns a quarter where it is the good one."""

    def score(self, groups: Sequence[Group]) -> Scores:
        samples = [sample for group in groups for sample in group.samples]
        token = tuple((torch.tensor(sample.ids) == GOOD).float() / 4 for sample in samples)
        return Scores(torch.stack([one.sum() for one in token]), token)


REWARDS: dict[str, list[Any]] = {
    "grpo_process": [Steps()],
    "maxrl": [h.TableReward(lambda ids: float(ids[0] == GOOD))],
    "gdpo": [h.TableReward(share), h.TableReward(lambda ids: float(ids[0] == GOOD))],
}
CHANGES: dict[str, dict[str, Any]] = {
    "clip_cov": {"select": {"share": 0.02, "cov_low": 0.1}},
    "kl_cov": {"select": {"share": 0.02}},
    "gdpo": {"weights": (1.0, 1.0)},
    "dapo": {"overlong": {"name": "soft_overlong", "buffer": 1}, "weights": (8.0,)},
}


def cast(names: frozenset[str], seed: int) -> dict[str, Role]:
    make = {
        "policy": lambda: h.policy(seed=seed, **TINY),
        "reference": lambda: h.policy(seed=seed, name="reference", **TINY),
        "critic": lambda: Role("critic", h.scorer_model(seed=seed, **TINY), True),
        "reward": lambda: Role("reward", h.scorer_model(seed=seed, **TINY), True),
    }
    return {name: make[name]() for name in make if name in names}


def learner_of(names: frozenset[str], seed: int, lr: float, total: int) -> LocalLearner:
    roles = cast(names, seed)
    optim = Optim(lr=lr, schedule="constant")
    return LocalLearner(roles, {n: optim for n, role in roles.items() if role.trained}, total=total, budget=1 << 14)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ONLINE)
def test_an_online_method_raises_the_reward(tmp_path: Path, name: str, seed: int) -> None:
    """The share of one of eight tokens in answers of up to four, over a few rollouts of 32 answers."""
    answers = 8 if ONLINE[name].slots["num_generations"] > 1 else 1
    method = method_of(name, longest=4, num_generations=answers, **CHANGES.get(name, {}))
    count, steps = 32 // answers, 10
    epochs = 2 if method.has_ratio() else 1
    learner = learner_of(method.roles(), seed, 0.02, steps * epochs)
    plan = online.OnlinePlan(
        steps, count, count * (1 if method.pairs else answers), epochs, seed, ptx_batch=4, canary=20, end_ids=(END,),
        equal_start=True,
    )  # fmt: skip
    rewards = [Weighted(f"r{n}", one) for n, one in enumerate(REWARDS.get(name, [h.TableReward(share)]))]
    generator = LocalGenerator(learner.roles["policy"], (END,), str)
    ptx = [h.row(i, 2, 4, vocabulary=VOCABULARY) for i in range(8)] if name == "instructgpt" else []
    online.train(
        method, learner, generator, rewards, PROMPTS, Sampling(4), plan, Light(tmp_path), ptx=ptx, quiet=True
    )  # fmt: skip
    got = [line["reward/r0"] for line in read_metrics(tmp_path)]
    assert got[0] < 0.25
    assert sum(got[-3:]) / 3 > got[0] + 0.25


# --- from data -------------------------------------------------------------------------------------------------------


def answered(prompt: Sequence[int], answer: Sequence[int]) -> Row:
    return Row(torch.tensor([*prompt, *answer]), len(prompt), torch.ones(len(answer), dtype=torch.bool))


def drawn(seed: int, count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, better answer, worse answer): the better one has the good token more often; the rest is noise."""
    stream, out = torch.Generator().manual_seed(seed), []
    while len(out) < count:
        prompt = torch.randint(2, VOCABULARY, (2,), generator=stream).tolist()
        noise = torch.randint(2, VOCABULARY, (2, 4), generator=stream)
        good = torch.rand(2, 4, generator=stream) < torch.tensor([[0.6], [0.05]])
        better, worse = torch.where(good, GOOD, noise).tolist()
        if better.count(GOOD) > worse.count(GOOD):
            out.append((prompt, better, worse))
    return out


def on_pairs(data: Any) -> list[Pair]:
    return [Pair(answered(p, better), answered(p, worse)) for p, better, worse in data]


def unpaired(data: Any) -> list[Unpaired]:
    """Each answer by itself, beside the better answer to the prompt before."""
    return [
        Unpaired(answered(p, answer), answered(p, data[n - 1][1]), good)
        for n, (p, better, worse) in enumerate(data)
        for answer, good in ((better, True), (worse, False))
    ]


def labeled(data: Any) -> list[Labeled]:
    return [Labeled(answered(p, one), one.count(GOOD) / 4) for p, *both in data for one in both]


def stepped(data: Any) -> list[Stepped]:
    """Each token is a step, right where it is the good one."""
    ends = torch.ones(4, dtype=torch.bool)
    return [Stepped(answered(p, one), (torch.tensor(one) == GOOD).float(), ends) for p, *both in data for one in both]


def rankings(data: Any) -> list[Ranking]:
    return [Ranking((answered(p, worse), answered(p, better)), (2, 1)) for p, better, worse in data]


def margins(model: Any, start: Any, data: Any) -> torch.Tensor:
    """log pi / pi_start of the better answer minus that of the worse one, by transformers' own forward."""

    def logp(one: Any, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found = one(ids, use_cache=False).logits.log_softmax(-1)[:, 1:-1]
        return found.gather(2, ids[:, 2:, None])[..., 0].sum(1)

    better, worse = (torch.tensor([[*row[0], *row[side]] for row in data]) for side in (1, 2))
    return (logp(model, better) - logp(start, better)) - (logp(model, worse) - logp(start, worse))


DIVERGENCES = [{"name": "implicit_reward", "divergence": one} for one in ("forward_kl", "js", "alpha")]
OBJECTIVES: dict[str, tuple[Any, Any]] = {
    **{name: (preference(name), on_pairs) for name in catalogue.PREFERENCE if name != "kto"},
    **{
        f"dpo {loss}": (preference("dpo", loss=loss), on_pairs)
        for loss in PAIR_LOSSES
        if loss not in ("sigmoid", "ipo")
    },
    # at the paper's tau of 0.05 its slope at gap 0 is 5 (1 - log 2) - 3 / 4 > 0: it first closes a gap
    "dpo discopop": (preference("dpo", loss={"name": "discopop", "tau": 1.0}), on_pairs),
    **{f"dpo {score['divergence']}": (preference("dpo", implicit_reward=score), on_pairs) for score in DIVERGENCES},
    "kto": (preference("kto"), unpaired),
    **{f"kto {loss}": (preference("kto", loss=loss), unpaired) for loss in SINGLE_LOSSES if loss != "kto"},
}

LR, ORDERED = {"dpo apo_down": 0.002}, {"dpo apo_down": 0.65}
"""It lowers both answers, the worse one first: the gap is widest before both are gone."""


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_preference_method_orders_held_out_pairs(tmp_path: Path, name: str, seed: int) -> None:
    """The better answer of pairs that were not trained gains more log-prob than the worse one."""
    objective, made = OBJECTIVES[name]
    beside = {"reference"} if "ref_logp" in objective.reads() else set()
    learner = learner_of(frozenset({"policy"} | beside), seed, LR.get(name, 0.01), 16)
    start = h.policy(seed=seed, **TINY).model
    data, held = drawn(seed, 256), drawn(100 + seed, 256)
    offline.train(objective, learner, [made(data)], offline.OfflinePlan(16, 32, seed), Light(tmp_path), quiet=True)
    found = margins(learner.roles["policy"].model, start, held)
    assert float((found > 0).float().mean()) > ORDERED.get(name, 0.8)
    assert float(found.mean()) > 0.5


SUPERVISED: dict[str, tuple[Any, Any]] = {
    "sft": (SFT, lambda data: [answered(p, better) for p, better, _ in data]),
    "k_way": (reward("k_way"), rankings),
    "pairwise": (reward("pairwise", centering=0.01), on_pairs),
    "log_exp": (reward("log_exp"), on_pairs),
    "absolute": (reward("absolute"), labeled),
    "process": (reward("process"), stepped),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", SUPERVISED)
def test_the_loss_on_held_out_data_falls(tmp_path: Path, name: str, seed: int) -> None:
    """Reward models order unseen pairs right; the loss of every kind falls."""
    objective, made = SUPERVISED[name]
    learner = learner_of(frozenset(term.role for term in objective.terms), seed, 0.01, 20)
    held = made(drawn(100 + seed, 64))
    before = evaluate.held_out(learner, objective, held)
    offline.train(
        objective, learner, [made(drawn(seed, 64))], offline.OfflinePlan(20, 16, seed), Light(tmp_path), quiet=True
    )
    after = evaluate.held_out(learner, objective, held)
    label = objective.terms[0].label
    assert after[label] < 0.7 * before[label]
    assert after.get("accuracy", 1.0) > 0.8
