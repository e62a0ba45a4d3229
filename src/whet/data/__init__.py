"""Data records passed between components, and the conversion of text to tensors."""

from whet.data.batching import dealt, epoch_batches, micro_batches, minibatches, order, pad_ids, take_elements
from whet.data.chat import PLAIN, Chat, chat_format, extras_of
from whet.data.columns import COLUMNS, Column, measured
from whet.data.read import read_rows
from whet.data.rows import Reader, numbers, ranks_of
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
    "Unpaired",
    "Weights",
    "chat_format",
    "dealt",
    "epoch_batches",
    "extras_of",
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
