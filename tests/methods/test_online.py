"""Online methods: which slots each has, what it reads, and its credit worked by hand."""

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from whet import ops
from whet.dials import KL, Truncated
from whet.errors import RecipeError
from whet.methods import Algorithm, clip_bounds, credited, diagnostics, part
from whet.methods.online import METHODS, controller
from whet.records import Batch, Row

BETA = 0.5
LOW = KL(coef=BETA)
LENGTHS = (3, 2, 1, 3)
SCORES = (1.0, -2.0, 8.0, 0.5)
OLD = [[-1.0, -2.0, -0.5], [-0.25, -1.5], [-3.0], [-1.0, -1.0, -1.0]]
REF = [[-1.5, -1.0, -0.75], [-0.5, -2.0], [-1.0], [-1.0, -1.25, -0.5]]
K1 = [[old - ref for old, ref in zip(a, b, strict=True)] for a, b in zip(OLD, REF, strict=True)]
VALUE = [[0.5, 0.25, -1.0], [1.0, 0.5], [2.0], [0.0, 0.5, 1.0]]
FINAL = (9.0, 3.0, 7.0, 4.0)
CUT = (False, True, False, True)

EVERYTHING = {"old_logp", "ref_logp", "old_value"}
TABLE: dict[str, tuple[set[str], set[str], bool, str, str]] = {
    # columns that are measured, roles, whether there is a ratio, surrogate, reduction of the policy
    "ppo": (EVERYTHING, {"policy", "reference", "critic"}, True, "clip", "token_mean"),
    "ppo_kl": (EVERYTHING, {"policy", "reference", "critic"}, True, "kl_penalised", "token_mean"),
    "instructgpt": (EVERYTHING, {"policy", "reference", "critic"}, True, "clip", "token_mean"),
    "deepspeed_chat": (EVERYTHING, {"policy", "reference", "critic"}, True, "clip", "token_mean"),
    "unclipped": (EVERYTHING, {"policy", "reference", "critic"}, True, "unclipped", "token_mean"),
    "policy_gradient": (EVERYTHING, {"policy", "reference", "critic"}, False, "reinforce", "token_mean"),
    "reinforce": ({"old_logp", "ref_logp"}, {"policy", "reference"}, False, "reinforce", "token_mean"),
    "grpo": ({"old_logp", "ref_logp"}, {"policy", "reference"}, True, "clip", "sequence_mean"),
}


def padded(rows: list[list[float]], fill: float = 0.0) -> Tensor:
    return torch.tensor([[*row, *[fill] * (3 - len(row))] for row in rows], dtype=torch.float64)


def rollout(**columns: Any) -> Batch:
    """Four answers of 3, 2, 1 and 3 tokens to two prompts; the second and the last were cut off."""
    rows = [Row(torch.arange(2, 4 + length), 2, torch.ones(length, dtype=torch.bool)) for length in LENGTHS]
    return Batch.of(rows).with_columns(
        **{
            "group": torch.tensor([0, 0, 1, 1]), "truncated": torch.tensor(CUT),
            "rewards": torch.tensor(SCORES, dtype=torch.float64)[:, None],
            "token_score": torch.zeros(4, 3, dtype=torch.float64), "old_logp": padded(OLD), "ref_logp": padded(REF),
            "old_value": padded(VALUE), "final_value": torch.tensor(FINAL, dtype=torch.float64),
        }
        | columns
    )  # fmt: skip


def credit(method: Algorithm, **columns: Any) -> Batch:
    return credited(method.at(method.init()), rollout(**columns))


def close(actual: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(actual.double(), padded(expected), rtol=1e-9, atol=1e-9)


def rewards_by_hand(score: Any = SCORES, beta: float = BETA) -> list[list[float]]:
    """-beta k1 on every token, and the score on the last one."""
    return [
        [-beta * kl + (s if t == len(row) - 1 else 0.0) for t, kl in enumerate(row)]
        for row, s in zip(K1, score, strict=True)
    ]


def gae_by_hand(rewards: list[list[float]], gamma: float, lam: float, final: Any = (0.0,) * 4) -> list[list[float]]:
    """The sum of discounted TD errors, written out."""
    out = []
    for r, v, last in zip(rewards, VALUE, final, strict=True):
        after = [*v[1:], last]
        delta = [r[t] + gamma * after[t] - v[t] for t in range(len(r))]
        out.append([sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(r))) for t in range(len(r))])
    return out


def whitened(rows: list[list[float]]) -> list[list[float]]:
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in flat) / (len(flat) - 1))
    return [[(x - mean) / (deviation + 1e-8) for x in row] for row in rows]


def to_go(rows: list[list[float]], gamma: float = 1.0) -> list[list[float]]:
    return [[sum(gamma ** (s - t) * row[s] for s in range(t, len(row))) for t in range(len(row))] for row in rows]


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_method_is_in_the_table() -> None:
    assert TABLE.keys() == METHODS.keys()


@pytest.mark.parametrize("name", TABLE)
def test_a_method_reads_and_casts_what_the_table_says(name: str) -> None:
    method = METHODS[name]()
    reads, roles, ratio, surrogate, reduction = TABLE[name]
    assert method.reads() == reads
    assert method.roles() == roles
    assert method.has_ratio() is ratio
    assert method.terms[0].loss.op.__name__ == surrogate
    assert method.terms[0].reduce.__name__ == reduction
    assert ("critic" in method.roles()) == ("old_value" in method.reads())
    assert ("reference" in method.roles()) == ("ref_logp" in method.reads())
    assert (method.penalty is not None) != any(term.loss.op is ops.k3 for term in method.terms)  # never both


@pytest.mark.parametrize("name", TABLE)
def test_a_variant_leaves_every_other_slot_identical(name: str) -> None:
    method = METHODS[name]()
    for slot in fields(Algorithm):
        variant = replace(method, **{slot.name: part(ops.uniform) if slot.name == "place" else None})
        for other in fields(Algorithm):
            if other.name != slot.name:
                assert getattr(variant, other.name) is getattr(method, other.name)


def test_instructgpt_is_ppo_with_one_term_more() -> None:
    method, base = METHODS["instructgpt"](kl=LOW, ptx_weight=0.3), METHODS["ppo"](kl=LOW)
    assert replace(method, terms=method.terms[:-1]) == base
    ptx = method.terms[-1]
    assert (ptx.role, ptx.stream, ptx.weight, ptx.loss.op, ptx.reduce) == (
        "policy",
        "ptx",
        0.3,
        ops.nll,
        ops.token_mean,
    )


@pytest.mark.parametrize("name", ["ppo_kl", "unclipped", "policy_gradient"])
def test_other_surrogates_change_one_slot_of_ppo(name: str) -> None:
    method, base = METHODS[name](), METHODS["ppo"]()
    assert replace(method, terms=()) == replace(base, terms=())
    assert method.terms[1:] == base.terms[1:]
    assert replace(method.terms[0], loss=base.terms[0].loss) == base.terms[0]


def test_grpo_without_beta_has_no_reference() -> None:
    method = METHODS["grpo"](beta=0.0)
    assert method.reads() == {"old_logp"}
    assert method.roles() == {"policy"}
    assert len(method.terms) == 1
    assert METHODS["grpo"](beta=0.04).terms[1].weight == 0.04


def test_a_kl_coefficient_of_zero_still_measures_it() -> None:
    assert "ref_logp" in METHODS["ppo"](kl=KL(coef=0.0)).reads()


def test_bootstrapping_reads_the_value_after_the_last_token() -> None:
    assert METHODS["ppo"](truncated=Truncated("bootstrap")).reads() == EVERYTHING | {"final_value"}
    for name in ("reinforce", "grpo"):
        with pytest.raises(RecipeError, match="needs a critic"):
            METHODS[name](truncated=Truncated("bootstrap"))


@pytest.mark.parametrize(
    ("dials", "bounds"), [({}, (0.2, 0.2)), ({"clip": 0.1}, (0.1, 0.1)), ({"clip_high": 0.28}, (0.2, 0.28))]
)
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_clip_bounds_are_the_surrogates(name: str, dials: dict[str, float], bounds: tuple[float, float]) -> None:
    assert clip_bounds(METHODS[name](**dials)) == bounds
    assert clip_bounds(METHODS["reinforce"]()) is None


# --- token rewards and credit by hand --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "ppo_kl", "instructgpt", "unclipped", "policy_gradient"])
def test_the_ppo_family_is_credited_by_hand(name: str) -> None:
    got = credit(METHODS[name](kl=LOW, gamma=0.9, lam=0.8))
    rewards = rewards_by_hand()
    advantage = gae_by_hand(rewards, 0.9, 0.8)
    close(got["kl"], K1)
    close(got["token_reward"], rewards)
    close(got["advantage"], whitened(advantage))
    close(got["returns"], [[a + v for a, v in zip(x, y, strict=True)] for x, y in zip(advantage, VALUE, strict=True)])


def test_deepspeed_chat_clips_the_score_at_five_and_does_not_whiten() -> None:
    got = credit(METHODS["deepspeed_chat"](gamma=1.0, lam=0.95))
    rewards = rewards_by_hand((1.0, -2.0, 5.0, 0.5), beta=0.1)
    close(got["token_reward"], rewards)
    close(got["advantage"], gae_by_hand(rewards, 1.0, 0.95))


def test_reinforce_is_credited_with_returns_to_go() -> None:
    for gamma in (1.0, 0.9):
        got = credit(METHODS["reinforce"](kl=LOW, gamma=gamma))
        close(got["advantage"], to_go(rewards_by_hand(), gamma))
    close(credit(METHODS["reinforce"](kl=LOW, whiten=True))["advantage"], whitened(to_go(rewards_by_hand())))


@pytest.mark.parametrize("scale", [True, False])
def test_grpo_is_credited_with_the_groups_zscore(scale: bool) -> None:
    got = credit(METHODS["grpo"](scale=scale, eps=0.0))
    first, second = (1.5, 4.5 / math.sqrt(2)), 3.75  # half the gap, and the deviation of two is the gap / sqrt(2)
    z = 1 / math.sqrt(2)
    each = (z, -z, z, -z) if scale else (first[0], -first[0], second, -second)
    close(got["advantage"], [[a] * length for a, length in zip(each, LENGTHS, strict=True)])
    assert "kl" not in got.columns


@pytest.mark.parametrize(("estimator", "kl"), [("k2", lambda r: r * r / 2), ("k3", lambda r: math.exp(-r) - 1 + r)])
def test_other_estimators_in_the_reward(estimator: Any, kl: Any) -> None:
    close(credit(METHODS["ppo"](kl=KL(coef=BETA, estimator=estimator)))["kl"], [[kl(x) for x in row] for row in K1])


def test_a_sequence_kl_is_charged_once_on_the_last_token_and_divided_by_the_length() -> None:
    got = credit(METHODS["ppo"](kl=KL(coef=BETA, where="sequence")))
    expected = [
        [*[0.0] * (len(row) - 1), score - BETA * sum(row) / len(row)] for row, score in zip(K1, SCORES, strict=True)
    ]
    close(got["token_reward"], expected)


NO_KL = KL(coef=0.0)


@pytest.mark.parametrize("name", ["ppo", "reinforce"])
@pytest.mark.parametrize(
    ("place", "normalised", "weights"),
    [
        ("terminal", False, lambda length: [0.0] * (length - 1) + [1.0]),
        ("uniform", False, lambda length: [1 / length] * length),
        ("linear", False, lambda length: [t / length for t in range(1, length + 1)]),
        ("linear", True, lambda length: [2 * t / (length * (length + 1)) for t in range(1, length + 1)]),
    ],
)
def test_the_score_is_placed_over_the_tokens(name: str, place: Any, normalised: bool, weights: Any) -> None:
    got = credit(METHODS[name](kl=NO_KL, place=place, place_normalised=normalised))
    close(
        got["token_reward"],
        [[score * w for w in weights(length)] for score, length in zip(SCORES, LENGTHS, strict=True)],
    )


@pytest.mark.parametrize("place", ["terminal", "uniform"])
def test_dense_scores_stay_at_their_places_and_the_rest_is_placed(place: Any) -> None:
    dense = [[0.25, -0.5, 0.125], [1.0, -1.0], [0.5], [0.0, 2.0, -1.0]]
    got = credit(METHODS["ppo"](kl=NO_KL, place=place), token_score=padded(dense))
    expected = []
    for row, score in zip(dense, SCORES, strict=True):
        rest, n = score - sum(row), len(row)
        expected.append([x + (rest / n if place == "uniform" else rest * (t == n - 1)) for t, x in enumerate(row)])
    close(got["token_reward"], expected)
    assert torch.allclose(got["score"], torch.tensor(SCORES, dtype=torch.float64))


def test_several_rewards_are_weighted_and_summed() -> None:
    method = replace(METHODS["ppo"](kl=NO_KL), combine=part(ops.weighted_sum, weights=(2.0, -1.0)))
    both = torch.tensor([[1.0, 0.5], [0.0, 1.0], [3.0, 3.0], [-1.0, 2.0]], dtype=torch.float64)
    assert credit(method, rewards=both)["score"].tolist() == [1.5, -1.0, 3.0, -4.0]


# --- truncated answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_a_truncated_answer_is_penalised(name: str) -> None:
    got = credit(METHODS[name](truncated=Truncated("penalise", 1.5)))
    bound = 5.0 if name == "deepspeed_chat" else 8.0
    assert got["score"].tolist() == [1.0, -3.5, bound, -1.0]


@pytest.mark.parametrize("name", TABLE)
def test_a_truncated_answer_is_masked_and_counts_nowhere(name: str) -> None:
    got = credit(METHODS[name](truncated=Truncated("mask")))
    assert got["mask"].sum(1).tolist() == [3, 0, 1, 0]
    assert not got["advantage"][[1, 3]].any()
    assert (got.counts().tokens, got.counts().sequences) == (4, 2)


def test_whitening_leaves_masked_answers_out() -> None:
    got = credit(METHODS["ppo"](kl=LOW, truncated=Truncated("mask")))
    advantage = gae_by_hand(rewards_by_hand(), 1.0, 0.95)
    expected = whitened([advantage[0], advantage[2]])
    close(got["advantage"], [expected[0], [], expected[1], []])


def test_a_truncated_answer_is_bootstrapped_with_the_critics_value() -> None:
    """The value stands for all that would have followed, the score included: a cut-off answer is not paid twice."""
    got = credit(METHODS["ppo"](kl=LOW, gamma=0.9, lam=0.8, whiten=False, truncated=Truncated("bootstrap")))
    rewards = [
        [*row[:-1], row[-1] - score] if cut else row
        for row, score, cut in zip(rewards_by_hand(), SCORES, CUT, strict=True)
    ]
    close(
        got["advantage"], gae_by_hand(rewards, 0.9, 0.8, [f if cut else 0.0 for f, cut in zip(FINAL, CUT, strict=True)])
    )


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("rule", ["keep", "mask", "penalise"])
def test_nothing_behind_an_answer_is_credited(name: str, rule: Any) -> None:
    """NaN in the padding of every measured column changes nothing."""
    method = METHODS[name](truncated=Truncated(rule))
    base = credit(method)
    nan = {
        column: padded(rows, math.nan) for column, rows in (("old_logp", OLD), ("ref_logp", REF), ("old_value", VALUE))
    }
    spoiled = credit(method, **nan)
    for column in {"token_reward", "advantage", "returns", "kl"} & base.columns.keys():
        assert torch.equal(base[column], spoiled[column]), column


# --- state -----------------------------------------------------------------------------------------------------------


def measured(kl: float = 0.0, kl_old: float = 0.0, sequences: float = 64) -> dict[str, float]:
    return {"kl": kl, "kl_old": kl_old, "sequences": sequences}


def test_a_fixed_coefficient_stays() -> None:
    method = METHODS["ppo"](kl=KL(coef=0.3))
    state = method.next(method.init(), measured(kl=100.0))
    assert state == method.init() == {"penalty": 0.3}
    assert method.at(state).penalty.coef == 0.3


@pytest.mark.parametrize(("kl", "error"), [(6.0, 0.2), (3.0, -0.2), (5.5, 0.1), (5.0, 0.0)])
def test_the_adaptive_coefficient_by_hand(kl: float, error: float) -> None:
    method = METHODS["ppo"](kl=KL(coef=0.3, controller="adaptive", target=5.0, horizon=1000))
    state = method.next(method.next(method.init(), measured(kl=kl)), measured(kl=kl))
    assert state["penalty"] == pytest.approx(0.3 * (1 + error * 64 / 1000) ** 2)
    assert method.at(state).penalty.coef == state["penalty"]
    assert credited(method.at({"penalty": 2.0}), rollout())["token_reward"][2, 0] == 8.0 - 2.0 * K1[2][0]


@pytest.mark.parametrize(("kl_old", "factor"), [(0.0066, 0.5), (0.0067, 1.0), (0.0149, 1.0), (0.0151, 2.0)])
def test_ppo_kl_halves_or_doubles_beta_by_the_kl_of_the_last_epoch(kl_old: float, factor: float) -> None:
    method = METHODS["ppo_kl"](beta=1.5, target=0.01)
    assert method.init() == {"penalty": 0.05, "term0.beta": 1.5}
    state = method.next(method.init(), measured(kl=99.0, kl_old=kl_old))
    assert state == {"penalty": 0.05, "term0.beta": 1.5 * factor}
    assert method.at(state).terms[0].loss.dials["beta"] == 1.5 * factor


def test_at_gives_plain_numbers_only() -> None:
    for name, make in METHODS.items():
        method = make()
        plain = method.at(method.init())
        assert plain.penalty is None or isinstance(plain.penalty.coef, float)
        for term in plain.terms:
            assert isinstance(term.weight, (int, float)), name
            assert not any(hasattr(dial, "next") for dial in term.loss.dials.values())


def test_a_controller_without_target_is_refused() -> None:
    for kind in ("adaptive", "halving"):
        with pytest.raises(RecipeError, match="needs the KL to aim at"):
            controller(KL(controller=kind))


# --- losses and what is watched --------------------------------------------------------------------------------------


def now() -> dict[str, Tensor]:
    """logp and value that have moved since, as leaves in float64."""
    return {
        "logp": padded([[-0.8, -2.4, -0.5], [-0.5, -1.0], [-2.5], [-1.0, -1.3, -0.9]]).requires_grad_(),
        "value": padded([[0.6, 0.75, -1.0], [1.0, 0.0], [2.5], [0.1, 0.5, 0.0]]).requires_grad_(),
    }


def policy_loss_by_hand(
    name: str, logp: list[float], advantage: list[float], old: list[float], ref: list[float]
) -> list[float]:
    out = []
    for x, a, y, z in zip(logp, advantage, old, ref, strict=True):
        ratio = math.exp(x - y)
        match name:
            case "policy_gradient" | "reinforce":
                out.append(-a * x)
            case "unclipped":
                out.append(-ratio * a)
            case "ppo_kl":
                out.append(-ratio * a + 1.0 * (ratio - 1 - (x - y)))
            case _:
                out.append(-min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
        if name == "grpo":
            out[-1] += 0.04 * (math.exp(z - x) - 1 - (z - x))
    return out


@pytest.mark.parametrize("name", TABLE)
def test_the_policys_loss_is_that_of_plain_python(name: str) -> None:
    method = METHODS[name]()
    method = method.at(method.init())
    batch, current = credited(method, rollout()), now()
    counts = batch.counts()
    terms = [term for term in method.terms if term.role == "policy" and term.stream == "rollout"]
    got = sum(float(term.share({**batch.columns, **current}, counts).detach()) for term in terms)
    per_answer = []
    for row, length in enumerate(LENGTHS):
        take = [current["logp"].detach()[row], batch["advantage"][row], batch["old_logp"][row], batch["ref_logp"][row]]
        per_answer.append(policy_loss_by_hand(name, *[one[:length].tolist() for one in take]))
    expected = sum(sum(x) / len(x) for x in per_answer) / 4 if name == "grpo" else sum(map(sum, per_answer)) / 9
    assert got == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("clip", "weight"), [(0.2, 1.0), (None, 0.5)])
def test_the_critics_loss_is_that_of_plain_python(clip: float | None, weight: float) -> None:
    method = METHODS["ppo"](value_clip=clip, value_weight=weight)
    method = method.at(method.init())
    batch, current = credited(method, rollout()), now()
    got = float(method.terms[1].share({**batch.columns, **current}, batch.counts()).detach())
    total = 0.0
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            v, old, target = (
                float(x[row, t]) for x in (current["value"].detach(), batch["old_value"], batch["returns"])
            )
            squares = [(v - target) ** 2]
            if clip is not None:
                squares.append((old + min(max(v - old, -clip), clip) - target) ** 2)
            total += max(squares) / 2
    assert got == pytest.approx(weight * total / 9, rel=1e-10)


def test_at_ratio_one_clip_reinforce_and_unclipped_have_one_gradient() -> None:
    gradients = []
    for name in ("ppo", "unclipped", "policy_gradient", "ppo_kl"):
        method = METHODS[name]()
        method = method.at(method.init())
        batch = credited(method, rollout())
        logp = batch["old_logp"].clone().requires_grad_()
        method.terms[0].share({**batch.columns, "logp": logp}, batch.counts()).backward()
        gradients.append(logp.grad)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-12, atol=1e-14)


def test_what_is_watched_of_a_mini_batch_by_hand() -> None:
    method = METHODS["ppo"]()
    batch = credited(method.at(method.init()), rollout())
    batch = batch.with_columns(**{name: value.detach() for name, value in now().items()})
    ratios = [
        math.exp(float(batch["logp"][i, t] - batch["old_logp"][i, t])) for i, n in enumerate(LENGTHS) for t in range(n)
    ]
    got = diagnostics(batch, (0.2, 0.2))
    assert got["ratio_mean"] == pytest.approx(sum(ratios) / 9)
    assert got["kl_old"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 9)
    assert got["clip_fraction"] == pytest.approx(sum(not 0.8 <= r <= 1.2 for r in ratios) / 9)
    flat = [
        (float(batch["returns"][i, t]), float(batch["old_value"][i, t]))
        for i, n in enumerate(LENGTHS)
        for t in range(n)
    ]

    def variance(xs: list[float]) -> float:
        return sum((x - sum(xs) / 9) ** 2 for x in xs) / 9

    assert got["explained_variance"] == pytest.approx(
        1 - variance([r - v for r, v in flat]) / variance([r for r, _ in flat])
    )
