"""Online methods: which slots each has, what it reads, and its credit worked by hand."""

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from whet import ops
from whet.data import Batch, Row
from whet.errors import RecipeError, RewardError
from whet.methods import (
    Algorithm,
    advantages,
    catalogue,
    clipping,
    diagnostics,
    online,
    outcome,
    paired,
    part,
    shaped,
    spread,
)
from whet.methods.choices import ONLINE_SLOTS
from whet.methods.options import KL, Entropy, Truncated

BETA = 0.5
LOW = KL(coef=BETA)
LONGEST = 40  # the answers' limit, far away
LENGTHS = (3, 2, 1, 3)
SCORES = (1.0, -2.0, 8.0, 0.5)
OLD = [[-1.0, -2.0, -0.5], [-0.25, -1.5], [-3.0], [-1.0, -1.0, -1.0]]
FULL = [[-1.125, -2.0, -0.75], [-0.25, -1.75], [-3.5], [-1.0, -1.0, -1.25]]  # under the whole vocabulary: less
REF = [[-1.5, -1.0, -0.75], [-0.5, -2.0], [-1.0], [-1.0, -1.25, -0.5]]
K1 = [[own - ref for own, ref in zip(a, b, strict=True)] for a, b in zip(FULL, REF, strict=True)]
VALUE = [[0.5, 0.25, -1.0], [1.0, 0.5], [2.0], [0.0, 0.5, 1.0]]
COLLISION = [[0.5, 0.25, 0.75], [0.625, 0.5], [0.25], [0.5, 0.5, 0.375]]
FINAL = (9.0, 3.0, 7.0, 4.0)
CUT = (False, True, False, True)
GREEDY = (0.5, 0.5, 2.0, 2.0)

ALONE = {"old_logp"}
LOSS_KL = {"old_logp", "ref_logp"}
REWARD_KL = {"old_logp", "old_full_logp", "ref_logp"}
EVERYTHING = REWARD_KL | {"old_value"}
TABLE: dict[str, tuple[set[str], bool, str, str]] = {
    # columns that are measured, whether there is a ratio, surrogate, reduction of the policy
    "ppo": (EVERYTHING, True, "clip", "token_mean"),
    "ppo_kl": (EVERYTHING, True, "kl_penalized", "token_mean"),
    "instructgpt": (EVERYTHING, True, "clip", "token_mean"),
    "deepspeed_chat": (EVERYTHING, True, "clip", "token_mean"),
    "unclipped": (EVERYTHING, True, "unclipped", "token_mean"),
    "policy_gradient": (EVERYTHING, False, "reinforce", "token_mean"),
    "vapo": ({"old_logp", "old_value"}, True, "clip", "token_mean"),
    "reinforce": (REWARD_KL, False, "reinforce", "token_mean"),
    "reinforce_pp": (REWARD_KL, True, "clip", "token_mean"),
    "reinforce_pp_baseline": (LOSS_KL, True, "clip", "token_mean"),
    "rloo": (REWARD_KL, False, "reinforce", "sequence_sum"),
    "remax": (REWARD_KL, False, "reinforce", "sequence_sum"),
    "optimal_baseline": ({"old_logp", "old_collision"}, False, "reinforce", "sequence_sum"),
    "grpo": (LOSS_KL, True, "clip", "sequence_mean"),
    "grpo_process": (LOSS_KL, True, "clip", "sequence_mean"),
    "dr_grpo": (ALONE, True, "clip", "fixed_length"),
    "dapo": (ALONE, True, "clip", "token_mean"),
    "gspo": (ALONE, True, "clip", "sequence_mean"),
    "cispo": (ALONE, True, "cispo", "token_mean"),
    "gdpo": (ALONE, True, "clip", "sequence_mean"),
    "maxrl": (ALONE, True, "clip", "token_mean"),
    "sapo": (ALONE, True, "sapo", "sequence_mean"),
    "gmpo": (ALONE, True, "gmpo", "sequence_mean"),
    "dppo": (ALONE, True, "dppo", "token_mean"),
    "clip_cov": (ALONE, True, "kept", "token_mean"),
    "kl_cov": (ALONE, True, "kl_on", "token_mean"),
}
CREDIT: dict[str, tuple[str, int, int, bool]] = {
    # credit, answers per prompt, rounds of refilling, whether the advantage is whitened
    "ppo": ("gae", 1, 0, True),
    "ppo_kl": ("gae", 1, 0, True),
    "instructgpt": ("gae", 1, 0, True),
    "deepspeed_chat": ("gae", 1, 0, False),
    "unclipped": ("gae", 1, 0, True),
    "policy_gradient": ("gae", 1, 0, True),
    "vapo": ("gae_adaptive", 16, 0, False),
    "reinforce": ("monte_carlo", 1, 0, False),
    "reinforce_pp": ("monte_carlo", 1, 0, True),
    "reinforce_pp_baseline": ("group_center", 8, 0, True),
    "rloo": ("leave_one_out", 4, 0, False),
    "remax": ("against_greedy", 1, 0, False),
    "optimal_baseline": ("optimal_baseline", 8, 0, False),
    "grpo": ("group_zscore", 8, 0, False),
    "grpo_process": ("group_steps", 8, 0, False),
    "dr_grpo": ("group_center", 8, 0, False),
    "dapo": ("group_zscore", 16, 3, False),
    "gspo": ("group_zscore", 8, 0, False),
    "cispo": ("group_zscore", 8, 0, False),
    "gdpo": ("group_center", 8, 0, True),
    "maxrl": ("group_mean_scaled", 8, 0, False),
    "sapo": ("group_zscore", 8, 0, False),
    "gmpo": ("group_zscore", 8, 0, False),
    "dppo": ("group_zscore", 8, 0, False),
    "clip_cov": ("group_zscore", 8, 0, False),
    "kl_cov": ("group_zscore", 8, 0, False),
}


def make(name: str, **changes: Any) -> Algorithm:
    return online(name, longest=LONGEST, **changes)


def clip_bounds(method: Algorithm) -> tuple[float, float] | None:
    found = clipping(method)
    return None if found is None else (found.options["clip_low"], found.options["clip_high"])


def padded(rows: list[list[float]], fill: float = 0.0) -> Tensor:
    return torch.tensor([[*row, *[fill] * (3 - len(row))] for row in rows], dtype=torch.float64)


def rollout(scores: Any = SCORES, **columns: Any) -> Batch:
    """Four answers of 3, 2, 1 and 3 tokens to two prompts; the second and the last were cut off."""
    rows = [Row(torch.arange(2, 4 + length), 2, torch.ones(length, dtype=torch.bool)) for length in LENGTHS]
    return Batch.of(rows).with_columns(
        **{
            "group": torch.tensor([0, 0, 1, 1]), "truncated": torch.tensor(CUT), "address": torch.tensor([3, 1, 4, 5]),
            "rewards": torch.tensor(scores, dtype=torch.float64)[:, None],
            "token_score": torch.zeros(4, 3, dtype=torch.float64), "old_logp": padded(OLD), "ref_logp": padded(REF),
            "old_full_logp": padded(FULL), "old_collision": padded(COLLISION),
            "old_value": padded(VALUE), "final_value": torch.tensor(FINAL, dtype=torch.float64),
            "baseline": torch.tensor(GREEDY, dtype=torch.float64),
            "segment_end": torch.tensor([[0, 1, 1], [0, 1, 0], [1, 0, 0], [1, 0, 1]], dtype=torch.bool),
        }
        | columns
    )  # fmt: skip


def credit(method: Algorithm, scores: Any = SCORES, **columns: Any) -> Batch:
    return advantages(method.at(method.init()), rollout(scores, **columns))


def scores_for(name: str) -> tuple[float, ...]:
    """MaxRL takes no negative score."""
    return tuple(map(abs, SCORES)) if name == "maxrl" else SCORES


def close(actual: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(actual.double(), padded(expected), rtol=1e-9, atol=1e-9)


def rewards_by_hand(score: Any = SCORES, beta: float = BETA) -> list[list[float]]:
    """-beta k1 on every token, and the score on the last one."""
    return [
        [-beta * kl + (s if t == len(row) - 1 else 0.0) for t, kl in enumerate(row)]
        for row, s in zip(K1, score, strict=True)
    ]


def gae_by_hand(
    rewards: list[list[float]], gamma: float, gae_lambda: Any, final: Any = (0.0,) * 4
) -> list[list[float]]:
    """The sum of discounted TD errors, written out; gae_lambda is one number, or one an answer."""
    out, lams = [], gae_lambda if isinstance(gae_lambda, tuple) else (gae_lambda,) * 4
    for r, v, last, own in zip(rewards, VALUE, final, lams, strict=True):
        after = [*v[1:], last]
        delta = [r[t] + gamma * after[t] - v[t] for t in range(len(r))]
        out.append([sum((gamma * own) ** (s - t) * delta[s] for s in range(t, len(r))) for t in range(len(r))])
    return out


def whitened(rows: list[list[float]]) -> list[list[float]]:
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in flat) / (len(flat) - 1))
    return [[(x - mean) / (deviation + 1e-8) for x in row] for row in rows]


def to_go(rows: list[list[float]], gamma: float = 1.0) -> list[list[float]]:
    return [[sum(gamma ** (s - t) * row[s] for s in range(t, len(row))) for t in range(len(row))] for row in rows]


def plus(one: list[list[float]], other: list[list[float]]) -> list[list[float]]:
    return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(one, other, strict=True)]


def on_each_token(each: Any) -> list[list[float]]:
    return [[float(a)] * length for a, length in zip(each, LENGTHS, strict=True)]


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_method_is_in_the_tables() -> None:
    assert TABLE.keys() == CREDIT.keys() == catalogue.ONLINE.keys()


def test_every_choice_of_every_slot_can_be_composed() -> None:
    """Each stands in some method; what it needs is set beside it."""
    beside: dict[str, dict[str, Any]] = {
        "against_greedy": {"num_generations": 1}, "gae": {"value": {"clip_range_vf": 0.2}},
        "gae_adaptive": {"value": {"clip_range_vf": 0.2}},
        "reinforce": {"ratio": None}, "kl_penalized": {"ratio": None}, "gmpo": {"ratio": None},
    }  # fmt: skip
    for slot, known in ONLINE_SLOTS.items():
        for name in known:
            base = "reinforce_pp" if slot == "reward_placement" else "dr_grpo"
            changes = {slot: name} | beside.get(name, {})
            assert isinstance(make(base, **changes), Algorithm), (slot, name)


@pytest.mark.parametrize("name", TABLE)
def test_a_method_reads_and_casts_what_the_table_says(name: str) -> None:
    method = make(name)
    reads, ratio, surrogate, reduction = TABLE[name]
    assert method.reads() == reads
    roles = (
        {"policy"} | ({"reference"} if "ref_logp" in reads else set()) | ({"critic"} if "old_value" in reads else set())
    )
    assert method.roles() == roles
    assert {term.role for term in method.terms} == roles - {"reference"}
    assert method.has_ratio() is ratio
    assert method.terms[0].loss.op.__name__ == surrogate
    assert method.terms[0].reduction.__name__ == reduction
    assert (method.penalty is not None) == (reads >= REWARD_KL)
    in_the_loss = [term.name for term in method.terms if term.name in ONLINE_SLOTS["kl_in_loss"]]
    assert (method.penalty is None and bool(in_the_loss)) == (reads == LOSS_KL)  # never both
    assert method.objective.terms == method.terms
    assert method.objective.select == method.select


@pytest.mark.parametrize("name", CREDIT)
def test_a_method_credits_as_the_table_says(name: str) -> None:
    method, (op, answers, refill, white) = make(name), CREDIT[name]
    assert op in [one.op.__name__ for one in method.advantage.walk()]
    assert (method.collect.num_generations, method.collect.dynamic_sampling) == (answers, refill)
    assert method.collect.greedy is (name == "remax")
    assert (method.normalize_advantage is not None) is white
    assert method.centered is (
        not white and op in ("group_center", "group_zscore", "group_mean_scaled", "leave_one_out")
    )
    assert method.truncated == Truncated("keep")
    assert (
        method.reward_placement.op,
        method.reward_normalization,
        method.importance_correction,
        method.pairs,
    ) == (ops.terminal, None, None, None)
    assert (method.normalize is not None) is (name == "gdpo")
    assert [one.op.__name__ for one in method.shape] == {
        "dapo": ["soft_overlong"],
        "deepspeed_chat": ["clip_score"],
    }.get(name, [])
    assert [column for column, _ in method.select] == (["selected"] if name in ("clip_cov", "kl_cov") else [])


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("ppo", (0.2, 0.2)), ("dapo", (0.2, 0.28)), ("vapo", (0.2, 0.28)), ("gspo", (3e-4, 4e-4)),
        ("clip_cov", (1.0, 1.0)),
        ("grpo", (0.2, 0.2)), ("reinforce_pp", (0.2, 0.2)), ("maxrl", (0.2, 0.2)), ("reinforce", None), ("cispo", None),
        ("kl_cov", None), ("sapo", None), ("gmpo", None), ("dppo", None), ("ppo_kl", None),
    ],
)  # fmt: skip
def test_clip_bounds_are_the_papers(name: str, bounds: tuple[float, float] | None) -> None:
    assert clip_bounds(make(name)) == bounds


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cispo", {"clip_low": 1.0, "clip_high": 0.28}), ("sapo", {"tau_positive": 1.0, "tau_negative": 1.05}),
        ("gmpo", {"clip_low": 0.4, "clip_high": 0.4}), ("dppo", {"divergence": "tv", "bound": 0.15}), ("kl_cov", {"coef": 1.0}),
    ],
)  # fmt: skip
def test_the_surrogates_dials_are_the_papers(name: str, options: dict[str, Any]) -> None:
    assert make(name).terms[0].loss.options == options


@pytest.mark.parametrize(
    ("name", "coef"),
    [
        ("ppo", 0.05),
        ("instructgpt", 0.02),
        ("deepspeed_chat", 0.1),
        ("reinforce", 0.05),
        ("reinforce_pp", 0.01),
        ("rloo", 0.05),
    ],
)
def test_the_coefficients_of_the_kl_in_the_reward(name: str, coef: float) -> None:
    assert make(name).init()["penalty"] == coef


def test_the_kl_in_the_loss_of_each_method() -> None:
    found = {
        name: (term.loss.op.__name__, term.weight, term.reduction is make(name).terms[0].reduction)
        for name in TABLE
        for term in make(name).terms
        if term.name in ONLINE_SLOTS["kl_in_loss"]
    }
    assert found == {
        "grpo": ("k3", 0.04, True), "grpo_process": ("k3", 0.04, True), "reinforce_pp_baseline": ("k2", 0.001, True),
    }  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_variant_leaves_every_other_slot_identical(name: str) -> None:
    method = make(name)
    for slot in fields(Algorithm):
        variant = replace(method, **{slot.name: part(ops.uniform) if slot.name == "reward_placement" else None})
        for other in fields(Algorithm):
            if other.name != slot.name:
                assert getattr(variant, other.name) is getattr(method, other.name)


def test_instructgpt_is_ppo_with_one_term_more() -> None:
    method, base = make("instructgpt", kl_in_reward=LOW, ptx_coef=0.3), make("ppo", kl_in_reward=LOW)
    assert replace(method, terms=method.terms[:-1]) == base
    ptx = method.terms[-1]
    got = (ptx.role, ptx.stream, ptx.weight, ptx.loss.op, ptx.reduction)
    assert got == ("policy", "ptx", 0.3, ops.nll, ops.token_mean)


@pytest.mark.parametrize("name", ["ppo_kl", "unclipped", "policy_gradient"])
def test_other_surrogates_change_one_slot_of_ppo(name: str) -> None:
    method, base = make(name), make("ppo")
    assert replace(method, terms=()) == replace(base, terms=())
    assert method.terms[1:] == base.terms[1:]
    assert replace(method.terms[0], loss=base.terms[0].loss, name=base.terms[0].name) == base.terms[0]


def test_the_reductions_of_verl_are_taken_under_their_names() -> None:
    for theirs, ours in (
        ("token-mean", ops.token_mean), ("seq-mean-token-mean", ops.sequence_mean), ("seq-mean-token-sum", ops.sequence_sum),
        ("seq-mean-token-sum-norm", ops.fixed_length),
    ):  # fmt: skip
        assert online("grpo", reduction=theirs, longest=8).terms[0].reduction is ours


def test_a_changed_slot_keeps_its_other_dials_and_another_part_begins_anew() -> None:
    assert clip_bounds(make("dapo", surrogate={"clip_low": 0.1})) == (0.1, 0.28)
    assert clip_bounds(make("dapo", surrogate="clip")) == (0.2, 0.28)
    assert make("dapo", surrogate="dual_clip").terms[0].loss.options == {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "bound": 3.0,
    }
    assert make("ppo", kl_in_reward={"controller": "halving", "target": 3.0}).init()["penalty"] == 0.05
    assert make("vapo", value={"vf_coef": 0.5}).terms[1].loss.options == {"clip": None}


def test_an_empty_record_is_its_defaults() -> None:
    assert make("reinforce_pp_baseline", kl_in_reward={}, kl_in_loss=None).init() == {"penalty": KL().coef}
    assert make("grpo", entropy={}).terms[-1].weight == Entropy().ent_coef
    assert make("vapo", value={}) == make("vapo")
    assert make("grpo", advantage="gae", value={}).terms[1].loss.options == {"clip": 0.2}


def test_grpo_without_a_kl_has_no_reference() -> None:
    for kl_in_loss in (None, {"coef": 0.0}):
        method = make("grpo", kl_in_loss=kl_in_loss)
        assert method.reads() == ALONE
        assert method.roles() == {"policy"}
        assert len(method.terms) == 1
    assert make("grpo", kl_in_loss={"coef": 0.3}).terms[1].weight == 0.3


@pytest.mark.parametrize("name", ONLINE_SLOTS["kl_in_loss"])
def test_a_loss_kl_casts_the_reference(name: str) -> None:
    method = make("grpo", kl_in_loss=name)
    assert method.roles() == {"policy", "reference"}
    assert method.reads() == {
        "k2": LOSS_KL, "k3": LOSS_KL, "k3_weighted": REWARD_KL, "exact": ALONE, "k2_sequence": LOSS_KL,
    }[name]  # fmt: skip
    assert method.terms[1].weight == 0.04
    assert ("exact_kl" if name == "exact" else "full_logp") in method.terms[1].reads()


def test_a_kl_coefficient_of_zero_still_measures_it() -> None:
    assert "ref_logp" in make("ppo", kl_in_reward=KL(coef=0.0)).reads()
    assert make("ppo", kl_in_reward=None).roles() == {"policy", "critic"}


def test_bootstrapping_reads_the_value_after_the_last_token() -> None:
    assert make("ppo", truncated=Truncated("bootstrap")).reads() == EVERYTHING | {"final_value"}


@pytest.mark.parametrize(
    ("options", "bounds"),
    [({}, (0.2, 0.2)), ({"clip_low": 0.1, "clip_high": 0.1}, (0.1, 0.1)), ({"clip_high": 0.28}, (0.2, 0.28))],
)
@pytest.mark.parametrize("name", ["ppo", "grpo"])
@pytest.mark.parametrize("surrogate", ["clip", "dual_clip"])
def test_clip_bounds_are_the_surrogates(name: str, surrogate: str, options: dict, bounds: tuple[float, float]) -> None:
    assert clip_bounds(make(name, surrogate={"name": surrogate, **options})) == bounds
    assert (
        clip_bounds(make("grpo", surrogate={"name": "clip", **options}, importance_correction="token_weight")) == bounds
    )


# --- token rewards and credit by hand --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "ppo_kl", "instructgpt", "unclipped", "policy_gradient"])
def test_the_ppo_family_is_credited_by_hand(name: str) -> None:
    got = credit(make(name, kl_in_reward=LOW, advantage={"gamma": 0.9, "gae_lambda": 0.8}))
    rewards = rewards_by_hand()
    advantage = gae_by_hand(rewards, 0.9, 0.8)
    close(got["kl"], K1)
    close(got["token_reward"], rewards)
    close(got["advantage"], whitened(advantage))
    close(got["returns"], plus(advantage, VALUE))


def test_by_default_ppo_has_gamma_one_and_lambda_095() -> None:
    close(
        credit(make("ppo", kl_in_reward=LOW, normalize_advantage=None))["advantage"],
        gae_by_hand(rewards_by_hand(), 1.0, 0.95),
    )


def test_deepspeed_chat_clips_the_score_at_five_and_does_not_whiten() -> None:
    got = credit(make("deepspeed_chat"))
    rewards = rewards_by_hand((1.0, -2.0, 5.0, 0.5), beta=0.1)
    close(got["token_reward"], rewards)
    close(got["advantage"], gae_by_hand(rewards, 1.0, 0.95))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_vapo_has_a_lambda_for_each_length_and_a_monte_carlo_critic(gamma: float) -> None:
    # alpha 1/2: lambda 1 - 1 / 1.5 for three tokens, 1 - 1 / 1 for two, 0 for one
    got = credit(make("vapo", advantage={"alpha": 0.5, "gamma": gamma}))
    rewards = rewards_by_hand(beta=0.0)
    close(got["advantage"], gae_by_hand(rewards, gamma, (1 / 3, 0.0, 0.0, 1 / 3)))
    close(got["returns"], to_go(rewards, gamma))  # lambda 1: the value drops out
    assert "kl" not in got.columns


def test_the_critics_own_lambda_changes_its_target_and_nothing_else() -> None:
    base, own = (make("ppo", kl_in_reward=LOW, value={"gae_lambda": gae_lambda}) for gae_lambda in (None, 0.3))
    assert replace(own, target=None) == base
    close(credit(own)["advantage"], whitened(gae_by_hand(rewards_by_hand(), 1.0, 0.95)))
    close(credit(own)["returns"], plus(gae_by_hand(rewards_by_hand(), 1.0, 0.3), VALUE))


def test_reinforce_is_credited_with_returns_to_go() -> None:
    for gamma in (1.0, 0.9):
        got = credit(make("reinforce", kl_in_reward=LOW, advantage={"gamma": gamma}))
        close(got["advantage"], to_go(rewards_by_hand(), gamma))
    for method in (
        make("reinforce", kl_in_reward=LOW, normalize_advantage="whiten"),
        make("reinforce_pp", kl_in_reward=LOW),
    ):
        close(credit(method)["advantage"], whitened(to_go(rewards_by_hand())))


def test_rloo_compares_whole_returns_kl_included_with_the_other_answers() -> None:
    got = credit(make("rloo", kl_in_reward=LOW))
    total = [sum(row) for row in rewards_by_hand()]
    assert total == [1 + 0.5 * 0.625, -2 - 0.5 * 0.5, 8 + 0.5 * 2.5, 0.5 + 0.5 * 0.5]  # sums of k1 -0.625 0.5 -2.5 -0.5
    close(
        got["advantage"],
        on_each_token([total[0] - total[1], total[1] - total[0], total[2] - total[3], total[3] - total[2]]),
    )
    close(got["token_reward"], rewards_by_hand())


def test_rloo_takes_the_mean_of_all_the_others() -> None:
    got = credit(make("rloo", kl_in_reward=None), group=torch.tensor([7, 7, 7, 7]))
    close(got["advantage"], on_each_token([score - (sum(SCORES) - score) / 3 for score in SCORES]))


def test_an_answer_without_others_is_an_error_that_says_so() -> None:
    with pytest.raises(RewardError, match="at least two answers in every group"):
        credit(make("rloo"), group=torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_remax_subtracts_the_greedy_answers_score_but_not_its_kl(gamma: float) -> None:
    got = credit(make("remax", kl_in_reward=LOW, advantage={"gamma": gamma}))
    close(
        got["advantage"], [[g - s for g in row] for row, s in zip(to_go(rewards_by_hand(), gamma), GREEDY, strict=True)]
    )


def test_grpo_process_credits_each_token_with_the_normalized_steps_from_it_on() -> None:
    dense = [[0.0, 1.0, 3.0], [0.0, 8.0], [5.0], [7.0, 0.0, 6.0]]
    got = credit(make("grpo_process"), (4.0, 8.0, 5.0, 13.0), token_score=padded(dense))
    a, b = math.sqrt(26 / 2) + 1e-6, 1 + 1e-6  # steps 1 3 8 of mean 4, 5 7 6 of mean 6
    expected = [[-4 / a, -4 / a, -1 / a], [4 / a, 4 / a], [-1 / b], [1 / b, 0.0, 0.0]]
    close(got["advantage"], expected)


def test_what_is_left_of_a_score_is_a_step_at_the_last_token() -> None:
    # dense 1 on the first token of the last answer, 2 more for the whole: its last token is a step's end already;
    # in the second answer no step ends at the last token, the penalty makes it one
    dense = [[0.0, 0.0, 0.0], [1.0, 0.0], [0.0], [0.0, 0.0, 0.0]]
    step = torch.tensor([[False, False, True], [True, False, False], [True, False, False], [False, False, True]])
    method = make("grpo_process", truncated=Truncated("penalize", 2.0), advantage={"eps": 0.0})
    got = credit(method, (4.0, 1.0, 3.0, 3.0), token_score=padded(dense), segment_end=step)
    # group 0: steps 4 | 1 -2 of mean 1, squares 9 0 9; group 1: 3 | 1
    close(got["advantage"], [[1.0] * 3, [-1.0, -1.0], [1 / math.sqrt(2)], [-1 / math.sqrt(2)] * 3])


def test_the_rounding_of_a_sum_is_no_step() -> None:
    # in float32 the sum of 0.1 0.7 0.1 is not 0.9; no step ends at the first answer's last token
    rows = [Row(torch.arange(6), 2, torch.ones(4, dtype=torch.bool))] * 2
    dense = torch.tensor([[0.1, 0.7, 0.1, 0.0], [0.5, 0.5, 0.0, 0.0]])
    batch = Batch.of(rows).with_columns(
        group=torch.zeros(2, dtype=torch.int64), truncated=torch.zeros(2, dtype=torch.bool), token_score=dense,
        rewards=torch.tensor([[0.9], [1.0]]), segment_end=torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool),
    )  # fmt: skip
    steps = [0.1, 0.7, 0.1, 0.5, 0.5]
    mean, spread = sum(steps) / 5, deviation(steps)
    z = [(x - mean) / spread for x in steps]
    got = advantages(make("grpo_process", advantage={"eps": 0.0}), batch)["advantage"]
    expected = torch.tensor([[sum(z[:3]), z[1] + z[2], z[2], 0.0], [z[3] + z[4], z[4], 0.0, 0.0]])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_optimal_baseline_is_credited_by_hand() -> None:
    got = credit(make("optimal_baseline"))
    energy = [
        [sum(1 - 2 * math.exp(OLD[r][s]) + COLLISION[r][s] for s in range(t + 1)) for t in range(n)]
        for r, n in enumerate(LENGTHS)
    ]
    expected: list[list[float]] = []
    for r, n in enumerate(LENGTHS):
        expected.append([])
        for t in range(n):
            peers = [p for p in (2 * (r // 2), 2 * (r // 2) + 1) if t < LENGTHS[p]]
            weight = sum(energy[p][t] for p in peers)
            assert weight > 0
            baseline = sum(energy[p][t] * SCORES[p] for p in peers) / weight if len(peers) > 1 else 0.0
            expected[-1].append(SCORES[r] - baseline)
    close(got["advantage"], expected)


Z = 1 / math.sqrt(2)  # the deviation of two is their gap / sqrt(2)


@pytest.mark.parametrize(
    ("name", "each"),
    [  # scores 1 -2 | 8 0.5
        ("grpo", (Z, -Z, Z, -Z)), ("gspo", (Z, -Z, Z, -Z)), ("cispo", (Z, -Z, Z, -Z)), ("sapo", (Z, -Z, Z, -Z)),
        ("gmpo", (Z, -Z, Z, -Z)), ("dppo", (Z, -Z, Z, -Z)), ("clip_cov", (Z, -Z, Z, -Z)), ("kl_cov", (Z, -Z, Z, -Z)),
        ("dapo", (Z, -Z, Z, -Z)), ("dr_grpo", (1.5, -1.5, 3.75, -3.75)),
    ],
)  # fmt: skip
def test_the_group_family_is_credited_by_hand(name: str, each: tuple[float, ...]) -> None:
    options = {} if name == "dr_grpo" else {"advantage": {"eps": 0.0}}
    got = credit(make(name, **options))
    close(got["advantage"], on_each_token(each))
    assert "kl" not in got.columns


def test_grpo_by_default_adds_1e_6_to_the_sample_deviation() -> None:
    got = credit(make("grpo"), (0.0, 2e-6, 0.0, 0.0))
    z = 1 / (math.sqrt(2) + 1)
    close(got["advantage"], on_each_token((-z, z, 0.0, 0.0)))


def test_reinforce_pp_baseline_whitens_what_is_centered() -> None:
    close(credit(make("reinforce_pp_baseline"))["advantage"], whitened(on_each_token((1.5, -1.5, 3.75, -3.75))))


def test_maxrl_divides_by_the_groups_mean() -> None:
    got = credit(make("maxrl"), (1.0, 0.0, 3.0, 1.0))
    close(got["advantage"], on_each_token((1.0, -1.0, 0.5, -0.5)))
    with pytest.raises(RewardError, match="no score may be negative"):
        credit(make("maxrl"))


def test_gdpo_normalizes_each_reward_before_it_sums_them() -> None:
    rewards = torch.tensor([[1.0, 100.0], [-2.0, 300.0], [8.0, 7.0], [0.5, 7.0]], dtype=torch.float64)
    method = make("gdpo", weights=(2.0, 0.5), normalize={"eps": 0.0})
    score = [2 * Z - 0.5 * Z, -2 * Z + 0.5 * Z, 2 * Z, -2 * Z]  # the second reward is constant in the second group
    got = credit(method, rewards=rewards)
    assert outcome(method, rollout(rewards=rewards)).tolist() == pytest.approx(score, rel=1e-12)
    close(got["advantage"], whitened(on_each_token(score)))  # their group means are 0 already
    assert torch.equal(got["rewards"], rewards)


def test_dapo_takes_the_overlong_penalty_off_before_it_compares() -> None:
    # limit 4, buffer 3: lengths 3 2 1 3 cost 2/3 1/3 0 2/3
    method = online("dapo", longest=4, overlong={"buffer": 3}, advantage="group_center")
    got = credit(method)
    score = [1 - 2 / 3, -2 - 1 / 3, 8.0, 0.5 - 2 / 3]
    assert got["score"].tolist() == pytest.approx(score)
    a, b = (score[0] - score[1]) / 2, (score[2] - score[3]) / 2
    close(got["advantage"], on_each_token((a, -a, b, -b)))


@pytest.mark.parametrize("combine", [{"name": "minimum"}, {"name": "lower_bound", "k": 2.0}])
def test_an_ensemble_is_combined_with_care(combine: dict[str, Any]) -> None:
    rewards = torch.tensor([[1.0, 3.0], [0.0, -2.0], [5.0, 5.0], [2.0, 1.0]], dtype=torch.float64)
    method = make("ppo", combine=combine, weights=(1.0, 1.0))
    expected = [1, -2, 5, 1] if combine["name"] == "minimum" else [2 - 2 * 1, -1 - 2 * 1, 5, 1.5 - 2 * 0.5]
    assert outcome(method, rollout(rewards=rewards)).tolist() == pytest.approx(expected)


def test_scores_are_combined_normalized_bounded_and_penalized_in_this_order() -> None:
    method = online(
        "ppo", longest=4, weights=(0.5,), reward_normalization="running", reward_clip={"name": "clip_score", "bound": 2.0},
        overlong={"name": "soft_overlong", "buffer": 3}, truncated=Truncated("penalize", 0.25),
    )  # fmt: skip
    state = {**method.init(), "running.count": 3.0, "running.mean": 9.0, "running.square": 0.5, "running.shift": 1.0}
    got = shaped(method.at(state), rollout())
    # (s / 2 - 1) / sqrt(0.5 / 2), bounded by 2, minus the length's share, minus what a cut costs
    expected = [-1 - 2 / 3, -2 - 1 / 3 - 0.25, 2.0, -1.5 - 2 / 3 - 0.25]
    assert got["score"].tolist() == pytest.approx(expected, rel=1e-12)


# --- the KL in the reward, and where the score is placed -------------------------------------------------------------


@pytest.mark.parametrize(("estimator", "kl"), [("k2", lambda r: r * r / 2), ("k3", lambda r: math.exp(-r) - 1 + r)])
def test_other_estimators_in_the_reward(estimator: Any, kl: Any) -> None:
    close(
        credit(make("ppo", kl_in_reward=KL(coef=BETA, estimator=estimator)))["kl"], [[kl(x) for x in row] for row in K1]
    )


EXACT = [[0.5, 0.25, 1.0], [0.0, 0.125], [0.75], [0.5, 2.0, 0.25]]


def test_the_exact_kl_stands_in_the_reward_and_its_own_state_in_the_loss() -> None:
    method = make("rloo", kl_in_reward=KL(coef=BETA, estimator="exact"))
    assert method.reads() == {"old_logp", "old_exact_kl"}
    assert method.roles() == {"policy", "reference"}
    got = credit(method, old_exact_kl=padded(EXACT))
    close(got["kl"], EXACT)
    total = [score - BETA * sum(row) for row, score in zip(EXACT, SCORES, strict=True)]
    close(got["advantage"], on_each_token([total[i] - total[i ^ 1] for i in range(4)]))
    term = method.at(method.init()).terms[1]
    assert (term.role, term.stream, term.weight, term.reduction) == ("policy", "rollout", BETA, ops.sequence_sum)
    columns = {**got.columns, "exact_kl": padded([[2 * x for x in row] for row in EXACT], math.nan)}
    assert float(term.share(columns, got.counts())) == pytest.approx(BETA * 2 * sum(map(sum, EXACT)) / 4)


def test_the_exact_kl_and_its_later_tokens_have_the_gradient_of_the_kl_over_whole_answers() -> None:
    """Two tokens of three, the second depends on the first: all nine answers, each as often as the policy draws it."""
    noise = torch.Generator().manual_seed(0)
    logits = [torch.randn(*shape, dtype=torch.float64, generator=noise).requires_grad_() for shape in [(3,), (3, 3)]]
    ref = [torch.randn(*shape, dtype=torch.float64, generator=noise).log_softmax(-1) for shape in [(3,), (3, 3)]]

    def both(first: Tensor, second: Tensor) -> Tensor:
        """(9, 2): of every answer's two tokens."""
        return torch.stack([first[:, None].expand(3, 3), second], -1).reshape(9, 2)

    own = [x.log_softmax(-1) for x in logits]
    logp, kl = both(*own), [(one.exp() * (one - other)).sum(-1) for one, other in zip(own, ref, strict=True)]
    exact = both(kl[0].expand(3), kl[1][:, None].expand(3, 3))
    p = logp.detach().sum(1).exp()
    exact_whole = (logp.sum(1).exp() * (logp.sum(1) - both(*ref).sum(1))).sum()

    method = make("reinforce", kl_in_reward=KL(coef=1.0, estimator="exact"), reduction="sequence_sum")
    method = method.at(method.init())
    rows = [Row(torch.arange(4), 2, torch.ones(2, dtype=torch.bool)) for _ in range(9)]
    batch = Batch.of(rows).with_columns(
        rewards=torch.zeros(9, 1, dtype=torch.float64), token_score=torch.zeros(9, 2, dtype=torch.float64),
        truncated=torch.zeros(9, dtype=torch.bool), old_exact_kl=exact.detach(),
    )  # fmt: skip
    batch = advantages(method, batch)
    loss = 0.0
    for number, weight in enumerate(p.tolist()):
        one = batch.take([number])
        columns = {**one.columns, "logp": logp[number : number + 1], "exact_kl": exact[number : number + 1]}
        loss = loss + weight * sum(term.share(columns, one.counts()) for term in method.terms)
    ours = torch.autograd.grad(loss, logits, retain_graph=True)
    theirs = torch.autograd.grad(exact_whole, logits)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["adaptive", "halving"])
def test_the_exact_kl_has_one_coefficient(kind: Any) -> None:
    method = make(
        "reinforce", kl_in_reward=KL(coef=BETA, estimator="exact", controller=kind, target=3.0, horizon=10_000)
    )
    state = method.next(method.init(), measured(kl=9.0, kl_old=0.0))
    now = method.at(state)
    assert now.penalty.coef == now.terms[1].weight == BETA * (2 if kind == "halving" else 1 + 0.2 * 64 / 10_000)


def test_a_sequence_kl_is_charged_once_on_the_last_token() -> None:
    for where, share in (("sequence", lambda n: 1 / n), ("sequence_sum", lambda n: 1.0)):
        got = credit(make("ppo", kl_in_reward=KL(coef=BETA, where=where)))
        expected = [
            [*[0.0] * (len(row) - 1), score - BETA * share(len(row)) * sum(row)]
            for row, score in zip(K1, SCORES, strict=True)
        ]
        close(got["token_reward"], expected)


NO_KL = KL(coef=0.0)
PLACES = [
    ("terminal", lambda length: [0.0] * (length - 1) + [1.0]),
    ("uniform", lambda length: [1 / length] * length),
    ("linear", lambda length: [t / length for t in range(1, length + 1)]),
    (
        {"name": "linear", "normalized": True},
        lambda length: [2 * t / (length * (length + 1)) for t in range(1, length + 1)],
    ),
]


@pytest.mark.parametrize("name", ["ppo", "reinforce", "remax", "reinforce_pp"])
@pytest.mark.parametrize(("place", "weights"), PLACES)
def test_the_score_is_placed_over_the_tokens(name: str, place: Any, weights: Any) -> None:
    got = credit(make(name, kl_in_reward=NO_KL, reward_placement=place))
    expected = [[score * w for w in weights(length)] for score, length in zip(SCORES, LENGTHS, strict=True)]
    close(got["token_reward"], expected)


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_the_score_is_placed_by_attention(heads: str) -> None:
    weights = [[0.5, 0.25, 0.25], [0.75, 0.25], [1.0], [0.0, 0.5, 0.5]]
    method = make("ppo", kl_in_reward=NO_KL, reward_placement={"name": "attention", "heads": heads})
    assert method.reads() == EVERYTHING | {f"attention_{heads}"}
    got = credit(method, **{f"attention_{heads}": padded(weights, math.nan)})
    close(got["token_reward"], [[score * w for w in row] for row, score in zip(weights, SCORES, strict=True)])
    assert make("ppo", reward_placement="attention").reads() == EVERYTHING | {"attention_mean"}


def test_raw_linear_weights_change_what_a_whole_answer_earns() -> None:
    # they sum to (T + 1) / 2: 2, 1.5, 1 and 2
    score = [2 * 1.0, 1.5 * -2.0, 8.0, 2 * 0.5]
    for place in ("linear", {"name": "linear", "normalized": False}):
        got = credit(make("dr_grpo", reward_placement=place))
        close(got["advantage"], on_each_token([(score[i] - score[i ^ 1]) / 2 for i in range(4)]))


@pytest.mark.parametrize("place", ["terminal", "uniform"])
def test_dense_scores_stay_at_their_places_and_the_rest_is_placed(place: Any) -> None:
    dense = [[0.25, -0.5, 0.125], [1.0, -1.0], [0.5], [0.0, 2.0, -1.0]]
    got = credit(make("ppo", kl_in_reward=NO_KL, reward_placement=place), token_score=padded(dense))
    expected = []
    for row, score in zip(dense, SCORES, strict=True):
        rest, n = score - sum(row), len(row)
        expected.append([x + (rest / n if place == "uniform" else rest * (t == n - 1)) for t, x in enumerate(row)])
    close(got["token_reward"], expected)
    assert torch.allclose(got["score"], torch.tensor(SCORES, dtype=torch.float64))


@pytest.mark.parametrize(
    "changes",
    [
        {"reward_normalization": "running"},
        {"normalize": "group_normalized", "num_generations": 2},
        {"combine": "minimum"},
    ],
)
def test_dense_scores_keep_their_size_or_are_refused(changes: dict[str, Any]) -> None:
    method = make("ppo", **changes)
    credit(method)
    with pytest.raises(RewardError, match="scores per token only go with combine weighted_sum"):
        credit(method, token_score=torch.ones(4, 3, dtype=torch.float64))


def test_several_rewards_are_weighted_and_summed() -> None:
    method = make("ppo", kl_in_reward=NO_KL, weights=(2.0, -1.0))
    both = torch.tensor([[1.0, 0.5], [0.0, 1.0], [3.0, 3.0], [-1.0, 2.0]], dtype=torch.float64)
    assert credit(method, rewards=both)["score"].tolist() == [1.5, -1.0, 3.0, -4.0]


# --- truncated answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_a_truncated_answer_is_penalized(name: str) -> None:
    got = credit(make(name, truncated=Truncated("penalize", 0.25)), scores_for(name))
    score = list(scores_for(name))
    if name == "deepspeed_chat":
        score = [1.0, -2.0, 5.0, 0.5]
    if name == "gdpo":
        score = [Z, -Z, Z, -Z]
    expected = [s - 0.25 * cut for s, cut in zip(score, CUT, strict=True)]
    assert got["score"].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", TABLE)
def test_a_truncated_answer_is_masked_and_counts_nowhere(name: str) -> None:
    got = credit(make(name, truncated=Truncated("mask")), scores_for(name))
    assert got["mask"].sum(1).tolist() == [3, 0, 1, 0]
    assert not got["advantage"][[1, 3]].any()
    assert (got.counts().tokens, got.counts().sequences) == (4, 2)
    assert got["advantage"][got["mask"]].isfinite().all()


@pytest.mark.parametrize("name", [name for name, (_, _, _, white) in CREDIT.items() if not white])
def test_a_masked_answer_keeps_its_place_in_its_groups_statistics(name: str) -> None:
    kept, masked = (credit(make(name, truncated=Truncated(rule)), scores_for(name)) for rule in ("keep", "mask"))
    assert torch.equal(masked["advantage"][[0, 2]], kept["advantage"][[0, 2]])
    assert masked["advantage"][[0, 2]].any()


def test_whitening_leaves_masked_answers_out() -> None:
    got = credit(make("ppo", kl_in_reward=LOW, truncated=Truncated("mask")))
    advantage = gae_by_hand(rewards_by_hand(), 1.0, 0.95)
    expected = whitened([advantage[0], advantage[2]])
    close(got["advantage"], [expected[0], [], expected[1], []])
    got = credit(make("reinforce_pp_baseline", truncated=Truncated("mask")))
    expected = whitened([[1.5] * 3, [3.75]])
    close(got["advantage"], [expected[0], [], expected[1], []])


def test_a_masked_answer_teaches_the_critic_nothing() -> None:
    got = credit(make("ppo", truncated=Truncated("mask")))
    assert not got["returns"][[1, 3]].any()


@pytest.mark.parametrize("name", ["ppo", "vapo"])
def test_a_truncated_answer_is_bootstrapped_with_the_critics_value(name: str) -> None:
    """The value stands for all that would have followed, the score included: a cut-off answer is not paid twice."""
    options = {"gamma": 0.9, "gae_lambda": 0.8} if name == "ppo" else {"gamma": 0.9, "alpha": 0.5}
    got = credit(
        make(name, kl_in_reward=LOW, advantage=options, normalize_advantage=None, truncated=Truncated("bootstrap"))
    )
    rewards = [
        [*row[:-1], row[-1] - score] if cut else row
        for row, score, cut in zip(rewards_by_hand(), SCORES, CUT, strict=True)
    ]
    final = [f if cut else 0.0 for f, cut in zip(FINAL, CUT, strict=True)]
    gae_lambda = 0.8 if name == "ppo" else (1 / 3, 0.0, 0.0, 1 / 3)
    close(got["advantage"], gae_by_hand(rewards, 0.9, gae_lambda, final))
    target = gae_by_hand(
        rewards, 0.9, 0.8 if name == "ppo" else 1.0, final
    )  # the critic's own lambda is bootstrapped too
    close(got["returns"], plus(target, VALUE))


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("rule", ["keep", "mask", "penalize"])
def test_nothing_behind_an_answer_is_credited(name: str, rule: Any) -> None:
    """NaN in the padding of every measured column changes nothing."""
    method = make(
        name, truncated=Truncated(rule, 0.25 if rule == "penalize" else 1.0), importance_correction="token_weight"
    )
    sampler = [[x - 0.25 for x in row] for row in OLD]
    base = credit(method, scores_for(name), sampler_logp=padded(sampler))
    nan = {
        column: padded(rows, math.nan)
        for column, rows in (
            ("old_logp", OLD), ("old_full_logp", FULL), ("ref_logp", REF), ("old_value", VALUE),
            ("old_collision", COLLISION), ("sampler_logp", sampler),
        )
    }  # fmt: skip
    spoiled = credit(method, scores_for(name), **nan)
    found = {"token_reward", "advantage", "returns", "kl", "correction"} & base.columns.keys()
    assert found >= {"token_reward", "advantage", "correction"}
    for column in found:
        assert torch.equal(base[column], spoiled[column]), column


# --- importance correction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correct", ONLINE_SLOTS["importance_correction"])
@pytest.mark.parametrize("name", ["grpo", "reinforce", "kl_cov"])
def test_the_correction_weighs_the_policys_loss_token_by_token(name: str, correct: str) -> None:
    gap = [[0.5, -0.25, 0.0], [0.25, 0.25], [0.0], [-0.1, 0.0, 0.1]]  # log old - log sampler
    sampler = padded(OLD) - padded(gap)
    method, plain = make(name, importance_correction=correct), make(name)
    got = credit(method, sampler_logp=sampler)
    assert torch.equal(got["correction"], getattr(ops, correct)(padded(OLD), sampler, got["mask"]))
    assert (got["correction"] != 1)[got["mask"]].any()
    assert torch.equal(got["advantage"], credit(plain)["advantage"])
    columns = {**got.columns, **now(), "selected": got["mask"]}
    mine, theirs = (one.at(one.init()).terms[0].loss(columns) for one in (method, plain))
    torch.testing.assert_close(mine, theirs * got["correction"])
    assert method.reads() == plain.reads()  # nothing more is measured
    assert method.has_ratio() == plain.has_ratio()


# --- what looks across a mini-batch ----------------------------------------------------------------------------------


def selected(method: Algorithm, batch: Batch, logp: Tensor) -> Batch:
    columns = {**batch.columns, "now_logp": logp}
    return batch.with_columns(**{name: one(columns) for name, one in method.select})


def test_clip_cov_gives_the_selected_tokens_no_gradient() -> None:
    method = make("clip_cov", select={"cov_low": 0.1, "cov_high": 99.0, "share": 0.25})
    batch = credit(method)
    current = now()["logp"].detach().requires_grad_()
    batch = selected(method, batch, current.detach())
    out = ~batch["selected"]
    assert int(out.sum()) == 2  # a quarter of nine
    method.terms[0].share({**batch.columns, "logp": current}, batch.counts()).backward()
    assert torch.equal(current.grad == 0, out | ~batch["mask"])


def test_clip_cov_knows_the_bounds_of_its_clip() -> None:
    method = make("clip_cov", surrogate={"name": "clip", "clip_low": 0.1, "clip_high": 0.15})
    assert (method.select[0][1].options["clip_low"], method.select[0][1].options["clip_high"]) == (0.1, 0.15)
    assert (make("clip_cov").select[0][1].options["clip_low"], make("clip_cov").select[0][1].options["clip_high"]) == (
        1.0,
        1.0,
    )


# --- which groups teach, and pairs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "dense", "expected"),
    [
        ([[1.0], [1.0], [2.0], [3.0]], None, [False, False, True, True]),
        ([[1.0], [2.0], [2.0], [2.0]], None, [True, True, False, False]),
        ([[1.0, 5.0], [1.0, 4.0], [2.0, 2.0], [2.0, 2.0]], None, [True, True, False, False]),
        (
            [[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [2.0, 2.5]],
            None,
            [False, False, True, True],
        ),  # the outcome is their sum
        (
            [[1.0], [1.0], [2.0], [2.0]],
            [[0.0, 1.0], [1.0, 0.0], [1.0], [1.0]],
            [True, True, False, False],
        ),  # or a token's
        ([[0.1], [0.1], [-7.0], [-7.0]], None, [False] * 4),
    ],
)
def test_only_groups_with_spread_teach(rewards: list, dense: list | None, expected: list[bool]) -> None:
    method = make("dapo", weights=(1.0,) * len(rewards[0]))
    columns = {"token_score": padded(dense)} if dense else {}
    batch = rollout(group=torch.tensor([5, 5, 2, 2]), rewards=torch.tensor(rewards, dtype=torch.float64), **columns)
    assert spread(method, batch).tolist() == expected


def test_where_each_reward_is_normalized_by_itself_each_ones_spread_counts() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [2.0, 2.0]], dtype=torch.float64)
    assert spread(make("gdpo", weights=(1.0, 1.0)), rollout(rewards=rewards)).tolist() == [True, True, False, False]


def test_spread_does_not_depend_on_the_order_of_the_answers() -> None:
    rewards = torch.tensor([[1.0], [4.0], [1.0], [5.0]])
    batch = rollout(group=torch.tensor([3, 1, 3, 1]), rewards=rewards)
    assert spread(make("dapo"), batch).tolist() == [False, True, False, True]


def test_a_pair_is_the_best_and_the_worst_answer_of_a_group() -> None:
    method = online("online_dpo")
    batch = advantages(method, rollout((1.0, 3.0, 0.5, 2.0), group=torch.tensor([0, 0, 0, 0])))
    got = paired(batch)
    assert got["score"].tolist() == [3.0, 0.5]
    assert [row.response for row in got.rows] == [2, 1]
    assert (got["index"].tolist(), got["element"].tolist(), got["probability"].tolist()) == ([0, 1], [0, 0], [1.0, 1.0])
    assert got["chosen_mask"].tolist() == [[True, True], [False, False]]
    assert got["mask"].tolist() == [[True, True], [True, False]]


def test_groups_of_equal_scores_give_no_pair_and_of_equal_answers_the_first_counts() -> None:
    got = paired(advantages(online("online_dpo"), rollout((2.0, 2.0, 1.0, 4.0))))
    assert got["score"].tolist() == [4.0, 1.0]
    assert got["element"].tolist() == [0, 0]
    three = paired(advantages(online("online_dpo"), rollout((2.0, 5.0, 2.0, 5.0), group=torch.tensor([0, 0, 0, 0]))))
    assert [row.response for row in three.rows] == [2, 3]  # the first 5 and the first 2
    none = paired(advantages(online("online_dpo"), rollout((2.0, 2.0, 1.0, 1.0))))
    assert (none.rows, none.elements()) == ((), [])


def test_a_pair_can_have_the_judges_probability() -> None:
    method = online("online_dpo", pairs={"name": "bradley_terry", "temperature": 2.0})
    got = paired(advantages(method, rollout((1.0, 3.0, 2.0, 2.0))), method.pairs)
    # of scores 3 and 1: 1 / (1 + e^-1); a tie is even, with the first answer as the better one
    assert got["probability"].tolist() == pytest.approx([1 / (1 + math.exp(-1))] * 2 + [0.5] * 2)
    assert got["score"].tolist() == [3.0, 1.0, 2.0, 2.0]
    assert [row.response for row in got.rows] == [2, 3, 1, 3] == [LENGTHS[i] for i in (1, 0, 2, 3)]
    assert (got["index"].tolist(), got["element"].tolist()) == ([0, 1, 0, 1], [0, 0, 1, 1])
    alone = paired(advantages(method, rollout((1.0, 3.0, 2.0, 2.0), group=torch.tensor([0, 1, 2, 3]))), method.pairs)
    assert alone.rows == ()


def test_the_judges_probability_weighs_the_loss_of_a_pair() -> None:
    method = online("online_dpo", pairs="bradley_terry", beta=0.5)
    batch = paired(advantages(method, rollout((1.0, 3.0, 0.5, 2.0))), method.pairs)
    generator = torch.Generator().manual_seed(0)
    logp = -torch.rand(batch["mask"].shape, dtype=torch.float64, generator=generator)
    ref = -torch.rand(batch["mask"].shape, dtype=torch.float64, generator=generator)
    columns = {**batch.columns, "full_logp": logp, "ref_logp": ref}
    reward = [0.5 * float((logp - ref)[i][batch["mask"][i]].sum()) for i in range(4)]
    expected = 0.0
    for (won, lost), (high, low) in (((0, 1), (3.0, 1.0)), ((2, 3), (2.0, 0.5))):
        p, gap = 1 / (1 + math.exp(low - high)), reward[won] - reward[lost]
        expected += (p * math.log1p(math.exp(-gap)) + (1 - p) * math.log1p(math.exp(gap))) / 2
    assert float(method.terms[0].share(columns, batch.counts())) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", ["hinge", "ipo", "discopop", [{"name": "sigmoid"}, {"name": "hinge"}]])
def test_a_loss_that_reads_no_probability_is_refused_with_soft_labels(loss: object) -> None:
    with pytest.raises(
        RecipeError, match="does not read the probability of a label; use the loss sigmoid, or pairs hard"
    ):
        online("online_dpo", loss=loss, pairs="bradley_terry")
    assert online("online_dpo", loss=loss).pairs is not None


def test_a_pair_of_a_cut_off_answer_is_penalized() -> None:
    method = online("online_dpo", truncated=Truncated("penalize", 3.0))
    got = paired(advantages(method, rollout((1.0, 3.0, 0.5, 2.0))))
    assert got["score"].tolist() == [1.0, 0.0, 0.5, -1.0]
    assert got["element"].tolist() == [0, 0, 1, 1]


def test_online_dpo_is_scored_but_not_credited() -> None:
    method = online("online_dpo", weights=(2.0,), reward_clip={"name": "clip_score", "bound": 5.0})
    got = advantages(method.at(method.init()), rollout())
    assert got["score"].tolist() == [2.0, -4.0, 5.0, 1.0]
    assert not {"advantage", "token_reward", "kl"} & got.columns.keys()
    assert (method.advantage, method.reward_placement, method.penalty) == (None, None, None)


# --- state -----------------------------------------------------------------------------------------------------------


def measured(
    kl: float = 0.0, kl_old: float = 0.0, sequences: float = 64, entropy: float = 1.0, reward: float = 0.0
) -> dict[str, float]:
    return {"kl": kl, "kl_old": kl_old, "sequences": sequences, "entropy": entropy, "reward": reward}


def test_a_fixed_coefficient_stays() -> None:
    method = make("ppo", kl_in_reward=KL(coef=0.3))
    state = method.next(method.init(), measured(kl=100.0))
    assert state == method.init() == {"penalty": 0.3}
    assert method.at(state).penalty.coef == 0.3
    assert not method.steered()


@pytest.mark.parametrize(("kl", "error"), [(6.0, 0.2), (3.0, -0.2), (5.5, 0.1), (5.0, 0.0)])
def test_the_adaptive_coefficient_by_hand(kl: float, error: float) -> None:
    method = make("ppo", kl_in_reward=KL(coef=0.3, controller="adaptive", target=5.0, horizon=1000))
    state = method.next(method.next(method.init(), measured(kl=kl)), measured(kl=kl))
    assert state["penalty"] == pytest.approx(0.3 * (1 + error * 64 / 1000) ** 2)
    assert method.at(state).penalty.coef == state["penalty"]
    assert advantages(method.at({"penalty": 2.0}), rollout())["token_reward"][2, 0] == 8.0 - 2.0 * K1[2][0]
    assert not method.steered()


@pytest.mark.parametrize(("kl", "factor"), [(1.9, 0.5), (2.1, 1.0), (4.4, 1.0), (4.6, 2.0)])
def test_the_penalty_is_halved_or_doubled_by_the_kl_to_the_reference(kl: float, factor: float) -> None:
    method = make("reinforce", kl_in_reward=KL(coef=0.3, controller="halving", target=3.0))
    assert method.next(method.init(), measured(kl=kl, kl_old=99.0))["penalty"] == 0.3 * factor
    assert not method.steered()  # nobody has to measure how far the updates moved


@pytest.mark.parametrize(("kl_old", "factor"), [(0.0066, 0.5), (0.0067, 1.0), (0.0149, 1.0), (0.0151, 2.0)])
def test_ppo_kl_halves_or_doubles_beta_by_the_kl_of_the_last_epoch(kl_old: float, factor: float) -> None:
    method = make("ppo_kl", surrogate={"beta": 1.5, "target": 0.01})
    assert method.init() == {"penalty": 0.05, "term0.beta": 1.5}
    assert make("ppo_kl").init() == {"penalty": 0.05, "term0.beta": 1.0}
    state = method.next(method.init(), measured(kl=99.0, kl_old=kl_old))
    assert state == {"penalty": 0.05, "term0.beta": 1.5 * factor}
    assert method.at(state).terms[0].loss.options["beta"] == 1.5 * factor
    assert method.steered()


def test_an_entropy_bonus_is_one_term_more_and_may_be_steered() -> None:
    base = make("grpo")
    fixed = make("grpo", entropy={"ent_coef": 0.25})
    assert replace(fixed, terms=fixed.terms[:-1]) == base
    bonus = fixed.terms[-1]
    assert (bonus.role, bonus.name, bonus.weight, bonus.reduction) == ("policy", "entropy", 0.25, ops.token_mean)
    assert bonus.reads() == {"full_entropy", "mask"}
    assert fixed.init() == {}
    moving = make("grpo", entropy={"ent_coef": 0.25, "target": 0.5, "increment": 0.125, "max_coef": 0.3125})
    name = f"term{len(base.terms)}.weight"
    assert moving.init() == {name: 0.25}
    assert moving.next(moving.init(), measured(entropy=0.75)) == {name: 0.125}
    assert moving.next(moving.init(), measured(entropy=0.5)) == {name: 0.3125}
    assert moving.at({name: 0.125}).terms[-1].weight == 0.125


def test_a_running_mean_of_implicit_rewards_is_kept_by_online_dpo_too() -> None:
    method = online("online_dpo", loss="bco_pair")
    assert method.init() == {"term0.delta": 0.0}
    assert method.next(method.init(), measured(reward=2.0)) == {"term0.delta": pytest.approx(0.2)}


def deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


def test_scores_are_standardized_by_the_first_rollouts_mean_and_the_running_deviation() -> None:
    method = make("reinforce", kl_in_reward=None, reward_normalization="running")
    state = method.init()
    assert method.at(state).reward_normalization.options == {"shift": 0.0, "scale": 1.0}  # nothing was seen yet
    seen: list[float] = []
    first = sum(SCORES) / 4
    for scores in (SCORES, (10.0, 20.0, 15.0, 11.0), (-5.0, 0.0, 0.25, 1e3)):
        seen += scores
        state = method.observe(state, rollout(scores))
        assert state == json.loads(json.dumps(state))
        got = advantages(method.at(state), rollout(scores))
        expected = [(s - first) / deviation(seen) for s in scores]
        assert got["score"].tolist() == pytest.approx(expected, rel=1e-10)
        assert not torch.equal(got["rewards"], got["score"][:, None])  # what a reward said is kept as it is
        state = method.next(state, measured())
    assert state["running.count"] == 12
    assert state["running.shift"] == pytest.approx(first)


def test_a_running_deviation_that_is_nothing_divides_by_one() -> None:
    method = make("reinforce", reward_normalization="running")
    for rows in ([0, 1, 2, 3], [0]):
        state = method.observe(method.init(), rollout((3.0, 3.0, 3.0, 3.0)).take(rows))
        assert method.at(state).reward_normalization.options == {"shift": 3.0, "scale": 1.0}


def test_without_running_normalization_nothing_is_kept() -> None:
    method = make("reinforce")
    assert method.observe(method.init(), rollout()) == method.init() == {"penalty": 0.05}


@pytest.mark.parametrize("name", TABLE)
def test_at_gives_plain_numbers_only(name: str) -> None:
    method = make(name)
    assert method.init() == json.loads(json.dumps(method.init()))
    plain = method.at(method.init())
    assert plain.penalty is None or isinstance(plain.penalty.coef, float)
    for term in plain.terms:
        assert isinstance(term.weight, (int, float))
        assert not any(hasattr(option, "next") for one in term.loss.walk() for option in one.options.values())
    assert method.next(method.init(), measured()).keys() == method.init().keys()


# --- losses and what is watched --------------------------------------------------------------------------------------

NOW = [[-0.8, -2.4, -0.5], [-0.5, -1.0], [-2.5], [-1.0, -1.3, -0.9]]
NOW_FULL = [[-0.9, -2.4, -0.75], [-0.5, -1.25], [-2.75], [-1.0, -1.5, -1.0]]


def now() -> dict[str, Tensor]:
    """logp, full_logp and value that have moved since, as leaves in float64."""
    return {
        "logp": padded(NOW).requires_grad_(),
        "full_logp": padded(NOW_FULL).requires_grad_(),
        "value": padded([[0.6, 0.75, -1.0], [1.0, 0.0], [2.5], [0.1, 0.5, 0.0]]).requires_grad_(),
    }


def clipped(ratio: float, a: float, low: float, high: float) -> float:
    return -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)


def chosen_by_kl_cov(advantage: Tensor) -> tuple[int, int]:
    """The one place with the largest covariance of log-prob and advantage: two in a thousand of nine tokens is one."""
    places = [(r, t) for r, n in enumerate(LENGTHS) for t in range(n)]
    mean_logp = sum(NOW[r][t] for r, t in places) / 9
    mean_a = sum(float(advantage[r, t]) for r, t in places) / 9
    return max(places, key=lambda at: (NOW[at[0]][at[1]] - mean_logp) * (float(advantage[at]) - mean_a))


def policy_loss_by_hand(name: str, row: int, advantage: Tensor) -> list[float]:
    """The loss of each token of an answer, its KL included."""
    out, n = [], LENGTHS[row]
    whole = math.exp(sum(NOW[row][t] - OLD[row][t] for t in range(n)) / n)
    for t in range(n):
        x, y, a = NOW[row][t], OLD[row][t], float(advantage[row, t])
        ratio = math.exp(x - y)
        match name:
            case "policy_gradient" | "reinforce" | "rloo" | "remax" | "optimal_baseline":
                out.append(-a * x)
            case "unclipped" | "dppo":
                out.append(-ratio * a)
            case "kl_cov":
                out.append(-ratio * a + (abs(x - y) if (row, t) == chosen_by_kl_cov(advantage) else 0.0))
            case "ppo_kl":
                out.append(-ratio * a + 1.0 * (ratio - 1 - (x - y)))
            case "gspo":
                out.append(clipped(whole, a, 3e-4, 4e-4))
            case "cispo":
                out.append(-min(ratio, 1.28) * a * x)
            case "sapo":
                tau = 1.0 if a > 0 else 1.05
                out.append(-4 / tau / (1 + math.exp(-tau * (ratio - 1))) * a)
            case "gmpo":
                steps = [NOW[row][s] - OLD[row][s] for s in range(n)]
                own = [min(d, 0.4) if a > 0 else max(d, -0.4) for d in steps]
                out.append(-a * math.exp(sum(own) / n))
            case "clip_cov":
                out.append(clipped(ratio, a, 1.0, 1.0))
            case "dapo" | "vapo":
                out.append(clipped(ratio, a, 0.2, 0.28))
            case _:
                out.append(clipped(ratio, a, 0.2, 0.2))
        log_ratio = REF[row][t] - NOW_FULL[row][t]
        if name in ("grpo", "grpo_process"):
            out[-1] += 0.04 * (math.exp(log_ratio) - 1 - log_ratio)
        if name == "reinforce_pp_baseline":
            out[-1] += 0.001 * log_ratio**2 / 2
    return out


@pytest.mark.parametrize("name", TABLE)
def test_the_policys_loss_is_that_of_plain_python(name: str) -> None:
    method = make(name)
    method = method.at(method.init())
    batch, current = advantages(method, rollout(scores_for(name))), now()
    batch = selected(method, batch, padded(NOW))
    counts = batch.counts()
    terms = [term for term in method.terms if term.role == "policy" and term.stream == "rollout"]
    got = sum(float(term.share({**batch.columns, **current}, counts).detach()) for term in terms)
    each = [policy_loss_by_hand(name, row, batch["advantage"]) for row in range(4)]
    expected = {
        "token_mean": sum(map(sum, each)) / 9,
        "sequence_mean": sum(sum(x) / len(x) for x in each) / 4,
        "sequence_sum": sum(map(sum, each)) / 4,
        "fixed_length": sum(map(sum, each)) / (4 * LONGEST),
    }[TABLE[name][3]]
    assert abs(got) > 1e-3
    assert got == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", TABLE)
def test_nan_behind_an_answer_reaches_no_loss_and_no_gradient(name: str) -> None:
    method = make(name)
    method = method.at(method.init())
    batch = selected(method, advantages(method, rollout(scores_for(name))), padded(NOW))
    values, gradients = [], []
    for junk in (0.0, math.nan):
        current = {"logp": padded(NOW).requires_grad_(), "full_logp": padded(NOW_FULL).requires_grad_()}
        current["value"] = padded(VALUE).requires_grad_()
        shown = {key: torch.where(batch["mask"], leaf, junk) for key, leaf in current.items()}
        terms = [term for term in method.terms if term.stream == "rollout"]
        total = sum(term.share({**batch.columns, **shown}, batch.counts()) for term in terms)
        values.append(float(total.detach()))
        gradients.append(torch.autograd.grad(total, current["logp"])[0])
    assert values[0] == values[1]
    assert torch.equal(*gradients)
    assert gradients[0].any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("k2", lambda rho, u: u * u / 2),
        ("k3", lambda rho, u: math.exp(-u) - 1 + u),
        ("k3_weighted", lambda rho, u: rho * (math.exp(-u) - 1 + u)),
    ],
)
def test_the_kl_in_the_loss_is_of_the_whole_vocabulary_whatever_could_be_drawn(name: str, expected: Any) -> None:
    method = make("grpo", kl_in_loss={"name": name, "coef": 0.5})
    batch = credit(method)
    got = float(method.terms[1].share({**batch.columns, **now()}, batch.counts()).detach())
    each = [
        [
            expected(math.exp(NOW_FULL[r][t] - FULL[r][t]), NOW_FULL[r][t] - REF[r][t])
            for t in range(n)
        ]
        for r, n in enumerate(LENGTHS)
    ]  # fmt: skip
    assert got == pytest.approx(0.5 * sum(sum(x) / len(x) for x in each) / 4, rel=1e-10)


def test_the_sequence_form_of_k2_and_the_exact_kl_in_the_loss() -> None:
    method = make("rloo", kl_in_reward=None, kl_in_loss={"name": "k2_sequence", "coef": 0.5})
    batch = credit(method)
    got = float(method.terms[1].share({**batch.columns, **now()}, batch.counts()).detach())
    squares = [sum(NOW_FULL[r][t] - REF[r][t] for t in range(n)) ** 2 / 2 for r, n in enumerate(LENGTHS)]
    assert got == pytest.approx(0.5 * sum(squares) / 4, rel=1e-10)
    method = make("grpo", kl_in_loss={"name": "exact", "coef": 0.5})
    got = float(method.terms[1].share({**batch.columns, "exact_kl": padded(EXACT, math.nan)}, batch.counts()))
    assert got == pytest.approx(0.5 * sum(sum(x) / len(x) for x in EXACT) / 4, rel=1e-10)


@pytest.mark.parametrize(("clip", "weight"), [(0.2, 1.0), (None, 0.5)])
def test_the_critics_loss_is_that_of_plain_python(clip: float | None, weight: float) -> None:
    method = make("ppo", value={"clip_range_vf": clip, "vf_coef": weight})
    method = method.at(method.init())
    batch, current = advantages(method, rollout()), now()
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
        method = make(name)
        method = method.at(method.init())
        batch = advantages(method, rollout())
        logp = batch["old_logp"].clone().requires_grad_()
        method.terms[0].share({**batch.columns, "logp": logp}, batch.counts()).backward()
        gradients.append(logp.grad)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-12, atol=1e-14)


def test_what_is_watched_of_a_mini_batch_by_hand() -> None:
    method = make("ppo")
    batch = advantages(method.at(method.init()), rollout())
    batch = batch.with_columns(**{name: value.detach() for name, value in now().items()})
    ratios = [
        math.exp(float(batch["logp"][i, t] - batch["old_logp"][i, t])) for i, n in enumerate(LENGTHS) for t in range(n)
    ]
    got = diagnostics(batch, clipping(make("ppo")))
    assert got["ratio_mean"] == pytest.approx(sum(ratios) / 9)
    assert got["kl_old"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 9)
    signs = [float(batch["advantage"][i, t]) for i, n in enumerate(LENGTHS) for t in range(n)]
    stopped = [(r > 1.2 and a > 0) or (r < 0.8 and a < 0) for r, a in zip(ratios, signs, strict=True)]
    outside = [not 0.8 <= r <= 1.2 for r in ratios]
    assert 0 < sum(stopped) < sum(outside)
    assert got["clip_fraction"] == pytest.approx(sum(stopped) / 9)
    assert got["ratio_outside"] == pytest.approx(sum(outside) / 9)
    assert "dual_clip_fraction" not in got
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


def test_the_clip_fraction_is_of_the_ratio_that_is_clipped() -> None:
    batch = rollout(logp=padded([[o + d for o, d in zip(row, (0.5, -0.5, 0.0), strict=False)] for row in OLD]))
    batch = batch.with_columns(advantage=torch.ones_like(batch["logp"]))
    assert diagnostics(batch, clipping(make("grpo")))["ratio_outside"] > 0.5  # tokens leave 1 by half a nat
    whole = diagnostics(batch, clipping(make("gspo")))
    assert whole["ratio_outside"] == pytest.approx(1 / 9)  # the means are 0, 0, 1/2 (one token) and 0
    assert whole["clip_fraction"] == pytest.approx(1 / 9)


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("surrogate", ["clip", "dual_clip"])
def test_the_clip_fraction_is_the_share_of_tokens_without_gradient(surrogate: str, sign: float) -> None:
    """Counted by the gradient itself, for ratios on all sides of the bounds 0.8, 1.2 and 3."""
    method = make("grpo", surrogate={"name": surrogate}, kl_in_loss=None)
    shifts = ((-0.5, 0.1, 0.5), (1.5, -1.5, 0.0), (0.3, -0.3, 1.2))
    logp = padded(
        [
            [o + d for o, d in zip(row, shift, strict=False)]
            for row, shift in zip(OLD, [*shifts, shifts[0]], strict=True)
        ]
    )
    batch = rollout(logp=logp)
    batch = batch.with_columns(advantage=torch.full_like(batch["logp"], sign))
    leaf = batch["logp"].clone().requires_grad_()
    method.terms[0].share({**batch.columns, "logp": leaf}, batch.counts()).backward()
    ratio, mask = (batch["logp"] - batch["old_logp"]).exp(), batch["mask"]
    still = int(((leaf.grad == 0) & mask).sum()) if sign else 0
    got = diagnostics(batch, clipping(method))
    capped = int(((ratio > 3) & mask).sum()) if sign < 0 and surrogate == "dual_clip" else 0
    assert got["clip_fraction"] + got.get("dual_clip_fraction", 0.0) == pytest.approx(still / 9)
    assert got.get("dual_clip_fraction", 0.0) == pytest.approx(capped / 9)
    assert (still > 0) == (sign != 0)
