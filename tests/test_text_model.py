"""Pooling, dropout, the head, and adapters on their own."""

import pickle
from dataclasses import replace

import bitsandbytes as bnb
import numpy as np
import pytest
import tiny
import torch
from helpers import (
    LORA,
    lora_parameters,
    make_backbone,
    make_classifier,
    make_model,
    make_settings,
    random_tokens,
    restore_model,
    train,
)
from peft import inject_adapter_in_model
from peft.tuners.lora.bnb import Linear4bit
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from skqlora.model.dropout import DropoutOfUpdates, LoraDropout
from skqlora.model.lora import peft_config
from skqlora.model.lora_layer import FusedLinear4bit
from skqlora.model.prediction import predict_outputs
from skqlora.model.text_model import pool
from skqlora.settings.adapter_settings import TextSettings


def test_pooling_ignores_padding():
    hidden = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    hidden[1, 2] = torch.nan
    assert pool(hidden, mask, "last").tolist() == [[4, 5], [8, 9]]
    assert pool(hidden, mask, "cls").tolist() == [[0, 1], [6, 7]]
    hidden[1, 2] = 99.0
    assert pool(hidden, mask, "mean").tolist() == [[2, 3], [7, 8]]


def masks_of(update=3, seed=0, p=0.5, n_layers=2, n_features=1000):
    layers = [LoraDropout(p, n_features, "cpu", torch.float32) for _ in range(n_layers)]
    DropoutOfUpdates(layers, seed).draw(update)
    return torch.stack([layer.mask for layer in layers])


def test_dropout_draws_a_mask_for_each_layer_and_update():
    masks = masks_of()
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masks, masks_of())
    different = [masks[1], masks_of(update=4)[0], masks_of(seed=1)[0]]
    assert not any(torch.equal(masks[0], other) for other in different)
    assert masks_of(p=0.2, n_features=100_000).mean().item() == pytest.approx(0.8, abs=0.01)


def test_dropout_keeps_its_mask_for_an_update():
    layer = LoraDropout(0.5, 1000, "cpu", torch.float32)
    dropout = DropoutOfUpdates([layer], seed=0)
    dropout.draw(0)
    mask = layer.mask
    dropout.draw(0)
    assert layer.mask is mask
    dropout.draw(1)
    assert not torch.equal(layer.mask, mask)


def test_dropout_keeps_the_mean_and_acts_in_training_only():
    layer = LoraDropout(0.2, 100_000, "cpu", torch.float32)
    DropoutOfUpdates([layer], seed=0).draw(0)
    x = torch.ones(2, 100_000)
    assert layer(x).mean().item() == pytest.approx(1, abs=0.01)
    assert layer.eval()(x) is x


@pytest.mark.parametrize("model_type", ["bert", "opt", "deberta-v2"])
def test_all_adapted_layers_drop_out(tiny_model, model_type):
    model = make_model(make_backbone(tiny_model(model_type)), lora_dropout=0.1)
    kinds = {type(layer.lora_dropout["default"]) for layer in model.replica.lora_layers}
    assert kinds == {LoraDropout}


def test_fresh_model_drops_nothing_until_it_is_trained(backbone):
    dropping, plain = make_model(backbone, lora_dropout=0.5), make_model(backbone)
    expected = predict_outputs(plain, random_tokens())
    np.testing.assert_array_equal(predict_outputs(dropping, random_tokens()), expected)


@pytest.mark.parametrize("use_dora", [False, True])
def test_base_is_never_in_training_mode(backbone, use_dora):
    lora = replace(LORA, use_dora=use_dora)
    model = make_model(backbone, lora, 3, "auto", lora_dropout=0.1).train()
    own = {"TextModel", "LoraDropout", "ModuleDict", "FusedLinear4bit"}
    assert {type(m).__name__ for m in model.modules() if m.training} == own
    assert not any(layer.base_layer.training for layer in model.replica.lora_layers)
    assert not any(m.training for m in model.eval().modules())


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_logits_of_a_decoder_equal_those_of_transformers(tiny_model, model_type, monkeypatch):
    # What it rounds otherwise has a test of its own.
    monkeypatch.setattr(FusedLinear4bit, "forward", Linear4bit.forward)
    decoder = tiny_model(model_type)
    ours = make_model(make_backbone(decoder), seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in lora_parameters(ours).values():
        parameter.data.normal_(std=0.1, generator=generator)

    theirs = AutoModelForSequenceClassification.from_pretrained(
        decoder,
        num_labels=3,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["score"],
        ),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    config = peft_config(LORA, theirs.base_model)
    config._custom_modules = None  # PEFT's own layers
    inject_adapter_in_model(config, theirs.base_model)
    theirs.base_model.load_state_dict(lora_parameters(ours), strict=False)
    theirs.score.load_state_dict(ours.head.state_dict())
    theirs.eval()
    for layer in theirs.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # or it would infer in bfloat16

    tokens = random_tokens()
    inputs = tokens.batch(np.arange(len(tokens)))
    with torch.no_grad():
        expected = theirs(**inputs).logits
        np.testing.assert_array_equal(ours(**inputs).numpy(), expected.numpy())


def test_an_embedding_has_an_adapter_and_no_dropout(encoder, corpus):
    clf = make_classifier(
        encoder, target_modules=["word_embeddings", "query"], lora_dropout=0.1, num_train_epochs=2
    )
    assert np.isfinite(clf.fit(*corpus).loss_curve_).all()


@pytest.mark.parametrize("quantization", ["nf4", None])
def test_autocast_leaves_adapted_layers_as_they_are(encoder, quantization):
    base = make_backbone(encoder, quantization=quantization)  # computes in float32
    layer = make_model(base).replica.lora_layers[0]
    x = torch.randn(3, layer.in_features, requires_grad=True)

    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.float16):
        output = layer(x)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert layer.lora_B["default"].weight.grad.dtype == torch.float32


def test_a_family_that_mixes_dtypes_is_in_float32_between_its_layers(tmp_path, corpus):
    deberta = tiny.save_model(tmp_path, "deberta")
    clf = make_classifier(deberta, compute_dtype="bfloat16", num_train_epochs=2)
    assert np.isfinite(clf.fit(*corpus).loss_curve_).all()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "opt", "gpt2", "qwen3"])
def test_fused_layer_trains_as_that_of_peft(tiny_model, model_type, use_dora, monkeypatch):
    lora = replace(LORA, use_dora=use_dora, use_rslora=True)
    base = make_backbone(tiny_model(model_type))
    targets = np.arange(16) % 3

    def trained():
        model = make_model(base, lora, lora_dropout=0.2)
        losses = train(model, random_tokens(), targets, make_settings(num_train_epochs=2))
        return losses, {name: p.detach().clone() for name, p in lora_parameters(model).items()}

    losses, ours = trained()
    monkeypatch.setattr(FusedLinear4bit, "forward", Linear4bit.forward)
    their_losses, theirs = trained()
    np.testing.assert_allclose(losses, their_losses, rtol=1e-5)
    for name, value in ours.items():
        assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)


def test_logits_of_a_pooler_equal_those_of_transformers(encoder):
    ours = make_model(make_backbone(encoder, quantization=None), LORA, 3, "pooler")
    theirs = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3).eval()
    theirs.classifier.load_state_dict(ours.head.state_dict())
    inputs = random_tokens().batch(np.arange(16))
    with torch.no_grad():
        expected = theirs(**inputs).logits
        torch.testing.assert_close(ours(**inputs), expected, rtol=0, atol=1e-6)


def test_pooling_follows_what_the_base_can(encoder, decoder):
    assert make_model(make_backbone(encoder)).pooling == "mean"
    assert make_model(make_backbone(decoder)).pooling == "last"
    with pytest.raises(ValueError, match="pooling='cls' with the decoder"):
        make_model(make_backbone(decoder), LORA, 3, "cls")
    with pytest.raises(ValueError, match="has no trained pooler"):
        make_model(make_backbone(decoder), LORA, 3, "pooler")


def test_adapter_comes_back_from_its_state_and_owns_its_memory(backbone):
    model = make_model(backbone, seed=4)
    for parameter in lora_parameters(model).values():
        parameter.data.normal_(std=0.1)
    state = model.adapter_state(TextSettings(32))
    expected = predict_outputs(model, random_tokens())
    copy = pickle.loads(pickle.dumps(state))
    restored = restore_model(backbone, copy)
    np.testing.assert_array_equal(predict_outputs(restored, random_tokens()), expected)
    tensors = [*state.lora_tensors.values(), *state.head_tensors.values()]
    trained = [p.detach().numpy() for p in lora_parameters(model).values()]
    assert not any(np.shares_memory(a, b) for a in tensors for b in trained)
    assert len(pickle.dumps(state)) < sum(t.nbytes for t in tensors) + 8192


def test_adapter_of_another_base_is_refused(encoder, tiny_model):
    state = make_model(make_backbone(encoder)).adapter_state(TextSettings(32))
    with pytest.raises(ValueError, match="is not the base that was fitted"):
        restore_model(make_backbone(tiny_model("electra")), state)
