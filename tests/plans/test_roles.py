"""Roles by name, module and shape."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lightning_memopt as lm
from lightning_memopt.plans.roles import Part, canonical_names, names_without_role
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


def test_what_is_classified_is_a_module_or_shapes():
    for wrong in (tiny_llama().parameters(), tiny_llama().named_parameters(), "llama"):
        with pytest.raises(TypeError, match="`model` must be a module, or pairs of name and shape: pass the"):
            lm.classify(wrong)


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


def test_mixture_of_experts_is_mlp_beside_a_router():
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.mlp.experts.gate_up_proj": (2, 16, 4),
        "model.layers.0.mlp.experts.down_proj": (2, 4, 8),
        "model.layers.0.mlp.experts.3.w1.weight": (4, 8),
        "model.layers.0.mlp.gate.weight": (2, 4),
    }
    assert list(roles(shapes.items()).values()) == [("query",), ("mlp",), ("mlp",), ("mlp",), ("router",)]


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
    assert list(roles(shapes.items()).values()) == [(role,) for role in (*expected, "linear")]


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


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.strength = nn.Parameter(torch.ones(4, 4))
        self.level_embed = nn.Parameter(torch.ones(3, 4))
        self.scale = nn.Parameter(torch.ones(1, 4, 1))


class HeadNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))


def found(model):
    """Return role and reason of every parameter but biases."""
    parts = lm.classify(model)
    return {name: (parts[0].role, parts[0].why) for name, parts in parts.items() if not name.endswith("bias")}


def test_modules_decide_before_words():
    model = nn.ModuleDict(
        {
            "q_proj": nn.Embedding(8, 4),
            "fc1": nn.Conv1d(4, 8, 31),
            "mlp": nn.ModuleDict({"fc1": nn.Conv2d(4, 8, 1), "dwconv": nn.Conv2d(8, 8, 3, groups=8)}),
            "patch_embed": nn.ModuleDict({"proj": nn.Conv2d(3, 4, 2)}),
            "k_proj": HeadNorm(),
            "up": nn.ConvTranspose1d(4, 8, 20),
            "rnn": nn.LSTM(4, 8),
            "anything": nn.Linear(4, 8),
            "gated": Gated(),
        }
    )
    assert found(model) == {
        "q_proj.weight": ("embedding", "module Embedding"),
        "fc1.weight": ("convolution", "module Conv1d"),
        "mlp.fc1.weight": ("mlp", "word fc1"),
        "mlp.dwconv.weight": ("convolution", "module Conv2d"),
        "patch_embed.proj.weight": ("embedding", "word patch_embed.proj"),
        "k_proj.weight": ("vector", "module HeadNorm"),
        "up.weight": ("convolution", "module ConvTranspose1d"),
        "rnn.weight_ih_l0": ("linear", "module LSTM"),
        "rnn.weight_hh_l0": ("linear", "module LSTM"),
        "rnn.bias_ih_l0": ("vector", "one dimension"),
        "rnn.bias_hh_l0": ("vector", "one dimension"),
        "anything.weight": ("linear", "module Linear"),
        "gated.strength": ("other", "unknown word strength"),
        "gated.level_embed": ("embedding", "word level_embed"),
        "gated.scale": ("vector", "shape"),
    }
    parts = lm.classify(model)
    flat = {name for name, (part,) in parts.items() if part.flatten}
    assert flat == {"fc1.weight", "up.weight"}  # more dimensions are flattened anyway
    assert names_without_role(model) == ["gated.strength"]


def test_reasons_do_not_distinguish_parts():
    assert Part("mlp", why="word fc1") == Part("mlp", why="scheme mine")


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("encoder.layers.0.attention.output.weight", (4, 4), "attention_output"),
        ("encoder.layers.0.feed_forward.output.weight", (4, 8), "mlp"),
        ("output.weight", (8, 4), "head"),
        ("model.classifier.out_proj.weight", (2, 4), "head"),
        ("layers.0.mixer.out_proj.weight", (4, 8), "other"),
        ("rwkv.blocks.0.attention.key.weight", (4, 4), "key"),
        ("rwkv.blocks.0.feed_forward.key.weight", (8, 4), "mlp"),
        ("layers.0.self_attn.gate_proj.weight", (4, 4), "linear"),
        ("layers.0.mlp.gate_proj.weight", (4, 4), "mlp"),
        ("layers.0.mlp.router.classifier.weight", (4, 8), "router"),
        ("classifier.weight", (4, 8), "head"),
        ("blocks.0.ff.net.0.proj.weight", (8, 4), "mlp"),
        ("blocks.0.ff.net.2.weight", (4, 8), "mlp"),
        ("blocks.0.mlp.0.weight", (4, 8), "mlp"),
        ("merger.mlp.0.weight", (4, 8), "other"),
        ("blocks.0.attn.to_out.0.weight", (4, 4), "attention_output"),
        ("layers.0.cross_attn.q_content_proj.weight", (4, 4), "query"),
        ("layers.0.self_attn.sa_kpos_proj.weight", (4, 4), "other"),
        ("layers.0.self_attn.relative_k_proj.weight", (4, 4), "other"),
        ("layers.0.self_attn.indexer.wk.weight", (4, 4), "linear"),
        ("layers.0.self_attn.q_proj.linear.weight", (4, 4), "query"),
        ("layers.0.output_query.dense.weight", (4, 8), "mlp"),
        ("layers.0.continuous_position_bias_mlp.0.weight", (8, 2), "other"),
        ("layers.0.self_attn.q_norm.weight", (4, 8), "vector"),
        ("layers.0.mlp.experts.gate_up_proj_bias", (2, 8), "vector"),
        ("lm_head.weight", (1, 8), "head"),
        ("layers.0.shared_expert_gate.weight", (1, 8), "vector"),
        ("vit.embeddings.cls_token", (1, 1, 8), "embedding"),
        ("vae.conv.weight", (8, 4, 3, 3), "convolution"),
        ("encoder.conv_pos.weight", (8, 4, 128), "convolution"),
        ("encoder.stem.weight", (8, 4, 9), "convolution"),
        ("encoder.stem.weight", (8, 4, 16), "other"),
    ],
)
def test_words_and_containers(name, shape, role):
    assert roles({name: shape}.items()) == {name: (role,)}


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.self_attn.q_proj.base_layer.weight",
        "layers.0.self_attn.q_proj.modules_to_save.default.weight",
        "layers.0.self_attn.q_proj.original_module.weight",
        "layers.0.self_attn.q_proj.parametrizations.weight.original1",
        "layers.0.self_attn.q_proj.weight_v",
    ],
)
def test_wrappers_of_a_layer_hide_no_word_and_stay_in_the_name(name):
    assert roles({name: (4, 4)}.items()) == {name: ("query",)}


@pytest.mark.parametrize("factor", ["lora_A.default.weight", "lora_B.default.weight", "lora_embedding_A.default"])
def test_adapters_are_lora_whatever_they_adapt(factor):
    name = f"base_model.model.layers.0.self_attn.q_proj.{factor}"
    assert lm.classify({name: (8, 64)}.items())[name][0].why == f"word {factor.partition('.')[0]}"
    assert roles({name: (8, 64)}.items()) == {name: ("lora",)}


def test_a_weight_normed_kernel_is_found_through_its_parametrization():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 31), dim=2)
    parts = lm.classify(nn.ModuleDict({"pos_conv_embed": conv}))
    assert [(part.role, part.flatten) for (part,) in parts.values()] == [
        ("vector", False),
        ("vector", False),
        ("convolution", True),
    ]


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


@pytest.mark.parametrize(
    ("name", "role"),
    [
        # torchvision, OpenAI's Whisper, OLMo, Megatron-LM, the annotated transformer, a lecture's GPT, LXMERT, fairseq
        ("encoder.layers.encoder_layer_0.mlp.0.weight", "mlp"),
        ("encoder.layers.encoder_layer_0.self_attention.out_proj.weight", "attention_output"),
        ("decoder.blocks.0.cross_attn.out.weight", "attention_output"),
        ("transformer.blocks.0.attn_out.weight", "attention_output"),
        ("transformer.blocks.0.ff_proj.weight", "mlp"),
        ("transformer.blocks.0.ff_out.weight", "mlp"),
        ("transformer.ff_out.weight", "head"),
        ("decoder.layers.0.self_attention.linear_proj.weight", "attention_output"),
        ("decoder.layers.0.mlp.linear_fc1.weight", "mlp"),
        ("encoder.layers.0.self_attn.W_q.weight", "query"),
        ("encoder.layers.0.self_attn.W_o.weight", "attention_output"),
        ("encoder.layers.0.feed_forward.w_2.weight", "mlp"),
        ("decoder.layers.0.attention.fc_out.weight", "attention_output"),
        ("decoder.fc_out.weight", "head"),
        ("encoder.layer_stack.0.slf_attn.w_qs.weight", "query"),
        ("to_logits.weight", "head"),
        ("output_layer.weight", "head"),
        ("token_embedding_table.weight", "embedding"),
        ("blocks.0.ffwd.net.0.weight", "mlp"),
        ("blocks.0.sa.proj.weight", "attention_output"),
        ("encoder.x_layers.0.lang_self_att.output.dense.weight", "attention_output"),
    ],
)
def test_words_of_other_code(name, role):
    assert roles({name: (8, 8)}.items()) == {name: (role,)}


def test_megatrons_groups():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attention = nn.Module()
            self.self_attention.linear_qkv = nn.Linear(32, 64, bias=False)

    model = Layer()
    model.config = SimpleNamespace(num_attention_heads=4, num_query_groups=2, kv_channels=8, hidden_size=32)
    parts = lm.classify(model)["self_attention.linear_qkv.weight"]
    assert [(part.role, part.slot) for part in parts] == [
        ("query", Slot(0, 0, 16, 32)),
        ("key", Slot(0, 16, 8, 32)),
        ("value", Slot(0, 24, 8, 32)),
    ]


def test_what_projects_no_queries_of_an_attention():
    found = roles(
        {
            "model.layers.0.self_attn.indexer.kv_proj.weight": (32, 16),
            "model.layers.0.ada_rms_norm.linear1.weight": (32, 16),
            "encoder.layer.0.bottleneck.attention.dense.weight": (16, 32),
        }.items()
    )
    assert {role for (role,) in found.values()} <= {"linear", "other"}


def test_kernels_named_embed_are_convolutions_unless_they_embed_patches():
    model = nn.ModuleDict({"embed": nn.Conv1d(4, 8, 7), "patch_embed": nn.Conv1d(4, 8, 4), "image": nn.Module()})
    model["image"].embed = nn.Conv2d(3, 8, 4, 4)
    assert roles(model) == {
        "embed.weight": ("convolution",),
        "embed.bias": ("vector",),
        "patch_embed.weight": ("embedding",),
        "patch_embed.bias": ("vector",),
        "image.embed.weight": ("embedding",),
        "image.embed.bias": ("vector",),
    }


@pytest.mark.parametrize("factor", ["hada_w1_a.default", "lokr_w2.default"])
def test_other_low_rank_adapters_are_lora(factor):
    name = f"base_model.model.layers.0.self_attn.q_proj.{factor}"
    assert roles({name: (8, 64)}.items()) == {name: ("lora",)}
    assert roles({name: (1, 64)}.items()) == {name: ("vector",)}


def test_the_last_layer_of_a_classifier_is_the_head():
    model = nn.Module()
    model.classifier = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    model.lm_heads = nn.ModuleList(nn.Linear(16, 32) for _ in range(2))
    model.pre_classifier = nn.Linear(16, 16)
    matrices = {name: role for name, (role,) in roles(model).items() if name.endswith("weight")}
    assert matrices == {
        "classifier.0.weight": "linear",
        "classifier.2.weight": "linear",
        "classifier.4.weight": "head",
        "lm_heads.0.weight": "head",
        "lm_heads.1.weight": "head",
        "pre_classifier.weight": "linear",
    }


def test_stacks_of_experts_with_short_names():
    shapes = {"tok_embeddings.weight": (64, 32)}
    names = [f"layers.0.feed_forward.experts.{word}" for word in ("w1", "w2", "w3")]
    found = lm.classify((shapes | dict(zip(names, [(4, 32, 64), (4, 64, 32), (4, 32, 64)], strict=True))).items())
    assert [found[name] for name in names] == [(Part("mlp", output_dim=-1),)] * 3
    found = lm.classify((shapes | dict(zip(names, [(4, 64, 32), (4, 32, 64), (4, 64, 32)], strict=True))).items())
    assert [found[name] for name in names] == [(Part("mlp"),)] * 3
