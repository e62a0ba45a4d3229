"""Counter-based random numbers: each number is a pure function of a key and an index.

There is no generator state, so a resumed run, a repeated step and a run on other workers draw the same numbers.
The hash is the finalizer of splitmix64 (Steele, Lea and Flood 2014), applied to each part of the address in turn.
"""

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def address(*parts: int | str) -> int:
    """Return a 64-bit key for one use of random numbers in a run, for example `address(seed, "order", epoch)`.

    The parts are integers or strings. Their order matters, and 1 differs from "1".
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _signed(word: int) -> int:
    word &= _WORD
    return word - (1 << 64) if word >= 1 << 63 else word


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts are arithmetic; the mask makes this one logical


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    return x ^ _shift(x, 31)


def uniform(key: int, *places: Tensor) -> Tensor:
    """Return uniform numbers in [0, 1), float64, one for each entry of the broadcast integer tensors `places`.

    The number at (i, j, ...) depends only on `key` and on `places[0][i, j, ...]`, `places[1][i, j, ...]`, ...

    >>> rows, columns = torch.arange(3)[:, None], torch.arange(4)
    >>> torch.equal(uniform(7, rows, columns)[1:2, 2:3], uniform(7, torch.tensor([[1]]), torch.tensor([2])))
    True
    """
    state = torch.tensor(_signed(key), dtype=torch.int64, device=places[0].device)
    for place in places:
        state = _mix(state + (place.long() + 1) * _signed(_GOLDEN))
    return _shift(_mix(state), 11).double() * 2.0**-53


def permutation(key: int, count: int) -> Tensor:
    """Return a random permutation of 0 ... count - 1 for this key, (count,) int64."""
    return torch.argsort(uniform(key, torch.arange(count)), stable=True)
