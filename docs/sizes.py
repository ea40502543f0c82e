"""Print what a fit takes on a GPU, for models of many sizes: the tables of guide/models.md.

The configurations are those of the models' config.json on the Hub, as far as shapes depend on them.
No weights are needed::

    python docs/sizes.py
"""

import torch
from transformers import AutoConfig

from skqlora.checkpoint.architecture import describe_architecture
from skqlora.checkpoint.spec import BackboneSpec
from skqlora.memory.estimate import estimate_training
from skqlora.settings.adapter_settings import LoraSettings

LORA = LoraSettings(16, 16, "all-linear", False, False, True)
N_CLASSES, BATCH, N_TOKENS = 10, 16, 512
QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
GEMMA3 = {"vocab_size": 262208}


def qwen3(hidden, intermediate, layers, heads):
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return "qwen3", QWEN3 | sizes


def gemma3(hidden, intermediate, layers, heads, kv_heads, head_dim):
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    return "gemma3", {"text_config": GEMMA3 | sizes}


def gpt_oss(layers, experts):
    return "gpt_oss", {"num_hidden_layers": layers, "num_local_experts": experts}


MODELS = {
    "HuggingFaceTB/SmolLM2-135M": (
        "llama",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
        },
    ),
    "Qwen/Qwen3-0.6B-Base": qwen3(1024, 3072, 28, 16),
    "Qwen/Qwen3-1.7B-Base": qwen3(2048, 6144, 28, 16),
    "HuggingFaceTB/SmolLM3-3B-Base": ("smollm3", {}),
    "Qwen/Qwen3-4B-Base": qwen3(2560, 9728, 36, 32),
    "google/gemma-3-4b-pt": gemma3(2560, 10240, 34, 8, 4, 256),
    "Qwen/Qwen3-8B-Base": qwen3(4096, 12288, 36, 32),
    "google/gemma-3-12b-pt": gemma3(3840, 15360, 48, 16, 8, 256),
    "Qwen/Qwen3-14B-Base": qwen3(5120, 17408, 40, 40),
    "openai/gpt-oss-20b": gpt_oss(24, 32),
    "mistralai/Mistral-Small-3.1-24B-Base-2503": (
        "mistral3",
        {
            "text_config": {
                "model_type": "mistral",
                "hidden_size": 5120,
                "intermediate_size": 32768,
                "num_hidden_layers": 40,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 131072,
            }
        },
    ),
    "google/gemma-3-27b-pt": gemma3(5376, 21504, 62, 32, 16, 128),
    "Qwen/Qwen3-30B-A3B-Base": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
    ),
    "Qwen/Qwen3-32B": qwen3(5120, 25600, 64, 64),
    "meta-llama/Llama-3.3-70B-Instruct": (
        "llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": ("qwen3_next", {}),
    "meta-llama/Llama-4-Scout-17B-16E": ("llama4", {}),
    "openai/gpt-oss-120b": gpt_oss(36, 128),
}


def estimator_of(model_type, settings):
    """Return a function of texts, tokens and checkpointing that estimates a training on a GPU."""
    config = AutoConfig.for_model(model_type, **settings)
    skeleton = describe_architecture(config, model=model_type, quantized=True).skeleton
    spec = BackboneSpec(
        model=model_type,
        revision=None,
        quantization="nf4",
        double_quant=True,
        compute_dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )

    def estimate(n_texts, n_tokens, checkpointing):
        return estimate_training(
            skeleton,
            spec,
            LORA,
            optim="paged_adamw_32bit",
            n_outputs=N_CLASSES,
            n_texts=n_texts,
            n_tokens=n_tokens,
            dropout=True,
            checkpointing=checkpointing,
        )

    return estimate


def estimates_of(model_type, settings):
    """Return the bytes of the base, and of a training in four forms."""
    estimate = estimator_of(model_type, settings)
    found = [
        estimate(BATCH, 64, False),
        estimate(BATCH, N_TOKENS, False),
        estimate(BATCH, N_TOKENS, True),
        estimate(1, N_TOKENS, True),
    ]
    return [found[0].base, *(each.resident for each in found)]


def main():
    print("| model | base | 16 x 64 tokens | 16 x 512 | checkpointed | 1 x 512, checkpointed |")
    print("|---|---|---|---|---|---|")
    for name, (model_type, settings) in MODELS.items():
        cells = " | ".join(f"{n / 1e9:.1f}" for n in estimates_of(model_type, settings))
        print(f"| `{name}` | {cells} |")


if __name__ == "__main__":
    main()
