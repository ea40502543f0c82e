"""Attention in bfloat16 on a CPU, for trainings with short texts.

Where a processor multiplies bfloat16, its products are several times as fast as those of float32.
The backward pass of torch's fused attention for CPUs gains nothing by that, and is even slower in
bfloat16. So the products and the softmax are computed here one after the other. This keeps the
scores of all pairs of tokens for the backward pass, which is little for short texts.
"""

import inspect
import re
import sys
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from skqlora.checkpoint.spec import BackboneSpec

NAME = "skqlora_bfloat16"
MAX_TOKENS = 256  # with 512 the fused kernel in float32 is as fast, and it keeps no scores
# Arguments of some families' attention that only transformers' own function looks at.
SPECIAL = ("position_bias", "softcap", "s_aux", "indices", "cache")
# Code that does otherwise where the kernel has another name, as DeepSeek-V3.2's masks do.
LOOKS_AT_THE_NAME = re.compile(r"_attn_implementation\s*(==|!=|in\b|not\b)")


def attends_in_bfloat16(spec: BackboneSpec) -> bool:
    """Return whether a base computes attention here, if it leaves the choice to transformers."""
    in_bfloat16 = spec.storage_dtype == torch.bfloat16
    return spec.device.type == "cpu" and in_bfloat16 and spec.attn_implementation is None


def use_bfloat16_attention(module: PreTrainedModel) -> None:
    """Let a base compute attention here, unless its family has no place for it."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if (
        module.config._attn_implementation == "sdpa"
        and module._can_set_attn_implementation()
        and not LOOKS_AT_THE_NAME.search(inspect.getsource(sys.modules[type(module).__module__]))
    ):
        module.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute softmax(s Q K^T + M) V, a function for transformers' `AttentionInterface`.

    Vaswani et al., arXiv 1706.03762, eq. 1, with a mask M that is added.

    Parameters
    ----------
    module : torch.nn.Module
        The layer of attention.
    query : torch.Tensor of shape (b, h, t, d)
    key, value : torch.Tensor of shape (b, g, t, d)
        The keys and values of g heads, each of which serves h / g of the query's.
    attention_mask : torch.Tensor or None
        Which tokens are seen, or what is added to the scores. Its shape can be broadcast to
        (b, h, t, t).
    scaling : float, optional
        The factor s, by default the square root of 1 / d.
    is_causal : bool, optional
        Whether a token sees only those before it, if there is no mask. By default the layer tells.

    Returns
    -------
    output : torch.Tensor of shape (b, t, h, d)
    scores : None
    """
    options = {"scaling": scaling, "is_causal": is_causal, **kwargs}
    if not torch.is_grad_enabled():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    n_tokens = key.shape[2]
    if n_tokens > MAX_TOKENS or any(kwargs.get(name) is not None for name in SPECIAL):
        return _attend_in_float32(module, query, key, value, attention_mask, options)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal:
        attention_mask = torch.ones(query.shape[2], n_tokens, dtype=torch.bool).tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Attention.apply(query, key, value, attention_mask, scale), None


def _attend_in_float32(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    if options.get("position_bias") is not None:
        options["position_bias"] = options["position_bias"].float()
    output, _ = sdpa_attention_forward(
        module, query.float(), key.float(), value.float(), mask, **options
    )
    return output.to(query.dtype), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        (n_rows, n_heads, n_tokens, width), n_groups = query.shape, key.shape[1]
        # The heads of the query that share a key become rows of one product with it.
        query = query.reshape(n_rows * n_groups, -1, width)
        key, value = (x.reshape(n_rows * n_groups, *x.shape[2:]) for x in (key, value))
        scores = torch.bmm(query, key.transpose(1, 2)).mul_(scale)  # (b g, h / g t, t)
        by_head = scores.view(n_rows, n_heads, n_tokens, -1)
        if mask is not None and mask.dtype == torch.bool:
            by_head.masked_fill_(mask.logical_not(), torch.finfo(scores.dtype).min)
        elif mask is not None:
            by_head.add_(mask)
        shares = scores.softmax(-1)
        ctx.save_for_backward(query, key, value, shares)
        ctx.scale, ctx.n_groups = scale, n_groups
        output = torch.bmm(shares, value).view(n_rows, n_heads, n_tokens, -1)
        return output.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, shares = ctx.saved_tensors
        n_rows, n_tokens, n_heads, _ = grad.shape
        grad = grad.transpose(1, 2).reshape(len(value), -1, value.shape[-1])
        grad_value = torch.bmm(shares.transpose(1, 2), grad)
        grad_shares = torch.bmm(grad, value.transpose(1, 2))
        scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
        scores.mul_(ctx.scale)
        grad_query = torch.bmm(scores, key).view(n_rows, n_heads, n_tokens, -1)
        grad_key = torch.bmm(scores.transpose(1, 2), query)
        groups = n_rows, ctx.n_groups, *key.shape[1:2]
        return grad_query, grad_key.view(*groups, -1), grad_value.view(*groups, -1), None, None
