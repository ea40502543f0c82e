"""Activation checkpointing: activations that are computed again instead of kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from skqlora.model.blocks import replaced_forwards, transformer_blocks


@contextmanager
def checkpointed_blocks(encoder: nn.Module) -> Iterator[None]:
    """Recompute each block's activations in the backward pass instead of keeping them.

    transformers' own switch acts in training mode only, which would wake the base's dropout.

    Parameters
    ----------
    encoder : torch.nn.Module
        A replica of a base: its blocks are changed, and on leaving changed back.

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
    with replaced_forwards(blocks, [partial(_checkpointed, block.forward) for block in blocks]):
        yield


def _checkpointed(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(
        partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False
    )
