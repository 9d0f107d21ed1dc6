"""Kernels are used where they are right, and nowhere else."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_memopt.kernels import check, jit_apply, jit_project
from lightning_memopt.kernels.check import usable
from tests.kernels import _interpreter  # noqa: F401

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unchecked():
    """Forget what was found out about devices."""
    check.failure.cache_clear()
    check._warned.clear()
    yield
    check.failure.cache_clear()
    check._warned.clear()


class Broken:
    """A kernel that is launched, and then multiplies one result or raises."""

    def __init__(self, kernel, place, factor):
        self.kernel, self.place, self.factor = kernel, place, factor

    def __getitem__(self, grid):
        def launch(*args, **options):
            if self.factor is None:
                raise TypeError("no such instruction")
            self.kernel[grid](*args, **options)
            if args[self.place] is not None:
                args[self.place].mul_(self.factor)

        return launch


def test_kernels_that_are_right_are_used_without_a_warning():
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert usable(CPU, None)
        assert usable(CPU, True)
        assert not usable(CPU, False)
    assert torch.equal(torch.get_rng_state(), before), "a training's random numbers are left alone"


@pytest.mark.parametrize(
    ("module", "name", "place", "factor", "text"),
    [
        (jit_project, "project_kernel", 2, 1.001, r"the kernel of products .* torch.float32 differs .* by 1.0e-03 of"),
        (jit_project, "project_kernel", 4, float("nan"), r"the kernel of products and sums .* by inf of"),
        (jit_project, "project_kernel", 0, None, r"the kernel of products .* raised TypeError: no such instruction"),
        (jit_apply, "apply_kernel", 9, 0, r"the kernel of updates .* with row and column squares .* by inf of"),
        (jit_apply, "apply_kernel", 0, None, r"the kernel of updates .* squares raised TypeError: no such"),
    ],
)
def test_a_broken_kernel_is_not_used(monkeypatch, module, name, place, factor, text):
    monkeypatch.setattr(module, name, Broken(getattr(module, name), place, factor))
    with pytest.warns(UserWarning, match=rf"Kernels are not used on cpu, because {text}"):
        assert not usable(CPU, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not usable(CPU, None), "one warning"
    with pytest.raises(RuntimeError, match=rf"`fused=True` needs kernels on cpu, but {text}.*Nothing has changed"):
        usable(CPU, True)
