"""Many small parameters as views into one flat buffer, which is copied, reduced or updated at once.

This module knows nothing of what the parameters are for.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

# Each parameter starts at a multiple of this many elements, so that a block of the 8-bit optimizer
# never spans two tensors.
ALIGNMENT = 256
# bitsandbytes pages the state of an optimizer only for tensors of at least this many elements.
# LoRA's own tensors are smaller, so their optimizer is paged only if they are in a flat buffer.
PAGED_MIN_ELEMENTS = 100_000


class FlatParameters:
    """Named parameters as views into one float32 tensor.

    Parameters
    ----------
    parameters : mapping of str to torch.nn.Parameter
        The parameters, on one device and of any floating dtype. Their `data` become float32 views.

    Attributes
    ----------
    leaf : torch.nn.Parameter of shape (n_elements,)
        The flat tensor, which an optimizer updates. Each parameter starts at a multiple of 256
        elements; the gaps between them stay zero.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self._parameters = dict(parameters)
        self._slots = {}  # name: (first element, shape)
        n_elements = 0
        for name, parameter in self._parameters.items():
            self._slots[name] = n_elements, tuple(parameter.shape)
            n_elements += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        device = next(iter(self._parameters.values())).device
        self.leaf = nn.Parameter(torch.zeros(n_elements, dtype=torch.float32, device=device))
        self._low: torch.Tensor | None = None
        for name, parameter in self._parameters.items():
            view = self._view(self.leaf.data, name)
            view.copy_(parameter.data)
            parameter.data = view

    @property
    def nbytes(self) -> int:
        """The bytes of the values in memory, with those of a copy in another dtype."""
        copied = self._low is not None and self._low.dtype != self.leaf.dtype
        return self.leaf.nbytes + (self._low.nbytes if copied and self._low is not None else 0)

    def load_state_dict(self, values: Mapping[str, np.ndarray]) -> None:
        """Set every parameter, with a single copy to the device.

        Parameters
        ----------
        values : mapping of str to ndarray
            The float32 values, with the names and shapes of the parameters. Other names are
            ignored.
        """
        flat = torch.zeros(self.leaf.shape, dtype=torch.float32)
        host = flat.numpy()
        for name in self._slots:
            self._view(host, name)[...] = values[name]
        self.leaf.data.copy_(flat)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the values of every parameter, as views of a single copy from the device."""
        host = self.leaf.detach().to("cpu", copy=True).numpy()
        return {name: self._view(host, name) for name in self._slots}

    def low(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the parameters in another dtype, as they are after the next `refresh`."""
        if self._low is None:
            self._low = self.leaf.detach().to(dtype)  # the leaf's own memory, if that is its dtype
        return {name: self._view(self._low, name) for name in self._slots}

    def refresh(self) -> None:
        """Bring the copies in another dtype up to date, with a single copy."""
        if self._low is not None and self._low.dtype != self.leaf.dtype:
            self._low.copy_(self.leaf.detach())

    def attach_gradients(self) -> None:
        """Give the parameters zero gradients to add to, which are views of the leaf's gradient.

        Never call `zero_grad` of an optimizer or a module. It would replace the leaf's gradient
        and silently leave the views behind.
        """
        self.leaf.grad = torch.zeros_like(self.leaf)
        for name, parameter in self._parameters.items():
            parameter.grad = self._view(self.leaf.grad, name)

    def detach_gradients(self) -> None:
        """Free the gradients."""
        for parameter in (self.leaf, *self._parameters.values()):
            parameter.grad = None

    @property
    def gradient(self) -> torch.Tensor:
        """The leaf's gradient, of shape (n_elements,), once it is attached."""
        assert self.leaf.grad is not None
        return self.leaf.grad

    def _view(self, flat: Any, name: str) -> Any:
        """Return the part of a flat tensor or array that holds a parameter, in its shape."""
        first, shape = self._slots[name]
        return flat[first : first + int(np.prod(shape))].reshape(shape)
