"""Slots that contradict each other are refused before any work, with the field and the fix."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from whet.errors import RecipeError
from whet.methods import catalogue, online, preference, reward
from whet.methods.choices import ONLINE_SLOTS, PAIR_LOSSES, REWARD_SLOTS, SCORES, SINGLE_LOSSES
from whet.methods.compose import dials_of
from whet.methods.options import KL, Entropy, Truncated, Value

ONLINE: list[tuple[str, dict[str, Any], str, str]] = [
    # method, changes, field, what the message says
    # a surrogate and its ratio
    ("ppo", {"ratio": None}, "method.ratio", "the surrogate clip needs one; set ratio"),
    ("ppo", {"surrogate": "reinforce"}, "method.ratio", "the surrogate reinforce has none; set ratio to null"),
    ("ppo", {"surrogate": "kl_penalised"}, "method.ratio", "has none; set ratio to null"),
    ("grpo", {"surrogate": "gmpo"}, "method.ratio", "has none; set ratio to null"),
    ("reinforce", {"surrogate": "dppo"}, "method.ratio", "the surrogate dppo needs one"),
    # a credit and its critic
    ("ppo", {"value": None}, "method.value", "the credit gae needs a critic; set value"),
    ("grpo", {"credit": "gae_adaptive"}, "method.value", "the credit gae_adaptive needs a critic; set value"),
    ("ppo", {"credit": "monte_carlo"}, "method.value", "the credit monte_carlo has no critic; set value to null"),
    ("grpo", {"value": Value()}, "method.value", "the credit group_zscore has no critic; set value to null"),
    # cut-off answers
    (
        "reinforce",
        {"truncated": Truncated("bootstrap")},
        "method.truncated.rule",
        "needs a critic.* use keep, mask or penalise",
    ),
    ("grpo", {"truncated": {"rule": "bootstrap"}}, "method.truncated.rule", "needs a critic"),
    (
        "ppo",
        {"truncated": Truncated("keep", 2.0)},
        "method.truncated.amount",
        "only the rule penalise .* got 2.0 with keep",
    ),
    ("ppo", {"truncated": {"amount": 0.5}}, "method.truncated.amount", "got 0.5 with keep"),
    ("ppo", {"truncated": Truncated("mask", 0.0)}, "method.truncated.amount", "got 0.0 with mask"),
    # whole answers
    ("grpo", {"place": "uniform"}, "method.place", "group_zscore credits whole answers.* use terminal"),
    ("rloo", {"place": "attention"}, "method.place", "leave_one_out credits whole answers"),
    ("maxrl", {"place": {"name": "linear", "normalised": True}}, "method.place", "changes nothing; use terminal"),
    # groups
    ("grpo", {"answers": 1}, "method.answers", "group_zscore compares the answers of a group.* at least 2; got 1"),
    ("rloo", {"answers": 1}, "method.answers", "leave_one_out compares"),
    ("optimal_baseline", {"answers": 1}, "method.answers", "optimal_baseline compares"),
    ("grpo_process", {"answers": 1}, "method.answers", "group_steps compares"),
    ("reinforce", {"refill": 2}, "method.answers", "normalise and refill compare the answers of a group.* got 1"),
    ("reinforce", {"normalise": "group_normalised"}, "method.answers", "at least 2; got 1"),
    ("online_dpo", {"answers": 1}, "method.answers", "a pair is made of two answers.* at least 2; got 1"),
    # the KL in the reward
    ("ppo", {"kl": KL(target=3.0)}, "method.kl.target", "the fixed controller aims at nothing.* got 3.0"),
    ("ppo", {"kl": KL(controller="adaptive")}, "method.kl.target", "the adaptive controller needs the KL to aim at"),
    ("ppo", {"kl": {"controller": "halving"}}, "method.kl.target", "the halving controller needs the KL to aim at"),
    ("ppo", {"kl": KL(horizon=5)}, "method.kl.horizon", "only the adaptive controller has one; got 5, leave it out"),
    ("ppo", {"kl": KL(controller="halving", target=3.0, horizon=5)}, "method.kl.horizon", "got 5"),
    ("ppo", {"kl": KL(estimator="exact")}, "method.kl.estimator", "whiten rescales the first alone"),
    ("gspo", {"kl": KL(estimator="exact"), "reduce": "token_mean"}, "method.kl.estimator", "group_zscore rescales"),
    ("dr_grpo", {"kl": KL(estimator="exact")}, "method.kl.estimator", "group_center rescales"),
    ("rloo", {"kl": KL(estimator="exact"), "reduce": "sequence_mean"}, "method.kl.estimator", "sequence_mean rescales"),
    ("rloo", {"kl": KL(where="sequence_sum")}, "method.kl.where", "use token"),
    ("grpo", {"rescale": "running"}, "method.rescale", "changes nothing"),
    ("grpo", {"normalise": "group_normalised"}, "method.normalise", "a single reward"),
    ("remax", {"rescale": "batch"}, "method.rescale", "none of its group"),
    ("maxrl", {"kl": KL()}, "method.kl", "use loss_kl"),
    ("ppo", {"kl": {"coeff": 1}}, "method, KL", "did you mean 'coef'?"),
    ("ppo", {"kl": {"controller": "foo"}}, "method, KL", "foo"),
    ("ppo", {"credit": None}, "method.credit", "cannot be left out"),
    ("rloo", {"kl": KL(estimator="exact", where="sequence")}, "method.kl.where", "use token; got sequence"),
    ("grpo_process", {"kl": KL()}, "method.kl", "group_steps reads rewards at the ends of steps alone; use loss_kl"),
    # the entropy's controller
    ("ppo", {"entropy": Entropy(step=0.1)}, "method.entropy.target", "step and most steer towards a target; set one"),
    ("ppo", {"entropy": {"most": 0.5}}, "method.entropy.target", "set one"),
    # selections
    (
        "cispo",
        {"select": "clip_cov"},
        "method.select",
        "clip_cov leaves out what the clip stops; use the surrogate clip",
    ),
    ("reinforce", {"select": "kl_cov"}, "method.select", "kl_cov holds several updates together"),
    ("remax", {"normalise": "group_normalised", "answers": 2}, "method.normalise", "leave normalise out"),
    # lengths
    ("dapo", {"longest": 16}, "method.overlong.buffer", "within the limit of 16 tokens; got 32"),
    ("dapo", {"longest": None}, "method.overlong.limit", "needs the answers' limit"),
    ("dr_grpo", {"longest": None}, "method.reduce.length", "needs the answers' limit"),
    # pairs of own answers
    ("online_dpo", {"truncated": Truncated("mask")}, "method.truncated.rule", "cannot mask one; use keep or penalise"),
    ("online_dpo", {"truncated": Truncated("bootstrap")}, "method.truncated.rule", "cannot bootstrap one"),
    *[("online_dpo", {"loss": name}, "method.loss", "take a loss on pairs") for name in SINGLE_LOSSES],
]
PREFERENCE: list[tuple[str, dict[str, Any], str, str]] = [
    ("dpo", {"loss": ["sigmoid", "kto"]}, "method.loss", "do not mix them"),
    ("kto", {"loss": [{"name": "bco"}, {"name": "hinge", "weight": 0.5}]}, "method.loss", "do not mix them"),
    ("dpo", {"score": "log_odds"}, "method.beta", "log-odds carry none (use orpo"),
    ("orpo", {"loss": "ipo"}, "method.loss", "ipo is scaled by beta, and log-odds carry none"),
    ("orpo", {"loss": "sppo_hard"}, "method.loss", "sppo_hard is scaled by beta"),
    ("orpo", {"score": "policy_score"}, "method.beta", "every other score needs one"),
    (
        "dpo",
        {"score": {"alpha": 0.3}},
        "method.score.alpha",
        "only the alpha divergence has one; got 0.3, leave it out",
    ),
    ("dpo", {"score": {"divergence": "js", "alpha": 0.3}}, "method.score.alpha", "leave it out"),
    ("dpo", {"loss": "aot", "score": {"mean": True}}, "method.score.mean", "aot sorts sums of log-probs; leave it out"),
    *[
        (
            "kto" if name in SINGLE_LOSSES else "dpo",
            {"loss": name, "score": {"divergence": "js"}},
            "method.score",
            f"{name} reads",
        )
        for name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired", *SINGLE_LOSSES)
    ],
    (
        "cpo",
        {"loss": "apo_down"},
        "method.score",
        "needs implicit_reward with the reverse_kl divergence; got policy_score",
    ),
    ("orpo", {"loss": "nca_pair"}, "method.score", "got log_odds"),
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
        ("ppo", {"kl": KL(horizon=10_000)}),
        ("ppo", {"kl": KL(controller="adaptive", target=3.0, horizon=5)}),
        ("ppo", {"entropy": Entropy(target=0.5, step=0.1, most=0.5)}),
        ("grpo", {"place": "linear"}),  # raw weights do change what an answer earns
        ("reinforce", {"place": "uniform"}),
        ("rloo", {"kl": KL(estimator="exact")}),
        ("cispo", {"select": "kl_cov"}),
        ("grpo", {"surrogate": "dual_clip", "select": "clip_cov"}),
        ("reinforce", {"surrogate": "clip", "ratio": "token"}),
        ("ppo", {"credit": "monte_carlo", "value": None}),
        ("dapo", {"longest": 32}),
        ("dapo", {"longest": None, "overlong": {"limit": 64}}),
        ("dr_grpo", {"longest": None, "reduce": {"length": 9}}),
        ("online_dpo", {"answers": 2, "truncated": Truncated("penalise", 2.0)}),
    ],
)
def test_what_lies_beside_a_contradiction_is_allowed(name: str, changes: dict[str, Any]) -> None:
    online(name, **{"longest": 40} | changes)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop"])
def test_losses_of_the_gap_take_every_divergence(loss: str) -> None:
    for divergence in ("reverse_kl", "forward_kl", "js", "alpha"):
        preference("dpo", loss=loss, score={"divergence": divergence})
    preference("cpo", loss=loss)


# --- names and dials that do not exist -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name", "near"), [(online, "grppo", "grpo"), (preference, "dppo", "dpo"), (reward, "kway", "k_way")]
)
def test_an_unknown_method_is_told_its_nearest_name(make: Callable[..., Any], name: str, near: str) -> None:
    refused(make, name, {}, "method", f"unknown '{name}'; did you mean '{near}'")


@pytest.mark.parametrize(
    ("make", "name", "slot"),
    [(online, "grpo", "nonsense"), (online, "ppo", "loss"), (online, "online_dpo", "credit"),
     (preference, "kto", "sft_weight"),
     (preference, "orpo", "beta"), (reward, "k_way", "centring"), (reward, "absolute", "centring")],
)  # fmt: skip
def test_a_slot_that_the_method_does_not_have_is_refused(make: Callable[..., Any], name: str, slot: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown '{slot}'.* known are|unknown '{slot}'; did you mean"):
        make(name, **{slot: 1.0})


BESIDE: dict[str, dict[str, Any]] = {
    "gae": {"value": {"clip": 0.2}}, "gae_adaptive": {"value": {"clip": 0.2}}, "reinforce": {"ratio": None},
    "kl_penalised": {"ratio": None}, "gmpo": {"ratio": None},
}  # fmt: skip


@pytest.mark.parametrize("slot", ONLINE_SLOTS)
def test_an_unknown_part_and_an_unknown_dial_are_refused_in_every_slot(slot: str) -> None:
    base = "reinforce_pp" if slot == "place" else "grpo"
    refused(online, base, {slot: {"name": "nothing"}, "longest": 40}, f"method.{slot}", "unknown 'nothing'")
    for name, choice in ONLINE_SLOTS[slot].items():
        changes = {"longest": 40, slot: {"name": name, "nodial": 1}} | BESIDE.get(name, {})
        refused(online, base, changes, f"method.{slot}.nodial", f"{name} has no such dial; known are")
        with pytest.raises(RecipeError, match=", ".join(dials_of(choice)) or "none"):
            online(base, **changes)


@pytest.mark.parametrize("name", PAIR_LOSSES | SINGLE_LOSSES)
def test_an_unknown_dial_of_a_preference_loss_is_refused(name: str) -> None:
    method = "kto" if name in SINGLE_LOSSES else "dpo"
    refused(preference, method, {"loss": {"name": name, "nodial": 1}}, "method.loss.nodial", "has no such dial")


@pytest.mark.parametrize("name", SCORES)
def test_an_unknown_dial_of_a_score_is_refused(name: str) -> None:
    method = "orpo" if name == "log_odds" else "dpo"
    refused(preference, method, {"score": {"name": name, "nodial": 1}}, "method.score.nodial", "has no such dial")


@pytest.mark.parametrize("name", REWARD_SLOTS["loss"])
def test_an_unknown_dial_of_a_reward_loss_is_refused(name: str) -> None:
    refused(reward, name, {"loss": {"nodial": 1}}, "method.loss.nodial", "has no such dial")


@pytest.mark.parametrize("hidden", ["beta", "delta", "scale", "shift", "weights"])
def test_what_a_method_sets_itself_is_no_dial(hidden: str) -> None:
    for known in (*ONLINE_SLOTS.values(), SCORES, PAIR_LOSSES, SINGLE_LOSSES, REWARD_SLOTS["loss"]):
        for name, choice in known.items():
            assert hidden not in dials_of(choice) or (name, hidden) == ("kl_penalised", "beta"), (name, hidden)


def test_every_method_of_the_catalogue_composes_as_it_stands() -> None:
    for name in (*catalogue.ONLINE, *catalogue.ONLINE_PREFERENCE):
        assert online(name, longest=40).terms
    for name in catalogue.PREFERENCE:
        assert preference(name).terms
    for name in catalogue.REWARD:
        assert reward(name).terms
