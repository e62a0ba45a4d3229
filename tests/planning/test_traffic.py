"""Bytes that travel, worked by hand for a shape of 1352 parameters on four workers."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from whet.errors import RecipeError
from whet.planning import Layout, Network, Shape, Traffic, traffic

SMALL = Shape("llama", hidden=8, layers=2, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocabulary=10)
P, SHARE = 1352, 3 / 4


def layout(engine: Any, **options: Any) -> Layout:
    return Layout(engine, 4, **options)


@pytest.mark.parametrize(
    ("engine", "options", "gathered", "reduced"),
    [
        ("ddp", {}, 0, 0),
        ("zero1", {}, 0, 0),
        ("zero2", {"low_precision": True}, 0, 2 * P),
        ("zero3", {"low_precision": True}, 2 * 2 * P, 2 * P),  # 3 x 2 P: Rajbhandari et al. 2020
        ("fsdp", {"low_precision": True}, 2 * 2 * P, 4 * P),
        ("fsdp", {}, 4 * 2 * P, 4 * P),
    ],
)
def test_a_micro_batch(engine: Any, options: dict, gathered: float, reduced: float) -> None:
    assert traffic.micro_batch(SMALL, layout(engine, **options), P) == Traffic(SHARE * gathered, SHARE * reduced)


@pytest.mark.parametrize(
    ("engine", "options", "gathered", "reduced"),
    [
        ("ddp", {}, 0, 2 * 4 * P),
        ("zero1", {"low_precision": True}, 2 * P, 2 * P),
        ("zero2", {"low_precision": True}, 2 * P, 0),
        ("zero3", {}, 0, 0),
        ("fsdp", {}, 0, 0),
    ],
)
def test_an_update(engine: Any, options: dict, gathered: float, reduced: float) -> None:
    assert traffic.update(layout(engine, **options), P) == Traffic(SHARE * gathered, SHARE * reduced)


def test_over_one_micro_batch_sharded_engines_move_what_the_paper_says() -> None:
    """Rajbhandari et al. 2020, section 7: plain data parallelizm and ZeRO-1 and -2 move 2 numbers a parameter, ZeRO-3 3."""

    def numbers(engine: Any) -> float:
        one = traffic.micro_batch(SMALL, layout(engine), P) + traffic.update(layout(engine), P)
        return one.total / (4 * P * SHARE)

    assert [numbers(engine) for engine in ("ddp", "zero1", "zero2", "zero3")] == [2, 2, 2, 3]


def test_adapters_move_their_own_gradients_but_all_weights() -> None:
    one = traffic.micro_batch(SMALL, layout("fsdp"), 100, held=2)
    assert one == Traffic(SHARE * 2 * 2 * P, SHARE * 400)


def test_a_forward_gathers_once() -> None:
    assert traffic.forward(SMALL, layout("zero3", low_precision=True)).gathered == SHARE * 2 * P
    assert traffic.forward(SMALL, layout("zero2", low_precision=True)).gathered == 0


def test_pushes() -> None:
    network = Network(inside=1000.0, between=100.0, host=200.0, per_node=8)
    sent = partial(traffic.push, SMALL, network=network, bytes_each=2)
    whole = sent(layout=layout("fsdp"), engines=8, tensor_parallel=2, route="broadcast")
    assert (whole.received, whole.everywhere, whole.gathered) == (2 * P, 2 * P * 16, SHARE * 2 * P)
    assert whole.seconds == pytest.approx(SHARE * 2.704 + 27.04)  # gathered within a node, sent between nodes
    near = sent(layout=layout("ddp"), engines=4, route="broadcast")
    assert (near.gathered, near.seconds, near.held) == (0, pytest.approx(2.704), 0)
    files = sent(layout=layout("ddp"), engines=4)
    assert files.seconds == pytest.approx(2 * 13.52)  # written and read; all on one node
    assert files.held == 3 * 2 * P
    assert sent(layout=Layout(), engines=1, direct=True).held == 2 * P
    assert (
        traffic.push(replace(SMALL, vocabulary=10**7), Layout(), network, engines=1, direct=True).held == traffic.CHUNK
    )
    far = sent(layout=layout("ddp"), engines=8, tensor_parallel=2)
    assert far.seconds == pytest.approx(2 * 13.52 + 2 * 27.04)  # 4 + 16 GPUs are three nodes
    assert sent(layout=layout("ddp"), engines=4, shared=True).seconds == files.seconds
    light = traffic.push(SMALL, layout("ddp"), network, engines=4, adapters=50)
    assert (light.received, light.everywhere) == (200, 800)
    assert traffic.push(SMALL, layout("fsdp"), network, engines=4, shared=True, route="handles").everywhere == 0


def test_rings_over_nodes_use_all_cards_of_a_node() -> None:
    network = Network(inside=300.0, between=25.0, per_node=8)
    assert (network.ring(8), network.ring(16)) == (300, 200)
    assert Network(inside=100.0, between=25.0).ring(64) == 100


def test_columns() -> None:
    assert traffic.columns(layout("fsdp"), rows=6, tokens=10, count=2) == SHARE * 4 * 6 * 10 * 2


@pytest.mark.parametrize("name", ["inside", "between", "host", "per_node"])
def test_a_network_that_stands_still_is_told(name: str) -> None:
    with pytest.raises(RecipeError, match=f"network.{name}: above 0; got 0"):
        Network(**{name: 0})
