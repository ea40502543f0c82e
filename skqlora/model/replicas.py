"""Clones of a frozen base that carry an adapter: made once for a shape, lent, and lent again.

Knows nothing of how a base is loaded, nor of heads, texts or training.
"""

import copy
import functools
import math
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import bitsandbytes as bnb
import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from skqlora._utils.libraries import library_lock
from skqlora.adapter import AdapterState, LoraSettings
from skqlora.model.flat import FlatParameters
from skqlora.model.lora_layer import FusedLinear4bit

ADAPTER = "default"  # PEFT's own name for the only adapter of a model
MAX_FREE_CLONES = 8
MIN_FREE_BYTES = 32_000_000  # for the adapters of the free clones, or if that is more:
FREE_SHARE = 0.25  # of the base's bytes
RANDOM_FILLS = (
    "uniform_",
    "normal_",
    "trunc_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
    "xavier_normal_",
)


class CloneShape(NamedTuple):
    """What the modules of a clone depend on; the rest of an adapter is values."""

    r: int
    target_modules: str | tuple[str, ...]
    use_dora: bool
    keep_pooler: bool

    @classmethod
    def of(cls, lora: LoraSettings, keep_pooler: bool) -> "CloneShape":
        """Take from the settings what is shape."""
        return cls(lora.r, lora.target_modules, lora.use_dora, keep_pooler)


class AdaptedClone:
    """A clone of a base's module tree with LoRA layers, whose values are one flat buffer a device.

    It shares every tensor of the base and owns only its modules and the adapter, which is float32
    whatever the base computes in. No dropout acts.

    Parameters
    ----------
    base : transformers.PreTrainedModel
        Frozen; it is not changed.
    lora : LoraSettings
    keep_pooler : bool
        Keep the base's pooler, if it has one. Without a use its LoRA would never get a gradient.

    Attributes
    ----------
    module : transformers.PreTrainedModel
    segments : list of FlatParameters
        LoRA's parameters by their names in the module: one for each device that the base is on.
    shape : CloneShape

    Raises
    ------
    ValueError
        If PEFT finds no module of that name in the base.
    """

    @torch.inference_mode(False)  # or a first prediction within it would spoil later fits
    def __init__(self, base: PreTrainedModel, lora: LoraSettings, keep_pooler: bool):
        self.shape = CloneShape.of(lora, keep_pooler)
        self.module = clone_module(base)
        if not keep_pooler:
            drop_pooler(self.module)
        with library_lock, drawing_nothing():
            inject_adapter_in_model(
                peft_config(lora, self.module), self.module, adapter_name=ADAPTER
            )
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
        self._active: weakref.ref[AdapterState] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the adapter in memory."""
        return sum(segment.nbytes for segment in self.segments)

    @property
    def n_parameters(self) -> int:
        """Number of the adapter's values."""
        return sum(math.prod(shape) for shape in self._shapes.values())

    @property
    def layers(self) -> list[Any]:
        """The layers that carry an adapter, in the order of the model."""
        return [layer for layer in self.module.modules() if isinstance(layer, LoraLayer)]

    def start(self, lora: LoraSettings, seed: int) -> None:
        """Give the adapter the first values that PEFT would, drawn on the CPU from the seed alone.

        A is Kaiming uniform or Gaussian with deviation 1/r, B zero (Hu et al., arXiv 2106.09685,
        section 4.1, and PEFT's `reset_lora_parameters`).
        """
        self.deactivate()
        self._scale(lora)
        generator = torch.Generator().manual_seed(seed)
        self._write(
            {
                name: self._first_value(name, shape, lora, generator)
                for name, shape in self._shapes.items()
            }
        )

    def activate(self, state: AdapterState) -> None:
        """Put a captured adapter on the clone: one copy, or none if it is there already.

        Raises
        ------
        ValueError
            If its tensors are not those of this base.
        """
        if self.holds(state):
            return
        refuse_other_shapes(state.lora_tensors, self._shapes)
        self.deactivate()
        self._scale(state.lora)
        self._write(state.lora_tensors)
        self.note_active(state)

    def holds(self, state: AdapterState | None) -> bool:
        """Whether the clone's values are those of `state`."""
        return state is not None and self._active is not None and self._active() is state

    def deactivate(self) -> None:
        """Note that the values are about to become other ones."""
        self._active = None

    def note_active(self, state: AdapterState) -> None:
        """Note that the values are those of `state`, which were just captured from them."""
        self._active = weakref.ref(state)

    @functools.cached_property
    @torch.no_grad()
    def row_axes(self) -> list[int | None]:
        """Axis of the rows in the input of each adapted layer; None where it has none of its own.

        Found by running three rows of five tokens. DeBERTa's queries and keys also serve relative
        positions, which all rows share.
        """
        n_rows, n_tokens = 3, 5
        layers = self.layers
        axes: dict[Any, set[int | None]] = {layer: set() for layer in layers}

        def record(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sizes = inputs[0].shape[:-1]
            rows = [i for i, size in enumerate(sizes) if size in (n_rows, n_rows * n_tokens)]
            axes[layer].add(rows[0] if rows else None)

        hooks = [layer.register_forward_pre_hook(record) for layer in layers]
        ids = torch.full((n_rows, n_tokens), 5, device=self.module.device)
        self.module(input_ids=ids, attention_mask=torch.ones_like(ids))
        for hook in hooks:
            hook.remove()
        return [axes[layer].pop() if len(axes[layer]) == 1 else None for layer in layers]

    def read(self) -> dict[str, np.ndarray]:
        """Return a copy of the adapter's values, by name in the module."""
        values: dict[str, np.ndarray] = {}
        for segment in self.segments:
            values |= segment.read()
        return values

    def _write(self, values: Mapping[str, np.ndarray]) -> None:
        for segment in self.segments:
            segment.write(values)

    def _scale(self, lora: LoraSettings) -> None:
        for layer in self.layers:
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
        elif ".lora_embedding_B." in name:  # of an embedding it is A that starts at zero
            value.normal_(generator=generator)
        return value.numpy()


def refuse_other_shapes(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse tensors that do not have the names and shapes that a base wants."""
    for name in shapes.keys() | tensors.keys():
        found = tensors[name].shape if name in tensors else None
        if found != shapes.get(name):
            raise ValueError(
                f"The adapter's {name!r} has the shape {found}, but the base wants "
                f"{shapes.get(name)}. Wanted: the adapter as it was fitted on this base."
            )


class ClonePool:
    """The clones of one base that nobody uses now, for the next one of their shape.

    A bounded list: the ones used longest ago go first, and the last one always stays.

    Parameters
    ----------
    base : transformers.PreTrainedModel
    base_bytes : int
        Its size in memory.
    """

    def __init__(self, base: PreTrainedModel, base_bytes: int):
        self._base = base
        self._max_free_bytes = max(MIN_FREE_BYTES, FREE_SHARE * base_bytes)
        self._free: list[AdaptedClone] = []  # the one used last at the end
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Size of the kept adapters in memory."""
        with self._lock:
            return sum(clone.nbytes for clone in self._free)

    @contextmanager
    def lease(
        self, lora: LoraSettings, *, keep_pooler: bool, holding: AdapterState | None
    ) -> Iterator[AdaptedClone]:
        """Lend a clone of the adapter's shape, free or new; see `Backbone.lease`."""
        clone = self._take(CloneShape.of(lora, keep_pooler), holding)
        if clone is None:
            clone = AdaptedClone(self._base, lora, keep_pooler)
        yield clone
        # Not reached by an exception: what that left behind is dropped with the clone.
        self._give_back(clone)

    def _take(self, shape: CloneShape, holding: AdapterState | None) -> AdaptedClone | None:
        with self._lock:
            fitting = [clone for clone in self._free if clone.shape == shape]
            if not fitting:
                return None
            # Else the one used longest ago, so that other adapters stay where they are.
            clone = next((clone for clone in fitting if clone.holds(holding)), fitting[0])
            self._free.remove(clone)
            return clone

    def _give_back(self, clone: AdaptedClone) -> None:
        with self._lock:
            self._free.append(clone)
            while len(self._free) > 1 and (
                len(self._free) > MAX_FREE_CLONES
                or sum(clone.nbytes for clone in self._free) > self._max_free_bytes
            ):
                self._free.pop(0)


class drawing_nothing(TorchFunctionMode):
    """Within it, in this thread, random first values are zeros and no generator advances.

    They are replaced at once, and the process's random state is the user's.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in RANDOM_FILLS:  # of torch.Tensor or torch.nn.init
            return (args[0] if args else kwargs["tensor"]).detach().zero_()
        if name in ("rand", "randn"):
            func = torch.zeros
        return func(*args, **kwargs)


def clone_module(base: PreTrainedModel) -> PreTrainedModel:
    """Copy the module tree and share every tensor and the configuration."""
    shared: list[Any] = [*base.parameters(), *base.buffers(), base.config]
    shared += [m.quant_state for m in base.modules() if getattr(m, "quant_state", None) is not None]
    return copy.deepcopy(base, {id(x): x for x in shared})


def drop_pooler(module: PreTrainedModel) -> None:
    """Take away the layer over the first token that some encoders end in."""
    if hasattr(module, "pooler"):
        setattr(module, "pooler", None)  # noqa: B010 (mypy: a module has no such attribute)


def peft_config(lora: LoraSettings, module: nn.Module) -> LoraConfig:
    """Write the settings as PEFT wants them for a base or its skeleton."""
    targets = lora.target_modules
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights,  # type: ignore[arg-type]
        fan_in_fan_out=has_conv1d(module),
    )
    config._register_custom_module({bnb.nn.Linear4bit: FusedLinear4bit})
    return config


def targeted_modules(
    target_modules: str | tuple[str, ...], skeleton: PreTrainedModel
) -> tuple[str, ...]:
    """Name the modules that an adapter would be on, tried on a skeleton without weights.

    What a base would refuse later is refused here.

    Parameters
    ----------
    target_modules : str or tuple of str
    skeleton : transformers.PreTrainedModel
        On the meta device; it is not changed.

    Returns
    -------
    names : tuple of str

    Raises
    ------
    ValueError
        If `target_modules` fits no layer, or one that cannot have an adapter.
    """
    try:
        if not all(isinstance(target, str) for target in target_modules):
            raise TypeError("a name that is no str.")
        return _try_targets(target_modules, skeleton)
    except Exception as error:  # PEFT's ValueError, re.error ... of a user's choice
        raise ValueError(
            f"Got target_modules={target_modules!r}, which cannot be adapted: {error} Wanted: "
            "'all-linear', or names of linear layers of this model."
        ) from error


@functools.lru_cache(maxsize=8)  # the candidates of a search differ in other parameters
def _try_targets(
    target_modules: str | tuple[str, ...], skeleton: PreTrainedModel
) -> tuple[str, ...]:
    module = clone_module(skeleton)
    lora = LoraSettings(1, 1.0, target_modules, False, False, True)
    with library_lock, torch.device("meta"):
        inject_adapter_in_model(peft_config(lora, module), module, adapter_name=ADAPTER)
    return tuple(name for name, m in module.named_modules() if isinstance(m, LoraLayer))


def has_conv1d(module: nn.Module) -> bool:
    """Whether the base keeps GPT-2's transposed layers, which it does only unquantized."""
    return any(isinstance(m, Conv1D) for m in module.modules())
