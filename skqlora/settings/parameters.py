"""The estimator's parameters as typed values. Only this module reads them from the estimator."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from skqlora.settings.adapter_settings import LoraSettings


@dataclass(frozen=True)
class Parameters:
    """The parameters that the user chose for a fit; "auto" leaves the choice to this package.

    The names and their meaning are those of the estimator's parameters. Parameters that decide how
    a fit begins, is scored or ends (`scoring`, `class_weight`, `random_state` ...) are not here,
    because only the estimator itself uses them.
    """

    model: str
    revision: str | None
    quantization: str | None
    double_quant: bool
    compute_dtype: str
    device: str
    attn_implementation: str | None
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: str | tuple[str, ...]
    layers: str | int | tuple[int, ...]
    cache_dtype: str | None
    use_rslora: bool
    use_dora: bool
    init_lora_weights: bool | str
    init_head_weights: str
    pooling: str
    max_length: int | str
    truncation: str
    stride: int
    prompt: str | None
    num_train_epochs: int | str
    batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool | str
    learning_rate: float | str
    head_learning_rate: float | str
    weight_decay: float
    warmup_steps: float
    lr_scheduler_type: str
    max_grad_norm: float | None
    optim: str
    verbose: int

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Self:
        """Make the parameters from the result of `get_params` of a validated estimator."""
        return cls(**{field.name: _plain(params[field.name]) for field in fields(cls)})

    @property
    def batch_rows(self) -> int:
        """The number of texts in one update."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def lora(self) -> LoraSettings:
        """The settings of the adapter, with the target modules as the user names them."""
        alpha = float(self.lora_alpha)
        return LoraSettings(
            r=self.lora_r,
            lora_alpha=int(alpha) if alpha.is_integer() else alpha,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=self.init_lora_weights,
        )


def _plain(value: Any) -> Any:
    """Replace NumPy types, paths and lists by plain values that are hashable and survive JSON."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return tuple(_plain(entry) for entry in value)
    return value
