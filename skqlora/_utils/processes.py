"""What a process must know of others: the one that it was forked from, those on the same GPU.

Knows nothing of models.
"""

import os
import tempfile
import threading
import warnings
from pathlib import Path

import torch
from filelock import FileLock

_threaded_process: int | None = None  # the process that has computed on several threads
_gpu_locks: dict[str, FileLock] = {}  # held until the process ends, by the GPU's UUID
_lock = threading.Lock()


def check_not_forked() -> None:
    """Refuse to compute in a fork of a process that has computed on several threads.

    A fork copies none of the threads that the libraries' pools wait for, so it would hang.

    Raises
    ------
    RuntimeError
        If this process is such a fork.
    """
    global _threaded_process  # noqa: PLW0603 (a fact of the process)
    if _threaded_process not in (None, os.getpid()):
        raise RuntimeError(
            f"This process ({os.getpid()}) was forked from one ({_threaded_process}) in which a "
            "QLoRAClassifier had computed on several threads, which a fork does not copy: it would "
            "hang. Wanted: workers that start afresh. Take joblib's default backend 'loky' or "
            "'threading' instead of 'multiprocessing', or the 'spawn' or 'forkserver' context of "
            "multiprocessing."
        )
    # A thread of Python's own may hold a lock at the moment of the fork, which then never opens.
    in_thread = threading.current_thread() is not threading.main_thread()
    if in_thread or torch.get_num_threads() > 1:
        _threaded_process = os.getpid()


def warn_if_gpu_is_shared(device: torch.device) -> None:
    """Warn, at a process's first base on a GPU, of another process of this package on it.

    The first process holds a lock file of the GPU in the folder for temporary files until it ends.
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
            warnings.warn(
                f"Another process has loaded a base on {device} too: each holds one of its own, "
                "and they take turns at computing. Pass n_jobs=1, or take threads, which share one "
                "(joblib.parallel_config(backend='threading')), or give each worker a GPU of its "
                "own (CUDA_VISIBLE_DEVICES).",
                stacklevel=2,
            )
        except OSError:  # another user's file, or no folder to write to
            pass


def lock_of_machine(name: str) -> FileLock:
    """Make a lock that one process of this machine may hold: `acquire` raises TimeoutError."""
    path = Path(tempfile.gettempdir()) / f"skqlora-{name}.lock"
    return FileLock(path, timeout=0, thread_local=False)
