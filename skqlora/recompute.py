"""Activation checkpointing: activations that are computed again instead of kept, and when."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from skqlora.layers import transformer_blocks
from skqlora.model import TextClassifierModel


@contextmanager
def checkpointed_blocks(encoder: nn.Module) -> Iterator[None]:
    """Recompute each block's activations in the backward pass instead of keeping them.

    transformers' own switch acts in training mode only, which would wake the base's dropout.

    Parameters
    ----------
    encoder : torch.nn.Module
        A clone of a base: its blocks are changed, and on leaving changed back.

    Raises
    ------
    ValueError
        If the stack of blocks cannot be told.
    """
    blocks = transformer_blocks(encoder)
    if blocks is None:
        raise ValueError(
            f"Got gradient_checkpointing=True but {type(encoder).__name__} has no single stack of "
            "like blocks. Pass gradient_checkpointing=False."
        )
    # accelerate's hooks, too, are a `forward` of the block itself, over that of its class.
    hooked = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, hooked, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _checkpointed(forward, *args, **kwargs):
    return checkpoint(
        partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False
    )


def fills_memory(model: TextClassifierModel, n_tokens: int) -> bool:
    """Tell whether the activations of a forward pass would fill half of the free memory of a GPU.

    Korthikanti et al. (arXiv 2205.05198, equation 2): 34 bytes for each token, feature and layer,
    attention scores aside, which the fused kernels do not keep.

    Parameters
    ----------
    model : TextClassifierModel
    n_tokens : int
        Of the pass, padding included.

    Returns
    -------
    fills : bool
        False on a CPU, or where the layers cannot be told.
    """
    device = model.backbone.spec.device
    blocks = transformer_blocks(model.encoder)
    if device.type == "cpu" or blocks is None:
        return False
    memory = getattr(torch, device.type)
    # What torch has set aside and does not use is free too.
    unused = memory.memory_reserved(device) - memory.memory_allocated(device)
    free = memory.mem_get_info(device)[0] + unused
    return 34 * n_tokens * model.backbone.hidden_size * len(blocks) > free / 2
