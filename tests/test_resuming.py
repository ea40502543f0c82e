"""Fits that continue an earlier one: `warm_start`, `partial_fit`."""

import numpy as np
import pytest
from helpers import assert_equal_adapters, make_classifier, trained_values


def test_warm_start_goes_on_from_the_adapter(encoder, corpus):
    texts, labels = corpus
    clf = make_classifier(encoder, warm_start=True, num_train_epochs=2).fit(texts, labels)
    before = clf.loss_curve_[-1]
    clf.set_params(learning_rate=1e-12, head_learning_rate=1e-12).fit(texts, labels)
    assert clf.n_iter_ == len(clf.loss_curve_) == 4
    assert clf.loss_curve_[2] == pytest.approx(clf.loss_curve_[3], abs=0.05)
    assert clf.loss_curve_[2] < before
    with pytest.raises(ValueError, match="Wanted: the same classes"):
        clf.fit(texts, ["x", "y"] * 24)
    with pytest.raises(ValueError, match="the fitted adapter to continue from has"):
        clf.set_params(lora_r=2).fit(texts, labels)


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw"])
def test_pieces_learn_what_the_whole_does_and_the_optimizer_goes_on(model, corpus, optim):
    texts, labels = corpus
    # One batch a piece: two pieces are two updates of one constant schedule.
    settings = {"batch_size": 24, "lora_dropout": 0.0, "optim": optim, "warmup_steps": 0}
    pieces = make_classifier(model, **settings)
    half = [slice(0, 24), slice(24, 48)] * 2
    for piece in half:
        pieces.partial_fit(texts[piece], labels[piece], classes=["animal", "colour", "number"])
    assert pieces.optimizer_state_.n_updates == pieces.n_iter_ == 4
    fresh = make_classifier(model, **settings)
    for piece in half:
        fresh.optimizer_state_ = None  # forgets its moments
        fresh.partial_fit(texts[piece], labels[piece], classes=["animal", "colour", "number"])
    assert np.abs(trained_values(pieces) - trained_values(fresh)).max() > 1e-3
    for _ in range(30):
        pieces.partial_fit(texts, labels)
    assert pieces.score(texts, labels) > 0.9


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw"])
def test_pieces_of_the_whole_are_epochs_of_a_fit(model, corpus, optim):
    recipe = {"batch_size": 48, "lora_dropout": 0.0, "optim": optim, "warmup_steps": 0}
    whole = make_classifier(model, lr_scheduler_type="constant", **recipe).fit(*corpus)
    pieces = make_classifier(model, **recipe)
    for _ in range(3):
        pieces.partial_fit(*corpus, classes=["animal", "colour", "number"])
    np.testing.assert_allclose(pieces.loss_curve_, whole.loss_curve_, rtol=1e-5)
    np.testing.assert_allclose(trained_values(pieces), trained_values(whole), rtol=0, atol=1e-4)


def test_pieces_weigh_what_they_are_told(clf, texts, labels):
    clf.set_params(optim="adamw")
    for piece in range(2):
        rows = slice(24 * piece, 24 * (piece + 1))
        clf.partial_fit(
            texts[rows], labels[rows], classes=labels, sample_weight=[[1, 1e-9][piece]] * 24
        )
        if piece == 0:
            moments = [state["exp_avg"].copy() for state in _states(clf)]
    # The gradient of the second piece is nothing beside that of the first.
    for before, after in zip(moments, _states(clf), strict=True):
        np.testing.assert_allclose(after["exp_avg"], 0.9**2 * before, rtol=0, atol=1e-6)


def test_pieces_of_a_multilabel_table(encoder, texts, indicator):
    clf = make_classifier(encoder, batch_size=4, lora_dropout=0.0)
    for _ in range(25):
        clf.partial_fit(texts, indicator, classes=[0, 1])
    assert clf.multilabel_
    assert clf.score(texts, indicator) > 0.9
    with pytest.raises(ValueError, match="one for each text"):
        clf.partial_fit(texts, indicator[:, 0])


def test_fit_and_pieces_follow_each_other(clf, corpus):
    clf.fit(*corpus).partial_fit(*corpus)
    assert clf.n_iter_ == len(clf.loss_curve_) == 3
    assert clf.loss_curve_[2] < clf.loss_curve_[0]
    fresh = make_classifier(clf.model, num_train_epochs=2).fit(*corpus)
    assert_equal_adapters(clf.fit(*corpus), fresh)
    assert clf.optimizer_state_ is None


def test_warm_start_keeps_the_better_adapter(encoder, texts, labels):
    held_out = {"X_val": texts[:12], "y_val": labels[:12]}
    clf = make_classifier(
        encoder, warm_start=True, early_stopping=True, scoring="loss", num_train_epochs=4
    )
    good = clf.fit(texts, labels, **held_out).predict_proba(texts)
    best = clf.best_validation_score_
    clf.set_params(learning_rate=0.5, n_iter_no_change=1).fit(texts, labels, **held_out)
    assert clf.best_validation_score_ == pytest.approx(best)
    np.testing.assert_array_equal(clf.predict_proba(texts), good)
    assert len(clf.validation_scores_) == clf.n_iter_ == 5


def test_scores_of_epochs_that_had_none_are_nan(encoder, corpus):
    clf = make_classifier(encoder, warm_start=True, num_train_epochs=1).fit(*corpus)
    clf.set_params(early_stopping=True).fit(*corpus)
    assert np.isnan(clf.validation_scores_).tolist() == [True, False]


def test_warm_start_holds_the_same_texts_out_and_trains_in_another_order(encoder, corpus):
    seen = []
    clf = make_classifier(
        encoder,
        warm_start=True,
        early_stopping=True,
        random_state=None,
        num_train_epochs=1,
        scoring=lambda est, X, y: seen.append(tuple(X)) or 1.0,
    )
    clf.fit(*corpus).fit(*corpus)
    assert len(set(seen)) == 1


def test_partial_fit_says_what_it_needs(clf, corpus):
    texts, labels = corpus
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        clf.partial_fit(texts, labels)
    with pytest.raises(ValueError, match=r"not among the classes.*colour"):
        clf.partial_fit(texts, labels, classes=["animal", "number"])
    assert not hasattr(clf, "classes_")
    clf.partial_fit(texts[:1], labels[:1], classes=sorted(set(labels)))
    with pytest.raises(ValueError, match="those before are"):
        clf.partial_fit(texts, labels, classes=["animal", "number"])
    with pytest.raises(ValueError, match=r"Got classes=\[\]"):
        make_classifier(clf.model).partial_fit(texts, labels, classes=[])
    for params in ({"early_stopping": True}, {"class_weight": "balanced"}):
        with pytest.raises(ValueError, match="partial_fit does not support"):
            make_classifier(clf.model, **params).partial_fit(texts, labels, classes=labels)


def _states(clf):
    return [state for state in clf.optimizer_state_.states if state]
