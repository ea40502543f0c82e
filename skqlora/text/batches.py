"""Token ids to batches.

Knows nothing of texts, of labels or of models: a batch is an array of row numbers.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike

MEGABATCHES_MIN = 4  # an epoch is cut into at least so many megabatches, to keep batches random
MEGABATCH_SIZE_MAX = 50  # effective batches that are sorted by length together
CPU_TRAINING_TOKENS = 2048  # of a padded pass on a CPU: the fastest on two cores


class TokenizedTexts:
    """Texts as token ids, to be drawn in padded batches.

    Parameters
    ----------
    sequences : sequence of sequences of int, of length n_texts
        Token ids, at least one each.
    pad_id : int
        Any id will do: padding is masked, and never recognised by its id.

    Attributes
    ----------
    lengths : ndarray of shape (n_texts,)
        Tokens of each text.
    """

    def __init__(self, sequences: Sequence[ArrayLike], pad_id: int):
        self.sequences = [np.asarray(ids, dtype=np.int32) for ids in sequences]
        self.pad_id = pad_id
        self.lengths = np.array([len(ids) for ids in self.sequences])

    def __len__(self) -> int:
        return len(self.sequences)

    def take(self, rows: np.ndarray) -> "TokenizedTexts":
        """Select rows by number."""
        return TokenizedTexts([self.sequences[row] for row in rows], self.pad_id)

    def batch(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Stack the token ids of `rows`, padded to the longest of them.

        Always on the right, whatever the tokenizer's `padding_side`: models count positions from
        the first column, so padding on the left would shift every text.

        Parameters
        ----------
        rows : ndarray of shape (n_rows,), int

        Returns
        -------
        input_ids : torch.Tensor of shape (n_rows, n_tokens), int64
        attention_mask : torch.Tensor of shape (n_rows, n_tokens), int64
            1 for tokens, 0 for padding.
        """
        lengths = self.lengths[rows]
        mask = np.arange(lengths.max()) < lengths[:, None]
        input_ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        input_ids[mask] = np.concatenate([self.sequences[row] for row in rows])
        return torch.from_numpy(input_ids), torch.from_numpy(mask.astype(np.int64))


def training_batches(
    lengths: np.ndarray, batch_rows: int, rng: np.random.RandomState
) -> list[np.ndarray]:
    """Cut one epoch into batches of rows of similar length, in random order.

    The rows are shuffled, cut into megabatches, sorted by length within each, cut into batches,
    and the batches are shuffled. Rows of a batch come longest first.

    Parameters
    ----------
    lengths : ndarray of shape (n_rows,)
        Tokens of each row.
    batch_rows : int
        Rows of a batch, i.e. of one update of the weights.
    rng : numpy.random.RandomState

    Returns
    -------
    batches : list of ndarray of int
        Row numbers; each row is in one batch. One batch is smaller where `batch_rows` does not
        divide the number of rows.
    """
    n_batches = len(lengths) // (batch_rows * MEGABATCHES_MIN)
    megabatch_rows = batch_rows * int(np.clip(n_batches, 1, MEGABATCH_SIZE_MAX))
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), megabatch_rows):
        megabatch = order[start : start + megabatch_rows]
        megabatch = megabatch[np.argsort(-lengths[megabatch], kind="stable")]
        batches += [megabatch[i : i + batch_rows] for i in range(0, len(megabatch), batch_rows)]
    return [batches[i] for i in rng.permutation(len(batches))]


def largest_pass(batch_size: int, longest: int, *, on_cpu: bool) -> int:
    """Tell how many texts of the greatest length share a forward pass of a training.

    Parameters
    ----------
    batch_size : int
        The most that may.
    longest : int
        Tokens of each.
    on_cpu : bool
        On a CPU fewer long texts share a pass than may: that is faster.

    Returns
    -------
    n_texts : int
    """
    if on_cpu:
        return min(batch_size, max(1, CPU_TRAINING_TOKENS // longest))
    return batch_size


def cut_by_tokens(lengths: np.ndarray, max_tokens: int) -> Iterator[slice]:
    """Cut rows that come longest first into parts of at most `max_tokens` once padded.

    Parameters
    ----------
    lengths : ndarray of shape (n_rows,)
        Tokens of each row.
    max_tokens : int
        Greatest number of rows times columns of a part; a longer row is a part of its own.

    Yields
    ------
    part : slice
        Of the rows.
    """
    start = 0
    while start < len(lengths):
        stop = min(start + max(1, max_tokens // int(lengths[start])), len(lengths))
        yield slice(start, stop)
        start = stop


def rounded_up_length(length: int) -> int:
    """Round a number of tokens up by at most a sixteenth: few different ones, little padding."""
    step = 1 << max(0, length.bit_length() - 5)
    return -(-length // step) * step


def prediction_batches(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Cut rows into batches by length, longest first, as `cut_by_tokens` does.

    Parameters
    ----------
    lengths : ndarray of shape (n_rows,)
        Tokens of each row.
    max_tokens : int

    Yields
    ------
    rows : ndarray of int
        Row numbers.
    """
    order = np.argsort(-lengths, kind="stable")
    for part in cut_by_tokens(lengths[order], max_tokens):
        yield order[part]
