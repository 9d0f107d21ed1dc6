"""Roles of every supported family, by name and by model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.plans.roles import NAMING_SCHEMES, Part, canonical_names
from lightning_memopt.sharding.slot import Slot
from tests._models import tiny_gpt2, tiny_llama


def roles(model, **kwargs):
    return {name: tuple(part.role for part in parts) for name, parts in lm.classify(model, **kwargs).items()}


def test_llama_from_transformers():
    found = roles(tiny_llama())
    layer = "model.layers.1."
    assert found["model.embed_tokens.weight"] == ("embedding",)
    assert found["lm_head.weight"] == ("head",)
    assert found[layer + "self_attn.q_proj.weight"] == ("query",)
    assert found[layer + "self_attn.k_proj.weight"] == ("key",)
    assert found[layer + "self_attn.v_proj.weight"] == ("value",)
    assert found[layer + "self_attn.o_proj.weight"] == ("attention_output",)
    for part in ("gate", "up", "down"):
        assert found[f"{layer}mlp.{part}_proj.weight"] == ("mlp",)
    assert found[layer + "input_layernorm.weight"] == ("vector",)
    assert not any("other" in parts for parts in found.values())


def test_llama_heads_come_from_the_model_only():
    model = tiny_llama()
    with_model = lm.classify(model)
    assert with_model["model.layers.0.self_attn.q_proj.weight"] == (Part("query", head_dim=8),)
    assert with_model["model.layers.0.self_attn.v_proj.weight"] == (Part("value"),)
    names = [(name, param.shape) for name, param in model.named_parameters()]
    assert lm.classify(names)["model.layers.0.self_attn.q_proj.weight"] == (Part("query"),)
    assert lm.classify(names, head_dim=4)["model.layers.0.self_attn.k_proj.weight"] == (Part("key", head_dim=4),)


def test_head_dim_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"`head_dim` 5 does not divide the 32 outputs of '.*q_proj.weight'"):
        lm.classify(tiny_llama(), head_dim=5)


def test_meta_names():
    shapes = {
        "tok_embeddings.weight": (8, 4),
        "layers.0.attention.wq.weight": (4, 4),
        "layers.0.attention.wo.weight": (4, 4),
        "layers.0.feed_forward.w2.weight": (4, 8),
        "output.weight": (8, 4),
    }
    assert list(roles(shapes.items()).values()) == [
        ("embedding",),
        ("query",),
        ("attention_output",),
        ("mlp",),
        ("head",),
    ]


def test_mixture_of_experts_is_mlp_and_its_router_is_other():
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.mlp.experts.gate_up_proj": (2, 16, 4),
        "model.layers.0.mlp.experts.down_proj": (2, 4, 8),
        "model.layers.0.mlp.experts.3.w1.weight": (4, 8),
        "model.layers.0.mlp.gate.weight": (2, 4),
    }
    assert list(roles(shapes.items()).values()) == [("query",), ("mlp",), ("mlp",), ("mlp",), ("other",)]


def test_gpt2_is_transposed_and_fused():
    found = lm.classify(tiny_gpt2())
    fused = found["transformer.h.0.attn.c_attn.weight"]
    assert fused == (
        Part("query", Slot(1, 0, 32), -1, 8),
        Part("key", Slot(1, 32, 32), -1, 8),
        Part("value", Slot(1, 64, 32), -1),
    )
    assert found["transformer.h.0.attn.c_proj.weight"] == (Part("attention_output", output_dim=-1),)
    assert found["transformer.h.0.mlp.c_proj.weight"] == (Part("mlp", output_dim=-1),)
    assert found["transformer.wpe.weight"] == (Part("embedding"),)
    assert found["transformer.h.0.attn.c_attn.bias"] == (Part("vector"),)


def test_bert_from_transformers():
    layer = "bert.encoder.layer.0"
    shapes = {
        "bert.embeddings.word_embeddings.weight": (16, 4),
        "bert.embeddings.token_type_embeddings.weight": (2, 4),
        f"{layer}.attention.self.query.weight": (4, 4),
        f"{layer}.attention.self.key.weight": (4, 4),
        f"{layer}.attention.self.value.weight": (4, 4),
        f"{layer}.attention.output.dense.weight": (4, 4),
        f"{layer}.intermediate.dense.weight": (16, 4),
        f"{layer}.output.dense.weight": (4, 16),
        f"{layer}.output.LayerNorm.weight": (4,),
        "cls.predictions.decoder.weight": (16, 4),
        "cls.predictions.transform.dense.weight": (4, 4),
    }
    expected = ["embedding", "embedding", "query", "key", "value", "attention_output", "mlp", "mlp", "vector", "head"]
    assert list(roles(shapes.items()).values()) == [(role,) for role in (*expected, "other")]


def test_vit_from_transformers():
    layer = "vit.layers.0"
    shapes = {
        "vit.embeddings.position_embeddings": (1, 5, 4),
        "vit.embeddings.patch_embeddings.projection.weight": (4, 1, 2, 2),
        f"{layer}.attention.q_proj.weight": (4, 4),
        f"{layer}.attention.o_proj.weight": (4, 4),
        f"{layer}.mlp.fc1.weight": (16, 4),
        f"{layer}.mlp.fc2.weight": (4, 16),
        "classifier.weight": (3, 4),
    }
    expected = ["embedding", "embedding", "query", "attention_output", "mlp", "mlp", "head"]
    assert list(roles(shapes.items()).values()) == [(role,) for role in expected]


def test_nanogpt_has_gpt2s_names_and_linear_weights():
    shapes = {
        "transformer.wte.weight": (16, 4),
        "transformer.h.0.attn.c_attn.weight": (12, 4),
        "transformer.h.0.attn.c_proj.weight": (4, 4),
        "transformer.h.0.mlp.c_fc.weight": (16, 4),
        "lm_head.weight": (16, 4),
    }
    found = lm.classify(shapes.items())
    assert [part.slot for part in found["transformer.h.0.attn.c_attn.weight"]] == [
        Slot(0, 0, 4),
        Slot(0, 4, 4),
        Slot(0, 8, 4),
    ]
    assert found["transformer.h.0.mlp.c_fc.weight"] == (Part("mlp"),)  # not transposed


class NanoAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_head, self.n_embd = 2, 8
        self.c_attn = nn.Linear(8, 24, bias=False)


def test_heads_of_a_module_that_counts_them():
    model = nn.ModuleDict({"attn": NanoAttention()})
    assert [part.head_dim for part in lm.classify(model)["attn.c_attn.weight"]] == [4, 4, None]


def test_torch_multihead_attention():
    layer = nn.TransformerEncoderLayer(16, 4, 32)
    found = lm.classify(layer)
    fused = found["self_attn.in_proj_weight"]
    assert [(part.role, part.slot, part.head_dim) for part in fused] == [
        ("query", Slot(0, 0, 16), 4),
        ("key", Slot(0, 16, 16), 4),
        ("value", Slot(0, 32, 16), None),
    ]
    assert found["self_attn.out_proj.weight"] == (Part("attention_output"),)
    assert found["linear1.weight"] == (Part("mlp"),)
    cross = lm.classify(nn.ModuleDict({"attn": nn.MultiheadAttention(16, 4, kdim=8, vdim=8)}))
    assert [cross[f"attn.{name}_proj_weight"][0].role for name in "qkv"] == ["query", "key", "value"]


def test_an_unknown_architecture_is_other():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 4))
    assert roles(model)["0.weight"] == ("other",)
    assert roles(model)["1.weight"] == ("other",)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("module._orig_mod.model.layers.0.weight", "model.layers.0.weight"),
        ("model._checkpoint_wrapped_module.mlp.weight", "model.mlp.weight"),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module.b", "a.b"),
        ("module", "module"),
    ],
)
def test_wrappers_do_not_change_names(name, expected):
    assert canonical_names([name]) == [expected]


def test_compiled_and_wrapped_models_classify_alike():
    model = tiny_llama()
    wrapped = {f"module._orig_mod.{name}": param.shape for name, param in model.named_parameters()}
    plain = {name: param.shape for name, param in model.named_parameters()}
    assert lm.classify(wrapped.items()) == lm.classify(plain.items())


def test_a_new_family_is_one_registration():
    scheme = lm.NamingScheme("toy", (lm.Rule(r"\.wqkv$", ("query", "key", "value"), fused_dim=0),))
    lm.register_naming_scheme(scheme)
    try:
        found = roles({"a.wqkv": (6, 2), "b.wqkv": (5, 2)}.items())
        assert found == {"a.wqkv": ("query", "key", "value"), "b.wqkv": ("other",)}
        with pytest.raises(ValueError, match="naming scheme 'toy' is registered already"):
            lm.register_naming_scheme(scheme)
    finally:
        NAMING_SCHEMES._entries.pop("toy")


def test_bad_schemes_are_refused():
    with pytest.raises(ValueError, match="Unknown role 'queri'. Did you mean 'query'"):
        lm.NamingScheme("bad", (lm.Rule("x", ("queri",)),))
    with pytest.raises(ValueError, match="has 2 roles and `fused_dim` None"):
        lm.NamingScheme("bad", (lm.Rule("x", ("query", "key")),))


@pytest.mark.parametrize("name", NAMING_SCHEMES.names())
def test_every_scheme_is_data_only(name):
    scheme = NAMING_SCHEMES.get(name)
    assert scheme.rules
    assert all(isinstance(rule.pattern, str) for rule in scheme.rules)


def test_slots_cover_fused_weights_exactly():
    for model in (tiny_gpt2(), nn.MultiheadAttention(16, 4)):
        shapes = {name: param.shape for name, param in model.named_parameters()}
        for name, parts in lm.classify(model).items():
            covered = [
                math.prod(part.slot.length if dim == part.slot.dim else size for dim, size in enumerate(shapes[name]))
                for part in parts
                if part.slot is not None
            ]
            if covered:
                assert sum(covered) == torch.Size(shapes[name]).numel()
