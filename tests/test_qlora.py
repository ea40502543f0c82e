"""What proves that a fit is QLoRA, on an encoder and on a decoder."""

import bitsandbytes as bnb
import pytest
import torch
from helpers import (
    digest_of_base,
    lora_parameters,
    make_backbone,
    make_classifier,
    make_model,
    make_settings,
    random_tokens,
)
from sklearn.model_selection import GridSearchCV
from torch import nn
from transformers import AutoModel

from skqlora.model.prediction import predict_outputs
from skqlora.training.trainer import Trainer

N_CLASSES = 3
TARGETS = torch.arange(16).numpy() % N_CLASSES


def test_every_linear_layer_is_nf4_with_double_quantization(backbone):
    linear = [m for m in backbone.module.modules() if isinstance(m, nn.Linear)]
    assert linear
    for layer in linear:
        assert isinstance(layer, bnb.nn.Linear4bit)
        state = layer.weight.quant_state
        assert (state.quant_type, state.blocksize) == ("nf4", 64)
        assert state.nested
        assert state.state2.blocksize == 256


def test_nothing_large_but_embeddings_is_left_unquantized(backbone):
    for module in backbone.module.modules():
        if not isinstance(module, (nn.Embedding, bnb.nn.Linear4bit)):
            assert all(p.ndim < 2 for p in module.parameters(recurse=False))


def test_bits_of_a_quantized_parameter(backbone):
    assert 4.126 <= backbone.footprint(0).bits_per_quantized_parameter <= 4.135


def test_without_double_quantization_a_parameter_takes_more_bits(model):
    backbone = make_backbone(model, double_quant=False)
    assert backbone.footprint(0).bits_per_quantized_parameter == pytest.approx(4.5)


def test_base_is_the_same_bytes_after_whatever_happened(model, corpus, monkeypatch):
    texts, labels = corpus
    base = make_backbone(model).module
    before = digest_of_base(base)
    clf = make_classifier(model, num_train_epochs=1, compute_dtype="float32").fit(texts, labels)
    clf.predict(texts)
    search = GridSearchCV(clf, {"lora_r": [2, 4]}, cv=2, error_score="raise")
    search.fit(texts, labels)
    monkeypatch.setattr("skqlora.training.trainer.Trainer._check_finite", _raise_keyboard_interrupt)
    with pytest.raises(KeyboardInterrupt):
        clf.fit(texts, labels)
    assert make_backbone(model).module is base
    assert digest_of_base(base) == before


def _raise_keyboard_interrupt(*_):
    raise KeyboardInterrupt


def test_trained_are_a_and_b_of_every_linear_layer_and_the_head(backbone):
    model = make_model(backbone)
    linear = {
        name
        for name, m in backbone.module.named_modules()
        if isinstance(m, nn.Linear) and not name.startswith("pooler")
    }
    expected = {f"encoder.{name}.lora_{ab}.default.weight" for name in linear for ab in "AB"}
    expected |= {f"head.{name}" for name, _ in model.head.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == expected
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def test_fresh_adapter_changes_no_hidden_state(model, backbone):
    adapted = make_model(backbone).encoder
    ids = torch.arange(10, 30).view(2, 10)
    mask = torch.ones_like(ids)
    bare = backbone.module(input_ids=ids, attention_mask=mask)[0]
    torch.testing.assert_close(adapted(input_ids=ids, attention_mask=mask)[0], bare, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_b_then_every_a_gets_a_gradient_also_after_prediction(backbone, checkpointing):
    tokens = random_tokens()
    rows = torch.arange(len(tokens)).numpy()
    for _ in range(2):  # a second fit on the same base
        model = make_model(backbone, lora_dropout=0.05)
        settings = make_settings(max_grad_norm=None, gradient_checkpointing=checkpointing)
        seen = []
        with Trainer(model, tokens, TARGETS, settings) as trainer:
            for _ in range(4):
                model.train()
                trainer.step(rows)
                model.eval()
                predict_outputs(model, tokens)
                gradients = {name: p.grad.clone() for name, p in lora_parameters(model).items()}
                assert all(g.isfinite().all() for g in gradients.values())
                seen.append({name for name, g in gradients.items() if g.abs().max() > 0})
        everything = set(lora_parameters(model))
        assert seen[0] == {name for name in everything if "lora_B" in name}
        assert seen[1] == seen[2] == seen[3] == everything


@torch.no_grad()
def test_4_bit_layer_multiplies_by_its_dequantized_weight(backbone):
    layer = next(m for m in backbone.module.modules() if isinstance(m, bnb.nn.Linear4bit))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    state = layer.weight.quant_state
    weight = bnb.functional.dequantize_4bit(layer.weight, state).float()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))


@torch.no_grad()
def test_4_bit_weights_are_as_far_from_the_source_as_nf4_is_from_gaussian_weights(model, backbone):
    # QLoRA's data type: relative error 0.092 on Gaussian weights, which random models have.
    source = AutoModel.from_pretrained(model)
    for name, layer in backbone.module.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = source.get_submodule(name).weight
            packed = layer.weight
            error = bnb.functional.dequantize_4bit(packed, packed.quant_state).float() - weight
            assert 0.08 < (error.norm() / weight.norm()).item() < 0.105


def test_hidden_states_in_4_bits_stay_near_those_in_32(model, backbone):
    tokens = random_tokens()
    nf4 = predict_outputs(make_model(backbone), tokens)
    full = predict_outputs(make_model(make_backbone(model, quantization=None)), tokens)
    distance = ((nf4 - full) ** 2).mean() ** 0.5 / full.std()
    assert 0 < distance < 0.35


def test_optimizer_is_bitsandbytes_paged_adamw_over_two_flat_tensors(backbone):
    optimizer = Trainer(make_model(backbone), random_tokens(), TARGETS, make_settings()).optimizer
    assert isinstance(optimizer, bnb.optim.PagedAdamW32bit)
    assert optimizer.is_paged
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
