"""The numbers of an update: by formulas in plain Python, the same for every split, and without effect on the weights."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import helpers as h
from torch import Tensor

from loops.helpers import go, method_of, unpaired
from whet import methods
from whet.data import Batch, Labeled, Row, Stepped
from whet.learner.local import LocalLearner
from whet.loops import offline
from whet.loops.experience import advantage_numbers
from whet.loops.metrics import timed
from whet.loops.numbers import update_columns
from whet.loops.record import RunFolder, read_metrics
from whet.methods import Objective, diagnostics
from whet.methods.algorithm import critic_loss
from whet.methods.compose import SFT


def given(batch: Batch, *names: str, seed: int = 3) -> dict[str, Tensor]:
    """Random log-probs for the columns of a batch, NaN outside the mask: nobody may read them."""
    stream, out = torch.Generator().manual_seed(seed), {}
    for name in names:
        values = -2 * torch.rand(batch["mask"].shape, dtype=torch.float64, generator=stream)
        out[name] = torch.where(batch["mask"], values, torch.nan)
    return out


def sums(values: Tensor, mask: Tensor, *, mean: bool = False) -> list[float]:
    out = []
    for row in range(len(mask)):
        own = [float(value) for value, kept in zip(values[row], mask[row], strict=True) if kept]
        out.append(sum(own) / (len(own) if mean else 1))
    return out


def average(values: list[float]) -> float:
    return sum(values) / len(values)


BY_HAND: dict[str, tuple[dict[str, Any], Callable[[list, list, list, list], list]]] = {
    "dpo": ({"beta": 0.3}, lambda total, ref, mean, per: [0.3 * (a - b) for a, b in zip(total, ref, strict=True)]),
    "ipo": ({"beta": 0.2, "implicit_reward": {"mean": True}},
            lambda total, ref, mean, per: [0.2 * (a - b) for a, b in zip(mean, per, strict=True)]),
    "cpo": ({"beta": 0.4}, lambda total, ref, mean, per: [0.4 * a for a in total]),
    "simpo": ({"beta": 2.0}, lambda total, ref, mean, per: [2.0 * a for a in mean]),
    "orpo": ({"loss": {"name": "sigmoid", "weight": 0.25}}, lambda total, ref, mean, per: [0.25 * a for a in mean]),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_implicit_rewards_and_log_probs_of_pairs_are_those_of_trl(name: str) -> None:
    options, rewards_of = BY_HAND[name]
    objective, batch = methods.preference(name, **options), Batch.of(h.pairs())
    columns = given(batch, "logp", "ref_logp")
    own = batch.with_columns(ref_logp=columns["ref_logp"]) if "ref_logp" in objective.reads() else batch
    found = update_columns(objective.terms, own, {"logp": columns["logp"]})
    mask = batch["mask"]
    both = [sums(columns[one], mask, mean=mean) for mean in (False, True) for one in ("logp", "ref_logp")]
    rewards = rewards_of(*both)
    chosen, rejected = rewards[::2], rewards[1::2]
    expected = {
        "rewards/chosen": average(chosen), "rewards/rejected": average(rejected), "rewards/margin": average(chosen) - average(rejected),
        "rewards/accuracy": average([float(a > b) for a, b in zip(chosen, rejected, strict=True)]),
        "logps/chosen": average(both[0][::2]), "logps/rejected": average(both[0][1::2]),
    }  # fmt: skip
    if name == "orpo":
        odds = [math.log(math.exp(one) / (1 - math.exp(one))) for one in both[2]]
        expected["log_odds"] = average(odds[::2]) - average(odds[1::2])
    assert found == pytest.approx(expected, rel=1e-9)


def test_equal_implicit_rewards_count_one_half() -> None:
    objective, batch = methods.preference("dpo"), Batch.of(h.pairs())
    logp = given(batch, "logp")["logp"]
    found = update_columns(objective.terms, batch.with_columns(ref_logp=logp), {"logp": logp})
    assert (found["rewards/accuracy"], found["rewards/margin"]) == (0.5, 0.0)  # the first step of DPO


def test_single_answers_are_told_by_label_without_the_mismatched_ones() -> None:
    objective, batch = methods.preference("kto", beta=0.5), Batch.of(unpaired())
    columns = given(batch, "logp", "ref_logp")
    own = batch.with_columns(ref_logp=columns["ref_logp"], kl_baseline=torch.full((len(batch.rows),), 0.75))
    found = update_columns(objective.terms, own, {"logp": columns["logp"]})
    total, ref = (sums(columns[name], batch["mask"]) for name in ("logp", "ref_logp"))
    rewards = [0.5 * (a - b) for a, b in zip(total, ref, strict=True)]
    good = [place for place in range(0, len(total), 2) if batch["good"][place]]
    bad = [place for place in range(0, len(total), 2) if not batch["good"][place]]
    chosen, rejected = (average([rewards[place] for place in one]) for one in (good, bad))
    assert found == pytest.approx({
        "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margin": chosen - rejected, "kl_baseline": 0.75,
        "logps/chosen": average([total[place] for place in good]), "logps/rejected": average([total[place] for place in bad]),
    })  # fmt: skip
    only = own.take([row for place in good for row in (place, place + 1)])
    now = {"logp": columns["logp"][[row for place in good for row in (place, place + 1)], : only["mask"].shape[1]]}
    assert update_columns(objective.terms, only, now).keys() == {"rewards/chosen", "logps/chosen", "kl_baseline"}


def test_scores_of_reward_models() -> None:
    pairs, rankings = Batch.of(h.pairs()[:3]), Batch.of(h.rankings())
    terms = methods.reward("pairwise").terms
    found = update_columns(terms, pairs, {"score": torch.tensor([2.0, 1.0, 0.5, 0.5, -1.0, 3.0])})
    assert found == pytest.approx({"accuracy": 0.5, "margin": -1.0, "score_mean": 1.0, "score_std": math.sqrt(9.5 / 6)})
    scores = [float((7 * row) % 5) for row in range(len(rankings.rows))]
    found, right, gaps = update_columns(terms, rankings, {"score": torch.tensor(scores)}), 0.0, []
    for rows in rankings.elements():
        for a in rows:
            for b in rows:
                if rankings["rank"][a] < rankings["rank"][b]:
                    gaps.append(scores[a] - scores[b])
                    right += 1.0 if gaps[-1] > 0 else 0.5 if gaps[-1] == 0 else 0.0
    assert found["accuracy"] == pytest.approx(right / len(gaps))
    assert found["margin"] == pytest.approx(average(gaps))
    absolute = Batch.of([Labeled(row, 1.0) for row in h.rows()[:2]])
    assert update_columns(terms, absolute, {"score": torch.tensor([1.0, 3.0])}) == {"score_mean": 2.0, "score_std": 1.0}
    row = h.row(0, 2, 4)
    steps = Batch.of([Stepped(row, torch.tensor([1.0, 0.5, 0.0, 1.0]), torch.tensor([True, True, True, True]))])
    found = update_columns(
        methods.reward("process").terms, steps, {"token_score": torch.tensor([[2.0, 9.0, 1.0, 0.0]])}
    )
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert (found["score_mean"], found.keys()) == (3.0, {"accuracy", "score_mean", "score_std"})


OBJECTIVES: dict[str, tuple[Objective, Callable[[], list]]] = {
    "sft": (SFT, h.rows), "dpo": (methods.preference("dpo"), h.pairs), "orpo": (methods.preference("orpo"), h.pairs),
    "kto": (methods.preference("kto"), unpaired), "pairwise": (methods.reward("pairwise"), h.pairs),
    "k_way": (methods.reward("k_way"), h.rankings),
}  # fmt: skip


def roles(objective: Objective) -> dict[str, Any]:
    if any(term.role == "reward" for term in objective.terms):
        return {"reward": h.scorer(name="reward", dtype=torch.float64)}
    own = {"policy": h.policy(dtype=torch.float64)}
    return own | (
        {"reference": h.policy(dtype=torch.float64, name="reference")} if "ref_logp" in objective.reads() else {}
    )


def lines(folder: Path, name: str, learner: LocalLearner) -> list[dict[str, float]]:
    objective, elements = OBJECTIVES[name]
    offline.train(objective, learner, [elements()], offline.OfflinePlan(3, 4), RunFolder(folder), quiet=True)
    return [{name: value for name, value in line.items() if not timed(name)} for line in read_metrics(folder)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_split_changes_a_number_of_an_offline_run(name: str, tmp_path: Path) -> None:
    whole: list[dict[str, float]] = []
    for number, (budget, packed) in enumerate(((10**6, False), (24, False), (10**6, True))):
        cast = roles(OBJECTIVES[name][0])
        optims = {one: h.FREE for one, role in cast.items() if role.trained}
        learner = LocalLearner(cast, optims, total=8, budget=budget, packed=packed)
        found = lines(tmp_path / str(number), name, learner)
        whole = whole or found
        for one, other in zip(found, whole, strict=True):
            assert one == pytest.approx(other, rel=1e-7, abs=1e-9)
        assert len({line["loss"] for line in found}) == 3


def test_token_accuracy_is_that_of_the_models_own_logits(tmp_path: Path) -> None:
    role = h.policy(dtype=torch.float64)
    ids = torch.tensor([5, 9])
    for _ in range(6):  # the most likely answer
        ids = torch.cat([ids, h.full_logits(role.model, ids)[-1:].argmax(-1)])
    elements = [*h.rows(), Row(ids, 2, torch.ones(6, dtype=torch.bool))]
    right = total = 0
    for row in elements:
        best = h.full_logits(role.model, row.ids).argmax(-1)
        for place in range(row.response):
            if row.mask[place]:
                total += 1
                right += int(best[row.start + place - 1] == row.ids[row.start + place])
    assert 6 <= right < total
    plan = offline.OfflinePlan(1, len(elements), shuffle=False)
    learner = LocalLearner({"policy": role}, {"policy": h.FREE}, total=8, budget=40)
    offline.train(SFT, learner, [elements], plan, RunFolder(tmp_path), quiet=True)
    (line,) = read_metrics(tmp_path)
    assert line["token_accuracy"] == pytest.approx(right / total)
    assert line["tokens"] == total


def test_numbers_of_critic_ratio_and_advantages_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    columns = {
        "mask": mask, "logp": torch.tensor([[-1.0, -2.0, 9.0], [-0.5, -1.5, -1.0]]),
        "old_logp": torch.tensor([[-1.5, -2.0, 0.0], [-1.0, -1.0, -1.0]]),
        "old_value": torch.tensor([[0.0, 1.0, 5.0], [0.5, 0.0, 0.0]]), "value": torch.tensor([[0.5, 1.1, 7.0], [0.5, -1.0, 0.0]]),
        "returns": torch.tensor([[1.0, 1.0, 9.0], [0.0, 1.0, 2.0]]), "advantage": torch.tensor([[1.0, -1.0, 9.0], [0.0, 2.0, 3.0]]),
        "token_reward": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.5, -0.25]]), "kl": torch.zeros(2, 3),
    }  # fmt: skip
    batch = Batch((h.row(0, 2, 3), h.row(1, 2, 3)), columns)
    ratios = [math.exp(one) for one in (0.5, 0.0, 0.5, -0.5, 0.0)]
    found = diagnostics(batch, None, critic_loss(method_of("ppo")))
    assert found["ratio_mean"] == pytest.approx(average(ratios))
    assert found["ratio_std"] == pytest.approx(math.sqrt(average([(one - average(ratios)) ** 2 for one in ratios])))
    assert found["kl_old_k1"] == pytest.approx(-0.1)
    assert found["value_error"] == pytest.approx(average([0.25, 0.01, 0.25, 4.0, 4.0]))
    # clip 0.2: 0.5 becomes 0.2, farther from 1; -1 becomes -0.2, nearer to 1
    assert found["value_clip_fraction"] == pytest.approx(1 / 5)
    values = advantage_numbers(batch)
    assert values["advantage_mean"] == pytest.approx(1.0)
    assert values["advantage_std"] == pytest.approx(math.sqrt(average([0.0, 4.0, 1.0, 1.0, 4.0])))
    assert values["total_reward"] == pytest.approx(0.625)
    assert (values["value_mean"], values["returns_mean"]) == pytest.approx((0.3, 1.0))


def test_tokens_of_an_online_step_are_those_of_its_answers(tmp_path: Path) -> None:
    go(tmp_path, method_of("grpo"), steps=2)
    for line in read_metrics(tmp_path):
        assert line["tokens"] == pytest.approx(line["length"] * 9)
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])
