"""Fused weights: their layouts, and what is not split. Orientation, which shapes tell."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.plans.roles import Part
from lightning_memopt.sharding.layout import Slot

HEADS, SIZE, WIDTH = 4, 8, 32


def slots(parts):
    """Return role, start, length and period of every part."""
    return [(part.role, part.slot.start, part.slot.length, part.slot.period) for part in parts]


def attention(cls="Attention", name="qkv", rows=96, columns=WIDTH, **attributes):
    """Return a layer with one fused weight in a module of the class ``cls``."""
    module = type(cls, (nn.Module,), {})()
    module.add_module(name, nn.Linear(columns, rows, bias=False))
    for key, value in attributes.items():
        setattr(module, key, value)
    return nn.ModuleDict({"attn": module})


def fused(*args, **kwargs):
    (parts,) = lm.classify(attention(*args, **kwargs)).values()
    return parts


HEAD = {"num_heads": HEADS, "head_dim": SIZE}
STACKED = [("query", 0, 32, None), ("key", 32, 32, None), ("value", 64, 32, None)]
PER_HEAD = [("query", 0, 8, 24), ("key", 8, 8, 24), ("value", 16, 8, 24)]
FEW_KEYS = [("query", 0, 32, None), ("key", 32, 16, None), ("value", 48, 16, None)]
PER_GROUP = [("query", 0, 16, 32), ("key", 16, 8, 32), ("value", 24, 8, 32)]
ONE_KEY = [("query", 0, 32, None), ("key", 32, 8, None), ("value", 40, 8, None)]


@pytest.mark.parametrize(
    ("cls", "name", "rows", "numbers", "expected"),
    [
        ("Attention", "qkv", 96, {}, STACKED),
        ("Attention", "Wqkv", 96, HEAD, STACKED),
        ("Attention", "in_proj_weight", 96, HEAD, STACKED),
        ("Attention", "qkv_proj", 64, HEAD | {"num_key_value_heads": 2}, FEW_KEYS),
        ("Attention", "qkv_proj", 64, HEAD | {"num_key_value_groups": 2}, FEW_KEYS),
        ("Attention", "query_key_value", 96, HEAD, PER_HEAD),
        ("Attention", "attn", 64, HEAD | {"n_query_groups": 2}, PER_GROUP),
        ("FalconAttention", "query_key_value", 64, HEAD | {"num_kv_heads": 2}, PER_GROUP),
        ("FalconAttention", "query_key_value", 48, HEAD | {"num_kv_heads": 1}, ONE_KEY),
        ("FalconAttention", "query_key_value", 96, HEAD | {"num_kv_heads": 4}, PER_HEAD),
        ("GPTBigCodeAttention", "c_attn", 96, HEAD | {"kv_heads": 4}, PER_HEAD),
        ("GPTBigCodeAttention", "c_attn", 48, HEAD | {"kv_heads": 1}, ONE_KEY),
        ("MiniMaxLightningAttention", "qkv_proj", 96, HEAD, PER_HEAD),
        ("DisentangledSelfAttention", "in_proj", 96, HEAD, PER_HEAD),
        ("CodeGenAttention", "qkv_proj", 96, {}, [("query", 0, 8, 24), ("value", 8, 8, 24), ("key", 16, 8, 24)]),
        ("Attention", "to_kv", 64, {}, [("key", 0, 32, None), ("value", 32, 32, None)]),
        ("Attention", "kv_proj", 32, HEAD | {"kv_heads": 2}, [("key", 0, 16, None), ("value", 16, 16, None)]),
        (
            "Attention",
            "kv_b_proj",
            56,
            {"num_heads": 4, "qk_head_dim": 12, "qk_nope_head_dim": 8, "v_head_dim": 6},
            [("key", 0, 8, 14), ("value", 8, 6, 14)],
        ),
        ("Qwen3NextAttention", "q_proj", 64, HEAD, [("query", 0, 8, 16), ("linear", 8, 8, 16)]),
    ],
)
def test_layouts(cls, name, rows, numbers, expected):
    parts = fused(cls, name, rows, **numbers)
    assert slots(parts) == expected
    covered = sum(part.slot.count(rows) for part in parts)
    assert covered == rows
    assert parts[0].why == (f"word {name}" if cls == "Attention" else f"class {cls}")


def test_queries_without_gates_stay_whole():
    assert fused("Qwen3NextAttention", "q_proj", 32, **HEAD) == (Part("query", head_dim=8),)


def test_stripes_repeat_what_one_slot_covers():
    assert [Slot(0, 8, 8, 24).count(size) for size in (0, 8, 12, 24, 96)] == [0, 0, 4, 8, 32]
    assert [Slot(0, 8, 8).count(size) for size in (0, 8, 12, 24)] == [0, 0, 4, 8]


@pytest.mark.parametrize(
    ("cls", "name", "rows", "numbers", "why"),
    [
        ("Attention", "qkv", 64, {}, "64 rows are not 3 × 32"),
        ("Attention", "qkv_proj", 64, HEAD | {"num_key_value_heads": 1}, "64 rows are not 32 + 8 + 8"),
        ("Attention", "query_key_value", 96, {}, "head_dim, heads unknown"),
        ("Attention", "query_key_value", 64, HEAD | {"num_kv_heads": 2}, "64 rows are not 4 × (8 + 8 + 8)"),
        ("FalconAttention", "query_key_value", 96, HEAD | {"num_kv_heads": 2}, "96 rows are not 2 × (16 + 8 + 8)"),
        ("FalconAttention", "query_key_value", 96, HEAD | {"num_kv_heads": 3}, "heads / kv_heads * head_dim is no"),
        ("CodeGenAttention", "qkv_proj", 64, {}, "64 rows are not 3 × 32"),
        ("Attention", "kv_b_proj", 56, HEAD, "qk_nope_head_dim, v_head_dim unknown"),
    ],
)
def test_what_does_not_add_up_is_not_split(cls, name, rows, numbers, why):
    (part,) = fused(cls, name, rows, **numbers)
    assert (part.role, part.slot) == ("linear", None)
    assert part.why.startswith(f"not split: {why}")


def test_names_alone_split_where_shapes_suffice():
    def found(name, shape, **kwargs):
        return lm.classify({name: shape}.items(), **kwargs)[name]

    assert slots(found("h.0.attn.qkv.weight", (96, 32))) == STACKED
    assert slots(found("h.0.attn.query_key_value.weight", (96, 32), head_dim=8)) == PER_HEAD
    (part,) = found("h.0.attn.query_key_value.weight", (96, 32))
    assert (part.role, part.why) == ("other", "not split: head_dim, heads unknown")
    (part,) = found("h.0.attn.qkv.weight", (64, 32))
    assert (part.role, part.why) == ("other", "not split: 64 rows are not 3 × 32")
    (part,) = found("h.0.attn.qkv.weight", (3, 32, 32))
    assert (part.role, part.why) == ("other", "not split: 3 dimensions")


# --- heads -----------------------------------------------------------------------------------------------------------


def head_dims(**kwargs):
    return [part.head_dim for part in fused(**kwargs)]


def test_heads_of_fused_weights():
    assert head_dims(rows=64, num_key_value_heads=2, **HEAD) == [8, 8, None]
    assert head_dims(name="query_key_value", **HEAD) == [8, 8, None]
    latent = {"num_heads": 4, "qk_head_dim": 12, "qk_nope_head_dim": 8, "v_head_dim": 6}
    assert head_dims(name="kv_b_proj", rows=56, **latent) == [8, None]


@pytest.mark.parametrize(
    ("attributes", "rows", "expected"),
    [
        ({"head_dim": 8}, 32, 8),
        ({"qk_head_dim": 12, "head_dim": 4}, 48, 12),
        ({"attention_head_size": 8, "head_size": 32}, 32, 8),
        ({"num_heads": 4, "embed_dim": 32}, 32, 8),
        ({"num_heads": 4, "internal_dim": 16, "hidden_size": 32}, 16, 4),
        ({"heads": 4}, 32, 8),  # by the rows
        ({"heads": 5}, 32, None),
        ({"num_heads": True, "head_dim": [8]}, 32, None),
        ({"config": SimpleNamespace(num_attention_heads=4, hidden_size=32)}, 32, 8),
        ({"config": SimpleNamespace(num_attention_heads=4, hidden_size=32, head_dim=16)}, 64, 16),
        ({"config": SimpleNamespace(num_attention_heads=4, hidden_size=32, head_dim=16), "head_dim": 4}, 32, 4),
        ({"config": SimpleNamespace(num_attention_heads=4, hidden_size=32), "num_heads": 2}, 32, 16),
    ],
)
def test_sizes_of_heads(attributes, rows, expected):
    assert fused(name="q_proj", rows=rows, **attributes)[0].head_dim == expected


def test_keys_are_fewer_than_queries():
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)
    assert fused(name="q_proj", rows=32, config=config)[0].head_dim == 8
    assert fused(name="k_proj", rows=16, config=config)[0].head_dim == 8


def test_the_nearest_configuration_counts():
    model = nn.ModuleDict({"text": attention(name="q_proj", rows=32), "vision": attention(name="q_proj", rows=32)})
    model.config = SimpleNamespace(num_attention_heads=4, hidden_size=32)
    model["vision"].config = SimpleNamespace(num_attention_heads=2, hidden_size=32)
    model["text"].config = SimpleNamespace(sampling_rate=16000)
    assert [part.head_dim for (part,) in lm.classify(model).values()] == [8, 16]


class Varying:
    """A configuration that refuses to tell what differs between layers."""

    @property
    def num_attention_heads(self):
        raise RuntimeError("per-layer attribute")


def test_a_configuration_that_refuses_says_nothing():
    assert fused(name="q_proj", rows=32, config=Varying())[0].head_dim is None


# --- orientation -----------------------------------------------------------------------------------------------------


def output_dims(shapes):
    return {name.rpartition("mlp.")[2]: parts[0].output_dim for name, parts in lm.classify(shapes.items()).items()}


@pytest.mark.parametrize(
    ("up", "down", "expected"),
    [
        ((4, 128, 32), (4, 32, 64), -2),  # Mixtral
        ((4, 32, 128), (4, 64, 32), -1),  # gpt-oss, Llama 4
        ((4, 32, 64), (4, 32, 32), -1),  # as wide inside as outside
        ((4, 64, 32), (4, 32, 32), -2),
    ],
)
def test_experts(up, down, expected):
    shapes = {"layers.0.mlp.experts.gate_up_proj": up, "layers.0.mlp.experts.down_proj": down}
    assert set(output_dims(shapes).values()) == {expected}


def test_experts_without_gates_follow_the_embedding():
    tokens = {"embed_tokens.weight": (99, 32)}
    linear = {"mlp.experts.up_proj": (4, 64, 32), "mlp.experts.down_proj": (4, 32, 64)}
    swapped = {"mlp.experts.up_proj": (4, 32, 64), "mlp.experts.down_proj": (4, 64, 32)}
    assert set(output_dims(linear).values()) == set(output_dims(tokens | linear).values()) == {-2}
    assert output_dims(tokens | swapped) == {
        "embed_tokens.weight": -2,
        "experts.up_proj": -1,
        "experts.down_proj": -1,
    }


def test_names_that_conv1d_and_linear_share():
    transposed = {"wte.weight": (99, 32), "h.0.mlp.c_fc.weight": (32, 64), "h.0.mlp.c_proj.weight": (64, 32)}
    linear = {"wte.weight": (99, 32), "h.0.mlp.c_fc.weight": (64, 32), "h.0.mlp.c_proj.weight": (32, 64)}
    assert output_dims(transposed) == {"wte.weight": -2, "c_fc.weight": -1, "c_proj.weight": -1}
    assert set(output_dims(linear).values()) == {-2}

    class Conv1D(nn.Module):  # a module tells for itself, whatever the shapes
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 4))

    model = nn.ModuleDict({"mlp": nn.ModuleDict({"c_fc": Conv1D(), "c_proj": nn.Linear(4, 8, bias=False)})})
    assert [(part.role, part.output_dim) for (part,) in lm.classify(model).values()] == [("mlp", -1), ("mlp", -2)]


def test_cross_attention_of_gpt2_is_keys_and_values():
    (parts,) = lm.classify({"h.0.crossattention.c_attn.weight": (32, 64)}.items()).values()
    assert slots(parts) == [("key", 0, 32, None), ("value", 32, 32, None)]
    assert {(part.slot.dim, part.output_dim) for part in parts} == {(1, -1)}


def test_xlnets_stacks_are_matrices():
    found = lm.classify({f"layer.0.rel_attn.{word}": (32, 4, 8) for word in "qkvro"}.items(), head_dim=8)
    assert list(found.values()) == [
        (Part("query", None, -1, 8, flatten=True),),
        (Part("key", None, -1, 8, flatten=True),),
        (Part("value", None, -1, flatten=True),),
        (Part("linear", None, -1, flatten=True),),
        (Part("attention_output", flatten=True),),
    ]


def test_what_a_model_tells_of_heads_is_not_replaced_by_thirds():
    model = nn.Module()
    model.attention = nn.Module()
    model.attention.num_heads, model.attention.num_kv_heads, model.attention.head_dim = 8, 2, 6
    model.attention.qkv = nn.Linear(32, 96, bias=False)
    (part,) = lm.classify(model)["attention.qkv.weight"]
    assert (part.role, part.why) == ("linear", "not split: 96 rows are not 48 + 12 + 12")
