"""The frozen 4-bit base: what may be one, how it loads, and the clones it lends to adapters.

Knows nothing of texts, labels or training. A base is only ever read: an adapter goes onto a clone
of its module tree, which shares every tensor with it.
"""

import copy
import functools
import math
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from skqlora.adapter import Footprint, LoraSettings
from skqlora.fingerprint import fingerprint_source

# Relative difference of hidden states that rounding alone explains.
PADDING_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
ADAPTER = "default"  # PEFT's own name for the only adapter of a model

# Loading and PEFT's injection both draw from torch's global generator, which they put back.
_generator_lock = threading.Lock()


@dataclass(frozen=True)
class BackboneSpec:
    """Everything that makes one loaded base differ from another.

    Attributes
    ----------
    model : str
        A Hub id or a local folder.
    revision : str or None
    quantization : {"nf4", "fp4"} or None
    double_quant : bool
        Quantize the quantization constants too.
    compute_dtype : torch.dtype
        Of the products with the base's weights.
    device : torch.device
    files : tuple
        What `describe_files` tells of a local folder, so that a changed folder is another base.
    """

    model: str
    revision: str | None
    quantization: str | None
    double_quant: bool
    compute_dtype: torch.dtype
    device: torch.device
    files: tuple = ()


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen base and what was found out about it.

    Attributes
    ----------
    module : transformers.PreTrainedModel
        Never changed after it is loaded; `lease` hands out clones.
    spec : BackboneSpec
    fingerprint : str
        Hash of the source weights and the configuration: see `fingerprint_source`.
    hidden_size : int
        Features of a last hidden state.
    causal : bool
        Whether a token sees only those before it.
    """

    module: PreTrainedModel
    spec: BackboneSpec
    fingerprint: str
    hidden_size: int
    causal: bool

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the base has an embedding of."""
        embeddings: Any = self.module.get_input_embeddings()
        return embeddings.num_embeddings

    def lease(self, lora: LoraSettings, *, seed: int, keep_pooler: bool = False) -> PreTrainedModel:
        """Return a clone of the base with fresh LoRA layers, for the caller to train or fill.

        The clone shares every tensor of the base and owns only its modules and the adapter, which
        is float32 whatever the base computes in. No dropout acts.

        Parameters
        ----------
        lora : LoraSettings
        seed : int
            Of the adapter's first values.
        keep_pooler : bool, default=False
            Keep the base's pooler, if it has one. Without a use its LoRA would never get a
            gradient.

        Returns
        -------
        module : transformers.PreTrainedModel

        Raises
        ------
        ValueError
            If PEFT finds no module of that name in the base.
        """
        module = _clone(self.module)
        if not keep_pooler:
            _drop_pooler(module)
        config = peft_config(lora, module)
        with _generator_lock, torch.random.fork_rng(devices=[]):  # on a CPU, whatever the device
            torch.default_generator.manual_seed(seed)
            inject_adapter_in_model(config, module, adapter_name=ADAPTER)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # PEFT takes the dtype of the base
        return module

    def autocast(self) -> AbstractContextManager:
        """Precision of a forward pass: autocast on an accelerator, none on a CPU.

        On a CPU the 4-bit layers alone compute in `compute_dtype`, which measured faster than
        autocast at the same error of the gradient.
        """
        device, dtype = self.spec.device.type, self.spec.compute_dtype
        if device == "cpu" or dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device, dtype=dtype)

    def footprint(self, trainable_parameters: int) -> Footprint:
        """Measure the base and put the number of trained parameters beside it."""
        layers = [m for m in self.module.modules() if isinstance(m, bnb.nn.Linear4bit)]
        packed: list[Any] = [layer.weight for layer in layers]
        packed_ids = {id(weight) for weight in packed}
        others = [p for p in self.module.parameters() if id(p) not in packed_ids]
        return Footprint(
            quantized_parameters=sum(math.prod(weight.quant_state.shape) for weight in packed),
            quantized_bytes=sum(_quantized_bytes(weight) for weight in packed),
            other_parameters=sum(p.numel() for p in others),
            other_bytes=sum(p.nbytes for p in others),
            trainable_parameters=trainable_parameters,
        )


def lora_layers(module: nn.Module) -> list[Any]:
    """List the layers of a leased clone that carry an adapter, in the order of the model."""
    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]


def load_backbone(spec: BackboneSpec) -> Backbone:
    """Return the base of `spec`, loaded and quantized at the first call of the process.

    Parameters
    ----------
    spec : BackboneSpec

    Returns
    -------
    backbone : Backbone

    Raises
    ------
    ValueError
        If the weights are missing, incomplete or not in safetensors format, or the model cannot be
        run on text alone, one text independent of those padded beside it.
    """
    with _generator_lock:
        return _load(spec)


@functools.lru_cache(maxsize=2)
def _load(spec: BackboneSpec) -> Backbone:
    fingerprint = fingerprint_source(spec.model, spec.revision)
    devices = [] if spec.device.type == "cpu" else [spec.device]
    # A pooler that the checkpoint lacks is drawn at random before it is dropped.
    with torch.random.fork_rng(devices, device_type=spec.device.type):
        module, loading = AutoModel.from_pretrained(
            spec.model,
            revision=spec.revision,
            quantization_config=_quantization_config(spec),
            dtype=_storage_dtype(spec),
            device_map={"": spec.device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    _refuse_missing_weights(spec.model, module, loading["missing_keys"])
    _freeze(module, spec.compute_dtype)
    hidden_size, causal = _probe(module, spec)
    return Backbone(module, spec, fingerprint, hidden_size, causal)


def _quantization_config(spec: BackboneSpec) -> BitsAndBytesConfig | None:
    if spec.quantization is None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantization,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=spec.compute_dtype,
        llm_int8_skip_modules=[],  # a headless base has no layer to keep out
    )


def _storage_dtype(spec: BackboneSpec) -> torch.dtype:
    """Dtype of what is not quantized: embeddings and norms, or everything."""
    if spec.quantization is None:
        return spec.compute_dtype
    # On an accelerator bfloat16 halves the embeddings; float16 would overflow the residual stream.
    on_accelerator = spec.device.type != "cpu"
    return (
        spec.compute_dtype
        if on_accelerator and spec.compute_dtype == torch.bfloat16
        else torch.float32
    )


def _refuse_missing_weights(model: str, module: PreTrainedModel, missing: set[str]) -> None:
    """Refuse a base with random weights; drop a pooler that the checkpoint does not have."""
    if any(key.startswith("pooler.") for key in missing):
        _drop_pooler(module)
    missing = {key for key in missing if not key.startswith("pooler.")}
    if missing:
        raise ValueError(
            f"model={model!r}: the checkpoint lacks {len(missing)} weights of "
            f"{type(module).__name__}, e.g. {min(missing)!r}. Wanted: a complete checkpoint of the "
            "architecture that its config.json names."
        )


def _drop_pooler(module: PreTrainedModel) -> None:
    if hasattr(module, "pooler"):
        setattr(module, "pooler", None)  # noqa: B010 (mypy: a module has no such attribute)


def _freeze(module: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Bring the base to the state that nothing changes any more."""
    module.eval().requires_grad_(False)
    module.config.use_cache = False
    for layer in module.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            # bitsandbytes would cast the bias in place at the first forward pass, and repack the
            # weights for CPU inference, which makes later gradients wrong.
            layer.support_avx512bf16_for_cpu = False
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.to(compute_dtype)


def _probe(module: PreTrainedModel, spec: BackboneSpec) -> tuple[int, bool]:
    """Width of the last hidden state, and whether a token sees only those before it.

    Configurations do not tell: `is_decoder` is unset for Llama. Two inputs that differ in their
    last token do. A third, padded, shows whether a text's result depends on its neighbours.
    """
    vocabulary = module.config.get_text_config().vocab_size
    ids = torch.arange(5, 13, device=spec.device)[None] % vocabulary
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % vocabulary
    padded = torch.cat([ids, ids[:, :5]], dim=1)
    mask = torch.ones_like(padded)
    mask[:, ids.shape[1] :] = 0

    @torch.no_grad()
    def hidden_states(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return module(input_ids=ids, attention_mask=mask)[0][0]

    name = f"model={spec.model!r} ({module.config.model_type})"
    module = _clone(module)
    _drop_pooler(module)  # as most adapters will
    try:
        plain = hidden_states(ids, torch.ones_like(ids))
        causal = torch.equal(plain[:-1], hidden_states(changed, torch.ones_like(ids))[:-1])
        beside_padding = hidden_states(padded, mask)[: len(plain)]
    except (AttributeError, IndexError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"{name} cannot be run on token ids and a mask alone: {error}. Wanted: a text encoder "
            "such as BERT, or a decoder such as Llama."
        ) from error
    error = (beside_padding - plain).float().norm() / plain.float().norm()
    if plain.ndim != 2 or error > PADDING_TOLERANCE[spec.compute_dtype]:
        raise ValueError(
            f"{name} gives a text another result when another text makes it padded (relative "
            f"difference {error:.1e}). Wanted: a model that heeds the attention mask, such as BERT."
        )
    return plain.shape[-1], causal


def _clone(base: PreTrainedModel) -> PreTrainedModel:
    """Copy the module tree and share every tensor and the configuration."""
    shared: list[Any] = [*base.parameters(), *base.buffers(), base.config]
    shared += [m.quant_state for m in base.modules() if getattr(m, "quant_state", None) is not None]
    return copy.deepcopy(base, {id(x): x for x in shared})


def peft_config(lora: LoraSettings, module: nn.Module) -> LoraConfig:
    """Write the settings as PEFT wants them for a base or its skeleton."""
    targets = lora.target_modules
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights,  # type: ignore[arg-type]
        fan_in_fan_out=_has_conv1d(module),
    )


def refuse_missing_targets(lora: LoraSettings, skeleton: nn.Module) -> None:
    """Try the adapter on a skeleton without weights, to refuse what a base would refuse later.

    Parameters
    ----------
    lora : LoraSettings
    skeleton : torch.nn.Module
        On the meta device; it is changed.

    Raises
    ------
    ValueError
        If `target_modules` fits no layer, or one that cannot have an adapter.
    """
    targets = lora.target_modules
    try:
        if not all(isinstance(target, str) for target in targets):
            raise TypeError("a name that is no str.")
        config = peft_config(lora, skeleton)
        inject_adapter_in_model(config, skeleton, low_cpu_mem_usage=True)
    except Exception as error:  # PEFT's ValueError, re.error ... of a user's choice
        raise ValueError(
            f"Got target_modules={targets!r}, which cannot be adapted: {error} Wanted: "
            "'all-linear', or names of linear layers of this model."
        ) from error


def describe_files(model: str) -> tuple:
    """List the path and the files of a local folder, with sizes and times; () for a Hub id."""
    folder = Path(model)
    if not folder.is_dir():
        return ()
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return folder.resolve(), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _has_conv1d(module: nn.Module) -> bool:
    """Whether the base keeps GPT-2's transposed layers, which it does only unquantized."""
    return any(isinstance(m, Conv1D) for m in module.modules())


def _quantized_bytes(weight: Any) -> int:
    """Packed weights and their constants, without the code tables that all layers could share."""
    state = weight.quant_state
    constants = [state.absmax] + ([state.state2.absmax] if state.nested else [])
    return weight.nbytes + sum(tensor.nbytes for tensor in constants)
