"""What every learner promises; another adapter is one more entry of ADAPTERS."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from models import helpers as h

from whet.data import Batch
from whet.errors import CheckpointError, RunStopped
from whet.learner.local import LocalLearner
from whet.methods import Term, online, part
from whet.methods.compose import SFT
from whet.methods.options import Optim
from whet.models.roles import Role
from whet.ops import reinforce, token_mean

ADAPTERS: dict[str, Callable[..., Any]] = {"local": LocalLearner}
"""Each takes (roles, optims, total, ...) and is a Learner with `roles` to look into."""

OPTIM = Optim(lr=0.02, schedule="constant", max_grad_norm=1e30)


@pytest.fixture(params=ADAPTERS)
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    adapter = ADAPTERS[request.param]

    def build(roles: dict[str, Role] | None = None, optim: Optim = OPTIM, **options: Any) -> Any:
        roles = {"policy": h.policy()} if roles is None else roles
        return adapter(
            roles, {n: optim for n, role in roles.items() if role.trained}, **({"total": 10, "budget": 40} | options)
        )

    return build


def batch(*, nan: bool = False) -> Batch:
    out = Batch.of(h.rows())
    advantage = torch.linspace(-1, 1, out["mask"].numel(), dtype=torch.float64).reshape(out["mask"].shape)
    return out.with_columns(advantage=advantage.masked_fill(out["mask"], torch.nan) if nan else advantage)


def work(given: Batch | None = None, terms: tuple[Term, ...] = SFT.terms) -> list:
    given = batch() if given is None else given
    return [(term, given, given.counts()) for term in terms]


def all_roles() -> dict[str, Role]:
    return {"policy": h.policy(), "reference": h.policy(name="reference", seed=1), "critic": h.scorer(seed=2)}


def nll(model: Any) -> float:
    """The mean over all trained tokens of -log pi, by transformers' own forward."""
    total, count = 0.0, 0
    for row in h.rows():
        logp = (
            h.full_logits(model, row.ids)
            .log_softmax(-1)[row.start - 1 : -1]
            .gather(1, row.ids[row.start :, None])[:, 0]
        )
        total, count = total - float(logp[row.mask].sum()), count + int(row.mask.sum())
    return total / count


# --- measure, update, evaluate, publish ------------------------------------------------------------------------------


def test_measured_columns_are_each_roles_own(make: Any) -> None:
    own = make(all_roles())
    got = own.measure(batch(), frozenset({"old_logp", "old_entropy", "ref_logp", "old_value", "final_value"}))
    for number, row in enumerate(got.rows):
        for role, column in (("policy", "old_logp"), ("reference", "ref_logp")):
            logp = h.full_logits(own.roles[role].model, row.ids).log_softmax(-1)[row.start - 1 : -1]
            expected = logp.gather(1, row.ids[row.start :, None])[:, 0] * row.mask
            torch.testing.assert_close(got[column][number, : row.response], expected, rtol=1e-10, atol=1e-10)
    assert not any(got[name].requires_grad for name in got.columns)
    assert got["final_value"].shape == (9,)
    assert set(make(all_roles()).measure(batch(), frozenset({"old_logp"})).columns) - set(batch().columns) == {
        "old_logp"
    }


def test_measuring_and_evaluating_change_nothing(make: Any) -> None:
    own = make(all_roles(), dropout=0.3)
    before, version = h.weights(own), own.version
    own.measure(batch(), frozenset({"old_logp", "old_value"}))
    first, second = own.evaluate(work()), own.evaluate(work())
    h.equal_weights(before, h.weights(own))
    assert own.version == version == first.version
    assert first.losses == second.losses  # dropout is off
    assert not first.grad_norm


def test_a_rehearsal_changes_nothing(make: Any) -> None:
    """It goes before the first update, whose bits stay the same."""
    plain, own = make(all_roles()), make(all_roles())
    before = h.weights(own)
    own.rehearse(batch(), {"policy": frozenset({"logp", "entropy"}), "critic": frozenset({"value"})})
    h.equal_weights(before, h.weights(own))
    assert own.version == 0
    assert own.update(work()).losses == plain.update(work()).losses
    h.equal_weights(h.weights(plain), h.weights(own))


def test_evaluation_gives_the_loss_by_transformers_own_forward(make: Any) -> None:
    own = make()
    step = own.evaluate(work())
    assert sum(step.losses.values()) == pytest.approx(nll(own.roles["policy"].model), rel=1e-9)
    assert own.update(work()).losses == pytest.approx(step.losses, rel=1e-9)


def test_an_update_lowers_the_loss_and_counts_the_version(make: Any) -> None:
    own = make(optim=replace(OPTIM, lr=0.003))
    losses = []
    for version in range(1, 6):
        step = own.update(work())
        assert step.version == own.version == own.publish().version == version
        losses.append(sum(step.losses.values()))
    assert losses == sorted(losses, reverse=True)
    assert step.lr == {"policy": pytest.approx(0.003)}


def test_what_was_read_comes_back_in_the_order_of_the_rows(make: Any) -> None:
    own = make()
    expected = own.measure(batch(), frozenset({"old_logp"}))["old_logp"]
    for given in (own.evaluate(work()), own.update(work())):
        assert torch.equal(given.now["train"]["logp"], expected)
        assert not given.now["train"]["logp"].requires_grad


def test_only_the_roles_of_the_work_move(make: Any) -> None:
    own = make(all_roles())
    before = h.weights(own)
    own.update(work())
    after = h.weights(own)
    h.equal_weights({k: before[k] for k in ("reference", "critic")}, {k: after[k] for k in ("reference", "critic")})
    assert not torch.equal(*(one["policy"]["model.norm.weight"] for one in (before, after)))


@pytest.mark.parametrize("limit", [0.1, 1e9])
def test_the_gradient_is_clipped_per_role_to_its_norm(make: Any, limit: float) -> None:
    own, free = make(optim=replace(OPTIM, max_grad_norm=limit)), make()
    step, plain = own.update(work()), free.update(work())
    norm = h.gradients(free)["policy"].norm()
    assert step.grad_norm["policy"] == pytest.approx(float(norm), rel=1e-6) == plain.grad_norm["policy"]
    assert float(h.gradients(own)["policy"].norm()) == pytest.approx(min(limit, float(norm)), rel=1e-5)


def test_gradients_do_not_pile_up_from_update_to_update(make: Any) -> None:
    own = make(optim=replace(OPTIM, lr=1e-30))
    own.update(work())
    first = h.gradients(own)["policy"]
    own.update(work())
    assert torch.equal(h.gradients(own)["policy"], first)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_loss_that_is_no_number_stops_before_any_weight_moves(make: Any, kind: str) -> None:
    own = make(optim=replace(OPTIM, kind=kind))
    own.update(work())
    before = h.weights(own)
    bad = (Term("policy", "train", part(reinforce), token_mean),)
    with pytest.raises(RunStopped, match=r"update 1: the loss of policy/train/reinforce is nan"):
        own.update(work(batch(nan=True), bad))
    h.equal_weights(before, h.weights(own))
    assert own.version == 1
    own.update(work())  # and the next good one goes on
    assert all(value.isfinite().all() for value in h.weights(own)["policy"].values())


def test_blend_mixes_by_hand(make: Any) -> None:
    own = make({"policy": h.policy(), "ema": h.policy(name="ema", seed=1)})
    before = h.weights(own)
    own.blend("ema", "policy", 0.25)
    for key, value in h.weights(own)["ema"].items():
        torch.testing.assert_close(
            value, 0.75 * before["ema"][key] + 0.25 * before["policy"][key], rtol=1e-14, atol=1e-16
        )
    own.blend("ema", "policy", 1.0)
    h.equal_weights({"x": h.weights(own)["ema"]}, {"x": before["policy"]})


def test_dropout_acts_in_updates_by_seed_and_version(make: Any) -> None:
    def loss(**given: Any) -> list[float]:
        own = make(optim=replace(OPTIM, lr=1e-30), **given)
        return [sum(own.update(work()).losses.values()) for _ in range(2)]

    plain, one, again, other = loss(), loss(dropout=0.3, seed=1), loss(dropout=0.3, seed=1), loss(dropout=0.3, seed=2)
    assert plain[0] == plain[1]
    assert one == again
    assert len({*one, *other, plain[0]}) == 5


@pytest.mark.parametrize("options", [{"budget": 1}, {"budget": 10**6}, {"packed": True}], ids=str)
def test_dropout_gives_the_same_gradient_however_the_batch_is_split(make: Any, options: dict[str, Any]) -> None:
    base, other = make(dropout=0.3, seed=1), make(dropout=0.3, seed=1, **options)
    base.update(work())
    other.update(work())
    ours, theirs = h.gradients(base)["policy"], h.gradients(other)["policy"]
    assert (ours - theirs).norm() < 1e-6 * ours.norm()


# --- the optimizers --------------------------------------------------------------------------------------------------


def adamw_by_hand(value: Any, gradients: list, optim: Optim, factors: list[float]) -> Any:
    """Loshchilov and Hutter 2019, algorithm 2, in plain tensors."""
    m, v = torch.zeros_like(value), torch.zeros_like(value)
    (b1, b2), decay = optim.betas, optim.weight_decay if value.ndim > 1 else 0.0
    for t, (g, factor) in enumerate(zip(gradients, factors, strict=True), 1):
        value = value * (1 - optim.lr * factor * decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        value = value - optim.lr * factor * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + optim.eps)
    return value


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_adamw_steps_by_hand_with_decay_on_matrices_alone(make: Any, kind: str) -> None:
    optim = Optim(
        lr=0.01,
        weight_decay=0.3,
        betas=(0.8, 0.9),
        eps=1e-6,
        max_grad_norm=1e30,
        schedule="linear",
        warmup_ratio=0.25,
        min_lr_ratio=0.2,
    )
    own = make({"policy": h.policy(kind)}, optim, total=8)
    before, gradients = h.weights(own)["policy"], []
    for _ in range(3):
        own.update(work())
        gradients.append({key: p.grad.clone() for key, p in own.roles["policy"].parameters().items()})
    factors = [1 / 3, 2 / 3, 1.0]  # a quarter of eight updates rises; then linearly down from 1
    assert any(value.ndim == 1 for value in before.values())
    for key, value in h.weights(own)["policy"].items():
        expected = adamw_by_hand(before[key], [one[key] for one in gradients], optim, factors)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def test_muon_trains_the_matrices_inside_the_layers_and_adamw_the_rest(make: Any) -> None:
    optim = Optim(lr=0.01, kind="muon", muon_lr=0.05, weight_decay=0.1, max_grad_norm=1e30, schedule="constant")
    own = make({"policy": h.policy("llama")}, optim)
    before, gradients = h.weights(own)["policy"], []
    for _ in range(2):
        own.update(work())
        gradients.append({key: p.grad.clone() for key, p in own.roles["policy"].parameters().items()})
    kinds = set()
    for key, value in h.weights(own)["policy"].items():
        matrix = ".layers." in key and value.ndim == 2
        kinds.add((matrix, value.ndim))
        if matrix:
            twin = torch.nn.Parameter(before[key].clone())
            torch_muon = torch.optim.Muon([twin], lr=0.05, weight_decay=0.1)
            for one in gradients:
                twin.grad = one[key].clone()
                torch_muon.step()
            expected = twin.detach()
        else:
            expected = adamw_by_hand(before[key], [one[key] for one in gradients], optim, [1.0, 1.0])
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    assert kinds == {(True, 2), (False, 2), (False, 1)}


@pytest.mark.parametrize(
    ("optim", "total", "factors"),
    [
        (Optim(schedule="constant"), 4, [1, 1, 1, 1]),
        (Optim(schedule="constant", warmup_ratio=0.5), 6, [0.25, 0.5, 0.75, 1, 1, 1]),
        (Optim(schedule="linear", min_lr_ratio=0.0), 4, [1, 0.75, 0.5, 0.25]),
        (Optim(schedule="linear", min_lr_ratio=0.2), 4, [1, 0.8, 0.6, 0.4]),
        (Optim(schedule="cosine", min_lr_ratio=0.0), 4, [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
        (Optim(schedule="cosine", min_lr_ratio=0.1), 2, [1, 0.55]),
    ],
)
def test_the_schedule_by_hand(make: Any, optim: Optim, total: int, factors: list[float]) -> None:
    assert [optim.factor(update, total) for update in range(total)] == pytest.approx(factors)
    own = make(optim=replace(optim, lr=0.001), total=total)
    assert [own.update(work()).lr["policy"] for _ in range(total)] == pytest.approx(
        [0.001 * factor for factor in factors]
    )


def test_each_role_has_its_own_optimizer() -> None:
    roles = all_roles()
    optims = {"policy": OPTIM, "critic": replace(OPTIM, lr=0.005, max_grad_norm=0.01)}
    own = LocalLearner(roles, optims, total=4)
    given = own.measure(batch(), frozenset({"old_logp", "old_value"}))
    given = given.with_columns(returns=given["old_value"] + 1)
    step = own.update([(term, given, given.counts()) for term in online("ppo").terms])
    assert step.lr == {"policy": 0.02, "critic": 0.005}
    assert float(h.gradients(own)["critic"].norm()) == pytest.approx(0.01, rel=1e-3)
    assert float(h.gradients(own)["policy"].norm()) == pytest.approx(step.grad_norm["policy"], rel=1e-9)


# --- save, load, export ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_two_more_updates_after_save_and_load_are_those_of_the_uninterrupted_run(
    make: Any, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    def fresh(seed: int) -> Any:
        roles = {"policy": h.policy(dtype=dtype, seed=seed), "ema": h.policy(dtype=dtype, name="ema", seed=3)}
        return make(roles, replace(OPTIM, kind=kind, schedule="cosine", weight_decay=0.1), dropout=0.1, seed=5)

    def go(own: Any) -> None:
        for _ in range(2):
            own.update(work())
            own.blend("ema", "policy", 0.3)

    whole = fresh(0)
    go(whole)
    whole.save(tmp_path)
    go(whole)
    resumed = fresh(8)
    resumed.load(tmp_path)
    assert resumed.version == 2
    go(resumed)
    h.equal_weights(h.weights(whole), h.weights(resumed))
    assert all(path.suffix in (".safetensors", ".json") for path in tmp_path.rglob("*") if path.is_file())


def test_adapters_on_a_trunk_are_saved_and_loaded(make: Any, tmp_path: Path) -> None:
    own, again = make(h.trunk()), make(h.trunk())
    own.update(work())
    own.save(tmp_path)
    again.load(tmp_path)
    h.equal_weights(h.weights(own), h.weights(again))
    own.update(work())
    again.update(work())
    h.equal_weights(h.weights(own), h.weights(again))


@pytest.mark.parametrize("what", ["one number", "two swapped"])
def test_a_frozen_role_that_changed_is_refused(make: Any, tmp_path: Path, what: str) -> None:
    own, again = make(all_roles()), make(all_roles())
    own.save(tmp_path)
    with torch.no_grad():
        weight = again.roles["reference"].model.get_input_embeddings().weight
        if what == "one number":
            weight[3, 4] += 1e-6
        else:
            weight[[3, 4]] = weight[[4, 3]]
    with pytest.raises(CheckpointError, match="frozen weights of the reference differ from those"):
        again.load(tmp_path)


def test_the_base_under_an_adapter_that_changed_is_refused(make: Any, tmp_path: Path) -> None:
    """On a trunk the reference is the base; another base is another reference, and another policy too."""
    own, again = make(h.trunk()), make(h.trunk(seed=1))
    own.save(tmp_path)
    with pytest.raises(CheckpointError):
        again.load(tmp_path)


def test_another_model_is_refused(make: Any, tmp_path: Path) -> None:
    make().save(tmp_path)
    with pytest.raises(CheckpointError, match="parameters of the policy differ"):
        make({"policy": h.policy("llama")}).load(tmp_path)


def test_another_optimizer_is_refused(make: Any, tmp_path: Path) -> None:
    own = make()
    own.update(work())
    own.save(tmp_path)
    with pytest.raises(CheckpointError):
        make(optim=replace(OPTIM, kind="muon")).load(tmp_path)


def test_an_exported_folder_is_read_by_other_tools(make: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = make({"policy": h.policy(dtype=torch.float32)})
    own.update(work())
    own.export("policy", tmp_path, tiny.tokenizer())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert nll(model) == pytest.approx(sum(own.evaluate(work()).losses.values()), rel=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 27
