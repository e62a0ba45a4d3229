"""Data records passed between components, and the conversion of text to tensors. Names are imported when they are first used,
since reading files needs no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whet.data.batching import dealt, epoch_batches, micro_batches, minibatches, order, pad_ids, take_elements
    from whet.data.chat import PLAIN, Chat, chat_format, extras_of
    from whet.data.columns import COLUMNS, Column, measured
    from whet.data.fields import numbers
    from whet.data.read import iterate_rows, read_rows
    from whet.data.rows import Reader, ranks_of
    from whet.data.store import Store, lengths_of
    from whet.data.types import (
        Batch,
        Element,
        Group,
        HasWeights,
        Labeled,
        Pair,
        Prompt,
        Ranking,
        Row,
        Sample,
        Segment,
        Stepped,
        Unpaired,
        Weights,
        pad,
        pad_support,
    )
    from whet.data.values import Located

_HOMES = {
    "whet.data.batching": (
        "dealt",
        "epoch_batches",
        "micro_batches",
        "minibatches",
        "order",
        "pad_ids",
        "take_elements",
    ),
    "whet.data.chat": (
        "PLAIN",
        "Chat",
        "chat_format",
        "extras_of",
    ),
    "whet.data.columns": (
        "COLUMNS",
        "Column",
        "measured",
    ),
    "whet.data.fields": ("numbers",),
    "whet.data.read": (
        "iterate_rows",
        "read_rows",
    ),
    "whet.data.rows": (
        "Reader",
        "ranks_of",
    ),
    "whet.data.store": (
        "Store",
        "lengths_of",
    ),
    "whet.data.types": (
        "Batch",
        "Element",
        "Group",
        "HasWeights",
        "Labeled",
        "Pair",
        "Prompt",
        "Ranking",
        "Row",
        "Sample",
        "Segment",
        "Stepped",
        "Unpaired",
        "Weights",
        "pad",
        "pad_support",
    ),
    "whet.data.values": ("Located",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "COLUMNS",
    "PLAIN",
    "Batch",
    "Chat",
    "Column",
    "Element",
    "Group",
    "HasWeights",
    "Labeled",
    "Located",
    "Pair",
    "Prompt",
    "Ranking",
    "Reader",
    "Row",
    "Sample",
    "Segment",
    "Stepped",
    "Store",
    "Unpaired",
    "Weights",
    "chat_format",
    "dealt",
    "epoch_batches",
    "extras_of",
    "iterate_rows",
    "lengths_of",
    "measured",
    "micro_batches",
    "minibatches",
    "numbers",
    "order",
    "pad",
    "pad_ids",
    "pad_support",
    "ranks_of",
    "read_rows",
    "take_elements",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The names of this package."""
    if name not in _HOME:
        raise AttributeError(f"module 'whet.data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
