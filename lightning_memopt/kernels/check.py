"""Whether kernels can be used on a device: they are compared with PyTorch's functions before their first use there."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_memopt.kernels.apply import Denominator, Direction, Rates, apply_
from lightning_memopt.kernels.project import project, rmatmul
from lightning_memopt.kernels.stack import Stack

# Norm of the difference over the norm of the result, for results in float32. Sums of 50 numbers are within 1e-6.
TOLERANCE = 1e-5
OTHERWISE = "`fused=None` uses kernels where they are available, `fused=False` never"
# The ranks of the factors, and the squares, of the updates that are compared.
UPDATES = ((3, ("row", "column")), (0, ("row",)), (0, ("column",)), (3, ("full",)), (0, ("run",)), (0, ()))
_warned: set[torch.device] = set()


def usable(device: torch.device, fused: bool | None) -> bool:
    """Return whether to use kernels on a device. The first call on it compiles and checks them, and takes seconds.

    Warns once per device if kernels are installed but wrong.

    Args:
        device: Where gradients and weights are.
        fused: Whether to use kernels; None for where they are available.

    Raises:
        RuntimeError: If ``fused`` is True and kernels are not available. The message says why.
    """
    if fused is False:
        return False
    reason = missing(device)
    if reason is None:
        reason = failure(device)
        if reason is not None and not fused and device not in _warned:
            _warned.add(device)
            warnings.warn(
                f"Kernels are not used on {device}, because {reason}. PyTorch's own functions take their place, which "
                "are slower. This warning is shown once; with `fused=False` it is not shown.",
                stacklevel=2,
            )
    if reason is not None and fused:
        raise RuntimeError(f"`fused=True` needs kernels on {device}, but {reason}. {OTHERWISE}. Nothing has changed.")
    return reason is None


def missing(device: torch.device) -> str | None:
    """Return what kernels lack to run on a device, or None."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "they run on CUDA devices only"
    if not installed():
        return "Triton is not installed (`pip install triton`)"
    return None


@cache
def installed() -> bool:
    """Return whether Triton can be imported. Does not import it."""
    return find_spec("triton") is not None


@cache
def failure(device: torch.device) -> str | None:
    """Return which kernel is wrong on a device, and by how much, or None."""
    for name, compare in comparisons(device):
        try:
            difference, allowed = compare()
        except Exception as error:  # of any type: compilers, drivers and missing headers have their own
            return f"the kernel of {name} raised {type(error).__name__}: {str(error).strip()[:300]}"
        if not difference <= allowed:
            return (
                f"the kernel of {name} differs from PyTorch by {difference:.1e} of the result's norm, "
                f"at most {allowed:.1e} is expected"
            )
    return None


def comparisons(device: torch.device) -> Iterator[tuple[str, Callable[[], tuple[float, float]]]]:
    """Yield what kernels do, each with a function that returns its error against float64 and what is allowed."""
    draw = _Draw(device)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"products and sums of {dtype}", partial(_project, draw, dtype)
        yield f"transposed products of {dtype}", partial(_rmatmul, draw, dtype)
    for rows, columns in ((True, True), (True, False), (False, True)):
        yield "sums of squares", partial(_sums, draw, rows=rows, columns=columns)
    for place, (rank, kinds) in enumerate(UPDATES):
        dtype = (torch.bfloat16, torch.float32)[place % 2]  # every pair would take twice as long to compile
        yield (
            f"updates of {dtype} with {' and '.join(kinds) or 'no'} squares",
            partial(_update, draw, rank, kinds, dtype),
        )
    yield "updates of torch.bfloat16 with extra bits", partial(_extra_bits, draw)


class _Draw:
    """Random numbers that do not touch the generators of a training."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._generator = device, torch.Generator("cpu").manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu").to(self._device)


def _project(draw: _Draw, dtype: torch.dtype) -> tuple[float, float]:
    parts = [draw(37, 53).to(dtype), draw(37, 53).to(dtype)]
    exact, right = torch.stack(parts).double(), draw(2, 53, 5)
    found = project(Stack.of(parts), right, rows=True, columns=True)
    return max(
        _error(found.product, exact @ right.double()),
        _error(found.rows, exact.square().sum(-1, keepdim=True)),
        _error(found.columns, exact.square().sum(-2, keepdim=True)),
    )


def _sums(draw: _Draw, *, rows: bool, columns: bool) -> tuple[float, float]:
    parts = [draw(37, 53), draw(37, 53)]
    found, square = project(Stack.of(parts), rows=rows, columns=columns), torch.stack(parts).double().square()
    errors = [_error(found.rows, square.sum(-1, keepdim=True))] if rows else []
    return max([*errors, *([_error(found.columns, square.sum(-2, keepdim=True))] if columns else [])])


def _rmatmul(draw: _Draw, dtype: torch.dtype) -> tuple[float, float]:
    parts, left = [draw(37, 53).to(dtype), draw(37, 53).to(dtype)], draw(2, 37, 5)
    return _error(rmatmul(left, Stack.of(parts)), left.double().mT @ torch.stack(parts).double())


def _update(draw: _Draw, rank: int, kinds: Sequence[str], dtype: torch.dtype) -> tuple[float, float]:
    """Return the relative error of an update with these squares, and what is allowed."""
    b, m, n, run, bound = 2, 37, 53, 4, 1.5
    weights, grads = [draw(m, n).to(dtype) for _ in range(b)], [draw(m, n) for _ in range(b)]
    left, right = (draw(b, m, rank), draw(b, rank, n)) if rank else (None, None)
    sizes = {"row": (b, m, 1), "column": (b, 1, n), "full": (b, m, n), "run": (b, m, -(-n // run))}
    squares = [draw(*sizes[kind]).square() + 0.1 for kind in kinds]
    update, expected = torch.stack(grads).double() * 0.5, torch.stack(weights).double() * (1 - 0.1 * 0.1)
    if left is not None and right is not None:
        update = update + left.double() @ right.double()
    if squares:
        roots = [square.double().sqrt() for square in squares]
        roots = [root.repeat_interleave(run, -1)[..., :n] if kinds[0] == "run" else root for root in roots]
        divisor = roots[0] / 0.7**0.5 * (roots[1] if roots[1:] else 1.0) + 1e-8
        update = update / divisor
    clamped = update.clamp(-bound, bound) if squares else update
    hits, lost = apply_(
        Stack.of(weights),
        Direction(Stack.of(grads), 0.5, left, right),
        Denominator(
            [Stack.of([square]) if kind == "full" else square for kind, square in zip(kinds, squares, strict=True)],
            0.7, 1e-8, run if "run" in kinds else None,
        ),
        Rates(0.1, 0.1, bound, checked=not rank, counted=True),
    )  # fmt: skip
    error, allowed = _error(torch.stack(weights), expected - 0.1 * clamped)
    miscounted = hits is not None and int(hits) != int((update.abs() > bound).sum())
    return (math.inf if miscounted or (lost is not None and int(lost)) else error), allowed


def _extra_bits(draw: _Draw) -> tuple[float, float]:
    """Return the relative error of an update of weights with eight more bits, and what is allowed."""
    weight, grad = draw(37, 53).bfloat16(), draw(37, 53)
    low, expected = torch.zeros_like(weight, dtype=torch.int8), weight.double() - 0.1 * grad.double()
    apply_(Stack.of([weight]), Direction(Stack.of([grad])), Denominator(), Rates(0.1), low=Stack.of([low]))
    value = ((weight.view(torch.int16).int() << 16) + (low.int() << 8)).view(torch.float32)
    error, allowed = _error(value, expected)
    return error, allowed + 2.0**-16


def _error(actual: Tensor | None, expected: Tensor) -> tuple[float, float]:
    """Return the relative error, and what is allowed: rounding to the dtype may add half of its last bit."""
    assert actual is not None
    rounding = 0.0 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps / 2
    difference = torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected)
    return float(difference.nan_to_num(math.inf)), TOLERANCE + rounding
