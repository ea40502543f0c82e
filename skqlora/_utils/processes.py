"""What a process must know about others: the one it was forked from, and those on the same GPU.

This module knows nothing about models.
"""

import os
import tempfile
import threading
from pathlib import Path

import joblib
import torch
from filelock import FileLock

from skqlora._utils.messages import warn

_threaded_process: int | None = None  # the id of the process that has computed on several threads
_gpu_locks: dict[str, FileLock] = {}  # held until the process ends, by the GPU's UUID
_lock = threading.Lock()
_warned_of_threads = False


def check_not_forked() -> None:
    """Refuse to compute in a fork of a process that has computed on several threads.

    A fork has none of the threads that the libraries' thread pools wait for, so it would hang.

    Raises
    ------
    RuntimeError
        If this process is such a fork.
    """
    global _threaded_process  # noqa: PLW0603 (a fact of the process)
    if _threaded_process not in (None, os.getpid()):
        raise RuntimeError(
            f"This process ({os.getpid()}) was forked from one ({_threaded_process}) in which a "
            "QLoRAClassifier had computed on several threads. A fork does not copy threads, so it "
            "would hang. Wanted: workers that start afresh. Take joblib's default backend 'loky' "
            "or 'threading' instead of 'multiprocessing', or the 'spawn' or 'forkserver' context "
            "of multiprocessing."
        )
    # A Python thread may hold a lock at the moment of the fork, which the fork can never release.
    in_thread = threading.current_thread() is not threading.main_thread()
    if in_thread or torch.get_num_threads() > 1:
        _threaded_process = os.getpid()


def warn_of_waiting_threads(device: torch.device) -> None:
    """Warn once if torch computes on a CPU with more threads than this process may use cores.

    torch takes a thread for each core of the machine, but a container may be limited to a few of
    them. Each short product then waits for a thread that waits for a core.
    """
    global _warned_of_threads  # noqa: PLW0603 (a fact of the process)
    if "LOKY_MAX_CPU_COUNT" in os.environ:  # joblib then counts what the user wants it to count
        return
    n_threads, n_cores = torch.get_num_threads(), joblib.cpu_count()
    if device.type != "cpu" or n_threads <= n_cores or _warned_of_threads:
        return
    _warned_of_threads = True
    warn(
        f"torch computes with {n_threads} threads, but this process may use {n_cores} cores. So "
        "threads wait for each other, and a fit may take many times as long. Call "
        f"torch.set_num_threads({n_cores}) first, or set the environment variable "
        f"OMP_NUM_THREADS={n_cores} before Python starts.",
        RuntimeWarning,
    )


def warn_if_gpu_is_shared(device: torch.device) -> None:
    """Warn when a process loads its first base on a GPU where another process has one.

    The first process holds a lock file for the GPU, in the folder for temporary files, until it
    ends.
    """
    if device.type == "cpu":
        return
    uuid = str(getattr(torch, device.type).get_device_properties(device).uuid)
    with _lock:
        if uuid in _gpu_locks:
            return
        _gpu_locks[uuid] = lock_of_machine(uuid)
        try:
            _gpu_locks[uuid].acquire()
        except TimeoutError:
            warn(
                f"Another process has loaded a base on {device} too. Each process holds its own, "
                "and they take turns at computing. Pass n_jobs=1, or take threads, which share one "
                "(joblib.parallel_config(backend='threading')), or give each worker a GPU of its "
                "own (CUDA_VISIBLE_DEVICES).",
            )
        except OSError:  # the file is another user's, or there is no folder to write to
            pass


def lock_of_machine(name: str) -> FileLock:
    """Make a lock for one process of this machine; for others `acquire` raises TimeoutError."""
    path = Path(tempfile.gettempdir()) / f"skqlora-{name}.lock"
    return FileLock(path, timeout=0, thread_local=False)
