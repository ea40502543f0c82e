"""A base and an adapter, merged into one dense Transformers model for sequence classification.

The 4-bit weights are dequantized in float32 and the adapter is added to them, because it was
trained on these weights and not on the ones before quantization. This module knows nothing of
texts.
"""

import copy
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from skqlora._utils.libraries import library_lock
from skqlora.adapter import AdapterState, check_shapes
from skqlora.checkpoint.modules import NoRandomInit
from skqlora.model.backbone import Backbone
from skqlora.model.lora import ADAPTER, peft_config, shown_to_peft
from skqlora.persistence.peft_format import adapted_modules
from skqlora.text.targets import Classes, Target

HEADS = {"last": "score", "pooler": "classifier"}  # the head's name in Transformers, by pooling


def stock_model(config: PreTrainedConfig, pooling: str) -> tuple[PreTrainedModel, str, str]:
    """Make Transformers' own model for sequence classification, and name its parts.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    pooling : {"last", "mean", "cls", "pooler"}

    Returns
    -------
    model : transformers.PreTrainedModel
        The model, in float32 and without meaningful weights.
    base, head : str
        The names of the base and of the head in the model.

    Raises
    ------
    ValueError
        If there is no such model, if it pools another way, or if its head is more than a linear
        layer.
    """
    refusal = ValueError(
        f"Got a {config.model_type} model with pooling={pooling!r}, for which Transformers "
        "has no class of its own. Wanted: one of Llama, Qwen, Mistral, Gemma, GPT-2 ... with "
        "pooling='last', or of BERT, ALBERT with pooling='pooler'. `save` writes any."
    )
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise refusal
    with library_lock, NoRandomInit():
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    base_name, head_name = model.base_model_prefix, HEADS.get(pooling, "")
    base = getattr(model, base_name, None)
    if base is None or not isinstance(getattr(model, head_name, None), nn.Linear):
        raise refusal
    if pooling == "pooler" and getattr(base, "pooler", None) is None:
        raise refusal
    return model, base_name, head_name


def classification_config(
    backbone_config: PreTrainedConfig, target: Target, *, pad_id: int | None
) -> PreTrainedConfig:
    """Write what is predicted into a copy of a base's configuration."""
    config = copy.deepcopy(backbone_config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    if isinstance(target, Classes):
        labels = [str(label) for label in target.values.tolist()]
        kind = "multi_label_classification" if target.multilabel else "single_label_classification"
    else:
        labels = [f"LABEL_{number}" for number in range(target.n_outputs)]  # as in Transformers
        kind = "regression"
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = kind  # type: ignore[assignment]
    config.pad_token_id = pad_id
    return config


def merge(backbone: Backbone, state: AdapterState, config: PreTrainedConfig) -> PreTrainedModel:
    """Make a dense float32 model of a base and an adapter, on the CPU.

    Parameters
    ----------
    backbone : Backbone
        The base, which is only read.
    state : AdapterState
        The adapter, which belongs to this base.
    config : transformers.PreTrainedConfig
        The configuration that `classification_config` returned.

    Returns
    -------
    model : transformers.PreTrainedModel
        The model. Its weights are those of the base, dequantized, plus ``scaling * B @ A``.

    Raises
    ------
    ValueError
        If Transformers has no class for this base with the pooling of the adapter.
    """
    model, base_name, head_name = stock_model(config, state.pooling)
    base, head = model.get_submodule(base_name), model.get_submodule(head_name)
    with torch.no_grad():
        base.load_state_dict(_dense_state(backbone.module, base), assign=True)
        _add_adapter(base, state)
        check_shapes(
            state.head_tensors, {name: tuple(p.shape) for name, p in head.named_parameters()}
        )
        for name, parameter in head.named_parameters():
            parameter.copy_(torch.tensor(state.head_tensors[name]))
    return model.requires_grad_(True)


def _dense_state(quantized: PreTrainedModel, dense: nn.Module) -> dict[str, torch.Tensor]:
    """Dequantize the weights of a base into the layout of a dense one."""
    state = quantized.state_dict()
    values = {}
    for name in dense.state_dict():
        module_name, _, parameter = name.rpartition(".")
        module = quantized.get_submodule(module_name)
        packed = getattr(module, parameter)
        if isinstance(packed, bnb.nn.Params4bit):
            value = _dequantized(packed)
            if isinstance(dense.get_submodule(module_name), Conv1D):  # GPT-2's transposed layers
                value = value.T.contiguous()
        else:
            value = state[name]
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        values[name] = value.to("cpu", dtype, copy=True)  # a copy: the base stays as it is
    return values


def _dequantized(weight: Any) -> torch.Tensor:
    """Dequantize a weight in float32, whatever precision the base computes in."""
    constants = copy.copy(weight.quant_state)
    constants.dtype = torch.float32
    return bnb.functional.dequantize_4bit(weight.data, constants)


def _add_adapter(base: nn.Module, state: AdapterState) -> None:
    targets = tuple(adapted_modules(state.lora_tensors))
    lora = replace(state.lora, target_modules=targets)
    with library_lock, NoRandomInit():
        adapted = LoraModel(shown_to_peft(base), {ADAPTER: peft_config(lora, base)}, ADAPTER)
    parameters = {name: p for name, p in base.named_parameters() if ".lora_" in name}
    check_shapes(state.lora_tensors, {name: tuple(p.shape) for name, p in parameters.items()})
    for name, parameter in parameters.items():
        parameter.copy_(torch.tensor(state.lora_tensors[name]))
    adapted.merge_and_unload()
