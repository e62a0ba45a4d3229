"""Preference and reward-model methods: value and gradient of their terms by independent formulas in float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from whet.data import Batch, Labeled, Pair, Ranking, Row, Stepped, Unpaired
from whet.methods import Objective, Part, catalogue, online, preference, reward
from whet.methods.choices import PAIR_LOSSES, REWARD_SLOTS, SINGLE_LOSSES

LENGTHS = ((3, 1), (2, 4), (1, 1))
PROBABILITY, MARGIN = (1.0, 0.75, 0.5), (0.0, 0.5, -0.25)
RANKS = ((2, 1), (1, 3, 3, 2), (1, 1), (3, 1, 2))


def row(length: int) -> Row:
    return Row(torch.arange(2, 4 + length), 2, torch.ones(length, dtype=torch.bool))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pairs(**columns: Tensor) -> Batch:
    own = [Pair(row(a), row(b), p, m) for (a, b), p, m in zip(LENGTHS, PROBABILITY, MARGIN, strict=True)]
    batch = Batch.of(own)
    return batch.with_columns(**{name: batch[name].double() for name in ("probability", "margin")} | columns)


def value_and_gradient(objective: Objective, batch: Batch, name: str, leaf: Tensor) -> tuple[float, Tensor]:
    """The sum of the terms' shares, and its gradient with respect to the column that carries it, which is looked at
    across the mini-batch before."""
    columns = {**batch.columns, "now_logp": leaf}
    columns |= {column: one(columns) for column, one in objective.select}
    leaf = leaf.clone().requires_grad_()
    total = sum(term.share({**columns, name: leaf}, batch.counts(term.mask)) for term in objective.terms)
    assert isinstance(total, Tensor)
    total.backward()
    assert leaf.grad is not None
    return float(total.detach()), leaf.grad


def numerical(function: Callable[[list[list[float]]], float], at: Tensor) -> Tensor:
    """Central differences of a plain-Python function."""
    out = torch.zeros_like(at)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in at.shape]).reshape(-1, at.ndim).tolist():
        step = torch.zeros_like(at)
        step[tuple(index)] = 1e-6
        out[tuple(index)] = (function((at + step).tolist()) - function((at - step).tolist())) / 2e-6
    return out


def check(objective: Objective, batch: Batch, name: str, leaf: Tensor, by_hand: Callable[[Any], float]) -> None:
    value, gradient = value_and_gradient(objective, batch, name, leaf)
    assert value == pytest.approx(by_hand(leaf.tolist()), rel=1e-10)
    torch.testing.assert_close(gradient, numerical(by_hand, leaf), rtol=1e-6, atol=1e-7)
    assert gradient.norm() > 1e-3


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- preference ------------------------------------------------------------------------------------------------------

REF = numbers(6, 4, seed=1)
NOW = -numbers(6, 4).abs() - 0.1  # log-probs: odds need them below 0


def cross_entropy(g: float, p: float = 1.0) -> float:
    return -p * log_sigmoid(g) - (1 - p) * log_sigmoid(-g)


def exo(g: float, e: float) -> float:
    s = logistic(g)
    return s * math.log(s / (1 - e)) + (1 - s) * math.log((1 - s) / e)


def discopop(g: float, tau: float) -> float:
    m = logistic(g / tau)
    return -(1 - m) * log_sigmoid(g) + m * math.exp(-g)


def plain(summed: float, length: int) -> float:
    return summed


def mean(summed: float, length: int) -> float:
    return summed / length


def odds(summed: float, length: int) -> float:
    p = math.exp(summed / length)
    return math.log(p / (1 - p))


def by_hand(
    loss: Callable[[float, float, float], float],
    *,
    beta: float = 0.3,
    score: Callable[[float, int], float] = plain,
    reference: bool = True,
    sft: float = 0.0,
) -> Callable[[list[list[float]]], float]:
    """The mean over pairs of loss(w, l, probability), and the SFT loss: a mean over the chosen answers' tokens."""

    def total(logp: list[list[float]]) -> float:
        out, nll = 0.0, 0.0
        for pair, (lengths, p) in enumerate(zip(LENGTHS, PROBABILITY, strict=True)):
            rewards = []
            for side, length in enumerate(lengths):
                row = 2 * pair + side
                summed = sum(logp[row][t] - (float(REF[row, t]) if reference else 0.0) for t in range(length))
                rewards.append(beta * score(summed, length))
            out += loss(*rewards, p)
            nll -= sum(logp[2 * pair][: lengths[0]])
        return out / len(LENGTHS) + sft * nll / sum(a for a, _ in LENGTHS)

    return total


def sorted_by_hand(unpaired: bool, smoothing: float = 0.0) -> Callable[[list[list[float]]], float]:
    """AOT: gaps against the reference's gaps, or chosen against rejected rewards, sorted either side."""

    def total(logp: list[list[float]]) -> float:
        now, then = (
            [
                sum(float(x[2 * pair + side][t]) for t in range(n))
                for pair, both in enumerate(LENGTHS)
                for side, n in enumerate(both)
            ]
            for x in (logp, REF.tolist())
        )
        if unpaired:
            rewards = [0.3 * (a - b) for a, b in zip(now, then, strict=True)]
            gaps = zip(sorted(rewards[::2]), sorted(rewards[1::2]), strict=True)
        else:
            own, other = ([0.3 * (x[i] - x[i + 1]) for i in (0, 2, 4)] for x in (now, then))
            gaps = zip(sorted(own), sorted(other), strict=True)
        return sum(cross_entropy(a - b, 1 - smoothing) for a, b in gaps) / 3

    return total


PREFERENCE: dict[str, tuple[Objective, Callable[[list[list[float]]], float]]] = {
    "dpo": (preference("dpo", beta=0.3), by_hand(lambda w, r, p: cross_entropy(w - r, p))),
    "dpo, smoothed": (
        preference("dpo", beta=0.3, loss={"label_smoothing": 0.1}),
        by_hand(lambda w, r, p: cross_entropy(w - r, 0.9 * p + 0.1 * (1 - p))),
    ),
    "dpo, mean": (
        preference("dpo", beta=2.0, implicit_reward={"mean": True}),
        by_hand(lambda w, r, p: cross_entropy(w - r, p), beta=2.0, score=mean),
    ),
    "dpo, with sft": (
        preference("dpo", beta=0.3, sft_weight=0.7),
        by_hand(lambda w, r, p: cross_entropy(w - r, p), sft=0.7),
    ),
    "dpo, forward kl": (
        preference("dpo", beta=0.3, implicit_reward={"divergence": "forward_kl"}),
        by_hand(lambda w, r, p: cross_entropy(w - r, p), score=lambda u, n: -math.exp(-u)),
    ),
    "dpo, js": (
        preference("dpo", beta=0.3, implicit_reward={"divergence": "js"}),
        by_hand(lambda w, r, p: cross_entropy(w - r, p), score=lambda u, n: log_sigmoid(u)),
    ),
    "dpo, alpha": (
        preference("dpo", beta=0.3, implicit_reward={"divergence": "alpha", "alpha": 0.25}),
        by_hand(lambda w, r, p: cross_entropy(w - r, p), score=lambda u, n: -math.exp(-0.75 * u) / 0.75),
    ),
    "dpo, hinge": (preference("dpo", beta=0.3, loss="hinge"), by_hand(lambda w, r, p: max(0.0, 1 - (w - r)))),
    "dpo, exo_pair": (
        preference("dpo", beta=0.3, loss={"name": "exo_pair", "label_smoothing": 0.2}),
        by_hand(lambda w, r, p: exo(w - r, 0.2)),
    ),
    "dpo, nca_pair": (
        preference("dpo", beta=0.3, loss="nca_pair"),
        by_hand(lambda w, r, p: -log_sigmoid(w) - 0.5 * log_sigmoid(-w) - 0.5 * log_sigmoid(-r)),
    ),
    "dpo, robust": (
        preference("dpo", beta=0.3, loss={"name": "robust", "label_smoothing": 0.2}),
        by_hand(lambda w, r, p: (-0.8 * log_sigmoid(w - r) + 0.2 * log_sigmoid(r - w)) / 0.6),
    ),
    "dpo, bco_pair": (
        preference("dpo", beta=0.3, loss="bco_pair").at({"term0.delta": 0.4}),
        by_hand(lambda w, r, p: -log_sigmoid(w - 0.4) - log_sigmoid(0.4 - r)),
    ),
    "dpo, sppo_hard": (
        preference("dpo", beta=0.25, loss="sppo_hard"),
        by_hand(lambda w, r, p: (4 * w - 2) ** 2 + (4 * r + 2) ** 2, beta=0.25),
    ),
    "dpo, aot": (
        preference("dpo", beta=0.3, loss={"name": "aot", "label_smoothing": 0.1}),
        sorted_by_hand(False, 0.1),
    ),
    "dpo, aot_unpaired": (preference("dpo", beta=0.3, loss="aot_unpaired"), sorted_by_hand(True)),
    "dpo, apo_zero": (
        preference("dpo", beta=0.3, loss="apo_zero"),
        by_hand(lambda w, r, p: 1 - logistic(w) + logistic(r)),
    ),
    "dpo, apo_down": (
        preference("dpo", beta=0.3, loss="apo_down"),
        by_hand(lambda w, r, p: logistic(w) + 1 - logistic(w - r)),
    ),
    "dpo, discopop": (
        preference("dpo", beta=0.3, loss={"name": "discopop", "tau": 0.5}),
        by_hand(lambda w, r, p: discopop(w - r, 0.5)),
    ),
    "dpo, a mixture": (  # MPO
        preference("dpo", beta=0.3, loss=[{"name": "sigmoid", "weight": 0.8}, {"name": "hinge", "weight": 0.2}, "sft"]),
        by_hand(lambda w, r, p: 0.8 * cross_entropy(w - r, p) + 0.2 * max(0.0, 1 - (w - r)), sft=1.0),
    ),
    "ipo": (
        preference("ipo", beta=0.3),
        by_hand(lambda h, k, p: (h - k - 1 / 0.6) ** 2, beta=1.0),
    ),
    "ipo, mean, with sft": (
        preference("ipo", beta=0.3, implicit_reward={"mean": True}, sft_weight=0.2),
        by_hand(lambda h, k, p: (h - k - 1 / 0.6) ** 2, beta=1.0, score=mean, sft=0.2),
    ),
    "orpo": (
        preference("orpo"),
        by_hand(lambda w, r, p: 0.1 * cross_entropy(w - r, p), beta=1.0, score=odds, reference=False, sft=1.0),
    ),
    "orpo, weaker": (
        preference("orpo", loss=[{"name": "sigmoid", "weight": 0.5}], sft_weight=0.25),
        by_hand(lambda w, r, p: 0.5 * cross_entropy(w - r, p), beta=1.0, score=odds, reference=False, sft=0.25),
    ),
    "simpo": (
        preference("simpo"),
        by_hand(lambda w, r, p: cross_entropy(w - r - 0.5, p), beta=2.0, score=mean, reference=False),
    ),
    "cpo": (
        preference("cpo", beta=0.3),
        by_hand(lambda w, r, p: cross_entropy(w - r, p), reference=False, sft=1.0),
    ),
}


@pytest.mark.parametrize("name", PREFERENCE)
def test_a_preference_loss_and_its_gradient(name: str) -> None:
    objective, expected = PREFERENCE[name]
    check(objective, pairs(ref_logp=REF), "logp", NOW, expected)


def test_every_preference_method_and_every_loss_on_pairs_is_here() -> None:
    assert {name.split(",")[0] for name in PREFERENCE} == catalogue.PREFERENCE.keys() - {"kto"}
    assert {term.name for objective, _ in PREFERENCE.values() for term in objective.terms} == PAIR_LOSSES.keys()


PAIRED = {"logp", "mask", "index"}
TABLE: dict[str, tuple[set[str], list[tuple[str, float, str]], set[str]]] = {
    # columns, (name, weight and mask) of each term, columns that are looked up across the mini-batch
    "dpo": (PAIRED | {"ref_logp", "probability"}, [("sigmoid", 1.0, "mask")], set()),
    "ipo": (PAIRED | {"ref_logp"}, [("ipo", 1.0, "mask")], set()),
    "orpo": (
        PAIRED | {"probability", "chosen_mask"},
        [("sigmoid", 0.1, "mask"), ("sft", 1.0, "chosen_mask")],
        set(),
    ),
    "simpo": (PAIRED | {"probability"}, [("sigmoid", 1.0, "mask")], set()),
    "cpo": (
        PAIRED | {"probability", "chosen_mask"},
        [("sigmoid", 1.0, "mask"), ("sft", 1.0, "chosen_mask")],
        set(),
    ),
    "kto": (PAIRED | {"ref_logp", "good", "kl_baseline", "now_logp"}, [("kto", 1.0, "mask")], {"kl_baseline"}),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_preference_method_is_what_the_table_says(name: str) -> None:
    reads, terms, select = TABLE[name]
    objective = preference(name)
    assert objective.reads() == reads
    assert [(term.name, term.weight, term.mask) for term in objective.terms] == terms
    assert {(term.role, term.stream) for term in objective.terms} == {("policy", "train")}
    assert {column for column, _ in objective.select} == select
    assert objective.init() == {}


def test_the_table_has_every_preference_method() -> None:
    assert TABLE.keys() == catalogue.PREFERENCE.keys()


def test_the_defaults_are_those_of_the_papers() -> None:
    options = {name: [part.options for part in preference(name).terms[0].loss.walk()] for name in TABLE}
    assert options["dpo"][0] == {"label_smoothing": 0.0, "margin": 0.0}
    assert [one["beta"] for name in ("dpo", "ipo", "cpo", "kto") for one in options[name] if "beta" in one][:2] == [
        0.1,
        0.1,
    ]
    assert [one["beta"] for one in options["simpo"] if "beta" in one] == [2.0]
    assert options["simpo"][0]["margin"] == 0.5
    assert options["kto"][0] == {"beta": 0.1, "desirable": 1.0, "undesirable": 1.0}


def test_where_policy_is_reference_a_loss_is_that_of_no_gap() -> None:
    e = 1e-3
    expected = {
        "sigmoid": math.log(2), "hinge": 1.0, "ipo": 25.0, "nca_pair": 2 * math.log(2), "robust": math.log(2),
        "bco_pair": 2 * math.log(2), "sppo_hard": 50.0, "aot": math.log(2), "aot_unpaired": math.log(2),
        "apo_zero": 1.0, "apo_down": 1.0, "discopop": 0.5 * math.log(2) + 0.5,
        "exo_pair": -math.log(2) - 0.5 * math.log(e * (1 - e)),
    }  # fmt: skip
    assert expected.keys() == PAIR_LOSSES.keys() - {"sft"}
    for name, number in expected.items():
        objective = preference("dpo", loss=name)
        value, _ = value_and_gradient(objective.at(objective.init()), pairs(ref_logp=REF), "logp", REF)
        assert value == pytest.approx(number), name


def test_a_running_mean_follows_the_rewards_of_the_mini_batches_before() -> None:
    objective = preference("dpo", loss=["bco_pair", "sigmoid", "bco_pair"])
    assert objective.init() == {"term0.delta": 0.0, "term2.delta": 0.0}
    state = objective.next(objective.next(objective.init(), {"reward": 5.0}), {"reward": -1.0})
    assert state == {f"term{place}.delta": pytest.approx(0.9 * 0.5 - 0.1) for place in (0, 2)}


def of_the_whole_vocabulary(one: Part) -> Part:
    """The part as a method with own answers has it: they may have been drawn from a few tokens only."""
    names = {"logp": "full_logp", "now_logp": "now_full_logp"}
    columns = {
        name: of_the_whole_vocabulary(source) if isinstance(source, Part) else names.get(source, source)
        for name, source in one.columns.items()
    }
    return replace(one, columns=columns)


@pytest.mark.parametrize("loss", sorted(PAIR_LOSSES.keys() - {"sft"}))
def test_online_dpo_is_dpo_on_the_rollouts_pairs(loss: str) -> None:
    ours = online("online_dpo", loss=loss, sft_weight=0.3, beta=0.2)
    theirs = preference("dpo", loss=loss, sft_weight=0.3, beta=0.2)
    expected = [replace(term, stream="rollout", loss=of_the_whole_vocabulary(term.loss)) for term in theirs.terms]
    assert list(ours.terms) == expected
    assert list(ours.select) == [(column, of_the_whole_vocabulary(one)) for column, one in theirs.select]
    assert ours.pairs
    assert ours.has_ratio()  # nothing is advantages, so nothing goes stale
    assert ours.reads() == {"old_logp", "ref_logp"}
    assert ours.roles() == {"policy", "reference"}


# --- answers that are good or bad ------------------------------------------------------------------------------------

GOOD = (True, False, True)


def unpaired() -> Batch:
    """Three answers, each with one that belongs to another prompt behind it."""
    own = [Unpaired(row(a), row(b), good) for (a, b), good in zip(LENGTHS, GOOD, strict=True)]
    return Batch.of(own).with_columns(ref_logp=REF)


def log_ratios(logp: list[list[float]]) -> list[float]:
    """Of all six rows, summed."""
    lengths = [length for both in LENGTHS for length in both]
    return [sum(logp[r][t] - float(REF[r, t]) for t in range(n)) for r, n in enumerate(lengths)]


def single(loss: Callable[[float, bool], float], beta: float = 0.3) -> Callable[[list[list[float]]], float]:
    return lambda logp: sum(loss(beta * u, good) for u, good in zip(log_ratios(logp)[::2], GOOD, strict=True)) / 3


def kto_by_hand(shift: float, desirable: float, undesirable: float) -> Callable[[list[list[float]]], float]:
    z = max(0.0, sum(log_ratios((NOW + shift).tolist())[1::2]) / 3)
    return single(
        lambda w, good: desirable * (1 - logistic(w - 0.3 * z)) if good else undesirable * logistic(w - 0.3 * z)
    )


@pytest.mark.parametrize("shift", [0.0, 2.0])
@pytest.mark.parametrize(("desirable", "undesirable"), [(1.0, 1.0), (1.5, 0.5)])
def test_kto_and_its_gradient_with_the_baseline_held_fixed(shift: float, desirable: float, undesirable: float) -> None:
    z = sum(log_ratios((NOW + shift).tolist())[1::2])
    assert (z > 0) is (shift > 0)  # both sides of its clamp
    objective = preference("kto", beta=0.3, loss={"desirable": desirable, "undesirable": undesirable})
    check(objective, unpaired(), "logp", NOW + shift, kto_by_hand(shift, desirable, undesirable))


def test_no_mismatched_answer_is_trained() -> None:
    for name in SINGLE_LOSSES:
        objective = preference("kto", loss=name)
        _, gradient = value_and_gradient(objective.at(objective.init()), unpaired(), "logp", NOW)
        assert not gradient[1::2].any(), name
        assert (gradient[::2, 0] != 0).all(), name


def test_bco_and_apo_zero_on_single_answers() -> None:
    bco = preference("kto", beta=0.3, loss="bco")
    assert bco.init() == {"term0.delta": 0.0}
    at = bco.at({"term0.delta": 0.4})
    check(at, unpaired(), "logp", NOW, single(lambda w, good: -log_sigmoid(w - 0.4 if good else 0.4 - w)))
    apo = preference("kto", beta=0.3, loss={"name": "apo_zero_unpaired", "desirable": 1.5, "undesirable": 0.5})
    expected = single(lambda w, good: 1.5 * (1 - logistic(w)) if good else 0.5 * logistic(w))
    check(apo, unpaired(), "logp", NOW, expected)


def test_the_baseline_of_a_score_per_token_is_per_token() -> None:
    objective = preference("kto", beta=0.3, implicit_reward={"mean": True})
    columns = {**unpaired().columns, "now_logp": NOW + 2}
    baseline = objective.select[0][1](columns)
    each = [u / n for u, n in zip(log_ratios((NOW + 2).tolist())[1::2], (1, 4, 1), strict=True)]
    torch.testing.assert_close(baseline, torch.full((6,), sum(each) / 3, dtype=torch.float64))


# --- reward models ---------------------------------------------------------------------------------------------------


HARD = (1.0, 1.0, 1.0)


def pairwise_by_hand(
    scores: list[float], *, margins: Any = (0.0,) * 3, soft: Any = HARD, centering: float = 0.0
) -> float:
    total = 0.0
    for pair, (margin, p) in enumerate(zip(margins, soft, strict=True)):
        chosen, rejected = scores[2 * pair], scores[2 * pair + 1]
        total += cross_entropy(chosen - rejected - margin, p) + centering * (chosen + rejected) ** 2
    return total / 3


def k_way_by_hand(scores: list[float], *, ties: str) -> float:
    total, start = 0.0, 0
    for ranks in RANKS:
        own = scores[start : start + len(ranks)]
        start += len(ranks)
        losses = []
        for i in range(len(ranks)):
            for j in range(i):
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                if ranks[i] != ranks[j]:
                    losses.append(-log_sigmoid(own[better] - own[worse]))
                elif ties == "half":
                    losses.append(-0.5 * log_sigmoid(own[i] - own[j]) - 0.5 * log_sigmoid(own[j] - own[i]))
        total += sum(losses) / len(losses) if losses else 0.0
    return total / len(RANKS)


REWARD: dict[str, tuple[Objective, Callable[[], Batch], Callable[[list[float]], float]]] = {
    "pairwise": (reward("pairwise"), pairs, lambda s: pairwise_by_hand(s, margins=MARGIN, soft=PROBABILITY)),
    "pairwise, centered": (
        reward("pairwise", centering=0.3),
        pairs,
        lambda s: pairwise_by_hand(s, margins=MARGIN, soft=PROBABILITY, centering=0.3),
    ),
    "log_exp": (reward("log_exp"), pairs, pairwise_by_hand),
    "log_exp, centered": (reward("log_exp", centering=0.3), pairs, lambda s: pairwise_by_hand(s, centering=0.3)),
    "k_way": (reward("k_way"), lambda: rankings(), lambda s: k_way_by_hand(s, ties="drop")),
    "k_way, half": (
        reward("k_way", loss={"ties": "half"}),
        lambda: rankings(),
        lambda s: k_way_by_hand(s, ties="half"),
    ),
    "absolute": (
        reward("absolute"),
        lambda: labeled(),
        lambda s: sum((x - t) ** 2 / 2 for x, t in zip(s, (1.0, -0.5, 2.0), strict=True)) / 3,
    ),
}


def rankings() -> Batch:
    return Batch.of([Ranking(tuple(row(1 + i) for i in range(len(ranks))), ranks) for ranks in RANKS])


def labeled() -> Batch:
    batch = Batch.of([Labeled(row(2), target) for target in (1.0, -0.5, 2.0)])
    return batch.with_columns(target=batch["target"].double())


@pytest.mark.parametrize("name", REWARD)
def test_a_reward_loss_and_its_gradient(name: str) -> None:
    objective, make, expected = REWARD[name]
    batch = make()
    check(objective, batch, "score", 2 * numbers(len(batch.rows)), expected)
    assert {(term.role, term.stream) for term in objective.terms} == {("reward", "train")}
    assert objective.init() == {}


def test_a_process_reward_model_learns_at_the_ends_of_steps_alone() -> None:
    ends, labels = ((0, 1, 0, 1), (1, 0), (0,)), ((9.0, 1.0, 9.0, 0.25), (0.0, 9.0), (9.0,))
    steps = [
        Stepped(row(len(own)), torch.tensor(label, dtype=torch.float64), torch.tensor(own, dtype=torch.bool))
        for own, label in zip(ends, labels, strict=True)
    ]
    scores = numbers(3, 4)

    def expected(s: list[list[float]]) -> float:
        """The mean over all three steps of the cross-entropy with their labels 1, 1/4 and 0."""
        places = [(0, 1, 1.0), (0, 3, 0.25), (1, 0, 0.0)]
        return sum(cross_entropy(s[r][t], label) for r, t, label in places) / 3

    check(reward("process"), Batch.of(steps), "token_score", scores, expected)


RANKED = {"score", "index", "mask"}
READS = {
    "k_way": RANKED | {"rank", "element"}, "pairwise": RANKED | {"margin", "probability"}, "log_exp": RANKED,
    "absolute": {"score", "target", "mask"}, "process": {"token_score", "segment_label", "segment_end"},
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_a_reward_method_reads_what_the_table_says(name: str) -> None:
    assert reward(name).reads() == READS[name]
    assert [term.label for term in reward(name).terms] == [f"reward/train/{name}"]


def test_every_reward_method_is_here_and_has_its_records() -> None:
    assert {name.split(",")[0] for name in REWARD} | {"process"} == catalogue.REWARD.keys()
    assert READS.keys() == catalogue.REWARD.keys() == REWARD_SLOTS["loss"].keys()
    assert catalogue.READS.keys() == catalogue.REWARD.keys() | catalogue.SUPERVISED.keys()
    assert [reward(name).terms[1:] == () for name in catalogue.REWARD] == [True] * 5  # by default nothing is centered


def test_k_way_of_two_is_pairwise_without_margin() -> None:
    scores = 2 * numbers(4)
    two = Batch.of([Ranking((row(1), row(2)), (1, 2)), Ranking((row(3), row(1)), (1, 2))])
    flat = Batch.of([Pair(row(1), row(2)), Pair(row(3), row(1))])
    flat = flat.with_columns(margin=flat["margin"].double(), probability=flat["probability"].double())
    ours, theirs = (
        value_and_gradient(reward("k_way"), two, "score", scores),
        value_and_gradient(reward("pairwise"), flat, "score", scores),
    )
    assert ours[0] == pytest.approx(theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
