"""The frozen 4-bit base: how it is loaded and measured, and how it lends replicas.

This module knows nothing of texts, labels or training. A base is only ever read. An adapter goes
onto a replica of the base's module tree, which shares every tensor with the base.
"""

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import PreTrainedModel

from skqlora.adapter import AdapterState, Footprint
from skqlora.checkpoint.fingerprint import Fingerprint
from skqlora.checkpoint.loading import hash_as_version_1, load_base
from skqlora.checkpoint.spec import BackboneSpec
from skqlora.model.attention import attends_in_bfloat16, use_bfloat16_attention
from skqlora.model.norm import use_fused_norms
from skqlora.model.replicas import AdaptedReplica, ReplicaPool
from skqlora.model.trial import try_base
from skqlora.settings.adapter_settings import LoraSettings


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen base, and what was determined about it when it was loaded.

    Attributes
    ----------
    module : transformers.PreTrainedModel
        The base itself. After it is loaded it is neither changed nor run: `lease` hands out
        replicas.
    spec : BackboneSpec
    fingerprint : Fingerprint
        The hashes of the source weights and the configuration.
    hidden_size : int
        The number of features of a last hidden state.
    causal : bool
        Whether a token sees only the tokens before it.
    replicas : ReplicaPool
        The replicas that are not in use.
    """

    module: PreTrainedModel
    spec: BackboneSpec
    fingerprint: Fingerprint
    hidden_size: int
    causal: bool
    replicas: ReplicaPool

    @classmethod
    def load(cls, spec: BackboneSpec) -> "Backbone":
        """Load and quantize a base; `skqlora.model.cache.get_backbone` returns a shared one.

        Parameters
        ----------
        spec : BackboneSpec

        Returns
        -------
        backbone : Backbone

        Raises
        ------
        ValueError
            If the weights cannot be read; see `load_base`. If the model cannot be run on text
            alone, or if padding changes the result of a text.
        """
        module, fingerprint = load_base(spec)
        freeze(module, spec.compute_dtype)
        if attends_in_bfloat16(spec):
            use_bfloat16_attention(module)
        if spec.storage_dtype == torch.bfloat16:
            use_fused_norms(module)
        hidden_size, causal = _try_in_either_precision(module, spec)
        replicas = ReplicaPool(module, _count_bytes(module))
        return cls(module, spec, fingerprint, hidden_size, causal, replicas)

    def fingerprint_for(self, pooling: str) -> str:
        """Return the hash of what an adapter with this pooling depends on."""
        hashes = self.fingerprint
        return hashes.with_pooler if pooling == "pooler" else hashes.without_pooler

    def is_base_of(self, adapter: AdapterState) -> bool:
        """Return whether an adapter was trained on this base."""
        if adapter.fingerprint == self.fingerprint_for(adapter.pooling):
            return True
        return adapter.fingerprint == self._fingerprint_of_version_1

    @functools.cached_property
    def _fingerprint_of_version_1(self) -> str:
        return hash_as_version_1(self.spec)

    @property
    def nbytes(self) -> int:
        """The bytes in memory of the base and of the adapters on its free replicas."""
        return _count_bytes(self.module) + self.replicas.nbytes

    @property
    def vocab_size(self) -> int:
        """The number of tokens for which the base has an embedding."""
        embeddings: Any = self.module.get_input_embeddings()
        return embeddings.num_embeddings

    def lease(
        self,
        lora: LoraSettings,
        *,
        keep_pooler: bool = False,
        holding: AdapterState | None = None,
    ) -> AbstractContextManager[AdaptedReplica]:
        """Lend a replica of the base with LoRA layers, for the caller to train or fill.

        A free replica of the adapter's shape costs nothing, whereas PEFT has to inject its layers
        into a new one. A replica comes with the values that its last user left. After an exception
        it is not lent again.

        Parameters
        ----------
        lora : LoraSettings
        keep_pooler : bool, default=False
            Whether to keep the base's pooler, if it has one. LoRA on a pooler that is not used
            would never get a gradient.
        holding : AdapterState, optional
            The adapter whose values the replica should already hold, if a free one does.

        Returns
        -------
        replica : context manager of AdaptedReplica

        Raises
        ------
        ValueError
            If PEFT finds none of the target modules in the base.
        """
        return self.replicas.lease(lora, keep_pooler=keep_pooler, holding=holding)

    def autocast(self, *, by_peft: bool) -> AbstractContextManager:
        """Return the context of a forward pass: autocast where float32 meets 16 bits on a GPU.

        With float16 hidden states are float32, since they would overflow. With bfloat16 only PEFT's
        own layers, which DoRA has, would compute in float32.

        Parameters
        ----------
        by_peft : bool
            Whether adapted layers are PEFT's own.
        """
        device, dtype = self.spec.device.type, self.spec.compute_dtype
        mixed = dtype == torch.float16 or (by_peft and dtype == torch.bfloat16)
        return torch.autocast(device, dtype=dtype) if mixed and device != "cpu" else nullcontext()

    def footprint(self, trainable_parameters: int) -> Footprint:
        """Measure the base, and report it together with the number of trained parameters."""
        parameters: list[Any] = list(self.module.parameters())
        packed = [p for p in parameters if isinstance(p, bnb.nn.Params4bit)]
        others = [p for p in parameters if not isinstance(p, bnb.nn.Params4bit)]
        return Footprint(
            quantized_parameters=sum(math.prod(weight.quant_state.shape) for weight in packed),
            quantized_bytes=sum(_quantized_bytes(weight) for weight in packed),
            other_parameters=sum(p.numel() for p in others),
            other_bytes=sum(p.nbytes for p in others),
            trainable_parameters=trainable_parameters,
        )


def _try_in_either_precision(module: PreTrainedModel, spec: BackboneSpec) -> tuple[int, bool]:
    """Run a base; if its code mixes dtypes, as DeBERTa's does, try float32 between its layers."""
    try:
        return try_base(module, spec)
    except ValueError as error:
        lowered = spec.quantization and spec.storage_dtype == torch.bfloat16
        if not lowered or "dtype" not in str(error):
            raise
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and not isinstance(tensor, bnb.nn.Params4bit):
            tensor.data = tensor.data.float()
    freeze(module, spec.compute_dtype)
    return try_base(module, spec)


def freeze(module: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Put a base into its final state, which nothing changes any more."""
    module.eval().requires_grad_(False)
    module.config.use_cache = False
    for layer in module.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            # bitsandbytes would cast the bias in place at the first forward pass, and repack the
            # weights for CPU inference, which makes later gradients wrong.
            layer.support_avx512bf16_for_cpu = False
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.to(compute_dtype)


def _count_bytes(module: PreTrainedModel) -> int:
    """Count the bytes of all parameters, buffers and quantization constants."""
    tensors = [*module.parameters(), *module.buffers()]
    constants = sum(
        _quantized_bytes(weight) - weight.nbytes
        for weight in module.parameters()
        if isinstance(weight, bnb.nn.Params4bit)
    )
    return sum(tensor.nbytes for tensor in tensors) + constants


def _quantized_bytes(weight: Any) -> int:
    """Count the bytes of a packed weight and its constants.

    The code tables, which all layers could share, are not counted.
    """
    state = weight.quant_state
    constants = [state.absmax] + ([state.state2.absmax] if state.nested else [])
    return weight.nbytes + sum(tensor.nbytes for tensor in constants)
