"""Mixtures of experts: their matrices in 4 bits, frozen, and dequantized where they are used."""

import weakref
from unittest.mock import patch

import numpy as np
import pytest
import tiny
import torch
from bitsandbytes.nn import Params4bit
from helpers import LORA, digest_of_base, make_backbone, make_classifier
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_memory import estimate, peak_of_step
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import skqlora.checkpoint.quantizer
from skqlora import estimate_memory
from skqlora.checkpoint.experts import PackedExperts, expert_matrices, find_routers
from skqlora.checkpoint.modules import replicate
from skqlora.model.backbone import _count_bytes
from skqlora.persistence.merging import _dequantized

IDS = torch.arange(5, 17)[None]


def experts_of(module):
    """The modules that hold experts."""
    return [m for m in module.modules() if expert_matrices(m)]


@pytest.mark.parametrize("model_type", tiny.MIXTURES)
def test_family_takes_a_step(tiny_model, corpus, model_type):
    folder = tiny_model(model_type)
    base = make_backbone(folder)
    before = digest_of_base(base.module)
    clf = make_classifier(folder, num_train_epochs=1, lora_dropout=0.1).fit(*corpus)
    clf.fit(*corpus)
    assert digest_of_base(base.module) == before
    assert clf.adapter_.pooling == "last"
    assert 4.126 <= clf.footprint_.bits_per_quantized_parameter <= 4.14
    embeddings = base.module.get_input_embeddings().weight.numel()
    n_quantized = clf.footprint_.quantized_parameters
    others = clf.footprint_.other_parameters - embeddings
    assert n_quantized / (n_quantized + others) >= 0.98
    b = [value for name, value in clf.adapter_.lora_tensors.items() if "lora_B" in name]
    assert all(np.abs(value).max() > 0 for value in b)
    first = clf.predict_proba(corpus[0])
    np.testing.assert_array_equal(clf.predict_proba(corpus[0]), first)


@pytest.mark.parametrize("model_type", tiny.MIXTURES)
def test_texts_do_not_depend_on_their_neighbours(tiny_model, corpus, model_type):
    texts, labels = corpus
    clf = make_classifier(tiny_model(model_type), num_train_epochs=1).fit(texts, labels)
    alone = np.concatenate([clf.predict_proba([text]) for text in texts[:8]])
    np.testing.assert_allclose(clf.predict_proba(texts)[:8], alone, atol=1e-5)


@pytest.mark.parametrize("model_type", tiny.MIXTURES)
def test_adapters_are_on_all_linear_layers_but_routers(tiny_model, model_type):
    base = make_backbone(tiny_model(model_type))
    routers = find_routers(base.module)
    linear = {
        name
        for name, m in base.module.named_modules()
        if isinstance(m, torch.nn.Linear) and name not in routers
    }
    for name in routers:
        assert base.module.get_submodule(name).weight.dtype == torch.float32
    with base.lease(LORA) as replica:
        named = dict(replica.module.named_modules())
        adapted = {name for name, m in named.items() if any(m is x for x in replica.lora_layers)}
        trained = [name for name, p in replica.module.named_parameters() if p.requires_grad]
    assert adapted == linear
    assert not any("experts.lora" in name for name in trained)


def dense_copy(base):
    """A replica of a base whose experts have the dequantized matrices as they are."""
    module = replicate(base.module)
    for experts in experts_of(module):
        experts.__class__ = type(experts).__mro__[2]
        for name, parameter in list(experts.named_parameters(recurse=False)):
            if isinstance(parameter, Params4bit):
                dense = torch.nn.Parameter(_dequantized(parameter), requires_grad=False)
                experts._parameters[name] = dense
    return module


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "qwen3_moe"])
def test_results_and_gradients_are_those_of_the_dequantized_matrices(tiny_model, model_type):
    base = make_backbone(tiny_model(model_type))
    found = []
    for module in (replicate(base.module), dense_copy(base)):
        embeddings = base.module.get_input_embeddings()(IDS).detach().requires_grad_(True)
        hidden = module(inputs_embeds=embeddings)[0]
        hidden.square().sum().backward()
        found.append((hidden.detach(), embeddings.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_hidden_states_may_come_by_name(tiny_model):
    [layer, *_] = experts_of(make_backbone(tiny_model("mixtral")).module)
    hidden, chosen = torch.randn(6, 64), torch.zeros(6, 2, dtype=torch.long)
    weights = torch.full((6, 2), 0.5)
    by_name = layer(hidden_states=hidden, top_k_index=chosen, top_k_weights=weights)
    torch.testing.assert_close(by_name, layer(hidden, chosen, weights))


def test_dequantized_matrices_do_not_stay(tiny_model):
    module = replicate(make_backbone(tiny_model("mixtral")).module)
    module(inputs_embeds=torch.randn(1, 5, 64, requires_grad=True))[0].sum().backward()
    for experts in experts_of(module):
        assert isinstance(experts, PackedExperts)
        assert not {"gate_up_proj", "down_proj"} & vars(experts).keys()
        assert isinstance(experts.gate_up_proj, Params4bit)


EIGHT_LAYERS = {"hidden_size": 128, "num_hidden_layers": 8}
DEEP = {
    "mixtral": EIGHT_LAYERS | {"intermediate_size": 256, "num_local_experts": 8},
    "qwen3_moe": EIGHT_LAYERS
    | {"moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 4},
    "gpt_oss": EIGHT_LAYERS | {"intermediate_size": 128, "num_local_experts": 8},
    "deepseek_v3": EIGHT_LAYERS | {"moe_intermediate_size": 128, "n_routed_experts": 16},
    "llama4_text": EIGHT_LAYERS | {"intermediate_size": 128, "num_local_experts": 8},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", DEEP)
def test_estimate_of_the_peak_of_a_training_step(
    tmp_path, model_type, compute_dtype, checkpointing
):
    folder = tiny.save_model(tmp_path, model_type, **DEEP[model_type])
    base = make_backbone(folder, compute_dtype=compute_dtype)
    measured = peak_of_step(base, 8, 40, checkpointing=checkpointing)
    estimated = estimate(base, 8, 40, dropout=True, checkpointing=checkpointing)
    assert estimated.base == _count_bytes(base.module)
    assert 0.85 < (estimated.activations + estimated.workspace) / measured < 1.15
    n_experts = sum(s.numel() for m in experts_of(base.module) for s in expert_matrices(m).values())
    assert estimated.workspace > n_experts / 8 * compute_dtype.itemsize  # a layer's, dequantized


def test_loading_holds_one_stack_of_experts_at_a_time(tmp_path):
    config = AutoConfig.for_model("mixtral", **tiny.MIXTURES["mixtral"] | {"vocab_size": 400})
    config.num_hidden_layers = 6
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    quantize, stacks, alive = skqlora.checkpoint.quantizer.quantize_matrices, [], []

    def watch(matrices, *args):
        stacks.append(weakref.ref(matrices))
        alive.append(sum(stack() is not None for stack in stacks))
        return quantize(matrices, *args)

    with patch("skqlora.checkpoint.quantizer.quantize_matrices", watch):
        make_backbone(str(tmp_path))
    assert alive == [1] * 12  # two for each layer


def test_checkpoint_with_half_of_the_experts_is_refused(tmp_path):
    config = AutoConfig.for_model("mixtral", **tiny.MIXTURES["mixtral"] | {"vocab_size": 400})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    half = {n: t for n, t in tensors.items() if not ("experts.2." in n or "experts.3." in n)}
    assert len(half) < len(tensors)
    save_file(half, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\..*shape \(2, .*Wanted: \(4, "):
        make_backbone(str(tmp_path))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_merged_model_has_the_same_logits(tiny_model, corpus, tmp_path, model_type):
    texts, labels = corpus
    clf = make_classifier(tiny_model(model_type), num_train_epochs=1).fit(texts, labels)
    clf.merge(tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = clf.to_transformers()[1]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    np.testing.assert_allclose(logits.numpy(), clf.decision_function(texts), atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("model_type", tiny.MIXTURES)
def test_peft_reads_the_adapter_alike_or_it_is_refused(tiny_model, corpus, tmp_path, model_type):
    texts, labels = corpus
    folder = tiny_model(model_type)
    clf = make_classifier(folder, quantization=None, num_train_epochs=1).fit(texts, labels)
    try:
        clf.set_params(lora_dropout=0.0).to_peft(tmp_path)
    except ValueError as error:
        assert "PEFT would read" in str(error) or "no class of its own" in str(error)  # noqa: PT017
        return
    stock = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, dtype=torch.float32, pad_token_id=0
    )
    model = PeftModel.from_pretrained(stock, tmp_path).eval()
    ids = clf.to_transformers()[1](texts[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    np.testing.assert_allclose(logits[0].numpy(), clf.decision_function(texts[:1])[0], atol=1e-4)


def test_routers_are_not_taken_for_attention(tmp_path):
    config = AutoConfig.for_model(
        "gemma4_text",
        **tiny.TOWERS["gemma4"][0] | tiny.EXPERTS | tiny.TOKENS | {"vocab_size": 408},
        enable_moe_block=True,
        top_k_experts=2,
    )
    config.num_experts = config.num_key_value_heads * 16  # as wide as the keys
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config).model
    assert find_routers(module)
    assert not any("attn" in name for name in find_routers(module))


def test_experts_have_no_adapter_even_if_they_are_named(tiny_model, corpus):
    clf = make_classifier(tiny_model("mixtral"), target_modules=["gate_up_proj"])
    with pytest.raises(ValueError, match=r"has no module 'gate_up_proj'\. Wanted: .*q_proj"):
        clf.fit(*corpus)
    shared = make_classifier(
        tiny_model("qwen2_moe"), target_modules=["down_proj", "q_proj"], num_train_epochs=1
    ).fit(*corpus)
    names = {name.split(".lora_")[0].split(".", 2)[2] for name in shared.adapter_.lora_tensors}
    assert names == {"self_attn.q_proj", "mlp.shared_expert.down_proj"}


def test_unquantized_experts_stay_as_they_are(tiny_model, corpus):
    folder = tiny_model("mixtral")
    clf = make_classifier(folder, quantization=None, num_train_epochs=1).fit(*corpus)
    assert clf.footprint_.quantized_parameters == 0
    estimated = estimate_memory(
        folder, quantization=None, device="cpu", compute_dtype="float32", max_length=64
    )
    assert estimated.activations > 0
