"""Texts to token ids, remembered."""

from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import tiny
import torch
from tokenizers import normalizers

from skqlora.tokenization import CachingTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer("encoder")


def tokenize(tokenizer, texts, max_length, vocab_size):
    return CachingTokenizer(tokenizer).tokenize(texts, max_length, vocab_size)


def test_long_text_loses_its_end_but_not_its_closing_token(tokenizer):
    text = "the cat is here " * 20
    whole = tokenizer(text)["input_ids"]
    (cut,) = tokenize(tokenizer, [text], max_length=10, vocab_size=1000).sequences
    assert cut.tolist() == [*whole[:9], whole[-1]]


def test_cut_equals_the_tokenizers_own_truncation(tokenizer):
    text = "I saw a horse and a bird " * 10
    (cut,) = tokenize(tokenizer, [text], max_length=17, vocab_size=1000).sequences
    assert cut.tolist() == tokenizer(text, truncation=True, max_length=17)["input_ids"]


def test_truncation_settings_of_the_tokenizer_do_not_matter(tmp_path):
    tokenizer = tiny.make_tokenizer("encoder")
    tokenizer.save_pretrained(tmp_path)
    reloaded = type(tokenizer).from_pretrained(tmp_path)
    reloaded.backend_tokenizer.enable_truncation(4)
    reloaded.backend_tokenizer.enable_padding(length=50)
    texts = ["the cat is here and the dog too", "a"]
    expected = tokenize(tokenizer, texts, 64, 1000).sequences
    for ours, theirs in zip(tokenize(reloaded, texts, 64, 1000).sequences, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_closing_token_is_kept_also_where_short_texts_are_normalized_away(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    strict = type(tokenizer).from_pretrained(tmp_path)
    strict.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    (cut,) = tokenize(strict, ["the cat is here " * 20], max_length=10, vocab_size=1000).sequences
    assert (len(cut), cut[-1]) == (10, strict.eos_token_id)


@pytest.mark.parametrize("style", ["encoder", "decoder"])
def test_empty_text_has_a_token(style):
    tokens = tokenize(tiny.make_tokenizer(style), ["", "cat"], max_length=10, vocab_size=1000)
    assert (tokens.lengths >= 1).all()


def test_max_length_without_room_for_a_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="max_length=2 but the tokenizer adds 2 special tokens"):
        tokenize(tokenizer, ["cat"], max_length=2, vocab_size=1000)


def test_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(ValueError, match="only 100 token embeddings"):
        tokenize(tokenizer, ["the cat is here"], max_length=10, vocab_size=100)


def counting(tokenizer, **options):
    """A caching tokenizer, and a mock of the one that it calls."""
    spy = Mock(wraps=tokenizer, is_fast=True)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(spy, name, getattr(tokenizer, name))
    return CachingTokenizer(spy, **options), spy


def n_encoded(spy):
    return sum(len(call.args[0]) for call in spy.call_args_list)


def test_a_text_is_tokenized_once(tokenizer, corpus):
    texts = sorted(set(corpus[0]))
    caching, spy = counting(tokenizer)
    first = caching.tokenize(texts[:20] * 2, 32, 1000)
    again = caching.tokenize(texts[10:], 32, 1000)
    assert n_encoded(spy) == len(texts)
    expected = tokenize(tokenizer, texts, 32, 1000).sequences
    for ours, theirs in zip(first.sequences[20:], expected[:20], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(again.sequences, expected[10:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_another_max_length_is_another_cut(tokenizer):
    caching, _ = counting(tokenizer)
    text = "the cat is here " * 10
    assert [caching.tokenize([text], n, 1000).lengths[0] for n in (10, 20, 10)] == [10, 20, 10]


def test_memory_is_bounded_and_the_text_used_longest_ago_goes_first(tokenizer):
    caching, spy = counting(tokenizer, max_bytes=1500)
    for text in ("one", "two", "three", "one", "four", "five", "one"):
        caching.tokenize([text], 32, 1000)
        assert caching._n_bytes <= 1500
    assert n_encoded(spy) == 5
    caching.tokenize(["two"], 32, 1000)
    assert n_encoded(spy) == 6


def test_a_pass_over_more_text_than_fits_pushes_nothing_out(tokenizer):
    caching, spy = counting(tokenizer, max_bytes=2000)
    caching.tokenize(["cat"], 32, 1000)
    caching.tokenize([f"number {i}" for i in range(100)], 32, 1000)
    caching.tokenize(["cat"], 32, 1000)
    assert n_encoded(spy) == 101


def test_threads_get_their_own_texts(tokenizer):
    caching, _ = counting(tokenizer, max_bytes=20_000)
    texts = [f"the {word} of number {i}" for i in range(60) for word in ("cat", "dog")]
    expected = tokenize(tokenizer, texts, 12, 1000).sequences
    rows = [np.random.RandomState(i).permutation(len(texts))[:40] for i in range(60)]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda r: caching.tokenize([texts[i] for i in r], 12, 1000), rows)
        for chosen, result in zip(rows, results, strict=True):
            for row, ids in zip(chosen, result.sequences, strict=True):
                np.testing.assert_array_equal(ids, expected[row])


def test_a_worker_with_one_thread_tokenizes_on_one(tokenizer, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    caching, spy = counting(tokenizer)
    caching.tokenize(["a cat", "a dog"], 32, 1000)
    assert [call.args[0] for call in spy.call_args_list] == [["a cat"], ["a dog"]]
