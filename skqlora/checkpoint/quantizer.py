"""How transformers quantizes a base while it loads: linear layers, and the experts' matrices.

This extends the bitsandbytes integration of transformers by what it leaves in 16 bits, and by
checkpoints in another format of few bits, such as MXFP4. A layer is read, brought into its shape
and packed before the next one is read.
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize, replace_with_bnb_linear
from transformers.quantizers import (
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from skqlora.checkpoint.experts import (
    expert_matrices,
    find_routers,
    quantize_matrices,
    use_packed_experts,
)

METHOD = "bitsandbytes_4bit_with_experts"
# The share of its weights that a 4-bit model may keep in layers that are not quantized.
UNQUANTIZED_SHARE = 0.02


def unquantized_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Name the linear layers that stay as they are in a 4-bit base.

    These are routers, and layers that transformers wants in float32. Where the latter are a large
    part of the model, as T5's `wo`, they are quantized nevertheless.
    """
    return find_routers(model) + (() if _float32_is_large(model) else _in_float32(model))


def _in_float32(model: PreTrainedModel) -> tuple[str, ...]:
    endings = tuple(model._keep_in_fp32_modules or ())
    linear = (name for name, m in model.named_modules() if type(m) is nn.Linear)
    return tuple(name for name in linear if f".{name}".endswith(tuple(f".{e}" for e in endings)))


def _float32_is_large(model: PreTrainedModel) -> bool:
    layers: list[Any] = [model.get_submodule(name) for name in _in_float32(model)]
    n_kept = sum(layer.weight.numel() for layer in layers)
    return n_kept > UNQUANTIZED_SHARE * sum(p.numel() for p in model.parameters())


def dequantizer(stored: dict[str, Any]) -> HfQuantizer | None:
    """Return what can dequantize a checkpoint while it is read, or None if transformers cannot.

    Parameters
    ----------
    stored : dict
        The entry "quantization_config" of the checkpoint's config.json.
    """
    quantizer = AutoHfQuantizer.from_config(dict(stored), pre_quantized=True)
    if "dequantize" not in quantizer.get_load_operations():
        return None
    quantizer.quantization_config.dequantize = True
    return quantizer


@register_quantization_config(METHOD)
class FourBitConfig(BitsAndBytesConfig):
    """The configuration of a base in 4 bits, its experts included.

    Parameters
    ----------
    stored : dict, optional
        How the checkpoint is quantized in another format.
    **kwargs
        The parameters of `transformers.BitsAndBytesConfig`.
    """

    def __init__(self, stored: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(load_in_4bit=True, **kwargs)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.stored = stored


@register_quantizer(METHOD)
class FourBitQuantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' 4-bit quantization of linear layers and of experts."""

    def __init__(self, quantization_config: FourBitConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        stored = quantization_config.stored
        self.dequantizer = None if stored is None else dequantizer(stored)
        # The checkpoint's tensors then come as they are, and converters pack them.
        self.pre_quantized = self.dequantizer is not None

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Return whether a parameter is to be packed."""
        module, name = _owner(model, param_name)
        return name in expert_matrices(module) or super().param_needs_quantization(
            model, param_name, **kwargs
        )

    def get_quantize_ops(self) -> "PackMatrices":
        """Return the operation that packs a parameter."""
        return PackMatrices(self)

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel) -> list:
        """Return the conversions of the checkpoint's tensors, which end with packing them."""
        if self.dequantizer is None:
            return super().update_weight_conversions(weight_conversions, model)
        conversions = self.dequantizer.update_weight_conversions(weight_conversions, model)
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        for converter in converters:
            converter.operations.append(PackMatrices(self))
        if not any("weight" in converter.source_patterns for converter in converters):
            conversions.append(WeightConverter("weight", "weight", [PackMatrices(self)]))
        return conversions

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if _float32_is_large(model):  # T5 looks at the dtype of the weight, packed or not
            config.bnb_4bit_quant_storage = torch.float32
        replace_with_bnb_linear(model, list(unquantized_layers(model)), config)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        use_packed_experts(model, self.quantization_config.bnb_4bit_compute_dtype)
        return super()._process_model_after_weight_loading(model, **kwargs)


class PackMatrices(Bnb4bitQuantize):
    """Pack the weight of a linear layer, or the matrices of a layer's experts."""

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Return the packed values by the parameters' names."""
        converted: dict[str, torch.Tensor] = {}
        dtype = model.get_input_embeddings().weight.dtype
        for name, value in _by_full_name(input_dict, full_layer_name).items():
            module, parameter = _owner(model, name)
            tensor = value[0] if isinstance(value, list) else value
            if isinstance(module, Linear4bit) and parameter == "weight":
                packed = super().convert({name: tensor.to(dtype)}, model=model, **kwargs)
                converted |= packed
            elif parameter in expert_matrices(module):
                converted[name] = self._pack_experts(tensor.to(dtype))
            else:
                converted[name] = tensor.to(getattr(module, parameter).dtype)
        return converted

    def _pack_experts(self, matrices: torch.Tensor) -> torch.Tensor:
        config = self.hf_quantizer.quantization_config
        return quantize_matrices(
            matrices, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant
        )


def _by_full_name(values: dict[str, Any], full_name: str | None) -> dict[str, Any]:
    """Return values by the names of parameters, of which a conversion may know only a part."""
    if full_name is None:
        return values
    full_name = full_name.replace("*.", "0.")
    before, _, after = next(full_name.partition(part) for part in values if part in full_name)
    return {before + part + after: value for part, value in values.items()}


def _owner(model: PreTrainedModel, name: str) -> tuple[nn.Module, str]:
    """Return the module that has a parameter, and the parameter's name there."""
    path, _, parameter = name.rpartition(".")
    return model.get_submodule(path), parameter
