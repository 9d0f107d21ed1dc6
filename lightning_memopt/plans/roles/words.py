"""The words that models name their weights with. A word is the last segment of a name, its container an earlier one.

A model whose words are missing is one more word here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lightning_memopt.plans.roles.names import Place, container_of, place


def _table(**roles: str) -> Mapping[str, str]:
    return {word: role for role, words in roles.items() for word in words.split()}


# Sources: the modeling code of transformers 5.23, timm 1.0, litgpt 0.5, diffusers 0.42, nanoGPT and torch.
ANYWHERE = _table(
    embedding="wte wpe embed_tokens embed_in embed_positions tok_embeddings token_embedding word_embedding"
    " word_embeddings position_embedding position_embeddings pos_embed decoder_pos_embed token_type_embeddings shared"
    " embeddings embedding embed tok_emb pos_emb patch_embedding patch_embeddings patch_embed patch_projection"
    " patch_embed.proj patch_embedder.proj patch_embed.projection patch_embeddings.proj patch_embeddings.projection"
    " embeddings.projection pos_embed.proj vision_embed_tokens rel_embeddings"
    " query_position_embeddings relative_attention_bias relative_position_bias_table attention_biases embedding_table"
    " token_embedding_table position_embedding_table"
    " cls_token mask_token distillation_token rel_pos_h rel_pos_w latents projector.query multi_modal_projector.query",
    query="q_proj query wq to_q q_lin query_proj q_b_proj wq_b q_attn c_q add_q_proj q_proj_weight linear_q q_linear"
    " q_up_proj projection_query",
    key="k_proj key wk to_k k_lin key_proj c_k add_k_proj k_proj_weight linear_k k_linear projection_key",
    value="v_proj value wv to_v v_lin value_proj c_v add_v_proj v_proj_weight linear_v v_linear projection_value",
    attention_output="o_proj to_out out_lin to_add_out attn_out",
    mlp="gate_proj up_proj down_proj gate_up_proj fc1 fc2 fc_in fc_out ff_out ff_proj c_fc wi wi_0 wi_1"
    " dense_h_to_4h dense_4h_to_h"
    " lin1 lin2 linear1 linear2 intermediate_dense output_dense pwconv1 pwconv2 pointwise_conv1 pointwise_conv2 ffn"
    " ffn_output ffw_layer_1 ffw_layer_2 linear_up linear_down",
    head="lm_head lm_heads audio_lm_head embed_out score classifier dense_prediction class_embed qa_outputs"
    " logits_dense predictions.decoder lm_head.decoder",
    linear="q_a_proj kv_a_proj_with_mqa in_proj x_proj dt_proj in_proj_qkvz in_proj_ba x_proj_weight dt_proj_weight"
    " pooler.dense transform.dense classifier.dense lm_head.dense embed.out gateway.gate",
    router="router gate shared_expert_gate",
)
INSIDE: Mapping[str, Mapping[str, str]] = {
    "attention": _table(
        query="q Wq W_q w_qs to_query q_head receptance",
        key="k Wk W_k w_ks to_key k_head",
        value="v Wv W_v w_vs to_value v_head",
        attention_output="out_proj out dense wo Wo w_o W_o o proj linear_proj fc_out c_proj output output_proj"
        " projection_layer projection linear_out"
        " post post_proj attention_out final",
        linear="gate_proj gate",
    ),
    "mlp": _table(
        mlp="w1 w2 w3 v1 wo Wo Wi c_proj proj fc fc_1 fc_2 dense dense1 dense2 key value receptance layer_1 layer_2 net"
        " linear_1 linear_2 linear_in linear_out linear_fc1 linear_fc2 up down proj_in proj_out proj_up proj_up_gate"
        " proj_down in_proj out_proj input_linear output_linear intermediate output w_0 w_1 w_2 w_out",
    ),
}
# Heads, unless in a numbered layer or at the end of an encoder.
ON_TOP = _table(
    head="output out fc fc_out ff_out decoder_pred output_projection output_layer to_logits logits_proj head.fc"
    " classifier.out_proj classifier.linear_out classification_head.out_proj"
)
_HEAD = re.compile(r"^(?!pre_)(\w+_)?(head|classifier)$")
# With what it is for: of positions, of one of several inputs. `relative_k_proj` projects no keys.
_PREFIXED = re.compile(
    r"^(?!(?:.*_)?rel)(?:.*_)?(query|key|value|q|k|v)(?:_content|_pos|_pos_sine|_global)?(?:_proj)?$"
)
_LONG = {"q": "query", "k": "key", "v": "value"}
# Parameters of their own such as `register_tokens` or `level_embed`.
_LEARNED = re.compile(r"(^|_)(embed|embeds|emb|embedding|embeddings|encoding|token|tokens)(_|$)")
# What follows an `intermediate` in BERT's relatives: `output`, `output_query`, `layout_output`.
_OUTPUT = re.compile(r"^(\w+_)?output(_query)?$")


def role_of(at: Place) -> tuple[str, str]:
    """Return the role that a name tells, and the words that tell it; nothing if the name does not tell."""
    if at.container in ("router", "linear"):
        return at.container, f"word {at.parent}"
    inside = INSIDE.get(at.container, {})
    if at.word in inside:
        return inside[at.word], f"word {at.word} in {at.container}"
    for word in (f"{at.parent}.{at.word}", at.word):
        if (word in ON_TOP or _HEAD.match(word)) and not at.in_layer and not at.parent.endswith("encoder"):
            return "head", f"word {word} at the top"
        if word in ANYWHERE:
            return ANYWHERE[word], f"word {word}"
    prefixed = _PREFIXED.match(at.word) if at.container == "attention" else None
    if prefixed:
        return _LONG.get(prefixed[1], prefixed[1]), f"word {at.word} in attention"
    if at.in_layer and not at.container and at.word == "dense" and _OUTPUT.match(at.parent):
        return "mlp", f"word {at.parent}.dense"
    if at.in_layer and at.numbered and container_of(at.word) == "mlp":
        return "mlp", f"word {at.word}"
    if at.word == "linear" and at.parent:  # a wrapper of the layer that its parent names
        return role_of(place(".".join(at.path[:-1])))
    return "", ""


def is_learned(at: Place) -> bool:
    """Return whether a parameter of its own, outside any layer, is named as an embedding or token."""
    return _LEARNED.search(at.word) is not None
