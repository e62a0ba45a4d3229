"""Slots that contradict each other are refused before any work, with the field and the fix."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from whet.errors import RecipeError
from whet.methods import catalogue, online, preference, reward
from whet.methods.choices import ONLINE_SLOTS, PAIR_LOSSES, REWARD_SLOTS, SCORES, SINGLE_LOSSES
from whet.methods.compose import choice_options
from whet.methods.options import KL, Entropy, Truncated, Value

ONLINE: list[tuple[str, dict[str, Any], str, str]] = [
    # method, changes, field, what the message says
    # a surrogate and its ratio
    ("ppo", {"ratio": None}, "algorithm.ratio", "the surrogate clip needs one; set ratio"),
    ("ppo", {"surrogate": "reinforce"}, "algorithm.ratio", "the surrogate reinforce has none; set ratio to null"),
    ("ppo", {"surrogate": "kl_penalized"}, "algorithm.ratio", "has none; set ratio to null"),
    ("grpo", {"surrogate": "gmpo"}, "algorithm.ratio", "has none; set ratio to null"),
    ("reinforce", {"surrogate": "dppo"}, "algorithm.ratio", "the surrogate dppo needs one"),
    # a credit and its critic
    ("ppo", {"value": None}, "algorithm.value", "the advantage gae needs a critic; set value"),
    ("grpo", {"advantage": "gae_adaptive"}, "algorithm.value", "the advantage gae_adaptive needs a critic; set value"),
    (
        "ppo",
        {"advantage": "monte_carlo"},
        "algorithm.value",
        "the advantage monte_carlo has no critic; set value to null",
    ),
    ("grpo", {"value": Value()}, "algorithm.value", "the advantage group_zscore has no critic; set value to null"),
    # cut-off answers
    (
        "reinforce",
        {"truncated": Truncated("bootstrap")},
        "algorithm.truncated.rule",
        "needs a critic.* use keep, mask or penalize",
    ),
    ("grpo", {"truncated": {"rule": "bootstrap"}}, "algorithm.truncated.rule", "needs a critic"),
    (
        "ppo",
        {"truncated": Truncated("keep", 2.0)},
        "algorithm.truncated.amount",
        "only the rule penalize .* got 2.0 with keep",
    ),
    ("ppo", {"truncated": {"amount": 0.5}}, "algorithm.truncated.amount", "got 0.5 with keep"),
    ("ppo", {"truncated": Truncated("mask", 0.0)}, "algorithm.truncated.amount", "got 0.0 with mask"),
    # whole answers
    (
        "grpo",
        {"reward_placement": "uniform"},
        "algorithm.reward_placement",
        "group_zscore gives one value to the whole answer.* use terminal",
    ),
    (
        "rloo",
        {"reward_placement": "attention"},
        "algorithm.reward_placement",
        "leave_one_out gives one value to the whole answer",
    ),
    (
        "maxrl",
        {"reward_placement": {"name": "linear", "normalized": True}},
        "algorithm.reward_placement",
        "changes nothing; use terminal",
    ),
    # groups
    (
        "grpo",
        {"num_generations": 1},
        "algorithm.num_generations",
        "group_zscore compares the answers of a group.* at least 2; got 1",
    ),
    ("rloo", {"num_generations": 1}, "algorithm.num_generations", "leave_one_out compares"),
    ("optimal_baseline", {"num_generations": 1}, "algorithm.num_generations", "optimal_baseline compares"),
    ("grpo_process", {"num_generations": 1}, "algorithm.num_generations", "group_steps compares"),
    (
        "reinforce",
        {"dynamic_sampling": 2},
        "algorithm.num_generations",
        "normalize and dynamic_sampling compare the answers of a group.* got 1",
    ),
    ("reinforce", {"normalize": "group_normalized"}, "algorithm.num_generations", "at least 2; got 1"),
    (
        "online_dpo",
        {"num_generations": 1},
        "algorithm.num_generations",
        "a pair needs two answers.* at least 2; got 1",
    ),
    # the KL in the reward
    (
        "ppo",
        {"kl_in_reward": KL(target=3.0)},
        "algorithm.kl_in_reward.target",
        "the fixed controller has no target.* got 3.0",
    ),
    (
        "ppo",
        {"kl_in_reward": KL(controller="adaptive")},
        "algorithm.kl_in_reward.target",
        "the adaptive controller needs a target KL",
    ),
    (
        "ppo",
        {"kl_in_reward": {"controller": "halving"}},
        "algorithm.kl_in_reward.target",
        "the halving controller needs a target KL",
    ),
    (
        "ppo",
        {"kl_in_reward": KL(horizon=5)},
        "algorithm.kl_in_reward.horizon",
        "only the adaptive controller has a horizon; got 5, leave it out",
    ),
    (
        "ppo",
        {"kl_in_reward": KL(controller="halving", target=3.0, horizon=5)},
        "algorithm.kl_in_reward.horizon",
        "got 5",
    ),
    (
        "ppo",
        {"kl_in_reward": KL(estimator="exact")},
        "algorithm.kl_in_reward.estimator",
        "normalize_advantage rescales only the reward",
    ),
    (
        "gspo",
        {"kl_in_reward": KL(estimator="exact"), "reduction": "token_mean"},
        "algorithm.kl_in_reward.estimator",
        "group_zscore rescales",
    ),
    ("dr_grpo", {"kl_in_reward": KL(estimator="exact")}, "algorithm.kl_in_reward.estimator", "group_center rescales"),
    (
        "rloo",
        {"kl_in_reward": KL(estimator="exact"), "reduction": "sequence_mean"},
        "algorithm.kl_in_reward.estimator",
        "sequence_mean rescales",
    ),
    ("rloo", {"kl_in_reward": KL(where="sequence_sum")}, "algorithm.kl_in_reward.where", "use token"),
    ("grpo", {"reward_normalization": "running"}, "algorithm.reward_normalization", "changes nothing"),
    ("grpo", {"normalize": "group_normalized"}, "algorithm.normalize", "a single reward"),
    (
        "remax",
        {"reward_normalization": "batch"},
        "algorithm.reward_normalization",
        "the greedy answers of against_greedy are not among them",
    ),
    ("maxrl", {"kl_in_reward": KL()}, "algorithm.kl_in_reward", "use kl_in_loss"),
    ("ppo", {"kl_in_reward": {"coeff": 1}}, "algorithm, KL", "did you mean 'coef'?"),
    ("ppo", {"kl_in_reward": {"controller": "foo"}}, "algorithm, KL", "foo"),
    ("ppo", {"advantage": None}, "algorithm.advantage", "cannot be left out"),
    (
        "rloo",
        {"kl_in_reward": KL(estimator="exact", where="sequence")},
        "algorithm.kl_in_reward.where",
        "use token; got sequence",
    ),
    (
        "grpo_process",
        {"kl_in_reward": KL()},
        "algorithm.kl_in_reward",
        "group_steps reads rewards only at the ends of steps; use kl_in_loss",
    ),
    # the entropy's controller
    (
        "ppo",
        {"entropy": Entropy(increment=0.1)},
        "algorithm.entropy.target",
        "increment and max_coef steer towards a target; set one",
    ),
    ("ppo", {"entropy": {"max_coef": 0.5}}, "algorithm.entropy.target", "set one"),
    # selections
    (
        "cispo",
        {"select": "clip_cov"},
        "algorithm.select",
        "clip_cov needs a clipped surrogate; use clip or dual_clip",
    ),
    ("reinforce", {"select": "kl_cov"}, "algorithm.select", "kl_cov needs several updates per rollout"),
    ("remax", {"normalize": "group_normalized", "num_generations": 2}, "algorithm.normalize", "leave normalize out"),
    # lengths
    ("dapo", {"longest": 16}, "algorithm.overlong.buffer", "at most the limit of 16 tokens; got 32"),
    ("dapo", {"longest": None}, "algorithm.overlong.limit", "needs the answers' limit"),
    ("dr_grpo", {"longest": None}, "algorithm.reduction.length", "needs the answers' limit"),
    # pairs of own answers
    (
        "online_dpo",
        {"truncated": Truncated("mask")},
        "algorithm.truncated.rule",
        "mask does not work with pairs of answers; use keep or penalize",
    ),
    (
        "online_dpo",
        {"truncated": Truncated("bootstrap")},
        "algorithm.truncated.rule",
        "bootstrap does not work with pairs",
    ),
    *[("online_dpo", {"loss": name}, "algorithm.loss", "use a loss on pairs") for name in SINGLE_LOSSES],
]
PREFERENCE: list[tuple[str, dict[str, Any], str, str]] = [
    ("dpo", {"loss": ["sigmoid", "kto"]}, "algorithm.loss", "use one kind"),
    ("kto", {"loss": [{"name": "bco"}, {"name": "hinge", "weight": 0.5}]}, "algorithm.loss", "use one kind"),
    ("dpo", {"implicit_reward": "log_odds"}, "algorithm.beta", "log_odds has no beta (in orpo"),
    ("orpo", {"loss": "ipo"}, "algorithm.loss", "ipo is scaled by beta, and log_odds has no beta"),
    ("orpo", {"loss": "sppo_hard"}, "algorithm.loss", "sppo_hard is scaled by beta"),
    ("orpo", {"implicit_reward": "policy_score"}, "algorithm.beta", "implicit_reward needs one"),
    (
        "dpo",
        {"implicit_reward": {"alpha": 0.3}},
        "algorithm.implicit_reward.alpha",
        "only the alpha divergence has an alpha; got 0.3, leave it out",
    ),
    ("dpo", {"implicit_reward": {"divergence": "js", "alpha": 0.3}}, "algorithm.implicit_reward.alpha", "leave it out"),
    (
        "dpo",
        {"loss": "aot", "implicit_reward": {"mean": True}},
        "algorithm.implicit_reward.mean",
        "aot sorts sums of log-probs; leave it out",
    ),
    *[
        (
            "kto" if name in SINGLE_LOSSES else "dpo",
            {"loss": name, "implicit_reward": {"divergence": "js"}},
            "algorithm.implicit_reward",
            f"{name} reads",
        )
        for name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired", *SINGLE_LOSSES)
    ],
    (
        "cpo",
        {"loss": "apo_down"},
        "algorithm.implicit_reward",
        "needs implicit_reward with the reverse_kl divergence; got policy_score",
    ),
    ("orpo", {"loss": "nca_pair"}, "algorithm.implicit_reward", "got log_odds"),
]


def refused(make: Callable[..., Any], name: str, changes: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make(name, **changes)
    message = str(caught.value)
    assert message.startswith(field + ":"), message
    assert re.search(says.replace("(", r"\("), message), message


@pytest.mark.parametrize(("name", "changes", "field", "says"), ONLINE)
def test_an_online_method_that_contradicts_itself(name: str, changes: dict[str, Any], field: str, says: str) -> None:
    refused(online, name, {"longest": 40} | changes, field, says)


@pytest.mark.parametrize(("name", "changes", "field", "says"), PREFERENCE)
def test_a_preference_method_that_contradicts_itself(name: str, changes: dict, field: str, says: str) -> None:
    refused(preference, name, changes, field, says)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ppo", {"truncated": Truncated("keep", 1.0)}),  # the default amount is nobody's word
        ("ppo", {"kl_in_reward": KL(horizon=10_000)}),
        ("ppo", {"kl_in_reward": KL(controller="adaptive", target=3.0, horizon=5)}),
        ("ppo", {"entropy": Entropy(target=0.5, increment=0.1, max_coef=0.5)}),
        ("grpo", {"reward_placement": "linear"}),  # raw weights do change what an answer earns
        ("reinforce", {"reward_placement": "uniform"}),
        ("rloo", {"kl_in_reward": KL(estimator="exact")}),
        ("cispo", {"select": "kl_cov"}),
        ("grpo", {"surrogate": "dual_clip", "select": "clip_cov"}),
        ("reinforce", {"surrogate": "clip", "ratio": "token"}),
        ("ppo", {"advantage": "monte_carlo", "value": None}),
        ("dapo", {"longest": 32}),
        ("dapo", {"longest": None, "overlong": {"limit": 64}}),
        ("dr_grpo", {"longest": None, "reduction": {"length": 9}}),
        ("online_dpo", {"num_generations": 2, "truncated": Truncated("penalize", 2.0)}),
    ],
)
def test_what_lies_beside_a_contradiction_is_allowed(name: str, changes: dict[str, Any]) -> None:
    online(name, **{"longest": 40} | changes)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop"])
def test_losses_of_the_gap_take_every_divergence(loss: str) -> None:
    for divergence in ("reverse_kl", "forward_kl", "js", "alpha"):
        preference("dpo", loss=loss, implicit_reward={"divergence": divergence})
    preference("cpo", loss=loss)


# --- names and options that do not exist -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name", "near"), [(online, "grppo", "grpo"), (preference, "dppo", "dpo"), (reward, "kway", "k_way")]
)
def test_an_unknown_method_is_told_its_nearest_name(make: Callable[..., Any], name: str, near: str) -> None:
    refused(make, name, {}, "method", f"unknown '{name}'; did you mean '{near}'")


@pytest.mark.parametrize(
    ("make", "name", "slot"),
    [(online, "grpo", "nonsense"), (online, "ppo", "loss"), (online, "online_dpo", "advantage"),
     (preference, "kto", "sft_weight"),
     (preference, "orpo", "beta"), (reward, "k_way", "centering"), (reward, "absolute", "centering")],
)  # fmt: skip
def test_a_slot_that_the_method_does_not_have_is_refused(make: Callable[..., Any], name: str, slot: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown '{slot}'.* known are|unknown '{slot}'; did you mean"):
        make(name, **{slot: 1.0})


BESIDE: dict[str, dict[str, Any]] = {
    "gae": {"value": {"clip_range_vf": 0.2}}, "gae_adaptive": {"value": {"clip_range_vf": 0.2}}, "reinforce": {"ratio": None},
    "kl_penalized": {"ratio": None}, "gmpo": {"ratio": None},
}  # fmt: skip


@pytest.mark.parametrize("slot", ONLINE_SLOTS)
def test_an_unknown_part_and_an_unknown_dial_are_refused_in_every_slot(slot: str) -> None:
    base = "reinforce_pp" if slot == "reward_placement" else "grpo"
    refused(online, base, {slot: {"name": "nothing"}, "longest": 40}, f"algorithm.{slot}", "unknown 'nothing'")
    for name, choice in ONLINE_SLOTS[slot].items():
        changes = {"longest": 40, slot: {"name": name, "nodial": 1}} | BESIDE.get(name, {})
        refused(online, base, changes, f"algorithm.{slot}.nodial", f"{name} has no such option; known are")
        with pytest.raises(RecipeError, match=", ".join(choice_options(choice)) or "none"):
            online(base, **changes)


@pytest.mark.parametrize("name", PAIR_LOSSES | SINGLE_LOSSES)
def test_an_unknown_dial_of_a_preference_loss_is_refused(name: str) -> None:
    method = "kto" if name in SINGLE_LOSSES else "dpo"
    refused(preference, method, {"loss": {"name": name, "nodial": 1}}, "algorithm.loss.nodial", "has no such option")


@pytest.mark.parametrize("name", SCORES)
def test_an_unknown_dial_of_a_score_is_refused(name: str) -> None:
    method = "orpo" if name == "log_odds" else "dpo"
    refused(
        preference,
        method,
        {"implicit_reward": {"name": name, "nodial": 1}},
        "algorithm.implicit_reward.nodial",
        "has no such option",
    )


@pytest.mark.parametrize("name", REWARD_SLOTS["loss"])
def test_an_unknown_dial_of_a_reward_loss_is_refused(name: str) -> None:
    refused(reward, name, {"loss": {"nodial": 1}}, "algorithm.loss.nodial", "has no such option")


@pytest.mark.parametrize("hidden", ["beta", "delta", "scale", "shift", "weights"])
def test_what_a_method_sets_itself_is_no_dial(hidden: str) -> None:
    for known in (*ONLINE_SLOTS.values(), SCORES, PAIR_LOSSES, SINGLE_LOSSES, REWARD_SLOTS["loss"]):
        for name, choice in known.items():
            assert hidden not in choice_options(choice) or (name, hidden) == ("kl_penalized", "beta"), (name, hidden)


def test_every_method_of_the_catalogue_composes_as_it_stands() -> None:
    for name in (*catalogue.ONLINE, *catalogue.ONLINE_PREFERENCE):
        assert online(name, longest=40).terms
    for name in catalogue.PREFERENCE:
        assert preference(name).terms
    for name in catalogue.REWARD:
        assert reward(name).terms
