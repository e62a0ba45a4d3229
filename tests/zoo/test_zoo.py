"""Every causal architecture: losses, packing, sampling, ratios and exports equal what transformers and peft compute."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import helpers as h
from torch import Tensor

from whet.data import Batch, Row
from whet.errors import ModelError
from whet.generate import Request
from whet.generate.local import LocalGenerator
from whet.learner.local import LocalLearner
from whet.loops import evaluate
from whet.methods import compose
from whet.methods.options import LoRA, Sampling
from whet.models import lora
from whet.models.probe import probe
from whet.models.readers import read
from whet.models.roles import Role

from . import table

CLOSE = 1e-4
"""Rounding in float32, in nats or logits; logits of the tiny models are of size 1 to 30."""
ROWS = [h.row(seed, prompt, answer) for seed, prompt, answer in ((1, 4, 9), (2, 3, 5), (3, 6, 14), (4, 2, 6))]
PROMPTS = [h.prompt(number, ids) for number, ids in enumerate([(2, 9, 4), (3, 4, 6, 7, 8, 9, 4, 4, 3), (10, 11, 5, 2)])]

everyone = [
    pytest.param(kind, marks=() if kind in table.SHORT else pytest.mark.long)
    for kind in table.kinds()
    if kind not in table.BOTH_WAYS
]


def role_of(kind: str) -> Role:
    return Role("policy", table.model(kind), True)


def own_logps(model: Any, row: Row) -> Tensor:
    """transformers' own log-probs of the tokens of one row after the first: (S - 1,)."""
    return h.full_logits(model, row.ids).log_softmax(-1)[:-1].gather(1, row.ids[1:, None])[:, 0]


@pytest.mark.parametrize("kind", everyone)
def test_an_architecture_is_trained_and_sampled_as_its_own_forward_says(kind: str, capsys: Any) -> None:
    role = role_of(kind)
    probe(role, [row.ids for row in ROWS])
    loss_is_its_own(role)
    packing_is_right_or_left_off(kind)
    greedy_is_its_own(role)
    ratio_is_one(role)
    assert role.paths.padding
    assert role.paths.cache is (kind not in table.UNCACHED)
    assert ("answers are generated without one, which is slow" in capsys.readouterr().err) == (kind in table.UNCACHED)


def loss_is_its_own(role: Role) -> None:
    """The model's own loss of each row, with -100 on its prompt, weighted by the tokens that it counts."""
    total, count = 0.0, 0
    shifted = role.model.config.model_type in table.UNSHIFTED
    more = {"output_router_logits": False} if hasattr(role.model.config, "output_router_logits") else {}
    for row in ROWS:
        labels = row.ids.clone()
        labels[: row.start] = -100
        labels = torch.cat([labels[1:], torch.tensor([-100])]) if shifted else labels
        with torch.no_grad():
            own = role.model(input_ids=row.ids[None], labels=labels[None], use_cache=False, **more).loss
        total, count = total + float(own) * row.response, count + row.response
    learner = LocalLearner({"policy": role}, {"policy": h.FREE}, total=1, budget=40)
    got = evaluate.held_out(learner, compose.SFT, ROWS)
    assert next(iter(got.values())) == pytest.approx(total / count, abs=CLOSE)


def packing_is_right_or_left_off(kind: str) -> None:
    role = role_of(kind)
    probe(role, [row.ids for row in ROWS], packed=True)
    print("PATHS", kind, role.paths.packing, role.paths.sharing, role.paths.window)
    tails = [Row(torch.cat([row.ids[: row.start], row.ids[row.start :].flip(0)]), row.start, row.mask) for row in ROWS]
    rows = [*ROWS, *tails]
    with torch.no_grad():
        got = read(role, Batch.of(rows), frozenset({"logp"}), packed=True, shared=True)["logp"]
    for row, logp in zip(rows, got, strict=True):
        torch.testing.assert_close(
            logp[: row.response], own_logps(role.model, row)[row.start - 1 :], rtol=CLOSE, atol=CLOSE
        )


def greedy_is_its_own(role: Role) -> None:
    """Each token of a greedy answer is the most probable one after a full forward without a cache."""
    asked = [Request(prompt, draw, 0, Sampling(8, 0.0), 3) for draw, prompt in enumerate(PROMPTS)]
    for sample in LocalGenerator(role, (1,), str).generate(asked):
        ids = list(PROMPTS[sample.draw].ids)
        for token in sample.ids:
            logits = h.full_logits(role.model, torch.tensor(ids))[-1]
            assert logits[token] >= logits.max() - CLOSE
            ids.append(token)
        assert sample.ids[-1] == 1 or len(sample.ids) == 8


def ratio_is_one(role: Role) -> None:
    """What is measured before an update is, bit for bit, what the update computes with gradient."""
    learner = LocalLearner({"policy": role}, {"policy": h.FREE}, total=1, budget=40)
    batch = learner.measure(Batch.of(ROWS), frozenset({"old_logp"}))
    result = learner.forward_backward([(term, batch, batch.counts()) for term in compose.SFT.terms])
    (now,) = (columns["logp"] for columns in result.now.values())
    assert bool(batch["old_logp"].any())
    assert torch.equal(now, batch["old_logp"])


@pytest.mark.parametrize("kind", sorted(table.BOTH_WAYS))
def test_what_looks_both_ways_is_refused(kind: str) -> None:
    with pytest.raises(ModelError, match="no causal language model"):
        probe(role_of(kind), [row.ids for row in ROWS])


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")  # peft, when it unties to merge
@pytest.mark.parametrize(
    "kinds",
    [table.SHORT, pytest.param(tuple(k for k in table.kinds() if k not in table.BOTH_WAYS), marks=pytest.mark.long)],
    ids=["short", "all"],
)
def test_exports_of_all_load_in_a_fresh_process(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """Plain, and with an adapter that is merged: the logits of the reloaded folder are those of the role before."""
    ids = ROWS[2].ids
    expected: dict[str, Tensor] = {}
    for kind in kinds:
        role = role_of(kind)
        expected[str(tmp_path / kind)] = h.full_logits(role.model, ids)
        role.export(tmp_path / kind)
        adapted = with_adapter(kind)
        with adapted.active():
            expected[str(tmp_path / f"{kind}-merged")] = h.full_logits(adapted.model, ids)
        adapted.export(tmp_path / f"{kind}-merged")
    given = tmp_path / "given.pt"
    torch.save({"ids": ids[None], "folders": list(expected)}, given)
    subprocess.run([sys.executable, str(Path(__file__).parent / "load.py"), str(given)], check=True)
    got = torch.load(f"{given}.out")
    wrong = {}
    for folder, logits in expected.items():
        if isinstance(got[folder], str):
            wrong[folder] = got[folder]
        elif not torch.allclose(got[folder], logits, rtol=CLOSE, atol=CLOSE):
            wrong[folder] = f"off by {float((got[folder] - logits).abs().max()):.2g}"
    assert not wrong, "\n".join(f"{Path(folder).name}: {why}" for folder, why in wrong.items())


def with_adapter(kind: str) -> Role:
    """The architecture with LoRA whose B is not 0, on its linear layers, as far as its forward calls them."""
    model = table.model(kind)
    wrapped = lora.attach(
        model, LoRA(rank=2, alpha=4.0, targets=table.TARGETS.get(kind, "all-linear")), ("policy",), seed=5
    )
    role, called = Role("policy", model, True, wrapped=wrapped, adapter="policy"), set()
    for _, module in model.named_modules():
        if hasattr(module, "lora_B"):
            module.register_forward_hook(lambda module, *_: called.add(module))
    with role.active():
        h.full_logits(model, ROWS[0].ids)
    assert called
    with torch.no_grad():
        for number, module in enumerate(one for one in model.modules() if one in called):
            generator = torch.Generator().manual_seed(number)
            module.lora_B["policy"].weight.normal_(std=0.1, generator=generator)
    return role
