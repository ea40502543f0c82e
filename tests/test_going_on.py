"""Fits that go on from an earlier one: `warm_start`, `partial_fit`."""

import numpy as np
import pytest
from helpers import make_classifier, trained_values


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
    with pytest.raises(ValueError, match="the fitted adapter to go on from has"):
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
    for params in ({"early_stopping": True}, {"class_weight": "balanced"}):
        with pytest.raises(ValueError, match="partial_fit does not support"):
            make_classifier(clf.model, **params).partial_fit(texts, labels, classes=labels)
