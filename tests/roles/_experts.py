"""Language models of transformers with mixtures of experts or compressed attention."""

from __future__ import annotations

from tests.roles._cases import VOCAB, Case, hf, tokens
from tests.roles._decoders import ATTENTION, GATED, GROUPED, LLAMA, TOKENS_AND_HEAD, WIDE, WIDE_ATTENTION

TOP2 = {"num_experts_per_tok": 2}
FEW = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, **TOP2}
MOE = {**GROUPED, **FEW, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}

# Stacks of [outputs, inputs], which most families have, and stacks of [inputs, outputs].
STACKED = "*.experts.{gate_up,up,down}_proj  mlp\n"
TRANSPOSED = "*.experts.{gate_up,down}_proj  mlp T\n"
ROUTER = "*.{gate,router,router.layer}.weight  router\n"
# One output, so a vector by its shape.
SHARED = """
*.shared_expert_gate.weight                          vector
*.shared_expert{,s}.{gate,up,down}_proj.weight       mlp
"""
MIXTURE = TOKENS_AND_HEAD + ATTENTION + ROUTER + STACKED

LATENT = {**GROUPED, **FEW, "num_key_value_heads": 4, "moe_intermediate_size": 24, "kv_lora_rank": 12}
LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 0}
LATENT |= {"n_group": 1, "topk_group": 1}
LATENT_ATTENTION = """
*.{q_a_proj,kv_a_proj_with_mqa}.weight    linear
*.{q_proj,q_b_proj}.weight                query/12
*.kv_b_proj.weight                        key/8@0:8%14 value@8:6%14
*.self_attn.o_proj.weight                 attention_output
"""

CASES: list[Case] = [
    hf("mixtral", "MixtralForCausalLM", MOE, MIXTURE),
    hf("qwen2_moe", "Qwen2MoeForCausalLM", MOE, MIXTURE + SHARED),
    hf(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        WIDE | MOE | {"head_dim": 16},
        TOKENS_AND_HEAD + WIDE_ATTENTION + ROUTER + STACKED,
    ),
    hf("olmoe", "OlmoeForCausalLM", MOE, MIXTURE, train=False),
    hf("granite_moe", "GraniteMoeForCausalLM", MOE, MIXTURE, train=False),
    hf(
        "dbrx",
        "DbrxForCausalLM",
        {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": VOCAB, "max_seq_len": 16}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}}
        | {"ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}}},
        """
        transformer.wte.weight          embedding
        lm_head.weight                  head
        *.attn.Wqkv.weight              query/8@0:32 key/8@32:16 value@48:16
        *.attn.out_proj.weight          attention_output
        *.experts.mlp.{w1,v1}           mlp
        *.experts.mlp.w2                mlp T
        """
        + ROUTER,
    ),
    hf(  # every expert of its attention is a query projection with an output projection
        "jetmoe",
        "JetMoeForCausalLM",
        {**GROUPED, **FEW, "kv_channels": 8},
        TOKENS_AND_HEAD
        + """
        *.self_attention.kv_proj.weight                key/8@0:16 value@16:16
        *.self_attention.experts.input_linear.weight   query/8
        *.self_attention.experts.output_linear.weight  attention_output
        *.mlp.{input,output}_linear.weight             mlp
        """
        + ROUTER,
    ),
    hf(
        "gpt_oss",
        "GptOssForCausalLM",
        {**WIDE, **FEW, "layer_types": ["full_attention"]},
        TOKENS_AND_HEAD + WIDE_ATTENTION + ROUTER + TRANSPOSED + "*.experts.{gate_up,down}_proj_bias  vector",
    ),
    hf(
        "llama4",
        "Llama4ForCausalLM",
        {**WIDE, **FEW, "interleave_moe_layer_step": 1, "pad_token_id": 0},
        TOKENS_AND_HEAD + WIDE_ATTENTION + ROUTER + TRANSPOSED + SHARED,
    ),
    hf(
        "aria",
        "AriaTextForCausalLM",
        {**GROUPED, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "pad_token_id": 0},
        TOKENS_AND_HEAD + ATTENTION + ROUTER + TRANSPOSED + SHARED,
        train=False,
    ),
    hf(
        "deepseek_v2_lite",
        "DeepseekV2ForCausalLM",
        {**LATENT, "q_lora_rank": None},
        TOKENS_AND_HEAD + LATENT_ATTENTION + ROUTER + STACKED + SHARED,
    ),
    *[
        hf(
            name,
            cls,
            {**LATENT, "q_lora_rank": 20},
            TOKENS_AND_HEAD + LATENT_ATTENTION + ROUTER + STACKED + SHARED,
        )
        for name, cls in [("deepseek_v2", "DeepseekV2ForCausalLM"), ("deepseek_v3", "DeepseekV3ForCausalLM")]
    ],
    hf(  # a layer of softmax attention below one of linear attention
        "minimax",
        "MiniMaxForCausalLM",
        {**WIDE, **FEW, "num_hidden_layers": 2, "block_size": 8, "layer_types": ["full_attention", "linear_attention"]},
        TOKENS_AND_HEAD
        + """
        *.self_attn.qkv_proj.weight     query/16@0:16%48 key/16@16:16%48 value@32:16%48
        *.self_attn.out_proj.weight     attention_output
        *.self_attn.output_gate.weight  linear
        """
        + WIDE_ATTENTION
        + ROUTER
        + STACKED,
    ),
    hf(  # a head's rows of the query projection are its query and its output gate
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {**MOE, "head_dim": 16, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        TOKENS_AND_HEAD
        + """
        *.linear_attn.conv1d.weight                convolution flat
        *.linear_attn.in_proj_{qkvz,ba}.weight     linear
        *.linear_attn.out_proj.weight              linear or attention_output
        *.self_attn.q_proj.weight                  query/16@0:16%32 linear@16:16%32 or query/16 or query/32
        """
        + WIDE_ATTENTION
        + ROUTER
        + STACKED
        + SHARED,
    ),
    hf(
        "jamba",
        "JambaForCausalLM",
        {**GROUPED, "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "pad_token_id": 0}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "use_mamba_kernels": False}
        | {"mamba_d_state": 8, "mamba_dt_rank": 4},
        LLAMA
        + """
        *.mamba.A_log                           other
        *.mamba.conv1d.weight                   convolution flat
        *.mamba.{in,out,x,dt}_proj.weight       linear
        """
        + ROUTER
        + STACKED,
        unproven="*.dt_proj.weight",
    ),
    hf(
        "nemotron_h",
        "NemotronHForCausalLM",
        {**WIDE, **FEW, "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 16}
        | {"ssm_state_size": 8, "n_groups": 2, "chunk_size": 8, "moe_intermediate_size": 24}
        | {"moe_shared_expert_intermediate_size": 40},
        """
        model.embeddings.weight                 embedding
        lm_head.weight                          head
        *.mixer.conv1d.weight                   convolution flat
        *.mixer.{in,out}_proj.weight            linear
        *.mixer.shared_experts.{up,down}_proj.weight  mlp
        """
        + WIDE_ATTENTION
        + ROUTER
        + STACKED,
    ),
    *[
        hf(
            name,
            cls,
            {**GROUPED, **config, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
            | {"mamba_chunk_size": 8, "pad_token_id": 0},
            TOKENS_AND_HEAD
            + ATTENTION
            + GATED
            + """
            *.mamba.conv1d.weight               convolution flat
            *.mamba.{in,out}_proj.weight        linear
            """,
            train=False,
        )
        for name, cls, config in [
            ("falcon_h1", "FalconH1ForCausalLM", {"mamba_d_ssm": 64}),
            ("bamba", "BambaForCausalLM", {"num_hidden_layers": 2, "attn_layer_indices": [1]}),
        ]
    ],
    hf(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        {**GROUPED, "num_hidden_layers": 3, "lru_width": 32, "head_dim": 8, "attention_window_size": 8},
        "model.embed_tokens.weight  embedding"
        + ATTENTION
        + GATED
        + """
        *.temporal_block.linear_{x,y,out}.weight           linear
        *.temporal_block.conv_1d.weight                    convolution flat
        *.rg_lru.{input,recurrent}_gate_weight             other
        *.rg_lru.{input,recurrent}_gate_bias               vector
        """,
        train=False,
    ),
    hf(
        "mamba",
        "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": VOCAB, "state_size": 8, "time_step_rank": 4},
        """
        backbone.embeddings.weight              embedding
        *.mixer.A_log                           other
        *.mixer.conv1d.weight                   convolution flat
        *.mixer.{in,out,x,dt}_proj.weight       linear
        """,
        unproven="*.dt_proj.weight",
    ),
    hf(
        "mamba2",
        "Mamba2ForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": VOCAB, "state_size": 8, "n_groups": 2}
        | {"num_heads": 8, "head_dim": 8, "chunk_size": 8, "tie_word_embeddings": False},
        """
        backbone.embeddings.weight              embedding
        lm_head.weight                          head
        *.mixer.conv1d.weight                   convolution flat
        *.mixer.{in,out}_proj.weight            linear
        """,
    ),
    hf(
        "rwkv",
        "RwkvForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB, "context_length": 16}
        | {"attention_hidden_size": 32},
        """
        rwkv.embeddings.weight                  embedding
        head.weight                             head
        *.time_mix_{key,value,receptance}       vector
        *.attention.receptance.weight           query
        *.attention.key.weight                  key
        *.attention.value.weight                value
        *.attention.output.weight               attention_output
        *.feed_forward.{key,value,receptance}.weight  mlp
        """,
        lambda: {**tokens(), "use_cache": False},
    ),
]
