"""The experts of a mixture of experts, whose matrices are kept in 4 bits.

transformers keeps a layer's experts in parameters of three dimensions, one matrix for each expert,
which its bitsandbytes integration leaves in 16 bits. Here they are packed like the weights of
linear layers. A layer's experts are dequantized together when they are used, in the forward pass
and again in the backward pass, so that one layer at a time has them in `compute_dtype`.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from torch import nn
from torch.utils.checkpoint import checkpoint


def expert_matrices(module: nn.Module) -> dict[str, torch.Size]:
    """Find the parameters of a module that hold a matrix for each expert, packed or not.

    These are the parameters of three dimensions of a class of experts, which transformers calls so
    in every family.

    Parameters
    ----------
    module : torch.nn.Module

    Returns
    -------
    shapes : dict of str to torch.Size
        The names of the parameters and their shapes before packing, (n_experts, n_rows,
        n_columns). It is empty for most modules.
    """
    if "Expert" not in type(module).__name__:
        return {}
    shapes = {name: _shape(p) for name, p in module.named_parameters(recurse=False)}
    return {name: s for name, s in shapes.items() if len(s) == 3 and min(s[1:]) > 1}


def has_experts(model: nn.Module) -> bool:
    """Return whether a model is a mixture of experts."""
    return any(expert_matrices(module) for module in model.modules())


def _shape(parameter: Any) -> torch.Size:
    packed = isinstance(parameter, Params4bit) and parameter.quant_state is not None
    return parameter.quant_state.shape if packed else parameter.shape


def find_routers(model: nn.Module) -> tuple[str, ...]:
    """Name the linear layers that choose experts: those beside experts, with an output for each.

    They stay as they are, unquantized and without an adapter, because a small change of their
    output sends a token to another expert.
    """
    routers = set()
    modules = dict(model.named_modules())
    for name, module in modules.items():
        counts = {shape[0] for shape in expert_matrices(module).values()}
        parent = name.rpartition(".")[0]
        if counts and parent:  # otherwise there is nothing beside it
            routers |= {
                f"{parent}.{inner}"
                for inner, layer in modules[parent].named_modules()
                if isinstance(layer, nn.Linear)
                and layer.out_features in counts
                and "att" not in inner  # beside experts that stand in the block itself
            }
    return tuple(sorted(routers))


def quantize_matrices(value: torch.Tensor, quant_type: str, double_quant: bool) -> Params4bit:
    """Pack matrices of shape (n_experts, n_rows, n_columns) on the device where they are."""
    packed: Any = Params4bit(
        value, requires_grad=False, quant_type=quant_type, compress_statistics=double_quant
    )
    return packed.to(value.device)


def use_packed_experts(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Let each module whose expert matrices are packed dequantize them where it uses them."""
    for module in model.modules():
        matrices = map(module.get_parameter, expert_matrices(module))
        if any(isinstance(each, Params4bit) for each in matrices):
            experts_class: Any = type(module)
            module.__class__ = _packed_class(experts_class)
            module.compute_dtype = compute_dtype  # type: ignore[assignment]


@functools.cache
def _packed_class(experts_class: Any) -> type[nn.Module]:
    return type(f"Packed{experts_class.__name__}", (PackedExperts, experts_class), {})


class PackedExperts(nn.Module):
    """A layer's experts, in front of the class that computes with them.

    The products are in `compute_dtype`, as those of a 4-bit linear layer are. The result has the
    dtype of the hidden states. What the backward pass needs is computed again there, because
    autograd would otherwise keep the dequantized matrices of all layers.
    """

    compute_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output of the experts; the arguments are those of their own class."""
        hidden, *others = args or (kwargs.pop("hidden_states"),)
        return checkpoint(
            self._compute, hidden, *others, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    def _compute(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._dequantized():
            output = super().forward(hidden.to(self.compute_dtype), *args, **kwargs)
        return output.to(hidden.dtype)

    @contextmanager
    def _dequantized(self) -> Iterator[None]:
        """Hide the packed parameters behind dense tensors of the same names.

        An attribute in an object's own dictionary comes before a parameter of this name. A replica
        of the base is used by one thread at a time.
        """
        names = [name for name, _ in self.named_parameters(recurse=False)]
        try:
            for name in names:
                self.__dict__[name] = self._dense(self._parameters[name])
            yield
        finally:
            for name in names:
                self.__dict__.pop(name, None)

    @torch.no_grad()
    def _dense(self, parameter: Any) -> torch.Tensor:
        if not isinstance(parameter, Params4bit):  # a bias
            return parameter.to(self.compute_dtype)
        dense = dequantize_4bit(parameter.data, parameter.quant_state)
        return dense.to(self.compute_dtype)
