"""A learner that computes in bfloat16 keeps float32 weights, and whatever else it keeps in float32."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from models import helpers as h

from whet.data import Batch
from whet.errors import CheckpointError
from whet.learner.base import LearnerContext, LearnerOptions
from whet.learner.local import LocalLearner
from whet.methods import online
from whet.methods.compose import SFT
from whet.methods.options import Optim
from whet.models.load import checkpoint_activations
from whet.models.roles import Role

FINE = Optim(lr=1e-5, schedule="constant", max_grad_norm=1e30, weight_decay=0.0)
COARSE = Optim(lr=0.01, schedule="constant", max_grad_norm=1e30)


def roles(dtype: torch.dtype = torch.float32, kind: str = "llama") -> dict[str, Role]:
    return {"policy": h.policy(kind, dtype=dtype)}


def learner(cast: dict[str, Role] | None = None, *, bf16: bool = True, optim: Optim = COARSE, **given: Any) -> Any:
    cast = roles() if cast is None else cast
    optims = {name: optim for name, role in cast.items() if role.trained}
    return LocalLearner(cast, optims, bf16=bf16, **({"total": 10, "budget": 40} | given))


def batch() -> Batch:
    return Batch.of(h.rows())


def work(given: Batch | None = None, terms: Any = SFT.terms) -> list:
    given = batch() if given is None else given
    return [(term, given, given.counts()) for term in terms]


def nll(model: Any) -> float:
    """The mean of -log pi over all trained tokens, by transformers' forward of each row alone."""
    total, count = 0.0, 0
    for row in h.rows():
        with torch.no_grad():
            logits = model(row.ids[None]).logits[0].double()
        logp = logits.log_softmax(-1)[row.start - 1 : -1].gather(1, row.ids[row.start :, None])[:, 0]
        total, count = total - float(logp[row.mask].sum()), count + int(row.mask.sum())
    return total / count


def test_small_updates_move_the_float32_weights_and_are_lost_in_bfloat16() -> None:
    """A step of 1e-5 is a hundredth of what a weight of 0.2 is rounded to in bfloat16 (8 bits)."""
    master, pure = learner(optim=FINE), learner(roles(torch.bfloat16), bf16=False, optim=FINE)
    moved = []
    for own in (master, pure):
        before = h.weights(own)["policy"]
        own.update(work())
        after = h.weights(own)["policy"]
        large = {key: value.abs() > 0.1 for key, value in before.items() if ".layers." in key and value.ndim == 2}
        steps = torch.cat([(after[key].float() - before[key].float())[place].abs() for key, place in large.items()])
        assert {value.dtype for value in after.values()} == {next(iter(before.values())).dtype}
        moved.append(float((steps > 0).float().mean()))
        assert float(steps.max()) < 0.1 * 2**-8
    assert moved[0] > 0.99
    assert moved[1] == 0.0
    states = [value for pairs in master._optimizers.values() for one, _ in pairs for value in one.state.values()]
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}
    assert {p.grad.dtype for p in master.roles["policy"].parameters().values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_the_loss_is_that_of_autocast_and_near_that_of_float32(kind: str) -> None:
    own, plain = learner(roles(kind=kind), budget=1), learner(roles(kind=kind), bf16=False, budget=1)
    got, exact = sum(own.evaluate(work()).losses.values()), sum(plain.evaluate(work()).losses.values())
    with torch.autocast("cpu", torch.bfloat16):
        expected = nll(own.roles["policy"].model)
    assert got == pytest.approx(expected, rel=1e-6)
    assert exact == pytest.approx(nll(own.roles["policy"].model), rel=1e-6)
    assert got == pytest.approx(exact, rel=1e-2)
    assert got != pytest.approx(exact, rel=1e-5)
    own.update(work())
    plain.update(work())
    ours, theirs = h.gradients(own)["policy"], h.gradients(plain)["policy"]
    assert 1e-4 * theirs.norm() < (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_ratio_is_exactly_1_on_policy(packed: bool, checkpointing: bool) -> None:
    """Measured and updated in the same precision, and an equal reference agrees to the bit."""
    cast = roles() | {"reference": h.policy("llama", dtype=torch.float32, name="reference")}
    if checkpointing:
        checkpoint_activations(cast["policy"].model)
    own = learner(cast, packed=packed)
    given = own.measure(batch(), frozenset({"old_logp", "ref_logp"}))
    given = given.with_columns(advantage=torch.ones_like(given["old_logp"]))
    step = own.update(work(given, online("reinforce").terms))
    (now,) = step.now.values()
    assert torch.equal(now["logp"], given["old_logp"])
    assert torch.equal(given["ref_logp"], given["old_logp"])


def test_recomputed_activations_give_the_same_gradient() -> None:
    """The layers are computed again in the backward pass, which runs outside of autocast."""
    own, again = learner(), learner()
    checkpoint_activations(again.roles["policy"].model)
    for one in (own, again):
        one.update(work())
    assert torch.equal(h.gradients(own)["policy"], h.gradients(again)["policy"])


def test_a_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, resumed = learner(), learner()
    whole.update(work())
    whole.save(tmp_path)
    resumed.load(tmp_path)
    for own in (whole, resumed):
        own.update(work())
    h.equal_weights(h.weights(whole), h.weights(resumed))
    masters = h.weights(whole)["policy"].values()
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters)


@pytest.mark.parametrize(("was", "now"), [(True, False), (False, True)])
def test_a_checkpoint_of_another_precision_is_refused(tmp_path: Path, was: bool, now: bool) -> None:
    learner(bf16=was).save(tmp_path)
    own = learner(bf16=now)
    before = h.weights(own)
    name = "bf16" if was else "float32"
    with pytest.raises(CheckpointError, match=rf"computed in {name} so far.*--learner\.precision {name}"):
        own.load(tmp_path)
    h.equal_weights(before, h.weights(own))


def test_adapters_train_in_it_too_and_their_base_is_the_reference() -> None:
    cast = h.trunk("llama")
    own = learner(cast)
    given = own.measure(batch(), frozenset({"old_logp", "ref_logp", "old_value"}))
    assert torch.equal(given["ref_logp"], given["old_logp"])
    before = h.weights(own)
    assert float(own.update(work()).grad_norm["policy"]) > 0
    assert {p.dtype for p in cast["policy"].parameters().values()} == {torch.float32}
    assert not torch.equal(
        *(next(v for k, v in one["policy"].items() if "lora_B" in k) for one in (before, h.weights(own)))
    )


def test_other_programs_are_told_to_compare_within_half_precision() -> None:
    assert learner().low_precision
    assert not learner(bf16=False).low_precision


@pytest.mark.parametrize(
    ("precision", "half", "expected"),
    [("auto", True, True), ("auto", False, False), ("bf16", False, True), ("float32", True, False)],
)
@pytest.mark.parametrize("adapter", ["local", "ddp", "fsdp", "zero2"])
def test_every_backend_takes_the_precision(adapter: str, precision: Any, half: bool, expected: bool) -> None:
    from whet.learner.base import LEARNERS

    found = LEARNERS.find(adapter)
    context = LearnerContext(adapter, half=half)
    options = found.options(precision=precision)
    assert isinstance(options, LearnerOptions)
    assert found.make(options, context).keywords["bf16"] is expected


def test_float32_is_the_default_here() -> None:
    """Numbers on a CPU keep their bits."""
    options = LearnerOptions()
    assert not options.in_bf16(LearnerContext())
    assert not options.tf32
    assert not LocalLearner(roles(), {"policy": COARSE}, total=1).roles["policy"].autocast
    assert tiny.causal_lm("llama").dtype == torch.float32
