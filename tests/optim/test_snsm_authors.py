"""SNSM's optimizers beside the method of its authors' code, written down again in float64 (arXiv 2411.07120).

Written from what the code at github.com/timmytonga/sn-sm computes. A step there is::

    W ← W − η √b₂ / b₁ · N / (√V + ε),   W ← W − η λ W

N is G, its average, or for a linear weight X Pᵀ + G − G P Pᵀ. V averages the squares of G (adds them, if β₂ = 1), in a
linear weight their sums over rows or columns, or over runs of elements. b₁ and b₂ are Adam's corrections, or 1. Linear
weights choose P at step 1 and at multiples of the gap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import lightning_memopt as lm
from tests._compare import relative_error
from tests.kinds.contract.cases import gradient

LR, EPS, RANK, GAP, RUN = 0.01, 1e-6, 4, 12, 8
SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (40, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 40),
    "lm_head.weight": (40, 16),
}
LINEAR = {name for name in SHAPES if name.endswith(("_proj.weight", "lm_head.weight"))}


@dataclass(frozen=True)
class Authors:
    """Their options for one weight."""

    betas: tuple[float, float] = (0.9, 0.999)
    corrected: bool = True
    subspace: bool = False
    sums: bool = False
    run: int | None = None

    def train(self, weight: Tensor, grads: list[Tensor]) -> list[Tensor]:
        """Return the weight after every step."""
        (beta1, beta2), found = self.betas, []
        average, squares, basis = torch.zeros(()), torch.zeros(()), torch.zeros(())
        for step, grad in enumerate((grad.double() for grad in grads), start=1):
            if self.subspace and step == 1:
                basis = leading(grad)
            inside = project(grad, basis) if self.subspace else grad
            average = beta1 * average + (1 - beta1) * inside
            numerator = back(average, basis, grad) + grad - back(inside, basis, grad) if self.subspace else average
            squares = beta2 * squares + (1.0 if beta2 == 1 else 1 - beta2) * self.reduced(grad**2)
            b1, b2 = (1 - beta1**step, 1 - beta2**step) if self.corrected else (1.0, 1.0)
            weight = weight - LR * b2**0.5 / b1 * numerator / (squares.sqrt() + EPS)
            found.append(weight)
        return found

    def reduced(self, square: Tensor) -> Tensor:
        """Return the sum of each subset, spread over its elements."""
        if not self.sums:
            return square
        if self.run is not None:
            return square.view(-1, self.run).sum(1, keepdim=True).expand(-1, self.run).reshape(square.shape)
        return square.sum(1 if square.shape[0] >= square.shape[1] else 0, keepdim=True)


def leading(grad: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    return right[:RANK].T if grad.shape[0] >= grad.shape[1] else left[:, :RANK]


def project(grad: Tensor, basis: Tensor) -> Tensor:
    return grad @ basis if grad.shape[0] >= grad.shape[1] else basis.T @ grad


def back(inside: Tensor, basis: Tensor, grad: Tensor) -> Tensor:
    return inside @ basis.T if grad.shape[0] >= grad.shape[1] else basis @ inside


SNSM = {"paper": True, "rank": RANK, "gap": GAP}
SUMS = {"reduction": "sum", "correct_eps": True}
ADAM = Authors()
ADAGRAD = Authors((0.9, 1.0), corrected=False)
RMSPROP = Authors((0.0, 0.999), corrected=False)
# Ours; theirs for linear weights, and for all others.
CASES: dict[str, tuple[Callable[..., torch.optim.Optimizer], Authors, Authors]] = {
    "AdamSNSM": (partial(lm.AdamSNSM, **SNSM), replace(ADAM, subspace=True, sums=True), ADAM),
    "AdaGradSNSM": (partial(lm.AdaGradSNSM, **SNSM), replace(ADAGRAD, subspace=True, sums=True), ADAGRAD),
    "RMSPropSN": (partial(lm.RMSPropSN, max_update=None), replace(RMSPROP, sums=True), RMSPROP),
    "AdamSN": (partial(lm.AdamSN, **SUMS), replace(ADAM, sums=True), ADAM),
    "AdamSN on runs": (partial(lm.AdamSN, subset_size=RUN, **SUMS), replace(ADAM, sums=True, run=RUN), ADAM),
}


def start(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    shapes = enumerate(SHAPES.items())
    return {name: nn.Parameter(gradient(shape, seed, dtype, scale=0.1)) for seed, (name, shape) in shapes}


def gradients(name: str, steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Return gradients that share a part, so small that ε shows, and each at a size of its own."""
    shape, seed = SHAPES[name], 1000 * (1 + list(SHAPES).index(name))
    common = gradient(shape, seed, dtype)
    return [1e-5 * (1 + step % 3) * (common + gradient(shape, seed + step, dtype)) for step in range(1, steps + 1)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("case", CASES)
def test_steps_equal_those_of_the_authors_until_the_second_subspace(case, dtype, tolerance):
    build, linear, other = CASES[case]
    params, steps = start(dtype), GAP - 1
    grads = {name: gradients(name, steps, dtype) for name in SHAPES}
    expected = {
        name: (linear if name in LINEAR else other).train(param.detach().double(), grads[name])
        for name, param in params.items()
    }
    optimizer = build(params.items(), lr=LR, eps=EPS)
    for step in range(steps):
        for name, param in params.items():
            param.grad = grads[name][step]
        optimizer.step()
        for name, param in params.items():
            error = relative_error(param.detach(), expected[name][step])
            assert error <= tolerance, f"step {step + 1}, {name}: {error:.1e}"


@pytest.mark.parametrize("cls", [lm.AdamSNSM, lm.AdaGradSNSM])
def test_all_subspaces_change_in_the_steps_of_the_authors(cls):
    params, steps = start(torch.float32), 10
    optimizer = cls(params.items(), lr=LR, paper=True, rank=RANK, gap=4)
    changed: dict[str, list[int]] = {name: [] for name in LINEAR}
    for step in range(1, steps + 1):
        before = {name: optimizer.state[params[name]]["subspace_p"].clone() for name in LINEAR}
        for name, param in params.items():
            param.grad = gradients(name, steps, torch.float32)[step - 1]
        optimizer.step()
        for name in LINEAR:
            if not torch.equal(before[name], optimizer.state[params[name]]["subspace_p"]):
                changed[name].append(step)
    assert changed == dict.fromkeys(LINEAR, [1, 4, 8])


def test_epsilon_before_the_bias_correction_matters_in_the_first_steps():
    """So the steps above would differ without the option."""
    ways = []
    for correct in (True, False):
        params = start(torch.float32)
        optimizer = lm.AdamSN(params.items(), lr=LR, eps=EPS, correct_eps=correct)
        for name, param in params.items():
            param.grad = gradients(name, 1, torch.float32)[0]
        optimizer.step()
        ways.append(params["model.embed_tokens.weight"].detach())
    assert relative_error(*ways) > 1e-3
