"""The memory that is free on a device or within a container's limit."""

import math
from pathlib import Path

import torch

# The folder of a container's limits, for version 2 and version 1 of control groups.
CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device, *, spread: bool = False) -> float:
    """Count the bytes that a training could still take on a device.

    Parameters
    ----------
    device : torch.device
    spread : bool, default=False
        Whether to count all devices of the same kind together.

    Returns
    -------
    n_bytes : float
    """
    if device.type == "cpu":
        import psutil

        return min(psutil.virtual_memory().available, _free_in_container())
    memory = getattr(torch, device.type)
    places = range(memory.device_count()) if spread else [device.index]
    # Memory that torch has reserved but does not use is free too.
    return sum(
        memory.mem_get_info(i)[0] + memory.memory_reserved(i) - memory.memory_allocated(i)
        for i in places
    )


def _free_in_container() -> float:
    """Count the bytes up to a container's limit, which the operating system's figures ignore."""
    for limit, usage, statistics in [
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ]:
        try:
            allowed, used = (int((CGROUP / name).read_text()) for name in (limit, usage))
            lines = (CGROUP / statistics).read_text().splitlines()
        except (OSError, ValueError):  # there is no such file, or it says "max"
            continue
        figures = dict(line.split() for line in lines)
        # The operating system gives up cached pages of files when memory is short.
        return allowed - used + int(figures.get("inactive_file", 0))
    return math.inf
