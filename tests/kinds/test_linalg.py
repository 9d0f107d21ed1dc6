from __future__ import annotations

import math

import pytest
import torch

from lightning_memopt.kinds import batch
from lightning_memopt.kinds.batch import chunks, take, take_stack
from lightning_memopt.kinds.linalg import (
    column_square_sums,
    gram,
    matmul,
    orthonormalize,
    rmatmul,
    row_square_sums,
    store_,
)
from lightning_memopt.kinds.noise import Noise
from tests._compare import TOLERANCE, assert_equal, assert_same_projector, relative_error
from tests.kinds.contract.cases import gradient

SHAPES = [(7, 5), (1, 9), (9, 1), (1, 1), (0, 4), (4, 0), (3, 7, 5), (2, 1, 9), (0, 3, 4), (3, 0, 4), (2, 3, 5, 4)]
LIMITS = [1, 3, 8, 40, 1 << 17]


@pytest.fixture(params=LIMITS, ids=lambda limit: f"chunk{limit}")
def chunk(request, monkeypatch):
    monkeypatch.setattr(batch, "CPU_CHUNK", request.param)
    return request.param


# --- chunks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_cover_every_element_once(shape, chunk):
    count = torch.zeros(shape)
    for index in chunks(count):
        count[index] += 1
        assert count[index].ndim == count.ndim, "a chunk keeps all dimensions"
    assert_equal(count, torch.ones(shape))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) < 4], ids=str)
def test_chunks_are_bounded(shape, chunk):
    """At most the limit, or one row where a row alone is larger; a layout has one stack dimension at most."""
    tensor = torch.zeros(shape)
    for index in chunks(tensor):
        assert tensor[index].numel() <= max(chunk, shape[-1])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_take_follows_what_broadcasts(shape, chunk):
    block = gradient(shape, 1)
    for other_shape in (shape, (*shape[:-1], 1), (*shape[:-2], 1, shape[-1]), (*shape[:-2], 1, 1)):
        other, out = gradient(other_shape, 2), torch.zeros(shape)
        for index in chunks(block):
            out[index] = block[index] * take(other, index)
        assert_equal(out, block * other)


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5)], ids=str)
def test_take_stack_gives_whole_matrices(shape, chunk):
    block, right = gradient(shape, 1), gradient((*shape[:-2], 5, 2), 2)
    out = torch.zeros(*shape[:-1], 2)
    for index in chunks(block):
        out[index] = block[index] @ take_stack(right, index)
    torch.testing.assert_close(out, block @ right)


# --- products and sums against float64 -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) < 4], ids=str)
def test_products_equal_the_plain_ones(shape, dtype, chunk):
    matrix = gradient(shape, 1, dtype)
    right, left = gradient((*shape[:-2], shape[-1], 3), 2), gradient((*shape[:-1], 3), 3)
    for actual, expected in (
        (matmul(matrix, right), matrix.double() @ right.double()) if dtype != torch.float64 else (None, None),
        (rmatmul(left, matrix), left.double().mT @ matrix.double()) if dtype != torch.float64 else (None, None),
        (matmul(matrix, right.double()), matrix.double() @ right.double()),
    ):
        if actual is not None:
            assert actual.shape == expected.shape
            assert relative_error(actual, expected) < 1e-6
    assert matmul(matrix, right).dtype == torch.float32
    assert rmatmul(left, matrix).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_square_sums_equal_the_plain_ones(shape, dtype, chunk):
    matrix = gradient(shape, 1, dtype)
    square = matrix.double().square()
    expected_rows, expected_columns = square.sum(-1, keepdim=True), square.sum(-2, keepdim=True)
    tolerance = TOLERANCE[torch.float32]
    for actual, expected in (
        (row_square_sums(matrix, torch.float32), expected_rows),
        (column_square_sums(matrix, torch.float32), expected_columns),
    ):
        torch.testing.assert_close(actual, expected.float(), **tolerance)


@pytest.mark.parametrize("run", [1, 2, 3, 5, 9, 100])
@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (9, 1), (3, 7, 5), (0, 4)], ids=str)
def test_row_square_sums_of_runs(shape, run, chunk):
    matrix = gradient(shape, 1)
    actual = row_square_sums(matrix, torch.float32, run)
    parts = [part.double().square().sum(-1) for part in matrix.split(run, dim=-1)]
    assert actual.shape == (*shape[:-1], math.ceil(shape[-1] / run))
    torch.testing.assert_close(actual, torch.stack(parts, -1).float(), **TOLERANCE[torch.float32])


def test_gram_is_in_float64():
    matrix = gradient((3, 9, 4), 1)
    assert_equal(gram(matrix), matrix.double().mT @ matrix.double())


# --- orthonormalize --------------------------------------------------------------------------------------------------


def orth(matrix):
    return orthonormalize(matrix, gram(matrix))


def identity_error(q):
    square = q.double().mT @ q.double()
    return float((square - torch.eye(q.shape[-1], dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("shape", [(9, 4), (4, 4), (1, 1), (50, 1), (3, 12, 5), (200, 32)], ids=str)
def test_orthonormalize_random(shape):
    matrix = gradient(shape, 1)
    q = orth(matrix)
    assert q.dtype == matrix.dtype
    assert identity_error(q) < 1e-6
    assert_same_projector(q, torch.linalg.qr(matrix.double()).Q)


def test_orthonormalize_zero():
    assert_equal(orth(torch.zeros(2, 6, 3)), torch.zeros(2, 6, 3))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_orthonormalize_rank_deficient(rank):
    """Columns that depend on those before them become zero, the others are orthonormal and span the same."""
    matrix = (gradient((20, rank), 1, torch.float64) @ gradient((rank, 5), 2, torch.float64)).float()
    q = orth(matrix)
    assert_equal(q[:, rank:], torch.zeros(20, 5 - rank))
    assert identity_error(q[:, :rank]) < 1e-6
    assert_same_projector(q, torch.linalg.svd(matrix.double(), full_matrices=False).U[:, :rank])


def test_orthonormalize_more_columns_than_rows():
    q = orth(gradient((3, 5), 1))
    assert_equal(q[:, 3:], torch.zeros(3, 2))
    assert_same_projector(q, torch.eye(3))


def test_orthonormalize_with_a_zero_column():
    matrix = gradient((8, 3), 1)
    matrix[:, 1] = 0
    q = orth(matrix)
    assert_equal(q[:, 1], torch.zeros(8))
    assert_same_projector(q, torch.linalg.qr(matrix[:, [0, 2]].double()).Q)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_orthonormalize_of_any_size(scale):
    matrix = gradient((30, 4), 1, scale=scale)
    q = orth(matrix)
    assert identity_error(q) < 1e-6
    assert_same_projector(q, torch.linalg.qr(matrix.double()).Q)


def test_orthonormalize_badly_scaled_columns():
    """Columns of lengths from 1e-6 to 1e6: each counts, however short."""
    matrix = gradient((40, 7), 1) * 10.0 ** torch.arange(-6, 7, 2)
    q = orth(matrix)
    assert identity_error(q) < 1e-6
    assert_same_projector(q, torch.linalg.qr(matrix.double()).Q)


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-4])
def test_orthonormalize_nearly_parallel_columns(angle):
    """In float64 what is kept is orthonormal to 1e-6 down to the cut-off."""
    one, two = gradient((50, 2), 1, torch.float64).T
    matrix = torch.stack((one, one + angle * two), -1)
    assert identity_error(orth(matrix)) < 1e-6


@pytest.mark.parametrize("angle", [6e-6, 1e-5, 2e-5, 3e-5])
def test_orthonormalize_a_column_that_leans_on_a_dependent_one(angle):
    """The second column hardly differs from the first; what it adds is the third, which must not be lost with it."""
    one, other = torch.linalg.qr(gradient((50, 2), 1, torch.float64)).Q.T
    q = orth(torch.stack((one, one + angle * other, other), -1).float()).double()
    assert identity_error(q[:, q.ne(0).any(0)]) < 1e-5
    assert (q @ (q.T @ other)).norm() > 1 - 1e-6


def test_orthonormalize_adds_over_ranks():
    """The Gram matrix of all rows is all that is needed to orthonormalise a part of them."""
    matrix = gradient((12, 3), 1)
    parts = matrix.split(5)
    total = sum(gram(part) for part in parts)
    torch.testing.assert_close(
        torch.cat([orthonormalize(part, total) for part in parts]), orth(matrix), rtol=1e-6, atol=1e-6
    )


def test_orthonormalize_an_empty_part():
    matrix = gradient((12, 3), 1)
    assert orthonormalize(matrix[:0], gram(matrix)).shape == (0, 3)


# --- stochastic rounding ---------------------------------------------------------------------------------------------


def noise(target, seed=0):
    return Noise.of(seed, tuple(target.shape), (0,) * target.ndim)


def test_store_same_dtype_copies():
    target, value = torch.zeros(5), gradient((5,), 1)
    store_(target, value, noise(target))
    assert_equal(target, value)
    value[0] = 7
    assert target[0] != 7, "a copy, not a view"


def test_store_onto_itself_is_nothing():
    target = gradient((5,), 1)
    store_(target, target.view(5))
    assert_equal(target, gradient((5,), 1))


def test_store_keeps_what_bfloat16_can_represent():
    value = torch.cat(
        (gradient((1000,), 1, torch.bfloat16), torch.tensor([0.0, -0.0, 1e-40, 3e38], dtype=torch.bfloat16))
    )
    for seed in range(5):
        target = torch.zeros_like(value)
        store_(target, value.float(), noise(target, seed))
        assert_equal(target, value)
        assert_equal(target.signbit(), value.signbit())


def test_store_keeps_what_is_not_finite():
    value = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0])
    target = torch.zeros(4, dtype=torch.bfloat16)
    store_(target, value, noise(target))
    assert_equal(target, value.bfloat16())


def test_store_near_the_largest_number_stays_a_number_or_infinity():
    value = torch.full((1000,), torch.finfo(torch.float32).max)
    target = torch.zeros(1000, dtype=torch.bfloat16)
    store_(target, value, noise(target))
    assert not target.isnan().any()
    assert (target > 0).all()


@pytest.mark.parametrize("value", [1 / 3, -1 / 3, 1e-30, -7.77e20, 1.0 + 2**-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_store_rounds_without_bias(value, dtype):
    """The two neighbours occur with the probabilities whose mean is the value: a binomial count, to 5 sigma."""
    count = 40_000
    values = torch.full((count,), value, dtype=dtype)
    target = torch.zeros(count, dtype=torch.bfloat16)
    store_(target, values, noise(target, 3))
    neighbours = target.double().unique()
    assert len(neighbours) == 2
    low, high = neighbours.tolist()
    assert low < value < high
    assert high - low <= 2**-7 * abs(value)
    upper = (value - low) / (high - low)
    found = float((target.double() == high).double().mean())
    assert abs(found - upper) < 5 * math.sqrt(upper * (1 - upper) / count) + 2**-16


def test_store_is_repeatable():
    value = gradient((1000,), 1)
    one, two, other = (torch.zeros(1000, dtype=torch.bfloat16) for _ in range(3))
    store_(one, value, noise(one, 1))
    store_(two, value, noise(two, 1))
    store_(other, value, noise(other, 2))
    assert_equal(one, two)
    assert not torch.equal(one, other)


def test_store_works_on_parts_and_transposes():
    value = gradient((6, 8), 1)
    target = torch.zeros(8, 6, dtype=torch.bfloat16)
    whole = Noise.of(5, (6, 8), (0, 0))
    store_(target.mT[:3], value[:3], whole)
    store_(target.mT[3:], value[3:], whole.part((slice(3, 6),)))
    torch.testing.assert_close(target.mT.float(), value, rtol=2**-7, atol=0)
    again = torch.zeros(6, 8, dtype=torch.bfloat16)
    store_(again, value, whole)
    assert_equal(target.mT, again, "rounded the same in parts and as a whole")


def test_noise_depends_on_the_position_only():
    whole = Noise.of(3, (4, 6, 10), (0, 0, 0))
    bits = whole.bits((4, 6, 10), torch.device("cpu"))
    part = whole.part((slice(1, 3), slice(2, 5))).bits((2, 3, 10), torch.device("cpu"))
    assert_equal(part, bits[1:3, 2:5])
    assert_equal(Noise.of(3, (4, 6, 10), (2, 3, 4)).bits((2, 3, 6), torch.device("cpu")), bits[2:, 3:, 4:])


def test_noise_is_uniform_and_uncorrelated():
    """Means, correlations of neighbours and of seeds, and single bits, to 5 sigma."""
    size = 1 << 16
    for seed in (0, 1, 2**62 + 12345):
        bits = Noise.of(seed, (256, 256), (0, 0)).bits((256, 256), torch.device("cpu"))
        assert bits.min() >= 0
        assert bits.max() < 1 << 16
        unit = (bits.double() + 0.5) / (1 << 16) - 0.5
        limit = 5 / 12 / math.sqrt(size)
        assert abs(float(unit.mean())) < 5 * math.sqrt(1 / 12 / size)
        other = Noise.of(seed + 1, (256, 256), (0, 0)).bits((256, 256), torch.device("cpu")).double() / (1 << 16) - 0.5
        for shifted in (unit.roll(1, 0), unit.roll(1, 1), other):
            assert abs(float((unit * shifted).mean())) < limit
        for bit in range(16):
            assert abs(float((bits >> bit & 1).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(size)


def test_store_in_float16_rounds_to_nearest():
    value = gradient((100,), 1)
    target = torch.zeros(100, dtype=torch.float16)
    store_(target, value, noise(target))
    assert_equal(target, value.half())
