"""Blocks that are alike take a step together: the same result, the same number of operations at any depth."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_memopt as lm
from lightning_memopt.kinds import batch
from lightning_memopt.kinds.batch import Batch, chunks, parts
from lightning_memopt.optim import block as blocks
from lightning_memopt.optim import guards, stepping
from lightning_memopt.optim.block import Block
from tests._compare import assert_equal, relative_error
from tests.kinds.contract.cases import gradient

WIDTH = 16
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


def shapes(depth: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, WIDTH)}
    for layer in range(depth):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{name}.weight": (WIDTH, WIDTH) for name in LINEAR}
        found |= {f"{prefix}.mlp.{name}.weight": (40, WIDTH) for name in ("gate_proj", "up_proj")}
        found |= {f"{prefix}.mlp.down_proj.weight": (WIDTH, 40), f"{prefix}.input_layernorm.weight": (WIDTH,)}
        found |= {f"{prefix}.mlp.experts.up_proj": (3, 12, WIDTH)}
    return found | {"lm_head.weight": (40, WIDTH)}


def optimizer_of(depth: int = 3, *, dtype: torch.dtype = torch.float32, device: str = "cpu", **options) -> lm.MemOpt:
    named = []
    for place, (name, shape) in enumerate(shapes(depth).items()):
        weight = gradient(shape, place, dtype) if device == "cpu" else torch.empty(shape, dtype=dtype, device=device)
        named.append((name, nn.Parameter(weight)))
    return lm.MemOpt(named, lr=1e-2, weight_decay=0.1, **options)


def take_steps(optimizer: lm.MemOpt, steps: int) -> None:
    for number in range(1, steps + 1):
        for place, param in enumerate(optimizer.param_groups[0]["params"]):
            param.grad = gradient(tuple(param.shape), 1000 * number + place).to(param.dtype)
        optimizer.step()


OPTIONS = [
    *({"recipe": name} for name in lm.recipe_names()),
    {"recipe": "adapm_lean", "maximize": True},
    {"recipe": "adam_snsm", "gap": 3},
    {"recipe": "adam_snsm", "gap": 2, "handover": "rotate"},
    {"recipe": "adam_sn", "subset_size": 5},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_together_equals_one_by_one(options, dtype):
    together, one_by_one = optimizer_of(dtype=dtype, **options), optimizer_of(dtype=dtype, **options)
    take_steps(together, 5)
    with mock.patch.object(Block, "batched", False), mock.patch.object(Block, "is_adam", False):
        take_steps(one_by_one, 5)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for (_, param, block), (_, other, _) in zip(together.blocks(), one_by_one.blocks(), strict=True):
        assert relative_error(param, other) < tolerance, block.name
        for key, value in together.state[param].items():
            assert value.shape == one_by_one.state[other][key].shape
            assert relative_error(value, one_by_one.state[other][key]) < 10 * tolerance, f"{block.name} {key}"


@pytest.mark.parametrize("recipe", ["adapm_lean", "adam_snsm"])
def test_state_in_bfloat16_is_rounded_by_position(recipe):
    """Every block keeps its own random numbers: two blocks with the same gradients round differently."""
    optimizer = optimizer_of(recipe=recipe, state_dtype="bfloat16")
    for param in optimizer.param_groups[0]["params"]:
        param.grad = gradient(tuple(param.shape), 7)
    optimizer.step()
    key = {"adapm_lean": "low_rank_r", "adam_snsm": "subspace_x"}[recipe]
    queries = [param for _, param, block in optimizer.blocks() if block.name.endswith("q_proj.weight")]
    found = [optimizer.state[param][key] for param in queries]
    assert found[0].dtype == torch.bfloat16
    assert not torch.equal(found[0], found[1])


class Counting(TorchDispatchMode):
    """Counts all operations but views, such as that of a vector as one row."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is not torch.ops.aten.view.default
        return func(*args, **(kwargs or {}))


class Reading(TorchDispatchMode):
    """Counts the numbers that are read from tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_depth_adds_no_operations(recipe):
    counts = []
    for depth in (2, 9):
        optimizer = optimizer_of(depth, recipe=recipe, **({"gap": 1} if "snsm" in recipe else {}))
        take_steps(optimizer, 2)
        with Counting() as mode:
            optimizer.step()
        counts.append(mode.count)
    assert counts[0] == counts[1]


def test_betas_may_be_a_list():
    optimizer = optimizer_of(betas=[0.9, 0.95])
    optimizer.param_groups[0]["betas"] = [0.8, 0.95]
    take_steps(optimizer, 1)


def test_a_learning_rate_in_a_tensor_is_read_once():
    counts = []
    for depth in (2, 9):
        optimizer = optimizer_of(depth, recipe="adapm_lean")
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-2)
        with Reading() as mode:
            take_steps(optimizer, 1)
        counts.append(mode.count)
    assert counts[0] == counts[1]


def test_copies_of_a_block_stay_alike():
    blocks = [block for *_, block in optimizer_of(recipe="adapm_lean").blocks()]
    assert all(copied.family is block.family for block, copied in zip(blocks, copy.deepcopy(blocks), strict=True))


def test_large_channels_last_convolutions_are_copied_one_by_one(monkeypatch):
    """They have no view as a matrix. Copies of all of them at once would take as much memory as the weights."""
    monkeypatch.setattr(blocks, "SMALL", 0)
    counted = []
    monkeypatch.setattr(stepping, "update", lambda updates, *rest: counted.append(len(updates)) or iter(()))
    for layout in (torch.contiguous_format, torch.channels_last):
        params = [nn.Parameter(gradient((8, 4, 3, 3), place).to(memory_format=layout)) for place in range(3)]
        for param in params:
            param.grad = torch.ones_like(param)
        counted.clear()
        lm.MemOpt([(f"conv{place}.weight", param) for place, param in enumerate(params)], "adafactor", lr=0.1).step()
        assert counted == ([3] if layout is torch.contiguous_format else [1, 1, 1])


def test_vectors_with_state_of_a_smaller_dtype_keep_the_arithmetic():
    """Numbers are the same as a vector and as a matrix."""
    values, grads = gradient((1, 9), 1, torch.float64), gradient((1, 9), 2, torch.float64)
    found = []
    for shape in ((9,), (1, 9)):
        param = nn.Parameter(values.view(shape).clone())
        param.grad = grads.view(shape)
        lm.MemOpt([("a.weight", param)], "adamw", lr=1.0, state_dtype="float32").step()
        found.append(param.detach().view(-1))
    assert_equal(*found)


@pytest.mark.parametrize("recipe", lm.recipe_names())
def test_a_step_reads_nothing_from_a_gpu_but_the_verdict(recipe, monkeypatch):
    """A tensor on the meta device has no value: reading it raises. Nothing in a step depends on the kind of device."""
    monkeypatch.setattr(guards, "_read", lambda flags: set())
    monkeypatch.setattr(stepping, "exact_arithmetic", lambda devices: nullcontext())  # no autocast on this device
    optimizer = optimizer_of(2, recipe=recipe, device="meta")
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.empty_like(param)
    for number in (1, 2, 20):  # 20: the bound counts elements
        for state in optimizer.state.values():
            state["step"] = torch.tensor(float(number - 1))
        optimizer.step()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_large_blocks_equal_small_ones(options, monkeypatch):
    """Small blocks are stacked, large ones updated where they are."""
    stacked, in_place = optimizer_of(**options), optimizer_of(**options)
    take_steps(stacked, 3)
    monkeypatch.setattr(blocks, "SMALL", 0)
    monkeypatch.setattr(guards, "SMALL", 0)
    take_steps(in_place, 3)
    for (_, param, one), (_, other, _) in zip(stacked.blocks(), in_place.blocks(), strict=True):
        assert relative_error(param, other) < 1e-5, one.name
        for key, value in stacked.state[param].items():
            assert relative_error(value, in_place.state[other][key]) < 1e-4, f"{one.name} {key}"


@pytest.mark.parametrize("limit", [1, 40, 100, 1 << 19])
@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5), (0, 4), (1, 1)], ids=str)
def test_chunks_of_a_batch_cover_it(shape, limit, monkeypatch):
    monkeypatch.setattr(batch, "CPU_CHUNK", limit)
    tensors = [gradient(shape, number) for number in range(5)]
    for negated in (False, True):
        seen = Batch(tensors, negated=negated)
        expected = -torch.stack(tensors) if negated else torch.stack(tensors)
        for split in (chunks, parts):
            out = torch.zeros(expected.shape)
            for index in split(seen):
                out[index] = seen[index]
            assert_equal(out, expected)
        assert seen.shape == expected.shape


def test_the_gradients_of_a_batch_are_not_copied():
    tensors = [gradient((2000, 300), number) for number in range(2)]
    seen = Batch(tensors)
    for index in chunks(seen):
        assert seen[index].untyped_storage().data_ptr() in {each.untyped_storage().data_ptr() for each in tensors}
