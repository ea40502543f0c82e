"""What a fitted classifier keeps: plain data, so that unpickling one does not even load torch."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

TEXT_FIELD = "{text}"  # in a prompt
TRUNCATIONS = "head", "tail", "head+tail", "windows"


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter's shape and start depend on, in PEFT's names."""

    r: int
    lora_alpha: float  # an int by PEFT's annotation, but it only divides
    target_modules: str | tuple[str, ...]
    use_rslora: bool
    use_dora: bool
    init_lora_weights: bool | str

    @property
    def scaling(self) -> float:
        """Factor of LoRA's output: alpha / r, or alpha / sqrt(r) (arXiv 2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True)
class TextSettings:
    """How a text becomes token ids, in the names of the estimator's parameters."""

    max_length: int
    truncation: str = "head"
    stride: int = 0
    prompt: str | None = None


@dataclass(frozen=True, repr=False)
class AdapterState:
    """What a fit leaves behind: everything that is not in the base.

    Nothing of it may be changed, since a base may still hold a copy: its arrays are read-only.

    Attributes
    ----------
    lora : LoraSettings
    pooling : {"last", "mean", "cls", "pooler"}
    text : TextSettings
    model, revision : str or None
        The base's name where it was trained, and the commit if it came from the Hub.
    fingerprint, tokenizer_fingerprint : str
        Of the base and of the tokenizer that the adapter was trained with.
    lora_tensors : dict of str to ndarray
        float32, by parameter name in the base.
    head_tensors : dict of str to ndarray
        float32; "weight" of shape (n_classes, hidden_size) and, but for "last", "bias".
    """

    lora: LoraSettings
    pooling: str
    text: TextSettings
    model: str
    revision: str | None
    fingerprint: str
    tokenizer_fingerprint: str
    lora_tensors: dict[str, np.ndarray]
    head_tensors: dict[str, np.ndarray]

    def __post_init__(self):
        for array in (*self.lora_tensors.values(), *self.head_tensors.values()):
            array.setflags(write=False)

    def __repr__(self) -> str:
        tensors = (*self.lora_tensors.values(), *self.head_tensors.values())
        n_bytes = sum(tensor.nbytes for tensor in tensors)
        return f"AdapterState(r={self.lora.r}, pooling={self.pooling!r}, {n_bytes / 1e6:.2f} MB)"

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.__post_init__()  # a pickle forgets the flags


@dataclass(frozen=True, repr=False)
class OptimizerState:
    """Where an optimizer stands, for training that goes on later.

    Attributes
    ----------
    optim : str
        Of which kind it is.
    n_updates : int
        Updates so far.
    schedule_step : int
        Where the schedule of the rates is: behind, if float16 overflowed in an update.
    states : list of dict of str to ndarray or float
        Moments, for each tensor that it updates.
    """

    optim: str
    n_updates: int
    schedule_step: int
    states: list[dict[str, np.ndarray | float]]

    def __repr__(self) -> str:
        return f"OptimizerState(optim={self.optim!r}, n_updates={self.n_updates})"


@dataclass(frozen=True, repr=False)
class TrainerState:
    """Where a training stands between two updates.

    Attributes
    ----------
    values : list of ndarray
        float32: the flat buffers of LoRA and, last, of the head.
    optimizer : OptimizerState
    n_epochs : int
        Epochs that are over.
    micro_tokens : int
        Greatest size of a forward pass: smaller, after one ran out of memory.
    epoch_losses : ndarray of shape (n_updates_of_this_epoch,)
        float32, of all ranks.
    order : dict
        Of `numpy.random.RandomState.get_state`, when the epoch began.
    scaler : dict
        Of `torch.amp.GradScaler.state_dict`.
    """

    values: list[np.ndarray]
    optimizer: OptimizerState
    n_epochs: int
    micro_tokens: int
    epoch_losses: np.ndarray
    order: dict[str, Any]
    scaler: dict[str, Any]


@dataclass(frozen=True)
class Footprint:
    """Size of a base in memory and of what is trained on it.

    Attributes
    ----------
    quantized_parameters, quantized_bytes : int
        Of the 4-bit layers, quantization constants included.
    other_parameters, other_bytes : int
        Of what is not quantized: embeddings and norms, or everything.
    trainable_parameters : int
        Of the adapter and the head, which are float32.
    """

    quantized_parameters: int
    quantized_bytes: int
    other_parameters: int
    other_bytes: int
    trainable_parameters: int

    @property
    def bits_per_quantized_parameter(self) -> float:
        """Bits of a quantized parameter, or NaN if there is none.

        QLoRA (arXiv 2305.14314, section 3) derives 4.127 for NF4 with double quantization.
        """
        return 8 * self.quantized_bytes / (self.quantized_parameters or math.nan)

    @property
    def trainable_share(self) -> float:
        """Trained parameters over those of the base."""
        return self.trainable_parameters / (self.quantized_parameters + self.other_parameters)

    def __str__(self) -> str:
        def line(name: str, parameters: int, n_bytes: int, remark: str) -> str:
            millions, megabytes = parameters / 1e6, n_bytes / 1e6
            return f"{name:13}{millions:9.2f} M parameters {megabytes:9.2f} MB  ({remark})"

        bits = (
            f"{self.bits_per_quantized_parameter:.3f} bits each; "
            f"{2 * self.quantized_parameters / 1e6:.2f} MB in 16"
        )
        share = f"{self.trainable_share:.2%} of the model"
        rows = [
            ("4-bit layers", self.quantized_parameters, self.quantized_bytes, bits),
            ("not quantized", self.other_parameters, self.other_bytes, "embeddings, norms ..."),
            ("trained", self.trainable_parameters, 4 * self.trainable_parameters, share),
        ]
        return "\n".join(line(*row) for row in rows if row[1])
