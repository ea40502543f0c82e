"""The plain data that a fitted estimator keeps, so that unpickling one does not even load torch."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skqlora._utils.tables import html_table
from skqlora.settings.adapter_settings import LoraSettings, TextSettings
from skqlora.settings.settings import Settings
from skqlora.text.columns import Columns
from skqlora.text.targets import Target


@dataclass(frozen=True, repr=False)
class AdapterState:
    """The result of a fit: everything that is not in the base.

    Its arrays are read-only and nothing else in it may be changed either, because a base may still
    hold a copy of it.

    Attributes
    ----------
    lora : LoraSettings
    pooling : {"last", "mean", "cls", "pooler"}
    text_settings : TextSettings
    model, revision : str or None
        The name of the base where the adapter was trained, and its commit if it came from the Hub.
    fingerprint, tokenizer_fingerprint : str
        The fingerprints of the base and of the tokenizer that the adapter was trained with.
    lora_tensors : dict of str to ndarray
        The float32 tensors of LoRA, by the names of the parameters in the base.
    head_tensors : dict of str to ndarray
        The float32 tensors of the head: "weight" of shape (n_outputs, hidden_size) and, unless
        `pooling` is "last", "bias".
    """

    lora: LoraSettings
    pooling: str
    text_settings: TextSettings
    model: str
    revision: str | None
    fingerprint: str
    tokenizer_fingerprint: str
    lora_tensors: dict[str, np.ndarray]
    head_tensors: dict[str, np.ndarray]

    def __post_init__(self):
        for array in (*self.lora_tensors.values(), *self.head_tensors.values()):
            array.setflags(write=False)

    def find_base(self, model: str) -> str:
        """Return where the base is: as the adapter's, if a relative path leads nowhere from here.

        Parameters
        ----------
        model : str
            The name of the base that the user gave.
        """
        path, known = Path(model), Path(self.model)
        if path.is_absolute() or path.exists() or not known.is_absolute():
            return model
        parts = tuple(part for part in Path(os.path.normpath(path)).parts if part != os.pardir)
        is_same = bool(parts) and known.parts[-len(parts) :] == parts
        return self.model if is_same and known.is_dir() else model

    def __repr__(self) -> str:
        tensors = (*self.lora_tensors.values(), *self.head_tensors.values())
        n_bytes = sum(tensor.nbytes for tensor in tensors)
        return f"AdapterState(r={self.lora.r}, pooling={self.pooling!r}, {n_bytes / 1e6:.2f} MB)"

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.__post_init__()  # a pickle does not keep the read-only flags


@dataclass(frozen=True, repr=False)
class OptimizerState:
    """The state of an optimizer, for training that continues later.

    Attributes
    ----------
    optim : str
        The kind of the optimizer.
    n_updates : int
        The number of updates so far.
    schedule_step : int
        The step of the schedule of the learning rates. It is behind `n_updates` if float16
        overflowed in an update.
    states : list of dict of str to ndarray or float
        The moments of each tensor that the optimizer updates.
    """

    optim: str
    n_updates: int
    schedule_step: int
    states: list[dict[str, np.ndarray | float]]

    def __repr__(self) -> str:
        return f"OptimizerState(optim={self.optim!r}, n_updates={self.n_updates})"


@dataclass(frozen=True, repr=False)
class TrainerState:
    """The state of a training between two updates.

    Attributes
    ----------
    values : list of ndarray
        The float32 values in the flat buffers of LoRA and, as the last one, of the head.
    optimizer : OptimizerState
    n_epochs : int
        The number of epochs that are over.
    micro_tokens : int
        The greatest padded size of a forward pass, in tokens. It becomes smaller when a pass runs
        out of memory.
    epoch_losses : ndarray of shape (n_updates_of_this_epoch,)
        The losses of this epoch's updates, summed over all ranks, in float32.
    order : dict
        The result of `numpy.random.RandomState.get_state` when the epoch began.
    scaler : dict
        The result of `torch.amp.GradScaler.state_dict`.
    """

    values: list[np.ndarray]
    optimizer: OptimizerState
    n_epochs: int
    micro_tokens: int
    epoch_losses: np.ndarray
    order: dict[str, Any]
    scaler: dict[str, Any]


@dataclass(frozen=True, repr=False)
class Footprint:
    """The size of a base in memory and of what is trained on it.

    Attributes
    ----------
    quantized_parameters, quantized_bytes : int
        The size of the 4-bit layers, including the quantization constants.
    other_parameters, other_bytes : int
        The size of what is not quantized: embeddings and norms, or everything.
    trainable_parameters : int
        The number of parameters of the adapter and the head, which are float32.
    """

    quantized_parameters: int
    quantized_bytes: int
    other_parameters: int
    other_bytes: int
    trainable_parameters: int

    @property
    def bits_per_quantized_parameter(self) -> float:
        """The number of bits of a quantized parameter, or NaN if there is none.

        QLoRA (arXiv 2305.14314, section 3) derives 4.127 for NF4 with double quantization.
        """
        return 8 * self.quantized_bytes / (self.quantized_parameters or math.nan)

    @property
    def trainable_share(self) -> float:
        """The number of trained parameters divided by that of the base's parameters."""
        return self.trainable_parameters / (self.quantized_parameters + self.other_parameters)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {count} in {size}" for name, count, size, _ in self._rows())
        return f"Footprint({parts})"

    def __str__(self) -> str:
        return "\n".join(
            f"{name:13}{count:>22} {size:>12}  ({remark})"
            for name, count, size, remark in self._rows()
        )

    def _repr_html_(self) -> str:
        return html_table("Size of the base and of what is trained", self._rows())

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """Return the rows of the table: a part, its parameters, its size and a remark."""
        bits = (
            f"{self.bits_per_quantized_parameter:.3f} bits each; "
            f"{2 * self.quantized_parameters / 1e6:.2f} MB in 16 bits"
        )
        share = f"{self.trainable_share:.2%} of the model"
        rows = [
            ("4-bit layers", self.quantized_parameters, self.quantized_bytes, bits),
            ("not quantized", self.other_parameters, self.other_bytes, "embeddings, norms ..."),
            ("trained", self.trainable_parameters, 4 * self.trainable_parameters, share),
        ]
        return [
            (name, f"{count / 1e6:.2f} M parameters", f"{n_bytes / 1e6:.2f} MB", remark)
            for name, count, n_bytes, remark in rows
            if count
        ]


@dataclass(frozen=True, eq=False)
class Fitted:
    """The attributes that a fit sets on its estimator, named without their underscore.

    They are set all at once at the end of a fit, so a fit that fails leaves an older one whole.
    Two are for later fits only: `random_seed`, and `weight_scale`, the weight of a text that later
    calls of `partial_fit` take for one. This is None before a first call. `columns` is None if `X`
    was a column of texts and no table.
    """

    columns: Columns | None
    target: Target
    adapter: AdapterState
    n_iter: int
    n_samples_seen: int
    loss_curve: list[float]
    validation_scores: list[float] | None
    best_validation_score: float | None
    optimizer_state: OptimizerState | None
    footprint: Footprint
    settings: Settings | None
    random_seed: int
    weight_scale: float | None


def check_shapes(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the tensors of an adapter have the names and shapes that a base requires.

    Raises
    ------
    ValueError
        If a tensor is missing, is unknown to the base, or has another shape.
    """
    for name in shapes.keys() | tensors.keys():
        found = tensors[name].shape if name in tensors else None
        if found != shapes.get(name):
            raise ValueError(
                f"The adapter's {name!r} has the shape {found}, but the base wants "
                f"{shapes.get(name)}. Wanted: the adapter as it was fitted on this base."
            )
