"""Evaluation: win rates and intervals by hand, held-out numbers against transformers, KL against full forwards."""

from pathlib import Path

import pytest
import tiny
import torch

from whet.data import Prompt, Ranking, Row, chat_format
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.loops import evaluate
from whet.methods import reward
from whet.methods.compose import SFT
from whet.methods.options import Sampling
from whet.models.load import ModelSource, load_scorer
from whet.models.roles import Role


def row(ids: list[int], start: int) -> Row:
    return Row(torch.tensor(ids), start, torch.ones(len(ids) - start, dtype=torch.bool))


def test_a_tie_is_half_a_win() -> None:
    assert evaluate.win_rate([1.0, 2.0, 0.0, 5.0], [0.0, 2.0, 1.0, 4.0])[0] == (1 + 0.5 + 0 + 1) / 4


def test_the_interval_is_that_of_the_normal_law_for_many_values() -> None:
    """300 wins of 400: mean 0.75, standard error sqrt(0.75 x 0.25 / 400) = 0.02165, so 0.7076 to 0.7924."""
    mean, low, high = evaluate.interval([1.0] * 300 + [0.0] * 100)
    assert mean == 0.75
    assert low == pytest.approx(0.7076, abs=0.004)
    assert high == pytest.approx(0.7924, abs=0.004)


def test_the_interval_of_one_number_is_that_number() -> None:
    assert evaluate.interval([2.5] * 7) == (2.5, 2.5, 2.5)


def test_held_out_loss_is_the_mean_over_all_tokens_whatever_the_batches() -> None:
    model = tiny.causal_lm(dtype=torch.float64)
    rows = [row([3, 9, 8, 7], 1), row([3, 10, 11, 12, 13, 6], 2), row([5, 6], 1)]
    total = count = 0.0
    with torch.no_grad():
        for one in rows:
            logp = model(one.ids[None]).logits.log_softmax(-1)[0]
            total -= sum(float(logp[t - 1, one.ids[t]]) for t in range(one.start, one.length))
            count += one.length - one.start
    learner = LocalLearner({"policy": Role("policy", model, False)}, {}, total=1)
    for size in (1, 2, 64):
        found = evaluate.held_out(learner, SFT, rows, batch=size)
        assert found == {"policy/train/nll": pytest.approx(total / count, rel=1e-12)}


def test_accuracy_counts_untied_pairs_and_equal_scores_as_half(tmp_path: Path) -> None:
    model = load_scorer(ModelSource(str(tiny.folder(tmp_path)), dtype="float32", device="cpu"))
    rows = [row([3, 9, token, 6], 2) for token in (7, 8, 9)]
    with torch.no_grad():
        scores = [model(one.ids[None]).logits.item() for one in rows]
    order = sorted(range(3), key=lambda k: -scores[k])
    ranks = [order.index(k) + 1 for k in range(3)]  # just as the model orders them
    elements = [Ranking(tuple(rows), tuple(ranks)), Ranking(tuple(rows), tuple(4 - rank for rank in ranks))]
    elements += [Ranking((rows[0], rows[0]), (1, 2)), Ranking((rows[0], rows[1]), (1, 1))]
    learner = LocalLearner({"reward": Role("reward", model, False)}, {}, total=1)
    found = evaluate.held_out(learner, reward("k_way"), elements)
    assert found["accuracy"] == pytest.approx((3 + 0 + 0.5) / 7)


def test_kl_is_the_difference_of_the_two_models_log_probs_of_the_answer() -> None:
    ours, theirs = tiny.causal_lm(seed=0), tiny.causal_lm(seed=1)
    chat = chat_format(tiny.tokenizer())
    policy, reference = Role("policy", ours, False), Role("reference", theirs, False)
    prompts = [
        Prompt(str(k), tuple(ids), ({"role": "user", "content": "a"},)) for k, ids in enumerate([[3, 9, 4], [3, 4]])
    ]
    groups = evaluate.answers(
        LocalGenerator(policy, chat.end_ids, chat.text), prompts, Sampling(max_new_tokens=6), count=2
    )
    got = evaluate.kl(LocalLearner({"policy": policy, "reference": reference}, {}, total=1), groups)
    expected = []
    for group in groups:
        for sample in group.samples:
            ids, start = torch.tensor(group.prompt.ids + sample.ids), len(group.prompt.ids)
            with torch.no_grad():
                both = [model(ids[None]).logits.log_softmax(-1)[0] for model in (ours, theirs)]
            expected.append(sum(float(both[0][t - 1, ids[t]] - both[1][t - 1, ids[t]]) for t in range(start, len(ids))))
    assert got.tolist() == pytest.approx(expected, abs=1e-4)
