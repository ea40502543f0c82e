"""The LoRA layer over a 4-bit layer, with LoRA's product added in place."""

from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit
from torch import nn


class FusedLinear4bit(Linear4bit):
    """PEFT's layer without the copies of its output, for float32 inputs without autocast.

    PEFT copies the base's output, scales LoRA's product and adds the two. These are three passes
    over a tensor as large as the output, for a product of rank r. Here a single matrix product adds
    itself to the base's output: y = W x + s B (A x), Hu et al., arXiv 2106.09685, eq. 3. The
    results are PEFT's except for the rounding of float32. DoRA, the mixed precision of autocast,
    and an adapter that is merged or turned off are left to PEFT.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer's output for x of shape (..., in_features)."""
        [adapter] = self.active_adapters
        if (
            adapter in self.lora_variant
            or x.dtype != torch.float32
            or torch.is_autocast_enabled(x.device.type)
            or self.disable_adapters
            or self.merged
        ):
            return super().forward(x, *args, **kwargs)
        lower: Any = self.lora_A[adapter]
        upper: Any = self.lora_B[adapter]
        dropped = self.lora_dropout[adapter](x) if self.training else x
        # A call of a module costs as much as the product of one short text.
        down = nn.functional.linear(dropped, lower.weight).flatten(0, -2)
        # (n_rows * n_tokens, out_features): addmm_ adds to a matrix
        output = self.base_layer(x.flatten(0, -2), *args, **kwargs)
        output.addmm_(down, upper.weight.t(), alpha=self.scaling[adapter])
        return output.unflatten(0, x.shape[:-1])
