"""`whet explain`: the objective with its numbers, the arithmetic, and where it ends."""

from pathlib import Path

import pytest

import whet
from proof import cases as known
from proof.enumeration import Problem
from whet.cli.main import OFFLINE, ONLINE, main
from whet.methods import catalogue
from whet.methods.choices import changed
from whet.methods.explain import ending

PROBLEM = Problem()
CASES = known.cases(PROBLEM)


def lines(verb: str, *words: str, **fields: object) -> list[str]:
    return [line.strip() for line in whet.explain(verb, *words, **fields).splitlines()]


@pytest.mark.parametrize("verb", [*OFFLINE, *ONLINE])
def test_every_training_verb_is_explained_with_all_numbers_filled_in(verb: str) -> None:
    text = whet.explain(verb)
    assert text.startswith(verb)
    for title in ("objective, minimized:", "arithmetic:", "trained and frozen:", "trained tokens:"):
        assert f"\n{title}\n" in text
    assert "{" not in text
    assert ("where it ends:" in text) == (verb in ONLINE or verb in catalogue.PREFERENCE)


@pytest.mark.parametrize("name", catalogue.REWARD)
def test_every_reward_model_is_explained(name: str) -> None:
    assert lines("reward", **{"algorithm.name": name})[0].startswith(f"reward, {name}: ")


def test_the_numbers_are_the_recipes() -> None:
    told = lines(
        "grpo",
        **{"surrogate.clip_high": 0.3, "num_generations": 4, "kl_in_loss.coef": 0.01, "rollout.prompts_per_step": 6,
           "rollout.mini_batch_size": 8,
           "rollout.ppo_epochs": 2, "rollout.num_steps": 5, "sampling.max_new_tokens": 10},
    )  # fmt: skip
    assert any("-min(rho A, clip(rho, 1 - 0.2, 1 + 0.3) A)" in line for line in told)
    assert any(line.startswith("+ KL in the loss  0.01 (pi_ref / pi") for line in told)
    assert "6 prompts x 4 answers = 24 answers a rollout, at most 10 tokens each" in told
    assert "24 answers in mini-batches of 8 = 3 updates, x 2 epochs = 6 updates a rollout" in told
    assert "5 rollouts x 6 = 30 updates in all" in told
    assert any(line.startswith("at most 8 x 10 = 80 trained tokens an update") for line in told)
    assert "the deviation divides the reward but not the KL, so the effective beta differs from the coefficient" in told
    assert any(
        line.startswith("in this recipe: surrogate is clip (clip_high 0.3), the method's is clip") for line in told
    )


def test_pairs_are_counted_as_pairs() -> None:
    told = lines("online_dpo", **{"num_generations": 4, "rollout.prompts_per_step": 8, "sampling.max_new_tokens": 10})
    assert "8 prompts x 4 answers = 32 answers a rollout, at most 10 tokens each" in told
    assert "8 pairs in mini-batches of 8 = 1 updates, x 1 epochs = 1 updates a rollout" in told
    assert any(line.startswith("at most 16 x 10 = 160 trained tokens an update") for line in told)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (
            {"kl_in_reward.controller": "adaptive", "kl_in_reward.target": 3.0},
            "adaptive coefficient, target 3.0 nats per answer",
        ),
        (
            {"kl_in_reward.estimator": "exact", "normalize_advantage": None},
            "KL(policy || reference) of the token's own state",
        ),
        ({"reward_placement": "linear"}, "a longer answer earns more"),
        ({"truncated.rule": "mask"}, "answers cut off at the limit are masked"),
        ({"sampling.top_p": 0.9}, "some tokens cannot be sampled"),
        (
            {"rollout.sync_reference.every": 5, "rollout.sync_reference.mix": 0.6},
            "moves by 0.6 towards the policy every 5 rollouts",
        ),
        ({"entropy.ent_coef": 0.01, "entropy.target": 0.5}, "steered to 0.5 nats per token"),
        ({"model.lora.rank": 8}, "by adapters of rank 8"),
        ({"model.lora.rank": 8}, "policy (LoRA): adamw, learning rate 1e-05: linear to 0"),
        ({"model.lora.rank": 8}, "critic (LoRA): adamw, learning rate 5e-05: linear to 0"),
        ({"optim.schedule": "constant"}, "policy: adamw, learning rate 1e-06: constant"),
    ],
)
def test_what_a_recipe_sets_is_told(fields: dict, what: str) -> None:
    assert what in whet.explain("ppo", **fields)


@pytest.mark.parametrize("name", CASES)
def test_where_a_method_is_said_to_end_is_where_it_ends(name: str) -> None:
    """The words against the fixed points that `proof.cases` computes: pi* is promised exactly where it is reached."""
    case = CASES[name]
    methods = {**catalogue.ONLINE, **catalogue.ONLINE_PREFERENCE}
    slots = changed(methods[case.method].slots, {**case.changes, "num_generations": case.group})
    promised = ending(slots)[0].startswith("pi*")
    assert promised == (case.field == "regularized")


@pytest.mark.parametrize(
    ("verb", "fields", "why"),
    [
        ("instructgpt", {}, "moved: the pre-training term has another optimum"),
        ("ppo", {"entropy.ent_coef": 0.1}, "moved: the entropy bonus rewards distributions of high entropy"),
        ("reinforce", {"advantage.gamma": 0.5}, "moved: gamma below 1 discounts"),
        (
            "ppo",
            {"reward_normalization": "batch"},
            "moved: scores are divided by statistics of the policy's own answers",
        ),
        ("ppo", {"truncated.rule": "mask"}, "moved: answers cut off at the limit follow the rule mask"),
        ("ppo", {"sampling.top_p": 0.9}, "moved: some tokens cannot be sampled"),
        ("reinforce", {"reduction": "sequence_mean"}, "moved: each answer is divided by its length"),
        ("ppo", {"kl_in_reward.estimator": "k3"}, "moved: the k3 in the reward misses the gradient of the KL"),
        ("ppo", {"kl_in_reward.where": "sequence"}, "moved: the KL is divided by the answer's length"),
        ("ppo", {"kl_in_loss": "k2"}, "moved: there is another KL in the loss"),
    ],
)
def test_what_moves_the_end_is_said(verb: str, fields: dict, why: str) -> None:
    told = lines(verb, **fields)
    assert any(line.startswith(why) for line in told)
    assert not any(line.startswith("pi*") for line in told)


@pytest.mark.parametrize(
    ("verb", "fields", "end"),
    [
        ("online_dpo", {}, "no policy: a judge without noise always prefers the answer with the higher score"),
        ("online_dpo", {}, "to end at pi_ref exp(s / beta) / Z: --pairs bradley_terry"),
        ("online_dpo", {"pairs": "bradley_terry"}, "pi*(y|x) = pi_ref(y|x) exp(s / 0.1) / Z"),
        ("online_dpo", {"pairs": "bradley_terry", "pairs.temperature": 4.0}, "pi*(y|x) = pi_ref(y|x) exp(s / 0.4) / Z"),
        ("online_dpo", {"pairs": "bradley_terry", "sampling.top_p": 0.9}, "moved: some tokens cannot be sampled"),
        ("online_dpo", {"pairs": "bradley_terry", "sft_weight": 1.0}, "moved: the SFT loss has another optimum"),
        ("online_dpo", {"loss.label_smoothing": 0.1}, "the same gap w - l = log((1 - e) / e)"),
        ("online_dpo", {"loss": "ipo"}, "ipo: a gap of the log-ratios of 1 / (2 beta) for every pair"),
        ("online_dpo", {"loss": "discopop"}, "discopop: no policy"),
        ("kto", {}, "kto: no policy: an answer that is good more often than bad"),
        ("dpo", {}, "pi*(y|x) = pi_ref(y|x) exp(r / beta) / Z, for labels that give the probability"),
        ("dpo", {}, "pairs that are always labeled the same way (probability 1, the default of a row) have no such r"),
        ("simpo", {}, "moved: the implicit reward has no reference"),
        ("ipo", {}, "ipo: a gap of the log-ratios"),
    ],
)
def test_where_preference_methods_end_is_said(verb: str, fields: dict, end: str) -> None:
    assert any(line.startswith(end) for line in lines(verb, **fields))


def test_a_group_that_is_only_centered_scales_beta_by_its_size() -> None:
    told = lines("dr_grpo", **{"kl_in_loss": "k2", "num_generations": 4})
    assert "the group's mean includes the answer itself, so the effective beta is 4/3 of kl_in_loss.coef" in told


def test_a_recipe_may_name_its_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: rloo\nalgorithm: {num_generations: 6}\n")
    assert main(["explain", str(recipe), "--kl-in-reward.coef", "0.2"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("rloo: ")
    assert "x 6 answers" in told
    assert "r_t <- r_t - 0.2 (log pi_old - log pi_ref)" in told
    assert main(["explain", "grpo", str(recipe)]) == 2
    assert "is a recipe of rloo; got grpo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "which method?"),
        (["rloop"], "did you mean 'rloo'?"),
        (["sample"], "sample trains nothing"),
        (
            ["grpo", "--kl-in-reward.coeff", "1"],
            "unknown field 'algorithm.kl_in_reward.coeff'; did you mean 'algorithm.kl_in_reward.coef'?",
        ),
        (
            ["rloo", "--num-generations", "1"],
            "algorithm.num_generations: the advantage leave_one_out compares the answers of a group",
        ),
    ],
)
def test_what_cannot_be_explained_is_told(words: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *words]) == 2
    assert what in capsys.readouterr().err


def test_a_recipe_without_a_verb_is_told_how_to_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("seed: 3\n")
    assert main(["explain", str(recipe)]) == 2
    assert "it names no method; add a line such as `method: ppo`" in capsys.readouterr().err
