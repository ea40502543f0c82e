"""Early stopping: scores on held-out texts, and the best adapter kept."""

import numpy as np
import pytest
from helpers import assert_equal_adapters, make_classifier

from skqlora.text.columns import read_table
from skqlora.text.inputs import CheckedTexts, check_labelled_texts
from skqlora.training.early_stopping import hold_out


@pytest.mark.parametrize("scoring", [None, "loss", "f1_macro", lambda est, X, y: est.score(X, y)])
def test_scores_of_every_kind(encoder, corpus, scoring):
    texts, labels = corpus
    clf = make_classifier(
        encoder, early_stopping=True, scoring=scoring, num_train_epochs=6, validation_fraction=0.25
    )
    clf.fit(texts, labels)
    scores = clf.validation_scores_
    assert len(scores) == len(clf.loss_curve_) == clf.n_iter_ <= 6
    assert clf.best_validation_score_ == max(scores)


def test_early_stopping_stops_and_restores(encoder, corpus):
    texts, labels = corpus
    given = iter([0.0, 0.1, 0.5, 0.4, 0.3, 0.9])  # the first is of the start
    settings = {"early_stopping": True, "num_train_epochs": 5, "n_iter_no_change": 2}
    clf = make_classifier(encoder, scoring=lambda est, X, y: next(given), **settings)
    clf.fit(texts, labels, X_val=texts[:9], y_val=labels[:9])
    assert clf.validation_scores_ == [0.1, 0.5, 0.4, 0.3]
    assert clf.n_iter_ == 4
    # The adapter of the second epoch: that of a fit which stopped there.
    given = iter([0.0, 0.1, 0.5])
    settings |= {"n_iter_no_change": 1, "tol": 1.0}
    second = make_classifier(encoder, scoring=lambda est, X, y: next(given), **settings)
    second.fit(texts, labels, X_val=texts[:9], y_val=labels[:9])
    assert second.n_iter_ == 2
    assert_equal_adapters(clf, second)


def test_of_equal_scores_the_last_adapter_is_kept(encoder, corpus):
    def fitted(*scores):
        given = iter([0.0, *scores])  # the first is of the start
        clf = make_classifier(encoder, early_stopping=True, scoring=lambda est, X, y: next(given))
        return clf.set_params(num_train_epochs=9).fit(*corpus)

    equal = fitted(0.7, 0.7, 0.7)
    assert equal.validation_scores_ == [0.7] * 3
    assert_equal_adapters(equal, fitted(0.5, 0.6, 0.7, 0.1, 0.1))


@pytest.mark.parametrize(
    ("counts", "fraction"), [([60, 39, 1], 0.1), ([100, 50, 2], 0.8), ([5, 5], 0.8), ([9, 1], 0.3)]
)
def test_every_class_keeps_a_text_for_training(counts, fraction):
    labels = np.repeat(["a", "b", "c"][: len(counts)], counts)
    inputs = CheckedTexts.of(read_table([str(i) for i in range(len(labels))]))
    table = check_labelled_texts(inputs, labels)
    training, held_out = hold_out(table, fraction, seed=0)
    assert sorted([*training.texts, *held_out.texts]) == sorted(table.texts)
    assert set(training.y) == set(labels)
    assert len(held_out) == pytest.approx(fraction * len(labels), abs=1)
    share = np.mean(held_out.y == "a")
    assert share == pytest.approx(counts[0] / len(labels), abs=0.15)


def test_validation_is_of_the_same_kind_as_the_training(encoder, texts, indicator):
    numbers = np.arange(48) % 2
    for y, y_val in [(numbers, indicator), (indicator, numbers)]:
        with pytest.raises(ValueError, match="Wanted: both of one kind"):
            make_classifier(encoder, early_stopping=True).fit(texts, y, X_val=texts, y_val=y_val)


@pytest.mark.parametrize(
    ("scoring", "error", "message"),
    [
        (lambda est, X, y: 0.5, TypeError, "takes no sample_weight"),
        (lambda est, X, y, sample_weight: {"f1": 0.5}, ValueError, "Got the score {'f1': 0.5}"),
        (lambda est, X, y, sample_weight: float("nan"), ValueError, "Got the score nan"),
        ("f1", ValueError, "scoring='f1' of early stopping failed on .*(average|pos_label)"),
    ],
)
def test_what_is_wrong_with_a_scorer_shows_before_the_training(
    encoder, corpus, monkeypatch, scoring, error, message
):
    def train(*_):
        raise AssertionError("trained")

    monkeypatch.setattr("skqlora.training.trainer.Trainer.train_epoch", train)
    clf = make_classifier(encoder, early_stopping=True, scoring=scoring)
    with pytest.raises(error, match=message):
        clf.fit(*corpus, sample_weight=np.arange(48))


@pytest.mark.parametrize("scoring", [None, "loss", "f1_macro"])
def test_multilabel_targets_stop_early(encoder, texts, indicator, scoring):
    clf = make_classifier(encoder, early_stopping=True, scoring=scoring, num_train_epochs=8)
    clf.fit(texts, indicator, X_val=texts[:12], y_val=indicator[:12])
    assert clf.best_validation_score_ == max(clf.validation_scores_)
    if scoring == "loss":
        held_out = clf.predict_log_proba(texts[:12]), clf.decision_function(texts[:12])
        present, absent = held_out[0], held_out[0] - held_out[1]
        expected = np.where(indicator[:12], present, absent).mean()
        assert clf.best_validation_score_ == pytest.approx(expected, abs=1e-6)


def test_score_is_that_of_the_kept_adapter(encoder, texts, labels):
    weights = np.linspace(0.1, 3, 12)
    for scoring in ("loss", "accuracy"):
        clf = make_classifier(encoder, early_stopping=True, scoring=scoring)
        clf.fit(texts, labels, X_val=texts[:12], y_val=labels[:12], sample_weight_val=weights)
        if scoring == "loss":
            classes = np.searchsorted(clf.classes_, labels[:12])
            log_proba = clf.predict_log_proba(texts[:12])[np.arange(12), classes]
            expected = np.average(log_proba, weights=weights)
        else:
            expected = clf.score(texts[:12], labels[:12], sample_weight=weights)
        assert clf.best_validation_score_ == pytest.approx(expected, abs=1e-6)
