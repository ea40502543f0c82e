"""torch's settings as this package computes with them, whatever a caller has set around it."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from skqlora._utils.libraries import library_lock

_lock = threading.Lock()
_n_inside = 0  # the calls of `plain_torch` that have not ended, in all threads
_outside: dict[str, Any] = {}  # the settings of the process that the first of them has replaced


@contextmanager
def plain_torch() -> Iterator[None]:
    """Compute with torch's own defaults, and restore the caller's settings on leaving.

    Autocast, default device, inference mode and grad mode belong to a thread. The precision of
    float32 products belongs to the process: it is replaced as long as any thread computes here.
    Deterministic algorithms, which change no result on a CPU, are left as they are. The default
    dtype is left too, since libraries change it for moments in other threads: what computes here
    names its dtypes, and `float32_by_default` is for what builds models.
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
def float32_by_default() -> Iterator[None]:
    """Build models in float32, one thread at a time."""
    import torch

    with library_lock:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


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

    for name in ("mkldnn", "cuda"):
        products = getattr(torch.backends, name).matmul
        if products.fp32_precision not in ("none", "ieee"):
            _outside[name] = products.fp32_precision
            products.fp32_precision = "ieee"


def _restore_settings() -> None:
    import torch

    while _outside:
        name, precision = _outside.popitem()
        inherited = precision == torch.backends.fp32_precision  # type: ignore[attr-defined]
        getattr(torch.backends, name).matmul.fp32_precision = "none" if inherited else precision
