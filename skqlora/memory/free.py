"""How much memory is free, on a device or within a container's limit."""

import math
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")  # a container's limits, of version 2 and of version 1


def free_memory(device: torch.device, *, spread: bool = False) -> float:
    """Count the bytes that a training could still take on a device.

    Parameters
    ----------
    device : torch.device
    spread : bool, default=False
        Count all of its kind together.

    Returns
    -------
    n_bytes : float
    """
    if device.type == "cpu":
        import psutil

        return min(psutil.virtual_memory().available, _free_in_container())
    memory = getattr(torch, device.type)
    places = range(memory.device_count()) if spread else [device.index]
    # What torch has set aside and does not use is free too.
    return sum(
        memory.mem_get_info(i)[0] + memory.memory_reserved(i) - memory.memory_allocated(i)
        for i in places
    )


def _free_in_container() -> float:
    """Count the bytes up to a container's limit, which the operating system's figures leave out."""
    for limit, usage, statistics in [
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ]:
        try:
            allowed, used = (int((CGROUP / name).read_text()) for name in (limit, usage))
            lines = (CGROUP / statistics).read_text().splitlines()
        except (OSError, ValueError):  # no such file, or "max"
            continue
        figures = dict(line.split() for line in lines)
        # Pages of files are given up when memory is short.
        return allowed - used + int(figures.get("inactive_file", 0))
    return math.inf
