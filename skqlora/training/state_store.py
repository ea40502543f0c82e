"""Hidden states of texts, kept for later fits in bounded memory, or for one fit in a file.

This module knows nothing of how they are computed.
"""

import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from skqlora._utils.caches import register_cache
from skqlora._utils.messages import warn
from skqlora.memory.free import free_memory
from skqlora.model.backbone import Backbone
from skqlora.training.distributed import Ranks

MEMORY_SHARE = 0.1  # the share of the memory that is free or holds states
CHUNK = bytes(1 << 20)  # zeros to write where a file cannot be given its size at once

States = dict[tuple, torch.Tensor]  # each of shape (n_tokens, width), on the CPU

_lock = threading.Lock()
_stores: "weakref.WeakKeyDictionary[Backbone, States]" = weakref.WeakKeyDictionary()
_reserved: list[int] = []  # bytes that trainings are about to fill


def find(backbone: Backbone, keys: list[tuple]) -> States:
    """Return the states of a base that are kept under these keys; absent keys are left out."""
    with _lock:
        store = _stores.get(backbone, {})
        return {key: store[key] for key in keys if key in store}


def keep(backbone: Backbone, states: States) -> None:
    """Keep states in memory for later fits."""
    with _lock:
        _stores.setdefault(backbone, {}).update(states)


def forget() -> None:
    """Drop all kept states. A training that uses some holds them until it ends."""
    with _lock:
        _stores.clear()


register_cache(forget)


@contextmanager
def reserved_memory(n_bytes: int, backbone: Backbone, used: States) -> Iterator[bool]:
    """Reserve memory for states to be computed, and drop kept ones if there is no room.

    Parameters
    ----------
    n_bytes : int
    backbone : Backbone
    used : dict of tuple to torch.Tensor
        The states of that base that must not be dropped.

    Yields
    ------
    fits : bool
        Whether there is memory for the states.
    """
    with _lock:
        held = _count_kept() + sum(_reserved)
        room = MEMORY_SHARE * (free_memory(torch.device("cpu")) + held) / Ranks.current().size
        if held + n_bytes > room:
            _stores.clear()
            _stores[backbone] = dict(used)
            held = _count_kept() + sum(_reserved)
        fits = held + n_bytes <= room
        if fits:
            _reserved.append(n_bytes)
    try:
        yield fits
    finally:
        if fits:
            with _lock:
                _reserved.remove(n_bytes)


def in_memory(width: int, dtype: torch.dtype) -> Callable[[int], torch.Tensor]:
    """Return a function that allocates the states of a text, given its number of tokens."""
    return lambda n_tokens: torch.empty(n_tokens, width, dtype=dtype)


def in_file(n_tokens: int, width: int, dtype: torch.dtype) -> Callable[[int], torch.Tensor] | None:
    """Return a function that allocates the states of a text in a temporary file.

    The file has room for `n_tokens` tokens in all. Return None if the disk has less.
    """
    n_bytes = n_tokens * width * dtype.itemsize
    try:
        with tempfile.TemporaryFile() as file:
            # Room is taken now, since a full disk would end the process at a later write.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            else:
                for _ in range(-(-n_bytes // len(CHUNK))):
                    file.write(CHUNK)
                file.flush()
            mapped = np.memmap(file, dtype=np.uint8, mode="r+", shape=(n_bytes,))
    except OSError as error:
        warn(
            f"There are no {n_bytes / 1e9:.1f} GB in {tempfile.gettempdir()!r} to keep what the "
            f"layers before the first adapted one compute ({error}), so each epoch computes it "
            "again: the result is the same up to rounding. Set TMPDIR to a larger disk, or pass "
            "cache_dtype=None to do without.",
            RuntimeWarning,
        )
        return None
    rest = torch.from_numpy(mapped).view(dtype).view(n_tokens, width)

    def allocate(n_tokens: int) -> torch.Tensor:
        nonlocal rest
        taken, rest = rest[:n_tokens], rest[n_tokens:]
        return taken

    return allocate


def _count_kept() -> int:
    return sum(state.nbytes for store in _stores.values() for state in store.values())
