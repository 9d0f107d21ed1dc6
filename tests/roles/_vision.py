"""Models of transformers for images, and for images with text."""

from __future__ import annotations

from typing import Any

import torch

from tests.roles._cases import Case, hf, pairs, pixels
from tests.roles._encoders import BERT, BERT_EMBEDDINGS, PROJECTIONS

VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 80}
VIT |= {"image_size": 16, "patch_size": 8}
# Its second stage is 32 wide, and heads have 8 outputs in both stages.
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2}
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 16, "patch_size": 2}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
RESNET |= {"layer_type": "basic", "out_features": ["stage2"]}
DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5, "num_labels": 3}
DETR |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80}
DETR |= {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": RESNET}

MLP = "*.mlp.fc{1,2}.weight  mlp\n"
PATCHES = """
*.{cls,mask,distillation}_token             vector or embedding
*.position_embeddings                       embedding
*.patch_embeddings.projection.weight        embedding
"""
HEAD = "classifier.weight  head\n"
WINDOWS = """
*.patch_embeddings.projection.weight        embedding
*.relative_position_bias_table              embedding
*.downsample.reduction.weight               linear
*.attention.output.dense.weight             attention_output
*.{intermediate,output}.dense.weight        mlp
*.self.query.weight                         query/8
*.self.key.weight                           key/8
*.self.value.weight                         value
"""
CONVNEXT = """
*.patch_embeddings.weight                   embedding
*.dwconv.weight                             convolution
*.downsampling_layer.1.weight               convolution
*.pwconv{1,2}.weight                        mlp
"""
DETECTOR = """
*.convolution.weight                        convolution
model.input_projection.weight               convolution
model.query_{position,refpoint}_embeddings.weight  embedding
class_labels_classifier.weight              head
class_embed.weight                          head
bbox_predictor.layers.*.weight              linear or mlp or head
model.decoder.bbox_embed.layers.*.weight    linear or mlp or head
*.{query_scale,ref_point_head,ref_anchor_head}.layers.*.weight  linear or mlp
*.v_proj.weight                             value
"""
FUSED_BY_THIRDS = "query/8@0:32 key/8@32:32 value@64:32\n"


def _flat_patches() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    places = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).expand(2, 4, 2).float()
    return {"flattened_patches": torch.cat([places, torch.randn(2, 4, 12, generator=generator)], dim=-1)}


def _qwen() -> dict[str, Any]:
    patches = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return {"hidden_states": patches, "grid_thw": torch.tensor([[1, 4, 4]])}


CASES: list[Case] = [
    hf("vit", "ViTForImageClassification", VIT, PATCHES + PROJECTIONS + MLP + HEAD, pixels),
    hf(
        "deit",
        "DeiTForImageClassificationWithTeacher",
        VIT,
        PATCHES + PROJECTIONS + MLP + "{cls,distillation}_classifier.weight  head",
        pixels,
        train=False,
    ),
    hf(
        "beit",
        "BeitForImageClassification",
        {**VIT, "use_relative_position_bias": True, "use_absolute_position_embeddings": True},
        PATCHES + PROJECTIONS + MLP + HEAD + "*.relative_position_bias_table  embedding",
        pixels,
    ),
    hf("dinov2", "Dinov2Model", {**VIT, "mlp_ratio": 2}, PATCHES + PROJECTIONS + MLP, pixels, train=False),
    hf(
        "swin",
        "SwinForImageClassification",
        SWIN,
        WINDOWS + PROJECTIONS + MLP + HEAD,
        pixels,
    ),
    hf(
        "swinv2",
        "Swinv2ForImageClassification",
        SWIN,
        """
        *.logit_scale                                    vector
        *.continuous_position_bias_mlp.{0,2}.weight      linear or mlp
        """
        + WINDOWS
        + HEAD,
        pixels,
        train=False,
    ),
    hf("donut_swin", "DonutSwinModel", SWIN, WINDOWS, pixels, train=False),
    hf("convnext", "ConvNextForImageClassification", STAGES, CONVNEXT + HEAD, pixels),
    hf(
        "convnextv2",
        "ConvNextV2ForImageClassification",
        STAGES,
        CONVNEXT + HEAD + "*.grn.{weight,bias}  vector",
        pixels,
        train=False,
    ),
    hf(
        "sam",
        "SamVisionModel",
        {**VIT, "intermediate_size": None, "output_channels": 16, "mlp_dim": 80, "global_attn_indexes": [0]}
        | {"use_rel_pos": True, "initializer_range": 0.02},
        f"""
        vision_encoder.pos_embed                embedding
        *.patch_embed.projection.weight         embedding
        *.attn.rel_pos_{{h,w}}                  embedding or other
        *.attn.qkv.weight                       {FUSED_BY_THIRDS.strip()}
        *.attn.proj.weight                      attention_output
        *.mlp.lin{{1,2}}.weight                 mlp
        *.neck.conv{{1,2}}.weight               convolution
        """,
        pixels,
        proof="values",
    ),
    hf(
        "blip_vision",
        "BlipVisionModel",
        VIT,
        f"""
        embeddings.class_embedding              vector or embedding
        embeddings.position_embedding           embedding
        embeddings.patch_embedding.weight       embedding
        *.self_attn.qkv.weight                  {FUSED_BY_THIRDS.strip()}
        *.self_attn.projection.weight           attention_output
        """
        + MLP,
        pixels,
        proof="all",
    ),
    hf(
        "vitdet",
        "VitDetModel",
        {**VIT, "intermediate_size": 80, "mlp_ratio": 2, "pretrain_image_size": 16},
        f"""
        embeddings.position_embeddings          embedding
        embeddings.projection.weight            embedding
        *.attention.qkv.weight                  {FUSED_BY_THIRDS.strip()}
        *.attention.proj.weight                 attention_output
        """
        + MLP,
        pixels,
        proof="all",
        train=False,
    ),
    hf(
        "siglip_vision",
        "SiglipVisionModel",
        VIT,
        f"""
        *.patch_embedding.weight                embedding
        *.position_embedding.weight             embedding
        head.probe                              vector or embedding
        head.attention.in_proj_weight           {FUSED_BY_THIRDS.strip()}
        """
        + PROJECTIONS
        + MLP,
        pixels,
        proof="all",
    ),
    hf(
        "clip",
        "CLIPModel",
        {"text_config": {**BERT, "projection_dim": 24}, "vision_config": {**VIT, "projection_dim": 24}}
        | {"projection_dim": 24},
        """
        *.{token,position,patch}_embedding.weight  embedding
        {visual,text}_projection.weight            linear
        """
        + PROJECTIONS
        + MLP,
        pairs,
    ),
    hf(  # linear layers with the names of GPT-2
        "bridgetower",
        "BridgeTowerModel",
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 80}
        | {"text_config": {**BERT, "num_hidden_layers": 2}, "share_cross_modal_transformer_layers": False}
        | {"vision_config": {"hidden_size": 64, "num_hidden_layers": 2, "patch_size": 8, "image_size": 16}},
        f"""
        cross_modal_{{text,image}}_transform.0.weight   linear
        token_type_embeddings.weight                    embedding
        *.{{patch,position}}_embedding.weight           embedding
        *.attn.in_proj_weight                           query/64@0:64 key/64@64:64 value@128:64
        *.attn.out_proj.weight                          attention_output
        *.mlp.{{c_fc,c_proj}}.weight                    mlp
        {BERT_EMBEDDINGS}
        *.{{attention,crossattention}}.self.query.weight  query/8
        *.{{attention,crossattention}}.self.key.weight    key/8
        *.{{attention,crossattention}}.self.value.weight  value
        *.{{attention,crossattention}}.output.dense.weight attention_output
        *.{{intermediate,output}}.dense.weight          mlp
        *pooler.dense.weight                            linear
        """,
        pairs,
        proof="all",
        train=False,
    ),
    hf(
        "qwen2_vl_vision",
        "models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
        | {"spatial_merge_size": 2, "temporal_patch_size": 2},
        f"""
        patch_embed.proj.weight                 embedding
        blocks.0.attn.qkv.weight                {FUSED_BY_THIRDS.strip()}
        blocks.0.attn.proj.weight               attention_output
        blocks.0.mlp.fc{{1,2}}.weight           mlp
        merger.mlp.{{0,2}}.weight               linear or mlp
        """,
        _qwen,
        proof="all",
    ),
    hf("detr", "DetrForObjectDetection", DETR, DETECTOR + PROJECTIONS + MLP, pixels),
    hf(
        "conditional_detr",
        "ConditionalDetrForObjectDetection",
        DETR,
        """
        *.q_{content,pos,pos_sine}_proj.weight  query/8 or query
        *.k_{content,pos}_proj.weight           key/8 or key
        """
        + DETECTOR
        + PROJECTIONS
        + MLP,
        pixels,
    ),
    hf(
        "dab_detr",
        "DabDetrForObjectDetection",
        {**DETR, "hidden_size": 32},
        """
        *_query_{content,pos,pos_sine}_proj.weight  query/8 or query
        *_key_{content,pos}_proj.weight             key/8 or key
        *_value_proj.weight                         value
        *.output_proj.weight                        attention_output
        *.fc{1,2}.weight                            mlp
        """
        + DETECTOR
        + PROJECTIONS,
        pixels,
        train=False,
    ),
    hf(
        "exaone_vision",
        "models.exaone4_5.modeling_exaone4_5.Exaone4_5_VisionModel",
        {"depth": 1, "hidden_size": 32, "num_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80}
        | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}
        | {"window_size": 8, "fullatt_block_indexes": [0]},
        """
        patch_embed.proj.weight                 embedding
        blocks.0.attn.qkv.weight                query/8@0:32 key/8@32:16 value@48:16
        blocks.0.attn.proj.weight               attention_output
        blocks.0.mlp.{gate,up,down}_proj.weight mlp
        merger.mlp.{0,2}.weight                 linear or mlp
        """,
        _qwen,
        proof="all",
        train=False,
    ),
    hf(
        "pix2struct_vision",
        "Pix2StructVisionModel",
        {"hidden_size": 32, "patch_embed_hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 4}
        | {"d_ff": 80, "d_kv": 8, "seq_len": 16},
        """
        embeddings.patch_projection.weight          linear or embedding
        embeddings.{row,column}_embedder.weight     embedding
        *.attention.query.weight                    query/8
        *.attention.key.weight                      key/8
        *.attention.value.weight                    value
        *.attention.output.weight                   attention_output
        *.mlp.{wi_0,wi_1,wo}.weight                 mlp
        """,
        _flat_patches,
    ),
    hf(
        "segformer",
        "SegformerForImageClassification",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
        | {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]},
        """
        *.patch_embeddings.proj.weight              embedding
        *.sequence_reduction.weight                 convolution
        *.dwconv.weight                             convolution
        """
        + PROJECTIONS
        + MLP
        + HEAD,
        pixels,
        train=False,
    ),
    hf(  # its head is called an output
        "git",
        "GitForCausalLM",
        {**BERT, "vision_config": VIT},
        BERT_EMBEDDINGS
        + """
        *.{patch,position}_embedding.weight         embedding
        *.visual_projection.0.weight                linear
        *.attention.self.query.weight               query/8
        *.attention.self.key.weight                 key/8
        *.attention.self.value.weight               value
        *.attention.output.dense.weight             attention_output
        *.{intermediate,output}.dense.weight        mlp
        output.weight                               head
        """
        + PROJECTIONS
        + MLP,
        pairs,
        train=False,
    ),
]
