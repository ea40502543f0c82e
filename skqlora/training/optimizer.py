"""AdamW over flat tensors, with its state in paged memory on CUDA.

bitsandbytes pages the state of a tensor only from 100,000 elements on and synchronizes the device
after each tensor. LoRA's tensors are smaller, so that a paged AdamW of single tensors would not be
paged at all. One flat tensor that holds all of them is paged, and one kernel updates it.
"""

import threading
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch

from skqlora.model.flat import PAGED_MIN_ELEMENTS

PAGED_STATES = ("state1", "state2")  # bitsandbytes' names of the first and second moments


class PagedPool:
    """A pool of managed CUDA memory for optimizer states, reused because it cannot be freed.

    bitsandbytes has no way to free what it got from `cudaMallocManaged`. Without reuse, every fit
    of a process would take memory for its optimizer's state and never give it back.
    """

    def __init__(self) -> None:
        self._free: dict[torch.device, list[torch.Tensor]] = {}  # flat uint8 buffers
        self._lock = threading.Lock()

    def take(self, n_bytes: int, device: torch.device) -> torch.Tensor:
        """Return a flat uint8 buffer in managed memory whose first `n_bytes` are zero."""
        with self._lock:
            free = self._free.setdefault(device, [])
            fitting = [i for i, buffer in enumerate(free) if buffer.numel() >= n_bytes]
            best = min(fitting, key=lambda i: free[i].numel(), default=None)
            buffer = None if best is None else free.pop(best)
        if buffer is None:
            buffer = bnb.functional.get_paged(n_bytes, dtype=torch.uint8, device=device)
        used = _as_paged(buffer[:n_bytes], device)
        bnb.functional.fill(used, 0)
        return buffer

    def give_back(self, buffer: torch.Tensor, device: torch.device) -> None:
        """Keep a buffer for a later `take`."""
        with self._lock:
            self._free.setdefault(device, []).append(buffer)


def _as_paged(view: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Mark a view of managed memory as bitsandbytes marks the whole; views inherit no marks."""
    view.is_paged, view.page_deviceid = True, device.index  # type: ignore[attr-defined]
    return view


paged_pool = PagedPool()


class _PooledStates:
    """A mixin of bitsandbytes' paged optimizers, to which `paged_pool` lends their states."""

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if p.device.type == "cpu" or p.numel() < PAGED_MIN_ELEMENTS:
            return torch.zeros_like(p, dtype=dtype)
        buffer = paged_pool.take(p.numel() * dtype.itemsize, p.device)
        self.__dict__.setdefault("_taken", []).append((buffer, p.device))
        return _as_paged(buffer[: p.numel() * dtype.itemsize].view(dtype).view(p.shape), p.device)

    def release(self) -> None:
        """Give the paged states back to the pool. The optimizer must not step again."""
        for buffer, device in self.__dict__.pop("_taken", []):
            paged_pool.give_back(buffer, device)


class PagedAdamW32bit(_PooledStates, bnb.optim.PagedAdamW32bit):
    """bitsandbytes' paged AdamW with 32-bit states, in pooled memory."""


class PagedAdamW8bit(_PooledStates, bnb.optim.PagedAdamW8bit):
    """bitsandbytes' paged AdamW with 8-bit states, in pooled memory."""


OPTIMIZERS = {
    "paged_adamw_32bit": PagedAdamW32bit,
    "paged_adamw_8bit": PagedAdamW8bit,
    "adamw": torch.optim.AdamW,
}


def make_optimizer(optim: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build an AdamW optimizer (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).

    Parameters
    ----------
    optim : {"paged_adamw_32bit", "paged_adamw_8bit", "adamw"}
        The kind of AdamW. On a CPU, which has no pages to move, the paged ones keep their state in
        plain memory.
    groups : list of dict
        The parameter groups of torch's optimizers, with "params", "lr" and "weight_decay".

    Returns
    -------
    optimizer : torch.optim.Optimizer
    """
    return OPTIMIZERS[optim](groups)


def release(optimizer: torch.optim.Optimizer) -> None:
    """Give back what the optimizer took from the paged pool, if anything."""
    if isinstance(optimizer, _PooledStates):
        optimizer.release()


def numpy_state_dict(optimizer: torch.optim.Optimizer) -> list[dict[str, np.ndarray | float]]:
    """Copy the moments of an optimizer to NumPy, in a dict for each tensor that it updates.

    Returns
    -------
    states : list of dict of str to ndarray or float
        The moments, by the optimizer's own names. The dicts are empty before the first update.
    """
    return [
        {
            name: value.detach().cpu().numpy().copy() if isinstance(value, torch.Tensor) else value
            for name, value in optimizer.state[tensor].items()
        }
        for tensor in _tensors(optimizer)
    ]


def load_numpy_state_dict(
    optimizer: torch.optim.Optimizer, states: list[dict[str, np.ndarray | float]]
) -> None:
    """Give a new optimizer a copy of the moments of an earlier optimizer of the same kind."""
    for tensor, state in zip(_tensors(optimizer), states, strict=True):
        for name, value in state.items():
            restored: Any = value
            if isinstance(value, np.ndarray):
                restored = torch.from_numpy(value.copy())
                if name in PAGED_STATES and isinstance(optimizer, _PooledStates):
                    restored = optimizer.get_state_buffer(tensor, restored.dtype).copy_(restored)
                elif restored.ndim > 0:  # torch's own step counter stays on the CPU
                    restored = restored.to(tensor.device)
            optimizer.state[tensor][name] = restored


def _tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]
