"""LoRA over a linear layer, as one step of autograd."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora.bnb import Linear4bit
from torch import nn
from torch.autograd.function import once_differentiable

from skqlora.model.dropout import LoraDropout


class _Fused:
    """PEFT's layer in fewer steps, all of them in the dtype that the base computes in.

    It computes what PEFT's layer does, y = W x + s B A dropout(x) (Hu et al., arXiv 2106.09685,
    eq. 3). PEFT computes B A x in float32, for which it casts x and the product, and it makes new
    tensors for the dropped x, for a copy of W x, for s B A x and for the sum. Here dropout is on
    the columns of A, and the product adds itself to W x. DoRA and an adapter that is merged or
    turned off are left to PEFT.

    Attributes
    ----------
    low : tuple of torch.Tensor, or None
        A and B in the dtype that the base computes in, if someone keeps such copies up to date.
    """

    low: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer's output for x of shape (..., in_features)."""
        [adapter] = self.active_adapters
        if adapter in self.lora_variant or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        factors = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        low = self.low or [factor.to(dtype_of_products(self.base_layer)) for factor in factors]
        dropout = self.lora_dropout[adapter]
        scale, mask = self.scaling[adapter], None
        if isinstance(dropout, LoraDropout) and dropout.training:
            scale, mask = scale / (1 - dropout.p), dropout.mask
        # Each dtype is chosen here, also under the autocast that float16 needs elsewhere.
        with _no_autocast(x.device.type):
            return _AdaptedProduct.apply(x, *factors, *low, mask, scale, self.base_layer)


class FusedLinear4bit(_Fused, Linear4bit):
    """LoRA over a 4-bit layer."""


class FusedLinear(_Fused, peft.tuners.lora.Linear):
    """LoRA over a layer that is not quantized."""


def dtype_of_products(base: Any) -> torch.dtype:
    """Return the dtype in which a linear layer computes."""
    return base.compute_dtype if isinstance(base, bnb.nn.Linear4bit) else base.weight.dtype


class _AdaptedProduct(torch.autograd.Function):
    """The product W x + s B A (m * x), where the mask m is that of LoRA's dropout.

    W is frozen. For the backward pass, too, it is in 16 bits only for the moment of its product.
    The gradients of A and B are added to those that are there, which autograd would do for a tensor
    of each: with the texts of a small batch such steps take as long as the products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lower: torch.Tensor,
        upper: torch.Tensor,
        low_lower: torch.Tensor,
        low_upper: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        base: Any,
    ) -> torch.Tensor:
        # x: (..., n_in); lower: (r, n_in); upper: (n_out, r); mask: (n_in,) or None
        cast = x.to(low_lower.dtype)
        rows = cast.reshape(-1, x.shape[-1])  # (n, n_in)
        masked = low_lower if mask is None else low_lower * mask
        down = torch.mm(rows, masked.t())  # (n, r)
        output = base(cast)
        output.view(-1, len(upper)).addmm_(down, low_upper.t(), alpha=scale)
        ctx.save_for_backward(rows, masked, low_upper, down, mask)
        ctx.factors, ctx.scale, ctx.base, ctx.x = (lower, upper), scale, base, (x.shape, x.dtype)
        return output.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, masked, low_upper, down, mask = ctx.saved_tensors
        grad = grad.reshape(-1, len(low_upper)).to(rows.dtype)
        grad_down = torch.mm(grad, low_upper)  # (n, r)
        lower, upper = map(_gradient, ctx.factors)
        grad_lower = torch.mm(grad_down.t(), rows)
        if mask is None:
            lower.add_(grad_lower, alpha=ctx.scale)
        else:
            lower.addcmul_(grad_lower, mask, value=ctx.scale)
        upper.add_(torch.mm(down.t(), grad).t(), alpha=ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            shape, dtype = ctx.x
            grad_x = torch.mm(grad, _dense_weight(ctx.base, grad.dtype))
            grad_x = grad_x.addmm_(grad_down, masked, alpha=ctx.scale).to(dtype).view(shape)
        return grad_x, *[None] * 7


def _no_autocast(device_type: str) -> AbstractContextManager:
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _dense_weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a layer's weight, of shape (n_out, n_in), unpacked if it has 4 bits."""
    weight = base.weight
    if isinstance(weight, bnb.nn.Params4bit):
        return dequantize_4bit(weight.view(-1, 1), weight.quant_state).to(dtype)
    return weight


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Return the gradient that a parameter has, or zeros that become it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
