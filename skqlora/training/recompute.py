"""Activation checkpointing, which computes activations again instead of keeping them."""

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

    The switch of transformers itself acts only in training mode, which would turn on the base's
    dropout.

    Parameters
    ----------
    encoder : torch.nn.Module
        A replica of a base. Its blocks are changed, and changed back at the end of the context.

    Raises
    ------
    ValueError
        If the stack of blocks cannot be determined.
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
