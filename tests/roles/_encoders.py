"""Encoders and encoder-decoders for text, of transformers."""

from __future__ import annotations

from tests.roles._cases import VOCAB, Case, encoder_decoder, hf
from tests.roles._decoders import PLAIN

BERT = {**PLAIN, "intermediate_size": 80, "max_position_embeddings": 20, "pad_token_id": 0}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": VOCAB, "max_position_embeddings": 16}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80}
BART |= {"pad_token_id": 0, "decoder_start_token_id": 1}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 80, "num_layers": 1, "num_heads": 4, "vocab_size": VOCAB}
T5 |= {"decoder_start_token_id": 0}

BERT_EMBEDDINGS = "*.{word,position,token_type}_embeddings.weight  embedding\n"
BERT_MLP = "*.layer.0.{intermediate,output}.dense.weight  mlp\n"
BERT_OUTPUT = "*.attention.output.dense.weight  attention_output\n"
BERT_LAYERS = (
    BERT_OUTPUT
    + BERT_MLP
    + """
*.attention.self.query.weight      query/8
*.attention.self.key.weight        key/8
*.attention.self.value.weight      value
"""
)
TRANSFORM = """
*.{transform,lm_head,predictions,discriminator_predictions}.dense.weight  linear
*.{lm_head,predictions}.decoder.weight                                    head
"""
PROJECTIONS = """
*.q_proj.weight                    query/8
*.k_proj.weight                    key/8
*.v_proj.weight                    value
*.{out_proj,o_proj}.weight         attention_output
"""
BART_LAYERS = PROJECTIONS + "*.layers.0.fc{1,2}.weight  mlp\n"
BART_LINES = "*.{shared,embed_positions}.weight  embedding" + BART_LAYERS
T5_LINES = """
shared.weight                      embedding
*.relative_attention_bias.weight   embedding
*Attention.q.weight                query/16
*Attention.k.weight                key/16
*Attention.v.weight                value
*Attention.o.weight                attention_output
"""


CASES: list[Case] = [
    hf("t5", "T5ForConditionalGeneration", T5, T5_LINES + "*.{wi,wo}.weight  mlp", encoder_decoder),
    hf(
        "mt5",
        "MT5ForConditionalGeneration",
        T5,
        T5_LINES + "*.{wi_0,wi_1,wo}.weight  mlp",
        encoder_decoder,
        train=False,
    ),
    hf("bart", "BartForConditionalGeneration", BART, BART_LINES, encoder_decoder),
    *[
        hf(name, cls, BART, BART_LINES, encoder_decoder, train=False)
        for name, cls in [("pegasus", "PegasusForConditionalGeneration"), ("marian", "MarianMTModel")]
    ],
    hf(
        "m2m_100",
        "M2M100ForConditionalGeneration",
        BART,
        "model.shared.weight  embedding" + BART_LAYERS,
        encoder_decoder,
        train=False,
    ),
    hf(
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        {"hidden_size": 32, "vocab_size": VOCAB, "max_position_embeddings": 16, "decoder_start_token_id": 1}
        | {"num_encoder_layers": 1, "num_decoder_layers": 1, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80}
        | {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
        """
        *.{word,position,ngram}_embeddings.weight  embedding
        *.query_proj.weight                        query/8
        *.key_proj.weight                          key/8
        *.value_proj.weight                        value
        *.out_proj.weight                          attention_output
        *.self_attn.relative_pos_embeddings.weight linear
        *.feed_forward.{intermediate,output}.weight mlp
        """,
        encoder_decoder,
    ),
    hf(
        "led",
        "LEDForConditionalGeneration",
        {**BART, "max_encoder_position_embeddings": 16, "max_decoder_position_embeddings": 16, "attention_window": 4},
        """
        *.longformer_self_attn.{query,query_global}.weight  query/8
        *.longformer_self_attn.{key,key_global}.weight      key/8
        *.longformer_self_attn.{value,value_global}.weight  value
        *.self_attn.output.weight                           attention_output
        """
        + BART_LINES,
        encoder_decoder,
    ),
    hf("bert", "BertForMaskedLM", BERT, BERT_EMBEDDINGS + BERT_LAYERS + TRANSFORM),
    hf(
        "bert_classifier",
        "BertForSequenceClassification",
        BERT,
        BERT_EMBEDDINGS + BERT_LAYERS + "bert.pooler.dense.weight  linear\nclassifier.weight  head",
        train=False,
    ),
    *[
        hf(name, cls, BERT | {"tie_word_embeddings": False}, BERT_EMBEDDINGS + BERT_LAYERS + TRANSFORM, train=False)
        for name, cls in [("roberta", "RobertaForMaskedLM"), ("camembert", "CamembertForMaskedLM")]
    ],
    hf(
        "roberta_classifier",
        "RobertaForSequenceClassification",
        BERT,
        BERT_EMBEDDINGS + BERT_LAYERS + "classifier.dense.weight  linear\nclassifier.out_proj.weight  head",
        train=False,
    ),
    hf(
        "distilbert",
        "DistilBertForQuestionAnswering",
        {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 80, "vocab_size": VOCAB, "max_position_embeddings": 16},
        """
        *.{word,position}_embeddings.weight  embedding
        *.attention.q_lin.weight             query/8
        *.attention.k_lin.weight             key/8
        *.attention.v_lin.weight             value
        *.attention.out_lin.weight           attention_output
        *.ffn.lin{1,2}.weight                mlp
        qa_outputs.weight                    head
        """,
    ),
    hf(
        "albert",
        "AlbertForMaskedLM",
        {**BERT, "embedding_size": 16},
        BERT_EMBEDDINGS
        + """
        albert.encoder.embedding_hidden_mapping_in.weight  linear
        *.attention.query.weight                           query/8
        *.attention.key.weight                             key/8
        *.attention.value.weight                           value
        *.attention.dense.weight                           attention_output
        *.{ffn,ffn_output}.weight                          mlp
        predictions.dense.weight                           linear
        """,
    ),
    *[
        hf(  # queries, keys and values also meet those of relative positions
            f"deberta{'_relative' if relative else ''}",
            "DebertaForMaskedLM",
            {**BERT, "relative_attention": relative, "pos_att_type": ["c2p", "p2c"] if relative else []}
            | {"max_relative_positions": 8, "hidden_dropout_prob": 0.0},
            "deberta.embeddings.{word,position}_embeddings.weight  embedding\n"
            + BERT_OUTPUT
            + BERT_MLP
            + TRANSFORM
            + "*.attention.self.in_proj.weight  query/8@0:8%24 key/8@8:8%24 value@16:8%24\n"
            + extra,
            proof="values" if relative else "order",
            train=relative,
        )
        for relative, extra in [
            (False, ""),
            (
                True,
                """
                deberta.encoder.rel_embeddings.weight       embedding
                *.attention.self.pos_proj.weight            key/8 or linear
                *.attention.self.pos_q_proj.weight          query/8
                """,
            ),
        ]
    ],
    hf(
        "deberta_v2",
        "DebertaV2ForMaskedLM",
        {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4}
        | {"max_relative_positions": 8, "share_att_key": False},
        """
        *.{word,position,rel}_embeddings.weight      embedding
        *.attention.self.{query,pos_query}_proj.weight  query/8
        *.attention.self.{key,pos_key}_proj.weight   key/8
        *.attention.self.value_proj.weight           value
        """
        + BERT_OUTPUT
        + BERT_MLP
        + TRANSFORM,
    ),
    hf(
        "electra",
        "ElectraForPreTraining",
        {**BERT, "embedding_size": 16},
        BERT_EMBEDDINGS
        + BERT_LAYERS
        + TRANSFORM
        + """
        electra.embeddings_project.weight                          linear
        discriminator_predictions.dense_prediction.weight          head
        """,
        train=False,
    ),
    hf(  # its attention is made of three-dimensional parameters; the output's has outputs first
        "xlnet",
        "XLNetLMHeadModel",
        {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 80, "vocab_size": VOCAB},
        """
        transformer.mask_emb                vector or embedding
        transformer.word_embedding.weight   embedding
        *.rel_attn.q                        query/8 T flat
        *.rel_attn.k                        key/8 T flat
        *.rel_attn.v                        value T flat
        *.rel_attn.r                        key/8 T flat or linear T flat
        *.rel_attn.o                        attention_output flat
        *.rel_attn.r_{r,s,w}_bias           vector
        *.rel_attn.seg_embed                other or embedding or vector
        *.ff.layer_{1,2}.weight             mlp
        """,
        unproven="*.rel_attn.{r,o,seg_embed}",
    ),
    hf(
        "xlm",
        "XLMWithLMHeadModel",
        {"emb_dim": 32, "n_layers": 1, "n_heads": 4, "n_words": VOCAB, "max_position_embeddings": 16},
        """
        transformer.{position_embeddings,embeddings}.weight  embedding
        *.attentions.0.q_lin.weight                          query/8
        *.attentions.0.k_lin.weight                          key/8
        *.attentions.0.v_lin.weight                          value
        *.attentions.0.out_lin.weight                        attention_output
        *.ffns.0.lin{1,2}.weight                             mlp
        """,
    ),
    hf(
        "modernbert",
        "ModernBertForMaskedLM",
        {**BERT, "intermediate_size": 40, "layer_types": ["full_attention"]},
        """
        model.embeddings.tok_embeddings.weight  embedding
        *.attn.Wqkv.weight                      query/8@0:32 key/8@32:32 value@64:32
        *.attn.Wo.weight                        attention_output
        *.mlp.{Wi,Wo}.weight                    mlp
        head.dense.weight                       linear
        """,
    ),
    hf(
        "bigbird",
        "BigBirdForMaskedLM",
        {**BERT, "attention_type": "original_full"},
        BERT_EMBEDDINGS + BERT_LAYERS + TRANSFORM + "bert.pooler.weight  linear",
        train=False,
    ),
    hf(
        "mpnet",
        "MPNetForMaskedLM",
        BERT,
        BERT_EMBEDDINGS
        + BERT_MLP
        + TRANSFORM
        + """
        mpnet.encoder.relative_attention_bias.weight  embedding
        *.attention.attn.q.weight                     query/8
        *.attention.attn.k.weight                     key/8
        *.attention.attn.v.weight                     value
        *.attention.attn.o.weight                     attention_output
        """,
        train=False,
    ),
    hf(
        "longformer",
        "LongformerForMaskedLM",
        {**BERT, "attention_window": 4},
        BERT_EMBEDDINGS
        + BERT_LAYERS
        + TRANSFORM
        + """
        *.attention.self.query_global.weight          query/8
        *.attention.self.key_global.weight            key/8
        *.attention.self.value_global.weight          value
        """,
        train=False,
    ),
    hf(  # half of its heads are convolutions
        "convbert",
        "ConvBertForMaskedLM",
        {**BERT, "embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3},
        BERT_EMBEDDINGS
        + BERT_LAYERS
        + """
        *.key_conv_attn_layer.bias                           vector
        *.key_conv_attn_layer.{depthwise,pointwise}.weight   convolution flat
        *.{conv_kernel,conv_out}_layer.weight                linear
        generator_predictions.dense.weight                   linear
        """,
        train=False,
    ),
    hf(  # its router is called a classifier
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        {**T5, "num_decoder_layers": 1, "num_experts": 4, "num_sparse_encoder_layers": 1}
        | {"num_sparse_decoder_layers": 1},
        T5_LINES + "*.router.classifier.weight  router\n*.{wi,wo}.weight  mlp",
        encoder_decoder,
        train=False,
    ),
    hf(
        "funnel",
        "FunnelForMaskedLM",
        {"vocab_size": VOCAB, "block_sizes": [1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8}
        | {"d_inner": 80},
        """
        *.word_embeddings.weight           embedding
        *.attention.q_head.weight          query/8
        *.attention.k_head.weight          key/8
        *.attention.v_head.weight          value
        *.attention.post_proj.weight       attention_output
        *.attention.r_kernel               key/8 T flat or linear T flat
        *.attention.r_{w,r,s}_bias         vector
        *.attention.seg_embed              other or embedding or vector
        *.ffn.linear_{1,2}.weight          mlp
        """,
        unproven="*.r_kernel",
        train=False,
    ),
]
