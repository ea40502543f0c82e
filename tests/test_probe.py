"""A head that starts as a logistic regression."""

import numpy as np
import pytest
from helpers import make_classifier, trained_values
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from skqlora.training import probe
from skqlora.training.probe import choose_probe_rows, fit_probe


@pytest.fixture
def features():
    rng = np.random.RandomState(0)
    targets = np.arange(90) % 3
    centres = 10 * rng.normal(size=(3, 6))
    scales = np.array([1, 10, 0.1, 1, 1, 0])  # one of them says nothing
    return ((centres[targets] + rng.normal(size=(90, 6))) * scales).astype(np.float32), targets


@pytest.fixture
def weakly_regularised(monkeypatch):
    """Let few texts decide alone."""
    monkeypatch.setattr(probe, "PROBE_C", 10)


def logits(features, head):
    return features @ head["weight"].T + head.get("bias", 0)


def test_probe_is_a_regression_on_scaled_features(features):
    x, y = features
    weights = np.linspace(0.5, 1.5, 90)
    scaled = StandardScaler().fit_transform(x)
    expected = LogisticRegression(C=probe.PROBE_C).fit(scaled, y, weights)
    head = fit_probe(x, y, weights, 3, bias=True)
    assert head["weight"].dtype == head["bias"].dtype == np.float32
    np.testing.assert_allclose(logits(x, head), expected.decision_function(scaled), atol=1e-3)


def test_probe_without_bias_has_none_and_tells_classes_apart(features, weakly_regularised):
    x, y = features
    head = fit_probe(x, y, np.ones(90), 3, bias=False)
    assert set(head) == {"weight"}
    assert (logits(x, head).argmax(axis=1) == y).mean() > 0.9


def test_two_classes_share_one_regression(features):
    x, y = (part[features[1] < 2] for part in features)
    values = logits(x, fit_probe(x, y, np.ones(60), 2, bias=True))
    np.testing.assert_allclose(values[:, 0], -values[:, 1], atol=1e-5)
    assert (values.argmax(axis=1) == y).all()


def test_each_label_has_its_own_regression(features, weakly_regularised):
    x, y = features
    targets = np.column_stack([y == 0, y < 2, np.zeros(90), np.ones(90)]).astype(int)
    weights = np.ones((90, 4))
    values = logits(x, fit_probe(x, targets, weights, 4, bias=True))
    assert ((values[:, :2] > 0) == targets[:, :2]).all()
    np.testing.assert_array_equal(values[:, 2:], 0)  # nothing to learn of them


def test_rows_are_all_or_some_with_each_class(monkeypatch):
    targets = np.array([0] * 95 + [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(choose_probe_rows(targets, seed=0), np.arange(100))
    monkeypatch.setattr(probe, "PROBE_TEXTS", 10)
    rows = choose_probe_rows(targets, seed=0)
    assert len(rows) == len(set(rows)) == 10
    assert set(targets[rows]) == set(range(6))
    assert len(choose_probe_rows(targets[:, None] == np.arange(2), seed=0)) == 10


@pytest.mark.parametrize("params", [{}, {"layers": 1}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_training_starts_where_frozen_features_end(family, params, corpus, request):
    model = request.getfixturevalue(family)
    hardly = {"num_train_epochs": 2, "learning_rate": 1e-9, "head_learning_rate": 1e-9}
    clf = make_classifier(model, init_head_weights="probe", **hardly, **params).fit(*corpus)
    assert clf.score(*corpus) > 0.9
    blind = make_classifier(model, init_head_weights="normal", **hardly, **params).fit(*corpus)
    assert blind.score(*corpus) < 0.8


def test_probe_of_several_labels(encoder, corpus, weakly_regularised):
    texts, labels = corpus
    y = (np.array(labels)[:, None] == np.unique(labels)).astype(int)
    hardly = {"num_train_epochs": 1, "learning_rate": 1e-9, "head_learning_rate": 1e-9}
    clf = make_classifier(encoder, init_head_weights="probe", **hardly).fit(texts, y)
    assert (clf.predict(texts) == y).mean() > 0.85


def test_same_seed_gives_the_same_weights(encoder, corpus):
    def values():
        clf = make_classifier(encoder, num_train_epochs=1, init_head_weights="probe")
        return trained_values(clf.fit(*corpus))

    np.testing.assert_array_equal(values(), values())


def test_going_on_does_not_start_the_head_again(encoder, corpus):
    clf = make_classifier(encoder, num_train_epochs=2, init_head_weights="probe").fit(*corpus)
    hardly = {"num_train_epochs": 1, "learning_rate": 1e-9, "head_learning_rate": 1e-9}
    before = clf.adapter_.head_tensors["weight"]
    clf.set_params(warm_start=True, **hardly).fit(*corpus)
    np.testing.assert_allclose(clf.adapter_.head_tensors["weight"], before, atol=1e-6)
