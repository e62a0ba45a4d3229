"""Elements in an Arrow file: what is read is what was written, bit by bit, for every kind of element."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from whet.data import Batch, Labeled, Pair, Ranking, Row, Stepped, Store, Unpaired, lengths_of, store

from .helpers import bits

KINDS = ("row", "pair", "ranking", "labeled", "unpaired", "stepped")


def row(rng: random.Random) -> Row:
    length = rng.randint(2, 30)
    start = rng.randint(1, length - 1)
    mask = torch.tensor([rng.random() < 0.6 for _ in range(length - start)])
    return Row(torch.tensor([rng.randrange(150_000) for _ in range(length)]), start, mask)


def element(kind: str, rng: random.Random) -> Any:
    if kind == "row":
        return row(rng)
    if kind == "pair":
        return Pair(row(rng), row(rng), rng.random(), rng.uniform(-1e6, 1e6))
    if kind == "ranking":
        count = rng.randint(2, 9)
        return Ranking(tuple(row(rng) for _ in range(count)), tuple(rng.randint(1, count) for _ in range(count)))
    if kind == "labeled":
        return Labeled(row(rng), rng.choice([0.1, -3.4e38, 1e-45, 2.0]))
    if kind == "unpaired":
        return Unpaired(row(rng), row(rng), rng.random() < 0.5)
    own = row(rng)
    ends = torch.tensor([rng.random() < 0.3 for _ in range(own.response)])
    return Stepped(own, torch.where(ends, torch.rand(own.response), 0.0), ends)


def stored(path: Path, elements: list[Any]) -> Store:
    with path.open("wb") as file:
        store.write(file, elements)
    return Store(path)


@pytest.mark.parametrize("tokens", [1, 100, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_each_element_is_read_as_it_was_written(
    kind: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BATCH_TOKENS", tokens)  # record batches of one element, of some, and of all
    rng = random.Random(kind)
    elements = [element(kind, rng) for _ in range(50)]
    found = stored(tmp_path / "a.arrow", elements)
    assert len(found) == 50
    assert bits(list(found)) == bits(elements)
    assert bits(found[7:31:3]) == bits(elements[7:31:3])
    assert bits(found[-1]) == bits(elements[-1])
    assert lengths_of(found).tolist() == lengths_of(elements).tolist()
    picked = [rng.randrange(50) for _ in range(20)]
    assert bits([found[one] for one in picked]) == bits([elements[one] for one in picked])
    columns, expected = Batch.of(found[:9]).columns, Batch.of(elements[:9]).columns
    assert columns.keys() == expected.keys()
    assert all(bits(columns[name]) == bits(expected[name]) for name in columns)


def test_an_index_outside_is_an_error(tmp_path: Path) -> None:
    found = stored(tmp_path / "a.arrow", [element("pair", random.Random(0)) for _ in range(3)])
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"^element {index} of 3$"):
            found[index]


def test_an_element_keeps_nothing_of_the_file_and_can_be_changed(tmp_path: Path) -> None:
    elements = [element("row", random.Random(0)) for _ in range(3)]
    found = stored(tmp_path / "a.arrow", elements)
    found[1].ids.fill_(7)
    assert bits(found[1]) == bits(elements[1])


def test_the_length_of_an_element_is_that_of_its_longest_row(tmp_path: Path) -> None:
    short, long = (Row(torch.arange(size), 1, torch.ones(size - 1, dtype=torch.bool)) for size in (3, 8))
    elements = [Pair(short, long), Pair(short, short), Pair(long, short)]
    assert lengths_of(elements).tolist() == [8, 3, 8]
    assert stored(tmp_path / "a.arrow", elements).lengths().tolist() == [8, 3, 8]


def test_no_element_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no element"):
        stored(tmp_path / "a.arrow", [])
