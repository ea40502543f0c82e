"""The device and the precision of a model, and errors that mean too little memory."""

from collections.abc import Mapping

import torch

# The words by which errors without a type of their own say that memory ran out. CUDA, cuBLAS, cuDNN
# and the CPU's allocator raise such errors.
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")


def resolve_device(device: str, *, here: bool = True) -> torch.device:
    """Turn "auto" or a torch device name into a device that QLoRA can train on.

    Parameters
    ----------
    device : str
    here : bool, default=True
        Whether the device has to be on this machine.

    Returns
    -------
    resolved : torch.device

    Raises
    ------
    ValueError
        If there is no such device, or bitsandbytes cannot train on it.
    """
    if device == "auto":
        device = next((kind for kind in ("cuda", "xpu") if _is_available(kind)), "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"Got device={device!r}, which is no torch device. Wanted: 'auto', 'cpu', 'cuda', "
            "'cuda:1', 'xpu' ..."
        ) from error
    if resolved.type not in ("cpu", "cuda", "xpu"):
        raise ValueError(
            f"Got device={device!r}, but bitsandbytes cannot train a 4-bit model on "
            f"{resolved.type!r} devices. Pass device='cpu', or 'cuda' or 'xpu' where there is one."
        )
    available = _is_available(resolved.type, resolved.index or 0)
    if not available and not here:
        return resolved
    if not available:
        raise ValueError(
            f"Got device={device!r}, but torch sees no such device here. Pass device='auto' to "
            "take what there is, or install a torch built for it."
        )
    if resolved.type != "cpu" and resolved.index is None:
        resolved = torch.device(resolved.type, getattr(torch, resolved.type).current_device())
    return resolved


def may_spread(device: torch.device) -> bool:
    """Return whether a base without a given device may continue on the GPUs after the first.

    It may not do so under `torchrun`, where each process has a GPU of its own.
    """
    in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return device == torch.device("cuda", 0) and torch.cuda.device_count() > 1 and not in_group


def _is_available(kind: str, index: int = 0) -> bool:
    return kind == "cpu" or index < getattr(torch, kind).device_count()


def resolve_compute_dtype(compute_dtype: str, device: torch.device) -> torch.dtype:
    """Turn "auto" or a name into the dtype of the products with the base's weights.

    "auto" is bfloat16 if the hardware multiplies it, otherwise float16 on a GPU and float32 on a
    CPU.

    Raises
    ------
    ValueError
        If the dtype is float16 and the device is a CPU.
    """
    if compute_dtype == "float16" and device.type == "cpu":
        raise ValueError(
            "Got compute_dtype='float16' on a CPU, where it trains neither fast nor stably. Pass "
            "'auto', 'bfloat16' or 'float32'."
        )
    if compute_dtype != "auto":
        return getattr(torch, compute_dtype)
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32
    if device.type == "cuda" and _is_available("cuda"):
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.float16
    return torch.bfloat16


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether memory ran out, so that computing less at once may work."""
    typed = isinstance(error, torch.OutOfMemoryError)
    return typed or any(words in str(error) for words in OUT_OF_MEMORY)


def empty_cache(device: torch.device) -> None:
    """Let an accelerator's allocator give back what it holds and nobody uses."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def to_device(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy tensors from the host, without waiting for an accelerator that is still computing."""
    if device.type == "cuda":  # only copies from pinned memory do not wait
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def _cpu_multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
