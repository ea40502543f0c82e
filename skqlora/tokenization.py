"""Texts to token ids, remembered for the folds and candidates of a search.

Knows nothing of labels, of models or of scikit-learn: a text is a ``str``.
"""

import functools
import hashlib
import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from skqlora.data import TokenizedTexts
from skqlora.quiet import muted

PROBES = (
    "",
    "The quick brown FOX can't jump over 1,234.56 lazy dogs: it's 7am!",
    "  two  spaces,\ttabs\r\nand lines ",
    "na\u00efve caf\u00e9 cafe\u0301 \u00df \u0130 \u0416\u0443\u043a \u05e9\u05dc\u05d5\u05dd",
    "\u4f60\u597d\u4e16\u754c \u3053\u3093 \ud55c\uad6d \u0645\u0631\u062d\u0628\u0627",
    "x_1 = f(a)[0] # \U0001f600 https://example.org/?q=1&r=2",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
)  # letters, numbers, spaces, accents composed and not, scripts, code, an emoji
CACHE_BYTES = 64_000_000  # of remembered texts and ids, for each tokenizer


@functools.lru_cache(maxsize=4)
def load_tokenizer(
    model: str, revision: str | None = None, files: tuple = ()
) -> "CachingTokenizer":
    """Load the tokenizer of a Hub model or a local folder, once a process.

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
    tokenizer : CachingTokenizer

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
        with muted():
            tokenizer = AutoTokenizer.from_pretrained(
                model, revision=revision, trust_remote_code=False
            )
    except Exception as error:  # the libraries raise a dozen types here, KeyError and OSError too
        raise refusal from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up where there are no files
        raise refusal
    return CachingTokenizer(tokenizer)


class CachingTokenizer:
    """A tokenizer for any number of threads that remembers the texts it has seen.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Its own truncation and padding are turned off for good: they are settings of the object,
        which threads would overwrite for each other.
    max_bytes : int
        Of what is remembered. The texts used longest ago go first.
    """

    def __init__(self, tokenizer: Any, max_bytes: int = CACHE_BYTES):
        self._tokenizer = tokenizer
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        self._max_bytes = max_bytes
        self._remembered: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()
        self._n_bytes = 0
        self._lock = threading.Lock()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary and of what some texts in many scripts become.

        Of what the tokenizer does and not of its files, which other versions write otherwise.
        """
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        ids = [self._tokenizer(text, truncation=False)["input_ids"] for text in PROBES]
        return hashlib.sha256(json.dumps([vocabulary, ids]).encode()).hexdigest()

    @property
    def max_length(self) -> int:
        """Greatest number of tokens that the tokenizer's files allow, special tokens included."""
        return self._tokenizer.model_max_length

    def tokenize(self, texts: list[str], max_length: int, vocab_size: int) -> TokenizedTexts:
        """Turn texts into token ids of at most `max_length`, special tokens included.

        Long texts lose their end, never the special tokens that close a sequence.

        Parameters
        ----------
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
        n_special = self._tokenizer.num_special_tokens_to_add()
        if max_length <= n_special:
            raise ValueError(
                f"Got max_length={max_length} but the tokenizer adds {n_special} special tokens to "
                f"each text; pass at least {n_special + 1}."
            )
        known = self._recall(texts, max_length)
        unknown = list(dict.fromkeys(text for text in texts if text not in known))
        if unknown:
            new = dict(zip(unknown, self._encode(unknown, max_length, vocab_size), strict=True))
            self._remember(new, max_length)
            known |= new
        pad_id = self._first_known(("pad_token_id", "eos_token_id"), vocab_size)
        return TokenizedTexts([known[text] for text in texts], pad_id)

    def _recall(self, texts: Iterable[str], max_length: int) -> dict[str, np.ndarray]:
        known = {}
        with self._lock:
            for text in texts:
                ids = self._remembered.get((max_length, text))
                if ids is not None:
                    self._remembered.move_to_end((max_length, text))
                    known[text] = ids
        return known

    def _remember(self, new: dict[str, np.ndarray], max_length: int) -> None:
        if sum(map(_size, new, new.values())) > self._max_bytes:
            return  # a pass over so much text would only push out what will be wanted again
        with self._lock:
            for text, ids in new.items():
                if (max_length, text) not in self._remembered:  # by another thread, meanwhile
                    self._remembered[max_length, text] = ids
                    self._n_bytes += _size(text, ids)
            while self._n_bytes > self._max_bytes:
                (_, text), ids = self._remembered.popitem(last=False)
                self._n_bytes -= _size(text, ids)

    def _encode(self, texts: list[str], max_length: int, vocab_size: int) -> list[np.ndarray]:
        # A batch is spread over all cores, which the one thread that a worker process was given
        # forbids.
        batches = [texts] if torch.get_num_threads() > 1 else [[text] for text in texts]
        filler = [self._first_known(("bos_token_id", "eos_token_id"), vocab_size)]
        sequences = []
        for batch in batches:
            encoding = self._tokenizer(
                batch,
                truncation=False,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_special_tokens_mask=True,
                verbose=False,
            )
            sequences += [
                np.array(_cut(ids, special, max_length) or filler, dtype=np.int32)
                for ids, special in zip(
                    encoding["input_ids"], encoding["special_tokens_mask"], strict=True
                )
            ]
        greatest = max(int(ids.max()) for ids in sequences)
        if greatest >= vocab_size:
            raise ValueError(
                f"The tokenizer gave the token id {greatest} but the model has only {vocab_size} "
                "token embeddings. Wanted: the tokenizer that belongs to the model, in its folder."
            )
        return sequences

    def _first_known(self, names: Iterable[str], vocab_size: int) -> int:
        ids = (getattr(self._tokenizer, name) for name in names)
        return next((token for token in ids if token is not None and token < vocab_size), 0)


def _size(text: str, ids: np.ndarray) -> int:
    """Bytes that a remembered text takes, its place in the table included."""
    return sys.getsizeof(text) + sys.getsizeof(ids) + 200


def _cut(ids: list[int], special: list[int], max_length: int) -> list[int]:
    """Take tokens out of a long row's end, but for the special ones that close it."""
    if len(ids) <= max_length:
        return ids
    n_closing = next((i for i, is_special in enumerate(reversed(special)) if not is_special), 0)
    return ids[: max_length - n_closing] + ids[len(ids) - n_closing :]
