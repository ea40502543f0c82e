"""What texts, classes and labels count in the loss; bad weights are refused early."""

import numpy as np
import pytest
from helpers import assert_equal_adapters, make_classifier, trained_values
from sklearn.model_selection import cross_val_score

from skqlora import QLoRAClassifier


def test_weight_of_two_is_the_row_twice_and_of_zero_no_row(model, corpus):
    texts, labels = corpus
    weights = np.arange(48) // 3 % 3
    repeated = [i for i in range(48) for _ in range(weights[i])]
    one_batch = {"batch_size": 64, "lora_dropout": 0.0, "optim": "adamw", "num_train_epochs": 1}
    weighted = make_classifier(model, **one_batch).fit(texts, labels, sample_weight=weights)
    twice = make_classifier(model, **one_batch)
    twice.fit([texts[i] for i in repeated], [labels[i] for i in repeated])
    np.testing.assert_allclose(weighted.loss_curve_, twice.loss_curve_, rtol=1e-5)
    np.testing.assert_allclose(trained_values(weighted), trained_values(twice), rtol=0, atol=1e-4)


def test_equal_weights_change_nothing(encoder, corpus):
    plain = make_classifier(encoder).fit(*corpus)
    assert_equal_adapters(plain, make_classifier(encoder).fit(*corpus, sample_weight=[3.0] * 48))


def test_class_weight_moves_the_predictions(encoder, texts):
    labels = np.array(["0", "1"])[(np.arange(48) % 8 == 0).astype(int)]
    share = {
        key: make_classifier(encoder, class_weight=weight, lora_dropout=0.0)
        .fit(texts, labels)
        .predict_proba(texts)[:, 1]
        .mean()
        for key, weight in [("none", None), ("balanced", "balanced"), ("dict", {"0": 1, "1": 7})]
    }
    assert share["none"] < share["balanced"] - 0.1
    assert share["dict"] == pytest.approx(share["balanced"], abs=1e-3)


@pytest.mark.parametrize(
    ("fit", "params", "message"),
    [
        ({"sample_weight": [1.0, -1.0]}, {}, r"sample_weight\[1\] = -1.0.*negative"),
        ({"sample_weight": [1.0, np.nan]}, {}, r"sample_weight\[1\] = nan"),
        ({"sample_weight": [0, 0]}, {}, "zeros only"),
        ({"sample_weight": [1]}, {}, r"shape \(1,\)"),
        ({"sample_weight": ["a", "b"]}, {}, "not all numbers"),
        ({"sample_weight": [1, 0]}, {}, r"leave only the classes \['a'\]"),
        ({}, {"class_weight": {"c": 2}}, r"class_weight for \['c'\].*same type: \['a', 'b'\]"),
        ({}, {"scoring": "best"}, "scoring='best', which is no scorer"),
        ({}, {"class_weight": {"a": -2}}, "weight -2 in class_weight"),
        ({}, {"class_weight": [{0: 1}]}, "list as class_weight"),
        ({"sample_weight_val": [1]}, {}, "sample_weight_val without X_val and y_val"),
        ({"X_val": ["a"]}, {}, "X_val without y_val"),
        ({"X_val": ["a"], "y_val": ["a"]}, {}, "early_stopping=False"),
        ({"X_val": ["a"], "y_val": ["c"]}, {"early_stopping": True}, "y_val that are not among"),
        ({"X_val": ["a"], "y_val": [None]}, {"early_stopping": True}, r"y_val\[0\] = None"),
        ({"X_val": ["a", "b"], "y_val": ["a"]}, {"early_stopping": True}, "2 texts in X_val"),
        (
            {"X_val": ["a"], "y_val": ["a"], "sample_weight_val": [-1]},
            {"early_stopping": True},
            r"sample_weight_val\[0\] = -1",
        ),
        ({}, {"early_stopping": True}, "too few, on one side"),
        (
            {"X_val": ["a"], "y_val": ["a"]},
            {"early_stopping": True, "scoring": "best"},
            "scoring='best', which is no scorer",
        ),
    ],
)
def test_bad_weights_and_validation_are_refused(encoder, monkeypatch, fit, params, message):
    def load(*_, **__):
        raise AssertionError("a base was loaded")

    monkeypatch.setattr("skqlora.model.backbone.Backbone.load", load)
    with pytest.raises(ValueError, match=message):
        make_classifier(encoder, **params).fit(["one", "two"], ["a", "b"], **fit)


def test_weights_multiply(encoder, texts, labels):
    weights = np.linspace(0.2, 3, 48)
    both = make_classifier(encoder, class_weight={"colour": 4})
    both.fit(texts, labels, sample_weight=weights)
    product = weights * np.where(labels == "colour", 4, 1)
    alone = make_classifier(encoder).fit(texts, labels, sample_weight=product)
    assert_equal_adapters(both, alone)


def test_weights_count_across_updates_and_not_across_micro_batches(encoder, corpus):
    weighted = {"class_weight": {"animal": 30}, "optim": "adamw", "max_grad_norm": None}
    whole = make_classifier(encoder, **weighted).fit(*corpus)
    parts = make_classifier(encoder, batch_size=2, gradient_accumulation_steps=8, **weighted)
    np.testing.assert_allclose(
        trained_values(parts.fit(*corpus)), trained_values(whole), rtol=0, atol=1e-5
    )
    # With one text an update, a weight still makes that update count more.
    single = {"batch_size": 1, "optim": "adamw", "max_grad_norm": None, "num_train_epochs": 1}
    shares = [
        make_classifier(encoder, class_weight=weight, **single)
        .fit(*corpus)
        .predict_proba(corpus[0])[:, 0]
        .mean()
        for weight in (None, {"animal": 30})
    ]
    assert shares[1] > shares[0] + 0.1


@pytest.mark.parametrize("entries", [[5.0, 1.0], ["balanced", "balanced"]])
def test_class_weights_of_labels_are_dicts(clf, texts, indicator, entries):
    with pytest.raises(ValueError, match="a list of 2 dicts"):
        clf.set_params(class_weight=entries).fit(texts, indicator)


def test_cross_val_score_shows_our_message(clf, texts, labels):
    texts[5] = None
    with pytest.raises(TypeError, match="of type NoneType"):
        cross_val_score(clf, texts, labels, cv=2, error_score="raise")


@pytest.mark.parametrize("scale", [1e-310, 1e-10, 1e39, 1e307])
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_only_the_ratios_of_weights_matter(encoder, corpus, method, scale):
    texts, labels = corpus
    weights = np.arange(1.0, 49) / 48
    trained = []
    for factor in (1.0, scale):
        clf = make_classifier(encoder, num_train_epochs=2)
        for _ in range(1 if method == "fit" else 3):
            classes = {} if method == "fit" else {"classes": np.unique(labels)}
            getattr(clf, method)(texts, labels, sample_weight=weights * factor, **classes)
        trained.append(trained_values(clf))
    np.testing.assert_allclose(*trained, rtol=1e-3, atol=1e-5)


def test_later_pieces_weigh_as_much_as_the_first(encoder, corpus, tmp_path):
    texts, labels = corpus
    classes = np.unique(labels)
    small, plain = make_classifier(encoder), make_classifier(encoder)
    for piece, rows in enumerate([slice(24), slice(24, 48)]):
        weights = np.full(24, piece + 1.0)
        plain.partial_fit(texts[rows], labels[rows], classes, weights)
        small.partial_fit(texts[rows], labels[rows], classes, 2.0**-40 * weights)
        small.save(tmp_path / str(piece))
        small = QLoRAClassifier.load(tmp_path / str(piece))
    assert_equal_adapters(small, plain)


def test_large_weights_of_the_validation(encoder, corpus):
    texts, labels = corpus
    scores = []
    for weight in (1.0, 1e308):
        clf = make_classifier(encoder, early_stopping=True, num_train_epochs=1)
        held_out = {"X_val": texts[:12], "y_val": labels[:12]}
        held_out["sample_weight_val"] = weight * np.ones(12)
        scores.append(clf.fit(texts, labels, **held_out).best_validation_score_)
    assert scores[0] == scores[1]


@pytest.mark.parametrize("class_weight", ["balanced", None, {"animal": 1e300}])
def test_weights_near_the_greatest_float(encoder, corpus, class_weight):
    clf = make_classifier(encoder, class_weight=class_weight, num_train_epochs=1)
    weights = np.full(48, 1e308)
    if class_weight in ("balanced", None):
        clf.fit(*corpus, sample_weight=weights)
    else:
        with pytest.raises(ValueError, match="too large for float64"):
            clf.fit(*corpus, sample_weight=weights)


@pytest.mark.parametrize(("first", "later"), [(1.0, 1e30), (1e300, 1e-300), (1e-300, 1.0)])
def test_pieces_whose_weights_have_another_scale_are_refused(encoder, corpus, first, later):
    texts, labels = corpus
    clf = make_classifier(encoder)
    clf.partial_fit(texts, labels, np.unique(labels), np.full(48, first))
    before = trained_values(clf)
    with pytest.raises(ValueError, match=r"Wanted: weights of one scale in all calls\."):
        clf.partial_fit(texts, labels, sample_weight=np.full(48, later))
    np.testing.assert_array_equal(trained_values(clf), before)


def test_integers_beyond_floats_as_weights_are_refused(encoder, corpus):
    with pytest.raises(ValueError, match="sample_weight that is not all numbers"):
        make_classifier(encoder).fit(*corpus, sample_weight=[10**400] * 48)
    with pytest.raises(ValueError, match="in class_weight"):
        make_classifier(encoder, class_weight={"animal": 10**400}).fit(*corpus)
