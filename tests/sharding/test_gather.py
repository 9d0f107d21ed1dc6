"""Gathers, in one process: the all-gather is a stand-in that knows the pieces of all ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memopt.sharding import collectives
from lightning_memopt.sharding.collectives import Gather, gather
from lightning_memopt.sharding.layout import Cut, pieces
from tests._compare import assert_equal
from tests.kinds.contract.cases import gradient


class Counting(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_pieces_of_any_length_make_the_whole(monkeypatch):
    cuts = [
        (0, [3, 3, 3, 3]),
        (1, [3, 3, 3, 3]),
        (0, [4, 4, 2, 0]),
        (1, [4, 4, 2, 0]),
        (2, [1, 0, 0, 0]),
        (0, [2, 5, 5, 1]),
        (0, [0, 2, 0, 3]),
    ]
    shapes = [(12, 5), (5, 12), (10, 7), (7, 10), (3, 2, 1), (13,), (5, 1, 3)]
    wholes = [gradient(shape, number) for number, shape in enumerate(shapes)]
    wholes[1], wholes[3] = wholes[1].double(), wholes[3].bfloat16()
    parts = [whole.split(lengths, dim) for whole, (dim, lengths) in zip(wholes, cuts, strict=True)]

    def all_gather(output: Tensor, piece: Tensor, group: str) -> None:
        rows, start = output.view(-1, piece.numel()), 0
        for each in parts:
            for row, part in zip(rows, each, strict=True):
                row[start : start + part.nbytes] = part.contiguous().view(-1).view(torch.uint8)
            start += -(-max(part.nbytes for part in each) // 8) * 8

    monkeypatch.setattr(collectives, "_all_gather", all_gather)
    wanted = [
        Gather(each[0], Cut(dim, tuple(lengths), 0, "A"), whole.nbytes)
        for each, whole, (dim, lengths) in zip(parts, wholes, cuts, strict=True)
    ]
    for found, whole in zip(gather(wanted), wholes, strict=True):
        assert_equal(found, whole)
        assert found.is_contiguous()


@pytest.mark.parametrize("dim", [0, 1])
def test_ranks_add_no_operations(monkeypatch, dim):
    monkeypatch.setattr(collectives, "_all_gather", lambda output, piece, group: None)
    counts = []
    for ranks in (4, 1000):
        cut = Cut(dim, tuple(pieces(1599, ranks)), 0, "A")  # the last piece is shorter, or there are empty ones
        shape = [3, 3]
        shape[dim] = cut.sizes[0]
        with Counting() as counting:
            gather([Gather(torch.zeros(shape), cut, 4 * 3 * 1599)])
        counts.append(counting.count)
    assert counts[1] <= counts[0] + 10
