"""The rules behind "auto"."""

import numpy as np
import pytest
from helpers import make_classifier, make_settings

from skqlora.settings import recipe
from skqlora.settings.recipe import AUTO_EPOCHS, AUTO_UPDATES, auto_epochs


@pytest.mark.parametrize("n_texts", [1, 16, 17, 100, 1000, 1601, 5000, 10**6])
@pytest.mark.parametrize("batch_rows", [1, 16, 64])
def test_epochs_are_as_many_as_give_enough_updates(n_texts, batch_rows):
    fewest, most = AUTO_EPOCHS
    n_epochs = auto_epochs(n_texts, batch_rows)
    updates = -(-n_texts // batch_rows)
    assert fewest <= n_epochs <= most
    assert n_epochs == most or n_epochs * updates >= AUTO_UPDATES
    assert n_epochs == fewest or (n_epochs - 1) * updates < AUTO_UPDATES


def test_auto_trains_few_texts_longer(encoder, corpus, monkeypatch):
    monkeypatch.setattr(recipe, "AUTO_UPDATES", 12)
    monkeypatch.setattr(recipe, "AUTO_EPOCHS", (2, 6))
    texts, labels = corpus

    def n_epochs(n_texts, **params):
        clf = make_classifier(encoder, num_train_epochs="auto", **params)
        clf.fit(texts[:n_texts], labels[:n_texts])
        assert len(clf.loss_curve_) == clf.n_iter_
        return clf.n_iter_

    assert n_epochs(48) == 4  # of 3 updates
    assert n_epochs(32) == 6
    assert n_epochs(48, batch_size=2) == 2
    assert n_epochs(48, batch_size=2, gradient_accumulation_steps=8) == 4


def test_auto_is_the_number_of_epochs_and_nothing_else(encoder, corpus):
    auto = make_classifier(encoder, num_train_epochs="auto").fit(*corpus)
    counted = make_classifier(encoder, num_train_epochs=auto.n_iter_).fit(*corpus)
    texts = corpus[0]
    np.testing.assert_array_equal(auto.predict_proba(texts), counted.predict_proba(texts))


@pytest.mark.parametrize(
    ("params", "rate", "head_rate"),
    [
        ({}, 2.5e-4, 2.5e-3),
        ({"learning_rate": 1e-3}, 1e-3, 1e-2),
        ({"head_learning_rate": 1e-3}, 2.5e-4, 1e-3),
        ({"init_head_weights": "probe"}, 2.5e-4, 2.5e-3),
        ({"init_head_weights": "class_names"}, 2.5e-4, 2.5e-4),
    ],
)
def test_rates_that_are_left_open(params, rate, head_rate):
    rates = {"learning_rate": "auto", "head_learning_rate": "auto"} | params
    settings = make_settings(model_type="llama", hidden_size=2000, **rates)
    assert settings.learning_rate == pytest.approx(rate)
    assert settings.head_learning_rate == pytest.approx(head_rate)
