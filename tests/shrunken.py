"""Tiny models of any family: its default configuration with small numbers in it."""

import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForTextEncoding

MOST_PARAMETERS = 5_000_000
LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_decoder_layers num_hidden_groups"
)
# What families call the same thing, and its small value.
SMALL = {
    64: "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim attention_hidden_size "
    "decoder_hidden_size",
    128: "intermediate_size ffn_dim d_ff ffn_hidden_size hidden_dim encoder_ffn_dim n_inner "
    "decoder_ffn_dim max_position_embeddings n_positions max_sequence_length n_ctx context_length "
    "intermediate_size_mlp block_ff_dim shared_intermediate_size dense_intermediate_size "
    "max_seq_len sequence_length lru_width",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts "
    "num_routed_experts num_global_key_value_heads index_n_heads mamba_n_heads mamba_num_heads",
    2: f"{LAYERS} num_key_value_heads num_kv_heads num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k "
    "top_k linear_num_key_heads",
    16: "head_dim kv_channels d_kv qk_nope_head_dim v_head_dim global_head_dim q_lora_rank "
    "kv_lora_rank hidden_size_per_layer_input linear_key_head_dim linear_value_head_dim "
    "attention_head_dim rotary_dim block_size chunk_size sliding_window local_attention "
    "attention_window "
    "mamba_d_state mamba_chunk_size state_size ssm_state_size time_step_rank mamba_dt_rank "
    "mamba_d_ssm linear_head_dim index_head_dim index_topk",
    8: "qk_rope_head_dim",
    32: "moe_intermediate_size embedding_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size",
    1: "n_group topk_group n_shared_experts first_k_dense_replace n_groups num_shared_experts "
    "moe_num_shared_experts num_expert_groups num_expert_group",
    0: "num_kv_shared_layers",
}
# Their rotary embeddings have a part each for time, height and width, of sizes in the code.
ROTATED_IN_THREE = {
    *("glm4v_text", "glm4v_moe_text", "glm_ocr_text", "qwen2_vl_text", "qwen2_5_vl_text"),
}
VALUES = {name: value for value, names in SMALL.items() for name in names.split()}


def shrunken_config(config):
    """Make a small configuration of the same family as a configuration of a text model."""
    vocab_size = len(tiny.make_tokenizer("encoder")) + 8
    values = config.to_dict()
    n_layers = [values[name] for name in LAYERS.split() if isinstance(values.get(name), int)]
    small = {}
    for name, value in values.items():
        if name in VALUES and type(value) is int:
            small[name] = min(value, VALUES[name]) if value > 0 else value
        elif name in ("vocab_size", "vocab_size_per_layer_input"):
            small[name] = vocab_size
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            small[name] = {"pad": 0, "bos": 1, "eos": 2}[name.split("_")[0]]
        elif isinstance(value, list) and n_layers and len(value) == n_layers[0]:
            small[name] = [value[0], value[-1]]  # a list with an entry for each layer
    if config.model_type in ROTATED_IN_THREE:
        rope = values["rope_parameters"] or {}
        head_dim = small.get("head_dim") or small["hidden_size"] // small["num_attention_heads"]
        half = int(head_dim * rope.get("partial_rotary_factor", 1)) // 2
        third = half // 3
        small["rope_parameters"] = rope | {"mrope_section": [half - 2 * third, third, third]}
    if "qk_rope_head_dim" in small:  # latent attention
        small |= {"head_dim": 8, "qk_head_dim": 24, "num_key_value_heads": 4}
    return {name: value for name, value in small.items() if name in values}


def save_family(folder, family):
    """Write a tiny random model of a family's text model, and a tokenizer; return its path."""
    config = CONFIG_MAPPING[family]()
    is_pair = config.is_encoder_decoder
    text = config.get_text_config() if not is_pair else config
    small = type(text)(**shrunken_config(text))
    auto_class = AutoModelForTextEncoding if is_pair else AutoModel
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in auto_class.from_config(small).parameters())
    if n_parameters > MOST_PARAMETERS:
        raise RuntimeError(f"{family} still has {n_parameters / 1e6:.0f} million parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto_class.from_config(small, dtype=torch.float32)
    model.save_pretrained(folder)
    tiny.make_tokenizer("encoder").save_pretrained(folder)
    return str(folder)
