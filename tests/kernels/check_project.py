"""Products and sums of squares: the kernel against ``kinds.linalg``."""

from __future__ import annotations

import pytest
import torch

from lightning_memopt.kernels.project import project, rmatmul
from lightning_memopt.kernels.stack import Stack
from lightning_memopt.kinds import linalg
from lightning_memopt.kinds.batch import Batch
from tests._compare import TOLERANCE, assert_equal, relative_error
from tests.kernels._interpreter import LAYOUTS, matrices
from tests.kinds.contract.cases import gradient

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# b, m, n, r: single elements, sizes around the tiles, splits of a long row, several blocks of columns.
SIZES = [(1, 1, 1, 1), (5, 3, 17, 3), (2, 17, 33, 4), (1, 65, 33, 24), (2, 33, 65, 33), (1, 2, 300, 3), (1, 3, 5, 130)]
CASES = [
    *((size, F32, "plain") for size in SIZES),
    *(((2, 17, 33, 4), dtype, layout) for dtype in (F32, BF16) for layout in LAYOUTS),
    ((2, 33, 17, 3), F16, "transposed"),
]


def check(parts, stack, r, batch):
    b, m, n = len(stack.addresses), stack.m, stack.n
    right, left = gradient((*batch.shape[:-2], n, r), 7), gradient((*batch.shape[:-1], r), 8)
    found = project(stack, right.reshape(b, n, r), rows=True, columns=True)
    expected = linalg.matmul(batch, right)
    assert relative_error(found.product.view(expected.shape), expected) < 1e-6
    for mine, theirs in (
        (found.rows, linalg.row_square_sums(batch, F32)),
        (found.columns, linalg.column_square_sums(batch, F32)),
    ):
        torch.testing.assert_close(mine.view(theirs.shape), theirs, **TOLERANCE[F32])
    expected = linalg.rmatmul(left, batch)
    assert relative_error(rmatmul(left.reshape(b, m, r), stack).reshape(expected.shape), expected) < 1e-6


@pytest.mark.parametrize(("size", "dtype", "layout"), CASES, ids=str)
def test_equals_the_functions_of_linalg(size, dtype, layout):
    b, m, n, r = size
    parts = matrices(b, (m, n), dtype, layout)
    check(parts, Stack.of(parts), r, Batch(parts))


def test_large_stacks_take_several_launches(monkeypatch):
    """What columns need for partial sums stays bounded."""
    parts, right = matrices(5, (70, 9), F32), gradient((5, 9, 2), 1)
    expected = project(Stack.of(parts), right, rows=True, columns=True)
    monkeypatch.setattr("lightning_memopt.kernels.project.SCRATCH", 2 * 2 * 4 * 70)
    found = project(Stack.of(parts), right, rows=True, columns=True)
    for name in ("product", "rows", "columns"):
        assert_equal(getattr(found, name), getattr(expected, name))


def test_of_stacks_of_matrices():
    parts = matrices(2, (3, 5, 7), F32)
    check(parts, Stack.of(parts), 2, Batch(parts))


def test_of_transposed_and_negated_matrices():
    parts = matrices(2, (5, 7), F32)
    check(parts, Stack.of(parts, negated=True).mT, 3, Batch(parts, negated=True).mT)


def test_right_may_be_strided():
    parts, right = matrices(2, (5, 7), F32), gradient((2, 3, 7), 1).mT
    assert_equal(project(Stack.of(parts), right).product, project(Stack.of(parts), right.contiguous()).product)


def test_only_what_is_asked_for():
    stack = Stack.of(matrices(2, (5, 7), F32))
    assert [name for name, value in vars(project(stack, rows=True)).items() if value is not None] == ["rows"]
    assert [name for name, value in vars(project(stack, columns=True)).items() if value is not None] == ["columns"]
    whole, alone = project(stack, gradient((2, 7, 3), 1), rows=True), project(stack, gradient((2, 7, 3), 1))
    assert_equal(whole.product, alone.product)
    assert alone.rows is None
    assert alone.columns is None


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_nothing_sums_to_zero(shape):
    m, n = shape
    stack = Stack.of(matrices(2, shape, F32))
    found = project(stack, torch.ones(2, n, 3), rows=True, columns=True)
    assert_equal(found.product, torch.zeros(2, m, 3))
    assert_equal(found.rows, torch.zeros(2, m, 1))
    assert_equal(found.columns, torch.zeros(2, 1, n))
    assert_equal(rmatmul(torch.ones(2, m, 3), stack), torch.zeros(2, n, 3).mT)


def test_rank_zero():
    assert_equal(project(Stack.of(matrices(2, (3, 4), F32)), torch.ones(2, 4, 0)).product, torch.zeros(2, 3, 0))


def test_equal_inputs_give_equal_bits():
    stack, right = Stack.of(matrices(2, (17, 70), F32)), gradient((2, 70, 3), 1)
    one, two = (project(stack, right, rows=True, columns=True) for _ in range(2))
    for name, value in vars(one).items():
        assert_equal(value, vars(two)[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e15, 1e-15, 1e-45], ids=str)
def test_unusual_numbers_are_those_of_linalg(value):
    parts = matrices(1, (3, 5), F32)
    parts[0][1, 2] = value
    stack, right = Stack.of(parts), gradient((1, 5, 2), 1)
    found = project(stack, right, rows=True, columns=True)
    for mine, theirs in (
        (found.product, linalg.matmul(Batch(parts), right)),
        (found.rows, linalg.row_square_sums(Batch(parts), F32)),
        (found.columns, linalg.column_square_sums(Batch(parts), F32)),
    ):
        torch.testing.assert_close(mine, theirs, **TOLERANCE[F32], equal_nan=True)


@pytest.mark.parametrize("scale", [1e-18, 1e15], ids=str)
def test_scales_far_from_one(scale):
    parts = [part * scale for part in matrices(2, (5, 7), F32)]
    right = gradient((2, 7, 2), 1)
    found = project(Stack.of(parts), right, rows=True)
    assert relative_error(found.product, linalg.matmul(Batch(parts), right)) < 1e-6
    assert relative_error(found.rows, linalg.row_square_sums(Batch(parts), F32)) < 1e-6


def test_what_cannot_be_a_stack():
    one = torch.zeros(3, 4)
    assert Stack.fits([one, torch.zeros(3, 4)])
    assert not Stack.fits([one.double()])
    assert not Stack.fits([one[0]])
    assert not Stack.fits([one, torch.zeros(4, 3).mT]), "strides differ"
    assert Stack.fits([torch.zeros(1, 4), torch.zeros(4, 1).mT]), "the stride of a single row means nothing"
