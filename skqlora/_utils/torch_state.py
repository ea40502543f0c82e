"""torch's settings as this package computes with them, whatever a caller has set around it."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import joblib
import numpy as np

_lock = threading.Lock()
_n_inside = 0  # the calls of `plain_torch` that have not ended, in all threads
_outside: dict[str, Any] = {}  # the settings of the process that the first of them has replaced


@contextmanager
def plain_torch() -> Iterator[None]:
    """Compute with torch's own defaults, and restore the caller's settings on leaving.

    Autocast, default device, inference mode and grad mode belong to a thread. The default dtype and
    the precision of float32 products belong to the process: they are replaced as long as any thread
    computes here. Deterministic algorithms, which change no result on a CPU, are left as they are.
    """
    import torch

    with ExitStack() as stack:
        for device in ("cpu", "cuda", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_plain_process())
        yield


@contextmanager
def preserved_random_state() -> Iterator[Callable[[], bool]]:
    """Give back the random states of this process on leaving, for a short time.

    Yields
    ------
    has_changed : callable
        A function that returns whether one of them has changed since.
    """
    import torch

    def states() -> tuple[Any, ...]:
        return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002

    def has_changed() -> bool:
        of_torch, *others = states()
        return not torch.equal(of_torch, before[0]) or joblib.hash(others) != joblib.hash(
            list(before[1:])
        )

    before = states()
    try:
        yield has_changed
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])


@contextmanager
def _plain_process() -> Iterator[None]:
    global _n_inside  # noqa: PLW0603 (a fact of the process)
    with _lock:
        if _n_inside == 0:
            _replace_settings()
        _n_inside += 1
    try:
        yield
    finally:
        with _lock:
            _n_inside -= 1
            if _n_inside == 0:
                _restore_settings()


def _replace_settings() -> None:
    import torch

    if torch.get_default_dtype() != torch.float32:
        _outside["dtype"] = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
    for name in ("mkldnn", "cuda"):
        products = getattr(torch.backends, name).matmul
        if products.fp32_precision not in ("none", "ieee"):
            _outside[name] = products.fp32_precision
            products.fp32_precision = "ieee"


def _restore_settings() -> None:
    import torch

    if "dtype" in _outside:
        torch.set_default_dtype(_outside.pop("dtype"))
    while _outside:
        name, precision = _outside.popitem()
        getattr(torch.backends, name).matmul.fp32_precision = precision
