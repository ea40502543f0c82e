"""Runs of a base that was just loaded: what they tell of it, and which bases they refuse.

A forward pass must be a function of its texts alone. This module knows nothing of adapters.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from skqlora.checkpoint.experts import has_experts
from skqlora.checkpoint.modules import drop_pooler, replicate
from skqlora.checkpoint.spec import BackboneSpec

# The relative difference of hidden states that rounding alone explains, by compute dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# A number of tokens. BigBird, for one, computes otherwise from 705 on.
LONG = 1024


@torch.no_grad()
def try_base(base: PreTrainedModel, spec: BackboneSpec) -> tuple[int, bool]:
    """Run a base on a few token ids, and refuse it if its result depends on anything else.

    Configurations do not say whether a token sees those after it: `is_decoder` is unset for Llama.
    So the model is run on two inputs that differ in their last token. A third input, which is
    padded to the length of another one beside it, shows whether a text's result depends on its
    neighbours. At the end the first input comes again. For a base in 16 bits the padding is tried
    in float32 as well.

    Parameters
    ----------
    base : transformers.PreTrainedModel
    spec : BackboneSpec

    Returns
    -------
    hidden_size : int
        The number of features of a last hidden state.
    causal : bool
        Whether a token sees only the tokens before it.

    Raises
    ------
    ValueError
        If the model cannot be run on text alone, if padding changes the result of a text, if a run
        changes the model or a later result, or if it draws random numbers.
    """
    name = f"model={spec.model!r} ({base.config.model_type})"
    ids, changed, both, mask = _inputs(base, spec.device)
    module = replicate(base)
    drop_pooler(module)  # as for most adapters

    def hidden_states(ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        mask = torch.ones_like(ids) if mask is None else mask
        return module(input_ids=ids, attention_mask=mask)[0][0]

    try:
        with _NoRandomMode(name), _unchanged_tensors(module, name):
            plain = hidden_states(ids)
            other_end = hidden_states(changed)
            beside_longer = hidden_states(both, mask)[: len(plain)]
            again = hidden_states(ids)
    except _ChangedError:
        raise
    except Exception as error:  # a model may fail in any way on what it was not made for
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} cannot be run on token ids and a mask alone: {reason}. Wanted: a text encoder "
            "such as BERT, or a decoder such as Llama."
        ) from error
    if plain.ndim != 2:
        raise ValueError(
            f"{name} returns {plain.ndim} dimensions for a text. Wanted: a model that returns "
            "hidden states, one vector for each token."
        )
    if not plain.isfinite().all() or not plain.any():
        raise ValueError(
            f"{name} gives hidden states that are infinite, NaN or all zero. Wanted: a model with "
            "sound weights, or another compute_dtype."
        )
    tolerance = TOLERANCE[spec.compute_dtype]
    _check_equal(plain, again, spec, f"{name} gives a text another result the second time")
    # Experts compute with the tokens of all texts at once, so that a sum's rounding may differ.
    change = _difference(module, plain[:-1], other_end[:-1])
    causal = change <= (tolerance if has_experts(module) else 0)
    if _changes_with_length(spec):
        long = ids.repeat(1, -(-_long(spec) // ids.shape[1]))[:, : _long(spec)]
        first, _, second = hidden_states(long), hidden_states(changed), hidden_states(long)
        _check_equal(first, second, spec, f"{name} gives a long text another result after a short")
    error, allowed = _difference(module, plain, beside_longer), tolerance
    in_16_bits = spec.storage_dtype == torch.bfloat16 and spec.quantization is not None
    if error <= allowed and in_16_bits and not has_experts(module):
        _compute_in_float32(module)
        try:
            plain, beside_longer = hidden_states(ids), hidden_states(both, mask)[: len(plain)]
            error, allowed = _difference(module, plain, beside_longer), TOLERANCE[torch.float32]
        except RuntimeError as failure:  # some code takes nothing but the dtype of the weights
            if "dtype" not in str(failure):
                raise
    if not error <= allowed:
        raise ValueError(
            f"{name} gives a text another result beside a longer one, to whose length it is padded "
            f"(relative difference {error:.1e}). Wanted: a model that heeds the attention mask, "
            "such as BERT."
        )
    return plain.shape[-1], causal


def _compute_in_float32(replica: PreTrainedModel) -> None:
    """Let a replica of a 4-bit base compute in float32, where rounding hides nothing.

    4-bit matrices and embeddings stay as they are; what they give is raised.
    """
    for module in replica.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.float32
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda *parts: parts[-1].float())
            continue
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.dtype == torch.bfloat16:
                setattr(module, name, nn.Parameter(weight.float(), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.dtype == torch.bfloat16:
                setattr(module, name, buffer.float())


class _ChangedError(ValueError):
    """A run has changed what it may only read."""


def _inputs(base: PreTrainedModel, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Make ids, the same with another end, and a batch of them and longer ones."""
    vocabulary = base.config.get_text_config().vocab_size
    ids = torch.arange(5, 13, device=device)[None] % vocabulary
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % vocabulary
    longer = torch.arange(8, 21, device=device)[None] % vocabulary
    both = torch.cat([torch.cat([ids, ids[:, :5]], dim=1), longer])
    mask = torch.ones_like(both)
    mask[0, ids.shape[1] :] = 0
    return ids, changed, both, mask


@contextmanager
def _unchanged_tensors(module: nn.Module, name: str) -> Iterator[None]:
    """Refuse a model whose runs write to its parameters or buffers, which all replicas share."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    versions = {key: tensor._version for key, tensor in tensors.items()}
    yield
    changed = [key for key, tensor in tensors.items() if tensor._version != versions[key]]
    if changed:
        raise _ChangedError(
            f"{name} changes its own {changed[0]!r} when it is run. Wanted: a model whose weights "
            "stay as they are."
        )


class _NoRandomMode(TorchDispatchMode):
    """A context in which this thread may draw no random number from a generator of torch."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Attention may draw its dropout, which is off here.
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in str(func):
            raise _ChangedError(
                f"{self._name} draws random numbers when it is run, so that no result can be had "
                "twice. Wanted: a model that computes the same each time."
            )
        return func(*args, **(kwargs or {}))


def _long(spec: BackboneSpec) -> int:
    return min(spec.architecture().max_positions or LONG, LONG)


def _changes_with_length(spec: BackboneSpec) -> bool:
    """Return whether a long text changes what the modules hold, as a run without values shows."""
    module = replicate(spec.architecture().skeleton)
    drop_pooler(module)
    before = _attributes(module)
    try:
        for n_tokens in (_long(spec), 8):
            ids = torch.zeros(1, n_tokens, dtype=torch.int64, device="meta")
            with _NoRandomMode(""), _UnpaddedMode():
                module(input_ids=ids, attention_mask=torch.ones_like(ids))
    except _ChangedError:
        return True
    except Exception:  # what depends on values cannot be run without them
        return False
    return _attributes(module) != before


class _UnpaddedMode(TorchFunctionMode):
    """A context in which a model that asks whether nothing is padded hears that it is so."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "__bool__":
            return True
        return func(*args, **(kwargs or {}))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the plain values that modules hold beside their tensors, and the modules' classes."""
    plain = (bool, int, float, str, type(None))
    return {
        f"{name}.{key}": value if isinstance(value, plain) else type(value)
        for name, each in module.named_modules()
        for key, value in [*vars(each).items(), ("__class__", type(each))]
    }


def _check_equal(some: torch.Tensor, others: torch.Tensor, spec: BackboneSpec, what: str) -> None:
    """Refuse results that differ, on an accelerator by more than its kernels' order of summing."""
    error = ((some - others).float().norm() / some.float().norm()).item()
    tolerance = 0 if spec.device.type == "cpu" else TOLERANCE[spec.compute_dtype]
    if not error <= tolerance:
        raise ValueError(
            f"{what} (relative difference {error:.1e}). Wanted: a model whose results depend on "
            "nothing but the text."
        )


def _difference(module: PreTrainedModel, some: torch.Tensor, others: torch.Tensor) -> float:
    """Compute by how much hidden states differ, relative to their size, for most tokens."""
    errors = (others - some).float().norm(dim=1) / some.float().norm(dim=1)
    # Where two experts have nearly the same score, rounding may send a token to the other one.
    return (errors.median() if has_experts(module) else errors.mean()).item()
