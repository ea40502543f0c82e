"""The parameters of a fit that are plain values, with their types."""

import functools
import os
from dataclasses import dataclass
from numbers import Integral
from typing import Any, get_args, get_type_hints

import numpy as np


@dataclass(frozen=True)
class Parameters:
    """The parameters that the user chose for a fit; "auto" leaves the choice to this package.

    The names and their meaning are those of the estimator's parameters. All are plain values, which
    can be hashed, compared and saved. Parameters that may be functions, dicts or random states, or
    that concern only the course of a fit, are not here: see `training/estimator.py`.
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

    @property
    def batch_rows(self) -> int:
        """The number of texts in one update."""
        return self.batch_size * self.gradient_accumulation_steps


def read_parameters(estimator: object) -> Parameters:
    """Read the parameters of an estimator, which were validated, from its attributes.

    They are turned into Python's own types, since NumPy's numbers, enumerations, paths and lists
    cannot all be hashed, compared and written as JSON.

    Parameters
    ----------
    estimator : QLoRAClassifier

    Returns
    -------
    parameters : Parameters
    """
    hints = _hints()
    values = {name: _plain(getattr(estimator, name), hint) for name, hint in hints.items()}
    return Parameters(**values)


@functools.cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Parameters)


def _plain(value: Any, hint: Any) -> Any:
    """Turn a value into the one of the hinted types that it stands for."""
    kinds = get_args(hint) or (hint,)
    plain = value  # such as None
    if isinstance(value, str):
        plain = str.__str__(value)  # the value of an enumeration's member, not its name
    elif isinstance(value, os.PathLike):
        plain = os.fspath(value)
    elif isinstance(value, list | tuple):
        plain = tuple(_plain(entry, str | int) for entry in value)
    elif bool in kinds and isinstance(value, bool | np.bool_):
        plain = bool(value)
    elif int in kinds and isinstance(value, Integral | np.bool_):
        plain = int(value)
    elif float in kinds and value is not None:
        plain = float(value)
    return plain
