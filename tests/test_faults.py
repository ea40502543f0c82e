"""What goes wrong in the middle of a fit leaves something whole behind."""

import numpy as np
import pytest
from helpers import assert_equal_adapters, digest_of_base, make_backbone, make_classifier

from skqlora.training import Trainer


def spoil_update(monkeypatch, number):
    """Let the n-th update of a training make a weight infinite."""
    apply = Trainer._apply

    def spoiling(self):
        apply(self)
        if self.n_updates + 1 == number:
            self.segments[-1].leaf.data.fill_(float("inf"))

    monkeypatch.setattr(Trainer, "_apply", spoiling)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_divergence_keeps_the_last_epoch_before(encoder, corpus, monkeypatch, early_stopping):
    held_out = {"X_val": corpus[0][:9], "y_val": corpus[1][:9]} if early_stopping else {}
    params = {
        "early_stopping": early_stopping,
        "scoring": "loss",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    expected = make_classifier(encoder, num_train_epochs=2, **params).fit(*corpus, **held_out)
    clf = make_classifier(encoder, num_train_epochs=6, **params)
    spoil_update(monkeypatch, 7)  # three updates an epoch: the first of the third
    with pytest.raises(FloatingPointError, match=r"in update 8 \(epoch 3\)"):
        clf.fit(*corpus, **held_out)
    assert clf.n_iter_ == 2
    assert clf.loss_curve_ == expected.loss_curve_
    assert clf.validation_scores_ == expected.validation_scores_
    assert_equal_adapters(clf, expected)


def test_divergence_in_the_first_epoch_leaves_an_older_fit(encoder, corpus, monkeypatch):
    clf = make_classifier(encoder, batch_size=1).fit(*corpus)
    before = clf.adapter_
    spoil_update(monkeypatch, 3)
    trained = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, rows: trained.append(1) or step(self, rows))
    texts, labels = corpus[0] * 10, corpus[1] * 10
    with pytest.raises(FloatingPointError, match=r"in update 4 \(epoch 1\)"):
        clf.fit(texts, labels)
    assert clf.adapter_ is before
    assert len(trained) == 50  # of 480: it is not noticed at once, but soon


def test_an_interrupted_fit_leaves_the_base_and_an_older_fit_alone(model, corpus, monkeypatch):
    clf = make_classifier(model).fit(*corpus)
    expected, base = clf.predict_proba(corpus[0]), make_backbone(model).module
    before = digest_of_base(base)
    step = Trainer.step

    def interrupt(self, rows):
        if self.n_updates == 4:
            raise KeyboardInterrupt
        return step(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            clf.fit(*corpus)
    assert digest_of_base(base) == before
    np.testing.assert_array_equal(clf.predict_proba(corpus[0]), expected)
    assert_equal_adapters(make_classifier(model).fit(*corpus), clf)
