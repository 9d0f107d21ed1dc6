"""Weights that hold several roles, and those that one class of modules uses like no other, as rules.

Patterns are searched in names without ``.weight``. A class whose weights are laid out like no others is one more rule.
"""

from __future__ import annotations

from lightning_memopt.plans.roles.schemes import Rule

QKV, KV = ("query", "key", "value"), ("key", "value")
_HEAD = "head_dim"
_KEYS = "kv_heads * head_dim"
_PER_HEAD = (_HEAD, _HEAD, _HEAD)
_PER_GROUP = ("heads / kv_heads * head_dim", _HEAD, _HEAD)
_STACKED = r"(^|\.)(qkv|Wqkv|wqkv|c_attn|in_proj_weight|to_qkv|qkv_proj|att_proj)$"
_GATED = r"Qwen3(Next|_5\w*)Attention"  # the second half of every head of queries is a gate on its output

EXCEPTIONS = (
    Rule(r"\.c_attn$", QKV, 0, sizes=_PER_GROUP, repeat="kv_heads", module="GPTBigCodeAttention"),
    Rule(r"\.query_key_value$", QKV, 0, sizes=_PER_GROUP, repeat="kv_heads", module="FalconAttention"),
    Rule(r"\.qkv_proj$", QKV, 0, sizes=_PER_HEAD, repeat="heads", module="MiniMaxLightningAttention"),
    Rule(r"\.in_proj$", QKV, 0, sizes=_PER_HEAD, repeat="heads", module="DisentangledSelfAttention"),  # DeBERTa
    Rule(r"\.qkv_proj$", ("query", "value", "key"), 0, repeat=4, module="CodeGenAttention"),
    Rule(r"\.q_proj$", ("query", "linear"), 0, sizes=(_HEAD, _HEAD), repeat="heads", module=_GATED),
    Rule(r"\.q_proj$", ("query",), module=_GATED),
    Rule(r"(^|\.)rel_attn\.q$", ("query",), output_dim=-1, flatten=True),  # XLNet: [inputs, heads, head_dim]
    Rule(r"(^|\.)rel_attn\.k$", ("key",), output_dim=-1, flatten=True),
    Rule(r"(^|\.)rel_attn\.v$", ("value",), output_dim=-1, flatten=True),
    Rule(r"(^|\.)rel_attn\.r$", ("linear",), output_dim=-1, flatten=True),  # of relative positions
    Rule(r"(^|\.)rel_attn\.o$", ("attention_output",), flatten=True),  # [outputs, heads, head_dim]
    Rule(r"(^|\.)self_attention\.experts\.input_linear$", ("query",)),  # JetMoe
    Rule(r"(^|\.)self_attention\.experts\.output_linear$", ("attention_output",)),
    Rule(r"(^|\.)codebooks_head$", ("head",), output_dim=-1),  # CSM: [codebooks, inputs, outputs]
    Rule(r"\.attention\.r_kernel$", ("linear",), output_dim=-1, flatten=True),  # Funnel: [inputs, heads, head_dim]
    Rule(r"\.bottleneck\.attention\.dense$", ("linear",)),  # MobileBERT
    Rule(r"(^|\.)experts\.mlp\.w2$", ("mlp",), output_dim=-1),  # DBRX
)
# The first one whose sizes add up decides.
FUSED = (
    Rule(_STACKED, QKV, 0, sizes=("heads * head_dim", _KEYS, _KEYS)),
    Rule(_STACKED, QKV, 0),
    Rule(r"(^|\.)c_attn$", QKV, 1, output_dim=-1),
    Rule(r"(^|\.)crossattention\.c_attn$", KV, 1, output_dim=-1),
    Rule(r"(^|\.)query_key_value$", QKV, 0, sizes=_PER_HEAD, repeat="heads"),
    Rule(r"(^|\.)linear_qkv$", QKV, 0, sizes=_PER_GROUP, repeat="kv_heads"),  # Megatron-LM
    Rule(r"(^|\.)attn\.attn$", QKV, 0, sizes=_PER_GROUP, repeat="kv_heads"),  # litgpt before 0.5
    Rule(r"(^|\.)(kv_proj|to_kv|kv)$", KV, 0, sizes=(_KEYS, _KEYS)),
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
