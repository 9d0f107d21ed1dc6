"""Dense language models of transformers."""

from __future__ import annotations

from typing import Any

import torch

from tests.roles._cases import VOCAB, Case, hf, tokens

GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": VOCAB, "n_positions": 16}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
PLAIN = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": VOCAB, "num_attention_heads": 4}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "intermediate_size": 80}
WIDE = {**GROUPED, "head_dim": 16}  # heads wider than hidden size / heads

# Names of transformers' LLaMA; heads of 8 or 16 outputs.
_ATTENTION = """
*.{self_attn,mixer,temporal_block}.q_proj.weight  query/8
*.{self_attn,mixer,temporal_block}.k_proj.weight  key/8
*.{self_attn,mixer,temporal_block}.v_proj.weight  value
*.{self_attn,mixer,temporal_block}.o_proj.weight  attention_output
"""
ATTENTION, WIDE_ATTENTION = _ATTENTION, _ATTENTION.replace("/8", "/16")
TOKENS_AND_HEAD = """
model.embed_tokens.weight  embedding
lm_head.weight             head
"""
TIED = "model.embed_tokens.weight  embedding\n"
GATED = "*.{mlp,feed_forward,mlp_block}.{gate,up,down}_proj.weight  mlp\n"
LLAMA = TOKENS_AND_HEAD + ATTENTION + GATED
WIDE_LLAMA = TOKENS_AND_HEAD + WIDE_ATTENTION + GATED

GPT2_BLOCK = """
*.h.0.attn.c_attn.weight      query/8@0:32 key/8@32:32 value@64:32 T
*.h.0.attn.c_proj.weight      attention_output T
*.h.0.mlp.{c_fc,c_proj}.weight mlp T
"""
GPT2_EMBEDDINGS = "*.{wte,wpe}.weight  embedding\n"
FALCON = """
*.word_embeddings.weight             embedding
*.self_attention.dense.weight        attention_output
*.mlp.dense_{h_to_4h,4h_to_h}.weight mlp
"""
PER_HEAD = "*.query_key_value.weight  query/8@0:8%24 key/8@8:8%24 value@16:8%24"


def _trajectory() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"states": 5, "actions": 3, "rewards": 1, "returns_to_go": 1}
    drawn = {name: torch.randn(2, 4, size, generator=generator) for name, size in sizes.items()}
    return {**drawn, "timesteps": torch.arange(4).expand(2, 4), "attention_mask": torch.ones(2, 4)}


def _conditioned() -> dict[str, Any]:
    return {**tokens(), "encoder_hidden_states": torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))}


CASES: list[Case] = [
    hf("gpt2", "GPT2LMHeadModel", GPT2, GPT2_EMBEDDINGS + GPT2_BLOCK),
    hf(  # keys and values of another sequence
        "gpt2_cross",
        "GPT2LMHeadModel",
        {**GPT2, "add_cross_attention": True},
        GPT2_EMBEDDINGS
        + GPT2_BLOCK
        + """
        *.crossattention.c_attn.weight   key/8@0:32 value@32:32 T
        *.crossattention.q_attn.weight   query/8 T
        *.crossattention.c_proj.weight   attention_output T
        """,
        _conditioned,
    ),
    hf("gpt1", "OpenAIGPTLMHeadModel", GPT2, "*.{tokens,positions}_embed.weight  embedding" + GPT2_BLOCK),
    hf(
        "imagegpt",
        "ImageGPTForCausalImageModeling",
        GPT2,
        "lm_head.weight  head\n" + GPT2_EMBEDDINGS + GPT2_BLOCK,
        train=False,
    ),
    hf(
        "decision_transformer",
        "DecisionTransformerModel",
        {**GPT2, "hidden_size": 32, "state_dim": 5, "act_dim": 3, "max_ep_len": 16},
        """
        embed_timestep.weight               embedding
        embed_{state,action}.weight         linear
        embed_return.weight                 vector
        predict_return.weight               vector
        predict_{state,action.0}.weight     linear or head
        """
        + GPT2_EMBEDDINGS
        + GPT2_BLOCK,
        _trajectory,
        proof="all",
    ),
    hf(
        "gpt_neo",
        "GPTNeoForCausalLM",
        {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 16}
        | {"attention_types": [[["global"], 1]]},
        GPT2_EMBEDDINGS
        + """
        *.attention.q_proj.weight       query/8
        *.attention.k_proj.weight       key/8
        *.attention.v_proj.weight       value
        *.attention.out_proj.weight     attention_output
        *.mlp.{c_fc,c_proj}.weight      mlp
        """,
    ),
    hf(
        "gptj",
        "GPTJForCausalLM",
        {**GPT2, "rotary_dim": 4, "tie_word_embeddings": False},
        """
        transformer.wte.weight          embedding
        lm_head.weight                  head
        *.attn.q_proj.weight            query/8
        *.attn.k_proj.weight            key/8
        *.attn.v_proj.weight            value
        *.attn.out_proj.weight          attention_output
        *.mlp.fc_{in,out}.weight        mlp
        """,
    ),
    hf(  # four stripes, each of query, value, key
        "codegen",
        "CodeGenForCausalLM",
        {**GPT2, "n_head": 8, "rotary_dim": 4, "tie_word_embeddings": False},
        """
        transformer.wte.weight          embedding
        lm_head.weight                  head
        *.attn.qkv_proj.weight          query/4@0:8%24 value@8:8%24 key/4@16:8%24
        *.attn.out_proj.weight          attention_output
        *.mlp.fc_{in,out}.weight        mlp
        """,
    ),
    *[
        hf(
            f"gpt_bigcode{'_mqa' if multi_query else ''}",
            "GPTBigCodeForCausalLM",
            {**GPT2, "multi_query": multi_query},
            GPT2_EMBEDDINGS
            + f"""
            *.attn.c_attn.weight        {fused}
            *.attn.c_proj.weight        attention_output
            *.mlp.{{c_fc,c_proj}}.weight  mlp
            """,
        )
        for multi_query, fused in [
            (True, "query/8@0:32 key/8@32:8 value@40:8"),
            (False, "query/8@0:8%24 key/8@8:8%24 value@16:8%24"),
        ]
    ],
    hf("starcoder2", "Starcoder2ForCausalLM", GROUPED, TIED + ATTENTION + "*.mlp.{c_fc,c_proj}.weight  mlp"),
    hf("bloom", "BloomForCausalLM", {**PLAIN, "n_layer": 1, "n_head": 4}, FALCON + PER_HEAD),
    *[
        hf(
            name,
            cls,
            {**PLAIN, "intermediate_size": 80, "tie_word_embeddings": False},
            """
            *.embed_{in,tokens}.weight              embedding
            *.attention.dense.weight                attention_output
            *.self_attn.dense.weight                attention_output
            *.mlp.dense_{h_to_4h,4h_to_h}.weight    mlp
            {lm_head,embed_out}.weight              head
            """
            + PER_HEAD,
            train=name != "gpt_neox_japanese",
        )
        for name, cls in [
            ("gpt_neox", "GPTNeoXForCausalLM"),
            ("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM"),
            ("persimmon", "PersimmonForCausalLM"),
        ]
    ],
    hf(
        "fuyu",
        "FuyuForCausalLM",
        {**PLAIN, "text_config": {**PLAIN, "intermediate_size": 80, "model_type": "persimmon"}}
        | {"intermediate_size": 80, "patch_size": 4, "num_channels": 3, "pad_token_id": 0},
        """
        model.language_model.embed_tokens.weight  embedding
        model.vision_embed_tokens.weight          linear or embedding
        lm_head.weight                            head
        *.self_attn.dense.weight                  attention_output
        *.mlp.dense_{h_to_4h,4h_to_h}.weight      mlp
        """
        + PER_HEAD,
        train=False,
    ),
    *[
        hf(name, "FalconForCausalLM", {**PLAIN, **config}, FALCON + f"*.query_key_value.weight  {fused}")
        for name, config, fused in [
            (
                "falcon_rw",
                {"multi_query": False, "new_decoder_architecture": False, "alibi": True},
                "query/8@0:8%24 key/8@8:8%24 value@16:8%24",
            ),
            (
                "falcon_7b",
                {"multi_query": True, "new_decoder_architecture": False},
                "query/8@0:32 key/8@32:8 value@40:8",
            ),
            (
                "falcon_40b",
                {"num_kv_heads": 2, "new_decoder_architecture": True},
                "query/8@0:16%32 key/8@16:8%32 value@24:8%32",
            ),
        ]
    ],
    hf(
        "mpt",
        "MptForCausalLM",
        {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": VOCAB, "max_seq_len": 16},
        """
        transformer.wte.weight           embedding
        *.attn.Wqkv.weight               query/8@0:32 key/8@32:32 value@64:32
        *.attn.out_proj.weight           attention_output
        *.ffn.{up,down}_proj.weight      mlp
        """,
    ),
    hf(
        "phi",
        "PhiForCausalLM",
        GROUPED,
        TOKENS_AND_HEAD
        + """
        *.self_attn.dense.weight         attention_output
        *.mlp.fc{1,2}.weight             mlp
        """
        + ATTENTION,
    ),
    hf(
        "phi3",
        "Phi3ForCausalLM",
        {**GROUPED, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        TOKENS_AND_HEAD
        + """
        *.self_attn.qkv_proj.weight      query/8@0:32 key/8@32:16 value@48:16
        *.self_attn.o_proj.weight        attention_output
        *.mlp.{gate_up,down}_proj.weight mlp
        """,
    ),
    hf("llama", "LlamaForCausalLM", WIDE, WIDE_LLAMA),
    *[
        hf(name, cls, GROUPED | {"pad_token_id": 0}, LLAMA, train=False)
        for name, cls in [
            ("mistral", "MistralForCausalLM"),
            ("qwen2", "Qwen2ForCausalLM"),
            ("olmo2", "Olmo2ForCausalLM"),
            ("stablelm", "StableLmForCausalLM"),
        ]
    ],
    hf("qwen3", "Qwen3ForCausalLM", WIDE, WIDE_LLAMA),
    hf(
        "glm4",
        "Glm4ForCausalLM",
        WIDE | {"pad_token_id": 0},
        WIDE_LLAMA + "*.mlp.gate_up_proj.weight  mlp",
        train=False,
    ),
    *[
        hf(name, cls, WIDE, TIED + WIDE_ATTENTION + GATED, train=name == "gemma3")
        for name, cls in [
            ("gemma", "GemmaForCausalLM"),
            ("gemma2", "Gemma2ForCausalLM"),
            ("gemma3", "Gemma3ForCausalLM"),
        ]
    ],
    hf(
        "cohere",
        "CohereForCausalLM",
        {**GROUPED, "use_qk_norm": True, "pad_token_id": 0},
        TIED + ATTENTION + GATED + "*.{q,k}_norm.weight  vector",
    ),
    hf(  # Conv1D in its MLP alone
        "clvp_decoder",
        "ClvpForCausalLM",
        {**PLAIN, "max_position_embeddings": 16, "max_text_tokens": 16, "n_inner": 80, "num_mel_attn_blocks": 1},
        """
        *.{input,position}_embeds_layer.weight  embedding
        lm_head.weight                          head
        *.attn.q_proj.weight                    query/8
        *.attn.k_proj.weight                    key/8
        *.attn.v_proj.weight                    value
        *.attn.out_proj.weight                  attention_output
        *.mlp.{c_fc,c_proj}.weight              mlp T
        """,
        train=False,
    ),
    hf(
        "opt",
        "OPTForCausalLM",
        {**PLAIN, "ffn_dim": 80, "max_position_embeddings": 16, "word_embed_proj_dim": 16}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        """
        *.embed_{tokens,positions}.weight   embedding
        *.project_{in,out}.weight           linear
        *.self_attn.q_proj.weight           query/8
        *.self_attn.k_proj.weight           key/8
        *.self_attn.v_proj.weight           value
        *.self_attn.out_proj.weight         attention_output
        *.layers.0.fc{1,2}.weight           mlp
        """,
    ),
]
