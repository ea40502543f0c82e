"""Copying a module tree, and building one without drawing random numbers.

This module knows nothing of adapters.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

RANDOM_FILLS = (
    "uniform_",
    "normal_",
    "trunc_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
    "xavier_normal_",
)


class NoRandomInit(TorchFunctionMode):
    """A context in which this thread fills tensors with zeros instead of random numbers.

    The first values of a model that is loaded are replaced at once, so they need not be random. And
    the random state of the process belongs to the user, so nothing may be drawn from it.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in RANDOM_FILLS:  # methods of torch.Tensor, functions of torch.nn.init
            return (args[0] if args else kwargs["tensor"]).detach().zero_()
        if name in ("rand", "randn"):
            func = torch.zeros
        return func(*args, **kwargs)


def replicate(base: PreTrainedModel) -> PreTrainedModel:
    """Copy the module tree of a base, and share every tensor and the configuration."""
    shared: list[Any] = [*base.parameters(), *base.buffers(), base.config]
    shared += [m.quant_state for m in base.modules() if getattr(m, "quant_state", None) is not None]
    return copy.deepcopy(base, {id(x): x for x in shared})


def drop_pooler(module: PreTrainedModel) -> None:
    """Remove the layer over the first token that is at the end of some encoders."""
    if hasattr(module, "pooler"):
        setattr(module, "pooler", None)  # noqa: B010 (mypy: a module has no such attribute)
