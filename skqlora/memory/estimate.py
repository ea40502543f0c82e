"""The memory that a training takes, computed from shapes before a model is loaded."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from skqlora._utils.tables import html_table
from skqlora.checkpoint.experts import expert_matrices
from skqlora.checkpoint.quantizer import unquantized_layers
from skqlora.checkpoint.spec import BackboneSpec
from skqlora.memory.tracing import Precision, trace_training
from skqlora.model.attention import attends_in_bfloat16
from skqlora.model.flat import PAGED_MIN_ELEMENTS
from skqlora.settings.adapter_settings import LoraSettings

# In bitsandbytes 64 weights share a constant, and 256 constants share a second one.
BLOCK, NESTED_BLOCK = 64, 256
# The bytes of AdamW's two moments for each trained value.
STATE_BYTES = {
    "paged_adamw_32bit": 8.0,
    "paged_adamw_8bit": 2 + 8 / NESTED_BLOCK,
    "adamw": 8.0,
}
# The bytes of torch's workspace for matrix products on Hopper GPUs. Older GPUs take 8 MiB.
CUBLAS_BYTES = 32 << 20
# The number of tensors, as large as the widest activations, that a block's backward pass holds, and
# their number if it begins with the block's forward pass.
TRANSIENTS = 1
TRANSIENTS_CHECKPOINTED = 2


@dataclass(frozen=True, repr=False)
class MemoryEstimate:
    """The bytes that a fit takes at its peak, by what takes them.

    Attributes
    ----------
    base : int
        The bytes of the frozen model.
    adapter : int
        The bytes of the adapter and the head, which are float32.
    gradients : int
        The bytes of the gradients of the adapter and the head.
    optimizer : int
        The bytes of AdamW's moments.
    activations : int
        The bytes that a forward pass keeps for its backward pass.
    workspace : int
        The bytes of one dequantized weight or a layer's experts, of dropout's masks for an update,
        of what a layer's backward pass holds for a moment, and on an accelerator of torch's own
        workspace.
    n_texts, n_tokens : int
        The number of texts in a pass, and the number of tokens in each, padding included.
    gradient_checkpointing : bool
        Whether activations are computed again in the backward pass instead of kept.
    optimizer_paged : bool
        Whether the moments may move to the host's memory when the GPU's memory runs out.
    total_checkpointed : int or None
        The total if activations are computed again instead of kept, which `fit` does if the rest
        would not fit and `gradient_checkpointing` is "auto". None if that is settled already.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    n_texts: int
    n_tokens: int
    gradient_checkpointing: bool
    optimizer_paged: bool
    total_checkpointed: int | None = None

    @property
    def total(self) -> int:
        """The sum of all parts."""
        trained = self.adapter + self.gradients + self.optimizer
        return self.base + trained + self.activations + self.workspace

    @property
    def resident(self) -> int:
        """The sum of all parts that cannot leave the device."""
        return self.total - (self.optimizer if self.optimizer_paged else 0)

    def __repr__(self) -> str:
        parts = ("base", "adapter", "gradients", "optimizer", "activations", "workspace", "total")
        sizes = ", ".join(f"{part}={_megabytes(getattr(self, part))}" for part in parts)
        return f"MemoryEstimate({sizes}, n_texts={self.n_texts}, n_tokens={self.n_tokens})"

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {size:>13}" for name, size in rows)

    def _repr_html_(self) -> str:
        return html_table("Memory of the fit at its peak", self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        """Return the rows of the table: a part and its size."""
        again = ", computed again in the backward pass" if self.gradient_checkpointing else ""
        rows = [
            ("base", self.base),
            ("adapter and head", self.adapter),
            ("their gradients", self.gradients),
            ("optimizer, paged" if self.optimizer_paged else "optimizer", self.optimizer),
            (
                f"activations of {self.n_texts} x {self.n_tokens} tokens{again}",
                self.activations,
            ),
            ("workspace", self.workspace),
            ("total", self.total),
        ]
        if self.total_checkpointed is not None:
            rows.append(("total, if activations are computed again", self.total_checkpointed))
        return [(name, _megabytes(size)) for name, size in rows]


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def estimate_training(
    skeleton: PreTrainedModel,
    spec: BackboneSpec,
    lora: LoraSettings,
    *,
    optim: str,
    n_outputs: int,
    n_texts: int,
    n_tokens: int,
    dropout: bool = False,
    keep_pooler: bool = False,
    checkpointing: bool = False,
) -> MemoryEstimate:
    """Estimate the memory that a training takes, from shapes alone.

    The activations are those that autograd keeps of a forward pass on the meta device, so they hold
    for the architecture at hand. Attention is assumed to be a fused kernel unless it is "eager".

    Parameters
    ----------
    skeleton : transformers.PreTrainedModel
        The model on the meta device.
    spec : BackboneSpec
        The specification of the base, whose device need not be on this machine.
    lora : LoraSettings
    optim : {"paged_adamw_32bit", "paged_adamw_8bit", "adamw"}
    n_outputs : int
    n_texts, n_tokens : int
        The shape of the largest pass.
    dropout : bool, default=False
        Whether LoRA's dropout is active.
    keep_pooler : bool, default=False
    checkpointing : bool, default=False

    Returns
    -------
    estimate : MemoryEstimate
    """
    accelerated = spec.device.type != "cpu"
    precision = Precision(
        storage=spec.storage_dtype,
        compute=spec.compute_dtype,
        quantized=spec.quantization is not None,
        autocast=accelerated and spec.compute_dtype == torch.float16,
        keeps_scores=attends_in_bfloat16(spec),
    )
    trace = trace_training(
        skeleton,
        lora,
        precision,
        dropout=dropout,
        keep_pooler=keep_pooler,
        n_rows=n_texts,
        n_tokens=n_tokens,
    )
    checkpointing = checkpointing and trace.kept_checkpointed is not None
    n_trained = trace.adapter_elements + n_outputs * (trace.hidden_size + 1)
    itemsize = spec.compute_dtype.itemsize
    widest = (n_texts * n_tokens * trace.widest + trace.score_elements) * itemsize
    transients = (TRANSIENTS_CHECKPOINTED if checkpointing else TRANSIENTS) * widest
    low = trace.adapter_elements * itemsize if itemsize < 4 else 0  # the adapter in 16 bits
    dequantized = trace.largest_weight * spec.compute_dtype.itemsize + trace.recomputed
    return MemoryEstimate(
        base=_count_base_bytes(skeleton, spec),
        adapter=4 * n_trained,
        gradients=4 * n_trained,
        optimizer=int(STATE_BYTES[optim] * n_trained),
        activations=(trace.kept_checkpointed or 0) if checkpointing else trace.kept,
        workspace=transients + low + dequantized + (CUBLAS_BYTES if accelerated else 0),
        n_texts=n_texts,
        n_tokens=n_tokens,
        gradient_checkpointing=checkpointing,
        optimizer_paged=optim.startswith("paged")
        and spec.device.type == "cuda"
        and trace.adapter_elements >= PAGED_MIN_ELEMENTS,
    )


def _count_base_bytes(skeleton: PreTrainedModel, spec: BackboneSpec) -> int:
    """Count the bytes of a loaded base: packed weights with constants, and the rest as stored."""
    sizes: dict[Any, float] = {buffer: buffer.nbytes for buffer in skeleton.buffers()}
    quantized = spec.quantization is not None
    kept = {skeleton.get_submodule(name) for name in unquantized_layers(skeleton)}
    for module in skeleton.modules():
        linear = isinstance(module, nn.Linear | Conv1D) and module not in kept
        packed = {"weight"} if linear else expert_matrices(module).keys()
        for name, parameter in module.named_parameters(recurse=False):
            if quantized and name in packed:
                sizes[parameter] = _packed_bytes(parameter.numel(), spec.double_quant)
            else:
                dtype = spec.compute_dtype if quantized and linear else spec.storage_dtype
                sizes[parameter] = parameter.numel() * dtype.itemsize
    return int(sum(sizes.values()))


def _packed_bytes(n_weights: int, double_quant: bool) -> int:
    """Compute the bytes of a 4-bit weight (Dettmers et al., arXiv 2305.14314, section 3)."""
    n_blocks = math.ceil(n_weights / BLOCK)
    constants = n_blocks + 4 * math.ceil(n_blocks / NESTED_BLOCK) if double_quant else 4 * n_blocks
    return math.ceil(n_weights / 2) + constants
