"""Bytes of storages: each counts once, whatever looks at it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.memory.storages import Storages
from tests.memory._tensors import TwoParts


def test_a_view_counts_all_of_its_storage_once():
    whole = torch.zeros(1000)
    storages = Storages()
    assert storages.count([whole[10:20]]) == 4000
    assert storages.count([whole, whole[:500].view(50, 10), whole.detach(), whole.view(torch.int32)]) == 0
    assert Storages().count([whole, whole]) == 4000


def test_two_tensors_of_one_buffer_count_once():
    buffer = bytearray(64)
    first = torch.frombuffer(buffer, dtype=torch.uint8)
    assert Storages().count([first, first[32:].view(torch.float32)]) == 64
    flat = torch.zeros(12)
    assert Storages().count(flat.split(5)) == 48


def test_an_expanded_tensor_counts_what_is_there():
    assert Storages().count([torch.zeros(1).expand(1000)]) == 4
    assert Storages().count([torch.zeros(0), torch.zeros(3, 0)]) == 0
    assert Storages().count([]) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8, torch.complex64, torch.bool])
def test_every_dtype_counts_its_bytes(dtype):
    assert Storages().count([torch.zeros(10, dtype=dtype)]) == 10 * torch.zeros(1, dtype=dtype).element_size()


def test_what_was_freed_is_not_taken_for_what_is_new():
    """Storages are told apart by address, and the same address may come back: but not while the tensors live."""
    kept = [torch.zeros(100) for _ in range(50)]
    assert Storages().count(kept) == 50 * 400


def test_a_tensor_of_two_tensors_counts_both():
    codes, scale = torch.zeros(100, dtype=torch.uint8), torch.zeros(7)
    storages = Storages()
    assert storages.count([TwoParts(codes, scale)]) == 128
    assert storages.count([codes, scale, TwoParts(codes, torch.zeros(2))]) == 8, "the codes were counted before"
    nested = TwoParts(TwoParts(torch.zeros(10), torch.zeros(1)), torch.zeros(3))
    assert Storages().count([nested]) == 56


def test_a_sparse_tensor_counts_its_indices_and_values():
    """As the gradient of `nn.Embedding(sparse=True)`, which SparseAdam takes."""
    layer = nn.Embedding(50, 6, sparse=True)
    layer(torch.tensor([3, 7, 9, 11])).sum().backward()
    assert Storages().count([layer.weight.grad]) == 4 * 8 + 4 * 6 * 4
    assert lm.take_snapshot([], layer).memory.gradients == 4 * 8 + 4 * 6 * 4


def test_meta_tensors_count_what_they_would_take():
    first = torch.zeros(100, device="meta")
    storages = Storages()
    assert storages.count([first, first[:3]]) == 400
    assert storages.count([torch.zeros(10, device="meta")]) == 40
