"""What a training keeps for its backward pass, determined with a model without weights.

The model runs on the meta device, where tensors have shapes but no values, and autograd reports
what it would keep. This module knows nothing of the memory that a device has.
"""

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from skqlora._utils.caches import registered_lru_cache
from skqlora._utils.torch_state import float32_by_default
from skqlora.checkpoint.experts import expert_matrices
from skqlora.checkpoint.modules import drop_pooler
from skqlora.model.attention import MAX_TOKENS
from skqlora.model.blocks import transformer_blocks
from skqlora.model.dropout import LoraDropout
from skqlora.model.flat import ALIGNMENT
from skqlora.model.lora import ADAPTER, inject_lora
from skqlora.model.norm import use_fused_norms
from skqlora.settings.adapter_settings import LoraSettings

# The names of the functions that autocast computes in the lower precision and in float32, as far as
# transformers calls them. torch's "Automatic Mixed Precision" page lists all of them.
LOWERED = ("linear", "matmul", "__matmul__", "bmm", "addmm", "baddbmm", "einsum", "conv1d")
RAISED = ("layer_norm", "rms_norm", "softmax", "pow", "__pow__", "rsqrt", "exp", "sum", "cumsum")


class UntraceableError(RuntimeError):
    """A model's memory cannot be determined from its shapes."""


@dataclass(frozen=True)
class Precision:
    """The dtypes in which the parts of a model are stored and computed.

    Attributes
    ----------
    storage : torch.dtype
        The dtype of what is not quantized.
    compute : torch.dtype
        The dtype of the products with the base's weights.
    quantized : bool
        Whether the base is quantized, so that these products are cast back to the dtype of their
        input.
    autocast : bool
        Whether autocast to `compute` is on.
    keeps_scores : bool
        Whether attention keeps the scores of short texts; see `skqlora.model.attention`.
    """

    storage: torch.dtype
    compute: torch.dtype
    quantized: bool
    autocast: bool
    keeps_scores: bool = False


@dataclass(frozen=True)
class Trace:
    """The sizes of a training's parts.

    Attributes
    ----------
    kept : int
        The bytes of activations that a pass keeps for its backward pass.
    kept_checkpointed : int or None
        The same bytes if blocks are computed again, or None if the blocks cannot be identified.
    adapter_elements : int
        The number of values in the adapter, including the gaps in its flat buffer.
    hidden_size : int
        The number of features of a last hidden state.
    widest : int
        The greatest number of features of a linear layer's input or output.
    largest_weight : int
        The greatest number of elements of a linear layer's weight, or of a layer's experts.
    recomputed : int
        The bytes that a layer's experts hold while their part of the backward pass is computed
        again, the dequantized matrices not counted.
    score_elements : int
        The number of attention scores of a layer if its kernel stores them, otherwise 0.
    """

    kept: int
    kept_checkpointed: int | None
    adapter_elements: int
    hidden_size: int
    widest: int
    largest_weight: int
    recomputed: int
    score_elements: int


@registered_lru_cache(maxsize=64)  # the folds and most candidates of a search share a trace
@float32_by_default()
def trace_training(
    skeleton: PreTrainedModel,
    lora: LoraSettings,
    precision: Precision,
    *,
    dropout: bool,
    keep_pooler: bool,
    n_rows: int,
    n_tokens: int,
) -> Trace:
    """Run a training's forward pass without values and sum up what it keeps.

    Parameters
    ----------
    skeleton : transformers.PreTrainedModel
        The model on the meta device, which is not changed.
    lora : LoraSettings
    precision : Precision
    dropout : bool
        Whether LoRA's dropout is active. With DoRA each layer then keeps an input of its own.
    keep_pooler : bool
    n_rows, n_tokens : int
        The shape of the pass, padding included.

    Returns
    -------
    trace : Trace

    Raises
    ------
    UntraceableError
        If the computation of the model depends on values.
    """
    module = _adapted_skeleton(skeleton, lora, precision, keep_pooler=keep_pooler)
    adapted: list[Any] = [m for m in module.modules() if isinstance(m, LoraLayer)]
    if dropout:
        for layer in (layer for layer in adapted if ADAPTER in layer.lora_A):
            layer.lora_dropout[ADAPTER] = _dropout_of(layer)
            layer.training = True  # DoRA then computes the layer's own product a second time
    kept = _Kept([*module.parameters(), *module.buffers()])
    blocks = list(transformer_blocks(module) or ())
    by_block = [_BlockUse(block, kept) for block in blocks]
    ids = torch.empty(n_rows, n_tokens, dtype=torch.int64, device="meta")
    try:
        with (
            torch.enable_grad(),
            saved_tensors_hooks(kept.add, _unneeded),
            _Dataless(precision, padded=n_rows > 1),
        ):
            hidden = module(input_ids=ids, attention_mask=torch.empty_like(ids))[0]
    except Exception as error:  # a model may fail in any way when it needs values
        raise UntraceableError(
            f"{type(module).__name__} cannot be run without values: {error}"
        ) from error
    weights = [w for m in module.modules() if (w := _matrix(m)) is not None and not w.requires_grad]
    experts = [m for m in module.modules() if isinstance(m, _TracedExperts)]
    sizes = [weight.numel() for weight in weights] + [m.n_elements for m in experts]
    trained = [p for p in module.parameters() if p.requires_grad]
    outside = kept.nbytes - sum(use.kept for use in by_block)
    dense = _dense_bytes(adapted, precision) if lora.use_dora and dropout else 0
    in_blocks = max(use.kept + dense // len(blocks) for use in by_block) if blocks else 0
    return Trace(
        kept=kept.nbytes + dense,
        kept_checkpointed=outside + sum(use.input for use in by_block) + in_blocks
        if blocks
        else None,
        adapter_elements=sum(-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in trained),
        hidden_size=hidden.shape[-1],
        widest=max(max(weight.shape) for weight in weights),
        largest_weight=max(sizes),
        recomputed=max((m.recomputed for m in experts), default=0),
        score_elements=_count_scores(module, precision, n_rows, n_tokens),
    )


def _adapted_skeleton(
    skeleton: PreTrainedModel, lora: LoraSettings, precision: Precision, *, keep_pooler: bool
) -> PreTrainedModel:
    """Copy a skeleton, give the copy the dtypes of its base, and add an adapter."""
    module = copy.deepcopy(skeleton).eval().requires_grad_(False)
    nn.Module.to(module, precision.storage)
    module.config.use_cache = False
    if module.config._attn_implementation != "eager":
        module.config._attn_implementation = "sdpa"  # the other kernels keep as much
    if not keep_pooler:
        drop_pooler(module)
    for layer in module.modules():
        # Autograd would keep a second copy of a weight that autocast has to cast. There is no such
        # copy of a 4-bit weight.
        if (weight := _matrix(layer)) is not None:
            weight.data = weight.data.to(precision.compute)
        if precision.quantized and expert_matrices(layer):
            experts_class: Any = type(layer.to(precision.compute))
            layer.__class__ = _traced_class(experts_class)
    if precision.storage == torch.bfloat16:
        use_fused_norms(module)
    with torch.device("meta"):
        inject_lora(lora, module)
    return module.eval()


def _count_scores(module: PreTrainedModel, precision: Precision, n_rows: int, n_tokens: int) -> int:
    scored = precision.keeps_scores and n_tokens <= MAX_TOKENS
    if module.config._attn_implementation != "eager" and not scored:
        return 0
    return n_rows * n_tokens**2 * (getattr(module.config, "num_attention_heads", None) or 1)


def _dropout_of(layer: Any) -> LoraDropout:
    weight = layer.get_base_layer().weight
    return LoraDropout(0.1, layer.in_features, weight.device, weight.dtype)


def _dense_bytes(adapted: list[Any], precision: Precision) -> int:
    """Count the bytes of the dequantized weights that PEFT's DoRA keeps if dropout is active."""
    if not precision.quantized:
        return 0
    itemsize = (precision.compute if precision.autocast else torch.float32).itemsize
    return sum(layer.get_base_layer().weight.numel() * itemsize for layer in adapted)


def _matrix(module: nn.Module) -> torch.Tensor | None:
    return module.weight if isinstance(module, nn.Linear | Conv1D) else None


def _unneeded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor  # there is no backward pass


class _Kept:
    """The storages that autograd keeps, each counted once, except for those that exist anyway."""

    def __init__(self, there: Iterable[torch.Tensor]):
        self._storages = {_key(tensor): tensor for tensor in there}  # alive: keys stay unique
        self.nbytes = self.largest = 0

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        if _key(tensor) not in self._storages:
            self._storages[_key(tensor)] = tensor
            self.nbytes += tensor.untyped_storage().nbytes()
            self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return tensor


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _BlockUse:
    """The bytes that are kept within a block, and those of the hidden states that enter it."""

    def __init__(self, block: nn.Module, kept: _Kept):
        self.input = self.kept = 0
        self._all = kept
        block.register_forward_pre_hook(self._enter, with_kwargs=True)
        block.register_forward_hook(self._leave)

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._before = self._all.nbytes
        hidden = args[0] if args else kwargs["hidden_states"]
        self.input = hidden.nbytes if hidden.requires_grad else 0

    def _leave(self, *_: object) -> None:
        self.kept = self._all.nbytes - self._before


class _TracedExperts(nn.Module):
    """Packed experts without values, which keep their inputs as `PackedExperts` does."""

    recomputed = 0  # bytes, at most

    @property
    def n_elements(self) -> int:
        """The number of elements of all expert matrices of the layer."""
        return sum(shape.numel() for shape in expert_matrices(self).values())

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kept = _Kept([*self.parameters(), *self.buffers()])
        with saved_tensors_hooks(kept.add, _unneeded):
            lowered = hidden.to(next(self.parameters()).dtype)
            output = super().forward(lowered, *args, **kwargs).to(hidden.dtype)
        # The gradient of the widest of them is there at the same time.
        self.recomputed = max(self.recomputed, kept.nbytes + kept.largest)
        inputs = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        return _Recomputed.apply(output.detach(), hidden, *inputs)


@functools.cache
def _traced_class(experts_class: Any) -> type[nn.Module]:
    return type(f"Traced{experts_class.__name__}", (_TracedExperts, experts_class), {})


class _Recomputed(torch.autograd.Function):
    """A step whose backward pass begins with computing it again from its inputs."""

    @staticmethod
    def forward(ctx, output, *inputs):
        ctx.save_for_backward(*inputs)
        return output.clone()


class _Dataless(TorchFunctionMode):
    """A context in which a model runs on the meta device as it does on a real one.

    Decisions that depend on values are made as for a batch with padding, or without it if `padded`
    is False. Attention keeps what the fused kernels keep. Autocast, which torch does not apply on
    the meta device, is imitated.
    """

    def __init__(self, precision: Precision, *, padded: bool):
        super().__init__()
        self._precision, self._padded = precision, padded

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        precision = self._precision
        if name == "__bool__":  # the model asks whether nothing is padded
            return not self._padded
        if name == "scaled_dot_product_attention":
            query, key, value = args[:3]
            if precision.autocast:
                query, key, value = (x.to(precision.compute) for x in (query, key, value))
            if precision.keeps_scores and key.shape[2] <= MAX_TOKENS:
                return _ScoredAttention.apply(query, key, value)
            states = (query, key, value)
            if precision.keeps_scores:  # the kernel then computes in float32
                states = tuple(x.float() for x in states)
            output = _FusedAttention.apply(*states, kwargs.get("attn_mask"))
            return output.to(query.dtype)
        if name == "_grouped_mm":  # on the meta device torch has it in bfloat16 alone
            return _GroupedProduct.apply(*args[:2])
        if name == "linear" and precision.quantized and not args[1].requires_grad:
            return func(args[0].to(precision.compute), *args[1:], **kwargs).to(args[0].dtype)
        if precision.autocast and name in LOWERED:
            args = _cast(args, precision.compute)
        elif precision.autocast and name in RAISED:
            args = _cast(args, torch.float32)
        return func(*args, **kwargs)


def _cast(args: tuple, dtype: torch.dtype) -> tuple:
    return tuple(
        arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
        for arg in args
    )


class _GroupedProduct(torch.autograd.Function):
    """The product of rows, grouped by their expert, with frozen matrices of all experts."""

    @staticmethod
    def forward(ctx, rows, matrices):
        ctx.save_for_backward(matrices)
        return rows.new_empty(len(rows), matrices.shape[-1])


class _FusedAttention(torch.autograd.Function):
    """Attention that keeps what torch's fused kernels keep, which does not include the scores.

    FlashAttention (Dao et al., arXiv 2205.14135, algorithm 2) keeps the queries, keys, values and
    output, and the logarithm of each row's normaliser. The mask is kept too, as numbers in the
    dtype of the queries.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask):
        if mask is not None:
            mask = mask.to(query.dtype)
        out = torch.empty_like(query)  # which has the strides of the queries, too
        if query.shape[-1] != value.shape[-1]:
            out = query.new_empty(*query.shape[:-1], value.shape[-1])
        normalisers = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, normalisers)
        return out


class _ScoredAttention(torch.autograd.Function):
    """Attention that keeps the shares of all pairs of tokens, and no output."""

    @staticmethod
    def forward(ctx, query, key, value):
        shares = query.new_empty(*query.shape[:-1], key.shape[-2])
        ctx.save_for_backward(query, key, value, shares)
        return query.new_empty(*query.shape[:-1], value.shape[-1])
