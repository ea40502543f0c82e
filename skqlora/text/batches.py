"""The way from token ids to batches.

This module knows nothing about texts, labels or models: a batch is an array of row numbers.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike

MEGABATCHES_MIN = 4  # an epoch has at least this many megabatches, to keep the batches random
INPUTS = "input_ids", "token_type_ids"  # the rows of a sequence, by their names in a model
# The most effective batches that are sorted by length together.
MEGABATCH_SIZE_MAX = 50


class TokenizedTexts:
    """Texts as token ids, which are drawn in padded batches.

    Parameters
    ----------
    sequences : sequence of sequences of int, of length n_texts
        The token ids of each text, at least one each; or an array of shape (2, n_tokens) with
        token ids and token types, for texts of two parts.
    pad_id : int
        The id for padding. Any id will do, since padding is masked and never recognised by its id.

    Attributes
    ----------
    lengths : ndarray of shape (n_texts,)
        The number of tokens of each text.
    """

    def __init__(self, sequences: Sequence[ArrayLike], pad_id: int):
        self.sequences = [np.asarray(ids, dtype=np.int32) for ids in sequences]
        self.pad_id = pad_id
        self.lengths = np.array([ids.shape[-1] for ids in self.sequences])

    def __len__(self) -> int:
        return len(self.sequences)

    def take(self, rows: np.ndarray) -> "TokenizedTexts":
        """Select rows by number."""
        return TokenizedTexts([self.sequences[row] for row in rows], self.pad_id)

    def batch(self, rows: np.ndarray, n_tokens: int | None = None) -> dict[str, torch.Tensor]:
        """Stack the tokens of `rows`, padded to the longest of them or to `n_tokens`.

        The padding is always on the right, whatever the tokenizer's `padding_side` is. Models count
        positions from the first column, so padding on the left would shift every text.

        Parameters
        ----------
        rows : ndarray of shape (n_rows,), int

        Returns
        -------
        inputs : dict of str to torch.Tensor of shape (n_rows, n_tokens), int64
            The arguments of a model: `input_ids`, the `attention_mask`, which is 1 for tokens and 0
            for padding, and `token_type_ids` if there are token types.
        """
        lengths = self.lengths[rows]
        mask = np.arange(n_tokens or lengths.max()) < lengths[:, None]
        tokens = np.concatenate([np.atleast_2d(self.sequences[row]) for row in rows], axis=1)
        arrays = {"attention_mask": mask.astype(np.int64)}
        # The padding of token types is 0, as Transformers' tokenizers do it.
        for name, values, padding in zip(INPUTS, tokens, (self.pad_id, 0), strict=False):
            arrays[name] = np.full(mask.shape, padding, dtype=np.int64)
            arrays[name][mask] = values
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def training_batches(
    lengths: np.ndarray, batch_rows: int, rng: np.random.RandomState
) -> list[np.ndarray]:
    """Cut one epoch into batches of rows of similar length, in random order.

    The rows are shuffled and cut into megabatches. The rows of each megabatch are sorted by length
    and cut into batches, and the batches are shuffled. The rows of a batch come longest first.

    Parameters
    ----------
    lengths : ndarray of shape (n_rows,)
        The number of tokens of each row.
    batch_rows : int
        The number of rows in a batch, i.e. in one update of the weights.
    rng : numpy.random.RandomState

    Returns
    -------
    batches : list of ndarray of int
        The row numbers of each batch. Each row is in one batch. One batch is smaller if
        `batch_rows` does not divide the number of rows.
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


def cut_by_tokens(lengths: np.ndarray, max_tokens: int) -> Iterator[slice]:
    """Cut rows that come longest first into parts of at most `max_tokens` once padded.

    Parameters
    ----------
    lengths : ndarray of shape (n_rows,)
        The number of tokens of each row.
    max_tokens : int
        The greatest number of rows times columns of a part. A longer row is a part of its own.

    Yields
    ------
    part : slice
        A slice of the rows.
    """
    start = 0
    while start < len(lengths):
        stop = min(start + max(1, max_tokens // int(lengths[start])), len(lengths))
        yield slice(start, stop)
        start = stop


def rounded_up_length(length: int) -> int:
    """Round a number of tokens up by at most a sixteenth, for few lengths and little padding."""
    step = 1 << max(0, length.bit_length() - 5)
    return -(-length // step) * step


def prediction_batches(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Sort rows by length, longest first, and cut them into batches as `cut_by_tokens` does.

    Parameters
    ----------
    lengths : ndarray of shape (n_rows,)
        The number of tokens of each row.
    max_tokens : int

    Yields
    ------
    rows : ndarray of int
        The row numbers of a batch.
    """
    order = np.argsort(-lengths, kind="stable")
    for part in cut_by_tokens(lengths[order], max_tokens):
        yield order[part]
