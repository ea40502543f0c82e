"""The estimator's parameters as typed values, read from it in this one place."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from skqlora.settings.adapter_settings import LoraSettings


@dataclass(frozen=True)
class Parameters:
    """What the user asks of a fit; "auto" stands where the choice is left to us.

    The names and their meaning are those of the estimator's parameters. The parameters that are not
    here (`scoring`, `class_weight`, `random_state` and what else says when a fit begins, is scored
    or ends) are used up by the estimator itself.
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
        """Read them from what an estimator's `get_params` returns, which were validated before."""
        return cls(**{field.name: _plain(params[field.name]) for field in fields(cls)})

    @property
    def batch_rows(self) -> int:
        """Number of texts in one update."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def lora(self) -> LoraSettings:
        """The adapter that is asked for, its target modules as the user names them."""
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
    """Return a value without types of NumPy, paths or lists: hashable, and the same as JSON."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return tuple(_plain(entry) for entry in value)
    return value
