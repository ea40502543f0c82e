"""Batches of predictions: what happens when memory runs out, and what runs ahead."""

import threading

import numpy as np
import pytest
import torch
from helpers import make_backbone, make_model, random_tokens

from skqlora.model import prediction
from skqlora.model.prediction import one_ahead, predict_outputs
from skqlora.model.text_model import TextModel


def test_running_out_of_memory_computes_smaller_batches(encoder, monkeypatch):
    model, tokens = make_model(make_backbone(encoder)), random_tokens(40)
    expected = predict_outputs(model, tokens)
    forward, sizes = TextModel.forward, []

    def out_of_memory_above_nine(self, input_ids, attention_mask):
        sizes.append(len(input_ids))
        if len(input_ids) > 9:
            raise torch.OutOfMemoryError("injected")
        return forward(self, input_ids, attention_mask)

    monkeypatch.setattr(TextModel, "forward", out_of_memory_above_nine)
    np.testing.assert_allclose(predict_outputs(model, tokens), expected, atol=1e-5)
    assert sizes[:3] == [40, 20, 10]
    assert sum(size for size in sizes if size <= 9) == 40  # each text is computed once


def test_another_error_and_one_text_too_many_are_raised(encoder, monkeypatch):
    model = make_model(make_backbone(encoder))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(TextModel, "forward", fail)
    error = RuntimeError("injected")
    with pytest.raises(RuntimeError, match="injected"):
        predict_outputs(model, random_tokens(5))
    error = torch.OutOfMemoryError("injected")
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        predict_outputs(model, random_tokens(1))


def test_no_batch_has_more_tokens_than_the_limit(encoder, monkeypatch):
    model, tokens = make_model(make_backbone(encoder)), random_tokens(40)
    forward, shapes = TextModel.forward, []

    def noting(self, input_ids, attention_mask):
        shapes.append(input_ids.numel())
        return forward(self, input_ids, attention_mask)

    monkeypatch.setattr(TextModel, "forward", noting)
    monkeypatch.setattr(prediction, "TOKENS_ON_CPU", 64)
    predict_outputs(model, tokens)
    assert max(shapes) <= 64
    assert len(shapes) < 40


def test_one_ahead_computes_the_next_item_meanwhile():
    started = [threading.Event() for _ in range(4)]

    def square(number):
        started[number].set()
        return number**2

    found = []
    for number, result in enumerate(one_ahead(square, range(4))):
        assert all(event.wait(5) for event in started[: number + 2])
        assert not any(event.is_set() for event in started[number + 2 :])
        found.append(result)
    assert found == [0, 1, 4, 9]
    assert list(one_ahead(square, [])) == []


def test_one_ahead_raises_what_the_other_thread_raised():
    with pytest.raises(ZeroDivisionError):
        list(one_ahead(lambda number: 1 / number, [1, 0]))
