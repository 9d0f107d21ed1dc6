"""Optimizers take the same steps with kernels and without."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.kernels import apply, check, project
from lightning_memopt.optim import fused
from tests._compare import assert_equal, relative_error
from tests.kernels import _interpreter  # noqa: F401
from tests.kinds.contract.cases import gradient

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAYER = "model.layers.{}.self_attn.{}_proj.weight"
SHAPES: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (9, 6), "model.norm.weight": (6,)}
SHAPES |= {LAYER.format(layer, "q"): (6, 6) for layer in (0, 1)}
SHAPES |= {"model.layers.0.mlp.experts.up_proj": (2, 5, 6)}


@pytest.fixture(scope="module", autouse=True)
def checked():
    """Check the kernels once for all tests of this file."""
    assert check.usable(torch.device("cpu"), True)


def made(dtype=F32, **options):
    named = [(name, nn.Parameter(gradient(shape, 3, dtype))) for name, shape in SHAPES.items()]
    return lm.MemOpt(named, lr=1e-2, weight_decay=0.1, **options)


def step(optimizer, number):
    for place, param in enumerate(optimizer.param_groups[0]["params"]):
        param.grad = gradient(tuple(param.shape), 100 * number + place, param.dtype)
    optimizer.step()


OPTIONS = [
    {"recipe": "adapm_lean", "maximize": True, "state_dtype": "bfloat16", "dtype": BF16},
    {"recipe": "adapm", "max_update": None, "dtype": F16},
    {"recipe": "adam_snsm", "gap": 10},
    {"recipe": "adam_sn", "subset_size": 5, "state_dtype": "bfloat16"},
    {"recipe": "adam_mini", "head_dim": 3},
    {"recipe": "adapm_lean", "clip_update": 0.5, "max_update": 0.7},
    {"recipe": "adafactor", "clip_update": 0.5},
    {"recipe": "adapm_lean", "master_weight_bits": 24, "dtype": BF16},
    {"recipe": "adam_sn", "master_weight_bits": 32, "dtype": BF16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_steps_as_without_kernels(options):
    mine, eager = made(**options, fused=True), made(**options, fused=False)
    dtype = options.get("dtype", F32)
    for number in range(1, 3 if options["recipe"] == "adapm_lean" else 2):
        step(mine, number)
        step(eager, number)
    for (_, param, block), (_, other, _) in zip(mine.blocks(), eager.blocks(), strict=True):
        assert relative_error(param, other) < (1e-5 if dtype == F32 else 1e-2), block.name
        for key, value in mine.state[param].items():
            wide = value.dtype == F32 and dtype == F32
            assert relative_error(value, eager.state[other][key]) < (1e-4 if wide else 1e-2), f"{block.name} {key}"


def launches(optimizer):
    with (
        mock.patch.object(apply, "apply_", wraps=apply.apply_) as applied,
        mock.patch("lightning_memopt.kinds.linalg.project", wraps=project.project) as projected,
    ):
        assert fused.kernel.apply_ is applied
        step(optimizer, 1)
    return applied.call_count, projected.call_count


def test_every_bit_is_there_with_kernels_too():
    """An update without products and sums: elements do not depend on the order of anything."""
    for bits in (16, 24, 32):
        options = {"recipe": "adam_sn", "master_weight_bits": bits, "subset_size": 1}
        mine, eager = made(BF16, **options, fused=True), made(BF16, **options, fused=False)
        for each in (mine, eager):
            step(each, 1)
        others = sum(int((weight != eager.full_weights()[name]).sum()) for name, weight in mine.full_weights().items())
        assert others <= 2, f"{bits} bits: {others} differ"


def test_one_launch_for_blocks_that_are_alike():
    """The embedding, the experts, and the queries. Torch's AdamW updates the vector."""
    applied, projected = launches(made(recipe="adapm_lean"))
    assert applied == 3
    assert projected == 3, "one pass finds a product and two sums of squares"
    assert launches(made(recipe="adapm_lean", fused=False)) == (0, 0)


def test_float64_does_without_kernels():
    assert launches(made(torch.float64, recipe="adapm_lean", fused=True)) == (0, 0)


def test_tensors_that_lie_differently_do_without():
    optimizer, expected = made(recipe="adafactor"), made(recipe="adafactor", fused=False)
    for each in (optimizer, expected):
        for param in each.param_groups[0]["params"]:
            param.grad = gradient(tuple(param.shape), 5)
        mixed = next(param for _, param, block in each.blocks() if block.name == LAYER.format(0, "q"))
        mixed.grad = mixed.grad.mT.contiguous().mT
        each.step()
    for param, other in zip(optimizer.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True):
        assert relative_error(param, other) < 1e-6


def test_a_weight_that_would_become_infinite_keeps_its_value():
    optimizer = made(F16, recipe="adapm", max_update=None)
    for group in optimizer.param_groups:
        group["lr"] = 1e6
    before = copy.deepcopy(optimizer.param_groups[0]["params"])
    with pytest.raises(FloatingPointError, match="Weights would have become infinite or NaN in"):
        step(optimizer, 1)
    for param, old in zip(optimizer.param_groups[0]["params"], before, strict=True):
        assert param.isfinite().all()
        assert_equal(param[~(param != old)], old[~(param != old)])


def test_broken_kernels_raise_before_anything_changes(monkeypatch):
    optimizer = made(recipe="adapm_lean", fused=True)
    weights = optimizer.param_groups[0]["params"]
    state, before = copy.deepcopy(optimizer.state_dict()["state"]), [weight.detach().clone() for weight in weights]
    monkeypatch.setattr("lightning_memopt.kernels.check.failure", lambda device: "the kernel of sums is wrong")
    with pytest.raises(RuntimeError, match="`fused=True` needs kernels on cpu, but the kernel of sums is wrong"):
        step(optimizer, 1)
    assert_equal(optimizer.state_dict()["state"], state)
    assert_equal([weight.detach() for weight in weights], before)
