"""Token ids to batches."""

import numpy as np

from skqlora.text.batches import TokenizedTexts, prediction_batches, training_batches


def test_batch_is_padded_on_the_right_to_its_longest_row():
    tokens = TokenizedTexts([[5, 6], [7], [8, 9, 10, 11]], pad_id=3)
    inputs = tokens.batch(np.array([1, 0]))
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].tolist() == [[7, 3], [5, 6]]
    assert inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]


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
