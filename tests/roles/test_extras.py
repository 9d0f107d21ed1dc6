"""Weights of other libraries, where they are installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from tests._models import tiny_gpt2, tiny_llama
from tests.roles._cases import VOCAB, Case, ids, noise
from tests.roles._decoders import ATTENTION, GPT2_EMBEDDINGS
from tests.roles.test_layouts import check_order, check_parts
from tests.roles.test_orientation import check_orientation
from tests.roles.test_truth import check

IMAGES = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 5}
WINDOWS = {"img_size": 16, "patch_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}
TIMM_BLOCK = """
patch_embed.proj.weight              embedding
*.attn.proj.weight                   attention_output
*.mlp.fc{1,2}.weight                 mlp
head{,.fc}.weight                    head
"""
CONVNEXT = (
    """
    stem.0.weight                                                   convolution or embedding
    *.{downsample.1,conv_dw}.weight                                 convolution
    """
    + TIMM_BLOCK
)
TIMM_VIT = (
    TIMM_BLOCK
    + """
cls_token                            vector or embedding
pos_embed                            embedding
*.attn.qkv.weight                    query/8@0:32 key/8@32:32 value@64:32
"""
)
DIFFUSION_BLOCK = """
*.attn{1,2}.to_q.weight              query/8
*.attn{1,2}.to_k.weight              key/8
*.attn{1,2}.to_v.weight              value
*.attn{1,2}.to_out.0.weight          attention_output
*.ff.net.{0.proj,2}.weight           mlp
"""
LITGPT = """
transformer.wte.weight               embedding
lm_head.weight                       head
*.attn.proj.weight                   attention_output
*.mlp.{fc,fc_1,fc_2,proj}.weight     mlp
"""
ADAPTERS = """
*.lora_{A,B}.default.weight          lora
*.lora_embedding_{A,B}.default       lora
"""
NAMES = """
*.lm_head.*weight                        head
*.embed_tokens.{base_layer.,}weight      embedding
*.mlp.*_proj.{base_layer.,}weight        mlp
*.q_proj.{base_layer.,}weight            query/8
"""


def adapted_llama() -> nn.Module:
    import peft

    targets = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    return peft.get_peft_model(tiny_llama(layers=1), peft.LoraConfig(r=4, **targets))


def adapted_gpt2() -> nn.Module:
    import peft

    return peft.get_peft_model(
        tiny_gpt2(layers=1), peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    )


def litgpt_llama() -> nn.Module:
    from litgpt.model import GPT, Config

    heads = {"n_head": 4, "n_embd": 32, "n_query_groups": 2, "head_size": 16, "rotary_percentage": 1.0}
    names = {"mlp_class_name": "LLaMAMLP", "norm_class_name": "RMSNorm", "bias": False, "intermediate_size": 80}
    return GPT(Config(block_size=16, n_layer=1, padded_vocab_size=VOCAB, **heads, **names))


def litgpt_pythia() -> nn.Module:
    from litgpt.model import GPT, Config

    return GPT(Config(block_size=16, n_layer=1, n_head=4, n_embd=32, padded_vocab_size=VOCAB))


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=24,
        attention_head_dim=4,  # the number of heads, in this class
        norm_num_groups=8,
    )


def diffusion_transformer() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1, "patch_size": 2}
    return DiTTransformer2DModel(**sizes, sample_size=8, num_embeds_ada_norm=10, norm_num_groups=8)


def timm_case(name: str, module: str, cls: str, truth: str, size: int = 16, unproven: str = "", **options: Any) -> Case:
    def make() -> nn.Module:
        return getattr(import_module(f"timm.models.{module}"), cls)(**options)

    return Case(name, make, truth, lambda: {"x": noise(2, 3, size, size)}, proof="all", unproven=unproven)


def _latents() -> dict[str, Any]:
    return {
        "sample": noise(2, 4, 8, 8),
        "timestep": torch.tensor([3, 5]),
        "encoder_hidden_states": noise(2, 5, 24),
    }


def _tokens() -> dict[str, Any]:
    return {"idx": ids()}


PEFT = [
    Case("llama", adapted_llama, ADAPTERS + NAMES + ATTENTION, dict),
    Case(
        "gpt2",
        adapted_gpt2,
        ADAPTERS
        + GPT2_EMBEDDINGS
        + """
        *.attn.c_attn.{base_layer.,}weight   query/8@0:32 key/8@32:32 value@64:32 T
        *.attn.c_proj.weight                 attention_output T
        *.mlp.c_{fc,proj}.{base_layer.,}weight  mlp T
        """,
        dict,
    ),
]
TRAINED = [
    Case(
        "litgpt_llama",
        litgpt_llama,
        LITGPT + "*.attn.qkv.weight  query/16@0:64 key/16@64:32 value@96:32",
        _tokens,
    ),
    Case("litgpt_pythia", litgpt_pythia, LITGPT + "*.attn.qkv.weight  query/8@0:32 key/8@32:32 value@64:32", _tokens),
    timm_case("timm_vit", "vision_transformer", "VisionTransformer", TIMM_VIT, **IMAGES),
    timm_case(
        "timm_vit_pool",
        "vision_transformer",
        "VisionTransformer",
        """
        reg_token                            embedding or other
        attn_pool.latent                     vector or embedding
        attn_pool.q.weight                   query/8
        attn_pool.kv.weight                  key/8@0:32 value@32:32
        attn_pool.proj.weight                attention_output
        """
        + TIMM_VIT,
        **IMAGES,
        global_pool="map",
        class_token=False,
        reg_tokens=2,
    ),
    timm_case(
        "timm_swin",
        "swin_transformer",
        "SwinTransformer",
        """
        *.relative_position_bias_table       embedding
        *.downsample.reduction.weight        linear
        layers.0.*.qkv.weight                query/8@0:16 key/8@16:16 value@32:16
        layers.1.*.qkv.weight                query/8@0:32 key/8@32:32 value@64:32
        """
        + TIMM_BLOCK,
        **WINDOWS,
        num_classes=5,
    ),
    timm_case("timm_eva", "eva", "Eva", TIMM_VIT, **IMAGES, qkv_fused=True),
]
PLAIN = [
    Case(
        "unet",
        unet,
        """
        *.{conv,conv_in,conv_out,conv1,conv2,conv_shortcut}.weight  convolution
        *.proj_{in,out}.weight                                      convolution
        *.time_embedding.linear_{1,2}.weight                        linear
        *.time_emb_proj.weight                                      linear
        mid_block.*.to_q.weight                                     query/16
        mid_block.*.to_k.weight                                     key/16
        """
        + DIFFUSION_BLOCK,
        _latents,
    ),
    Case(
        "dit",
        diffusion_transformer,
        """
        pos_embed.proj.weight                                       embedding
        *.embedding_table.weight                                    embedding
        *.timestep_embedder.linear_{1,2}.weight                     linear
        *.norm1.linear.weight                                       linear
        proj_out_1.weight                                           linear
        proj_out_2.weight                                           linear or head
        """
        + DIFFUSION_BLOCK,
        lambda: {
            "hidden_states": noise(2, 4, 8, 8),
            "timestep": torch.tensor([3, 5]),
            "class_labels": torch.tensor([1, 2]),
        },
    ),
    timm_case(
        "timm_convnext",
        "convnext",
        "ConvNeXt",
        CONVNEXT,
        64,
        depths=(1, 1, 1, 1),
        dims=(8, 16, 16, 16),
        num_classes=5,
    ),
    timm_case(
        "timm_convnext_1x1",
        "convnext",
        "ConvNeXt",
        CONVNEXT,
        64,
        depths=(1, 1, 1, 1),
        dims=(8, 16, 16, 16),
        num_classes=5,
        unproven="*.mlp.*",  # its features are not in the last dimension
        conv_mlp=True,
    ),
]


def _needs(case: Case) -> None:
    library = {"litgpt": "litgpt.model", "timm": "timm"}.get(case.name.partition("_")[0], "diffusers.models")
    pytest.importorskip(library, exc_type=ImportError)


@pytest.mark.parametrize("case", PEFT, ids=repr)
def test_adapters_and_what_they_wrap(case):
    pytest.importorskip("peft", exc_type=ImportError)
    check(case)


@pytest.mark.parametrize("case", [*TRAINED, *PLAIN], ids=repr)
def test_every_weight_is_what_it_is(case):
    _needs(case)
    check(case)


@pytest.mark.parametrize("case", [*TRAINED, *PLAIN], ids=repr)
def test_outputs_are_where_they_are_said_to_be(case):
    _needs(case)
    check_orientation(case)


@pytest.mark.parametrize("case", TRAINED, ids=repr)
def test_fused_parts_are_what_attention_makes_of_them(case):
    _needs(case)
    check_parts(case)
    if case.proof == "order":
        check_order(case)
