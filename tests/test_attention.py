"""Attention in bfloat16 on a CPU, compared with that of torch."""

import numpy as np
import pytest
import tiny
import torch
from helpers import make_backbone, make_classifier
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from skqlora.model import attention
from skqlora.model.attention import MAX_TOKENS, attend


def random_states(n_tokens=7, n_heads=4, n_groups=2, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, n_tokens, 8) for heads in (n_heads, n_groups, n_groups)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


class Layer(nn.Module):
    def __init__(self, *, is_causal, num_key_value_groups):
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, num_key_value_groups


def output_and_gradients(function, states, mask, layer, **options):
    output, scores = function(layer, *states, mask, **options)
    assert scores is None
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return [output, *torch.autograd.grad((output.float() * weights).sum(), states)]


@pytest.mark.parametrize("n_groups", [1, 2, 4])
@pytest.mark.parametrize("masked", [None, torch.bool, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 7, MAX_TOKENS + 1])
def test_attention_equals_that_of_torch(n_groups, masked, is_causal, n_tokens):
    layer = Layer(is_causal=is_causal, num_key_value_groups=4 // n_groups)
    states = random_states(n_tokens, n_groups=n_groups)
    mask = None
    if masked is not None:
        seen = torch.ones(3, 1, n_tokens, n_tokens, dtype=torch.bool)
        seen[1, ..., 1 + n_tokens // 2 :] = False
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    given = mask if masked is None else seen if masked == torch.bool else mask.bfloat16()
    ours = output_and_gradients(attend, states, given, layer, scaling=0.3)
    floats = [state.detach().float().requires_grad_() for state in states]
    theirs = output_and_gradients(sdpa_attention_forward, floats, mask, layer, scaling=0.3)
    for own, expected in zip(ours, theirs, strict=True):
        assert own.dtype == torch.bfloat16
        error = (own.float() - expected).norm() / expected.norm().clamp(min=1e-3)
        assert error < 0.02  # bfloat16 has 8 bits


def test_short_texts_are_attended_to_without_the_fused_kernel(monkeypatch):
    monkeypatch.setattr(attention, "sdpa_attention_forward", None)
    layer = Layer(is_causal=False, num_key_value_groups=2)
    attend(layer, *random_states(MAX_TOKENS), None)


def test_predictions_use_the_fused_kernel():
    layer, states = Layer(is_causal=True, num_key_value_groups=2), random_states()
    with torch.no_grad():
        output, _ = attend(layer, *states, None)
        assert torch.equal(output, sdpa_attention_forward(layer, *states, None)[0])


@pytest.mark.parametrize("model_type", ["bert", "llama", "qwen3"])
def test_a_base_in_bfloat16_uses_it(tmp_path, model_type):
    model = tiny.save_model(tmp_path, model_type)

    def kernel(**changes):
        return make_backbone(model, **changes).module.config._attn_implementation

    assert kernel(compute_dtype=torch.bfloat16) == attention.NAME
    assert kernel(compute_dtype=torch.float32) == "sdpa"
    assert kernel(compute_dtype=torch.bfloat16, attn_implementation="eager") == "eager"
    assert kernel(compute_dtype=torch.bfloat16, attn_implementation="sdpa") == "sdpa"


def test_a_family_that_looks_at_the_name_of_the_kernel_keeps_it(tmp_path, monkeypatch):
    model = tiny.save_model(tmp_path, "llama")
    looking = "if self.config._attn_implementation in ('eager', 'sdpa'):"
    monkeypatch.setattr("inspect.getsource", lambda module: looking)
    base = make_backbone(model, compute_dtype=torch.bfloat16)
    assert base.module.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("texts", [["cat dog"] * 8, ["cat", "cat dog cow"] * 4])
def test_relative_positions_are_added_with_and_without_padding(tmp_path, texts):
    tiny.save_whole(tmp_path, "t5")
    clf = make_classifier(tmp_path, compute_dtype="bfloat16", num_train_epochs=2)
    clf.fit(texts, [0, 1] * 4)
    assert np.isfinite(clf.loss_curve_).all()
