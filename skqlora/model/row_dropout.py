"""Dropout of LoRA's input with one mask for each text, however an update is cut into passes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class RowsOfUpdate:
    """The rows of an update that a forward pass holds.

    Attributes
    ----------
    update : int
        The number of the update of the weights.
    batch_rows : int
        The number of rows in the update, over all of its passes and ranks.
    rows : torch.Tensor of int64, of shape (n_rows,)
        The places in the update of the rows of this pass, on the device of the model.
    """

    update: int
    batch_rows: int
    rows: torch.Tensor


class RowDropout(nn.Module):
    """Dropout with one mask for each row, which all tokens of the row share.

    The mask follows from the seed, the number of the update, the layer and the row's place in the
    update, and never from a global generator. So neither the cut of an update into passes, nor
    recomputation under checkpointing, nor another thread changes what is trained.

    Parameters
    ----------
    p : float
        The share of the features that is dropped.
    seed, layer : int
    row_axis : int
        The axis of the input along which the rows lie. It may hold several tokens of each row in
        turn.

    Attributes
    ----------
    part : RowsOfUpdate or None
        The rows that the current pass holds, which `TextModel.forward` sets.
    """

    def __init__(self, p: float, seed: int, layer: int, row_axis: int):
        super().__init__()
        self.p, self.seed, self.layer, self.row_axis = p, seed, layer, row_axis
        self.part: RowsOfUpdate | None = None
        self._keep, self._update = torch.empty(0), -1  # the mask of an update, and its number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop features, which are along the last axis, from the activations of a pass."""
        if not self.training:
            return x
        part = self.part
        assert part is not None, "a forward pass in training must say which rows it holds"
        if self._update != part.update:
            self._keep, self._update = self._draw(part, x), part.update
        keep = self._keep[part.rows.to(x.device)]  # a base may be on several devices
        # (n_rows, n_features), repeated for each token if rows and tokens share the axis
        n_repeats = x.shape[self.row_axis] // len(part.rows)
        scale = (keep.float() / (1 - self.p)).repeat_interleave(n_repeats, 0)
        shape = [1] * x.ndim
        shape[self.row_axis], shape[-1] = scale.shape
        return x * scale.to(x.dtype).view(shape)

    def _draw(self, part: RowsOfUpdate, x: torch.Tensor) -> torch.Tensor:
        """Draw what all rows of an update keep, as bool of shape (batch_rows, n_features)."""
        words = np.random.SeedSequence([self.seed, part.update, self.layer]).generate_state(2)
        generator = torch.Generator(x.device).manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        keep = torch.empty(part.batch_rows, x.shape[-1], dtype=torch.float32, device=x.device)
        return keep.bernoulli_(1 - self.p, generator=generator).bool()
