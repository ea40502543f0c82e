"""Norms of hidden states as one step, compared with Llama's."""

import tiny
import torch
from helpers import make_backbone
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from skqlora.model.norm import use_fused_norms


def output_and_gradient(norm, x):
    x = x.clone().requires_grad_()
    output = norm(x)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    [gradient] = torch.autograd.grad((output.float() * weights).sum(), x)
    return output, gradient


def test_norm_and_its_gradient_equal_llamas():
    generator = torch.Generator().manual_seed(0)
    norm = LlamaRMSNorm(48, eps=1e-2).requires_grad_(False)
    norm.weight.normal_(generator=generator)
    x = torch.randn(64, 16, 48, generator=generator) * 0.1
    x[0, 0] = 0
    expected = output_and_gradient(norm, x)
    use_fused_norms(norm)
    for dtype, tolerance in [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)]:
        for own, theirs in zip(
            output_and_gradient(norm.to(dtype), x.to(dtype)), expected, strict=True
        ):
            assert own.dtype == dtype
            assert (own.float() - theirs).norm() < tolerance * theirs.norm()


def test_norms_are_recognised_by_what_they_compute():
    changed, unchanged = Qwen3RMSNorm(8), GemmaRMSNorm(8)
    use_fused_norms(torch.nn.ModuleList([changed, unchanged]))
    assert type(changed) is not Qwen3RMSNorm
    assert isinstance(changed, Qwen3RMSNorm)
    assert type(unchanged) is GemmaRMSNorm


def test_decoder_in_bfloat16_takes_a_step_a_norm(tmp_path):
    backbone = make_backbone(tiny.save_model(tmp_path, "llama"), compute_dtype=torch.bfloat16)
    ids = torch.arange(5)[None]
    with torch.profiler.profile() as profile:
        backbone.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    n_steps = sum(event.count for event in profile.key_averages() if event.key == "_RMSNorm")
    assert n_steps == sum("norm" in name for name, _ in backbone.module.named_modules())
