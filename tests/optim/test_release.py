"""Reformat: what is dropped of the momentum moves the weights, and its memory comes back."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_memopt as lm
from tests._compare import assert_equal, relative_error
from tests._models import fill_grads, tiny_gpt2, train
from tests.kinds.contract.cases import gradient
from tests.optim._reformatting import LOSSY, MOMENTA, NAME, PAIRS, SECOND_MOMENTS, SHAPES, grad_of, made, momentum_of

pytestmark = pytest.mark.slow


def denominator(optimizer: lm.MemOpt, param: Tensor, *, beta2: float, eps: float) -> Tensor:
    """Return the denominator of the last step in float64, straight from the definition of every kind."""
    state = {key: value.double() for key, value in optimizer.state[param].items()}
    kind, step = optimizer._binding.blocks[param][0].recipe.second_moment, float(state["step"])
    shape = param.shape if param.ndim < 4 else param.flatten(1).shape
    *_, m, n = shape
    if kind.name == "none":
        return torch.ones(shape, dtype=torch.float64)
    if kind.name == "dense":
        square = state["exp_avg_sq"].view(shape)
    elif kind.name == "factored":
        row, column = state["factored_row"], state["factored_col"]
        square = row * column / row.mean(-2, keepdim=True)
    elif kind.name == "blockwise":
        square = state["blockwise_sq"].repeat_interleave(kind.outputs_per_number, dim=-2).expand(shape)
    elif kind.subset_size is None:
        square = state["subset_norm_sq"].expand(shape) * (min(m, n) if kind.reduction == "sum" else 1)
    else:
        starts = range(0, n, kind.subset_size)
        sizes = [min(kind.subset_size, n - start) for start in starts]
        parts = [
            state["subset_norm_sq"][..., [index]].expand(*shape[:-1], size) * (size if kind.reduction == "sum" else 1)
            for index, size in enumerate(sizes)
        ]
        square = torch.cat(parts, dim=-1)
    correction = 1 - beta2**step if beta2 < 1 and kind.bias_correction else 1.0
    return (square / correction).sqrt() + eps


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "maximize": {"maximize": True},
    "weight decay": {"weight_decay": 0.5},
    "AdaGrad": {"betas": (0.9, 1.0)},
    "betas and eps": {"betas": (0.6, 0.9), "eps": 1e-2},
    "tensor lr": {"lr": torch.tensor(1e-2)},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("second_moment", SECOND_MOMENTS)
def test_weights_move_by_what_is_dropped(second_moment, settings):
    """By −lr · β₁/(1−β₁) · ΔM / D, compared in float64; by nothing else, and not at all with `discard`."""
    options = {"betas": (0.9, 0.99), "eps": 1e-8, "max_update": None, **SETTINGS[settings]}
    beta1, beta2 = options["betas"]
    shapes = SHAPES.values() if settings == "plain" else [(12, 12)]
    kind = SECOND_MOMENTS[second_moment]
    starts = {
        key: made(key[1], MOMENTA[key[0]], kind, steps=2, **options) for key in itertools.product(MOMENTA, shapes)
    }
    for (before, after), shape in itertools.product(LOSSY, shapes):
        for dropped in ("release", "discard"):
            optimizer, param = copy.deepcopy(starts[before, shape])
            param.detach().zero_()  # so that float32 resolves the change
            dense = momentum_of(optimizer, param)
            divisor = denominator(optimizer, param, beta2=beta2, eps=options["eps"])
            optimizer.reformat({NAME: MOMENTA[after]}, dropped=dropped)
            lost = dense - momentum_of(optimizer, param)
            expected = -1e-2 * beta1 / (1 - beta1) * lost / divisor if dropped == "release" else torch.zeros_like(lost)
            assert bool(expected.any()) == (dropped == "release")
            error = relative_error(param.detach().view(expected.shape), expected)
            assert error <= 1e-5, f"{before} to {after}, {shape}, {dropped}: {error:.1e}"


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float64", "float64")])
def test_release_in_other_dtypes(dtypes):
    """The state is what it is rounded to: what rounding drops is released, too."""
    shape, (weights, state_dtype) = (20, 12), dtypes
    param = nn.Parameter(gradient(shape, 99).to(getattr(torch, weights)))
    overrides = {NAME: {**MOMENTA["low_rank 8"], "second_moment": "dense"}}
    options = {} if state_dtype == "float64" else {"state_dtype": state_dtype}
    optimizer = lm.MemOpt([(NAME, param)], "adamw", lr=1e-2, overrides=overrides, **options)
    for step in range(1, 6):
        param.grad = grad_of(shape, step).to(param.dtype)
        optimizer.step()
    param.detach().zero_()
    dense, divisor = momentum_of(optimizer, param), denominator(optimizer, param, beta2=0.999, eps=1e-8)
    optimizer.reformat({NAME: {"rank": 3}})
    expected = -1e-2 * 9 * (dense - momentum_of(optimizer, param)) / divisor
    tolerance = {"bfloat16": 4e-3, "float32": 1e-5, "float64": 1e-12}[weights]
    assert relative_error(param.detach(), expected) <= tolerance


def test_release_moves_one_block_of_a_fused_weight():
    model = tiny_gpt2()
    optimizer = lm.AdaPMLean(model.named_parameters(), rank=8)
    train(model, optimizer, 4)
    name = "transformer.h.0.attn.c_attn.weight"
    param = dict(model.named_parameters())[name]
    weights = [entry.detach().clone() for entry in model.parameters()]
    optimizer.reformat({f"{name}:key": {"rank": 2}, f"{name}:value": {"momentum": "dense"}})
    for entry, old in zip(model.parameters(), weights, strict=True):
        moved = (entry != old).any(0) if entry is param else (entry != old).any()
        assert not moved.any() or entry is param
        assert entry is not param or moved.nonzero().flatten().tolist() == list(range(32, 64))


def test_before_the_first_step_weights_stay():
    for before, after in PAIRS:
        optimizer, param = made((12, 20), MOMENTA[before], steps=0)
        weights = param.detach().clone()
        optimizer.reformat({NAME: MOMENTA[after]})
        assert_equal(param.detach(), weights)


@functools.cache
def end_of(before: str, after: str | None) -> Tensor:
    """Return where a weight is after 87 steps, with a change in the middle of its gradients if ``after`` is given."""
    kind = MOMENTA[before] | ({"gap": 10_000} if "subspace" in before else {})
    optimizer, param = made(TRAVELLER, kind, SECOND_MOMENTS["none"], steps=0, lr=1.0, betas=(0.7, 0.999))
    for step in range(1, 88):
        # The first subspace; then zeros, until nothing is left of the bias correction; gradients; zeros.
        param.grad = grad_of(TRAVELLER, step) if step in (1, *GRADIENTS) else torch.zeros(TRAVELLER)
        if step == GRADIENTS[5] and after is not None:
            optimizer.reformat({NAME: MOMENTA[after] | ({"gap": 10_000} if "subspace" in after else {})})
        if step == GRADIENTS[0] - 1:
            param.detach().zero_()
        optimizer.step()
    return param.detach()


TRAVELLER, GRADIENTS = (12, 12), range(36, 48)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_released_momentum_keeps_the_sum(before, after):
    """With a constant rate and no second moment, weights travel as far as the gradients add up to, whatever changes."""
    alone, changed = end_of(before, None), end_of(before, after)
    assert relative_error(changed, alone) <= 1e-4
    assert relative_error(alone, -sum(grad_of(TRAVELLER, step) for step in GRADIENTS)) <= 1e-4


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(setup: Any, run: Any) -> int:
    """Return the most bytes that were allocated while ``run`` worked on what ``setup`` made, above what was before."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        from _memory import PeakMemory
    finally:
        del sys.path[0]
    with PeakMemory("cpu") as memory:
        optimizer = setup()
        memory.step(lambda: run(optimizer))
    return memory.peaks[0]


@pytest.mark.parametrize(
    ("shape", "blocks", "bound"), [((384, 384), 1, 9.5), ((384, 384), 6, 9.5), ((256, 2048), 3, 5)]
)
@pytest.mark.parametrize(("before", "after"), [*LOSSY, *((after, before) for before, after in LOSSY)])
def test_memory_is_a_multiple_of_one_block_however_many_there_are(before, after, shape, blocks, bound):
    """In units of a block's dense float32 momentum: float64 eigenvectors of the short side are most of a square's.

    State that grows counts, too; it stays.
    """
    names = [NAME.replace("0", str(layer)) for layer in range(blocks)]
    size = 4 * shape[0] * shape[1]

    def setup() -> lm.MemOpt:
        params = [(name, nn.Parameter(torch.randn(shape))) for name in names]
        change = {**MOMENTA[before], "second_moment": "factored"}
        optimizer = lm.MemOpt(params, "adamw", overrides={"mlp": change})
        fill_grads([param for _, param in params], 0)
        optimizer.step()
        return optimizer

    def run(optimizer: lm.MemOpt) -> None:
        before = optimizer.snapshot().state_bytes
        optimizer.reformat(dict.fromkeys(names, MOMENTA[after]))
        grown.append(max(0, optimizer.snapshot().state_bytes - before))

    grown: list[int] = []
    peak = peak_memory(setup, run)
    assert peak <= bound * size + grown[0]


def test_old_state_is_gone():
    """Nothing refers to it any more, and what is there is what the plan says."""
    made_before, old = [], []
    for (before, after), dropped in itertools.product(PAIRS, ("release", "discard")):
        optimizer, param = made((20, 12), MOMENTA[before], steps=2)
        momentum = optimizer._binding.blocks[param][0].recipe.momentum
        old += [weakref.ref(optimizer.state[param][key]) for key in momentum.keys]
        optimizer.reformat({NAME: MOMENTA[after]}, dropped=dropped)
        held = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in optimizer.state[param].values()}
        snapshot = optimizer.snapshot()
        assert sum(held.values()) == snapshot.state_bytes + snapshot.counter_bytes
        made_before.append(optimizer)
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)
