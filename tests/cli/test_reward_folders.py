"""Reward models and adapters that a recipe names: what starts the critic, what is said, and what is refused before a run."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from whet.cli.main import main
from whet.data import Group, Prompt, Sample
from whet.errors import ModelError, RecipeError
from whet.methods import compose
from whet.runs import checks, config, learners, models, rewards
from whet.runs.recipe import OnlineRecipe

from .helpers import whet

PPO = compose.online("ppo")
LORA = {"model.lora.rank": 4, "trunk": "shared"}
ROWS = [torch.arange(3, 20)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base `m`, the whole reward models `whole` and `bert`, adapters of `m`, and one of a model with other weights."""
    home = tmp_path_factory.mktemp("home")
    tiny.folder(home / "m")
    tiny.folder(home / "other", seed=1)
    for name, base in (("rm", "m"), ("far", "other")):
        torch.manual_seed(3)
        scorer = AutoModelForSequenceClassification.from_pretrained(home / base, num_labels=1)
        scorer.config.pad_token_id = 0
        if name == "rm":
            scorer.save_pretrained(home / "whole")
        given = LoraConfig(
            task_type="SEQ_CLS", r=2, target_modules=["q_proj"], use_rslora=True, init_lora_weights=False
        )
        get_peft_model(scorer, given).save_pretrained(home / name)
    policy = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(home / "m"), policy).save_pretrained(home / "policy")
    given = tiny.config("llama").to_dict()
    own = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "pad_token_id")
    torch.manual_seed(3)
    BertForSequenceClassification(
        BertConfig(**{key: given[key] for key in own}, num_labels=1, initializer_range=0.3)
    ).save_pretrained(home / "bert")
    for name in ("whole", "rm", "far", "bert", "policy"):
        tiny.tokenizer().save_pretrained(home / name)
    (home / "judge.py").write_text("def one(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n")
    tiny.write_jsonl(home / "prompts.jsonl", [{"prompt": "a b"}, {"prompt": "c"}])
    tiny.write_jsonl(home / "pairs.jsonl", [{"prompt": "a", "chosen": "yes", "rejected": "no"}] * 2)
    return home


def recipe(home: Path, *sources: str, method: str = "ppo", **options: Any) -> OnlineRecipe:
    given = [("model", f"{home}/{options.pop('model', 'm')}"), ("data", f"{home}/prompts.jsonl")]
    dense = {"dense": True} if options.pop("dense", False) else {}
    given += [
        (key, value.replace("HOME", str(home)) if isinstance(value, str) else value) for key, value in options.items()
    ]
    out = config.resolve(
        OnlineRecipe, method, None, [*given, ("reward", [{"source": f"{home}/{one}"} | dense for one in sources])]
    )
    assert isinstance(out, OnlineRecipe)
    return out


@pytest.mark.parametrize(
    ("sources", "options", "words"),
    [
        (["whole"], LORA, "critic: it begins untrained, since HOME/whole is a whole model"),
        (["judge.py:one", "whole"], LORA, "HOME/whole is a whole model"),
        (["rm"], LORA, ""),
        (["whole", "rm"], LORA, ""),
        (["whole"], LORA | {"critic.path": "HOME/rm"}, ""),
        (["whole"], {"model.lora.rank": 4}, ""),
        (["judge.py:one"], LORA, ""),
        (["whole"], LORA | {"method": "grpo"}, ""),
    ],
)
def test_a_critic_that_begins_untrained_beside_a_reward_model_is_said(
    home: Path, sources: list[str], options: dict[str, Any], words: str
) -> None:
    given = recipe(home, *sources, **options)
    told = [
        one for one in checks.cautions(given, compose.online(options.get("method", "ppo"))) if one.startswith("critic")
    ]
    assert len(told) == bool(words)
    assert words.replace("HOME", str(home)) in " ".join(told)
    for advised in ("--critic.path", "--model.export adapter", "--trunk separate"):
        assert (advised in " ".join(told)) == bool(words)


@pytest.mark.parametrize("trunk", ["shared", "separate"])
def test_the_critic_starts_as_the_reward_model_where_the_caution_says_so(home: Path, trunk: str) -> None:
    """The value at the last token of a text is the score of the reward model, on the way that is advised."""
    from whet.data import Batch, Row
    from whet.models.readers import read

    given = recipe(home, "rm" if trunk == "shared" else "whole", **(LORA | {"trunk": trunk}))
    tokenizer, _ = models.tokenizer_and_chat(given.model)
    learner = learners.online_learner(given, PPO, 1, tokenizer, ROWS)
    batch = Batch.of([Row(torch.tensor([3, 7, 8, 4, 9]), 2, torch.ones(3, dtype=torch.bool))])
    start = read(learner.roles["critic"], batch, frozenset({"final_value"}))["final_value"]
    score = read(learner.roles["reward0"], batch, frozenset({"score"}))["score"]
    torch.testing.assert_close(start, score, rtol=1e-5, atol=1e-5)


def test_an_encoder_scores_through_its_own_forward(home: Path) -> None:
    """As a reward of a run: pooler included, both ways, whatever the lengths in a batch."""
    given = recipe(home, "bert", method="grpo")
    tokenizer, chat = models.tokenizer_and_chat(given.model)
    learner = learners.online_learner(given, compose.online("grpo"), 1, tokenizer, ROWS)
    (reward,) = rewards.rewards_of(given, tokenizer, learner.columns)
    messages = ({"role": "user", "content": "a b"},)
    prompt = Prompt("0", tuple(chat.prompt_ids(messages)), messages)
    answers = [chat.answer_ids(messages, text) for text in ("yes", "no maybe please", "a b c d e f g")]
    samples = [Sample(0, k, tuple(ids), (0.0,) * len(ids), 0, "stop", chat.text(ids)) for k, ids in enumerate(answers)]
    model = BertForSequenceClassification.from_pretrained(home / "bert").eval()
    with torch.no_grad():
        expected = [float(model(torch.tensor([[*prompt.ids, *ids]])).logits) for ids in answers]
    got = reward.reward.score([Group(prompt, tuple(samples))]).answer.tolist()
    assert got == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3


REFUSED: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "a critic of whole texts": (["bert"], {}, r"critic: it would start from .*bert, .* give --critic\.path"),
    "an adapter of another base": (
        ["far"],
        LORA,
        r"trained on .*other, and the trunk is .*/m, which has other weights",
    ),
    "a critic that is no adapter": (["judge.py:one"], LORA | {"critic.path": "HOME/whole"}, "this is a whole model"),
    "dense scores of whole texts": (
        ["bert"],
        {"method": "reinforce", "dense": True},
        r"reward\.0\.dense: .*bert has one score per text",
    ),
    "an adapter alone of a merged one": (
        ["judge.py:one"],
        {"model": "policy", "model.lora.rank": 4, "model.export": "adapter"},
        r"model\.export: .*policy is an adapter, which is merged",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_cannot_read_is_refused_when_it_is_loaded(home: Path, name: str) -> None:
    sources, options, words = REFUSED[name]
    method = options.get("method", "ppo")
    given = recipe(home, *sources, **options)
    tokenizer, _ = models.tokenizer_and_chat(given.model)
    with pytest.raises((ModelError, RecipeError), match=words):
        learners.online_learner(given, compose.online(method), 1, tokenizer, ROWS)


def test_separated_embeddings_are_not_sent_to_an_engine_that_shares_them(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would drop the head and sample from the embeddings."""
    monkeypatch.setattr("whet.extras.installed", lambda _: True)
    for targets, refused in ((["lm_head"], True), (["embed_tokens", "q_proj"], True), (["q_proj"], False)):
        given = recipe(
            home,
            "judge.py:one",
            method="grpo",
            generator="vllm",
            **{"model.lora.rank": 2, "model.lora.targets": targets},
        )
        tokenizer, _ = models.tokenizer_and_chat(given.model)
        if refused:
            with pytest.raises(RecipeError, match=r"model\.lora\.targets: .* one weight for embeddings and head"):
                models.cast(given, compose.online("grpo"), tokenizer)
        else:
            models.cast(given, compose.online("grpo"), tokenizer)


def test_an_encoder_is_trained_as_a_reward_model_through_its_own_forward(
    home: Path, tmp_path: Path, capsys: Any
) -> None:
    given = ["reward", "--model", f"{home}/bert", "--data", f"{home}/pairs.jsonl", "--train.num-steps", "3", "--quiet"]
    said = whet(capsys, given[0], *given[1:], "--head.standardize", "true", "--out", f"{tmp_path}/no")
    assert said.status == 2
    assert "head.standardize" in said.error
    assert not (tmp_path / "no").exists()
    assert main([*given, "--head.standardize", "false", "--lr", "1e-3", "--out", f"{tmp_path}/run"]) == 0
    before, after = (
        BertForSequenceClassification.from_pretrained(one).eval() for one in (home / "bert", tmp_path / "run/model")
    )
    moved = (
        before.classifier.weight.detach() - after.classifier.weight.detach(),
        before.bert.pooler.dense.weight.detach() - after.bert.pooler.dense.weight.detach(),
    )
    assert all(float(one.abs().max()) > 1e-4 for one in moved)
