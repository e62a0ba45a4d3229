import re
from pathlib import Path
from typing import Any

import pytest

from whet.cli.main import OFFLINE, ONLINE, _grouped, parsed
from whet.errors import RecipeError
from whet.methods import catalogue, compose
from whet.methods.choices import changed
from whet.methods.options import LoRA, Optim
from whet.runs import config
from whet.runs import recipe as fields
from whet.runs import slots as method
from whet.runs.config import resolve
from whet.runs.recipe import Eval, Offline, Online, Rank, RewardSource, Sample, Source


def yaml(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


def line(kind: type, verb: str, *words: str) -> Any:
    """The recipe of a command line."""
    recipe, overrides, _ = parsed(words)
    return resolve(kind, verb, recipe, list(_grouped(overrides).items()))


def test_overrides_win_over_the_users_recipe_over_the_shipped_one_over_the_defaults(tmp_path: Path) -> None:
    mine = yaml(tmp_path, "train: {batch: 8, packing: true}\noptim: {lr: 2.0e-5, warmup: 0.25}\n")
    recipe = line(Offline, "sft", mine, "--optim.lr", "0.5", "--train.batch", "4")
    assert (recipe.optim.lr, recipe.train.batch) == (0.5, 4)  # the override
    assert (recipe.optim.warmup, recipe.train.packing) == (0.25, True)  # the user's
    assert (recipe.train.epochs, recipe.optim.schedule) == (3.0, "cosine")  # the shipped
    assert (recipe.train.micro_tokens, recipe.optim.betas, recipe.seed) == (8192, (0.9, 0.95), 0)  # the defaults


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "1.0e-3", "0.001", ".001"])
def test_a_number_may_be_written_as_one_likes(written: str, tmp_path: Path) -> None:
    assert line(Offline, "sft", "--lr", written).optim.lr == 0.001
    assert line(Offline, "sft", yaml(tmp_path, f"optim: {{lr: {written}}}")).optim.lr == 0.001


@pytest.mark.parametrize(
    "words", [("--optim.lr=0.5",), ("--optim.lr", "0.5"), ("--lr", "0.5"), ("--lr", "1", "--lr", "0.5")]
)
def test_an_override_has_several_forms_and_the_last_one_counts(words: tuple[str, ...]) -> None:
    assert line(Offline, "sft", *words).optim.lr == 0.5


def test_dashes_stand_for_underscores_and_a_flag_without_value_is_true() -> None:
    recipe = line(Online, "ppo", "--model.trust-remote-code", "--max-new-tokens", "7", "--model.chat-template", "plain")
    assert (recipe.model.trust_remote_code, recipe.sampling.max_new_tokens) == (True, 7)
    assert recipe.model.chat_template == "plain"


BARE = [
    (Offline, "sft", ("--model", "DIR"), lambda r: r.model.path, "DIR"),
    (Offline, "sft", ("--data", "a.jsonl"), lambda r: r.data.train, "a.jsonl"),
    (Offline, "sft", ("--data", "[{path: a.jsonl, weight: 2}, {path: b.jsonl}]"), lambda r: r.data.train,
     [Source("a.jsonl", 2.0), Source("b.jsonl", 1.0)]),
    (Offline, "sft", ("--data.train", "[a.jsonl, b.jsonl]"), lambda r: r.data.train, [Source("a.jsonl"), Source("b.jsonl")]),
    (Offline, "sft", ("--data", "[a.jsonl, b.jsonl]"), lambda r: r.data.train, [Source("a.jsonl"), Source("b.jsonl")]),
    (Online, "ppo", ("--critic", "DIR"), lambda r: r.critic.path, "DIR"),
    (Online, "instructgpt", ("--ptx", "a.jsonl"), lambda r: r.ptx.data, "a.jsonl"),
    (Online, "ppo", ("--reward", "f.py:f"), lambda r: r.reward, [RewardSource("f.py:f")]),
    (Online, "ppo", ("--reward", "f.py:f", "--reward", "DIR"), lambda r: r.reward, [RewardSource("f.py:f"), RewardSource("DIR")]),
    (Online, "ppo", ("--reward", "{source: DIR, weight: 0.5, dense: true}"), lambda r: r.reward,
     [RewardSource("DIR", 0.5, None, True)]),
    (Sample, "sample", ("--model", "DIR", "--data", "a.jsonl"), lambda r: (r.model.path, r.data.train), ("DIR", "a.jsonl")),
    (Eval, "eval", ("--model", "DIR"), lambda r: r.model.path, "DIR"),
    (Rank, "rank", ("--data", "a.jsonl"), lambda r: r.data.train, "a.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "verb", "words", "read", "expected"), BARE)
def test_a_bare_value_for_a_section_is_its_main_field(
    kind: type, verb: str, words: tuple, read: Any, expected: Any
) -> None:
    assert read(line(kind, verb, *words)) == expected


def test_bare_values_work_in_yaml_and_leave_the_rest_of_the_section_to_others(tmp_path: Path) -> None:
    mine = yaml(tmp_path, "model: DIR\ndata: a.jsonl\nreward: [f.py:f, {source: g.py:g, weight: 2}]\n")
    recipe = line(Online, "ppo", mine, "--model.dtype", "float32", "--data.max-tokens", "9")
    assert (recipe.model.path, recipe.model.dtype) == ("DIR", "float32")
    assert (recipe.data.train, recipe.data.max_tokens) == ("a.jsonl", 9)
    assert recipe.reward == [RewardSource("f.py:f"), RewardSource("g.py:g", 2.0)]


def test_part_of_an_optional_section_switches_it_on() -> None:
    assert line(Offline, "sft").model.lora is None
    assert line(Offline, "sft", "--model.lora.rank", "4").model.lora == LoRA(rank=4)
    assert line(Online, "ppo", "--critic.optim", "null").critic.optim is None
    assert line(Online, "ppo", "--critic.optim.lr", "0.5").critic.optim == Optim(lr=0.5, schedule="linear", final=0.1)


SIGMOID = {"name": "sigmoid", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}
SLOTS = [
    ("grpo", ("--answers", "4"), {"answers": 4}),
    ("grpo", ("--method.answers", "4"), {"answers": 4}),
    ("grpo", ("--kl.coef", "0.1"), {"kl": {"coef": 0.1}}),
    ("ppo", ("--kl.target", "6"), {"kl": {"coef": 0.05, "target": 6}}),
    ("ppo", ("--kl", "null"), {"kl": None}),
    ("grpo", ("--surrogate.low", "0.1"), {"surrogate": {"name": "clip", "low": 0.1}}),
    ("dapo", ("--surrogate.low", "0.1"), {"surrogate": {"name": "clip", "high": 0.28, "low": 0.1}}),
    ("dapo", ("--surrogate", "dual_clip"), {"surrogate": {"name": "dual_clip"}}),
    ("dapo", ("--surrogate", "clip"), {"surrogate": {"name": "clip", "high": 0.28}}),
    ("dapo", ("--surrogate.name", "cispo", "--surrogate.high", "3"), {"surrogate": {"name": "cispo", "high": 3}}),
    ("dapo", ("--surrogate", "{name: cispo, high: 3}"), {"surrogate": {"name": "cispo", "high": 3}}),
    ("ppo", ("--credit.lam", "0.9"), {"credit": {"name": "gae", "gamma": 1.0, "lam": 0.9}}),
    ("ppo", ("--credit", "leave_one_out", "--value", "null"), {"credit": {"name": "leave_one_out"}, "value": None}),
    ("ppo", ("--value.clip", "null"), {"value": {"clip": None, "weight": 1.0}}),
    ("dpo", ("--beta", "0.3"), {"beta": 0.3}),
    ("dpo", ("--loss", "hinge"), {"loss": {"name": "hinge"}}),
    ("dpo", ("--loss.label-smoothing", "0.1"), {"loss": {"name": "sigmoid", "label_smoothing": 0.1}}),
    ("dpo", ("--score.mean",), {"score": {"name": "implicit_reward", "mean": True}}),
    ("dpo", ("--loss", "[{name: sigmoid, weight: 0.8}, {name: bco_pair, weight: 0.2}]"), {"loss": list(SIGMOID)}),
    ("reward", ("--loss.ties", "half"), {"name": "k_way", "loss": {"name": "k_way", "ties": "half"}}),
    (
        "reward",
        ("--method.name", "pairwise", "--centring", "0.1"),
        {"name": "pairwise", "loss": {"name": "pairwise"}, "centring": 0.1},
    ),
    ("reward", ("--method.name", "process"), {"name": "process", "loss": {"name": "process"}}),
]


@pytest.mark.parametrize(("verb", "words", "changes"), SLOTS)
def test_a_name_that_is_no_field_is_a_slot_of_the_method_and_the_others_keep_their_defaults(
    verb: str, words: tuple, changes: dict
) -> None:
    expected = dict(catalogue.slots_of(verb, changes.get("name"))) | changes
    assert line(fields.kind_of(verb), verb, *words).method == expected


def test_a_recipe_has_every_slot_of_its_method() -> None:
    for verb in ONLINE:
        assert line(Online, verb).method == dict(catalogue.slots_of(verb))


def test_the_users_recipe_and_the_overrides_change_a_slot_one_after_the_other(tmp_path: Path) -> None:
    mine = yaml(tmp_path, "method: {surrogate: {name: dual_clip, bound: 4}, kl: {coef: 0.1}, whiten: whiten}\n")
    method = line(Online, "grpo", mine, "--surrogate.low", "0.1", "--kl.coef", "0.2", "--whiten.ddof", "0").method
    assert method["surrogate"] == {"name": "dual_clip", "bound": 4, "low": 0.1}
    assert (method["kl"], method["whiten"]) == ({"coef": 0.2}, {"name": "whiten", "ddof": 0})
    method = line(Online, "grpo", mine, "--surrogate", "clip").method  # another part begins anew
    assert method["surrogate"] == {"name": "clip"}


def test_what_the_command_line_composes_is_what_the_catalogue_does(tmp_path: Path) -> None:
    """Written out in the recipe, every verb's method is the one of Python."""
    for verb in (*ONLINE, *catalogue.PREFERENCE):
        slots = method.checked(verb, line(fields.kind_of(verb), verb).method)
        own = compose.online_of(slots, longest=64) if verb in ONLINE else compose.preference_of(slots)
        assert own == (compose.online(verb, longest=64) if verb in ONLINE else compose.preference(verb)), verb
    for name in catalogue.REWARD:
        slots = method.checked("reward", line(fields.RewardModel, "reward", "--method.name", name).method)
        assert compose.reward_of(slots) == compose.reward(name)


UNKNOWN = [
    (Offline, "sft", ("--optim.rl", "1"), "unknown field 'optim.rl'; did you mean 'optim.lr'?"),
    (Offline, "sft", ("--train.batchsize", "1"), "unknown field 'train.batchsize'; did you mean 'train.batch'?"),
    (Offline, "sft", ("--model.lora.rang", "1"), "unknown field 'model.lora.rang'; did you mean 'model.lora.rank'?"),
    (Offline, "sft", ("--data", "[{file: a}]"), "unknown field 'data.train.file'; "),
    (Sample, "sample", ("--cuont", "1"), "unknown field 'cuont'; did you mean 'count'?"),
    (Eval, "eval", ("--judg", "a"), "unknown field 'judg'; did you mean 'judge'?"),
    (Online, "ppo", ("--reward", "{sauce: DIR}"), "unknown field 'reward.sauce'; did you mean 'reward.source'?"),
    (Online, "ppo", ("--rollout.promts", "1"), "unknown field 'rollout.promts'; did you mean 'rollout.prompts'?"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "verb", "words", "what"), UNKNOWN)
def test_an_unknown_field_is_named_with_the_nearest_one(kind: type, verb: str, words: tuple, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        line(kind, verb, *words)
    assert str(caught.value).startswith(what)


def test_an_unknown_field_of_a_recipe_file_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown field 'trian'; did you mean 'train'\?"):
        line(Offline, "sft", yaml(tmp_path, "trian: {batch: 3}"))


WRONG = [
    (Offline, "sft", ("--train.batch", "0"), "train.batch: ", "0"),
    (Offline, "sft", ("--train.batch", "many"), "train.batch: ", "'many'"),
    (Offline, "sft", ("--train.batch", "1.5"), "train.batch: ", "1.5"),
    (Offline, "sft", ("--lr", "-1"), "optim.lr: ", "-1"),
    (Offline, "sft", ("--lr",), "optim.lr: ", "True"),
    (Offline, "sft", ("--optim.warmup", "1"), "optim.warmup: ", "1"),
    (Offline, "sft", ("--model.dtype", "int8"), "model.dtype: ", "'int8'"),
    (Offline, "sft", ("--data.too-long", "shorten"), "data.too_long: ", "'shorten'"),
    (Offline, "sft", ("--seed", "-1"), "seed: ", "-1"),
    (Offline, "sft", ("--model.lora.rank", "0"), "model.lora.rank: ", "0"),
    (Offline, "sft", ("--train", "3"), "train: ", "3"),
    (Online, "ppo", ("--sampling.temperature", "-1"), "sampling.temperature: ", "-1"),
    (Online, "ppo", ("--trunk", "common"), "trunk: ", "'common'"),
    (Online, "ppo", ("--reward", "[{weight: 2}]"), "reward", "source"),
    (Online, "ppo", ("--reward", "[{source: DIR, weight: heavy}]"), "reward[0].weight: ", "got 'heavy'"),
    (Online, "ppo", ("--critic.optim.lr", "0"), "critic.optim.lr: ", "0"),
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
    ("grpo", {"answers": 0}, "method.answers: expected `int` >= 1; got 0"),
    ("grpo", {"answers": 2.5}, "method.answers: expected `int`, got `float`; got 2.5"),
    ("grpo", {"asnwers": 2}, "unknown field 'method.asnwers'; did you mean 'method.answers'?"),
    ("grpo", {"surrogate": {"low": 0}}, "method.surrogate.low: expected `float` > 0.0; got 0"),
    ("grpo", {"surrogate": {"lwo": 0.1}}, "unknown field 'method.surrogate.lwo'; did you mean 'method.surrogate.low'?"),
    (
        "grpo",
        {"surrogate": {"bound": 3}},
        "unknown field 'method.surrogate.bound'; did you mean 'method.surrogate.low'?",
    ),
    ("grpo", {"surrogate": "clpi"}, "method.surrogate: unknown 'clpi'; did you mean 'clip'?"),
    (
        "grpo",
        {"surrogate": None},
        "method.surrogate: it cannot be left out; known are clip, dual_clip, unclipped, kl_penalised, "
        "reinforce, cispo, sapo, gmpo, dppo",
    ),
    ("grpo", {"surrogate": 0.2}, "method.surrogate: expected the name of a part, or {name: ..., dial: ...}; got 0.2"),
    ("grpo", {"surrogate": ["clip", "cispo"]}, "method.surrogate: it holds one part; got a list of 2"),
    ("grpo", {"surrogate": {"name": "dual_clip", "bound": 1}}, "method.surrogate.bound: expected `float` > 1.0; got 1"),
    ("ppo", {"credit": {"lam": 1.5}}, "method.credit.lam: expected `float` <= 1.0; got 1.5"),
    ("ppo", {"credit": {"lam": "long"}}, "method.credit.lam: expected `float`, got `str`; got 'long'"),
    (
        "ppo",
        {"place": {"name": "uniform", "normalised": True}},
        "method.place.normalised: uniform has no dials; leave it out",
    ),
    ("ppo", {"place": "middle"}, "method.place: unknown 'middle'; known are terminal, uniform, linear, attention"),
    ("ppo", {"kl": {"coeff": 1}}, "unknown field 'method.kl.coeff'; did you mean 'method.kl.coef'?"),
    ("ppo", {"kl": {"coef": -1}}, "method.kl.coef: expected `float` >= 0.0; got -1"),
    ("ppo", {"kl": 0.1}, "method.kl: expected `object | null`, got `float`; got 0.1"),
    (
        "ppo",
        {"kl": {"where": "middle"}},
        "method.kl.where: invalid enum value 'middle'; known are token, sequence, sequence_sum; got 'middle'",
    ),
    ("ppo", {"value": {"lam": 2}}, "method.value.lam: expected `float` <= 1.0; got 2"),
    ("dpo", {"loss": {"label_smoothing": 0.5}}, "method.loss.label_smoothing: expected `float` < 0.5; got 0.5"),
    (
        "dpo",
        {"loss": {"name": "exo_pair", "label_smoothing": 0}},
        "method.loss.label_smoothing: expected `float` > 0.0; got 0",
    ),
    ("dpo", {"loss": [{"name": "sigmoid", "weight": -1}]}, "method.loss.weight: expected `float` >= 0.0; got -1"),
    ("dpo", {"loss": ["sigmiod"]}, "method.loss: unknown 'sigmiod'; did you mean 'sigmoid'?"),
    ("dpo", {"loss": []}, "method.loss: it holds one part; got a list of 0"),
    (
        "dpo",
        {"score": {"divergence": "kl"}},
        "method.score.divergence: invalid enum value 'kl'; known are reverse_kl, forward_kl, js, alpha; got 'kl'",
    ),
    ("dpo", {"rollout": 3}, "unknown field 'method.rollout'; "),
    ("online_dpo", {"kl": {"coef": 0.1}}, "unknown field 'method.kl'; "),
    ("online_dpo", {"credit": "gae"}, "unknown field 'method.credit'; "),
    ("orpo", {"beta": 0.1}, "unknown field 'method.beta'; "),
    ("kto", {"sft_weight": 0.1}, "unknown field 'method.sft_weight'; "),
]


@pytest.mark.parametrize(("verb", "changes", "what"), DIALS)
def test_a_methods_slots_and_dials_are_checked_by_name_type_and_range(verb: str, changes: dict, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        method.checked(verb, changed(catalogue.slots_of(verb), changes))
    assert str(caught.value) == what if not what.endswith("; ") else str(caught.value).startswith(what)


def test_an_unknown_reward_method_is_named_with_the_nearest_one() -> None:
    with pytest.raises(RecipeError, match=r"unknown field 'k_wya'; did you mean 'k_way'\?"):
        line(fields.RewardModel, "reward", "--method.name", "k_wya")


OLD = [
    ("grpo", "clip", "it is a part: --surrogate clip"),
    ("dpo", "hinge", "it is a part: --loss hinge"),
    ("ppo", "lam", "did you mean 'method.credit.lam'?"),
    ("ppo_kl", "target", "did you mean 'method.surrogate.target'?"),
    ("dpo", "label_smoothing", "did you mean 'method.loss.label_smoothing'?"),
    ("orpo", "margin", "did you mean 'method.loss.margin'?"),
    ("grpo", "rolout", "did you mean 'rollout'?"),
]


@pytest.mark.parametrize(("verb", "word", "hint"), OLD)
def test_a_part_a_dial_or_a_field_of_the_recipe_without_its_section_points_there(
    verb: str, word: str, hint: str
) -> None:
    kind = fields.kind_of(verb)
    with pytest.raises(RecipeError, match=rf"unknown field '(method\.)?{word}'; {re.escape(hint)}$"):
        method.checked(verb, line(kind, verb, f"--{word}", "0.1").method, config.leaves(kind))


@pytest.mark.parametrize("name", sorted(path.stem for path in config.SHIPPED.glob("*.yaml")))
def test_every_shipped_recipe_resolves(name: str) -> None:
    verb = name.partition("-")[0]
    recipe = line(fields.kind_of(verb), verb, name)
    assert recipe.optim.lr > 0
    if hasattr(recipe, "method"):
        method.checked(verb, recipe.method)


def test_every_training_verb_has_a_shipped_recipe_of_its_own_or_that_of_a_method_with_the_same_needs() -> None:
    shipped = {path.stem for path in config.SHIPPED.glob("*.yaml")}
    for verb in (*OFFLINE, *ONLINE):
        name = verb if verb in shipped else catalogue.shipped_recipe(verb)
        assert name in shipped
        assert line(fields.kind_of(verb), verb).optim == line(fields.kind_of(name), name).optim
        if verb in ONLINE:  # a critic's learning rate where there is one, one update a rollout where there is no ratio
            recipe = line(Online, verb)
            method = compose.online_of(recipe.method, longest=64)
            assert (recipe.critic.optim is not None) == ("critic" in method.roles()), verb
            assert method.has_ratio() or (recipe.rollout.minibatch, recipe.rollout.epochs) == (None, 1), verb


def test_a_shipped_recipe_is_taken_by_its_name() -> None:
    recipe = line(Offline, "sft", "sft-instructgpt")
    assert (recipe.train.epochs, recipe.train.dropout, recipe.optim.lr) == (16.0, 0.2, 9.65e-6)


def test_a_recipe_that_is_not_there_is_named_with_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"sft-instructgtp: no such recipe; the shipped ones are .*sft-instructgpt"):
        line(Offline, "sft", "sft-instructgtp")


@pytest.mark.parametrize(
    ("text", "what"), [("a: [", "not valid YAML"), ("- a\n- b", "a recipe is a mapping of fields, got list")]
)
def test_a_recipe_file_that_is_none_is_named(text: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=what):
        line(Offline, "sft", yaml(tmp_path, text))


def test_a_resolved_recipe_written_as_yaml_resolves_to_itself(tmp_path: Path) -> None:
    words = ("--model", "DIR", "--reward", "f.py:f", "--answers", "4", "--critic.optim.lr", "0.5", "--loss-kl", "null")
    for more in ((), ("--surrogate", "cispo"), ("--whiten.ddof", "0", "--whiten", "whiten")):
        recipe = line(Online, "grpo", *words, *more)
        assert line(Online, "grpo", yaml(tmp_path, config.to_yaml(recipe))) == recipe
    recipe = line(
        fields.kind_of("dpo"), "dpo", "--loss", "[{name: sigmoid, weight: 0.8}, {name: bco_pair, weight: 0.2}]"
    )
    assert line(fields.kind_of("dpo"), "dpo", yaml(tmp_path, config.to_yaml(recipe))) == recipe
    recipe = line(fields.RewardModel, "reward", "--method.name", "pairwise", "--centring", "0.1")
    assert line(fields.RewardModel, "reward", yaml(tmp_path, config.to_yaml(recipe))) == recipe


def test_a_second_word_that_is_no_option_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"unexpected word 'b\.yaml'; options are written --name value"):
        parsed(["a.yaml", "b.yaml"])
