"""Models of transformers for sound."""

from __future__ import annotations

from typing import Any

from tests.roles._cases import Case, hf, ids, noise, waves
from tests.roles._decoders import PLAIN
from tests.roles._encoders import BART, BART_LAYERS, PROJECTIONS

WAVES = {**PLAIN, "intermediate_size": 80, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
WAVES |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
WAVES |= {"mask_time_prob": 0.0, "layerdrop": 0.0}
# The kernel of positions is a norm and a direction, and longer than MAX_KERNEL was.
FEATURES = """
*conv_layers.{0,1}.conv.weight                convolution flat
*feature_projection.projection.weight         linear
*.parametrizations.weight.original0           vector
*.parametrizations.weight.original1           convolution flat
*.{intermediate,output}_dense.weight          mlp
"""


def _spectrogram() -> dict[str, Any]:
    return {"input_features": noise(2, 8, 16), "decoder_input_ids": ids()}


def _spoken() -> dict[str, Any]:
    return {"input_values": noise(2, 2000), "decoder_input_ids": ids()}


def _mel() -> dict[str, Any]:
    return {"hidden_states": noise(2, 8, 16)}


CASES: list[Case] = [
    hf(
        "whisper",
        "WhisperForConditionalGeneration",
        {**BART, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
        | {"bos_token_id": 1, "eos_token_id": 2},
        """
        model.encoder.conv{1,2}.weight               convolution flat
        *.embed_{tokens,positions}.weight            embedding
        """
        + BART_LAYERS,
        _spectrogram,
    ),
    hf("wav2vec2", "Wav2Vec2ForCTC", WAVES, FEATURES + PROJECTIONS + "lm_head.weight  head", waves),
    hf("hubert", "HubertModel", WAVES, FEATURES + PROJECTIONS, waves, train=False),
    hf(
        "wav2vec2_conformer",
        "Wav2Vec2ConformerModel",
        {**WAVES, "position_embeddings_type": "relative", "conv_depthwise_kernel_size": 31},
        FEATURES
        + """
        *.self_attn.pos_bias_{u,v}                                vector
        *.self_attn.linear_q.weight                               query/8
        *.self_attn.linear_k.weight                               key/8
        *.self_attn.linear_v.weight                               value
        *.self_attn.linear_out.weight                             attention_output
        *.self_attn.linear_pos.weight                             linear
        *.conv_module.{pointwise_conv1,depthwise_conv,pointwise_conv2}.weight  convolution flat
        """,
        waves,
        train=False,
    ),
    hf(
        "moonshine",
        "MoonshineForConditionalGeneration",
        {"hidden_size": 32, "intermediate_size": 80, "vocab_size": 64, "decoder_start_token_id": 1}
        | {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
        | {"encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4}
        | {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
        """
        model.encoder.conv{1,2,3}.weight             convolution flat
        model.decoder.embed_tokens.weight            embedding
        *.mlp.fc{1,2}.weight                         mlp
        """
        + PROJECTIONS,
        _spoken,
        train=False,
    ),
    hf(
        "granite_speech_encoder",
        "models.granite_speech.modeling_granite_speech.GraniteSpeechCTCEncoder",
        {"input_dim": 16, "num_layers": 2, "hidden_dim": 32, "feedforward_mult": 2, "num_heads": 4, "dim_head": 16}
        | {"output_dim": 12, "context_size": 8, "max_pos_emb": 8, "conv_kernel_size": 15, "conv_expansion_factor": 2},
        """
        *.attn.to_q.weight                           query/16
        *.attn.to_kv.weight                          key/16@0:64 value@64:64
        *.attn.to_out.weight                         attention_output
        *.attn.rel_pos_emb.weight                    embedding
        *.{ff1,ff2}.{up,down}_proj.weight            mlp
        *.conv.{up_conv,depth_conv.conv,down_conv}.weight  convolution flat
        {input_linear,out_mid}.weight                linear
        out.weight                                   linear or head
        """,
        _mel,
        proof="values",
        train=False,
    ),
    hf(  # a head for every codebook
        "musicgen_decoder",
        "MusicgenForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 80, "num_attention_heads": 4, "vocab_size": 64}
        | {"num_codebooks": 2, "max_position_embeddings": 16},
        """
        model.decoder.embed_tokens.{0,1}.weight      embedding
        lm_heads.{0,1}.weight                        head
        """
        + BART_LAYERS,
        lambda: {"input_ids": ids().repeat_interleave(2, dim=0)},
        train=False,
    ),
]
