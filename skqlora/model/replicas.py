"""Replicas of a frozen base that carry an adapter, made once for a shape and lent repeatedly.

This module knows nothing of how a base is loaded, nor of heads, texts or training.
"""

import math
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from skqlora.adapter import AdapterState, check_shapes
from skqlora.checkpoint.modules import drop_pooler, replicate
from skqlora.model.flat import FlatParameters
from skqlora.model.lora import ADAPTER, inject_lora
from skqlora.model.lora_layer import FusedLinear, FusedLinear4bit, dtype_of_products
from skqlora.settings.adapter_settings import LoraSettings

MAX_FREE_REPLICAS = 8
# The adapters of the free replicas may take this many bytes, or this share of the base's bytes if
# that is more.
MIN_FREE_BYTES = 32_000_000
FREE_SHARE = 0.25


class ReplicaShape(NamedTuple):
    """The settings that the modules of a replica depend on; the rest of an adapter is values."""

    r: int
    target_modules: str | tuple[str, ...]
    use_dora: bool
    keep_pooler: bool

    @classmethod
    def of(cls, lora: LoraSettings, keep_pooler: bool) -> "ReplicaShape":
        """Take the part of the settings that determines the shape."""
        return cls(lora.r, lora.target_modules, lora.use_dora, keep_pooler)


class AdaptedReplica:
    """A replica of a base's module tree with LoRA layers, whose values are in flat buffers.

    The replica shares every tensor of the base. It owns only its modules and the adapter, which is
    float32 whatever the base computes in. No dropout is active.

    Parameters
    ----------
    base : transformers.PreTrainedModel
        The frozen base, which is not changed.
    lora : LoraSettings
    keep_pooler : bool
        Whether to keep the base's pooler, if it has one. LoRA on a pooler that is not used would
        never get a gradient.

    Attributes
    ----------
    module : transformers.PreTrainedModel
    segments : list of FlatParameters
        The buffers of LoRA's parameters by their names in the module, one for each device that
        the base is on.
    shape : ReplicaShape

    Raises
    ------
    ValueError
        If PEFT finds none of the target modules in the base.
    """

    def __init__(self, base: PreTrainedModel, lora: LoraSettings, keep_pooler: bool):
        self.shape = ReplicaShape.of(lora, keep_pooler)
        self.module = replicate(base)
        if not keep_pooler:
            drop_pooler(self.module)
        inject_lora(lora, self.module)
        self.module.eval()  # PEFT's modules start in training mode
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        by_device: dict[torch.device, dict[str, nn.Parameter]] = {}
        for name, parameter in trained.items():
            by_device.setdefault(parameter.device, {})[name] = parameter
        self.segments = [FlatParameters(parameters) for parameters in by_device.values()]
        self._shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
        # DoRA's magnitudes start as the norms of the base's weights (arXiv 2402.09353, eq. 5).
        self._magnitudes = {
            name: p.detach().cpu().numpy().copy()
            for name, p in trained.items()
            if "lora_magnitude_vector" in name
        }
        self._held: weakref.ref[AdapterState] | None = None
        self._share_low_copies()

    @property
    def nbytes(self) -> int:
        """The bytes of the adapter in memory."""
        return sum(segment.nbytes for segment in self.segments)

    @property
    def n_parameters(self) -> int:
        """The number of the adapter's values."""
        return sum(math.prod(shape) for shape in self._shapes.values())

    @property
    def lora_layers(self) -> list[Any]:
        """The layers that carry an adapter, in the order of the model."""
        return [layer for layer in self.module.modules() if isinstance(layer, LoraLayer)]

    def refresh(self) -> None:
        """Bring what the layers compute with up to date with the adapter's values."""
        for segment in self.segments:
            segment.refresh()

    def reset_parameters(self, lora: LoraSettings, seed: int) -> None:
        """Set the first values that PEFT would give the adapter, drawn from the seed alone.

        They are drawn on the CPU. A is Kaiming uniform, or Gaussian with the standard deviation
        1/r, and B is zero (Hu et al., arXiv 2106.09685, section 4.1, and PEFT's
        `reset_lora_parameters`).
        """
        self.mark_changed()
        self._scale(lora)
        generator = torch.Generator().manual_seed(seed)
        self._load_state_dict(
            {
                name: self._first_value(name, shape, lora, generator)
                for name, shape in self._shapes.items()
            }
        )

    def load_adapter(self, state: AdapterState) -> None:
        """Put a captured adapter on the replica, with one copy or none if it is there already.

        Raises
        ------
        ValueError
            If the names and shapes of its tensors are not those of this replica.
        """
        if self.holds(state):
            return
        check_shapes(state.lora_tensors, self._shapes)
        self.mark_changed()
        self._scale(state.lora)
        self._load_state_dict(state.lora_tensors)
        self.mark_holding(state)

    def holds(self, state: AdapterState | None) -> bool:
        """Return whether the replica's values are those of `state`."""
        return state is not None and self._held is not None and self._held() is state

    def mark_changed(self) -> None:
        """Note that the values are about to change."""
        self._held = None

    def mark_holding(self, state: AdapterState) -> None:
        """Note that the values are those of `state`, just captured from or loaded into them."""
        self._held = weakref.ref(state)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return a copy of the adapter's values, by their names in the module."""
        values: dict[str, np.ndarray] = {}
        for segment in self.segments:
            values |= segment.state_dict()
        return values

    def _share_low_copies(self) -> None:
        """Give layers A and B in the dtype of their products, cast together and not one by one."""
        if self.shape.use_dora:  # PEFT's own layers
            return
        fused = FusedLinear | FusedLinear4bit
        layers = {name: m for name, m in self.module.named_modules() if isinstance(m, fused)}
        dtypes = {dtype_of_products(layer.base_layer) for layer in layers.values()}
        if len(dtypes) != 1:  # layers that a family wants in float32
            return
        [dtype] = dtypes
        low: dict[str, torch.Tensor] = {}
        for segment in self.segments:
            low |= segment.low(dtype)
        for name, layer in layers.items():
            lower, upper = (low[f"{name}.lora_{factor}.{ADAPTER}.weight"] for factor in "AB")
            layer.low = lower, upper

    def _load_state_dict(self, values: Mapping[str, np.ndarray]) -> None:
        for segment in self.segments:
            segment.load_state_dict(values)

    def _scale(self, lora: LoraSettings) -> None:
        for layer in self.lora_layers:
            layer.scaling[ADAPTER] = lora.scaling

    def _first_value(
        self, name: str, shape: tuple[int, ...], lora: LoraSettings, generator: torch.Generator
    ) -> np.ndarray:
        if name in self._magnitudes:
            return self._magnitudes[name]
        value = torch.zeros(shape, dtype=torch.float32)
        if ".lora_A." in name and lora.init_lora_weights == "gaussian":
            value.normal_(std=1 / lora.r, generator=generator)
        elif ".lora_A." in name:
            bound = 1 / math.sqrt(math.prod(shape[1:]))  # the fan in
            value.uniform_(-bound, bound, generator=generator)
        elif ".lora_embedding_B." in name:  # in an embedding's adapter A starts at zero
            value.normal_(generator=generator)
        return value.numpy()


class ReplicaPool:
    """The replicas of one base that are not in use, for the next adapter of their shape.

    Their number and size are bounded. The least recently used ones are dropped first, and the most
    recently used one always stays.

    Parameters
    ----------
    base : transformers.PreTrainedModel
    base_bytes : int
        The size of the base in memory.
    """

    def __init__(self, base: PreTrainedModel, base_bytes: int):
        self._base = base
        self._max_free_bytes = max(MIN_FREE_BYTES, FREE_SHARE * base_bytes)
        self._free: list[AdaptedReplica] = []  # the most recently used one is last
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The bytes of the kept adapters in memory."""
        with self._lock:
            return sum(replica.nbytes for replica in self._free)

    @contextmanager
    def lease(
        self, lora: LoraSettings, *, keep_pooler: bool, holding: AdapterState | None
    ) -> Iterator[AdaptedReplica]:
        """Lend a replica of the adapter's shape, free or new; see `Backbone.lease`."""
        replica = self._take(ReplicaShape.of(lora, keep_pooler), holding)
        if replica is None:
            replica = AdaptedReplica(self._base, lora, keep_pooler)
        yield replica
        # An exception does not get here: what it left behind is dropped with the replica.
        self._give_back(replica)

    def _take(self, shape: ReplicaShape, holding: AdapterState | None) -> AdaptedReplica | None:
        with self._lock:
            fitting = [replica for replica in self._free if replica.shape == shape]
            if not fitting:
                return None
            # Otherwise take the least recently used one, so that other adapters stay in place.
            replica = next((replica for replica in fitting if replica.holds(holding)), fitting[0])
            self._free.remove(replica)
            return replica

    def _give_back(self, replica: AdaptedReplica) -> None:
        with self._lock:
            self._free.append(replica)
            while len(self._free) > 1 and (
                len(self._free) > MAX_FREE_REPLICAS
                or sum(replica.nbytes for replica in self._free) > self._max_free_bytes
            ):
                self._free.pop(0)
