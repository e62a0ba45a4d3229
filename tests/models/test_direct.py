"""The decoder that reads the weights of a standard decoder: the numbers of the model's own forward, whoever enters or leaves."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from whet.models.decode import Cached, Decoder, Recomputed, decoder
from whet.models.direct import Direct
from whet.models.probe import probe
from whet.models.roles import Role
from whet.models.structure import structure

from . import helpers as h

IDS = [row.ids for row in h.rows()]


def direct(role: Role) -> Direct:
    parts = structure(role)
    assert parts is not None
    return Direct(role, parts)


def expected(role: Role, rows: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return torch.stack([h.full_logits(role.model, torch.tensor(row))[-1] for row in rows])


class Followed:
    """A decoder, and the rows that it should have."""

    def __init__(self, role: Role, steps: Decoder) -> None:
        self.role, self.steps, self.rows = role, steps, list[list[int]]()
        self.stream = torch.Generator().manual_seed(4)

    def check(self, got: Tensor, rows: list[list[int]]) -> None:
        torch.testing.assert_close(got, expected(self.role, rows).to(got), rtol=1e-5, atol=2e-5)

    def enter(self, prompts: list[list[int]], owner: list[int]) -> None:
        new = [list(prompts[one]) for one in owner]
        self.check(self.steps.enter(prompts, torch.tensor(owner)), new)
        self.rows += new

    def keep(self, rows: list[int]) -> None:
        self.steps.keep(torch.tensor(rows, dtype=torch.long))
        self.rows = [list(self.rows[row]) for row in rows]

    def grow(self, count: int = 1) -> None:
        for _ in range(count):
            tokens = torch.randint(2, 27, (len(self.rows),), generator=self.stream)
            for row, token in zip(self.rows, tokens.tolist(), strict=True):
                row.append(token)
            got = self.steps.next(tokens)
        self.check(got, self.rows)


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
MODELS: dict[str, Any] = {
    "qwen3": lambda: h.policy(dtype=torch.float32),
    "llama": lambda: h.policy("llama", dtype=torch.float32),
    "biased": lambda: biased(),
    "one group": lambda: h.policy("llama", dtype=torch.float32, num_key_value_heads=1),
    "scaled rotary": lambda: h.policy("llama", dtype=torch.float32, rope_parameters=LINEAR),
}


def biased() -> Role:
    role = h.policy("llama", dtype=torch.float32, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in role.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    return role


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["direct", "recomputed"])
def test_rows_enter_and_leave_and_the_logits_stay_those_of_the_plain_forward(name: str, kind: str) -> None:
    role = MODELS[name]()
    with torch.no_grad(), role.sampling():
        run = Followed(role, direct(role) if kind == "direct" else Recomputed(role))
        run.enter([[5, 6], [3, 4, 6, 7, 8], [9, 2]], [0, 0, 1, 2, 1])
        run.grow(3)
        run.keep([4, 1, 3])
        run.grow(2)
        run.enter([[7] * 30, [8]], [1, 0, 1])  # longer than what there is, and shorter
        run.grow(50)
        run.keep([0, 5, 2])
        run.grow(30)  # over the end of what was allocated
        run.enter([[3, 5, 4]], [0, 0])
        run.keep([4, 3])  # slots before the first row are given up
        run.grow(2)
        run.keep([])
        run.enter([[3, 5]], [0])
        run.grow(2)


def test_one_sequence_is_scored_as_the_plain_forward_does() -> None:
    role = h.policy(dtype=torch.float32)
    with torch.no_grad(), role.sampling():
        got = direct(role).every(IDS[-1])
        torch.testing.assert_close(got, h.full_logits(role.model, IDS[-1]), rtol=1e-5, atol=2e-5)


def test_adapters_are_part_of_the_weights_and_only_of_their_role() -> None:
    roles = h.trunk()
    with torch.no_grad():
        for name, parameter in roles["policy"].parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    out = {}
    for name in ("policy", "reference"):
        role = roles[name]
        with torch.no_grad(), role.sampling():
            run = Followed(role, direct(role))
            run.enter([[5, 6, 7]], [0])
            run.grow(3)
            out[name] = expected(role, run.rows)
    assert not torch.allclose(out["policy"], out["reference"], atol=1e-2)


def test_wide_products_are_by_pieces_with_the_same_numbers() -> None:
    role = h.policy(dtype=torch.float32, vocabulary=2500)
    with torch.no_grad(), role.sampling():
        run = Followed(role, direct(role))
        run.enter([[5, 6, 7]], [0, 0])
        run.grow(2)


def moved(**changes: Any) -> Role:
    return h.policy("llama", dtype=torch.float32, **changes)


def strange() -> Role:
    """A standard decoder by its structure, whose activations are doubled on the way."""
    role = h.policy("llama", dtype=torch.float32)

    class Doubled(type(role.model.model.layers[0])):  # type: ignore[misc]
        def forward(self, *args: Any, **given: Any) -> Any:
            return super().forward(*args, **given) * 2

    role.model.model.layers[0].__class__ = Doubled
    return role


def test_the_probe_notes_what_is_right(capsys: Any) -> None:
    kinds = {"qwen3": True, "llama": True, "gpt2": False}
    for kind, right in kinds.items():
        role = h.policy(kind, dtype=torch.float32)
        probe(role, IDS, cached=True)
        assert (role.paths.cache, role.paths.decode) == (True, right)
        with role.sampling():
            assert isinstance(decoder(role), Direct if right else Cached)
            assert isinstance(decoder(role, "cached"), Cached)
            assert isinstance(decoder(role, "recomputed"), Recomputed)
    assert not capsys.readouterr().err


def test_a_structure_that_matches_with_other_numbers_is_said_and_left_off(capsys: Any) -> None:
    role = strange()
    probe(role, IDS, cached=True)
    assert (role.paths.cache, role.paths.decode) == (True, False)
    assert capsys.readouterr().err.count("decoding on its weights differs") == 1


@pytest.mark.parametrize(
    "role",
    [
        pytest.param(lambda: Role("policy", h.gemma2(dtype=torch.float32), True), id="capped, sliding window"),
        pytest.param(lambda: sliding(), id="a window far beyond the rows that are tried"),
        pytest.param(lambda: moved(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), id="dynamic"),
    ],
)  # fmt: skip
def test_what_may_differ_beyond_the_rows_that_are_tried_is_left_to_its_own_modules(role: Any, capsys: Any) -> None:
    own = role()
    probe(own, IDS, cached=True)
    assert own.paths.decode is False
    assert not capsys.readouterr().err


def sliding() -> Role:
    from transformers import AutoModelForCausalLM, MistralConfig

    given = tiny.config("llama").to_dict()
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    config = MistralConfig(**{name: given[name] for name in names}, sliding_window=4096, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    return Role("policy", AutoModelForCausalLM.from_config(config).eval(), True)


def test_in_bfloat16_it_decodes_within_rounding(capsys: Any) -> None:
    for dtype, half in ((torch.bfloat16, False), (torch.float32, True)):
        role = h.policy(dtype=dtype)
        role.compute_in(half)
        probe(role, IDS, cached=True)
        assert role.paths.decode
    assert not capsys.readouterr().err
