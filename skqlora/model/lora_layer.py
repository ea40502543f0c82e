"""The LoRA layer over a 4-bit one, with its product added in place."""

from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit


class FusedLinear4bit(Linear4bit):
    """PEFT's layer, less the copies of its output where the base computes in float32.

    PEFT copies the base's output, scales LoRA's product and adds the two: three passes over a
    tensor as large as the output, for a product of rank r. Here one matrix product adds itself to
    the output of the base: y = W x + s B (A x), Hu et al., arXiv 2106.09685, eq. 3. The numbers
    are PEFT's but for float32's rounding. DoRA, what autocast mixes, and an adapter that is merged
    or turned off are left to PEFT.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the layer on x of shape (..., in_features)."""
        [adapter] = self.active_adapters
        if (
            adapter in self.lora_variant
            or x.dtype != torch.float32
            or torch.is_autocast_enabled(x.device.type)
            or self.disable_adapters
            or self.merged
        ):
            return super().forward(x, *args, **kwargs)
        down = self.lora_A[adapter](self.lora_dropout[adapter](x)).flatten(0, -2)
        # (n_rows * n_tokens, out_features): addmm_ adds to a matrix
        output = self.base_layer(x.flatten(0, -2), *args, **kwargs)
        up: Any = self.lora_B[adapter]
        output.addmm_(down, up.weight.t(), alpha=self.scaling[adapter])
        return output.unflatten(0, x.shape[:-1])
