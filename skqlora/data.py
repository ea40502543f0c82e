"""Texts to token ids to batches.

Knows nothing of labels, of models or of scikit-learn: a text is a ``str``, a batch an array of row
numbers.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

MEGABATCHES_MIN = 4  # an epoch is cut into at least so many megabatches, to keep batches random
MEGABATCH_SIZE_MAX = 50  # effective batches that are sorted by length together


@functools.lru_cache(maxsize=8)
def load_tokenizer(model: str, revision: str | None = None, files: tuple = ()) -> Any:
    """Load the tokenizer of a Hub model or a local folder.

    Parameters
    ----------
    model : str
        A Hub id or a local folder.
    revision : str, optional
        Branch, tag or commit on the Hub.
    files : tuple, default=()
        Of a local folder, so that a changed folder is read again.

    Returns
    -------
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    ValueError
        If there is no tokenizer that can be read without running code from the model's repository.
    """
    refusal = ValueError(
        f"model={model!r} has no tokenizer that can be loaded. Wanted: its tokenizer files "
        "(tokenizer.json, tokenizer_config.json) beside its config.json; "
        "`tokenizer.save_pretrained(folder)` writes them."
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:  # the libraries raise a dozen types here, KeyError and OSError too
        raise refusal from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up where there are no files
        raise refusal
    return tokenizer


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

    def __init__(self, sequences: Sequence[Sequence[int]], pad_id: int):
        self.sequences = [np.asarray(ids, dtype=np.int64) for ids in sequences]
        self.pad_id = pad_id
        self.lengths = np.array([len(ids) for ids in sequences])

    def __len__(self) -> int:
        return len(self.sequences)

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


def tokenize(tokenizer: Any, texts: list[str], max_length: int, vocab_size: int) -> TokenizedTexts:
    """Turn texts into token ids of at most `max_length`, special tokens included.

    Long texts lose their end, never the special tokens that close a sequence. The tokenizer's own
    truncation is not used: it is a setting of the shared object, and threads would overwrite each
    other's.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : list of str, of length n_texts
    max_length : int
        Greatest number of tokens of a text.
    vocab_size : int
        Number of tokens that the model knows.

    Returns
    -------
    tokens : TokenizedTexts
        An empty text becomes one begin- or end-of-text token where the tokenizer adds none.

    Raises
    ------
    ValueError
        If `max_length` leaves no room for a token of the text, or the tokenizer is not the
        model's.
    """
    n_special = tokenizer.num_special_tokens_to_add()
    if max_length <= n_special:
        raise ValueError(
            f"Got max_length={max_length} but the tokenizer adds {n_special} special tokens to "
            f"each text; pass at least {n_special + 1}."
        )
    encoding = tokenizer(
        texts,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_special_tokens_mask=True,
        verbose=False,
    )
    filler = [_first_known((tokenizer.bos_token_id, tokenizer.eos_token_id), vocab_size)]
    sequences = [
        _cut(ids, special, max_length) or filler
        for ids, special in zip(encoding["input_ids"], encoding["special_tokens_mask"], strict=True)
    ]
    greatest = max(max(ids) for ids in sequences)
    if greatest >= vocab_size:
        raise ValueError(
            f"The tokenizer gave the token id {greatest} but the model has only {vocab_size} token "
            "embeddings. Wanted: the tokenizer that belongs to the model, in its folder."
        )
    pad_id = _first_known((tokenizer.pad_token_id, tokenizer.eos_token_id), vocab_size)
    return TokenizedTexts(sequences, pad_id)


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


def prediction_batches(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Cut rows into batches by length, longest first, each of at most `max_tokens` once padded.

    Parameters
    ----------
    lengths : ndarray of shape (n_rows,)
        Tokens of each row.
    max_tokens : int
        Greatest number of rows times columns of a batch; a longer row is a batch of its own.

    Yields
    ------
    rows : ndarray of int
        Row numbers.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + max(1, max_tokens // int(lengths[order[start]]))
        yield order[start:stop]
        start = stop


def _cut(ids: list[int], special: list[int], max_length: int) -> list[int]:
    """Take tokens out of a long row's end, but for the special ones that close it."""
    if len(ids) <= max_length:
        return ids
    n_closing = next((i for i, is_special in enumerate(reversed(special)) if not is_special), 0)
    return ids[: max_length - n_closing] + ids[len(ids) - n_closing :]


def _first_known(candidates: Iterable[int | None], vocab_size: int) -> int:
    return next((token for token in candidates if token is not None and token < vocab_size), 0)
