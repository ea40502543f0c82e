"""Many small parameters as views into one flat buffer, which is what is copied, reduced or updated.

Knows nothing of what the parameters are for.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

ALIGNMENT = 256  # elements: a block of the 8-bit optimizer never spans two tensors
# bitsandbytes pages the state of an optimizer only for tensors of so many elements. LoRA's own are
# smaller: only in a flat buffer is their optimizer paged.
PAGED_MIN_ELEMENTS = 100_000


class FlatParameters:
    """Parameters as views into one float32 tensor, by name.

    Parameters
    ----------
    parameters : mapping of str to torch.nn.Parameter
        On one device, of any floating dtype. Their `data` become float32 views.

    Attributes
    ----------
    leaf : torch.nn.Parameter of shape (n_elements,)
        What an optimizer sees. Each parameter starts at a multiple of 256 elements; the gaps stay
        zero.
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
        for name, parameter in self._parameters.items():
            view = self._view(self.leaf.data, name)
            view.copy_(parameter.data)
            parameter.data = view

    @property
    def nbytes(self) -> int:
        """Size of the values in memory."""
        return self.leaf.nbytes

    def load_state_dict(self, values: Mapping[str, np.ndarray]) -> None:
        """Set every parameter: one copy to the device.

        Parameters
        ----------
        values : mapping of str to ndarray
            float32, of the parameters' names and shapes; others are left out.
        """
        flat = torch.zeros(self.leaf.shape, dtype=torch.float32)
        host = flat.numpy()
        for name in self._slots:
            self._view(host, name)[...] = values[name]
        self.leaf.data.copy_(flat)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return a copy of every parameter: one copy from the device, of which they are views."""
        host = self.leaf.detach().to("cpu", copy=True).numpy()
        return {name: self._view(host, name) for name in self._slots}

    def attach_gradients(self) -> None:
        """Give the parameters gradients that are views of the leaf's: zeros, to add to.

        Never call `zero_grad` of an optimizer or a module: it replaces the leaf's gradient and
        leaves the views behind, silently.
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
        """The leaf's gradient, of shape (n_elements,), once there is one."""
        assert self.leaf.grad is not None
        return self.leaf.grad

    def _view(self, flat: Any, name: str) -> Any:
        """Part of a flat tensor or array that holds a parameter, in its shape."""
        first, shape = self._slots[name]
        return flat[first : first + int(np.prod(shape))].reshape(shape)
