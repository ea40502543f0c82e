"""Where the time of an update goes: by kind of operation, with launches, waits and idle time."""

import time
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

# The kinds of operations, by parts of the names of torch's operators. The first that fits counts.
KINDS = {
    "dequantization": ("dequantize",),
    "attention": ("attention", "softmax", "bmm"),
    "optimizer": ("optimizer", "adam"),
    "products": ("mm", "gemm", "linear", "matmul"),
    "copies and casts": ("copy", "clone", "cat", "fill", "zero"),
    "norms": ("norm", "rsqrt", "mean", "pow"),
    "element by element": (
        *("mul", "add", "sub", "div", "neg", "sum", "sqrt", "clamp", "where", "masked", "sin"),
        *("cos", "gelu", "silu", "bernoulli", "index", "gather"),
    ),
}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def profile_work(work, device, rank):
    """Run a function under torch's profiler.

    Parameters
    ----------
    work : callable
        One update of a training.
    device : torch.device
    rank : int
        The rank of LoRA: products with a side of this length are counted as LoRA's.

    Returns
    -------
    figures : dict
        "seconds" and "calls" by kind of operation, "launches" and "waits" of the host, the
        wall-clock "wall_s", and "idle_s", in which no operation ran on the device.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    began = time.perf_counter()
    with profile(activities=activities, record_shapes=True) as profiler:
        work()
        if on_gpu:
            torch.cuda.synchronize()
    wall = time.perf_counter() - began
    seconds, calls, busy = defaultdict(float), defaultdict(int), 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        if not event.key.startswith(("aten::", "bitsandbytes::")):  # kernels are in their operator
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = kind_of(event.key, event.input_shapes, rank)
        seconds[kind] += spent / 1e6
        calls[kind] += event.count
        busy += spent / 1e6
    counts = {event.key: event.count for event in profiler.key_averages()}
    return {
        "seconds": dict(seconds),
        "calls": dict(calls),
        "launches": sum(n for key, n in counts.items() if "LaunchKernel" in key),
        "waits": sum(counts.get(name, 0) for name in WAITS),
        "wall_s": wall,
        "idle_s": max(0.0, wall - busy),
    }


def kind_of(name, shapes, rank):
    """Return the kind of an operator."""
    name = name.lower()
    kind = next((kind for kind, parts in KINDS.items() if any(p in name for p in parts)), "other")
    if kind == "products" and any(rank in shape for shape in shapes or []):
        return "products of LoRA"
    return kind


def print_profile(figures):
    """Print the profile of an update as a Markdown table."""
    wall = figures["wall_s"]
    print(f"\n{wall:.3f} s; {figures['launches']} launches, {figures['waits']} waits of the host\n")
    print("| kind | seconds | share | calls |\n|---|---|---|---|")
    rows = figures["seconds"] | {"idle, and what is not torch": figures["idle_s"]}
    for kind, seconds in sorted(rows.items(), key=lambda row: -row[1]):
        calls = figures["calls"].get(kind, "")
        print(f"| {kind} | {seconds:.4f} | {seconds / wall:.2f} | {calls} |")
