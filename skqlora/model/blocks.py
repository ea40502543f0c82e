"""Finding the stack of a model's layers and the modules in them, and replacing their `forward`.

This module knows nothing of adapters.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

from torch import nn


def transformer_blocks(encoder: nn.Module) -> nn.ModuleList | None:
    """Return the stack of `num_hidden_layers` like blocks, or None if there is not exactly one."""
    stacks = list(_stacks(encoder).values())
    return stacks[0] if len(stacks) == 1 else None


def modules_in_layers(
    names: Iterable[str], layers: int | Sequence[int], encoder: Any
) -> tuple[str, ...]:
    """Choose the modules that are in some of a model's layers.

    Parameters
    ----------
    names : iterable of str
        The names of the modules to choose from.
    layers : int or sequence of int
        How many layers at the end to take, or the numbers of the layers, where negative numbers
        count from the end.
    encoder : transformers.PreTrainedModel

    Returns
    -------
    chosen : tuple of str

    Raises
    ------
    ValueError
        If the layers of the model cannot be identified, if it does not have that many, or if none
        of the modules is in them.
    """
    shown = layers if isinstance(layers, int) else list(layers)  # as the user writes it
    stacks = _stacks(encoder)
    if len(stacks) != 1:
        raise ValueError(
            f"Got layers={shown!r}, but {type(encoder).__name__} has no single stack of like "
            "layers. Pass layers='all', or choose by target_modules."
        )
    [(stack, blocks)] = stacks.items()
    wanted: Sequence[int] = range(-layers, 0) if isinstance(layers, int) else layers
    wrong = [
        i for i in wanted if not isinstance(i, Integral) or not -len(blocks) <= i < len(blocks)
    ]
    if wrong or not len(wanted):
        raise ValueError(
            f"Got layers={shown!r}, but the model has {len(blocks)} layers. Wanted: at most that "
            f"many, or a list of numbers from 0 to {len(blocks) - 1}, or of negative ones that "
            "count from the end."
        )
    prefixes = tuple(f"{stack}.{i % len(blocks)}." for i in wanted)
    chosen = tuple(name for name in names if name.startswith(prefixes))
    if not chosen:
        raise ValueError(
            f"Got layers={shown!r}, but what target_modules names is in none of them. Pass other "
            "layers, or target_modules='all-linear'."
        )
    return chosen


@contextmanager
def replaced_forwards(blocks: Iterable[nn.Module], forwards: Iterable[Any]) -> Iterator[None]:
    """Give each layer another `forward`, and restore its own on leaving.

    accelerate's hooks, too, set a `forward` on the layer itself, which hides that of its class.
    """
    blocks = list(blocks)
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


def _stacks(encoder: Any) -> dict[str, nn.ModuleList]:
    n_layers = getattr(encoder.config, "num_hidden_layers", None)
    return {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n_layers
        and len({type(block) for block in module}) == 1
    }
