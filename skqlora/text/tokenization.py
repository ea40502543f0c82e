"""The way from texts to token ids, which are remembered for the folds and candidates of a search.

This module knows nothing about labels, models or scikit-learn. A row is a ``str``, or a tuple of
them for the columns of a table.
"""

import functools
import hashlib
import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.utils.hub import cached_files

from skqlora._utils.caches import registered_lru_cache
from skqlora._utils.hub import plain_reason
from skqlora._utils.libraries import muted
from skqlora.settings.adapter_settings import TextSettings
from skqlora.text.batches import TokenizedTexts
from skqlora.text.cutting import Cuts, Encoded, fit_into
from skqlora.text.encoding import Encoding, Row, RowEncoder

FINGERPRINTED_TEXTS = (
    "",
    "The quick brown FOX can't jump over 1,234.56 lazy dogs: it's 7am!",
    "  two  spaces,\ttabs\r\nand lines ",
    "na\u00efve caf\u00e9 cafe\u0301 \u00df \u0130 \u0416\u0443\u043a \u05e9\u05dc\u05d5\u05dd",
    "\u4f60\u597d\u4e16\u754c \u3053\u3093 \ud55c\uad6d \u0645\u0631\u062d\u0628\u0627",
    "x_1 = f(a)[0] # \U0001f600 https://example.org/?q=1&r=2",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
)  # letters, numbers, spaces, accents composed and not, scripts, code, an emoji
# The files that a tokenizer is made of, of which there is one at least.
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer.model",
    "bpe.codes",
    "byte_maps.json",
    "prophetnet.tokenizer",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "vocab.json",
    "vocab.txt",
]
CACHE_BYTES = 64_000_000  # the most that each tokenizer uses for remembered texts and ids


@registered_lru_cache(maxsize=4)
def load_tokenizer(
    model: str, revision: str | None = None, files: tuple = ()
) -> "CachingTokenizer":
    """Load the tokenizer of a Hub model or a local folder, once per process.

    Parameters
    ----------
    model : str
        The id of a model on the Hub, or a local folder.
    revision : str, optional
        The branch, tag or commit on the Hub.
    files : tuple, default=()
        The files of a local folder, so that a changed folder is read again.

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
        "(tokenizer.json, tokenizer_config.json) next to its config.json; "
        "`tokenizer.save_pretrained(folder)` writes them."
    )
    try:
        with muted():
            tokenizer = AutoTokenizer.from_pretrained(
                model, revision=revision, trust_remote_code=False
            )
    except Exception as error:  # the libraries raise a dozen types, among them KeyError and OSError
        reason = plain_reason(error, model, revision)
        if reason is None and not _has_tokenizer_files(model, revision):
            raise refusal from error
        reason = reason or " ".join((str(error) or type(error).__name__).split())[:200]
        raise ValueError(f"{refusal} ({reason})") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # it is made up, as there are no files
        raise refusal
    return CachingTokenizer(tokenizer)


def _has_tokenizer_files(model: str, revision: str | None) -> bool:
    found = cached_files(
        model, TOKENIZER_FILES, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return bool(found)


def check_tokenizer(tokenizer: "CachingTokenizer", model: str, fingerprint: str) -> None:
    """Check that a tokenizer is the one that an adapter was trained with.

    Parameters
    ----------
    tokenizer : CachingTokenizer
    model : str
        The `model` that the user passed.
    fingerprint : str
        The fingerprint of the tokenizer that the adapter was trained with.

    Raises
    ------
    ValueError
        If the tokenizer is another one.
    """
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"The tokenizer of model={model!r} (fingerprint {tokenizer.fingerprint[:12]}) is "
            f"not the one that was fitted with (fingerprint {fingerprint[:12]}). "
            "Put the tokenizer's files back into the base's folder, or call `fit` with "
            "warm_start=False."
        )


class CachingTokenizer:
    """A tokenizer that any number of threads may use and that remembers the texts it has seen.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The tokenizer to wrap. Its own truncation and padding are turned off for good, because they
        are settings of the object, which threads would overwrite for each other.
    max_bytes : int
        The most that the remembered texts may take. The texts used longest ago are forgotten first.
    """

    def __init__(self, tokenizer: Any, max_bytes: int = CACHE_BYTES):
        self._tokenizer = tokenizer
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        self._encoder = RowEncoder(tokenizer)
        self._max_bytes = max_bytes
        self._remembered: OrderedDict[tuple[TextSettings, Row], Encoded] = OrderedDict()
        self._n_bytes = 0
        self._lock = threading.Lock()

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the vocabulary and of the ids of some texts in many scripts.

        It depends on what the tokenizer does and not on its files, because other versions of the
        libraries write these differently.
        """
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        ids = [self._tokenizer(text, truncation=False)["input_ids"] for text in FINGERPRINTED_TEXTS]
        return hashlib.sha256(json.dumps([vocabulary, ids]).encode()).hexdigest()

    @property
    def gives_token_type_ids(self) -> bool:
        """Whether it says of which of two texts a token is."""
        return "token_type_ids" in self._tokenizer.model_input_names

    @property
    def separates_pairs(self) -> bool:
        """Whether it puts a special token between two texts."""
        count = self._tokenizer.num_special_tokens_to_add
        return count(pair=True) > count()

    @property
    def max_length(self) -> int:
        """The greatest number of tokens, with special ones, that the tokenizer's files allow."""
        return self._tokenizer.model_max_length

    def ids_of_word(self, word: str) -> list[int]:
        """Turn a word into the ids that it would have after a text, without special tokens."""
        both = (
            self._encoder.plain_tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (" " + word, word)
        )
        return min(both, key=len)  # some tokenizers put a space before the word themselves

    def tokenize(
        self,
        texts: Sequence[Row],
        settings: TextSettings,
        vocab_size: int,
        cuts: Cuts | None = None,
    ) -> tuple[TokenizedTexts, np.ndarray]:
        """Turn texts into token ids without ever cutting special ones or those of a prompt.

        Parameters
        ----------
        texts : sequence of str or of tuple of str, of length n_texts
            The texts of the rows, or the texts for the fields of the prompt; or pairs of texts,
            which are encoded as the tokenizer does it, if there is no prompt.
        settings : TextSettings
        vocab_size : int
            The number of tokens that the model knows.
        cuts : Cuts, optional
            Where the texts that are cut are counted.

        Returns
        -------
        tokens : TokenizedTexts
            The windows of all texts in turn. An empty text becomes one begin- or end-of-text token
            if the tokenizer adds none.
        counts : ndarray of int, of shape (n_texts,)
            The number of windows of each text, which is above 1 only for long texts and with
            truncation "windows".

        Raises
        ------
        ValueError
            If `max_length` leaves no room for a token of the text or too little for `stride`, or if
            the tokenizer is not the model's or is too simple for a prompt or a pair.
        """
        self._check_max_length(texts[0], settings)
        known = self._recall(texts, settings)
        unknown = list(dict.fromkeys(text for text in texts if text not in known))
        if unknown:
            new = dict(zip(unknown, self._encode(unknown, settings, vocab_size), strict=True))
            self._remember(new, settings)
            known |= new
        encoded = [known[text] for text in texts]
        if cuts is not None:
            cuts.add(encoded)
        pad_id = self._first_known(("pad_token_id", "eos_token_id"), vocab_size)
        windows = [ids for text in encoded for ids in text.windows]
        counts = np.array([len(text.windows) for text in encoded])
        return TokenizedTexts(windows, pad_id), counts

    def _check_max_length(self, row: Row, settings: TextSettings) -> None:
        """Refuse a `max_length` without room for text next to special tokens and the prompt."""
        n_kept, what = self._encoder.count_kept(row, settings)
        if settings.max_length <= n_kept:
            raise ValueError(
                f"Got max_length={settings.max_length} but {what}; pass at least {n_kept + 1}."
            )
        room = settings.max_length - n_kept
        if settings.truncation == "windows" and settings.stride > room // 2:
            raise ValueError(
                f"Got stride={settings.stride} but a window of max_length={settings.max_length} "
                f"holds {room} tokens of the text. Wanted: at most half as many, {room // 2}; or "
                "pass a greater max_length."
            )

    def _recall(self, texts: Iterable[Row], settings: TextSettings) -> dict[Row, Encoded]:
        known = {}
        with self._lock:
            for text in texts:
                encoded = self._remembered.get((settings, text))
                if encoded is not None:
                    self._remembered.move_to_end((settings, text))
                    known[text] = encoded
        return known

    def _remember(self, new: dict[Row, Encoded], settings: TextSettings) -> None:
        if sum(map(_size, new, new.values())) > self._max_bytes:
            return  # so much text would only push out texts that will be needed again
        with self._lock:
            for text, encoded in new.items():
                if (settings, text) not in self._remembered:  # another thread may have added it
                    self._remembered[settings, text] = encoded
                    self._n_bytes += _size(text, encoded)
            while self._n_bytes > self._max_bytes:
                (_, text), encoded = self._remembered.popitem(last=False)
                self._n_bytes -= _size(text, encoded)

    def _encode(self, texts: list[Row], settings: TextSettings, vocab_size: int) -> list[Encoded]:
        # The tokenizer spreads a batch over all cores. A worker process that was given one thread
        # must not use them, so it tokenizes its texts one by one.
        batches = [texts] if torch.get_num_threads() > 1 else [[text] for text in texts]
        encoded = [
            fit_into(encoding, settings, row)
            if len(encoding.part_of)
            else self._filler(encoding, vocab_size)
            for batch in batches
            for row, encoding in zip(batch, self._encoder.encode(batch, settings), strict=True)
        ]
        greatest = max(int(ids.max()) for text in encoded for ids in text.windows)
        if greatest >= vocab_size:
            raise ValueError(
                f"The tokenizer gave the token id {greatest} but the model has only {vocab_size} "
                "token embeddings. Wanted: the tokenizer that belongs to the model, in its folder."
            )
        return encoded

    def _filler(self, encoding: Encoding, vocab_size: int) -> Encoded:
        """Return a token for a row of which a tokenizer makes none."""
        filler = np.zeros((*encoding.ids.shape[:-1], 1), dtype=np.int32)
        filler.flat[0] = self._first_known(("bos_token_id", "eos_token_id"), vocab_size)
        return Encoded((filler,))

    def _first_known(self, names: Iterable[str], vocab_size: int) -> int:
        ids = (getattr(self._tokenizer, name) for name in names)
        return next((token for token in ids if token is not None and token < vocab_size), 0)


def _size(text: Row, encoded: Encoded) -> int:
    """Count the bytes that a remembered text takes, including its place in the table."""
    parts = () if isinstance(text, str) else text
    return sum(map(sys.getsizeof, (text, *parts, *encoded.windows))) + 300
