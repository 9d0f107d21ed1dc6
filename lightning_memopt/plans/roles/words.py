"""The words that models name their weights with. A word is the last segment of a name, its container an earlier one.

A weight with a word that no model had used before is one more word here. A class whose fused weights are laid out like
no others is one more rule.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lightning_memopt.plans.roles.names import Place, container_of
from lightning_memopt.plans.roles.schemes import Rule


def _table(**roles: str) -> Mapping[str, str]:
    return {word: role for role, words in roles.items() for word in words.split()}


# Sources: the modeling code of transformers 5.23, timm 1.0, litgpt 0.5, diffusers 0.42, nanoGPT and torch.
ANYWHERE = _table(
    embedding="wte wpe embed_tokens embed_in embed_positions tok_embeddings token_embedding word_embedding"
    " word_embeddings position_embedding position_embeddings pos_embed decoder_pos_embed token_type_embeddings shared"
    " embeddings embedding embed tok_emb pos_emb patch_embedding patch_embeddings rel_embeddings"
    " query_position_embeddings relative_attention_bias relative_position_bias_table embedding_table cls_token"
    " mask_token distillation_token patch_embed.proj patch_embeddings.projection",
    query="q_proj query wq to_q q_lin query_proj q_b_proj wq_b q_attn c_q add_q_proj q_proj_weight linear_q q_linear"
    " q_up_proj",
    key="k_proj key wk to_k k_lin key_proj c_k add_k_proj k_proj_weight linear_k k_linear",
    value="v_proj value wv to_v v_lin value_proj c_v add_v_proj v_proj_weight linear_v v_linear",
    attention_output="o_proj to_out out_lin to_add_out",
    mlp="gate_proj up_proj down_proj gate_up_proj fc1 fc2 fc_in fc_out c_fc wi wi_0 wi_1 dense_h_to_4h dense_4h_to_h"
    " lin1 lin2 linear1 linear2 intermediate_dense output_dense pwconv1 pwconv2 ffn ffn_output output.dense",
    head="lm_head lm_heads embed_out score classifier dense_prediction class_embed qa_outputs predictions.decoder"
    " lm_head.decoder",
    linear="q_a_proj kv_a_proj_with_mqa in_proj x_proj dt_proj in_proj_qkvz in_proj_ba pooler.dense transform.dense"
    " classifier.dense lm_head.dense",
    router="router gate shared_expert_gate",
)
INSIDE: Mapping[str, Mapping[str, str]] = {
    "attention": _table(
        query="q receptance",
        key="k",
        value="v",
        attention_output="out_proj dense wo Wo o proj c_proj output output_proj projection_layer",
        linear="gate_proj gate",
    ),
    "mlp": _table(
        mlp="w1 w2 w3 v1 wo Wo Wi c_proj proj fc fc_1 fc_2 dense dense1 dense2 key value receptance layer_1 layer_2"
        " linear_fc1 linear_fc2 up down proj_in proj_out input_linear output_linear net",
    ),
}
# Within numbered layers these are something else.
ON_TOP = _table(
    head="head output out fc class_labels_classifier decoder_pred head.fc classifier.out_proj",
)
# Of one of several inputs, as in the detectors of the DETR family: `sa_qcontent_proj` is not one, `q_pos_proj` is.
_ONE_OF_SEVERAL = re.compile(r"^(?!relative_)(?:.*_)?(query|key|value|q|k|v)(_content|_pos)?_proj$")
_LONG = {"q": "query", "k": "key", "v": "value"}


def role_of(at: Place) -> tuple[str, str]:
    """Return the role that a name tells, and the words that tell it; nothing if the name does not tell."""
    pair = f"{at.parent}.{at.word}"
    inside = INSIDE.get(at.container, {})
    if at.container == "router":
        return "router", f"word {at.parent}"
    if at.word in inside:
        return inside[at.word], f"word {at.word} in {at.container}"
    for word in (pair, at.word):
        if word in ANYWHERE:
            return ANYWHERE[word], f"word {word}"
        if word in ON_TOP and not at.in_layer:
            return ON_TOP[word], f"word {word} at the top"
    several = _ONE_OF_SEVERAL.match(at.word) if at.container == "attention" else None
    if several:
        return _LONG.get(several[1], several[1]), f"word {at.word} in attention"
    if at.numbered and at.in_layer and container_of(at.word) == "mlp":
        return "mlp", f"word {at.word}"
    return "", ""


QKV, KV = ("query", "key", "value"), ("key", "value")
_HEAD = "head_dim"
_PER_GROUP = ("heads / kv_heads * head_dim", _HEAD, _HEAD)
# What two classes do differently, or what no word says. Patterns are searched in names without ``.weight``.
EXCEPTIONS = (
    Rule(r"\.c_attn$", QKV, 0, sizes=_PER_GROUP, repeat="kv_heads", module="GPTBigCodeAttention"),
    Rule(r"\.query_key_value$", QKV, 0, sizes=_PER_GROUP, repeat="kv_heads", module="FalconAttention"),
    Rule(r"\.qkv_proj$", QKV, 0, sizes=(_HEAD,) * 3, repeat="heads", module="MiniMaxLightningAttention"),
    Rule(r"\.qkv_proj$", ("query", "value", "key"), 0, repeat=4, module="CodeGenAttention"),
    # The second half of every head is a gate on its output.
    Rule(
        r"\.q_proj$", ("query", "linear"), 0, sizes=(_HEAD, _HEAD), repeat="heads", module=r"Qwen3(Next|_5\w*)Attention"
    ),
    Rule(r"(^|\.)rel_attn\.q$", ("query",), output_dim=-1, flatten=True),  # XLNet: [inputs, heads, head_dim]
    Rule(r"(^|\.)rel_attn\.k$", ("key",), output_dim=-1, flatten=True),
    Rule(r"(^|\.)rel_attn\.v$", ("value",), output_dim=-1, flatten=True),
    Rule(r"(^|\.)rel_attn\.r$", ("linear",), output_dim=-1, flatten=True),  # of positions
    Rule(r"(^|\.)rel_attn\.o$", ("attention_output",), flatten=True),
    Rule(r"(^|\.)self_attention\.experts\.input_linear$", ("query",)),  # JetMoe
    Rule(r"(^|\.)self_attention\.experts\.output_linear$", ("attention_output",)),
    Rule(r"(^|\.)experts\.mlp\.w2$", ("mlp",), output_dim=-1),  # DBRX
)
# The first rule whose sizes add up decides.
FUSED = (
    Rule(r"(^|\.)crossattention\.c_attn$", KV, 1, output_dim=-1),
    Rule(r"(^|\.)c_attn$", QKV, 1, output_dim=-1),
    Rule(
        r"(^|\.)(qkv|Wqkv|wqkv|c_attn|in_proj_weight|to_qkv|qkv_proj)$",
        QKV,
        0,
        sizes=("heads * head_dim", "kv_heads * head_dim", "kv_heads * head_dim"),
    ),
    Rule(r"(^|\.)(qkv|Wqkv|wqkv|c_attn|in_proj_weight|to_qkv|qkv_proj)$", QKV, 0),
    Rule(r"(^|\.)query_key_value$", QKV, 0, sizes=(_HEAD,) * 3, repeat="heads"),
    Rule(r"(^|\.)attn\.attn$", QKV, 0, sizes=_PER_GROUP, repeat="kv_heads"),  # litgpt before 0.5
    Rule(r"(^|\.)(kv_proj|to_kv|kv)$", KV, 0, sizes=("kv_heads * head_dim",) * 2),
    Rule(r"(^|\.)(kv_proj|to_kv|kv)$", KV, 0),
    Rule(
        r"(^|\.)kv_b_proj$",
        KV,
        0,
        sizes=("qk_nope_head_dim", "v_head_dim"),
        repeat="heads",
        head_dim="qk_nope_head_dim",
    ),
)
# What transformers' ``Conv1D``, of shape [inputs, outputs], and ``torch.nn.Linear`` are both called.
TRANSPOSED = ("c_attn", "c_fc", "c_proj")
TOKENS = (
    "wte",
    "embed_tokens",
    "tok_embeddings",
    "word_embeddings",
    "token_embedding",
    "embed_in",
    "shared",
    "tok_emb",
)
# Weights of experts in one stack: before the activation → after it.
EXPERTS = {"gate_up_proj": "down_proj", "fc1": "fc2", "up_proj": "down_proj", "gate_proj": "down_proj"}
