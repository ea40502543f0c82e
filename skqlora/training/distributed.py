"""A fit on several ranks of `torch.distributed`, which share the rows and sum up their results.

This module knows nothing of models or optimizers. Without a process group there is one rank.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
        The number of this process, from 0 on, and the number of all processes.
    """

    rank: int
    size: int

    @classmethod
    def current(cls) -> "Ranks":
        """Return the rank of this process and the number of ranks, 1 without a process group."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls(0, 1)

    def share(self, n_rows: int) -> np.ndarray:
        """Return the places in a batch of `n_rows` rows that this rank takes, if there are any.

        It takes every `size`-th place. A batch is sorted by length, so each rank gets both long and
        short rows.
        """
        return np.arange(self.rank, n_rows, self.size)

    @contextmanager
    def one_fit_at_a_time(self) -> Iterator["Ranks"]:
        """Refuse a second fit of this rank at the same time, since their sums would mix.

        Yields
        ------
        ranks : Ranks
            This object itself.

        Raises
        ------
        RuntimeError
            If another thread of this process is within this context.
        """
        if self.size == 1:
            yield self
            return
        if not _fit_lock.acquire(blocking=False):
            raise RuntimeError(
                "Two threads of one process of a torch.distributed group call fit at once, where "
                "each fit sums its gradients over all processes. Wanted: one fit after the other, "
                "e.g. n_jobs=1."
            )
        try:
            yield self
        finally:
            _fit_lock.release()

    def sum_up(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over all ranks, the same bits on each, in one all-reduce."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def from_first(self, value: Any) -> Any:
        """Return the first rank's value on every rank, for what is decided once for all ranks."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def call_on_first(self, function: Callable[[], Any]) -> Any:
        """Call a function on the first rank; return its value, or raise its error, on every rank.

        An error on one rank alone would leave the others waiting.
        """
        outcome: tuple[Any, Exception | None] = None, None
        if self.rank == 0:
            try:
                outcome = function(), None
            except Exception as error:
                outcome = None, error
        value, error = self.from_first(outcome)
        if error is not None:
            raise error
        return value

    def check_same_inputs(self, inputs: Callable[[], object]) -> None:
        """Refuse to train on ranks that were given different inputs.

        Parameters
        ----------
        inputs : callable
            A function that returns the inputs, which are the same if they print the same. It is
            called only if there are several ranks.

        Raises
        ------
        ValueError
            If the inputs differ, so that the updates of the ranks would not belong together.
        """
        if self.size == 1:
            return
        digest = hashlib.sha256(repr(inputs()).encode("utf-8")).hexdigest()
        digests = [digest] * self.size
        dist.all_gather_object(digests, digest)
        different = [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]
        if different:
            raise ValueError(
                f"The texts, labels, weights or parameters of rank {different[0]} are not those of "
                "rank 0. Wanted: the same call of fit on each rank, with all texts in the same "
                "order; each then trains on its share of every batch."
            )
