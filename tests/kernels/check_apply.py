"""The update of weights: the kernel against ``optim.update.apply_``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from lightning_memopt.kernels import apply as kernel
from lightning_memopt.kernels.stack import Stack
from lightning_memopt.kinds.batch import Batch
from lightning_memopt.kinds.linalg import store_chunk_
from lightning_memopt.kinds.momentum import Direction
from lightning_memopt.kinds.noise import Noise
from lightning_memopt.kinds.second_moment import Denominator
from lightning_memopt.optim import update
from lightning_memopt.optim.bounds import Rates, Watch
from lightning_memopt.optim.weights import Weights, joined_
from tests._compare import TOLERANCE, assert_equal
from tests.kernels._interpreter import LAYOUTS, matrices
from tests.kinds.contract.cases import gradient

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One update of ``b`` weights."""

    b: int = 2
    shape: tuple[int, ...] = (17, 33)
    q: int = 0
    squares: str = "row column"
    weights: torch.dtype = F32
    base: torch.dtype = F32
    square: torch.dtype = F32
    layout: str = "plain"
    scale: float = 0.5
    lr: float = 0.1
    decay: float = 0.1
    bound: float | None = 1.5
    checked: bool = False
    negated: bool = False
    run: int | None = None
    change: dict[tuple[int, ...], float] = field(default_factory=dict)  # of the gradient of the first block

    def __str__(self) -> str:
        changed = [f"{key}={getattr(self, key)}" for key in self.__dataclass_fields__ if self.differs(key)]
        return ",".join(changed).replace(" ", "") or "plain"

    def differs(self, key: str) -> bool:
        return getattr(self, key) != getattr(Case, key, {})


def square(case: Case, how: str, seed: int) -> Any:
    stack, (m, n) = (case.b, *case.shape[:-2]), case.shape[-2:]
    if how == "full":
        return Batch([part.abs() for part in matrices(case.b, case.shape, case.square, case.layout, seed)])
    last = {"row": (m, 1), "column": (1, n), "run": (m, -(-n // (case.run or max(1, n))))}[how]
    return gradient((*stack, *last), seed).abs()


def run(case: Case) -> None:
    weights = matrices(case.b, case.shape, case.weights, case.layout, 10)
    mine = [part.clone() for part in weights]  # keeps the strides of dense tensors
    grads = matrices(case.b, case.shape, case.base, case.layout, 20)
    for place, value in case.change.items():
        grads[0][place] = value
    stack, (m, n) = (case.b, *case.shape[:-2]), case.shape[-2:]
    factors: Any = (gradient((*stack, m, case.q), 30), gradient((*stack, case.q, n), 40)) if case.q else ()
    squares = [square(case, how, 50 + place) for place, how in enumerate(case.squares.split())]
    bound = case.bound if case.squares else None  # `for_kernel` leaves bounds without a denominator to the eager update
    rates = Rates(case.lr, case.decay, bound, case.checked)
    watch = Watch(counting=True)
    lost = update.apply_(
        Weights(Batch(weights)), Direction(Batch(grads, negated=case.negated), case.scale, *factors),
        Denominator(tuple(squares), 0.7, 1e-8, case.run), rates, dtype=F32, watch=watch,
    )  # fmt: skip

    def flat(value: Any) -> Any:
        return Stack.of(value.parts) if isinstance(value, Batch) else value.flatten(0, -3)

    found = kernel.apply_(
        Stack.of(mine),
        kernel.Direction(Stack.of(grads, negated=case.negated), case.scale, *map(flat, factors)),
        kernel.Denominator([flat(each) for each in squares], 0.7, 1e-8, case.run),
        kernel.Rates(case.lr, case.decay, bound, case.checked, counted=True),
    )  # fmt: skip
    for one, other in zip(mine, weights, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE[case.weights], equal_nan=True)
    hits, kept = found
    assert (hits is None) == (not watch.hits or bound is None)
    if hits is not None:
        assert hits.item() == sum(watch.hits).item()
    assert (kept is None) == (lost is None)
    if lost is not None:
        assert kept.item() == lost.item()


SHAPES = [(1, 1), (3, 17), (33, 5), (1, 65), (65, 1), (66, 131), (3, 5, 7)]
CASES = [
    *(Case(b=1, shape=shape) for shape in SHAPES),
    *(Case(b=2, shape=shape, q=2) for shape in SHAPES[1::2]),
    *(Case(b=5, shape=(3, 5), q=q) for q in (1, 6, 66)),
    *(Case(b=1, shape=(3, 5), q=q) for q in (24, 48)),
    *(Case(squares=squares, q=q) for squares in ("", "row", "column", "full") for q in (0, 8)),
    *(Case(squares="run", run=run, q=q) for run, q in ((1, 0), (5, 0), (5, 8), (40, 0))),
    *(Case(squares=squares, bound=None) for squares in ("", "row column", "full")),
    *(Case(weights=dtype, base=dtype, layout=layout) for dtype in (F32, BF16) for layout in LAYOUTS),
    Case(weights=BF16, base=BF16, layout="transposed", q=6),
    Case(weights=F16, base=F16, layout="strided", q=6),
    Case(squares="full", square=BF16, layout="strided"),
    Case(squares="full row"),
    Case(weights=BF16, base=F32, q=3),
    Case(weights=F32, base=BF16),
    Case(decay=0.0),
    Case(scale=0.0, q=3),
    Case(scale=0.0),
    Case(negated=True, q=3),
    Case(negated=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_eager_update(case):
    run(case)


NAN, INF = float("nan"), float("inf")
BEYOND = {(1, 2): 3e5, (0, 0): -3e5, (2, 2): NAN}
UNUSUAL = [
    *(Case(change={(1, 2): value}) for value in (NAN, INF, -INF, 1e30, 1e-40)),
    *(Case(change={(1, 2): value}, checked=True, bound=None) for value in (NAN, INF, 1e38)),
    *(Case(change={(1, 2): NAN}, weights=dtype, squares=how) for dtype in (BF16, F16) for how in ("", "row")),
    Case(change=BEYOND, weights=F16, squares="", lr=1.0, scale=1.0, checked=True),
    Case(change={(1, 2): 3e38}, weights=BF16, squares="", lr=1.0, scale=2.0, checked=True),
    Case(change={(1, 2): 1e30}, q=2, checked=True),
]


@pytest.mark.parametrize("case", UNUSUAL, ids=str)
def test_unusual_numbers_are_those_of_the_eager_update(case):
    run(replace(case, shape=(3, 5)))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
def test_nothing_to_update(shape):
    run(Case(shape=shape, checked=True))


# --- rounding of bfloat16 --------------------------------------------------------------------------------------------


def subtract(weights, grads, rounding=None):
    """W ← W − G, which float32 represents: only the rounding can differ."""
    rates = kernel.Rates(1.0)
    kernel.apply_(Stack.of(weights), kernel.Direction(Stack.of(grads)), kernel.Denominator(), rates, rounding=rounding)


def test_rounds_to_nearest_and_halves_to_even():
    half = 2.0**-8  # of the last bit of a bfloat16 between 1 and 2
    values = [1 + half, 1 + 3 * half, 1 + half * 1.001, 1 + half * 0.999, -1 - half, 255.9, 1e-40, 3.3e38, 3.4e38, 0.0]
    values += [INF, -INF, NAN]
    weights, grads = torch.zeros(1, len(values), dtype=BF16), -torch.tensor([values])
    subtract([weights], [grads])
    assert_equal(weights, torch.tensor([values]).to(BF16))


@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 7)], ids=str)
def test_stochastic_rounding_is_that_of_the_position(shape):
    whole = tuple(size + 4 for size in shape)
    noise = Noise.of((3 << 61, 5), whole, [2] * len(shape))
    grads = matrices(2, shape, F32)
    grads[0].view(-1)[0], grads[1].view(-1)[1] = NAN, INF
    eager, mine = (Batch(matrices(2, shape, BF16, seed=9)) for _ in range(2))
    for place, grad in enumerate(grads):
        store_chunk_(eager, (place,), eager[(place,)].float() - grad, noise)
    rounding = kernel.Rounding.of(noise.seed, noise.start, noise.strides, shape[:-2])
    subtract(mine.parts, grads, rounding)
    nearest = [part - grad for part, grad in zip(matrices(2, shape, BF16, seed=9), grads, strict=True)]
    for one, other, plain in zip(mine.parts, eager.parts, nearest, strict=True):
        assert_equal(one, other)
        assert not torch.equal(one.nan_to_num(), plain.to(BF16).nan_to_num()), "some are not rounded to nearest"


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("bits", [torch.int8, torch.int16], ids=str)
def test_extra_bits_are_those_of_the_eager_update(bits, noisy):
    shape = (2, 5, 33)
    noise = Noise.of((3 << 61, 5), shape, [0] * 3) if noisy else None
    grads, limits = matrices(2, shape, F32), torch.iinfo(bits)
    drawn = torch.randint(limits.min, limits.max + 1, (2, *shape), generator=torch.Generator().manual_seed(1))
    mine, eager = (
        Weights(Batch(matrices(2, shape, BF16, seed=9)), Batch(list(drawn.to(bits))), noise) for _ in range(2)
    )
    direction, rates = Direction(Batch(grads)), Rates(0.01, 0.1, checked=True)
    lost = update.apply_(eager, direction, Denominator(), rates, dtype=F32, watch=Watch())
    rounding = None if noise is None else kernel.Rounding.of(noise.seed, noise.start, noise.strides, shape[:-2])
    _, kept = kernel.apply_(
        Stack.of(mine.values.parts), kernel.Direction(Stack.of(grads)), kernel.Denominator(),
        kernel.Rates(0.01, 0.1, checked=True), low=Stack.of(mine.low.parts), rounding=rounding,
    )  # fmt: skip
    for place in range(2):  # but for the last bit of float32, since a sum may be fused with its product
        one, other = (
            joined_(torch.empty(shape), each.values.parts[place], each.low.parts[place]) for each in (mine, eager)
        )
        torch.testing.assert_close(one, other, rtol=2**-22, atol=0)
    assert kept.item() == lost.item() == 0
    assert not torch.equal(mine.low.parts[0], drawn[0].to(bits))


def test_stochastic_rounding_leaves_other_dtypes_alone():
    grads, weights = matrices(1, (3, 5), F32), matrices(1, (3, 5), F32, seed=9)
    expected = weights[0] - grads[0]
    subtract(weights, grads, kernel.Rounding.of(3, 0, (5, 1), ()))
    assert_equal(weights[0], expected)
