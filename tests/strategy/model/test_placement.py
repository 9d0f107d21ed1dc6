"""Along which dimension parameters are sharded."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning.pytorch")

import lightning_memopt as lm
from lightning_memopt.plans.placement import shard_dim, shard_dims
from tests._models import big_gpt2, big_llama, tiny_llama


@pytest.mark.parametrize(
    ("name", "shape", "size", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", (16, 8), 4, 0),  # the long side
        ("model.layers.0.mlp.down_proj.weight", (8, 16), 4, 1),
        ("model.layers.0.mlp.down_proj.weight", (8, 18), 4, 0),  # uneven: only dimension 0
        ("model.layers.0.mlp.up_proj.weight", (18, 8), 4, 0),  # uneven, but dimension 0 anyway
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), 4, 1),  # heads are rows
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), 3, 0),
        ("transformer.h.0.attn.c_attn.weight", (8, 24), 4, 0),  # GPT-2's: fused along columns
        ("transformer.h.0.attn.c_proj.weight", (8, 8), 4, 0),  # GPT-2's: heads are columns of outputs
        ("transformer.h.0.mlp.c_fc.weight", (8, 32), 4, 1),
        ("self_attn.in_proj_weight", (24, 8), 4, 1),  # torch's: fused along rows
        ("self_attn.in_proj_weight", (24, 8), 3, 0),
        ("model.embed_tokens.weight", (96, 8), 4, 0),
        ("model.norm.weight", (8,), 4, 0),
        ("model.norm.weight", (3,), 4, 0),
        ("unknown.weight", (4, 64), 4, 1),
        ("conv.weight", (8, 64, 3), 4, 0),  # a kernel, flattened
        ("conv.weight", (8, 64, 3, 3), 4, 0),
        ("experts.weight", (8, 16, 32), 4, 0),  # a stack
        ("experts.weight", (3, 16, 32), 4, 2),  # too few matrices: their long side
        ("experts.weight", (3, 64, 32), 4, 1),
        ("experts.weight", (3, 63, 31), 4, 0),
        ("scalar", (), 4, 0),
    ],
)
def test_placement(name, shape, size, expected):
    transposed = ("transformer.h.1.mlp.c_fc.weight", (8, 32))  # tells what GPT-2's names mean
    parts = lm.classify([(name, shape), transposed])[name]
    assert shard_dim(shape, parts, size) == expected


@pytest.mark.parametrize("size", [1, 2, 8, 64, 1024])
@pytest.mark.parametrize("model", [big_llama("1B"), big_gpt2()], ids=["llama", "gpt2"])
def test_placement_of_large_models(model, size):
    """`fully_shard` would refuse a dimension other than 0 that is not divided evenly."""
    dims = shard_dims(model, size)
    parts = lm.classify(model)
    for name, param in model.named_parameters():
        dim = dims[param]
        assert dim == 0 or param.shape[dim] % size == 0
        slot = parts[name][0].slot
        other = param.shape[1 - slot.dim] if slot is not None else 0
        assert slot is None or dim != slot.dim or other % size


def test_placement_is_of_the_global_shape_and_the_name():
    with torch.device("meta"):
        model = tiny_llama()
    real = tiny_llama()
    assert list(shard_dims(model, 4).values()) == list(shard_dims(real, 4).values())
