"""Dropout of LoRA's input: which features each adapted layer drops in an update of the weights."""

import numpy as np
import torch
from torch import nn


class LoraDropout(nn.Module):
    """Dropout with one mask for all tokens of all texts of an update.

    Such a mask of the input is a mask of A's columns too, and needs no pass over the activations
    (Lin et al., arXiv 2404.09610, drop columns of A in this way).

    Parameters
    ----------
    p : float
        The share of the features that is dropped.
    n_features : int
    device : torch.device
    dtype : torch.dtype

    Attributes
    ----------
    mask : torch.Tensor of shape (n_features,)
        Zero for the features that are dropped, and 1 for the others.
    """

    def __init__(self, p: float, n_features: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.p = p
        self.mask = torch.ones(n_features, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop features, which are along the last axis, from activations."""
        return x * (self.mask.to(x.dtype) / (1 - self.p)) if self.training else x


class DropoutOfUpdates:
    """Draws the masks of all layers, for one update after the other.

    The masks follow from the seed and the number of the update, and never from a global generator.
    So neither the cut of an update into passes, nor recomputation under checkpointing, nor another
    thread changes what is trained.

    Parameters
    ----------
    layers : list of LoraDropout
        The layers, at least one, of the same `p` and dtype.
    seed : int
    """

    def __init__(self, layers: list[LoraDropout], seed: int):
        self._layers, self._seed, self._update = layers, seed, -1

    def draw(self, update: int) -> None:
        """Give each layer its mask for an update, unless it has that already."""
        if update == self._update:
            return
        words = np.random.SeedSequence([self._seed, update]).generate_state(2)
        seed = int(words[0]) << 31 | int(words[1]) >> 1
        p, widths = self._layers[0].p, [len(layer.mask) for layer in self._layers]
        # Each of the devices that a base is on draws all masks, which are then those of one device.
        for device in {layer.mask.device for layer in self._layers}:
            generator = torch.Generator(device).manual_seed(seed)
            masks = torch.empty(sum(widths), dtype=torch.float32, device=device)
            masks.bernoulli_(1 - p, generator=generator)
            masks = masks.to(self._layers[0].mask.dtype)
            for layer, mask in zip(self._layers, masks.split(widths), strict=True):
                if layer.mask.device == device:
                    layer.mask = mask
        self._update = update
