"""The only ways in which tests compare tensors: exactly, per dtype, relative to a norm, or by projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# For results whose order of summation differs, and nothing else: (rtol, atol) of `torch.testing.assert_close`.
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
    torch.float32: {"rtol": 1e-5, "atol": 1e-7},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 1e-6},
}


def assert_equal(actual: Any, expected: Any, message: str = "") -> None:
    """Check for the same values and dtypes, bit for bit (but NaN equals NaN).

    Never ``torch.equal`` alone: it calls an int8 and a float32 tensor of the same values equal.
    """
    if _surely_equal(actual, expected):  # ``assert_close`` takes ten times as long, and tests compare a lot
        return
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{message}\n{text}" if message else text
    )


def _surely_equal(actual: Any, expected: Any) -> bool:
    """Return whether two are equal in every respect, for plain tensors and containers of them; False means "look"."""
    if type(actual) is not type(expected):
        return False
    if type(actual) in (Tensor, torch.nn.Parameter):
        facts = [(value.dtype, value.device, value.layout, value.shape) for value in (actual, expected)]
        return facts[0] == facts[1] and actual.layout == torch.strided and torch.equal(actual, expected)
    if type(actual) is dict:
        return actual.keys() == expected.keys() and all(_surely_equal(v, expected[k]) for k, v in actual.items())
    if type(actual) in (list, tuple):
        return len(actual) == len(expected) and all(map(_surely_equal, actual, expected))
    return False


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """Check for the same parameters, bit for bit."""
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert_equal(ours, theirs)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected, in float64; 0/0 is 0."""
    difference = float((actual.double() - expected.double()).norm())
    size = float(expected.double().norm())
    return difference if size == 0 else difference / size


def assert_same_projector(q1: Tensor, q2: Tensor, tolerance: float = 1e-5) -> None:
    """Check that two bases span the same space: compares ``Q Qᵀ``, since signs and rotations of a basis are free.

    Shapes: ``[..., m, r]`` each, columns orthonormal or zero.
    """
    q1, q2 = q1.double(), q2.double()
    difference = float((q1 @ q1.mT - q2 @ q2.mT).abs().max()) if q1.numel() else 0.0
    assert difference <= tolerance, f"the projectors differ by {difference:.2e}, allowed is {tolerance:.0e}"
