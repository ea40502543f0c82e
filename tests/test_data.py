"""Texts to token ids to batches."""

import numpy as np
import pytest
import tiny
from tokenizers import normalizers

from skqlora.data import TokenizedTexts, prediction_batches, tokenize, training_batches


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer("encoder")


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


def test_batch_is_padded_on_the_right_to_its_longest_row():
    tokens = TokenizedTexts([[5, 6], [7], [8, 9, 10, 11]], pad_id=3)
    input_ids, mask = tokens.batch(np.array([1, 0]))
    assert input_ids.tolist() == [[7, 3], [5, 6]]
    assert mask.tolist() == [[1, 0], [1, 1]]


def test_training_batches_hold_each_row_once_and_rows_of_like_length():
    lengths = np.random.RandomState(0).randint(1, 200, size=1003)
    batches = training_batches(lengths, 16, np.random.RandomState(1))
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(1003))
    assert sorted(len(batch) for batch in batches)[:2] == [1003 % 16, 16]
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    unsorted = sum(16 * lengths[i : i + 16].max() for i in range(0, 1003, 16))
    assert padded < 1.15 * lengths.sum() < unsorted


def test_training_batches_differ_between_epochs_and_follow_the_seed():
    lengths = np.full(64, 7)
    rng = np.random.RandomState(0)
    first, second = (np.concatenate(training_batches(lengths, 8, rng)) for _ in range(2))
    again = np.concatenate(training_batches(lengths, 8, np.random.RandomState(0)))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, again)


def test_prediction_batches_keep_to_the_token_budget():
    lengths = np.random.RandomState(0).randint(1, 60, size=200)
    lengths[7] = 500  # longer than the budget: a batch of its own
    batches = list(prediction_batches(lengths, max_tokens=256))
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(200))
    assert batches[0].tolist() == [7]
    assert all(len(rows) * lengths[rows].max() <= 256 for rows in batches[1:])
