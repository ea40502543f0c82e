"""One fit on several ranks of `torch.distributed`: who takes which rows, and what is summed up.

Knows nothing of models or optimizers. Without a process group there is one rank.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

_fit_lock = threading.Lock()


@dataclass(frozen=True)
class Ranks:
    """A process among those that train together.

    Attributes
    ----------
    rank, size : int
    """

    rank: int
    size: int

    @classmethod
    def current(cls) -> "Ranks":
        """Those of the default process group, or this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls(0, 1)

    def share(self, n_rows: int) -> np.ndarray:
        """Places in a batch of `n_rows` that this rank takes; none where there are too few.

        Every `size`-th, because a batch is sorted by length: each rank gets long and short rows.
        """
        return np.arange(self.rank, n_rows, self.size)

    @contextmanager
    def one_fit_at_a_time(self) -> Iterator[None]:
        """Refuse a second fit beside another of this rank: their sums would meet.

        Raises
        ------
        RuntimeError
            If another thread of this process is within it.
        """
        if self.size == 1:
            yield
            return
        if not _fit_lock.acquire(blocking=False):
            raise RuntimeError(
                "Two threads of one process of a torch.distributed group call fit at once, where "
                "each fit sums its gradients over all processes. Wanted: one fit after the other, "
                "e.g. n_jobs=1."
            )
        try:
            yield
        finally:
            _fit_lock.release()

    def sum_up(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by the sum over all ranks, the same bits on each: one all-reduce."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def agree(self, seed: int, *inputs: object) -> int:
        """Return the first rank's seed, once all ranks are found to have the same inputs.

        Parameters
        ----------
        seed : int
            This rank's.
        *inputs : object
            What is the same if it prints the same.

        Returns
        -------
        seed : int

        Raises
        ------
        ValueError
            If they differ: the ranks' updates would not belong together.
        """
        if self.size == 1:
            return seed
        digest = hashlib.sha256(repr(inputs).encode("utf-8")).hexdigest()
        answers: list[tuple[int, str]] = [(seed, digest)] * self.size
        dist.all_gather_object(answers, (seed, digest))
        different = [rank for rank, (_, theirs) in enumerate(answers) if theirs != answers[0][1]]
        if different:
            raise ValueError(
                f"The texts, labels or parameters of rank {different[0]} are not those of rank 0. "
                "Wanted: the same call of fit on each rank, with all texts in the same order; each "
                "then trains on its share of every batch."
            )
        return answers[0][0]
