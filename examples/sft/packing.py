"""Several examples in one row of tokens, each of which sees only itself."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from examples.sft.chat import Example

IGNORED = -100  # the label of tokens without a loss, as in transformers and `torch.nn.functional.cross_entropy`


def pack(examples: Iterable[Example], seq_len: int, pad: int, *, multiple: int = 1) -> dict[str, Tensor]:
    """Return rows of examples, filled in the given order.

    Positions start at 0 in every example. Models from transformers take that as the border of a sequence if they get
    neither an attention mask nor a cache: their attention then is block-diagonal. Every token of padding has position
    0, so it is a sequence of its own.

    Args:
        examples: Examples of at most ``seq_len`` tokens each.
        seq_len: Tokens per row.
        pad: The token that fills up rows.
        multiple: The number of rows is made a multiple of this, with rows of padding.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``, each ``[rows, seq_len]``. Labels are -100 outside of answers.
    """
    rows: list[list[Example]] = []
    room = 0
    for example in examples:
        if len(example) > room:
            rows.append([])
            room = seq_len
        rows[-1].append(example)
        room -= len(example)
    rows += [[] for _ in range(-len(rows) % multiple)]
    packed = {
        "input_ids": torch.full((len(rows), seq_len), pad),
        "position_ids": torch.zeros(len(rows), seq_len, dtype=torch.long),
        "labels": torch.full((len(rows), seq_len), IGNORED),
    }
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            border, end = start + len(example.prompt), start + len(example)
            packed["input_ids"][number, start:end] = torch.tensor(example.prompt + example.answer)
            packed["labels"][number, border:end] = torch.tensor(example.answer)
            packed["position_ids"][number, start:end] = torch.arange(end - start)
            start = end
    return packed
