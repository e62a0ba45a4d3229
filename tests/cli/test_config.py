import math
import re
from pathlib import Path
from typing import Any

import pytest

from whet.cli.main import OFFLINE, ONLINE, _grouped, parsed
from whet.errors import RecipeError
from whet.methods import catalogue, compose
from whet.methods.choices import changed
from whet.methods.options import LoRA, Optim
from whet.runs import checks, config
from whet.runs import recipe as fields
from whet.runs import slots as method
from whet.runs.config import resolve
from whet.runs.recipe import DataSource, EvalRecipe, OfflineRecipe, OnlineRecipe, RankRecipe, RewardSource, SampleRecipe


def yaml(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


def line(kind: type, verb: str, *words: str) -> Any:
    """The recipe of a command line."""
    recipe, overrides, _ = parsed(words)
    return resolve(kind, verb, recipe, list(_grouped(overrides).items()))


def test_overrides_win_over_the_users_recipe_over_the_shipped_one_over_the_defaults(tmp_path: Path) -> None:
    mine = yaml(tmp_path, "train: {batch_size: 8, padding_free: false}\noptim: {lr: 2.0e-5, warmup_ratio: 0.25}\n")
    recipe = line(OfflineRecipe, "sft", mine, "--optim.lr", "0.5", "--train.batch-size", "4")
    assert (recipe.optim.lr, recipe.train.batch_size) == (0.5, 4)  # the override
    assert (recipe.optim.warmup_ratio, recipe.train.padding_free) == (0.25, False)  # the user's
    assert (recipe.train.num_epochs, recipe.optim.schedule) == (3.0, "cosine")  # the shipped
    assert (recipe.train.max_tokens_per_micro_batch, recipe.optim.betas, recipe.seed) == (
        None,
        (0.9, 0.95),
        0,
    )  # the defaults


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "1.0e-3", "0.001", ".001"])
def test_a_number_may_be_written_as_one_likes(written: str, tmp_path: Path) -> None:
    assert line(OfflineRecipe, "sft", "--lr", written).optim.lr == 0.001
    assert line(OfflineRecipe, "sft", yaml(tmp_path, f"optim: {{lr: {written}}}")).optim.lr == 0.001


@pytest.mark.parametrize(
    "words", [("--optim.lr=0.5",), ("--optim.lr", "0.5"), ("--lr", "0.5"), ("--lr", "1", "--lr", "0.5")]
)
def test_an_override_has_several_forms_and_the_last_one_counts(words: tuple[str, ...]) -> None:
    assert line(OfflineRecipe, "sft", *words).optim.lr == 0.5


def test_dashes_stand_for_underscores_and_a_flag_without_value_is_true() -> None:
    recipe = line(
        OnlineRecipe, "ppo", "--model.trust-remote-code", "--max-new-tokens", "7", "--model.chat-template", "plain"
    )
    assert (recipe.model.trust_remote_code, recipe.sampling.max_new_tokens) == (True, 7)
    assert recipe.model.chat_template == "plain"


BARE = [
    (OfflineRecipe, "sft", ("--model", "DIR"), lambda r: r.model.path, "DIR"),
    (OfflineRecipe, "sft", ("--data", "a.jsonl"), lambda r: r.data.train, "a.jsonl"),
    (OfflineRecipe, "sft", ("--data", "[{path: a.jsonl, weight: 2}, {path: b.jsonl}]"), lambda r: r.data.train,
     [DataSource("a.jsonl", 2.0), DataSource("b.jsonl", 1.0)]),
    (OfflineRecipe, "sft", ("--data.train", "[a.jsonl, b.jsonl]"), lambda r: r.data.train, [DataSource("a.jsonl"), DataSource("b.jsonl")]),
    (OfflineRecipe, "sft", ("--data", "[a.jsonl, b.jsonl]"), lambda r: r.data.train, [DataSource("a.jsonl"), DataSource("b.jsonl")]),
    (OnlineRecipe, "ppo", ("--critic", "DIR"), lambda r: r.critic.path, "DIR"),
    (OnlineRecipe, "instructgpt", ("--ptx", "a.jsonl"), lambda r: r.ptx.data, "a.jsonl"),
    (OnlineRecipe, "ppo", ("--reward", "f.py:f"), lambda r: r.reward, [RewardSource("f.py:f")]),
    (OnlineRecipe, "ppo", ("--reward", "f.py:f", "--reward", "DIR"), lambda r: r.reward, [RewardSource("f.py:f"), RewardSource("DIR")]),
    (OnlineRecipe, "ppo", ("--reward", "f.py:f", "--reward.timeout", "3", "--reward.weight", "2"), lambda r: r.reward,
     [RewardSource("f.py:f", 2.0, {"timeout": 3})]),
    (OnlineRecipe, "ppo", ("--reward.timeout", "3", "--reward", "{source: f.py:f, name: a, b: 1}"), lambda r: r.reward,
     [RewardSource("f.py:f", 1.0, {"b": 1, "timeout": 3}, "a")]),
    (OnlineRecipe, "ppo", ("--reward", "{source: DIR, weight: 0.5, dense: true}"), lambda r: r.reward,
     [RewardSource("DIR", 0.5, dense=True)]),
    (SampleRecipe, "sample", ("--model", "DIR", "--data", "a.jsonl"), lambda r: (r.model.path, r.data.train), ("DIR", "a.jsonl")),
    (EvalRecipe, "eval", ("--model", "DIR"), lambda r: r.model.path, "DIR"),
    (RankRecipe, "rank", ("--data", "a.jsonl"), lambda r: r.data.train, "a.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "verb", "words", "read", "expected"), BARE)
def test_a_bare_value_for_a_section_is_its_main_field(
    kind: type, verb: str, words: tuple, read: Any, expected: Any
) -> None:
    assert read(line(kind, verb, *words)) == expected


def test_bare_values_work_in_yaml_and_leave_the_rest_of_the_section_to_others(tmp_path: Path) -> None:
    mine = yaml(tmp_path, "model: DIR\ndata: a.jsonl\nreward: [f.py:f, {source: g.py:g, weight: 2}]\n")
    recipe = line(OnlineRecipe, "ppo", mine, "--model.dtype", "float32", "--data.max-tokens", "9")
    assert (recipe.model.path, recipe.model.dtype) == ("DIR", "float32")
    assert (recipe.data.train, recipe.data.max_tokens) == ("a.jsonl", 9)
    assert recipe.reward == [RewardSource("f.py:f"), RewardSource("g.py:g", 2.0)]


def test_part_of_an_optional_section_switches_it_on() -> None:
    assert line(OfflineRecipe, "sft").model.lora is None
    assert line(OfflineRecipe, "sft", "--model.lora.rank", "4").model.lora == LoRA(rank=4)
    assert line(OnlineRecipe, "ppo", "--critic.optim", "null").critic.optim is None
    assert line(OnlineRecipe, "ppo", "--critic.optim.lr", "0.5").critic.optim == Optim(
        lr=0.5, schedule="linear", min_lr_ratio=0.0
    )


LITERATURE = {  # full training: (lr, schedule, warm-up, final share); each source stands in the shipped recipe
    "pretrain": (1e-4, "cosine", 0.02, 0.1),  # Brown et al. 2020
    "sft": (1e-5, "cosine", 0.0, 0.1),  # Ouyang et al. 2022
    "reward": (9e-6, "cosine", 0.0, 0.1),  # Ouyang et al. 2022
    **dict.fromkeys(catalogue.PREFERENCE, (1e-6, "linear", 0.1, 0.0)),  # Rafailov et al. 2023; Tunstall et al. 2023
    **dict.fromkeys(("ppo", "ppo_kl", "instructgpt", "vapo"), (1e-6, "linear", 0.0, 0.0)),  # Ziegler et al. 2019
    **dict.fromkeys(("reinforce", "rloo", "remax", "policy_gradient"), (1e-6, "linear", 0.0, 0.0)),
    **dict.fromkeys(
        ("grpo", "dr_grpo", "dapo", "gspo", "online_dpo"), (1e-6, "constant", 0.0, None)
    ),  # Shao et al. 2024
}


@pytest.mark.parametrize("verb", LITERATURE)
def test_the_learning_rate_and_its_schedule_are_the_literatures_for_each_verb(verb: str) -> None:
    own = line(fields.kind_of(verb), verb).optim
    rate, schedule, warmup, final = LITERATURE[verb]
    assert (own.lr, own.schedule, own.warmup_ratio) == (rate, schedule, warmup)
    assert final is None or own.min_lr_ratio == final


@pytest.mark.parametrize("verb", LITERATURE)
def test_lora_has_ten_times_the_learning_rate_of_full_training(verb: str, tmp_path: Path) -> None:
    kind, rate = fields.kind_of(verb), LITERATURE[verb][0]
    for words in (("--lora.rank", "4"), ("--lora.rank", "4", "--weight-decay", "0.5")):
        assert line(kind, verb, *words).optim.lr == pytest.approx(10 * rate, rel=1e-12)
    mine = yaml(tmp_path, "model: {lora: {rank: 4}}\noptim: {schedule: cosine}")
    assert line(kind, verb, mine).optim.lr == pytest.approx(10 * rate, rel=1e-12)
    assert line(kind, verb, mine, "--lora", "null").optim.lr == rate
    # a rate that was given is kept, by the line or by a file
    assert line(kind, verb, "--lora.rank", "4", "--lr", "3e-5").optim.lr == 3e-5
    assert line(kind, verb, yaml(tmp_path, "model: {lora: {rank: 4}}\noptim: {lr: 3.0e-5}")).optim.lr == 3e-5


def test_the_critics_default_rate_is_that_of_its_adapter() -> None:
    def rates(*words: str) -> tuple[float, float]:
        own = line(OnlineRecipe, "ppo", *words)
        return own.optim.lr, own.critic.optim.lr

    assert rates() == (1e-6, 5e-6)
    assert rates("--lora.rank", "4") == (1e-5, 5e-5)
    assert rates("--lora.rank", "4", "--lr", "1e-3") == (1e-3, 5e-5)
    assert rates("--lora.rank", "4", "--critic.optim.lr", "1e-3") == (1e-5, 1e-3)
    assert line(OnlineRecipe, "ppo", "--lora.rank", "4", "--critic.optim", "null").critic.optim is None


def test_a_resolved_recipe_has_the_rates_and_is_resolved_to_itself(tmp_path: Path) -> None:
    own = line(OnlineRecipe, "ppo", "--lora.rank", "4", "--optim.schedule", "constant")
    text = config.to_yaml(own, "ppo")
    assert "lr: 1.0e-05" in text
    assert line(OnlineRecipe, "ppo", yaml(tmp_path, text)) == own


@pytest.mark.parametrize("verb", ["sft", "dpo", "ppo", "grpo"])
def test_a_constant_schedule_needs_no_final_rate_of_the_default(verb: str) -> None:
    own = line(fields.kind_of(verb), verb, "--optim.schedule", "constant").optim
    checks.check_optim(own, "optim")
    with pytest.raises(RecipeError, match="a constant schedule does not use it"):
        checks.check_optim(
            line(fields.kind_of(verb), verb, "--optim.schedule", "constant", "--min-lr-ratio", "0").optim, "optim"
        )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_can_end_at_zero(schedule: str) -> None:
    own = line(OfflineRecipe, "sft", "--optim.schedule", schedule, "--min-lr-ratio", "0").optim
    assert own.factor(0, 1000) == 1.0
    assert own.factor(999, 1000) == pytest.approx(
        0.001 if schedule == "linear" else (math.pi * 0.001) ** 2 / 4, rel=0.01
    )
    assert own.factor(1000, 1000) == pytest.approx(0.0, abs=1e-15)


SIGMOID = {"name": "sigmoid", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}
SLOTS = [
    ("grpo", ("--num-generations", "4"), {"num_generations": 4}),
    ("grpo", ("--algorithm.num_generations", "4"), {"num_generations": 4}),
    ("grpo", ("--kl-in-reward.coef", "0.1"), {"kl_in_reward": {"coef": 0.1}}),
    ("ppo", ("--kl-in-reward.target", "6"), {"kl_in_reward": {"coef": 0.05, "target": 6}}),
    ("ppo", ("--kl-in-reward", "null"), {"kl_in_reward": None}),
    ("grpo", ("--surrogate.clip-low", "0.1"), {"surrogate": {"name": "clip", "clip_low": 0.1}}),
    ("dapo", ("--surrogate.clip-low", "0.1"), {"surrogate": {"name": "clip", "clip_high": 0.28, "clip_low": 0.1}}),
    ("dapo", ("--surrogate", "dual_clip"), {"surrogate": {"name": "dual_clip"}}),
    ("dapo", ("--surrogate", "clip"), {"surrogate": {"name": "clip", "clip_high": 0.28}}),
    (
        "dapo",
        ("--surrogate.name", "cispo", "--surrogate.clip-high", "3"),
        {"surrogate": {"name": "cispo", "clip_high": 3}},
    ),
    ("dapo", ("--surrogate", "{name: cispo, clip_high: 3}"), {"surrogate": {"name": "cispo", "clip_high": 3}}),
    ("ppo", ("--advantage.gae_lambda", "0.9"), {"advantage": {"name": "gae", "gamma": 1.0, "gae_lambda": 0.9}}),
    (
        "ppo",
        ("--advantage", "leave_one_out", "--value", "null"),
        {"advantage": {"name": "leave_one_out"}, "value": None},
    ),
    ("ppo", ("--value.clip-range-vf", "null"), {"value": {"clip_range_vf": None, "vf_coef": 1.0}}),
    ("dpo", ("--beta", "0.3"), {"beta": 0.3}),
    ("dpo", ("--loss", "hinge"), {"loss": {"name": "hinge"}}),
    ("dpo", ("--loss.label-smoothing", "0.1"), {"loss": {"name": "sigmoid", "label_smoothing": 0.1}}),
    ("dpo", ("--implicit-reward.mean",), {"implicit_reward": {"name": "implicit_reward", "mean": True}}),
    ("dpo", ("--loss", "[{name: sigmoid, weight: 0.8}, {name: bco_pair, weight: 0.2}]"), {"loss": list(SIGMOID)}),
    ("reward", ("--loss.ties", "half"), {"name": "k_way", "loss": {"name": "k_way", "ties": "half"}}),
    (
        "reward",
        ("--algorithm.name", "pairwise", "--centering", "0.1"),
        {"name": "pairwise", "loss": {"name": "pairwise"}, "centering": 0.1},
    ),
    ("reward", ("--algorithm.name", "process"), {"name": "process", "loss": {"name": "process"}}),
]


@pytest.mark.parametrize(("verb", "words", "changes"), SLOTS)
def test_a_name_that_is_no_field_is_a_slot_of_the_method_and_the_others_keep_their_defaults(
    verb: str, words: tuple, changes: dict
) -> None:
    expected = dict(catalogue.slots_of(verb, changes.get("name"))) | changes
    assert line(fields.kind_of(verb), verb, *words).algorithm == expected


def test_a_recipe_has_every_slot_of_its_method() -> None:
    for verb in ONLINE:
        assert line(OnlineRecipe, verb).algorithm == dict(catalogue.slots_of(verb))


def test_the_users_recipe_and_the_overrides_change_a_slot_one_after_the_other(tmp_path: Path) -> None:
    mine = yaml(
        tmp_path,
        "algorithm: {surrogate: {name: dual_clip, bound: 4}, kl_in_reward: {coef: 0.1}, normalize_advantage: whiten}\n",
    )
    method = line(
        OnlineRecipe,
        "grpo",
        mine,
        "--surrogate.clip-low",
        "0.1",
        "--kl-in-reward.coef",
        "0.2",
        "--normalize-advantage.ddof",
        "0",
    ).algorithm
    assert method["surrogate"] == {"name": "dual_clip", "bound": 4, "clip_low": 0.1}
    assert (method["kl_in_reward"], method["normalize_advantage"]) == ({"coef": 0.2}, {"name": "whiten", "ddof": 0})
    method = line(OnlineRecipe, "grpo", mine, "--surrogate", "clip").algorithm  # another part begins anew
    assert method["surrogate"] == {"name": "clip"}


def test_what_the_command_line_composes_is_what_the_catalogue_does(tmp_path: Path) -> None:
    """Written out in the recipe, every verb's method is the one of Python."""
    for verb in (*ONLINE, *catalogue.PREFERENCE):
        slots = method.checked(verb, line(fields.kind_of(verb), verb).algorithm)
        own = compose.online_of(slots, longest=64) if verb in ONLINE else compose.preference_of(slots)
        assert own == (compose.online(verb, longest=64) if verb in ONLINE else compose.preference(verb)), verb
    for name in catalogue.REWARD:
        slots = method.checked("reward", line(fields.RewardModelRecipe, "reward", "--algorithm.name", name).algorithm)
        assert compose.reward_of(slots) == compose.reward(name)


UNKNOWN = [
    (OfflineRecipe, "sft", ("--optim.rl", "1"), "unknown field 'optim.rl'; did you mean 'optim.lr'?"),
    (OfflineRecipe, "sft", ("--train.batchsize", "1"), "unknown field 'train.batchsize'; did you mean 'train.batch_size'?"),
    (OfflineRecipe, "sft", ("--model.lora.rang", "1"), "unknown field 'model.lora.rang'; did you mean 'model.lora.rank'?"),
    (OfflineRecipe, "sft", ("--data", "[{file: a}]"), "unknown field 'data.train.file'; "),
    (SampleRecipe, "sample", ("--num-genrations", "1"), "unknown field 'num_genrations'; did you mean 'num_generations'?"),
    (EvalRecipe, "eval", ("--judg", "a"), "unknown field 'judg'; did you mean 'judge'?"),
    (OnlineRecipe, "ppo", ("--reward", "{sauce: DIR}"), "unknown field 'reward.sauce'; did you mean 'reward.source'?"),
    (OnlineRecipe, "ppo", ("--rollout.promts", "1"), "unknown field 'rollout.promts'; did you mean 'rollout.prompts_per_step'?"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "verb", "words", "what"), UNKNOWN)
def test_an_unknown_field_is_named_with_the_nearest_one(kind: type, verb: str, words: tuple, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        line(kind, verb, *words)
    assert str(caught.value).startswith(what)


def test_an_unknown_field_of_a_recipe_file_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown field 'trian'; did you mean 'train'\?"):
        line(OfflineRecipe, "sft", yaml(tmp_path, "trian: {batch: 3}"))


WRONG = [
    (OfflineRecipe, "sft", ("--train.batch-size", "0"), "train.batch_size: ", "0"),
    (OfflineRecipe, "sft", ("--train.batch-size", "many"), "train.batch_size: ", "'many'"),
    (OfflineRecipe, "sft", ("--train.batch-size", "1.5"), "train.batch_size: ", "1.5"),
    (OfflineRecipe, "sft", ("--lr", "-1"), "optim.lr: ", "-1"),
    (OfflineRecipe, "sft", ("--lr",), "optim.lr: ", "True"),
    (OfflineRecipe, "sft", ("--optim.warmup-ratio", "1"), "optim.warmup_ratio: ", "1"),
    (OfflineRecipe, "sft", ("--model.dtype", "int8"), "model.dtype: ", "'int8'"),
    (OfflineRecipe, "sft", ("--data.too-long", "shorten"), "data.too_long: ", "'shorten'"),
    (OfflineRecipe, "sft", ("--seed", "-1"), "seed: ", "-1"),
    (OfflineRecipe, "sft", ("--model.lora.rank", "0"), "model.lora.rank: ", "0"),
    (OfflineRecipe, "sft", ("--train", "3"), "train: ", "3"),
    (OnlineRecipe, "ppo", ("--sampling.temperature", "-1"), "sampling.temperature: ", "-1"),
    (OnlineRecipe, "ppo", ("--trunk", "common"), "trunk: ", "'common'"),
    (OnlineRecipe, "ppo", ("--reward", "[{weight: 2}]"), "reward", "source"),
    (OnlineRecipe, "ppo", ("--reward", "[{source: DIR, weight: heavy}]"), "reward[0].weight: ", "got 'heavy'"),
    (OnlineRecipe, "ppo", ("--critic.optim.lr", "0"), "critic.optim.lr: ", "0"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "verb", "words", "field", "got"), WRONG)
def test_an_impossible_value_is_named_with_its_field_and_what_was_got(
    kind: type, verb: str, words: tuple, field: str, got: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        line(kind, verb, *words)
    assert str(caught.value).startswith(field)
    assert got in str(caught.value)


DIALS = [
    ("grpo", {"num_generations": 0}, "algorithm.num_generations: expected `int` >= 1; got 0"),
    ("grpo", {"num_generations": 2.5}, "algorithm.num_generations: expected `int`, got `float`; got 2.5"),
    (
        "grpo",
        {"num_genrations": 2},
        "unknown field 'num_genrations'; did you mean 'algorithm.num_generations'?",
    ),
    ("grpo", {"surrogate": {"clip_low": 0}}, "algorithm.surrogate.clip_low: expected `float` > 0.0; got 0"),
    (
        "grpo",
        {"surrogate": {"lwo": 0.1}},
        "unknown field 'algorithm.surrogate.lwo'; did you mean 'algorithm.surrogate.clip_low'?",
    ),
    (
        "grpo",
        {"surrogate": {"bound": 3}},
        "unknown field 'algorithm.surrogate.bound'; did you mean 'algorithm.surrogate.clip_low'?",
    ),
    ("grpo", {"surrogate": "clpi"}, "algorithm.surrogate: unknown 'clpi'; did you mean 'clip'?"),
    (
        "grpo",
        {"surrogate": None},
        "algorithm.surrogate: it cannot be left out; known are clip, dual_clip, unclipped, kl_penalized, "
        "reinforce, cispo, sapo, gmpo, dppo",
    ),
    (
        "grpo",
        {"surrogate": 0.2},
        "algorithm.surrogate: expected the name of a part, or {name: ..., option: ...}; got 0.2",
    ),
    ("grpo", {"surrogate": ["clip", "cispo"]}, "algorithm.surrogate: it holds one part; got a list of 2"),
    (
        "grpo",
        {"surrogate": {"name": "dual_clip", "bound": 1}},
        "algorithm.surrogate.bound: expected `float` > 1.0; got 1",
    ),
    ("ppo", {"advantage": {"gae_lambda": 1.5}}, "algorithm.advantage.gae_lambda: expected `float` <= 1.0; got 1.5"),
    (
        "ppo",
        {"advantage": {"gae_lambda": "long"}},
        "algorithm.advantage.gae_lambda: expected `float`, got `str`; got 'long'",
    ),
    (
        "ppo",
        {"reward_placement": {"name": "uniform", "normalized": True}},
        "algorithm.reward_placement.normalized: uniform has no options; leave it out",
    ),
    (
        "ppo",
        {"reward_placement": "middle"},
        "algorithm.reward_placement: unknown 'middle'; known are terminal, uniform, linear, attention",
    ),
    (
        "ppo",
        {"kl_in_reward": {"coeff": 1}},
        "unknown field 'algorithm.kl_in_reward.coeff'; did you mean 'algorithm.kl_in_reward.coef'?",
    ),
    ("ppo", {"kl_in_reward": {"coef": -1}}, "algorithm.kl_in_reward.coef: expected `float` >= 0.0; got -1"),
    ("ppo", {"kl_in_reward": 0.1}, "algorithm.kl_in_reward: expected `object | null`, got `float`; got 0.1"),
    (
        "ppo",
        {"kl_in_reward": {"where": "middle"}},
        "algorithm.kl_in_reward.where: invalid enum value 'middle'; known are token, sequence, sequence_sum; got 'middle'",
    ),
    ("ppo", {"value": {"gae_lambda": 2}}, "algorithm.value.gae_lambda: expected `float` <= 1.0; got 2"),
    ("dpo", {"loss": {"label_smoothing": 0.5}}, "algorithm.loss.label_smoothing: expected `float` < 0.5; got 0.5"),
    (
        "dpo",
        {"loss": {"name": "exo_pair", "label_smoothing": 0}},
        "algorithm.loss.label_smoothing: expected `float` > 0.0; got 0",
    ),
    ("dpo", {"loss": [{"name": "sigmoid", "weight": -1}]}, "algorithm.loss.weight: expected `float` >= 0.0; got -1"),
    ("dpo", {"loss": ["sigmiod"]}, "algorithm.loss: unknown 'sigmiod'; did you mean 'sigmoid'?"),
    ("dpo", {"loss": []}, "algorithm.loss: it holds one part; got a list of 0"),
    (
        "dpo",
        {"implicit_reward": {"divergence": "kl"}},
        "algorithm.implicit_reward.divergence: invalid enum value 'kl'; known are reverse_kl, forward_kl, js, alpha; got 'kl'",
    ),
    ("dpo", {"rollout": 3}, "unknown field 'rollout'; "),
    ("online_dpo", {"kl_in_reward": {"coef": 0.1}}, "unknown field 'kl_in_reward'; "),
    ("online_dpo", {"advantage": "gae"}, "unknown field 'advantage'; "),
    ("orpo", {"beta": 0.1}, "unknown field 'beta'; "),
    ("kto", {"sft_weight": 0.1}, "unknown field 'sft_weight'; "),
]


@pytest.mark.parametrize(("verb", "changes", "what"), DIALS)
def test_a_methods_slots_and_dials_are_checked_by_name_type_and_range(verb: str, changes: dict, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        method.checked(verb, changed(catalogue.slots_of(verb), changes))
    assert str(caught.value) == what if not what.endswith("; ") else str(caught.value).startswith(what)


def test_an_unknown_reward_method_is_named_with_the_nearest_one() -> None:
    with pytest.raises(RecipeError, match=r"unknown field 'k_wya'; did you mean 'k_way'\?"):
        line(fields.RewardModelRecipe, "reward", "--algorithm.name", "k_wya")


OLD = [
    ("grpo", "clip", "it is a part: --surrogate clip"),
    ("dpo", "hinge", "it is a part: --loss hinge"),
    ("ppo_kl", "target", "did you mean 'algorithm.surrogate.target'?"),
    ("dpo", "label_smoothing", "did you mean 'algorithm.loss.label_smoothing'?"),
    ("orpo", "margin", "did you mean 'algorithm.loss.margin'?"),
    ("grpo", "rolout", "did you mean 'rollout'?"),
]


@pytest.mark.parametrize(("verb", "word", "hint"), OLD)
def test_a_part_a_dial_or_a_field_of_the_recipe_without_its_section_points_there(
    verb: str, word: str, hint: str
) -> None:
    kind = fields.kind_of(verb)
    with pytest.raises(RecipeError, match=rf"unknown field '(algorithm\.)?{word}'; {re.escape(hint)}$"):
        method.checked(verb, line(kind, verb, f"--{word}", "0.1").algorithm, config.leaves(kind))


@pytest.mark.parametrize(
    ("verb", "word", "ours"),
    [
        ("grpo", "learning-rate", "lr"),
        ("grpo", "beta", "kl_in_loss.coef"),
        ("grpo", "bf16", "precision bf16"),
        ("sft", "per-device-train-batch-size", "batch_size"),
        ("grpo", "max-steps", "num_steps (TRL counts updates"),
        ("ppo", "cliprange-value", "clip_range_vf"),
        ("ppo", "actor-learning-rate", "lr"),
        ("grpo", "n-samples-per-prompt", "num_generations"),
        ("grpo", "clip-ratio-high", "clip_high"),
        ("dpo", "pref-beta", "beta"),
        ("sft", "cutoff-len", "data.max_tokens"),
    ],
)
def test_an_option_of_another_framework_is_named_as_it_is_here(verb: str, word: str, ours: str) -> None:
    kind = fields.kind_of(verb)

    def resolved() -> None:
        recipe = line(kind, verb, f"--{word}", "0.1")
        method.checked(verb, recipe.algorithm, config.leaves(kind))

    with pytest.raises(RecipeError) as caught:
        resolved()
    assert f"; here it is {ours}" in str(caught.value)


@pytest.mark.parametrize(
    "words", [("--lr", "0.1"), ("--num-steps", "3"), ("--lora.rank", "4"), ("--gae-lambda", "0.5")]
)
def test_short_names_and_full_ones_are_the_same(words: tuple[str, str]) -> None:
    full = {"--lr": "--optim.lr", "--num-steps": "--rollout.num-steps", "--lora.rank": "--model.lora.rank",
            "--gae-lambda": "--algorithm.advantage.gae-lambda"}  # fmt: skip
    assert line(OnlineRecipe, "ppo", *words) == line(OnlineRecipe, "ppo", full[words[0]], words[1])


@pytest.mark.parametrize("name", sorted(path.stem for path in config.SHIPPED.glob("*.yaml")))
def test_every_shipped_recipe_resolves(name: str) -> None:
    verb = name.partition("-")[0]
    recipe = line(fields.kind_of(verb), verb, name)
    assert recipe.optim.lr > 0
    if hasattr(recipe, "algorithm"):
        method.checked(verb, recipe.algorithm)


def test_every_training_verb_has_a_shipped_recipe_of_its_own_or_that_of_a_method_with_the_same_needs() -> None:
    shipped = {path.stem for path in config.SHIPPED.glob("*.yaml")}
    for verb in (*OFFLINE, *ONLINE):
        name = verb if verb in shipped else catalogue.shipped_recipe(verb)
        assert name in shipped
        assert line(fields.kind_of(verb), verb).optim == line(fields.kind_of(name), name).optim
        if verb in ONLINE:  # a critic's learning rate where there is one, one update a rollout where there is no ratio
            recipe = line(OnlineRecipe, verb)
            method = compose.online_of(recipe.algorithm, longest=64)
            assert (recipe.critic.optim is not None) == ("critic" in method.roles()), verb
            assert method.has_ratio() or (recipe.rollout.mini_batch_size, recipe.rollout.ppo_epochs) == (None, 1), verb


def test_a_shipped_recipe_is_taken_by_its_name() -> None:
    recipe = line(OfflineRecipe, "sft", "sft-instructgpt")
    assert (recipe.train.num_epochs, recipe.train.dropout, recipe.optim.lr) == (16.0, 0.2, 9.65e-6)


def test_a_recipe_that_is_not_there_is_named_with_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"sft-instructgtp: no such recipe; the shipped ones are .*sft-instructgpt"):
        line(OfflineRecipe, "sft", "sft-instructgtp")


@pytest.mark.parametrize(
    ("text", "what"), [("a: [", "not valid YAML"), ("- a\n- b", "a recipe is a mapping of fields, got list")]
)
def test_a_recipe_file_that_is_none_is_named(text: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=what):
        line(OfflineRecipe, "sft", yaml(tmp_path, text))


def test_a_resolved_recipe_written_as_yaml_resolves_to_itself(tmp_path: Path) -> None:
    words = (
        "--model",
        "DIR",
        "--reward",
        "f.py:f",
        "--num-generations",
        "4",
        "--critic.optim.lr",
        "0.5",
        "--kl-in-loss",
        "null",
    )
    for more in ((), ("--surrogate", "cispo"), ("--normalize-advantage.ddof", "0", "--normalize-advantage", "whiten")):
        recipe = line(OnlineRecipe, "grpo", *words, *more)
        assert line(OnlineRecipe, "grpo", yaml(tmp_path, config.to_yaml(recipe))) == recipe
    recipe = line(
        fields.kind_of("dpo"), "dpo", "--loss", "[{name: sigmoid, weight: 0.8}, {name: bco_pair, weight: 0.2}]"
    )
    assert line(fields.kind_of("dpo"), "dpo", yaml(tmp_path, config.to_yaml(recipe))) == recipe
    recipe = line(fields.RewardModelRecipe, "reward", "--algorithm.name", "pairwise", "--centering", "0.1")
    assert line(fields.RewardModelRecipe, "reward", yaml(tmp_path, config.to_yaml(recipe))) == recipe


def test_a_second_word_that_is_no_option_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"unexpected word 'b\.yaml'; options are written --name value"):
        parsed(["a.yaml", "b.yaml"])


PARTS: dict[str, tuple[list[tuple[str, Any]], str, dict[str, Any]]] = {
    "a part and its option": ([("surrogate", "dual_clip"), ("surrogate.bound", 4.0)], "surrogate", {"name": "dual_clip", "bound": 4.0}),
    "an option in two parts": (
        [("advantage", "gae_adaptive"), ("advantage.gamma", 0.9)], "advantage", {"name": "gae_adaptive", "gamma": 0.9}
    ),
    "options of the default": (
        [("surrogate.clip_low", 0.1), ("surrogate.clip_high", 0.3)], "surrogate", {"name": "clip", "clip_low": 0.1, "clip_high": 0.3}
    ),
    "an option before another part": ([("surrogate.clip_low", 0.1), ("surrogate", "reinforce")], "surrogate", {"name": "reinforce"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_part_and_its_options_are_given_as_several_options(name: str) -> None:
    overrides, slot, expected = PARTS[name]
    found = config.resolve(OnlineRecipe, "grpo", None, overrides).algorithm[slot]
    assert {key: found.get(key) for key in expected} == expected
