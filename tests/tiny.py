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

# What needs values of its input: its windows are as long as the longest text, rounded up.
VALUE_DEPENDENT = {"longformer": BERT | {"attention_window": 8}}
UNFIT = {"fnet": BERT, "layoutlm": BERT}  # loadable, and refused at the first forward pass


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
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, pieces)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="</s>",
        **({"pad_token": "<pad>", "bos_token": "<s>"} if style == "encoder" else {}),
    )


def save_model(folder, model_type: str, **overrides) -> str:
    """Write a tiny random model of a family and its tokenizer to a folder; return its path."""
    encoders = ENCODERS | VALUE_DEPENDENT
    style = "encoder" if model_type in encoders else "decoder"
    tokenizer = make_tokenizer(style)
    settings = (DECODERS | encoders | UNFIT)[model_type]
    config = transformers.AutoConfig.for_model(
        model_type,
        **settings
        | {
            "vocab_size": len(tokenizer) + 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | overrides,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
