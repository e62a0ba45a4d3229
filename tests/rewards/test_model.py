"""Reward models as rewards: whet's own on the sampled ids, published ones through their own tokenizer and template."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from whet.data import Group, Prompt, Sample, chat_format
from whet.models.load import ModelSource, load_scorer, load_tokenizer
from whet.models.roles import Role
from whet.rewards import Weighted, score_all
from whet.rewards.functions import FunctionReward
from whet.rewards.model import ModelReward

OTHER = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"

CHAT = chat_format(tiny.tokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("reward"))


def role(folder: Path, **given: Any) -> Role:
    return Role("reward", load_scorer(ModelSource(str(folder), dtype="float32", device="cpu"), seed=3), False, **given)


def test_an_answer_that_was_cut_off_is_read_without_an_end_token(folder: Path) -> None:
    """Through its own tokenizer too: the model must not take it for a finished one."""
    from dataclasses import replace

    whole = groups(chat_format(tiny.tokenizer()))[0]
    cut = replace(whole, samples=(replace(whole.samples[0], ids=whole.samples[0].ids[:-1], finish="length"),))
    same = ModelReward(role(folder), CHAT).score([cut]).answer
    other = ModelReward(role(folder), CHAT, same=False).score([cut]).answer
    assert same.tolist() == pytest.approx(
        by_transformers(folder, [list(cut.prompt.ids + cut.samples[0].ids)]), abs=1e-5
    )
    assert other.tolist() == pytest.approx(same.tolist(), abs=1e-6)


def groups(chat: Any) -> list[Group]:
    out = []
    for number, (question, answers) in enumerate(
        [("hello good", ["yes no", "a b c d"]), ("one", ["two three four", ""])]
    ):
        messages = ({"role": "user", "content": question},)
        ids = [chat.answer_ids(messages, answer) for answer in answers]
        samples = [
            Sample(number, k, tuple(own), (0.0,) * len(own), 0, "stop", chat.text(own)) for k, own in enumerate(ids)
        ]
        out.append(Group(Prompt(str(number), tuple(chat.prompt_ids(messages)), messages), tuple(samples)))
    return out


def by_transformers(folder: Path, rows: list[list[int]]) -> list[float]:
    """The published way: one label of AutoModelForSequenceClassification, one row at a time."""
    model = load_scorer(ModelSource(str(folder), dtype="float32", device="cpu"), seed=3)
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits.item() for ids in rows]


def test_a_reward_model_of_the_policys_tokenizer_reads_the_sampled_ids(folder: Path) -> None:
    chat = chat_format(tiny.tokenizer())
    given = groups(chat)
    got = ModelReward(role(folder), CHAT).score(given).answer
    rows = [list(group.prompt.ids + sample.ids) for group in given for sample in group.samples]
    assert got.tolist() == pytest.approx(by_transformers(folder, rows), abs=1e-5)


def test_a_published_reward_model_reads_the_text_through_its_own_tokenizer(folder: Path) -> None:
    """Its ids are others (the words in reverse), its template too; the policy's ids must not reach it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "user", "assistant", *reversed(tiny.WORDS)]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    own.chat_template = OTHER
    got = ModelReward(role(folder), chat_format(own), same=False).score(groups(chat_format(tiny.tokenizer()))).answer
    texts = ["user hello good <eos> assistant yes no <eos>", "user hello good <eos> assistant a b c d <eos>"]
    texts += ["user one <eos> assistant two three four <eos>", "user one <eos> assistant <eos>"]
    rows = [[words.index(word) for word in text.split()] for text in texts]
    assert got.tolist() == pytest.approx(by_transformers(folder, rows), abs=1e-5)


def test_the_shift_acts_on_the_score(folder: Path) -> None:
    given = groups(chat_format(tiny.tokenizer()))
    plain, moved = (
        ModelReward(role(folder), CHAT).score(given).answer,
        ModelReward(role(folder, shift=-1.0), CHAT).score(given).answer,
    )
    assert moved.tolist() == pytest.approx((plain - 1).tolist(), abs=1e-6)


def test_a_dense_reward_model_scores_every_token_and_sums_to_the_answer(folder: Path) -> None:
    given = groups(chat_format(tiny.tokenizer()))
    scores = ModelReward(role(folder), CHAT, dense=True).score(given)
    assert scores.token is not None
    assert [len(one) for one in scores.token] == [3, 5, 4, 1]
    rows = [list(group.prompt.ids + sample.ids) for group in given for sample in group.samples]
    first = by_transformers(
        folder, [rows[0][: len(rows[0]) - 2 + k] for k in range(3)]
    )  # the prefixes that end in each token
    assert scores.token[0].tolist() == pytest.approx(first, abs=1e-5)
    assert scores.answer[0].item() == pytest.approx(sum(first), abs=1e-5)


def test_several_rewards_are_told_apart_and_only_dense_ones_keep_their_places(folder: Path) -> None:
    given = groups(chat_format(tiny.tokenizer()))
    helpful = Weighted("helpful", ModelReward(role(folder), CHAT, dense=True), 0.5)
    polite = Weighted("polite", FunctionReward(lambda prompts, completions, **_: [1.0, 2.0, 3.0, 4.0]), 2.0)
    named, dense, step, _ = score_all([helpful, polite], given)
    assert list(named) == ["helpful", "polite"]
    assert named["polite"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert dense.shape == (4, 5)
    assert dense.sum(1).tolist() == pytest.approx((0.5 * named["helpful"]).tolist(), abs=1e-6)
    assert step.sum(1).tolist() == [3, 5, 4, 1]


def test_a_dense_reward_model_with_steps_scores_their_last_tokens_and_the_answers_end_alone(folder: Path) -> None:
    given, word = groups(chat_format(tiny.tokenizer())), tiny.tokenizer().convert_tokens_to_ids
    ends = {word("b"), word("three")}
    every = ModelReward(role(folder), CHAT, dense=True).score(given)
    scores = ModelReward(role(folder), CHAT, dense=True, ends=ends.__contains__).score(given)
    assert every.token is not None
    assert scores.token is not None
    assert scores.ends is not None
    steps = [
        [0, 0, 1],
        [0, 1, 0, 0, 1],
        [0, 1, 0, 1],
        [1],
    ]  # yes no <end> | a b c d <end> | two three four <end> | <end>
    assert [one.int().tolist() for one in scores.ends] == steps
    for got, whole, step, answer in zip(scores.token, every.token, steps, scores.answer.tolist(), strict=True):
        assert got.tolist() == pytest.approx((whole * torch.tensor(step)).tolist(), abs=1e-6)
        assert answer == pytest.approx(float(got.sum()), abs=1e-6)
    _, dense, step, _ = score_all(
        [Weighted("steps", ModelReward(role(folder), CHAT, dense=True, ends=ends.__contains__))], given
    )
    assert step.int().tolist() == [[*one, *[0] * (5 - len(one))] for one in steps]
    assert not dense[~step].any()


def test_a_tokenizer_is_read_from_the_folder(folder: Path) -> None:
    assert load_tokenizer(ModelSource(str(folder))).get_vocab() == tiny.tokenizer().get_vocab()
