"""Tiny random models of many families, with a small tokenizer, built in the test run."""

import functools

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, PreTrainedTokenizerFast

TOPICS = {
    "animal": ["cat", "dog", "horse", "bird", "fish", "mouse", "cow", "sheep"],
    "colour": ["red", "blue", "green", "yellow", "white", "black", "brown", "pink"],
    "number": ["one", "two", "three", "four", "five", "six", "seven", "eight"],
}
FRAMES = [
    "the {} is here",
    "I saw a {}",
    "{}",
    "there was once a very {} thing in my house",
    "{} ?",
]

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = SIZES | {"intermediate_size": 128, "max_position_embeddings": 128}
LLAMA = BERT | {"num_key_value_heads": 2}

# Every family that a test fits; what differs from the family's own defaults is only size.
DECODERS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 16},
    "gemma": LLAMA | {"head_dim": 16},
    "gemma2": LLAMA | {"head_dim": 16},
    "gemma3_text": LLAMA | {"head_dim": 16},
    "phi": BERT,
    "phi3": LLAMA,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": BERT,
    "opt": {**SIZES, "ffn_dim": 128, "max_position_embeddings": 128, "word_embed_proj_dim": 64},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "starcoder2": LLAMA,
    "stablelm": LLAMA,
    "olmo2": LLAMA,
    "cohere": LLAMA,
    "smollm3": LLAMA,
    "granite": LLAMA,
}
ENCODERS = {
    "bert": BERT,
    "roberta": BERT | {"max_position_embeddings": 130},
    "xlm-roberta": BERT | {"max_position_embeddings": 130},
    "camembert": BERT | {"max_position_embeddings": 130},
    "distilbert": {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 128,
        "max_position_embeddings": 128,
    },
    "electra": BERT | {"embedding_size": 32},
    "albert": BERT | {"embedding_size": 32},
    "mpnet": BERT | {"max_position_embeddings": 130},
    "deberta-v2": BERT
    | {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_buckets": 16,
    },
    "modernbert": BERT
    | {
        "cls_token_id": 1,
        "sep_token_id": 2,
        "global_attn_every_n_layers": 2,
        "local_attention": 16,
    },
}

# Mixtures of experts: four experts, of which a token goes to two.
LLAMA_16 = LLAMA | {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MIXTURES = {
    "gpt_oss": LLAMA_16 | LOCAL,
    "qwen2_moe": LLAMA | EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": LLAMA_16 | EXPERTS,
    "qwen3_5_moe_text": LLAMA_16
    | EXPERTS
    | LINEAR_ATTENTION
    | {"shared_expert_intermediate_size": 32},
    "mixtral": LLAMA | LOCAL,
    "olmoe": LLAMA | {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": LLAMA | LATENT | ROUTED,
    "glm4_moe": LLAMA_16 | ROUTED,
    "granitemoe": LLAMA | LOCAL,
    "phimoe": LLAMA | LOCAL,
    "llama4_text": LLAMA_16
    | LOCAL
    | {"num_experts_per_tok": 1, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1},
    "jetmoe": SIZES
    | LOCAL
    | {"num_key_value_heads": 2, "kv_channels": 16, "intermediate_size": 64},
}

# Models of more than text: the text model's settings, and those of the vision tower.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 16,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3], "mrope_interleaved": True}}
TOWERS = {
    "gemma3": (LLAMA_16, VISION),
    "gemma4": (
        LLAMA_16
        | {
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 408,
            "num_kv_shared_layers": 0,
            "global_head_dim": 16,
        },
        VISION,
    ),
    "mistral3": (LLAMA | {"model_type": "mistral"}, VISION | {"model_type": "pixtral"}),
    "llama4": (
        MIXTURES["llama4_text"],
        VISION | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
    ),
    "qwen2_5_vl": (LLAMA | MROPE, QWEN_VISION),
    "qwen3_vl": (LLAMA_16 | MROPE, QWEN_VISION),
    "qwen3_5": (LLAMA_16 | LINEAR_ATTENTION, QWEN_VISION),
    "qwen3_5_moe": (MIXTURES["qwen3_5_moe_text"], QWEN_VISION),
    "glm4v_moe": (
        LLAMA
        | ROUTED
        | {
            "rope_parameters": ROPE | {"mrope_section": [1, 2, 1], "partial_rotary_factor": 0.5},
        },
        QWEN_VISION,
    ),
    "mllama": (
        LLAMA | {"cross_attention_layers": []},
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
    ),
    "llava": (LLAMA | {"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}),
    "smolvlm": (LLAMA | {"model_type": "llama"}, VISION),
    "idefics3": (LLAMA | {"model_type": "llama"}, VISION),
    "aya_vision": (
        LLAMA | {"model_type": "cohere2"},
        VISION | {"model_type": "siglip_vision_model"},
    ),
    "lfm2_vl": (
        LLAMA | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        VISION | {"model_type": "siglip2_vision_model"},
    ),
    "internvl": (
        LLAMA | {"model_type": "qwen2"},
        VISION | {"model_type": "internvl_vision", "image_size": [32, 32], "patch_size": [16, 16]},
    ),
}

# Encoders of encoder-decoders.
T5 = {"d_model": 64, "num_layers": 2, "d_ff": 128, "d_kv": 16, "num_heads": 4}
ENCODER_DECODERS = {"t5": T5, "mt5": T5, "umt5": T5}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# What needs values of its input: its windows are as long as the longest text, rounded up.
VALUE_DEPENDENT = {"longformer": BERT | {"attention_window": 8}}
# What would change itself while it runs; see PINNED in architecture.py.
CHANGING = {
    "big_bird": BERT | {"block_size": 4, "num_random_blocks": 1},
    "rwkv": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "rescale_every": 2,
        "context_length": 128,
    },
}
UNFIT = {"fnet": BERT, "layoutlm": BERT}  # loadable, and refused at the first forward pass


# Its code multiplies float32 with the dtype of the weights.
MIXED = {"deberta": BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}}


def corpus(n_rows: int = 48) -> tuple[list[str], list[str]]:
    """Texts of three topics that a tiny model can tell apart, and their topics."""
    names = list(TOPICS)
    labels = [names[i % len(names)] for i in range(n_rows)]
    texts = [
        FRAMES[(i // 3) % len(FRAMES)].format(TOPICS[label][(i // 15 + i // 3) % 8])
        for i, label in enumerate(labels)
    ]
    return texts, labels


@functools.cache
def make_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; "encoder" brackets a text in special tokens, "decoder" adds none."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(240)[0], trainer)
    if style == "encoder":
        pieces = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        pair = "<s> $A </s> $B:1 </s>:1"
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", pair, pieces)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="</s>",
        **({"pad_token": "<pad>", "bos_token": "<s>"} if style == "encoder" else {}),
    )


def save_model(folder, model_type: str, **overrides) -> str:
    """Write a tiny random model of a family and its tokenizer to a folder; return its path."""
    encoders = ENCODERS | VALUE_DEPENDENT | MIXED
    style = "encoder" if model_type in encoders else "decoder"
    tokenizer = make_tokenizer(style)
    settings = (DECODERS | MIXTURES | encoders | CHANGING | UNFIT | MIXED)[model_type]
    config = transformers.AutoConfig.for_model(
        model_type, **settings | {"vocab_size": len(tokenizer) + 8} | TOKENS | overrides
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_whole(folder, model_type: str, **overrides) -> transformers.PreTrainedModel:
    """Write a tiny model that holds a text model among others, and a tokenizer; return the model.

    It is a model of text and images, or an encoder-decoder.
    """
    vocabulary = {"vocab_size": len(make_tokenizer("decoder")) + 8} | TOKENS
    if model_type in TOWERS:
        text, vision = TOWERS[model_type]
        settings = {
            "text_config": text | vocabulary,
            "vision_config": vision,
            "tie_word_embeddings": False,
        }
        auto_class, style = transformers.AutoModelForImageTextToText, "decoder"
    else:
        settings = ENCODER_DECODERS[model_type] | vocabulary | {"decoder_start_token_id": 0}
        auto_class, style = transformers.AutoModelForSeq2SeqLM, "encoder"
    config = transformers.AutoConfig.for_model(model_type, **settings | overrides)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto_class.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    make_tokenizer(style).save_pretrained(folder)
    return model
