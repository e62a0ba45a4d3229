"""Signs of divergence in the metrics, each said once; rollouts that are skipped because all answers are masked."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from models import helpers as h

from loops.helpers import cast, go, learner_of, loop_state, method_of, rollout
from whet.errors import RunStopped
from whet.loops.divergence import Divergence
from whet.loops.record import read_metrics
from whet.methods.options import Sampling, Truncated

BASE = {"kl": 0.5, "length": 10.0, "entropy": 2.0, "truncated": 0.1, "score": 1.0, "score_std": 0.5}
CRITIC = "loss/critic/rollout/value_loss"
CASES: list[tuple[list[dict[str, float]], int | None, str, bool]] = [
    # the metrics of each step beside BASE, the step in which a sign is found, its text, whether it is fatal
    ([{"kl": 29.0}] * 4, None, "", True),
    ([{}, {"kl": 31.0}, {"kl": 31.0}], 3, "the KL to the reference is 3.10 nats per token (31 per answer)", True),
    ([{}, {"kl": 31.0}, {}, {"kl": 31.0}, {}], None, "", True),
    ([{"kl": 81.0}], 1, "the policy runs away from it", True),
    ([{}, {"entropy": 0.041}, {"entropy": 0.041}], None, "", True),
    ([{}, {"entropy": 0.039}, {"entropy": 0.039}], 3, "the entropy of the policy is 0.039 nats per token, and was 2", True),
    ([{"entropy": 0.09}, {"entropy": 0.0}, {"entropy": 0.0}], None, "", True),
    ([{}, {}, {"truncated": 0.94}, {"truncated": 0.94}], None, "", True),
    ([{}, {}, {"truncated": 0.96}, {"truncated": 1.0}], 4, "100% of the answers reach sampling.max_new_tokens, and 10% did", True),
    ([{"truncated": 1.0}] * 4, None, "", True),
    ([{"score_std": 0.0}] * 4 + [{}] + [{"score_std": 0.0}] * 3, None, "", False),
    ([{"score_std": 0.0}] * 5, 5, "were equal in the last 5 steps (mean 1 now)", False),
    ([{"score_std": 0.0, "zero_spread": 0.9}] * 6, None, "", False),
    ([{"zero_spread": 1.0}] * 5, 5, "were equal in the last 5 steps", False),
    ([{CRITIC: one} for one in (*[9.0] * 10, 308.0, 310.0, 308.0)], None, "", True),
    ([{CRITIC: one} for one in (*[9.0] * 10, 310.0, 310.0, 310.0)], 13, "of the critic is 310, and was at most 9", True),
    ([{CRITIC: one} for one in (*[9.0] * 10, 310.0, 310.0, 5.0, 310.0)], None, "", True),
    ([{CRITIC: one} for one in (0.0, 1000.0, 1000.0, 1000.0, 2000.0)], None, "", True),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "found", "text", "fatal"), CASES)
def test_a_sign_is_found_in_this_step_and_said_once(
    steps: list[dict[str, float]], found: int | None, text: str, fatal: bool
) -> None:
    one, signs = Divergence(), []
    for step, numbers in enumerate(steps, 1):
        signs += [(step, *sign) for sign in one.signs(step, BASE | numbers, answers=32)]
        again = Divergence()
        again.restore(json.loads(json.dumps(one.state())))  # as a resumed run has it
        one = again
    signs += [(0, *sign) for sign in one.signs(len(steps) + 1, BASE | steps[-1], answers=32)]
    if found is None:
        assert signs == []
        return
    ((step, said, ends),) = signs
    assert (step, ends) == (found, fatal)
    assert text in said


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([0.7, 7.4], None),  # 4 (1 + 0.7) above 0.7 is 7.5
        ([0.7, 7.6], 2),
        ([-3.0, -2.0, 10.1], 3),
        ([4.8, 4.0, 16.0, 16.0, 16.0], None),  # the first steps show the scale
        ([0.5] * 10 + [3.6, 3.6, 0.5, 3.6, 3.6], None),
        ([0.5] * 10 + [3.4] * 5, None),
        ([0.5] * 10 + [3.6] * 5, 13),
        ([0.3] * 50 + [1.7] * 50, None),  # a curriculum
    ],
)  # fmt: skip
def test_the_loss_of_an_offline_run_explodes(losses: list[float], found: int | None) -> None:
    one = Divergence()
    steps = [step for step, loss in enumerate(losses, 1) if one.signs(step, {"loss": loss, "lr/policy": 0.5})]
    assert steps == ([] if found is None else [found])


def test_few_answers_say_nothing_about_lengths_and_one_nothing_about_scores() -> None:
    one = Divergence()
    shares = [0.5, 0.5, 0.75, 0.25] * 4 + [1.0] * 15  # 4 answers a step: 64 at the start, then 60 at the limit
    assert not [
        sign for step, share in enumerate(shares, 1) for sign in one.signs(step, BASE | {"truncated": share}, answers=4)
    ]
    assert one.signs(32, BASE | {"truncated": 1.0}, answers=4)
    alone = Divergence()
    assert not [sign for step in range(1, 9) for sign in alone.signs(step, BASE | {"score_std": 0.0}, answers=1)]


def test_the_rate_that_is_named_is_that_of_the_critic() -> None:
    one = Divergence()
    said = [
        one.signs(step, {CRITIC: 1.0 if step < 11 else 99.0, "lr/policy": 1e-6, "lr/critic": 9e-3})
        for step in range(1, 14)
    ]
    ((text, _),) = said[-1]
    assert "too high (now 0.009): lower critic.optim.lr" in text


@pytest.mark.parametrize("batch", [1, 4])
def test_losses_of_mixed_rows_raise_no_alarm(batch: int) -> None:
    """Rows of two kinds, easy and hard, drawn at random: no alarm in 40 runs of 500 steps."""
    draw = random.Random(1)

    def loss() -> float:
        rows = [max(0.02, draw.gauss(0.3, 0.1) if draw.random() < 0.6 else draw.gauss(2.8, 0.6)) for _ in range(batch)]
        return sum(rows) / batch

    alarms = 0
    for _ in range(40):
        one = Divergence()
        alarms += any(one.signs(step, {"loss": loss()}) for step in range(1, 501))
    assert alarms == 0


def test_a_change_of_the_policy_in_one_step() -> None:
    one = Divergence()
    assert one.signs(1, BASE, moved=3.9) == []
    ((text, fatal),) = one.signs(2, BASE | {"lr/policy": 0.01}, moved=float("nan"))
    assert fatal
    assert "(now 0.01): lower optim.lr" in text
    assert one.signs(3, BASE, moved=50.0) == []


def test_a_run_that_diverges_stops_if_it_is_told_to_and_goes_on_otherwise(tmp_path: Path, capsys: Any) -> None:
    method = method_of("ppo")
    for mode in ("warn", "stop"):
        own = learner_of(cast(method), lr=2.0)
        if mode == "warn":
            go(tmp_path / mode, method, learner=own, steps=4, save_every=1, on_divergence=mode)
            continue
        with pytest.raises(
            RunStopped, match=r"step 1: .*The run stops here since train.on_divergence is stop.*stopped/step-0"
        ):
            go(tmp_path / mode, method, learner=own, steps=4, save_every=1, on_divergence=mode)
    assert len(read_metrics(tmp_path / "warn")) == 4
    assert loop_state(tmp_path / "warn")["divergence"]["said"][0] == "moved"
    assert not list((tmp_path / "stop").glob("checkpoints/step-*"))  # nothing was saved after the step that diverged


# --- skipped rollouts --------------------------------------------------------------------------------------------------

MASK = Truncated(rule="mask")


@pytest.mark.parametrize("name", ["ppo", "grpo", "reinforce", "rloo"])
def test_a_rollout_whose_answers_are_all_masked_is_skipped(tmp_path: Path, capsys: Any, name: str) -> None:
    method = method_of(name, truncated=MASK)
    roles = cast(method)
    own = learner_of(roles)
    before = h.weights(own)
    go(tmp_path, method, learner=own, sampling=Sampling(1), end_ids=(), steps=3, save_every=1)
    lines = capsys.readouterr().err.splitlines()
    assert [one for one in lines if "this rollout is skipped" in one] == [
        f"whet: step {step}: all {3 * method.collect.num_generations} answers are truncated and masked (truncated.rule), so no token is "
        "trained; this rollout is skipped and no weight changes"
        for step in (1, 2, 3)
    ]
    after = h.weights(own)
    assert all((before[role][key] == after[role][key]).all() for role in before for key in before[role])
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["truncated"] == 1.0 and "kl" not in row and "entropy" not in row for row in rows)
    assert not any(any(row["mask"]) for row in rollout(tmp_path, 2))
    assert loop_state(tmp_path)["skipped"] == 3


def test_skipped_rollouts_are_bounded_over_resumes_too(tmp_path: Path) -> None:
    method = method_of("grpo", truncated=MASK)
    given: dict[str, Any] = {"sampling": Sampling(1), "end_ids": (), "save_every": 1}
    go(tmp_path, method, steps=4, **given)
    with pytest.raises(
        RunStopped, match=r"step 6: all 9 answers are .* as in the 5 steps before; raise sampling.max_new_tokens"
    ):
        go(tmp_path, method, steps=9, resume=True, **given)
    assert len(read_metrics(tmp_path)) == 5


def test_a_rollout_with_one_whole_answer_is_trained(tmp_path: Path, capsys: Any) -> None:
    """The number of skipped rollouts in a row begins again."""
    method = method_of("grpo", truncated=MASK)
    go(tmp_path, method, sampling=Sampling(3), steps=6, save_every=1)
    rows = read_metrics(tmp_path)
    trained = [any(any(row["mask"]) for row in rollout(tmp_path, step)) for step in range(1, 7)]
    assert any(trained)
    assert [
        ("loss/policy/rollout/clip" in row) or any(name.startswith("loss/") for name in row) for row in rows
    ] == trained
    assert loop_state(tmp_path)["skipped"] == (0 if trained[-1] else trained[::-1].index(True))
